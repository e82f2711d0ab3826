"""An engine's pieces, built side by side in processes (`parallel_build`): what they make, and that none is left."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from factories import SMALL, small_unet
from test_build_tensorrt import is_running, needs_rtx, recording, rtx_spec
from test_trt_api import save_graph

from sdtrt.backends.child import end_child
from sdtrt.backends.tensorrt.build import Request
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.backends.tensorrt.versions.header import read_header
from sdtrt.backends.tensorrt86 import parallel_build, policy, worker
from sdtrt.backends.tensorrt86.build import WORKER, PieceRequest, build_plan
from sdtrt.backends.tensorrt86.pieces import read_pieces
from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.common.errors import BuildError, BuildMemoryShortage
from sdtrt.exports.component import write_onnx
from sdtrt.specs import Profile, Sizes
from sdtrt.specs.contract import unet_contract

SPEC = rtx_spec(profiles=(Profile.of(Sizes(2, 64, 96)),), optimization_level=None)
COUNT = 5  # the pieces that attentions of 90 tokens leave of the UNet below
needs_proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
# In all processes of a build: TensorRT for RTX leaves attention to PyTorch too, which it never does by itself.
SPLITS = (
    "from sdtrt.backends.tensorrt86 import policy\n"
    "policy.split_tokens = lambda spec: 90 if spec.split_attention is None else 0\n"
)
NEVER_ENDS = SPLITS + (
    "import time\n"
    "from sdtrt.backends.tensorrt.versions import building\n"
    "building.serialize = lambda draft, config: time.sleep(100)\n"
)


def children_of(pid):
    """Of all the threads of a process, and their children."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has just ended
            found += [int(word) for word in file.read_text().split()]
    return found


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A UNet's ONNX and contract."""
    unet = small_unet("sd1", **SMALL).half()
    contract = unet_contract(dict(unet.config), "fp16")
    path = tmp_path_factory.mktemp("whole") / "model.onnx"
    write_onnx(unet, contract, path)
    return path, contract


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "entry"
    path.mkdir()
    return path


