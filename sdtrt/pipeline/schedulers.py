"""Schedulers by their usual names, made from the model's own scheduler configuration."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch

from sdtrt.common.errors import ModelError, UsageError, first_line
from sdtrt.specs import NoiseSpec, SchedulerName


@dataclass(frozen=True)
class _Kind:
    """How one scheduler is made.

    Args:
        class_name: the diffusers class.
        sampler: what Stable Diffusion web UIs call it.
        forced: configuration that the name stands for, whatever the model's own says.
        defaults: configuration for where the model's own says nothing, and the class's default is not meant for
            Stable Diffusion.
    """

    class_name: str
    sampler: str
    forced: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


# Stable Diffusion's latents are not bounded by 1 (no clipping), its PNDM has no Runge-Kutta warm-up (PLMS), and its
# last step goes to the first alpha rather than to 1.
_KINDS: dict[SchedulerName, _Kind] = {
    "pndm": _Kind("PNDMScheduler", "PLMS", defaults={"skip_prk_steps": True, "set_alpha_to_one": False}),
    "ddim": _Kind("DDIMScheduler", "DDIM", defaults={"clip_sample": False, "set_alpha_to_one": False}),
    "euler": _Kind("EulerDiscreteScheduler", "Euler"),
    "euler-a": _Kind("EulerAncestralDiscreteScheduler", "Euler a"),
    "dpm++": _Kind("DPMSolverMultistepScheduler", "DPM++ 2M", forced={"algorithm_type": "dpmsolver++"}),
    "unipc": _Kind("UniPCMultistepScheduler", "UniPC"),
    "lcm": _Kind("LCMScheduler", "LCM", defaults={"clip_sample": False}),
    "heun": _Kind("HeunDiscreteScheduler", "Heun", defaults={"clip_sample": False}),
}

_DPM = _KINDS["dpm++"].class_name
_SAMPLERS = {kind.class_name: kind.sampler for kind in _KINDS.values()} | {
    "LMSDiscreteScheduler": "LMS",
    "KDPM2DiscreteScheduler": "DPM2",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "DPMSolverSDEScheduler": "DPM++ SDE",
}
# Samplers that have one spacing in web UIs, whatever the schedule type: LCM's is the same as ours.
_OF_ONE_SPACING = ("DDIM", "PLMS", "UniPC", "LCM")
_DISTILLED = ("LCMScheduler", "TCDScheduler")  # their timesteps are some of the `original_inference_steps`
# What diffusers' pipelines from text to images use of a scheduler.
_INTERFACE = ("set_timesteps", "timesteps", "init_noise_sigma", "scale_model_input", "step", "order")
_SPACINGS = {"use_karras_sigmas": "Karras", "use_exponential_sigmas": "Exponential", "use_beta_sigmas": "Beta"}


@dataclass(frozen=True)
class Settings:
    """What stands for a model's own scheduler where its class can't be had: the stored configuration alone."""

    config: Mapping[str, Any]


def make_scheduler(name: SchedulerName | None, own: Any) -> Any:
    """The scheduler called `name`, with the noise schedule and prediction type of the model's `own`.

    Args:
        own: a diffusers scheduler, or the `Settings` of one.

    Returns:
        A diffusers scheduler; `own` itself for None.

    Raises:
        ModelError: where the model's configuration makes no such scheduler.
    """
    if name is None:
        return own
    kind = _KINDS[name]
    config = own.config
    changes = {key: config.get(key, value) for key, value in kind.defaults.items()}
    try:
        return getattr(diffusers, kind.class_name).from_config(config, **{**changes, **kind.forced})
    except Exception as error:  # schedulers compute with what they are given
        raise _unfit(kind.class_name, first_line(error)) from error


def _unfit(class_name: str, reason: str) -> ModelError:
    return ModelError(
        f"the model's scheduler configuration does not do for {class_name}: {reason}",
        hint="check its scheduler/scheduler_config.json, use another --scheduler, or another model",
    )


def keep_on_host(scheduler: Any) -> None:
    """Let this scheduler keep its timesteps on the CPU, whatever device its pipeline asks for.

    diffusers' schedulers branch on the timestep and look up their tables by it, which are on the CPU: with timesteps on
    the GPU each step waits there for all the work before it. The values are the same on either side.

    The scheduler becomes one of a class derived from its own, of the same name: so copies and pickles of it do the
    same, each for itself, and `set_timesteps` has the signature that pipelines look at.
    """
    own: Any = type(scheduler)
    if not issubclass(own, _OnHost) and "device" in inspect.signature(own.set_timesteps).parameters:
        scheduler.__class__ = _on_host(own)


class _OnHost:
    """What marks the classes that `_on_host` makes."""


@functools.cache
def _on_host(own: Any) -> type:
    """The class derived from a scheduler's own whose timesteps stay on the CPU."""
    signature = inspect.signature(own.set_timesteps)

    @functools.wraps(own.set_timesteps)
    def set_timesteps(self: Any, *arguments: Any, **options: Any) -> Any:
        given = signature.bind(self, *arguments, **options)
        given.arguments["device"] = "cpu"
        return own.set_timesteps(*given.args, **given.kwargs)

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        make, arguments, *state = own.__reduce_ex__(self, protocol)
        plain = (own if argument is type(self) else argument for argument in arguments)
        return (_made_on_host, (make, *plain), *state)

    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own.__name__, (own, _OnHost), {**names, "set_timesteps": set_timesteps, "__reduce_ex__": reduce})


