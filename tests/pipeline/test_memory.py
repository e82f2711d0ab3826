"""Requests that can't fit in GPU memory are refused with what would fit. The GPU's free memory is a stand-in here."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from factories import engine_key_of, sd1_folder
from fault_server import UNET

from sdtrt.backends.scratch import Scratch
from sdtrt.common.errors import EngineError, MemoryShortage
from sdtrt.engines.entry import Entry
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening import memory, request
from sdtrt.pipeline.opening import open as pipeline_open
from sdtrt.pipeline.opening.memory import ALLOWANCE_BYTES, PADDING, by_scratch, demand_of, fitting, free_bytes
from sdtrt.specs import ModelSpec, Profile, Range, Sizes

GIB = 2**30
CUDA = torch.device("cuda")
SQUARE = Sizes(2, 1024, 1024)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return resolve_model(
        ModelSpec(str(sd1_folder(tmp_path_factory.mktemp("m") / "sd1", cross_attention_dim=32, **UNET)))
    )


def engine(weights, scratch, *profiles, backend="tensorrt"):
    """An engine's entry, as far as memory goes; figures in GiB."""
    info = {"plan_bytes": int(weights * GIB), "scratch_bytes": int(scratch * GIB)}
    key = engine_key_of(profiles=[asdict(one) for one in profiles], backend=backend)
    return Entry(Path("none"), "engine", key, info, {}, {}, 0.0)


def entries(sizes=SQUARE, images=1, weights=2.0, scratch=4.0):
    """The engines of a UNet, a text encoder and a VAE decoder for exactly one size."""
    return {
        "unet": engine(weights / 2, scratch, Profile.of(sizes)),
        "text_encoder": engine(weights / 4, 0.0, Profile.of(Sizes(images, 8, 8))),
        "vae_decoder": engine(weights / 4, scratch / 2, Profile.of(Sizes(images, sizes.height, sizes.width))),
    }


def refused(model, monkeypatch, free, found, sizes=SQUARE, images=1, precision="fp16"):
    """The error for that much free memory (GiB); None where the request passes."""
    spec = request.PipelineSpec(model, "tensorrt", precision, sizes, steps=2, images=images)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(free * GIB))
    try:
        memory.check_memory(spec, found)
    except MemoryShortage as error:
        return error
    return None


def test_what_fits_passes(model, monkeypatch):
    assert refused(model, monkeypatch, 6.25, entries()) is None
    assert refused(model, monkeypatch, 6.24, entries()) is not None


def test_the_refusal_has_what_is_needed_what_is_free_and_a_size(model, monkeypatch):
    error = refused(model, monkeypatch, 4.25, entries())
    assert error.message == "the engines for 1024x1024 pixels need 6.25 GiB of GPU memory, and 4.25 GiB are free"
    assert error.hint == "use --height 704 --width 704, or end other programs on the GPU"
    assert isinstance(error, EngineError)


@pytest.mark.parametrize(
    ("sizes", "images", "free", "hint"),
    [
        (SQUARE, 1, 2.27, "use --height 64 --width 64,"),
        (SQUARE, 1, 2.251, "use --height 16 --width 16,"),
        (Sizes(2, 1024, 512), 1, 5.0, "use --height 832 --width 384,"),
        (Sizes(2, 96, 128), 1, 4.25, "use --height 64 --width 64,"),
        (Sizes(2, 96, 56), 1, 4.25, "use --height 64 --width 32,"),
        (Sizes(16, 512, 512), 8, 6.0, "use --batch-size 7,"),
        (Sizes(16, 512, 512), 8, 2.75, "use --batch-size 1,"),
        (Sizes(8, 512, 512), 8, 4.25, "use --batch-size 4,"),
        (Sizes(8, 1024, 1024), 4, 2.75, "use --batch-size 1 --height 704 --width 704,"),
    ],
)
def test_what_is_suggested_is_smaller_in_the_same_shape(model, monkeypatch, sizes, images, free, hint):
    error = refused(model, monkeypatch, free, entries(sizes, images), sizes, images)
    assert error.hint.startswith(hint)


