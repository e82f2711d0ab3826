"""Reads how a picture was made: the text in its file, a JSON document of ours, a web UI's text. Makes no picture.

What a web UI's words mean is `recipe_fields`'s; a file's value is never trusted to be of the right kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from sdtrt.backends import registry
from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.common.errors import UsageError
from sdtrt.models.resolve import Model
from sdtrt.pipeline.inputs import images
from sdtrt.pipeline.recipes.controls import adapters_of_ours, controls_of_ours, image_prompts_of_ours
from sdtrt.pipeline.recipes.fields import from_web_ui
from sdtrt.pipeline.recipes.files import Finder
from sdtrt.specs import AUTO, BackendName, GenerateSpec, Recipe

# What a picture may have several of: of each, what it is, the digest that tells it apart, and what its picture is.
_LISTED = {
    "controlnets": ("ControlNet", "fingerprint", "control image"),
    "ip_adapters": ("IP-Adapter", "sha256", "ip image"),
    "t2i_adapters": ("T2I-Adapter", "fingerprint", "t2i image"),
}
MAX_TEXT_BYTES = 4 << 20
FORMATS_HINT = "name a picture of sdtrt or of a web UI (AUTOMATIC1111, Forge), its JSON, or its text as .txt"
# Of our JSON: option → where its value is, and of which types it may be.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[type, ...]]] = {
    "negative_prompt": (("negative_prompt",), (str,)),
    "steps": (("steps",), (int,)),
    "guidance_scale": (("guidance_scale",), (int, float)),
    "strength": (("strength",), (int, float)),
    "edit": (("edit",), (bool,)),
    "image_guidance_scale": (("image_guidance_scale",), (int, float)),
    "mask_blur": (("mask_blur",), (int,)),
    "padding_crop": (("padding_crop",), (int,)),
    "prompt_syntax": (("prompt_syntax",), (str,)),
    "clip_skip": (("clip_skip",), (int,)),
    "component": (("components",), (list,)),
    "scheduler": (("scheduler", "name"), (str,)),
    "prediction_type": (("noise", "prediction_type"), (str,)),
    "timestep_spacing": (("noise", "timestep_spacing"), (str,)),
    "zero_snr": (("noise", "zero_snr"), (bool,)),
    "sigmas": (("noise", "sigmas"), (str,)),
    "eta": (("eta",), (int, float)),
    "model": (("model", "name"), (str,)),
    "revision": (("model", "revision"), (str,)),
    "variant": (("model", "variant"), (str,)),
    "config": (("model", "config"), (str,)),
    "vae": (("model", "vae_name"), (str,)),
    "upscale": (("upscale", "factor"), (int, float)),
    "upscaler": (("upscale", "upscaler"), (str,)),
    "upscale_steps": (("upscale", "steps"), (int,)),
    "upscale_strength": (("upscale", "strength"), (int, float)),
    "vae_tiling": (("vae_tiling",), (bool,)),
    "quality": (("quality",), (str,)),
    "cache_interval": (("deep_caching", "interval"), (int,)),
    "cache_depth": (("deep_caching", "depth"), (int,)),
    "cache_schedule": (("deep_caching", "schedule"), (str,)),
    "refiner": (("refiner", "name"), (str,)),
    "refiner_start": (("refiner", "start"), (int, float)),
}
# What is compared with the new picture's, read elsewhere, or follows from the rest.
_TOLD = {
    *("prompt", "seed", "width", "height", "images", "model", "backend", "device", "precision", "scheduler", "noise"),
    *("init_image", "mask", "batch_size", "tokens", "embeddings", "versions", "engine", "engines", "seconds"),
    *("original_size", "crop", "target_size", "controlnets", "ip_adapters", "t2i_adapters", "guidance_interval"),
}


def read_recipe(path: Path) -> Recipe:
    """Read how the picture of a file was made.

    Args:
        path: a picture (PNG, JPEG, WebP) of ours or of a web UI, a JSON document of ours, or a web UI's text.

    Raises:
        UsageError: for a file that tells nothing, or tells it in another program's way.
    """
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise UsageError(f"--from {path} {problem}", hint=FORMATS_HINT)
    if path.suffix.lower() in (".json", ".txt"):
        return _of_text(path, _text_of(path))
    metadata = images.read_metadata(path)
    if metadata is None or not metadata.parameters.strip():
        raise _silent(path)
    if metadata.details:
        return _of_ours(path, metadata.details)
    return from_web_ui(path, metadata.parameters)


def _text_of(path: Path) -> str:
    """A text file's content. Raises `UsageError` for none."""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise UsageError(f"--from {path} is larger than a recipe is", hint=FORMATS_HINT)
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--from {path} can't be read: {error}", hint=FORMATS_HINT) from error


