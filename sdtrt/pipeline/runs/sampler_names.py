"""What Stable Diffusion web UIs call a scheduler and what it was set to. Makes no scheduler and changes none."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_DPM = "DPMSolverMultistepScheduler"  # of several samplers: its configuration tells which
_SINGLESTEP = "DPMSolverSinglestepScheduler"
_SAMPLERS = {
    "PNDMScheduler": "PLMS",
    "DDIMScheduler": "DDIM",
    "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "UniPCMultistepScheduler": "UniPC",
    "LCMScheduler": "LCM",
    "HeunDiscreteScheduler": "Heun",
    "LMSDiscreteScheduler": "LMS",
    "KDPM2DiscreteScheduler": "DPM2",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "DEISMultistepScheduler": "DEIS",
    "SASolverScheduler": "SA Solver",
}
# Samplers that have one spacing in web UIs, whatever the schedule type: LCM's is the same as ours.
_OF_ONE_SPACING = ("DDIM", "PLMS", "UniPC", "LCM", "TCD")
_SPACINGS = {"use_karras_sigmas": "Karras", "use_exponential_sigmas": "Exponential", "use_beta_sigmas": "Beta"}


def sampler_name(scheduler: Any) -> str:
    """What Stable Diffusion web UIs call this scheduler; the class's own name for one that they don't know."""
    class_name: str = type(scheduler).__name__
    config = scheduler.config
    if class_name == _DPM and config.algorithm_type == "dpmsolver++":
        return f"DPM++ {config.solver_order}M"
    if class_name == _SINGLESTEP and config.algorithm_type == "dpmsolver++":
        return f"DPM++ {config.solver_order}S"
    if class_name == _DPM and config.algorithm_type == "sde-dpmsolver++":
        heun = config.solver_type == "heun" and config.solver_order == 2
        return f"DPM++ {config.solver_order}M SDE{' Heun' if heun else ''}"
    return _SAMPLERS.get(class_name) or class_name.removesuffix("Scheduler")


def schedule_type(scheduler: Any, asked: str | None = None) -> str | None:
    """What web UIs call the spacing of the timesteps that were set; None where the sampler says it all.

    Without a word they take Karras for some samplers and Uniform for others.

    Args:
        asked: the sigmas that a request names. SGM Uniform and Simple are less than a timestep apart.
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
    nearest = min(spacings, key=lambda name: float(np.abs(spacings[name] - own).mean()))
    return "SGM Uniform" if (nearest, asked) == ("Simple", "sgm_uniform") else nearest


def _web_ui_spacings(steps: int, trained: int) -> dict[str, npt.NDArray[Any]]:
    """The timesteps of web UIs' schedule types, as in stable-diffusion-webui's modules/sd_schedulers.py."""
    numbers = np.arange(steps)
    return {
        "Uniform": np.linspace(trained - 1, 0, steps),
        "DDIM": 1 + numbers[::-1] * (trained // steps),
        "Simple": trained - 1 - (numbers * trained / steps).astype(int),
        "SGM Uniform": np.linspace(trained - 1, 0, steps + 1)[:-1],
    }


def noise_schedule(scheduler: Any) -> str | None:
    """What web UIs call the noise schedule, where it is not the usual one."""
    return "Zero Terminal SNR" if scheduler.config.get("rescale_betas_zero_snr") else None


def eta_field(scheduler: Any) -> str:
    """The field in which web UIs have a sampler's eta: DDIM has one of its own."""
    return "Eta DDIM" if sampler_name(scheduler) == "DDIM" else "Eta"
