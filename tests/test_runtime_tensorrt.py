"""TensorRT sessions: on fakes of the GPU's side that compute with real memory, one of each version's API."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import trt_fakes
from factories import flip, in_threads
from hypothesis import given
from hypothesis import strategies as st
from trt_fakes import (
    CHANNELS,
    EPSILON,
    GROUPS,
    HEADS,
    PIXELS,
    WIDTH,
    FakeCuda,
    FakePyCuda,
    expected,
    fake_library,
    profile_shapes,
    write_plan,
)

from sdtrt.backends import scratch as scratch_module
from sdtrt.backends import unchanged
from sdtrt.backends.scratch import Scratch
from sdtrt.backends.tensorrt import checking
from sdtrt.backends.tensorrt import plan as plan_module
from sdtrt.backends.tensorrt import pycuda as pycuda_module
from sdtrt.backends.tensorrt import session as session_module
from sdtrt.backends.tensorrt.build import Request
from sdtrt.backends.tensorrt.plan import PlanProfile, choose_profile, load_plan, profile_of
from sdtrt.backends.tensorrt.pycuda import PyCudaSession
from sdtrt.backends.tensorrt.session import TensorRTSession
from sdtrt.backends.tensorrt.versions import libraries, running
from sdtrt.backends.tensorrt.versions.messages import REBUILD
from sdtrt.backends.tensorrt86 import torch_kernels
from sdtrt.backends.tensorrt86.memory_layout import attention_bytes, last_uses, lay_out, size_bytes
from sdtrt.backends.tensorrt86.pieces import Normalization, Piece, list_file, read_pieces, write_pieces
from sdtrt.backends.tensorrt86.torch_kernels import compute
from sdtrt.common import host
from sdtrt.common.errors import CacheError, EngineError, MemoryShortage
from sdtrt.engines.directory import EngineDirectory
from sdtrt.specs import BuildSpec, ExportSpec, Profile, Range
from sdtrt.specs.contract import Attention, Contract, TensorSpec, unet_contract

CONFIG = {"in_channels": CHANNELS, "out_channels": CHANNELS, "cross_attention_dim": WIDTH}
CONTRACT = unet_contract(CONFIG, "fp16")
WIDE = profile_shapes((1, 2, 4), (12, 16, 24), (12, 16, 24))
TALL = profile_shapes((1, 2, 2), (24, 32, 40), (12, 16, 24))
LABELS = ["tensorrt 8.6.1", "tensorrt 10.0.1", "tensorrt 10.1.0", "tensorrt 11.4.0.106"]
LABELS += ["tensorrt_lean 10.15.1.29", "tensorrt_rtx 1.7.1.116"]


@pytest.fixture
def cuda(monkeypatch):
    """A GPU made of the CPU."""
    fake = FakeCuda()
    monkeypatch.setattr(host, "gpus", lambda: (host.Gpu("Fake", (8, 9), 2**30),))
    for module in (session_module, scratch_module):
        monkeypatch.setattr(module, "torch", trt_fakes.fake_torch(fake))
    monkeypatch.setattr(unchanged, "HOST", "none")
    monkeypatch.setattr(session_module, "_cuda_device", lambda device, library: torch.device("cpu", 0))
    return fake


@pytest.fixture
def plan(tmp_path, request):
    """A plan of the version that the test runs, 8.6.1 where it does not say."""
    label = request.node.callspec.params.get("label", "") if hasattr(request.node, "callspec") else ""
    version = fake_library(label or "tensorrt 8.6.1").version
    magic = b"vtrt" if label.startswith("tensorrt_rtx") else b"ftrt"
    return write_plan(tmp_path / "engine.plan", [WIDE], (*version, 0, 0)[:4], magic)


def feeds(batch=2, height=16, width=16, tokens=77, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, CHANNELS, height, width, generator=generator).half(),
        "timestep": torch.rand(batch, generator=generator),
        "encoder_hidden_states": torch.randn(batch, tokens, WIDTH, generator=generator).half(),
    }


def wanted(arrays):
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    return expected(arrays["sample"], arrays["timestep"], arrays["encoder_hidden_states"])


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


@pytest.fixture
def split_plan(tmp_path):
    """An engine in two pieces, with PyTorch's attention of the pixels between them."""
    return written(trt_fakes.two_pieces(tmp_path / "engine.plan"), ("before", "after"))


