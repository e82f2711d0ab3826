"""Which pipelines `accelerate` takes, and why others are refused, by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
import torch
import transformers

from sdtrt.backends import registry
from sdtrt.common.errors import EngineError
from sdtrt.live.controlnets import check_controlnets, groups_of
from sdtrt.live.t2i_adapters import PART as ADAPTER
from sdtrt.live.t2i_adapters import adapters_of, check_adapters
from sdtrt.models.components import TEXT_ENCODERS, part_of
from sdtrt.models.image_prompts import projection_of
from sdtrt.models.live import LiveModel
from sdtrt.pipeline.parts.facades import Facade
from sdtrt.pipeline.parts.watch import moved_by
from sdtrt.specs import AUTO, SIZE_MULTIPLE, BackendName, Component
from sdtrt.specs.contract import VAE_CLASSES, editing_channels, inpainting_channels

TAKEN = (
    "Stable Diffusion 1.x, 2.x and XL pipelines from text, from an image, for inpainting and edits,"
    " with and without ControlNet or T2I-Adapter"
)
HINT = f"sdtrt.accelerate takes {TAKEN}; run this one in PyTorch"
CHANNELS = 4
# Parts that give a UNet inputs which its engine has not, or that make another kind of pipeline.
FOREIGN_PARTS = ("prior", "movq", "transformer", "motion_adapter", "image_noising_scheduler")
CLASSES: dict[str, tuple[type, ...]] = {
    "unet": (diffusers.UNet2DConditionModel,),
    "vae": (diffusers.AutoencoderKL, diffusers.AutoencoderTiny),
    "text_encoder": (transformers.CLIPTextModel,),
    "text_encoder_2": (transformers.CLIPTextModelWithProjection,),
}
METHODS = {"vae": ("decode", "encode", "_decode", "_encode")}


def check_pipeline(pipe: Any) -> LiveModel:
    """The model of a pipeline whose parts engines can run.

    Raises:
        EngineError: for any other, naming its class and what of it no engine runs.
    """
    name = type(pipe).__name__
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise EngineError(f"{name} is no diffusers pipeline", hint="pass what from_pretrained of a pipeline returned")
    foreign = FOREIGN_PARTS if adapters_of(pipe) else (*FOREIGN_PARTS, ADAPTER)
    for part in foreign:
        if getattr(pipe, part, None) is not None:
            raise EngineError(f"{name} has a {part}, whose part in the result no engine has an input for", hint=HINT)
    for part, classes in CLASSES.items():
        _check_part(name, part, getattr(pipe, part, None), classes)
    model = LiveModel.of(pipe)
    if not hasattr(pipe, "unet") or not {"unet", *TEXT_ENCODERS} & model.modules.keys():
        raise EngineError(f"{name} has no unet", hint=HINT)
    _check_shapes(name, pipe, model)
    check_controlnets(name, pipe, HINT)
    check_adapters(name, pipe)
    return model


def _check_part(name: str, part: str, module: Any, classes: tuple[type, ...]) -> None:
    """Refuse a part that is of another class, computes otherwise, or is somebody else's to move or compile."""
    if module is None:
        return
    if isinstance(module, Facade):
        raise EngineError(
            f"{name} was opened by sdtrt.load: an engine runs its {part} already",
            hint="sdtrt.load(..., height=..., width=...) opens one for another size",
        )
    base = next((one for one in classes if isinstance(module, one)), None)
    if base is None and part == "vae" and isinstance(module, diffusers.ModelMixin):
        return  # PyTorch runs it
    if base is None:
        compiled = "; pass it before torch.compile" * hasattr(module, "_orig_mod")
        wanted = " or ".join(one.__name__ for one in classes)
        raise EngineError(
            f"the {part} of {name} is a {type(module).__name__}, not a {wanted}", hint=f"{HINT}{compiled}"
        )
    for method in ("forward", *METHODS.get(part, ())):
        if getattr(type(module), method, None) is not getattr(base, method, None):
            raise EngineError(f"the {part} of {name}, a {type(module).__name__}, has a {method} of its own", hint=HINT)
    if moved_by(module) is not None:
        raise EngineError(
            f"the {part} of {name} is moved by hooks (offloading, caching or a device map)",
            hint="pipe.remove_all_hooks(), or load the pipeline without them, and move it with pipe.to(...)",
        )
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise EngineError(f"the {part} of {name} is compiled", hint="load the pipeline anew, without compile()")
    if any(not parameter.is_floating_point() for parameter in module.parameters()):
        raise EngineError(f"the {part} of {name} has quantised weights", hint="load it in fp16, bf16 or fp32")


