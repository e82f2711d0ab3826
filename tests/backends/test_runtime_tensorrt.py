"""TensorRT sessions: on fakes of the GPU's side that compute with real memory, one of each version's API."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
import time
import weakref
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import trt_fakes
from factories import flip, in_threads
from trt_fakes import (
    CHANNELS,
    CONFIG,
    CONTRACT,
    WIDTH,
    FakeCuda,
    FakePyCuda,
    fake_gpu,
    fake_library,
    feeds,
    profile_shapes,
    wanted,
    write_plan,
)

from sdtrt.backends import graph_pool, unchanged
from sdtrt.backends.scratch import Scratch
from sdtrt.backends.tensorrt import checking
from sdtrt.backends.tensorrt import plan as plan_module
from sdtrt.backends.tensorrt import pycuda as pycuda_module
from sdtrt.backends.tensorrt.build import Request
from sdtrt.backends.tensorrt.plan import PlanProfile, choose_profile, list_file, load_plan, profile_of
from sdtrt.backends.tensorrt.pycuda import PyCudaSession
from sdtrt.backends.tensorrt.session import TensorRTSession
from sdtrt.backends.tensorrt.versions import libraries, running
from sdtrt.common.errors import CacheError, EngineError, MemoryShortage
from sdtrt.engines.directory import EngineDirectory
from sdtrt.specs import BuildSpec, ExportSpec, Profile, Range
from sdtrt.specs.contract import Contract, unet_contract

WIDE = profile_shapes((1, 2, 4), (12, 16, 24), (12, 16, 24))
TALL = profile_shapes((1, 2, 2), (24, 32, 40), (12, 16, 24))
LABELS = ["tensorrt 8.6.1", "tensorrt 10.0.1", "tensorrt 10.1.0", "tensorrt 11.4.0.106"]
LABELS += ["tensorrt_lean 10.15.1.29", "tensorrt_rtx 1.7.1.116"]


@pytest.fixture
def cuda(monkeypatch):
    """A GPU made of the CPU."""
    return fake_gpu(monkeypatch, FakeCuda())


@pytest.fixture
def plan(tmp_path, request):
    """A plan of the version that the test runs, 8.6.1 where it does not say."""
    label = request.node.callspec.params.get("label", "") if hasattr(request.node, "callspec") else ""
    version = fake_library(label or "tensorrt 8.6.1").version
    magic = b"vtrt" if label.startswith("tensorrt_rtx") else b"ftrt"
    return write_plan(tmp_path / "engine.plan", [WIDE], (*version, 0, 0)[:4], magic)


def session_on(plan, label="tensorrt 8.6.1", **options):
    return TensorRTSession(plan, CONTRACT, device=torch.device("cuda"), library=fake_library(label), **options)


@pytest.mark.parametrize("label", LABELS)
def test_runs_are_right_first_second_and_later(label, cuda, plan):
    """From the stream, while the graph is captured, and from the graph: with each version's API."""
    with session_on(plan, label) as session:
        for seed in range(5):
            given = feeds(seed=seed)
            outputs = session.run(given)
            np.testing.assert_array_equal(outputs["out_sample"], wanted(given))
        assert session.graph_count == 1


@pytest.mark.parametrize("runs", [1, 2, 4])
def test_outputs_never_alias(runs, cuda, plan):
    with session_on(plan) as session:
        for seed in range(runs):
            kept = session.run(feeds(seed=seed))["out_sample"]
        copy = kept.clone()
        later = [session.run(feeds(seed=9))["out_sample"] for _ in range(3)]
    assert torch.equal(kept, copy)
    assert len({tensor.data_ptr() for tensor in (kept, *later)}) == 4


def test_shapes_take_turns_in_a_bounded_number_of_graphs(cuda, plan):
    sizes = [(1, 12, 12), (2, 16, 16), (4, 24, 24), (3, 13, 17)]
    with session_on(plan, graphs=2) as session:
        for seed in range(4):
            for batch, height, width in sizes:
                given = feeds(batch, height, width, seed=seed)
                np.testing.assert_array_equal(session.run(given)["out_sample"], wanted(given))
            assert session.graph_count == (2 if seed else 0)


