"""Ctrl-C, SIGTERM and SIGHUP: each ends a command by itself, at any moment, and nothing is left."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from sdtrt.engines import upkeep
from sdtrt.engines.directory import EngineDirectory

REPOSITORY = Path(__file__).resolve().parents[2]
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
COUNT = int(os.environ.get("SDTRT_SIGNALS", "60"))  # of the test at random moments
SEED = int(os.environ.get("SDTRT_SIGNALS_SEED", "0"))
HINT = "hint: nothing half-done was left; finished images were kept"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX'")


def heed() -> None:
    """As in a shell's foreground, whatever these tests run in."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_DFL)


def run_program(code: str, **options) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that listens as the command does."""
    begin = "import os, signal, sys, time\nfrom pathlib import Path\nfrom sdtrt.common import interrupts\n"
    return subprocess.run(
        [sys.executable, "-c", f"{begin}{code}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        **{"preexec_fn": heed, **options},
    )


def words_of(number: signal.Signals) -> str:
    by = "" if number == signal.SIGINT else f" by {number.name}"
    return f"error: interrupted{by}\n{HINT}\n"


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("made", ["private_folder(Path(tempfile.tempdir), 'draft-')", "temporary_folder()"])
def test_a_signal_undoes_what_is_under_way_and_then_ends_the_process(tmp_path, number, made):
    code = f"""
import tempfile
from sdtrt.common.files import private_folder, temporary_folder
tempfile.tempdir = {str(tmp_path)!r}
interrupts.listen()
with {made} as folder:
    (folder / "half").write_text("done")
    try:
        signal.raise_signal({int(number)})
    except BaseException:
        print("a library has caught it")
print("went on")
"""
    ended = run_program(code)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-number, "", words_of(number))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", NUMBERS)
def test_what_the_process_was_told_to_ignore_it_ignores(number):
    """`nohup` ignores SIGHUP; a shell's jobs in the background ignore Ctrl-C."""
    code = f"interrupts.listen(); signal.raise_signal({int(number)}); print('went on')"
    ended = run_program(code, preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "went on\n", "")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_a_process_whose_main_thread_does_not_answer(number):
    """It is in C code, which Python's own handlers wait for."""
    code = f"""
import hashlib, threading
interrupts.PATIENCE_S = 0.05
interrupts.listen()
threading.Timer(0.1, os.kill, (os.getpid(), {int(number)})).start()
with interrupts.undoing(lambda: os.write(1, b"undone")):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    started = time.monotonic()
    ended = run_program(code)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-number, "undone", words_of(number))
    assert time.monotonic() - started < 20, "minutes before the main thread's answer"


def test_renames_that_belong_together_are_not_parted():
    code = """
interrupts.listen()
with interrupts.held():
    signal.raise_signal(signal.SIGTERM)
    print("both", flush=True)
print("went on")
"""
    ended = run_program(code)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "both\n")


def test_a_second_signal_does_not_cut_short_what_the_first_one_undoes():
    code = """
def undo():
    os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1); print("undone", flush=True)
interrupts.listen()
with interrupts.undoing(undo):
    signal.raise_signal(signal.SIGINT)
"""
    ended = run_program(code)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "undone\n", words_of(signal.SIGINT))


def test_a_forked_child_undoes_nothing_of_its_parent():
    code = """
