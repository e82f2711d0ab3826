"""Features asked for together: ControlNet, IP-Adapter, LoRA, refiner, second pass, edits and previews, in one request.

Each pair beside plain diffusers, whose pictures PyTorch's are to the bit; what goes with nothing is refused at once.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import diffusers
import factories
import ip_adapters
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import save_file
from test_control_commands import lines, photograph
from test_controlnet import small_controlnet, union_of
from test_edits import editing_folder
from test_lora_commands import FILE, TARGETS, random_adapter

import sdtrt
from sdtrt.common.console import QUIET
from sdtrt.common.errors import UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models import loading
from sdtrt.pipeline.inputs.images import read_parameters
from sdtrt.pipeline.runs.generate import generate
from sdtrt.pipeline.runs.saving import PreviewFile
from sdtrt.specs import (
    ControlSpec,
    EmbeddingSpec,
    GenerateSpec,
    ImagePromptSpec,
    LoraSpec,
    ModelSpec,
    RefinerSpec,
    UpscaleSpec,
)

pytestmark = pytest.mark.usefixtures("on_the_cpu")
SLOW = pytest.mark.slow
LEVELS = 2  # of 255
SIZE = {"height": 64, "width": 80}
UNETS = {kind: factories.SMALLEST[kind] for kind in ("sd1", "sdxl")}


@pytest.fixture(scope="module")
def made(tmp_path_factory, smallest):
    """The folder or file of a name: models, a ControlNet, an IP-Adapter and a LoRA of each kind, pictures."""
    root, there = tmp_path_factory.mktemp("together"), {"sd1": smallest}

    def unet(kind):
        return factories.small_unet(kind, **UNETS[kind])

    def net(kind, path):
        small_controlnet(unet(kind)).half().save_pretrained(path)
        return path

    def union(path):
        with factories.seeded(7):
            net = union_of(unet("sdxl"))
        net.half().save_pretrained(path)
        return path

    def lora(kind, path):
        layers = random_adapter(unet(kind), diffusers_lora(), 1)
        diffusers.StableDiffusionPipeline.save_lora_weights(path, unet_lora_layers=layers)
        return path / FILE

    write = {
        "sdxl": lambda path: factories.sdxl_folder(path, **UNETS["sdxl"]),
        "refiner": lambda path: factories.refiner_folder(path, seed=3, **UNETS["sdxl"]),
        "lcm": factories.lcm_folder,
        "edit-sd1": lambda path: editing_folder(path, "sd1"),
        "edit-sdxl": lambda path: editing_folder(path, "sdxl"),
        "union": union,
        "tiny": lambda path: factories.vae_folder(path, factories.small_tiny_vae()),
    }
    for kind in UNETS:
        write[f"net-{kind}"] = partial(net, kind)
        write[f"ip-{kind}"] = lambda path, kind=kind: ip_adapters.write(path, unet(kind))
        write[f"lora-{kind}"] = partial(lora, kind)

    def find(name):
        if name not in there:
            there[name] = write[name](root / name)
        return there[name]

    return find


def diffusers_lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=TARGETS)


@pytest.fixture
def pictures(folder):
    """The working folder, with a map, a picture to start from, one for an IP-Adapter, and a mask."""
    lines(0, (160, 128)).save(folder / "map.png")
    photograph(2).save(folder / "init.png")
    photograph(3, (48, 48)).save(folder / "ip.png")
    mask = Image.new("L", (80, 64))
    mask.paste(255, (16, 8, 48, 40))
    mask.save(folder / "mask.png")
    return folder


@pytest.fixture
def asked(made, pictures):
    """A request for two pictures at once, with what is named of a kind."""

    def spec(model, *parts, kind="sd1", **options):
        named = {}
        if "net" in parts:
            named["controls"] = (ControlSpec(str(made(f"net-{kind}")), pictures / "map.png", scale=0.8, end=0.9),)
        if "ip" in parts:
            named["ip_images"] = (ImagePromptSpec(pictures / "ip.png", 0.6),)
        adapters = (str(made(f"ip-{kind}")),) if "ip" in parts else ()
        loras = (LoraSpec(str(made(f"lora-{kind}")), 0.7),) if "lora" in parts else ()
        given = {"steps": 3, "seed": 5, "num_images": 2, "batch_size": 2, "output": pictures / "out", **SIZE, **named}
        full = ModelSpec(str(made(model)), ip_adapters=adapters, loras=loras)
        usual = {"backend": "torch", "negative_prompt": "blue"}
        return GenerateSpec(**{"prompts": ("red",), "model": full, **usual, **given, **options})

    return spec


def pixels_of(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def pictures_of(spec, directory):
    return [pixels_of(one.path) for one in generate(spec, directory, QUIET).images]


def pipeline(spec, made, task="", kind="sd1", control="ControlNet", cls=None):
    """diffusers' own pipeline for a request, loaded by itself."""
    parts = {} if kind == "sdxl" else {"safety_checker": None}
    if spec.controls:
        parts["controlnet"] = ControlNetModel.from_pretrained(spec.controls[0].name, torch_dtype=torch.float32)
    name = f"StableDiffusion{'XL' * (kind == 'sdxl')}{control * bool(spec.controls)}{task}Pipeline"
    pipe = (cls or getattr(diffusers, name)).from_pretrained(spec.model.name, torch_dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    if spec.ip_images:
        ip_adapters.load(pipe, made(f"ip-{kind}"), scale=0.6)
    for one in spec.model.loras:
        pipe.load_lora_weights(str(one.name))
        pipe.fuse_lora(lora_scale=one.weight)
    return pipe


def arguments(spec, *, image=None, size=SIZE, **options):
    """What diffusers' own call takes for both pictures of a request."""
    given = {"prompt": ["red"] * 2, "negative_prompt": ["blue"] * 2, "num_inference_steps": spec.steps}
    given |= {"guidance_scale": spec.guidance_scale, "generator": generators()}
    if image is not None:
        given |= {"image": image}
    if spec.ip_images:
        given |= {"ip_adapter_image": Image.open(spec.ip_images[0].image)}
    if spec.controls:
        fitted = Image.open(spec.controls[0].image).resize((size["width"], size["height"]), Image.Resampling.LANCZOS)
        given["image" if image is None else "control_image"] = fitted
        given |= {"controlnet_conditioning_scale": 0.8, "control_guidance_end": 0.9}
    if image is None or spec.controls or spec.mask is not None:
        given |= size
    return {**given, **options}


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (5, 6)]


