"""Write an S3 tokenizer's weights as the graph of the released `speech_tokenizer_v1.onnx`.

The graph's contract, as CosyVoice's frontend and s3tokenizer use it: input 0 is a Whisper log-mel (1, 128, T) float32,
input 1 its length (1,) int32, the output holds ceil(T / 2) unit ids. s3tokenizer (utils.py, `onnx2torch`) finds the
weights by these names: the convolutions and the positions by the initializer, everything else by the node.
"""

# T mel frames, 100 Hz   S S3 units, 50 Hz   D channels   H heads   K codes

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx_graph import GraphBuilder
from torch import Tensor

CONVOLUTION_WEIGHTS = {  # by the released file's initializer names
    "conv1": ("onnx::Conv_1519", "onnx::Conv_1520"),
    "conv2": ("onnx::Conv_1521", "onnx::Conv_1522"),
}
POSITIONS = "encoders.positional_embedding"
QUANTIZER = "/quantizer/rq/model/layers.0"
MASKED = -1.0e10  # added to the attention score of a position past the end, as s3tokenizer does


def build_speech_tokenizer(state_dict: Mapping[str, Tensor], num_heads: int) -> onnx.ModelProto:
    """Build the ONNX model that computes what `s3tokenizer.S3Tokenizer` with these weights computes.

    Args:
        state_dict: of an `S3Tokenizer("speech_tokenizer_v1", ...)`: 128 mel bins, any width, depth, number of codes.
        num_heads: attention heads, which the weights do not tell.

    Returns:
        the model, checked by onnx.
    """
    weights = {key: tensor.detach().float().numpy() for key, tensor in state_dict.items()}
    num_mels = weights["encoder.conv1.weight"].shape[1]
    num_layers = len({key.split(".")[2] for key in weights if key.startswith("encoder.blocks.")})

    graph = GraphBuilder("speech_tokenizer_v1")
    feats = helper.make_tensor_value_info("feats", TensorProto.FLOAT, [1, num_mels, "T"])
    feats_length = helper.make_tensor_value_info("feats_length", TensorProto.INT32, [1])
    indices = helper.make_tensor_value_info("indices", TensorProto.INT64, [1, "S"])

    hidden, score_bias = _front(graph, weights)
    for layer in range(num_layers):
        hidden = _block(graph, weights, f"/blocks.{layer}", hidden, score_bias, num_heads)
    _quantize(graph, weights["quantizer._codebook.embed"], hidden)
    return graph.model([feats, feats_length], [indices])


def _front(graph: GraphBuilder, weights: Mapping[str, np.ndarray]) -> tuple[str, str]:
    """Add convolutions and positions; returns hidden states [1, S, D] and the attention's bias [1, 1, 1, S]."""
    length = graph.node("/Cast", "Cast", ["feats_length"], to=TensorProto.INT64)
    x = "feats"
    for name, stride in (("conv1", 1), ("conv2", 2)):
        frames = graph.dimension(f"/{name}/size", x, 2)
        mask = graph.valid_mask(f"/{name}/mask", frames, length)
        x = graph.node(f"/{name}/Mul", "Mul", [x, mask])
        kernel_name, bias_name = CONVOLUTION_WEIGHTS[name]
        kernel = graph.weight(kernel_name, weights[f"encoder.{name}.weight"])
        bias = graph.weight(bias_name, weights[f"encoder.{name}.bias"])
        x = graph.node(f"/{name}/Conv", "Conv", [x, kernel, bias], kernel_shape=[3], pads=[1, 1], strides=[stride])
        x = graph.gelu(f"/{name}/gelu", x)

    one, two = graph.constant("/length/Constant", 1), graph.constant("/length/Constant_1", 2)
    length = graph.node("/length/Div", "Div", [graph.node("/length/Add", "Add", [length, one]), two])
    units = graph.dimension("/units", x, 2)
    valid = graph.valid_mask("/units/mask", units, length)
    padded = graph.node("/units/Sub", "Sub", [graph.constant("/units/Constant_1", 1.0), valid])
    score_bias = graph.node("/units/Mul", "Mul", [padded, graph.constant("/units/Constant_2", MASKED)])

    x = graph.node("/Transpose", "Transpose", [x], perm=[0, 2, 1])
    first = graph.constant("/positions/Constant", [0])
    axis = graph.constant("/positions/Constant_1", [0])
    last = graph.node("/positions/Unsqueeze", "Unsqueeze", [units, axis])
    table = graph.weight(POSITIONS, weights["encoder.positional_embedding"])
    positions = graph.node("/positions/Slice", "Slice", [table, first, last, axis])
    return graph.node("/Add", "Add", [x, positions]), score_bias


