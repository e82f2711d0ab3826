"""`sdtrt serve --ray` as a process of its own, with Ray itself: two replicas on this machine, and its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from asked import pixels
from pixel_checker import Scene, Shape, judge

import sdtrt
from sdtrt.specs import GenerateSpec

pytest.importorskip("ray", reason="Ray is of Linux alone")
grpc = pytest.importorskip("grpc")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KEY = "k" * 32
LEVELS = 2  # of 255
PROMPT = "a red circle on a blue background"
SCENE = Scene((Shape("circle", "red"),), "blue")
SIZE = {"width": 128, "height": 128}
REPLICA = "ray::ServeReplica:sdtrt:Pictures"


class Server:
    """The command, what it says, and its processes; temporary files have a folder of their own, with a short name."""

    def __init__(self, folder, temporary):
        self.log, self.temporary = (folder / "log").open("w+"), Path(temporary)
        words = ["--ray", "--replicas", "2", "--max-steps", "60", "--max-pixels", "16384", "--grace", "60"]
        words += ["--backend", "onnxruntime", "--engine-dir", str(folder / "engines")]
        code = "from sdtrt.__main__ import main; main()"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", "--port", "0", *words],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**environment, "TMPDIR": temporary, "SDTRT_API_KEY": KEY},
        )
        self.url = self.process.stdout.readline().strip()
        self.session = requests.Session()
        self.session.headers["x-api-key"] = KEY

    def text(self):
        self.log.seek(0)
        return self.log.read()

    def until(self, true, seconds=240):
        """Wait until something is so."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, self.text()
            time.sleep(0.1)

    def is_ready(self):
        return requests.get(f"{self.url}/readyz", timeout=30).status_code == 200

    def submit(self, **body):
        answer = self.session.post(f"{self.url}/api/v1/jobs", json={"prompt": PROMPT, **SIZE, **body}, timeout=60)
        assert answer.status_code == 202, answer.text
        return self.url + answer.headers["location"]

    def state(self, place):
        return self.session.get(place, timeout=30).json()["state"]

    def over(self, place):
        """A job that is over."""
        self.until(lambda: self.state(place) in ("done", "error", "cancelled"))
        return self.session.get(place, timeout=30).json()

    def picture(self, place):
        """A job's first picture."""
        told = self.over(place)
        assert told["state"] == "done", told
        return self.session.get(self.url + told["images"][0]["url"], timeout=30).content

    def processes(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self):
        """The replicas, those first that are older."""
        found = [
            one for one in self.processes() if one.is_running() and one.cmdline()[:1] and REPLICA in one.cmdline()[0]
        ]
        return sorted(found, key=psutil.Process.create_time)

    def worked_s(self):
        """Seconds of processor time of each replica's worker."""
        return [sum(child.cpu_times().user for child in one.children()) for one in self.replicas()]