def check(spec, directory, expected, most=0):
    """Hold the pictures of a request against diffusers' own; they are two."""
    found = pictures_of(spec, directory)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - np.asarray(other).astype(int)).max() <= most
    assert np.abs(found[0] - found[1]).max() > LEVELS


def made_anew(run, command, spec):
    """Make a picture of a request's folder anew from its file."""
    first = sorted(spec.output.iterdir())[0]
    code, _, err = run(command, "--from", str(first), "--batch-size", "2", "--num-images", "2", "-o", "again")
    assert code == 0, err
    assert "not taken" not in err
    (again,) = (path for path in spec.output.parent.joinpath("again").iterdir() if path.name == first.name)
    assert again.read_bytes() == first.read_bytes()


@SLOW
@pytest.mark.parametrize(("kind", "task"), [("sd1", ""), ("sd1", "Inpaint"), ("sdxl", "Img2Img")])
def test_a_controlnet_and_an_ip_adapter(kind, task, asked, made, pictures, directory, run):
    init = {"init_image": pictures / "init.png"} if task else {}
    mask = {"mask": pictures / "mask.png"} if task == "Inpaint" else {}
    spec = asked(kind, "net", "ip", kind=kind, **init, **mask)
    image = Image.open("init.png") if task else None
    given = {"strength": spec.strength} if task else {}
    if mask:
        image, given = [image] * 2, {**given, "mask_image": [Image.open("mask.png")] * 2}
    expected = pipeline(spec, made, task, kind)(**arguments(spec, image=image, **given)).images
    check(spec, directory, expected)
    fields = read_parameters(sorted(spec.output.iterdir())[0]).fields
    assert [name for name in fields if name.startswith("ControlNet")] == ["ControlNet 0", "ControlNet 1"]
    assert fields["ControlNet 0"].startswith("Module: none, Model: net-")
    assert fields["ControlNet 1"].startswith("Module: ip-adapter-auto")
    made_anew(run, {"": "txt2img", "Img2Img": "img2img", "Inpaint": "inpaint"}[task], spec)