def _block(
    graph: GraphBuilder, weights: Mapping[str, np.ndarray], name: str, hidden: str, score_bias: str, num_heads: int
) -> str:
    """Add one pre-norm transformer block; hidden states [1, S, D] in and out."""

    def weight(part: str) -> np.ndarray:
        return weights[f"encoder.{name[1:]}.{part}"]

    attn = f"{name}/attn"
    normed = graph.layer_norm(f"{name}/attn_ln", hidden, weight("attn_ln.weight"), weight("attn_ln.bias"))
    query = graph.linear(f"{attn}/query", normed, weight("attn.query.weight"), weight("attn.query.bias"))
    key = graph.linear(f"{attn}/key", normed, weight("attn.key.weight"), None)
    value = graph.linear(f"{attn}/value", normed, weight("attn.value.weight"), weight("attn.value.bias"))

    width = weight("attn.query.weight").shape[0]
    split = graph.constant(f"{attn}/Constant", [0, 0, num_heads, width // num_heads])
    scale = graph.constant(f"{attn}/Constant_1", float((width // num_heads) ** -0.25))  # on both sides: no overflow
    heads = {}
    for label, x, order in (("q", query, [0, 2, 1, 3]), ("k", key, [0, 2, 3, 1]), ("v", value, [0, 2, 1, 3])):
        x = graph.node(f"{attn}/{label}/Reshape", "Reshape", [x, split])
        x = graph.node(f"{attn}/{label}/Transpose", "Transpose", [x], perm=order)
        heads[label] = x if label == "v" else graph.node(f"{attn}/{label}/Mul", "Mul", [x, scale])
    scores = graph.node(f"{attn}/MatMul", "MatMul", [heads["q"], heads["k"]])
    scores = graph.node(f"{attn}/Add", "Add", [scores, score_bias])
    scores = graph.node(f"{attn}/Softmax", "Softmax", [scores], axis=-1)
    mixed = graph.node(f"{attn}/MatMul_1", "MatMul", [scores, heads["v"]])
    mixed = graph.node(f"{attn}/Transpose", "Transpose", [mixed], perm=[0, 2, 1, 3])
    mixed = graph.node(f"{attn}/Reshape", "Reshape", [mixed, graph.constant(f"{attn}/Constant_2", [0, 0, width])])
    attended = graph.linear(f"{attn}/out", mixed, weight("attn.out.weight"), weight("attn.out.bias"))
    hidden = graph.node(f"{name}/Add", "Add", [hidden, attended])

    normed = graph.layer_norm(f"{name}/mlp_ln", hidden, weight("mlp_ln.weight"), weight("mlp_ln.bias"))
    wide = graph.linear(f"{name}/mlp/mlp.0", normed, weight("mlp.0.weight"), weight("mlp.0.bias"))
    wide = graph.gelu(f"{name}/mlp/mlp.1", wide)
    narrow = graph.linear(f"{name}/mlp/mlp.2", wide, weight("mlp.2.weight"), weight("mlp.2.bias"))
    return graph.node(f"{name}/Add_1", "Add", [hidden, narrow])


def _quantize(graph: GraphBuilder, codebook: np.ndarray, hidden: str) -> None:
    """Add the nearest code, [K, D], to each L2-normalised hidden state; the output is `indices` [1, S]."""
    width = codebook.shape[1]
    norm = graph.node(f"{QUANTIZER}/ReduceL2", "ReduceL2", [hidden], axes=[-1])
    norm = graph.node(f"{QUANTIZER}/Max", "Max", [norm, graph.constant(f"{QUANTIZER}/Constant", 1e-12)])
    unit = graph.node(f"{QUANTIZER}/Div", "Div", [hidden, norm])
    unit = graph.node(f"{QUANTIZER}/Reshape", "Reshape", [unit, graph.constant(f"{QUANTIZER}/Constant_1", [-1, width])])

    name = f"{QUANTIZER}/_codebook"
    codes = graph.weight(f"onnx::{name}.embed", codebook.T)  # [D, K]
    two = graph.constant(f"{name}/Constant", 2.0)
    columns, rows = graph.constant(f"{name}/Constant_1", [1]), graph.constant(f"{name}/Constant_2", [0])
    square = graph.node(f"{name}/ReduceSum", "ReduceSum", [graph.node(f"{name}/Pow", "Pow", [unit, two]), columns])
    cross = graph.node(f"{name}/MatMul", "MatMul", [graph.node(f"{name}/Mul", "Mul", [unit, two]), codes])
    code_square = graph.node(f"{name}/Pow_1", "Pow", [codes, two])
    code_square = graph.node(f"{name}/ReduceSum_1", "ReduceSum", [code_square, rows])
    distance = graph.node(f"{name}/Add", "Add", [graph.node(f"{name}/Sub", "Sub", [square, cross]), code_square])
    nearest = graph.node(f"{name}/ArgMax", "ArgMax", [graph.node(f"{name}/Neg", "Neg", [distance])], axis=1, keepdims=0)
    shape = graph.constant(f"{QUANTIZER}/Constant_2", [1, -1])
    graph.node(f"{QUANTIZER}/Reshape_1", "Reshape", [nearest, shape], output="indices")
