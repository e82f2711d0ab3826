"""Engines loaded ahead of a request, by a TensorRT that computes on the CPU: what is loaded, shared, and let go."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from factories import engine_key_of, engines_wanted
from trt_fakes import CONTRACT, FakeCuda, fake_gpu, fake_library, profile_shapes, write_plan

from sdtrt.backends import registry
from sdtrt.backends.open import open_session
from sdtrt.backends.tensorrt import plan as plan_module
from sdtrt.backends.tensorrt.versions import libraries, running
from sdtrt.cli import prewarm
from sdtrt.cli.likely_engines import likely_engines, load_ahead
from sdtrt.common import host
from sdtrt.common.errors import CacheError, EngineError, EntryInUseError, MemoryShortage
from sdtrt.common.files import sha256_file
from sdtrt.engines import digests
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening import memory, preloaded, request
from sdtrt.pipeline.opening import open as pipeline_open
from sdtrt.specs import ControlSpec, GenerateSpec, ImagePromptSpec, LoraSpec, ModelSpec, Profile, Range, Sizes

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
ROOT = Path(__file__).resolve().parents[2]
SHAPES = profile_shapes((1, 2, 4), (12, 16, 24), (12, 16, 24))
PROFILE = Profile(Range(1, 2, 4), Range(96, 128, 192), Range(96, 128, 192))
CUDA = torch.device("cuda")
SPEC = GenerateSpec(("a red circle",), ModelSpec("tiny"), "tensorrt")


def plans_in(loaded):
    """What a backend's loader has loaded: one plan, or several."""
    return loaded if isinstance(loaded, (list, tuple)) else [loaded]


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    """A GPU made of the CPU, with TensorRT 8.6."""
    library = fake_library("tensorrt 8.6.1")
    monkeypatch.setattr(host, "has_primary_context", lambda index: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    fake_gpu(monkeypatch, FakeCuda())
    monkeypatch.setattr(libraries, "open_library", lambda backend: library)
    digests._AHEAD.clear()
    yield
    preloaded.let_go()
    digests._AHEAD.clear()


@pytest.fixture
def loaded(monkeypatch):
    """The plans that are deserialised, by the entry's folder, the file, and the thread."""
    calls, load = [], running.load_engine

    def noting(library, plan, **options):
        calls.append((plan.parent.name, plan.name, threading.current_thread().name))
        return load(library, plan, **options)

    monkeypatch.setattr(running, "load_engine", noting)
    return calls


@pytest.fixture
def hashed(monkeypatch):
    """The files that are hashed to be proven."""
    calls, hash_file = [], sha256_file
    monkeypatch.setattr(digests, "sha256_file", lambda path: calls.append(path) or hash_file(path))
    return calls


def write_whole(plan):
    """The plan of an engine in one piece."""
    write_plan(plan, [SHAPES])


def publish(
    directory,
    component="unet",
    profile=PROFILE,
    *,
    used=1,
    model="tiny",
    write=write_whole,
    step_ms=None,
    loras=None,
    **key,
):
    """An engine that runs here, unless `key` says otherwise; used last at the time `used`; `write` writes its plans."""

    def make(folder: Path):
        write(folder / "engine.plan")
        info = {"model": model, "contract": CONTRACT.to_json(), "plan_bytes": 2**29, "scratch_bytes": 0}
        info |= {} if loras is None else {"loras": loras}
        return info | ({} if step_ms is None else {"step_ms": step_ms})

    known = {
        "format": registry.get("tensorrt").format,
        "component": component,
        "backend_version": "8.6.1",
        "host": registry.get("tensorrt").host_key(),
        "profiles": [asdict(profile)],
        "options": {"version_compatible": False},
    }
    entry = directory.obtain("engine", engine_key_of(**(known | key)), make)
    os.utime(entry.path / "entry.json", (used, used))
    return entry


def in_background(spec, directory):
    """What the background does for a request, to its end."""
    preloaded.expect()
    thread = threading.Thread(target=load_ahead, args=(spec, directory), name="sdtrt-tensorrt")
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


# ------------------------------------------------------------------------------------------------- which are loaded


def test_likely_are_engines_that_fit_the_largest_first(directory):
    unet = publish(directory, used=1, write=lambda plan: write_plan(plan, [SHAPES, SHAPES]))
    decoder = publish(directory, "vae_decoder", precision="fp32")
    text = publish(directory, "text_encoder", Profile(Range.of(1), Range.of(8), Range.of(8)))
    publish(directory, "vae_encoder")
    found = [entry.name for entry in likely_engines(SPEC, directory)]
    assert found[0] == unet.name
    assert sorted(found) == sorted(entry.name for entry in (unet, decoder, text))


def test_likely_are_engines_with_the_same_loras_merged_in_them(directory):
    bare, styled = publish(directory, used=1), publish(directory, used=3, number=2, loras=["style.safetensors:0.8"])
    publish(directory, used=2, number=3, loras=["style.safetensors"])
    lora = LoraSpec("style.safetensors", 0.8)
    for loras, entry in (((), bare), ((lora,), styled), ((lora, lora), None)):
        request = replace(SPEC, model=replace(SPEC.model, loras=loras))
        assert [one.name for one in likely_engines(request, directory)] == ([entry.name] if entry else [])
    with_pictures = replace(SPEC.model, ip_adapters=("face.safetensors",))
    request = replace(SPEC, model=with_pictures, ip_images=(ImagePromptSpec(Path("one.png")),))
    assert likely_engines(request, directory) == []


def test_auto_loads_the_plans_that_it_will_take(directory, monkeypatch):
    """Those that are there, though it would build for another backend; not where that one's are there and faster."""
    monkeypatch.setattr(host, "torch_sees_gpu", lambda: True)
    inductor = registry.get("inductor")
    monkeypatch.setattr(type(inductor), "why_not", lambda self: None)
    monkeypatch.setattr(type(registry.get("tensorrt")), "why_not", lambda self: None)
    request, sizes = replace(SPEC, backend="auto"), {"profiles": [asdict(Profile.of(Sizes(2, 128, 128)))]}
    unet = publish(directory, step_ms=7.7, **sizes)
    assert registry.choose_backend("auto") == "inductor"
    assert [entry.name for entry in likely_engines(request, directory)] == [unet.name]
    own = {"backend": "inductor", "format": inductor.format, "backend_version": inductor.version()}
    own |= {"host": inductor.host_key(), "model": "of the same architecture"}
    publish(directory, step_ms=9.9, **own, **sizes)
    assert [entry.name for entry in likely_engines(request, directory)] == [unet.name], "the faster one"
    publish(directory, step_ms=5.9, used=2, number=2, **own, **sizes)
    assert likely_engines(request, directory) == [], "packages are not loaded ahead"


@pytest.mark.parametrize(
    "other",
    [
        {"model": "another"},
        {"backend": "tensorrt-rtx"},
        {"backend_version": "10.0.1"},
        {"host": {"gpu": "Another", "compute_capability": [8, 9]}},
        {"format": registry.get("tensorrt").format - 1},
        {"precision": "fp32"},
        {"profiles": [{"batch": {}}]},
        {"profiles": None},
        {"profiles": [{key: {"min": 128, "opt": 8, "max": 8} for key in ("batch", "height", "width")}]},
        {"options": None, "backend_version": "8.6.0"},
        {"profile": Profile.of(Sizes(1, 128, 128))},
        {"profile": Profile.of(Sizes(2, 256, 128))},
    ],
)
def test_one_that_does_not_run_here_or_not_fit_is_left_for_one_that_does(other, directory):
    """Although it was used last."""
    spec = GenerateSpec(("a red circle",), ModelSpec("tiny"), "tensorrt", height=128, width=128)
    fitting = publish(directory, used=1)
    publish(directory, used=2, **other)
    assert [entry.name for entry in likely_engines(spec, directory)] == [fitting.name]


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, ["unet", "vae_decoder"]),
        ({"init_image": Path("a.png")}, ["unet", "vae_decoder", "vae_encoder"]),
        ({"components": ("unet",)}, ["unet"]),
        ({"precision": "fp32"}, []),
        ({"height": 512}, []),
        ({"height": 128, "width": 192}, ["unet", "vae_decoder"]),
        ({"batch_size": 2, "num_images": 2}, ["unet", "vae_decoder"]),
        ({"batch_size": 8, "num_images": 1}, ["unet", "vae_decoder"]),
        ({"batch_size": 3, "num_images": 3}, ["vae_decoder"]),
        ({"batch_size": 3, "num_images": 3, "guidance_scale": 1.0}, ["unet", "vae_decoder"]),
        ({"backend": "onnxruntime"}, []),
        ({"backend": "torch"}, []),
        ({"controls": (ControlSpec("canny", Path("map.png")),)}, ["controlnet", "vae_decoder"]),
    ],
)
def test_what_a_request_calls_and_how(changed, found, directory):
    for component in ("unet", "controlnet", "vae_decoder", "vae_encoder"):
        publish(directory, component, PROFILE)
    spec = GenerateSpec(**{"prompts": ("x",), "model": ModelSpec("tiny"), "backend": "tensorrt", **changed})
    assert sorted(str(entry.key["component"]) for entry in likely_engines(spec, directory)) == found


