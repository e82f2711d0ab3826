"""What a server does where something is missing, full or gone, and with LoRAs of its list; its worker is a thread."""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
import requests
from asked import job_over, pixels
from PIL import Image

import sdtrt
from sdtrt.serve import dispatch
from sdtrt.serve.builds import Builds
from sdtrt.serve.catalog import Catalog
from sdtrt.serve.frames import Frame
from sdtrt.serve.jobs import Job
from sdtrt.serve.log import Log
from sdtrt.serve.metrics import Metrics
from sdtrt.serve.requests import PictureRequest
from sdtrt.serve.worker_process import WorkerGone
from sdtrt.specs import GenerateSpec, LoraSpec, ModelSpec
from sdtrt.specs.serve import ServeSpec

BODY = {"prompt": "a red circle", "steps": 2, "width": 64, "height": 64, "seed": 1}
SLOW = pytest.mark.slow


def over(server, **body):
    """A job that is over."""
    return job_over(server, {**BODY, **body}, seconds=60)


@SLOW
def test_what_has_no_engine_is_refused_where_nothing_is_built(start, tmp_path):
    server = start(backend="onnxruntime", allow_build=False)
    told = over(server)
    assert told["error"]["kind"] == "EngineError"
    assert told["error"]["message"].startswith(
        "no onnxruntime fp32 engine for the text_encoder, unet, vae_decoder of tiny"
    )
    assert told["error"]["hint"].startswith("sdtrt build --model tiny")
    assert str(tmp_path) not in str(told)
    answer = requests.post(f"{server.url}/v1/images/generations", json={"prompt": "x"}, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "EngineError")


@SLOW
def test_a_full_disk_and_a_bug_end_one_job_in_words_and_the_next_is_made(start, monkeypatch):
    server = start(backend="torch")
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    for raised, kind in ((OSError(errno.ENOSPC, "full"), "DiskFull"), (KeyError("x"), "ServerError")):

        def write(*_, raised=raised):
            raise raised

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", write)
            told = over(server, init_image=image, steps=4)
        assert (told["state"], told["error"]["kind"]) == ("error", kind)
    assert any('"bug"' in line and "KeyError" in line for line in server.lines())
    assert over(server)["state"] == "done"


@SLOW
def test_a_model_that_memory_has_no_room_for_is_not_loaded(start, monkeypatch):
    from sdtrt.serve import host_memory

    server = start(backend="torch")
    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "available_bytes", lambda: 2**20)
        answer = requests.post(f"{server.url}/v1/images/generations", json={"prompt": "x"}, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "MemoryShortage")
    assert answer.json()["error"]["message"].startswith("tiny takes 0.01 GiB of memory, and 0.00 are free")
    assert over(server)["state"] == "done"


@SLOW
def test_loras_are_of_the_servers_list_and_their_pictures_the_commands(start, tmp_path):
    import torch
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from test_lora import ATTENTION, random_adapter

    from sdtrt.models import loading
    from sdtrt.models.resolve import resolve_model

    unet = loading.load_unet(resolve_model(ModelSpec()), torch.float32)
    layers = random_adapter(unet, LoraConfig(r=2, target_modules=ATTENTION), 1)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "style", unet_lora_layers=layers)
    (file,) = (tmp_path / "style").iterdir()
    file.rename(tmp_path / "style.safetensors")
    server = start(backend="torch", loras=(str(tmp_path / "style.safetensors"),))
    data = {}
    for name, loras in (("with", [{"name": "style", "weight": 0.8}]), ("without", [])):
        told = over(server, loras=loras)
        data[name] = requests.get(server.url + told["images"][0]["url"], timeout=30).content
    model = ModelSpec(loras=(LoraSpec(str(tmp_path / "style.safetensors"), 0.8),))
    spec = GenerateSpec(("a red circle",), model=model, steps=2, width=64, height=64, seed=1, backend="torch")
    report = sdtrt.generate(spec, progress=False)
    np.testing.assert_array_equal(pixels(data["with"]), pixels(report.images[0].path.read_bytes()))
    assert not np.array_equal(pixels(data["with"]), pixels(data["without"]))
    assert str(tmp_path) not in str(Image.open(io.BytesIO(data["with"])).info)
    answer = requests.post(f"{server.url}/api/v1/jobs", json={**BODY, "loras": [{"name": str(file)}]}, timeout=30)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (400, "UsageError")


@SLOW
def test_a_reader_who_leaves_cancels_where_it_says_so(start):
    server = start(backend="torch")
    for query, end in (("?cancel_on_leave=true", "cancelled"), ("", "done")):
        answer = requests.post(f"{server.url}/api/v1/jobs", json={**BODY, "steps": 50}, timeout=30)
        events = f"{server.url}{answer.headers['location']}/events"
        with requests.get(events + query, stream=True, timeout=60) as stream:
            next(line for line in stream.iter_lines() if line == b"event: step")
        with requests.get(events, stream=True, timeout=60) as stream:
            assert f"event: {end}".encode() in list(stream.iter_lines())


def test_engines_are_built_for_a_picture_once(monkeypatch):
    class Building:
        async def start(self):
            pass

        async def about_itself(self, _):
            return Frame("ready", {})

        async def ask(self, *_):
            async def answers():
                yield Frame("done", {})

            return answers()

        async def end(self):
            pass

    async def asked():
        back = []
        request = PictureRequest("x", seed=1)
        job = Job.of(request, request.spec(Catalog.of(ServeSpec()), ServeSpec()), "a", "native")
        log, metrics = Log(io.StringIO()), Metrics(lambda: 0)
        builds = Builds(Building, log, metrics, lambda pictures, failure: back.append((len(pictures), failure)))
        building = asyncio.create_task(builds.run())
        builds.ask(job.pictures)
        while len(back) < 2:
            await asyncio.sleep(0)
        builds.ask(job.pictures)
        building.cancel()
        return back

    nothing, built, again = asyncio.run(asked())
    assert (nothing[0], built) == (0, (1, None))
    assert again[1].message == "its engines were built, and none fits"


def test_where_no_worker_starts_requests_end_in_words(tmp_path, monkeypatch):
    class Dead:
        def __init__(self, *_):
            pass

        async def start(self):
            raise WorkerGone("exit code 1")

        async def end(self):
            pass

    async def asked():
        spec = ServeSpec(engine_dir=os.devnull)
        dispatcher = dispatch.Dispatcher(spec, Catalog.of(spec), tmp_path, Log(io.StringIO()))
        job = dispatcher.submit(PictureRequest("x"), "somebody", "native")
        await dispatcher.start()
        await asyncio.wait_for(job.finished.wait(), 5)
        await dispatcher.stop()
        return job.failure

    monkeypatch.setattr(dispatch, "WorkerProcess", Dead)
    failure = asyncio.run(asked())
    assert (failure.kind, failure.message) == ("WorkerEnded", "no worker starts")