def _of_text(path: Path, text: str) -> Recipe:
    """The recipe in a document of ours, or in a web UI's text."""
    if not text.lstrip().startswith(("{", "[")) and path.suffix.lower() == ".txt":
        return from_web_ui(path, text.strip())
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--from {path} is no JSON: {error}", hint=FORMATS_HINT) from error
    if _is_of_comfy(document):
        raise _of_comfy(path)
    if not isinstance(document, dict) or "sdtrt" not in _at(document, ("versions",), (dict,), {}):
        raise UsageError(f"--from {path} is no JSON that sdtrt wrote", hint=FORMATS_HINT)
    return _of_ours(path, document)


def _silent(path: Path) -> UsageError:
    """The error for a picture without a text that is read."""
    with Image.open(path) as image:
        if image.info.keys() & {"workflow", "prompt"}:
            return _of_comfy(path)
    return UsageError(f"--from {path} carries no text that says how it was made", hint=FORMATS_HINT)


def _is_of_comfy(document: object) -> bool:
    """Whether a document is a graph of ComfyUI: for its page, or for its server."""
    if not isinstance(document, dict):
        return False
    return "nodes" in document or any(isinstance(one, dict) and "class_type" in one for one in document.values())


def _of_comfy(path: Path) -> UsageError:
    return UsageError(
        f"--from {path} is a workflow of ComfyUI, a program of its own that sdtrt does not read",
        hint="give its settings as options: --prompt, --steps, --seed, ...",
    )


def _at(document: Mapping[str, Any], keys: tuple[str, ...], types: tuple[type, ...], default: Any = None) -> Any:
    """A value in nested objects; the default where it is not there or of other types."""
    found: Any = document
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    fits = isinstance(found, types) and not (isinstance(found, bool) and not {bool, object} & set(types))
    return found if fits else default


def _of_ours(path: Path, details: Mapping[str, Any]) -> Recipe:
    """The recipe in what sdtrt wrote: a picture's own settings, or a command's report on several."""
    files = Finder(path)
    options = {name: value for name, where in _FIELDS.items() if (value := _at(details, *where)) is not None}
    left = [f"{name} {_at(details, keys, (object,))!r}" for name, (keys, _) in _FIELDS.items() if _odd(details, name)]
    options |= _images(path, details) | _pairs(details) | _interval(details)
    options |= {"lora": loras} if (loras := files.loras_of_ours(_at(details, ("model", "loras"), (list,), []))) else {}
    embeddings = files.embeddings_of_ours(_at(details, ("embeddings",), (list,), []))
    options |= {"embedding": embeddings} if embeddings else {}
    options |= controls_of_ours(_at(details, ("controlnets",), (list,), []), files)
    options |= image_prompts_of_ours(_at(details, ("ip_adapters",), (list,), []), files)
    options |= adapters_of_ours(_at(details, ("t2i_adapters",), (list,), []), files)
    for name in ("init_image", "mask"):
        options |= files.picture(name, details.get(name))
    machine, problems = _machine(details)
    left += [*problems, *files.missing]
    left += [f"{name}: sdtrt has no such option" for name in details if name not in _TOLD | _roots()]
    return Recipe(path, options | machine, _recorded(details), absent=files.absent, left=tuple(left))


def _odd(details: Mapping[str, Any], name: str) -> bool:
    """Whether a field is there, but of no type that is read."""
    keys, types = _FIELDS[name]
    return _at(details, keys, (object,)) is not None and _at(details, keys, types) is None


def _roots() -> set[str]:
    return {keys[0] for keys, _ in _FIELDS.values()}


def _images(path: Path, details: Mapping[str, Any]) -> dict[str, Any]:
    """Prompts, seeds and size: a picture's own, or those of a report on several."""
    made = [one for one in _at(details, ("images",), (list,), [details]) if isinstance(one, dict)]
    seeds: list[Any] = [one.get("seed") for one in made]
    prompts: list[Any] = [one.get("prompt") for one in made]
    if not made or not all(isinstance(one, int) for one in seeds) or not all(isinstance(one, str) for one in prompts):
        raise UsageError(f"--from {path} names no prompt and seed", hint=FORMATS_HINT)
    jobs: list[tuple[str, int]] = list(zip(prompts, seeds, strict=True))
    count = next((number for number, (prompt, _) in enumerate(jobs) if prompt != prompts[0]), len(jobs))
    first: int = jobs[0][1]
    if [(one, seed) for one in prompts[::count] for seed in range(first, first + count)] != jobs:
        raise UsageError(f"--from {path} tells of pictures of several commands", hint="name one picture's own file")
    options: dict[str, Any] = {"prompt": prompts[::count], "seed": first, "num_images": count}
    for name in ("width", "height"):
        options |= {name: size} if (size := _at(made[0], (name,), (int,))) else {}
    negative = _at(made[0], ("negative_prompt",), (str,))
    return options | ({"negative_prompt": negative} if negative else {})


def _pairs(details: Mapping[str, Any]) -> dict[str, str]:
    """SDXL's size conditioning."""
    found = {}
    for name, mark in (("original_size", "x"), ("crop", ","), ("target_size", "x")):
        pair = _at(details, (name,), (list,), [])
        if len(pair) == 2 and all(isinstance(one, int) for one in pair):
            found[name] = f"{pair[0]}{mark}{pair[1]}"
    return found


