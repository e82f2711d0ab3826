"""From the shell to an image of one denoising step: whole processes, engines built and files in the page cache.

    python benchmarks/startup.py --model sd15 --backend tensorrt --height 512 --width 512 --output startup.json

What a command takes before its first step ends is less than these seconds: they hold the VAE's decoding and writing the
PNG as well.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sdtrt import host


def seconds_of(command: list[str]) -> float:
    """Wall-clock seconds of a process that must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Measure after one process that is not counted, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sdtrt", "txt2img", "--model", args.model, "--backend", args.backend]
        command += ["--height", str(args.height), "--width", str(args.width), "--steps", "1", "--seed", "1"]
        command += ["--prompt", "a red circle", "--quiet", "--no-build", "--overwrite", "--output", f"{folder}/a.png"]
        samples = [seconds_of(command) for _ in range(args.repeats + 1)][1:]
    figures = {"seconds": {"median": sorted(samples)[len(samples) // 2], "samples": samples}}
    asked = shlex.join(["python", *sys.argv])
    report = {"command": asked, "host": host.facts(), "versions": host.library_versions(), **figures}
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
