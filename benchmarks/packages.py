"""What an Inductor engine of a component costs and keeps: build, open, changes of weights, steps at several sizes.

    python benchmarks/packages.py --output packages.json                                     # the built-in model
    python benchmarks/packages.py --model FOLDER --height 512 --width 512 --engine-dir ENGINES \\
        --batches 1,4,8,16 --profile batch=2:2:8 --profile height=512:512:768,width=512:512:768 \\
        --profile width=768 --output packages.json

The first of `--batches` names the engine that `open`, `checkpoints`, `changes` and `parameters` are about; `steps` is
about all of them: each batch of images has an engine of its own (guidance makes two rows an image), each `--profile` is
one more, in the words of `sdtrt build`, and each engine is timed at every size that it takes. Engines that the
directory has are not built again. Files are in the page cache when they are read: they were read, or written, before.

- `open`: from the entry to a session with weights in it, three times in one process; then its first run.
- `checkpoints`: one engine with the weights of checkpoint A, of another one (B, from `--other` or made with noise), and
  of A with a low-rank update of its attentions merged by hand; each beside eager PyTorch with the very same weights.
- `changes`: back and forth between A and B while captured graphs run. Every ninth comes from its file on the disk.
- `parameters`: each changed alone, beside PyTorch in fp32; on models of few parameters only.

`promises` holds the figures against what issue tracker and docs promise. A part that fails leaves its error, and the
others run; the report is written after each part. The exit code is 1 where a part failed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch

from sdtrt.backends import registry
from sdtrt.backends.build import build_engine, engine_key
from sdtrt.backends.checking import compare
from sdtrt.backends.inductor.session import InductorSession
from sdtrt.backends.inductor.weights import PACKAGE_FILE
from sdtrt.backends.open import open_session
from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.exports.computed import computed
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.models.components import contract_of, load_component, part_of, profile_of
from sdtrt.models.resolve import Model, resolve_model
from sdtrt.models.tensor_names import own_name
from sdtrt.reports import meters
from sdtrt.reports.bench_parts import time_component
from sdtrt.reports.meters import Timing, synchronize, tf32
from sdtrt.specs import COMPONENTS, BuildSpec, Component, ExportSpec, ModelSpec, Precision, Profile, Range, Sizes
from sdtrt.specs.contract import Contract

BACKEND = "inductor"
OPENS = 3
FILE_EVERY = 9  # changes: an odd number, so that both checkpoints come from their files
FEW_ELEMENTS = 20_000_000  # of a component whose parameters are changed one by one
LORA_RANK = 8
LORA_ENDS = tuple(
    f"{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
)
NOISE = 0.2  # of the other checkpoint, in standard deviations of each tensor
CHANGE_LIMIT_S, OPEN_LIMIT_S, GROWTH_LIMIT, ERROR_LIMIT = 1.0, 2.0, 0.01, 1.0
EXACT = 1e-5  # relative: an error in fp32 that is rounding, whatever eager PyTorch's own is

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Request:
    """What is measured.

    Args:
        profiles: of the component's engines; the first one's is the engine that the weights are about.
        changes: back and forth.
    """

    model: Model
    component: Component
    precision: Precision
    profiles: tuple[Profile, ...]
    directory: EngineDirectory
    device: torch.device
    other: Model | None
    changes: int
    folder: Path
    console: Console

    @property
    def contract(self) -> Contract:
        """The component's."""
        return contract_of(self.model, self.component, self.precision)

    @property
    def dtype(self) -> torch.dtype:
        """Of the engine's weights."""
        return cast("torch.dtype", getattr(torch, self.contract.outputs[0].dtype))

    def build_spec(self, profile: Profile) -> BuildSpec:
        """Of one engine."""
        return BuildSpec(ExportSpec(self.model.spec, self.component, self.precision), BACKEND, (profile,))

    def engine(self, profile: Profile | None = None) -> Entry:
        """An engine, built where it is missing; by default the first one."""
        return build_engine(self.model, self.build_spec(profile or self.profiles[0]), self.directory, self.console)

    def session(self, entry: Entry) -> InductorSession:
        """An open session with the model's weights."""
        session = open_session(entry, self.device, None, self.model)
        assert isinstance(session, InductorSession)
        return session

    def feeds(self, sizes: Sizes | None = None) -> Tensors:
        """Seeded inputs on the device; by default of the size that the first engine is for."""
        feeds = seeded_feeds(self.contract, sizes or self.profiles[0].optimum)
        return {name: tensor.to(self.device) for name, tensor in feeds.items()}

    def checkpoint(self, name: str) -> Path:
        """The file of a checkpoint."""
        return self.folder / f"{name}.safetensors"


