"""What a request has beside its model, through the server: each picture is the one that `generate` makes alone."""

from __future__ import annotations

import base64
import io
import json

import factories
import ip_adapters
import numpy as np
import pytest
import requests
import torch
from asked import job_over, pixels
from conftest import in_thread
from PIL import Image
from safetensors.torch import save_file
from test_controlnet import small_controlnet
from test_t2i_adapter import KINDS, small_adapter

import sdtrt
from sdtrt.specs import (
    AdapterSpec,
    ControlSpec,
    EmbeddingSpec,
    GenerateSpec,
    GuidanceInterval,
    ImagePromptSpec,
    ModelSpec,
    NoiseSpec,
    RefinerSpec,
    Savings,
    SizeConditioning,
    UpscaleSpec,
)
from sdtrt.specs.serve import Limits, Listed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_the_cpu")]
SMALL_XL = {**factories.SMALLEST["sdxl"], "sample_size": 8, "transformer_layers_per_block": 1}
COMMON = {"steps": 3, "width": 64, "height": 64, "seed": 5}


class Things:
    """A folder with small models, all that is beside them, and pictures that they go by."""

    def __init__(self, root, smallest):
        self.root, unet = root, factories.small_unet("sd1", **factories.SMALLEST["sd1"])
        self.models = (ModelSpec(str(smallest)), ModelSpec(str(factories.sdxl_folder(root / "xl", **SMALL_XL))))
        self.refiner = str(factories.refiner_folder(root / "fine", seed=3, **SMALL_XL))
        for name, seed in (("lines", 7), ("other", 8)):
            small_controlnet(unet, seed=seed).half().save_pretrained(root / name)
        small_adapter(5, **KINDS["sd1"][2]).save_pretrained(root / "sketch")
        self.ip_adapter = str(ip_adapters.write(root, unet))
        with factories.seeded(4):
            save_file({"dog": torch.randn(2, unet.config.cross_attention_dim)}, root / "dog.safetensors")
        for number, name in enumerate(("map", "second")):
            levels = np.random.default_rng(number).integers(0, 2, (64, 64), dtype=np.uint8) * 255
            Image.fromarray(levels).convert("RGB").save(root / f"{name}.png")

    def path(self, name):
        return str(self.root / name)

    def text(self, name):
        """A picture as requests have it."""
        return base64.b64encode((self.root / f"{name}.png").read_bytes()).decode()

    @property
    def listed(self):
        return Listed(
            controlnets=(self.path("lines"), f"second={self.path('other')}"),
            ip_adapters=(f"face={self.ip_adapter}",),
            t2i_adapters=(self.path("sketch"),),
            embeddings=(f"cat2={self.path('dog.safetensors')}",),
            refiners=(self.refiner,),
        )


@pytest.fixture(scope="module")
def things(tmp_path_factory, smallest):
    return Things(tmp_path_factory.mktemp("things"), smallest)


@pytest.fixture(scope="module")
def server(tmp_path_factory, things):
    limits = Limits(pixels=128 * 128, steps=20, images=4)
    options = {"models": things.models, "listed": things.listed, "limits": limits, "open_models": 2}
    with in_thread(tmp_path_factory.mktemp("beside"), backend="torch", **options) as running:
        yield running


def made(server, **body):
    """The file that the server makes, by its own interface."""
    told = job_over(server, {"prompt": "red on blue", **COMMON, **body}, seconds=60)
    assert told["state"] == "done", told["error"]
    return requests.get(server.url + told["images"][0]["url"], timeout=30).content


def alone(tmp_path, model, prompt="red on blue", **options):
    """The picture that `generate` makes."""
    spec = GenerateSpec((prompt,), model, "torch", output=tmp_path, **{**COMMON, **options})
    return pixels(sdtrt.generate(spec, progress=False).images[0].path.read_bytes())


