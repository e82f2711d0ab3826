"""Engines of fixed sizes behind a server: batches are padded to those that are there, and engines may go meanwhile."""

from __future__ import annotations

import io
import json
import threading
from collections import Counter

import numpy as np
import pytest
import requests
from asked import job_over, pixels
from conftest import in_thread
from PIL import Image

import sdtrt
from sdtrt.engines.directory import EngineDirectory
from sdtrt.specs import GenerateSpec, ModelSpec

pytest.importorskip("openvino", reason="needs the extra openvino")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_the_cpu")]
BODY = {"prompt": "red on blue", "steps": 2, "width": 64, "height": 64}
BATCHES = (1, 2, 4, 8)
LEVELS = 2  # of 255


@pytest.fixture(scope="module")
def alone(tmp_path_factory, smallest):
    """Pictures made alone, by their seeds; engines of every batch are in the folder `engines`."""
    root, found = tmp_path_factory.mktemp("padded"), {}
    for count in reversed(BATCHES):
        sizes = {"num_images": 8, "batch_size": count, "seed": 0, "output": root / f"{count}"}
        shape = {name: BODY[name] for name in ("steps", "width", "height")}
        spec = GenerateSpec((BODY["prompt"],), ModelSpec(str(smallest)), "openvino", precision="fp32", **sizes, **shape)
        report = sdtrt.generate(spec, engine_dir=root / "engines", progress=False)
        found = {one.seed: pixels(one.path.read_bytes()) for one in report.images}
    return root, found


@pytest.fixture(scope="module")
def server(alone, smallest):
    options = {"models": (ModelSpec(str(smallest)),), "allow_build": False, "batch_wait_ms": 200.0, "open_models": 4}
    with in_thread(alone[0], backend="openvino", precision="fp32", **options) as running:
        yield running


def over(server, **body):
    """A job that is over."""
    return job_over(server, {**BODY, **body})


def check(server, told, expected):
    """The sizes of the engines that made a job's pictures, each of which is the one made alone."""
    assert told["state"] == "done", told["error"]
    sizes = []
    for one in told["images"]:
        data = requests.get(server.url + one["url"], timeout=30).content
        assert np.abs(pixels(data) - expected[one["seed"]]).max() <= LEVELS
        sizes.append(json.loads(Image.open(io.BytesIO(data)).info["sdtrt"])["batch_size"])
    return sizes


def test_a_batch_is_padded_to_the_next_engine_and_each_picture_is_the_one_made_alone(server, alone):
    for count, size in ((1, 1), (2, 2), (3, 4), (5, 8), (8, 8)):
        assert check(server, over(server, seed=0, count=count), alone[1]) == [size] * count


def test_engines_that_are_removed_under_load_leave_no_request_without_an_answer(server, alone):
    """Those that are left make what they can; where none is left, the refusal says which are missing."""
    told, lock = [], threading.Lock()

    def ask(number):
        for _ in range(4):
            one = over(server, seed=number, count=3)
            with lock:
                told.append(one)

    asking = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for one in asking:
        one.start()
    entries = engines(alone[0])
    for one in entries[8] + entries[4]:
        one.rename(alone[0] / one.name)
    for one in asking:
        one.join(120)
    assert [one["state"] for one in told] == ["done"] * 16
    assert {size for one in told for size in check(server, one, alone[1])} <= {*BATCHES}
    assert Counter(check(server, over(server, seed=0, count=3), alone[1])) == {2: 2, 1: 1}
    for one in entries[2] + entries[1]:
        one.rename(alone[0] / one.name)
    refused = over(server, seed=0, count=3)
    assert (refused["state"], refused["error"]["kind"]) == ("error", "EngineError")
    assert refused["error"]["message"].startswith("no openvino fp32 engine for the")
    for one in [one for group in entries.values() for one in group]:
        (alone[0] / one.name).rename(one)
    assert check(server, over(server, seed=0), alone[1]) == [1]


def engines(root):
    """The folders of the engines, by the pictures that they make at once."""
    found = {count: [] for count in BATCHES}
    for entry in EngineDirectory(root / "engines").entries("engine"):
        rows = entry.engine_key.profiles[0].batch.opt
        found[rows // 2 if entry.engine_key.component == "unet" else rows].append(entry.path)
    return found