# ------------------------------------------------------------------------------------------------- loaded and shared


def test_a_session_shares_what_was_loaded_and_nothing_is_read_twice(directory, loaded, hashed):
    share(publish(directory), directory, loaded, hashed, lambda session: [session._plan.loaded])


def share(entry, directory, loaded, hashed, plans_of):
    """Open a session on what was loaded ahead: nothing is loaded nor read twice."""
    in_background(SPEC, directory)
    files = [name for name in sorted(entry.files) if not name.endswith(".json")]
    assert loaded == [(entry.name, name, "sdtrt-tensorrt") for name in files]
    engines = [plan.engine for plan in plans_in(preloaded._KEPT[entry.path][0])]
    with pytest.raises(EntryInUseError):
        directory.remove(entry)
    with preloaded.taken([entry]) as folders:
        assert folders == {entry.path}
        session = open_session(entry, CUDA)
    with session:
        assert [plan.engine for plan in plans_of(session)] == engines
    assert len(loaded) == len(files)
    assert sorted(path.name for path in hashed) == sorted(entry.files)
    assert not preloaded._KEPT
    with open_session(entry, CUDA):
        assert len(hashed) == 2 * len(entry.files), "a digest is good for one session: this one proves them anew"


def test_what_is_being_loaded_is_waited_for_and_other_plans_are_not(directory, loaded, monkeypatch):
    unet, other = publish(directory), publish(directory, "vae_decoder", model="another")
    begun, go, load = threading.Event(), threading.Event(), running.load_engine

    def slowly(library, plan, **options):
        if threading.current_thread().name == "sdtrt-tensorrt":
            begun.set()
            assert go.wait(10)
        return load(library, plan, **options)

    monkeypatch.setattr(running, "load_engine", slowly)
    preloaded.expect()
    thread = threading.Thread(target=load_ahead, args=(SPEC, directory), name="sdtrt-tensorrt")
    thread.start()
    assert begun.wait(10)
    open_session(other, CUDA).close()
    threading.Timer(0.05, go.set).start()
    with preloaded.taken([unet]) as folders, open_session(unet, CUDA):
        assert folders == {unet.path}
    thread.join(10)
    assert [name for name, *_ in loaded].count(unet.name) == 1


