"""ControlNets by name, in `generate`, `load` and the commands, beside diffusers' own pipelines; wrong ones, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import factories
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from PIL import Image
from safetensors.torch import save_file
from test_controlnet import small_controlnet, union_of

import sdtrt
from sdtrt.backends import registry
from sdtrt.cli.control_options import BesideOptions, ControlOptions
from sdtrt.common.console import QUIET
from sdtrt.common.errors import EngineError, ModelError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models.loading import load_parts
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.inputs import control_images
from sdtrt.pipeline.inputs.images import read_init_image, read_metadata, read_parameters
from sdtrt.pipeline.runs.generate import generate
from sdtrt.specs import ControlSpec, ExportRequest, ExportSpec, GenerateSpec, ModelSpec

pytestmark = pytest.mark.usefixtures("on_the_cpu")
SLOW = pytest.mark.slow
LEVELS = 2  # of 255
TASKS = ("txt2img", "img2img", "inpaint")


@pytest.fixture(scope="session")
def model_of(tmp_path_factory, smallest):
    """The folder of a model of a kind."""
    made = {"sd1": smallest}

    def find(kind):
        if kind not in made:
            write = factories.sdxl_folder if kind == "sdxl" else factories.sd1_folder
            path = tmp_path_factory.mktemp("models") / kind
            made[kind] = write(path, **{**factories.UNET_CONFIGS[kind], **factories.SMALLEST[kind]})
        return made[kind]

    return find


@pytest.fixture(scope="session")
def net_of(tmp_path_factory):
    """The folder of a ControlNet for models of a kind; numbers give several."""
    made = {}

    def find(kind, number=0):
        if (kind, number) not in made:
            unet = factories.small_unet(kind, **factories.SMALLEST[kind])
            path = tmp_path_factory.mktemp("nets") / f"control-{kind}-{number}"
            small_controlnet(unet, seed=7 + number).half().save_pretrained(path)
            made[kind, number] = path
        return made[kind, number]

    return find


def lines(seed, size=(80, 64)):
    """A map of lines: black and white."""
    levels = np.random.default_rng(seed).integers(0, 2, (size[1], size[0]), dtype=np.uint8) * 255
    return Image.fromarray(levels).convert("RGB")


def photograph(seed=2, size=(80, 64)):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def pictures(tmp_path):
    """The folder of two maps, a picture and its mask."""
    for name, picture in {"map": lines(0), "other": lines(1), "init": photograph()}.items():
        picture.save(tmp_path / f"{name}.png")
    mask = Image.new("L", (80, 64))
    mask.paste(255, (16, 8, 48, 40))
    mask.save(tmp_path / "mask.png")
    return tmp_path


@pytest.fixture
def spec(pictures, smallest, net_of):
    controls = (ControlSpec(str(net_of("sd1")), pictures / "map.png", scale=0.8),)
    model, output = ModelSpec(str(smallest)), pictures / "out"
    return GenerateSpec(("red on blue",), model, "torch", steps=2, seed=5, output=output, controls=controls)


def asked(spec, task, pictures):
    """The request as one of a task."""
    init = {} if task == "txt2img" else {"init_image": pictures / "init.png"}
    return replace(spec, **init, **({"mask": pictures / "mask.png"} if task == "inpaint" else {}))


def own_pipeline(folder, nets, task, kind):
    """diffusers' own pipeline, which it loads itself."""
    name = {"txt2img": "", "img2img": "Img2Img", "inpaint": "Inpaint"}[task]
    cls = getattr(diffusers, f"StableDiffusion{'XL' * (kind == 'sdxl')}ControlNet{name}Pipeline")
    loaded = [ControlNetModel.from_pretrained(net, torch_dtype=torch.float32) for net in nets]
    more = {} if kind == "sdxl" else {"safety_checker": None}
    pipe = cls.from_pretrained(
        folder, controlnet=loaded if len(loaded) > 1 else loaded[0], torch_dtype=torch.float32, **more
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own_picture(pipe, spec):
    """What diffusers makes of the same request."""
    maps = [Image.open(one.image).convert("RGB") for one in spec.controls]
    given = {"controlnet_conditioning_scale": [one.scale for one in spec.controls]}
    given |= {"control_guidance_start": [one.start for one in spec.controls]}
    given |= {"control_guidance_end": [one.end for one in spec.controls]}
    given["image" if spec.init_image is None else "control_image"] = maps
    given = {name: values if len(maps) > 1 else values[0] for name, values in given.items()}
    if spec.init_image is not None:
        given |= {"image": Image.open(spec.init_image), "strength": spec.strength}
    if spec.mask is not None:
        given |= {"mask_image": Image.open(spec.mask)}
    generator = torch.Generator().manual_seed(spec.seed)
    size = {"height": spec.height or 64, "width": spec.width or 80}
    given |= {"num_inference_steps": spec.steps, "guidance_scale": spec.guidance_scale, "generator": generator}
    return np.asarray(pipe(spec.prompts[0], **given, **size).images[0])


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def picture(spec, directory):
    return pixels_of(generate(spec, directory, QUIET).images[0].path)


CASES = [(kind, task) for kind in ("sd1", "sdxl") for task in TASKS]


@pytest.mark.parametrize(("kind", "task"), [CASES[0], *(pytest.param(*case, marks=SLOW) for case in CASES[1:])])
def test_it_is_the_picture_of_diffusers_own_pipeline(kind, task, spec, pictures, model_of, net_of, directory):
    own = replace(spec.controls[0], name=str(net_of(kind)))
    spec = asked(replace(spec, model=ModelSpec(str(model_of(kind))), controls=(own,)), task, pictures)
    expected = own_picture(own_pipeline(model_of(kind), [net_of(kind)], task, kind), spec)
    np.testing.assert_array_equal(picture(spec, directory), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "task"), CASES)
