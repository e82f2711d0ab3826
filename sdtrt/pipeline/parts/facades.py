"""The facades: what diffusers sees in place of a component that an engine runs.

They hold no weights. What needs them, and is not done by the engine, they refuse with a way that works.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import PushToHubMixin

from sdtrt.backends.gradients import in_pytorch
from sdtrt.backends.session import Session
from sdtrt.common.errors import EngineError, NotInEngineError
from sdtrt.pipeline.parts.forwards import TextForward, UNetForward, run, torch_dtype
from sdtrt.pipeline.parts.image_prompts import PromptedForward
from sdtrt.specs import Component
from sdtrt.specs.contract import Contract, is_tiny_vae


class Facade(torch.nn.Module, SchedulerMixin):  # type: ignore[misc]  # diffusers is not typed
    """What all facades share: they are like the class that they stand for, as far as an engine goes.

    `DiffusionPipeline.save_pretrained` leaves out, with a warning, what is of none of the classes that it knows, and
    the folder is broken. So a facade is of one of them, and refuses: of `SchedulerMixin`, of which diffusers asks
    nothing else. Its names are not a facade's (`_Absent`).

    Of what the class that it stands for has, class methods and names are a facade's own; all else that it lacks is a
    `NotInEngineError`.
    A copy runs the same engine, so one thread at a time may use it and its copies; there are no pickles.

    Args:
        original: the class that it stands for.
        components: what engines run of it.
    """

    device: torch.device
    dtype: torch.dtype
    _original: Any = None
    _components: tuple[Component, ...] = ()

    def __init__(self, original: type, *components: Component) -> None:
        super().__init__()
        self._original, self._components = original, components

    def __getattr__(self, name: str) -> Any:
        """A submodule; what the original's class has; an entry of the configuration, as diffusers itself does yet."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
        own = inspect.getattr_static(self._original, name, None)
        if isinstance(own, (classmethod, staticmethod, str, list, type)) and not name.startswith("_"):
            return getattr(self._original, name)
        if name in self.__dict__.get("_internal_dict", {}):
            return self._internal_dict[name]
        if inspect.isfunction(own) and name in ConfigMixin.__dict__:
            return getattr(self._configured(), name)
        raise self._lacking(name)

    def _configured(self) -> Any:
        """An object of the original's class that has its configuration, and nothing else."""
        plain = self._original.__new__(self._original)
        torch.nn.Module.__init__(plain)
        plain._internal_dict = self._internal_dict
        return plain

    def _lacking(self, name: str) -> NotInEngineError:
        """What is said of something that the module has not."""
        names = " and ".join(self._components)
        return NotInEngineError(f"the engine of the {names} has no {name}", hint=in_pytorch(*self._components))

    # What modules have, and diffusers asks of them

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """What PyTorch runs of it; who takes the first parameter of none for its dtype or device hears of that."""
        own = [*super().parameters(recurse)]
        return iter(own) if own else _NoParameters(self._lacking("parameters"))

    def get_submodule(self, target: str) -> torch.nn.Module:
        """A submodule by its path; a layer that is in the engine is not there."""
        try:
            return super().get_submodule(target)
        except AttributeError as error:
            raise self._lacking(target) from error

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Weights are in the engine."""
        raise self._lacking("load_state_dict")

    def enable_group_offload(self, *_: Any, **__: Any) -> NoReturn:
        """Engines stay where they are."""
        raise self._lacking("enable_group_offload")

    @property
    def _hf_hook(self) -> Any:
        """accelerate's, which moves a module's weights from one device to another: there is none."""
        raise self._lacking("_hf_hook")

    @_hf_hook.setter
    def _hf_hook(self, hook: object) -> None:
        raise self._lacking(f"offloading ({type(hook).__name__})")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Facade:
        """`to`, `half`, `cuda` and their like: refuse what would change the dtype or the device of the engine."""
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        result = fn(probe)
        if (result.dtype, result.device) != (probe.dtype, probe.device):
            names = " and ".join(self._components)
            raise EngineError(
                f"the engine of the {names} can't go from {_place(probe)} to {_place(result)}",
                hint="open the pipeline with another precision or backend (--precision, --backend), or with the"
                " backend torch",
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    # Copies

    def __copy__(self) -> Facade:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Facade:
        memo |= {id(engine): engine for engine in self._engines()}
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def _engines(self) -> tuple[Any, ...]:
        """What copies have in common."""
        return (self.session, self.forward)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise EngineError(
            f"a pipeline whose {' and '.join(self._components)} an engine runs can't be pickled",
            hint="open it in the other process: engines are shared there through the engine directory",
        )


class _Absent:
    """A name that a base class has and its children have not: their `__getattr__` is asked for it."""

    def __get__(self, instance: object, owner: type | None = None) -> NoReturn:
        raise AttributeError


for _mixin in (SchedulerMixin, PushToHubMixin):
    for _name in vars(_mixin):
        if not _name.startswith("__"):
            setattr(Facade, _name, _Absent())


class _NoParameters(Iterator[torch.nn.Parameter]):
    """No parameters to a loop; an error to who takes the first one without asking."""

    def __init__(self, error: NotInEngineError) -> None:
        self._error = error

    def __iter__(self) -> Iterator[torch.nn.Parameter]:
        return iter(())

    def __next__(self) -> torch.nn.Parameter:
        raise self._error


class DiffusersFacade(Facade):
    """What diffusers' models have beside that: a configuration that can be saved, and ways to compute."""

    _internal_dict: FrozenDict  # diffusers' own name: pipelines for old models assign it to mend the configuration

    @property
    def config(self) -> FrozenDict:
        """The configuration, with attribute access as in diffusers."""
        return self._internal_dict

    def register_to_config(self, **entries: Any) -> None:
        """Change entries of the configuration."""
        self._internal_dict = FrozenDict({**self._internal_dict, **entries})

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: object = None) -> None:
        """Engines have their own attention."""
        if valid:
            raise self._lacking("enable_xformers_memory_efficient_attention")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """It never was."""

    def unfuse_qkv_projections(self) -> None:
        """They never were."""