def test_hashing_under_way_is_waited_for_not_repeated(directory, hashed, monkeypatch):
    """`hash_ahead` has begun with the file; the load ahead, then the session, take its digest."""
    entry = publish(directory)
    slow = digests.sha256_file

    def slowly(path):
        time.sleep(0.05)
        return slow(path)

    monkeypatch.setattr(digests, "sha256_file", slowly)
    digests.hash_ahead(lambda: [entry.path / "engine.plan"])
    in_background(SPEC, directory)
    with preloaded.taken([entry]) as folders, open_session(entry, CUDA):
        assert folders
    assert len(hashed) == 1


def test_it_follows_on_the_import_of_tensorrt(directory, loaded, tmp_path, monkeypatch):
    name = "library_of_test_preload"
    (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(libraries, "MODULES", {"tensorrt": (name,)})
    monkeypatch.setattr(prewarm, "wake_gpu", lambda: gpu)
    gpu = prewarm.Future()
    entry = publish(directory)
    prewarm.start_gpu(SPEC, directory)
    time.sleep(0.02)
    assert not loaded
    gpu.set_result(True)
    for thread in threading.enumerate():
        if thread.name == "sdtrt-tensorrt":
            thread.join(10)
    assert [folder for folder, *_ in loaded] == [entry.name]
    assert name in sys.modules


# ------------------------------------------------------------------------------------------------- not, or let go


def test_one_damaged_engine_hides_no_other(directory, loaded):
    large, small = publish(directory), publish(directory, "vae_decoder")
    plan = large.path / "engine.plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    in_background(SPEC, directory)
    assert [(folder, plan) for folder, plan, _ in loaded] == [(small.name, "engine.plan")]


def test_nothing_is_asked_of_the_gpu_where_nothing_is_wanted_any_more(directory, monkeypatch):
    publish(directory)
    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: asked.append("the GPU") or 0)
    preloaded.let_go()
    load_ahead(SPEC, directory)
    assert not asked