def cases(things):
    """By their names: what a request says, and what `generate` is told."""
    root = things.root
    lines = {"name": "lines", "image": things.text("map"), "scale": 0.8, "start": 0.1, "end": 0.9}
    net = ControlSpec(things.path("lines"), root / "map.png", 0.8, 0.1, 0.9)
    other = ControlSpec(things.path("other"), root / "second.png", preprocessor="none")
    with_face = ModelSpec(things.models[0].name, ip_adapters=(things.ip_adapter,))
    fine, large = RefinerSpec(ModelSpec(things.refiner), 0.5), {"model": "xl"}
    second = {"name": "second", "image": things.text("second"), "preprocessor": "none"}
    return {
        "two ControlNets": ({"control": [lines, second]}, {"controls": (net, other)}),
        "a ControlNet in both passes": (
            {"control": [lines], "upscale": {"factor": 1.5, "steps": 2, "strength": 0.6}},
            {"controls": (net,), "upscale": UpscaleSpec(1.5, steps=2, strength=0.6)},
        ),
        "pixels enlarged": (
            {"upscale": {"factor": 1.5, "upscaler": "lanczos"}, "vae_tiling": True},
            {"upscale": UpscaleSpec(1.5, "lanczos"), "vae_tiling": True},
        ),
        "an IP-Adapter": (
            {"ip_adapters": [{"name": "face", "image": things.text("map"), "scale": 0.6}]},
            {"model": with_face, "ip_images": (ImagePromptSpec(root / "map.png", 0.6),)},
        ),
        "a T2I-Adapter": (
            {"t2i_adapters": [{"name": "sketch", "image": things.text("second"), "scale": 0.7}]},
            {"adapters": (AdapterSpec(things.path("sketch"), root / "second.png", 0.7),)},
        ),
        "an embedding": (
            {"prompt": "a cat2", "embeddings": ["cat2"]},
            {"prompt": "a cat2", "embeddings": (EmbeddingSpec(things.path("dog.safetensors"), "cat2"),)},
        ),
        "savings and noise": (
            {"guidance_interval": [0.0, 0.5], "timestep_spacing": "trailing"},
            {
                "savings": Savings(GuidanceInterval(0.0, 0.5)),
                "noise": NoiseSpec(timestep_spacing="trailing"),
            },
        ),
        "a refiner": (
            {**large, "refiner": {"name": "fine", "start": 0.5}, "crop": [0, 8]},
            {"model": things.models[1], "refiner": fine, "conditioning": SizeConditioning(crop=(0, 8))},
        ),
    }


def test_each_picture_is_the_commands_and_names_nothing_by_its_path(server, things, tmp_path):
    plain = alone(tmp_path / "plain", things.models[0])
    for number, (name, (body, options)) in enumerate(cases(things).items()):
        data = made(server, **body)
        expected = alone(tmp_path / f"{number}", **{"model": things.models[0], **options})
        np.testing.assert_array_equal(pixels(data), expected, name)
        assert plain.shape != expected.shape or np.abs(plain - expected).max() > 2, name
        assert str(things.root) not in str(Image.open(io.BytesIO(data)).info)
    assert np.array_equal(pixels(made(server)), plain)  # nothing of it stays
    assert len(server.dispatcher.store) == len(cases(things)) + 1


def test_a_picture_says_by_the_servers_names_what_it_has(server, things):
    info = Image.open(io.BytesIO(made(server, control=cases(things)["two ControlNets"][0]["control"]))).info
    assert [one["name"] for one in json.loads(info["sdtrt"])["controlnets"]] == ["lines", "second"]
    assert "ControlNet 1: " in info["parameters"]


def test_pictures_made_at_once_share_what_is_beside_the_model(server, things, tmp_path):
    body = {"control": cases(things)["two ControlNets"][0]["control"][:1], "upscale": {"factor": 1.5}}
    answer = requests.post(
        f"{server.url}/api/v1/jobs", json={"prompt": "red on blue", **COMMON, **body, "count": 3}, timeout=30
    )
    with requests.get(server.url + answer.headers["location"] + "/events", stream=True, timeout=60) as stream:
        list(stream.iter_lines())
    told = requests.get(server.url + answer.headers["location"], timeout=30).json()
    net = ControlSpec(things.path("lines"), things.root / "map.png", 0.8, 0.1, 0.9)
    for number, one in enumerate(told["images"]):
        options = {"controls": (net,), "upscale": UpscaleSpec(1.5), "seed": 5 + number}
        expected = alone(tmp_path / f"{number}", things.models[0], **options)
        data = requests.get(server.url + one["url"], timeout=30).content
        assert np.abs(pixels(data) - expected).max() <= 2


def test_a_web_uis_client_has_controlnets_hires_fix_and_a_refiner(server, things, tmp_path):
    import webuiapi

    client = webuiapi.WebUIApi(port=server.port, sampler="Euler a", steps=3)
    assert client.controlnet_model_list() == ["lines", "second", "sketch", "face"]
    assert client.controlnet_module_list() == ["none", "canny", "ip-adapter-auto"]
    assert [one["name"] for one in client.get_upscalers()] == ["Lanczos"]
    unit = webuiapi.ControlNetUnit(Image.open(things.path("map.png")), model="lines [12345678]", weight=0.8)
    hires = {"enable_hr": True, "hr_scale": 1.5, "hr_second_pass_steps": 2, "denoising_strength": 0.6}
    asked = {"prompt": "red", "seed": 5, "width": 64, "height": 64, "cfg_scale": 5}
    result = client.txt2img(**asked, **hires, controlnet_units=[unit], alwayson_scripts={})  # it keeps its default's
    own = {"scheduler": "euler-a", "guidance_scale": 5.0, "prompt_syntax": "webui", "prompt": "red"}
    net = ControlSpec(things.path("lines"), things.root / "map.png", 0.8, preprocessor="none")
    options = {"controls": (net,), "upscale": UpscaleSpec(1.5, steps=2, strength=0.6), **own}
    np.testing.assert_array_equal(
        np.asarray(result.image.convert("RGB")), alone(tmp_path / "hires", things.models[0], **options)
    )
    body = {**asked, "steps": 3, "sampler_name": "Euler a", "refiner_checkpoint": "fine", "refiner_switch_at": 0.5}
    body["override_settings"] = {"sd_model_checkpoint": "xl"}
    answer = requests.post(f"{server.url}/sdapi/v1/txt2img", json=body, timeout=60).json()
    expected = alone(tmp_path / "fine", things.models[1], refiner=RefinerSpec(ModelSpec(things.refiner), 0.5), **own)
    np.testing.assert_array_equal(pixels(base64.b64decode(answer["images"][0])), expected)
    with pytest.raises(RuntimeError, match="hr_resize_x can"):
        client.txt2img(**asked, **hires, hr_resize_x=96, alwayson_scripts={})


