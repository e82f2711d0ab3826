"""Which operators of an fp16 graph compute in fp32: TensorRT 8.6 must be told."""

from __future__ import annotations

from pathlib import Path

import onnx

from sdtrt.exports.onnx_file import load_split
from sdtrt.exports.onnx_index import Facts

# fmt: off
MOVING = frozenset((
    "Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice",
    "Split", "Squeeze", "Transpose", "Unsqueeze", "Where"
))


def float32_nodes(path: Path) -> frozenset[str]:
    """The names of a file's nodes that compute in fp32: arithmetic, not the moving about of its results."""
    model, weights = load_split(path)
    types = Facts(model, weights).types
    computing = (node for node in model.graph.node if node.op_type not in MOVING)
    return frozenset(node.name for node in computing if types.get(node.output[0]) == onnx.TensorProto.FLOAT)
