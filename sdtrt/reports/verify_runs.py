"""The three runs of a verification. Compares nothing and writes no file.

They follow one another, so that no two UNets are resident at once: the whole pipeline in fp32, whose UNet calls are
recorded; PyTorch's UNet in half precision on the recorded inputs, whose error is the noise floor; the engine on the
recorded inputs, and the whole pipeline with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from sdtrt.backends.native import NATIVE
from sdtrt.common.console import Console
from sdtrt.common.errors import EngineError, SdtrtError
from sdtrt.common.metrics import count_non_finite
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.models import loading
from sdtrt.models.image_prompts import attentions_of
from sdtrt.models.resolve import Model
from sdtrt.pipeline.inputs.control_images import ControlImage
from sdtrt.pipeline.inputs.images import InitImage
from sdtrt.pipeline.opening.memory import out_of_memory
from sdtrt.pipeline.opening.open import OpenPipeline, open_pipeline
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.pipeline.parts.guided_rows import computed_rows
from sdtrt.pipeline.parts.hooks import hooked
from sdtrt.pipeline.runs.call import Control, PipelineCall
from sdtrt.reports.meters import release_memory, tf32
from sdtrt.reports.verify_pictures import gradient, half
from sdtrt.specs import DEFAULT_VERIFY_SEED, GenerateSpec, Precision, VerifySpec
from sdtrt.specs.contract import DTYPES

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RecordedCall:
    """One call of the UNet in the fp32 run, on the CPU: its inputs and its output `[B,C,H,W]`.

    In a step without guidance they are those of the rows that are computed.

    Args:
        more: its other arguments by diffusers' names: the text's states, added conditioning, a guidance embedding, the
            residuals of ControlNets, the embeddings of pictures for IP-Adapters.
    """

    sample: torch.Tensor
    timestep: torch.Tensor
    more: Mapping[str, Any]
    output: Array

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """The inputs as a UNet takes them; the timestep keeps its dtype."""
        more: dict[str, Any] = _mapped(self.more, lambda tensor: tensor.to(device, dtype))
        return {"sample": self.sample.to(device, dtype), "timestep": self.timestep.to(device), **more}


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A value with each tensor in it changed, whatever lists and mappings it is in."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(one, change) for name, one in value.items()}
    return [_mapped(one, change) for one in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Reference:
    """The fp32 run: the calls that were recorded, and the final image `[H,W,3]` in 0 to 1."""

    calls: tuple[RecordedCall, ...]
    pixels: Array


@dataclass(frozen=True)
class Shown:
    """The pictures that a run goes by, as they were read.

    Args:
        controls: of ControlNets.
        pictures: of IP-Adapters, which count as much as `scales` says.
    """

    controls: tuple[ControlImage, ...] = ()
    pictures: tuple[Image.Image, ...] = ()
    scales: tuple[float, ...] = ()


class _Recorder:
    """A hook that keeps some of a UNet's calls, by their numbers."""

    def __init__(self, wanted: Sequence[int]) -> None:
        self.wanted = frozenset(wanted)
        self.count = 0
        self.calls: list[RecordedCall] = []

    def __call__(self, unet: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note one call of a diffusers pipeline: `unet(sample, timestep, encoder_hidden_states=…)`."""
        if self.count in self.wanted:
            rows = computed_rows(unet)
            more = {
                name: _mapped(value, lambda one: rows(one).cpu())
                for name, value in kwargs.items()
                if name != "return_dict"
            }
            timestep = torch.as_tensor(args[1]).cpu()
            self.calls.append(RecordedCall(rows(args[0]).cpu(), timestep, more, _numpy(rows(output[0]))))
        self.count += 1


def _on_the_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu()


def run_reference(
    spec: VerifySpec, pipeline_spec: PipelineSpec, shown: Shown, directory: EngineDirectory, console: Console
) -> Reference:
    """Run the whole pipeline in PyTorch, in fp32 without TF32."""
    pipeline_spec = replace(pipeline_spec, backend=NATIVE, precision="fp32")
    with tf32(False), open_pipeline(pipeline_spec, directory, console) as opened:
        call = _call(spec.image, opened.spec, shown)
        recorder = _Recorder(spread(call.count_unet_calls(opened), spec.timesteps))
        with hooked(opened.pipe.unet, recorder):
            pixels = _image(call, shown, opened, "fp32 reference", console)
    del opened  # or its UNet would stay where it is
    release_memory(pipeline_spec.device)
    reference = Reference(tuple(recorder.calls), pixels)
    if count_non_finite(pixels) or any(count_non_finite(call.output) for call in reference.calls):
        raise EngineError(
            f"{pipeline_spec.model.name} itself gives values that are not finite in fp32, without any engine",
            hint="its weights may be damaged; try another --scheduler or --guidance-scale",
        )
    return reference


def run_noise_floor(spec: PipelineSpec, reference: Reference, shown: Shown, console: Console) -> list[Array]:
    """PyTorch's own UNet in half precision (bf16 for an engine that takes it, else fp16) on the recorded inputs."""
    precision: Precision = "bf16" if DTYPES[spec.precision] == DTYPES["bf16"] else "fp16"
    own = replace(spec, backend=NATIVE, precision=precision)
    try:
        unet = loading.load_unet(own.model, own.parts_dtype).to(own.device)
    except SdtrtError as error:  # weights that don't fit into fp16: then there is no floor
        console.warn(f"no noise floor: {error.message}")
        return [np.full_like(call.output, np.nan) for call in reference.calls]
    for attention in attentions_of(unet) if shown.scales else ():
        attention.processor.scale = list(shown.scales)
    outputs = _replay(unet, reference, own, f"{precision} noise floor", console)
    del unet
    release_memory(spec.device)
    return outputs


def run_candidate(
    spec: VerifySpec,
    pipeline_spec: PipelineSpec,
    entry: Entry | None,
    reference: Reference,
    shown: Shown,
    directory: EngineDirectory,
    console: Console,
) -> tuple[list[Array], Array]:
    """The engine on the recorded inputs, and the whole image as `sdtrt txt2img` makes it with this engine."""
    allow_build = spec.image.allow_build
    with open_pipeline(pipeline_spec, directory, console, allow_build=allow_build, unet_engine=entry) as opened:
        name = "engine" if entry is not None else f"{pipeline_spec.backend} {pipeline_spec.precision}"
        _scale_adapters(opened, shown)
        outputs = _replay(opened.pipe.unet, reference, pipeline_spec, name, console)
        return outputs, _image(_call(spec.image, opened.spec, shown), shown, opened, f"image with {name}", console)


def _replay(unet: Any, reference: Reference, spec: PipelineSpec, name: str, console: Console) -> list[Array]:
    """What a UNet gives for the recorded inputs, in its own precision."""
    outputs = []
    with torch.inference_mode(), console.bar(name, len(reference.calls)) as advance, out_of_memory(spec):
        for call in reference.calls:
            outputs.append(_numpy(unet(**call.inputs(spec.device, unet.dtype), return_dict=False)[0]))
            advance()
    return outputs


def _scale_adapters(opened: OpenPipeline, shown: Shown) -> None:
    """Have IP-Adapters count as much as is asked for."""
    if shown.scales:
        opened.pipe.set_ip_adapter_scale(list(shown.scales))


def _image(call: PipelineCall, shown: Shown, opened: OpenPipeline, name: str, console: Console) -> Array:
    """One call of a pipeline: pixels `[H,W,3]`, finite or not."""
    _scale_adapters(opened, shown)
    with console.bar(name, call.count_unet_calls(opened)) as advance, out_of_memory(opened.spec):
        pixels = call.run(opened, advance=advance)
    array: Array = np.asarray(pixels[0])
    return array


def _call(image: GenerateSpec, spec: PipelineSpec, shown: Shown) -> PipelineCall:
    """The call of a pipeline that makes the image."""
    return call_of(image, spec, image.prompts[:1], (seed_of(image),), shown)


def call_of(
    image: GenerateSpec,
    spec: PipelineSpec,
    prompts: tuple[str, ...],
    seeds: tuple[int, ...],
    shown: Shown | None = None,
) -> PipelineCall:
    """The call of a pipeline that makes pictures, from noise or from a picture that is always the same."""
    shown = shown or Shown()
    return PipelineCall(
        prompts=prompts,
        seeds=seeds,
        guidance_scale=image.guidance_scale,
        negative_prompt=image.negative_prompt,
        start=gradient(spec.sizes.height, spec.sizes.width) if spec.img2img else None,
        strength=strength_of(image),
        mask=half(spec.sizes.height, spec.sizes.width) if spec.inpaint else None,
        pictures=shown.pictures,
        controls=tuple(Control.of(one, spec.sizes) for one in shown.controls),
    )


def asked_of(image: GenerateSpec, model: Model) -> GenerateSpec:
    """The image that a model makes: SDXL's refiner, and models for inpainting and edits, start from a picture."""
    if model.is_editing:
        return replace(image, init_image=Path("gradient"), edit=True)
    if not model.is_refiner and not model.is_inpainting:
        return image
    mask = Path("half") if model.is_inpainting else None
    return replace(image, init_image=Path("gradient"), mask=mask, strength=strength_of(image))


def start_of(image: GenerateSpec, model: Model) -> InitImage | None:
    """What a model starts from that makes no image from text alone: always the same picture; None for the others."""
    if image.init_image is None:
        return None
    own_height, own_width = model.default_size()
    return InitImage(Path("gradient"), "", gradient(image.height or own_height, image.width or own_width))


def seed_of(image: GenerateSpec) -> int:
    """The seed of the noise."""
    return DEFAULT_VERIFY_SEED if image.seed is None else image.seed


def strength_of(image: GenerateSpec) -> float:
    """How much of the picture that img2img starts from is replaced: at least one step runs."""
    return image.strength if int(image.steps * image.strength) else 1.0


def _numpy(tensor: torch.Tensor) -> Array:
    """On the CPU, in fp32 (NumPy has no bf16)."""
    array: Array = tensor.detach().float().cpu().numpy()
    return array


def spread(total: int, wanted: int | None) -> list[int]:
    """The numbers of `wanted` of `total` calls, spread evenly, the first and the last among them; all for None."""
    if wanted is None or wanted >= total:
        return list(range(total))
    return sorted({round(position) for position in np.linspace(0, total - 1, wanted).tolist()})
