"""Build an ONNX graph node by node, with the node names that its readers look for.

PyTorch's exporter chooses names by its own version's rules, and s3tokenizer finds weights *by name*: so the graphs of
this folder are written out. Values are named as the exporter names them, `<node>_output_0`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 16  # the last one whose ReduceMean takes its axes as an attribute
IR_VERSION = 8  # of the same age: every onnxruntime since 1.11 reads it


class GraphBuilder:
    """Collect nodes in the order in which they run.

    Numbers that are no weights become `Constant` nodes: s3tokenizer takes every initializer for a weight of the node
    that reads it, and would overwrite the real one.
    """

    def __init__(self, name: str):
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def weight(self, name: str, values: np.ndarray) -> str:
        """Add an initializer (once for each name), float32, and return its name."""
        if name not in self.initializers:
            contiguous = np.ascontiguousarray(values, dtype=np.float32)
            self.initializers[name] = numpy_helper.from_array(contiguous, name)
        return name

    def constant(self, name: str, value: float | int | Sequence[int]) -> str:
        """Add a `Constant` node and return its value's name; floats become float32, integers int64."""
        is_float = isinstance(value, float)
        array = np.asarray(value, dtype=np.float32 if is_float else np.int64)
        return self.node(name, "Constant", [], value=numpy_helper.from_array(array))

    def node(self, name: str, op_type: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Add a node and return the name of its one output (`<name>_output_0` unless given)."""
        output = output or f"{name}_output_0"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=name, **attributes))
        return output

    def linear(self, name: str, x: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
        """Add `x @ weight.T + bias` as `<name>/MatMul` and `<name>/Add`; weight is [out, in] as in PyTorch."""
        product = self.node(f"{name}/MatMul", "MatMul", [x, self.weight(f"onnx::{name}.weight", weight.T)])
        if bias is None:
            return product
        return self.node(f"{name}/Add", "Add", [self.weight(f"{name[1:].replace('/', '.')}.bias", bias), product])

    def gelu(self, name: str, x: str) -> str:
        """Add the exact GELU, x / 2 * (1 + erf(x / sqrt 2)), which has no operator of its own before opset 20."""
        scaled = self.node(f"{name}/Div", "Div", [x, self.constant(f"{name}/Constant", float(np.sqrt(2.0)))])
        error = self.node(f"{name}/Erf", "Erf", [scaled])
        shifted = self.node(f"{name}/Add", "Add", [error, self.constant(f"{name}/Constant_1", 1.0)])
        product = self.node(f"{name}/Mul", "Mul", [x, shifted])
        return self.node(f"{name}/Mul_1", "Mul", [product, self.constant(f"{name}/Constant_2", 0.5)])

    def layer_norm(self, name: str, x: str, weight: np.ndarray, bias: np.ndarray) -> str:
        """Add a LayerNorm over the last axis, spelt out: weight in `<name>/Mul`, bias in `<name>/Add_1`."""
        mean = self.node(f"{name}/ReduceMean", "ReduceMean", [x], axes=[-1])
        centred = self.node(f"{name}/Sub", "Sub", [x, mean])
        squared = self.node(f"{name}/Pow", "Pow", [centred, self.constant(f"{name}/Constant", 2.0)])
        variance = self.node(f"{name}/ReduceMean_1", "ReduceMean", [squared], axes=[-1])
        stable = self.node(f"{name}/Add", "Add", [variance, self.constant(f"{name}/Constant_1", 1e-5)])
        deviation = self.node(f"{name}/Sqrt", "Sqrt", [stable])
        unit = self.node(f"{name}/Div", "Div", [centred, deviation])
        prefix = name[1:].replace("/", ".")
        scaled = self.node(f"{name}/Mul", "Mul", [unit, self.weight(f"{prefix}.weight", weight)])
        return self.node(f"{name}/Add_1", "Add", [scaled, self.weight(f"{prefix}.bias", bias)])

    def dimension(self, name: str, x: str, axis: int) -> str:
        """Add the size of one axis of `x`, an int64 scalar."""
        shape = self.node(f"{name}/Shape", "Shape", [x])
        return self.node(f"{name}/Gather", "Gather", [shape, self.constant(f"{name}/Constant", axis)], axis=0)

    def valid_mask(self, name: str, size: str, length: str) -> str:
        """Add 1.0 at positions before `length` [1] and 0.0 after it; `size` is a scalar; returns [size]."""
        zero, one = self.constant(f"{name}/Constant", 0), self.constant(f"{name}/Constant_1", 1)
        positions = self.node(f"{name}/Range", "Range", [zero, size, one])
        valid = self.node(f"{name}/Less", "Less", [positions, length])
        return self.node(f"{name}/Cast", "Cast", [valid], to=TensorProto.FLOAT)

    def model(self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]) -> onnx.ModelProto:
        """Close the graph into a model, checked by onnx."""
        graph = helper.make_graph(self.nodes, self.name, inputs, outputs, list(self.initializers.values()))
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="taste-cosyvoice"
        )
        model.ir_version = IR_VERSION
        onnx.checker.check_model(model)
        return model
