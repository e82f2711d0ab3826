"""What a web UI's text means here: AUTOMATIC1111's and Forge's `parameters`, field by field.

Sources: stable-diffusion-webui, modules/processing.py (what is written), modules/sd_samplers_kdiffusion.py and
modules/sd_schedulers.py (names). A field that means nothing here is said by name; those that only tell of the program
are not (`_SILENT`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdtrt.common.errors import UsageError
from sdtrt.pipeline.inputs.images import Parameters, parse_parameters
from sdtrt.pipeline.recipes.controls import UNIT, controls_of_web_ui
from sdtrt.pipeline.recipes.files import WEIGHTS, Finder
from sdtrt.pipeline.recipes.samplers import scheduler_options
from sdtrt.specs import EMBEDDING_SUFFIXES, EmbeddingSpec, GuidanceInterval, LoraSpec, Recipe

_TAG = re.compile(r"<(lora|lyco|hypernet):([^:>]+)((?::[^:>]*)*)>")
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
# Fields that change no picture, or are the other half of another one.
_SILENT = {
    *("Version", "User", "Lora hashes", "VAE hash", "Model hash", "Batch size", "Batch pos", "Emphasis"),
    *("Schedule type", "Masked area padding", "Lora weights"),
}
_LAYER = "Clip skip"


@dataclass
class _Reading:
    """One text on its way to options."""

    text: Parameters
    files: Finder
    options: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def value(self, name: str) -> str | None:
        """A field's text; None where it is not there or says nothing."""
        found = self.text.fields.get(name, "").strip()
        return found if found and found != "None" else None

    def number(self, name: str, kind: type[int] | type[float]) -> int | float | None:
        """A field's number; None, with a word on it, where it is none."""
        text = self.text.fields[name].strip()
        try:
            if math.isfinite(found := kind(text)):
                return found
        except (ValueError, OverflowError):
            pass
        self.left.append(f"{name}: {text} is no number")
        return None


def from_web_ui(path: Path, text: str) -> Recipe:
    """The recipe in a web UI's text.

    Raises:
        UsageError: for a text without fields.
    """
    reading = _Reading(parse_parameters(text), Finder(path))
    if not reading.text.fields:
        raise UsageError(
            f"--from {path}: its text has no settings (Steps: 20, Sampler: ...)", hint="name a picture of a web UI"
        )
    _texts(reading)
    for name in reading.text.fields:
        if name in _READERS:
            _READERS[name](reading, name)
        elif name not in _SILENT and not UNIT.fullmatch(name):
            reading.left.append(f"{name}: {reading.text.fields[name]}")
    units = {name: one for name, one in reading.text.fields.items() if UNIT.fullmatch(name)}
    reading.options |= controls_of_web_ui(units, reading.files)
    options, left = scheduler_options(
        reading.value("Sampler"), reading.value("Schedule type"), ours=_is_ours(reading.text)
    )
    fields = reading.text.fields
    reading.left += left + ([] if fields.get("RNG") == "CPU" else [_noise(fields.get("RNG", "GPU"))])
    layer = int(fields[_LAYER]) if fields.get(_LAYER, "").isdecimal() and len(fields[_LAYER]) < 3 else None
    return Recipe(
        path,
        reading.options | options,
        model_title=reading.value("Model"),
        model_hash=reading.value("Model hash"),
        last_layer=layer,
        absent=reading.files.absent,
        left=(*reading.left, *reading.files.missing),
    )


def _noise(source: str) -> str:
    """What is said where the noise was not drawn on a CPU."""
    return f"RNG: {source} (its noise was not drawn on a CPU, as it is here: the seed gives another picture)"


def _is_ours(text: Parameters) -> bool:
    return text.fields.get("Version", "").startswith("sdtrt")