def test_a_graph_that_leaves_is_waited_for(cuda, plan, monkeypatch):
    with session_on(plan, graphs=1) as session:
        for _ in range(2):
            session.run(feeds())
        held, graphs = [], list(session._graphs._graphs)
        monkeypatch.setattr(cuda.current, "synchronize", lambda: held.append(list(session._graphs._graphs)))
        for _ in range(2):
            session.run(feeds(1))
        assert held == [graphs]
        assert graphs != list(session._graphs._graphs)


def test_one_graph_is_captured_at_a_time(cuda, plan, monkeypatch):
    """And contexts are made of an engine one after the other: TensorRT's engines are not for two threads at once."""
    captured, made = [], []
    enqueue, create = running.enqueue, running.create_shared_context

    def note_capture(*given):
        captured.append((trt_fakes.capturing is not None, graph_pool.CAPTURING.locked()))
        return enqueue(*given)

    def note_context(library, engine, *given):
        (loaded,) = (one for one in plan_module._LOADED.values() if one.engine is engine)
        made.append(loaded.lock.locked())
        return create(library, engine, *given)

    monkeypatch.setattr(running, "enqueue", note_capture)
    monkeypatch.setattr(running, "create_shared_context", note_context)
    with session_on(plan) as session:
        for _ in range(2):
            session.run(feeds())
    assert set(captured) == {(False, False), (True, True)}
    assert made
    assert all(made)


def test_no_graphs_on_request(cuda, plan):
    with session_on(plan, graphs=0) as session:
        for seed in range(3):
            given = feeds(seed=seed)
            np.testing.assert_array_equal(session.run(given)["out_sample"], wanted(given))
        assert session.graph_count == 0


def test_a_failed_capture_is_said_once_and_the_session_goes_on(cuda, plan, capsys):
    cuda.fail_capture = True
    with session_on(plan) as session:
        for seed in range(4):
            given = feeds(seed=seed)
            np.testing.assert_array_equal(session.run(given)["out_sample"], wanted(given))
        assert session.graph_count == 0
    said = capsys.readouterr().err
    assert said.count("warning: no CUDA graph for") == 1
    assert "not permitted when stream is capturing" in said.replace("\n", " ")


def test_the_default_stream_is_left_to_others(cuda, plan):
    """TensorRT runs on a stream of the session's own then, in order with the default one; else on the caller's."""
    with session_on(plan, graphs=0) as session:
        session.run(feeds())
        (used,) = session._context._streams
        assert used == session._graphs.stream.cuda_stream != 0
        assert cuda.current in session._graphs.stream.waited_for
        assert session._graphs.stream in cuda.current.waited_for
        cuda.current = cuda.Stream()
        session.run(feeds())
        assert session._context._streams[-1] == cuda.current.cuda_stream
        assert session._scratch._done in cuda.current.waited_for, "buffers may still be in use on the stream before"


def test_the_profile_tuned_for_the_size_is_used(cuda, tmp_path):
    plan = write_plan(tmp_path / "engine.plan", [WIDE, TALL])
    with session_on(plan, graphs=0) as session:
        for height, profile in ((20, 0), (40, 1), (16, 0)):
            given = feeds(2, height, 16)
            np.testing.assert_array_equal(session.run(given)["out_sample"], wanted(given))
            assert session._context.active_optimization_profile == profile


def test_out_of_profile_says_what_fits_and_how_to_get_there(cuda, plan):
    with session_on(plan) as session, pytest.raises(EngineError) as caught:
        session.run(feeds(2, 32, 16))
    assert "height 96 to 192" in caught.value.message
    assert "got height 256" in caught.value.message
    assert "sdtrt build --backend tensorrt --height 96:128:256" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(2, CHANNELS, 16, 16)}, "sample must be float16"),
        ({"timestep": torch.zeros(3)}, "timestep must have the shape"),
        ({"extra": torch.zeros(1)}, "the engine takes sample, timestep"),
    ],
)
def test_wrong_feeds_never_reach_the_engine(change, message, cuda, plan):
    with session_on(plan) as session:
        with pytest.raises(EngineError, match=message):
            session.run(feeds() | change)
        assert not session._context._streams


