"""Long runs in one process: memory stays, and so does a seed's image. The long one: `benchmarks/reliability.py`."""

from __future__ import annotations

import statistics
import sys
from itertools import pairwise

import pytest
from soak import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def grown_by(found, warm):
    """Bytes of growth after the images that warm the process up: a share would say less, the larger the process."""
    return found["resident_bytes"][found["generations"]] - found["resident_bytes"][warm]


@pytest.mark.slow
def test_a_hundred_generations_leave_memory_as_it_was():
    """Six requests after the warm-up: a leak of the size of a picture or of a small model is found."""
    found = run(100, 0, warm=40)
    assert found["same_image_before_and_after"]
    assert grown_by(found, 40) <= 1_600_000


@pytest.mark.slow
def test_two_hundred_openings_of_the_pipeline_leave_memory_as_it_was():
    """A request leaves at most half of the 26 kB that a leak had left of it (`benchmarks/reliability.md`).

    A leak grows all the time. Python's table of interned strings grows once, by 4 MB, when it is full: after some 100
    to 400 openings, as the libraries of the process have filled it. The median of several stretches tells one from the
    other.
    """
    found = run(300, 0, warm=100, each=1, every=25)
    assert found["same_image_before_and_after"]
    memory = [size for number, size in sorted(found["resident_bytes"].items()) if number >= 100]
    assert statistics.median(after - before for before, after in pairwise(memory)) <= 25 * 13_000
