"""`sdtrt serve` as a process of its own, with the built-in model in ONNX Runtime: load, faults, its end."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import requests
from asked import pixels
from PIL import Image

import sdtrt
from sdtrt.specs import GenerateSpec

pytestmark = pytest.mark.slow
LEVELS = 2  # of 255
QUICK = {"steps": 2, "width": 64, "height": 64}
SIZES = ((64, 64), (72, 64))
PROMPTS = ("a red circle", "a blue star on a black background", "a small green square")
REQUESTS, CLIENTS = 200, 24


class Server:
    """The command, and what it says."""

    def __init__(self, folder, *options):
        self.log = (folder / "log").open("w+")
        words = ["serve", "--port", "0", "--backend", "onnxruntime", "--engine-dir", str(folder / "engines"), *options]
        code = "from sdtrt.__main__ import main; main()"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self.url = self.process.stdout.readline().strip()
        self.port = int(self.url.rpartition(":")[2])

    def wait_until_ready(self, seconds=200):
        until = time.monotonic() + seconds
        while requests.get(f"{self.url}/readyz", timeout=30).status_code != 200:
            assert time.monotonic() < until, self.lines()
            time.sleep(0.1)

    def lines(self):
        self.log.flush()
        self.log.seek(0)
        return [json.loads(line) for line in self.log.read().splitlines() if line.startswith("{")]

    def workers(self):
        return [one["pid"] for one in self.lines() if one["event"] == "worker ready"]

    def post(self, path, body, **options):
        return requests.post(self.url + path, json=body, **{"timeout": 120, **options})

    def over(self, answer):
        """A job that is over."""
        assert answer.status_code == 202, answer.text
        until = time.monotonic() + 120
        while (told := requests.get(self.url + answer.headers["location"], timeout=30).json())["state"] in (
            "queued",
            "building",
            "running",
        ):
            assert time.monotonic() < until, told
            time.sleep(0.02)
        return told


@contextmanager
def serving(folder, *options):
    """A server that is ready; it is killed afterwards."""
    server = Server(folder, *options)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder):
    """A server whose first size is built and warm."""
    limits = ("--max-steps", "20", "--max-pixels", "16384", "--max-waiting", "64", "--body-seconds", "5")
    with serving(folder, "--warm", "64x64", *limits) as server:
        yield server


def made(folder, size):
    """What the command makes alone, with the server's own engines, by prompt and seed."""
    options = {"steps": 2, "width": size[0], "height": size[1], "seed": 0, "num_images": 2, "backend": "onnxruntime"}
    spec = GenerateSpec(PROMPTS, output=folder / "made", allow_build=False, **options)
    report = sdtrt.generate(spec, engine_dir=folder / "engines", progress=False)
    return {(one.prompt, one.seed): pixels(one.path.read_bytes()) for one in report.images}


@pytest.fixture(scope="module")
def expected(server, folder):
    """By size, prompt and seed, what the command makes."""
    return {size: made(folder, size) for size in SIZES}


def test_a_picture_is_the_commands_to_the_bit(server, folder, expected):
    told = server.over(server.post("/api/v1/jobs", {"prompt": PROMPTS[0], "seed": 1, **QUICK}))
    data = requests.get(server.url + told["images"][0]["url"], timeout=30).content
    np.testing.assert_array_equal(pixels(data), expected[64, 64][PROMPTS[0], 1])
    assert str(folder) not in str(Image.open(io.BytesIO(data)).info)


def test_what_has_no_engine_is_built_while_the_rest_is_served(server):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "blue").save(buffer, "PNG")
    init = base64.b64encode(buffer.getvalue()).decode()
    from_image = server.post("/api/v1/jobs", {"prompt": PROMPTS[0], "init_image": init, **QUICK, "steps": 4})
    while requests.get(server.url + from_image.headers["location"], timeout=30).json()["state"] != "building":
        time.sleep(0.02)
    assert server.over(server.post("/api/v1/jobs", {"prompt": PROMPTS[1], **QUICK}))["state"] == "done"
    assert requests.get(server.url + from_image.headers["location"], timeout=30).json()["state"] == "building"
    told = server.over(from_image)
    assert told["state"] == "done", told