class UNetFacade(DiffusersFacade):
    """A `UNet2DConditionModel` for diffusers' pipelines, run by an engine: its `forward` is a `UNetForward`.

    Args:
        session: runs the engine; who opened it closes it.
        contract: the engine's inputs and outputs.
        config: the UNet's diffusers configuration; what it leaves out has the class's defaults.
        device: where the pipeline runs, and where the session takes its tensors.
    """

    def __init__(
        self, session: Session[torch.Tensor], contract: Contract, config: Mapping[str, Any], device: torch.device
    ) -> None:
        super().__init__(UNet2DConditionModel, contract.component)
        self.session, self.contract = session, contract
        self.forward = UNetForward(session, contract, device)
        self._internal_dict = FrozenDict({**default_config(UNet2DConditionModel), **config})
        self.device, self.dtype = device, self.forward.dtype
        if config.get("addition_embed_type") == "text_time":
            width = config["projection_class_embeddings_input_dim"]
            # SDXL's pipelines read the width of the added conditioning from the layer that takes it.
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def take_image_prompts(self, projection: torch.nn.Module, layout: Any) -> None:
        """Take what makes tokens of pictures for IP-Adapters, on the facade's device.

        Args:
            projection: diffusers' pipelines look into it, too (`encoder_hid_proj`).
            layout: a UNet without memory for weights; `set_ip_adapter_scale` looks there, and writes there.
        """
        self.encoder_hid_proj, self.attn_processors = projection, dict(layout.attn_processors)
        self.down_blocks, self.up_blocks = tuple(layout.down_blocks), tuple(layout.up_blocks)
        self.forward = PromptedForward(projection, self.attn_processors, self.forward)

    def set_attention_slice(self, slice_size: str | int | list[int] | None = "auto") -> None:
        """Engines need no slicing: they have the memory for the sizes that they were built for."""

    def disable_freeu(self) -> None:
        """It never was enabled."""


