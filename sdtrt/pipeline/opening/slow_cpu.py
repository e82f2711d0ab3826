"""What would make a picture on a CPU faster: one note, of what a request doesn't do already.

Knows requests; nothing of it is measured here. `docs/cpu.md` has the figures.
"""

from __future__ import annotations

from collections.abc import Iterator

from sdtrt.backends import registry
from sdtrt.common.console import Console
from sdtrt.common.errors import SdtrtError
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.specs.contract import is_tiny_vae

SLOW_PIXELS = 512 * 512  # of an image: below it no step takes seconds
FEW_STEPS = 8
ADVISED = "openvino"


def note_slow_cpu(spec: PipelineSpec, console: Console) -> None:
    """Say in one line what would make a request faster that takes minutes on a CPU; nothing where there is nothing."""
    if spec.device.type != "cpu" or spec.sizes.height * spec.sizes.width < SLOW_PIXELS:
        return
    if ways := list(_ways(spec)):
        console.note(f"on a CPU this takes long; faster: {'; '.join(ways)} (docs/cpu.md)")


def _ways(spec: PipelineSpec) -> Iterator[str]:
    """What is not done already, the greatest gain first."""
    if spec.steps > FEW_STEPS:
        yield "a latent consistency model, or a LoRA that makes one, with --steps 4"
    precision = "bf16" if _computes_in_bf16() else "fp32"
    if (spec.backend, spec.precision) != (ADVISED, precision):
        install = "" if registry.get(ADVISED).why_not() is None else "pip install 'sdtrt[openvino]', then "
        yield f"{install}--backend {ADVISED}{' --precision bf16' * (precision == 'bf16')}"
    if not is_tiny_vae(spec.model.config("vae")):
        yield f"a tiny VAE, as --vae madebyollin/{'taesdxl' if spec.model.is_sdxl else 'taesd'}"


def _computes_in_bf16() -> bool:
    """Whether this processor multiplies in bf16."""
    try:
        registry.get(ADVISED).check_precision("bf16")
    except SdtrtError:
        return False
    return True
