"""What an image carries to be made again: its request's settings, as plain data and as web UIs write them.

Makes no image and writes no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from sdtrt.common import host
from sdtrt.common.version import __version__
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models.components import text_encoders_of
from sdtrt.models.controlnets import PART
from sdtrt.models.loras import Lora, web_ui_hash
from sdtrt.models.origins import has_weight_suffix
from sdtrt.models.resolve import Model
from sdtrt.models.t2i_adapters import PART as ADAPTER
from sdtrt.pipeline.inputs import images
from sdtrt.pipeline.inputs.adapter_images import AdapterImage
from sdtrt.pipeline.inputs.control_images import CANNY_HIGH, CANNY_LOW, ControlImage
from sdtrt.pipeline.inputs.masks import Mask
from sdtrt.pipeline.opening.open import OpenPipeline
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.pipeline.runs.jobs import Job
from sdtrt.pipeline.runs.sampler_names import eta_field, noise_schedule, sampler_name, schedule_type
from sdtrt.pipeline.runs.upscaling import title_of
from sdtrt.specs import LANCZOS, LATENT, GenerateSpec, NoiseSpec
from sdtrt.specs.deep_features import DEEP_OUT, depth_of


def settings_of(
    spec: GenerateSpec,
    opened: OpenPipeline,
    init: images.InitImage | None,
    mask: Mask | None,
    controls: Sequence[ControlImage],
    directory: EngineDirectory,
    pictures: Sequence[images.InitImage] = (),
) -> dict[str, Any]:
    """What all images of a request have in common, as plain data; `pictures` are those for IP-Adapters."""
    pipeline_spec, scheduler = opened.spec, opened.pipe.scheduler
    return {
        "model": _model_facts(pipeline_spec.model, directory),
        "backend": pipeline_spec.backend,
        "device": device_name(pipeline_spec.device),
        "precision": pipeline_spec.precision,
        "scheduler": {"name": spec.scheduler, **_scheduler_facts(scheduler)},
        "steps": spec.steps,
        "guidance_scale": spec.guidance_scale,
        **({} if spec.eta is None else {"eta": spec.eta}),
        **_savings_facts(spec),
        "strength": spec.strength if init is not None and not spec.edit else None,
        "init_image": None if init is None else {"name": init.path.name, "sha256": init.sha256},
        **({} if mask is None else _mask_facts(spec, mask)),
        **_image_prompt_facts(spec, pipeline_spec.model, directory, pictures),
        **({"edit": True, "image_guidance_scale": spec.image_guidance_scale} if spec.edit else {}),
        **_control_facts(opened, controls, directory),
        "batch_size": pipeline_spec.images,
        **_text_facts(opened, directory),
        **_noise_facts(spec),
        **({"vae_tiling": True} if spec.vae_tiling else {}),
        **caching_facts(pipeline_spec),
        **{name: list(pair) for name, pair in spec.conditioning.given.items()},
        **({"components": list(spec.components)} if spec.components else {}),
        "versions": {"sdtrt": __version__, **host.library_versions()},
    }


def caching_facts(spec: PipelineSpec) -> dict[str, Any]:
    """How deep features were kept. Other images say nothing of it."""
    caching, depth = spec.savings.caching, depth_of(spec.engines.groups, DEEP_OUT)
    if depth is None:
        return {}
    return {"deep_caching": {"interval": caching.interval, "depth": depth, "schedule": caching.schedule}}


def _caching_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same, a field each: no web UI has words for it."""
    facts = settings.get("deep_caching", {})
    return {f"Cache {name}": value for name, value in facts.items()}


def refiner_facts(spec: GenerateSpec, refiner: PipelineSpec | None, directory: EngineDirectory) -> dict[str, Any]:
    """Which refiner it was, and where it took over; empty for none."""
    if spec.refiner is None or refiner is None:
        return {}
    return {"refiner": {**_model_facts(refiner.model, directory), "start": spec.refiner.start}}


def upscale_facts(spec: GenerateSpec, larger: PipelineSpec | None, directory: EngineDirectory) -> dict[str, Any]:
    """How a second pass was made, and its size; empty for none."""
    if spec.upscale is None or larger is None:
        return {}
    one, path = spec.upscale, Path(spec.upscale.upscaler).expanduser()
    facts: dict[str, Any] = {"factor": one.factor, "upscaler": one.upscaler, "strength": one.strength}
    if one.upscaler not in (LATENT, LANCZOS):
        facts["sha256"] = directory.file_digest(path)
    facts |= {"steps": one.steps or spec.steps, "width": larger.sizes.width, "height": larger.sizes.height}
    return {"upscale": facts}


