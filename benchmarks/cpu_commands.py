"""Time whole commands that take turns: from the shell to their end, and the processor time that they and theirs took.

    python benchmarks/cpu_commands.py --repeats 7 --output FILE "sdtrt txt2img -b openvino ..." "sdtrt txt2img ..."

A first run of each is not counted: it may build engines. On a busy machine the least processor time tells most.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import time
from pathlib import Path


def run(command: str) -> dict[str, float]:
    """Run a command; seconds until its end, and of processor time."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(shlex.split(command), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 2), "processor_seconds": round(used, 2)}


def main() -> None:
    """Let the commands take turns, and print or write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    runs: dict[str, list[dict[str, float]]] = {command: [] for command in args.commands}
    for turn in range(args.repeats + 1):
        for command, own in runs.items():
            found = run(command)
            if turn:
                own.append(found)
    least = {
        command: {name: min(one[name] for one in own) for name in ("seconds", "processor_seconds")}
        for command, own in runs.items()
    }
    load_average = {"before": load, "after": os.getloadavg()[0]}
    text = json.dumps({"least": least, "runs": runs, "load_average": load_average}, indent=1)
    print(text)
    if args.output is not None:
        args.output.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
