"""The T2I-Adapter that a user names: a folder or a hub id, found, and held against a model's UNet by its configuration.

Reads no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sdtrt.common.console import Console
from sdtrt.common.errors import ModelError
from sdtrt.models.hub import Repo, is_repo_id, refuse_address
from sdtrt.models.named_parts import NamedPart, with_weights
from sdtrt.models.origins import Origin, local_path
from sdtrt.specs import ModelSpec
from sdtrt.specs.groups import adapter_mismatch

PART = "adapter"
CLASS = "T2IAdapter"
HINT = "pass a T2I-Adapter's folder or a hub id (owner/name) as --t2i-adapter"
FITTING = "use a T2I-Adapter for this model (SD 1.x, 2.x and XL have ones of their own)"
_NET = NamedPart(PART, "T2I-Adapter", (CLASS,), f"a {CLASS}", HINT, takes_files=False)
_HUB_FILES = ("config.json", "diffusion_pytorch_model*.json", "adapter/*.json")


def find_t2i_adapter(spec: ModelSpec, unet: Mapping[str, Any], console: Console) -> Origin:
    """Where the T2I-Adapter lies that `spec` names, which fits a UNet.

    Args:
        unet: the configuration of the model's UNet.

    Raises:
        UsageError, ModelError: where there is none, it can't be read, or is for another kind of model.
    """
    assert spec.t2i_adapter is not None
    found = _find(replace(spec, name=spec.t2i_adapter, revision=None), console)
    if (differing := adapter_mismatch(found.config(), unet)) is not None:
        fact, own, wanted = differing
        raise ModelError(
            f"the T2I-Adapter {spec.t2i_adapter} is for another model than {spec.name}: its {fact} is {own}, where the"
            f" unet takes {wanted}",
            hint=FITTING,
        )
    return with_weights(found, console)


def _find(spec: ModelSpec, console: Console) -> Origin:
    """Where the T2I-Adapter lies that `spec` names."""
    path = local_path(spec.name)
    if path is not None and path.is_dir():
        return _NET.in_folder(spec, path)
    if path is not None:
        raise ModelError(f"{spec.name} is a file, which does not say what kind of T2I-Adapter it has", hint=HINT)
    refuse_address(spec.name, "--t2i-adapter")
    if not is_repo_id(spec.name):
        raise ModelError(f"there is no T2I-Adapter at {spec.name}", hint=HINT)
    repo = Repo(spec.name, None, spec.offline, console)
    folder = repo.fetch(_HUB_FILES, "T2I-Adapter's configuration")
    return _NET.in_folder(spec, folder, repo.pinned(folder))
