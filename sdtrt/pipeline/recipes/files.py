"""Finds the files that a picture's text names: LoRAs, embeddings, VAEs, models, the picture that it began from.

A text names files without their folders. They are looked for in the working folder and beside the picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtrt.specs import EMBEDDING_SUFFIXES, EmbeddingSpec, LoraSpec

WEIGHTS = (".safetensors",)


class Finder:
    """Looks for files around one picture, and remembers what it did not find (`missing`, each with a way out).

    Of pictures that were not found, `absent` has more: by the name of their option, what they are.
    """

    def __init__(self, path: Path) -> None:
        self.folders = tuple(dict.fromkeys((Path(), path.parent)))
        self.missing: list[str] = []
        self.absent: dict[str, str] = {}

    def find(self, name: str, suffixes: Iterable[str]) -> Path | None:
        """A file of that name, with one of these suffixes or its own; None where there is none.

        A name with a folder in it is taken as its last part: a text must not lead out of these folders.
        """
        plain = Path(name.replace("\\", "/")).name
        names = [plain] if plain.lower().endswith(tuple(suffixes)) else [f"{plain}{suffix}" for suffix in suffixes]
        paths = (folder / one for folder in self.folders for one in names)
        return next((path for path in paths if plain and path.is_file()), None)

    def wanted(self, what: str, name: str, suffixes: Iterable[str], option: str) -> Path | None:
        """As `find`; what is not found is remembered."""
        found = self.find(name, suffixes)
        if found is None:
            self.missing.append(f"{what} {name}: no such file here or beside the picture, give {option}")
        return found

    def loras_of_ours(self, facts: Sequence[object]) -> list[str]:
        """`--lora` for what a JSON of ours says of LoRAs: by the name that was given, else by the file's."""
        made = []
        for one in facts:
            if not isinstance(one, dict) or not isinstance(one.get("weight"), int | float):
                self.missing.append(f"LoRA {one!r}: not understood")
                continue
            name = self.named("LoRA", one, WEIGHTS, "--lora FILE:WEIGHT")
            made += [str(LoraSpec(name, one["weight"]))] if name else []
        return made

    def embeddings_of_ours(self, facts: Sequence[object]) -> list[str]:
        """`--embedding` for what a JSON of ours says of textual inversions."""
        made = []
        for one in facts:
            if not isinstance(one, dict) or not isinstance(one.get("token"), str):
                self.missing.append(f"embedding {one!r}: not understood")
                continue
            name = self.named("embedding", one, EMBEDDING_SUFFIXES, "--embedding FILE:TOKEN")
            made += [str(EmbeddingSpec(name, one["token"]))] if name else []
        return made

    def named(self, what: str, fact: Mapping[str, Any], suffixes: Iterable[str], option: str) -> str | None:
        """The name that was given, where it still leads to something or is no path; else that of a file around."""
        given, short = fact.get("file", fact.get("name")), fact.get("name")
        if isinstance(given, str) and (Path(given).exists() or self._is_id(given, suffixes)):
            return given
        if isinstance(given, str) and self._is_in_a_repository(given) and not self.find(given, suffixes):
            return given
        found = self.wanted(what, str(short or given), suffixes, option)
        return None if found is None else str(found)

    @staticmethod
    def _is_id(name: str, suffixes: Iterable[str]) -> bool:
        """Whether a name is a hub id rather than a path: `owner/name`, or a file in it."""
        parts = name.split("/")
        if len(parts) == 2:
            return all(parts) and parts[0][0] not in ".~" and not name.lower().endswith(tuple(suffixes))
        return len(parts) == 3 and all(parts) and parts[0][0] not in ".~"

    @staticmethod
    def _is_in_a_repository(name: str) -> bool:
        """Whether a name can be a file in a folder of a repository on the hub; it can be a moved file's path, too."""
        parts = name.split("/")
        return len(parts) > 3 and all(parts) and parts[0][0] not in ".~" and ".." not in parts

    def picture(self, name: str, fact: object) -> dict[str, Path]:
        """The option for the picture that a JSON of ours names: a file of that name around, with those bytes."""
        if not isinstance(fact, dict) or not fact:
            return {}
        file, digest = str(fact.get("name")), fact.get("sha256")
        for folder in self.folders:
            path = folder / Path(file).name
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
                return {name: path}
        option = f"--{name.replace('_', '-')}"
        self.missing.append(f"{name} {file}: that file is not here nor beside the picture, give {option} FILE")
        self.absent[name] = f"the {name.replace('_', ' ')} {file}, and no file with its content is here or beside it"
        return {}