@pytest.mark.feature("ControlNet, `--controlnet`", "sd1 sdxl", "onnxruntime")
def test_engines_give_the_picture_of_diffusers_own_pipeline(kind, task, spec, pictures, model_of, net_of, engine_dir):
    own = replace(spec.controls[0], name=str(net_of(kind)))
    model = ModelSpec(str(model_of(kind)))
    spec = asked(replace(spec, model=model, controls=(own,), backend="onnxruntime"), task, pictures)
    expected = own_picture(own_pipeline(model_of(kind), [net_of(kind)], task, kind), spec)
    report = generate(spec, EngineDirectory(engine_dir), QUIET)
    assert {"unet", "controlnet", "vae_decoder"} <= set(report.engines)
    assert np.abs(pixels_of(report.images[0].path) - expected).max() <= LEVELS


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.feature("ControlNet, several", "sd1", "onnxruntime")
@pytest.mark.feature("ControlNet, `--controlnet`", "sd1", "onnxruntime")
def test_several_controlnets_each_in_an_engine_are_summed(backend, spec, pictures, net_of, smallest, engine_dir):
    nets = [net_of("sd1"), net_of("sd1", 1)]
    second = ControlSpec(str(nets[1]), pictures / "other.png", 0.4, start=0.2, end=0.9)
    spec = replace(spec, controls=(*spec.controls, second), backend=backend, steps=4)
    expected = own_picture(own_pipeline(smallest, nets, "txt2img", "sd1"), spec)
    report = generate(spec, EngineDirectory(engine_dir), QUIET)
    assert np.abs(pixels_of(report.images[0].path) - expected).max() <= LEVELS
    if backend == "torch":
        return
    assert {"controlnet", "controlnet_2"} <= set(report.engines)
    there = {entry.name for entry in EngineDirectory(engine_dir).entries("engine")}
    photo = {"image": pictures / "init.png", "preprocessor": "none"}
    for other in (
        replace(spec, controls=tuple(replace(one, scale=0.1, start=0.0, end=0.5) for one in spec.controls)),
        replace(spec, controls=tuple(replace(one, **photo) for one in spec.controls)),
        replace(spec, controls=spec.controls[::-1]),
        replace(spec, controls=spec.controls[:1], prompts=("a blue star",)),
    ):
        generate(replace(other, allow_build=False), EngineDirectory(engine_dir), QUIET)
    assert {entry.name for entry in EngineDirectory(engine_dir).entries("engine")} == there


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(registry.get("inductor").why_not() is not None, reason="needs a C++ compiler")
@pytest.mark.feature("ControlNet, several", "sd1", "inductor")
@pytest.mark.feature("ControlNet, `--controlnet`", "sd1", "inductor")
def test_two_controlnets_share_an_inductor_package_each_with_its_weights(spec, pictures, net_of, directory):
    second = ControlSpec(str(net_of("sd1", 1)), pictures / "other.png", 0.5)
    spec = replace(spec, controls=(*spec.controls, second), height=64, width=64)
    expected = picture(spec, directory)
    spec = replace(spec, backend="inductor", components=("unet", "controlnet"))
    report = generate(spec, directory, QUIET)
    assert report.engines["controlnet"] == report.engines["controlnet_2"]
    assert len(directory.entries("engine")) == 2
    assert np.abs(pixels_of(report.images[0].path) - expected).max() <= LEVELS
    swapped = replace(spec, controls=spec.controls[::-1], allow_build=False)
    assert np.abs(picture(swapped, directory) - expected).max() <= LEVELS  # a sum
    other = replace(spec, controls=(replace(second, name=spec.controls[0].name), spec.controls[0]), allow_build=False)
    assert np.abs(picture(other, directory) - expected).max() > LEVELS


