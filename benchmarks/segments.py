"""What a step gains where PyTorch computes the UNet's large self-attentions between TensorRT engines.

    python benchmarks/segments.py --folder /tmp/segments --build-only
    python benchmarks/segments.py --folder /tmp/segments --output segments.json
    python benchmarks/segments.py --backend onnxruntime --height 64 --width 64 --folder /tmp/cpu --output cpu.json

The exported UNet is cut at its self-attentions of the largest resolution, or of `--min-tokens` and more
(`sdtrt.build.splitting`); each piece becomes an engine of its own, and pieces and attentions run as one CUDA graph.
Rows are variants: `whole` (the same graph, not cut), `separate` (queries, keys and values by three products) and
`joined` (by one), the latter two with each of `--kernels`: error against PyTorch in fp32, milliseconds a step, GPU time
by kernel. Sizes are fixed. The model is `tuning.py`'s (`two-level`), or any that sdtrt knows. PyTorch's attention is
also timed by itself. `--backend onnxruntime` runs all but the CUDA graph on a CPU; `tensorrt-rtx` can only be built
for.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fidelity import Built, errors, feeds_of, kernels, outputs_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tuning import make_unet

from sdtrt import host, onnx_graph, trt_api
from sdtrt.build.splitting import Facts, choose, find_attentions, freeze, split
from sdtrt.build.tensorrt import build_plan
from sdtrt.components import Contract, unet_contract
from sdtrt.console import Console
from sdtrt.export import write_onnx
from sdtrt.meters import time_queued_calls
from sdtrt.models import load_unet, resolve_model
from sdtrt.runtime import TENSORRT_FILE
from sdtrt.runtime.onnxruntime import OnnxRuntimeSession
from sdtrt.runtime.pieces import Attention
from sdtrt.runtime.plan import load_plan
from sdtrt.runtime.tensorrt import attend
from sdtrt.specs import BuildSpec, ExportSpec, ModelSpec, Precision, Profile, Sizes

TIMESTEPS = (981.0, 421.0, 1.0)
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
VARIANTS = ("whole", "separate", "joined")
# Stable Diffusion 1.5's at 512x512, and the first with its heads widened to what kernels like: [B,heads,S,D].
SHAPES = ((2, 8, 4096, 40), (2, 8, 4096, 64), (2, 8, 1024, 80), (2, 8, 256, 160), (2, 8, 64, 160))
ALONE = 20  # attentions in the graph that times them by themselves
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Segment(Built):
    """A piece on disk, its tensors (fixed sizes), and the attentions that come after it."""

    contract: Contract
    attentions: tuple[Attention, ...]

    @classmethod
    def from_json(cls, folder: Path, data: Mapping[str, Any]) -> Segment:
        """One entry of `write_segments`'s list."""
        attentions = (Attention(**one | {"sources": tuple(one["sources"])}) for one in data["attentions"])
        return cls(folder / data["name"], Contract.from_json(data["contract"]), tuple(attentions))


# --------------------------------------------------------------------------------------------------------- splitting


def write_segments(source: Path, folder: Path, contract: Contract, sizes: Sizes, tokens: int | None, name: str) -> None:
    """Split an exported model; graphs into folders of their own, and what they are into `segments.json`, last."""
    model, weights = onnx_graph.load_split(source)
    freeze(model, weights, contract.input_shapes(sizes))
    facts = Facts(model, weights)
    cuts = [] if name == "whole" else choose(find_attentions(facts), tokens)
    pieces = split(model, weights, facts, cuts, joined=name == "joined")
    entries = []
    for number, piece in enumerate(pieces):
        part = Contract(contract.component, contract.precision, piece.inputs, piece.outputs)
        attentions = [asdict(attention) for attention in piece.attentions]
        entries.append({"name": f"piece-{number}", "contract": part.to_json(), "attentions": attentions})
        (folder / f"piece-{number}").mkdir(parents=True, exist_ok=True)
        onnx_graph.save(piece.model, piece.weights, folder / f"piece-{number}" / "model.onnx")
    (folder / "segments.json").write_text(json.dumps(entries, indent=1))


def read_segments(folder: Path) -> list[Segment]:
    """The pieces that lie in a folder, in order."""
    return [Segment.from_json(folder, entry) for entry in json.loads((folder / "segments.json").read_text())]


# ---------------------------------------------------------------------------------------------------------- building


