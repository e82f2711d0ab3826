"""Model names → models: found, and what they say of themselves checked.

A model is the built-in `tiny`, a diffusers folder, a hub id, or a single-file checkpoint with the original key names.
Its configuration and the headers of its weight files are read and checked; tensors are for `loading`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import ModelError, UsageError, quote
from sdtrt.models.checkpoints import PREFIXES, Layout, check_checkpoint, inferred_repo
from sdtrt.models.configuration import check_values
from sdtrt.models.controlnets import PART as CONTROLNET
from sdtrt.models.controlnets import find_controlnet
from sdtrt.models.hub import Repo, is_address, is_repo_id
from sdtrt.models.ip_adapters import IpAdapter, find_ip_adapters
from sdtrt.models.loras import Lora, find_loras
from sdtrt.models.origins import (
    Origin,
    choose_variants,
    has_weight_suffix,
    in_file,
    in_folder,
    local_path,
    read_checkpoint_infos,
)
from sdtrt.models.prediction import foreign_noise, header_texts, stated_noise
from sdtrt.models.t2i_adapters import PART as ADAPTER
from sdtrt.models.t2i_adapters import find_t2i_adapter
from sdtrt.models.vaes import with_vae
from sdtrt.models.weights import WEIGHT_NAMES, TensorInfo, check_headers, read_json
from sdtrt.specs import DEFAULT_MODEL, Group, ModelSpec, NoiseSpec
from sdtrt.specs.contract import (
    REFINER_TIME_IDS,
    SDXL_TIME_IDS,
    VAE_CLASSES,
    editing_channels,
    embeds_guidance,
    inpainting_channels,
    latent_channels_of,
    pooled_width,
    text_width,
    time_ids_of,
    trained_size,
    vae_scale_factor,
)
from sdtrt.specs.image_prompts import group_of

TINY = Path(__file__).parent / "tiny"

_TASKS = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
LCM_PIPELINES = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
SD_PIPELINES = (*_TASKS, *LCM_PIPELINES)
SDXL_PIPELINES = tuple(name.replace("Diffusion", "DiffusionXL") for name in _TASKS)
SD_EDITING = "StableDiffusionInstructPix2PixPipeline"
SDXL_EDITING = SD_EDITING.replace("Diffusion", "DiffusionXL")
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
    "vae": VAE_CLASSES,
}
# Configuration that says where a model came from, not what it computes.
_PROVENANCE = ("_name_or_path", "_diffusers_version", "_commit_hash", "transformers_version")


@dataclass(frozen=True)
class Model:
    """A model that was found and whose configuration fits; its weights are read when parts are loaded.

    Args:
        source: the diffusers folder, or the checkpoint file.
        config_folder: where the configuration of the parts lies (`source` itself for a folder).
        parts: names of the parts that it has.
        index: the content of its `model_index.json`.
        origins: where each part lies; that of a missing one has its configuration alone.
        missing: names of the parts that its kind has, and it lacks: a single file need not be whole.
        stated: what a single file says of its noise, which goes before its scheduler's configuration.
        loras: that are merged into its weights.
        ip_adapters: that are put into its UNet.
    """

    spec: ModelSpec
    layout: Layout
    source: Path
    config_folder: Path
    pipeline_class: str
    parts: tuple[str, ...]
    index: Mapping[str, Any] = field(repr=False)
    origins: Mapping[str, Origin] = field(repr=False)
    missing: tuple[str, ...] = ()
    stated: NoiseSpec = field(default_factory=NoiseSpec)
    loras: tuple[Lora, ...] = ()
    ip_adapters: tuple[IpAdapter, ...] = ()
    _configs: dict[str, dict[str, Any]] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The name that the user gave it."""
        return self.spec.name

    @property
    def is_sdxl(self) -> bool:
        """Whether it takes SDXL's added conditioning (its base has two text encoders, its refiner the second alone)."""
        return self.pipeline_class in (*SDXL_PIPELINES, SDXL_EDITING)

    @property
    def is_lcm(self) -> bool:
        """Whether it was made for diffusers' pipelines of latent consistency models."""
        return self.pipeline_class in LCM_PIPELINES

    @property
    def embeds_guidance(self) -> bool:
        """Whether its UNet takes the guidance scale as an input, so that no negative prompt counts."""
        return embeds_guidance(self.config("unet"))

    @property
    def is_refiner(self) -> bool:
        """Whether it only changes images: SDXL's refiner, whose time ids have an aesthetic score for a target size."""
        return self.is_sdxl and time_ids_of(self.config("unet"), self.pooled_width) == REFINER_TIME_IDS

    @property
    def is_inpainting(self) -> bool:
        """Whether its UNet takes the latents with a mask and the latents of what that leaves of an image."""
        return bool(self.config("unet")["in_channels"] == inpainting_channels(latent_channels_of(self.config("vae"))))

    @property
    def is_editing(self) -> bool:
        """Whether it edits images as a text says (instruct-pix2pix): its UNet takes that image's latents, too."""
        return self.pipeline_class in (SD_EDITING, SDXL_EDITING)

    @property
    def pooled_width(self) -> int | None:
        """The width of the pooled text that the UNet takes; None where it takes none."""
        return pooled_width(self.config("text_encoder_2")) if "text_encoder_2" in self.origins else None

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent."""
        return vae_scale_factor(self.config("vae"))

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
        return trained_size(self.config("unet"), self.vae_scale_factor)

    def origin(self, part: str) -> Origin:
        """Where a part lies. Raises `ModelError` where models of its kind have no such part."""
        if part not in self.origins:
            raise ModelError(f"{self.name} has no {part}", hint=f"it has {', '.join(self.parts)}")
        return self.origins[part]

    def class_name(self, part: str) -> str:
        """The class of a part."""
        return self.origin(part).class_name

    def config(self, part: str) -> dict[str, Any]:
        """The configuration that is stored with a part (without its class's defaults), also with a missing one.

        The file is read once: what was checked is what is used, whatever becomes of the file.

        Raises:
            ModelError: where models of its kind have no such part, or its configuration can't be read or says what
                can't be.
        """
        if part not in self._configs:
            origin = self.origin(part)
            config = origin.config()
            if origin.config_file is not None:
                check_values(part, config, origin.config_file)
            self._configs[part] = config
        return dict(self._configs[part])

    def config_file(self, part: str) -> Path:
        """Where the configuration of a part is stored."""
        origin = self.origin(part)
        return origin.config_file or origin.file or origin.folder

    def weight_files(self, part: str) -> tuple[Path, ...]:
        """The files that hold a part's weights, downloaded if they lie on the hub; empty for a part without weights.

        Raises:
            ModelError: if they are missing, can't be had, or are pickle files that the user didn't allow.
        """
        self.check_has(part)
        return self.origin(part).files()

    def files(self, part: str) -> tuple[Path, ...]:
        """All the files that a part is read from. Raises `ModelError` as of `weight_files`."""
        added = [one.path for one in self.loras_of(part)] + [one.path for one in self.ip_adapters_of(part)]
        return (self.config_file(part), *self.weight_files(part), *added)

    def loras_of(self, part: str) -> tuple[Lora, ...]:
        """The LoRAs that change a part."""
        return tuple(one for one in self.loras if part in one.parts)

    def ip_adapters_of(self, part: str) -> tuple[IpAdapter, ...]:
        """The IP-Adapters that a part has layers of."""
        return self.ip_adapters if part == "unet" else ()

    def is_stored(self, part: str) -> bool:
        """Whether a part is what its files have, and nothing is put into it."""
        return not (self.loras_of(part) or self.ip_adapters_of(part))

    @property
    def groups(self) -> tuple[Group, ...]:
        """The optional groups of inputs that its UNet needs."""
        return (group_of([one.tokens for one in self.ip_adapters]),) if self.ip_adapters else ()

    def stored_weight_files(self, part: str) -> tuple[Path, ...]:
        """The weight files of a part that are on this machine already; empty if there are none."""
        return () if part in self.missing else self.origin(part).stored_files()

    def check_has(self, *parts: str) -> None:
        """Raise `ModelError` if any of these parts (or none named: any at all) is missing, saying what to add."""
        missing = [part for part in self.missing if part in parts or not parts]
        if not missing:
            return
        folder = "pass a diffusers folder of the same kind, with weights, as --config FOLDER"
        add = "add a VAE with --vae FILE, FOLDER or hub id"
        hint = add if missing == ["vae"] else f"{folder}; or {add}" if "vae" in missing else folder
        raise ModelError(f"{self.name} has no {' and no '.join(missing)}", hint=hint)

    def fingerprint(self, part: str, digest: Callable[[Path], str]) -> str:
        """Sha256 of what a part computes: its configuration and weights, wherever the model lies.

        Args:
            digest: sha256 of a file (the engine directory's memoises it).
        """
        config = {name: value for name, value in self.config(part).items() if name not in _PROVENANCE}
        content: dict[str, Any] = {
            "part": part,
            "layout": self.origin(part).layout,
            "config": config,
            "weights": sorted(digest(path) for path in self.weight_files(part)),
        }
        if loras := self.loras_of(part):  # only then: the keys of all other engines stay as they are
            content["loras"] = [[digest(one.path), one.spec.weight] for one in loras]
        if adapters := self.ip_adapters_of(part):
            content["ip_adapters"] = [digest(one.path) for one in adapters]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# --- finding a model ---------------------------------------------------------------------------------------------


def resolve_model(spec: ModelSpec, console: Console = QUIET) -> Model:
    """Find a model and check its configuration and its weight files' headers; loads no tensor.

    Of a hub model only the configuration is fetched here; a part's weights follow when they are asked for.

    Raises:
        UsageError: for a name that can't be a model's, or options that don't fit its kind.
        ModelError: for a model that is missing, damaged, unsupported or not allowed.
    """
    model = _resolve(spec, console)
    if spec.loras:
        width = model.config("unet").get("cross_attention_dim")
        model = replace(model, loras=find_loras(spec, model.parts, width, console))
    if spec.ip_adapters:
        adapters = find_ip_adapters(spec, model.config("unet"), model.is_sdxl, console)
        model = replace(model, ip_adapters=adapters)
    model = model if spec.controlnet is None else with_controlnet(model, spec.controlnet, console)
    return model if spec.t2i_adapter is None else with_t2i_adapter(model, spec.t2i_adapter, console)


def with_t2i_adapter(model: Model, name: str, console: Console = QUIET) -> Model:
    """A model with a T2I-Adapter as its part `adapter`; its weights are read when parts are loaded.

    Args:
        name: the T2I-Adapter's folder or hub id.

    Raises:
        UsageError, ModelError: where there is no such T2I-Adapter, or it is for another kind of model.
    """
    spec = replace(model.spec, t2i_adapter=name)
    return _with_part(model, spec, ADAPTER, find_t2i_adapter(spec, model.config("unet"), console))


def _with_part(model: Model, spec: ModelSpec, part: str, origin: Origin) -> Model:
    """A model with a further part, whose configuration is checked."""
    parts = tuple(dict.fromkeys((*model.parts, part)))
    found = replace(model, spec=spec, parts=parts, origins={**model.origins, part: origin})
    found.config(part)
    return found


def with_controlnet(model: Model, name: str, console: Console = QUIET) -> Model:
    """A model with a ControlNet as its part `controlnet`; its weights are read when parts are loaded.

    Args:
        name: the ControlNet's folder, hub id, or file.

    Raises:
        UsageError, ModelError: where there is no such ControlNet, or it is for another kind of model.
    """
    spec = replace(model.spec, controlnet=name)
    return _with_part(model, spec, CONTROLNET, find_controlnet(spec, model.config("unet"), console))


def _resolve(spec: ModelSpec, console: Console) -> Model:
    """`resolve_model`, but for its LoRAs, IP-Adapters and ControlNet."""
    if spec.name == DEFAULT_MODEL:
        return _from_folder(spec, TINY, console)
    path = local_path(spec.name)
    if path is not None and path.is_dir():
        return _from_folder(spec, path, console)
    if path is not None and path.is_file():
        return _from_single_file(spec, path, console)
    if is_repo_id(spec.name) and not has_weight_suffix(spec.name):
        return _from_hub(spec, console)
    raise _unknown_name(spec.name)


def _unknown_name(name: str) -> UsageError | ModelError:
    """The error for a name that nothing answers to, with the closest names that something does."""
    from difflib import get_close_matches

    if is_address(name):
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
    if len(path.parts) > 1 or has_weight_suffix(name):
        return ModelError(f"there is no model at {name}", hint=hint)
    return UsageError(f"unknown model: {name!r}", hint=hint)


def _is_model_path(path: Path) -> bool:
    return (path / "model_index.json").is_file() or path.suffix == ".safetensors"


def _refuse_options(spec: ModelSpec, kind: str, names: tuple[str, ...]) -> None:
    """Raise `UsageError` for options that mean nothing for this kind of model."""
    for name in names:
        if getattr(spec, name) is not None:
            raise UsageError(f"--{name} does not apply to {kind} ({spec.name})", hint=f"leave --{name} away")


def _from_folder(spec: ModelSpec, folder: Path, console: Console) -> Model:
    """A local diffusers folder: its weights' headers are checked too."""
    _refuse_options(spec, "a local folder", ("revision", "config"))
    index = _read_index(folder, spec.name)
    model = _folder_model(spec, folder, index, None, console)
    for part in WEIGHT_NAMES:
        if part in model.parts and (part == "unet" or model.stored_weight_files(part)):
            check_headers(model.weight_files(part))
    return model


def _from_hub(spec: ModelSpec, console: Console) -> Model:
    """A hub model: its configuration is fetched, its weights are left for later."""
    _refuse_options(spec, "a hub model", ("config",))
    repo = Repo(spec.name, spec.revision, spec.offline, console)
    folder = repo.fetch(_config_patterns(), "configuration")
    index = _read_index(folder, spec.name)
    return _folder_model(spec, folder, index, repo.pinned(folder), console)


def _folder_model(
    spec: ModelSpec, folder: Path, index: Mapping[str, Any], repo: Repo | None, console: Console
) -> Model:
    """A model whose parts lie in folders of their own."""
    pipeline_class = _check_pipeline_class(index, spec.name)
    classes = _check_parts(index, spec.name, spec)
    origins = {part: in_folder(spec, folder, part, name, repo) for part, name in classes.items()}
    origins = choose_variants(with_vae(spec, origins, console), console)
    model = Model(spec, "folder", folder, folder, pipeline_class, tuple(origins), index, origins)
    _check_configs(model)
    return model


def _check_pipeline_class(index: Mapping[str, Any], name: str) -> str:
    pipeline_class = str(index.get("_class_name"))
    if pipeline_class not in (*SD_PIPELINES, *SDXL_PIPELINES, SD_EDITING, SDXL_EDITING):
        raise ModelError(
            f"{name} is a {pipeline_class}, which sdtrt does not support",
            hint=f"use a Stable Diffusion 1.x, 2.x or XL model ({SD_PIPELINES[0]} or {SDXL_PIPELINES[0]})",
        )
    return pipeline_class


def _check_parts(index: Mapping[str, Any], name: str, spec: ModelSpec) -> dict[str, str]:
    """The parts that the pipeline needs, each of a class that sdtrt knows: name → class.

    A VAE of another class, or none, is no error where the user names one.
    """
    classes = {}
    for part in _parts_of(index):
        if part == "vae" and spec.vae is not None and _entry(index, part)[1] not in VAE_CLASSES:
            continue
        library, class_name = _entry(index, part)
        if class_name is None:
            raise ModelError(f"{name} has no {part}", hint="use a complete model, not a part of one")
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
        classes[part] = str(class_name)
    return classes


def _parts_of(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts of a kind of model; SDXL's refiner has the second text encoder alone."""
    if index["_class_name"] not in (*SDXL_PIPELINES, SDXL_EDITING):
        return SD_PARTS
    first = ("tokenizer", "text_encoder")
    alone = all(_entry(index, part) == (None, None) for part in first)
    return tuple(part for part in SDXL_PARTS if not (alone and part in first))


def _entry(index: Mapping[str, Any], part: str) -> tuple[Any, Any]:
    """The library and the class of a part; None and None where there is none."""
    entry = index.get(part)
    return (entry[0], entry[1]) if isinstance(entry, list) and len(entry) == 2 else (None, None)


def _check_configs(model: Model) -> None:
    """Each part's configuration is there; the UNet takes the VAE's latents, the encoders' text, and nothing else."""
    for part in model.origins:
        model.config(part)
    if model.config("vae").get("_class_name", VAE_CLASSES[0]) != model.class_name("vae"):
        raise ModelError(
            f"the vae of {model.name} is said to be an {model.class_name('vae')}, and its configuration is that of an"
            f" {model.config('vae')['_class_name']}",
            hint=f"check {model.config_file('vae')}, or download the model again",
        )
    unet = model.config("unet")
    channels, latent_channels = unet["in_channels"], latent_channels_of(model.config("vae"))
    fitting = [latent_channels, inpainting_channels(latent_channels)]
    fitting = [editing_channels(latent_channels)] if model.is_editing else fitting
    if channels not in fitting and model.spec.vae is not None:
        raise ModelError(
            f"the unet of {model.name} takes {channels} channels where the vae {model.spec.vae} makes"
            f" {latent_channels}",
            hint="use a VAE of the model's kind as --vae",
        )
    if channels not in fitting:
        raise ModelError(
            f"the unet of {model.name} takes {channels} channels where the vae makes {latent_channels}: "
            "a model for editing or upscaling, which sdtrt does not support",
            hint="use the text-to-image model that it was made from, one for inpainting, or one for editing whose"
            f" model_index.json names a {SD_EDITING}",
        )
    for what, found, wanted in _joints(model, unet):
        if found not in wanted:
            raise ModelError(
                f"the parts of {model.name} don't fit each other: {what} is {found!r}, where"
                f" {' or '.join(map(repr, wanted))} fits",
                hint="download or copy the model again, or use another model",
            )
    if model.is_sdxl:
        _check_conditioning(model)


def _joints(model: Model, unet: Mapping[str, Any]) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Where a UNet meets other parts: what it is, what the UNet's configuration has there, and what fits."""
    yield "the unet's out_channels", unet["out_channels"], (latent_channels_of(model.config("vae")),)
    conditioning = ("text_time",) if model.is_sdxl else (None, "text")
    yield "the unet's addition_embed_type", unet.get("addition_embed_type"), conditioning
    if model.is_sdxl or unet.get("encoder_hid_dim_type"):
        return  # `_check_conditioning` knows what fits
    widths = unet["cross_attention_dim"]
    for width in widths if isinstance(widths, list) else [widths]:
        yield "the unet's cross_attention_dim", width, (text_width(model.config("text_encoder")),)


def _check_conditioning(model: Model) -> None:
    """SDXL's UNet takes the text of the encoders that there are, and as many time ids as diffusers' pipelines make."""
    unet = model.config("unet")
    widths = [text_width(model.config(part)) for part in model.origins if part.startswith("text_encoder")]
    if unet.get("cross_attention_dim") != sum(widths):
        raise ModelError(
            f"the unet of {model.name} takes text of width {unet.get('cross_attention_dim')}, where its text encoders"
            f" make {' + '.join(map(str, widths))}",
            hint="use a complete model: download or convert it again",
        )
    count = time_ids_of(unet, model.pooled_width)
    if count not in (SDXL_TIME_IDS, REFINER_TIME_IDS):
        raise ModelError(
            f"the unet of {model.name} takes {count} time ids, where SDXL has {SDXL_TIME_IDS}, and its refiner"
            f" {REFINER_TIME_IDS}",
            hint=f"check {model.config_file('unet')} and {model.config_file('text_encoder_2')}",
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


# --- single-file checkpoints -------------------------------------------------------------------------------------


def _from_single_file(spec: ModelSpec, path: Path, console: Console) -> Model:
    """A checkpoint with the original key names; its configuration comes from elsewhere, and so does what it lacks."""
    from_elsewhere = spec.config is not None or spec.vae is not None
    _refuse_options(spec, "a single file", ("revision",) if from_elsewhere else ("revision", "variant"))
    infos = read_checkpoint_infos(spec, path)
    check_checkpoint(path, infos)
    config_folder, repo = _config_folder(spec, infos, console)
    index = _read_index(config_folder, str(config_folder))
    pipeline_class = _check_pipeline_class(index, str(config_folder))
    classes = _check_parts(index, str(config_folder), spec)
    origins = {part: in_file(spec, path, config_folder, part, name) for part, name in classes.items()}
    lacking = {part for part in PREFIXES if part in classes and not any(map(origins[part].is_mine, infos))}
    wanted = lacking - ({"vae"} if spec.vae else set())
    elsewhere = _from_config(spec, config_folder, {part: classes[part] for part in sorted(wanted)}, repo)
    if elsewhere:
        console.note(f"{' and '.join(elsewhere)} of {spec.name}: from {spec.config}")
    origins = choose_variants(with_vae(spec, origins | elsewhere, console), console)
    if spec.variant and all(origin.file for part, origin in origins.items() if part in WEIGHT_NAMES):
        _refuse_options(spec, "a single file", ("variant",))
    missing = tuple(part for part in origins if part in wanted - elsewhere.keys())
    parts = tuple(part for part in origins if part not in missing)
    stated = stated_noise(infos, header_texts(path))
    if warning := foreign_noise(infos, index["scheduler"][1]):
        console.warn(warning)
    model = Model(spec, "single-file", path, config_folder, pipeline_class, parts, index, origins, missing, stated)
    _check_configs(model)
    return model


def _from_config(spec: ModelSpec, folder: Path, classes: Mapping[str, str], repo: Repo | None) -> dict[str, Origin]:
    """Of the parts that a single file lacks, those whose weights lie where the user says its configuration is."""
    if spec.config is None:
        return {}
    there = replace(spec, name=spec.config, revision=None)
    found = {part: in_folder(there, folder, part, name, repo) for part, name in classes.items()}
    return {part: origin for part, origin in found.items() if origin.has(spec.variant) or origin.has(None)}


def _config_folder(spec: ModelSpec, infos: Mapping[str, TensorInfo], console: Console) -> tuple[Path, Repo | None]:
    """Where the configuration of a single file lies: as asked, else where diffusers would look on the hub."""
    source = spec.config
    if source == DEFAULT_MODEL:
        return TINY, None
    path = local_path(source) if source else None
    if path is not None:
        return path, None
    if source and not is_repo_id(source):
        raise ModelError(
            f"there is no configuration at {source}", hint="pass a diffusers folder or a hub id as --config"
        )
    repo_id = source or inferred_repo(infos)
    console.note(f"configuration of {spec.name}: {repo_id}")
    repo = Repo(repo_id, None, spec.offline, console)
    try:
        folder = repo.fetch(_config_patterns(), "configuration")
        return folder, repo.pinned(folder)
    except ModelError as error:
        hint = f"pass a diffusers folder of the same kind as --config FOLDER ({error.hint})"
        raise ModelError(
            f"{spec.name} needs the configuration of its kind of model: {error.message}", hint=hint
        ) from error