# ------------------------------------------------------------------------------------------------- checkpoints


def write_checkpoints(ask: Request) -> None:
    """Write the state dicts of checkpoint A, of B, and of A with a LoRA merged by hand."""
    state = load_component(ask.model, ask.component, ask.dtype).state_dict()
    _save(state, ask.checkpoint("A"))
    _save(_with_lora(state, ask.device), ask.checkpoint("A+LoRA"))
    other = ask.other and load_component(ask.other, ask.component, ask.dtype).state_dict()
    _save(other or _noised(state, ask.device), ask.checkpoint("B"))


def _save(state: Mapping[str, torch.Tensor], path: Path) -> None:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def _noised(state: Mapping[str, torch.Tensor], device: torch.device) -> Tensors:
    """Another checkpoint: each tensor with noise of its own, those that are all alike with a little."""
    generator = torch.Generator(device).manual_seed(1)
    changed = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            changed[name] = tensor
            continue
        wide = tensor.to(device, torch.float32)
        size = NOISE * float(wide.std(unbiased=False)) or 0.02
        noise = torch.randn(wide.shape, generator=generator, device=device)
        changed[name] = (wide + size * noise).to("cpu", tensor.dtype)
    return changed


def _with_lora(state: Mapping[str, torch.Tensor], device: torch.device) -> Tensors:
    """A state dict with W + B·A added to the projections of all attentions, each update as large as a tenth of W."""
    generator = torch.Generator(device).manual_seed(2)
    merged = dict(state)
    for name, tensor in state.items():
        if name.endswith(LORA_ENDS) and tensor.dim() == 2:
            rows, columns = tensor.shape
            up = torch.randn(rows, LORA_RANK, generator=generator, device=device)
            update = up @ torch.randn(LORA_RANK, columns, generator=generator, device=device)
            wide = tensor.to(device, torch.float32)
            merged[name] = (wide + update * (0.1 * wide.norm() / update.norm())).to("cpu", tensor.dtype)
    return merged


def eager(ask: Request, state: Mapping[str, torch.Tensor], feeds: Tensors) -> tuple[Tensors, Tensors]:
    """What PyTorch computes with these weights: in the engine's precision, and in fp32 without TF32."""
    module = load_component(ask.model, ask.component, ask.dtype)
    module.load_state_dict(state)
    plain = _computed(ask, torch.nn.Module.to(module, ask.device), feeds)
    return plain, _computed(ask, torch.nn.Module.to(module, torch.float32), feeds)


def _computed(ask: Request, module: torch.nn.Module, feeds: Tensors) -> Tensors:
    with tf32(False):
        return computed(module, ask.contract, feeds)


def run(session: InductorSession, feeds: Tensors) -> Tensors:
    """A session's outputs on the CPU."""
    return {name: tensor.cpu() for name, tensor in session.run(feeds).items()}


def equal(one: Tensors, other: Tensors) -> bool:
    """Whether two results are the same to the last bit."""
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# ------------------------------------------------------------------------------------------------- parts


def measure_build(ask: Request) -> dict[str, Any]:
    """Build the engine that the weights are about, or find it."""
    key = engine_key(ask.model, ask.build_spec(ask.profiles[0]), ask.directory).to_json()
    there = ask.directory.find("engine", key) is not None
    start = time.perf_counter()
    entry = ask.engine()
    facts = {name: value for name, value in entry.info.items() if name not in ("contract", "model")}
    shared = ask.other and engine_key(ask.other, ask.build_spec(ask.profiles[0]), ask.directory).to_json() == key
    return {
        "found": there,
        "obtained_s": time.perf_counter() - start,
        "build_s": entry.info.get("seconds"),
        "package_bytes": entry.file(PACKAGE_FILE).stat().st_size,
        "other_has_the_same_key": shared,
        "info": facts,
    }