@pytest.mark.slow
def test_load_opens_a_pipeline_with_controlnets(pictures, net_of, smallest, spec, engine_dir):
    given = {"height": 64, "width": 80, "backend": "onnxruntime", "engine_dir": engine_dir, "progress": False}
    nets = [net_of("sd1"), net_of("sd1", 1)]
    for count, task in ((1, "txt2img"), (2, "txt2img"), (1, "img2img")):
        controls = tuple(ControlSpec(str(net), pictures / "map.png") for net in nets[:count])
        request = asked(replace(spec, controls=controls), task, pictures)
        names = [str(net) for net in nets[:count]]
        pipe = sdtrt.load(str(smallest), task=task, controlnet=names if count > 1 else names[0], **given)
        plain = own_pipeline(smallest, nets[:count], task, "sd1")
        assert type(pipe) is type(plain)
        assert np.abs(own_picture(pipe, request).astype(int) - own_picture(plain, request)).max() <= LEVELS
        assert len(sdtrt.status(pipe)["controlnet"].engines) == count
        pipe.close()


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_images_made_at_once_are_those_made_alone(task, spec, pictures, net_of, directory):
    second = ControlSpec(str(net_of("sd1", 1)), pictures / "other.png", 0.4)
    for controls in (spec.controls, (*spec.controls, second)):
        one = asked(replace(spec, controls=controls, num_images=3), task, pictures)
        alone = generate(one, directory, QUIET).images
        together = generate(replace(one, batch_size=2), directory, QUIET).images
        for made, other in zip(alone, together, strict=True):
            assert made.seed == other.seed
            assert np.abs(pixels_of(made.path) - pixels_of(other.path)).max() <= LEVELS


@pytest.mark.slow
def test_a_component_that_is_not_named_is_pytorchs(spec, directory, engine_dir):
    expected = picture(spec, directory)
    spec = replace(spec, backend="onnxruntime", components=("unet", "vae_decoder"))
    report = generate(spec, EngineDirectory(engine_dir), QUIET)
    assert set(report.engines) == {"unet", "vae_decoder"}
    assert np.abs(pixels_of(report.images[0].path) - expected).max() <= LEVELS


# Unions


@pytest.fixture(scope="session")
def union_folder(tmp_path_factory):
    unet = factories.small_unet("sdxl", **factories.SMALLEST["sdxl"])
    path = tmp_path_factory.mktemp("nets") / "union"
    small_controlnet(unet, make=union_of).save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.feature("ControlNet unions (in PyTorch, beside an engine)", "sdxl", "onnxruntime")
