"""Checks, before anything heavy is loaded, that a scheduler runs so many steps. Makes no scheduler, only copies."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch

from sdtrt.common.errors import ModelError, UsageError, first_line
from sdtrt.pipeline.parts.schedulers import DISTILLED, unfit

# What diffusers' pipelines from text to images use of a scheduler.
_INTERFACE = ("set_timesteps", "timesteps", "init_noise_sigma", "scale_model_input", "step", "order")


def check_steps(scheduler: Any, steps: int, *, img2img: bool = False, strength: float = 1.0) -> None:
    """Refuse what a pipeline could not run: a scheduler that is none of text to image, or too many steps.

    Args:
        img2img: whether the pipeline starts from an image, to which the scheduler adds noise.
        strength: of an image that a pipeline of latent consistency models starts from: all steps lie in that part.

    Raises:
        ModelError: for a scheduler that runs no number of steps, or fails in these.
        UsageError: for more steps than it has (diffusers would repeat timesteps, or fail late).
    """
    name = type(scheduler).__name__
    if lacking := [one for one in (*_INTERFACE, *["add_noise"] * img2img) if not hasattr(scheduler, one)]:
        raise ModelError(
            f"the model's {name} is none for pipelines {'from images' if img2img else 'from text'} to images:"
            f" it has no {lacking[0]}",
            hint="use --scheduler, as in --scheduler euler, or another model",
        )
    try:
        _check_table(scheduler)
        most = _most_steps(scheduler, steps, strength)
        if 0 < steps <= most:
            _rehearse(scheduler, steps)
    except Exception as error:  # schedulers compute with what they are given, or take other arguments
        raise unfit(name, first_line(error)) from error
    if steps > most and strength < 1:
        raise UsageError(
            f"{name} runs at most {most} steps at strength {strength:g}, got {steps}",
            hint=f"use --steps {most}" if most else "use a higher --strength",
        )
    if steps > most:
        raise UsageError(f"{name} runs at most {most} steps, got {steps}", hint=f"use --steps {most}")


def check_eta(scheduler: Any) -> None:
    """Raise `UsageError` for a scheduler whose steps take no eta: diffusers' pipelines would pass over it."""
    if "eta" not in inspect.signature(scheduler.step).parameters:
        raise UsageError(
            f"{type(scheduler).__name__} has no eta", hint="use --scheduler ddim or tcd with --eta, or leave --eta out"
        )


def _most_steps(scheduler: Any, steps: int, strength: float) -> int:
    """How many steps the scheduler has, `steps` at most.

    Raises:
        ValueError: where it has not even one.
    """
    config = scheduler.config
    most = min(steps, config.get("num_train_timesteps", steps))
    if type(scheduler).__name__ in DISTILLED:
        most = min(most, int(config.original_inference_steps * strength))
    while most > 1 and not _has_steps(scheduler, most):
        most -= 1
    if most == 1:
        _check_timesteps(_tried(scheduler, 1))
    return int(most)


def _tried(scheduler: Any, steps: int) -> Any:
    """A copy of the scheduler that is set to so many steps."""
    tried = copy.deepcopy(scheduler)
    type(scheduler).set_timesteps(tried, steps, device="cpu")  # the class's own: the instance's may be another's
    return tried


def _check_table(scheduler: Any) -> None:
    """Raise `ValueError` for noise levels of another number of timesteps (`trained_betas` may be a short list)."""
    table, count = getattr(scheduler, "alphas_cumprod", ()), scheduler.config.get("num_train_timesteps")
    if len(table) not in (0, count):
        raise ValueError(f"it has noise levels for {len(table)} timesteps of {count}")


def _check_timesteps(tried: Any) -> None:
    """Raise `ValueError` for timesteps that the model was not trained for.

    Schedulers look their tables up by the timestep, and a negative one counts from the end. (EDM's have no tables, and
    logarithms for timesteps.)
    """
    low, high = min(tried.timesteps.tolist()), max(tried.timesteps.tolist())
    count = tried.config.get("num_train_timesteps", math.inf)
    if high >= count or (low < 0 and hasattr(tried, "alphas_cumprod")):
        raise ValueError(f"its timesteps are {low:g} to {high:g}, and there are 0 to {count - 1}")


def _has_steps(scheduler: Any, steps: int) -> bool:
    """Whether so many steps all have noise levels of their own, at timesteps that the model was trained for.

    `timestep_spacing="leading"` with `steps_offset=1`, as Stable Diffusion has it, goes one too far with the last one.
    Others round two of a thousand to one, which some multistep solvers divide by the difference of.
    """
    tried = _tried(scheduler, steps)
    try:
        _check_timesteps(tried)
    except ValueError:
        return False
    levels = tried.sigmas[:-1].tolist() if hasattr(tried, "sigmas") else tried.timesteps.tolist()
    return len(set(levels)) >= steps


def _rehearse(scheduler: Any, steps: int) -> None:
    """Go through all steps with one latent pixel, as a pipeline would: what fails there fails here first.

    Raises:
        ValueError: where the noise grows, or the latents end as no numbers.
        Exception: whatever the scheduler raises.
    """
    tried, generator = _tried(scheduler, steps), torch.Generator().manual_seed(0)
    if tried.timesteps[0] < tried.timesteps[-1]:
        raise ValueError("it goes from images to noise")
    options: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(tried.step).parameters:
        options["generator"] = generator
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # some draw from the global generator
        latents = torch.randn((1, 4, 1, 1), generator=generator) * tried.init_noise_sigma
        for timestep in tried.timesteps:
            tried.scale_model_input(latents, timestep)
            noise = torch.randn(latents.shape, generator=generator)
            latents = tried.step(noise, timestep, latents, **options)[0]
    if not torch.isfinite(latents).all():
        raise ValueError("it turns latents into values that are not finite")