@pytest.mark.parametrize("free", [2.5, 3.0, 4.0, 5.5])
@pytest.mark.parametrize(("sizes", "images"), [(SQUARE, 1), (Sizes(12, 768, 512), 6), (Sizes(2, 2048, 640), 2)])
def test_what_is_suggested_fits(sizes, images, free):
    """Engines for exactly that size, with scratch memory that grows with images x pixels."""
    demand = demand_of(entries(sizes, images), sizes, images)
    count, smaller = fitting(demand, int(free * GIB), sizes, images)
    part = smaller.batch * smaller.height * smaller.width / (sizes.batch * sizes.height * sizes.width)
    assert smaller.batch == sizes.batch // images * count
    own = demand_of(entries(smaller, count, scratch=4.0 * part), smaller, count)
    assert own.total <= free * GIB < demand.total


def test_engines_for_larger_sizes_are_to_be_built_anew(model, monkeypatch):
    """Their scratch memory is for the largest, whatever is asked for: a smaller request alone would not help."""
    wide = Profile(Range(2, 2, 2), Range(512, 512, 1024), Range(512, 512, 1024))
    found = {"unet": engine(2, 4, wide)}
    error = refused(model, monkeypatch, 4.0, found, Sizes(2, 512, 512))
    assert error.hint.startswith("that size fits with engines for nothing larger (sdtrt build --batch 2 --height 512")
    error = refused(model, monkeypatch, 2.75, found, Sizes(2, 512, 512))
    assert error.hint.startswith("use --height 320 --width 320 with engines for nothing larger (sdtrt build --batch 2 ")


@pytest.mark.parametrize(("precision", "word"), [("fp16", "GPU, or use a GPU"), ("fp32", "--precision fp16")])
def test_weights_that_do_not_fit(model, monkeypatch, precision, word):
    error = refused(model, monkeypatch, 2.0, entries(), precision=precision)
    assert word in error.hint
    assert "the weights alone take too much" in error.hint


@pytest.mark.parametrize("value", [None, "4096", -1, 1.5, True, 10**400, [1]])
def test_engines_that_do_not_say_what_they_need_are_let_through(model, monkeypatch, value):
    found = {"unet": engine(1, 1, Profile.of(SQUARE))}
    found["unet"].info["scratch_bytes"] = value
    assert refused(model, monkeypatch, 0.1, found) is None
    del found["unet"].info["scratch_bytes"]
    assert refused(model, monkeypatch, 0.1, found) is None


def test_free_memory_has_what_pytorch_keeps_for_later(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * GIB)
    assert free_bytes(CUDA) == 7 * GIB
    assert free_bytes(torch.device("cpu")) is None