@pytest.fixture
def everywhere(tmp_path, monkeypatch):
    """Run some Python at the start of each process of a build."""

    def arrange(code):
        (tmp_path / "start").mkdir()
        (tmp_path / "start" / "sitecustomize.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path / "start")

    return arrange


@needs_rtx
@needs_proc
def test_each_piece_is_built_in_a_process_of_its_own(whole, folder, everywhere):
    """By the real builder of TensorRT for RTX, as that needs no GPU."""
    everywhere(SPLITS)
    shown, seen, done = [], set(), threading.Event()

    def watch():
        while not done.wait(0.01):
            seen.update(pid for child in children_of(os.getpid()) for pid in children_of(child))

    console = Console(quiet=True)
    console.activity = recording(shown)
    watching = threading.Thread(target=watch)
    watching.start()
    try:
        found = build_plan(whole[0], folder, whole[1], SPEC, timing_cache=None, console=console)
    finally:
        done.set()
        watching.join()
    pieces = read_pieces(folder / "engine.plan", whole[1])
    assert found["pieces"] == len(found["piece_seconds"]) == len(pieces) == COUNT
    assert len(seen) == COUNT
    assert not any(map(is_running, seen))
    assert found["plan_bytes"] == sum(piece.plan.stat().st_size for piece in pieces)
    assert all(read_header(piece.plan).size_bytes == piece.plan.stat().st_size for piece in pieces)
    wanted = {"build.log", "engine.plan.json", *(piece.plan.name for piece in pieces)}
    assert {path.name for path in folder.iterdir()} == wanted
    assert [text for text in shown if "pieces" in text] == [
        f"optimising {COUNT} pieces, {n} done" for n in range(COUNT + 1)
    ]


@needs_rtx
@pytest.mark.slow
def test_all_that_builders_say_is_in_one_log_piece_by_piece(whole, folder, monkeypatch):
    monkeypatch.setattr(policy, "split_tokens", lambda spec: 90)
    worker._build(libraries.open_library("tensorrt-rtx"), Request(whole[0], folder, whole[1], SPEC, None, False), print)
    text = (folder / "build.log").read_text()
    assert sorted(re.findall(r"^\[piece (\d+)\]$", text, re.MULTILINE)) == [str(n) for n in range(COUNT)]
    for said in text.split("\n[piece ")[1:]:
        assert said.count("Engine generation completed") == 1
        assert re.search(rf"Input filename: .*/{said[0]}\.onnx", said)


@needs_rtx
@needs_proc
@pytest.mark.slow
def test_where_one_piece_fails_the_others_end_and_the_engine_is_built_whole(whole, folder, monkeypatch):
    sources = worker._sources

    def one_is_odd(request, pieces, report):
        found = sources(request, pieces, report)
        if len(found) > 1:
            found[2].onnx.write_bytes(save_graph(pieces / "odd.onnx", "Frobnicate").read_bytes())
        return found

    monkeypatch.setattr(worker, "_sources", one_is_odd)
    monkeypatch.setattr(policy, "split_tokens", lambda spec: 90 if spec.split_attention is None else 0)
    said = []
    found = worker.build_here(Request(whole[0], folder, whole[1], SPEC, None, False), said.append)
    assert found["pieces"] == 1
    assert "piece_seconds" not in found
    first, _ = [message["warn"] for message in said if "warn" in message]
    assert re.match(r"the engine failed in pieces \(.*\(Frobnicate\).*\): building it in one, which runs slower", first)
    assert children_of(os.getpid()) == []
    assert {path.name for path in folder.iterdir()} == {"build.log", "engine.plan"}


# --------------------------------------------------------------------------------------------------- whatever dies


@pytest.fixture
def hung_build(whole, folder, everywhere, tmp_path):
    """A build that hangs in each of its builders, in a process of its own: that, its worker, the builders."""
    everywhere(NEVER_ENDS)
    script = (
        "import json, sys\n"
        "from sdtrt.backends.tensorrt import build\n"
        "request = build.Request.from_json(json.load(open(sys.argv[1])))\n"
        f"build.build_in_child(request, build.Console(quiet=True), lambda text: print(text, flush=True), {WORKER!r})\n"
    )
    request = Request(whole[0], folder, whole[1], SPEC, None, False)
    (tmp_path / "request").write_text(json.dumps(request.to_json()))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["TMPDIR"] = str(tmp_path)
    command = [sys.executable, "-c", script, str(tmp_path / "request")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as parent:
        try:
            while b"pieces" not in (line := parent.stdout.readline()):
                assert line, parent.stderr.read().decode()
            (coordinator,) = children_of(parent.pid)
            wait_until(lambda: len(children_of(coordinator)) == min(parallel_build.most_jobs(), COUNT))
            # Each has read its request, and builds: it has begun its log.
            wait_until(
                lambda: (
                    sum("INFO" in log.read_text() for log in folder.glob("build.log.*")) == parallel_build.most_jobs()
                )
            )
            yield parent, coordinator, children_of(coordinator)
        finally:
            parent.kill()


@needs_rtx
@needs_proc
@pytest.mark.parametrize(
    "how",
    [signal.SIGKILL, *(pytest.param(how, marks=pytest.mark.slow) for how in (signal.SIGTERM, signal.SIGINT))],
)
def test_no_process_outlives_the_parent(hung_build, how):
    parent, coordinator, builders = hung_build
    assert all(map(is_running, [coordinator, *builders]))
    parent.send_signal(how)
    wait_until(lambda: not any(map(is_running, [parent.pid, coordinator, *builders])))


@needs_rtx
@needs_proc
def test_no_process_outlives_the_worker(hung_build):
    """The parent says what it died of."""
    parent, coordinator, builders = hung_build
    os.kill(coordinator, signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, [coordinator, *builders])))
    _, words = parent.communicate(timeout=20)
    assert b"TensorRT's builder died (SIGKILL)" in words
    kept = re.search(r"TensorRT's log is in (\S+)", words.decode())[1]
    assert "INFO" in Path(kept).read_text(), "what builders had said is kept, though nobody was left to join it"