@pytest.fixture
def text_plan(tmp_path):
    """The same, with a piece before them that takes the text only."""
    return written(trt_fakes.three_pieces(tmp_path / "engine.plan"), ("text", "before", "last"))


@pytest.fixture
def norm_plan(tmp_path):
    """An engine in two pieces, with PyTorch's group normalisation between them."""
    return written(trt_fakes.normalized_pieces(tmp_path / "engine.plan"), ("doubling", "adding"))


def written(pieces, kinds):
    """The plans of an engine's pieces, and their list; returns the first."""
    write_pieces(pieces[0].plan, pieces)
    for kind, piece in zip(kinds, pieces, strict=True):
        shapes = {spec.name: [spec.dims] * 3 for spec in piece.contract.inputs}
        write_plan(piece.plan, [shapes], kind=kind)
    return pieces[0].plan


def with_attention(given):
    """What the engine in two pieces computes."""
    pixels = given["sample"].float().flatten(2).transpose(1, 2)
    query, key, value = (factor * pixels.unflatten(2, (HEADS, -1)).transpose(1, 2) for factor in (1, 2, 3))
    states = torch.softmax(0.5 * query @ key.transpose(2, 3), -1) @ value
    attended = states.transpose(1, 2).flatten(2).transpose(1, 2).reshape(given["sample"].shape)
    return wanted(given) + attended.numpy()


def with_norm(given):
    """What the engine with a normalisation computes."""
    groups = 2 * given["sample"].float().unflatten(1, (GROUPS, -1))
    mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), correction=0, keepdim=True)
    normal = ((groups - mean) / (variance + EPSILON).sqrt()).flatten(1, 2)
    return wanted(given) + normal.numpy()


@pytest.fixture
def captured_kernels(monkeypatch):
    """PyTorch's kernels are captured with the pieces: here a fake graph notes them down as it does TensorRT's."""

    def noted(cut, tensors, real=torch_kernels.compute):
        out, given = real(cut, tensors), dict(tensors)
        if trt_fakes.capturing is not None:
            trt_fakes.capturing.append(lambda: out.copy_(real(cut, given)))
        return out

    monkeypatch.setattr(session_module, "compute", noted)


@pytest.fixture
def text_runs(monkeypatch):
    """The text that the piece for it is run on, each time."""
    runs, kind = [], trt_fakes.KINDS["text"]

    def compute(encoder_hidden_states):
        runs.append(encoder_hidden_states.copy())
        return kind.compute(encoder_hidden_states)

    monkeypatch.setitem(trt_fakes.KINDS, "text", replace(kind, compute=compute))
    return runs


def test_what_is_made_of_the_text_alone_is_made_once_for_each_text(cuda, text_plan, captured_kernels, text_runs):
    first, other = feeds(seed=0), feeds(seed=9)
    with session_on(text_plan) as session:
        for turn in range(8):  # from the stream, while captured, and from the graph; the text changes in the midst
            text = (first if turn < 5 else other)["encoder_hidden_states"]
            step = feeds(seed=turn) | {"encoder_hidden_states": text}
            found = session.run(step)["out_sample"]
            np.testing.assert_allclose(found.float(), with_attention(step), rtol=2e-3, atol=1e-2)
        assert session.graph_count == 1
        assert [len(told["Layers"]) for told in session.information()] == [1, 1, 1]
    assert len(text_runs) == 2
    for given, run in zip((first, other), text_runs, strict=True):
        np.testing.assert_array_equal(run, given["encoder_hidden_states"])


def test_what_was_made_of_a_text_is_made_again_after_that_failed(cuda, text_plan, captured_kernels, text_runs):
    given = feeds()
    with session_on(text_plan) as session:
        session.run(given)
        session._library.module._fail = "1: [executionContext.cpp] Error Code 1: Cuda Runtime (out of memory)"
        for _ in range(2):
            with pytest.raises(MemoryShortage):
                session.run(feeds(seed=1))
        session._library.module._fail = None
        for step in (feeds(seed=1), given, given):
            found = session.run(step)["out_sample"]
            np.testing.assert_allclose(found.float(), with_attention(step), rtol=2e-3, atol=1e-2)
    assert len(text_runs) == 3


