"""The group normalisations of an exported model: where they are, and whether they are what they seem.

PyTorch's exporter spells one out: reshape to `[B,groups,-1]`, instance normalisation, reshape back, scale, shift.
`find_spelled` finds them all. What is cut out (`cut`) ends with the second reshape, and `check` holds what was read
against what the nodes compute; `norm_plugin` takes scale and shift as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from sdtrt.backends.tensorrt86.pieces import Normalization
from sdtrt.exports.onnx_index import GraphIndex

OPERATOR = "InstanceNormalization"
CHECK_PIXELS, CHECK_TOLERANCE = (4, 6), 5e-3
DEFAULT_EPSILON = 1e-5  # the operator's own

Array = npt.NDArray[Any]


def sizes_of_norms(facts: GraphIndex) -> list[int]:
    """The size in bytes of each instance normalisation's output, whatever its form, where its type is known."""
    names = [node.output[0] for node in facts.makers.values() if node.op_type == OPERATOR]
    return [facts.bytes_of(name) for name in names if name in facts.types]


@dataclass(frozen=True)
class SpelledNorm:
    """A group normalisation without scale and shift, as PyTorch's exporter writes it.

    Args:
        split: the reshape to `[B,groups,-1]`.
        norm: the instance normalisation.
        join: the reshape back.
        groups: of channels, as the first reshape's constant says.
    """

    split: onnx.NodeProto
    norm: onnx.NodeProto
    join: onnx.NodeProto
    groups: int

    @property
    def source(self) -> str:
        """The name of what is normalised."""
        return str(self.split.input[0])

    @property
    def result(self) -> str:
        """The name of what comes of it."""
        return str(self.join.output[0])

    @property
    def epsilon(self) -> float:
        """What is added to a group's variance."""
        return next((float(one.f) for one in self.norm.attribute if one.name == "epsilon"), DEFAULT_EPSILON)


def find_spelled(facts: GraphIndex) -> list[SpelledNorm]:
    """The group normalisations of a graph, in its order, whatever their types and sizes."""
    found = (_spelled(facts, node) for node in facts.makers.values() if node.op_type == OPERATOR)
    return [one for one in found if one is not None]


def _spelled(facts: GraphIndex, norm: onnx.NodeProto) -> SpelledNorm | None:
    """The group normalisation around an instance normalisation."""
    split, join = facts.makers.get(norm.input[0]), facts.only_taker(norm.output[0], "Reshape")
    if split is None or split.op_type != "Reshape" or join is None:
        return None
    shape = facts.values.get(split.input[1])
    return SpelledNorm(split, norm, join, int(shape[1])) if shape is not None and shape.shape == (3,) else None


def find_normalizations(facts: GraphIndex) -> list[Normalization]:
    """The group normalisations of images in fp16, in a graph's order."""
    return [
        Normalization(one.source, one.result, one.groups, one.epsilon)
        for one in find_spelled(facts)
        if _is_of_images(facts, one)
    ]


def _is_of_images(facts: GraphIndex, norm: SpelledNorm) -> bool:
    """Whether what is normalised is an image in fp16 of a fixed size, in groups of its channels."""
    dims, by_groups = facts.dims.get(norm.source, []), facts.dims.get(norm.split.output[0], [])
    if len(dims) != 4 or None in dims or facts.types.get(norm.source) != onnx.TensorProto.FLOAT16:
        return False
    if norm.groups < 1 or (dims[1] or 0) % norm.groups or by_groups[:2] != [dims[0], norm.groups]:
        return False
    return len(by_groups) == 3 and facts.dims.get(norm.result) == dims


def check(facts: GraphIndex, normalization: Normalization, opset: int) -> float:
    """The worst group's relative L2 error of what was read against what the nodes compute, on a few pixels.

    Raises:
        ValueError: where they are not the same.
    """
    batch, channels = (int(size or 0) for size in facts.dims[normalization.source][:2])
    shape = (batch, channels, *CHECK_PIXELS)
    model = _model(facts, normalization, shape, opset)
    import onnxruntime

    given = _sample(normalization, shape)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        computed = session.run(None, {normalization.source: given})[0].astype(np.float64)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise ValueError(f"{normalization} can't be computed by itself: {error}") from error
    expected = _reference(normalization, given.astype(np.float64))
    by_groups = (batch, normalization.groups, -1)
    off, length = (np.linalg.norm(a.reshape(by_groups), axis=-1) for a in (computed - expected, expected))
    difference = float(np.max(off / length))
    if not difference < CHECK_TOLERANCE:
        raise ValueError(f"{normalization} is not what the graph computes: relative error {difference:.2e}")
    return difference


def _model(facts: GraphIndex, normalization: Normalization, shape: tuple[int, ...], opset: int) -> onnx.ModelProto:
    """A normalisation's nodes by themselves, for an image of a few pixels."""
    join = facts.makers[normalization.result]
    norm = facts.makers[join.input[0]]
    split, dtype = facts.makers[norm.input[0]], facts.types[normalization.source]
    back = f"{normalization.result}.shape"
    constants = {name: facts.values.get(name) for name in (*split.input[1:], *norm.input[1:])}
    nodes = [onnx.helper.make_node("Constant", [], [back], value=numpy_helper.from_array(np.asarray(shape)))]
    for name, value in constants.items():
        if value is None:
            raise ValueError(f"{name}, which {normalization} takes, is no constant")
        nodes.append(onnx.helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value)))
    copy = onnx.NodeProto.FromString(join.SerializeToString())
    copy.input[1] = back
    ends = [
        onnx.helper.make_tensor_value_info(name, dtype, shape) for name in (normalization.source, normalization.result)
    ]
    graph = onnx.helper.make_graph([*nodes, split, norm, copy], "normalization", ends[:1], ends[1:])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


def _sample(normalization: Normalization, shape: tuple[int, ...]) -> Array:
    """Groups that hardly vary, where the epsilon shows, and groups that do, around means of their own."""
    generator = np.random.default_rng(0)
    groups = normalization.groups
    values = generator.standard_normal((shape[0], groups, shape[1] // groups, *shape[2:]))
    numbers = np.arange(groups).reshape(-1, 1, 1, 1)
    wide = 3 * values + numbers % 5 - 2
    narrow = 2 * normalization.epsilon**0.5 * values
    return np.asarray(np.where(numbers % 2, wide, narrow).reshape(shape).astype(np.float16))


def _reference(normalization: Normalization, given: Array) -> Array:
    """`[B,C,H,W]` → the same."""
    groups = given.reshape(given.shape[0], normalization.groups, -1)
    deviation = np.sqrt(groups.var(-1, keepdims=True) + normalization.epsilon)
    return np.asarray(((groups - groups.mean(-1, keepdims=True)) / deviation).reshape(given.shape))
