"""Opens diffusers' own pipelines with engines in the place of their parts. Makes no images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch

from sdtrt.backends import registry
from sdtrt.backends.open import open_beside, open_session
from sdtrt.backends.scratch import Scratch
from sdtrt.backends.session import Session
from sdtrt.common.console import Console
from sdtrt.common.errors import ModelChangedError, ModelError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.engines.keys import Sight
from sdtrt.models import loading
from sdtrt.models.components import (
    TEXT_ENCODERS,
    VAE_HALVES,
    components_of,
    part_of,
    text_encoders_of,
)
from sdtrt.models.controlnets import PART
from sdtrt.models.embeddings import put_into
from sdtrt.models.resolve import Model
from sdtrt.models.t2i_adapters import PART as ADAPTER
from sdtrt.models.weights import WEIGHT_NAMES
from sdtrt.pipeline.opening import memory, preloaded
from sdtrt.pipeline.opening.all_engines import ensure_all
from sdtrt.pipeline.opening.memory import check_memory
from sdtrt.pipeline.opening.request import PROMPT_ROWS, PipelineSpec, first_of, shallow_beside
from sdtrt.pipeline.parts import pixels, schedulers
from sdtrt.pipeline.parts.control_facade import ControlNetFacade, together
from sdtrt.pipeline.parts.control_forward import ControlNetForward
from sdtrt.pipeline.parts.deep_cache import CachedForward, DeepCache
from sdtrt.pipeline.parts.facades import TextEncoderFacade, UNetFacade, VaeFacade
from sdtrt.pipeline.parts.forwards import UNetForward
from sdtrt.pipeline.parts.guided_rows import GuidedForward
from sdtrt.pipeline.parts.refusals import refuse_as_a_whole
from sdtrt.pipeline.parts.scheduler_checks import check_eta, check_steps


@dataclass(frozen=True)
class OpenPipeline:
    """A diffusers pipeline that is ready to run, the engines in it, and the files that its parts were read from."""

    pipe: Any
    spec: PipelineSpec
    entries: Mapping[str, Entry]
    files: Sight

    def check_weights(self) -> None:
        """Raise `ModelChangedError` where weights that this pipeline has mapped into memory were written meanwhile."""
        if self.spec.device.type == "cpu":  # a GPU has copies
            called = (name for name in components_of(self.spec.model) if self.spec.img2img or name != "vae_encoder")
            self.files.check_mapped({part_of(name) for name in called if name not in self.entries})

    @property
    def entry(self) -> Entry | None:
        """The UNet's engine; None where PyTorch runs it."""
        return self.entries.get("unet")


@contextmanager
def open_pipeline(
    spec: PipelineSpec,
    directory: EngineDirectory,
    console: Console,
    *,
    allow_build: bool = True,
    unet_engine: Entry | None = None,
) -> Iterator[OpenPipeline]:
    """Load what a pipeline needs and no more, with the engines' facades as the parts that they replace.

    Scheduler and tokenizers come first, so that what they can't do is refused before an engine is built. PyTorch's grad
    mode stays the caller's own: the weights of what PyTorch runs are frozen, and engines refuse what asks for a
    gradient.

    Args:
        unet_engine: the UNet's engine, whatever weights it was built from; None to find or build the one that fits.
    """
    parts = {"scheduler": checked_scheduler(spec)} | _load_tokenizers(spec)
    if spec.has_engines:  # that one stays diffusers' own, to be compared with
        schedulers.keep_on_host(parts["scheduler"])
    with _open_engines(spec, directory, console, allow_build, unet_engine) as running:
        with console.stage("loading the pipeline"):
            files = Sight(spec.model, (name for name in WEIGHT_NAMES if name in spec.model.parts))
            with files.steady():
                parts |= _load_parts(spec, running)
                _check_weights(spec, running, directory, given=unet_engine)
            parts |= _facades(spec, running, parts.get("vae"))
            _choose_programs(spec, parts, running, DeepCache(lambda: spec.savings.caching, console))
            _give_image_prompts(spec, parts)
        # No name for the pipeline here: whoever drops it ends this generator, which closes the engines.
        yield OpenPipeline(_assemble(spec, parts, running), spec, running.entries, files)