def test_pieces_and_attention_run_in_order_on_the_stream_and_in_the_graph(cuda, split_plan, captured_kernels):
    with session_on(split_plan) as session:
        for seed in range(5):
            given = feeds(seed=seed)
            found = session.run(given)["out_sample"]
            np.testing.assert_allclose(found.float(), with_attention(given), rtol=2e-3, atol=1e-2)
        assert session.graph_count == 1
        assert session.scratch_bytes == session._block.numel() + attention_bytes(read_pieces(split_plan, CONTRACT))
        assert attention_bytes(read_pieces(split_plan, CONTRACT)) == 2 * np.prod(trt_fakes.PIXELS)
        assert [len(told["Layers"]) for told in session.information()] == [1, 1]
        with pytest.raises(EngineError, match="height 128; got height 192"):
            session.run(feeds(height=24))


@pytest.mark.parametrize("own", [False, True], ids=["the session's stream", "the caller's stream"])
def test_what_lies_between_pieces_is_on_their_stream(own, cuda, split_plan, captured_kernels, monkeypatch):
    """Anywhere else it would not wait for the piece before, nor the next piece for it."""
    streams = []
    monkeypatch.setattr(session_module, "compute", lambda *given: streams.append(cuda.current) or compute(*given))
    with session_on(split_plan, graphs=0) as session:
        stream = cuda.Stream() if own else session._stream
        with cuda.stream(stream if own else cuda.current):
            session.run(feeds())
        assert streams == [stream]


def test_pieces_and_a_norm_run_in_order_on_the_stream_and_in_the_graph(cuda, norm_plan, captured_kernels):
    with session_on(norm_plan) as session:
        for seed in range(5):
            given = feeds(seed=seed)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = session.run(given)["out_sample"]
            np.testing.assert_allclose(found.float(), with_norm(given), rtol=2e-3, atol=1e-2)
        assert session.graph_count == 1
        doubled = session._crossing["doubled"]
        assert session._block.data_ptr() <= doubled.data_ptr() < session._block.data_ptr() + session._block.numel()
        # What the plans need of scratch memory, what crosses, and the norm's result.
        assert session.scratch_bytes == 4096 + 2 * doubled.nbytes


def test_how_plans_lay_out_what_they_give_to_each_other_is_no_matter_of_the_session(
    cuda, split_plan, captured_kernels, monkeypatch
):
    """`channels_last`: one writes [N][H][W][C] where PyTorch has memory for [N,C,H,W], and the other reads that."""
    before, after = trt_fakes.KINDS["before"], trt_fakes.KINDS["after"]

    def write(**given):
        found = before.compute(**given)
        return found | {"doubled": found["doubled"].transpose(0, 2, 3, 1).reshape(found["doubled"].shape)}

    def read(doubled, **given):
        batch, channels, height, width = doubled.shape
        images = doubled.reshape(batch, height, width, channels).transpose(0, 3, 1, 2)
        return after.compute(doubled=images, **given)

    for name, kind, function in (("before", before, write), ("after", after, read)):
        monkeypatch.setitem(trt_fakes.KINDS, name, replace(kind, compute=function))
    with session_on(split_plan) as session:
        for seed in range(4):
            found = session.run(feeds(seed=seed))["out_sample"]
            np.testing.assert_allclose(found.float(), with_attention(feeds(seed=seed)), rtol=2e-3, atol=1e-2)
        assert session.graph_count == 1


def test_what_nothing_else_takes_is_normalised_in_its_place(cuda, tmp_path, captured_kernels):
    pieces = trt_fakes.pieces_in_place(tmp_path / "engine.plan")
    with session_on(written(pieces, ("doubling", "adding in place"))) as session:
        for seed in range(5):
            given = feeds(seed=seed)
            np.testing.assert_allclose(session.run(given)["out_sample"].float(), with_norm(given), rtol=2e-3, atol=1e-2)
        assert session.graph_count == 1
        doubled, normal = session._crossing["doubled"], session._crossing["normal"]
        assert doubled.data_ptr() == normal.data_ptr()
        assert session.scratch_bytes == 4096 + doubled.nbytes