def measure_open(ask: Request) -> dict[str, Any]:
    """From the entry to a session with weights, and its first run; all files are in the page cache."""
    entry, feeds = ask.engine(), ask.feeds()
    for path in (entry.file(PACKAGE_FILE), *ask.model.weight_files(part_of(ask.component))):
        path.read_bytes()
    bare, opened, first = [], [], []
    for _ in range(OPENS):
        start = time.perf_counter()
        open_session(entry, ask.device).close()
        bare.append(time.perf_counter() - start)
        start = time.perf_counter()
        with ask.session(entry) as session:
            synchronize(ask.device)
            opened.append(time.perf_counter() - start)
            start = time.perf_counter()
            session.run(feeds)
            synchronize(ask.device)
            first.append(time.perf_counter() - start)
            weights_bytes = session.weights_bytes
    names = ("without_weights_s", "open_s", "first_run_s")
    figures = {name: Timing(tuple(one)).to_json() for name, one in zip(names, (bare, opened, first), strict=True)}
    return figures | {"weights_bytes": weights_bytes}


def measure_checkpoints(ask: Request) -> dict[str, Any]:
    """One engine with three sets of weights, each beside PyTorch with the same."""
    before, rows, feeds = len(ask.directory.entries("engine")), [], ask.feeds()
    outputs: dict[str, Tensors] = {}
    with ask.session(ask.engine()) as session:
        for name in ("A", "B", "A+LoRA"):
            state = safetensors.torch.load_file(ask.checkpoint(name))
            session.set_weights(state)
            launched = run(session, feeds)
            outputs[name] = found = [run(session, feeds) for _ in range(2)][-1]  # from a graph, where there are such
            plain, wanted = eager(ask, state, feeds)
            engine, own = compare(found, wanted), compare(plain, wanted)
            rows.append(
                {
                    "checkpoint": name,
                    "engine": engine,
                    "eager": own,
                    "error_ratio": engine["relative_l2"] / own["relative_l2"] if own["relative_l2"] else None,
                    "correct": _is_correct(engine["relative_l2"], own["relative_l2"]),
                    "differs_from_a": compare(found, outputs["A"])["relative_l2"],
                    "graph_equals_launch": equal(launched, found),
                }
            )
            _forget()
        graphs = session.graph_count
    return {"checkpoints": rows, "graphs": graphs, "built": len(ask.directory.entries("engine")) - before}


def _is_correct(error: float, own: float) -> bool:
    """Whether an engine's error is no larger than that of eager PyTorch in its precision."""
    return error <= max(ERROR_LIMIT * own, EXACT)