def test_a_failing_run_names_the_cause(cuda, plan):
    with session_on(plan) as session:
        session._library.module._fail = "1: [executionContext.cpp] Error Code 1: Cuda Runtime (out of memory)"
        with pytest.raises(MemoryShortage, match="too little free memory"):
            session.run(feeds())
        session._library.module._fail = None
        np.testing.assert_array_equal(session.run(feeds())["out_sample"], wanted(feeds()))


def test_a_build_notes_what_a_session_takes(cuda, plan, tmp_path, monkeypatch):
    """`sdtrt.pipeline.opening.memory` reads it before sessions are opened."""
    profile = Profile(Range(1, 2, 4), Range(96, 128, 192), Range(96, 128, 192))
    spec = BuildSpec(ExportSpec(precision="fp16"), "tensorrt", (profile,))
    request = Request(tmp_path / "model.onnx", tmp_path, CONTRACT, spec, None, False)
    library = fake_library("tensorrt 8.6.1")
    monkeypatch.setattr(checking, "why_not_runnable", lambda library, spec: None)
    monkeypatch.setattr(libraries, "open_library", lambda backend: library)
    monkeypatch.setattr(checking, "reference_of", lambda request: None)
    info = checking.check(library, request, lambda message: None, {})
    assert info["scratch_bytes"] == trt_fakes.Engine.device_memory_size
    assert info["unchecked"] is None


def test_non_contiguous_feeds(cuda, plan):
    given = feeds()
    given["sample"] = given["sample"].transpose(2, 3)
    with session_on(plan) as session:
        np.testing.assert_array_equal(session.run(given)["out_sample"], wanted(given))


def test_close_frees_and_may_come_twice(cuda, plan):
    session = session_on(plan)
    session.run(feeds())
    session.close()
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.run(feeds())


def test_nothing_is_freed_before_the_gpu_has_finished(cuda, plan, monkeypatch):
    session = session_on(plan)
    for _ in range(2):
        session.run(feeds())
    held, finish = [], session._scratch.finish
    monkeypatch.setattr(
        session._scratch, "finish", lambda: held.append((session.graph_count, *session._buffers._memory)) or finish()
    )
    session.close()
    assert held == [(1, "sample", "timestep", "encoder_hidden_states")]


def test_sessions_share_the_engine_and_not_the_context(cuda, plan):
    library = fake_library("tensorrt 8.6.1")
    options = {"device": torch.device("cuda"), "library": library}
    first = TensorRTSession(plan, CONTRACT, **options)
    second = TensorRTSession(plan, CONTRACT, **options)
    assert first._plan.loaded is second._plan.loaded
    assert first._context is not second._context
    first.close()
    given = feeds()
    np.testing.assert_array_equal(second.run(given)["out_sample"], wanted(given))
    second.close()
    assert not [loaded for loaded in plan_module._LOADED.values() if loaded.library is library]


# ------------------------------------------------------------------------------- inputs that stay, copied only once


def is_copied(session, given, name="encoder_hidden_states"):
    """Whether a run copies an input: what lay in its buffer is spoilt first, and shows in the result if it does not."""
    session._buffers._memory[name].fill_(7)
    return np.array_equal(session.run(given)["out_sample"], wanted(given))


@pytest.fixture
def session(cuda, plan):
    with session_on(plan) as opened:
        yield opened


@pytest.fixture
def given(session):
    """Feeds that the session has been run with."""
    made = feeds()
    session.run(made)
    return made


def test_the_same_text_is_copied_once(session, given):
    for seed in range(1, 5):  # from the stream, while captured, and from the graph
        step = feeds(seed=seed) | {"encoder_hidden_states": given["encoder_hidden_states"]}
        np.testing.assert_array_equal(session.run(step)["out_sample"], wanted(step))
    assert session.graph_count == 1
    assert not is_copied(session, given)


