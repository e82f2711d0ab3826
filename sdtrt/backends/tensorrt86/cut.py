"""Cut an exported model into pieces; what is cut out between them is left to PyTorch.

That is self-attentions of a UNet, or the large group normalisations of a VAE's decoder or encoder.

A piece starts from the model's inputs, the cuts' results and what earlier pieces have made; only floating-point
tensors cross (TensorRT 8.6 has no int64 inputs), so arithmetic on shapes is repeated in each piece that needs it. The
first piece may be what cross-attention makes of the text alone: it needs to run once for a text, and not at each step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from sdtrt.backends.tensorrt.versions.weak_typing import CHANNELS_TOGETHER
from sdtrt.backends.tensorrt86.group_norms import check as check_normalization
from sdtrt.backends.tensorrt86.group_norms import find_normalizations, sizes_of_norms
from sdtrt.backends.tensorrt86.pieces import Cut, Normalization, Piece
from sdtrt.exports import onnx_index, onnx_simplify
from sdtrt.exports.attention import check as check_attention
from sdtrt.exports.onnx_file import ELEM_TYPES, Weights
from sdtrt.exports.onnx_index import GraphIndex
from sdtrt.specs.contract import Attention, Contract, TensorSpec

MARK = "Cut"  # what stands for one in a graph that is being cut
MARK_DOMAIN = "sdtrt.cut"
DTYPES: dict[int, str] = {number: name for name, number in ELEM_TYPES.items()}
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
PROJECTING = ("MatMul", "Gemm", "Add")  # what makes keys and values of a text

# Which group normalisations are worth plans of their own. TensorRT 8.6 has one in three copies in fp32, six times its
# bytes: plans whose largest are of 64 and 96 MiB work in 512 and 960. One that PyTorch computes is there once or twice,
# and all that is around those of full size, with or without them, comes to five to eight times the bytes of such a one:
# one of half as many, left in, would take as much, one of a quarter does not. The second largest stands for them, as a
# decoder's largest is one by itself. Of Stable Diffusion 1.5's VAE at 512x512 these are 13 in the decoder (one of 128
# MiB, 7 of 64, 5 of 32) and 7 in the encoder. Each is a plan more to build and to load: none for less than 32 MiB, and
# at most 16.
NORM_BYTES, NORM_SHARE, MOST_NORMS = 2**25, 2, 16

Array = npt.NDArray[Any]
Dims = Sequence[int | None]


@dataclass(frozen=True)
class Slice:
    """What a piece is built from: a part of a model's graph, and the cuts to compute after it."""

    model: onnx.ModelProto
    weights: Weights
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cuts: tuple[Cut, ...]


