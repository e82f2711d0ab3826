"""`--gpus 0,1`: two workers behind one queue, here without GPUs; one of them is ended under load."""

from __future__ import annotations

import os
import signal
import time

import pytest
import requests
from test_server import PROMPTS, QUICK, metrics, serving

pytestmark = pytest.mark.slow
JOBS = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("two"), "--gpus", "0,1", "--warm", "64x64", "--max-batch", "2") as server:
        yield server


def batches(server):
    """The workers that made batches, by their numbers, in order."""
    return [one["worker"] for one in server.lines() if one["event"] == "batch"]


def wait_for(condition, what):
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.05)


def submitted(server):
    """Jobs of several clients, which no two workers get the same of."""
    return [
        server.post(
            "/api/v1/jobs",
            {"prompt": PROMPTS[0], **QUICK, "steps": 8, "seed": seed},
            headers={"x-client-id": f"c{seed}"},
        )
        for seed in range(JOBS)
    ]


def test_each_worker_is_warm_before_it_takes_requests_and_both_share_the_work(server):
    wait_for(lambda: len(server.workers()) == 2, "two workers")
    both = {0, 1}
    wait_for(lambda: {*batches(server)} == both, "each has made the size that was to be warm")
    before = len(batches(server))
    told = [server.over(one) for one in submitted(server)]
    assert [one["state"] for one in told] == ["done"] * JOBS
    assert [one["images"][0]["seed"] for one in told] == list(range(JOBS))
    assert {*batches(server)[before:]} == both


def test_where_one_worker_ends_the_other_goes_on_and_a_new_one_comes(server):
    first = server.workers()[0]
    answers = submitted(server)
    os.kill(first, signal.SIGKILL)
    assert [server.over(one)["state"] for one in answers] == ["done"] * JOBS
    wait_for(lambda: len(server.workers()) == 3, "a new worker")
    assert metrics(server)["sdtrt_worker_ends_total"] == 1
    assert requests.get(f"{server.url}/readyz", timeout=30).text == "ready"
