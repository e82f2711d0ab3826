"""What schedulers are called: by sdtrt, diffusers, and web UIs. Case, spaces and dashes don't count.

Knows names alone; `pipeline.parts.schedulers` makes what they stand for.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from sdtrt.common.errors import UsageError

SchedulerName = Literal[
    "pndm",
    "ddim",
    "euler",
    "euler-a",
    "dpm++",
    "unipc",
    "lcm",
    "heun",
    "dpm++2m-sde",
    "dpm++2m-sde-heun",
    "dpm++3m-sde",
    "dpm++2s",
    "dpm++sde",
    "dpm2",
    "dpm2-a",
    "lms",
    "deis",
    "sa-solver",
    "tcd",
    "ddpm",
]

Sigmas = Literal["karras", "exponential", "beta", "uniform", "sgm_uniform", "simple", "ddim_uniform"]

SCHEDULERS: tuple[SchedulerName, ...] = get_args(SchedulerName)
SIGMAS: tuple[Sigmas, ...] = get_args(Sigmas)

# What else they are called. `_plain` has been applied to these: `DPM++ 2M` and `dpmpp_2m` are `dpm++2m`.
_ALIASES: dict[str, SchedulerName] = {
    "plms": "pndm",
    "eulerdiscrete": "euler",
    "eulerancestral": "euler-a",
    "eulerancestraldiscrete": "euler-a",
    "dpm++2m": "dpm++",
    "dpmsolvermultistep": "dpm++",
    "unipcmultistep": "unipc",
    "heundiscrete": "heun",
    "dpmsolversinglestep": "dpm++2s",
    "dpmsolversde": "dpm++sde",
    "kdpm2discrete": "dpm2",
    "dpm2ancestral": "dpm2-a",
    "kdpm2ancestraldiscrete": "dpm2-a",
    "lmsdiscrete": "lms",
    "deismultistep": "deis",
}
_SIGMA_ALIASES: dict[str, Sigmas] = {"ddim": "ddim_uniform", "normal": "uniform"}
_AUTOMATIC = "automatic"  # what web UIs call a sampler's usual schedule type


def find_scheduler(text: str) -> tuple[SchedulerName, Sigmas | None]:
    """The scheduler of a name, and the spacing of its noise levels where the name ends with that (`DPM++ 2M Karras`).

    Raises:
        UsageError: for an unknown one, with the nearest names.
    """
    plain = _plain(text)
    known: dict[str, SchedulerName] = {_plain(name): name for name in SCHEDULERS} | _ALIASES
    if plain in known:
        return known[plain], None
    endings = {_plain(name): name for name in SIGMAS}
    for ending in sorted(endings, key=len, reverse=True):
        if (name := known.get(plain.removesuffix(ending))) is not None:
            return name, endings[ending]
    raise _unknown(text, plain, known)


def find_sigmas(text: str) -> Sigmas | None:
    """The spacing of noise levels of a name, as web UIs' schedule type; None for their `Automatic`.

    Raises:
        UsageError: for an unknown one.
    """
    known: dict[str, Sigmas] = {_plain(name): name for name in SIGMAS} | _SIGMA_ALIASES
    plain = _plain(text)
    if plain == _AUTOMATIC:
        return None
    if plain not in known:
        raise UsageError(f"unknown sigmas: {text!r}", hint=f"choose one of {', '.join(SIGMAS)}")
    return known[plain]


def _plain(text: str) -> str:
    """A name without what does not count: `DPM++ 2M SDE` and `dpmpp_2m_sde` are `dpm++2msde`."""
    return re.sub(r"[\s_-]+", "", text.lower()).replace("dpmpp", "dpm++").removesuffix("scheduler")


def _unknown(text: str, plain: str, known: dict[str, SchedulerName]) -> UsageError:
    from difflib import get_close_matches

    close = list(dict.fromkeys(known[one] for one in get_close_matches(plain, known, n=3)))
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return UsageError(f"unknown scheduler: {text!r}", hint=f"{hint}choose one of {', '.join(SCHEDULERS)}")
