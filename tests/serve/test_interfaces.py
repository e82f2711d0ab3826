"""The interfaces of a server, each spoken to by a client that others wrote, over HTTP; pictures are the commands'."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import requests
from asked import pixels
from PIL import Image

import sdtrt
from sdtrt.specs import GenerateSpec

SIZE = {"width": 64, "height": 64}
QUICK = {"steps": 2, **SIZE}
LEVELS = 2  # of 255
SLOW = pytest.mark.slow


def png(color="red", size=(64, 64), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(data):
    return base64.b64encode(data).decode()


def made(tmp_path, *prompts, **options):
    """What the command makes."""
    report = sdtrt.generate(GenerateSpec(prompts, backend="torch", output=tmp_path, **options), progress=False)
    return [pixels(one.path.read_bytes()) for one in report.images]


def submit(serving, **body):
    """The id of a job, by sdtrt's own interface."""
    answer = requests.post(f"{serving.url}/api/v1/jobs", json={"prompt": "a red circle", **QUICK, **body}, timeout=30)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def job(serving, **body):
    """A job that is over."""
    name = submit(serving, **body)
    followed(serving, name)
    return requests.get(f"{serving.url}/api/v1/jobs/{name}", timeout=30).json()


def followed(serving, name):
    """A job's events, to its end."""
    with requests.get(f"{serving.url}/api/v1/jobs/{name}/events", stream=True, timeout=60) as stream:
        lines = [line.decode() for line in stream.iter_lines() if line]
    return [
        (first.removeprefix("event: "), json.loads(second.removeprefix("data: ")))
        for first, second in zip(lines[::2], lines[1::2], strict=True)
    ]


def image(serving, one):
    return requests.get(serving.url + one["url"], timeout=30).content


def test_a_job_is_followed_and_its_picture_is_the_commands(serving, tmp_path):
    answer = requests.post(
        f"{serving.url}/api/v1/jobs", json={"prompt": "a red circle", "seed": 5, **QUICK}, timeout=30
    )
    assert answer.status_code == 202
    events = followed(serving, answer.json()["id"])
    names = [name for name, _ in events]
    assert names[0] in ("queued", "running")
    assert [name for name in names if name not in ("queued", "running")][:2] == ["step", "step"]
    assert {"preview", "image"} < set(names)
    assert names[-1] == "done"
    preview = next(data["image"] for name, data in events if name == "preview")
    assert Image.open(io.BytesIO(base64.b64decode(preview.partition(",")[2]))).size == (64, 64)
    told = requests.get(f"{serving.url}/api/v1/jobs/{answer.json()['id']}", timeout=30).json()
    assert (told["state"], told["model"], told["images"][0]["seed"]) == ("done", "tiny", 5)
    data = image(serving, told["images"][0])
    np.testing.assert_array_equal(pixels(data), made(tmp_path, "a red circle", seed=5, **QUICK)[0])
    assert "Seed: 5" in Image.open(io.BytesIO(data)).info["parameters"]


def test_requests_share_a_call_and_each_picture_is_as_made_alone(serving, tmp_path):
    before, texts = (
        metric(serving, "sdtrt_batch_pictures_count"),
        (("a red circle", "blue"), ("a blue star", "a red one")),
    )
    submit(serving, steps=20, count=3)  # while this is made, the others come
    names = [submit(serving, prompt=prompt, negative_prompt=negative, seed=9) for prompt, negative in texts]
    for name, (prompt, negative) in zip(names, texts, strict=True):
        followed(serving, name)
        told = requests.get(f"{serving.url}/api/v1/jobs/{name}", timeout=30).json()
        data = image(serving, told["images"][0])
        alone = made(tmp_path / name, prompt, negative_prompt=negative, seed=9, **QUICK)[0]
        assert np.abs(pixels(data) - alone).max() <= LEVELS
        assert Image.open(io.BytesIO(data)).info["parameters"].startswith(f"{prompt}\nNegative prompt: {negative}\n")
    assert metric(serving, "sdtrt_batch_pictures_count") == before + 2


def metric(serving, name):
    text = requests.get(f"{serving.url}/metrics", timeout=30).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name + " "))


