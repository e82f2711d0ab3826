"""ControlNet in pipelines whose UNet runs in an engine, beside plain diffusers: residuals are inputs of that engine."""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext as nothing

import factories
import numpy as np
import pytest
import torch
import torch_engines
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)
from PIL import Image
from trt_fakes import fake_library

import sdtrt
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.common.errors import EngineError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.keys import ExportKey, export_key
from sdtrt.live.swap import swapped_of
from sdtrt.models.resolve import resolve_model
from sdtrt.specs import ExportSpec, ModelSpec, Profile, Sizes

pytestmark = pytest.mark.usefixtures("on_the_cpu")
TOLERANCE = 1e-4  # of latents in fp32 on the CPU
UNET_ALONE = ("unet",)
PIPELINES = {"sd1": StableDiffusionControlNetPipeline, "sdxl": StableDiffusionXLControlNetPipeline}


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


MAP, OTHER_MAP, PICTURE = noise(0), noise(1), noise(2)
MASK = Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16))


def union_of(unet):
    """A union of ControlNets for a UNet; `from_unet` makes only those of SDXL's own width."""
    known = inspect.signature(ControlNetUnionModel).parameters
    config = {name: value for name, value in unet.config.items() if name in known}
    return ControlNetUnionModel(**config, num_trans_channel=32, num_proj_channel=32)