def test_a_union_of_controlnets_is_pytorchs_beside_an_engine(
    task, spec, pictures, model_of, union_folder, directory, engine_dir
):
    folder = model_of("sdxl")
    own = ControlSpec(str(union_folder), pictures / "map.png", 0.8, mode=3)
    spec = asked(replace(spec, model=ModelSpec(str(folder)), controls=(own,)), task, pictures)
    name = {"txt2img": "", "img2img": "Img2Img", "inpaint": "Inpaint"}[task]
    cls = getattr(diffusers, f"StableDiffusionXLControlNetUnion{name}Pipeline")
    union = ControlNetUnionModel.from_pretrained(union_folder)
    pipe = cls.from_pretrained(folder, controlnet=union, torch_dtype=torch.float32)
    given = {"control_image": [lines(0)], "control_mode": [3], "controlnet_conditioning_scale": 0.8, "height": 64}
    given |= {} if task == "txt2img" else {"image": Image.open(spec.init_image), "strength": spec.strength}
    given |= {"mask_image": Image.open(spec.mask)} if spec.mask else {}
    given |= {"num_inference_steps": 2, "guidance_scale": 7.5, "generator": torch.Generator().manual_seed(5)}
    expected = np.asarray(pipe("red on blue", width=80, **given).images[0]).astype(int)
    np.testing.assert_array_equal(picture(spec, directory), expected)
    report = generate(replace(spec, backend="onnxruntime"), EngineDirectory(engine_dir), QUIET)
    assert "unet" in report.engines
    assert "controlnet" not in report.engines
    assert np.abs(pixels_of(report.images[0].path) - expected).max() <= LEVELS


def test_a_mode_is_a_unions(spec, directory):
    with pytest.raises(UsageError, match="is no union of ControlNets: it has no mode 1"):
        generate(replace(spec, controls=(replace(spec.controls[0], mode=1),)), directory, QUIET)


@pytest.mark.slow
def test_a_union_wants_a_mode_that_it_has(spec, model_of, union_folder, pictures, directory):
    own = ControlSpec(str(union_folder), pictures / "map.png")
    spec = replace(spec, model=ModelSpec(str(model_of("sdxl"))))
    for controls, message in (
        ((own,), "is a union of 6 ControlNets, and no mode says which of them"),
        ((replace(own, mode=6),), "and it has no mode 6"),
        ((own, own), "is a union of ControlNets: it runs alone"),
    ):
        with pytest.raises(UsageError, match=message):
            generate(replace(spec, controls=controls), directory, QUIET)


# Files


def original_names(net):
    """A ControlNet's tensors under the names that its training had."""
    made = {}
    for key, value in net.state_dict().items():
        layer, _, kind = key.rpartition(".")
        number = layer.rpartition(".")[2]
        if layer.startswith("controlnet_down_blocks"):
            made[f"zero_convs.{number}.0.{kind}"] = value
        elif layer == "controlnet_mid_block":
            made[f"middle_block_out.0.{kind}"] = value
        elif layer.startswith("controlnet_cond_embedding"):
            place = {"conv_in": 0, "conv_out": 14}.get(number)
            made[f"input_hint_block.{2 * int(number) + 2 if place is None else place}.{kind}"] = value
        else:
            made[factories.ldm_unet_key(key, net.config)] = value
    return made


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("sd1", "original"),
        pytest.param("sd1", "diffusers", marks=SLOW),
        pytest.param("sd1", "prefixed", marks=SLOW),
        pytest.param("sdxl", "diffusers", marks=SLOW),  # diffusers reads no other of XL
    ],
)
def test_a_file_is_the_controlnet_of_its_folder(kind, form, model_of, net_of, tmp_path):
    net = ControlNetModel.from_pretrained(net_of(kind), torch_dtype=torch.float16)
    tensors = net.state_dict() if form == "diffusers" else original_names(net)
    prefix = "control_model." if form == "prefixed" else ""
    path = tmp_path / "net.safetensors"
    save_file({f"{prefix}{name}": value.contiguous() for name, value in tensors.items()}, path)
    found = resolve_model(ModelSpec(str(model_of(kind)), controlnet=str(path)))
    loaded = load_parts(found, ("controlnet",), torch.float16)["controlnet"]
    assert type(loaded) is ControlNetModel
    for name, tensor in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for name, value in ControlNetModel.load_config(net_of(kind)).items():
        if not name.startswith("_"):
            assert json.dumps(loaded.config[name]) == json.dumps(value), name


