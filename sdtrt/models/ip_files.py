"""The files of IP-Adapters: safetensors, or what PyTorch saves, as those for faces come (`.bin`).

Knows names and shapes of tensors. Who may have a pickle file read is `ip_adapters`' to say; none of its code runs here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sdtrt.common.errors import ModelError
from sdtrt.models.weights import MAX_TENSORS, TensorInfo, is_pickle, read_header, read_saved, read_tensors

if TYPE_CHECKING:
    import torch

GROUPS = ("image_proj", "ip_adapter")
_LORA = re.compile(r"ip_adapter\.\d+\.to_(q|k|v|out)_lora\.(down|up)\.weight")


def is_of_lora(name: str) -> bool:
    """Whether a tensor is of the LoRA that an adapter for faces has beside its own layers."""
    return _LORA.fullmatch(name) is not None


def infos_of(path: Path) -> dict[str, TensorInfo]:
    """Name, dtype and shape of an adapter's tensors; a pickle has no header, and is mapped into memory for it.

    Raises:
        ModelError: if the file can't be read.
    """
    if not is_pickle(path):
        return read_header(path)
    return {
        name: TensorInfo(str(one.dtype).removeprefix("torch."), tuple(one.shape), one.nbytes)
        for name, one in _read_pickle(path).items()
    }


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors by their names, each with its group's before it. Raises `ModelError` as of `infos_of`."""
    return _read_pickle(path) if is_pickle(path) else read_tensors(path, list(read_header(path)))


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file in two groups, as the authors save it."""
    import torch

    data = read_saved(path)
    groups = {name: data.get(name) for name in GROUPS} if isinstance(data, Mapping) else {}
    found = {
        f"{group}.{name}": one for group, own in groups.items() if isinstance(own, Mapping) for name, one in own.items()
    }
    if not found or len(found) > MAX_TENSORS or not all(isinstance(one, torch.Tensor) for one in found.values()):
        raise ModelError(
            f"{path} is no IP-Adapter: it has no tensors in {' and '.join(GROUPS)}", hint="download it again"
        )
    return found