def takes_images(pipe: Any) -> bool:
    """Whether a pipeline's call encodes images; what ControlNets take is not encoded."""
    names = inspect.signature(type(pipe).__call__).parameters
    return "image" in names and ("control_image" in names or not groups_of(pipe))


def takes_masks(pipe: Any) -> bool:
    """Whether a pipeline's call makes what a mask covers of an image."""
    return "mask_image" in inspect.signature(type(pipe).__call__).parameters


def edits(pipe: Any) -> bool:
    """Whether a pipeline's call edits an image as a text says (instruct-pix2pix)."""
    return "image_guidance_scale" in inspect.signature(type(pipe).__call__).parameters


def _check_shapes(name: str, pipe: Any, model: LiveModel) -> None:
    """Refuse UNets of other inputs, and VAEs of other channels."""
    if "vae" in model.modules:
        _check_vae(name, model.config("vae"))
    if "unet" not in model.modules:
        return
    config = model.config("unet")
    taken = (CHANNELS, inpainting_channels(CHANNELS)) if takes_masks(pipe) else (CHANNELS,)
    if edits(pipe):
        taken = (editing_channels(CHANNELS),)
    if config["in_channels"] not in taken or config["out_channels"] != CHANNELS:
        raise EngineError(
            f"the unet of {name} takes {config['in_channels']} channels and gives {config['out_channels']}", hint=HINT
        )
    if getattr(pipe.unet, "encoder_hid_proj", None) is not None and projection_of(pipe.unet) is None:
        kind = type(pipe.unet.encoder_hid_proj).__name__
        raise EngineError(f"the unet of {name} has projected states that are no IP-Adapter's ({kind})", hint=HINT)
    if config.get("attention_type", "default") != "default":
        raise EngineError(f"the unet of {name} has {config['attention_type']} attention", hint=HINT)


def _check_vae(name: str, config: Mapping[str, Any]) -> None:
    if (config["in_channels"], config["out_channels"]) != (3, 3):
        raise EngineError(
            f"the vae of {name} has {config['in_channels']} channels in and {config['out_channels']} out;"
            " engines need 3 and 3",
            hint=HINT,
        )


def vae_in_pytorch(model: LiveModel) -> str:
    """Why PyTorch runs a VAE whatever is asked for; empty where engines may."""
    if not {"vae", "unet"} <= model.modules.keys():
        return f"engines run {' and '.join(VAE_CLASSES)}, beside a unet"
    factor = model.vae_scale_factor
    return "" if factor == SIZE_MULTIPLE else f"engines need a VAE of factor {SIZE_MULTIPLE}, this has {factor}"


def refuse_vae(model: LiveModel, names: Iterable[Component]) -> None:
    """Raise `EngineError` where engines are asked for of a VAE that PyTorch alone runs."""
    if any(part_of(name) == "vae" for name in names) and (why := vae_in_pytorch(model)):
        raise EngineError(
            f"no engine runs the vae of {model.name}: {why}",
            hint="leave vae_decoder and vae_encoder out of components=: PyTorch runs them, beside engines of the rest",
        )


def engine_pixels(model: LiveModel, pixels: int) -> int:
    """What a side of an image counts in engines, which take each latent for 8 pixels, whatever the VAE makes of it."""
    return pixels * SIZE_MULTIPLE // model.vae_scale_factor


def choose_backend(choice: BackendName, device: torch.device) -> tuple[BackendName, str]:
    """The backend that runs where a pipeline's modules are, and for `auto` why it is expected to be the fastest.

    Raises:
        EngineError: where none of those chosen runs there, with each one's reason.
    """
    if choice == AUTO:
        found, problems = registry.automatic(device.type)
        if found is not None:
            return found.name, registry.why(found, problems)
        raise _nothing_serves("no backend", device, problems)
    backend = registry.get(choice)
    if backend.source is None:
        problem = "it has no engines"
    elif backend.device() != device.type:
        problem = f"it runs on {backend.device()}"
    elif (error := backend.why_not()) is not None:
        problem = error.message
    else:
        return backend.name, ""
    raise _nothing_serves(f"{choice} can't run: no engine", device, [problem])


def _nothing_serves(wanted: str, device: torch.device, reasons: Iterable[str]) -> EngineError:
    return EngineError(
        f"{wanted} serves a pipeline on {device.type} ({'; '.join(reasons) or 'engines run on cuda and on cpu'})",
        hint="move the pipeline first, as in pipe.to('cuda'); sdtrt doctor says what this machine has",
    )
