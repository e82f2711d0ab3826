"""The client of `fault_server.py`: folders with a user's own files, jobs with faults, and what must hold after."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from factories import sha256_of

REPOSITORY = Path(__file__).resolve().parents[1]
KINDS = ("export", "file", "build", "images", "image")
# A user's own files, where jobs write; the second has the name that the first image would take.
PRECIOUS = {"out/holiday.jpg": b"my own", "out/a-red-circle-1.png": b"mine, too", "engines/README.md": b"notes"}


@dataclass
class Server:
    """The forking server's other end."""

    process: subprocess.Popen[str]
    log: Path

    def ask(self, job: str, folder: Path, **fault: Any) -> dict[str, Any]:
        """Run a job there, with a fault or without."""
        self.process.stdin.write(json.dumps({"job": job, "folder": str(folder), "fault": fault}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the server has died:\n{self.log.read_text()}"
        return json.loads(line)


@contextmanager
def served(place: Path) -> Iterator[Server]:
    """A running server, its model in `place`."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests"))),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, str(REPOSITORY / "tests" / "fault_server.py"), str(place / "model")]
    with (
        (place / "server.log").open("w") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as process,
    ):
        line = process.stdout.readline()
        server = Server(process, place / "server.log")
        assert line, server.log.read_text()
        yield server
        process.stdin.close()


def new_folder(path: Path) -> Path:
    """A folder of a user's: an engine directory and a place for results, with files in both."""
    for name, content in PRECIOUS.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


@dataclass
class Campaign:
    """Many faults, one after the other, in one folder that is never tidied in between: what is left over stays."""

    server: Server
    folder: Path
    references: dict[str, str] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def learn(self) -> None:
        """Run every job undisturbed, twice: what is right, and how long it takes where all that it needs is there."""
        for kind in (*KINDS, *KINDS):
            self._forget(kind)
            ended = self.server.ask(kind, self.folder)
            assert ended["end"] == "done", ended
            self.references[kind] = ended["value"]
            self.operations[kind] = ended["operations"]
            self.seconds[kind] = ended["seconds"]

    def strike(self, kind: str, **fault: Any) -> str:
        """Run a job with a fault, then look at everything, then run it again; returns how the first run ended."""
        self._forget(kind)
        before = self._onnx_and_image()
        ended = self.server.ask(kind, self.folder, **fault)
        what = f"{kind} with {fault}: {ended['end']}"
        if ended["end"] in ("bug", "hung"):
            self.problems.append(f"{what}: {ended['trace']}")
        if ended["end"] == "done" and ended["value"] != self.references[kind]:
            self.problems.append(f"{what}, and with a wrong result")
        self._look(what, before)
        again = self.server.ask(kind, self.folder)
        if again["end"] != "done" or again["value"] != self.references[kind]:
            self.problems.append(f"{what}; the next run: {again}")
        name = f"{kind}: {ended['end']}"
        self.counts[name] = self.counts.get(name, 0) + 1
        return str(ended["end"])

    def random_kill(self, dice: random.Random) -> str:
        """Kill a random job before a random operation, or at a random moment."""
        kind = dice.choice(KINDS)
        if dice.random() < 0.5:
            return self.strike(kind, kill_at=dice.randint(1, self.operations[kind]))
        return self.strike(kind, kill_after=dice.uniform(0, self.seconds[kind]))

    def _forget(self, kind: str) -> None:
        """Remove what a job would only find again, and the images of earlier rounds."""
        for path in (self.folder / "out").glob("a-red-circle-*"):
            if f"out/{path.name}" not in PRECIOUS:
                path.unlink()
        if kind == "build":
            for path in (self.folder / "engines").glob("unet-onnxruntime-*"):
                path.rename(path.with_name(".gone"))
                _remove(path.with_name(".gone"))

    def _onnx_and_image(self) -> dict[str, str]:
        """Digests of the two results that are replaced, where they are there."""
        paths = (self.folder / "out" / name for name in ("unet.onnx", "again.png"))
        return {path.name: sha256_of(path) for path in paths if path.exists()}

    def _look(self, what: str, before: dict[str, str]) -> None:
        """Everything that must hold after a fault."""
        found = self.server.ask("check", self.folder)
        if found["end"] != "done":
            self.problems.append(f"{what}: then the check fails: {found}")
            return
        for name, content in PRECIOUS.items():
            path = self.folder / name
            if not path.exists() or path.read_bytes() != content:
                self.problems.append(f"{what}: {name} of the user's is lost")
        right = {"unet.onnx": self.references["file"], "again.png": self.references["image"]}
        named = {path.rpartition("/")[2] for path in PRECIOUS}
        images = set(self.references["images"].split(","))
        for name, state in found["value"]:
            if name.startswith("unet-") and state != "ok":
                self.problems.append(f"{what}: the entry {name} is {state}")
            elif name in right and state not in (right[name], before.get(name)):
                self.problems.append(f"{what}: {name} is neither the old nor the new one")
            elif name.startswith("a-red-circle") and name not in named and state not in images:
                self.problems.append(f"{what}: {name} is no image that was asked for")
        lost = before.keys() - {name for name, _ in found["value"]}
        self.problems += [f"{what}: {name} is gone" for name in sorted(lost)]


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
