"""A parsed network: its inputs, and what its layers compute in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sdtrt.backends.tensorrt.versions.libraries import (
    Library,
    dtype_name,
)

PRECISION_OF_DTYPE: dict[str, str] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
PRECISION_OF_DTYPE |= {"int8": "int8", "fp8": "fp8"}


@dataclass
class Draft:
    """A parsed network, what must live as long as it (the parser owns the weights), and what to warn of."""

    library: Library
    builder: Any
    network: Any
    parser: Any
    warnings: list[str] = field(default_factory=list)


def network_inputs(draft: Draft) -> dict[str, str]:
    """Name → dtype (`float16`) of a network's inputs."""
    tensors = [draft.network.get_input(index) for index in range(draft.network.num_inputs)]
    return {tensor.name: dtype_name(tensor.dtype) for tensor in tensors}


# Layers that compute. Others move, store or convert numbers, and tell nothing about precision; but for those that round
# to 8 bits: each stands for the products that take what it gives.
COMPUTING = frozenset(
    {
        *("ACTIVATION", "CONVOLUTION", "DECONVOLUTION", "EINSUM", "ELEMENTWISE", "MATRIX_MULTIPLY", "NORMALIZATION"),
        *("POOLING", "QUANTIZE", "REDUCE", "SCALE", "SOFTMAX", "UNARY"),
    }
)


def network_precisions(draft: Draft) -> dict[str, int]:
    """How many computing layers of a strongly typed network have each precision, `{"fp16": 120, "fp32": 7}`."""
    counts: Counter[str] = Counter()
    for index in range(draft.network.num_layers):
        layer = draft.network.get_layer(index)
        tensor = layer.get_output(0) if layer.type.name in COMPUTING else None
        if tensor is not None and (precision := PRECISION_OF_DTYPE.get(dtype_name(tensor.dtype))):
            counts[precision] += 1
    return dict(counts)