@dataclass
class Changes:
    """What is noted of changes back and forth: seconds of each and of the run after it, and bytes then."""

    from_file: list[float] = field(default_factory=list)
    from_memory: list[float] = field(default_factory=list)
    runs: list[float] = field(default_factory=list)
    equal_to_first: list[bool] = field(default_factory=list)
    process_bytes: list[int] = field(default_factory=list)
    gpu_bytes: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data. B comes first, and A second."""
        memory = {"process": self.process_bytes, "gpu": self.gpu_bytes}
        return {
            "changes": len(self.runs),
            "from_file_s": Timing(tuple(self.from_file)).to_json(),
            "from_memory_s": Timing(tuple(self.from_memory)).to_json(),
            "run_after_s": Timing(tuple(self.runs)).to_json(),
            "a_is_back_to_the_last_bit": bool(self.equal_to_first[1::2]) and all(self.equal_to_first[1::2]),
            "b_differs": not any(self.equal_to_first[::2]),
            "memory": {name: {"growth": growth(sizes), "bytes": sizes} for name, sizes in memory.items()},
        }


def measure_changes(ask: Request) -> dict[str, Any]:
    """Change the weights back and forth between two runs each; seconds, memory, and whether A comes back."""
    kept = {
        name: {key: one.to(ask.device) for key, one in safetensors.torch.load_file(ask.checkpoint(name)).items()}
        for name in "AB"
    }
    feeds, noted = ask.feeds(), Changes()
    with ask.session(ask.engine()) as session:
        from_model = _changed_by_command(ask, session, feeds)
        session.set_weights(kept["A"])
        first = run(session, feeds)
        graphs = session.graph_count
        for number in range(ask.changes):
            name = "BA"[number % 2]
            _change_once(ask, session, None if number % FILE_EVERY == 0 else kept[name], name, noted)
            _run_once(ask, session, feeds, first, noted)
        went_on = session.graph_count == graphs
    return {"from_model_s": from_model, "graphs": graphs, "graphs_went_on": went_on, **noted.to_json()}


def _change_once(ask: Request, session: InductorSession, state: Tensors | None, name: str, noted: Changes) -> None:
    """Give a session other weights; without a state, those of the checkpoint's file."""
    start = time.perf_counter()
    session.set_weights(safetensors.torch.load_file(ask.checkpoint(name)) if state is None else state)
    (noted.from_file if state is None else noted.from_memory).append(time.perf_counter() - start)


def _run_once(ask: Request, session: InductorSession, feeds: Tensors, first: Tensors, noted: Changes) -> None:
    """Run it with them, and look at the memory."""
    start = time.perf_counter()
    outputs = session.run(feeds)
    synchronize(ask.device)
    noted.runs.append(time.perf_counter() - start)
    noted.equal_to_first.append(equal({name: one.cpu() for name, one in outputs.items()}, first))
    noted.process_bytes.append(resident_bytes())
    noted.gpu_bytes.append(meters.gpu_bytes(ask.device))


def _changed_by_command(ask: Request, session: InductorSession, feeds: Tensors) -> dict[str, Any]:
    """Seconds of what sdtrt's commands do: load the part of a model, then give it to the session, which then runs."""
    samples = []
    for _ in range(OPENS):
        session.run(feeds)
        synchronize(ask.device)
        start = time.perf_counter()
        session.set_weights(load_component(ask.other or ask.model, ask.component, ask.dtype))
        samples.append(time.perf_counter() - start)
    return Timing(tuple(samples)).to_json()


