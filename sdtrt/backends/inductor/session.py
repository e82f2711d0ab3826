"""Sessions on a compiled package: torch tensors in and out, weights that may change; on a GPU a CUDA graph a shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from sdtrt.backends.cuda_graphs import MAX_GRAPHS, CudaGraphs, InputBuffers, key_of, memory_errors
from sdtrt.backends.gradients import refuse_gradients
from sdtrt.backends.graph_pool import GraphPool, Outputs
from sdtrt.backends.inductor.package import Package
from sdtrt.backends.inductor.weights import REBUILD, Constant, Weights
from sdtrt.backends.scratch import Scratch
from sdtrt.backends.session import Session, check_tensors, shapes_of
from sdtrt.common.errors import EngineError
from sdtrt.models.tensor_names import other_names, own_tensors
from sdtrt.specs import Profile
from sdtrt.specs.contract import Contract
from sdtrt.specs.deep_features import taken_feature

Given = torch.nn.Module | Mapping[str, torch.Tensor]  # what weights may come as


@dataclass(frozen=True)
class _Run:
    """One shape's run over the input buffers (`cuda_graphs.Run`), which works in the pool."""

    package: Package
    inputs: Sequence[torch.Tensor]
    names: Sequence[str]
    pool: GraphPool

    def launch(self) -> Outputs:
        return self.pool.launch(self._compute)

    def reserve(self, example: Outputs) -> Outputs:
        return {name: torch.empty_like(tensor) for name, tensor in example.items()}

    def record(self, outputs: Outputs) -> Outputs:
        for name, tensor in self._compute().items():
            outputs[name].copy_(tensor)
        return outputs

    def _compute(self) -> Outputs:
        return _outputs(self.package, self.inputs, self.names)


