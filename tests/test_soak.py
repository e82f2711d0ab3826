"""Long runs in one process: memory stays, and so does a seed's image. The long one: `benchmarks/reliability.py`."""

from __future__ import annotations

import sys

import pytest
from soak import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_a_hundred_generations_leave_memory_as_it_was():
    found = run(100, 0, warm=40)
    assert found["same_image_before_and_after"]
    assert found["growth"] <= 0.02


@pytest.mark.slow
def test_a_thousand_generations_leave_memory_as_it_was():
    found = run(1000, 0)
    assert found["same_image_before_and_after"]
    assert found["growth"] <= 0.02
