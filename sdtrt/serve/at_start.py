"""Whether what a server is to have is there, found out before it listens: configurations are read, and no tensor.

Knows the rooms that find models. Knows no HTTP and no worker.
"""

from __future__ import annotations

from pathlib import Path

from sdtrt.common.errors import ModelError
from sdtrt.models.resolve import resolve_model
from sdtrt.serve.catalog import Catalog
from sdtrt.specs import ModelSpec
from sdtrt.specs.serve import ServeSpec

_FILES = ("embedding", "upscaler")  # that are no folder's and no hub's


def check_there(catalog: Catalog, spec: ServeSpec) -> None:
    """Look for all models, and for the files and folders of what requests may name beside them.

    Of a hub model its configuration is fetched. What else is on a hub is left until a request names it.

    Raises:
        UsageError, ModelError: for the first one that is not there, or can't be used.
    """
    first, *_ = spec.models
    refiners = [
        ModelSpec(path, variant=first.variant, offline=first.offline, vae=first.vae)
        for path in catalog.listed["refiner"].values()
    ]
    for model in (*spec.models, *refiners):
        resolve_model(model)
    for kind, listed in {"lora": catalog.loras, **catalog.listed}.items():
        for path in listed.values() if kind != "refiner" else ():
            _check_path(kind, path)


def _check_path(kind: str, path: str) -> None:
    may_be_an_id = kind not in _FILES and "/" in path and not path.startswith(("/", ".", "~"))
    if Path(path).expanduser().exists() or may_be_an_id:
        return
    option, what = f"--{kind.replace('_', '-')}", "file" if kind in _FILES else "file or folder"
    raise ModelError(
        f"{option} {path}: there is no such {what}",
        hint=f"check the path{'' if kind in _FILES else ', or name a hub id (owner/name)'}",
    )