def _texts(reading: _Reading) -> None:
    """The prompts without their tags, what these name, and how brackets are read."""
    text = reading.text
    plain = _is_ours(text) and (text.fields.get("Emphasis") == "None" or not set("()[]") & set(text.prompt))
    tagged = "" if plain else text.prompt + text.negative_prompt
    loras = [str(one) for one in _loras(reading, tagged)]
    prompts = [one if plain else _untagged(one) for one in (text.prompt, text.negative_prompt)]
    reading.options["prompt"] = [prompts[0]]
    if prompts[1]:
        reading.options["negative_prompt"] = prompts[1]
    if not (plain or text.fields.get("Emphasis") == "None"):
        reading.options["prompt_syntax"] = "webui"
    if (emphasis := text.fields.get("Emphasis", "Original")) not in ("Original", "None"):
        reading.left.append(f"Emphasis: {emphasis} (weights count as in Original)")
    if loras:
        reading.options["lora"] = loras


def _untagged(text: str) -> str:
    """A prompt without tags: the spaces around one stay, as web UIs leave them."""
    return _TAG.sub("", text).strip() if _TAG.search(text) else text


def _loras(reading: _Reading, text: str) -> Iterator[LoraSpec]:
    """The LoRAs that tags name, and whose files are found."""
    for kind, name, rest in _TAG.findall(text):
        weights = rest.split(":")[1:]
        if kind == "hypernet":
            reading.left.append(f"<{kind}:{name}{rest}>: sdtrt has no hypernetworks")
            continue
        if len(weights) > 1:
            reading.left.append(f"<{kind}:{name}{rest}>: one weight, the first, is for all of it")
        path = reading.files.wanted("LoRA", name, WEIGHTS, "--lora FILE:WEIGHT")
        if path is not None:
            try:
                yield LoraSpec(str(path), float(weights[0]) if weights else 1.0)
            except (ValueError, UsageError):
                reading.left.append(f"<{kind}:{name}{rest}>: its weight is no number")


# A field each -------------------------------------------------------------------------------------------------------


def _number(option: str, kind: type[int] | type[float]) -> Callable[[_Reading, str], None]:
    """What takes a number for an option."""

    def read(reading: _Reading, name: str) -> None:
        found = reading.number(name, kind)
        if found is not None:
            reading.options[option] = found

    return read


def _size(reading: _Reading, name: str) -> None:
    match = _SIZE.fullmatch(reading.text.fields[name].strip())
    if match is None:
        reading.left.append(f"{name}: {reading.text.fields[name]}")
    else:
        reading.options |= {"width": int(match[1]), "height": int(match[2])}


def _model(reading: _Reading, name: str) -> None:
    title = reading.value(name)
    found = reading.files.find(title, WEIGHTS) if title else None
    if found is not None or title == "tiny":
        reading.options["model"] = "tiny" if found is None else str(found)


def _vae(reading: _Reading, name: str) -> None:
    title = reading.value(name)
    if title is None or title == "Automatic":
        return
    path = reading.files.wanted("VAE", title, WEIGHTS, "--vae FILE")
    if path is not None:
        reading.options["vae"] = str(path)


def _refiner(reading: _Reading, name: str) -> None:
    """`title [hash]`."""
    title = re.sub(r"\s*\[[0-9a-f]*\]$", "", reading.text.fields[name].strip())
    path = reading.files.wanted("refiner", title, WEIGHTS, "--refiner MODEL")
    if path is not None:
        reading.options["refiner"] = str(path)


def _strength(reading: _Reading, name: str) -> None:
    """Of a picture with a hires fix it is that one's."""
    if "Image CFG scale" in reading.text.fields and reading.value(name) not in ("1", "1.0"):
        reading.left.append(f"{name}: {reading.text.fields[name]} (an edit starts from noise)")
        return
    _number("upscale_strength" if "Hires upscale" in reading.text.fields else "strength", float)(reading, name)


def _edit(reading: _Reading, name: str) -> None:
    """Web UIs write it of pictures by a model that edits, and of no others."""
    _number("image_guidance_scale", float)(reading, name)
    reading.options["edit"] = True


