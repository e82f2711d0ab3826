"""What TensorRT 8.6 alone must be told, whose networks are weakly typed; `building` calls it where 8.6 is.

On the day 8.6 is dropped this file goes, and its calls there.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from sdtrt.backends.tensorrt.versions.libraries import Library
from sdtrt.backends.tensorrt.versions.network import COMPUTING, Draft
from sdtrt.specs import BuildSpec

DEFAULT_LEVEL = 1  # the builder's effort where nobody asks for one: see `configure`
# Parsers of 8.6.0 under the bindings of 8.6.1: virtual functions came in before the destructor, which would miss.
NEVER_FREED: list[Any] = []
MAX_OPSET_8 = 17  # the newest ONNX opset that TensorRT 8.6's parser reads


def has_plugin(library: Library, name: str) -> bool:
    """Whether there is a plugin for weakly typed networks. The parser takes ONNX operators of its name for it."""
    if not library.has("plugins that choose types"):
        return False
    trt, _ = library.module, library.logger  # plugins are registered with the logger
    return any(creator.name == name for creator in trt.get_plugin_registry().plugin_creator_list)


def onnx_node(onnx: Path, index: int) -> tuple[str, str]:
    """Name and operator of a node, empty where there is no such node or the file can't be read."""
    import onnx as onnx_library

    try:
        node = onnx_library.load(str(onnx), load_external_data=False).graph.node[max(index, 0)]
    except Exception:  # the parse error that is being reported may be just that: an unreadable file
        return "", ""
    return node.name, node.op_type


def parse_hint(library: Library, onnx: Path) -> str | None:
    """What helps against a parse error where an ONNX file's opset is too new; None where it is not."""
    if (opset := _onnx_opset(onnx)) <= MAX_OPSET_8:
        return None
    return f"{library.name} reads ONNX opsets up to {MAX_OPSET_8}, this is {opset}: use --exporter torchscript"


def _onnx_opset(onnx: Path) -> int:
    """The opset of an ONNX file's main domain, 0 where it can't be read."""
    import onnx as onnx_library

    try:
        model = onnx_library.load(str(onnx), load_external_data=False)
    except Exception:
        return 0
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def configure(draft: Draft, config: Any, spec: BuildSpec, fp32_nodes: Collection[str]) -> None:
    """Tell a builder's configuration what later versions do by themselves, or take from the network's types.

    Where nobody asks for an effort it is 1: UNets of Stable Diffusion 1.5's size were built and timed with that; level
    2 made none of the parts that were tried faster, and 3, 8.6's own, did not end in the time that there was
    (`benchmarks/tuning.md`).

    Args:
        fp32_nodes: the ONNX nodes that compute in fp32.
    """
    trt = draft.library.module
    if spec.optimization_level is None:
        config.builder_optimization_level = DEFAULT_LEVEL
    kept = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
    config.set_tactic_sources(sum(1 << int(source) for source in kept))
    config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
    if spec.export.precision == "fp32":
        return
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
    for layer in fp32_layers(draft, fp32_nodes):
        layer.precision = trt.DataType.FLOAT
        layer.set_output_type(0, trt.DataType.FLOAT)


CHANNELS_TOGETHER = 8  # of a tensor that lies channels last


def lay_channels_last(draft: Draft, names: Collection[str]) -> None:
    """Have some of a network's inputs and outputs lie channels last; fp16, a multiple of 8 channels.

    TensorRT calls that `HWC8`: [N,C,H,W] as an array [N][H][W][(C+7)/8*8], so with such a C the very bytes of NHWC; in
    8.x bound to fp16, and for three dimensions or more (8.5.3's Python API on `TensorFormat`). A mask on tensors that
    are neither inputs nor outputs is ignored (Developer Guide, "I/O Formats"; NVIDIA/TensorRT issue 3604 for 8.6). Only
    one format is in the mask, which leaves no choice: who gives and who takes a tensor agree. `BuilderFlag.DIRECT_IO`
    is not set: it fails a build that needs a change of layout at an input or output ("no conformant implementation
    exists", NVIDIA-AI-IOT/cuDLA-samples issue 36), and a fast layer inside may be worth one.
    """
    trt, network = draft.library.module, draft.network
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    tensors += [network.get_output(index) for index in range(network.num_outputs)]
    assert set(names) <= {tensor.name for tensor in tensors}, "a plan would give or take another layout"
    for tensor in tensors:
        if tensor.name in names:
            tensor.allowed_formats = 1 << int(trt.TensorFormat.HWC8)


def fp32_layers(draft: Draft, nodes: Collection[str]) -> list[Any]:
    """The layers of a weakly typed fp16 network that must not be lowered: those of the ONNX nodes that compute in fp32.

    That is what strong typing does by itself: the export decides (timestep embedding, upcast attention). The network's
    own types don't tell: before a build, 8.6 calls most layers of an fp16 graph fp32. Its parser names a layer after
    its node, which is how they are found. Norm statistics need no mention: the normalisation layer computes them in
    fp32 anyway.
    """
    layers = [draft.network.get_layer(index) for index in range(draft.network.num_layers)]
    kept = [layer for layer in layers if layer.name in nodes and layer.type.name in COMPUTING]
    missing = set(nodes) - {layer.name for layer in layers}
    if missing:
        draft.warnings.append(
            f"{len(missing)} of {len(nodes)} operators that the ONNX computes in fp32 may be computed in fp16:"
            f" TensorRT's parser has no layers of their names ({', '.join(sorted(missing)[:3])})"
        )
    return kept