@pytest.mark.parametrize("name", ["sample", "timestep"])
def test_latents_and_timestep_are_copied_at_each_step(name, session, given):
    """A scheduler's CUDA graph may write them anew, which no tensor's version tells."""
    assert is_copied(session, given, name)


def test_another_tensor_of_the_same_shape_is_copied(session, given):
    assert is_copied(session, given | {"encoder_hidden_states": given["encoder_hidden_states"].clone() + 1})
    assert is_copied(session, given), "the buffer has the other one's values now"
    assert is_copied(session, given | {"encoder_hidden_states": given["encoder_hidden_states"].detach()})


def test_a_new_tensor_in_the_place_of_an_old_one_is_copied(session, given):
    """Python may give it the same id, the allocator the same address."""
    for _ in range(20):
        given["encoder_hidden_states"] = None
        given["encoder_hidden_states"] = torch.rand(2, 77, WIDTH).half()
        assert is_copied(session, given)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.add_(1),
        lambda tensor: tensor[0, :3].fill_(5),
        lambda tensor: tensor.detach().mul_(2),
        lambda tensor: torch.neg(tensor, out=tensor),
        lambda tensor: setattr(tensor, "data", tensor + 3),
        lambda tensor: setattr(tensor, "data", tensor.data.as_strided(tensor.shape, (77 * WIDTH, 1, 77))),
    ],
    ids=["in place", "through a view", "detached", "out", "other data", "other strides"],
)
@pytest.mark.parametrize("inference", [False, True])
def test_a_changed_tensor_is_copied(change, inference, session, given):
    with torch.inference_mode(inference):
        change(given["encoder_hidden_states"])
    assert is_copied(session, given)
    assert is_copied(session, given) == given["encoder_hidden_states"].is_inference()


def test_tensors_of_inference_mode_are_copied(session):
    """They have no version."""
    with torch.inference_mode():
        given = feeds()
        for _ in range(3):
            assert is_copied(session, given)
            given["encoder_hidden_states"].add_(1)


def test_tensors_on_the_cpu_are_copied(session, given, monkeypatch):
    """A NumPy array that shares their memory changes them without a trace."""
    monkeypatch.setattr(unchanged, "HOST", "cpu")
    given["encoder_hidden_states"] = given["encoder_hidden_states"].clone()
    for _ in range(3):
        assert is_copied(session, given)
        given["encoder_hidden_states"].numpy()[...] += 1


def test_another_shape_takes_the_buffer(session, given):
    other = feeds(1, 12, 12)
    session.run(other)
    assert is_copied(session, given)
    assert is_copied(session, other)


def test_a_copy_that_fails_leaves_nothing_known(session, given, monkeypatch):
    """It may have written half of the buffer."""
    sound = session._buffers.view
    failing = feeds(seed=1)
    refusing = {"encoder_hidden_states": torch.empty(3)}  # of a shape that copy_ does not take
    monkeypatch.setattr(session._buffers, "view", lambda name, shape: refusing.get(name, sound(name, shape)))
    with pytest.raises(RuntimeError, match="must match"):
        session.run(failing)
    monkeypatch.setattr(session._buffers, "view", sound)
    assert is_copied(session, given)


def test_a_run_that_fails_after_the_copy_is_waited_for(session, given, cuda):
    """Its copies may still be under way when another stream's run leaves them out."""
    failing = feeds(seed=1)
    cuda.current = first = cuda.Stream()
    session._library.module._fail = "an error"
    with pytest.raises(EngineError):
        session.run(failing)
    assert session._scratch._done.stream is first
    session._library.module._fail = None
    cuda.current = cuda.Stream()
    session.run(failing)
    assert session._scratch._done in cuda.current.waited_for


def test_no_tensor_is_kept_alive(session):
    given = feeds()
    last = weakref.ref(given["encoder_hidden_states"])
    session.run(given)
    del given
    assert last() is None


# ------------------------------------------------------------------------------------------ one scratch memory for all