def small_controlnet(unet, seed=7, make=ControlNetModel.from_unet):
    """A ControlNet for a UNet whose residuals are no zeros, as those of an untrained one are."""
    with factories.seeded(seed):
        net = make(unet)
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            torch.nn.init.normal_(layer.weight, std=0.2)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The engine directory of all these tests: each engine is built once."""
    return EngineDirectory(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def make(tokenizer):
    """Make a pipeline in memory, the same one each time."""

    def made(cls=StableDiffusionControlNetPipeline, kind="sd1", *, control=small_controlnet, **parts):
        unet = factories.small_unet(kind, **factories.SMALLEST[kind])
        more = {"controlnet": control(unet)} if control else {}
        return factories.live_pipeline(cls, kind, **{"tokenizer": tokenizer, "unet": unet, **more, **parts})

    return made


@pytest.fixture
def accelerate(directory):
    def call(pipe, **options):
        given = {"height": 64, "width": 64, "engine_dir": directory.path, "progress": False, "components": UNET_ALONE}
        return sdtrt.accelerate(pipe, **{**given, **options})

    return call


def latents(pipe, **options):
    given = {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "latent"}
    if not {"image", "control_image"} & set(options):
        given["image"] = MAP
    return pipe(**{**given, **options, "generator": torch.Generator().manual_seed(3)}).images


def differ(found, expected):
    """How much latents differ at most."""
    return float((found - expected).abs().max())


def names(directory):
    return {entry.name for entry in directory.entries("engine")}


def test_a_controlnet_has_its_effect_and_nothing_that_is_turned_builds_an_engine(make, accelerate, directory):
    plain, pipe = make(), accelerate(make())
    assert differ(latents(plain), latents(plain, controlnet_conditioning_scale=0.0)) > 100 * TOLERANCE
    built = names(directory)
    for options in (
        {},
        {"controlnet_conditioning_scale": 0.3},
        {"image": OTHER_MAP, "prompt": "a blue star"},
        {"control_guidance_start": 0.5},
        {"control_guidance_end": 0.5, "num_inference_steps": 3},
        {"guess_mode": True},
        {"guess_mode": True, "guidance_scale": 1.0, "prompt": ["a", "b"], "image": [MAP, OTHER_MAP]},
    ):
        assert differ(latents(pipe, **options), latents(plain, **options)) <= TOLERANCE, options
    assert names(directory) == built
    one = sdtrt.status(pipe)
    assert one["unet"].is_in_engine
    assert "PyTorch runs it" in one["controlnet"].reason
    sdtrt.restore(pipe)
    assert torch.equal(latents(pipe), latents(plain))


def test_a_controlnet_that_is_compiled_or_pools_is_left_to_pytorch(make, accelerate):
    plain, compiled, pooling = make(), make(), make()
    compiled.controlnet.compile(backend="eager")
    pooling.controlnet.register_to_config(global_pool_conditions=True)
    for pipe in (compiled, pooling):
        with pytest.raises(EngineError, match="no engine runs the controlnet of StableDiff") as caught:
            accelerate(pipe, components=("unet", "controlnet"))
        assert "leave controlnet out of components=" in caught.value.hint
    accelerate(compiled)
    assert not sdtrt.status(compiled)["controlnet"].is_in_engine
    assert differ(latents(compiled), latents(plain)) <= TOLERANCE


@pytest.mark.feature("ControlNet, several", "sd1", "onnxruntime")
def test_several_controlnets_are_summed_before_the_engine(make, accelerate, directory):
    accelerate(make())
    built = names(directory)

    def two(unet):
        return [small_controlnet(unet), small_controlnet(unet, seed=8)]

    plain, pipe = make(control=two), accelerate(make(control=two))
    for scales in ([1.0, 0.5], [0.2, 0.9]):
        options = {"image": [MAP, OTHER_MAP], "controlnet_conditioning_scale": scales}
        options |= {"control_guidance_end": [1.0, 0.5]}
        assert differ(latents(pipe, **options), latents(plain, **options)) <= TOLERANCE
    pipe.controlnet = plain.controlnet = small_controlnet(plain.unet, seed=9)
    assert differ(latents(pipe), latents(plain)) <= TOLERANCE
    assert names(directory) == built


def several(unet):
    """Three ControlNets, one of them twice."""
    first, second = small_controlnet(unet), small_controlnet(unet, seed=8)
    return [first, second, first]


MAPS = {"image": [MAP, OTHER_MAP, PICTURE]}


@pytest.mark.parametrize("backend", ["inductor", pytest.param("onnxruntime", marks=pytest.mark.slow)])
@pytest.mark.feature("ControlNet, several", "sd1", "onnxruntime inductor")
def test_each_of_several_controlnets_runs_in_an_engine(make, accelerate, directory, monkeypatch, tmp_path, backend):
    if backend == "inductor":
        torch_engines.instead_of_inductor(monkeypatch)
        directory = EngineDirectory(tmp_path / "stand-ins")  # which no other test can open
    chosen = {"components": ("unet", "controlnet"), "backend": backend, "engine_dir": directory.path}
    plain, pipe = make(control=several), accelerate(make(control=several), **chosen)
    before = swapped_of(pipe)
    built, one = names(directory), sdtrt.status(pipe)["controlnet"]
    assert (one.is_in_engine, len(one.engines)) == (True, 2)
    assert len({engine.name for engine in one.engines}) == (1 if backend == "inductor" else 2), "weights apart or not"
    for options in (
        {"controlnet_conditioning_scale": [1.0, 0.5, 0.2]},
        {"controlnet_conditioning_scale": [0.2, 0.9, 0.0], "control_guidance_end": [0.5, 1.0, 1.0]},
        {"controlnet_conditioning_scale": [1.0, 1.0, 0.3], "control_guidance_start": [0.0, 0.5, 0.0]},
        {"controlnet_conditioning_scale": [0.5, 0.5, 0.5], "guess_mode": backend == "onnxruntime"},  # half the rows
    ):
        options = {**MAPS, **options}
        assert differ(latents(pipe, **options), latents(plain, **options)) <= TOLERANCE, options
    assert [*before] == ["unet", "controlnet", "controlnet_2"]
    assert swapped_of(accelerate(pipe, **chosen)) == before, "they stay"
    assert names(directory) == built
    for pipeline in (pipe, plain):
        pipeline.controlnet.nets[1].controlnet_mid_block.weight.data.mul_(1.5)
    turned = {**MAPS, "controlnet_conditioning_scale": [1.0, 1.0, 0.3]}
    if backend == "inductor":
        assert differ(latents(pipe, **turned), latents(plain, **turned)) <= TOLERANCE
    else:
        with pytest.raises(EngineError, match="the controlnet has other weights than its engine"):
            latents(pipe, **turned)
    sdtrt.restore(pipe)
    assert not swapped_of(pipe)
    assert torch.equal(latents(pipe, **turned), latents(plain, **turned))


def test_of_several_controlnets_one_that_pools_leaves_all_to_pytorch(make, accelerate):
    def one_pools(unet):
        nets = several(unet)
        nets[1].register_to_config(global_pool_conditions=True)
        return nets

    pipe = make(control=one_pools)
    with pytest.raises(EngineError, match="it, or one of several, is a union, compiled or quantised, or pools"):
        accelerate(pipe, components=("unet", "controlnet"))


def test_pooled_residuals_are_widened(make, accelerate):
    plain, pipe = make(), accelerate(make())
    for one in (plain, pipe):
        one.controlnet.register_to_config(global_pool_conditions=True)
    assert differ(latents(pipe), latents(plain)) <= TOLERANCE


IMAGES = {"image": PICTURE, "control_image": MAP, "strength": 0.9}


@pytest.mark.parametrize(
    ("cls", "kind", "options"),
    [
        (StableDiffusionControlNetImg2ImgPipeline, "sd1", IMAGES),
        (StableDiffusionControlNetInpaintPipeline, "sd1", {**IMAGES, "mask_image": MASK}),
        (StableDiffusionControlNetPipeline, "sd2", {}),
        (StableDiffusionXLControlNetPipeline, "sdxl", {}),
        pytest.param(StableDiffusionXLControlNetImg2ImgPipeline, "sdxl", IMAGES, marks=pytest.mark.slow),
        (StableDiffusionXLControlNetInpaintPipeline, "sdxl", {**IMAGES, "mask_image": MASK}),
    ],
)
@pytest.mark.feature("ControlNet", "sd1 sd2 sdxl", "onnxruntime")
def test_each_of_diffusers_pipelines_gives_its_pictures(make, accelerate, cls, kind, options):
    plain, pipe = make(cls, kind), accelerate(make(cls, kind))
    assert differ(latents(pipe, **options), latents(plain, **options)) <= TOLERANCE


def test_a_unet_for_inpainting_has_its_nine_channels_and_the_residuals(make, accelerate):
    nine = factories.small_unet("sd1", **{**factories.SMALLEST["sd1"], "in_channels": 9})
    control = small_controlnet(factories.small_unet("sd1", **factories.SMALLEST["sd1"]))
    cls = StableDiffusionControlNetInpaintPipeline
    plain, pipe = (make(cls, control=None, unet=copy.deepcopy(nine), controlnet=control) for _ in range(2))
    options = {**IMAGES, "mask_image": MASK}
    assert differ(latents(accelerate(pipe), **options), latents(plain, **options)) <= TOLERANCE


@pytest.mark.feature("ControlNet unions (in PyTorch, beside an engine)", "sdxl", "onnxruntime")
def test_a_union_of_controlnets_is_one_more_controlnet(make, accelerate):
    def union(unet):
        return small_controlnet(unet, make=union_of)

    options = {"control_image": [MAP], "control_mode": [1]}
    plain, pipe = (make(StableDiffusionXLControlNetUnionPipeline, "sdxl", control=union) for _ in range(2))
    accelerate(pipe)
    assert differ(latents(pipe, **options), latents(plain, **options)) <= TOLERANCE


@pytest.mark.slow
def test_all_parts_in_engines_give_the_picture(make, accelerate):
    cls = StableDiffusionControlNetImg2ImgPipeline
    plain, pipe = (make(cls, vae=factories.small_vae()) for _ in range(2))
    accelerate(pipe, components=None)
    parts = {part.part: part.is_in_engine for part in sdtrt.status(pipe).parts}
    assert parts == {"unet": True, "text_encoder": True, "vae_decoder": True, "vae_encoder": True, "controlnet": True}
    pictures = [np.asarray(latents(one, **IMAGES, output_type="np")) * 255 for one in (plain, pipe)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2
    assert not sdtrt.status(accelerate(make(), components=None))["vae_encoder"].is_in_engine


def test_one_unet_serves_calls_with_and_without_controlnet(make, accelerate, directory, capsys):
    pipe = accelerate(make(StableDiffusionPipeline, control=None))
    plain, size = make(), {"height": 64, "width": 64, "image": None}
    without = StableDiffusionPipeline.from_pipe(plain, vae=plain.vae)
    (alone,) = sdtrt.status(pipe)["unet"].engines
    controlled = StableDiffusionControlNetPipeline.from_pipe(pipe, vae=pipe.vae, controlnet=plain.controlnet)
    assert differ(latents(controlled), latents(plain)) <= TOLERANCE, "by on_miss"
    both = sdtrt.status(pipe)["unet"].engines
    assert len(both) == 2
    assert alone in both
    again = accelerate(make())
    assert {one.name for one in sdtrt.status(again)["unet"].engines} == {one.name for one in both} - {alone.name}
    size.pop("image")
    assert differ(unconditioned(again, **size), unconditioned(without, **size)) <= TOLERANCE, "it gets zeros"
    capsys.readouterr()
    strict = accelerate(make(StableDiffusionPipeline, control=None), on_miss="error")
    with pytest.raises(EngineError, match="no engine of the unet with inputs for controlnet is open"):
        latents(StableDiffusionControlNetPipeline.from_pipe(strict, vae=pipe.vae, controlnet=plain.controlnet))


def unconditioned(pipe, **options):
    """Latents of the pipeline's UNet without a ControlNet."""
    own = StableDiffusionPipeline.from_pipe(pipe, vae=pipe.vae)
    own.set_progress_bar_config(disable=True)
    given = {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "latent", **options}
    return own(**given, generator=torch.Generator().manual_seed(3)).images