@SLOW
def test_a_picture_is_changed_where_a_mask_says(serving, tmp_path):
    init, mask = png("blue"), png("white", mode="L")
    told = job(serving, init_image=encoded(init), mask=encoded(mask), strength=0.6, seed=3, steps=4)
    (tmp_path / "init.png").write_bytes(init)
    (tmp_path / "mask.png").write_bytes(mask)
    files = {"init_image": tmp_path / "init.png", "mask": tmp_path / "mask.png"}
    alone = made(tmp_path / "out", "a red circle", seed=3, strength=0.6, steps=4, **SIZE, **files)[0]
    np.testing.assert_array_equal(pixels(image(serving, told["images"][0])), alone)


@SLOW
def test_a_preset_leaves_out_what_the_commands_leave_out(serving, tmp_path):
    told = job(serving, seed=2, steps=4, count=3, quality="high")
    expected = made(tmp_path, "a red circle", seed=2, steps=4, num_images=3, quality="high", **SIZE)
    for one, own in zip(told["images"], expected, strict=True):
        data = image(serving, one)
        assert np.abs(pixels(data) - own).max() <= LEVELS
    whole = made(tmp_path / "whole", "a red circle", seed=2, steps=4, **SIZE)[0]
    assert np.abs(expected[0] - whole).max() > LEVELS
    assert "guidance" in Image.open(io.BytesIO(data)).info["sdtrt"]


@SLOW
def test_the_openai_package_makes_and_changes_pictures(serving, tmp_path):
    import openai

    client = openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    extra = {"num_inference_steps": 2, "guidance_scale": 5.0, "seed": 7, "negative_prompt": "blue"}
    answer = client.images.generate(model="tiny", prompt="a star", n=2, size="64x64", extra_body=extra)
    options = {"seed": 7, "guidance_scale": 5.0, "negative_prompt": "blue", "num_images": 2, "batch_size": 2}
    expected = made(tmp_path, "a star", **QUICK, **options)
    first = [base64.b64decode(one.b64_json) for one in answer.data]
    for data, own in zip(first, expected, strict=True):
        np.testing.assert_array_equal(pixels(data), own)
    hole = io.BytesIO()
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(hole, "PNG")
    edited = client.images.edit(
        image=("star.png", first[0]), mask=("mask.png", hole.getvalue()), prompt="a circle", size="64x64",
        output_format="jpeg", extra_body={"num_inference_steps": 2, "seed": 7, "strength": 0.9},
    )  # fmt: skip
    assert Image.open(io.BytesIO(base64.b64decode(edited.data[0].b64_json))).format == "JPEG"
    with pytest.raises(openai.BadRequestError, match="unknown model: 'dall-e-3'") as caught:
        client.images.generate(model="dall-e-3", prompt="a star", size="64x64")
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="multiple of 8"):
        client.images.generate(prompt="a star", size="65x64")


@SLOW
def test_a_web_uis_client_makes_and_changes_pictures(serving, tmp_path):
    import webuiapi

    client = webuiapi.WebUIApi(port=serving.port, sampler="Euler a", steps=2)
    result = client.txt2img(prompt="a (red:1.2) circle", seed=4, n_iter=2, cfg_scale=5, **SIZE)
    options = {"seed": 4, "guidance_scale": 5.0, "scheduler": "euler-a", "prompt_syntax": "webui", "num_images": 2}
    expected = made(tmp_path, "a (red:1.2) circle", batch_size=2, **QUICK, **options)
    for picture, own in zip(result.images, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), own)
    assert result.info["all_seeds"] == [4, 5]
    changed = client.img2img([result.image], prompt="a star", mask_image=Image.new("L", (64, 64), 255), seed=4, **SIZE)
    assert changed.image.size == (64, 64)
    assert changed.info["notes"]  # what it asked of the mask's filling
    assert client.png_info(result.image).info.startswith("a (red:1.2) circle\nSteps: 2, Sampler: Euler a")
    assert "euler-a" in {one["name"] for one in client.get_samplers()}
    assert client.get_sd_models()[0]["title"] == "tiny"
    assert client.get_loras() == []
    assert client.set_options({"sd_model_checkpoint": "tiny"}) == {}
    assert client.get_options()["sd_model_checkpoint"] == "tiny"
    assert client.get_progress()["progress"] == 0
    assert client.interrupt() == {}
    with pytest.raises(RuntimeError, match="restore_faces can"):
        client.txt2img(prompt="a star", restore_faces=True, **SIZE)
    with pytest.raises(RuntimeError, match=r"unknown hr_upscaler: .*LDSR"):
        client.txt2img(prompt="a star", enable_hr=True, hr_upscaler=webuiapi.HiResUpscaler.LDSR, **SIZE)