def _hires(spec: GenerateSpec) -> dict[str, Any]:
    """A second pass in web UIs' words."""
    if (one := spec.upscale) is None:
        return {}
    return {
        "Denoising strength": float(one.strength),
        "Hires upscale": float(one.factor),
        "Hires steps": one.steps,
        "Hires upscaler": title_of(one),
    }


def _refiner_title(settings: Mapping[str, Any]) -> str | None:
    """A refiner's name and hash, as web UIs write them."""
    if "refiner" not in settings:
        return None
    facts = settings["refiner"]
    title = Path(facts["name"]).stem if "sha256" in facts else Path(facts["name"]).name
    return f"{title} [{facts['sha256'][:10]}]" if "sha256" in facts else title


def _noise_facts(spec: GenerateSpec) -> dict[str, Any]:
    """What was asked of the noise, which the scheduler's facts don't tell from the model's own."""
    names = [one.name for one in fields(NoiseSpec) if one.name != "sources"]
    asked = {name: value for name in names if (value := getattr(spec.noise, name)) is not None}
    return {"noise": asked} if asked else {}


def _savings_facts(spec: GenerateSpec) -> dict[str, Any]:
    """What of a run's work was left out; empty for nothing."""
    interval, named = spec.savings.guidance, {} if spec.quality is None else {"quality": spec.quality}
    return named if interval.is_whole else {**named, "guidance_interval": [interval.start, interval.stop]}


def _mask_facts(spec: GenerateSpec, mask: Mask) -> dict[str, Any]:
    """Which mask it was, and how it was used. Other images say nothing of masks."""
    facts = {"name": mask.path.name, "sha256": mask.sha256}
    return {"mask": facts, "mask_blur": spec.mask_blur, "padding_crop": spec.padding_crop}


def _image_prompt_facts(
    spec: GenerateSpec, model: Model, directory: EngineDirectory, pictures: Sequence[images.InitImage]
) -> dict[str, Any]:
    """Which IP-Adapters there were, and which picture each got. Other images say nothing of them."""
    facts = [
        {
            "name": adapter.name,
            "file": given,
            "sha256": directory.file_digest(adapter.path),
            "image_encoder": directory.file_digest(adapter.encoder_files[1]),
            "scale": asked.scale,
            "image": {"name": picture.path.name, "sha256": picture.sha256},
        }
        for adapter, given, asked, picture in zip(
            model.ip_adapters, model.spec.ip_adapters, spec.ip_images, pictures, strict=True
        )
    ]
    return {"ip_adapters": facts} if facts else {}


def _image_prompt_fields(settings: Mapping[str, Any]) -> dict[str, str]:
    """IP-Adapters by the name under which web UIs have them: units of their ControlNet extension,
    behind those of ControlNets and T2I-Adapters."""
    before = sum(len(settings.get(name, ())) for name in ("controlnets", "t2i_adapters"))
    return {
        f"ControlNet {number}": f"Module: ip-adapter-auto, Model: {one['name']} [{one['sha256'][:8]}],"
        f" Weight: {one['scale']:g}, Guidance Start: 0.0, Guidance End: 1.0"
        for number, one in enumerate(settings.get("ip_adapters", ()), before)
    }


def _control_facts(
    opened: OpenPipeline, controls: Sequence[ControlImage], directory: EngineDirectory
) -> dict[str, Any]:
    """Which ControlNets there were, and what each went by. Other images say nothing of ControlNets."""
    models = (opened.spec.model, *opened.spec.others.values())
    facts = [
        {
            "name": one.spec.name,
            "fingerprint": model.fingerprint(PART, directory.file_digest),
            "image": {"name": one.picture.path.name, "sha256": one.picture.sha256},
            "scale": one.spec.scale,
            "start": one.spec.start,
            "end": one.spec.end,
            "preprocessor": one.spec.preprocessor,
            "mode": one.spec.mode,
        }
        for one, model in zip(controls, models, strict=False)
    ]
    return {"controlnets": facts} if facts else {}