@needs_proc
def test_what_ends_a_worker_ends_what_it_has_started():
    """At once, though it does not listen: what is deleted next must have no one who writes there."""
    command = ["sh", "-c", "sleep 100 & sleep 100 & wait"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as child:
        wait_until(lambda: len(children_of(child.pid)) == 2)
        started = children_of(child.pid)
        end_child(child, with_group=True)
    wait_until(lambda: not any(map(is_running, started)))


# -------------------------------------------------------------------------------------------------- other builders


@pytest.fixture
def builders(whole, folder, tmp_path, monkeypatch):
    """Requests for pieces, the later the larger, with some Python in place of their builders.

    It knows `piece`, `begun` (how many began before it) and `tell`.
    """
    (tmp_path / "onnx").mkdir()
    requests = []
    for number in range(4):
        onnx = tmp_path / "onnx" / f"{number}.onnx"
        onnx.write_bytes(bytes(1000 * (number + 1)))
        requests.append(PieceRequest(onnx, folder, whole[1], SPEC, None, False, number))

    def arrange(code):
        program = tmp_path / "python"
        program.write_text(
            f"#!{sys.executable}\n"
            "import json, os, sys, time\n"
            "request = json.loads(sys.stdin.buffer.readline())\n"
            "piece = request['piece']\n"
            "def tell(**message): print(json.dumps(message), flush=True)\n"
            f"notes = open({str(tmp_path / 'notes')!r}, 'a+')\n"
            "notes.seek(0)\n"
            "begun = notes.read().count('begin')\n"
            "def note(word): notes.write(f'{word} {piece}\\n'); notes.flush()\n"
            f"note('begin')\n{code}\n"
            "note('end')\n"
            "tell(result={'seconds': 1.0, 'precision': {}, 'piece': piece})\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return requests

    return arrange


def jobs(monkeypatch, count):
    monkeypatch.setattr(parallel_build, "most_jobs", lambda: count)


def notes(tmp_path):
    return (tmp_path / "notes").read_text().splitlines()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_so_many_run_side_by_side_the_largest_first(builders, folder, tmp_path, monkeypatch, count):
    requests = builders("time.sleep(0.3)\ntell(warn='all say this')\ntell(show='unseen')")
    jobs(monkeypatch, count)
    said = []
    found = parallel_build.build(requests, folder / "build.log", said.append)
    assert [one["piece"] for one in found] == [0, 1, 2, 3]
    running, most = 0, 0
    for line in notes(tmp_path):
        running += 1 if line.startswith("begin") else -1
        most = max(most, running)
    assert most == count
    assert set(notes(tmp_path)[:count]) == {f"begin {piece}" for piece in (3, 2, 1)[:count]}
    assert [message["warn"] for message in said if "warn" in message] == ["all say this"]
    assert {"show": "unseen"} not in said


@needs_proc
def test_the_first_failure_ends_the_others_at_once(builders, folder, tmp_path, monkeypatch):
    requests = builders(
        "if piece == 1: time.sleep(0.3); tell(error='BuildError', message='no kernel', hint='try'); sys.exit()\n"
        "time.sleep(100)"
    )
    jobs(monkeypatch, 3)
    start = time.monotonic()
    with pytest.raises(BuildError, match="no kernel"):
        parallel_build.build(requests, folder / "build.log", print)
    assert time.monotonic() - start < 50
    assert children_of(os.getpid()) == []
    assert sorted(notes(tmp_path)) == ["begin 1", "begin 2", "begin 3"], "what had not begun never did"


@needs_proc
@pytest.mark.parametrize(
    "end", ["tell(error='BuildMemoryShortage', message='too little', hint='try')", "os.kill(os.getpid(), 9)"]
)
def test_too_little_memory_for_several_builds_the_rest_one_at_a_time(builders, folder, tmp_path, monkeypatch, end):
    """Also where the system kills a builder, as it does with those that take too much."""
    requests = builders(
        f"if piece == 2 and begun < 3: time.sleep(0.5); {end}; sys.exit()\nif piece == 1 and begun < 4: time.sleep(100)"
    )
    jobs(monkeypatch, 2)
    said = []
    found = parallel_build.build(requests, folder / "build.log", said.append)
    assert [one["piece"] for one in found] == [0, 1, 2, 3]
    (warning,) = [message["warn"] for message in said if "warn" in message]
    assert re.match(r"2 pieces side by side failed \(.*\): building 3 one at a time", warning)
    assert notes(tmp_path)[-6:] == [f"{word} {piece}" for piece in (2, 1, 0) for word in ("begin", "end")]
    assert notes(tmp_path).count("end 3") == 1, "what is built stays"
    assert said[-1] == {"show": "optimising 4 pieces, 4 done"}


def test_too_little_memory_for_one_is_an_error(builders, folder, tmp_path, monkeypatch):
    requests = builders("tell(error='BuildMemoryShortage', message='too little', hint='try'); sys.exit()")
    jobs(monkeypatch, 1)
    with pytest.raises(BuildMemoryShortage, match="too little"):
        parallel_build.build(requests, folder / "build.log", print)
    assert notes(tmp_path) == ["begin 3"]


def test_a_builder_that_dies_is_told_by_its_own_last_words(builders, folder, monkeypatch):
    requests = builders(
        "print(f'words of {piece}', file=sys.stderr, flush=True)\n"
        "if piece == 2: time.sleep(0.3); os.abort()\n"
        "time.sleep(100)"
    )
    jobs(monkeypatch, 4)
    with pytest.raises(BuildError, match=r"died \(SIGABRT\); its last words: words of 2$") as caught:
        parallel_build.build(requests, folder / "build.log", print)
    assert type(caught.value) is BuildError
    assert "\n[piece 2]\nwords of 2\n" in (folder / "build.log").read_text()
    assert [path.name for path in folder.iterdir()] == ["build.log"]


@pytest.mark.parametrize(
    ("cores", "has_gpu", "free", "count"),
    [
        (6, False, None, 2),
        (6, True, None, 1),
        (6, True, 2**30, 1),
        (6, True, 9 * 2**30, 1),
        (6, True, 17 * 2**30, 2),
        (6, True, 80 * 2**30, 2),
        (1, True, 80 * 2**30, 1),
    ],
)
def test_how_many_builders_run_depends_on_the_gpu_and_on_cores(monkeypatch, cores, has_gpu, free, count):
    """On a GPU they time kernels: more than two would disturb each other, and gain nothing."""
    monkeypatch.setattr(host, "cores", lambda: cores)
    monkeypatch.setattr(host, "has_gpu", lambda: has_gpu)
    monkeypatch.setattr(host, "free_gpu_bytes", lambda: free)
    assert parallel_build.most_jobs() == count


# --------------------------------------------------------------------------------------------------- timing caches

KEEP = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from sdtrt.backends.tensorrt import worker

class Timing:
    def __init__(self, data): self.entries = set(data.split())
    def combine(self, other, ignore_mismatch): time.sleep(0.05); self.entries |= other.entries
    def serialize(self): return b" ".join(sorted(self.entries))

file, name = Path(sys.argv[1]), sys.argv[2]
for count in range(5):
    own = Timing(f"{name}.{count}".encode())
    config = SimpleNamespace(get_timing_cache=lambda: own, create_timing_cache=Timing)
    worker._keep_timings(file, file.parent, config, print)
"""


def test_builders_that_end_together_keep_each_others_timings(tmp_path):
    """TensorRT for RTX keeps none: the cache is a set of words here, the files and processes are real."""
    file = tmp_path / "t.cache"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", KEEP, str(file)]
    processes = [subprocess.Popen([*command, name], env=environment) for name in "abc"]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert file.read_text().split() == [f"{name}.{count}" for name in "abc" for count in range(5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.cache", "t.cache.lock"]
