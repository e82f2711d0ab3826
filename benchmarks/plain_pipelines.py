"""diffusers' own pipelines, as benchmarks of live ones begin with them, and the time of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sdtrt.models.resolve import resolve_model  # sdtrt first: it switches off what ONNX Runtime tells its maker
from sdtrt.reports.meters import time_calls
from sdtrt.specs import ModelSpec

# isort: split
import diffusers
import torch


def load(name: str) -> Any:
    """diffusers' own pipeline of a model, where it runs."""
    model = resolve_model(ModelSpec(name))
    gpu = torch.cuda.is_available()
    cls = diffusers.StableDiffusionXLPipeline if model.is_sdxl else diffusers.StableDiffusionPipeline
    options: dict[str, Any] = {} if model.is_sdxl else {"safety_checker": None}
    pipe: Any = cls.from_pretrained(model.source, torch_dtype=torch.float16 if gpu else torch.float32, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if gpu else "cpu")


def timed(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of a call's seconds, a GPU idle before and after it."""
    return time_calls(call, repeats, device).median
