"""Sessions on engines in pieces: on the fakes of `trt_fakes`, plans and PyTorch's kernels between them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import piece_fakes
import pytest
import torch
import trt_fakes
from hypothesis import given
from hypothesis import strategies as st
from piece_fakes import HEADS, PIXELS, with_attention, with_norm, written
from trt_fakes import CHANNELS, CONTRACT, FakeCuda, fake_gpu, fake_library, feeds, profile_shapes, wanted, write_plan

from sdtrt.backends.scratch import Scratch
from sdtrt.backends.tensorrt.plan import list_file
from sdtrt.backends.tensorrt.session import TensorRTSession
from sdtrt.backends.tensorrt.versions import running
from sdtrt.backends.tensorrt.versions.messages import REBUILD
from sdtrt.backends.tensorrt86 import session as session_module
from sdtrt.backends.tensorrt86 import torch_kernels
from sdtrt.backends.tensorrt86.memory_layout import attention_bytes, last_uses, lay_out, size_bytes
from sdtrt.backends.tensorrt86.pieces import Normalization, Piece, read_pieces
from sdtrt.backends.tensorrt86.session import PiecesSession, open_plans
from sdtrt.backends.tensorrt86.torch_kernels import compute
from sdtrt.common.errors import EngineError, MemoryShortage
from sdtrt.specs.contract import Attention, Contract, TensorSpec

WIDE = profile_shapes((1, 2, 4), (12, 16, 24), (12, 16, 24))
CUDA = torch.device("cuda")


@pytest.fixture
def cuda(monkeypatch):
    """A GPU made of the CPU."""
    return fake_gpu(monkeypatch, FakeCuda(), session_module)


@pytest.fixture
def needs(monkeypatch):
    """Make engines need so much scratch memory."""
    return lambda size: trt_fakes.need_scratch(monkeypatch, size)


def session_on(plan, **options):
    return PiecesSession(plan, CONTRACT, device=CUDA, library=fake_library("tensorrt 8.6.1"), **options)


@pytest.fixture
def split_plan(tmp_path):
    """An engine in two pieces, with PyTorch's attention of the pixels between them."""
    return written(piece_fakes.two_pieces(tmp_path / "engine.plan"), ("before", "after"))


@pytest.fixture
def text_plan(tmp_path):
    """The same, with a piece before them that takes the text only."""
    return written(piece_fakes.three_pieces(tmp_path / "engine.plan"), ("text", "before", "last"))


@pytest.fixture
def norm_plan(tmp_path):
    """An engine in two pieces, with PyTorch's group normalisation between them."""
    return written(piece_fakes.normalized_pieces(tmp_path / "engine.plan"), ("doubling", "adding"))


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
    for step, run in zip((first, other), text_runs, strict=True):
        np.testing.assert_array_equal(run, step["encoder_hidden_states"])


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
        assert attention_bytes(read_pieces(split_plan, CONTRACT)) == 2 * np.prod(PIXELS)
        assert [len(told["Layers"]) for told in session.information()] == [1, 1]
        with pytest.raises(EngineError, match="height 128; got height 192"):
            session.run(feeds(height=24))


@pytest.mark.parametrize("own", [False, True], ids=["the session's stream", "the caller's stream"])
def test_what_lies_between_pieces_is_on_their_stream(own, cuda, split_plan, captured_kernels, monkeypatch):
    """Anywhere else it would not wait for the piece before, nor the next piece for it."""
    streams = []
    monkeypatch.setattr(session_module, "compute", lambda *given: streams.append(cuda.current) or compute(*given))
    with session_on(split_plan, graphs=0) as session:
        stream = cuda.Stream() if own else session._graphs.stream
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
    pieces = piece_fakes.pieces_in_place(tmp_path / "engine.plan")
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
    assert list(read_pieces(split_plan, CONTRACT)) == piece_fakes.two_pieces(split_plan)


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
    with TensorRTSession(plan, CONTRACT, device=CUDA, library=fake_library("tensorrt 8.6.1"), scratch=scratch) as whole:
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
        assert cuda.current.waited_for[-1] is session._graphs.stream
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


def test_a_session_opened_in_inference_mode_runs_outside_it(cuda, split_plan, captured_kernels):
    with torch.inference_mode():
        session = session_on(split_plan)
    with session:
        for seed in range(3):
            given = feeds(seed=seed)
            found = session.run(given)["out_sample"]
            np.testing.assert_allclose(found.float(), with_attention(given), rtol=2e-3, atol=1e-2)


def test_whether_there_is_a_list_decides_on_the_kind_of_session(cuda, split_plan, tmp_path, monkeypatch):
    monkeypatch.setattr(session_module.libraries, "open_library", lambda backend: fake_library("tensorrt 8.6.1"))
    for plan, kind in ((split_plan, PiecesSession), (write_plan(tmp_path / "whole.plan", [WIDE]), TensorRTSession)):
        with open_plans(plan, CONTRACT, device=CUDA) as session:
            assert type(session) is kind
            assert session.run(feeds())["out_sample"].shape == feeds()["sample"].shape
