"""The attentions of an exported model: where they are, and whether they are what they seem.

`find_attentions` knows the form that PyTorch's exporter gives scaled dot-product attention, `check` holds what it has
read (heads, scale) against what those nodes compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from sdtrt.exports.onnx_index import GraphIndex
from sdtrt.specs.contract import Attention

BY_HEADS, TRANSPOSED = (0, 2, 1, 3), (0, 2, 3, 1)  # [B,S,heads,D] → [B,heads,S,D], [B,heads,D,S]
ROUNDING = 2e-3  # what a scale in fp16, squared, may be off by
CHECK_TOKENS, CHECK_TOLERANCE = (24, 31), 1e-2  # tokens of the queries; of keys and values

Array = npt.NDArray[Any]
Dims = Sequence[int | None]


@dataclass(frozen=True)
class _Walk:
    """Where a way back through casts, factors and transpositions has led to: a node, and what was met."""

    node: onnx.NodeProto
    scale: float = 1.0
    axes: tuple[int, ...] = (0, 1, 2, 3)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """An attribute's value, or the operator's own where the node does not say it."""
    return next((onnx.helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def _back(facts: GraphIndex, name: str) -> _Walk | None:
    """The first node on the way back from a tensor that is no cast, factor or transposition."""
    scale, axes = 1.0, (0, 1, 2, 3)
    while (node := facts.makers.get(name)) is not None:
        if node.op_type in ("Mul", "Div") and (found := facts.scalar(node)) is not None:
            name, factor = found
            if node.op_type == "Div" and name != node.input[0]:
                return None
            scale *= factor if node.op_type == "Mul" else 1 / factor
        elif node.op_type == "Transpose":
            order = _attribute(node, "perm", ())
            if len(order) != len(axes):
                return None
            axes, name = tuple(order[axis] for axis in axes), node.input[0]
        elif node.op_type == "Cast":
            name = node.input[0]
        else:
            return _Walk(node, scale, axes)
    return None


def _projection(facts: GraphIndex, name: str) -> onnx.NodeProto | None:
    """The matrix product that makes a tensor, a bias aside."""
    node = facts.makers.get(name)
    if node is not None and node.op_type == "Add":
        made = [facts.makers[given] for given in node.input if given in facts.makers]
        node = made[0] if len(made) == 1 else None
    return node if node is not None and node.op_type == "MatMul" else None


def find_attentions(facts: GraphIndex, *, cross: bool = False) -> list[Attention]:
    """The self-attentions of a graph, in its order; with `cross` also those with keys and values of other states."""
    nodes = {id(node): node for node in facts.makers.values() if node.op_type == "Softmax"}
    found = (_match(facts, node, cross) for node in nodes.values())
    return [attention for attention in found if attention is not None]


def _match(facts: GraphIndex, softmax: onnx.NodeProto, cross: bool) -> Attention | None:
    """The attention around a softmax."""
    if _attribute(softmax, "axis", -1) not in (-1, 3):
        return None
    product, weights = _back(facts, softmax.input[0]), softmax.output[0]
    if (cast := facts.only_taker(weights, "Cast")) is not None:
        weights = cast.output[0]
    second = facts.only_taker(weights, "MatMul")
    if product is None or product.node.op_type != "MatMul" or second is None or second.input[0] != weights:
        return None
    ends = [_back(facts, name) for name in (*product.node.input, second.input[1])]
    result, parts = _joined(facts, second.output[0]), [end for end in ends if end is not None]
    if result is None or len(parts) < 3 or any(part.node.op_type != "Reshape" for part in parts):
        return None
    layouts = [part.axes for part in parts]
    shapes = {facts.end_of_shape(part.node.input[1], 2) for part in parts}
    if layouts != [BY_HEADS, TRANSPOSED, BY_HEADS] or product.axes != (0, 1, 2, 3) or parts[2].scale != 1:
        return None
    found = _described(facts, [part.node.input[0] for part in parts], result, shapes, [product, *parts])
    if found is None or not (cross or _is_of_one(facts, found)):
        return None
    return found if _is_over_all(facts, found, [part.node.output[0] for part in parts]) else None


def _joined(facts: GraphIndex, name: str) -> str | None:
    """What joins the heads again: [B,heads,S,D] → [B,S,C]."""
    moved = facts.only_taker(name, "Transpose")
    if moved is None or tuple(_attribute(moved, "perm", ())) != BY_HEADS:
        return None
    joined = facts.only_taker(moved.output[0], "Reshape")
    return None if joined is None else joined.output[0]


def _described(
    facts: GraphIndex, sources: list[str], result: str, shapes: set[tuple[int, ...] | None], walks: list[_Walk]
) -> Attention | None:
    """The attention, if heads of all three parts are of the same width, and keys and values of the same states."""
    shape = shapes.pop()
    states = [_states(facts, source) for source in sources]
    if shapes or shape is None or len(shape) != 2 or min(shape) < 1 or None in states or states[1] != states[2]:
        return None
    scale, usual = math.prod(walk.scale for walk in walks), shape[1] ** -0.5
    dims = facts.dims.get(sources[0], ())
    return Attention(
        sources=tuple(sources),
        result=result,
        heads=shape[0],
        width=shape[1],
        # The exporter has rounded its root to fp16: the model's own is what was meant.
        scale=usual if abs(scale / usual - 1) < ROUNDING else scale,
        tokens=dims[1] if len(dims) == 3 else None,
    )


def _states(facts: GraphIndex, source: str) -> str | None:
    """What queries, keys or values are a projection of."""
    node = _projection(facts, source)
    return None if node is None else node.input[0]


def _is_of_one(facts: GraphIndex, attention: Attention) -> bool:
    """Whether queries, keys and values are projections of the same states: self-attention."""
    return len({_states(facts, source) for source in attention.sources}) == 1


def _is_over_all(facts: GraphIndex, attention: Attention, by_heads: Sequence[str]) -> bool:
    """Whether it is over all tokens of a sample, and not over windows of them, as far as sizes are known."""
    query, *others = zip(attention.sources, by_heads, strict=True)
    batch, tokens = _rows(facts, query[0])
    _, other_tokens = _rows(facts, others[0][0])
    wanted: dict[str, Dims] = {attention.result: (batch, tokens, attention.heads * attention.width)}
    for (source, split_up), count in ((query, tokens), *((one, other_tokens) for one in others)):
        wanted[source] = (batch, count, attention.heads * attention.width)
        wanted[split_up] = (batch, count, attention.heads, attention.width)
    return all(_agree(facts.dims.get(name, dims), dims) for name, dims in wanted.items())


def _rows(facts: GraphIndex, name: str) -> tuple[int | None, int | None]:
    """Batch and tokens of what is projected, as far as they are known."""
    batch, tokens = (*facts.dims.get(name, ()), None, None)[:2]
    return batch, tokens


def _agree(found: Dims, wanted: Dims) -> bool:
    """Whether dimensions may be the same; None is one that is not known."""
    if len(found) != len(wanted):
        return False
    return all(one is None or other is None or one == other for one, other in zip(found, wanted, strict=True))


def check(facts: GraphIndex, attention: Attention, opset: int) -> float:
    """The relative L2 error of what was read of an attention against what its nodes compute, on a few tokens.

    Raises:
        ValueError: where they are not the same.
    """
    inner = _inner(facts, attention)
    values = [onnx.helper.make_tensor_value_info(n, facts.types[n], [1, None, None]) for n in attention.sources]
    output = onnx.helper.make_tensor_value_info(attention.result, facts.types[attention.result], None)
    graph = onnx.helper.make_graph(inner, "attention", values, [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    import onnxruntime

    generator, channels = np.random.default_rng(0), attention.heads * attention.width
    dtype = onnx.helper.tensor_dtype_to_np_dtype(facts.types[attention.sources[0]])
    counts = (CHECK_TOKENS[0], CHECK_TOKENS[1], CHECK_TOKENS[1])
    given = [generator.standard_normal((1, count, channels)).astype(dtype) for count in counts]
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        computed = session.run(None, dict(zip(attention.sources, given, strict=True)))[0].astype(np.float64)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise ValueError(f"{attention} can't be computed by itself: {error}") from error
    expected = _reference(attention, [array.astype(np.float64) for array in given])
    difference = float(np.linalg.norm(computed - expected) / np.linalg.norm(expected))
    if not difference < CHECK_TOLERANCE:
        raise ValueError(f"{attention} is not what the graph computes: relative error {difference:.2e}")
    return difference


def _inner(facts: GraphIndex, attention: Attention) -> list[onnx.NodeProto]:
    """Copies of an attention's nodes, in order, that take any number of tokens."""
    found: dict[int, onnx.NodeProto] = {}

    def visit(name: str) -> None:
        node = facts.makers.get(name)
        if node is None or name in attention.sources or id(node) in found:
            return
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        if node.op_type == "Reshape":
            visit(node.input[0])
            end = facts.end_of_shape(node.input[1], 1 if name == attention.result else 2)
            shape = (0, -1, *(end or ()))
            copy.input[1] = f"{name}.shape"
            constant = numpy_helper.from_array(np.asarray(shape, dtype=np.int64))
            found[-id(node)] = onnx.helper.make_node("Constant", [], [copy.input[1]], value=constant)
        else:
            for given in node.input:
                visit(given)
        found[id(node)] = copy

    visit(attention.result)
    return [*_constants(facts, found.values()), *found.values()]


def _constants(facts: GraphIndex, nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Constant nodes for those inputs that are small initializers."""
    for name in {given for node in nodes for given in node.input}:
        if name in facts.values and name not in facts.makers:
            yield onnx.helper.make_node("Constant", [], [name], value=numpy_helper.from_array(facts.values[name]))


def _reference(attention: Attention, given: Sequence[Array]) -> Array:
    """[B,S,C] each → [B,S,C]."""
    query, key, value = (
        part.reshape(*part.shape[:2], attention.heads, attention.width).swapaxes(1, 2) for part in given
    )
    scores = attention.scale * query @ key.swapaxes(2, 3)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    states = (weights / weights.sum(-1, keepdims=True)) @ value
    return np.asarray(states.swapaxes(1, 2).reshape(given[0].shape))