def build(segments: Sequence[Segment], spec: BuildSpec, jobs: int) -> None:
    """Build those engines that are not there yet, some side by side, each in a process of its own."""

    def make(segment: Segment) -> None:
        if not segment.facts.exists():
            measured = build_plan(
                segment.onnx, segment.folder, segment.contract, spec, timing_cache=None, console=Console()
            )
            segment.facts.write_text(json.dumps(measured))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(make, sorted(segments, key=lambda one: -one.onnx.stat().st_size)))


# ----------------------------------------------------------------------------------------------------------- running


class OnnxRuntimeSegments:
    """The pieces in ONNX Runtime, the attentions in PyTorch, on the CPU."""

    def __init__(self, segments: Sequence[Segment], kernel: str, stack: ExitStack) -> None:
        self._kernel, self._segments = KERNELS[kernel], segments
        self._sessions = [
            stack.enter_context(OnnxRuntimeSession(one.onnx, one.contract, optimized=False)) for one in segments
        ]

    def run(self, feeds: Mapping[str, Tensor]) -> Tensor:
        """The model's inputs → its output."""
        tensors = dict(feeds)
        for segment, session in zip(self._segments, self._sessions, strict=True):
            tensors |= session.run({spec.name: tensors[spec.name] for spec in segment.contract.inputs})
            with sdpa_kernel(self._kernel):
                tensors |= {one.result: attend(one, tensors) for one in segment.attentions}
        return tensors[self._segments[-1].contract.outputs[-1].name]


class TensorRTSegments:
    """The pieces in TensorRT, the attentions in PyTorch: one CUDA graph.

    What crosses between pieces lies in buffers that the pieces write and read; an attention's result is read where
    PyTorch has put it (with `fixed`, from a buffer that it is copied to). Each piece has one context, which only this
    graph uses; all work in one scratch memory.
    """

    def __init__(
        self, segments: Sequence[Segment], kernel: str, example: Mapping[str, Tensor], *, fixed: bool = False
    ) -> None:
        self._segments, self._library, self._fixed = segments, trt_api.open_library("tensorrt"), fixed
        self._device = next(iter(example.values())).device
        self._stream = torch.cuda.Stream(self._device)
        self._plans = [self._load(segment) for segment in segments]
        sizes = [trt_api.scratch_bytes(self._library, plan.engine) for plan in self._plans]
        self._scratch = torch.empty(max(*sizes, 256), dtype=torch.uint8, device=self._device)
        self._contexts = [self._new_context(plan.engine) for plan in self._plans]
        self._inputs = {name: tensor.clone() for name, tensor in example.items()}
        self._outputs = {
            spec.name: torch.empty(spec.shape({}), dtype=getattr(torch, spec.dtype), device=self._device)
            for segment in segments
            for spec in segment.contract.outputs
        }
        self._results: Tensors = {}
        self._kept: list[Tensors] = []  # what the graph and the run before it use
        self.graph = torch.cuda.CUDAGraph()
        self._capture(KERNELS[kernel])

    def run(self, feeds: Mapping[str, Tensor]) -> Tensor:
        """The model's inputs, copied as a session does → a copy of its output."""
        for name, tensor in feeds.items():
            if name in ("sample", "timestep") or not torch.equal(self._inputs[name], tensor):
                self._inputs[name].copy_(tensor)
        return self.replay().clone()

    def step(self, feeds: Mapping[str, Tensor]) -> Tensor:
        """As `run`, where the conditioning is the same as before."""
        for name in ("sample", "timestep"):
            self._inputs[name].copy_(feeds[name])
        return self.replay().clone()

    def replay(self) -> Tensor:
        """The graph alone."""
        self.graph.replay()
        return self._outputs[self._segments[-1].contract.outputs[-1].name]

    def time_pieces(self, repeats: int) -> list[float]:
        """Milliseconds of each piece by itself, from a graph and a context of its own; attentions are not in them."""
        found = []
        for segment, plan in zip(self._segments, self._plans, strict=True):
            context, graph = self._new_context(plan.engine), torch.cuda.CUDAGraph()
            with torch.cuda.stream(self._stream):
                self._prepare(segment, context)
                self._start(segment, context, self._kept[-1])
            self._stream.synchronize()
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._start(segment, context, self._kept[-1])
            found.append(time_queued_calls(graph.replay, repeats, self._device).scaled(1000).median)
            graph.reset()
        return found

    def close(self) -> None:
        """Free the graph, then what it uses."""
        torch.cuda.synchronize(self._device)
        self.graph.reset()
        self._contexts.clear()
        self._plans.clear()
        self._kept.clear()

    def _load(self, segment: Segment) -> Any:
        index = self._device.index if self._device.index is not None else torch.cuda.current_device()
        return load_plan(segment.folder / TENSORRT_FILE, segment.contract, self._library, index)

    def _new_context(self, engine: Any) -> Any:
        block = self._scratch
        return trt_api.create_shared_context(self._library, engine, block.data_ptr(), block.numel())

    def _capture(self, kernel: SDPBackend) -> None:
        """Run once on the graph's stream (TensorRT and cuDNN prepare themselves then), and capture the second run."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.inference_mode(), sdpa_kernel(kernel):
            with torch.cuda.stream(self._stream):
                for segment, context in zip(self._segments, self._contexts, strict=True):
                    self._prepare(segment, context)
                self._enqueue()
            self._stream.synchronize()
            with torch.cuda.graph(self.graph, stream=self._stream, capture_error_mode="thread_local"):
                self._enqueue()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _enqueue(self) -> None:
        """Put pieces and attentions on the stream, each bound to what comes before it."""
        tensors = self._inputs | self._outputs
        self._kept.append(tensors)
        for segment, context in zip(self._segments, self._contexts, strict=True):
            self._start(segment, context, tensors)
            for attention in segment.attentions:
                tensors[attention.result] = self._placed(attention.result, attend(attention, tensors))

    def _prepare(self, segment: Segment, context: Any) -> None:
        """Set a context's input shapes."""
        shapes = {spec.name: spec.shape({}) for spec in segment.contract.inputs}
        trt_api.prepare_context(self._library, context, 0, shapes, self._stream.cuda_stream)

    def _start(self, segment: Segment, context: Any, tensors: Tensors) -> None:
        """Bind a piece to its tensors and put it on the stream."""
        specs = (*segment.contract.inputs, *segment.contract.outputs)
        addresses = {spec.name: tensors[spec.name].data_ptr() for spec in specs}
        trt_api.set_addresses(self._library, context, addresses)
        trt_api.enqueue(self._library, context, self._stream.cuda_stream)

    def _placed(self, name: str, result: Tensor) -> Tensor:
        """An attention's result where it is, or copied to where its first one was."""
        if not self._fixed:
            return result
        return self._results.setdefault(name, torch.empty_like(result)).copy_(result)