def _interval(reading: _Reading, name: str) -> None:
    """Our own: web UIs have no such field."""
    text = reading.text.fields[name].strip()
    try:
        GuidanceInterval.parse(text)
    except UsageError:
        reading.left.append(f"{name}: {text}")
    else:
        reading.options["guidance_interval"] = text


def _eta(reading: _Reading, name: str) -> None:
    """DDIM's and TCD's alone: what web UIs' other samplers take under that name, diffusers' schedulers don't."""
    if (name, reading.value("Sampler")) in (("Eta DDIM", "DDIM"), ("Eta", "TCD")):
        _number("eta", float)(reading, name)
    else:
        reading.left.append(f"{name}: {reading.text.fields[name]} (sdtrt has no eta for {reading.value('Sampler')})")


def _hires_steps(reading: _Reading, name: str) -> None:
    """0 means as many as the picture has."""
    found = reading.number(name, int)
    if found:
        reading.options["upscale_steps"] = found


def _upscaler(reading: _Reading, name: str) -> None:
    title = reading.value(name)
    if title in ("Latent", "Lanczos"):
        reading.options["upscaler"] = title.lower()
    elif title is not None:
        path = reading.files.wanted("Hires upscaler", title, (*WEIGHTS, ".pth"), "--upscaler FILE")
        reading.options |= {} if path is None else {"upscaler": str(path)}


def _layer(reading: _Reading, name: str) -> None:
    if not reading.text.fields[name].isdecimal():
        reading.left.append(f"{name}: {reading.text.fields[name]}")


def _embeddings(reading: _Reading, name: str) -> None:
    found = []
    for one in reading.text.fields[name].split(","):
        title = one.partition(":")[0].strip()
        if title and (path := reading.files.wanted("embedding", title, EMBEDDING_SUFFIXES, "--embedding FILE")):
            found.append(str(EmbeddingSpec(str(path), title)))
    if found:
        reading.options["embedding"] = found


def _area(reading: _Reading, name: str) -> None:
    """Only the masked part: the pixels around it are a field of their own."""
    if reading.value(name) == "Only masked":
        padding = reading.number("Masked area padding", int) if "Masked area padding" in reading.text.fields else 32
        reading.options["padding_crop"] = 32 if padding is None else padding
    elif reading.value(name) != "Whole picture":
        reading.left.append(f"{name}: {reading.text.fields[name]}")


def _noise_schedule(reading: _Reading, name: str) -> None:
    if reading.value(name) == "Zero Terminal SNR":
        reading.options["zero_snr"] = True
    elif reading.value(name) != "Default":
        reading.left.append(f"{name}: {reading.text.fields[name]}")


def _word(option: str) -> Callable[[_Reading, str], None]:
    """A reader of our own fields that are words."""

    def read(reading: _Reading, name: str) -> None:
        reading.options[option] = reading.text.fields[name].strip()

    return read


def _nothing(reading: _Reading, name: str) -> None:
    """Another function has it."""


_READERS: dict[str, Callable[[_Reading, str], None]] = {
    "Steps": _number("steps", int),
    "CFG scale": _number("guidance_scale", float),
    "Guidance interval": _interval,
    "Seed": _number("seed", int),
    "Denoising strength": _strength,
    "Hires upscale": _number("upscale", float),
    "Hires steps": _hires_steps,
    "Hires upscaler": _upscaler,
    "Mask blur": _number("mask_blur", int),
    "Eta": _eta,
    "Eta DDIM": _eta,
    "Image CFG scale": _edit,
    "Size": _size,
    "Model": _model,
    "VAE": _vae,
    "Refiner": _refiner,
    "Refiner switch at": _number("refiner_start", float),
    "Clip skip": _layer,
    "TI hashes": _embeddings,
    "Inpaint area": _area,
    "Noise Schedule": _noise_schedule,
    "Cache interval": _number("cache_interval", int),
    "Cache depth": _number("cache_depth", int),
    "Cache schedule": _word("cache_schedule"),
    "Quality preset": _word("quality"),
    "Sampler": _nothing,
    "RNG": _nothing,
}