@pytest.fixture
def needs(monkeypatch):
    """Make engines need so much scratch memory."""
    return lambda size: trt_fakes.need_scratch(monkeypatch, size)


@pytest.mark.parametrize("label", LABELS)
def test_sessions_share_the_scratch_memory(label, cuda, plan, needs):
    """The one that needs the most is opened first."""
    scratch = Scratch()
    needs(8192)
    with session_on(plan, label, scratch=scratch) as large:
        needs(4096)
        with session_on(plan, label, scratch=scratch) as small:
            for seed in range(4):
                for session in (large, small):
                    given = feeds(seed=seed)
                    np.testing.assert_array_equal(session.run(given)["out_sample"], wanted(given))
            found = [context.device_memory for session in (large, small) for context in contexts_of(session)]
            assert len(found) == 4, "one for the stream and one for the graph, each"
            assert set(found) == {scratch._block.data_ptr()}
            assert scratch._block.numel() == 8192
            assert (large.scratch_bytes, small.scratch_bytes) == (8192, 4096)


def contexts_of(session):
    return [session._context, *(graph.run.context for graph in session._graphs._graphs.values())]


def test_a_session_that_needs_more_leaves_the_others_where_they_are(cuda, plan, needs):
    """CUDA graphs have the address: the memory must neither move nor be freed."""
    scratch = Scratch()
    with session_on(plan, scratch=scratch) as small:
        small.run(feeds())
        small.run(feeds())
        before, block = {context.device_memory for context in contexts_of(small)}, weakref.ref(small._block)
        needs(8192)
        with session_on(plan, scratch=scratch) as large:
            large.run(feeds())
            assert large._context.device_memory not in before
            assert large._block.numel() == 8192
            assert {context.device_memory for context in contexts_of(small)} == before == {block().data_ptr()}
            np.testing.assert_array_equal(small.run(feeds())["out_sample"], wanted(feeds()))
            small.close()
            assert block() is None, "and what nobody has any more is freed"


def test_a_session_on_its_own_has_its_own(cuda, plan):
    with session_on(plan) as one, session_on(plan) as other:
        assert one._context.device_memory != other._context.device_memory
        assert one._scratch is not other._scratch


def test_one_sessions_run_waits_for_the_others_on_any_stream(cuda, plan):
    scratch = Scratch()
    with session_on(plan, scratch=scratch) as one, session_on(plan, scratch=scratch) as other:
        cuda.current = first = cuda.Stream()
        one.run(feeds())
        assert scratch._done.stream is first
        cuda.current = second = cuda.Stream()
        other.run(feeds())
        assert scratch._done in second.waited_for
        assert scratch._done.stream is second
        cuda.current = third = cuda.Stream()
        one.run(feeds())
        assert scratch._done in third.waited_for


def test_threads_take_turns_in_a_scratch(cuda, plan, monkeypatch):
    """From waiting for the last run to noting the own one, nobody else may come between."""
    scratch, inside, most = Scratch(), 0, 0
    enqueue = running.enqueue

    def slowly(*arguments):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.005)
        enqueue(*arguments)
        inside -= 1

    monkeypatch.setattr(running, "enqueue", slowly)

    def work(seed):
        with session_on(plan, graphs=0, scratch=scratch) as session:
            for _ in range(5):
                session.run(feeds(seed=seed))

    in_threads(work, ((seed,) for seed in range(4)))
    assert most == 1


def test_a_closed_session_keeps_nothing_of_the_scratch(cuda, plan):
    scratch = Scratch()
    one, other = session_on(plan, scratch=scratch), session_on(plan, scratch=scratch)
    block = weakref.ref(scratch._block)
    one.run(feeds())
    one.close()
    np.testing.assert_array_equal(other.run(feeds())["out_sample"], wanted(feeds()))
    other.close()
    del scratch
    assert block() is None
    assert one._plan is other._plan is None


def test_the_other_gpu_is_refused(cuda):
    scratch = Scratch()
    scratch.block(1, torch.device("cpu", 0))
    with pytest.raises(AssertionError, match="one GPU"):
        scratch.block(1, torch.device("cpu", 1))


