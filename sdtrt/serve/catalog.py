"""What requests may name: the models, LoRAs, ControlNets and the like that a server was started with, by short names.
No path goes in or out.

Knows names alone; whether there is such a model is for a worker to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self, TypeVar

from sdtrt.common.errors import UsageError
from sdtrt.specs import EmbeddingSpec, LoraSpec, ModelSpec, check_choice
from sdtrt.specs.serve import ServeSpec, split_name

NamedT = TypeVar("NamedT")
_PATH = re.compile(r"(?<![\w.:/~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"`,;:()]+[/\\])+([^\s/\\'\"`,;:()]*)")


@dataclass(frozen=True)
class Catalog:
    """What a server has, by the names that clients know; the first model is the default.

    Args:
        listed: paths by names, for each kind: `controlnet`, `ip_adapter`, …
    """

    models: dict[str, ModelSpec]
    loras: dict[str, str]
    listed: dict[str, dict[str, str]]

    @classmethod
    def of(cls, spec: ServeSpec) -> Self:
        """Raises `UsageError` where two of a kind would have one name, and for a word that no prompt can have."""
        models = _by_name("model", [(short_name(one.name), one) for one in spec.models])
        listed = {
            kind.name.removesuffix("s"): _by_name(kind.name.removesuffix("s"), _named(getattr(spec.listed, kind.name)))
            for kind in fields(spec.listed)
        }
        for name, path in listed["embedding"].items():
            EmbeddingSpec(path, name)
        return cls(models, _by_name("LoRA", _named(spec.loras)), listed)

    @property
    def default(self) -> str:
        """The model of a request that names none."""
        return next(iter(self.models))

    def model(self, name: str | None, loras: tuple[LoraSpec, ...] = ()) -> ModelSpec:
        """The model of a name, with LoRAs by theirs. Raises `UsageError` for any other name."""
        name = name or self.default
        check_choice("model", name, tuple(self.models))
        found = tuple(LoraSpec(_listed("lora", one.name, self.loras), one.weight) for one in loras)
        return replace(self.models[name], loras=found)

    def path(self, kind: str, name: str) -> str:
        """What the server has by the name of a kind. Raises `UsageError` for a name that is not listed."""
        return _listed(kind, name, self.listed[kind])

    @property
    def names(self) -> dict[str, str]:
        """What clients call each path that is listed, by the path."""
        return {path: name for listed in (self.loras, *self.listed.values()) for name, path in listed.items()}


def _listed(kind: str, name: str, listed: dict[str, str]) -> str:
    if not listed:
        option = f"--{kind.replace('_', '-')}"
        raise UsageError(f"unknown {kind}: {name!r}", hint=f"this server was started without {option}")
    check_choice(kind, name, tuple(listed))
    return listed[name]


def _named(given: Iterable[str]) -> list[tuple[str, str]]:
    """Names and paths of what was listed as `PATH` or `NAME=PATH`."""
    return [(name or short_name(path), path) for name, path in map(split_name, given)]


def _by_name(what: str, given: list[tuple[str, NamedT]]) -> dict[str, NamedT]:
    found: dict[str, NamedT] = {}
    for name, one in given:
        if name in found:
            raise UsageError(f"two {what}s are called {name}", hint="rename one of them: requests name them so")
        found[name] = one
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
