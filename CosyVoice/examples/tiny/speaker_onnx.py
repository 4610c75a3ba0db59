"""Make a small stand-in for the released `campplus.onnx`: same input, same output, far fewer weights.

A random convolution, the mean and the standard deviation of its channels over time, and a random rotation of those
statistics, scaled by what they are on the demo corpus. Nothing is trained; voices differ in the statistics.
"""

# T fbank frames, 100 Hz   C channels

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from onnx_graph import GraphBuilder
from torch import Tensor

FBANK_BINS = 80
CHANNELS = 256
KERNEL_FRAMES = 5
EMBEDDING_SIZE = 192
VARIANCE_FLOOR = 1e-6


def build_speaker_encoder(fbanks: Sequence[Tensor], seed: int) -> onnx.ModelProto:
    """Build the speaker encoder.

    Args:
        fbanks: mean-subtracted filterbanks [T, 80] of recordings by several speakers.
        seed: of all random numbers.

    Returns:
        the ONNX model: `input` (B, T, 80) float32 -> `output` (B, 192) float32.
    """
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(CHANNELS, FBANK_BINS, KERNEL_FRAMES, generator=generator)
    kernel /= math.sqrt(FBANK_BINS * KERNEL_FRAMES)
    bias = torch.randn(CHANNELS, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(2 * CHANNELS, EMBEDDING_SIZE, generator=generator))

    statistics = torch.stack([_pool(fbank, kernel, bias) for fbank in fbanks])
    weight = rotation.T / statistics.std(dim=0)
    offset = -weight @ statistics.mean(dim=0)

    graph = GraphBuilder("campplus")
    x = graph.node("/Transpose", "Transpose", ["input"], perm=[0, 2, 1])
    weights = [graph.weight("conv.weight", kernel.numpy()), graph.weight("conv.bias", bias.numpy())]
    padding = [KERNEL_FRAMES // 2] * 2
    x = graph.node("/conv/Conv", "Conv", [x, *weights], kernel_shape=[KERNEL_FRAMES], pads=padding, strides=[1])
    x = graph.node("/conv/Relu", "Relu", [x])
    mean = graph.node("/pool/ReduceMean", "ReduceMean", [x], axes=[-1])
    centred = graph.node("/pool/Sub", "Sub", [x, mean])
    square = graph.node("/pool/Mul", "Mul", [centred, centred])
    variance = graph.node("/pool/ReduceMean_1", "ReduceMean", [square], axes=[-1], keepdims=0)
    floor = graph.constant("/pool/Constant", VARIANCE_FLOOR)
    deviation = graph.node("/pool/Sqrt", "Sqrt", [graph.node("/pool/Add", "Add", [variance, floor])])
    last_axis = graph.constant("/pool/Constant_1", [-1])
    mean = graph.node("/pool/Squeeze", "Squeeze", [mean, last_axis])
    pooled = graph.node("/pool/Concat", "Concat", [mean, deviation], axis=-1)
    product = graph.node("/head/MatMul", "MatMul", [pooled, graph.weight("head.weight", weight.T.numpy())])
    graph.node("/head/Add", "Add", [product, graph.weight("head.bias", offset.numpy())], output="output")
    return graph.model(
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["B", "T", FBANK_BINS])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["B", EMBEDDING_SIZE])],
    )


def _pool(fbank: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Mean and deviation over time of the convolution's channels, [2 C]."""
    x = F.relu(F.conv1d(fbank.T[None], kernel, bias, padding=KERNEL_FRAMES // 2))[0]
    return torch.cat([x.mean(dim=1), (x.var(dim=1, correction=0) + VARIANCE_FLOOR).sqrt()])
