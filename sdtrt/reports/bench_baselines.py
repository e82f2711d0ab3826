"""What sdtrt is compared with, inside the same diffusers pipelines: PyTorch in several forms, ONNX Runtime on the GPU.

What they do to a UNet is done on its one instance; diffusers itself stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdtrt.backends.gradients import refuse_gradients
from sdtrt.backends.onnxruntime.build import EXTERNAL_BYTES
from sdtrt.backends.onnxruntime.fused_attention import fuse
from sdtrt.backends.session import Session, check_feeds
from sdtrt.common.console import Console
from sdtrt.common.errors import EngineError, first_line
from sdtrt.common.files import temporary_folder
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.exports.component import FILE_NAME, export_component
from sdtrt.exports.onnx_run import LOG_SEVERITY
from sdtrt.models.components import contract_of
from sdtrt.pipeline.opening.open import OpenPipeline, open_pipeline
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.pipeline.parts.facades import UNetFacade
from sdtrt.reports import bench_compile
from sdtrt.reports.bench_compile import FORMS, compile_pipeline
from sdtrt.reports.meters import tf32
from sdtrt.specs import BaselineName, ExportSpec, Precision
from sdtrt.specs.contract import DTYPES, Contract

WARMUPS_BEFORE_CAPTURE = 3  # PyTorch's own recipe: libraries choose algorithms and allocate workspaces at first
CUDA_PROVIDER = "CUDAExecutionProvider"
CUDA_SETTINGS = {"prefer_nhwc": "1"}  # convolutions channels last, as cuDNN's kernels for fp16 are
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Baseline:
    """One way to run the model without sdtrt's engines.

    Args:
        variant: what sets it apart from others of its backend and precision.
        needs_gpu: why a CPU has no use for it, or no way to run it; None where it runs on both.
        tf32: let PyTorch round fp32 matrix products to TF32.
    """

    name: BaselineName
    backend: str
    precision: Precision
    variant: str | None
    needs_gpu: str | None = None
    tf32: bool = False


_FP16 = "PyTorch computes fp16 on a CPU more slowly than fp32"
BASELINES: dict[BaselineName, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("torch-fp32", "torch", "fp32", "TF32 off"),
        Baseline("torch-tf32", "torch", "fp32", "TF32 on", "a CPU has no TF32", tf32=True),
        Baseline("torch-fp16", "torch", "fp16", None, _FP16),
        Baseline("torch-graph", "torch", "fp16", "channels-last, CUDA graph", "CUDA graphs need a GPU"),
        Baseline("torch-compile", "torch", "fp16", "torch.compile of all parts, fused QKV, channels last, one graph"),
        Baseline("torch-compile-max", "torch", "fp16", "the same, max-autotune", "its kernels are the GPU's"),
        Baseline("torch-compile-regional", "torch", "fp16", "the same, of repeated blocks"),
        Baseline("torch-compile-unet", "torch", "fp16", "torch.compile of the UNet, reduce-overhead"),
        Baseline("torch-tensorrt", "torch", "fp16", "Torch-TensorRT of the UNet", "TensorRT needs a GPU"),
        Baseline("onnxruntime-cuda", "onnxruntime", "fp16", "CUDA, attentions fused", "its CUDA provider needs a GPU"),
    )
}


@contextmanager
def open_baseline(
    baseline: Baseline, spec: PipelineSpec, directory: EngineDirectory, console: Console
) -> Iterator[OpenPipeline]:
    """Open a baseline's pipeline; `spec` is of the torch backend, in the baseline's precision.

    Raises:
        EngineError: where this machine can't run it.
        Exception: whatever torch.compile and ONNX Runtime raise.
    """
    if baseline.name == "onnxruntime-cuda":
        with _open_onnxruntime(spec, directory, console) as opened:
            yield opened
        return
    with tf32(baseline.tf32), open_pipeline(spec, directory, console) as opened:
        if baseline.name in FORMS:
            compile_pipeline(opened.pipe, baseline.name, spec.device, GraphedForward)
        yield opened


def code_of(baseline: Baseline, precision: Precision, device: str) -> str:
    """The Python that makes a baseline of a diffusers pipeline: its own functions, as they run here.

    Args:
        precision: that it computes in here: on a CPU all do in fp32.
        device: its type.
    """
    dtype = DTYPES[precision]
    lines = [f'pipe = DiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.{dtype}).to("{device}")']
    if device == "cuda":
        lines.append(f"torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = {baseline.tf32}")
    parts = [bench_compile.code_of(baseline.name)]
    if baseline.name == "onnxruntime-cuda":
        parts = [inspect.getsource(_open_onnxruntime)]
    if device == "cuda" and "graphed(" in parts[0]:
        parts += [inspect.getsource(GraphedForward), inspect.getsource(capture_graph)]
    if baseline.name in FORMS:
        graphed = "GraphedForward" if device == "cuda" else "lambda forward: forward"
        parts.append(f"{FORMS[baseline.name].__name__}(pipe, {graphed})")
    return "\n\n\n".join(["\n".join(lines), *(part.rstrip() for part in parts if part)]) + "\n"


class GraphedForward:
    """A UNet's `forward`, captured into a CUDA graph for the shapes of its calls, the last ones only.

    Inputs are copied into buffers of its own and outputs cloned, so that a scheduler may keep them.

    Args:
        forward: the UNet's own.
        capture: makes a replay of a call without arguments; by default PyTorch's CUDA graphs.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        capture: Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]] | None = None,
    ) -> None:
        self._forward, self._capture = forward, capture or capture_graph
        self._shapes: Shapes | None = None
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._replay: Callable[[], None] | None = None
        self._output = torch.empty(0)

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """What `UNet2DConditionModel.forward` takes from a text-to-image pipeline, with and without ControlNets."""
        used = [name for name, value in others.items() if value is not None and value != {}]
        assert not used, f"no graph is captured with {used}"
        assert not return_dict, "diffusers' pipelines ask for a tuple"
        moment = torch.as_tensor(timestep, device=sample.device).float().reshape(-1).expand(sample.shape[0])
        names = tuple(added_cond_kwargs or ())
        middle = () if mid_block_additional_residual is None else (mid_block_additional_residual,)
        residuals = (*(down_block_additional_residuals or ()), *middle)
        given = (sample, moment, encoder_hidden_states, *(added_cond_kwargs or {}).values(), *residuals)
        shapes = tuple(tuple(tensor.shape) for tensor in given)
        if self._replay is None or shapes != self._shapes:
            self._record(given, names)
            self._shapes = shapes
        for buffer, tensor in zip(self._inputs, given, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        assert self._replay is not None
        self._replay()
        return (self._output.clone(),)

    def _record(self, given: tuple[torch.Tensor, ...], names: tuple[str, ...]) -> None:
        """Capture a call on buffers like these: `names` are of the added conditioning; residuals come last."""
        self._replay = None  # a graph that leaves gives its memory back before the next one takes its own
        self._inputs = tuple(_buffer(tensor) for tensor in given)
        sample, moment, states, *others = self._inputs
        added, (*down, middle) = others[: len(names)], others[len(names) :] or (None,)
        conditions: dict[str, Any] = {"added_cond_kwargs": dict(zip(names, added, strict=True)) or None}
        if middle is not None:
            conditions |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

        def call() -> torch.Tensor:
            output: torch.Tensor = self._forward(sample, moment, states, **conditions, return_dict=False)[0]
            return output

        self._replay, self._output = self._capture(call)


def _buffer(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's own copy; images in channels-last order, as the UNet's weights are."""
    order = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return tensor.detach().clone(memory_format=order)


def capture_graph(call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Capture a call into a CUDA graph: its replay, and the tensor that each replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS_BEFORE_CAPTURE):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile (the one that watches its memory does).
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = call()
    return graph.replay, output


@contextmanager
def _open_onnxruntime(spec: PipelineSpec, directory: EngineDirectory, console: Console) -> Iterator[OpenPipeline]:
    """The pipeline with its UNet in ONNX Runtime's CUDA provider, from the same ONNX file as the engines.

    Attentions are that library's operator, as in its engines for a CPU. Its optimiser for Stable Diffusion
    (`onnxruntime.transformers`) fuses more, but only in graphs as older PyTorch wrote them.
    """
    groups = spec.engines.groups_of("unet")
    contract = contract_of(spec.model, "unet", spec.precision, groups)
    require_provider(CUDA_PROVIDER)
    export = ExportSpec(spec.model.spec, precision=spec.precision, groups=groups)
    entry = export_component(spec.model, export, directory, console)
    with open_pipeline(spec, directory, console) as opened:
        opened.pipe.unet.to("meta")  # PyTorch's copy of the weights is no part of what is measured
        with temporary_folder() as place:
            session = BoundSession(_fused(entry, place, console), contract, spec.device)
        with session:
            opened.pipe.unet = UNetFacade(session, contract, spec.model.config("unet"), spec.device)
            yield opened


def _fused(export: Entry, folder: Path, console: Console) -> Path:
    """A file in a folder with an export whose attentions are fused; the export's own where none is, which is said."""
    try:
        model, count = fuse(export.verified(FILE_NAME), folder, EXTERNAL_BYTES, console)
    except OSError as error:
        raise EngineError(
            f"can't write a copy of the UNet to {folder}: {error.strerror}", hint="free some space there, or set TMPDIR"
        ) from error
    if count == 0:
        console.warn("ONNX Runtime's baseline has its attentions as they were exported: none was recognised")
    return model


def has_provider(provider: str) -> bool:
    """Whether the installed ONNX Runtime has an execution provider."""
    import onnxruntime

    return provider in onnxruntime.get_available_providers()


def require_provider(provider: str) -> None:
    """Raise `EngineError` unless the installed ONNX Runtime has an execution provider."""
    if not has_provider(provider):
        raise EngineError(
            f"the installed ONNX Runtime has no {provider}", hint="pip install onnxruntime-gpu in place of onnxruntime"
        )


class BoundSession(Session[torch.Tensor]):
    """Runs an ONNX model on torch tensors where they lie (ONNX Runtime's IO binding): no copies through the host.

    Args:
        model: the ONNX file; it is optimised when it is loaded.
        contract: its inputs and outputs.
        device: `cuda` (or `cpu`, which the tests use).

    Raises:
        EngineError: where ONNX Runtime can't load the file, or can't use the GPU.
    """

    def __init__(self, model: Path, contract: Contract, device: torch.device) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = LOG_SEVERITY
        on_gpu = device.type == "cuda"
        provider, settings = (CUDA_PROVIDER, CUDA_SETTINGS) if on_gpu else ("CPUExecutionProvider", {})
        self.contract, self._device = contract, device
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(model), options, providers=[(provider, settings)], enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise EngineError(
                f"ONNX Runtime can't load {model.name} with {provider}: {first_line(error)}", hint="sdtrt doctor"
            ) from error
        if provider not in self._session.get_providers():  # where its libraries are missing, it is left out
            raise EngineError(
                f"ONNX Runtime can't use its {provider} here",
                hint="install the CUDA and cuDNN libraries that your onnxruntime-gpu was built for",
            )

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the model; the outputs are new tensors on the same device."""
        import numpy as np

        refuse_gradients(self.contract.component, feeds)
        shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in feeds.items()}
        values = check_feeds(self.inputs, shapes, dtypes)
        outputs = {
            spec.name: torch.empty(spec.shape(values), dtype=getattr(torch, spec.dtype), device=self._device)
            for spec in self.outputs
        }
        binding, index = self._session.io_binding(), self._device.index or 0
        for name, tensor in feeds.items():
            place = (self._device.type, index, getattr(np, dtypes[name]), shapes[name], tensor.data_ptr())
            binding.bind_input(name, *place)
        for spec in self.outputs:
            tensor = outputs[spec.name]
            place = (self._device.type, index, getattr(np, spec.dtype), tuple(tensor.shape), tensor.data_ptr())
            binding.bind_output(spec.name, *place)
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # ONNX Runtime works on a stream of its own
        self._session.run_with_iobinding(binding)
        return outputs

    def close(self) -> None:
        """Free the model."""
        self._session = None
        self.let_go()
