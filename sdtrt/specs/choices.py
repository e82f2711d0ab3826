"""The words and numbers that a request may have, and the checks that every request shares."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, get_args

from sdtrt.common.errors import UsageError

Component = Literal["text_encoder", "text_encoder_2", "controlnet", "unet", "vae_decoder", "vae_encoder"]

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]

Group = str  # of a UNet's inputs, beside those that each has: one of `GROUPS`, and what it is of (`ip_adapter:4`)

BackendName = str  # one of `backends.registry.names()`


Exporter = Literal["torchscript", "dynamo"]

BenchTask = Literal["txt2img", "img2img"]

BaselineName = Literal[
    "torch-fp32",
    "torch-tf32",
    "torch-fp16",
    "torch-graph",
    "torch-compile",
    "torch-compile-max",
    "torch-compile-regional",
    "torch-compile-unet",
    "torch-tensorrt",
    "onnxruntime-cuda",
]

PredictionType = Literal["epsilon", "v_prediction"]

TimestepSpacing = Literal["leading", "linspace", "trailing"]

COMPONENTS: tuple[str, ...] = get_args(Component)

PRECISIONS: tuple[str, ...] = get_args(Precision)

WHOLE: tuple[Precision, ...] = ("fp32", "fp16", "bf16")  # those that all products are computed in

QUANTISED: tuple[Precision, ...] = ("int8", "fp8")  # products of 8 bits inside; the rest, inputs and outputs in bf16

GROUPS: tuple[str, ...] = ("controlnet", "t2i_adapter", "free_u", "ip_adapter", "deep_out", "deep_in")


EXPORTERS: tuple[str, ...] = get_args(Exporter)

PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)

TIMESTEP_SPACINGS: tuple[str, ...] = get_args(TimestepSpacing)

BENCH_TASKS: tuple[str, ...] = get_args(BenchTask)

BASELINES: tuple[str, ...] = get_args(BaselineName)

AUTO = "auto"  # the backend that is fastest on this machine
ALL = "all"  # of `sdtrt build`: every backend that runs on this machine
DEFAULT_MODEL = "tiny"

DEFAULT_STEPS = 50

DEFAULT_GUIDANCE_SCALE = 7.5

DEFAULT_IMAGE_GUIDANCE_SCALE = 1.5

DEFAULT_STRENGTH = 0.8

DEFAULT_PREVIEW_EVERY = 5  # steps

DEFAULT_TOKENS = 77

SAMPLE_PROMPT = "a red circle on a blue background"

SIZE_MULTIPLE = 8  # pixels per latent, and what diffusers' pipelines demand of both sides

MAX_PIXELS = 16384  # a side; beyond it sizes in bytes leave what libraries count with

MOST_STEPS = 999  # that schedulers run of a model's 1000 timesteps

MAX_SEED = 2**63 - 1

RANDOM_SEED = -1  # what web UIs call a random one

MAX_IMAGES = 100_000  # of one prompt in one run: days of work; more is a typo

MAX_MASK_BLUR = 512  # pixels: a radius beyond it smooths any mask away

MAX_BATCH = 10_000  # images made at once: prompts and random generators of more fill the memory before a GPU is full

MIN_SSIM_PIXELS = 16  # a side: structural similarity looks at 11x11 pixels at a time

DEFAULT_VERIFY_SEED = 0

MAX_DIGITS = 9  # of a number that is typed: more fit nothing here

FEWEST_CACHED_STEPS = 10  # with fewer, neighbours are too far apart for deep features to be kept

MOST_IMAGE_TOKENS = 4096  # of one IP-Adapter: those of some pictures; more is a typo

GIB = 2**30


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `UsageError` unless `value` is one of `choices`; the hint names the closest one."""
    if value in choices:
        return
    from difflib import get_close_matches

    close = get_close_matches(value, choices, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UsageError(f"unknown {option}: {value!r}", hint=f"{hint}choose one of {', '.join(choices)}")


def check_group(name: Group) -> None:
    """Raise `UsageError` for a group of inputs that there is not."""
    kind, _, tokens = name.partition(":")
    check_choice("group", kind, GROUPS)
    counts = tokens.split("+")
    if kind == "ip_adapter" and not all(one.isdecimal() and 0 < int(one) <= MOST_IMAGE_TOKENS for one in counts):
        raise UsageError(
            f"the group {name} doesn't say how many image tokens each adapter has", hint="as in ip_adapter:4+16"
        )
    if kind in ("deep_out", "deep_in") and not (tokens.isdecimal() and int(tokens[:MAX_DIGITS]) > 0):
        raise UsageError(f"the group {name} doesn't say how deep it is", hint=f"as in {kind}:1")


def check_output(output: Path | None) -> None:
    """Raise `UsageError` for `-`, which would be a folder of that name where people mean stdout."""
    if output == Path("-"):
        raise UsageError(
            "--output - would be a file or folder of that name: nothing but paths and JSON goes to stdout",
            hint="name a file or folder, as in --output out",
        )


def bytes_of(option: str, gib: float) -> int:
    """GiB → bytes. Raises `UsageError` unless it is a finite number from 0 up."""
    if not (math.isfinite(gib * GIB) and gib >= 0):
        raise UsageError(f"{option} must be a number of GiB from 0 up, got {gib}", hint=f"as in {option} 8")
    return int(gib * GIB)