# What a picture says


@pytest.mark.slow
def test_a_picture_says_which_controlnets_it_has(spec, directory, pictures, net_of):
    spec = replace(spec, controls=(replace(spec.controls[0], start=0.1, end=0.75),))
    path = generate(spec, directory, QUIET).images[0].path
    (facts,) = read_metadata(path).details["controlnets"]
    assert facts["image"] == {"name": "map.png", "sha256": factories.sha256_of(pictures / "map.png")}
    assert (facts["scale"], facts["start"], facts["end"], facts["preprocessor"]) == (0.8, 0.1, 0.75, None)
    field = read_parameters(path).fields["ControlNet 0"]
    assert field.startswith(f"Module: none, Model: {net_of('sd1').name}, Weight: 0.8, Resize Mode: Just Resize")
    assert "Guidance Start: 0.1, Guidance End: 0.75" in field


# What is refused


def test_options_are_paired_by_their_order():
    options = ControlOptions(["a/b:0.5", "c.safetensors"], [Path("1.png"), Path("2.png")], [0.1], [0.5, 0.9], ["canny"])
    first, second = options.specs()
    assert first == ControlSpec("a/b", Path("1.png"), 0.5, 0.1, 0.5, "canny")
    assert second == ControlSpec("c.safetensors", Path("2.png"), 1.0, 0.1, 0.9, "canny")
    assert ControlOptions().specs() == ()
    exports = ExportRequest(ExportSpec())
    both = BesideOptions(["a/b:0.5", "c"]).beside(exports)
    assert [one.common.model.controlnet for one in both] == ["a/b", "c"]
    assert [one.components for one in both] == [(), ("controlnet",)]
    assert BesideOptions().beside(exports) == [exports]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((["a"], []), "1 ControlNet and 0 control images"),
        ((["a"], [Path("1"), Path("2")]), "1 ControlNet and 2 control images"),
        (([], [Path("1.png")]), r"control image 1\.png is for a ControlNet, and there is none"),
        ((["a"], [Path("1")], [0.1, 0.2]), "control-start was given 2 times, for 1 ControlNets"),
        (([], [], [0.1]), "control-start is about a ControlNet, and there is none"),
        ((["a:inf"], [Path("1")]), "the scale of a must be a number, got inf"),
        ((["a"], [Path("1")], [0.5], [0.5]), r"a must start before it ends, both from 0 to 1, got 0\.5 and 0\.5"),
        ((["a"], [Path("1")], [], [], ["cany"]), "unknown control-preprocessor: 'cany'"),
        ((["a"] * 9, [Path("1")] * 9), "at most 8 ControlNets"),
    ],
)
def test_options_that_make_no_pairs_are_refused(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        ControlSpec.parse_all(*options)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "picture", "message", "hint"),
    [
        ("x/canny", photograph(), "no map of lines, which x/canny goes by", "use --control-preprocessor canny"),
        ("x/mlsd.safetensors", photograph(), "no map of lines", "--control-preprocessor none takes it as it is"),
        ("x/depth", photograph(), "no map of depth, which x/depth goes by: it is in colour", "a map in grey"),
        ("x/y", Image.new("RGB", (64, 64)), "is no map: all its pixels have one colour", "preprocessor none"),
    ],
)
def test_a_picture_that_is_no_map_is_found_before_the_model_is_looked_for(
    name, picture, message, hint, spec, pictures, directory
):
    picture.save(pictures / "wrong.png")
    wrong = replace(
        spec, model=ModelSpec("no/such/model/anywhere"), controls=(ControlSpec(name, pictures / "wrong.png"),)
    )
    with pytest.raises(UsageError, match=message) as caught:
        generate(wrong, directory, QUIET)
    assert hint in caught.value.hint
    taken = replace(wrong, controls=(replace(wrong.controls[0], preprocessor="none"),))
    assert len(control_images.read_control_images(taken, None)) == 1


