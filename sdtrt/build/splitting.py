"""Cut self-attentions out of an exported UNet, and the graph into the pieces between them.

`find_attentions` knows the form that PyTorch's exporter gives scaled dot-product attention, `check` holds what it has
read (heads, scale) against what those nodes compute, and `split` makes a model of each piece. A piece starts from
the model's inputs, the attentions' results and what earlier pieces have made; only floating-point tensors cross
(TensorRT 8.6 has no int64 inputs), so arithmetic on shapes is repeated in each piece that needs it. The first piece may
be what cross-attention makes of the text alone: it needs to run once for a text, and not at each step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from sdtrt import onnx_graph
from sdtrt.components import TensorSpec
from sdtrt.onnx_graph import ELEM_TYPES, Weights
from sdtrt.runtime.pieces import Attention

MARK = "Attention"  # what stands for an attention in a graph that is being cut
MARK_DOMAIN = "sdtrt.cut"
BY_HEADS, TRANSPOSED = (0, 2, 1, 3), (0, 2, 3, 1)  # [B,S,heads,D] → [B,heads,S,D], [B,heads,D,S]
ROUNDING = 2e-3  # what a scale in fp16, squared, may be off by
CHECK_TOKENS, CHECK_TOLERANCE = 24, 1e-2
DTYPES: dict[int, str] = {number: name for name, number in ELEM_TYPES.items()}
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
PROJECTING = ("MatMul", "Gemm", "Add")  # what makes keys and values of a text

Array = npt.NDArray[Any]
Dims = Sequence[int | None]


@dataclass(frozen=True)
class Part:
    """One part of a model: its graph, and the attentions to run after it."""

    model: onnx.ModelProto
    weights: Weights
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attentions: tuple[Attention, ...]


def freeze(model: onnx.ModelProto, weights: Weights, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give a graph's inputs fixed sizes, and fold all that follows from them."""
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            dim.dim_value = size
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")  # names of dimensions that are none any more
    onnx_graph.simplify(model, weights)


class Facts(onnx_graph.Facts):
    """What is known of a graph, small constants among it, and who makes and takes what."""

    def __init__(self, model: onnx.ModelProto, weights: Weights) -> None:
        super().__init__(model, weights)
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.makers, self.takers = onnx_graph.makers_of(model.graph), onnx_graph.takers_of(model.graph)

    def scalar(self, node: onnx.NodeProto) -> tuple[str, float] | None:
        """Of a node of two inputs, one of them a constant of one element: the other's name, and the constant."""
        for name, other in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
            value = self.values.get(other)
            if value is not None and value.size == 1:
                return name, float(value.ravel()[0])
        return None

    def end_of_shape(self, name: str, count: int) -> tuple[int, ...] | None:
        """The last elements of a shape, if they are known."""
        if (value := self.values.get(name)) is not None:
            return tuple(int(size) for size in value.ravel()[-count:])
        node = self.makers.get(name)
        if node is None or node.op_type != "Concat" or len(node.input) < count:
            return None
        parts = [self.values.get(part) for part in node.input[-count:]]
        return tuple(int(part.ravel()[0]) for part in parts if part is not None and part.size == 1)

    def only_taker(self, name: str, operator: str) -> onnx.NodeProto | None:
        """The one node that takes a tensor, if it is of that kind."""
        takers = self.takers[name]
        return takers[0] if len(takers) == 1 and takers[0].op_type == operator else None