def test_free_memory_that_can_not_be_asked_for_is_unknown(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert free_bytes(CUDA) is None


def test_engines_share_the_largest_scratch_memory():
    found = entries(scratch=4.0)
    found["vae_decoder"].info["scratch_bytes"] = 5 * GIB
    assert demand_of(found, SQUARE, 1).scratch == 5 * GIB
    assert demand_of(found, SQUARE, 1).wanted == 5 * GIB
    assert by_scratch(found) == ["vae_decoder", "unet", "text_encoder"]
    del found["vae_decoder"].info["scratch_bytes"]
    assert by_scratch(found)[0] == "unet", "engines that don't say it come last"


def test_a_pipelines_sessions_share_one_scratch_and_the_largest_comes_first(model, monkeypatch):
    found, opened = entries(), []
    found["vae_decoder"].info["scratch_bytes"] = 5 * GIB
    monkeypatch.setattr(pipeline_open, "ensure_all", lambda *_, **__: found)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    monkeypatch.setattr(pipeline_open, "open_session", lambda *given: opened.append(given) or nullcontext(given))
    spec = request.PipelineSpec(model, "tensorrt", "fp16", SQUARE, steps=2)
    with pipeline_open._open_engines(spec, None, None, True, None) as running:
        assert list(running.entries) == ["unet", "text_encoder", "vae_decoder"]
        assert {name: given[0] for name, given in running.sessions.items()} == found
    assert [entry for entry, *_ in opened] == [found[name] for name in ("vae_decoder", "unet", "text_encoder")]
    assert len({id(scratch) for *_, scratch in opened}) == 1
    assert isinstance(opened[0][2], Scratch)


def packages(sizes=SQUARE, images=1, largest=None):
    """Engines of Inductor of a UNet, a text encoder and a VAE decoder; of a range, where `largest` is given."""
    high = largest or sizes
    pairs = zip((sizes.batch, sizes.height, sizes.width), (high.batch, high.height, high.width), strict=True)
    unet = Profile(*(Range(low, low, most) for low, most in pairs))
    decoder = Profile(Range(images, images, high.batch // 2), unet.height, unet.width)
    text = Profile.of(Sizes(images, 8, 8))
    figures = {"unet": (1.0, 4.0, unet), "text_encoder": (0.5, 0.25, text), "vae_decoder": (0.5, 2.0, decoder)}
    return {name: engine(*figure, backend="inductor") for name, figure in figures.items()}


def test_engines_that_ask_for_their_scratch_share_it():
    """They take turns in one pool: it is as large as the one needs that needs the most."""
    demand = demand_of(packages(), SQUARE, 1)
    assert demand.fixed == pytest.approx(2 * PADDING * GIB + ALLOWANCE_BYTES, abs=8)
    assert (demand.scratch, demand.wanted) == (4 * GIB, 4 * GIB)


def test_a_run_asks_for_what_its_own_size_takes(model, monkeypatch):
    """An engine for a range is measured at its largest size, and a graph is of the request's."""
    small, large = Sizes(2, 512, 512), Sizes(8, 1024, 1024)
    found = packages(small, largest=large)
    found["text_encoder"].info["scratch_bytes"] = 0
    assert demand_of(found, small, 1).scratch == 4.0 / 16 * GIB
    assert refused(model, monkeypatch, 2.61, found, small) is None
    assert refused(model, monkeypatch, 2.59, found, small) is not None
    assert demand_of(found, large, 4).scratch == 4 * GIB


def test_what_is_suggested_fits_engines_that_ask_for_their_scratch(model, monkeypatch):
    error = refused(model, monkeypatch, 5.0, packages())
    assert error.message == "the engines for 1024x1024 pixels need 6.35 GiB of GPU memory, and 5.00 GiB are free"
    assert error.hint == "use --height 832 --width 832, or end other programs on the GPU"
    assert demand_of(packages(), Sizes(2, 832, 832), 1).total <= 5 * GIB


def test_what_sdxl_takes_on_an_h200_is_counted():
    """PyTorch had 8.75 GB there, after three pictures of 1024x1024 (benchmarks/graph-memory-sdxl-h200.json)."""
    figures = {"text_encoder": (0.25, 0.04), "text_encoder_2": (1.39, 0.04), "unet": (5.13, 0.39)}
    figures["vae_decoder"] = (0.10, 1.38)
    found = {
        name: engine(*(one * 1e9 / GIB for one in pair), Profile.of(profile), backend="inductor")
        for (name, pair), profile in zip(figures.items(), (*[SQUARE] * 3, Sizes(1, 1024, 1024)), strict=True)
    }
    assert 8.75e9 <= demand_of(found, SQUARE, 1).total <= 9.1e9


def test_the_pool_is_as_large_as_what_is_asked_of_pytorch(model):
    """Engines that are told where to work have a block beside it."""
    spec = request.PipelineSpec(model, "inductor", "fp16", SQUARE, steps=2)
    assert memory.pool_bytes(spec, packages()) == 4 * GIB
    assert memory.pool_bytes(spec, entries()) == 0
    assert memory.pool_bytes(spec, {**packages(), "unet": entries()["unet"]}) == 2 * GIB


def test_free_memory_leaves_open_pipelines_theirs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * GIB)
    monkeypatch.setattr(memory, "idle_bytes", lambda device: GIB // 2)
    assert free_bytes(CUDA) == 6.5 * GIB


def test_no_engines_need_nothing():
    assert demand_of({}, SQUARE, 1).total == 0
    assert demand_of(entries(), SQUARE, 1).total == 6 * GIB + ALLOWANCE_BYTES