# --------------------------------------------------------------------------------------------------------- measuring


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def opened(
    segments: Sequence[Segment], kernel: str, args: argparse.Namespace, example: Tensors
) -> Iterator[OnnxRuntimeSegments | TensorRTSegments]:
    """A variant, ready to run."""
    with ExitStack() as stack:
        if args.backend == "onnxruntime":
            yield OnnxRuntimeSegments(segments, kernel, stack)
        else:
            on_gpu = TensorRTSegments(segments, kernel, example, fixed=args.fixed_results)
            stack.callback(on_gpu.close)
            yield on_gpu


def times(
    running: OnnxRuntimeSegments | TensorRTSegments, feeds: Tensors, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds of a step with the same conditioning as before; on a GPU of the graph alone and its pieces too."""

    def medians(call: Callable[[], Any]) -> list[float]:
        return [time_queued_calls(call, repeats, device).scaled(1000).median for _ in range(3)]

    if isinstance(running, OnnxRuntimeSegments):
        return {"step_ms": medians(lambda: running.run(feeds))}
    found: dict[str, Any] = {"step_ms": medians(lambda: running.step(feeds)), "graph_ms": medians(running.replay)}
    return found | {"kernels": kernels(running.replay), "piece_ms": running.time_pieces(repeats)}


def measure(name: str, kernel: str, args: argparse.Namespace, state: Mapping[str, Any]) -> dict[str, Any]:
    """One row."""
    segments, feeds, floor = read_segments(args.folder / name), state["feeds"], state["floor"]
    device = feeds[0]["sample"].device
    with opened(segments, kernel, args, feeds[0]) as running:
        outputs = [running.run(one) for one in feeds]
        found = errors(outputs, state["expected"])["relative_l2"]
        for _ in range(3):
            running.run(feeds[0])
        row = times(running, feeds[0], args.repeats, device)
    state["outputs"].setdefault(name, outputs)
    whole = state["outputs"].get("whole")
    return row | {
        "relative_l2": found,
        "relative_l2_to_whole": None if whole is None else errors(outputs, [o.float() for o in whole])["relative_l2"],
        "worst_ratio_to_pytorch_fp16": max(one / own for one, own in zip(found, floor, strict=True)),
    }


def described(segment: Segment) -> dict[str, Any]:
    """What is known of a piece without running it."""
    built = json.loads(segment.facts.read_text()) if segment.facts.exists() else {}
    sizes = {
        word: sum(torch.Size(spec.shape({})).numel() * getattr(torch, spec.dtype).itemsize for spec in specs)
        for word, specs in (("bytes_in", segment.contract.inputs), ("bytes_out", segment.contract.outputs))
    }
    tensors = {"inputs": len(segment.contract.inputs), "outputs": len(segment.contract.outputs)}
    kept = ("build_seconds", "check_seconds", "plan_bytes", "scratch_bytes", "precision", "parity")
    build = {key: built[key] for key in kept if key in built}
    return {**tensors, **sizes, "attentions": [asdict(one) for one in segment.attentions], "build": build}


def time_attention(shape: tuple[int, ...], kernel: str, joined: bool, args: argparse.Namespace) -> dict[str, Any]:
    """PyTorch's attention by itself, from a CUDA graph of many; in microseconds each."""
    batch, heads, tokens, width = shape
    device = torch.device("cpu" if args.backend == "onnxruntime" else "cuda")
    channels = heads * width
    row: dict[str, Any] = {"shape": shape, "kernel": kernel, "layout": "joined" if joined else "separate"}
    names = ("qkv",) if joined else ("q", "k", "v")
    attention = Attention(names, "result", heads, width, width**-0.5)
    sizes = (batch, tokens, channels * (3 if joined else 1))
    tensors = {name: torch.randn(sizes, dtype=torch.float16, device=device) for name in names}
    try:
        with torch.inference_mode(), sdpa_kernel(KERNELS[kernel]):
            states = attend(attention, tensors)
            call, count = _repeated(lambda: attend(attention, tensors), device)
            call()
            found = time_queued_calls(call, args.repeats, device).scaled(1e6 / count).median
            work = kernels(call, 1) if device.type == "cuda" else []
        exact = attend(attention, {name: tensor.double().cpu() for name, tensor in tensors.items()})
    except RuntimeError as error:
        return row | {"error": reason_of(error)}
    difference = errors([states], [exact])["relative_l2"][0]
    return row | {"us": found, "relative_l2": difference, "kernels": work}


def _repeated(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], int]:
    """On a GPU a graph of many calls and their number; on a CPU the call itself."""
    if device.type != "cuda":
        return call, 1
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(ALONE):
            call()
    return graph.replay, ALONE


