"""IP-Adapters on the command line and for `load`: files in, the pictures of plain diffusers out; what is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import factories
import hub_server
import ip_adapters
import numpy as np
import pytest
import safetensors.torch
import torch
import torch_engines
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

import sdtrt
from sdtrt.common.errors import ModelError, SdtrtError, UsageError
from sdtrt.exports.program import export_program
from sdtrt.models.components import contract_of, load_component
from sdtrt.models.live import component_tensors
from sdtrt.models.loading import check_ip_adapters
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.inputs.images import read_metadata, read_parameters
from sdtrt.specs import GenerateSpec, ImagePromptSpec, ModelSpec, Profile, Sizes

pytestmark = pytest.mark.usefixtures("on_the_cpu")
SIZE = {"height": 64, "width": 64}
LEVELS = 2  # of 255
PARTS = {"safety_checker": None, "requires_safety_checker": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model in a folder, adapters for it, and pictures."""
    root = tmp_path_factory.mktemp("ip")
    unet = factories.small_unet("sd1", **factories.SMALLEST["sd1"])
    factories.sd1_folder(root / "model", **factories.SMALLEST["sd1"])
    ip_adapters.write(root / "adapters", unet)
    ip_adapters.write(root / "adapters", unet, "plus", seed=5)
    for name, seed in (("one", 0), ("other", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
    return root


@pytest.fixture
def base(folder):
    return folder / "adapters" / "models" / "ip-adapter_sd15.safetensors"


@pytest.fixture
def plus(folder):
    return folder / "adapters" / "models" / "ip-adapter-plus_sd15.safetensors"


def plain(folder, *paths, scale, cls=StableDiffusionPipeline):
    pipe = cls.from_pretrained(folder / "model", torch_dtype=torch.float32, **PARTS)
    pipe.set_progress_bar_config(disable=True)
    return ip_adapters.load(pipe, *paths, scale=scale)


def picture(path):
    with Image.open(path) as image:
        return image.convert("RGB")


def levels(one, other):
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("torch", marks=pytest.mark.slow),
        pytest.param("onnxruntime", marks=pytest.mark.slow),
    ],
)
@pytest.mark.feature("IP-Adapter, `--ip-adapter`", "sd1", "onnxruntime")
def test_a_picture_is_that_of_plain_diffusers_and_says_what_it_was_made_of(folder, base, tmp_path, backend):
    one, other = folder / "one.png", folder / "other.png"
    spec = GenerateSpec(
        prompts=("a red circle",),
        model=ModelSpec(str(folder / "model"), ip_adapters=(str(base),)),
        backend=backend,
        precision="fp32",
        steps=2,
        seed=7,
        output=tmp_path / "out.png",
        ip_images=(ImagePromptSpec(one, 0.6),),
        components=() if backend == "torch" else ("unet",),
        **SIZE,
    )
    report = sdtrt.generate(spec, engine_dir=tmp_path / "engines", progress=False)
    pipe = plain(folder, base, scale=0.6)

    def expected(given):
        options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(7), **SIZE}
        return pipe("a red circle", ip_adapter_image=picture(given), **options).images[0]

    made = picture(report.images[0].path)
    assert levels(made, expected(one)) <= LEVELS
    assert levels(made, expected(other)) > 10 * LEVELS
    fields = read_parameters(report.images[0].path).fields
    assert fields["ControlNet 0"].startswith("Module: ip-adapter-auto, Model: ip-adapter_sd15 [")
    assert "Weight: 0.6" in fields["ControlNet 0"]
    (details,) = read_metadata(report.images[0].path).details["ip_adapters"]
    assert (details["name"], details["scale"], details["image"]["name"]) == ("ip-adapter_sd15", 0.6, "one.png")
    if backend != "torch":
        built = sorted((tmp_path / "engines").rglob("*.json"))
        pipe.set_ip_adapter_scale(1.2)
        again = replace(spec, ip_images=(ImagePromptSpec(other, 1.2),), output=tmp_path / "again.png")
        second = sdtrt.generate(again, engine_dir=tmp_path / "engines", progress=False)
        assert levels(picture(second.images[0].path), expected(other)) <= LEVELS
        assert sorted((tmp_path / "engines").rglob("*.json")) == built