def adapter_facts(opened: OpenPipeline, adapters: Sequence[AdapterImage], directory: EngineDirectory) -> dict[str, Any]:
    """Which T2I-Adapters there were, and what each went by. Other images say nothing of them."""
    models = (opened.spec.model, *opened.spec.adapters)
    facts = [
        {
            "name": one.spec.name,
            "fingerprint": model.fingerprint(ADAPTER, directory.file_digest),
            "image": {"name": one.picture.path.name, "sha256": one.picture.sha256},
            "scale": one.spec.scale,
        }
        for one, model in zip(adapters, models, strict=False)
    ]
    return {"t2i_adapters": facts} if facts else {}


def _adapter_fields(settings: Mapping[str, Any]) -> dict[str, str]:
    """T2I-Adapters as web UIs have them: units of their ControlNet extension; no ControlNet is beside them."""
    return {
        f"ControlNet {number}": f"Module: none, Model: {_control_title(one['name'])}, Weight: {one['scale']},"
        " Resize Mode: Just Resize, Guidance Start: 0.0, Guidance End: 1.0"
        for number, one in enumerate(settings.get("t2i_adapters", ()))
    }


def _control_fields(settings: Mapping[str, Any]) -> dict[str, str]:
    """`ControlNet 0: Module: canny, Model: ...`, as sd-webui-controlnet writes it, a field for each."""
    fields = {}
    for number, one in enumerate(settings.get("controlnets", ())):
        is_canny = one["preprocessor"] == "canny"
        words = {
            "Module": "canny" if is_canny else "none",
            "Model": _control_title(one["name"]),
            "Weight": one["scale"],
            "Resize Mode": "Just Resize",
            **({"Threshold A": CANNY_LOW, "Threshold B": CANNY_HIGH} if is_canny else {}),
            "Guidance Start": one["start"],
            "Guidance End": one["end"],
            "Pixel Perfect": is_canny,
            "Control Mode": "Balanced",
        }
        fields[f"ControlNet {number}"] = ", ".join(f"{name}: {value}" for name, value in words.items())
    return fields


def _control_title(name: str) -> str:
    """A ControlNet's short name, as web UIs show it: without folders, and what separates their fields."""
    path = Path(name)
    title = path.stem if has_weight_suffix(name) else path.name or path.resolve().name
    return title.replace(",", " ").replace(":", " ")


def _model_facts(model: Model, directory: EngineDirectory) -> dict[str, Any]:
    """Which model it was: its name, and the fingerprints of the parts with weights (the name alone may change hands).

    A single file's own sha256 is there too: web UIs show its beginning as the model's hash.
    """
    spec = model.spec
    facts: dict[str, Any] = {"name": spec.name, "revision": spec.revision, "variant": spec.variant}
    if spec.config is not None:
        facts["config"] = spec.config
    for part in ("unet", *text_encoders_of(model), "vae"):
        facts[part] = model.fingerprint(part, directory.file_digest)
    if spec.vae is not None:
        facts["vae_name"] = spec.vae
    if model.loras:
        facts["loras"] = [_lora_facts(one, directory) for one in model.loras]
    if model.layout == "single-file":
        facts["sha256"] = directory.file_digest(model.source)
    return facts


def _lora_facts(lora: Lora, directory: EngineDirectory) -> dict[str, Any]:
    """Which LoRA it was, how much it counted, and the number by which web UIs know its file."""
    digest, hashed = directory.file_digest(lora.path), web_ui_hash(lora.path)
    named = {"name": lora.name, "file": lora.spec.name}
    return {**named, "weight": lora.spec.weight, "sha256": digest, "web_ui_hash": hashed}


def _text_facts(opened: OpenPipeline, directory: EngineDirectory) -> dict[str, Any]:
    """How texts were read, where a request says something of that."""
    plan = opened.spec.text
    facts: dict[str, Any] = {"prompt_syntax": plan.syntax, "tokens": opened.spec.sizes.tokens} if plan.is_own else {}
    facts |= {"clip_skip": plan.clip_skip} if plan.clip_skip else {}
    made = [
        {"name": one.name, "file": str(one.path), "token": one.token, "sha256": directory.file_digest(one.path)}
        for one in plan.embeddings
    ]
    return facts | ({"embeddings": made} if made else {})