@dataclass(frozen=True)
class _Walk:
    """Where a way back through casts, factors and transpositions has led to: a node, and what was met."""

    node: onnx.NodeProto
    scale: float = 1.0
    axes: tuple[int, ...] = (0, 1, 2, 3)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """An attribute's value, or the operator's own where the node does not say it."""
    return next((onnx.helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def _back(facts: Facts, name: str) -> _Walk | None:
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


def _projection(facts: Facts, name: str) -> onnx.NodeProto | None:
    """The matrix product that makes a tensor, a bias aside."""
    node = facts.makers.get(name)
    if node is not None and node.op_type == "Add":
        made = [facts.makers[given] for given in node.input if given in facts.makers]
        node = made[0] if len(made) == 1 else None
    return node if node is not None and node.op_type == "MatMul" else None


def find_attentions(facts: Facts) -> list[Attention]:
    """The self-attentions of a graph, in its order."""
    nodes = {id(node): node for node in facts.makers.values() if node.op_type == "Softmax"}
    found = (_match(facts, node) for node in nodes.values())
    return [attention for attention in found if attention is not None]


def _match(facts: Facts, softmax: onnx.NodeProto) -> Attention | None:
    """The self-attention around a softmax."""
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
    return found if found is not None and _is_over_all(facts, found, [part.node.output[0] for part in parts]) else None


def _joined(facts: Facts, name: str) -> str | None:
    """What joins the heads again: [B,heads,S,D] → [B,S,C]."""
    moved = facts.only_taker(name, "Transpose")
    if moved is None or tuple(_attribute(moved, "perm", ())) != BY_HEADS:
        return None
    joined = facts.only_taker(moved.output[0], "Reshape")
    return None if joined is None else joined.output[0]


def _described(
    facts: Facts, sources: list[str], result: str, shapes: set[tuple[int, ...] | None], walks: list[_Walk]
) -> Attention | None:
    """The attention, if all three parts are made of the same states by heads of the same width."""
    shape = shapes.pop()
    projections = [_projection(facts, source) for source in sources]
    states = {"" if node is None else node.input[0] for node in projections}
    if shapes or shape is None or len(shape) != 2 or min(shape) < 1 or len(states) != 1 or "" in states:
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


def _is_over_all(facts: Facts, attention: Attention, by_heads: Sequence[str]) -> bool:
    """Whether it is over all tokens of a sample, and not over windows of them, as far as sizes are known."""
    batch, tokens = (*facts.dims.get(attention.sources[0], ()), None, None)[:2]
    flat = (batch, tokens, attention.heads * attention.width)
    split_up = (batch, tokens, attention.heads, attention.width)
    wanted = dict.fromkeys((*attention.sources, attention.result), flat) | dict.fromkeys(by_heads, split_up)
    return all(_agree(facts.dims.get(name, dims), dims) for name, dims in wanted.items())


def _agree(found: Dims, wanted: Dims) -> bool:
    """Whether dimensions may be the same; None is one that is not known."""
    if len(found) != len(wanted):
        return False
    return all(one is None or other is None or one == other for one, other in zip(found, wanted, strict=True))


def check(facts: Facts, attention: Attention, opset: int) -> float:
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

    generator, shape = np.random.default_rng(0), (1, CHECK_TOKENS, attention.heads * attention.width)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(facts.types[attention.sources[0]])
    given = [generator.standard_normal(shape).astype(dtype) for _ in attention.sources]
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


def _inner(facts: Facts, attention: Attention) -> list[onnx.NodeProto]:
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


def _constants(facts: Facts, nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
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


def _join_projections(model: onnx.ModelProto, weights: Weights, facts: Facts, attention: Attention) -> Attention:
    """Make queries, keys and values by one product, as one tensor [B,S,3C]; as it was, where they have biases."""
    nodes = [facts.makers[source] for source in attention.sources]
    if any(node.op_type != "MatMul" or node.input[1] not in weights for node in nodes):
        return attention
    graph, names = model.graph, [node.input[1] for node in nodes]
    first = next(tensor for tensor in graph.initializer if tensor.name == names[0])
    rows, name = first.dims[0], f"{names[0]}.qkv"
    joined = np.concatenate([weights[one].reshape(rows, -1) for one in names], axis=1)  # bytes of whole rows
    columns = sum(int(facts.dims[one][1] or 0) for one in names)
    graph.initializer.add(name=name, dims=(rows, columns), data_type=first.data_type)
    weights[name] = np.ascontiguousarray(joined).reshape(-1)
    output = f"{attention.sources[0]}.qkv"
    product = onnx.helper.make_node("MatMul", [nodes[0].input[0], name], [output], name=f"{nodes[0].name}.qkv")
    graph.node.insert(list(graph.node).index(nodes[0]), product)
    facts.types[output], facts.dims[output] = first.data_type, [*facts.dims[attention.sources[0]][:2], columns]
    return replace(attention, sources=(output,))


def choose(attentions: Sequence[Attention], min_tokens: int) -> list[Attention]:
    """Those of at least so many tokens."""
    return [one for one in attentions if (one.tokens or 0) >= min_tokens]


def split(
    model: onnx.ModelProto,
    weights: Weights,
    facts: Facts,
    attentions: Sequence[Attention],
    conditioning: Collection[str] = (),
) -> tuple[Part, ...]:
    """Cut a graph at attentions of it, whose queries, keys and values become one product where that can be.

    Args:
        model, weights: an exported graph; both are changed, and of no use afterwards.
        facts: of that graph.
        conditioning: inputs that stay the same from step to step: their projections become the first piece.

    Raises:
        ValueError: where an attention is not what its nodes compute, or what it gives is what the model gives.
    """
    ends = {value.name for value in model.graph.output}
    if last := ends.intersection(one.result for one in attentions):
        raise ValueError(f"{', '.join(last)} is made by an attention")
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    for attention in attentions:
        check(facts, attention, opset)
    attentions = [_join_projections(model, weights, facts, attention) for attention in attentions]
    for attention in attentions:
        mark = onnx.helper.make_node(MARK, attention.sources, [attention.result], domain=MARK_DOMAIN)
        facts.makers[attention.result].CopyFrom(mark)
    onnx_graph.drop_unused(model.graph, weights)
    partition = Partition(model, facts, conditioning)
    return tuple(_assemble(model, weights, facts, partition, attentions, stage) for stage in range(partition.count))


def check_fixed(parts: Iterable[Part]) -> None:
    """Raise `ValueError` where something that crosses has no fixed size."""
    for spec in (spec for part in parts for spec in (*part.inputs, *part.outputs)):
        if spec.dynamic_axes:
            raise ValueError(f"the size of {spec.name} does not follow from the model's inputs")


class Partition:
    """Which piece makes what: first as early as can be, then later, where fewer bytes cross.

    What is made of conditioning alone is the first piece, if there is such, and nothing else is in it.

    `stages` has the piece of each node, by its first output. Constants, and what makes whole numbers or truth values of
    shapes, belong to no piece: every piece has its own.
    """

    def __init__(self, model: onnx.ModelProto, facts: Facts, conditioning: Collection[str] = ()) -> None:
        self._facts, self._nodes = facts, list(model.graph.node)
        self._projections = _projections_of(model.graph, facts, conditioning)
        self._ends = {value.name for value in model.graph.output}
        self._makers, self._takers = onnx_graph.makers_of(model.graph), onnx_graph.takers_of(model.graph)
        self.stages: dict[str, int] = {}
        for node in self._nodes:
            self.stages[node.output[0]] = self._earliest(node)
        for node in reversed(self._nodes):
            if not self.is_repeated(node) and not is_mark(node) and node.output[0] not in self._projections:
                self._place(node)
        self.count = 1 + max(self.stages.values())

    def is_repeated(self, node: onnx.NodeProto) -> bool:
        """Whether each piece has its own copy of a node."""
        return node.op_type == "Constant" or any(self._facts.types[name] not in FLOATS for name in node.output)

    def home(self, name: str) -> int | None:
        """The piece that makes a tensor, -1 for an attention; None for inputs, weights, and what is repeated."""
        node = self._makers.get(name)
        if node is None or self.is_repeated(node):
            return None
        return -1 if is_mark(node) else self.stages[node.output[0]]

    def needed_in(self, name: str) -> set[int]:
        """The pieces that take a tensor, or make something of its shape."""
        found: set[int] = set()
        for node in self._takers[name]:
            if self.is_repeated(node):
                found.update(stage for made in node.output for stage in self.needed_in(made))
            elif not is_mark(node):
                found.add(self.stages[node.output[0]])
        return found

    def is_output(self, name: str) -> bool:
        """Whether others take what a piece has made."""
        marks = any(is_mark(node) for node in self._takers[name])
        return name in self._ends or marks or bool(self.needed_in(name) - {self.home(name)})

    def _earliest(self, node: onnx.NodeProto) -> int:
        if node.output[0] in self._projections:
            return 0
        stages = (self.stages[self._makers[name].output[0]] for name in node.input if name in self._makers)
        return max([bool(self._projections), *stages]) + is_mark(node)

    def _latest(self, node: onnx.NodeProto) -> int:
        """The last piece that may have a node: the first that takes what it makes."""
        found = {stage for name in node.output for stage in self.needed_in(name)}
        marks = (taker for name in node.output for taker in self._takers[name] if is_mark(taker))
        found.update(self.stages[mark.output[0]] - 1 for mark in marks)
        return self._earliest(node) if self._ends.intersection(node.output) else min(found)

    def _place(self, node: onnx.NodeProto) -> None:
        """Put a node where the fewest bytes cross because of it, and of such pieces into the last."""

        def cost(stage: int) -> tuple[int, int]:
            self.stages[node.output[0]] = stage
            return sum(self._crossing(name) for name in {*node.input, *node.output}), -stage

        stages = range(self._earliest(node), self._latest(node) + 1)
        self.stages[node.output[0]] = min(stages, key=cost) if len(stages) > 1 else stages[0]

    def _crossing(self, name: str) -> int:
        """The bytes that are written and read because a tensor crosses."""
        home = self.home(name)
        if home is None or home < 0:
            return 0
        others = len(self.needed_in(name) - {home})
        return self.bytes_of(name) * (others + 1) if others else 0

    def bytes_of(self, name: str) -> int:
        """A tensor's size; sizes that are not known count as one."""
        item = onnx.helper.tensor_dtype_to_np_dtype(self._facts.types[name]).itemsize
        return item * math.prod(dim or 1 for dim in self._facts.dims.get(name, ()))


def _projections_of(graph: onnx.GraphProto, facts: Facts, conditioning: Collection[str]) -> frozenset[str]:
    """What is projected from conditioning alone. Where its heads are parted is left to the attention that takes it."""
    stored = {tensor.name for tensor in graph.initializer}
    found: set[str] = set()
    for node in graph.node:
        given = [name for name in node.input if name not in stored and name not in facts.values]
        if node.op_type in PROJECTING and given and all(name in conditioning or name in found for name in given):
            found.add(node.output[0])
    return frozenset(found)


def is_mark(node: onnx.NodeProto) -> bool:
    """Whether a node stands for an attention that is cut out."""
    return node.domain == MARK_DOMAIN


def _assemble(
    model: onnx.ModelProto,
    weights: Weights,
    facts: Facts,
    partition: Partition,
    attentions: Sequence[Attention],
    stage: int,
) -> Part:
    """The piece of one stage."""
    graph = model.graph
    nodes = _nodes_of(graph, partition, stage)
    made = {name for node in nodes for name in node.output}
    taken = {name for node in nodes for name in node.input}
    stored = {tensor.name for tensor in graph.initializer}
    inputs = sorted(name for name in taken - made - stored if name)
    outputs = [name for node in nodes for name in node.output if _leaves(partition, name, stage)]
    kept = [tensor for tensor in graph.initializer if tensor.name in taken]
    part = onnx.helper.make_graph(
        nodes, f"piece {stage}", [_value(facts, n) for n in inputs], [_value(facts, n) for n in outputs], kept
    )
    # What a mark waits for may be made by several pieces: it runs after the last of them.
    after = [one for one in attentions if partition.stages[one.result] == stage + 1]
    return Part(
        model=onnx.helper.make_model(part, opset_imports=list(model.opset_import), ir_version=model.ir_version),
        weights={tensor.name: weights[tensor.name] for tensor in kept if tensor.name in weights},
        inputs=tuple(_spec(facts, name) for name in inputs),
        outputs=tuple(_spec(facts, name) for name in outputs),
        attentions=tuple(after),
    )


def _nodes_of(graph: onnx.GraphProto, partition: Partition, stage: int) -> list[onnx.NodeProto]:
    """A piece's nodes in order, with its own copies of those that are repeated."""
    kept: list[onnx.NodeProto] = []
    needed: set[str] = set()
    for node in reversed(graph.node):
        mine = not is_mark(node) and partition.stages[node.output[0]] == stage
        if needed.intersection(node.output) if partition.is_repeated(node) else mine:
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def _leaves(partition: Partition, name: str, stage: int) -> bool:
    """Whether a piece gives a tensor to others."""
    return partition.home(name) == stage and partition.is_output(name)


def _value(facts: Facts, name: str) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, facts.types[name], facts.dims.get(name))


def _spec(facts: Facts, name: str) -> TensorSpec:
    """A tensor's part of a contract; a dimension that is not known has a name of its own."""
    if name not in facts.dims:
        raise ValueError(f"the shape of {name} is not known")
    dims = (f"{name}:{axis}" if dim is None else dim for axis, dim in enumerate(facts.dims[name]))
    return TensorSpec(name, DTYPES[facts.types[name]], tuple(dims))