@pytest.mark.slow
def test_engines_for_an_adapter_are_built_ahead_and_verified(folder, base, tmp_path, engine_dir, run):
    given = ("--model", str(folder / "model"), "--ip-adapter", str(base), "--backend", "onnxruntime")
    given += ("--precision", "fp32", "--engine-dir", str(tmp_path / "engines"))
    code, out, _ = run("build", *given)
    assert (code, len(out.split())) == (0, 4)
    shown = ("--ip-image", f"{folder / 'one.png'}:0.6", "--no-build", "--steps", "2", "--width", "64", "--height", "64")
    code, out, _ = run("verify", *given, *shown, "--output", str(tmp_path), "--json")
    report = json.loads(out)
    assert code == 0
    assert set(report["engines"]) == {"text_encoder", "unet", "vae_decoder"}
    assert report["ip_adapters"][0]["scale"] == 0.6
    assert all(1e-5 < error["reference_relative_l2"] < 1e-2 for error in report["timesteps"])
    assert all(error["relative_l2"] < 1e-5 for error in report["timesteps"])
    code, out, _ = run("txt2img", "a star", *given, *shown, "--output", str(tmp_path / "star.png"))
    assert (code, out.strip()) == (0, str(tmp_path / "star.png"))
    code, _, err = run("txt2img", "a star", *given[:-1], str(tmp_path / "none"), *shown)
    assert code == 1
    assert f"--ip-adapter {base}" in err


@pytest.mark.slow
@pytest.mark.feature("IP-Adapter, `--ip-adapter`", "sd1", "onnxruntime")
def test_several_adapters_start_from_an_image(folder, base, plus, tmp_path, run):
    one, other = str(folder / "one.png"), str(folder / "other.png")
    words = [
        "img2img",
        "a red circle",
        "--model",
        str(folder / "model"),
        "--backend",
        "onnxruntime",
        "--init-image",
        one,
    ]
    words += ["--ip-adapter", str(base), "--ip-image", f"{one}:0.4", "--ip-adapter", str(plus), "--ip-image", other]
    words += ["--steps", "4", "--seed", "3", "--height", "64", "--width", "64", "--component", "unet", "--quiet"]
    words += ["--strength", "0.75", "--json", "--output", str(tmp_path / "o.png")]
    code, out, err = run(*words, "--engine-dir", str(tmp_path))
    assert code == 0, err
    made = json.loads(out)
    assert [own["scale"] for own in made["ip_adapters"]] == [0.4, 1.0]
    pipe = plain(folder, base, plus, scale=[0.4, 1.0], cls=StableDiffusionImg2ImgPipeline)
    start = picture(one).resize((64, 64), Image.Resampling.LANCZOS)
    options = {"num_inference_steps": 4, "strength": 0.75, "generator": torch.Generator().manual_seed(3)}
    expected = pipe("a red circle", image=start, ip_adapter_image=[picture(one), picture(other)], **options).images[0]
    assert levels(picture(made["images"][0]["path"]), expected) <= LEVELS


@pytest.mark.slow
@pytest.mark.parametrize(("command", "kind"), [("txt2img", "sdxl"), ("inpaint", "sd1")])
@pytest.mark.feature("IP-Adapter, `--ip-adapter`", "sd1 sdxl", "inductor")
def test_each_command_takes_pictures_in_batches_too(folder, base, tmp_path, run, monkeypatch, command, kind):
    """PyTorch computes in the place of an engine without weights, which the facade gives what it gives an engine."""
    torch_engines.instead_of_inductor(monkeypatch)
    path, model = base, folder / "model"
    if kind == "sdxl":
        model = factories.sdxl_folder(tmp_path / "model", **factories.SMALLEST["sdxl"])
        unet = factories.small_unet("sdxl", **factories.SMALLEST["sdxl"])
        path = ip_adapters.write(tmp_path / "xl", unet, name="ip-adapter_sdxl.safetensors")
    one, mask = folder / "one.png", tmp_path / "mask.png"
    Image.new("L", (48, 48), 255).save(mask)
    words = [
        command,
        "a red circle",
        "--model",
        model,
        "--precision",
        "fp32",
        "--steps",
        2,
        "--seed",
        1,
        "-W",
        64,
        "-H",
        64,
    ]
    words += ["--num-images", 2, "--batch-size", 2, "--engine-dir", tmp_path / "engines", "--component", "unet"]
    words += ["--init-image", one, "--mask", mask] if command == "inpaint" else []
    shown = {}
    for name, scale in (("bare", 0), ("little", 0.2), ("much", 1)):
        for backend in ("torch", "inductor"):
            given = ["--ip-adapter", path, "--ip-image", f"{one}:{scale}", "--backend", backend, "--json", "--quiet"]
            own = [word for word in words if backend != "torch" or word not in ("--component", "unet")]
            code, out, err = run(*map(str, [*own, *given, "--output", tmp_path / f"{name}-{backend}"]))
            assert code == 0, err
            shown[name, backend] = [picture(made["path"]) for made in json.loads(out)["images"]]
        assert max(map(levels, shown[name, "torch"], shown[name, "inductor"])) <= LEVELS
    assert levels(shown["bare", "torch"][1], shown["much", "torch"][1]) > 2 * LEVELS


