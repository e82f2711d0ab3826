"""Where one part of a model lies: its configuration, and its weights in files of its own or among others in one file.

A model's parts need not lie together: a single file may lack some, and a VAE may be the user's own choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdtrt.common.console import Console
from sdtrt.common.errors import ModelError, quote
from sdtrt.models.checkpoints import PREFIXES, Layout
from sdtrt.models.hub import Repo
from sdtrt.models.weights import (
    WEIGHT_NAMES,
    TensorInfo,
    allows,
    find_weights,
    is_pickle,
    is_wanted,
    read_infos,
    read_json,
    weight_patterns,
)
from sdtrt.specs import ModelSpec


@dataclass(frozen=True)
class Origin:
    """Where one part of a model lies.

    Args:
        spec: the name of what it lies in, and which of the weight files there may be taken.
        part: as diffusers calls it, `vae`.
        class_name: what it is, `AutoencoderKL`.
        layout: whether its tensors have original names, as in a single file, or diffusers' own.
        root: the diffusers folder (or the hub repository's snapshot) that it lies in.
        subfolder: of its files in `root`; empty where `root` is the part's own.
        config_file: its configuration; None where that is its class's default.
        file: the one file that holds its tensors; None for the weight files of its folder.
        prefixes: what the names of its tensors begin with in `file`.
        derived: its configuration where no file has it, without its class.
        repo: the hub repository that `root` is a snapshot of.
    """

    spec: ModelSpec
    part: str
    class_name: str
    layout: Layout
    root: Path
    subfolder: str
    config_file: Path | None
    file: Path | None = None
    prefixes: tuple[str, ...] = ("",)
    repo: Repo | None = field(default=None, repr=False)
    derived: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.root / self.subfolder

    def config(self) -> dict[str, Any]:
        """Its configuration, without its class's defaults. Raises `ModelError` where that can't be read."""
        if self.config_file is None:
            return {"_class_name": self.class_name, **self.derived}
        return read_json(self.config_file)

    def is_mine(self, name: str) -> bool:
        """Whether a tensor of its file is one of its own."""
        return name.startswith(self.prefixes)

    def stored_files(self) -> tuple[Path, ...]:
        """The files with its weights that are on this machine already; empty if there are none."""
        if self.part not in WEIGHT_NAMES:
            return ()
        if self.file is not None:
            return (self.file,)
        return find_weights(self.folder, self.spec, self.part, strict=self.repo is None)

    def files(self) -> tuple[Path, ...]:
        """The files with its weights, downloaded if they lie on the hub; empty for a part without weights.

        Raises:
            ModelError: if they can't be had, or are pickle files that the user didn't allow.
        """
        if self.part not in WEIGHT_NAMES:
            return ()
        files = self.stored_files()
        if not files and self.repo is not None:
            self.repo.fetch(weight_patterns(self.spec, self.part, self.subfolder), f"{self.part} weights", large=True)
            files = self.stored_files()
        return files or self._refuse()

    def has(self, variant: str | None) -> bool | None:
        """Whether there are weights of a variant (None: plain ones) that may be taken; None where that is not known.

        Of a hub repository that can't be asked only the files in the cache are known.
        """
        wanted = replace(self, spec=replace(self.spec, variant=variant))
        if wanted.stored_files():
            return True
        if self.repo is None:
            return False
        names = self.repo.files()
        return None if names is None else any(is_wanted(wanted.spec, self.part, self.subfolder, name) for name in names)

    def as_variant(self, variant: str | None) -> Origin:
        """The same part with the weights of another variant."""
        return replace(self, spec=replace(self.spec, variant=variant))

    def _refuse(self) -> tuple[Path, ...]:
        """Say why there are no weights that may be read."""
        folder, spec, part = self.folder, self.spec, self.part
        stem, pickle_stem = WEIGHT_NAMES[part]
        if self.repo is not None and self.repo.cache_only:
            raise self.repo.not_cached(f"{part} weights")
        pickles = sorted(path.name for path in folder.glob(f"{pickle_stem}*.bin"))
        variants = sorted({path.name.split(".")[1].split("-")[0] for path in folder.glob(f"{stem}.*.safetensors")})
        if pickles and not variants:
            raise ModelError(
                f"the {part} of {spec.name} has pickle weights only ({pickles[0]}); reading pickle can run any code",
                hint=f"convert the model to safetensors, or if you trust it: --allow-pickle {quote(spec.name)}",
            )
        wanted = f"{spec.variant} weights" if spec.variant else "safetensors weights"
        if variants and not spec.variant:
            hint = f"it has the variant {variants[0]}: use --variant {quote(variants[0])}"
        elif spec.variant:
            hint = f"use one of its variants ({', '.join(variants)})" if variants else "leave --variant away"
        elif self.repo is not None:
            page = f"https://huggingface.co/{spec.name}/tree/main"
            hint = f"see its files at {page}; it may need --variant or --allow-pickle"
        else:
            hint = "download or copy the model again, or convert its weights to safetensors"
        raise ModelError(f"{spec.name} has no {wanted} for its {part}", hint=hint)


def local_path(name: str) -> Path | None:
    """The path that a name stands for if it exists."""
    try:
        path = Path(name).expanduser()
        return path if name.strip() and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, no such user
        return None


def has_weight_suffix(name: str) -> bool:
    """Whether a name is that of a file with weights."""
    return Path(name).suffix.lower() == ".safetensors" or is_pickle(Path(name))


def read_checkpoint_infos(spec: ModelSpec, path: Path) -> dict[str, TensorInfo]:
    """Name, dtype and shape of a checkpoint's tensors. Raises `ModelError` for a pickle that the user didn't allow."""
    if is_pickle(path) and not allows(spec, str(path)):
        raise ModelError(
            f"{path} is a pickle file, and reading pickle can run any code",
            hint=f"convert it to safetensors, or if you trust it: --allow-pickle {quote(path.name)}",
        )
    return read_infos(path)


CONFIG_NAMES = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
}


def in_folder(spec: ModelSpec, root: Path, part: str, class_name: str, repo: Repo | None = None) -> Origin:
    """A part of a diffusers folder, with files of its own."""
    config_file = root / part / CONFIG_NAMES.get(part, "config.json")
    return Origin(spec, part, class_name, "folder", root, part, config_file, repo=repo)


def in_file(spec: ModelSpec, file: Path, config_folder: Path, part: str, class_name: str) -> Origin:
    """A part of a checkpoint with the original key names; its configuration lies in a diffusers folder.

    What has no weights lies whole in that folder.
    """
    origin = in_folder(spec, config_folder, part, class_name)
    if part not in PREFIXES:
        return origin
    return replace(origin, layout="single-file", file=file, prefixes=PREFIXES[part])


def choose_variants(origins: Mapping[str, Origin], console: Console) -> dict[str, Origin]:
    """Take the plain weights of a part that lacks the variant that is asked for, and say so.

    A variant that no part has is left to be refused where weights are asked for.
    """
    variants = {part: origin.spec.variant for part, origin in origins.items() if part in WEIGHT_NAMES}
    in_folders = [part for part, variant in variants.items() if variant and origins[part].file is None]
    found = {part: origins[part].has(variants[part]) for part in in_folders}
    if not any(found.values()):
        return dict(origins)
    plain = [part for part in in_folders if not found[part] and origins[part].has(None)]
    for part in plain:
        console.note(f"{part} of {origins[part].spec.name}: no {variants[part]} weights, the plain ones are taken")
    return {part: origin.as_variant(None) if part in plain else origin for part, origin in origins.items()}