def load(model: str, precision: Precision) -> tuple[torch.nn.Module, Contract]:
    """A UNet on the CPU and its contract."""
    dtype = torch.float16 if precision == "fp16" else torch.float32
    if model == "two-level":
        unet = make_unet()
        return unet.to(dtype), unet_contract(dict(unet.config), precision)
    found = resolve_model(ModelSpec(model))
    return load_unet(found, dtype), unet_contract(found.config("unet"), precision)


def prepare(unet: torch.nn.Module, contract: Contract, args: argparse.Namespace) -> dict[str, str]:
    """Export, split and build what no earlier run with the same folder has left there; failures by variant."""
    sizes, source, failures = Sizes(args.batch, args.height, args.width), args.folder / "model.onnx", {}
    if not source.exists():
        write_onnx(unet, contract, source, console=Console())
    for name in args.variants:
        if not (args.folder / name / "segments.json").exists():
            write_segments(source, args.folder / name, contract, sizes, args.min_tokens, name)
        segments = read_segments(args.folder / name)
        print(f"{name}: {len(segments)} pieces", file=sys.stderr)
        try:
            if args.backend != "onnxruntime":
                build(segments, build_spec(contract, sizes, args), args.jobs)
        except Exception as error:
            failures[name] = reason_of(error)
            print(f"{name}: {failures[name]}", file=sys.stderr)
    return failures


