"""Kills, full disks and revoked permissions: the next run works, nothing partial is loaded, no file of the user's is lost."""

from __future__ import annotations

import errno
import os
import random
import shutil
from dataclasses import replace

import pytest
from faults import KINDS, Campaign, new_folder, served

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs fork")

POINTS = {"export": 6, "file": 6, "build": 10, "images": 10, "image": 10}  # of which two at random moments
FOOTPRINT = 2**20  # bytes: less than a job writes, more than a folder takes


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("faults")) as running:
        yield running


@pytest.fixture(scope="module")
def learned(server, tmp_path_factory):
    first = Campaign(server, new_folder(tmp_path_factory.mktemp("undisturbed") / "place"))
    first.learn()
    return first


@pytest.fixture
def campaign(learned, tmp_path):
    """A folder of its own, where every job has been run once."""
    shutil.copytree(learned.folder, tmp_path / "place")
    return replace(learned, folder=tmp_path / "place", counts={}, problems=[])


def spread(count: int, points: int) -> list[int]:
    """Numbers from 1 to `count`, evenly; the last ones are where things are renamed into place."""
    return sorted({1 + round(index * (count - 1) / (points - 1)) for index in range(points)})


@pytest.mark.parametrize("kind", KINDS)
def test_kills_leave_nothing_broken(campaign, kind):
    points = spread(campaign.operations[kind], POINTS[kind] - 2)
    ends = [campaign.strike(kind, kill_at=point) for point in points]
    assert ends == ["killed"] * len(points)
    dice = random.Random(kind)
    for _ in range(2):
        campaign.strike(kind, kill_after=dice.uniform(0, campaign.seconds[kind]))
    assert campaign.problems == []
    swept = campaign.server.ask("sweep", campaign.folder)
    assert swept["end"] == "done"
    assert list((campaign.folder / "engines" / ".building").iterdir()) == []
