"""What PyTorch's dynamo exporter writes of a UNet (opset 18) for TensorRT 8.6, which knows opsets up to 17.

ONNX's own converter leaves what 17 does not know. And 8.6's parser does two things otherwise than the standard
(https://github.com/onnx/onnx-tensorrt, release 8.6.1, `builtin_op_importers.cpp`): a Shape is of all axes whatever its
`start` and `end` say, and integers that a Constant has as an attribute are lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, NodeProto, load
from onnx.checker import ValidationError, check_model
from onnx.helper import get_attribute_value, make_node
from onnx.numpy_helper import from_array

from sdtrt.backends.tensorrt.versions.weak_typing import MAX_OPSET_8

NEW_IN_18: dict[str, dict[str, Callable[[NodeProto], Any]]] = {  # by operator: attributes, and what 17 does
    "Split": {"num_outputs": lambda node: len(node.output)},
    "Resize": {"keep_aspect_ratio_policy": lambda _: b"stretch", "antialias": lambda _: 0},
}
ALL_AXES = np.iinfo(np.int64).max  # as the end of a Slice


def lower_opset(path: Path) -> None:
    """Lower an ONNX file to opset 17 in place; its weights stay where they are.

    Raises:
        ValueError: where opset 17 can't say what a node does; the file is as it was.
    """
    model = load(path, load_external_data=False)
    nodes = [new for node in model.graph.node for new in _lowered(node, model.graph)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for opset in model.opset_import:
        if not opset.domain:
            opset.version = MAX_OPSET_8
    draft = path.with_name(f"{path.name}.draft")  # beside the weights
    draft.write_bytes(model.SerializeToString())
    try:
        check_model(str(draft))
    except ValidationError as error:
        draft.unlink()
        raise ValueError(f"can't be said in opset {MAX_OPSET_8}: {error}") from error
    draft.replace(path)


def _lowered(node: NodeProto, graph: GraphProto) -> Iterator[NodeProto]:
    """What stands for a node; constants join the graph's."""
    if any(one.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for one in node.attribute):
        raise ValueError(f"{node.name}: nodes inside of a node are not lowered")
    attributes = {one.name: get_attribute_value(one) for one in node.attribute}
    start, end = attributes.get("start", 0), attributes.get("end", ALL_AXES)
    if node.op_type == "Shape" and (start, end) != (0, ALL_AXES):
        bounds = {"start": [start], "end": [end], "axis": [0]}
        names = {name: f"{node.output[0]}.{name}" for name in ("all", *bounds)}
        graph.initializer.extend(from_array(np.array(given), names[name]) for name, given in bounds.items())
        yield make_node("Shape", node.input, [names["all"]], name=names["all"])
        yield make_node("Slice", [*names.values()], node.output, name=node.output[0])
    elif node.op_type == "Constant" and (kinds := attributes.keys() & {"value_int", "value_ints"}):
        graph.initializer.append(from_array(np.array(attributes[kinds.pop()], dtype=np.int64), node.output[0]))
    else:
        yield _without_news(node, attributes)


def _without_news(node: NodeProto, attributes: dict[str, Any]) -> NodeProto:
    """A node without the attributes that opset 18 has brought, where they say what 17 does."""
    same = NEW_IN_18.get(node.op_type, {})
    for name in attributes.keys() & same.keys():
        if attributes[name] != same[name](node):
            raise ValueError(f"{node.name}: {name} can't be said in opset {MAX_OPSET_8}")
    kept = [one for one in node.attribute if one.name not in same]
    del node.attribute[:]
    node.attribute.extend(kept)
    return node