def checked_scheduler(spec: PipelineSpec) -> Any:
    """The scheduler of a pipeline.

    Raises:
        ModelError, UsageError: where it can't run what is asked for (`check_steps`, `check_eta`).
    """
    scheduler = load_scheduler(spec)
    strength = spec.strength if is_lcm(spec, scheduler) else 1.0
    check_steps(scheduler, spec.steps, img2img=spec.img2img, strength=strength)
    if spec.eta is not None:
        check_eta(scheduler)
    return scheduler


def load_scheduler(spec: PipelineSpec) -> Any:
    """The model's own scheduler, or the one of another name, which does without the own one's class."""
    try:
        own = loading.load_parts(spec.model, ["scheduler"], torch.float32)["scheduler"]
    except ModelError:
        if spec.scheduler is None:
            raise
        own = schedulers.Settings(loading.scheduler_config(spec.model))
    made = schedulers.make_scheduler(spec.scheduler, own)
    return schedulers.with_noise(made, spec.noise.over(spec.model.stated))


def _load_tokenizers(spec: PipelineSpec) -> dict[str, Any]:
    """The tokenizers, by name; they have made tokens of the texts, which the text encoders know."""
    encoders = {name.replace("text_encoder", "tokenizer"): name for name in text_encoders_of(spec.model)}
    tokenizers = loading.load_parts(spec.model, list(encoders), torch.float32)
    for name, tokenizer in tokenizers.items():
        vocabulary = spec.model.config(encoders[name]).get("vocab_size", loading.CLIP_VOCABULARY)
        loading.check_words(tokenizer, spec.texts, vocabulary)
    return tokenizers


def _check_weights(spec: PipelineSpec, running: _Running, directory: EngineDirectory, given: Entry | None) -> None:
    """Refuse engines of other weights than the model has by now; one that is `given` may be of any."""
    if running.files is not None:
        running.files.check()
    for name, entry in running.entries.items():
        part, model = part_of(entry.engine_key.component), spec.source_of(name)
        if entry == given or not registry.get(spec.backend).weights_inside:
            continue
        if entry.engine_key.export.fingerprint != model.fingerprint(part, directory.file_digest):
            raise ModelChangedError(
                f"the {part} of {model.name} was replaced while its engine was found or built",
                hint="run the command again",
            )


@dataclass(frozen=True)
class _Running:
    """The engines of a pipeline, and the sessions that run them, by components; further ControlNets by their names.

    Args:
        files: how those were that the sessions' weights were read from; None where the engines hold their weights.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    sessions: dict[str, Session[torch.Tensor]] = field(default_factory=dict)
    files: Sight | None = None

    def covers(self, part: str, img2img: bool) -> bool:
        """Whether engines do all that the pipeline asks of a part."""
        names = (VAE_HALVES if img2img else VAE_HALVES[:1]) if part == "vae" else (part,)
        return all(name in self.sessions for name in names)


@contextmanager
def _open_engines(
    spec: PipelineSpec, directory: EngineDirectory, console: Console, allow_build: bool, unet_engine: Entry | None
) -> Iterator[_Running]:
    """Find or build the engines of a pipeline, then open all of them."""
    if not spec.in_engines and not spec.other_engines:
        preloaded.let_go()
        yield _Running()
        return
    entries = ensure_all(spec, directory, console, allow_build=allow_build, unet_engine=unet_engine)
    scratch = Scratch(memory.pool_bytes(spec, entries))  # the parts of a pipeline run one after the other
    with ExitStack() as stack:
        with preloaded.taken(entries.values()) as loaded:
            check_memory(spec, entries, loaded)
            held = registry.get(spec.backend).weights_inside
            files = None if held else Sight(spec.model, map(part_of, spec.in_engines))
            sessions: dict[str, Session[torch.Tensor]] = {}
            for name in sorted(memory.by_scratch(entries), key=_is_second):
                first = sessions[first_of(name)] if _is_second(name) else None
                sessions[name] = stack.enter_context(
                    _open(spec, spec.source_of(name), entries[name], scratch)
                    if first is None
                    else open_beside(entries[name], spec.device, scratch, first)
                )
        yield _Running(entries, sessions, files)


def _open(spec: PipelineSpec, model: Model, entry: Entry, scratch: Scratch) -> Session[torch.Tensor]:
    """Open one engine of a pipeline, with a model's weights where it holds none."""
    if registry.get(spec.backend).weights_inside:
        return open_session(entry, spec.device, scratch)
    return open_session(entry, spec.device, scratch, model)


