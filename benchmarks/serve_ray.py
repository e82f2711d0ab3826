"""Pictures a second of servers with one and with two workers, by Ray's replicas or by processes of `--gpus`.

    python benchmarks/serve_ray.py --engine-dir FOLDER/engines --model FOLDER/sd15 --backend inductor \\
        --sizes 512x512 --steps 50 --output FOLDER/serve-ray.json
    python benchmarks/serve_ray.py --by gpus ... (on a host without Ray: the same with --gpus 0 and --gpus 0,1)

Engines of 1, 2, 4 and 8 pictures come from `benchmarks/serve_on_gpu.sh FOLDER`, or are built when first wanted.
Both servers get the same requests, those of `serve_load.py`, twice: first to open all pipelines, then to be timed. The
goal is that two have 1.9 times the pictures of one. `--requests 24 --clients 8 --sizes 64x64 --steps 4` tries it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serve_load import Load, loaded, made_between, numbers_of, sizes_of, tell

from sdtrt.common import host

WORKERS = {
    "ray": (("--ray", "--replicas", "1"), ("--ray", "--replicas", "2")),
    "gpus": (("--gpus", "0"), ("--gpus", "0,1")),
}


def measure(options: argparse.Namespace, folder: Path, words: tuple[str, ...]) -> dict[str, Any]:
    """Load one server twice, and say what came of it the second time."""
    sizes = sizes_of(options)
    with loaded(options, folder, *words) as (_, port):
        send_all(Load(port, sizes, options.steps), options)
        load, before = Load(port, sizes, options.steps), numbers_of(port)
        seconds = send_all(load, options)
        after = numbers_of(port)
    batches, pictures = made_between(before, after)
    return {
        "options": list(words),
        "ends": dict(load.ends),
        "wrong": load.wrong,
        "pictures_per_s": round(len(load.seconds) / seconds, 3),
        "pictures_per_batch": round(pictures / batches, 2),
    }


def send_all(load: Load, options: argparse.Namespace) -> float:
    """Send all requests; the seconds that they took."""
    began = time.perf_counter()
    with ThreadPoolExecutor(options.clients) as pool:
        list(pool.map(load.send, range(options.requests)))
    return time.perf_counter() - began


def main() -> None:
    """Measure, show, and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--by", choices=tuple(WORKERS), default="ray")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--engine-dir", type=Path)
    parser.add_argument("--sizes", default="64x64")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one, two = (measure(options, Path(folder), words) for words in WORKERS[options.by])
    report = {
        "command": shlex.join(["python", "benchmarks/serve_ray.py", *sys.argv[1:]]),
        "host": host.facts(),
        "one": one,
        "two": two,
        "times_as_many_pictures": round(two["pictures_per_s"] / one["pictures_per_s"], 2),
    }
    tell(report, options.output)
    sys.exit(1 if one["wrong"] or two["wrong"] else 0)


if __name__ == "__main__":
    main()
