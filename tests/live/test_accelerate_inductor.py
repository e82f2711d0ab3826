"""Live pipelines in engines that PyTorch's Inductor compiled here, which compute with the pipelines' own weights."""

from __future__ import annotations

import factories
import pytest
import test_controlnet
import test_deep_cache
import torch
from diffusers import (
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from test_guidance_interval import by_hand

import sdtrt
from sdtrt.backends import registry
from sdtrt.backends.unchanged import same_memory
from sdtrt.common.errors import EngineError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.live.swap import swapped_of
from sdtrt.models.resolve import resolve_model
from sdtrt.specs import GuidanceInterval, ModelSpec, Sizes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("on_the_cpu", "compiled_once"),
    pytest.mark.skipif(registry.get("inductor").why_not() is not None, reason="needs a C++ compiler"),
]
PARTS = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
TOLERANCE = 1e-4  # of latents in fp32 on the CPU
LATENT = {"output_type": "latent"}
ARCHITECTURE = {**factories.SMALLEST["sd1"], "norm_num_groups": 8}  # of a group of one channel, a norm hides biases


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The engine directory of all these tests: each engine is built once."""
    return EngineDirectory(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def make(tokenizer):
    """Make a pipeline in memory, the same one each time."""

    def made(seed=0):
        unet = factories.small_unet("sd1", seed=seed, **ARCHITECTURE)
        parts = {"unet": unet, "vae": factories.small_tiny_vae(), "tokenizer": tokenizer}
        encoder = factories.small_text_encoder(seed=seed)
        pipe = StableDiffusionPipeline(**parts, text_encoder=encoder, scheduler=DDIMScheduler(), **PARTS)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return made


@pytest.fixture
def accelerate(directory):
    def call(pipe, **options):
        given = {"height": 64, "width": 64, "engine_dir": directory.path, "progress": False, "backend": "inductor"}
        return sdtrt.accelerate(pipe, **{**given, **options})

    return call


@pytest.fixture
def pipe(make, accelerate):
    """A pipeline with its UNet in an engine."""
    return accelerate(make(), components=("unet",))


def latents(pipe, **options):
    given = {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 64}
    return pipe(**{**given, **options, "generator": torch.Generator().manual_seed(3)}).images


def differ(found, expected):
    return float((found - expected).abs().max())


def names(directory):
    return {entry.name for entry in directory.entries("engine")}


@pytest.mark.feature("Deep caching (`cache_interval`, `--cache-interval`)", "sd1", "inductor")
def test_deep_caching_runs_two_packages_over_one_copy_of_the_weights(make, accelerate, directory):
    """Held against diffusers' modules, one layer of which takes what an earlier step gave it."""
    plain, pipe = make(), accelerate(make(), components=("unet",), cache_interval=3)
    built = names(directory)
    (opened,) = swapped_of(pipe)["unet"].engines
    views = opened.session.weight_views()
    assert all(same_memory(tensor, views[name]) for name, tensor in opened.shallow.weight_views().items())
    assert opened.shallow.weights_bytes < opened.session.weights_bytes / 2
    given = {"num_inference_steps": 12, "guidance_scale": 2.0}
    for scale in (1.0, 1.5):
        for one in (pipe, plain):
            with torch.no_grad():
                one.unet.up_blocks[-1].resnets[-1].conv1.weight.mul_(scale)
                one.unet.mid_block.resnets[0].conv1.weight.mul_(scale)
        reference = test_deep_cache.Reference(plain.unet)
        expected = latents(plain, **given)
        reference.remove()
        assert test_deep_cache.differ(latents(pipe, **given), expected) <= TOLERANCE
    accelerate(pipe, components=("unet",), cache_interval=5, cache_schedule="middle")
    assert names(directory) == built


