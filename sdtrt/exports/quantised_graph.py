"""Linear layers of an ONNX graph in 8 bits, by pairs of QuantizeLinear and DequantizeLinear around their products.

TensorRT 10 and later, and TensorRT for RTX, compute a product in 8 bits where both of its inputs come from a pair; ONNX
Runtime does what the pairs say. Weights lie in the file in 8 bits, so that of their pair the second half is left.

NVIDIA's own tool for this (modelopt) pins onnx, and onnxruntime-gpu in the place of the onnxruntime that checks
exports; its part for PyTorch writes fp8 by operators that only TensorRT has. ONNX Runtime's tool has no bf16.

It knows graphs, and how large each layer's inputs get. It does not know where that was seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor

from sdtrt.common.errors import ExportError
from sdtrt.exports.onnx_file import Weights
from sdtrt.exports.quantised import DTYPES, LARGEST, SMALLEST

TYPES = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}
STORED: dict[int, torch.dtype] = {onnx.TensorProto.BFLOAT16: torch.bfloat16, onnx.TensorProto.FLOAT: torch.float32}
PART = "unet."  # before the name of a layer of a UNet, in the name of its weight
TRANSPOSED = ".weight.T"  # after it: the graph takes the matrix as `[inputs, outputs]`


@dataclass(frozen=True)
class Product:
    """A linear layer's product in a graph."""

    layer: str
    node: onnx.NodeProto
    weight: onnx.TensorProto


def add_pairs(model: onnx.ModelProto, weights: Weights, largest: Mapping[str, float], kind: str) -> None:
    """Let linear layers compute in 8 bits. Weights have a scale per output in int8, in fp8 one; inputs have one.

    Args:
        model: a simplified graph; `weights` are its own, apart from it.
        largest: by the name of each layer that is to: how large its input gets.
        kind: `int8` or `fp8`.

    Raises:
        ExportError: where the graph has no product of such a layer.
    """
    products = list(_products(model, largest))
    _check_all(model, products, largest, kind)
    takers: defaultdict[str, list[Product]] = defaultdict(list)
    for one in products:
        takers[one.node.input[0]].append(one)
    before: dict[str, list[onnx.NodeProto]] = {}  # the name of a node → those that come before it
    for source, group in takers.items():
        size = max(largest[one.layer] for one in group)
        before[group[0].node.name] = _narrow_input(model, source, group, size, kind)
        for one in group:
            before.setdefault(one.node.name, []).append(_narrow_weight(model, weights, one, kind))
    _insert(model.graph, before)


def _check_all(model: onnx.ModelProto, products: Sequence[Product], largest: Mapping[str, float], kind: str) -> None:
    """Raise `ExportError` where a layer would stay in 16 bits without a word. A shallow program has not all layers."""
    names = {tensor.name for tensor in model.graph.initializer}
    there = {name for name in largest if names & {f"{PART}{name}.weight", f"{PART}{name}{TRANSPOSED}"}}
    missing = sorted(there - {one.layer for one in products})
    if missing or (largest and not products):
        raise ExportError(
            f"the exported graph has no product of {(missing or sorted(largest))[0]}, which was to be in {kind}",
            hint="use --exporter torchscript, or --precision fp16",
        )


def _products(model: onnx.ModelProto, largest: Mapping[str, float]) -> Iterator[Product]:
    """The products of some layers, in the graph's order."""
    matrices = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        name = node.input[1] if node.op_type == "MatMul" else ""
        layer = name.removeprefix(PART).removesuffix(TRANSPOSED)
        if name.endswith(TRANSPOSED) and layer in largest:
            yield Product(layer, node, matrices[name])


def _narrow_input(
    model: onnx.ModelProto, source: str, takers: Sequence[Product], size: float, kind: str
) -> list[onnx.NodeProto]:
    """Give products an input in 8 bits; returns the pair of nodes that rounds it, once for all of them."""
    stored = takers[0].weight.data_type
    scale = torch.tensor(max(size, SMALLEST) / LARGEST[DTYPES[kind]]).to(STORED[stored])
    own = [f"{source}.{word}" for word in (f"{kind}_scale", f"{kind}_zero", kind, f"{kind}_wide")]
    _store(model, own[0], stored, scale)
    _store(model, own[1], TYPES[kind], torch.zeros((), dtype=DTYPES[kind]))
    for one in takers:
        one.node.input[0] = own[3]
    make = onnx.helper.make_node
    return [
        make("QuantizeLinear", [source, *own[:2]], [own[2]], name=f"{own[2]}.quantise"),
        make("DequantizeLinear", [own[2], own[0]], [own[3]], name=f"{own[2]}.dequantise"),
    ]


def _narrow_weight(model: onnx.ModelProto, weights: Weights, one: Product, kind: str) -> onnx.NodeProto:
    """Store a layer's weight in 8 bits, with its scales; returns the node that makes a wide one of it."""
    name, stored = one.weight.name, one.weight.data_type
    matrix = torch.from_numpy(weights[name].copy()).view(STORED[stored]).reshape(tuple(one.weight.dims)).float()
    sizes = matrix.abs().amax(0) if kind == "int8" else matrix.abs().amax()
    scales = (sizes.clamp_min(SMALLEST) / LARGEST[DTYPES[kind]]).to(STORED[stored])
    weights[name] = rounded(matrix, scales, DTYPES[kind]).view(torch.uint8).reshape(-1).numpy()
    one.weight.data_type = TYPES[kind]
    _store(model, f"{name}.scale", stored, scales)
    one.node.input[1] = f"{name}.wide"
    # Of fp8, whose scale is one number, the axis means nothing.
    return onnx.helper.make_node(
        "DequantizeLinear", [name, f"{name}.scale"], [f"{name}.wide"], name=f"{name}.dequantise", axis=1
    )


def rounded(matrix: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix in 8 bits by scales that are rounded themselves, so that a number may come to lie beyond the largest."""
    most = LARGEST[dtype]
    scaled = (matrix / scales.float()).clamp(-most, most)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype)


def _store(model: onnx.ModelProto, name: str, data_type: int, value: Tensor) -> None:
    """Keep some numbers in the graph itself."""
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    model.graph.initializer.add(name=name, data_type=data_type, dims=value.shape, raw_data=data)


def _insert(graph: onnx.GraphProto, before: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Put nodes before others, by the names of these."""
    nodes = [part for node in graph.node for part in (*before.get(node.name, ()), node)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