class TextEncoderFacade(Facade):
    """A CLIP text encoder for diffusers' pipelines, run by an engine: its `forward` is a `TextForward`.

    Args:
        session: runs the engine; who opened it closes it.
        config: the encoder's configuration; what it leaves out has the class's defaults.
        device: where the pipeline runs, and where the session takes its tensors.
        dtype: of the pipeline: what the embeddings are cast to.
    """

    def __init__(
        self, session: Session[torch.Tensor], config: Mapping[str, Any], device: torch.device, dtype: torch.dtype
    ) -> None:
        import transformers

        projects = any(spec.name == "text_embeds" for spec in session.outputs)
        original = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
        super().__init__(original, session.contract.component)
        self.session = session
        self.forward = TextForward(session, device, dtype)
        self.config = transformers.CLIPTextConfig.from_dict(dict(config))
        self.device, self.dtype = device, dtype

    @property
    def text_model(self) -> Any:
        """The layers. diffusers asks whether they are there before it looks for those that a LoRA changes, and would
        find none: so this is no `AttributeError`, which it would take for another layout.
        """
        lacking = self._lacking("text_model, whose layers a LoRA changes")
        raise EngineError(lacking.message, hint=lacking.hint)


class VaeFacade(DiffusersFacade):
    """An `AutoencoderKL` (or `AutoencoderTiny`) for diffusers' pipelines: each half is an engine's, PyTorch's, or none.

    Args:
        config: the VAE's configuration; what it leaves out has the class's defaults.
        device: where the pipeline runs, and where the sessions take their tensors.
        decoder, encoder: run the engines; who opened them closes them.
        rest: the PyTorch VAE for the half that has no engine; None where nothing will ask for that half.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        device: torch.device,
        *,
        decoder: Session[torch.Tensor] | None = None,
        encoder: Session[torch.Tensor] | None = None,
        rest: Any = None,
    ) -> None:
        sessions = {"decoder": decoder, "encoder": encoder}
        components = [session.contract.component for session in sessions.values() if session is not None]
        assert components, "a VAE without engines needs no facade"
        tiny = is_tiny_vae(config)
        super().__init__(AutoencoderTiny if tiny else AutoencoderKL, *components)
        self._internal_dict = FrozenDict(_tiny_config(config) if tiny else _full_config(config))
        self.device = device
        self.decoder_session, self.encoder_session, self.rest = decoder, encoder, rest
        if any(torch_dtype(one.inputs[0].dtype) != torch.float32 for one in self._engines()):
            self.register_to_config(force_upcast=False)  # such an engine keeps within its precision, and has no other
        self.halves = torch.nn.ModuleDict(
            {name: VaeHalf(session, device) for name, session in sessions.items() if session is not None}
        )
        self.use_tiling = self.use_slicing = False

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # of the half that PyTorch runs, which may change it
        """The dtype of the decoder: SDXL's pipelines ask for it before they decode, to widen an fp16 one."""
        if self.decoder_session is None and self.rest is not None:
            dtype: torch.dtype = self.rest.dtype
            return dtype
        session = self.decoder_session or self.encoder_session
        assert session is not None
        return torch_dtype(session.inputs[0].dtype)

    @property
    def decoder(self) -> torch.nn.Module:
        """The module that decodes."""
        return self._half("decoder")

    @property
    def encoder(self) -> torch.nn.Module:
        """The module that encodes."""
        return self._half("encoder")

    @property
    def post_quant_conv(self) -> torch.nn.Module:
        """The layer that SDXL's pipelines read the decoder's dtype from, once they have widened it."""
        layer: torch.nn.Module = self._rest("decoder").post_quant_conv
        return layer

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Encode images `[B,3,8H,8W]`, and decode the likeliest latents, or (`sample_posterior`) a sample of them."""
        (encoded,) = self.encode(sample, return_dict=False)
        if isinstance(encoded, torch.Tensor):
            return self.decode(self._in_bytes(encoded), return_dict=return_dict)
        latents = encoded.sample(generator) if sample_posterior else encoded.mode()
        return self.decode(latents, return_dict=return_dict)

    def _in_bytes(self, latents: torch.Tensor) -> torch.Tensor:
        """A tiny VAE's latents in 256 steps, as `AutoencoderTiny.forward` stores them between its halves."""
        width, shift = 2 * self.config["latent_magnitude"], self.config["latent_shift"]
        stored = (latents / width + shift).clamp(0, 1).mul(255).round() / 255
        restored: torch.Tensor = (stored - shift) * width
        return restored

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents `[B,C,H,W]` → images `[B,3,8H,8W]` in the engine's dtype or that of `z`, whichever is wider."""
        if self.decoder_session is None:
            decoded: DecoderOutput | tuple[torch.Tensor] = self._rest("decoder").decode(z, return_dict=return_dict)
            return decoded
        image = self.decoder(z)
        image = image.to(torch.promote_types(image.dtype, z.dtype))
        return DecoderOutput(sample=image) if return_dict else (image,)

    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | AutoencoderTinyOutput | tuple[DiagonalGaussianDistribution | torch.Tensor]:
        """Images `[B,3,8H,8W]` → the distribution of their latents (a tiny VAE's: them), in the dtype of `x`."""
        if self.encoder_session is None:
            encoded: AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]
            encoded = self._rest("encoder").encode(x, return_dict=return_dict)
            return encoded
        given = self.encoder(x).to(x.dtype)
        if is_tiny_vae(self.config):
            return AutoencoderTinyOutput(latents=given) if return_dict else (given,)
        distribution = DiagonalGaussianDistribution(given)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def encode_one_by_one(self) -> None:
        """Have the engine of the encoder take the images of a batch one after the other."""
        if "encoder" in self.halves:
            self.halves["encoder"] = RowByRow(self.halves["encoder"])

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Decode and encode images in tiles: the half that PyTorch runs. An engine needs none: it takes them whole."""
        self.use_tiling = use_tiling
        if self.rest is not None:
            self.rest.enable_tiling() if use_tiling else self.rest.disable_tiling()

    def disable_tiling(self) -> None:
        """Take images whole."""
        self.enable_tiling(False)

    def enable_slicing(self) -> None:
        """Decode and encode a batch one by one: the half that PyTorch runs. An engine takes the batches it is for."""
        self.use_slicing = True
        if self.rest is not None:
            self.rest.enable_slicing()

    def disable_slicing(self) -> None:
        """Take a batch at once."""
        self.use_slicing = False
        if self.rest is not None:
            self.rest.disable_slicing()

    def _half(self, name: str) -> torch.nn.Module:
        """What computes a half."""
        module: torch.nn.Module = self.halves[name] if name in self.halves else getattr(self._rest(name), name)
        return module

    def _rest(self, name: str) -> Any:
        """The PyTorch VAE, for the half that no engine runs."""
        if self.rest is None:
            raise EngineError(
                f"this pipeline was opened without the VAE's {name}",
                hint="open it for img2img to encode images" if name == "encoder" else "use --backend torch",
            )
        return self.rest

    def _engines(self) -> tuple[Any, ...]:
        return tuple(session for session in (self.decoder_session, self.encoder_session) if session is not None)


class VaeHalf(torch.nn.Module):
    """A half of a VAE with its convolution at the latents, run by an engine: one tensor in, one tensor out."""

    def __init__(self, session: Session[torch.Tensor], device: torch.device) -> None:
        super().__init__()
        self.session, self._device = session, device

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """Latents `[B,C,H,W]` → images `[B,3,8H,8W]`, or images → moments `[B,2C,H,W]`, in the engine's dtype."""
        (result,) = run(self.session, self._device, sample).values()
        return result


class RowByRow(torch.nn.Module):
    """Half a VAE that takes images one by one, as its engine does."""

    def __init__(self, half: torch.nn.Module) -> None:
        super().__init__()
        self.encode_one = half

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[B,3,8H,8W]` → moments `[B,2C,H,W]`."""
        return torch.cat([self.encode_one(row) for row in images.split(1)])


def _place(tensor: torch.Tensor) -> str:
    """`float32 on cpu`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def default_config(cls: Any) -> dict[str, Any]:
    """The configuration of a diffusers model that sets nothing: old models' files leave newer entries out."""
    parameters = inspect.signature(cls.__init__).parameters
    return {name: value.default for name, value in parameters.items() if value.default is not inspect.Parameter.empty}


def _full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A full VAE's configuration, whole."""
    return {**default_config(AutoencoderKL), **config}


def _tiny_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tiny VAE's configuration, whole, with what its class itself adds to what is stored."""
    whole = {**default_config(AutoencoderTiny), **config}
    return whole | {"block_out_channels": whole["decoder_block_out_channels"], "force_upcast": False}