def growth(sizes: list[int]) -> float | None:
    """By how much memory grew after the first tenth at its most, as a share; None where nobody measured."""
    start = sizes[len(sizes) // 10] if sizes else 0
    return max(sizes[len(sizes) // 10 :]) / start - 1 if start else None


def resident_bytes() -> int:
    """The process's resident memory that is its own: pages of files that it has mapped come and go."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def measure_parameters(ask: Request) -> dict[str, Any]:
    """Change each parameter alone: the engine has to compute what PyTorch then does."""
    module = torch.nn.Module.to(load_component(ask.model, ask.component, ask.dtype), ask.device)
    elements = sum(parameter.numel() for parameter in module.parameters())
    if elements > FEW_ELEMENTS:
        return {"left_out": f"{elements} elements are too many: at most {FEW_ELEMENTS}"}
    plain, before = eager(ask, module.state_dict(), ask.feeds())
    limit = max(4 * compare(plain, before)["relative_l2"], 10 * EXACT)
    rows = _parameters(ask, module, before)
    return {
        "parameters": len(rows),
        "limit": limit,
        "not_followed": [row["name"] for row in rows if not row["error"] <= limit],
        "without_effect": [row["name"] for row in rows if row["effect"] <= limit],
        "largest_error": max(row["error"] for row in rows),
        "each": rows,
    }


@torch.no_grad()
def _parameters(ask: Request, module: torch.nn.Module, before: Tensors) -> list[dict[str, Any]]:
    """Of each parameter: the engine's error when it is changed, and how much the change does at all."""
    wide = torch.nn.Module.to(copy.deepcopy(module), torch.float32)
    generator, feeds, rows = torch.Generator(ask.device).manual_seed(3), ask.feeds(), list[dict[str, Any]]()
    pairs = zip(module.named_parameters(), wide.parameters(), strict=True)
    with ask.session(ask.engine()) as session:
        views = session.weight_views()
        for (name, parameter), exact in pairs:
            if own_name(name) not in views:
                continue  # of a VAE's other half
            kept, size = parameter.clone(), 0.5 * float(exact.std(unbiased=False))
            noise = torch.randn(exact.shape, generator=generator, device=ask.device)
            parameter.copy_(exact + size * noise + 0.05)
            exact.copy_(parameter)
            session.set_weights(module)
            wanted = _computed(ask, wide, feeds)
            error = compare(run(session, feeds), wanted)["relative_l2"]
            rows.append({"name": name, "error": error, "effect": compare(wanted, before)["relative_l2"]})
            parameter.copy_(kept)
            exact.copy_(kept)
    return rows


def measure_steps(ask: Request) -> list[dict[str, Any]]:
    """Each engine at every size that it takes: one row each, or one with the reason where there is no engine."""
    ends = ((profile.minimum, profile.optimum, profile.maximum) for profile in ask.profiles)
    sizes, rows = dict.fromkeys(one for three in ends for one in three), list[dict[str, Any]]()
    for profile in ask.profiles:
        try:
            rows += _steps_of(ask, profile, [one for one in sizes if one in profile])
        except Exception as error:
            traceback.print_exc()
            rows.append({"profile": str(profile), "error": f"{type(error).__name__}: {error}"})
        _forget()
    return rows


def _steps_of(ask: Request, profile: Profile, sizes: list[Sizes]) -> list[dict[str, Any]]:
    """The rows of one engine."""
    rows, entry = list[dict[str, Any]](), ask.engine(profile)
    with ask.session(entry) as session:
        for one in sizes:
            feeds = ask.feeds(one)
            timing = time_component(lambda feeds=feeds: session.run(feeds), ask.device)  # type: ignore[misc]
            rows.append(
                {
                    "profile": str(profile),
                    "fixed": profile.minimum == profile.maximum,
                    "batch": one.batch,
                    "height": one.height,
                    "width": one.width,
                    "step_ms": timing.scaled(1000).to_json(),
                    "graphs": session.graph_count,
                    "build_s": entry.info.get("seconds"),
                    "package_bytes": entry.info.get("package_bytes"),
                    "parity": entry.info.get("parity"),
                    "engine": entry.name,
                    "error": None,
                }
            )
    return rows


def _forget() -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------- report


def promises(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is promised, beside what was found of it: of the parts that ran."""
    found: list[tuple[str, Any, Any, bool]] = []
    if opened := report.get("open"):
        seconds = statistics.median(opened["open_s"]["samples"])
        found.append(("open with weights, s", seconds, OPEN_LIMIT_S, seconds <= OPEN_LIMIT_S))
    if same := report.get("checkpoints"):
        wrong = [row["checkpoint"] for row in same["checkpoints"] if not row["correct"]]
        found.append(("checkpoints with more error than eager PyTorch", wrong, [], not wrong))
        found.append(("engines built for other weights", same["built"], 0, same["built"] == 0))
    if changes := report.get("changes"):
        slowest = max(changes["from_file_s"]["samples"])
        found.append(("slowest change from a file, s", slowest, CHANGE_LIMIT_S, slowest <= CHANGE_LIMIT_S))
        back = changes["a_is_back_to_the_last_bit"]
        found.append(("A comes back to the last bit", back, True, bool(back)))
        for name, memory in changes["memory"].items():
            if (grown := memory["growth"]) is not None:
                found.append((f"growth of {name} memory", grown, GROWTH_LIMIT, grown <= GROWTH_LIMIT))
    if "not_followed" in (parameters := report.get("parameters") or {}):
        lost = parameters["not_followed"]
        found.append(("parameters that are not followed", lost, [], not lost))
    return [dict(zip(("what", "found", "limit", "held"), one, strict=True)) for one in found]


PARTS: dict[str, Callable[[Request], Any]] = {
    "build": measure_build,
    "open": measure_open,
    "checkpoints": measure_checkpoints,
    "changes": measure_changes,
    "parameters": measure_parameters,
    "steps": measure_steps,
}


def measure(ask: Request, names: list[str], report: dict[str, Any], output: Path) -> None:
    """Run the parts into a report, which is written after each."""
    for name in names:
        ask.console.note(f"{name} ...")
        start = time.perf_counter()
        try:
            if name in ("checkpoints", "changes") and not ask.checkpoint("B").exists():
                write_checkpoints(ask)
            report["rows" if name == "steps" else name] = PARTS[name](ask)
        except Exception:
            traceback.print_exc()
            report["errors"][name] = traceback.format_exc()[-3000:]
        report["seconds"][name] = round(time.perf_counter() - start, 3)
        report["promises"] = promises(report)
        output.write_text(json.dumps(report, indent=1) + "\n")
        _forget()


def profiles_of(args: argparse.Namespace, model: Model) -> tuple[Profile, ...]:
    """The profiles of the engines of the component, each once."""
    own_height, own_width = model.default_size()
    height, width = Range.of(args.height or own_height), Range.of(args.width or own_width)
    fixed = [Profile(Range.of(2 * int(images)), height, width) for images in args.batches.split(",")]
    more = [Profile.parse(text, fixed[0]) for text in args.profile]
    return tuple(dict.fromkeys(profile_of(args.component, profile) for profile in [*fixed, *more]))


def request_of(args: argparse.Namespace, folder: Path) -> Request:
    """What the arguments ask for."""
    backend = registry.get(BACKEND)
    model = resolve_model(ModelSpec(args.model))
    return Request(
        model,
        args.component,
        args.precision or backend.default_precision(),
        profiles_of(args, model),
        EngineDirectory(args.engine_dir),
        torch.device(backend.device()),
        resolve_model(ModelSpec(args.other)) if args.other else None,
        args.changes,
        folder,
        Console(),
    )


def about(ask: Request) -> dict[str, Any]:
    """What decides the figures."""
    driver = meters.driver_version()
    versions = host.library_versions() | ({} if driver is None else {"driver": driver})
    if ask.device.type == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "triton": host.library_version("triton") or "?"}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "host": host.facts() | {"cxx": os.environ.get("CXX")},
        "versions": versions,
        "model": ask.model.name,
        "component": ask.component,
        "precision": ask.precision,
        "device": str(ask.device),
        "errors": {},
        "seconds": {},
    }


def arguments() -> argparse.Namespace:
    """Those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--other", help="a model of the same architecture: checkpoint B; else one is made with noise")
    parser.add_argument("--component", default="unet", choices=COMPONENTS)
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"))
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--batches", default="1", metavar="N,N", help="images: a fixed engine each")
    parser.add_argument("--profile", action="append", default=[], metavar="batch=2:2:8,…", help="one more engine")
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--parts", default=",".join(PARTS), metavar="NAME,NAME", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--engine-dir", type=Path, help="where engines are kept; else they go with the process")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if unknown := set(args.parts.split(",")) - PARTS.keys():
        parser.error(f"there is no part {min(unknown)}: {', '.join(PARTS)}")
    return args


def main() -> int:
    """Measure, write the JSON; the promises go to stderr."""
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="sdtrt-packages-") as folder:
        args.engine_dir = args.engine_dir or Path(folder) / "engines"
        args.engine_dir.mkdir(exist_ok=True)
        ask = request_of(args, Path(folder))
        report = about(ask)
        measure(ask, args.parts.split(","), report, args.output)
    for one in report["promises"]:
        print(f"{'held' if one['held'] else 'BROKEN'}: {one['what']}: {one['found']} ({one['limit']})", file=sys.stderr)
    return 1 if report["errors"] or any(row.get("error") for row in report.get("rows", ())) else 0


if __name__ == "__main__":
    sys.exit(main())
