"""What stands in a live module's place: one method of it, which runs engines; the module and its weights stay.

Knows one module, one method, and the engines that run it. `accelerate` says which modules of a pipeline get one.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary, finalize, ref

import torch

from sdtrt.backends import registry
from sdtrt.backends.open import compute_with, open_session
from sdtrt.backends.scratch import Scratch
from sdtrt.backends.session import Session
from sdtrt.backends.unchanged import same_memory
from sdtrt.common.console import Console
from sdtrt.common.errors import EngineError, UnservedCallError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.engines.find import slack
from sdtrt.live.bound import Bound, Followed
from sdtrt.live.left import Left
from sdtrt.live.live_text import LiveText, encodes, least_rows
from sdtrt.live.steps import Steps
from sdtrt.live.token_table import TokenTable
from sdtrt.models.components import STEPPING, TEXT_ENCODERS, VAE_HALVES, part_of, sizes_of
from sdtrt.models.live import LiveModel, component_tensors, controlnets_of
from sdtrt.models.resolve import Model
from sdtrt.pipeline.opening.engines import ensure_engines
from sdtrt.pipeline.opening.request import EngineRequest
from sdtrt.pipeline.parts import tiles
from sdtrt.pipeline.parts.control_forward import ControlNetForward
from sdtrt.pipeline.parts.deep_cache import CachedForward, DeepCache
from sdtrt.pipeline.parts.facades import VaeFacade
from sdtrt.pipeline.parts.forwards import ADAPTER, EncodedText, UNetForward
from sdtrt.pipeline.parts.free_u import FreeU
from sdtrt.pipeline.parts.guided_rows import GuidedRows
from sdtrt.pipeline.parts.image_prompts import ImagePrompts
from sdtrt.pipeline.parts.parked import Parked
from sdtrt.pipeline.parts.watch import WAY_OUT, WeightsWatch, moved_by, refuse_changes, refuse_training
from sdtrt.specs import (
    COMPONENTS,
    DEFAULT_TOKENS,
    SIZE_MULTIPLE,
    BackendName,
    Component,
    DeepCaching,
    Group,
    ModelSpec,
    Precision,
    Profile,
    Savings,
    Sizes,
)

OnMiss = Literal["build", "torch", "error"]
ON_MISS: tuple[str, ...] = ("build", "torch", "error")
METHODS: dict[Component, str] = {
    "unet": "forward",
    "controlnet": "forward",
    "text_encoder": "forward",
    "text_encoder_2": "forward",
    "vae_decoder": "decode",
    "vae_encoder": "encode",
}
FIRST = ("sample", "input_ids", "z", "x")  # the names that the methods' first arguments have
RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")
AFTER_USUAL, AFTER_RESIDUALS = 8, 10  # their places among a UNet's arguments
_OTHER_TOKENS = "its token table is another one (textual inversion)"
IN_PYTORCH = "call sdtrt.accelerate with components= without it, or sdtrt.restore(pipe),"

_SWAPPED: WeakKeyDictionary[torch.nn.Module, dict[Component, Swapped]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Settings:
    """What the parts of an accelerated pipeline have in common.

    Args:
        spec: of the model: its name.
        stored: the model in files that the pipeline was loaded from, where it lies on this machine.
        modules: the pipeline's, which are not kept alive.
        precision: that is asked for; a component may have another (`Backend.precision_of`).
        on_miss: what happens at a call that no engine has the size of.
        lock: the parts' engines share memory, and run one at a time.
        savings: what of a run's work is left out.
        deep_groups: of the UNet's engine, where a deep feature is kept.
    """

    spec: ModelSpec
    stored: Model | None
    modules: Mapping[str, ref[torch.nn.Module]]
    backend: BackendName
    precision: Precision
    directory: EngineDirectory
    device: torch.device
    on_miss: OnMiss
    console: Console
    lock: threading.RLock
    savings: Savings = field(default_factory=Savings)
    deep_groups: tuple[Group, ...] = ()

    @property
    def model(self) -> LiveModel:
        """The model as the pipeline has it now."""
        modules = {name: module for name, one in self.modules.items() if (module := one()) is not None}
        return LiveModel(self.spec, modules, self.stored)

    def of(self, name: str) -> Settings:
        """Those of one part: of a further ControlNet (`controlnet_2`) they have it in the place of the first one."""
        if name in COMPONENTS:
            return self
        return replace(self, modules={**self.modules, "controlnet": self.modules[name]})

    def request(self, sizes: Sizes, component: Component, groups: tuple[Group, ...]) -> EngineRequest:
        """The engine for a call of one component; `sizes` are that call's."""
        images = sizes.batch
        return EngineRequest(self.model, self.backend, self.precision, sizes, (component,), images, self.device, groups)