def test_a_damaged_file_is_never_deserialised_and_the_session_says_so(directory, loaded, hashed):
    refuse(publish(directory), "engine.plan", directory, loaded, hashed)


def refuse(entry, name, directory, loaded, hashed):
    """Damage a file of an engine: nothing of it is deserialised, and a session names the file."""
    with (entry.path / name).open("r+b") as file:
        file.write(b"\0\0\0\0")
    in_background(SPEC, directory)
    assert not loaded
    assert not preloaded._KEPT
    with preloaded.taken([entry]), pytest.raises(CacheError, match=rf"{re.escape(name)} is damaged"):
        open_session(entry, CUDA)
    assert not loaded
    assert len(hashed) == len(set(hashed)), "damaged once is enough"
    directory.remove(entry)  # nothing holds it


def test_a_directory_that_others_can_change_is_left_alone(directory, loaded, hashed):
    publish(directory)
    directory.path.chmod(0o777)
    in_background(SPEC, directory)
    assert not loaded
    assert not hashed


@pytest.mark.parametrize("context", [False, OSError("no driver")])
def test_without_a_context_nothing_is_loaded(context, directory, loaded, monkeypatch):
    """Of a GPU for one process at a time, a builder may need it."""

    def state(index):
        if context:
            raise context
        return context

    publish(directory)
    monkeypatch.setattr(host, "has_primary_context", state)
    in_background(SPEC, directory)
    assert not loaded


def test_what_fails_is_silent_and_the_session_tells(directory, capfd):
    entry = publish(directory)
    libraries.open_library("tensorrt").module.Runtime.deserialize_cuda_engine = lambda self, data: self.refuse()
    in_background(SPEC, directory)
    assert not preloaded._KEPT
    libraries.open_library("tensorrt").module.Runtime.deserialize_cuda_engine = lambda self, data: None
    in_background(SPEC, directory)
    assert capfd.readouterr() == ("", "")
    with preloaded.taken([entry]), pytest.raises(EngineError, match="can't be loaded"):
        open_session(entry, CUDA)
    directory.remove(entry)


def test_nothing_is_loaded_unasked_or_once_the_request_has_its_engines(directory, loaded):
    publish(directory)
    load_ahead(SPEC, directory)
    preloaded.expect()
    with preloaded.taken([]):
        load_ahead(SPEC, directory)
    load_ahead(SPEC, directory)
    assert not loaded


def test_nothing_is_loaded_that_was_let_go_while_it_was_proven(directory, loaded, monkeypatch):
    entry = publish(directory)
    backend = type(registry.get("tensorrt"))
    proven = backend.loader

    def proving(*arguments):
        loader = proven(*arguments)
        preloaded.let_go()
        return loader

    monkeypatch.setattr(backend, "loader", proving)
    in_background(SPEC, directory)
    assert not loaded
    directory.remove(entry)