def build_spec(contract: Contract, sizes: Sizes, args: argparse.Namespace) -> BuildSpec:
    """How pieces are built: as the product's engines of one size are."""
    capability = tuple(args.compute_capability) if args.compute_capability else None
    export = ExportSpec(ModelSpec("segments"), precision=contract.precision)
    return BuildSpec(
        export,
        args.backend,
        (Profile.of(sizes),),
        args.optimization_level,
        norm_plugins=not args.no_norm_plugins,
        compute_capability=capability,
    )


# What the files in a folder depend on.
SETTINGS = (
    *("model", "precision", "batch", "height", "width", "min_tokens", "backend", "optimization_level"),
    *("no_norm_plugins", "compute_capability"),
)


def check_folder(args: argparse.Namespace) -> None:
    """Refuse a folder with the graphs and engines of another call."""
    file, settings = args.folder / "settings.json", {name: getattr(args, name) for name in SETTINGS}
    if not file.exists():
        args.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    known = json.loads(file.read_text())
    others = [f"{name} {known.get(name)}" for name in SETTINGS if known.get(name) != settings[name]]
    if others:
        sys.exit(f"{args.folder} is of another call, with {', '.join(others)}: name another --folder")


def measure_all(unet: torch.nn.Module, contract: Contract, args: argparse.Namespace) -> dict[str, Any]:
    """All rows; a variant that fails is a row with its error."""
    failures = prepare(unet, contract, args)
    if args.build_only:
        sys.exit(1 if failures else 0)
    device = torch.device("cpu" if args.backend == "onnxruntime" else "cuda")
    feeds = feeds_of(contract, Sizes(args.batch, args.height, args.width), device, TIMESTEPS)
    half = outputs_of(unet.to(device), torch.float16, feeds)
    expected = outputs_of(unet, torch.float32, feeds)
    unet.to("cpu")
    floor = errors(half, expected)["relative_l2"]
    state = {"feeds": feeds, "expected": expected, "floor": floor, "outputs": {}}
    rows = []
    for name in args.variants:
        for kernel in args.kernels[: 1 if name == "whole" else None]:
            row: dict[str, Any] = {"variant": name, "kernel": None if name == "whole" else kernel}
            try:
                if name in failures:
                    raise RuntimeError(failures[name])
                row |= measure(name, kernel, args, state)
            except Exception as error:
                row["error"] = reason_of(error)
            rows.append(row)
    pieces = {name: [described(one) for one in read_segments(args.folder / name)] for name in args.variants}
    return {"pytorch_fp16": floor, "rows": rows, "pieces": pieces}


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="two-level", help="two-level, or a model that sdtrt knows")
    parser.add_argument("--precision", choices=["fp16", "fp32"], default="fp16")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--min-tokens", type=int, help="cut at attentions of so many; default: of the most")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, help="default: flash cudnn efficient; on a CPU flash")
    parser.add_argument("--backend", choices=["tensorrt", "onnxruntime", "tensorrt-rtx"], default="tensorrt")
    parser.add_argument("--compute-capability", type=int, nargs=2, metavar=("MAJOR", "MINOR"), help="of tensorrt-rtx")
    parser.add_argument("--optimization-level", type=int)
    parser.add_argument("--no-norm-plugins", action="store_true")
    parser.add_argument(
        "--fixed-results", action="store_true", help="copy attentions' results: one address for all runs"
    )
    parser.add_argument("--jobs", type=int, default=3, help="builds at a time")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--build-only", action="store_true", help="measure in a later run with the same --folder")
    parser.add_argument("--attention-alone", choices=["yes", "no", "only"], default="yes", help="time it by itself")
    parser.add_argument("--folder", type=Path, required=True, help="where graphs and engines go; kept, for one model")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.output is None and not args.build_only:
        parser.error("--output is needed without --build-only")
    if args.backend == "tensorrt-rtx" and not args.build_only:
        parser.error("tensorrt-rtx is for --build-only")
    args.kernels = args.kernels or (["flash"] if args.backend == "onnxruntime" else ["flash", "cudnn", "efficient"])
    return args


def main() -> None:
    """Build, measure, write the JSON."""
    args = parsed()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    check_folder(args)
    figures: dict[str, Any] = {}
    if args.attention_alone != "only":
        figures = measure_all(*load(args.model, args.precision), args)
    if args.attention_alone != "no":
        figures["attention"] = [
            time_attention(shape, kernel, joined, args)
            for shape in SHAPES
            for kernel in args.kernels
            for joined in (False, True)
        ]
    report = {"command": shlex.join(["python", *sys.argv]), "host": host.facts(), "versions": host.library_versions()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
