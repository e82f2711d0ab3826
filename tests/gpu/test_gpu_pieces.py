"""An engine in pieces, PyTorch's attention between them, on a real GPU: the miniature at 512x512."""

from __future__ import annotations

import gpu_engines
import pytest
import torch
from factories import in_threads
from gpu_engines import NEEDS_GPU, NEEDS_TENSORRT

from sdtrt.backends.open import open_session
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.common.metrics import relative_l2
from sdtrt.engines.entry import stored_contract
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.tracing import UNetCall
from sdtrt.models.loading import load_unet
from sdtrt.specs import Sizes

pytestmark = [*NEEDS_GPU, NEEDS_TENSORRT, pytest.mark.timeout(1200)]
CUDA, SIZES = torch.device("cuda"), Sizes(2, 512, 512)
FP16_ERROR = 5e-3


@pytest.fixture(scope="module")
def split(directory):
    if not libraries.open_library("tensorrt").has("weak typing"):
        pytest.skip("only TensorRT 8.6 leaves attention to PyTorch")
    return gpu_engines.engine("split", directory)


@pytest.fixture(scope="module")
def expected(split):
    """PyTorch's results in fp32, by seed."""
    model, entry = split
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    call = UNetCall(load_unet(model, torch.float32).to(CUDA))
    with torch.inference_mode():
        return [call(*(tensor.float() for tensor in feeds_of(entry, seed).values())).cpu() for seed in range(3)]


def feeds_of(entry, seed):
    return {name: tensor.to(CUDA) for name, tensor in seeded_feeds(stored_contract(entry), SIZES, seed).items()}


def error(actual, expected):
    return relative_l2(actual.float().cpu().numpy(), expected.numpy())


def test_it_is_in_pieces_and_right_on_the_stream_and_from_the_graph(split, expected):
    entry = split[1]
    assert entry.info["pieces"] > 1
    assert sum(name.startswith("engine.plan") for name in entry.files) == entry.info["pieces"] + 1
    with open_session(entry, CUDA) as session:
        for turn in range(9):
            outputs = session.run(feeds_of(entry, turn % 3))["out_sample"]
            assert error(outputs, expected[turn % 3]) < FP16_ERROR
        assert session.graph_count == 1


def test_what_is_made_of_the_text_is_that_texts(split):
    """Made once for a text: the same tensor comes at each step, then another one."""
    entry = split[1]
    with torch.no_grad(), open_session(entry, CUDA) as kept, open_session(entry, CUDA) as anew:
        for text_seed in (0, 1, 0):
            text = feeds_of(entry, text_seed)["encoder_hidden_states"]
            for seed in range(4):
                step = feeds_of(entry, seed) | {"encoder_hidden_states": text}
                found = kept.run(step)["out_sample"]
                expected = anew.run(step | {"encoder_hidden_states": text.clone()})["out_sample"]
                assert error(found, expected.float().cpu()) < FP16_ERROR
                other = anew.run(feeds_of(entry, seed) | {"encoder_hidden_states": -text})["out_sample"]
                assert error(found, other.float().cpu()) > 2 * FP16_ERROR


def test_outputs_stay_what_they_are(split):
    entry = split[1]
    with open_session(entry, CUDA) as session:
        kept = [session.run(feeds_of(entry, turn % 3))["out_sample"] for turn in range(5)]
        copies = [tensor.clone() for tensor in kept]
        for turn in range(5):
            session.run(feeds_of(entry, turn % 3))
        assert all(torch.equal(one, copy) for one, copy in zip(kept, copies, strict=True))


def test_two_threads_on_streams_of_their_own(split, expected):
    entry, errors, failures = split[1], [], []

    def work(seed):
        try:
            with torch.cuda.stream(torch.cuda.Stream()), open_session(entry, CUDA) as session:
                for turn in range(12):
                    outputs = session.run(feeds_of(entry, (seed + turn) % 3))["out_sample"]
                    torch.cuda.current_stream().synchronize()
                    errors.append(error(outputs, expected[(seed + turn) % 3]))
        except BaseException as problem:
            failures.append(problem)

    in_threads(work, ((seed,) for seed in range(2)))
    assert not failures
    assert len(errors) == 24
    assert max(errors) < FP16_ERROR


def test_close_gives_the_memory_back(split):
    entry = split[1]
    for turn in range(4):
        with open_session(entry, CUDA) as session:
            for _ in range(3):
                session.run(feeds_of(entry, 0))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if turn == 0:
            before = torch.cuda.mem_get_info()[0]
    assert before - torch.cuda.mem_get_info()[0] < 64 * 2**20