def asked(server, number, expected):
    """One request of many, by an interface and of a kind that its number says; what came of it."""
    draw = random.Random(number)
    prompt, size = draw.choice(PROMPTS), draw.choice(SIZES)
    seed, kind = draw.randrange(2), number % 8
    own = expected[size][prompt, seed]
    width, height = size
    if kind == 6:
        broken = draw.choice([{"steps": 0}, {"width": 65}, {"prompt": 7}, {"model": "x"}, {"mask": "aGk="}])
        answer = server.post("/api/v1/jobs", {"prompt": prompt, **QUICK, **broken})
        assert answer.status_code in (400, 422)
        assert answer.json()["error"]["hint"]
        return "refused"
    if kind == 7:
        body = {"prompt": prompt, "n": 4, "size": "128x128", "num_inference_steps": 20}
        with pytest.raises(requests.exceptions.RequestException):
            server.post("/v1/images/generations", body, timeout=0.05)
        return "left"
    headers = {"x-client-id": f"c{number % 5}"}
    if kind < 2:
        body = {"prompt": prompt, "seed": seed, "size": f"{width}x{height}", "num_inference_steps": 2}
        answer = again(server, "/v1/images/generations", body, headers)
        data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    elif kind < 4:
        body = {"prompt": prompt, "seed": seed, "width": width, "height": height, "steps": 2, "cfg_scale": 7.5}
        answer = again(server, "/sdapi/v1/txt2img", body, headers)
        data = base64.b64decode(answer.json()["images"][0])
    else:
        body = {"prompt": prompt, "seed": seed, "width": width, "height": height, "steps": 2}
        told = server.over(again(server, "/api/v1/jobs", body, headers))
        data = requests.get(server.url + told["images"][0]["url"], timeout=60).content
    assert np.abs(pixels(data) - own).max() <= LEVELS
    return "made"


def again(server, path, body, headers):
    """Ask, and where there is no room come again when told to."""
    while (answer := server.post(path, body, headers=headers)).status_code == 429:
        assert int(answer.headers["retry-after"]) >= 1
        time.sleep(0.2)
    assert answer.status_code in (200, 202), answer.text
    return answer


def test_of_many_requests_each_gets_its_own_picture_or_a_clear_error(server, expected):
    with ThreadPoolExecutor(CLIENTS) as pool:
        ends = Counter(pool.map(lambda number: asked(server, number, expected), range(REQUESTS)))
    assert ends == {"made": 150, "refused": 25, "left": 25}
    numbers = metrics(server)
    assert numbers["sdtrt_batch_pictures_sum"] / numbers["sdtrt_batch_pictures_count"] > 1.5
    assert numbers["sdtrt_queue_pictures"] == 0
    assert numbers["sdtrt_worker_ends_total"] == 0


def metrics(server):
    """The numbers without labels."""
    lines = requests.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    pairs = [line.split() for line in lines if not line.startswith("#") and "{" not in line]
    return {name: float(value) for name, value in pairs}


def test_a_worker_that_is_killed_leaves_no_request_alone(server):
    body = {"prompt": PROMPTS[0], "count": 4, **QUICK, "steps": 10}
    answers = [server.post("/api/v1/jobs", {**body, "seed": seed}) for seed in range(2)]
    while requests.get(server.url + answers[0].headers["location"], timeout=30).json()["state"] != "running":
        time.sleep(0.01)
    before = server.workers()
    os.kill(before[-1], signal.SIGKILL)
    assert [server.over(one)["state"] for one in answers] == ["done"] * 2
    assert len(server.workers()) == len(before) + 1
    reasons = [one["reason"] for one in server.lines() if one["event"] == "worker ended"]
    assert reasons == ["signal 9"]


def told_raw(server, request):
    """What comes back for bytes that no client would send."""
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall(request)
        return connection.makefile("rb").readline()


def test_tricks_with_headers_are_answered_or_refused(server):
    host = b"Host: localhost\r\n"
    assert b" 400 " in told_raw(
        server, b"GET /healthz HTTP/1.1\r\n" + host + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n"
    )
    assert b" 400 " in told_raw(server, b"GET /healthz HTTP/1.1\r\n" + host + b"X: " + b"x" * 2_000_000 + b"\r\n\r\n")
    assert b" 400 " in told_raw(server, b"GET /healthz HTTP/1.1\r\n\r\n")
    assert b" 421 " in told_raw(server, b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n")
    assert b" 200 " in told_raw(server, b"GET /healthz HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n")


def test_a_header_that_does_not_come_is_waited_for_no_longer_than_a_body(server):
    began = time.monotonic()
    assert told_raw(server, b"GET /healthz HT") == b""
    assert 3 < time.monotonic() - began < 25


def test_it_ends_when_what_it_has_accepted_is_done(server, folder):
    job = {"prompt": PROMPTS[0], **QUICK, "steps": 20, "count": 4}
    found = []
    asking = threading.Thread(target=lambda: found.append(server.post("/sdapi/v1/txt2img", {**job, "n_iter": 4})))
    asking.start()
    accepted = server.post("/api/v1/jobs", job)
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    late = server.post("/api/v1/jobs", job)
    assert late.status_code == 503
    assert late.json()["error"]["kind"] == "ServerEnding"
    assert int(late.headers["retry-after"]) > 0
    assert server.over(accepted)["state"] == "done"
    asking.join(60)
    assert found[0].status_code == 200
    assert len(found[0].json()["images"]) == 4
    assert server.process.wait(30) == 0
    assert [one.name for one in folder.iterdir() if one.name.startswith("sdtrt-")] == []
