"""Kills, full disks, no permission: the next run works, nothing partial is loaded, nothing of a user's is lost."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from dataclasses import replace

import pytest
from faults import KINDS, Campaign, new_folder, served

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs fork")

POINTS = {"export": 6, "file": 6, "build": 10, "images": 10, "image": 10}  # of which two at random moments
LIMIT = 6000  # bytes: less than the smallest result
# An entry of the engine directory, and a file of the user's.
TWO_FAST = [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ("export", "image"))) for kind in KINDS]


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


@pytest.mark.slow
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


def test_a_kill_between_two_bars_of_progress_holds_up_nobody(campaign):
    """tqdm's lock belongs to all forks of a process, and one that is killed never gives it back."""
    assert campaign.strike("images", kill_counting=True) == "killed"
    assert campaign.problems == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_at_any_moment_is_a_clean_error(campaign, kind):
    for point in spread(campaign.operations[kind] // 2, 4):
        end = campaign.strike(kind, fail_at=point, errno=errno.ENOSPC)
        assert end in ("error", "done")
    assert campaign.problems == []


@pytest.mark.parametrize("kind", TWO_FAST)
def test_files_that_may_not_grow_are_a_clean_error(campaign, kind):
    assert campaign.strike(kind, limit=LIMIT) == "error"
    assert campaign.problems == []


@pytest.mark.parametrize("kind", TWO_FAST)
def test_without_permission_to_write_nothing_is_lost(campaign, kind):
    shut = [path for path in (campaign.folder / "engines", campaign.folder / "out") if path.exists()]
    for path in shut:
        path.chmod(0o555)
    ended = campaign.server.ask(kind, campaign.folder, unprivileged=True)
    for path in shut:
        path.chmod(0o755)
    reads_only = kind == "build"  # the engine is there
    assert ended["end"] == ("done" if reads_only else "error"), ended
    assert campaign.strike(kind) == "done"
    assert campaign.problems == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems")
@pytest.mark.slow
def test_a_full_file_system_is_a_clean_error_and_no_loss(campaign, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", small], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount here")
    try:
        new_folder(small / "place")
        full = replace(campaign, folder=small / "place")
        for kind in KINDS:
            assert full.server.ask(kind, full.folder)["end"] == "done"
        for kind in KINDS:
            for room in (4096, 65536, 150_000):
                filler = small / "filler"
                free = shutil.disk_usage(small).free
                filler.write_bytes(bytes(max(0, free - room)))
                ended = full.server.ask(kind, full.folder)
                assert ended["end"] in ("error", "done"), ended
                filler.unlink()
                full.strike(kind)
        assert full.problems == []
    finally:
        subprocess.run(["umount", "-l", small], check=True)


@pytest.mark.slow
def test_an_interrupt_at_any_moment_leaves_nothing(campaign):
    dice = random.Random(6)
    for kind in KINDS:
        for _ in range(2):
            campaign.strike(kind, interrupt_after=dice.uniform(0, campaign.seconds[kind]))
    assert campaign.problems == []
    assert {name.split(": ")[1] for name in campaign.counts} <= {"interrupted", "done"}
    assert [path.name for path in (campaign.folder / "engines" / ".building").iterdir()] == []
    assert not [path.name for path in (campaign.folder / "out").iterdir() if path.name.startswith(".")]


def test_eight_processes_make_one_engine(server, learned, tmp_path):
    """All want an engine that nobody has: one export, one build, eight right results."""
    folder = new_folder(tmp_path / "place")
    ended = server.ask("crowd", folder)
    assert ended["end"] == "done", ended
    assert ended["value"]["results"] == [learned.references["build"]] * 8
    assert sorted(ended["value"]["made"]) == ["onnx", "onnxruntime"]