interrupts.listen()
with interrupts.undoing(lambda: print("undone", flush=True)):
    child = os.fork()
    if child == 0:
        signal.raise_signal(signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(0.1)
print("went on")
"""
    ended = run_program(code)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "went on\n", "")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_shell_sees_which_signal_it_was(number, tmp_path):
    paint = f"'{sys.executable}' -m sdtrt txt2img -p x --steps 900 -b torch -o x.png"
    script = ["sh", "-c", f"timeout --preserve-status -s {int(number)} 1 {paint}"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        script, capture_output=True, text=True, timeout=60, check=False, env=environment, cwd=tmp_path, preexec_fn=heed
    )
    assert ended.returncode == 128 + number, ended.stderr
    assert ended.stderr.startswith(words_of(number))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- at random moments


COMMANDS = {
    "txt2img": "txt2img -p x --steps 500 --num-images 9 -o out",
    "txt2img, building": "txt2img -p x --steps 500 -o out --engine-dir new",
    "txt2img, torch": "txt2img -p x --steps 500 -b torch -o x.png",
    "img2img": "img2img -p x -i init.png --steps 500 -o x.jpg --overwrite",
    "export": "export --engine-dir new",
    "export to a file": "export --component unet --output unet.onnx",
    "build": "build -b onnxruntime --force",
    "verify": "verify -b onnxruntime -o report",
    "bench": "bench -b onnxruntime",
    "inspect": "inspect",
    "doctor": "doctor --json",
    "engines": "engines list",
    "engines verify": "engines verify",
    "engines rm": "engines rm unet-onnx-",
    "engines prune": "engines prune --keep-gib 0",
    "help": "--help",
}


class Struck:
    """One command in a place of its own, to which a signal is sent after a while."""

    def __init__(self, built: Path, words: str, number: signal.Signals, seconds: float) -> None:
        self.number = number
        with tempfile.TemporaryDirectory() as folder:
            self.place = Path(folder)
            for name in ("home", "tmp", "work"):
                (self.place / name).mkdir()
            shutil.copytree(built, self.place / "engines")
            Image.new("RGB", (128, 128), "red").save(self.place / "work" / "init.png")
            self.mark = str(uuid.uuid4())
            self._run(words, seconds)
            self.wrong = [*self._outcome(), *self._orphans(), *self._leftovers()]

    def _run(self, words: str, seconds: float) -> None:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("XDG_")},
            "PYTHONPATH": str(REPOSITORY),
            "SDTRT_ENGINE_DIR": str(self.place / "engines"),
            "HOME": str(self.place / "home"),
            "TMPDIR": str(self.place / "tmp"),
            "SDTRT_TEST_MARK": self.mark,
        }
        with subprocess.Popen(
            [sys.executable, "-m", "sdtrt", *words.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=self.place / "work",
            preexec_fn=heed,
        ) as running:
            time.sleep(seconds)
            self.was_done = running.poll() is not None
            running.send_signal(self.number)
            sent = time.monotonic()
            try:
                self.out, self.err = running.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                running.kill()
                self.out, self.err = running.communicate()
            self.seconds = time.monotonic() - sent
        self.code = running.returncode

    @property
    def end(self) -> str:
        """In a word: `done` where it came too late, `python` where Python had not come to the command yet."""
        if self.code == 0 and (self.was_done or self.seconds < 0.1):
            return "done"
        if "Traceback" in self.err and "sdtrt/" not in self.err:
            return "python"
        return "ended" if self.code == -self.number else "wrong"

    def _outcome(self) -> list[str]:
        if self.end == "wrong" or (self.end == "ended" and "Traceback" in self.err):
            return [f"{self.code} after {self.seconds:.1f} s: {self.err[-2000:]}"]
        return []

    def _orphans(self) -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in path.read_bytes():
                    found.append((path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return [f"runs on: {command}" for command in found]

    def _leftovers(self) -> list[str]:
        places = [self.place / "tmp", self.place / "home"]
        places += [
            self.place / folder / name for folder in ("engines", "work/new") for name in (".building", ".timing")
        ]
        found = [path for place in places if place.exists() for path in place.iterdir()]
        found += [path for path in (self.place / "work").rglob(".*") if path.name not in (".building", ".locks")]
        found = [path for path in found if not path.name.startswith(".digests.json")]
        wrong = [f"left {path.relative_to(self.place)}" for path in found]
        for folder in ("engines", "work/new"):
            checked = upkeep.check(EngineDirectory(self.place / folder))
            wrong += [f"{one.name}: {one.problem}" for one in checked if one.state != "ok"]
        return wrong


@pytest.mark.slow
@pytest.mark.timeout(60 + 15 * COUNT)
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_signal_at_any_moment_ends_every_command_and_leaves_nothing(tiny_engines):
    """Before sdtrt/__main__.py runs, Python itself answers."""
    dice, ends, wrong = random.Random(SEED), Counter(), []
    for _ in range(COUNT):
        name, number, seconds = dice.choice(list(COMMANDS)), dice.choice(NUMBERS), dice.uniform(0.05, 4)
        struck = Struck(tiny_engines, COMMANDS[name], number, seconds)
        ends[struck.end] += 1
        said = [f"{name}, {number.name} after {seconds:.3f} s: {text}" for text in struck.wrong]
        for text in said:
            print(text, flush=True)
        wrong += said
    print(dict(ends))
    assert wrong == []
    assert ends["ended"] > COUNT / 2