def test_what_is_normalised_and_taken_again_keeps_its_memory(norm_plan):
    first, second = last_uses(read_pieces(norm_plan, CONTRACT), ["out_sample"])
    assert first == {"sample"}
    assert second == {"doubled", "normal", "timestep", "encoder_hidden_states"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_norm_computes_in_fp32_under_autocast_too(dtype, monkeypatch):
    norm = Normalization("x", "y", 2, 1e-6)
    given = torch.randn(1, 8, 6, 4).to(dtype)
    place = torch.empty_like(given)
    inner, seen = torch.linalg.vector_norm, []
    monkeypatch.setattr(
        torch.linalg, "vector_norm", lambda *a, **b: seen.append(torch.is_autocast_enabled("cpu")) or inner(*a, **b)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compute(norm, {"x": given, "y": place})
    assert found is place
    assert seen == [False]  # a GPU's autocast would have it make a copy in fp32; a CPU's leaves it alone
    expected = torch.nn.functional.group_norm(given.double(), 2, eps=1e-6)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


def test_lists_from_before_there_were_norms_are_read(split_plan):
    file = list_file(split_plan)
    data = json.loads(file.read_text())
    for entry in data:
        assert entry.pop("normalizations") == []
    file.write_text(json.dumps(data))
    assert list(read_pieces(split_plan, CONTRACT)) == trt_fakes.two_pieces(split_plan)


def test_only_what_is_still_needed_keeps_its_memory(split_plan):
    pieces = read_pieces(split_plan, CONTRACT)
    assert [piece.plan.name for piece in pieces] == ["engine.plan", "engine.plan.1"]
    first, second = last_uses(pieces, ["out_sample"])
    assert first == {"query", "key", "value", "sample"}
    assert second == {"doubled", "attended", "timestep", "encoder_hidden_states"}


@given(data=st.data())
def test_what_crosses_lies_apart_from_all_that_is_still_needed(data):
    """Pieces in a row, each of which takes some of what those before it gave, and of what was normalised of that."""
    pieces, made, maker = [], [], {}
    for number in range(data.draw(st.integers(1, 6))):
        taken = data.draw(st.lists(st.sampled_from(made), unique=True)) if made else []
        sizes = data.draw(st.lists(st.integers(1, 400), min_size=1, max_size=4))
        outputs = [TensorSpec(f"{number}.{index}", "float16", (1, size, 1, 1)) for index, size in enumerate(sizes)]
        count = data.draw(st.integers(0, len(outputs)))
        norms = [Normalization(spec.name, f"{spec.name}.norm", 1, 1e-6) for spec in outputs[:count]]
        twice = [replace(norm, result=f"{norm.source}.other") for norm in norms if data.draw(st.booleans())]
        contract = Contract("unet", "fp16", tuple(taken), tuple(outputs))
        pieces.append(Piece(Path(f"engine.plan.{number}"), contract, (*norms, *twice)))
        sources = {spec.name: spec for spec in outputs}
        results = [replace(sources[norm.source], name=norm.result) for norm in (*norms, *twice)]
        made += [*outputs, *results]
        maker |= dict.fromkeys((spec.name for spec in (*outputs, *results)), number)
    own = [pieces[-1].contract.outputs[0].name]
    work = data.draw(st.lists(st.integers(0, 2000), min_size=len(pieces), max_size=len(pieces)))
    layout = lay_out(pieces, own, work)
    assert layout.places.keys() == {spec.name for spec in made} - set(own)
    begins = {name: offset for name, (offset, _) in layout.places.items()} | dict(enumerate(layout.work_offsets))
    sizes = {name: size_bytes(spec) for name, (_, spec) in layout.places.items()} | dict(enumerate(work))
    assert all(begin % 512 == 0 and begin + sizes[name] <= layout.size for name, begin in begins.items())
    # A plan runs at an even step, and what is normalised after it comes at the next.
    steps = {name: {2 * number + name.endswith((".norm", ".other"))} for name, number in maker.items()}
    steps |= {number: {2 * number} for number in range(len(pieces))}
    for number, piece in enumerate(pieces):
        for name in piece.inputs:
            steps[name].add(2 * number)
        for norm in piece.cuts:
            steps[norm.source].add(2 * number + 1)
    for one, other in combinations(begins, 2):
        if max(map(min, (steps[one], steps[other]))) <= min(map(max, (steps[one], steps[other]))):
            apart = begins[one] + sizes[one] <= begins[other] or begins[other] + sizes[other] <= begins[one]
            assert apart or other == f"{one}.norm", "only what is normalised in place has its source's"
    for name in maker.keys() - set(own):
        if name.endswith(".norm") and (source := name.removesuffix(".norm")) not in own:
            is_taken_once = max(steps[source]) == 2 * maker[source] + 1 and f"{source}.other" not in maker
            assert (begins[name] == begins[source]) == is_taken_once


def test_what_a_plan_works_in_and_what_crosses_later_have_the_same_bytes():
    """Much of either at different times: together they need as much as the step that needs the most."""
    small, large = (TensorSpec(f"of {kib} KiB", "float16", (1, 512 * kib, 1, 1)) for kib in (1, 8))
    ends = (((), (small,)), ((small,), (large,)), ((large,), CONTRACT.outputs))
    pieces = [Piece(Path(f"engine.plan.{number}"), Contract("unet", "fp16", *end)) for number, end in enumerate(ends)]
    assert lay_out(pieces, ["out_sample"], [8 * 1024, 512, 1024]).size == 8 * 1024 + 1024 + 512
    assert lay_out(pieces, ["out_sample"], [10 * 1024, 512, 1024]).size == 10 * 1024 + 1024


def test_engines_in_pieces_share_the_scratch_memory_with_others(cuda, split_plan, needs, captured_kernels):
    """What lies between pieces is part of it, behind what the plans need; the fakes overwrite all that these have."""
    scratch, plan = Scratch(), write_plan(split_plan.with_name("whole.plan"), [WIDE])
    needs(2 * 10**6 + 1)
    with session_on(plan, scratch=scratch) as whole:
        needs(100_000)
        with session_on(split_plan, scratch=scratch) as split:
            for seed in range(4):
                inputs = feeds(seed=seed)
                found = split.run(inputs)["out_sample"]
                np.testing.assert_allclose(found.float(), with_attention(inputs), rtol=2e-3, atol=1e-2)
                np.testing.assert_array_equal(whole.run(inputs)["out_sample"], wanted(inputs))
            assert split._block is whole._block
            assert 100_000 < split.scratch_bytes < split._block.numel()


def test_a_piece_that_gives_another_size_than_listed_is_refused(cuda, split_plan, monkeypatch):
    """Its place in the scratch memory is of the listed size: more would be written over its neighbours."""
    real = running.prepare_context

    def larger(*arguments):
        return {name: tuple(2 * size for size in shape) for name, shape in real(*arguments).items()}

    with session_on(split_plan) as session:
        monkeypatch.setattr(running, "prepare_context", larger)
        with pytest.raises(EngineError, match="piece 0 gives query in another size"):
            session.run(feeds())


def with_attention_of(entry, **changes):
    return {**entry, "attentions": [{**entry["attentions"][0], **changes}]}


def with_dims_of(entry, name, dims, kind="inputs"):
    specs = [{**spec, "dims": dims} if spec["name"] == name else spec for spec in entry["contract"][kind]]
    return {**entry, "contract": {**entry["contract"], kind: specs}}


def with_output_of(entry, name):
    contract = entry["contract"]
    more = {**contract["outputs"][0], "name": name, "dims": [2, CHANNELS, 3, 3]}
    return {**entry, "contract": {**contract, "outputs": [*contract["outputs"], more]}}


def with_norm_of(entry, **changes):
    return {**entry, "normalizations": [{**entry["normalizations"][0], **changes}]}


def with_chained_norms(entry):
    """A second norm after the same piece, of what the first one gives."""
    first = entry["normalizations"][0]
    return {**entry, "normalizations": [first, {**first, "source": first["result"], "result": "again"}]}


@pytest.mark.parametrize(
    "change",
    [
        lambda data: [{**data[0], "normalizations": []}, data[1]],
        lambda data: [{**data[0], "normalizations": [{"source": "doubled", "result": "normal"}]}, data[1]],
        lambda data: [{**data[0], "normalizations": None}, data[1]],
        lambda data: [with_norm_of(data[0], groups=0), data[1]],
        lambda data: [with_norm_of(data[0], groups=-2), data[1]],
        lambda data: [with_norm_of(data[0], groups=3), data[1]],  # of four channels
        lambda data: [with_norm_of(data[0], groups=float("inf")), data[1]],
        lambda data: [with_norm_of(data[0], epsilon=0), data[1]],
        lambda data: [with_norm_of(data[0], epsilon=-1e-6), data[1]],
        lambda data: [with_norm_of(data[0], epsilon=float("nan")), data[1]],
        lambda data: [with_norm_of(data[0], epsilon=float("inf")), data[1]],
        lambda data: [with_norm_of(data[0], source="normal"), data[1]],
        lambda data: [with_chained_norms(data[0]), data[1]],
        lambda data: [with_norm_of(data[0], source="encoder_hidden_states"), data[1]],  # comes later, and is no image
        lambda data: [with_norm_of(data[0], result="other"), data[1]],
        lambda data: [with_norm_of(data[0], result="doubled"), data[1]],
        lambda data: [with_norm_of(data[0], result="out_sample"), data[1]],
        lambda data: [{**data[0], "normalizations": 2 * data[0]["normalizations"]}, data[1]],
        lambda data: [data[0], with_output_of(data[1], "normal")],
        lambda data: [data[0], with_output_of(data[1], "doubled")],
        lambda data: [with_output_of(data[0], "sample"), data[1]],
        lambda data: [with_dims_of(data[0], "doubled", [2, CHANNELS, 256], "outputs"), data[1]],
        lambda data: [with_dims_of(data[0], "doubled", ["batch", CHANNELS, 16, 16], "outputs"), data[1]],
        lambda data: [data[0], with_dims_of(data[1], "normal", [2, CHANNELS, 8, 32])],
        lambda data: json.loads(json.dumps(data).replace("float16", "int32")),
    ],
)
def test_a_list_with_a_norm_that_can_not_be_is_refused(change, norm_plan):
    file = list_file(norm_plan)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(EngineError, match="does not list the engine's pieces"):
        read_pieces(norm_plan, CONTRACT)


def test_what_an_engine_takes_may_be_normalised(norm_plan):
    """No build makes such a list, but what is read can be used."""
    file = list_file(norm_plan)
    first, second = json.loads(file.read_text())
    file.write_text(json.dumps([with_norm_of(first, source="sample"), second]))
    pieces = read_pieces(norm_plan, CONTRACT)
    layout = lay_out(pieces, ["out_sample"], [0, 0])
    assert layout.size == 2 * size_bytes(layout.places["normal"][1]) == 2 * 2 * CHANNELS * 16 * 16 * 2
    assert layout.places.keys() == {"doubled", "normal"}
    assert attention_bytes(pieces) == 0


@pytest.mark.parametrize("run", [1, 2])
def test_a_run_that_fails_between_pieces_is_waited_for_all_the_same(run, cuda, split_plan, monkeypatch):
    """What it has put on the session's stream is still to come: others of the scratch memory come after it."""
    real, calls = torch_kernels.compute, []

    def compute(cut, tensors):
        calls.append(cut)
        if len(calls) == run:
            raise cuda.OutOfMemoryError("CUDA out of memory")
        return real(cut, tensors)

    monkeypatch.setattr(session_module, "compute", compute)
    with session_on(split_plan, graphs=0) as session:
        for _ in range(run - 1):
            session.run(feeds())
        cuda.current.waited_for.clear()
        with pytest.raises(MemoryShortage):
            session.run(feeds())
        assert cuda.current.waited_for[-1] is session._stream
        found = session.run(feeds())["out_sample"]
        np.testing.assert_allclose(found.float(), with_attention(feeds()), rtol=2e-3, atol=1e-2)


def test_a_callers_autocast_does_not_change_what_the_next_piece_reads():
    attention = Attention(("query", "key", "value"), "attended", HEADS, CHANNELS // HEADS, 0.5)
    tensors = {name: torch.randn(PIXELS).half() for name in attention.sources}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute(attention, tensors).dtype == torch.float16


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[1:],
        lambda data: data[:1],
        lambda data: [{**data[0], "attentions": []}, data[1]],
        lambda data: [{**data[0], "attentions": [{"sources": ["query"]}]}, data[1]],
        lambda data: [{"contract": data[0]["contract"]}],
        lambda data: [],
        lambda data: {"pieces": data},
        lambda data: [with_attention_of(data[0], heads=0), data[1]],
        lambda data: [with_attention_of(data[0], width=-2), data[1]],
        lambda data: [with_attention_of(data[0], scale=float("nan")), data[1]],
        lambda data: [with_attention_of(data[0], sources=["query", "key"]), data[1]],
        lambda data: [with_attention_of(data[0], sources=["query", "key", "doubled"]), data[1]],
        lambda data: [with_dims_of(data[0], "sample", ["batch", CHANNELS, 16, 16]), data[1]],
        lambda data: [with_dims_of(data[0], "timestep", [2, 1]), data[1]],
        lambda data: [data[0], with_dims_of(data[1], "doubled", [2, CHANNELS, 8, 32])],
        lambda data: None,
    ],
)
def test_a_list_of_pieces_that_makes_no_engine_is_refused(change, cuda, split_plan):
    file = list_file(split_plan)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(EngineError, match="does not list the engine's pieces") as caught:
        session_on(split_plan)
    assert caught.value.hint == REBUILD


def test_numpy_has_no_attention_to_run_between_pieces(split_plan):
    with pytest.raises(EngineError, match="leaves some of its work to PyTorch") as caught:
        PyCudaSession(split_plan, CONTRACT)
    assert "--split-attention 0" in caught.value.hint


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
        held, graphs = [], list(session._graphs)
        monkeypatch.setattr(cuda.current, "synchronize", lambda: held.append(list(session._graphs)))
        for _ in range(2):
            session.run(feeds(1))
        assert held == [graphs]
        assert graphs != list(session._graphs)


def test_one_graph_is_captured_at_a_time(cuda, plan, monkeypatch):
    """And contexts are made of an engine one after the other: TensorRT's engines are not for two threads at once."""
    captured, made = [], []
    enqueue, create = running.enqueue, running.create_shared_context

    def note_capture(*given):
        captured.append((trt_fakes.capturing is not None, session_module._CAPTURING.locked()))
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
        (used,) = session._contexts[0]._streams
        assert used == session._stream.cuda_stream != 0
        assert cuda.current in session._stream.waited_for
        assert session._stream in cuda.current.waited_for
        cuda.current = cuda.Stream()
        session.run(feeds())
        assert session._contexts[0]._streams[-1] == cuda.current.cuda_stream
        assert session._scratch._done in cuda.current.waited_for, "buffers may still be in use on the stream before"


def test_the_profile_tuned_for_the_size_is_used(cuda, tmp_path):
    plan = write_plan(tmp_path / "engine.plan", [WIDE, TALL])
    with session_on(plan, graphs=0) as session:
        for height, profile in ((20, 0), (40, 1), (16, 0)):
            given = feeds(2, height, 16)
            np.testing.assert_array_equal(session.run(given)["out_sample"], wanted(given))
            assert session._contexts[0].active_optimization_profile == profile


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
        assert not session._contexts[0]._streams


def test_a_failing_run_names_the_cause(cuda, plan):
    with session_on(plan) as session:
        session._library.module._fail = "1: [executionContext.cpp] Error Code 1: Cuda Runtime (out of memory)"
        with pytest.raises(MemoryShortage, match="too little free memory"):
            session.run(feeds())
        session._library.module._fail = None
        np.testing.assert_array_equal(session.run(feeds())["out_sample"], wanted(feeds()))


def test_a_build_notes_what_a_session_takes(cuda, plan, tmp_path, monkeypatch):
    """`sdtrt.pipeline.memory` reads it before sessions are opened."""
    profile = Profile(Range(1, 2, 4), Range(96, 128, 192), Range(96, 128, 192))
    spec = BuildSpec(ExportSpec(precision="fp16"), "tensorrt", (profile,))
    request = Request(tmp_path / "model.onnx", tmp_path, CONTRACT, spec, None, False)
    library = fake_library("tensorrt 8.6.1")
    monkeypatch.setattr(checking, "why_not_runnable", lambda library, spec: None)
    monkeypatch.setattr(libraries, "open_library", lambda backend: library)
    monkeypatch.setattr(checking, "_compare", lambda request, feeds, outputs: {})
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
        session._scratch, "finish", lambda: held.append((session.graph_count, *session._buffers)) or finish()
    )
    session.close()
    assert held == [(1, "sample", "timestep", "encoder_hidden_states")]