def _made_on_host(make: Callable[..., Any], *arguments: Any) -> Any:
    """A copy of a scheduler that stays on the host, as `copy` and `pickle` make it: its state follows."""
    scheduler = make(*arguments)
    keep_on_host(scheduler)
    return scheduler


def check_steps(scheduler: Any, steps: int, *, img2img: bool = False) -> None:
    """Refuse what a pipeline could not run: a scheduler that is none of text to image, or too many steps.

    Args:
        img2img: whether the pipeline starts from an image, to which the scheduler adds noise.

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
        most = _most_steps(scheduler, steps)
        if steps <= most:
            _rehearse(scheduler, steps)
    except Exception as error:  # schedulers compute with what they are given, or take other arguments
        raise _unfit(name, first_line(error)) from error
    if steps > most:
        raise UsageError(f"{name} runs at most {most} steps, got {steps}", hint=f"use --steps {most}")


def _most_steps(scheduler: Any, steps: int) -> int:
    """How many steps the scheduler has, `steps` at most.

    Raises:
        ValueError: where it has not even one.
    """
    config = scheduler.config
    most = min(steps, config.get("num_train_timesteps", steps))
    if type(scheduler).__name__ in _DISTILLED:
        most = min(most, config.original_inference_steps)
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


def sampler_name(scheduler: Any) -> str:
    """What Stable Diffusion web UIs call this scheduler; the class's own name for one that they don't know."""
    class_name: str = type(scheduler).__name__
    config = scheduler.config
    if class_name == _DPM and config.algorithm_type == "dpmsolver++":
        return f"DPM++ {config.solver_order}M"
    if class_name == _DPM and config.algorithm_type == "sde-dpmsolver++":
        heun = config.solver_type == "heun" and config.solver_order == 2
        return f"DPM++ {config.solver_order}M SDE{' Heun' if heun else ''}"
    known = None if class_name == _DPM else _SAMPLERS.get(class_name)
    return known or class_name.removesuffix("Scheduler")


def schedule_type(scheduler: Any) -> str | None:
    """What web UIs call the spacing of the timesteps that were set; None where the sampler says it all.

    Without a word they take Karras for some samplers and Uniform for others.
    """
    if name := next((name for key, name in _SPACINGS.items() if scheduler.config.get(key)), None):
        return name
    steps = scheduler.num_inference_steps
    if sampler_name(scheduler) in _OF_ONE_SPACING or steps is None:
        return None
    timesteps = scheduler.timesteps.cpu().numpy()
    own = timesteps[::2] if len(timesteps) == 2 * steps - 1 else timesteps  # two evaluations a step
    if len(own) != steps:
        return None
    spacings = _web_ui_spacings(steps, scheduler.config.num_train_timesteps)
    return min(spacings, key=lambda name: float(np.abs(spacings[name] - own).mean()))


def _web_ui_spacings(steps: int, trained: int) -> dict[str, npt.NDArray[Any]]:
    """The timesteps of web UIs' schedule types, as in stable-diffusion-webui's modules/sd_schedulers.py."""
    numbers = np.arange(steps)
    return {
        "Uniform": np.linspace(trained - 1, 0, steps),
        "DDIM": 1 + numbers[::-1] * (trained // steps),
        "Simple": trained - 1 - (numbers * trained / steps).astype(int),
        "SGM Uniform": np.linspace(trained - 1, 0, steps + 1)[:-1],
    }


def facts(scheduler: Any) -> dict[str, Any]:
    """What a scheduler is, and how it takes noise, as plain data."""
    config = scheduler.config
    names = ("prediction_type", "timestep_spacing", "rescale_betas_zero_snr")
    return {"class": type(scheduler).__name__} | {name: config[name] for name in names if name in config}


def noise_schedule(scheduler: Any) -> str | None:
    """What web UIs call the noise schedule, where it is not the usual one."""
    return "Zero Terminal SNR" if scheduler.config.get("rescale_betas_zero_snr") else None


def with_noise(scheduler: Any, noise: NoiseSpec) -> Any:
    """The scheduler with another prediction type, spacing or noise schedule; itself where nothing is said of these.

    Raises:
        UsageError: for what this scheduler can't do.
    """
    cls = type(scheduler)
    known = inspect.signature(cls.__init__).parameters
    changes = {name: value for name, value in _changes(noise).items() if value or name in known}
    if lacking := [name for name in changes if name not in known]:
        raise _unable(cls, noise, lacking[0])
    if not changes:
        return scheduler
    if noise.timestep_spacing and cls.__name__ in _DISTILLED:
        raise _unable(cls, noise, "timestep_spacing")
    made = cls.from_config(scheduler.config, **changes)
    if noise.zero_snr and made.config.prediction_type == "epsilon":
        raise UsageError(
            "at zero terminal SNR there is nothing but noise, of which epsilon prediction makes no image",
            hint="use --prediction-type v_prediction, or --no-zero-snr",
        )
    return made


def _changes(noise: NoiseSpec) -> dict[str, Any]:
    """The configuration that is another one then, by diffusers' names."""
    changes = {
        "prediction_type": noise.prediction_type,
        "timestep_spacing": noise.timestep_spacing or ("trailing" if noise.zero_snr else None),
        "rescale_betas_zero_snr": noise.zero_snr,
    }
    return {name: value for name, value in changes.items() if value is not None}


def _unable(cls: type, noise: NoiseSpec, name: str) -> UsageError:
    """The error for a scheduler that knows no such configuration."""
    field = {"rescale_betas_zero_snr": "zero_snr"}.get(name, name)
    what = "zero terminal SNR" if field == "zero_snr" else f"choice of {field.replace('_', ' ')}"
    able = [key for key, kind in _KINDS.items() if name in _parameters(kind) and kind.class_name not in _DISTILLED]
    return UsageError(
        f"{cls.__name__} has no {what} ({noise.source(field)})",
        hint=f"use --scheduler {', '.join(able[:-1])} or {able[-1]}",
    )


def _parameters(kind: _Kind) -> Collection[str]:
    """What the configuration of a scheduler may have."""
    return inspect.signature(getattr(diffusers, kind.class_name).__init__).parameters