# ----------------------------------------------------------------------------------------------------------- the plans


def test_a_replaced_plan_is_loaded_anew(cuda, plan):
    library = fake_library("tensorrt 8.6.1")
    first = load_plan(plan, CONTRACT, library, 0)
    write_plan(plan, [WIDE, TALL])
    assert len(load_plan(plan, CONTRACT, library, 0).profiles) == 2
    assert len(first.profiles) == 1


def test_threads_load_one_engine(cuda, plan):
    library, loaded = fake_library("tensorrt 8.6.1"), []
    in_threads(lambda: loaded.append(load_plan(plan, CONTRACT, library, 0)), [()] * 4)
    assert len({id(one) for one in loaded}) == 1


def test_a_plan_of_another_component_is_refused(cuda, plan):
    other = unet_contract({**CONFIG, "cross_attention_dim": WIDTH}, "fp32")
    with pytest.raises(EngineError, match=r"takes .*sample \(float16\).* and not .*sample \(float32\)"):
        TensorRTSession(plan, other, device=torch.device("cuda"), library=fake_library("tensorrt 8.6.1"))


def test_a_damaged_plan_says_how_to_rebuild(cuda, plan):
    data = plan.read_bytes()
    plan.write_bytes(data[:-20] + bytes(20))
    with pytest.raises(EngineError, match="damaged") as caught:
        session_on(plan)
    assert "sdtrt build --backend tensorrt --force" in caught.value.hint


def test_half_a_plan_is_found_by_its_sidecar(cuda, plan):
    """Before TensorRT reads it, which may crash on it."""
    sidecar = {"files": {plan.name: {"size_bytes": plan.stat().st_size}}}
    (plan.parent / "entry.json").write_text(json.dumps(sidecar))
    with session_on(plan):
        pass
    plan.write_bytes(plan.read_bytes()[:40])
    with pytest.raises(EngineError, match=f"cut short: 40 of {sidecar['files'][plan.name]['size_bytes']} bytes"):
        session_on(plan)


def test_a_plan_of_another_version_says_which(cuda, tmp_path):
    plan = write_plan(tmp_path / "engine.plan", "not for this version", version=(10, 3, 0, 26))
    plan.write_bytes(plan.read_bytes() + b"\xff")
    with pytest.raises(EngineError, match=r"built by TensorRT 10\.3\.0\.26, and this is 8\.6\.1"):
        session_on(plan)


def test_a_cpu_is_no_place_for_tensorrt(plan):
    with pytest.raises(EngineError, match="not on cpu") as caught:
        TensorRTSession(plan, CONTRACT, device=torch.device("cpu"), library=fake_library("tensorrt 8.6.1"))
    assert "onnxruntime" in caught.value.hint


def test_profiles_from_shapes_and_the_nearest_one():
    wide, tall = (profile_of(CONTRACT, shapes) for shapes in (WIDE, TALL))
    assert wide.bounds["latent_height"] == (12, 16, 24)
    assert wide.bounds["tokens"] == (77, 77, 77)
    sizes = {"batch": 2, "latent_height": 24, "latent_width": 16, "tokens": 77}
    assert choose_profile([wide, tall], sizes) == 1, "24 is nearer to 32 than to 16, by ratio"
    assert choose_profile([wide, tall], {**sizes, "latent_height": 20}) == 0
    with pytest.raises(EngineError, match=r"tokens 77 .*of 2 profiles.*got tokens 154"):
        choose_profile([wide, tall], {**sizes, "tokens": 154})


def test_exact_profiles_come_first():
    exact, loose = PlanProfile({"batch": (2, 2, 2)}), PlanProfile({"batch": (1, 1, 8)})
    assert choose_profile([loose, exact], {"batch": 2}) == 1
    assert choose_profile([loose, exact], {"batch": 3}) == 0


# -------------------------------------------------------------------------------------------------------- PyCUDA


