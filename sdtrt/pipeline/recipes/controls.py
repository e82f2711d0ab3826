"""Reads which ControlNets and adapters a picture had, and what these went by: from our JSON, from a web UI's text.

Reads no picture but to know it by its digest, and no weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sdtrt.pipeline.inputs.control_images import CANNY_HIGH, CANNY_LOW
from sdtrt.pipeline.recipes.files import WEIGHTS, Finder

UNIT = re.compile(r"ControlNet \d+")  # sd-webui-controlnet's fields, which has IP-Adapters, too
T2I = re.compile(r"t2i-?_?adapter", re.IGNORECASE)  # what the names of such files begin with
_PARTS = {"start": 0.0, "end": 1.0}
_USUAL = {"Resize Mode": "Just Resize", "Control Mode": "Balanced"}
_CANNY = {"Threshold A": CANNY_LOW, "Threshold B": CANNY_HIGH}


def controls_of_ours(facts: Sequence[object], files: Finder) -> dict[str, Any]:
    """The options for what a JSON of ours says of ControlNets."""
    known = [one for one in facts if isinstance(one, dict) and _are_numbers(one, "scale", *_PARTS)]
    files.missing += [f"ControlNet {one!r}: not understood" for one in facts if one not in known]
    named = [(files.named("ControlNet", one, WEIGHTS, "--controlnet ID:SCALE"), one) for one in known]
    rows = [{**one, "name": name} for name, one in named if name]
    options = _options(rows, files)
    pictures = [files.picture("control_image", one.get("image")) for one in rows]
    if options and all(pictures):
        options["control_image"] = [one["control_image"] for one in pictures]
    return options


def image_prompts_of_ours(facts: Sequence[object], files: Finder) -> dict[str, Any]:
    """The options for what a JSON of ours says of IP-Adapters."""
    known = [one for one in facts if isinstance(one, dict) and _are_numbers(one, "scale")]
    files.missing += [f"IP-Adapter {one!r}: not understood" for one in facts if one not in known]
    named = [(files.named("IP-Adapter", one, WEIGHTS, "--ip-adapter ID"), one) for one in known]
    rows = [(name, one, files.picture("ip_image", one.get("image"))) for name, one in named if name]
    options: dict[str, Any] = {"ip_adapter": [name for name, *_ in rows]} if rows else {}
    if rows and all(picture for *_, picture in rows):
        options["ip_image"] = [f"{picture['ip_image']}:{one['scale']}" for _, one, picture in rows]
    return options


def adapters_of_ours(facts: Sequence[object], files: Finder) -> dict[str, Any]:
    """The options for what a JSON of ours says of T2I-Adapters."""
    known = [one for one in facts if isinstance(one, dict) and _are_numbers(one, "scale")]
    files.missing += [f"T2I-Adapter {one!r}: not understood" for one in facts if one not in known]
    named = [(files.named("T2I-Adapter", one, (), "--t2i-adapter ID:SCALE"), one) for one in known]
    rows = [(name, one, files.picture("t2i_image", one.get("image"))) for name, one in named if name]
    options: dict[str, Any] = {"t2i_adapter": [f"{name}:{one['scale']}" for name, one, _ in rows]} if rows else {}
    if rows and all(picture for *_, picture in rows):
        options["t2i_image"] = [picture["t2i_image"] for *_, picture in rows]
    return options


def controls_of_web_ui(units: Mapping[str, str], files: Finder) -> dict[str, Any]:
    """The options for a web UI's units: of ControlNets whose files are found. Their pictures no text names."""
    rows = [row for name, text in units.items() if (row := _unit(name, text, files))]
    if rows:
        files.absent["control_image"] = (
            f"{len(rows)} control image{'s' * (len(rows) != 1)}, which its text does not name"
        )
    return _options(rows, files)


def _unit(name: str, text: str, files: Finder) -> dict[str, Any] | None:
    """What one unit says of a ControlNet; None where it is another thing, or its file is not found."""
    said = dict(one.split(": ", 1) for one in text.split(", ") if ": " in one)
    title = re.sub(r"\s*\[[0-9a-f]*\]$", "", said.get("Model", "None"))
    module = said.get("Module", "none")
    numbers = [
        _number(said.get(one, usual)) for one, usual in (("Weight", 1), ("Guidance Start", 0), ("Guidance End", 1))
    ]
    is_image, is_t2i = module.startswith("ip-adapter"), bool(T2I.match(title))
    if is_image or is_t2i or "None" in (title, *map(str, numbers)):
        option = "--t2i-adapter ID:SCALE --t2i-image FILE" if is_t2i else "--controlnet ID:SCALE"
        option = "--ip-adapter ID --ip-image FILE:SCALE" if is_image else option
        files.missing.append(f"{name}: {text} (give {option})")
        return None
    path = files.wanted(name, title, WEIGHTS, "--controlnet FILE:SCALE")
    if path is None:
        return None
    scale, start, end = numbers
    usual = {**_USUAL, **(_CANNY if module == "canny" else {})}
    odd = [f"{key} {said[key]}" for key, one in usual.items() if key in said and not _is(said[key], one)]
    odd += [] if module in ("none", "None", "canny") else [f"Module {module} (give the map that it makes)"]
    files.missing += [f"{name}: {one}" for one in odd]
    preprocessor = "canny" if module == "canny" else None
    return {"name": str(path), "scale": scale, "start": start, "end": end, "preprocessor": preprocessor}


def _options(rows: Sequence[Mapping[str, Any]], files: Finder) -> dict[str, Any]:
    """The options of ControlNets without their pictures. What all leave as it usually is, none of them says."""
    if not rows:
        return {}
    options: dict[str, Any] = {"controlnet": [f"{one['name']}:{one['scale']}" for one in rows]}
    for part, usual in _PARTS.items():
        if any(one[part] != usual for one in rows):
            options[f"control_{part}"] = [one[part] for one in rows]
    if any(one.get("preprocessor") for one in rows):
        options["control_preprocessor"] = [str(one.get("preprocessor") or "none") for one in rows]
    modes = {one["mode"] for one in rows if isinstance(one.get("mode"), int)}
    if len(modes) == 1:
        options["control_mode"] = modes.pop()
    files.missing += [f"control modes {', '.join(map(str, sorted(modes)))}: a union is alone"] if modes else []
    return options


def _are_numbers(fact: Mapping[str, Any], *names: str) -> bool:
    values = [fact.get(name) for name in names]
    return all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)


def _number(text: object) -> float | None:
    """A number; None for what is none."""
    try:
        return found if math.isfinite(found := float(str(text))) else None
    except ValueError:
        return None


def _is(text: str, usual: object) -> bool:
    """Whether a text says what is usual: a number is one however it is written."""
    return text == usual or (_number(text) is not None and _number(text) == _number(usual))
