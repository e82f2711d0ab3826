"""What web UIs' samplers and schedule types are called here. Makes no scheduler."""

from __future__ import annotations

import re

from sdtrt.specs import SCHEDULERS

_NAMES = {
    "PLMS": "pndm",
    "DPM++ 2M": "dpm++",
    "Euler a": "euler-a",
}
_SPACED = ("Karras", "Exponential", "Beta")  # schedules of noise levels, not of timesteps
# The last two are `trailing` to a timestep or less.
_SPACINGS = {"Uniform": "linspace", "DDIM": "leading", "Simple": "trailing", "SGM Uniform": "trailing"}
_OF_ONE_SPACING = ("DDIM", "PLMS", "UniPC", "LCM", "TCD")
# What stable-diffusion-webui takes for a sampler whose schedule is `Automatic`, or not named; others are uniform.
_AUTOMATIC = {
    "DPM++ 2M": "Karras",
    "DPM++ SDE": "Karras",
    "DPM++ 2M SDE": "Exponential",
    "DPM++ 2M SDE Heun": "Exponential",
    "DPM++ 3M SDE": "Exponential",
    "DPM2": "Karras",
    "DPM2 a": "Karras",
    "DPM++ 2S a": "Karras",
}


def scheduler_options(
    sampler: str | None, schedule: str | None, *, ours: bool = False
) -> tuple[dict[str, str], list[str]]:
    """The options for a web UI's sampler and schedule type, and what has none.

    Args:
        sampler: as in `DPM++ 2M`; before version 1.9 with its schedule, as in `DPM++ 2M Karras`.
        schedule: None where the text names none.
        ours: whether sdtrt wrote it, which says nothing of a schedule only where there is none.
    """
    if sampler is None:
        return {}, []
    old = re.fullmatch(rf"(.+) ({'|'.join((*_SPACED, 'SGM Uniform'))})", sampler)
    sampler, named = (old[1], old[2]) if old else (sampler, schedule)
    if named in (None, "Automatic") and not ours:
        named = _AUTOMATIC.get(sampler, "Uniform") if schedule is not None else "Uniform"
    name = _name_of(sampler)
    if name is None:
        return {}, [f"Sampler: {sampler} (sdtrt has no such scheduler: the model's own is used)"]
    return _with_schedule(sampler, name, named)


def _with_schedule(sampler: str, name: str, schedule: str | None) -> tuple[dict[str, str], list[str]]:
    """A scheduler's options with a schedule's."""
    if schedule is None or sampler in _OF_ONE_SPACING:
        return {"scheduler": name}, []
    if schedule in _SPACINGS:
        return {"scheduler": name, "timestep_spacing": _SPACINGS[schedule]}, []
    if schedule in _SPACED:
        return {"scheduler": name, "sigmas": schedule.lower()}, []
    return {"scheduler": name}, [f"Schedule type: {schedule} (sdtrt has no such schedule)"]


def _name_of(sampler: str) -> str | None:
    """A scheduler's name here: by the table, else by the words."""
    words = sampler.lower()
    guesses = (_NAMES.get(sampler), words, words.replace(" ", "-"), words.replace("++ ", "++").replace(" ", "-"))
    return next((one for one in guesses if one in SCHEDULERS), None)
