"""What requests may name: the models and LoRAs that a server was started with, by short names. No path goes in or out.

Knows names alone; whether there is such a model is for a worker to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, TypeVar

from sdtrt.common.errors import UsageError
from sdtrt.specs import LoraSpec, ModelSpec, check_choice
from sdtrt.specs.serve import ServeSpec

NamedT = TypeVar("NamedT")
_PATH = re.compile(r"(?<![\w.:/~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"`,;:()]+[/\\])+([^\s/\\'\"`,;:()]*)")


@dataclass(frozen=True)
class Catalog:
    """The models and LoRAs of a server by the names that clients know; the first model is the default."""

    models: dict[str, ModelSpec]
    loras: dict[str, str]

    @classmethod
    def of(cls, spec: ServeSpec) -> Self:
        """Raises `UsageError` where two would have one name."""
        models = _by_name("model", [(one.name, one) for one in spec.models])
        return cls(models, _by_name("LoRA", [(one, one) for one in spec.loras]))

    @property
    def default(self) -> str:
        """The model of a request that names none."""
        return next(iter(self.models))

    def model(self, name: str | None, loras: tuple[LoraSpec, ...] = ()) -> ModelSpec:
        """The model of a name, with LoRAs by theirs. Raises `UsageError` for any other name."""
        name = name or self.default
        check_choice("model", name, tuple(self.models))
        for one in loras:
            if not self.loras:
                raise UsageError(f"unknown lora: {one.name!r}", hint="this server was started without --lora")
            check_choice("lora", one.name, tuple(self.loras))
        return replace(self.models[name], loras=tuple(LoraSpec(self.loras[one.name], one.weight) for one in loras))


def _by_name(what: str, given: list[tuple[str, NamedT]]) -> dict[str, NamedT]:
    found: dict[str, NamedT] = {}
    for name, one in given:
        short = short_name(name)
        if short in found:
            raise UsageError(f"two {what}s are called {short}", hint="rename one of them: requests name them so")
        found[short] = one
    return found


def short_name(name: str) -> str:
    """What clients call a model or a LoRA: a hub id as it is, of a path the last part, without the suffix of a file."""
    path = Path(name).expanduser()
    if not path.exists():
        return name if name.count("/") <= 1 and not path.is_absolute() else path.name
    return path.stem if path.is_file() else path.resolve().name


def without_paths(text: str) -> str:
    """A message for clients: of each absolute path the last part alone."""
    return _PATH.sub(lambda match: match[1] or "a folder", text)
