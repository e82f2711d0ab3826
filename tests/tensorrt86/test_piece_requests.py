"""What is asked of the process that builds one piece, and what is read back of an engine in pieces."""

import json

import piece_fakes
import pytest
from factories import checked_spec
from trt_fakes import CONTRACT, fake_library

from sdtrt.backends.tensorrt.build import Request
from sdtrt.backends.tensorrt.versions import running
from sdtrt.backends.tensorrt86 import precision
from sdtrt.backends.tensorrt86.build import PieceRequest
from sdtrt.common.errors import BuildError, UsageError
from sdtrt.specs import BuildSpec, ExportSpec, Profile, Range, Sizes

STATIC = Profile.of(Sizes(2, 512, 512))
DYNAMIC = Profile(Range(1, 2, 4), Range(512, 512, 512), Range(512, 512, 512))

PROFILE = Profile(Range(1, 2, 4), Range(96, 128, 192), Range(96, 128, 192))


@pytest.fixture
def request_of_it(tmp_path):
    spec = BuildSpec(ExportSpec(), "tensorrt", (PROFILE,))
    return Request(tmp_path / "model.onnx", tmp_path, CONTRACT, spec, tmp_path / "cache", False)


def test_a_request_for_a_piece_comes_out_of_the_pipe_as_it_went_in(request_of_it, tmp_path):
    piece = PieceRequest.of(request_of_it, tmp_path / "3.onnx", CONTRACT, 3, ("x", "y"))
    assert PieceRequest.from_json(json.loads(json.dumps(piece.to_json()))) == piece
    assert (piece.plan.name, piece.log.name) == ("engine.plan.3", "build.log.3")
    assert piece.onnx == tmp_path / "3.onnx"
    assert (piece.folder, piece.timing_cache) == (request_of_it.folder, request_of_it.timing_cache)


def test_the_piece_of_the_text_and_those_of_few_layers_may_be_in_any_precision_and_no_other(request_of_it, monkeypatch):
    """They are a few products, or one convolution; the builder chooses. The whole may not be."""
    monkeypatch.setattr(running, "layer_precisions", lambda told: told)
    library = fake_library("tensorrt 8.6.1")
    few, wide, half = {"fp32": 1}, {"fp32": 9}, {"fp16": 9}
    with pytest.raises(BuildError, match="an engine in fp16 was asked for"):
        precision.read_precision(library, request_of_it, [wide])
    monkeypatch.setattr(precision, "read_pieces", lambda plan, contract: piece_fakes.three_pieces(plan))
    assert precision.read_precision(library, request_of_it, [wide, half, few]) == {"fp32": 10, "fp16": 9}
    with pytest.raises(BuildError, match="its computing layers are: 11 fp32"):
        precision.read_precision(library, request_of_it, [wide, few, few])
    with pytest.raises(BuildError, match="an engine in fp16 was asked for"):
        precision.read_precision(library, request_of_it, [half, wide, half])


@pytest.mark.parametrize(
    "wrong",
    [
        {"backend": "tensorrt-rtx", "profiles": (STATIC,), "split_attention": 2048},
        {"backend": "tensorrt", "profiles": (STATIC, STATIC), "split_attention": 2048},
        {"backend": "tensorrt", "profiles": (DYNAMIC,), "split_attention": 2048},
        {"backend": "tensorrt", "profiles": (STATIC,), "split_attention": 2048, "version_compatible": True},
    ],
)
def test_pieces_that_can_not_be_are_refused(wrong):
    with pytest.raises(UsageError):
        checked_spec(ExportSpec(), **wrong)