def test_a_job_is_cancelled_between_two_steps_and_its_neighbour_stays(serving):
    names = [submit(serving, prompt=prompt, seed=1, steps=20) for prompt in ("a red circle", "a blue star")]
    with requests.get(f"{serving.url}/api/v1/jobs/{names[0]}/events", stream=True, timeout=60) as stream:
        lines = stream.iter_lines()
        next(line for line in lines if line == b"event: step")
        told = requests.delete(f"{serving.url}/api/v1/jobs/{names[0]}", timeout=30).json()
        assert [line for line in lines if line][-2:] == [b"event: cancelled", b'data: {"images": []}']
    assert told["state"] == "cancelled"
    assert followed(serving, names[1])[-1][0] == "done"


@SLOW
def test_a_client_that_leaves_cancels_its_picture(serving):
    body = {"prompt": "a red circle", "n": 4, "size": "256x256", "num_inference_steps": 20}
    with pytest.raises(requests.Timeout):
        requests.post(f"{serving.url}/v1/images/generations", json=body, timeout=0.2)
    job(serving)  # it comes behind the one that was left
    ends = [one.state for one in serving.dispatcher.store._jobs.values() if one.request.count == 4]
    assert ends == ["cancelled"]


def test_too_many_pictures_are_told_to_come_again(serving):
    body = {"prompt": "a red circle", **QUICK, "steps": 20, "count": 4}
    answers = [requests.post(f"{serving.url}/api/v1/jobs", json=body, timeout=30) for _ in range(6)]
    refused = next(one for one in answers if one.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["kind"] == "QueueFull"
    for one in answers:
        if one.status_code == 202:
            requests.delete(serving.url + one.headers["location"], timeout=30)
    assert job(serving)["state"] == "done"


def test_tokens_are_counted_and_capabilities_told(serving):
    texts = ["a red circle", "", "a " * 100]
    counted = requests.post(f"{serving.url}/api/v1/tokens", json={"texts": texts}, timeout=30).json()
    assert counted == {"counts": [3, 0, 100], "limit": 75}
    told = requests.get(f"{serving.url}/api/v1/capabilities", timeout=30).json()
    assert told["models"] == [{"name": "tiny", "kind": "sd", "height": 128, "width": 128, "task": "generate"}]
    assert told["limits"]["steps"] == 20


def test_what_no_model_makes_is_refused_in_words(serving):
    for body, message in (
        ({"steps": 21}, "steps must be at most 20 steps here, got 21"),
        ({"width": 512, "height": 512}, "size must be at most 65536 pixels here, got 262144"),
        ({"count": 5}, "count must be at most 4 pictures here"),
        ({"prompt": "a" * 501}, "prompt must be at most 500 characters here"),
        ({"scheduler": "nope"}, "unknown scheduler: 'nope'"),
        ({"model": "/etc/passwd"}, "unknown model: '/etc/passwd'"),
        ({"loras": [{"name": "/etc/passwd"}]}, "unknown lora: '/etc/passwd'"),
        ({"init_image": "no base64!"}, "init_image is no base64"),
        ({"init_image": encoded(b"GIF89a")}, "init_image"),
        ({"mask": encoded(png())}, "covers no init image"),
        ({"prompt": "\ud800"}, "a prompt must be valid UTF-8"),
    ):
        given = {"prompt": "a red circle", **QUICK, **body}
        answer = requests.post(f"{serving.url}/api/v1/jobs", json=given, timeout=30)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert message in error["message"]
        assert error["hint"]
    answer = requests.post(f"{serving.url}/api/v1/jobs", json={"prompt": "x", "stepps": 3}, timeout=30)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == "stepps: Extra inputs are not permitted"


@SLOW
def test_what_only_a_worker_finds_wrong_ends_its_job_in_words(serving):
    told = job(serving, init_image=encoded(png("blue", (16, 1000))), width=None, height=None, scheduler="lcm", steps=20)
    assert told["state"] == "done"
    cut = png("blue", (64, 64))[:-30]
    told = job(serving, init_image=encoded(cut))
    assert told["state"] == "error"
    assert told["error"]["message"].startswith("init image init_image can't be read")
