"""What a VAE, a ControlNet and a T2I-Adapter that a user names have in common: the folder of one, and its weights.

Reads no tensor.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sdtrt.common.console import Console
from sdtrt.common.errors import ModelError, quote
from sdtrt.models.hub import Repo
from sdtrt.models.origins import Origin
from sdtrt.models.weights import check_headers, read_json
from sdtrt.specs import ModelSpec


@dataclass(frozen=True)
class NamedPart:
    """A part that has an option of its own, called as the part is.

    Args:
        part: as diffusers calls it, `vae`.
        what: for the reader, `VAE`.
        classes: that are taken.
        wanted: these, for the reader.
        hint: what to pass.
        unnamed: the class of a configuration that does not say it.
        takes_files: whether one file of it is enough.
    """

    part: str
    what: str
    classes: Collection[str]
    wanted: str
    hint: str
    unnamed: str = "model without a class"
    takes_files: bool = True

    def class_of(self, config_file: Path) -> str:
        """The class that a configuration is of."""
        return str(read_json(config_file).get("_class_name", self.unnamed))

    def in_folder(self, spec: ModelSpec, root: Path, repo: Repo | None = None) -> Origin:
        """The part's own folder, or that of a pipeline with one. Raises `ModelError` where it is neither."""
        for subfolder in ("", self.part):
            config_file = root / subfolder / "config.json"
            if config_file.is_file() and (name := self.class_of(config_file)) in self.classes:
                return Origin(spec, self.part, name, "folder", root, subfolder, config_file, repo=repo)
        own = root / "config.json"
        files = sorted(path.name for path in root.glob("*.safetensors"))
        if own.is_file():
            raise ModelError(f"{spec.name} is a {self.class_of(own)}, not {self.wanted}", hint=self.hint)
        hint = self.hint
        if files and self.takes_files:
            hint = f"pass the file, as in --{self.part} {quote(str(Path(spec.name) / files[0]))}"
        raise ModelError(f"{spec.name} is no {self.what}'s folder: it has no config.json", hint=hint)


def with_weights(found: Origin, console: Console) -> Origin:
    """A part whose local weights can be read, with the plain ones where its variant has none, which is said.

    Raises:
        ModelError: for a file on this machine that can't be read.
    """
    if found.repo is None:
        check_headers(found.files())
    variant = found.spec.variant
    if variant is None or found.file is not None or found.has(variant) is not False:
        return found
    console.note(f"{found.spec.name}: no {variant} weights, the plain ones are taken")
    return found.as_variant(None)
