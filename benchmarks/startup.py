"""Where the time goes from the shell to the first denoising step: whole processes, engines built, files in memory.

    python benchmarks/startup.py --model sd15 --backend tensorrt --height 512 --width 512 --output startup.json
    python benchmarks/startup.py --model sd15 --backend inductor --height 512 --width 512 --steps 3 --output FILE

`seconds` is a whole command of one step (or of `--steps`: a CUDA graph is captured in the second one): it holds the
VAE's decoding, the PNG and the process's end as well. `timeline` is another process of the same command with marks from
outside (`startup_marks.py`), in seconds since the process began;
`nothing_ahead` the same without what sdtrt does in the background. Where there is a GPU, `gpu_held` is the same while
another process keeps the GPU initialised: the driver's own start then falls away, as with persistence mode.
`no_bytecode` is the whole command where Python finds no `.pyc` and may write none: a host with
PYTHONDONTWRITEBYTECODE whose libraries were unpacked without them is like that. In all other runs they may be written,
and are, by the first one, which is not counted. `floors` are the machine's own: one library or one driver call in a
process of its own. `imports` are the slowest of `python -X importtime`. What was left out says why.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import sdtrt
from sdtrt.common import host

MARKS = Path(__file__).with_name("startup_marks.py")
ROOT = Path(sdtrt.__file__).parents[1]
FIRST_STEP = "the first call of the UNet"
NO_ENGINE = "no engine runs the UNet: name a --backend other than torch"
SLOWEST = 25
SHOWN_S = 0.02  # spans shorter than that are in the JSON only
LARGE_LIBRARY = 10_000_000  # bytes: smaller ones take no time to read
LIMIT_S = 300
GPU_DEVICE = Path("/dev/nvidiactl")  # to ask the driver would initialise the GPU
IMPORT_LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|\s+(\S+)$", re.MULTILINE)

Marks = dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """How processes are run: sdtrt's arguments, a folder for what they write, how often."""

    arguments: tuple[str, ...]
    folder: Path
    repeats: int

    def seconds(self, **variables: str) -> float:
        """Wall-clock seconds of a whole command."""
        begin = time.perf_counter()
        run([sys.executable, "-m", "sdtrt", *self.arguments], **variables)
        return time.perf_counter() - begin

    def marked(self, *arguments: str) -> Marks:
        """What one process of `startup_marks.py` has noted, and its wall-clock seconds as `whole`."""
        file = self.folder / "marks.json"
        begin = time.perf_counter()
        run([sys.executable, str(MARKS), arguments[0], str(file), *arguments[1:]])
        whole = time.perf_counter() - begin
        return {**json.loads(file.read_text()), "whole": whole}


def environment(**variables: str) -> dict[str, str]:
    """The environment of a process that is timed: `.pyc` may be written, as on a machine that is in use."""
    found = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    paths = os.pathsep.join(filter(None, [str(ROOT), found.get("PYTHONPATH", "")]))
    return {**found, "PYTHONPATH": paths, **variables}


def run(command: Sequence[str], **variables: str) -> str:
    """Run a process that must succeed; returns its stderr."""
    done = subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command[1:4])} … failed: {done.stderr.strip()[-1000:]}")
    return done.stderr


def samples(values: Sequence[float]) -> dict[str, Any]:
    """A figure with all that it is the median of."""
    return {"median": round(median(values), 3), "samples": [round(value, 3) for value in values]}


def timeline(runs: Sequence[Marks]) -> dict[str, Any]:
    """Several runs of one command as one: each span by its name and its count, with medians over the runs."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in runs:
        seen: dict[str, int] = {}
        for span in one["spans"]:
            number = seen[span["name"]] = seen.get(span["name"], -1) + 1
            found.setdefault((span["name"], number), []).append(span)
    rows = [_row(name, spans) for (name, _), spans in found.items()]
    counts = ("modules", "modules_compiled", "compiling_s", "end", "whole")
    return {
        **{name: samples([one[name] for one in runs]) for name in counts},
        "usage": {name: samples([one["usage"][name] for one in runs]) for name in runs[0]["usage"]},
        "spans": sorted(rows, key=lambda row: (row["begin"], -row["end"])),
    }


def command_timeline(runs: Sequence[Marks]) -> dict[str, Any]:
    """The timeline of a command, with the end of its first step."""
    steps = [span["end"] for one in runs for span in one["spans"] if span["name"] == FIRST_STEP]
    if len(steps) != len(runs):
        raise RuntimeError(NO_ENGINE)  # as `auto` may choose
    return {"first_step_s": samples(steps), **timeline(runs)}


def _row(name: str, spans: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One span of a timeline."""
    used = [key for key in spans[0] if key not in ("name", "begin", "end", "thread")]
    return {
        "name": name,
        "thread": spans[0]["thread"],
        **{key: round(median(span[key] for span in spans), 3) for key in ("begin", "end", *used)},
        "seconds": round(median(span["end"] - span["begin"] for span in spans), 3),
        "samples": [[round(span["begin"], 3), round(span["end"], 3)] for span in spans],
    }


