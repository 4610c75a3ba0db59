"""Write a small speaker encoder as `campplus.onnx`: the released file's input and output, far fewer weights.

`export_speaker_encoder` writes a trained network. `build_speaker_encoder` needs no training: a random convolution, the
mean and the standard deviation of its channels over time, and a random rotation of those statistics, scaled by what
they are on the demo corpus; voices differ in the statistics.
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
from speaker_net import DILATIONS, EMBEDDING_SIZE, FBANK_BINS, FIRST_KERNEL, KERNEL, VARIANCE_FLOOR, SpeakerNet
from torch import Tensor, nn

CHANNELS = 256  # of the random convolution
KERNEL_FRAMES = 5


def export_speaker_encoder(net: SpeakerNet) -> onnx.ModelProto:
    """Write a trained network, its batch normalisations folded into the layers before them.

    Args:
        net: as training left it; its running statistics are used.

    Returns:
        the ONNX model: `input` (B, T, 80) float32 -> `output` (B, 192) float32.
    """
    graph = GraphBuilder("campplus")
    x = graph.node("/Transpose", "Transpose", ["input"], perm=[0, 2, 1])
    x = _convolve(graph, "/first", x, net.first, net.first_norm, kernel=FIRST_KERNEL)
    outputs = [x]
    for number, dilation in enumerate(DILATIONS):
        name = f"/blocks.{number}"
        y = _convolve(graph, name, x, net.blocks[number], net.block_norms[number], kernel=KERNEL, dilation=dilation)
        x = graph.node(f"{name}/Add", "Add", [x, y])
        outputs.append(x)
    joined = graph.node("/Concat", "Concat", outputs, axis=1)
    pooled = _pool_graph(graph, _convolve(graph, "/join", joined, net.join, net.join_norm))
    weight, bias = _fold(net.head, net.head_norm)
    return _finish(graph, pooled, weight, bias)


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
    return _finish(graph, _pool_graph(graph, x), weight, offset)


def _convolve(
    graph: GraphBuilder, name: str, x: str, conv: nn.Conv1d, norm: nn.BatchNorm1d, kernel: int = 1, dilation: int = 1
) -> str:
    """Add convolution, batch normalisation and ReLU as two nodes; the length over time is kept."""
    weight, bias = _fold(conv, norm)
    weights = [graph.weight(f"{name[1:]}.weight", weight.numpy()), graph.weight(f"{name[1:]}.bias", bias.numpy())]
    padding = [dilation * (kernel // 2)] * 2
    shape = {"kernel_shape": [kernel], "pads": padding, "dilations": [dilation], "strides": [1]}
    return graph.node(f"{name}/Relu", "Relu", [graph.node(f"{name}/Conv", "Conv", [x, *weights], **shape)])


def _fold(layer: nn.Conv1d | nn.Linear, norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that does what `layer` and `norm` do together in eval mode."""
    assert norm.running_mean is not None and norm.running_var is not None, "a batch normalisation without statistics"
    assert layer.bias is not None, "a layer without a bias"
    factor = (norm.running_var + norm.eps).rsqrt() * (norm.weight if norm.affine else 1.0)
    bias = factor * (layer.bias - norm.running_mean) + (norm.bias if norm.affine else 0.0)
    weight = layer.weight * factor.view(-1, *[1] * (layer.weight.dim() - 1))
    return weight.detach(), bias.detach()


def _pool_graph(graph: GraphBuilder, x: str) -> str:
    """Add the mean and the standard deviation over time of channels [B, C, T]; [B, 2 C]."""
    mean = graph.node("/pool/ReduceMean", "ReduceMean", [x], axes=[-1])
    centred = graph.node("/pool/Sub", "Sub", [x, mean])
    square = graph.node("/pool/Mul", "Mul", [centred, centred])
    variance = graph.node("/pool/ReduceMean_1", "ReduceMean", [square], axes=[-1], keepdims=0)
    floor = graph.constant("/pool/Constant", VARIANCE_FLOOR)
    deviation = graph.node("/pool/Sqrt", "Sqrt", [graph.node("/pool/Add", "Add", [variance, floor])])
    last_axis = graph.constant("/pool/Constant_1", [-1])
    mean = graph.node("/pool/Squeeze", "Squeeze", [mean, last_axis])
    return graph.node("/pool/Concat", "Concat", [mean, deviation], axis=-1)


def _finish(graph: GraphBuilder, pooled: str, weight: Tensor, bias: Tensor) -> onnx.ModelProto:
    """Add the last linear layer, weight [out, in], and close the graph."""
    product = graph.node("/head/MatMul", "MatMul", [pooled, graph.weight("head.weight", weight.T.numpy())])
    graph.node("/head/Add", "Add", [product, graph.weight("head.bias", bias.numpy())], output="output")
    return graph.model(
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["B", "T", FBANK_BINS])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["B", EMBEDDING_SIZE])],
    )


def _pool(fbank: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Mean and deviation over time of the convolution's channels, [2 C]."""
    x = F.relu(F.conv1d(fbank.T[None], kernel, bias, padding=KERNEL_FRAMES // 2))[0]
    return torch.cat([x.mean(dim=1), (x.var(dim=1, correction=0) + VARIANCE_FLOOR).sqrt()])