def test_what_is_not_used_is_freed_before_memory_is_judged(directory, loaded, monkeypatch):
    """And what is used counts once: as weights that lie on the GPU, not as weights that will need room there."""
    unused, unet = publish(directory, "vae_decoder"), publish(directory, "unet")
    in_background(SPEC, directory)
    engines = {path: weakref.ref(plans_in(loaded)[0]) for path, (loaded, _) in preloaded._KEPT.items()}
    assert len(engines) == 2
    spec = request.PipelineSpec(resolve_model(ModelSpec("tiny")), "tensorrt", "fp16", Sizes(2, 128, 128), steps=2)
    monkeypatch.setattr(pipeline_open, "ensure_all", lambda *_, **__: {"unet": unet})
    free = []

    def judged(device):
        assert engines[unused.path]() is None
        assert engines[unet.path]() is not None
        return free[0]

    @contextmanager
    def opened(entry, device, scratch):
        assert engines[entry.path]() is not None
        yield

    monkeypatch.setattr(memory, "free_bytes", judged)
    monkeypatch.setattr(pipeline_open, "open_session", opened)
    free.append(memory.ALLOWANCE_BYTES)
    with pipeline_open._open_engines(spec, directory, None, True, None):
        assert engines[unet.path]() is None, "sessions hold what they use"
    directory.remove(unused)
    in_background(SPEC, directory)
    engines[unet.path] = weakref.ref(plans_in(preloaded._KEPT[unet.path][0])[0])
    free[0] -= 1
    with pytest.raises(MemoryShortage), pipeline_open._open_engines(spec, directory, None, True, None):
        pass
    assert engines[unet.path]() is None


def test_what_is_just_being_loaded_and_not_used_is_waited_for_then_freed(directory, monkeypatch):
    publish(directory)
    begun, load = threading.Event(), running.load_engine

    def slowly(library, plan, **options):
        begun.set()
        time.sleep(0.1)
        return load(library, plan, **options)

    monkeypatch.setattr(running, "load_engine", slowly)
    preloaded.expect()
    threading.Thread(target=load_ahead, args=(SPEC, directory)).start()
    assert begun.wait(10)
    preloaded.let_go()
    assert not preloaded._KEPT
    assert not plan_module._LOADED


ENDS = """
import sys, threading, time, types
from sdtrt.pipeline.opening import preloaded

class Entry:
    path, engine_key = "entry", types.SimpleNamespace(backend="tensorrt")
    def __init__(self, name): self.path = name
    def hold(self): return open(__file__ if "__file__" in globals() else "/dev/null", "rb")

class Plan:
    def __del__(self): print("freed", flush=True)

def loader(entry, wanted):
    def load(device):
        print("loading", entry.path, flush=True)
        begun.set()
        time.sleep(0.2)
        return Plan()
    return load

begun = threading.Event()
preloaded.registry.get = lambda name: types.SimpleNamespace(loader=loader)
import atexit
atexit.register(preloaded.let_go)
preloaded.expect()
threading.Thread(target=lambda: [preloaded.load(Entry(name), 0) for name in ("one", "two")]).start()
begun.wait()
sys.exit(3)
"""


def test_a_process_that_ends_waits_for_one_load_and_begins_no_other():
    done = subprocess.run(
        [sys.executable, "-c", ENDS], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "loading one\nfreed\n", "")


def test_builders_get_the_gpus_memory(directory, monkeypatch):
    from sdtrt.pipeline.opening import engines as engines_module
    from sdtrt.pipeline.opening.engines import ensure_engines

    publish(directory)
    in_background(SPEC, directory)
    assert preloaded._KEPT
    model, sizes = resolve_model(ModelSpec("tiny")), Sizes(2, 128, 128)

    def build(*arguments):
        assert not preloaded._KEPT
        return publish(directory, used=3)

    monkeypatch.setattr(engines_module, "build_engine", build)
    monkeypatch.setattr(engines_module, "best_fit", lambda *_: None)
    assert ensure_engines(engines_wanted(model, "tensorrt", "fp16", sizes, ("unet",)), directory)