def _interval(details: Mapping[str, Any]) -> dict[str, str]:
    """The part of the run that was guided."""
    ends = _at(details, ("guidance_interval",), (list,), [])
    fits = len(ends) == 2 and all(isinstance(one, int | float) for one in ends)
    return {"guidance_interval": f"{ends[0]!r}:{ends[1]!r}"} if fits else {}


def _machine(details: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Backend and precision, where that backend runs here; else why not."""
    name = _at(details, ("backend",), (str,))
    if name is None:
        return {}, []
    if problem := _why_not(name):
        return {}, [f"backend {name}, precision {details.get('precision')}: {problem}"]
    precision = _at(details, ("precision",), (str,))
    return {"backend": name} | ({"precision": precision} if precision else {}), []


def _why_not(name: BackendName) -> str | None:
    """Why a backend does not run here; None if it does."""
    if name == AUTO or name not in registry.names():
        return "there is no such backend"
    backend = registry.get(name)
    if "cpu" not in backend.devices and not host.gpus():
        return "there is no NVIDIA GPU here"
    error = backend.why_not()
    return None if error is None else error.message


def _recorded(details: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a new picture is compared with."""
    names = ("model", "backend", "precision", "device", "versions", "init_image", "mask", "batch_size")
    return {name: details[name] for name in (*names, *_LISTED) if name in details}


def settle(spec: GenerateSpec, model: Model) -> GenerateSpec:
    """The request with what a web UI's text means only beside its model: the layer that it takes of a text encoder."""
    recipe = spec.recipe
    if recipe is None or recipe.last_layer is None or spec.clip_skip:
        return spec
    return replace(spec, clip_skip=max(recipe.last_layer - 1 - model.is_sdxl, 0))


def tell(recipe: Recipe, console: Console) -> None:
    """Say what was taken of a file, and what was not."""
    console.note(f"from {recipe.path}, where nothing else was typed: {', '.join(sorted(recipe.options))}")
    for text in recipe.left:
        console.warn(f"not taken from {recipe.path}: {text}")


def tell_differences(recipe: Recipe, settings: Mapping[str, Any], console: Console) -> None:
    """Say where what is made now is not what the file tells of: weights, machine, pictures to start from."""
    there, here = recipe.recorded, settings
    for part, digest in _at(there, ("model",), (dict,), {}).items():
        now = here["model"].get(part)
        if part in ("unet", "text_encoder", "text_encoder_2", "vae") and now is not None and now != digest:
            console.warn(f"{recipe.path} was made with other weights of the {part}: its picture will differ")
    title = here["model"]["name"]
    hashed = here["model"].get("sha256")
    if recipe.model_hash is not None and hashed is not None and not hashed.startswith(recipe.model_hash.lower()):
        console.warn(
            f"{recipe.path} was made with {recipe.model_title} ({recipe.model_hash}), {title} is another model"
        )
    elif recipe.model_title is not None and (recipe.model_hash is None or hashed is None):
        console.note(f"{recipe.path} names the model {recipe.model_title}; whether {title} is that one can't be told")
    for name in ("init_image", "mask"):
        own, other = (_at(one, (name, "sha256"), (str,)) for one in (there, here))
        if own is not None and other is not None and own != other:
            console.warn(f"{recipe.path} was made from another {name.replace('_', ' ')}: its picture will differ")
    _tell_listed(recipe, settings, console)
    _tell_rounding(recipe, settings, console)


def _tell_listed(recipe: Recipe, settings: Mapping[str, Any], console: Console) -> None:
    """Say where ControlNets, IP-Adapters and what they go by are others."""
    for name, (what, digest, picture) in _LISTED.items():
        there, here = (_at(one, (name,), (list,), []) for one in (recipe.recorded, settings))
        for own, now in zip(there, here, strict=False):
            if _at(own, (digest,), (str,), now[digest]) != now[digest]:
                console.warn(f"{recipe.path} was made with another {what} {_at(own, ('name',), (str,))}")
            if _at(own, ("image", "sha256"), (str,), now["image"]["sha256"]) != now["image"]["sha256"]:
                console.warn(f"{recipe.path} was made from another {picture}: its picture will differ")


def _tell_rounding(recipe: Recipe, settings: Mapping[str, Any], console: Console) -> None:
    """Say what makes a picture's last bits differ."""
    there, words = recipe.recorded, []
    for name in ("backend", "precision", "device", "batch_size"):
        if name in there and there[name] != settings[name]:
            words.append(f"{name.replace('_', ' ')} {there[name]}")
    versions = _at(there, ("versions",), (dict,), {})
    words += [f"{name} {one}" for name, one in versions.items() if settings["versions"].get(name, one) != one]
    if words:
        console.note(f"{recipe.path} was made with {', '.join(words)}: its pixels may differ by roundings")
