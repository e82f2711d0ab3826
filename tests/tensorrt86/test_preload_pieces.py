"""Engines in pieces, loaded ahead of a request: all their plans are, and each is proven."""

import pytest
from piece_fakes import two_pieces, written
from test_preload import _gpu, hashed, loaded, publish, refuse, share  # noqa: F401  # some are fixtures
from trt_fakes import FakeCuda, fake_torch

from sdtrt.backends.tensorrt86 import session as session_module


@pytest.fixture
def entry(directory, monkeypatch, _gpu):  # noqa: F811
    """An engine in two pieces."""
    monkeypatch.setattr(session_module, "torch", fake_torch(FakeCuda()))
    return publish(directory, write=lambda plan: written(two_pieces(plan), ("before", "after")))


def test_a_session_shares_what_was_loaded_and_nothing_is_read_twice(entry, directory, loaded, hashed):  # noqa: F811
    share(entry, directory, loaded, hashed, lambda session: [step.plan.loaded for step in session._steps])


def test_a_damaged_file_is_never_deserialised_and_the_session_says_so(entry, directory, loaded, hashed):  # noqa: F811
    refuse(entry, "engine.plan.1", directory, loaded, hashed)