@pytest.fixture
def driver(cuda, monkeypatch):
    fake = FakePyCuda()
    monkeypatch.setattr(pycuda_module, "_driver", lambda: fake)
    pycuda_module._primary_context.cache_clear()
    yield fake
    pycuda_module._primary_context.cache_clear()


@pytest.fixture
def use(monkeypatch):
    """Make a fake library the usual one."""

    def choose(label):
        library = fake_library(label)
        monkeypatch.setattr(libraries, "open_library", lambda backend: library)

    return choose


@pytest.mark.parametrize("label", LABELS)
def test_pycuda_session(label, driver, use, plan):
    use(label)
    with PyCudaSession(plan, CONTRACT) as session:
        results = []
        for batch, height in ((2, 16), (4, 24), (1, 12)):
            given = {name: tensor.numpy() for name, tensor in feeds(batch, height).items()}
            results.append((session.run(given)["out_sample"], wanted(given)))
        assert driver.active == 0, "the context is current only while it is needed"
    for result, right in results:
        np.testing.assert_array_equal(result, right)
    assert driver.freed == 4
    with pytest.raises(EngineError, match="closed"):
        session.run(given)


def test_pycuda_leaves_the_context_as_it_was_after_an_error(driver, use, plan):
    use("tensorrt 8.6.1")
    plan.write_bytes(plan.read_bytes()[:-20] + bytes(20))
    with pytest.raises(EngineError, match="damaged"):
        PyCudaSession(plan, CONTRACT)
    assert driver.active == 0


@pytest.mark.parametrize("kind", ["PyCUDA", "PyTorch"])
def test_every_session_lets_the_entry_go_when_it_closes(kind, driver, use, plan, tmp_path):
    use("tensorrt 8.6.1")
    session = PyCudaSession(plan, CONTRACT) if kind == "PyCUDA" else session_on(plan)
    hold = plan.open("rb")
    session.keep(hold)
    session.close()
    assert hold.closed


def test_the_example_runs_the_unet_and_proves_it_first(driver, use, plan, tmp_path, monkeypatch, capsys):
    use("tensorrt 8.6.1")
    directory = EngineDirectory(tmp_path / "engines")
    profile = Profile(Range(1, 2, 4), Range(96, 128, 192), Range(96, 128, 192))

    def publish(component):
        def make(folder):
            shutil.copy(plan, folder / "engine.plan")
            return {"contract": CONTRACT.to_json()}

        key = {"component": component, "backend": "tensorrt", "precision": "fp16", "profiles": [asdict(profile)]}
        return directory.obtain("engine", {**key, "options": {"version_compatible": False}}, make)

    publish("text_encoder")
    script = Path(__file__).resolve().parents[2] / "scripts" / "run_engine_pycuda.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(directory.path)])
    with pytest.raises(SystemExit, match="no such TensorRT engine of a UNet"):
        runpy.run_path(str(script))
    entry = publish("unet")
    runpy.run_path(str(script))
    assert capsys.readouterr().out.startswith(f"{entry.name}: out_sample float16 [2, {CHANNELS}, 16, 16], std ")
    flip(entry.file("engine.plan"))
    with pytest.raises(CacheError, match="damaged"):
        runpy.run_path(str(script))


def test_numpy_has_no_kernels_to_run_between_several_plans(plan):
    list_file(plan).write_text("[]")
    with pytest.raises(EngineError, match="leaves some of its work to PyTorch") as caught:
        PyCudaSession(plan, CONTRACT)
    assert "--split-attention 0" in caught.value.hint


def test_numpy_has_no_bfloat16(plan):
    contract: Contract = unet_contract(CONFIG, "bf16")
    with pytest.raises(EngineError, match="NumPy has no bfloat16, which sample is"):
        PyCudaSession(plan, contract)


def test_the_torch_free_path_imports_no_torch():
    """Opening an engine of the engine directory with PyCUDA, up to the missing library."""
    code = (
        "import sys, pathlib, sdtrt.backends.tensorrt.pycuda, sdtrt.engines.directory, sdtrt.backends.open\n"
        "sdtrt.engines.directory.EngineDirectory(pathlib.Path('none')).entries('engine')\n"
        "print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