def freeze(model: onnx.ModelProto, weights: Weights, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give a graph's inputs fixed sizes, and fold all that follows from them."""
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            dim.dim_value = size
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")  # names of dimensions that are none any more
    onnx_simplify.simplify(model, weights)


def _join_projections(model: onnx.ModelProto, weights: Weights, facts: GraphIndex, attention: Attention) -> Attention:
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


def choose(attentions: Sequence[Attention], min_tokens: int, most: int | None = None) -> list[Attention]:
    """The attentions of at least `min_tokens` tokens.

    Args:
        most: how many there may be; whole resolutions are taken, the largest first, until the next would be too many.
            None for no limit.
    """
    chosen: list[Attention] = []
    for tokens in sorted({one.tokens or 0 for one in attentions}, reverse=True):
        found = [one for one in attentions if one.tokens == tokens]
        if tokens < min_tokens or (most is not None and len(chosen) + len(found) > most):
            break
        chosen += found
    return [one for one in attentions if one in chosen]


def choose_norms(facts: GraphIndex) -> list[Normalization]:
    """The largest group normalisations of a graph of fixed sizes: TensorRT 8.6 needs most of its memory for them.

    All or none of each size; none at all where one of them has a form that is not recognised.
    """
    sizes = sorted(sizes_of_norms(facts), reverse=True)
    least = max([NORM_BYTES, *(size / NORM_SHARE for size in sizes[1:2])])
    large = [size for size in sizes if size >= least]
    if len(large) > MOST_NORMS:
        large = [size for size in large if size > large[MOST_NORMS]]
    found = [one for one in find_normalizations(facts) if facts.bytes_of(one.source) in large]
    return found if len(found) == len(large) else []


def split(
    model: onnx.ModelProto,
    weights: Weights,
    facts: GraphIndex,
    cuts: Sequence[Cut],
    conditioning: Collection[str] = (),
) -> tuple[Slice, ...]:
    """Cut a graph into slices; the three projections of an attention become one matrix product where they can.

    Args:
        model, weights: an exported graph; both are changed, and of no use afterwards.
        facts: of that graph.
        conditioning: inputs that stay the same from step to step: their projections become the first piece.

    Raises:
        ValueError: where a cut's nodes compute something else, or its result is an output of the model.
    """
    ends = {value.name for value in model.graph.output}
    if last := ends.intersection(cut.result for cut in cuts):
        raise ValueError(f"{', '.join(last)} is made by what is cut out")
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    for cut in cuts:
        _check(facts, cut, opset)
    cuts = [_join_projections(model, weights, facts, cut) if isinstance(cut, Attention) else cut for cut in cuts]
    for cut in cuts:
        mark = onnx.helper.make_node(MARK, cut.sources, [cut.result], domain=MARK_DOMAIN)
        facts.makers[cut.result].CopyFrom(mark)
    onnx_simplify.drop_unused(model.graph, weights)
    partition = Partition(model, facts, conditioning)
    return tuple(_assemble(model, weights, facts, partition, cuts, stage) for stage in range(partition.count))


def _check(facts: GraphIndex, cut: Cut, opset: int) -> None:
    """Raise `ValueError` where a cut is not what its nodes compute."""
    if isinstance(cut, Attention):
        check_attention(facts, cut, opset)
    else:
        check_normalization(facts, cut, opset)


def check_fixed(slices: Iterable[Slice]) -> None:
    """Raise `ValueError` where something that crosses has no fixed size."""
    for spec in (spec for one in slices for spec in (*one.inputs, *one.outputs)):
        if spec.dynamic_axes:
            raise ValueError(f"the size of {spec.name} does not follow from the model's inputs")


def channels_last(pieces: Sequence[Piece], contract: Contract) -> frozenset[str]:
    """The tensors that may lie channels last, the layout of 8.6's convolutions: those that only plans write and read.

    They are images in fp16 which one plan of an engine gives to others, of so many channels that none need padding.
    Whatever PyTorch looks into stays as it is: the engine's inputs and outputs, the sources and results of cuts, and
    what is made of conditioning, which is kept.
    """
    given = {spec for piece in pieces if not piece.is_of_conditioning for spec in piece.contract.outputs}
    taken = {name for piece in pieces for name in piece.inputs}
    seen = {name for piece in pieces for cut in piece.cuts for name in (*cut.sources, cut.result)}
    seen |= {spec.name for spec in (*contract.inputs, *contract.outputs)}
    return frozenset(spec.name for spec in given if spec.name in taken - seen and _fits_channels_last(spec))


def _fits_channels_last(spec: TensorSpec) -> bool:
    is_image = spec.dtype == "float16" and len(spec.dims) == 4 and not spec.dynamic_axes
    return is_image and spec.shape({})[1] % CHANNELS_TOGETHER == 0


class Partition:
    """Which piece computes which node: at first the earliest that can, then a later one where fewer bytes cross.

    Projections of conditioning alone, where there are any, are the first piece, and nothing else is in it.

    `stages` is the number of each node's piece, by the node's first output. Constants, and nodes that compute integers
    or booleans from shapes, belong to no piece: each piece that needs them has its own copies.
    """

    def __init__(self, model: onnx.ModelProto, facts: GraphIndex, conditioning: Collection[str] = ()) -> None:
        self._facts, self._nodes = facts, list(model.graph.node)
        self._projections = _projections_of(model.graph, facts, conditioning)
        self._ends = {value.name for value in model.graph.output}
        self._makers, self._takers = onnx_index.makers_of(model.graph), onnx_index.takers_of(model.graph)
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
        """The piece that makes a tensor, -1 for a cut; None for inputs, weights, and what is repeated."""
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
        return name in self._ends or self._is_cut_at(name) or bool(self.needed_in(name) - {self.home(name)})

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
        """Put a node where the fewest bytes cross because of it; of such pieces where the fewest are kept, or last."""

        def cost(stage: int) -> tuple[int, int, int]:
            self.stages[node.output[0]] = stage
            names = {*node.input, *node.output}
            return sum(map(self._crossing, names)), sum(map(self._kept, names)), -stage

        stages = range(self._earliest(node), self._latest(node) + 1)
        self.stages[node.output[0]] = min(stages, key=cost) if len(stages) > 1 else stages[0]

    def _crossing(self, name: str) -> int:
        """The bytes that are written and read because a tensor crosses; a cut has it written anyway."""
        home = self.home(name)
        if home is None or home < 0:
            return 0
        others = len(self.needed_in(name) - {home})
        written = 0 if self._is_cut_at(name) else 1
        return self._facts.bytes_of(name) * (others + written) if others else 0

    def _kept(self, name: str) -> int:
        """The bytes of a tensor for each piece that it is kept for after the one that makes it (-1 for a cut)."""
        made = self.home(name)
        if made is None:
            return 0
        return self._facts.bytes_of(name) * (max(self.needed_in(name), default=made) - made)

    def _is_cut_at(self, name: str) -> bool:
        """Whether a cut takes a tensor."""
        return any(is_mark(node) for node in self._takers[name])


def _projections_of(graph: onnx.GraphProto, facts: GraphIndex, conditioning: Collection[str]) -> frozenset[str]:
    """The outputs of projections of conditioning alone. The attentions that take them split them into heads."""
    stored = {tensor.name for tensor in graph.initializer}
    found: set[str] = set()
    for node in graph.node:
        given = [name for name in node.input if name not in stored and name not in facts.values]
        if node.op_type in PROJECTING and given and all(name in conditioning or name in found for name in given):
            found.add(node.output[0])
    return frozenset(found)


def is_mark(node: onnx.NodeProto) -> bool:
    """Whether a node stands for what is cut out."""
    return node.domain == MARK_DOMAIN


def _assemble(
    model: onnx.ModelProto,
    weights: Weights,
    facts: GraphIndex,
    partition: Partition,
    cuts: Sequence[Cut],
    stage: int,
) -> Slice:
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
    after = [cut for cut in cuts if partition.stages[cut.result] == stage + 1]
    return Slice(
        model=onnx.helper.make_model(part, opset_imports=list(model.opset_import), ir_version=model.ir_version),
        weights={tensor.name: weights[tensor.name] for tensor in kept if tensor.name in weights},
        inputs=tuple(_spec(facts, name) for name in inputs),
        outputs=tuple(_spec(facts, name) for name in outputs),
        cuts=tuple(after),
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


def _value(facts: GraphIndex, name: str) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, facts.types[name], facts.dims.get(name))


def _spec(facts: GraphIndex, name: str) -> TensorSpec:
    """A tensor's part of a contract; a dimension that is not known has a name of its own."""
    if name not in facts.dims:
        raise ValueError(f"the shape of {name} is not known")
    dims = (f"{name}:{axis}" if dim is None else dim for axis, dim in enumerate(facts.dims[name]))
    return TensorSpec(name, DTYPES[facts.types[name]], tuple(dims))