@pytest.mark.feature("Text to image", "sd1", "inductor")
def test_a_pipeline_gives_its_pictures_and_restored_to_the_last_bit(make, accelerate, directory, tmp_path):
    pipe = make()
    plain, state = latents(pipe), {name: one.clone() for name, one in pipe.unet.state_dict().items()}
    accelerate(pipe)
    parts = {part.part: part.is_in_engine for part in sdtrt.status(pipe).parts}
    assert parts == {"unet": True, "text_encoder": True, "vae_decoder": True, "vae_encoder": False}
    assert differ(latents(pipe), plain) <= TOLERANCE
    assert torch.equal(latents(pipe), latents(pipe))
    assert all(entry.info["checked_with"] == "random weights of the seed 0" for entry in directory.entries("engine"))
    pipe.unet.save_pretrained(tmp_path / "unet")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    sdtrt.restore(pipe)
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipe.unet.state_dict().items())
    assert torch.equal(latents(pipe), plain)
    pipe.save_pretrained(tmp_path / "pipe")
    found = factories.find_engine(
        resolve_model(ModelSpec(str(tmp_path / "pipe"))), "inductor", "fp32", Sizes(2, 64, 64), directory
    )
    assert found is not None, "an engine of a live pipeline serves files of its architecture"


def test_a_lora_merged_by_hand_is_in_the_next_picture_without_a_build(make, pipe, directory):
    """In tensors that engine and module share, and in those that are copied."""
    built, before, plain = names(directory), latents(pipe), make()
    for one in (pipe, plain):
        for name, parameter in one.unet.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight", "to_out.0.weight", "conv1.weight")):
                rows, columns = parameter.shape[0], parameter[0].numel()
                generator = torch.Generator().manual_seed(1)
                up, down = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
                parameter.data.add_(0.05 * (up @ down).view_as(parameter))
    merged = latents(pipe)
    assert differ(merged, before) > 100 * TOLERANCE
    assert differ(merged, latents(plain)) <= TOLERANCE
    assert names(directory) == built
    sdtrt.restore(pipe)
    assert torch.equal(latents(pipe), latents(plain)), "what was merged stays merged"


def test_diffusers_lora_calls_are_in_the_next_picture_without_a_build(make, accelerate, pipe, directory):
    """In a compiled package: `test_lora` has all calls, with engines that PyTorch runs."""
    built, plain, seen = names(directory), make(), {}
    for seed, letter in enumerate("aba"):
        for one in (pipe, plain):
            one.load_lora_weights(unet_lora(one.unet, ord(letter)), adapter_name=letter)
        found = latents(pipe)
        assert differ(found, latents(plain)) <= TOLERANCE
        assert torch.equal(seen.setdefault(letter, found), found)
        for one in (pipe, plain):
            one.set_adapters(letter, 0.5)
        scale = {"cross_attention_kwargs": {"scale": 0.5}} if seed else {}
        assert differ(half := latents(pipe, **scale), latents(plain, **scale)) <= TOLERANCE
        assert differ(half, found) > 100 * TOLERANCE
        for one in (pipe, plain):
            one.unload_lora_weights()
    assert differ(seen["a"], seen["b"]) > 100 * TOLERANCE
    assert names(directory) == built
    assert torch.equal(latents(accelerate(make(), components=("unet",))), latents(pipe))