class InductorSession(Session[torch.Tensor]):
    """Runs a package that PyTorch's Inductor has compiled.

    It owns its weights, which it has to be given once before it runs (`set_weights`), and may be given anew at any time
    between two runs. They take memory then, unless another session's are shared (`share_weights`). On a GPU the work is
    put on the caller's current stream, and nothing waits for the GPU; a shape's second run is captured into a CUDA
    graph (`CudaGraphs`), which goes on with new weights. Outputs are new tensors.

    Args:
        package: the file.
        constants: the tensors that it takes.
        fixed: those of them that are no weights of a model, by name.
        contract: its inputs and outputs.
        profile: the sizes that it takes.
        device: what it was compiled for: `cpu`, or a CUDA device.
        graphs: how many shapes to keep as CUDA graphs; 0 for none.
        scratch: shared with other sessions, which then never run at once with this one; None for one of its own.

    Raises:
        EngineError: where the package can't be loaded here, or takes other tensors than those listed.
    """

    def __init__(
        self,
        package: Path,
        constants: Sequence[Constant],
        fixed: Mapping[str, torch.Tensor],
        contract: Contract,
        profile: Profile,
        *,
        device: torch.device,
        graphs: int = MAX_GRAPHS,
        scratch: Scratch | None = None,
    ) -> None:
        self.contract, self._profile, self._file = contract, profile, package
        self._device = device = _with_index(device)
        self._has_weights = self._is_bound = False
        self._gpu = _Gpu(contract, profile, device, graphs, scratch or Scratch()) if device.type == "cuda" else None
        loaded = Package(package, device)
        try:
            _check_names(package, loaded, constants)
            self._weights = Weights(constants, fixed, device)
        except BaseException:
            loaded.close()
            raise
        self._package: Package | None = loaded

    @property
    def graph_count(self) -> int:
        """How many shapes are held as CUDA graphs."""
        return self._gpu.graphs.count if self._gpu else 0

    @property
    def weights_bytes(self) -> int:
        """What the weights take of the device's memory."""
        return self._weights.size_bytes

    def set_weights(self, weights: Given) -> None:
        """Take the weights of a model of the engine's architecture; the next run computes with them.

        Args:
            weights: the part of the model that the component is of, or its `state_dict()`, in the engine's precision,
                on any device. It is copied.

        Raises:
            EngineError: for tensors that are missing, unknown, or of another shape or dtype: none is changed then.
        """
        self._fill(weights.state_dict() if isinstance(weights, torch.nn.Module) else weights)

    def take_stored(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """As `set_weights`, of tensors in any floating dtype; says whether all numbers are finite in the engine's."""
        self._fill(tensors, casts=True)
        return self._weights.are_finite()

    def _fill(self, tensors: Mapping[str, torch.Tensor], *, casts: bool = False) -> None:
        self._bind()
        own, ignored = own_tensors(tensors), other_names(self.contract.component)
        if taken_feature(self.contract) is not None:
            ignored = ("",)  # of its component's layers it has some
        if self._gpu is None:
            self._weights.fill(own, ignored, casts=casts)
        else:
            with self._gpu.turn():
                self._weights.fill(own, ignored, casts=casts)
            torch.cuda.current_stream(self._device).synchronize()  # the caller's memory may change from here on
        self._has_weights = True

    def follow(self, tensors: Mapping[str, torch.Tensor], *, known: bool = False) -> None:
        """Take a live module's tensors as they are now. What is one of `weight_views` itself is not copied.

        Nothing waits for a GPU: changes that the caller's stream makes later are not in the next run.

        Args:
            tensors: all that the engine computes with, by their own names, of any floating dtype, on any device.
            known: these are only some of those that were given before, of the same shapes.

        Raises:
            EngineError: as of `set_weights`.
        """
        self._bind()
        if self._gpu is None:
            self._weights.follow(tensors, known=known)
        else:
            with self._gpu.turn():
                self._weights.follow(tensors, known=known)
        self._has_weights = True

    def share_weights(self, other: InductorSession) -> None:
        """Compute with the weights of another session of the same model, before the first run."""
        self._opened()
        with memory_errors(self._file):
            self._weights.share(other._weights)
        self._is_bound = False
        self._bind()

    def _bind(self) -> None:
        """Take memory for the weights, where none is shared, and give the package their addresses; once."""
        package = self._opened()
        if self._is_bound:
            return
        with memory_errors(self._file):
            self._weights.check()
        package.bind(self._weights.tensors)
        self._is_bound = True

    def weight_views(self) -> Mapping[str, torch.Tensor]:
        """By its own name, where each tensor of the model lies; the next run computes with what is written there."""
        self._bind()
        return self._weights.views()

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the engine; the outputs are new tensors on the session's device.

        Raises:
            EngineError: for tensors that don't fit the contract or the engine's sizes, a session that is closed or has
                no weights yet, or a run that fails.
            MemoryShortage: where the GPU has too little memory.
        """
        package = self._opened()
        if not self._has_weights:
            raise EngineError(f"{self._file} has no weights yet", hint="call set_weights first")
        refuse_gradients(self.contract.component, feeds)
        check_tensors(self.inputs, feeds)
        shapes = shapes_of(feeds)
        _check_sizes(self.contract, self._profile, shapes)
        names = [spec.name for spec in self.outputs]
        if self._gpu is None:
            inputs = [feeds[spec.name].to(self._device).contiguous() for spec in self.inputs]
            with torch.no_grad():
                return _outputs(package, inputs, names)
        with self._gpu.turn(), torch.no_grad(), memory_errors(shapes):
            key, buffers = key_of(shapes), self._gpu.buffers
            buffers.fill(feeds)
            views = buffers.views(key)
            run = _Run(package, [views[spec.name] for spec in self.inputs], names, self._gpu.pool)
            return self._gpu.graphs.run(key, usual=lambda: run, own=lambda: run)

    def close(self) -> None:
        """Free the package, graphs and weights, once the GPU has finished with them."""
        if self._package is None:
            return
        if self._gpu is not None:
            self._gpu.close()
        self._package.close()
        self._package = None
        self._weights = Weights((), {}, self._device)
        self.let_go()

    def _opened(self) -> Package:
        """The package; `EngineError` where the session is closed."""
        if self._package is None:
            raise EngineError("the session is closed", hint="open a new one")
        return self._package


class _Gpu:
    """What a session on a GPU has beside its package: buffers, graphs, and its turn among others."""

    def __init__(
        self, contract: Contract, profile: Profile, device: torch.device, graphs: int, scratch: Scratch
    ) -> None:
        self._device, self._scratch = device, scratch
        largest = contract.input_shapes(profile.maximum)
        elements = {name: torch.Size(shape).numel() for name, shape in largest.items()}
        with torch.cuda.device(device), memory_errors("its inputs"), torch.inference_mode(False):
            self._block = scratch.block(0, device)  # of no size: for the turns alone
            self.buffers = InputBuffers(contract.inputs, elements, device)
            self.pool = scratch.pool
            self.graphs = CudaGraphs(graphs, device, self.pool)
        self.pool.join(self)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within, work is put on the GPU in order with all that sessions of the scratch have put there."""
        with torch.cuda.device(self._device), self._scratch.turn(torch.cuda.current_stream()):
            yield

    def close(self) -> None:
        """Free graphs and buffers, once the GPU has finished with them."""
        self._scratch.finish()
        self.graphs.clear()
        self.buffers.clear()
        self.pool.leave(self)


def _outputs(package: Package, inputs: Sequence[torch.Tensor], names: Sequence[str]) -> Outputs:
    """Run a package; its outputs by name."""
    return {name: tensor.contiguous() for name, tensor in zip(names, package.run(inputs), strict=True)}


def _with_index(device: torch.device) -> torch.device:
    """A device that says which GPU it is. Raises `EngineError` where PyTorch can't use one."""
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise EngineError("this PyTorch can't use the GPU", hint="install a CUDA build of PyTorch: https://pytorch.org")
    return torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())


def _check_names(file: Path, package: Package, constants: Sequence[Constant]) -> None:
    """Raise `EngineError` where a package takes other tensors than its list says."""
    names = {one.name for one in constants}
    if odd := names ^ set(package.constants):
        raise EngineError(f"{file} takes other weights than its list says: {', '.join(sorted(odd)[:3])}", hint=REBUILD)


def _check_sizes(contract: Contract, profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `EngineError` for inputs of a size that the engine was not built for: nothing else would notice."""
    for name, (low, _, high) in contract.profile_shapes(profile).items():
        if any(not least <= size <= most for least, size, most in zip(low, shapes[name], high, strict=True)):
            takes = list(low) if low == high else f"{list(low)} to {list(high)}"
            raise EngineError(
                f"the engine takes {name} of the shape {takes}, got {list(shapes[name])}",
                hint="build one that does: sdtrt build --backend inductor --batch ROWS --height PIXELS --width PIXELS",
            )
