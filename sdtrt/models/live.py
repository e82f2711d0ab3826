"""A model that lives in a pipeline: its modules are the source of truth, whatever files they came from.

Knows modules and their tensors. Knows no engine, and changes nothing of the modules.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrt.common.errors import ModelError, SdtrtError
from sdtrt.models.adapters import is_fused, own_state
from sdtrt.models.image_prompts import PROJECTION, drop_projection, plain_processors
from sdtrt.models.resolve import Model, resolve_model
from sdtrt.specs import SIZE_MULTIPLE, Component, ModelSpec, Precision
from sdtrt.specs.contract import (
    DTYPES,
    VAE_CLASSES,
    editing_channels,
    latent_channels_of,
    pooled_width,
    trained_size,
    vae_scale_factor,
)

if TYPE_CHECKING:
    import torch

MODULES = ("text_encoder", "text_encoder_2", "unet", "vae")  # the parts with weights
CONTROLNET = "controlnet"
LAYOUT = "live"
HASHING_THREADS = 4
# What `CLIPTextModel` computes with. Versions of transformers differ in what else a configuration has.
_CLIP_NUMBERS = (
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "projection_dim",
    "vocab_size",
)
# What diffusers' constructors take, and `forward` computes nothing with.
_UNUSED = ("sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
HALVES: dict[str, tuple[str, ...]] = {
    "vae_decoder": ("decoder.", "post_quant_conv."),
    "vae_encoder": ("encoder.", "quant_conv."),
}


@dataclass(frozen=True)
class LiveModel:
    """The modules of a pipeline, as exports and builds take a model.

    Args:
        spec: its name alone: what the pipeline was loaded from, or its class.
        modules: by the names of their parts, `unet`; of several ControlNets `controlnet`, `controlnet_2`, ….
        stored: the model that its name leads to on this machine; its weights may be others by now.
    """

    spec: ModelSpec
    modules: Mapping[str, torch.nn.Module] = field(repr=False)
    stored: Model | None = field(default=None, compare=False, repr=False)
    _digests: dict[tuple[Component, Precision], str] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, pipe: Any) -> LiveModel:
        """The model of a pipeline, as its modules are at this moment."""
        modules = {name: module for name in MODULES if (module := getattr(pipe, name, None)) is not None}
        if "vae" in modules and not _is_usual_vae(modules["vae"]):
            del modules["vae"]
        nets = controlnets_of(pipe)
        modules |= nets if all(map(_is_controlnet, nets.values())) else {}
        name = str(getattr(pipe, "name_or_path", None) or "")
        return cls(ModelSpec(name or type(pipe).__name__), modules, _stored(name) if name else None)

    @property
    def name(self) -> str:
        """What people call it."""
        return self.spec.name

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts that the pipeline has."""
        return tuple(self.modules)

    @property
    def others(self) -> dict[str, LiveModel]:
        """The model with each further ControlNet in the place of the first one, by their names, `controlnet_2`."""
        further = [name for name in self.modules if name.startswith(f"{CONTROLNET}_")]
        usual = {name: module for name, module in self.modules.items() if name not in further}
        return {name: LiveModel(self.spec, {**usual, CONTROLNET: self.modules[name]}, self.stored) for name in further}

    @property
    def is_sdxl(self) -> bool:
        """Whether its UNet takes SDXL's added conditioning; where only text is encoded, whether it has both."""
        if "unet" not in self.modules:
            return "text_encoder_2" in self.modules
        return self.config("unet").get("addition_embed_type") == "text_time"

    @property
    def is_editing(self) -> bool:
        """Whether its UNet takes the latents of an image that is to be edited (instruct-pix2pix)."""
        if not {"unet", "vae"} <= self.modules.keys():
            return False
        channels = editing_channels(latent_channels_of(self.config("vae")))
        return bool(self.config("unet")["in_channels"] == channels)

    @property
    def pooled_width(self) -> int | None:
        """The width of the pooled text that the UNet takes; None where no second text encoder gives it."""
        return pooled_width(self.config("text_encoder_2")) if "text_encoder_2" in self.modules else None

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent; 8 where the pipeline has no VAE that engines know."""
        return vae_scale_factor(self.config("vae")) if "vae" in self.modules else SIZE_MULTIPLE

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the UNet was trained for."""
        if "unet" not in self.modules:
            return trained_size({}, self.vae_scale_factor)
        return trained_size(self.config("unet"), self.vae_scale_factor)

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a part, with its class's defaults. Raises `ModelError` where there is no such part."""
        self.check_has(part)
        config: Any = self.modules[part].config
        return _text_config(self.modules[part]) if hasattr(config, "to_dict") else dict(config)

    def check_has(self, *parts: str) -> None:
        """Raise `ModelError` where the pipeline lacks one of these parts."""
        if missing := [part for part in parts if part not in self.modules]:
            raise ModelError(
                f"the pipeline has no {' and no '.join(missing)}", hint=f"it has {', '.join(self.modules)}"
            )

    def files(self, part: str) -> tuple[Path, ...]:
        """None: it is read from modules."""
        return ()

    def digest(self, component: Component, precision: Precision) -> str:
        """`weights_digest` of a component; computed once."""
        name = (component, precision)
        if name not in self._digests:
            self._digests[name] = weights_digest(self._module_of(component), component, precision)
        return self._digests[name]

    def fingerprint(self, component: Component, precision: Precision) -> str:
        """What stands for a component's weights in the key of an export that is made from the live module."""
        content = {"part": component, "layout": LAYOUT, "weights": self.digest(component, precision)}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def load(self, component: Component, dtype: torch.dtype) -> torch.nn.Module:
        """A copy of a component's part in `dtype` on the CPU, in eval mode, without gradients and hooks.

        It shares the memory of tensors that are so already: who takes it must not write to them.
        """
        return _cpu_copy(self._module_of(component), dtype)

    def _module_of(self, component: Component) -> torch.nn.Module:
        part = "vae" if component in HALVES else component
        self.check_has(part)
        return self.modules[part]