def unet_lora(unet, seed):
    """A LoRA by chance of a UNet's attention and convolutions, in peft's format."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, one in unet.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight", "to_out.0.weight", "conv1.weight")):
            layer, kernel = f"unet.{name.removesuffix('.weight')}", one.shape[2:]
            tensors[f"{layer}.lora_A.weight"] = 0.3 * torch.randn(2, one.shape[1], *kernel, generator=generator)
            last = (1,) * len(kernel)
            tensors[f"{layer}.lora_B.weight"] = 0.3 * torch.randn(one.shape[0], 2, *last, generator=generator)
    return tensors


def test_another_checkpoint_is_in_the_next_picture_and_back_to_the_last_bit(make, pipe, directory):
    built, first = names(directory), latents(pipe)
    states = [make(seed).unet.state_dict() for seed in (0, 1)]
    other = make(1)
    other.text_encoder = pipe.text_encoder
    for _ in range(2):
        pipe.unet.load_state_dict(states[1])
        assert differ(latents(pipe), latents(other)) <= TOLERANCE
        pipe.unet.load_state_dict({name: tensor.clone() for name, tensor in states[0].items()}, assign=True)
        assert torch.equal(latents(pipe), first)
    assert names(directory) == built


@pytest.mark.feature("ControlNet", "sd1", "inductor")
def test_a_controlnet_and_its_scale_need_one_build_whatever_the_weights(make, accelerate, directory):
    """Its residuals are inputs of a second engine of the UNet, which shares the weights with the first."""
    pipe, plain = accelerate(make(), components=("unet",)), make()
    net = test_controlnet.small_controlnet(plain.unet)
    both = [StableDiffusionControlNetPipeline.from_pipe(one, vae=one.vae, controlnet=net) for one in (pipe, plain)]
    options = {"image": test_controlnet.MAP}
    assert differ(latents(both[0], **options), latents(both[1], **options)) <= TOLERANCE
    built, engines = names(directory), swapped_of(pipe)["unet"].engines
    views = engines[0].session.weight_views()
    assert len(engines) == 2
    assert all(view.data_ptr() == views[name].data_ptr() for name, view in engines[1].session.weight_views().items())
    for one in both:
        one.unet.load_state_dict(make(1).unet.state_dict())
    options |= {"controlnet_conditioning_scale": 0.4, "image": test_controlnet.OTHER_MAP}
    assert differ(latents(both[0], **options), latents(both[1], **options)) <= TOLERANCE
    assert differ(latents(pipe), latents(plain)) <= TOLERANCE
    assert names(directory) == built


def test_a_controlnet_in_an_engine_follows_its_weights_and_its_scale(make, accelerate, directory):
    pipe, plain = make(), make()
    both = [
        StableDiffusionControlNetPipeline.from_pipe(
            one, vae=one.vae, controlnet=test_controlnet.small_controlnet(one.unet)
        )
        for one in (pipe, plain)
    ]
    accelerate(both[0], components=("controlnet",))
    built = names(directory)
    for strength, gain in ((1.0, 1.0), (0.4, 1.0), (0.4, 1.5)):
        options = {"image": test_controlnet.MAP, "controlnet_conditioning_scale": strength}
        for one in both:
            one.controlnet.controlnet_mid_block.weight.data.mul_(gain)
            one.controlnet.controlnet_down_blocks[0].bias.data.add_(gain - 1)
        assert differ(latents(both[0], **options), latents(both[1], **options)) <= TOLERANCE
    assert sdtrt.status(both[0])["controlnet"].is_in_engine
    assert names(directory) == built


@pytest.mark.feature("ControlNet, several", "sd1", "inductor")
def test_several_controlnets_share_a_package_each_with_its_weights(make, accelerate, directory):
    def two(unet):
        return [test_controlnet.small_controlnet(unet, seed=seed) for seed in (7, 8)]

    pipe, plain = (
        StableDiffusionControlNetPipeline.from_pipe(one, vae=one.vae, controlnet=two(one.unet))
        for one in (make(), make())
    )
    accelerate(pipe, components=("controlnet",))
    built = names(directory)
    for scales in ([1.0, 0.4], [0.3, 1.0]):
        options = {"image": [test_controlnet.MAP, test_controlnet.OTHER_MAP], "controlnet_conditioning_scale": scales}
        assert differ(latents(pipe, **options), latents(plain, **options)) <= TOLERANCE
    assert len({one.name for one in sdtrt.status(pipe)["controlnet"].engines}) == 1
    assert names(directory) == built


def test_a_call_of_another_size_goes_by_on_miss(make, accelerate, pipe, capsys):
    accelerate(pipe, components=("unet",), on_miss="error")
    with pytest.raises(EngineError, match="no engine of the unet is open"):
        latents(pipe, width=128)
    accelerate(pipe, components=("unet",), on_miss="torch", progress=True)
    expected = latents(make(), width=128)
    assert differ(latents(pipe, width=128), expected) <= TOLERANCE
    assert "PyTorch runs it" in capsys.readouterr().err


def test_engines_of_several_sizes_share_the_weights(make, accelerate):
    pipe = accelerate(make(), components=("text_encoder",))
    accelerate(pipe, components=("text_encoder",), batch_size=2)
    one, two = (opened.session for opened in swapped_of(pipe)["text_encoder"].engines)
    views = one.weight_views()
    assert all(view.data_ptr() == views[name].data_ptr() for name, view in two.weight_views().items())
    plain = make()
    for encoder in (pipe.text_encoder, plain.text_encoder):
        for parameter in encoder.parameters():
            parameter.data.mul_(1.1)
    for options in ({}, {"prompt": ["a", "b"]}):
        assert differ(latents(pipe, **options), latents(plain, **options)) <= TOLERANCE


@pytest.mark.feature("Latent consistency models", "sd1", "inductor")
def test_a_consistency_model_and_a_tiny_vae_give_plain_diffusers_pictures(tokenizer, accelerate, directory):
    """Four steps, one row of the UNet: the guidance scale is an input, and turning it builds nothing."""

    def made():
        unet = factories.small_unet("sd1", **factories.ONE_LEVEL, time_cond_proj_dim=16)
        scheduler = LCMScheduler(**factories.LCM_SCHEDULE)
        given = {"tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
        return factories.live_pipeline(LatentConsistencyModelPipeline, "sd1", **given)

    pipe, plain = accelerate(made()), made()
    built = names(directory)
    assert all(sdtrt.status(pipe)[part].is_in_engine for part in ("unet", "text_encoder", "vae_decoder"))
    for scale in (1.0, 8.5):
        options = {"guidance_scale": scale, "num_inference_steps": 4, "output_type": "pt"}
        assert differ(latents(pipe, **options), latents(plain, **options)) <= 2 / 255
        assert differ(latents(pipe, **options | LATENT), latents(plain, **options | LATENT)) <= TOLERANCE
    assert names(directory) == built


@pytest.mark.feature("Without guidance: one row an image (Turbo, Lightning)", "sd1", "inductor")
def test_without_guidance_the_unet_has_an_engine_for_one_row(make, accelerate, directory):
    pipe, plain = accelerate(make(), guidance=False, components=("unet",)), make()
    built = names(directory)
    (engine,) = swapped_of(pipe)["unet"].engines
    assert [str(profile.batch.max) for profile in engine.entry.engine_key.profiles] == ["1"]
    for scale in (0.0, 1.0):
        assert differ(latents(pipe, guidance_scale=scale), latents(plain, guidance_scale=scale)) <= TOLERANCE
    assert names(directory) == built


def test_guidance_in_a_part_of_a_run_has_two_engines_and_one_copy_of_the_weights(make, accelerate, directory, tmp_path):
    for guidance in (True, False):
        accelerate(make(), components=("unet",), guidance=guidance)
    interval, built, plain = GuidanceInterval(0.25, 0.75), names(directory), make()
    pipe = accelerate(make(), components=("unet",), guidance_interval=interval)
    views = [one.session.weight_views() for one in swapped_of(pipe)["unet"].engines]
    make().save_pretrained(tmp_path / "model")
    given = {"height": 64, "width": 64, "components": ("unet",), "engine_dir": directory.path, "progress": False}
    loaded = sdtrt.load(str(tmp_path / "model"), backend="inductor", guidance_interval=interval, **given)
    assert names(directory) == built
    assert all(views[0][name].data_ptr() == view.data_ptr() for name, view in views[1].items())
    by_hand(plain, {1, 2})
    expected = latents(plain, num_inference_steps=4)
    for one in (pipe, loaded):
        assert differ(latents(one, num_inference_steps=4), expected) <= TOLERANCE
    assert differ(latents(loaded, guidance_scale=1.0), latents(make(), guidance_scale=1.0)) <= TOLERANCE
    with torch.no_grad():
        for module in (plain.unet, pipe.unet):
            module.conv_out.weight.mul_(1.5)
    by_hand(plain, {1, 2})
    assert differ(latents(pipe, num_inference_steps=4), latents(plain, num_inference_steps=4)) <= TOLERANCE
    loaded.close()


def test_other_layers_are_refused(pipe):
    pipe.unet.add_module("another", torch.nn.Linear(2, 2))
    with pytest.raises(EngineError, match="other layers"):
        latents(pipe)
    del pipe.unet.another
    sdtrt.restore(pipe)


def test_auto_takes_it_where_its_engines_are_there(make, pipe, accelerate, capsys):
    """And no others: ONNX Runtime's would have to be built."""
    other = accelerate(make(1), components=("unet",), backend="auto", progress=True)
    (engine,) = sdtrt.status(other)["unet"].engines
    assert engine.backend == "inductor"
    assert "backend: inductor (its engines are there)" in capsys.readouterr().err
