"""What memory an engine of the backend openvino takes, or a whole command: the process's own, and that of mapped files.

    python benchmarks/cpu_memory.py engine engines/unet-openvino-fp32-0123456789abcdef --output engine.json
    python benchmarks/cpu_memory.py command --output command.json -- sdtrt txt2img -b openvino -p "a lighthouse"

`VmHWM` is the most that was in memory at once, by the system's own count. `RssAnon` is memory of the process's own, and
`RssFile` pages of mapped files, which the system can take back and read again. For a command these two are the most
that was seen, every hundredth of a second, so that their sum can be more than `VmHWM`. Linux only.
"""

from __future__ import annotations

import sdtrt  # noqa: F401  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import json
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

FIELDS = ("VmHWM", "RssAnon", "RssFile")
EVERY_SECONDS = 0.01


def memory_gib(process: int | str = "self") -> dict[str, float]:
    """What a process holds now; nothing of one that has ended."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    found = dict(line.split(":", 1) for line in lines if line.startswith(FIELDS))
    return {name: round(int(value.split()[0]) / 2**20, 3) for name, value in found.items()}


def of_engine(folder: Path) -> dict[str, Any]:
    """What one engine takes in this process: before it is opened, open, and after a run at its largest size."""
    import torch

    from sdtrt.backends.open import open_session
    from sdtrt.engines.directory import EngineDirectory
    from sdtrt.exports.feeds import seeded_feeds

    entries = EngineDirectory(folder.parent).entries("engine")
    entry = next(one for one in entries if one.path.name == folder.name)
    (profile,) = entry.engine_key.profiles
    stages = {"before": memory_gib()}
    with open_session(entry, torch.device("cpu")) as session:
        stages["open"] = memory_gib()
        session.run(seeded_feeds(session.contract, profile.maximum))
        stages["after a run"] = memory_gib()
    return {"engine": entry.name, "file_bytes": entry.size_bytes, "sizes": str(profile.maximum), "gib": stages}


def of_command(command: list[str]) -> dict[str, Any]:
    """The most that a command holds, from its start to its end. Children of it are not counted."""
    most: dict[str, float] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with suppress(OSError):  # it may end at any time
                for name, value in memory_gib(process.pid).items():
                    most[name] = max(value, most.get(name, 0.0))
            time.sleep(EVERY_SECONDS)
    return {"command": command, "exit_code": process.returncode, "most_gib": most}


def main() -> None:
    """Measure, and print or write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("engine", "command"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("what", nargs="+", help="an engine's folder, or a command after --")
    args = parser.parse_args()
    found = of_engine(Path(args.what[0]).absolute()) if args.kind == "engine" else of_command(args.what)
    text = json.dumps(found, indent=1)
    print(text)
    if args.output is not None:
        args.output.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