def test_a_controlnet_for_another_model_is_refused_in_two_lines_before_anything_is_built(make, accelerate, directory):
    built = names(directory)
    large = factories.small_unet("sdxl", **factories.SMALLEST["sdxl"])
    wide = factories.small_unet("sd1", **{**factories.SMALLEST["sd1"], "cross_attention_dim": 48})
    deep = factories.small_unet("sd1")
    cases = (
        (large, "cross_attention_dim is 64"),
        (wide, "_dim is 48"),
        (deep, "number of residuals is 12, the unet's 4"),
    )
    for other, word in cases:
        pipe = make(control=lambda unet, other=other: small_controlnet(other))
        with pytest.raises(
            EngineError, match="the controlnet of StableDiffusionControlNetPipeline is for an"
        ) as caught:
            accelerate(pipe)
        assert word in caught.value.message
        assert "use a ControlNet for this model" in caught.value.hint
        assert "\n" not in caught.value.message + caught.value.hint
    assert names(directory) == built


@pytest.mark.feature("ControlNet", "sd1 sd2 sdxl", "tensorrt86", error="no engine whose unet has inputs for controlnet")
def test_tensorrt_86_refuses_such_engines_with_the_way_out(monkeypatch):
    export, profile = ExportSpec(groups=("controlnet",)), (Profile.of(Sizes(2, 512, 512)),)
    for label, refuses in (("tensorrt 8.6.1", True), ("tensorrt 10.13.3.9", False)):
        monkeypatch.setattr(libraries, "open_library", lambda _, label=label: fake_library(label))
        with (
            pytest.raises(UsageError, match="no engine whose unet has inputs for controlnet") if refuses else nothing()
        ):
            factories.checked_spec(export, "tensorrt", profile)
        factories.checked_spec(ExportSpec(), "tensorrt", profile)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"component": "vae_decoder"}, "the vae_decoder has no group controlnet"),
        ({"exporter": "dynamo"}, "the dynamo exporter writes no group"),
        ({"groups": ("control",)}, "unknown group: 'control'"),
    ],
)
def test_groups_that_can_not_be_exported_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        ExportSpec(**{"groups": ("controlnet",), **options})


