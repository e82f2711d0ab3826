"""Attentions of an exported model as one operator of ONNX Runtime's own each, which holds few scores at a time.

The ONNX spells an attention out: heads apart, a product, softmax, a product, heads joined. ONNX Runtime so writes all
scores to memory and reads them again, 1 GiB in fp32 for one self-attention of Stable Diffusion 1.5 at 512x512 with
guidance. Its operator MultiHeadAttention (domain com.microsoft, `docs/ContribOperators.md` in ONNX Runtime's
repository) computes the same block by block, and takes queries, keys and values with the heads side by side, as the
projections give them.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from sdtrt.common.console import Console
from sdtrt.common.errors import first_line
from sdtrt.exports import onnx_file, onnx_simplify
from sdtrt.exports.attention import check, find_attentions
from sdtrt.exports.onnx_file import Weights
from sdtrt.exports.onnx_index import GraphIndex
from sdtrt.specs.contract import Attention

OPERATOR, DOMAIN, VERSION = "MultiHeadAttention", "com.microsoft", 1
TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
KEPT = "is kept as it was exported, which takes more time and memory"


def fuse(source: Path, folder: Path, inline_bytes: int, console: Console) -> tuple[Path, int]:
    """Write an exported model with its attentions fused into a folder.

    An attention that is not what its nodes seemed to be, or is computed in several types, is left, which is said.

    Args:
        inline_bytes: from how many bytes on weights are in a file apart.

    Returns:
        The file and how many there are; the source itself, where there are none or it can't be read.
    """
    try:
        model, weights = onnx_file.load_split(source)
        count = _replace(model, weights, console)
    except DecodeError:  # ONNX Runtime reads it next, and says what is wrong
        return source, 0
    except onnx.shape_inference.InferenceError as error:
        console.warn(f"attention {KEPT}: {first_line(error)}")
        return source, 0
    if count == 0:
        return source, 0
    onnx_file.save(model, weights, folder / source.name, inline_bytes=inline_bytes)
    return folder / source.name, count


def _replace(model: onnx.ModelProto, weights: Weights, console: Console) -> int:
    """Put ONNX Runtime's operator in the place of each attention; returns how many."""
    facts, count = GraphIndex(model, weights), 0
    for one in find_attentions(facts, cross=True):
        try:
            _check_types(facts, one)
            check(facts, one, facts.opset)
        except ValueError as error:
            console.warn(f"an attention {KEPT}: {error}")
            continue
        node = facts.makers[one.result]
        node.CopyFrom(
            onnx.helper.make_node(
                OPERATOR, one.sources, [one.result], node.name, domain=DOMAIN, num_heads=one.heads, scale=one.scale
            )
        )
        count += 1
    if count:
        onnx_simplify.drop_unused(model.graph, weights)
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
    return count


def _check_types(facts: GraphIndex, attention: Attention) -> None:
    """Raise `ValueError` unless all that an attention takes and gives is of one type that the operator knows."""
    types = {facts.types.get(name) for name in (*attention.sources, attention.result)}
    if len(types) != 1 or not types <= set(TYPES):
        raise ValueError("not all that it takes and gives is fp32, or all fp16")
