"""The rules of a server, without one: turns, what may share a call, names, uploads, frames, its own options."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import subprocess
import sys
import time
import zlib

import pytest
from PIL import Image

from sdtrt.cli import serve_command
from sdtrt.common.errors import SdtrtError, UsageError
from sdtrt.serve import server, uploads, webui_units
from sdtrt.serve.at_start import check_there
from sdtrt.serve.beside import Beside, Control, Scaled
from sdtrt.serve.catalog import Catalog, without_paths
from sdtrt.serve.fair_queue import FairQueue, QueueFull
from sdtrt.serve.frames import Frame, Pipe, read_frame
from sdtrt.serve.jobs import Failure, Job, JobStore
from sdtrt.serve.native_body import JobBody
from sdtrt.serve.requests import PictureRequest
from sdtrt.specs import (
    DeepCaching,
    GuidanceInterval,
    LoraSpec,
    ModelSpec,
    Savings,
    SizeConditioning,
    UpscaleSpec,
)
from sdtrt.specs.serve import Limits, Listed, ServeSpec, parse_warm

SERVE = ServeSpec()
CATALOG = Catalog.of(SERVE)


def job(client="a", count=1, **options):
    request = PictureRequest("a red circle", seed=1, count=count, **options)
    return Job.of(request, request.spec(CATALOG, SERVE), client, "native")


def test_clients_take_turns_and_bring_along_what_shares_their_call():
    async def turns():
        queue = FairQueue(100)
        many, other, few = job("many", 6), job("other", 1, steps=9), job("few", 2)
        for one in (many, other, few):
            queue.put(one.pictures)
        return [[(p.job.client, p.index) for p in await queue.next_batch(3, 0)] for _ in range(4)]

    first, second, third, fourth = asyncio.run(turns())
    assert first == [("many", 0), ("few", 0), ("many", 1)]
    assert second == [("other", 0)]
    assert third == [("few", 1), ("many", 2), ("many", 3)]
    assert fourth == [("many", 4), ("many", 5)]


def test_a_picture_waits_for_company_as_long_as_it_may():
    async def company():
        queue, first, second = FairQueue(9), job("a"), job("b")
        queue.put(first.pictures)
        taking = asyncio.create_task(queue.next_batch(2, 10))
        await asyncio.sleep(0.02)
        assert not taking.done()
        queue.put(second.pictures)
        together = await asyncio.wait_for(taking, 1)
        queue.put(job("c").pictures)
        began = time.monotonic()
        alone = await queue.next_batch(2, 0.05)
        return len(together), len(alone), time.monotonic() - began

    together, alone, waited = asyncio.run(company())
    assert (together, alone) == (2, 1)
    assert 0.03 < waited < 1


def test_a_full_queue_takes_a_request_whole_or_not_at_all():
    queue = FairQueue(3)
    queue.put(job(count=2).pictures)
    with pytest.raises(QueueFull):
        queue.put(job(count=2).pictures)
    assert len(queue) == 2
    assert queue.drop(next(iter(queue)))
    assert len(queue) == 1


def test_what_differs_in_anything_but_prompt_seed_and_number_shares_no_call():
    base = PictureRequest("x", seed=1)
    assert PictureRequest("y", seed=2, count=3).key == base.key
    assert PictureRequest("x", negative_prompt="z").key == PictureRequest("x", negative_prompt="w").key
    for other in ({"steps": 9}, {"guidance_scale": 2.0}, {"negative_prompt": "z"}, {"uploads": {"init_image": b"1"}}):
        assert PictureRequest("x", **other).key != base.key
    loras = PictureRequest("x", loras=(LoraSpec("a", 0.5),), uploads={"init_image": b"1"})
    assert PictureRequest.from_json(loras.to_json(), loras.uploads) == loras


def test_a_job_is_over_when_its_pictures_are():
    one = job(count=2)
    one.settle(one.pictures[0], "done")
    assert one.state == "queued"
    one.fail(one.pictures[1], Failure("UsageError", "no", "yes"))
    assert one.state == "error"
    one.settle(one.pictures[1], "running")
    assert one.pictures[1].state == "error"  # what is over stays so


def test_finished_pictures_go_when_they_take_too_much_memory():
    store, jobs = JobStore(1000), [job() for _ in range(3)]
    for one in jobs:
        store.add(one)
        one.pictures[0].data = bytes(400)
        store.keep(one.pictures[0])
    assert [store.job(one.id) is None for one in jobs] == [True, False, False]
    assert store.picture(jobs[0].pictures[0].id) is None
    assert store.picture(jobs[2].pictures[0].id) is jobs[2].pictures[0]


def test_models_have_short_names_and_no_two_the_same(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "sd").mkdir(parents=True)
    spec = ServeSpec(models=(ModelSpec(str(tmp_path / "one" / "sd")), ModelSpec("owner/name"), ModelSpec()))
    catalog = Catalog.of(spec)
    assert list(catalog.models) == ["sd", "owner/name", "tiny"]
    assert catalog.model("sd").name == str(tmp_path / "one" / "sd")
    with pytest.raises(UsageError, match="unknown model"):
        catalog.model(str(tmp_path / "one" / "sd"))
    with pytest.raises(UsageError, match="two models are called sd"):
        Catalog.of(ServeSpec(models=tuple(ModelSpec(str(tmp_path / name / "sd")) for name in ("one", "two"))))


def test_what_is_listed_has_the_name_that_is_given_or_that_of_its_file(tmp_path):
    (tmp_path / "a=b.safetensors").touch()
    listed = Listed(controlnets=(str(tmp_path / "a=b.safetensors"), "edges=owner/canny", "owner/depth"))
    catalog = Catalog.of(ServeSpec(listed=listed, loras=("style=/srv/loras/x.safetensors",)))
    assert list(catalog.listed["controlnet"]) == ["a=b", "edges", "owner/depth"]
    assert catalog.path("controlnet", "edges") == "owner/canny"
    assert catalog.model(None, (LoraSpec("style", 0.5),)).loras == (LoraSpec("/srv/loras/x.safetensors", 0.5),)
    assert catalog.names["owner/canny"] == "edges"
    with pytest.raises(UsageError, match="unknown refiner: 'x'") as caught:
        catalog.path("refiner", "x")
    assert caught.value.hint == "this server was started without --refiner"
    with pytest.raises(UsageError, match="two controlnets are called x"):
        Catalog.of(ServeSpec(listed=Listed(controlnets=("x=a/b", "x=a/c"))))
    with pytest.raises(UsageError, match="a token must be one word, got 'two words'"):
        Catalog.of(ServeSpec(listed=Listed(embeddings=("two words=a.pt",))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": (ModelSpec(), ModelSpec("nowhere"))}, "unknown model: 'nowhere'"),
        ({"models": (ModelSpec("no/such/model"), ModelSpec())}, "there is no model at no/such/model"),
        ({"loras": ("style",)}, "--lora style: there is no such file or folder"),
        ({"listed": Listed(controlnets=("edges=/no/net",))}, "--controlnet /no/net: there is no such file or folder"),
        ({"listed": Listed(embeddings=("owner/name",))}, "--embedding owner/name: there is no such file"),
        ({"listed": Listed(refiners=("nobody",))}, "unknown model: 'nobody'"),
    ],
)
def test_a_server_without_one_of_its_models_does_not_start(options, message):
    """Nor does it listen, or start a worker: the port is looked for after that."""
    spec = ServeSpec(port=0, **options)
    with pytest.raises(SdtrtError, match=message) as caught:
        server.run(spec, quiet=True)
    assert caught.value.hint


def test_a_hubs_models_are_left_until_they_are_named():
    spec = ServeSpec(listed=Listed(controlnets=("owner/canny",), ip_adapters=("owner/name/models/face.safetensors",)))
    check_there(Catalog.of(spec), spec)


def test_a_unit_that_is_off_is_none_and_what_is_not_as_asked_is_noted():
    off = [False, {"enabled": False, "model": "x"}, {"model": "None"}]
    assert webui_units.read(off, CATALOG, 64, 64, 100).beside == Beside()
    with pytest.raises(UsageError, match="unknown model of ControlNet: 'x'"):
        webui_units.read([{"model": "x", "image": "aGk="}], CATALOG, 64, 64, 100)
    canny = {"model": "x", "module": "canny", "pixel_perfect": True, "threshold_a": 100, "threshold_b": -1}
    assert webui_units.notes([canny]) == []
    assert len(webui_units.notes([{**canny, "threshold_a": 64}])) == 1
    assert len(webui_units.notes([{**canny, "pixel_perfect": False}])) == 1


def test_single_savings_win_over_their_presets():
    body = JobBody(prompt="x", quality="balanced", cache_interval=2, cache_schedule="middle")
    request = body.request(Limits())
    assert request.savings == Savings(GuidanceInterval(0.0, 0.5), DeepCaching(2, schedule="middle"))
    assert request.quality == "balanced"
    assert request.spec(CATALOG, SERVE).savings == request.savings
    off = JobBody(prompt="x", quality="balanced", cache_interval=1, guidance_interval=(0, 1)).request(Limits())
    assert (off.quality, off.spec(CATALOG, SERVE).savings) == ("exact", Savings())


def test_a_request_with_everything_comes_through_a_pipe_as_it_was():
    beside = Beside(
        (Control("a", 0.5, mode=2),),
        (Scaled("b"),),
        (Scaled("c", 2.0),),
        ("word",),
        "fine",
        0.7,
        UpscaleSpec(2.0, "lanczos", 5, 0.5),
    )
    savings = Savings(GuidanceInterval(0.1, 0.5), DeepCaching(3, 2))
    told = SizeConditioning(crop=(1, 2))
    request = PictureRequest("x", beside=beside, savings=savings, conditioning=told, zero_snr=True)
    assert PictureRequest.from_json(json.loads(json.dumps(request.to_json())), {}) == request
    assert request.key != PictureRequest("x").key


def test_no_path_of_the_disk_gets_into_a_message():
    text = "model /srv/models/my.safetensors: run: sdtrt build --engine-dir /home/me/.cache/engines, at 1/2 of https://x.y/z"
    told = without_paths(text)
    assert "/srv" not in told
    assert "/home" not in told
    assert told.startswith("model my.safetensors: run: sdtrt build --engine-dir engines")
    assert told.endswith("at 1/2 of https://x.y/z")


def bomb(width, height):
    """A PNG whose header promises more pixels than memory has."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bomb(50_000, 50_000), "too large"),
        (bomb(2000, 2000), "2000x2000 is more than"),
        (bomb(1, 1000), "too long"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "in no image format"),
        (b"", "is empty"),
    ],
    ids=["bomb", "large", "long", "postscript", "empty"],
)
def test_an_upload_is_refused_by_its_header(data, message):
    with pytest.raises(UsageError, match=message):
        uploads.check(data, "image", 1000 * 1000)


