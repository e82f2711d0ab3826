"""Model names → models: found, and what they say of themselves checked.

A model is the built-in `tiny`, a diffusers folder, a hub id, or a single-file checkpoint with the original key names.
Its configuration and the headers of its weight files are read and checked; tensors are for `loading`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from sdtrt.checkpoints import PREFIXES, Layout, check_checkpoint, inferred_repo
from sdtrt.console import QUIET, Console
from sdtrt.errors import ModelError, UsageError
from sdtrt.hub import Repo, is_repo_id
from sdtrt.specs import DEFAULT_MODEL, ModelSpec
from sdtrt.weights import (
    WEIGHT_NAMES,
    TensorInfo,
    allows,
    find_weights,
    is_pickle,
    read_header,
    read_infos,
    read_json,
    weight_patterns,
)

TINY = Path(__file__).parent / "tiny"

SD_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
SDXL_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
SD_PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
SDXL_PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae", "scheduler")
# What the pipelines' constructors take beyond those, and sdtrt never loads.
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")

# Part → the classes that it may have; no other class is ever looked up, so a model can't name code to run.
_PART_CLASSES: dict[str, tuple[str, ...]] = {
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
}
_CONFIG_NAMES = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
}
# Configuration that says where a model came from, not what it computes.
_PROVENANCE = ("_name_or_path", "_diffusers_version", "_commit_hash", "transformers_version")


@dataclass(frozen=True)
class Model:
    """A model that was found and whose configuration fits; its weights are read when parts are loaded.

    Args:
        source: the diffusers folder, or the checkpoint file.
        config_folder: where the parts' configuration lies (`source` itself for a folder).
        parts: names of the parts that it has.
        index: the content of its `model_index.json`.
        repo: the hub repository that `source` is a snapshot of.
    """

    spec: ModelSpec
    layout: Layout
    source: Path
    config_folder: Path
    pipeline_class: str
    parts: tuple[str, ...]
    index: Mapping[str, Any] = field(repr=False)
    repo: Repo | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The name that the user gave it."""
        return self.spec.name

    @property
    def is_sdxl(self) -> bool:
        """Whether it takes SDXL's added conditioning and has two text encoders."""
        return self.pipeline_class in SDXL_PIPELINES

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent."""
        return int(2 ** (len(self.config("vae")["block_out_channels"]) - 1))

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """What the pipeline's constructor takes beside its parts, such as `force_zeros_for_empty_prompt`."""
        return {
            name: value
            for name, value in self.index.items()
            if not name.startswith("_") and isinstance(value, (bool, int, float, str))
        }

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the UNet was trained for."""
        size = self.config("unet").get("sample_size") or 64
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return int(height) * self.vae_scale_factor, int(width) * self.vae_scale_factor

    def class_name(self, part: str) -> str:
        """The class of a part, as `model_index.json` has it."""
        self._check_has(part)
        return str(self.index[part][1])

    def config(self, part: str) -> dict[str, Any]:
        """The configuration that is stored with a part (without its class's defaults).

        Raises:
            ModelError: where the model has no such part, or its configuration can't be read.
        """
        self._check_has(part)
        return read_json(self.config_file(part))

    def config_file(self, part: str) -> Path:
        """Where the configuration of a part is stored."""
        return self.config_folder / part / _CONFIG_NAMES.get(part, "config.json")

    def weight_files(self, part: str) -> tuple[Path, ...]:
        """The files that hold a part's weights, downloaded if they lie on the hub; empty for a part without weights.

        Raises:
            ModelError: if they can't be had, or are pickle files that the user didn't allow.
        """
        self._check_has(part)
        if part not in WEIGHT_NAMES:
            return ()
        if self.layout == "single-file":
            return (self.source,)
        files = self.stored_weight_files(part)
        if not files and self.repo is not None:
            self.repo.fetch(weight_patterns(self.spec, part), f"{part} weights", large=True)
            files = self.stored_weight_files(part)
        return files or _refuse_weights(self, part)

    def stored_weight_files(self, part: str) -> tuple[Path, ...]:
        """The weight files of a part that are on this machine already; empty if there are none."""
        if self.layout == "single-file":
            return (self.source,) if part in WEIGHT_NAMES else ()
        return find_weights(self.source, self.spec, part, strict=self.repo is None)

    def fingerprint(self, part: str, digest: Callable[[Path], str]) -> str:
        """Sha256 of what a part computes: its configuration and weights, wherever the model lies.

        Args:
            digest: sha256 of a file (the engine directory's memoises it).
        """
        config = {name: value for name, value in self.config(part).items() if name not in _PROVENANCE}
        content = {
            "part": part,
            "layout": self.layout,
            "config": config,
            "weights": sorted(digest(path) for path in self.weight_files(part)),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def _check_has(self, part: str) -> None:
        if part not in self.parts:
            raise ModelError(f"{self.name} has no {part}", hint=f"it has {', '.join(self.parts)}")


# --- finding a model ---------------------------------------------------------------------------------------------


def resolve_model(spec: ModelSpec, console: Console = QUIET) -> Model:
    """Find a model and check its configuration and its weight files' headers; loads no tensor.

    Of a hub model only the configuration is fetched here; a part's weights follow when they are asked for.

    Raises:
        UsageError: for a name that can't be a model's, or options that don't fit its kind.
        ModelError: for a model that is missing, damaged, unsupported or not allowed.
    """
    if spec.name == DEFAULT_MODEL:
        return _from_folder(spec, TINY)
    path = _local_path(spec.name)
    if path is not None and path.is_dir():
        return _from_folder(spec, path)
    if path is not None and path.is_file():
        return _from_single_file(spec, path, console)
    if is_repo_id(spec.name) and not _has_weight_suffix(spec.name):
        return _from_hub(spec, console)
    raise _unknown_name(spec.name)


def _local_path(name: str) -> Path | None:
    """The path that a name stands for if it exists."""
    try:
        path = Path(name).expanduser()
        return path if name.strip() and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, no such user
        return None


def _has_weight_suffix(name: str) -> bool:
    return Path(name).suffix.lower() == ".safetensors" or is_pickle(Path(name))


def _unknown_name(name: str) -> UsageError | ModelError:
    """The error for a name that nothing answers to, with the closest names that something does."""
    from difflib import get_close_matches

    if re.match(r"(https?://)?(huggingface\.co|hf\.co)/", name):
        return UsageError(
            f"--model takes no web address: {name!r}", hint="use the hub id alone, as in --model owner/name"
        )
    path = Path(name) if "\0" not in name else Path()
    folder = path.parent
    try:
        names = [entry.name for entry in folder.iterdir() if _is_model_path(entry)]
    except OSError:
        names = []
    candidates = {str(folder / found): found for found in names} | (
        {DEFAULT_MODEL: DEFAULT_MODEL} if folder == Path() else {}
    )
    close = get_close_matches(path.name.lower(), [found.lower() for found in candidates.values()], n=1)
    meant = [full for full, found in candidates.items() if close and found.lower() == close[0]]
    hint = f"did you mean {quote(meant[0])}? " if meant else ""
    hint += "pass tiny, a diffusers folder, a hub id (owner/name) or a .safetensors file"
    if len(path.parts) > 1 or _has_weight_suffix(name):
        return ModelError(f"there is no model at {name}", hint=hint)
    return UsageError(f"unknown model: {name!r}", hint=hint)


def _is_model_path(path: Path) -> bool:
    return (path / "model_index.json").is_file() or path.suffix == ".safetensors"


def _refuse_options(spec: ModelSpec, kind: str, names: tuple[str, ...]) -> None:
    """Raise `UsageError` for options that mean nothing for this kind of model."""
    for name in names:
        if getattr(spec, name) is not None:
            raise UsageError(f"--{name} does not apply to {kind} ({spec.name})", hint=f"leave --{name} away")


def _from_folder(spec: ModelSpec, folder: Path) -> Model:
    """A local diffusers folder: its weights' headers are checked too."""
    _refuse_options(spec, "a local folder", ("revision", "config"))
    index = _read_index(folder, spec.name)
    model = _folder_model(spec, folder, index, repo=None)
    for part in WEIGHT_NAMES:
        if part in model.parts and (part == "unet" or model.stored_weight_files(part)):
            _check_headers(model.weight_files(part))
    return model


def _from_hub(spec: ModelSpec, console: Console) -> Model:
    """A hub model: its configuration is fetched, its weights are left for later."""
    _refuse_options(spec, "a hub model", ("config",))
    repo = Repo(spec.name, spec.revision, spec.offline, console)
    folder = repo.fetch(_config_patterns(), "configuration")
    index = _read_index(folder, spec.name)
    return _folder_model(spec, folder, index, repo=repo.pinned(folder))


def _folder_model(spec: ModelSpec, folder: Path, index: Mapping[str, Any], repo: Repo | None) -> Model:
    """A model whose parts lie in folders of their own."""
    pipeline_class = _check_pipeline_class(index, spec.name)
    parts = _check_parts(index, spec.name)
    model = Model(spec, "folder", folder, folder, pipeline_class, parts, index, repo)
    _check_configs(model)
    return model


def _check_pipeline_class(index: Mapping[str, Any], name: str) -> str:
    pipeline_class = str(index.get("_class_name"))
    if pipeline_class not in (*SD_PIPELINES, *SDXL_PIPELINES):
        raise ModelError(
            f"{name} is a {pipeline_class}, which sdtrt does not support",
            hint=f"use a Stable Diffusion 1.x, 2.x or XL model ({SD_PIPELINES[0]} or {SDXL_PIPELINES[0]})",
        )
    return pipeline_class


def _check_parts(index: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The parts that the pipeline needs, each of a class that sdtrt knows."""
    parts = SDXL_PARTS if index["_class_name"] in SDXL_PIPELINES else SD_PARTS
    for part in parts:
        entry = index.get(part)
        library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if class_name is None:
            raise ModelError(
                f"{name} has no {part}", hint="use a complete text-to-image model, not a refiner or a part"
            )
        allowed = _PART_CLASSES.get(part)
        if allowed is None:  # schedulers: checked against diffusers' own when loaded
            fits = library == "diffusers" and re.fullmatch(r"[A-Za-z0-9]+Scheduler", str(class_name)) is not None
        else:
            fits = library in ("diffusers", "transformers") and class_name in allowed
        if not fits:
            raise ModelError(
                f"the {part} of {name} is a {library}.{class_name}, which sdtrt does not support",
                hint=f"use a model whose {part} is a {' or '.join(allowed or ('diffusers scheduler',))}",
            )
    return parts


def _check_configs(model: Model) -> None:
    """Each part's configuration is there, and the UNet takes the VAE's latents and nothing else."""
    for part in model.parts:
        model.config(part)
    channels, latent_channels = model.config("unet").get("in_channels"), model.config("vae").get("latent_channels")
    if channels != latent_channels:
        raise ModelError(
            f"the unet of {model.name} takes {channels} channels where the vae makes {latent_channels}: "
            "a model for inpainting or editing, which sdtrt does not support",
            hint="use the text-to-image model that it was made from",
        )


def _read_index(folder: Path, name: str) -> dict[str, Any]:
    """Read `model_index.json`, and where there is none say what the folder is instead."""
    file = folder / "model_index.json"
    if file.is_file():
        return read_json(file)
    if folder == TINY:
        raise ModelError(f"the built-in model is missing from {folder}", hint="install sdtrt again")
    below = sorted(path.parent.name for path in folder.glob("*/model_index.json"))
    checkpoints = sorted(path.name for path in folder.glob("*.safetensors"))
    if below:
        hint = f"it holds diffusers folders; pass one of them, as in --model {quote(str(Path(name) / below[0]))}"
    elif (folder / "config.json").is_file():
        hint = "it looks like one part of a model; pass the folder above it"
    elif checkpoints:
        hint = (
            f"it holds a single-file checkpoint; pass the file, as in --model {quote(str(Path(name) / checkpoints[0]))}"
        )
    else:
        hint = "pass a folder that diffusers' save_pretrained wrote, or a .safetensors checkpoint"
    raise ModelError(f"{name} is no diffusers model: it has no model_index.json", hint=hint)


# --- weight files of a folder ------------------------------------------------------------------------------------


def _config_patterns() -> list[str]:
    """What to fetch of a hub model to know it: everything that is small."""
    return ["model_index.json", *(f"{part}/{name}" for part in SDXL_PARTS for name in ("*.json", "merges.txt"))]


def _refuse_weights(model: Model, part: str) -> tuple[Path, ...]:
    """Say why a part has no weights that may be read."""
    folder, spec = model.source / part, model.spec
    stem, pickle_stem = WEIGHT_NAMES[part]
    if model.repo is not None and model.repo.cache_only:
        raise model.repo.not_cached(f"{part} weights")
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
    elif model.repo is not None:
        hint = f"see its files at https://huggingface.co/{spec.name}/tree/main; it may need --variant or --allow-pickle"
    else:
        hint = "download or copy the model again, or convert its weights to safetensors"
    raise ModelError(f"{spec.name} has no {wanted} for its {part}", hint=hint)


def _check_headers(files: Sequence[Path]) -> None:
    for file in files:
        if not is_pickle(file):
            read_header(file)


# --- single-file checkpoints -------------------------------------------------------------------------------------


def _from_single_file(spec: ModelSpec, path: Path, console: Console) -> Model:
    """A checkpoint with the original key names; its configuration comes from elsewhere."""
    _refuse_options(spec, "a single file", ("revision", "variant"))
    if is_pickle(path) and not allows(spec, str(path)):
        raise ModelError(
            f"{path} is a pickle file, and reading pickle can run any code",
            hint=f"convert it to safetensors, or if you trust it: --allow-pickle {quote(path.name)}",
        )
    infos = read_infos(path)
    check_checkpoint(path, infos)
    config_folder = _config_folder(spec, infos, console)
    index = _read_index(config_folder, str(config_folder))
    pipeline_class = _check_pipeline_class(index, str(config_folder))
    parts = tuple(
        part
        for part in _check_parts(index, str(config_folder))
        if part not in PREFIXES or any(name.startswith(PREFIXES[part]) for name in infos)
    )
    model = Model(spec, "single-file", path, config_folder, pipeline_class, parts, index)
    for part in parts:
        model.config(part)
    return model


def _config_folder(spec: ModelSpec, infos: Mapping[str, TensorInfo], console: Console) -> Path:
    """Where the configuration of a single file lies: as asked, else where diffusers would look on the hub."""
    source = spec.config
    if source == DEFAULT_MODEL:
        return TINY
    path = _local_path(source) if source else None
    if path is not None:
        return path
    if source and not is_repo_id(source):
        raise ModelError(
            f"there is no configuration at {source}", hint="pass a diffusers folder or a hub id as --config"
        )
    repo_id = source or inferred_repo(infos)
    console.note(f"configuration of {spec.name}: {repo_id}")
    try:
        return Repo(repo_id, None, spec.offline, console).fetch(_config_patterns(), "configuration")
    except ModelError as error:
        hint = f"pass a diffusers folder of the same kind as --config FOLDER ({error.hint})"
        raise ModelError(
            f"{spec.name} needs the configuration of its kind of model: {error.message}", hint=hint
        ) from error