@SLOW
def test_a_controlnet_and_an_ip_adapter_in_engines(asked, made, engine_dir):
    spec = asked("sd1", "net", "ip", "lora", backend="onnxruntime", components=("unet", "controlnet"))
    expected = pipeline(spec, made)(**arguments(spec)).images
    check(spec, EngineDirectory(engine_dir), expected, LEVELS)


@SLOW
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_latent_consistency_model_with_a_controlnet_and_an_ip_adapter(backend, asked, made, engine_dir):
    spec = replace(asked("lcm", "net", "ip", backend=backend), components=("unet",) if backend != "torch" else ())
    cls = diffusers.StableDiffusionControlNetPipeline
    expected = pipeline(spec, made, cls=cls)(**arguments(spec)).images
    check(spec, EngineDirectory(engine_dir), expected, 0 if backend == "torch" else LEVELS)


@SLOW
def test_the_second_pass_of_a_latent_consistency_model_has_as_many_steps_as_are_asked_for(asked, made, directory):
    spec = asked("lcm", "ip", upscale=UpscaleSpec(1.5, "lanczos", steps=2, strength=0.5))
    given = arguments(spec)
    given.pop("negative_prompt")
    first = pipeline(spec, made, cls=diffusers.LatentConsistencyModelPipeline)
    large = [one.resize((120, 96), Image.Resampling.LANCZOS) for one in first(**given).images]
    given |= {"image": large, "strength": 0.5, "num_inference_steps": 2, "generator": generators()}
    second = pipeline(spec, made, cls=diffusers.LatentConsistencyModelImg2ImgPipeline)
    check(spec, directory, second(**{name: one for name, one in given.items() if name not in SIZE}).images)


@SLOW
@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_a_second_pass_by_a_controlnet_has_the_map_in_its_own_size(upscaler, asked, made, directory, run):
    larger = UpscaleSpec(2.0, upscaler, steps=2, strength=0.6)
    spec = asked("sd1", "net", "ip", upscale=larger, prompt_syntax="webui", vae_tiling=True)
    start = pipeline(spec, made)(**arguments(spec, output_type="latent" if upscaler == "latent" else "pil")).images
    if upscaler == "latent":
        start = torch.nn.functional.interpolate(start, (16, 20), mode="bilinear")
    else:
        start = [one.resize((160, 128), Image.Resampling.LANCZOS) for one in start]
    second = pipeline(spec, made, "Img2Img")
    second.vae.enable_tiling()
    given = arguments(spec, image=start, size={"height": 128, "width": 160}, strength=0.6)
    check(spec, directory, second(**{**given, "num_inference_steps": 4}).images)
    made_anew(run, "txt2img", spec)


@SLOW
def test_a_second_pass_by_a_union_and_an_ip_adapter(asked, made, pictures, directory, run):
    spec = asked("sdxl", "ip", kind="sdxl", upscale=UpscaleSpec(1.5, steps=2, strength=0.6))
    spec = replace(spec, controls=(ControlSpec(str(made("union")), pictures / "map.png", 0.8, mode=1),))
    found, given = [], {"prompt": ["red"] * 2, "negative_prompt": ["blue"] * 2, "controlnet_conditioning_scale": 0.8}
    given |= {"guidance_scale": spec.guidance_scale, "control_mode": [1], "ip_adapter_image": Image.open("ip.png")}
    for task, size, steps in (("", (80, 64), 3), ("Img2Img", (120, 96), 4)):
        cls = getattr(diffusers, f"StableDiffusionXLControlNetUnion{task}Pipeline")
        net = diffusers.ControlNetUnionModel.from_pretrained(made("union"), torch_dtype=torch.float32)
        pipe = cls.from_pretrained(made("sdxl"), controlnet=net, torch_dtype=torch.float32)
        ip_adapters.load(pipe, made("ip-sdxl"), scale=0.6)
        control = {"control_image": [Image.open("map.png").resize(size, Image.Resampling.LANCZOS)]}
        control |= {"num_inference_steps": steps, "width": size[0], "height": size[1], "generator": generators()}
        if task:
            start = torch.nn.functional.interpolate(found, (12, 15), mode="bilinear")
            control |= {"image": start, "strength": 0.6}
        found = pipe(**given, **control, output_type="pil" if task else "latent").images
    check(spec, directory, found)
    made_anew(run, "txt2img", spec)