def test_openais_mask_is_white_where_it_is_transparent():
    picture = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    picture.putpixel((1, 0), (9, 9, 9, 0))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    assert list(Image.open(io.BytesIO(uploads.mask_of_alpha(buffer.getvalue()))).getdata()) == [0, 255]


def test_frames_come_through_a_pipe_whole_or_not_at_all():
    frame = Frame("make", {"prompt": "\ud800 ü"}, (b"12", b""))
    pipe = Pipe(io.BytesIO(frame.encode() + frame.encode()[:-1]), io.BytesIO())
    assert (pipe.read(), pipe.read()) == (frame, None)

    async def read():
        stream = asyncio.StreamReader()
        stream.feed_data(frame.encode() + b"\xff\xff\xff\xff")
        stream.feed_eof()
        return await read_frame(stream), await read_frame(stream)

    assert asyncio.run(read()) == (frame, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "no key keeps strangers out"),
        ({"host": "example.org"}, "no key keeps strangers out"),
        ({"api_key": "short"}, "can be guessed"),
        ({"port": 70_000}, "port must be"),
        ({"warm": ((65, 64),)}, "multiple of 8"),
        ({"devices": (0, 0)}, "named once"),
        ({"models": ()}, "without a model"),
    ],
)
def test_a_server_that_can_not_be_is_refused(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        ServeSpec(**options)
    assert caught.value.hint


def test_a_servers_request_for_its_workers_has_no_key():
    options = {"warm": parse_warm("64x64,128x64"), "limits": Limits(steps=9), "listed": Listed(refiners=("a/b",))}
    spec = ServeSpec(host="0.0.0.0", api_key="x" * 32, **options)
    data = spec.to_json()
    assert "x" * 32 not in str(data)
    again = ServeSpec.from_json(data)
    assert again.listed == spec.listed
    assert (again.warm, again.limits.steps, again.models) == (((64, 64), (128, 64)), 9, spec.models)


def test_what_is_not_installed_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(serve_command, "PACKAGES", {"no_such_module": "no-such", "sys": "sys"})
    with pytest.raises(UsageError, match="sdtrt serve needs no-such, which is not installed") as caught:
        serve_command.check_packages()
    assert caught.value.hint == 'pip install "sdtrt[serve]", or pip install no-such'


def test_the_commands_load_nothing_of_a_server():
    code = "import sys, sdtrt.cli.commands; print({'fastapi', 'uvicorn', 'torch'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
