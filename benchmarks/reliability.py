"""The long runs behind `benchmarks/reliability.md`: random kills, a soak, and what checking digests costs.

    python benchmarks/reliability.py kills --count 500
    python benchmarks/reliability.py soak --count 1000
    python benchmarks/reliability.py digest

Each prints one JSON document. Kills and soak run on random models of Stable Diffusion 1.x's structure, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]


def kills(count: int, seed: int) -> dict[str, Any]:
    """Kill jobs at random operations and moments, in one folder that is never tidied."""
    from faults import Campaign, new_folder, served

    dice = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="sdtrt-kills-") as place, served(Path(place)) as server:
        campaign = Campaign(server, new_folder(Path(place) / "place"))
        campaign.learn()
        killed = attempts = 0
        while killed < count:
            attempts += 1
            killed += campaign.random_kill(dice) == "killed"
        left = server.ask("sweep", campaign.folder)
    return {
        "kills": killed,
        "attempts": attempts,
        "by_job": dict(sorted(campaign.counts.items())),
        "operations_of_a_job": campaign.operations,
        "broken_follow_up_runs_or_entries": len(campaign.problems),
        "problems": campaign.problems[:20],
        "leftovers_swept": left.get("value"),
    }


def soak(count: int, seed: int, each: int) -> dict[str, Any]:
    """Generate in one process, changing sizes and models; resident memory along the way."""
    from soak import run

    return dict(run(count, seed, each=each))


def digest(repeats: int) -> dict[str, Any]:
    """How long a file of 2 GB takes to be checked, from the page cache."""
    from sdtrt.common.files import sha256_file

    size = 2 * 10**9
    with tempfile.TemporaryDirectory(prefix="sdtrt-digest-") as place:
        path = Path(place) / "engine.plan"
        with path.open("wb") as file:
            block = os.urandom(10**7)
            for _ in range(size // len(block)):
                file.write(block)
        seconds = [_seconds(sha256_file, path) for _ in range(repeats)]
    return {"bytes": size, "seconds": seconds, "bytes_per_second": round(size / min(seconds))}


def _seconds(call: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return round(time.perf_counter() - start, 3)


def main() -> None:
    """Run one of the three, and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "soak", "digest"))
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--each", type=int, default=10, help="soak: images of one request")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    start = time.perf_counter()
    runs = {
        "kills": lambda: kills(chosen.count, chosen.seed),
        "soak": lambda: soak(chosen.count, chosen.seed, chosen.each),
        "digest": lambda: digest(3),
    }
    found = runs[chosen.what]()
    machine = {"system": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()}
    wall = round(time.perf_counter() - start, 1)
    print(json.dumps({"what": chosen.what, "seed": chosen.seed, **found, "wall_seconds": wall, **machine}, indent=1))


if __name__ == "__main__":
    main()
