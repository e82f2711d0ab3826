"""Lists of an engine's pieces that say something else, or are damaged: only clean errors."""

import json

import piece_fakes
import pytest
from fuzzing import fuzz, only_clean_errors
from hypothesis import strategies as st
from test_fuzz import JSON_VALUES, damaged, put
from trt_fakes import CONTRACT

from sdtrt.backends.tensorrt.plan import list_file
from sdtrt.backends.tensorrt86 import memory_layout
from sdtrt.backends.tensorrt86.pieces import read_pieces, write_pieces
from sdtrt.backends.tensorrt86.session import profile_of_pieces


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("lists")


@st.composite
def lists_of_pieces(draw, good):
    """A list that says something else, or is damaged."""
    data = json.loads(good)
    if draw(st.booleans()):
        return damaged(draw, good)
    for _ in range(draw(st.integers(1, 3))):
        names = ("contract", "attentions", "inputs", "outputs", "sources", "result", "heads", "width", "scale", "dims")
        names += ("name", "dtype", "tokens", "normalizations", "source", "groups", "epsilon")
        data = put(data, draw(st.sampled_from(names)), draw(JSON_VALUES))
    return json.dumps(data).encode()


@fuzz(data=st.data())
def test_lists_of_an_engines_pieces(place, data):
    """What is accepted can be used: shapes, memory and profile follow from it."""
    plan = place / "engine.plan"
    kind = data.draw(st.sampled_from([piece_fakes.two_pieces, piece_fakes.normalized_pieces]))
    write_pieces(plan, kind(plan))
    file = list_file(plan)
    file.write_bytes(data.draw(lists_of_pieces(file.read_bytes())))
    with only_clean_errors():
        pieces = read_pieces(plan, CONTRACT)
        own = [spec.name for spec in CONTRACT.outputs]
        assert memory_layout.lay_out(pieces, own, [1] * len(pieces)).size > 0
        assert memory_layout.attention_bytes(pieces) >= 0
        profile = profile_of_pieces(CONTRACT, pieces)
        assert not profile.misfits({name: bounds[0] for name, bounds in profile.bounds.items()})