def test_maps_are_taken_for_what_they_are(spec, pictures):
    grey = photograph().convert("L").convert("RGB")
    for name, made in {"canny": lines(0), "depth": grey, "openpose": photograph(), "scribble": lines(1)}.items():
        made.save(pictures / "fine.png")
        fine = replace(spec, controls=(ControlSpec(name, pictures / "fine.png"),))
        assert control_images.read_control_images(fine, None)[0].picture.pixels.size == (80, 64)


def test_a_controlnet_of_the_model_goes_by_no_picture():
    with pytest.raises(UsageError, match="the ControlNet owner/name of a ModelSpec goes by no picture") as caught:
        GenerateSpec(("red",), ModelSpec(controlnet="owner/name"))
    assert "controls=(ControlSpec" in caught.value.hint


def test_a_control_image_that_is_no_image_is_called_one(spec, pictures, directory):
    (pictures / "map.png").write_text("no picture")
    with pytest.raises(UsageError, match=r"^control image .* is in no image format") as caught:
        generate(spec, directory, QUIET)
    assert caught.value.hint == "give --control-image a PNG, JPEG or WebP file"


def test_a_control_image_of_another_size_is_resized_and_that_is_said(spec, pictures, directory, capsys):
    lines(0, (96, 96)).save(pictures / "map.png")
    found = control_images.read_control_images(spec, None)
    control_images.note_sizes(found, 64, 64, control_images.Console())
    assert "resized from 96x96 to 64x64 (Lanczos)" in capsys.readouterr().err
    control_images.note_sizes(found, 64, 128, control_images.Console())
    assert "its proportions change" in capsys.readouterr().err
    crop = replace(spec, init_image=pictures / "init.png", mask=pictures / "mask.png", padding_crop=4)
    with pytest.raises(UsageError, match=r"control image .* is 96x96, where init image .* is 80x64"):
        generate(crop, directory, QUIET)


def test_a_controlnet_for_another_kind_of_model_is_refused_by_name(net_of, smallest, spec, directory, tmp_path):
    net = net_of("sdxl")
    wrong = replace(spec, controls=(replace(spec.controls[0], name=str(net)),))
    (net / "diffusion_pytorch_model.safetensors").rename(net / "away")  # its weights are not looked at
    try:
        with pytest.raises(ModelError, match=r"is for a model whose text has the width 64, and .* has the width 32"):
            generate(wrong, directory, QUIET)
    finally:
        (net / "away").rename(net / "diffusion_pytorch_model.safetensors")
    path = tmp_path / "xl.safetensors"
    save_file(ControlNetModel.from_pretrained(net).state_dict(), path)
    with pytest.raises(ModelError, match="is for a model whose text has the width 64") as caught:
        resolve_model(ModelSpec(str(smallest), controlnet=str(path)))
    assert "use a ControlNet for this model" in caught.value.hint


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["unet.lora_up.weight"], "is a LoRA"),
        (["adapter.body.0.resnets.0.block1.weight"], "is a T2I-Adapter"),
        (["lora_controlnet"], "is a Control-LoRA"),
        (["task_embedding"], "is a union of ControlNets"),
        (["down_blocks.0.resnets.0.conv1.weight"], "holds no ControlNet"),
    ],
)
def test_a_file_that_holds_no_controlnet_is_refused(names, message, smallest, tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(1) for name in names}, path)
    with pytest.raises(ModelError, match=message):
        resolve_model(ModelSpec(str(smallest), controlnet=str(path)))


def test_a_name_that_leads_nowhere_is_refused(smallest, net_of, tmp_path):
    def refused(name):
        with pytest.raises((ModelError, UsageError)) as caught:
            resolve_model(ModelSpec(str(smallest), controlnet=name, offline=True))
        return str(caught.value)

    assert "there is no ControlNet at nowhere" in refused("nowhere")
    assert "takes no web address" in refused("https://huggingface.co/owner/name")
    assert "the scale of" in refused(f"{net_of('sd1')}:O.8")
    assert "is no ControlNet's folder" in refused(str(tmp_path))
    assert "is a UNet2DConditionModel, not a ControlNetModel" in refused(str(smallest / "unet"))
    assert "not in the hub cache" in refused("owner/name")