@dataclass(frozen=True)
class Opened:
    """An engine that is open, and what it does as the module's method; `shallow` runs the steps beside a UNet's own."""

    entry: Entry
    session: Session[torch.Tensor]
    call: Callable[..., Any]
    shallow: Session[torch.Tensor] | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The optional groups of inputs that it has."""
        return self.entry.engine_key.export.groups


class Swapped:
    """A method of a live module that engines run, as an attribute of that module.

    A deep copy or a pickle of the module has the module's own method in its place; a shallow copy, which shares the
    weights, shares the engines. One thread runs at a time, others wait.

    Args:
        module: a part of a pipeline, which is not kept alive.
        component: what of it engines run.
        settings: of the pipeline.
        digest: of the weights that the engines have.
    """

    def __init__(self, module: torch.nn.Module, component: Component, settings: Settings, digest: str) -> None:
        self.component, self.settings = component, settings
        self.method = METHODS[component]
        self.engines: list[Opened] = []
        finalize(self, _close, self.engines).atexit = False
        self.parked = Parked(self._wanted)
        self.is_open = True
        self.bound = None if registry.get(settings.backend).weights_inside else Bound(component)
        self.watch = _watch_over(module, component, self.bound, settings, digest)
        self._module = ref(module)
        self.table = TokenTable(module) if component in TEXT_ENCODERS else None
        self.prompts = ImagePrompts(self._module)
        self.prompts.look()
        self.free_u = FreeU(self._module)
        self._said: set[str] = set()
        self.scratch = Scratch()
        self._steps = Steps()
        self.rows = GuidedRows()
        self.left = Left(self._may_leave)
        self.cache = _deep_cache(ref(self), self.bound, settings.console)
        own = getattr(type(module), self.method)
        functools.update_wrapper(self, own)
        parameters = list(inspect.signature(own).parameters.values())[1:]
        self.__signature__ = inspect.signature(own).replace(parameters=parameters)

    @property
    def module(self) -> torch.nn.Module:
        """The module. Raises `EngineError` where it is gone, and a shallow copy of it calls."""
        module = self._module()
        if module is None:
            raise EngineError(f"the {self.component} that was accelerated is gone", hint=WAY_OUT)
        return module

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # where the module is compiled: an engine is already
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the engine that has the call's size; the module's own method, where the engines are closed.

        Raises:
            EngineError: where the weights were changed, no engine has the size, or an argument that it needs.
        """
        with self.settings.lock:
            if not self.is_open:
                return self.original(*args, **kwargs)
            first = args[0] if args else next(kwargs[name] for name in FIRST if name in kwargs)
            steps = self.component in STEPPING
            states = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None) if steps else None
            if self.component in VAE_HALVES and tiles.cuts(self.module, first.shape[0]):
                return tiles.in_tiles(self.module, self.component, functools.partial(_tile, self), *args, **kwargs)
            result = self._run(_sizes_of_call(self.component, first, states), states, args, kwargs)
        if isinstance(result, EncodedText):
            return LiveText(result, functools.partial(self._rest_of_text, *args, **kwargs))
        return result

    def _run(self, sizes: Sizes, states: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let an engine compute, and look at the weights meanwhile; what it gives leaves this only if they are its own.

        A GPU computes on when its work is launched: what may take time comes after that.
        """
        is_first, looks = self._steps.is_first(states), self._steps.is_due(states)
        if self.component in STEPPING:
            sizes = replace(sizes, batch=self.rows.look(self.settings.savings.guidance, args, kwargs))
        self.find_left(looks=looks)
        if is_first and states is not None and not self.left:
            self.watch.settle(self.module)  # what came of the picture before, where nothing decoded that
        opened, result, cut, named = None, None, args, kwargs
        groups: tuple[Group, ...] = ()
        with self.left.where_refused(UnservedCallError):
            groups, cut, named = _taken(self, args, kwargs)
        if not self.left:
            opened = self._opened_for(sizes, groups)
        if opened is not None:
            with self.left.where_refused(UnservedCallError):
                result = opened.call(*cut, **named)
            if looks:
                self._look()
        if opened is None or self.left:
            result = self.rows.run(self.in_pytorch, *args, **kwargs)
        if looks:
            self._steps.seen(states)
        self._read(begins=is_first and opened is not None)
        return result

    def find_left(self, *, looks: bool) -> None:
        """Find why no engine may run the component, if so. Raise that, but for `on_miss="torch"`.

        Args:
            looks: look at the whole module; else only at what takes no time.
        """
        with self.left.where_refused():
            _check_place(self, self.module)
            refuse_training(self.component, self.module)
            _take_image_prompts(self)
            if not self.has_its_tokens():
                self.watch.stop()
                self.left.reason = _OTHER_TOKENS
                self._say(f"{self.component}: PyTorch runs it, as {_OTHER_TOKENS}")
            elif looks:
                refuse_changes(self.module, self.component, merges=self.bound is not None)
                if self.settings.on_miss == "torch":
                    self.watch.look(self.module)
                self.left.reason = ""

    def _look(self) -> None:
        """Look whether the weights are the engine's."""
        with self.left.where_refused():
            self.watch.look(self.module)

    def _opened_for(self, sizes: Sizes, groups: tuple[Group, ...]) -> Opened | None:
        """The engine for a call; None where PyTorch is to run it."""
        opened = self.fitting(sizes, groups)
        if opened is None:
            self._look()
            opened = None if self.left else self._on_miss(sizes, groups)
        return opened

    def has_its_tokens(self) -> bool:
        """Whether the module's token table is the engines'; where another layer has the same one, that is taken."""
        if self.table is None:
            return True
        if not self.table.fits(self.module):
            return False
        if self.table.is_replaced(self.module):
            self.watch.retake(self.module)
            if self.bound is not None:
                self.bound.look_anew()
            self.table.take(self.module)
        return True

    def _read(self, *, begins: bool) -> None:
        """Have the weights read while others work, once a picture; wait for all parts' where a picture is decoded."""
        if self.left:
            self.watch.stop()  # the module was changed since: what is read by now are not an engine's weights
        elif begins:
            self.watch.begin(self.module)
        else:
            self.watch.poll(self.module)
        if self.component == "vae_decoder":
            for one in self._siblings():
                one.watch.settle(one.module)
                one._steps.expect_another()  # what comes next may be one of the same conditioning

    def _siblings(self) -> list[Swapped]:
        """All that engines run of the pipeline's modules."""
        modules = (module for one in self.settings.modules.values() if (module := one()) is not None)
        return [one for module in modules for one in _SWAPPED.get(module, {}).values()]

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own method."""
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)

    def in_pytorch(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own method, for which its weights come back to the GPU and stay there."""
        self.bring_back()
        return self.original(*args, **kwargs)

    def _rest_of_text(self, *args: Any, **kwargs: Any) -> Any:
        with self.settings.lock:
            self._say(f"{self.component}: PyTorch computes the states of other layers (clip_skip)")
            return self.in_pytorch(*args, **kwargs)

    def _on_miss(self, sizes: Sizes, groups: tuple[Group, ...]) -> Opened | None:
        """The engine for a call of a size, or with inputs, that no open one has, by `on_miss`; None for PyTorch."""
        name = " with inputs for ".join((self.component, *groups))
        words = f"no engine of the {name} is open for {self._describe(sizes)}"
        if self.settings.on_miss == "torch":
            self._say(f"{words}: PyTorch runs it")
            return None
        if self.settings.on_miss == "error":
            raise EngineError(
                words,
                hint="sdtrt.accelerate(pipe, height=..., width=..., batch_size=...) opens one for another size;"
                ' on_miss="build" builds it at the call, on_miss="torch" runs PyTorch',
            )
        for rows in self.rows.counts or (sizes.batch,):  # with guidance in a part of a run it needs two
            if self.fitting(one := replace(sizes, batch=rows), groups) is None:
                entry, shallow = _ensure(self, one, groups)
                self.open(entry, shallow=shallow)
        return self.fitting(sizes, groups)

    def fitting(self, sizes: Sizes, groups: tuple[Group, ...] = ()) -> Opened | None:
        """The open engine that fits a size of the component's own call best, with inputs for all that it gives."""
        own = sizes_of(self.component, sizes, sizes.batch)
        fits = []
        for one in self.engines:
            if not set(groups) <= set(one.groups):
                continue
            profiles = one.entry.engine_key.profiles
            rows = least_rows(profiles, own.batch) if self.component in TEXT_ENCODERS else own.batch
            if (loose := slack(profiles, replace(own, batch=rows))) is not None:
                fits.append((rows, len(one.groups), loose, one))
        return min(fits, key=lambda fit: fit[:3])[3] if fits else None

    def _describe(self, sizes: Sizes) -> str:
        return self.engines[0].session.contract.describe(sizes) if self.engines else str(sizes)

    def _may_leave(self, error: EngineError) -> bool:
        """Whether PyTorch may run what engines refuse, which it says."""
        if self.settings.on_miss != "torch":
            return False
        self._say(f"{self.component}: PyTorch runs it: {error.message}")
        return True

    def _say(self, text: str) -> None:
        if text not in self._said:
            self.settings.console.note(text)
        self._said.add(text)

    def open(self, entry: Entry, scratch: Scratch | None = None, shallow: Entry | None = None) -> None:
        """Open an engine, unless it is open, on the memory of the last one. Raises as of `open_session`.

        Args:
            scratch: what the pipeline's engines share from now on.
            shallow: of the UNet's steps that go on from the deep feature that the engine gives.
        """
        _take_image_prompts(self)
        self.scratch = scratch or self.scratch
        if any(one.entry.path == entry.path for one in self.engines):
            return
        session = open_session(entry, self.settings.device, self.scratch)
        self.engines.append(Opened(entry, session, _call_of(self, session, entry.engine_key.profiles)))
        if shallow is not None:
            self.engines[-1] = _with_shallow(self, self.engines[-1], shallow)
        if self.bound is not None:
            self.engines[-1] = _followed(self.bound, self.engines[-1], self._module)

    # --- the weights' place ---------------------------------------------------------------------------------------

    def park(self) -> bool:
        """Let the weights leave the GPU, where an engine holds them; whether any did."""
        if self.bound is not None:
            return False
        self.watch.stop()
        found = self.parked.park(self.module, component_tensors(self.module, self.component).items())
        if found:
            self.watch.moved(self.module)
        return found

    def bring_back(self) -> None:
        """Bring the weights back to where the module is."""
        module = self._module()
        if self.parked and module is not None:
            was_read = self.watch.stop()
            self.parked.bring_back(module)
            self.watch.moved(module)
            if was_read:
                self.watch.begin(module)

    def _wanted(self) -> None:
        """A layer is called by itself, while the module's weights are away."""
        with self.settings.lock:
            self._say(f"{self.component}: a layer is called by itself: PyTorch runs it, and the weights are back")
            self.bring_back()

    # --- coming and going ------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Take the place of the module's method."""
        object.__setattr__(self.module, self.method, self)
        _SWAPPED.setdefault(self.module, {})[self.component] = self

    def close(self) -> None:
        """Give the module back its method and its weights, and close the engines. May be called twice."""
        with self.settings.lock:
            module = self._module()
            if module is not None:
                if module.__dict__.get(self.method) is self:
                    del module.__dict__[self.method]
                if (there := _SWAPPED.get(module, {})).get(self.component) is self:
                    del there[self.component]
            self.watch.stop()
            self.bring_back()
            self.is_open = False
            if self.bound is not None:
                self.bound.release(module)
            _close(self.engines)

    def __copy__(self) -> Swapped:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The own method of a module's copy, which is under way; alone, this shares its engines."""
        made = memo.get(id(self._module()))
        return self if made is None else types.MethodType(getattr(type(made), self.method), made)

    def __reduce__(self) -> Any:
        return getattr, (self.module, self.method)  # what is read has the class's own by then


def _deep_cache(swapped: ref[Swapped], bound: Bound | None, console: Console) -> DeepCache:
    """What decides which of a UNet's programs runs a step, as its settings are now; it keeps none of them alive."""

    def caching() -> DeepCaching:
        found = swapped()
        return DeepCaching() if found is None else found.settings.savings.caching

    return DeepCache(caching, console, lambda: 0 if bound is None else bound.changes)


def _with_shallow(swapped: Swapped, opened: Opened, entry: Entry) -> Opened:
    """A UNet's engine with that of its shallow steps beside it, between which each step chooses."""
    second = open_session(entry, swapped.settings.device, swapped.scratch)
    forward = CachedForward(opened.session, second, swapped.settings.device, swapped.cache, IN_PYTORCH)
    return replace(opened, call=functools.partial(swapped.rows.run, forward), shallow=second)


def _followed(bound: Bound, opened: Opened, module: ref[torch.nn.Module]) -> Opened:
    """An engine that holds no weights, computing with the module's; one of shallow steps reads them where it does."""
    session: Any = opened.session
    found = replace(opened, call=bound.following(session, module, opened.call))
    if (second := opened.shallow) is not None:
        compute_with(second, session)
        own, views = cast(Any, second).weight_views(), session.weight_views()
        assert all(same_memory(one, views[name]) for name, one in own.items()), "weights would not be followed"
    return found


def swapped_of(pipe: Any) -> dict[str, Swapped]:
    """What engines run of a pipeline's modules, whichever pipeline they were accelerated through: by their components,
    further ControlNets as `controlnet_2`, ….
    """
    found: dict[str, Swapped] = {}
    for component in METHODS:
        part = {component: getattr(pipe, part_of(component), None)}
        for name, module in (controlnets_of(pipe) if component == "controlnet" else part).items():
            module = getattr(module, "_orig_mod", module)  # that of torch.compile
            if isinstance(module, torch.nn.Module) and component in _SWAPPED.get(module, {}):
                found[name] = _SWAPPED[module][component]
    return found


def _take_image_prompts(swapped: Swapped) -> None:
    """Go on with the IP-Adapters that the UNet has now: its other engines are closed, but for those that serve.

    Engines without weights serve any adapters of the same number. Others are opened, or built, at the call.
    """
    before = swapped.prompts.count
    if swapped.component != "unet" or not swapped.prompts.look():
        return
    if swapped.bound is not None and before == swapped.prompts.count:
        swapped.bound.look_anew()
    else:
        swapped.bring_back()
        if swapped.bound is not None:
            swapped.bound.release(swapped.module)
        _close(swapped.engines)
    swapped.watch.stop()
    swapped.watch = _watch_over(swapped.module, swapped.component, swapped.bound, swapped.settings)


def _ensure(swapped: Swapped, sizes: Sizes, groups: tuple[Group, ...]) -> tuple[Entry, Entry | None]:
    """Find or build the engine of a size, and of groups of inputs; with it that of its shallow steps, if any."""
    settings, component = swapped.settings, swapped.component
    with torch.inference_mode(False), torch.no_grad():
        request = settings.request(sizes, component, groups)
        registry.get(settings.backend).check_groups(groups)
        entry = ensure_engines(request, settings.directory, settings.console)[component]
        if (shallow := request.shallow) is None:
            return entry, None
        return entry, ensure_engines(shallow, settings.directory, settings.console)[component]


def _tile(swapped: Swapped, tile: torch.Tensor) -> torch.Tensor:
    """One tile, by the engine of its size; PyTorch has those at the edges that none fits: they are of any size."""
    sizes = _sizes_of_call(swapped.component, tile, None)
    chosen, edge = swapped.settings.on_miss, tiles.is_edge(swapped.module, swapped.component, sizes)
    if swapped.fitting(sizes) is None and (chosen == "torch" or (chosen == "build" and edge)):
        swapped._say(f"{swapped.component}: PyTorch runs tiles of {sizes.width}x{sizes.height} pixels")
        swapped.bring_back()
        return tiles.in_pytorch(swapped.module, swapped.component, tile)
    (made,) = swapped._run(sizes, None, (tile,), {"return_dict": False})
    moments: torch.Tensor = getattr(made, "parameters", made)
    return moments


def _watch_over(
    module: torch.nn.Module, component: Component, bound: Bound | None, settings: Settings, digest: str | None = None
) -> WeightsWatch | Followed:
    """A watch over a module; `digest` is of the weights that its engines have, None for those that it has now."""
    if bound is not None:
        return Followed(module, component, bound)
    model = settings.model
    precision = registry.get(settings.backend).precision_of(model, component, settings.precision)
    return WeightsWatch(module, component, precision, digest or model.digest(component, precision))


def _call_of(swapped: Swapped, session: Session[torch.Tensor], profiles: Sequence[Profile]) -> Callable[..., Any]:
    """A module's method, by a session."""
    component, device, module = swapped.component, swapped.settings.device, swapped.module
    if component == "unet":
        return functools.partial(swapped.rows.run, UNetForward(session, session.contract, device, IN_PYTORCH))
    if component == "controlnet":
        return functools.partial(swapped.rows.run, ControlNetForward(session, device, IN_PYTORCH))
    if component in TEXT_ENCODERS:
        return encodes(session, device, ref(module), profiles, IN_PYTORCH)
    config: Any = module.config
    if component == "vae_decoder":
        return VaeFacade(config, device, decoder=session).decode
    facade = VaeFacade(config, device, encoder=session)
    facade.encode_one_by_one()
    return facade.encode


def _check_place(swapped: Swapped, module: torch.nn.Module) -> None:
    """Raise `EngineError` where a module is no longer where its engine is."""
    component, device = swapped.component, next(module.parameters()).device
    if module.__dict__.get(swapped.method) is not swapped or moved_by(module) is not None:
        raise EngineError(
            f"the {component} got hooks (offloading?) after sdtrt.accelerate: engines stay where they are",
            hint="pipe.remove_all_hooks(), then sdtrt.restore(pipe); offloading works in PyTorch alone",
        )
    if device.type != swapped.settings.device.type:
        raise EngineError(
            f"the {component} is on {device.type} by now, its engine on {swapped.settings.device.type}",
            hint=f"pipe.to({str(swapped.settings.device)!r}) takes it back; {WAY_OUT}",
        )


def _sizes_of_call(component: Component, first: torch.Tensor, states: torch.Tensor | None) -> Sizes:
    """The size of a call: of the UNet's for that, else of images or latents."""
    if component in TEXT_ENCODERS:
        return Sizes(first.shape[0], SIZE_MULTIPLE, SIZE_MULTIPLE)
    factor = 1 if component == "vae_encoder" else SIZE_MULTIPLE
    height, width = (side * factor for side in first.shape[-2:])
    if component in STEPPING:
        tokens = DEFAULT_TOKENS if states is None else states.shape[1]
        return Sizes(first.shape[0], height, width, tokens)
    return Sizes(1 if component == "vae_encoder" else first.shape[0], height, width)


def _taken(
    swapped: Swapped, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Group, ...], tuple[Any, ...], dict[str, Any]]:
    """The optional groups of inputs that a call needs, and its arguments as an engine with them takes them."""
    pictures, args, kwargs = swapped.prompts.take(args, kwargs)
    if swapped.component != "unet":
        return pictures, args, kwargs
    freed, args, kwargs = swapped.free_u.take(args, kwargs)
    own = (*_groups_of_call(args, kwargs), *freed, *pictures, *swapped.settings.deep_groups)
    return own, args, kwargs


def _groups_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Group, ...]:
    """The optional groups of inputs that a UNet's call gives: diffusers passes them by these names."""
    given = [kwargs.get(name) for name in RESIDUALS] + list(args[AFTER_USUAL:AFTER_RESIDUALS])
    groups: tuple[Group, ...] = ("controlnet",) if sum(one is not None for one in given) == len(RESIDUALS) else ()
    adapter = args[AFTER_RESIDUALS] if len(args) > AFTER_RESIDUALS else kwargs.get(ADAPTER)
    return (*groups, "t2i_adapter") if adapter is not None else groups


def _close(engines: list[Opened]) -> None:
    """Close all, and empty the list."""
    for one in engines:
        one.session.close()
        if one.shallow is not None:
            one.shallow.close()
    engines.clear()
