"""sdtrt: Stable Diffusion, fast on your own GPU.

Its public names are loaded when they are asked for: `import sdtrt` brings neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from sdtrt.common.version import __version__ as __version__

if TYPE_CHECKING:
    from sdtrt import specs
    from sdtrt.common.errors import (
        BuildError,
        BuildMemoryShortage,
        CacheError,
        EngineError,
        EntryInUseError,
        ExportError,
        MemoryShortage,
        ModelChangedError,
        ModelError,
        NotInEngineError,
        OutputError,
        SdtrtError,
        UnservedCallError,
        UsageError,
    )
    from sdtrt.engines.directory import EngineDirectory
    from sdtrt.live.accelerate import accelerate, restore
    from sdtrt.live.status import status
    from sdtrt.pipeline.front import build, export, generate, open_session
    from sdtrt.pipeline.opening.opened import load
    from sdtrt.pipeline.runs.previews import preview
    from sdtrt.specs import Profile, Sizes

__all__ = [
    "BuildError",
    "BuildMemoryShortage",
    "CacheError",
    "EngineDirectory",
    "EngineError",
    "EntryInUseError",
    "ExportError",
    "MemoryShortage",
    "ModelChangedError",
    "ModelError",
    "NotInEngineError",
    "OutputError",
    "Profile",
    "SdtrtError",
    "Sizes",
    "UnservedCallError",
    "UsageError",
    "accelerate",
    "build",
    "export",
    "generate",
    "load",
    "open_session",
    "preview",
    "restore",
    "specs",
    "status",
]

_MODULES = {
    "EngineDirectory": "sdtrt.engines.directory",
    "Profile": "sdtrt.specs",
    "Sizes": "sdtrt.specs",
    "accelerate": "sdtrt.live.accelerate",
    "build": "sdtrt.pipeline.front",
    "export": "sdtrt.pipeline.front",
    "generate": "sdtrt.pipeline.front",
    "load": "sdtrt.pipeline.opening.opened",
    "open_session": "sdtrt.pipeline.front",
    "preview": "sdtrt.pipeline.runs.previews",
    "restore": "sdtrt.live.accelerate",
    "status": "sdtrt.live.status",
}

# Before anything imports ONNX Runtime (diffusers does so, too): it would give the user a number, keep a database in the
# user's cache, write where links in the temporary folder point to, and look up its maker's host.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def __getattr__(name: str) -> Any:
    """A public name, loaded now. Raises `AttributeError` for any other."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "specs":
        return importlib.import_module("sdtrt.specs")
    return getattr(importlib.import_module(_MODULES.get(name, "sdtrt.common.errors")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