def _is_usual_vae(module: Any) -> bool:
    """Whether a VAE is of one of the classes that engines know, or of a child of theirs."""
    return any(base.__name__ in VAE_CLASSES for base in type(module).__mro__)


def controlnets_of(pipe: Any) -> dict[str, Any]:
    """The ControlNets of a pipeline, each once: `controlnet`, and of one that has several `controlnet_2`, ….

    Those that `torch.compile` wraps are as they are.
    """
    found = getattr(pipe, CONTROLNET, None)
    nets = dict.fromkeys(one for one in getattr(found, "nets", [found]) if one is not None)
    return {CONTROLNET if number == 1 else f"{CONTROLNET}_{number}": one for number, one in enumerate(nets, 1)}


def _is_controlnet(module: Any) -> bool:
    """Whether a module is one ControlNet of diffusers' own that an engine may run: others are left to PyTorch.

    That is one whose residuals are of full size, which is not compiled and has no quantised weights.
    """
    own = type(module).__module__.startswith("diffusers.") and type(module).__name__ == "ControlNetModel"
    if not own or module.config.global_pool_conditions or module._compiled_call_impl is not None:
        return False
    return all(tensor.is_floating_point() for tensor in module.parameters())


def _stored(name: str) -> Model | None:
    """The model of a name, as far as it lies on this machine."""
    try:
        return resolve_model(ModelSpec(name, offline=True))
    except SdtrtError:
        return None


def dtype_of(precision: Precision) -> torch.dtype:
    """`fp16` → `torch.float16`."""
    import torch

    dtype = getattr(torch, DTYPES[precision])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _cpu_copy(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A module like another one, its tensors cast; the attention processors are diffusers' own."""
    import torch

    memo: dict[int, Any] = {}
    for own in module.modules():
        for hooks in (own._forward_hooks, own._forward_pre_hooks, own._backward_hooks):
            memo[id(hooks)] = OrderedDict((key, hook) for key, hook in hooks.items() if is_of_transformers(hook))
        for parameter in own._parameters.values():
            if parameter is not None:
                cast = parameter.detach().to("cpu", dtype)
                memo[id(parameter)] = torch.nn.Parameter(cast, requires_grad=False)
        for buffer in own._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = buffer.detach().to("cpu", dtype if buffer.is_floating_point() else buffer.dtype)
    made: Any = copy.deepcopy(module, memo).eval()
    if hasattr(made, "set_attn_processor"):
        plain_processors(made)
    drop_projection(made)
    if hasattr(made, "disable_freeu"):  # whose numbers are an engine's input
        made.disable_freeu()
    result: torch.nn.Module = made
    return result


def is_of_transformers(hook: Any) -> bool:
    """Whether a hook is one of those by which transformers collects the states of layers."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def component_tensors(module: torch.nn.Module, component: Component) -> dict[str, torch.Tensor]:
    """The tensors that a component computes with, by diffusers' names: of a VAE those of one half.

    Versions of transformers differ in a prefix and in whether they store the positions, so both are left out. So are
    the tensors of adapters, which peft puts around layers, of projections that diffusers fused, and of what makes
    tokens of images for IP-Adapters.
    """
    halves = HALVES.get(component)
    return {
        name.removeprefix("text_model."): tensor
        for name, tensor in own_state(module).items()
        if (halves is None or name.startswith(halves))
        and not (name.endswith("position_ids") or name.startswith(f"{PROJECTION}.") or is_fused(name))
    }


def weights_digest(module: torch.nn.Module, component: Component, precision: Precision) -> str:
    """sha256 (hex) of what a component computes: its class's numbers, and its tensors in an engine's precision.

    It is the same for a module from a file and for a live one. Tensors are cast one at a time.
    """
    import torch

    dtype = dtype_of(precision)

    def digest(tensor: torch.Tensor) -> str:
        plain = tensor.detach().to("cpu", dtype).contiguous()
        return hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().data).hexdigest()

    tensors = component_tensors(module, component)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        digests = list(pool.map(digest, tensors.values()))
    content = {
        "component": component,
        "config": _numbers_of(module),
        "tensors": sorted(
            (name, list(tensor.shape), own) for (name, tensor), own in zip(tensors.items(), digests, strict=True)
        ),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _numbers_of(module: torch.nn.Module) -> dict[str, Any]:
    """What a module's configuration says of what it computes."""
    config: Any = module.config
    if hasattr(config, "to_dict"):
        whole = _text_config(module)
        return {name: whole.get(name) for name in _CLIP_NUMBERS}
    known = inspect.signature(base_of(type(module))).parameters
    return {name: config[name] for name in sorted(known) if name in config and name not in _UNUSED}


def _text_config(encoder: Any) -> dict[str, Any]:
    """A text encoder's configuration, with the tokens that it has rows for: diffusers forgets those that it unloads."""
    return {**encoder.config.to_dict(), "vocab_size": encoder.get_input_embeddings().weight.shape[0]}


def base_of(cls: type) -> type:
    """diffusers' or transformers' own class of a module: subclasses may take other arguments."""
    return next(base for base in cls.__mro__ if base.__module__.startswith(("diffusers.", "transformers.")))