def test_a_group_is_in_the_keys_of_those_that_have_it_alone(directory):
    tiny_model = resolve_model(ModelSpec())
    plain = export_key(tiny_model, ExportSpec(tiny_model.spec), directory.file_digest)
    controlled = export_key(tiny_model, ExportSpec(tiny_model.spec, groups=("controlnet",)), directory.file_digest)
    assert "groups" not in plain.to_json()
    assert controlled.to_json() == plain.to_json() | {"groups": ["controlnet"]}
    assert ExportKey.from_json(controlled.to_json()) == controlled != plain
    assert not controlled.has_weights_of(plain)


def test_residuals_that_do_not_fit_are_refused_by_name(make, accelerate):
    pipe = accelerate(make())
    call = (torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 77, 32))
    middle = torch.zeros(2, 64, 4, 4)
    down = [torch.zeros(2, 32, 8, 8), torch.zeros(2, 32, 8, 8), torch.zeros(2, 32, 4, 4), torch.zeros(2, 64, 4, 4)]
    pipe.unet(*call, down_block_additional_residuals=down, mid_block_additional_residual=middle)
    for wrong, message in (
        (down[:-1], "the unet takes 4 residuals"),
        ([down[0][:, :1], *down[1:]], r"the skip connection 0 must have the shape \[2, 32, 8, 8\], got \[2, 1, 8, 8\]"),
        ([*down[:-1], down[0]], "the skip connection 3 must have the shape"),
    ):
        with pytest.raises(EngineError, match=message):
            pipe.unet(*call, down_block_additional_residuals=wrong, mid_block_additional_residual=middle)
    for part in ({"down_block_additional_residuals": down}, {"mid_block_additional_residual": middle}):
        with pytest.raises(EngineError, match=f"no input for {next(iter(part))}"):
            pipe.unet(*call, **part)


@pytest.mark.parametrize(
    ("kind", "cls"),
    [pytest.param(*one, marks=pytest.mark.slow if one[0] == "sdxl" else ()) for one in PIPELINES.items()],
)
def test_a_controlnet_runs_in_an_engine_of_its_own(make, accelerate, directory, kind, cls):
    plain, pipe = make(cls, kind), accelerate(make(cls, kind), components=("unet", "controlnet"))
    built = names(directory)
    assert sdtrt.status(pipe)["controlnet"].is_in_engine
    for options in (
        {},
        {"controlnet_conditioning_scale": 0.3, "image": OTHER_MAP},
        {"control_guidance_end": 0.5, "num_inference_steps": 3},
        {"guess_mode": True},
    ):
        assert differ(latents(pipe, **options), latents(plain, **options)) <= TOLERANCE, options
    assert names(directory) == built
    pipe.controlnet.controlnet_mid_block.weight.data.mul_(1.5)
    with pytest.raises(EngineError, match="the controlnet has other weights than its engine"):
        latents(pipe)
    sdtrt.restore(pipe)
    plain.controlnet.controlnet_mid_block.weight.data.mul_(1.5)
    assert torch.equal(latents(pipe), latents(plain))