def _clip_skip(opened: OpenPipeline) -> int | None:
    """The layer that web UIs count from the end: Stable Diffusion takes the last one, SDXL the last but one."""
    skipped = opened.spec.text.clip_skip
    return skipped + 1 + opened.spec.model.is_sdxl if skipped else None


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _model_title(model: Model) -> str:
    """A model's short name, as web UIs show it."""
    path = Path(model.spec.name)
    return path.stem if model.layout == "single-file" else path.name or path.resolve().name


def _scheduler_facts(scheduler: Any) -> dict[str, Any]:
    """What a scheduler is, and how it takes noise, as plain data."""
    config = scheduler.config
    names = ("prediction_type", "timestep_spacing", "rescale_betas_zero_snr")
    spaced = [flag for flag in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if config.get(flag)]
    facts = {"class": type(scheduler).__name__} | {name: config[name] for name in names if name in config}
    return facts | dict.fromkeys(spaced, True)


def metadata_of(
    spec: GenerateSpec, opened: OpenPipeline, settings: Mapping[str, Any], job: Job, batch_size: int
) -> images.Metadata:
    """The text that one image carries. Nothing in it changes between two runs with one seed."""
    sizes, prompt = opened.spec.sizes, job.prompt
    own = {"prompt": prompt, "negative_prompt": spec.negative_prompt, "seed": job.seed}
    own |= {"width": sizes.width, "height": sizes.height}
    parameters = images.format_parameters(prompt, spec.negative_prompt, _fields(spec, opened, settings, job))
    return images.Metadata(parameters, {**own, **settings, "batch_size": batch_size})


def _listed(settings: Mapping[str, Any], what: str) -> str | None:
    """Something of each LoRA beside its name, as web UIs list them; None without any."""
    loras = settings["model"].get("loras", ())
    return ", ".join(f"{_listable(one['name'])}: {one[what]}" for one in loras) or None


def _listable(name: str) -> str:
    """A name in a list of names and hashes: web UIs leave out what separates these, and find it so."""
    return name.replace(":", "").replace(",", "")


def _is_literal(spec: GenerateSpec, job: Job) -> bool:
    """Whether brackets are text."""
    return spec.prompt_syntax == "plain" and bool(set(job.prompt + spec.negative_prompt) & set("()[]"))


def _fields(spec: GenerateSpec, opened: OpenPipeline, settings: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """An image's settings by the names that web UIs have for them; None where they name none."""
    sizes, scheduler = opened.spec.sizes, opened.pipe.scheduler
    return {
        "Steps": spec.steps,
        "Sampler": sampler_name(scheduler),
        "Schedule type": schedule_type(scheduler, spec.noise.sigmas),
        "CFG scale": float(spec.guidance_scale),
        "Quality preset": spec.quality,
        "Guidance interval": ":".join(map(repr, _savings_facts(spec).get("guidance_interval", ()))) or None,
        "Seed": job.seed,
        "Size": f"{sizes.width}x{sizes.height}",
        "Model hash": settings["model"]["sha256"][:10] if "sha256" in settings["model"] else None,
        "Model": _model_title(opened.spec.model),
        "Lora hashes": _listed(settings, "web_ui_hash"),
        "Lora weights": _listed(settings, "weight"),
        "Clip skip": _clip_skip(opened),
        "TI hashes": ", ".join(
            f"{_listable(one['name'])}: {one['sha256'][:12]}" for one in settings.get("embeddings", ())
        )
        or None,
        "Denoising strength": float(spec.strength) if opened.spec.img2img and not spec.edit else None,
        **_hires(spec),
        "Refiner": _refiner_title(settings),
        "Refiner switch at": None if spec.refiner is None else spec.refiner.start,
        "Image CFG scale": float(spec.image_guidance_scale) if spec.edit else None,
        "Mask blur": spec.mask_blur or None,
        "Inpaint area": None if spec.padding_crop is None else "Only masked",
        "Masked area padding": spec.padding_crop,
        **_control_fields(settings),
        **_adapter_fields(settings),
        **_image_prompt_fields(settings),
        **_caching_fields(settings),
        "RNG": "CPU",  # web UIs take a GPU's otherwise: other noise
        "Noise Schedule": noise_schedule(scheduler),
        eta_field(scheduler): None if spec.eta is None else float(spec.eta),
        "Emphasis": "None" if _is_literal(spec, job) else None,
        "Version": f"sdtrt {__version__}",
    }