@pytest.mark.slow
def test_a_program_has_the_weights_of_an_adapter_by_the_names_that_a_live_unet_has(folder, base):
    model = resolved(folder, base)
    contract = contract_of(model, "unet", "fp32", model.groups)
    module = load_component(model, "unet", torch.float32)
    program = export_program(module, contract, Profile.of(Sizes(2, 64, 64)), device=torch.device("cpu"))
    live = component_tensors(plain(folder, base, scale=1.0).unet, "unet")
    assert {name for sources in program.sources.values() for name in sources} == set(live)
    assert sum(".processor.to_k_ip.0." in name for name in live) == 4


@pytest.mark.slow
def test_load_opens_a_pipeline_that_takes_pictures_and_scales(folder, base, tmp_path):
    model = ModelSpec(str(folder / "model"), ip_adapters=(str(base),))
    options = {"backend": "onnxruntime", "components": ("unet",), "engine_dir": tmp_path, "progress": False}
    own, pipe = sdtrt.load(model, **SIZE, **options), plain(folder, base, scale=0.3)
    for scale in (0.3, 0.9):
        found = []
        for one in (own, pipe):
            one.set_ip_adapter_scale(scale)
            given = {"generator": torch.Generator().manual_seed(1), "num_inference_steps": 2, "output_type": "latent"}
            found.append(one("a", ip_adapter_image=picture(folder / "one.png"), **given, **SIZE).images)
        assert float((found[0] - found[1]).abs().max()) <= 1e-4
    twin = copy.deepcopy(own.unet)
    own.unet = twin
    with_copy = own("a", ip_adapter_image=picture(folder / "one.png"), **given, **SIZE).images
    assert with_copy.shape == found[0].shape
    own.close()


# --- what is refused -------------------------------------------------------------------------------------------------


def resolved(folder, *names):
    model = resolve_model(ModelSpec(str(folder / "model"), ip_adapters=tuple(map(str, names))))
    check_ip_adapters(model)
    return model


def two_lines(error):
    assert error.hint
    assert "\n" not in error.message + error.hint
    return error.message


def test_adapters_are_found_by_folder_and_file(folder, base, plus, tmp_path):
    (model,) = (resolved(folder, base).ip_adapters,)
    assert [(one.name, one.tokens) for one in model] == [("ip-adapter_sd15", 4)]
    assert resolved(folder, folder / "adapters").ip_adapters == model, "the usual name, of two"
    assert [one.tokens for one in resolved(folder, plus, base).ip_adapters] == [6, 4]
    assert resolved(folder, plus, base).groups == ("ip_adapter:6+4",)
    assert resolved(folder).fingerprint("unet", str) != resolved(folder, base).fingerprint("unet", str)
    assert resolved(folder).fingerprint("vae", str) == resolved(folder, base).fingerprint("vae", str)
    for name, message in (
        (tmp_path, "has no .safetensors file"),
        (tmp_path / "none.safetensors", "there is no IP-Adapter at"),
        ("https://huggingface.co/h94/IP-Adapter", "takes no web address"),
    ):
        with pytest.raises(SdtrtError, match=message) as caught:
            resolved(folder, name)
        two_lines(caught.value)


# huggingface_hub reads its settings when it is imported: a process of its own.
SCRIPT = """
import json, sys
from sdtrt.common.errors import SdtrtError
from sdtrt.models.resolve import resolve_model
from sdtrt.specs import ModelSpec
try:
    model = resolve_model(ModelSpec(sys.argv[1], ip_adapters=(sys.argv[2],), offline=len(sys.argv) > 3))
    (one,) = model.ip_adapters
    print(json.dumps([one.name, one.tokens, one.encoder.name, all(file.is_file() for file in one.encoder_files)]))
except SdtrtError as error:
    print(json.dumps([error.message, error.hint]))
"""