def measure_command(runs: Runs) -> dict[str, Any]:
    """The whole command, its timeline, and that with nothing in the background; they take turns."""
    turns = []
    for _ in range(runs.repeats):
        plain, ahead = runs.seconds(), runs.marked("command", *runs.arguments)
        turns.append((plain, ahead, runs.marked("command", "--nothing-ahead", *runs.arguments)))
    wholes, marked, nothing_ahead = zip(*turns, strict=True)
    return {
        "seconds": samples(wholes),
        "timeline": command_timeline(marked),
        "nothing_ahead": command_timeline(nothing_ahead),
        "libraries": _libraries(marked[0]["libraries"]),
        "floors": {"read libraries": lambda: floor(runs, "read", *_large(marked[0]["libraries"]))}
        | {"read engines": lambda: floor(runs, "read", *marked[0]["engine_files"])},
    }


def _large(libraries: dict[str, int]) -> list[str]:
    return [path for path, size in libraries.items() if size >= LARGE_LIBRARY]


def _libraries(libraries: dict[str, int]) -> dict[str, Any]:
    """The shared libraries that a command maps, the largest by name."""
    largest = sorted(_large(libraries), key=lambda path: -libraries[path])
    return {
        "count": len(libraries),
        "bytes": sum(libraries.values()),
        "largest": {Path(path).name: libraries[path] for path in largest},
    }


def floor(runs: Runs, *arguments: str) -> dict[str, Any]:
    """One of the machine's own floors, several times; why, where it fails."""
    return or_why(lambda: timeline([runs.marked("floor", *arguments) for _ in range(runs.repeats)]))


