"""A server under load: many clients by all interfaces, some broken, some leaving early; with and without batches.

    python benchmarks/serve_load.py --requests 2000 --clients 64 --alone 500 --output benchmarks/serve-load-cpu.json
    python benchmarks/serve_load.py --model FOLDER --sizes 512x512 --steps 20 --requests 200 --output load-gpu.json

It starts `sdtrt serve` with engines for its sizes, then another one with `--max-batch 1`, and sends both the same (the
second one the first `--alone` requests of it). Every accepted request must get one picture, which carries its own
prompt, seed and size, or an error with a hint. The report has times from the request to its picture, batch sizes,
pictures a second, the processor time of the server and of its worker, and their memory over time.
`--requests 40 --clients 8` tries it.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from sdtrt.common import host

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from served import serving

PROMPTS = ("a red circle", "a blue star on a black background", "a small green square", "a cyan ring")
LEAVES_AFTER_S = 0.05
SHARES = (30, 30, 30, 5, 5)  # of a hundred requests: native, OpenAI, web UI, broken, leaving
SAMPLES = 20  # of the memory


@dataclass
class Load:
    """What is sent to one server, and what came of it."""

    port: int
    sizes: Sequence[tuple[int, int]]
    steps: int
    seconds: list[float] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, number: int) -> None:
        """Send one request, of a kind that its number says."""
        draw = random.Random(number)
        kind = draw.choices(("native", "openai", "webui", "broken", "leaving"), SHARES)[0]
        began = time.perf_counter()
        try:
            end = getattr(self, f"_{kind}")(draw)
        except Exception as error:
            end = f"{type(error).__name__}: {error}"
        with self.lock:
            self.ends[f"{kind}: {end}"] += 1
            if end == "made":
                self.seconds.append(time.perf_counter() - began)
            elif kind not in ("broken", "leaving"):
                self.wrong.append(end)

    def _ask(self, path: str, body: dict[str, Any], timeout: float = 600) -> dict[str, Any]:
        """The answer; where there is no room, that of another try."""
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
            try:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
                answer = connection.getresponse()
                status, data = answer.status, json.loads(answer.read())
            finally:
                connection.close()
            if status != 429:
                return {"status": status, **data}
            time.sleep(0.2)

    def _get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("GET", path)
        data = connection.getresponse().read()
        connection.close()
        return data

    def _judge(self, data: bytes, prompt: str, seed: int, size: tuple[int, int]) -> str:
        """Whether a picture is of its request, by what it carries and its size."""
        with Image.open(io.BytesIO(data)) as image:
            told = json.loads(image.info["sdtrt"])
            same = (told["prompt"], told["seed"], image.size) == (prompt, seed, size)
        return "made" if same else f"another's picture: {told['prompt']}, {told['seed']}, {image.size}"

    def _native(self, draw: random.Random) -> str:
        prompt, seed, size = draw.choice(PROMPTS), draw.randrange(2**32), draw.choice(self.sizes)
        body = {"prompt": prompt, "seed": seed, "width": size[0], "height": size[1], "steps": self.steps}
        told = self._ask("/api/v1/jobs", body)
        self._get(f"/api/v1/jobs/{told['id']}/events")
        told = json.loads(self._get(f"/api/v1/jobs/{told['id']}"))
        if len(told["images"]) != 1:
            return f"{len(told['images'])} pictures for one"
        return self._judge(self._get(told["images"][0]["url"]), prompt, seed, size)

    def _openai(self, draw: random.Random) -> str:
        prompt, seed, size = draw.choice(PROMPTS), draw.randrange(2**32), draw.choice(self.sizes)
        body = {"prompt": prompt, "seed": seed, "size": f"{size[0]}x{size[1]}", "num_inference_steps": self.steps}
        told = self._ask("/v1/images/generations", body)
        (one,) = told["data"]
        return self._judge(base64.b64decode(one["b64_json"]), prompt, seed, size)

    def _webui(self, draw: random.Random) -> str:
        prompt, seed, size = draw.choice(PROMPTS), draw.randrange(2**32), draw.choice(self.sizes)
        body = {"prompt": prompt, "seed": seed, "width": size[0], "height": size[1], "steps": self.steps}
        told = self._ask("/sdapi/v1/txt2img", {**body, "cfg_scale": 7.5})
        (one,) = told["images"]
        return self._judge(base64.b64decode(one), prompt, seed, size)

    def _broken(self, draw: random.Random) -> str:
        broken: dict[str, Any] = draw.choice(
            [{"steps": 0}, {"width": 65}, {"prompt": 7}, {"model": "x"}, {"mask": "aGk="}, {"x": 1}]
        )
        told = self._ask("/api/v1/jobs", {"prompt": "x", **broken})
        return "refused" if told["status"] in (400, 422) and told["error"]["hint"] else f"not refused: {told}"

    def _leaving(self, draw: random.Random) -> str:
        size = draw.choice(self.sizes)
        body = {"prompt": "left alone", "n": 2, "size": f"{size[0]}x{size[1]}", "num_inference_steps": self.steps}
        with suppress(TimeoutError):
            self._ask("/v1/images/generations", body, LEAVES_AFTER_S)
        return "left"


@contextmanager
def loaded(options: argparse.Namespace, folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server that is ready, and its port; its log goes into the folder."""
    words = ["--model", options.model, "--warm", options.sizes, "--backend", options.backend]
    words += ["--keep-mib", "1"]  # what it keeps for those who come back is soon as much as it ever is
    words += ["--engine-dir", str(options.engine_dir or folder / "engines"), *more]
    with (folder / "log").open("a") as log, serving(*words, log=log) as (server, url):
        yield server, int(url.rpartition(":")[2])


