"""What TensorRT 8.6 computes in: which operators of an fp16 graph it is told to keep in fp32, and what it has built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from sdtrt.backends.tensorrt import checking
from sdtrt.backends.tensorrt.build import Request
from sdtrt.backends.tensorrt.versions import running
from sdtrt.backends.tensorrt.versions.libraries import Library
from sdtrt.backends.tensorrt86.pieces import read_pieces
from sdtrt.exports.onnx_file import load_split
from sdtrt.exports.onnx_index import GraphIndex

FEW_LAYERS = 8  # of a piece that may be in another precision than was asked for: none need stand out among so few
# fmt: off
MOVING = frozenset((
    "Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice",
    "Split", "Squeeze", "Transpose", "Unsqueeze", "Where"
))
# fmt: on


def float32_nodes(path: Path) -> frozenset[str]:
    """The names of a file's nodes that compute in fp32: arithmetic, not the moving about of its results."""
    model, weights = load_split(path)
    types = GraphIndex(model, weights).types
    computing = (node for node in model.graph.node if node.op_type not in MOVING)
    return frozenset(node.name for node in computing if types.get(node.output[0]) == onnx.TensorProto.FLOAT)


def fp32_nodes(library: Library, request: Request) -> frozenset[str]:
    """The ONNX's nodes that compute in fp32, where the network's types don't say so by themselves."""
    if library.has("strong typing") or request.spec.export.precision == "fp32":
        return frozenset()
    return float32_nodes(request.onnx)


def read_precision(library: Library, request: Request, information: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """`checking.read_precision` of an engine that may be in pieces.

    The engine must compute in what was asked for, and so must each piece of it, but for one that runs once for a text
    and those of few layers: these may be no more than a few products or one convolution, whose precision the builder
    chooses by itself.
    """
    whole = checking.read_precision(library, request, information)
    pieces = read_pieces(request.plan, request.contract)
    for piece, found in zip(pieces, map(running.layer_precisions, information), strict=True):
        if sum(found.values()) > FEW_LAYERS and not piece.is_of_conditioning:
            checking.check_precision(library, request.spec, found)
    return whole