def lives(process):
    """Whether a process runs; one that is over waits for its parent to hear of it, and does nothing."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def how(guidance):
    return {"steps": 20, "guidance_scale": guidance}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def server(folder):
    """A server without engines, with two replicas."""
    with tempfile.TemporaryDirectory(prefix="ry", dir="/tmp") as temporary:
        server = Server(folder, temporary)
        try:
            server.until(server.is_ready)
            server.until(lambda: len(server.replicas()) == 2)
            yield server
        finally:
            for one in [*server.processes(), server.process] if server.process.poll() is None else ():
                one.kill()
            server.process.wait()


def test_replicas_start_without_engines_and_one_of_them_builds_for_both(server, folder):
    assert not list((folder / "engines").glob("*unet*"))
    told = server.over(server.submit(steps=2, seed=1))
    assert told["state"] == "done", told
    assert server.text().count("parity: ") == 3  # both were asked for the three parts, and one made each of them


def test_both_replicas_make_pictures_which_are_those_that_are_made_alone(server, folder):
    before, made = server.worked_s(), {}
    places = {guidance: [server.submit(seed=seed, **how(guidance)) for seed in range(2)] for guidance in (6.0, 7.5)}
    for guidance, some in places.items():
        made[guidance] = [pixels(server.picture(place)) for place in some]
    worked = [late - early for early, late in zip(before, server.worked_s(), strict=True)]
    assert min(worked) > 0.25 * sum(worked), worked
    for guidance, pictures in made.items():
        options = {"output": folder / f"alone-{guidance:.0f}", "num_images": 2, "seed": 0, "backend": "onnxruntime"}
        spec = GenerateSpec((PROMPT,), **options, **how(guidance), **SIZE)
        report = sdtrt.generate(spec, engine_dir=folder / "engines", progress=False)
        for picture, alone in zip(pictures, report.images, strict=True):
            difference = picture - pixels(alone.path.read_bytes())
            assert np.abs(difference).max() <= LEVELS
            assert judge(picture.astype(np.uint8), SCENE).all_right


def test_the_key_and_the_limits_hold(server):
    assert requests.post(f"{server.url}/api/v1/jobs", json={"prompt": PROMPT}, timeout=30).status_code == 401
    answer = server.session.post(f"{server.url}/api/v1/jobs", json={"prompt": PROMPT, "steps": 61}, timeout=30)
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        400,
        "steps must be at most 60 steps here, got 61",
    )
    assert KEY not in server.text()


def test_tokens_are_counted_and_cancels_heard_while_replicas_work(server):
    long = {"steps": 60, "count": 4}
    places = [server.submit(guidance_scale=guidance, **long) for guidance in (6.0, 7.5)]
    server.until(lambda: all(server.state(place) == "running" for place in places))
    answer = server.session.post(f"{server.url}/api/v1/tokens", json={"texts": [PROMPT]}, timeout=30)
    assert answer.json()["counts"] == [7]
    assert [server.state(place) for place in places] == ["running"] * 2
    for place in places:
        server.session.delete(place, timeout=30)
    began = server.worked_s()
    assert server.over(server.submit(steps=2, seed=1))["state"] == "done"
    assert sum(server.worked_s()) - sum(began) < 3  # the cancelled ones take more than ten


def test_nobody_else_reads_or_joins_its_cluster(server):
    (own,) = (one for one in server.temporary.iterdir() if (one / "r").exists())
    assert own.stat().st_mode & 0o777 == 0o700
    assert not list(own.rglob("usage_stats*"))
    (environment,) = (one.environ() for one in server.processes() if "gcs_server" in one.name())
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    listening = {
        (one.laddr.ip.removeprefix("::ffff:"), one.laddr.port, process.pid)
        for process in [*server.processes(), psutil.Process(server.process.pid)]
        for one in process.net_connections()
        if one.status == "LISTEN"
    }
    beyond = {pid: port for address, port, pid in listening if address != "127.0.0.1"}
    assert beyond.keys() == {one.pid for one in server.replicas()}  # Ray has it so, and the token keeps others out
    (said,) = (line for line in server.text().splitlines() if '"event": "ray"' in line)
    asked = {f"127.0.0.1:{port}": "/ray.serve.ASGIService/HandleRequest" for port in beyond.values()}
    asked[json.loads(said)["address"]] = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
    for address, method in asked.items():
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(method)(b"", timeout=30)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_replica_that_is_killed_leaves_no_request_alone_and_another_one_comes(server):
    places = [server.submit(steps=30, seed=1, count=2, guidance_scale=guidance) for guidance in (6.0, 7.5)]
    server.until(lambda: all(server.state(place) == "running" for place in places))
    first, second = server.replicas()
    first.kill()
    assert [server.over(place)["state"] for place in places] == ["done"] * 2
    server.until(lambda: len(server.replicas()) == 2)
    assert second in server.replicas()
    assert first not in server.replicas()
    assert '"event": "worker ended"' in server.text()
    assert server.is_ready()


def test_it_ends_when_what_it_has_accepted_is_done_and_leaves_nothing(server):
    processes, batches, found = server.processes(), server.text().count('"event": "batch"'), []
    body = {"prompt": PROMPT, "size": "128x128", "num_inference_steps": 60}
    asked = partial(server.session.post, f"{server.url}/v1/images/generations", json=body, timeout=120)
    asking = threading.Thread(target=lambda: found.append(asked()))
    asking.start()
    server.until(lambda: server.text().count('"event": "batch"') > batches)
    server.process.send_signal(signal.SIGTERM)
    asking.join(120)
    assert found[0].status_code == 200
    assert server.process.wait(30) == 0
    assert server.process.stdout.read() == ""
    assert [one for one in processes if lives(one)] == []
    assert list(server.temporary.iterdir()) == []
