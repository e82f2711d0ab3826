"""IP-Adapters in pipelines whose UNet runs in an engine, beside plain diffusers: tokens and scales are its inputs."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext as nothing

import factories
import ip_adapters
import numpy as np
import pytest
import torch
import torch_engines
from benchmark_scripts import module
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterFaceIDPlusImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
)
from PIL import Image
from trt_fakes import fake_library

import sdtrt
import sdtrt.specs
from sdtrt.backends import registry
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.common.errors import EngineError, ExportError, ModelError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.exports.tracing import component_call, reference, traceable
from sdtrt.models.components import contract_of
from sdtrt.models.image_prompts import add_layers, attentions_of, groups_of
from sdtrt.models.live import LiveModel
from sdtrt.pipeline.parts.image_prompts import ImagePrompts, width_of
from sdtrt.specs import ExportSpec, Profile, Sizes
from sdtrt.specs.groups import with_groups
from sdtrt.specs.image_prompts import cross_attentions, token_counts

pytestmark = pytest.mark.usefixtures("on_the_cpu")
TOLERANCE = 1e-4  # of latents in fp32 on the CPU
EFFECT = 100 * TOLERANCE  # what another picture changes of latents, at least
SLOW = [
    pytest.param("onnxruntime", marks=pytest.mark.slow),
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.timeout(900),
            pytest.mark.skipif(registry.get("inductor").why_not() is not None, reason="needs a C++ compiler"),
        ],
    ),
]


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


PICTURE, OTHER = noise(0), noise(1)
ip_adapter_step = module("ip_adapter_step")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The engine directory of all these tests: each engine is built once."""
    return EngineDirectory(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def make(tokenizer):
    """Make a pipeline in memory, the same one each time."""

    def made(cls=StableDiffusionPipeline, kind="sd1", **parts):
        unet = factories.small_unet(kind, **factories.SMALLEST[kind])
        return factories.live_pipeline(cls, kind, **{"tokenizer": tokenizer, "unet": unet, **parts})

    return made


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Adapters for the smallest UNets, in files."""
    folder = tmp_path_factory.mktemp("adapters")

    def write(kind="base", seed=0, unet="sd1"):
        own = factories.small_unet(unet, **factories.SMALLEST[unet])
        return ip_adapters.write(folder / f"{unet}-{seed}", own, kind, seed=seed)

    return write


@pytest.fixture
def accelerate(directory):
    def call(pipe, **options):
        given = {"height": 64, "width": 64, "engine_dir": directory.path, "progress": False, "components": ("unet",)}
        return sdtrt.accelerate(pipe, **{**given, **options})

    return call


def latents(pipe, picture=PICTURE, **options):
    given = {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "latent"}
    given |= {} if "image" in options else {"height": 64, "width": 64}
    given |= {} if picture is None else {"ip_adapter_image": picture}
    return pipe(**{**given, **options, "generator": torch.Generator().manual_seed(3)}).images


def differ(found, expected):
    """How much latents differ at most."""
    return float((found - expected).abs().max())


def names(directory):
    return {entry.name for entry in directory.entries("engine")}


# --- in engines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", SLOW)
@pytest.mark.feature("IP-Adapter, on a live pipeline", "sd1", "onnxruntime inductor")
def test_an_adapter_has_its_effect_and_nothing_that_is_turned_builds_an_engine(
    make, accelerate, directory, written, backend
):
    plain, pipe = ip_adapters.load(make(), written()), accelerate(make(), backend=backend)
    ip_adapters.load(pipe, written())  # after `accelerate`: the engine is built at the call
    assert differ(latents(plain), latents(plain, OTHER)) > EFFECT
    assert differ(latents(pipe), latents(plain)) <= TOLERANCE
    built = names(directory)
    for scale in (0.6, 0.0, 1.5, {"up": {"block_1": [0.9, 0.1]}}):
        for one in (plain, pipe):
            one.set_ip_adapter_scale(scale)
        for options in ({}, {"picture": OTHER, "prompt": "a blue star"}, {"guidance_scale": 1.0, "prompt": ["a", "b"]}):
            assert differ(latents(pipe, **options), latents(plain, **options)) <= TOLERANCE, (scale, options)
    embeds = plain.prepare_ip_adapter_image_embeds(OTHER, None, "cpu", 1, True)
    assert differ(*(latents(one, None, ip_adapter_image_embeds=embeds) for one in (pipe, plain))) <= TOLERANCE
    again = ip_adapters.load(make(), written(), scale=1.5)
    again.set_ip_adapter_scale({"up": {"block_1": [0.9, 0.1]}})
    accelerate(again, backend=backend)  # in the other order
    assert torch.equal(latents(again), latents(pipe))
    assert names(directory) == built
    assert sdtrt.status(again)["unet"].is_in_engine
    assert "PyTorch runs it" in sdtrt.status(again)["image_encoder"].reason
    for one in (plain, pipe):
        one.unload_ip_adapter()
    assert differ(latents(pipe, None), latents(plain, None)) <= TOLERANCE
    assert names(directory) == built
    sdtrt.restore(pipe)
    assert torch.equal(latents(pipe, None), latents(plain, None))


def test_adapters_come_change_and_go_on_a_live_pipeline(make, accelerate, tmp_path, written, monkeypatch):
    """PyTorch computes in the place of an engine without weights: what is bound, and what is given."""
    torch_engines.instead_of_inductor(monkeypatch)
    options = {"backend": "inductor", "engine_dir": tmp_path}
    plain, pipe = make(), accelerate(make(), **options)
    for seed, scale in ((0, 0.6), (5, 0.0), (5, 1.2)):
        for one in (plain, pipe):
            ip_adapters.load(one, written(seed=seed), scale=scale)
        assert differ(latents(pipe), latents(plain)) <= TOLERANCE
    built = names(EngineDirectory(tmp_path))
    assert len(built) == 2
    for one in (plain, pipe):
        one.unload_ip_adapter()
    assert differ(latents(pipe, None), latents(plain, None)) <= TOLERANCE
    for one in (plain, pipe):
        ip_adapters.load(one, written(), scale=1.2)
    accelerate(pipe, **options)
    assert differ(latents(pipe, OTHER), latents(plain, OTHER)) <= TOLERANCE
    assert names(EngineDirectory(tmp_path)) == built


@pytest.mark.feature(
    "IP-Adapter, masks (`ip_adapter_masks`)", "sd1", "inductor", pytorch="no input for ip_adapter_masks"
)
@pytest.mark.slow
def test_masks_are_pytorchs_or_an_error_with_the_way_out(make, accelerate, tmp_path, written, monkeypatch, capsys):
    torch_engines.instead_of_inductor(monkeypatch)
    plain, pipe = (ip_adapters.load(make(), written(), scale=1.2) for _ in range(2))
    accelerate(pipe, backend="inductor", engine_dir=tmp_path, on_miss="torch", progress=True)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    masked = {"cross_attention_kwargs": {"ip_adapter_masks": [mask]}}
    whole = latents(pipe)
    assert differ(latents(pipe, **masked), latents(plain, **masked)) <= TOLERANCE
    assert differ(latents(plain, **masked), whole) > 10 * TOLERANCE
    assert capsys.readouterr().err.count("has no input for ip_adapter_masks") == 1
    assert torch.equal(latents(pipe), whole), "the engine's again"
    accelerate(pipe, backend="inductor", engine_dir=tmp_path, on_miss="build")
    with pytest.raises(EngineError, match="no input for ip_adapter_masks"):
        latents(pipe, **masked)


@pytest.mark.parametrize("backend", SLOW[1:])
def test_another_adapter_needs_no_other_engine_where_weights_are_outside(make, accelerate, directory, written, backend):
    plain, pipe = (ip_adapters.load(make(), written()) for _ in range(2))
    accelerate(pipe, backend=backend)
    built, first = names(directory), latents(pipe)
    for seed in (5, 0):
        for one in (plain, pipe):
            ip_adapters.load(one, written(seed=seed))
        assert differ(latents(pipe), latents(plain)) <= TOLERANCE
    assert torch.equal(latents(pipe), first), "A, B, A"
    for one in (plain, pipe):
        attentions_of(one.unet)[-1].processor.to_k_ip[0].weight.data.mul_(-1.5)
        one.unet.encoder_hid_proj.image_projection_layers[0].norm.bias.data.add_(0.5)
    assert differ(latents(pipe), latents(plain)) <= TOLERANCE
    assert differ(latents(pipe), first) > TOLERANCE
    assert names(directory) == built
    sdtrt.restore(pipe)
    assert torch.equal(latents(pipe), latents(plain))


@pytest.mark.parametrize("backend", SLOW[1:])
@pytest.mark.feature("IP-Adapter, `--ip-adapter`", "sd1", "inductor")
def test_the_commands_take_the_engine_that_a_live_pipeline_has_built(make, accelerate, written, directory, backend):
    path, model = written(), directory.path.parent / "model"
    accelerate(ip_adapters.load(make(), path), backend=backend)
    factories.sd1_folder(model, **factories.SMALLEST["sd1"])
    PICTURE.save(model / "one.png")
    plain = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None)
    ip_adapters.load(plain, path, scale=0.8)
    own = sdtrt.specs.GenerateSpec(
        prompts=("a red circle",),
        model=sdtrt.specs.ModelSpec(str(model), ip_adapters=(str(path),)),
        ip_images=(sdtrt.specs.ImagePromptSpec(model / "one.png", 0.8),),
        backend=backend,
        components=("unet",),
        steps=2,
        seed=3,
        height=64,
        width=64,
        output=model / "out.png",
        allow_build=False,
    )
    made = sdtrt.generate(own, engine_dir=directory.path, progress=False)
    with Image.open(made.images[0].path) as image:
        found = np.asarray(image, dtype=int)
    expected = np.asarray(latents(plain, output_type="np")) * 255
    assert np.abs(found - expected[0].round()).max() <= 2


@pytest.mark.slow
def test_several_adapters_several_pictures_and_a_resampler(make, accelerate, directory, written):
    paths = written(), written("plus", seed=5)
    plain, pipe = (ip_adapters.load(make(), *paths, scale=[0.4, 0.8]) for _ in range(2))
    accelerate(pipe)
    built = names(directory)
    assert differ(*(latents(one, [PICTURE, OTHER]) for one in (pipe, plain))) <= TOLERANCE
    for one in (plain, pipe):
        one.set_ip_adapter_scale([0.0, 0.5])
    assert differ(*(latents(one, [OTHER, PICTURE], num_images_per_prompt=2) for one in (pipe, plain))) <= TOLERANCE
    assert names(directory) == built
    two = [[PICTURE, OTHER], PICTURE]  # two pictures of an adapter have twice as many tokens
    assert differ(*(latents(one, two) for one in (pipe, plain))) <= TOLERANCE
    assert len(names(directory)) == len(built) + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "kind", "options"),
    [
        (StableDiffusionXLPipeline, "sdxl", {}),
        (StableDiffusionImg2ImgPipeline, "sd1", {"image": OTHER, "strength": 0.9}),
        (StableDiffusionControlNetPipeline, "sd1", {"image": OTHER}),
    ],
)
@pytest.mark.feature("IP-Adapter, on a live pipeline", "sd1 sdxl", "onnxruntime")
def test_each_of_diffusers_pipelines_gives_its_pictures(make, accelerate, written, cls, kind, options):
    def made():
        unet = factories.small_unet(kind, **factories.SMALLEST[kind])
        more = {"controlnet": ControlNetModel.from_unet(unet)} if "ControlNet" in cls.__name__ else {}
        return ip_adapters.load(make(cls, kind, unet=unet, **more), written(unet=kind))

    plain, pipe = made(), accelerate(made())
    assert differ(latents(plain, **options), latents(plain, OTHER, **options)) > EFFECT
    assert differ(latents(pipe, **options), latents(plain, **options)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(registry.get("inductor").why_not() is not None, reason="needs a C++ compiler")
@pytest.mark.feature("IP-Adapter, on a live pipeline", "sdxl", "inductor")
def test_sdxl_in_an_engine_of_inductor(make, accelerate, written):
    plain, pipe = (ip_adapters.load(make(StableDiffusionXLPipeline, "sdxl"), written(unet="sdxl")) for _ in range(2))
    accelerate(pipe, backend="inductor")
    for picture in (PICTURE, OTHER):
        assert differ(latents(pipe, picture), latents(plain, picture)) <= TOLERANCE


@pytest.mark.slow
def test_the_benchmark_has_a_row_for_each_choice_of_adapters(ip_adapter_step, monkeypatch, tmp_path):
    torch_engines.instead_of_inductor(monkeypatch)
    model = factories.sd1_folder(tmp_path / "model", **factories.SMALLEST["sd1"])
    words = ["--model", model, "--height", 64, "--width", 64, "--steps", 2, "--repeats", 1, "--calls", 1]
    words += ["--rows", "none", "one", "plus", "two", "--folder", tmp_path, "--output", tmp_path / "o.json"]
    monkeypatch.setattr(sys, "argv", ["ip_adapter_step.py", *map(str, words)])
    ip_adapter_step.main()
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert [row["adapters"] for row in rows] == ["none", "one", "plus", "two"]
    assert all(row["relative_l2"] < TOLERANCE for row in rows)
    assert [row["engines_built_by_that"] for row in rows[1:]] == [0, 0, 0]


# --- what is computed, in PyTorch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("upcast", [False, True])
def test_what_is_traced_computes_what_diffusers_computes(upcast):
    unet = factories.small_unet("sd1", **factories.SMALLEST["sd1"], upcast_attention=upcast).half()
    add_layers(unet, (4, 6))
    contract = contract_of(LiveModel.of(_Holder(unet)), "unet", "fp16", ("controlnet", "ip_adapter:4+6"))
    inputs = _random_inputs(contract)
    with torch.no_grad(), traceable(unet):
        found = component_call(unet, contract)(*inputs)
    unet.float()
    with torch.no_grad():
        wide = [tensor.float() for tensor in inputs]
        expected = reference(unet, contract)(*wide)
        inputs[-1].zero_()
        unscaled = reference(unet, contract)(*[tensor.float() for tensor in inputs])
    assert float((found - expected).norm() / expected.norm()) < 5e-3
    assert float((unscaled - expected).norm() / expected.norm()) > 0.05
    assert all("processor" not in one.__dict__ for one in attentions_of(unet)), "all as it was"


class _Holder:
    """What `LiveModel.of` asks of a pipeline."""

    def __init__(self, unet):
        self.unet, self.text_encoder = unet, factories.small_text_encoder()


def _random_inputs(contract):
    generator = torch.Generator().manual_seed(0)
    shapes = contract.input_shapes(Sizes(2, 64, 64))
    return [
        torch.randn(shapes[spec.name], generator=generator).to(getattr(torch, spec.dtype)) for spec in contract.inputs
    ]


def test_layers_without_inputs_for_them_are_not_exported():
    unet = factories.small_unet("sd1", **factories.SMALLEST["sd1"])
    add_layers(unet, (4,))
    with pytest.raises(ExportError, match="has layers of IP-Adapters, and its contract no inputs"):
        component_call(unet, contract_of(LiveModel.of(_Holder(unet)), "unet", "fp32"))


@pytest.mark.parametrize("kind", factories.SMALLEST)
def test_the_scale_has_a_column_for_each_attention_over_text(kind):
    unet = factories.small_unet(kind, **factories.SMALLEST[kind])
    add_layers(unet, (4,))
    assert cross_attentions(unet.config) == len(attentions_of(unet))
    assert groups_of(unet) == (), "without a projection there are no image prompts"


def test_groups_say_how_many_tokens_each_adapter_has():
    assert ExportSpec(groups=("controlnet", "ip_adapter:4+16")).groups == ("controlnet", "ip_adapter:4+16")
    assert token_counts(("controlnet", "ip_adapter:4+16")) == (4, 16)
    for wrong in ("ip_adapter", "ip_adapter:", "ip_adapter:4+", "ip_adapter:0", "ip_adapter:99999", "ip_adapter:4,1"):
        with pytest.raises(UsageError, match="how many image tokens"):
            ExportSpec(groups=(wrong,))


def test_a_unet_of_other_blocks_has_no_such_group():
    unet = factories.small_unet("sd1", **factories.SMALLEST["sd1"])
    contract = contract_of(LiveModel.of(_Holder(unet)), "unet", "fp32")
    for wrong, message in (
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "has a UNetMidBlock2DSimpleCrossAttn"),
        ({"reverse_transformer_layers_per_block": [[1], [2]]}, "transformer_layers_per_block = 1"),
    ):
        with pytest.raises(ModelError, match=message):
            with_groups(contract, {**unet.config, **wrong}, ("ip_adapter:4",))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_no_engine_takes_is_refused_with_the_way_out(make, written):
    pipe = ip_adapters.load(make(), written())
    prompts = ImagePrompts(lambda: pipe.unet)
    assert prompts.look()
    assert not prompts.look()
    embeds = torch.zeros(2, 1, ip_adapters.IMAGE_WIDTH)
    cases = (
        ({}, "has 1 IP-Adapter, and the call no image"),
        ({"image_embeds": [embeds, embeds]}, "has 1 IP-Adapters, and the call images for 2"),
        ({"image_embeds": [embeds[..., 1:]]}, "have the width 23, and it takes 24"),
    )
    for added, message in cases:
        with pytest.raises(EngineError, match=message):
            prompts.take((), {"added_cond_kwargs": added})
    masks = {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 8, 8)]}}
    with pytest.raises(EngineError, match="no input for ip_adapter_masks") as caught:
        prompts.take((), {"added_cond_kwargs": {"image_embeds": [embeds]}, **masks})
    assert "PyTorch takes masks" in caught.value.hint
    pipe.set_ip_adapter_scale([[0.5, 0.7]])
    with pytest.raises(EngineError, match="one for each picture goes with masks"):
        prompts.take((), {"added_cond_kwargs": {"image_embeds": [embeds]}})


def test_the_width_of_embeddings_is_that_of_each_kind_of_projection():
    kinds = {
        ImageProjection(24, 32, 4): 24,
        IPAdapterFullImageProjection(20, 32): 20,
        IPAdapterFaceIDImageProjection(16, 32, mult=2, num_tokens=4): 16,
        IPAdapterPlusImageProjection(12, 32, 32, depth=1, dim_head=16, heads=1, num_queries=4): 12,
        IPAdapterFaceIDPlusImageProjection(12, 32, 32, 16, depth=1, dim_head=16, heads=1): None,
    }
    assert [width_of(layer) for layer in kinds] == list(kinds.values())


@pytest.mark.feature(
    "IP-Adapter, on a live pipeline",
    "sd1 sd2 sdxl",
    "tensorrt86",
    error="no engine whose unet has inputs for ip_adapter",
)
def test_tensorrt_86_refuses_such_engines_with_the_way_out(monkeypatch):
    export, profile = ExportSpec(groups=("ip_adapter:4",)), (Profile.of(Sizes(2, 512, 512)),)
    for label, refuses in (("tensorrt 8.6.1", True), ("tensorrt 10.13.3.9", False)):
        monkeypatch.setattr(libraries, "open_library", lambda _, label=label: fake_library(label))
        with (
            pytest.raises(UsageError, match="no engine whose unet has inputs for ip_adapter") if refuses else nothing()
        ):
            factories.checked_spec(export, "tensorrt", profile)