def test_missing_engines_are_named_with_the_command_that_builds_them(spec, directory):
    with pytest.raises(EngineError, match="fp32 engine for the text_encoder, controlnet, unet, vae_decoder") as caught:
        generate(replace(spec, backend="onnxruntime", allow_build=False), directory, QUIET)
    assert "--component controlnet --component unet --component vae_decoder --controlnet" in caught.value.hint


@pytest.mark.slow
def test_build_builds_what_a_request_then_finds(spec, run, smallest, net_of, folder, pictures, engine_dir):
    nets = [word for number in (0, 1) for word in ("--controlnet", f"{net_of('sd1', number)}")]
    wanted = ("--component", "unet", "--component", "controlnet")
    common = ("--model", str(smallest), "--backend", "onnxruntime")
    code, out, err = run("build", *common, *nets, *wanted)
    assert code == 0, err
    assert len(out.splitlines()) == 3
    maps = ("--control-image", str(pictures / "map.png")) * 2
    code, out, err = run("txt2img", "red", *common, *nets, *maps, *wanted, "--no-build", "--steps", "2", "--json")
    assert code == 0, err
    assert set(json.loads(out)["engines"]) == {"unet", "controlnet", "controlnet_2"}
    assert len(json.loads(out)["controlnets"]) == 2
    code, out, err = run("inspect", "--model", str(smallest), "--controlnet", str(net_of("sd1")))
    assert code == 0, err
    assert "ControlNetModel" in out


# Edges


def test_canny_makes_a_map_of_edges(spec, pictures):
    pytest.importorskip("cv2")
    Image.new("RGB", (80, 64), "white").save(pictures / "init.png")
    drawn = Image.open(pictures / "init.png")
    drawn.paste((0, 0, 0), (20, 20, 60, 50))
    drawn.save(pictures / "init.png")
    own = ControlSpec("x/canny", pictures / "init.png", preprocessor="canny")
    (found,) = control_images.read_control_images(replace(spec, controls=(own,)), None)
    edges = np.asarray(found.fitted(64, 80))
    assert edges.shape == (64, 80, 3)
    assert set(np.unique(edges)) == {0, 255}
    assert edges[10, 10, 0] == edges[35, 40, 0] == 0
    assert edges[18:22, 40, 0].any()


@pytest.mark.slow
def test_a_picture_by_its_own_edges_is_the_picture_by_their_map(spec, pictures, directory):
    pytest.importorskip("cv2")
    own = ControlSpec(spec.controls[0].name, pictures / "init.png", preprocessor="canny")
    (found,) = control_images.read_control_images(replace(spec, controls=(own,)), None)
    made = replace(spec, controls=(own,))
    path = generate(made, directory, QUIET).images[0].path
    assert "Module: canny, " in read_parameters(path).fields["ControlNet 0"]
    assert "Threshold A: 100, Threshold B: 200" in read_parameters(path).fields["ControlNet 0"]
    found.fitted(64, 80).save(pictures / "edges.png")
    given = replace(made, controls=(replace(made.controls[0], image=pictures / "edges.png", preprocessor=None),))
    np.testing.assert_array_equal(picture(given, directory), pixels_of(path))


def test_a_missing_opencv_is_found_before_anything_is_read(spec, directory, monkeypatch):
    monkeypatch.setattr(control_images, "find_spec", lambda name: None)
    wrong = replace(spec, controls=(replace(spec.controls[0], image=Path("nowhere.png"), preprocessor="canny"),))
    with pytest.raises(UsageError, match="canny needs OpenCV, which is not installed") as caught:
        generate(wrong, directory, QUIET)
    assert 'pip install "sdtrt[control]"' in caught.value.hint


def test_a_cropped_part_goes_by_the_same_part_of_the_map(spec, pictures):
    (found,) = control_images.read_control_images(spec, read_init_image(pictures / "init.png"))
    box = (16, 8, 48, 40)
    expected = lines(0).crop(box).resize((64, 64), Image.Resampling.LANCZOS)
    assert found.fitted(64, 64, box).tobytes() == expected.tobytes()