def sizes_of(options: argparse.Namespace) -> list[tuple[int, int]]:
    """The pictures' sizes, (width, height)."""
    return [(int(one.split("x")[0]), int(one.split("x")[1])) for one in options.sizes.split(",")]


def made_between(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[float, float]:
    """The batches and the pictures that were made between two readings of the metrics."""
    count, total = (
        after[f"sdtrt_batch_pictures_{name}"] - before[f"sdtrt_batch_pictures_{name}"] for name in ("count", "sum")
    )
    return count, total


def tell(report: Mapping[str, Any], output: Path | None) -> None:
    """Print a report, and write it where that is asked for."""
    text = json.dumps(report, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [two for one in map(int, task.read_text().split()) for two in (one, *children_of(one))]
    return found


def memory_bytes(pids: Sequence[int]) -> int:
    """What processes have in the machine's memory."""
    total = 0
    for one in pids:
        with suppress(OSError):
            status = Path(f"/proc/{one}/status").read_text()
            total += next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))
    return total


def processor_s(pids: Sequence[int]) -> float:
    """The processor time that processes have taken, in seconds."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


def batch_sizes(port: int) -> dict[str, float]:
    """How many calls made how many pictures at most, by the server's metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    found, below = {}, 0.0
    for line in lines:
        if line.startswith('sdtrt_batch_pictures_bucket{le="'):
            size, count = line.split('"')[1], float(line.split()[-1])
            found[size], below = count - below, count
    return {size: count for size, count in found.items() if count}


def numbers_of(port: int) -> dict[str, float]:
    """The server's metrics without labels."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#") and "{" not in line)
    return {name: float(value) for name, value in pairs}


def measure(options: argparse.Namespace, requests: int, folder: Path, *more: str) -> dict[str, Any]:
    """Load one server, and say what came of it."""
    own = () if options.gpus is None else ("--gpus", options.gpus)
    with loaded(options, folder, *own, *more) as (server, port):
        load, every = Load(port, sizes_of(options), options.steps), requests / SAMPLES
        parts = {"server": [server.pid], "worker": children_of(server.pid)}
        memory = [{name: memory_bytes(pids) for name, pids in parts.items()}]
        used = {name: processor_s(pids) for name, pids in parts.items()}
        before, began = numbers_of(port), time.perf_counter()
        with ThreadPoolExecutor(options.clients) as pool:
            for number, _ in enumerate(pool.map(load.send, range(requests)), 1):
                if number >= len(memory) * every:
                    memory.append({name: memory_bytes(pids) for name, pids in parts.items()})
        seconds, after = time.perf_counter() - began, numbers_of(port)
        used = {name: processor_s(pids) - used[name] for name, pids in parts.items()}
        calls = batch_sizes(port)
    batches, pictures = made_between(before, after)
    cuts = statistics.quantiles(load.seconds, n=100)
    return {
        "options": list(more),
        "requests": requests,
        "ends": dict(load.ends),
        "wrong": load.wrong,
        "pictures_per_s": round(len(load.seconds) / seconds, 3),
        "request_s": {"p50": round(cuts[49], 3), "p90": round(cuts[89], 3), "p99": round(cuts[98], 3)},
        "pictures_per_batch": round(pictures / batches, 2),
        "calls_of_so_many_pictures_at_most": calls,
        "pictures": pictures,
        "processor_ms_per_picture": {name: round(1000 * used[name] / pictures, 2) for name in used},
        "workers_that_ended": after["sdtrt_worker_ends_total"],
        "memory_mib": {name: [round(one[name] / 2**20) for one in memory] for name in parts},
        "memory_growth_after_a_tenth": {
            name: round(max(one[name] for one in memory[2:]) / memory[2][name] - 1, 4) for name in parts
        },
    }


def _ms(report: dict[str, Any]) -> float:
    """The processor time of one picture."""
    return float(sum(report["processor_ms_per_picture"].values()))


def main() -> None:
    """Measure, show, and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--engine-dir", type=Path)
    parser.add_argument("--gpus", help="as of sdtrt serve: a process for each")
    parser.add_argument("--sizes", default="64x64,96x64")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--alone", type=int, help="of them, to the server without batches; by default all")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        batched = measure(options, options.requests, Path(folder))
        alone = measure(options, options.alone or options.requests, Path(folder), "--max-batch", "1")
    report = {
        "command": shlex.join(["python", "benchmarks/serve_load.py", *sys.argv[1:]]),
        "host": host.facts(),
        "batched": batched,
        "alone": alone,
        "times_as_many_pictures": round(batched["pictures_per_s"] / alone["pictures_per_s"], 2),
        "processor_time_alone_to_batched": round(_ms(alone) / _ms(batched), 2),
        "load_average": os.getloadavg(),
    }
    tell(report, options.output)
    sys.exit(1 if batched["wrong"] or alone["wrong"] else 0)


if __name__ == "__main__":
    main()