def test_a_session_opened_in_inference_mode_runs_outside_it(cuda, split_plan, captured_kernels):
    with torch.inference_mode():
        session = session_on(split_plan)
    with session:
        for seed in range(3):
            given = feeds(seed=seed)
            found = session.run(given)["out_sample"]
            np.testing.assert_allclose(found.float(), with_attention(given), rtol=2e-3, atol=1e-2)


def test_sessions_share_the_engine_and_not_the_context(cuda, plan):
    library = fake_library("tensorrt 8.6.1")
    options = {"device": torch.device("cuda"), "library": library}
    first = TensorRTSession(plan, CONTRACT, **options)
    second = TensorRTSession(plan, CONTRACT, **options)
    assert first._plans[0] is second._plans[0]
    assert first._contexts[0] is not second._contexts[0]
    first.close()
    given = feeds()
    np.testing.assert_array_equal(second.run(given)["out_sample"], wanted(given))
    second.close()
    assert not [loaded for loaded in plan_module._LOADED.values() if loaded.library is library]


# ------------------------------------------------------------------------------- inputs that stay, copied only once


def is_copied(session, given, name="encoder_hidden_states"):
    """Whether a run copies an input: what lay in its buffer is spoilt first, and shows in the result if it does not."""
    session._buffers[name].fill_(7)
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
    sound = session._input
    failing = feeds(seed=1)
    refusing = {"encoder_hidden_states": torch.empty(3)}  # of a shape that copy_ does not take
    monkeypatch.setattr(session, "_input", lambda name, shape: refusing.get(name, sound(name, shape)))
    with pytest.raises(RuntimeError, match="must match"):
        session.run(failing)
    monkeypatch.setattr(session, "_input", sound)
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

    def choose(size):
        monkeypatch.setattr(trt_fakes.Engine, "device_memory_size", size)
        monkeypatch.setattr(trt_fakes.Engine, "device_memory_size_v2", size)

    return choose


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
    return [one for made in (session, *session._graphs.values()) for one in contexts_in(made).values()]


def contexts_in(made):
    return made._contexts if hasattr(made, "_contexts") else made.contexts


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
            assert large._contexts[0].device_memory not in before
            assert large._block.numel() == 8192
            assert {context.device_memory for context in contexts_of(small)} == before == {block().data_ptr()}
            np.testing.assert_array_equal(small.run(feeds())["out_sample"], wanted(feeds()))
            small.close()
            assert block() is None, "and what nobody has any more is freed"


def test_a_session_on_its_own_has_its_own(cuda, plan):
    with session_on(plan) as one, session_on(plan) as other:
        assert one._contexts[0].device_memory != other._contexts[0].device_memory
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
    assert one._plans == other._plans == ()


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
    script = Path(__file__).resolve().parents[1] / "scripts" / "run_engine_pycuda.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(directory.path)])
    with pytest.raises(SystemExit, match="no such TensorRT engine of a UNet"):
        runpy.run_path(str(script))
    entry = publish("unet")
    runpy.run_path(str(script))
    assert capsys.readouterr().out.startswith(f"{entry.name}: out_sample float16 [2, {CHANNELS}, 16, 16], std ")
    flip(entry.file("engine.plan"))
    with pytest.raises(CacheError, match="damaged"):
        runpy.run_path(str(script))


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