def _is_second(name: str) -> bool:
    """Whether an engine's name says that it serves fewer rows, or shallow steps, beside another one."""
    return first_of(name) != name


def _load_parts(spec: PipelineSpec, running: _Running) -> dict[str, Any]:
    """What PyTorch runs, on the pipeline's device."""
    encoders = text_encoders_of(spec.model)
    controlnet = [PART] if PART in spec.model.parts else []
    modules = [name for name in ("unet", *encoders, *controlnet, "vae") if not running.covers(name, spec.img2img)]
    parts = {"unet": loading.load_unet(spec.model, spec.parts_dtype)} if "unet" in modules else {}
    parts |= loading.load_parts(spec.model, [name for name in modules if name != "unet"], spec.parts_dtype)
    for half in VAE_HALVES:
        if "vae" in modules and half in running.sessions:
            setattr(parts["vae"], half.removeprefix("vae_"), None)
    for name, model in spec.others.items():
        if name not in running.sessions:
            parts[name] = loading.load_parts(model, (PART,), spec.parts_dtype)[PART]
            modules.append(name)
    parts |= _adapters(spec)
    modules += [ADAPTER] if ADAPTER in parts else []
    for name in modules:
        parts[name].to(spec.device).eval()
    return parts


def _adapters(spec: PipelineSpec) -> dict[str, Any]:
    """The T2I-Adapters, several as the one part that diffusers has for them; PyTorch runs them, once a picture."""
    models = [model for model in (spec.model, *spec.adapters) if ADAPTER in model.parts]
    found = [loading.load_parts(model, (ADAPTER,), spec.parts_dtype)[ADAPTER] for model in models]
    if not found:
        return {}
    return {ADAPTER: diffusers.MultiAdapter(found) if len(found) > 1 else found[0]}


def _facades(spec: PipelineSpec, running: _Running, vae: Any) -> dict[str, torch.nn.Module]:
    """What stands in for the parts that engines run; `vae` is PyTorch's, where a half of it has no engine."""
    facades: dict[str, torch.nn.Module] = {}
    for name, session in running.sessions.items():
        if _is_second(name):
            continue
        component = session.contract.component
        config = spec.source_of(name).config(part_of(component))
        if name == "unet":
            facades[name] = UNetFacade(session, session.contract, config, spec.device)
        elif component == PART:
            facades[name] = ControlNetFacade(session, config, spec.device)
        elif name in TEXT_ENCODERS:
            facades[name] = TextEncoderFacade(session, config, spec.device, spec.parts_dtype)
        else:
            decoder, encoder = (running.sessions.get(half) for half in VAE_HALVES)
            facades["vae"] = VaeFacade(config, spec.device, decoder=decoder, encoder=encoder, rest=vae)
    return facades


def _choose_programs(spec: PipelineSpec, parts: Mapping[str, Any], running: _Running, cache: DeepCache) -> None:
    """Have the UNet, and the ControlNets that engines run, compute each step by the engine that it is for.

    In steps without guidance they compute the prompt's rows alone; other ControlNets are computed whole.
    """
    if "unet" in running.sessions:
        parts["unet"].forward = _forward_of("unet", spec, running, cache)
    if spec.prompt_rows is None:
        return
    for name in ("unet", *(name for name in (PART, *spec.others) if name in running.sessions)):
        module, second = parts[name], name + PROMPT_ROWS
        part = _forward_of(second, spec, running, cache) if second in running.sessions else None
        module.forward = GuidedForward(spec.savings.guidance, module.forward, part, spec.prompt_rows)


def _forward_of(name: str, spec: PipelineSpec, running: _Running, cache: DeepCache) -> UNetForward | ControlNetForward:
    """The forward of a facade, by an engine of its component."""
    session = running.sessions[name]
    if session.contract.component == PART:
        return ControlNetForward(session, spec.device, "use --backend torch")
    shallow = shallow_beside(name, running.sessions)
    if shallow is not None:
        return CachedForward(session, shallow, spec.device, cache)
    return UNetForward(session, session.contract, spec.device)


