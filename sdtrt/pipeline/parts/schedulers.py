"""Makes schedulers by their usual names from the model's own configuration. Runs none of their steps."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers

from sdtrt.common.errors import ModelError, UsageError, first_line
from sdtrt.specs import NoiseSpec, SchedulerName
from sdtrt.specs.generate import SPACING_OF_SIGMAS


@dataclass(frozen=True)
class _Kind:
    """How one scheduler is made.

    Args:
        class_name: the diffusers class.
        forced: configuration that the name stands for, whatever the model's own says.
        defaults: configuration for where the model's own says nothing, and the class's default is not meant for
            Stable Diffusion.
    """

    class_name: str
    forced: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


# Stable Diffusion's latents are not bounded by 1 (no clipping), its PNDM has no Runge-Kutta warm-up (PLMS), and its
# last step goes to the first alpha rather than to 1.
_SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_KINDS: dict[SchedulerName, _Kind] = {
    "pndm": _Kind("PNDMScheduler", defaults={"skip_prk_steps": True, "set_alpha_to_one": False}),
    "ddim": _Kind("DDIMScheduler", defaults={"clip_sample": False, "set_alpha_to_one": False}),
    "euler": _Kind("EulerDiscreteScheduler"),
    "euler-a": _Kind("EulerAncestralDiscreteScheduler"),
    "dpm++": _Kind("DPMSolverMultistepScheduler", forced={"algorithm_type": "dpmsolver++"}),
    "unipc": _Kind("UniPCMultistepScheduler"),
    "lcm": _Kind("LCMScheduler", defaults={"clip_sample": False}),
    "heun": _Kind("HeunDiscreteScheduler", defaults={"clip_sample": False}),
    "dpm++2m-sde": _Kind("DPMSolverMultistepScheduler", forced=_SDE),
    "dpm++2m-sde-heun": _Kind("DPMSolverMultistepScheduler", forced={**_SDE, "solver_type": "heun"}),
    "dpm++3m-sde": _Kind("DPMSolverMultistepScheduler", forced={**_SDE, "solver_order": 3}),
    "dpm++2s": _Kind("DPMSolverSinglestepScheduler", forced={"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++sde": _Kind("DPMSolverSDEScheduler"),
    "dpm2": _Kind("KDPM2DiscreteScheduler"),
    "dpm2-a": _Kind("KDPM2AncestralDiscreteScheduler"),
    "lms": _Kind("LMSDiscreteScheduler"),
    "deis": _Kind("DEISMultistepScheduler", forced={"algorithm_type": "deis"}),
    "sa-solver": _Kind("SASolverScheduler", forced={"algorithm_type": "data_prediction"}),
    "tcd": _Kind("TCDScheduler", defaults={"clip_sample": False}),
    "ddpm": _Kind("DDPMScheduler", defaults={"clip_sample": False}),
}

_PACKAGES = ("torchsde", "scipy")  # that some of diffusers' schedulers need
_FLAGS = {name: f"use_{name}_sigmas" for name in ("karras", "exponential", "beta")}

DISTILLED = ("LCMScheduler", "TCDScheduler")  # their timesteps are some of the `original_inference_steps`


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
        UsageError: where it needs a package that is not there.
    """
    if name is None:
        return own
    kind = _KINDS[name]
    config = own.config
    changes = {key: config.get(key, value) for key, value in kind.defaults.items()}
    try:
        return getattr(diffusers, kind.class_name).from_config(config, **{**changes, **kind.forced})
    except ImportError as error:
        raise _lacks_package(kind.class_name, error) from error
    except Exception as error:  # schedulers compute with what they are given
        raise unfit(kind.class_name, first_line(error)) from error


def _lacks_package(class_name: str, error: ImportError) -> UsageError:
    """The error for a scheduler whose package is not installed, which diffusers knows."""
    package = next((name for name in _PACKAGES if name in str(error)), "scipy")
    return UsageError(
        f"{class_name} needs {package}, which is not installed",
        hint=f'pip install "sdtrt[schedulers]", or pip install {package}; or use --scheduler dpm++2m-sde',
    )


def unfit(class_name: str, reason: str) -> ModelError:
    """The error for a model whose configuration makes no such scheduler, or none that runs."""
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


def let_go(scheduler: Any) -> None:
    """Undo `keep_on_host`: the scheduler is of its own class again."""
    own = type(scheduler)
    if issubclass(own, _OnHost):
        scheduler.__class__ = own.__mro__[1]


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


def with_noise(scheduler: Any, noise: NoiseSpec) -> Any:
    """The scheduler with another prediction type, spacing or noise schedule; itself where nothing is said of these.

    Raises:
        UsageError: for what this scheduler can't do.
    """
    cls = type(scheduler)
    known = inspect.signature(cls.__init__).parameters
    changes = {name: value for name, value in _changes(noise, known).items() if value or name in known}
    if lacking := [name for name in changes if name not in known]:
        raise _unable(cls, noise, lacking[0])
    if not changes:
        return scheduler
    if (noise.timestep_spacing or noise.sigmas) and cls.__name__ in DISTILLED:
        raise _unable(cls, noise, "timestep_spacing" if noise.timestep_spacing else "sigmas")
    try:
        made = cls.from_config(scheduler.config, **changes)
    except ImportError as error:
        raise _lacks_package(f"{cls.__name__} with {noise.sigmas} sigmas", error) from error
    if noise.zero_snr and made.config.prediction_type == "epsilon":
        raise UsageError(
            "at zero terminal SNR there is nothing but noise, of which epsilon prediction makes no image",
            hint="use --prediction-type v_prediction, or --no-zero-snr",
        )
    return made


def _changes(noise: NoiseSpec, known: Container[str]) -> dict[str, Any]:
    """The configuration that is another one then, by diffusers' names.

    Args:
        known: what the scheduler's configuration may have.
    """
    flags = {} if noise.sigmas is None else {flag: noise.sigmas == name for name, flag in _FLAGS.items()}
    spacing = noise.timestep_spacing or SPACING_OF_SIGMAS.get(noise.sigmas or "")
    if spacing is None and noise.sigmas in ("exponential", "beta") and "timestep_spacing" in known:
        spacing = "linspace"  # as diffusers' own table of schedule types has them
    changes = {
        "prediction_type": noise.prediction_type,
        "timestep_spacing": spacing or ("trailing" if noise.zero_snr else None),
        "rescale_betas_zero_snr": noise.zero_snr,
        **flags,
    }
    return {name: value for name, value in changes.items() if value is not None}


def _unable(cls: type, noise: NoiseSpec, name: str) -> UsageError:
    """The error for a scheduler that knows no such configuration."""
    names = {"rescale_betas_zero_snr": "zero_snr", **dict.fromkeys(_FLAGS.values(), "sigmas")}
    field = names.get(name, name)
    if field == "timestep_spacing" and noise.timestep_spacing is None and noise.sigmas:
        field = "sigmas"
    what = "zero terminal SNR" if field == "zero_snr" else f"choice of {field.replace('_', ' ')}"
    name = next(iter(_FLAGS.values())) if name == "sigmas" else name
    able = [key for key, kind in _KINDS.items() if name in _parameters(kind) and kind.class_name not in DISTILLED]
    return UsageError(
        f"{cls.__name__} has no {what} ({noise.source(field)})",
        hint=f"use --scheduler {', '.join(able[:-1])} or {able[-1]}",
    )


def _parameters(kind: _Kind) -> Collection[str]:
    """What the configuration of a scheduler may have."""
    return inspect.signature(getattr(diffusers, kind.class_name).__init__).parameters