@pytest.mark.slow
def test_of_the_hub_only_what_is_needed_is_fetched(folder, base, tmp_path):
    repo = shutil.copytree(folder / "adapters", tmp_path / "repo")
    shutil.copytree(repo / "models" / "image_encoder", repo / "sdxl_models" / "image_encoder")
    (repo / "sdxl_models" / "ip-adapter_sdxl.safetensors").write_bytes(base.read_bytes())
    with hub_server.serve({"owner/ip": repo}) as hub:

        def ask(name, *offline, url=hub.url):
            variables = {name: value for name, value in os.environ.items() if not name.lower().endswith("proxy")}
            variables |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1"}
            variables["PYTHONPATH"] = str(Path(sdtrt.__file__).parents[1])
            command = [sys.executable, "-c", SCRIPT, str(folder / "model"), name, *offline]
            result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
            assert result.returncode == 0, result.stderr
            return json.loads(result.stdout)

        assert ask("owner/ip") == ["ip-adapter_sd15", 4, "image_encoder", True]
        wanted = ["ip-adapter_sd15.safetensors", "image_encoder/config.json", "image_encoder/model.safetensors"]
        assert hub.downloads == [f"models/{name}" for name in wanted]
        plus = "owner/ip/models/ip-adapter-plus_sd15.safetensors"
        assert ask(plus)[:2] == ["ip-adapter-plus_sd15", 6]
        assert ask("owner/ip/nothing.safetensors")[0] == "owner/ip has no file nothing.safetensors"
        assert ask("owner/nothing")[0].startswith("the hub has no model owner/nothing")
    assert ask(plus, "offline", url="http://127.0.0.1:9")[:2] == ["ip-adapter-plus_sd15", 6]


def test_what_does_not_fit_is_refused_by_its_header(folder, base, tmp_path):
    unet = factories.small_unet("sd1", **factories.SMALLEST["sd1"])
    tensors = ip_adapters.tensors(unet)
    other = ip_adapters.tensors(factories.small_unet("sdxl", **factories.SMALLEST["sdxl"]))
    first = "ip_adapter.1.to_k_ip.weight"
    cases = {
        "for another kind": (other, "is for .*width 64.* is .*width 32"),
        "of another width": (
            ip_adapters.tensors(unet, width=23),
            "takes image embeddings of width 23, and .* gives 24",
        ),
        "without a layer": ({k: v for k, v in tensors.items() if ".7." not in k}, "is for another UNet: 3 attentions"),
        "with a layer": (
            {**tensors, "ip_adapter.9.to_k_ip.weight": tensors[first]},
            r"\(ip_adapter.9.to_k_ip.weight\)",
        ),
        "of other channels": ({**tensors, first: torch.zeros(16, 32)}, "does not fit the unet: .*to_k_ip"),
        "with more": ({**tensors, "lora.down": torch.zeros(1)}, "is no IP-Adapter: it has lora.down"),
        "for faces": (
            {k: v for k, v in tensors.items() if "proj.weight" not in k},
            "takes embeddings of faces",
        ),
        "with another projection": ({**tensors, "image_proj.extra": torch.zeros(2)}, "does not fit the unet: .*extra"),
    }
    adapters = folder / "wrong" / "models"
    adapters.mkdir(parents=True, exist_ok=True)
    if not (adapters / "image_encoder").exists():
        (adapters / "image_encoder").symlink_to(base.parent / "image_encoder")
    for name, (content, message) in cases.items():
        path = adapters / f"{name.replace(' ', '-')}.safetensors"
        safetensors.torch.save_file({key: value.clone() for key, value in content.items()}, path)
        with pytest.raises(ModelError, match=message) as caught:
            resolved(folder, path)
        two_lines(caught.value)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(base.read_bytes())
    with pytest.raises(ModelError, match="has no image encoder beside it"):
        resolved(folder, alone)


def test_each_adapter_needs_a_picture(base, folder):
    model = ModelSpec(ip_adapters=(str(base),))
    for given, named in (((), model), ((ImagePromptSpec(Path("a.png")),), ModelSpec())):
        with pytest.raises(UsageError, match="picture") as caught:
            GenerateSpec(prompts=("a",), model=named, ip_images=given)
        two_lines(caught.value)
    spec = GenerateSpec(prompts=("a",), model=model, ip_images=(ImagePromptSpec(folder / "none.png"),))
    with pytest.raises(UsageError, match=r"ip image .*none\.png does not exist"):
        sdtrt.generate(spec, progress=False)
    assert ImagePromptSpec.parse("a:b.png:0.5") == ImagePromptSpec(Path("a:b.png"), 0.5)
    assert ImagePromptSpec.parse("a:b.png") == ImagePromptSpec(Path("a:b.png"))
    with pytest.raises(UsageError, match="must be a number, got nan"):
        ImagePromptSpec.parse("a.png:nan")
    with pytest.raises(UsageError, match="must be names"):
        ModelSpec(ip_adapters="a.safetensors")