def or_why(take: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Figures, or why there are none: the others are not lost with them."""
    try:
        return take()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return {"left_out": str(error).splitlines()[-1]}


def floors_of(backend: str) -> dict[str, tuple[str, ...]]:
    """The floors that don't depend on a run, as arguments of `startup_marks.py`."""
    found: dict[str, tuple[str, ...]] = {"python": ("python",), "torch": ("torch",), "diffusers": ("diffusers",)}
    if GPU_DEVICE.exists():
        found |= {"driver": ("driver",), "torch, CUDA": ("cuda",)}
    libraries = {"onnxruntime": "onnxruntime", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
    if backend in libraries:
        found[libraries[backend]] = ("library", libraries[backend])
    return found


@contextmanager
def gpu_held(folder: Path) -> Iterator[None]:
    """Keep the GPU initialised by another process for the time of a `with`."""
    command = [sys.executable, str(MARKS), "floor", str(folder / "held.json"), "hold"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True)
    with holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            raise RuntimeError("the GPU can't be held: see stderr")
        try:
            yield
        finally:
            holder.stdin.close()


def measure_held(runs: Runs, floors: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """The command and the driver's floors once more while another process holds the GPU."""
    if not GPU_DEVICE.exists():
        return {"left_out": "no NVIDIA GPU"}
    runs = replace(runs, repeats=min(runs.repeats, 2))
    with gpu_held(runs.folder):
        found = measure_command(runs)
        del found["floors"], found["libraries"]
        return {**found, "floors": {name: floor(runs, *floors[name]) for name in ("driver", "torch, CUDA")}}


def measure_no_bytecode(runs: Runs) -> dict[str, Any]:
    """The whole command where every module is compiled from its source."""
    empty = runs.folder / "no-bytecode"
    empty.mkdir()
    variables = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(empty)}
    return samples([runs.seconds(**variables) for _ in range(min(runs.repeats, 2))])


def slowest_imports(runs: Runs) -> dict[str, Any]:
    """The slowest imports of the command by their own time, and of top-level packages by the sum of that."""
    text = run([sys.executable, "-X", "importtime", "-m", "sdtrt", *runs.arguments])
    rows = [(int(own), int(inclusive), name) for own, inclusive, name in IMPORT_LINE.findall(text)]
    packages: dict[str, int] = {}
    for own, _, name in rows:
        package = name.partition(".")[0]
        packages[package] = packages.get(package, 0) + own
    slowest = [{"name": name, "own_us": own, "inclusive_us": all_of_it} for own, all_of_it, name in sorted(rows)[::-1]]
    return {
        "count": len(rows),
        "own_us": sum(packages.values()),
        "slowest": slowest[:SLOWEST],
        "packages_us": dict(sorted(packages.items(), key=lambda item: -item[1])[:SLOWEST]),
    }


def settings() -> dict[str, Any]:
    """What of the machine's settings matters here."""
    asked = ("PYTHONDONTWRITEBYTECODE", "CUDA_MODULE_LOADING", "OMP_NUM_THREADS")
    query = ["nvidia-smi", "--query-gpu=persistence_mode", "--format=csv,noheader"]
    try:
        persistence = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError):
        persistence = []
    return {**{name: os.environ.get(name) for name in asked}, "persistence_mode": persistence}


def table(report: dict[str, Any]) -> str:
    """The figures for people."""
    parts = [f"{'begin':>8}{'end':>8}{'seconds':>9}{'CPU':>7}  timeline (seconds since the process began)"]
    for row in report["timeline"]["spans"]:
        if row["seconds"] >= SHOWN_S or row["name"] == FIRST_STEP:
            cpu = row["user_s"] + row["system_s"]
            where = "" if row["thread"] == "main" else f" [{row['thread']}]"
            times = f"{row['begin']:8.2f}{row['end']:8.2f}{row['seconds']:9.2f}{cpu:7.2f}"
            parts.append(f"{times}  {row['name']}{where}")
    rows = {"whole command": report["seconds"], "with no .pyc": report["no_bytecode"]}
    for name in ("timeline", "nothing_ahead"):
        rows[f"first step, {name.replace('_', ' ')}"] = report[name]["first_step_s"]
    if "seconds" in report["gpu_held"]:
        rows["whole command, GPU held"] = report["gpu_held"]["seconds"]
        rows["first step, GPU held"] = report["gpu_held"]["timeline"]["first_step_s"]
    floors = report["floors"] | {f"{name}, GPU held": one for name, one in report["gpu_held"].get("floors", {}).items()}
    rows |= {f"floor: {name}": one["whole"] for name, one in floors.items() if "whole" in one}
    parts += [f"{figure['median']:9.2f} s  {name}" for name, figure in rows.items() if "median" in figure]
    compiled = report["timeline"]["modules_compiled"]["median"]
    parts.append(f"{compiled:9.0f}    modules compiled from source, of {report['timeline']['modules']['median']:.0f}")
    return "\n".join(parts)


def measure(runs: Runs, backend: str) -> dict[str, Any]:
    """All figures, after a process that is not counted."""
    runs.seconds()
    found = measure_command(runs)
    of_run: dict[str, Callable[[], dict[str, Any]]] = found.pop("floors")
    floors = floors_of(backend)
    held = or_why(lambda: measure_held(runs, floors))
    return {
        **found,
        "gpu_held": held,
        "no_bytecode": or_why(lambda: measure_no_bytecode(runs)),
        "floors": {name: floor(runs, *arguments) for name, arguments in floors.items()}
        | {name: take() for name, take in of_run.items()},
        "imports": or_why(lambda: slowest_imports(runs)),
    }


def main() -> None:
    """Measure and write the JSON; a table goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.backend == "torch":
        parser.error(NO_ENGINE)
    if not args.output.parent.is_dir():
        parser.error(f"there is no folder {args.output.parent}")
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["txt2img", "--model", args.model, "--backend", args.backend]
        arguments += [
            "--height",
            str(args.height),
            "--width",
            str(args.width),
            "--seed",
            "1",
            "--steps",
            str(args.steps),
        ]
        arguments += ["--prompt", "a red circle", "--quiet", "--no-build", "--overwrite", "--output", f"{folder}/a.png"]
        figures = measure(Runs(tuple(arguments), Path(folder), args.repeats), args.backend)
    asked = shlex.join(["python", *sys.argv])
    about = {"command": asked, "host": host.facts(), "versions": host.library_versions(), "settings": settings()}
    args.output.write_text(json.dumps({**about, **figures}, indent=1) + "\n")
    print(table(figures), file=sys.stderr)


if __name__ == "__main__":
    main()