def test_a_control_picture_of_other_proportions_is_cut_around_its_middle_as_the_unit_says(server, things, tmp_path):
    wide = Image.new("RGB", (128, 64))
    wide.paste(Image.open(things.path("map.png")), (32, 0))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    unit = {"image": base64.b64encode(buffer.getvalue()).decode(), "model": "lines", "resize_mode": "Crop and Resize"}
    body = {"prompt": "red", "seed": 5, "width": 64, "height": 64, "steps": 3}
    body["alwayson_scripts"] = {"controlnet": {"args": [unit]}}
    answer = requests.post(f"{server.url}/sdapi/v1/txt2img", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    net = ControlSpec(things.path("lines"), things.root / "map.png", preprocessor="none")
    expected = alone(tmp_path, things.models[0], "red", controls=(net,), guidance_scale=7.0, prompt_syntax="webui")
    np.testing.assert_array_equal(pixels(base64.b64decode(answer.json()["images"][0])), expected)


def test_what_is_not_listed_and_what_can_not_be_is_refused_in_words(server, things):
    face = {"name": "face", "image": things.text("map")}
    for body, message in (
        ({"control": [{"name": things.path("lines"), "image": things.text("map")}]}, "unknown controlnet: "),
        ({"ip_adapters": [{**face, "name": "lines"}]}, "unknown ip_adapter: 'lines'"),
        ({"refiner": {"name": "/etc/passwd"}}, "unknown refiner: '/etc/passwd'"),
        ({"upscale": {"upscaler": "/etc/passwd"}}, "unknown upscaler: '/etc/passwd'"),
        ({"upscale": {"factor": 4}}, "the second pass makes 256x256, more than the 16384 pixels"),
        ({"embeddings": ["dog"]}, "unknown embedding: 'dog'"),
        ({"control": [{"name": "lines", "image": "no base64!"}]}, "control_0 is no base64"),
        ({"guidance_interval": [0.5, 0.1]}, "guidance-interval must go from"),
        ({"t2i_adapters": [{"name": "sketch", "image": things.text("map")}], "upscale": {}}, "don't go together"),
    ):
        answer = requests.post(f"{server.url}/api/v1/jobs", json={"prompt": "x", **COMMON, **body}, timeout=30)
        assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True), answer.text
        assert answer.json()["error"]["hint"]
    body = {
        "prompt": "x",
        "alwayson_scripts": {"ControlNet": {"args": [{"model": "lines", "image": things.text("map")}]}},
    }
    unit = body["alwayson_scripts"]["ControlNet"]["args"][0]
    for wrong, message in (
        ({"module": "openpose"}, "the preprocessor 'openpose'"),
        ({"control_mode": 1}, "control_mode 1"),
        ({"model": "/etc/passwd"}, "unknown model of ControlNet"),
        ({"image": ""}, "the unit of lines has no image"),
        ({"model": "face", "guidance_end": 0.5}, "counts in all steps here"),
        ({"weight": "much"}, "a unit of ControlNet, weight"),
    ):
        body["alwayson_scripts"]["ControlNet"]["args"] = [{**unit, **wrong}]
        answer = requests.post(f"{server.url}/sdapi/v1/txt2img", json=body, timeout=30)
        assert (answer.status_code, message in answer.json()["errors"]) == (400, True), answer.text


def test_capabilities_name_all_lists(server):
    told = requests.get(f"{server.url}/api/v1/capabilities", timeout=30).json()
    assert told["controlnets"] == ["lines", "second"]
    assert (told["ip_adapters"], told["t2i_adapters"], told["refiners"]) == (["face"], ["sketch"], ["fine"])
    assert (told["embeddings"], told["upscalers"]) == (["cat2"], ["latent", "lanczos"])
    assert told["qualities"][0] == "exact"