@SLOW
def test_a_live_pipeline_with_a_controlnet_and_an_ip_adapter(asked, made, engine_dir):
    spec = asked("sd1", "net", "ip")
    pipe = pipeline(spec, made)
    expected = pipe(**arguments(spec)).images
    parts = {"components": ["unet", "controlnet"], "engine_dir": engine_dir, "progress": False}
    sdtrt.accelerate(pipe, backend="onnxruntime", batch_size=2, **parts, **SIZE)
    for one, other in zip(pipe(**arguments(spec)).images, expected, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= LEVELS
    sdtrt.restore(pipe)
    for one, other in zip(pipe(**arguments(spec)).images, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@SLOW
def test_a_second_pass_in_engines_with_a_lora_and_an_ip_adapter(asked, engine_dir):
    larger = UpscaleSpec(1.5, "lanczos", steps=2, strength=0.6)
    spec = asked("sd1", "net", "ip", "lora", upscale=larger, num_images=1, batch_size=1)
    (expected,) = pictures_of(spec, EngineDirectory(engine_dir))
    spec = replace(spec, backend="onnxruntime", components=("unet", "controlnet"), output=spec.output / "engines")
    (found,) = pictures_of(spec, EngineDirectory(engine_dir))
    assert np.abs(found - expected).max() <= LEVELS


@SLOW
@pytest.mark.parametrize("task", ["", "Img2Img"])
def test_a_refiner_behind_all_others(task, asked, made, pictures, directory, run):
    parts, init = (("net", "ip"), {}) if not task else (("ip",), {"init_image": pictures / "init.png"})
    refiner = RefinerSpec(ModelSpec(str(made("refiner"))), 0.5)
    spec = asked("sdxl", *parts, kind="sdxl", refiner=refiner, clip_skip=1, steps=4, **init)
    drawn = generators()
    given = {"generator": drawn, "clip_skip": 1}
    if task:
        given |= {"image": Image.open("init.png"), "strength": spec.strength}
    first = pipeline(spec, made, task, "sdxl")
    latents = first(**arguments(spec, **given, output_type="latent", denoising_end=0.5)).images
    second = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(made("refiner"), torch_dtype=torch.float32)
    rest = {"prompt": ["red"] * 2, "negative_prompt": ["blue"] * 2, "num_inference_steps": 4, "clip_skip": 1}
    rest |= {"guidance_scale": spec.guidance_scale, "generator": drawn}
    check(spec, directory, second(image=latents, denoising_start=0.5, **rest).images)
    made_anew(run, "img2img" if task else "txt2img", spec)


@SLOW
def test_web_uis_syntax_with_a_refiner_a_controlnet_and_a_lora(asked, made, directory):
    """What means the same in both syntaxes gives the same picture; weights and chunks change it."""
    refiner = RefinerSpec(ModelSpec(str(made("refiner"))), 0.5)
    spec = asked("sdxl", "net", "lora", kind="sdxl", refiner=refiner, num_images=1)
    (plain,) = pictures_of(spec, directory)
    (same,) = pictures_of(replace(spec, prompt_syntax="webui"), directory)
    np.testing.assert_array_equal(same, plain)
    weighted = replace(spec, prompt_syntax="webui", prompts=("(red:1.5) BREAK blue",))
    assert np.abs(pictures_of(weighted, directory)[0] - plain).max() > LEVELS


@SLOW
def test_an_edit_with_an_ip_adapter_a_lora_and_an_embedding(asked, made, pictures, directory, run):
    vectors = torch.randn(2, factories.TEXT_WIDTH, generator=torch.Generator().manual_seed(9))
    save_file({"emb_params": vectors}, "cat.safetensors")
    more = {"prompts": ("red cat",), "embeddings": (EmbeddingSpec.parse("cat.safetensors"),)}
    spec = asked("edit-sd1", "ip", "lora", edit=True, init_image=pictures / "init.png", **more)
    given = {"image": [Image.open("init.png")] * 2, "image_guidance_scale": spec.image_guidance_scale}
    pipe = pipeline(spec, made, "InstructPix2Pix")
    pipe.load_textual_inversion("cat.safetensors", token="cat")
    check(spec, directory, pipe(**arguments(spec, **given, prompt=["red cat"] * 2)).images, LEVELS)
    made_anew(run, "img2img", spec)


@SLOW
def test_an_edit_goes_on_in_a_refiner_and_is_shown(asked, made, pictures, directory, monkeypatch):
    shown = []
    monkeypatch.setattr(PreviewFile, "show", lambda _, pictures: shown.append(len(pictures)))
    refiner = RefinerSpec(ModelSpec(str(made("refiner"))), 0.5)
    more = {"edit": True, "init_image": pictures / "init.png", "refiner": refiner, "steps": 4}
    spec = asked("edit-sdxl", kind="sdxl", preview=str(made("tiny")), preview_every=1, **more)
    drawn = generators()
    given = {"image": [Image.open("init.png")] * 2, "generator": drawn, **SIZE}
    given |= {"image_guidance_scale": spec.image_guidance_scale, "output_type": "latent", "denoising_end": 0.5}
    latents = pipeline(spec, made, "InstructPix2Pix", "sdxl")(**arguments(spec, **given)).images
    second = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(made("refiner"), torch_dtype=torch.float32)
    rest = {"prompt": ["red"] * 2, "negative_prompt": ["blue"] * 2, "num_inference_steps": 4}
    rest |= {"guidance_scale": spec.guidance_scale, "generator": drawn}
    check(spec, directory, second(image=latents, denoising_start=0.5, **rest).images)
    assert shown == [2, 2]


PAIRS = [
    (("lcm", "net"), {"init_image": "init.png"}, "which diffusers' pipelines with a ControlNet don't give it from an"),
    (("lcm", "net"), {"upscale": UpscaleSpec(2)}, "don't give it in a second pass"),
    (("edit-sdxl", "ip"), {"init_image": "init.png", "edit": True}, "pipeline for it takes no IP-Adapter"),
]


@pytest.mark.parametrize(("parts", "options", "message"), PAIRS)
def test_what_no_pipeline_takes_at_once_is_refused_before_anything_is_read(
    parts, options, message, asked, pictures, directory, monkeypatch
):
    for name in ("load_unet", "load_parts"):
        monkeypatch.setattr(loading, name, lambda *_: pytest.fail("weights were read"))
    options = {name: pictures / one if isinstance(one, str) else one for name, one in options.items()}
    kind = "sdxl" if "sdxl" in parts[0] else "sd1"
    with pytest.raises(UsageError, match=message) as caught:
        generate(asked(*parts, kind=kind, **options), directory, QUIET)
    assert caught.value.hint


def test_a_refiner_behind_a_controlnet_and_an_image_is_refused(tmp_path):
    control = ControlSpec("canny", tmp_path)
    with pytest.raises(UsageError, match="does not go on behind ControlNet canny") as caught:
        GenerateSpec(("x",), init_image=tmp_path, controls=(control,), refiner=RefinerSpec(ModelSpec("x")))
    assert "leave --refiner" in caught.value.hint


@SLOW
def test_a_second_pass_of_too_many_steps_is_refused_before_anything_is_read(asked, directory, monkeypatch):
    monkeypatch.setattr(loading, "load_unet", lambda *_: pytest.fail("weights were read"))
    for model, larger, message in (
        ("lcm", UpscaleSpec(2, steps=20, strength=0.2), "second pass: LCMScheduler runs at most 10 steps at strength"),
        ("sd1", UpscaleSpec(2, steps=10, strength=0.1), "second pass: LCMScheduler runs at most 50 steps, got 100"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            generate(asked(model, upscale=larger, scheduler="lcm"), directory, QUIET)
        assert "--upscale-steps" in caught.value.hint
    with pytest.raises(UsageError, match="LCMScheduler has no eta") as caught:
        generate(asked("sd1", upscale=UpscaleSpec(2), scheduler="lcm", eta=0.5), directory, QUIET)
    assert "--eta" in caught.value.hint