def _give_image_prompts(spec: PipelineSpec, parts: dict[str, Any]) -> None:
    """Add the image encoder that a model's IP-Adapters need, and give the UNet's facade what makes tokens for it."""
    if not spec.model.ip_adapters:
        return
    unet = parts["unet"]
    in_engine = isinstance(unet, UNetFacade)
    added, given = loading.load_image_prompts(spec.model, spec.parts_dtype, in_engine=in_engine)
    added["image_encoder"].to(spec.device)
    parts |= added
    if in_engine:
        unet.take_image_prompts(given.projection.to(spec.device), given.layout)


def _assemble(spec: PipelineSpec, parts: Mapping[str, Any], running: _Running) -> Any:
    """diffusers' own pipeline of these parts, by its constructor."""
    options: dict[str, Any]
    parts = {**parts, **_together(spec, parts)}
    parts = {name: part for name, part in parts.items() if name not in spec.others}
    if spec.model.is_sdxl:
        zeros = spec.model.pipeline_options.get("force_zeros_for_empty_prompt", True)
        options = {"force_zeros_for_empty_prompt": zeros}
        options |= {} if ADAPTER in parts else {"add_watermarker": False}  # diffusers' for T2I-Adapters has none
        options |= {name: None for name in ("tokenizer", "text_encoder") if name not in parts}
        options |= {"requires_aesthetics_score": True} if spec.model.is_refiner else {}
    else:
        options = {"safety_checker": None, "requires_safety_checker": False}
        options |= {"feature_extractor": None} if "feature_extractor" not in parts else {}
    pipe = _pipeline_class(spec, parts["scheduler"])(**parts, **options)
    if spec.edit and isinstance(pipe.vae, VaeFacade):
        pipe.vae.encode_one_by_one()  # of several images at once, too, as the encoder's engine takes one
    pipe.set_progress_bar_config(disable=True)
    if spec.tile is not None:
        pipe.vae.enable_tiling()
    put_into(pipe, spec.text.embeddings)
    if running.sessions:
        refuse_as_a_whole(pipe, dict.fromkeys(one.contract.component for one in running.sessions.values()))
        if spec.device.type == "cuda":
            pixels.round_on_device(pipe.image_processor)
    return pipe


def is_lcm(spec: PipelineSpec, scheduler: Any) -> bool:
    """Whether diffusers' pipeline of latent consistency models runs a request: it knows one scheduler, no mask, no
    ControlNet and no T2I-Adapter."""
    other = spec.inpaint or spec.edit or PART in spec.model.parts or ADAPTER in spec.model.parts
    return spec.model.is_lcm and not other and isinstance(scheduler, diffusers.LCMScheduler)


def reassembled(opened: OpenPipeline, spec: PipelineSpec) -> OpenPipeline:
    """Another pipeline of the same modules, which PyTorch runs; `spec` differs in task, size and steps alone."""
    assert not opened.entries
    names = ["scheduler", "unet", "vae", *text_encoders_of(spec.model), *_tokenizer_names(spec)]
    names += [name for name in (PART, "image_encoder", "feature_extractor") if getattr(opened.pipe, name, None)]
    parts = {name: getattr(opened.pipe, name) for name in names}
    known = replace(spec, text=replace(spec.text, embeddings=()), others={})  # the modules have them
    return OpenPipeline(_assemble(known, parts, _Running()), spec, {}, opened.files)


def _tokenizer_names(spec: PipelineSpec) -> list[str]:
    return [name.replace("text_encoder", "tokenizer") for name in text_encoders_of(spec.model)]


def _together(spec: PipelineSpec, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Several ControlNets as the one part that diffusers has for them; nothing where there is one, or none."""
    return {PART: together([parts[name] for name in (PART, *spec.others)])} if spec.others else {}


def _pipeline_class(spec: PipelineSpec, scheduler: Any) -> Any:
    """diffusers' own pipeline for a task. diffusers loads it now, and no other."""
    control = "ControlNet" * (PART in spec.model.parts) + "Union" * spec.is_union
    control += "Adapter" * (ADAPTER in spec.model.parts)
    task = "InstructPix2Pix" if spec.edit else "Inpaint" if spec.inpaint else "Img2Img" if spec.img2img else ""
    if is_lcm(spec, scheduler):
        return getattr(diffusers, f"LatentConsistencyModel{task}Pipeline")
    return getattr(diffusers, f"StableDiffusion{'XL' * spec.model.is_sdxl}{control}{task}Pipeline")


def engine_facts(entry: Entry) -> dict[str, str]:
    """Which engine it was."""
    return {"name": entry.name, "digest": entry.digest}
