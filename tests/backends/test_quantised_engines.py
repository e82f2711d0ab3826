"""Engines in 8 bits that PyTorch's Inductor compiled on this processor: built, run, given other weights, refused.

Nothing stands in for anything here. There is one engine of each precision, of the smallest UNet, for all these tests.
"""

from __future__ import annotations

import copy
import shutil

import factories
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig

import sdtrt
from sdtrt.backends import registry
from sdtrt.backends.build import build_engine, engine_key
from sdtrt.backends.inductor.build import KEPT
from sdtrt.backends.inductor.weights import CONSTANTS_FILE, PACKAGE_FILE, read_constants
from sdtrt.backends.open import open_session
from sdtrt.common.console import QUIET
from sdtrt.common.errors import CacheError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.program import fuse_projections
from sdtrt.exports.quantised import layers_to_quantise, quantise
from sdtrt.exports.tracing import reference
from sdtrt.models.components import load_component
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.inputs.images import read_metadata
from sdtrt.pipeline.opening.fastest import resolve_fastest
from sdtrt.reports.verify import verify
from sdtrt.specs import (
    BuildSpec,
    DeepCaching,
    ExportSpec,
    GenerateSpec,
    ModelSpec,
    Profile,
    Savings,
    Sizes,
    VerifySpec,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("on_the_cpu", "probed_once"),
    pytest.mark.skipif(registry.get("inductor").why_not() is not None, reason="needs a C++ compiler"),
]
CPU = torch.device("cpu")
SIZES = Sizes(2, 64, 64)
ERRORS = {"int8": (0.002, 0.03), "fp8": (0.005, 0.1)}  # against fp32: no less than 8 bits cost, and no more
BOTH = pytest.mark.parametrize("precision", ["int8", "fp8"])
PARTS = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two checkpoints of one architecture."""
    folder = tmp_path_factory.mktemp("models")
    folders = [factories.sd1_folder(folder / str(seed), seed=seed, **factories.ONE_LEVEL) for seed in (0, 1)]
    return [resolve_model(ModelSpec(str(path))) for path in folders]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The engine directory of all these tests: each engine is built once."""
    return EngineDirectory(tmp_path_factory.mktemp("engines"))


def engine(model, directory, precision):
    spec = BuildSpec(ExportSpec(model.spec, "unet", precision), "inductor", (Profile.of(SIZES),))
    return build_engine(model, spec, directory, QUIET)


def in_fp32(module, contract, feeds):
    """What the module computes in fp32."""
    with torch.inference_mode():
        return reference(module.float(), contract)(*(one.float() for one in feeds.values()))


def error(found, wanted):
    return float((found.float() - wanted).norm() / wanted.norm())


@BOTH
def test_one_engine_serves_two_checkpoints_and_says_its_error(models, shared, precision):
    one, two = (engine(model, shared, precision) for model in models)
    assert one.digest == two.digest
    least, most = ERRORS[precision]
    (figures,) = one.info["parity"]
    assert least < figures["relative_l2"] < most
    assert one.info["step_ms"] > 0
    assert one.info["torch_step_ms"] > 0
    listed = read_constants(one.path / CONSTANTS_FILE)
    rounded = {one.dtype for one in listed if one.given and not one.scales}
    assert rounded == {{"int8": "int8", "fp8": "float8_e4m3fn"}[precision]}
    for model in models:
        with open_session(one, CPU, None, model) as session:
            feeds = seeded_feeds(session.contract, SIZES)
            wanted = in_fp32(load_component(model, "unet", torch.bfloat16), session.contract, feeds)
            found = session.run(feeds)["out_sample"]
            assert found.dtype == torch.bfloat16
            assert least < error(found, wanted) < most
            assert torch.equal(session.run(feeds)["out_sample"], found)


@BOTH
def test_it_computes_what_its_layers_compute_in_pytorch(models, shared, precision):
    """Which is nearer to it than the rounding itself: the products are those of 8 bits."""
    with open_session(engine(models[0], shared, precision), CPU, None, models[0]) as session:
        feeds = seeded_feeds(session.contract, SIZES)
        module = load_component(models[0], "unet", torch.bfloat16)
        fuse_projections(module)
        quantise(module, layers_to_quantise(module, KEPT[precision]), precision)
        with torch.inference_mode():
            wanted = reference(module, session.contract)(*feeds.values()).float()
        assert error(session.run(feeds)["out_sample"], wanted) < ERRORS[precision][1] / 2


def test_each_weight_alone_is_followed(models, shared):
    """Rows, scales, biases, and what is not rounded at all."""
    model = models[0]
    module = load_component(model, "unet", torch.bfloat16)
    with open_session(engine(model, shared, "int8"), CPU, None, model) as session, torch.inference_mode():
        feeds = seeded_feeds(session.contract, SIZES)
        before = session.run(feeds)["out_sample"]
        for name, parameter in module.named_parameters():
            kept = parameter.clone()
            parameter.mul_(-3)
            parameter.add_(0.5)
            session.set_weights(module)
            found, wanted = session.run(feeds)["out_sample"], in_fp32(module, session.contract, feeds)
            module.bfloat16()
            assert error(found, wanted) < 0.06, name
            module.get_parameter(name).copy_(kept)
        session.set_weights(module)
        assert torch.equal(session.run(feeds)["out_sample"], before)


@pytest.mark.parametrize("name", [PACKAGE_FILE, CONSTANTS_FILE])
def test_a_flipped_bit_is_refused(models, shared, directory, name):
    built = engine(models[0], shared, "int8")
    directory.path.mkdir(mode=0o700)
    shutil.copytree(built.path, directory.path / built.name)
    (entry,) = directory.entries("engine")
    factories.flip(directory.path / built.name / name)
    with pytest.raises(CacheError, match="damaged"):
        open_session(entry, CPU, None, models[0])


@BOTH
def test_verify_holds_it_to_thresholds_of_its_own(models, shared, tmp_path, precision):
    image = GenerateSpec(
        ("a red circle",),
        model=models[0].spec,
        backend="inductor",
        precision=precision,
        steps=2,
        height=64,
        width=64,
        seed=0,
        components=("unet",),
    )
    engine(models[0], shared, precision)
    spec = VerifySpec(image, timesteps=2, output=tmp_path)
    report = verify(spec, shared, QUIET)
    assert report.thresholds == sdtrt.specs.THRESHOLDS[precision]
    assert report.unet_passed, report.timesteps
    strict = verify(VerifySpec(image, timesteps=2, output=tmp_path, limits={"max_relative_l2": 1e-3}), shared, QUIET)
    assert not strict.unet_passed


def test_a_live_pipeline_keeps_its_16_bits_and_every_change_is_rounded_anew(models, shared, tokenizer):
    """In place, by `.data`, and back; the module itself is nobody's copy."""
    built = engine(models[0], shared, "int8").created
    unet = factories.small_unet("sd1", **factories.ONE_LEVEL)
    parts = {"unet": unet, "vae": factories.small_tiny_vae(), "tokenizer": tokenizer}
    pipe = StableDiffusionPipeline(
        **parts, text_encoder=factories.small_text_encoder(), scheduler=DDIMScheduler(), **PARTS
    )
    pipe.set_progress_bar_config(disable=True)
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}

    def latents():
        generator = torch.Generator().manual_seed(3)
        given = {"num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 64}
        return pipe("a red circle", **given, generator=generator).images

    def changed():
        for name, parameter in unet.named_parameters():
            if name.endswith(("to_q.weight", "to_v.weight", "net.2.weight")):
                parameter.data.mul_(-2)

    plain = latents()
    changed()
    other = latents()
    unet.load_state_dict(state)
    assert error(other, plain) > 0.1, "a change that nobody would see proves nothing"
    sdtrt.accelerate(
        pipe, backend="inductor", precision="int8", height=64, width=64, components=("unet",), engine_dir=shared.path
    )
    assert engine(models[0], shared, "int8").created == built, "the engine of the files serves it"
    first = latents()
    assert error(first, plain) < 0.1
    changed()
    assert error(latents(), other) < 0.1
    unet.load_state_dict(state)
    assert torch.equal(latents(), first)
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())
    follow_loras(pipe, latents, first)
    sdtrt.restore(pipe)
    assert torch.equal(latents(), plain)


def follow_loras(pipe, latents, first):
    """A LoRA is in the rounded weights of the next picture, as much as is asked for, and gone in another."""
    before = copy.deepcopy(pipe.unet.state_dict())
    made = {}
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        pipe.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v", "net.2"]), name)
    for names, weights in ((("one",), (2.0,)), (("other",), (2.0,)), (("one", "other"), (1.0, 0.5))):
        pipe.set_adapters(list(names), list(weights))
        made[names] = latents()
        plain = merged(pipe, latents)
        assert error(made[names], first) > 0.1, "a LoRA that nobody would see proves nothing"
        assert error(made[names], plain) < 0.1
    pipe.set_adapters(["one"], [2.0])
    assert torch.equal(latents(), made["one",])
    pipe.unload_lora_weights()
    assert torch.equal(latents(), first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())


def merged(pipe, latents):
    """What PyTorch makes in fp32 with the adapters as they are."""
    forward = pipe.unet.forward
    try:
        pipe.unet.forward = type(pipe.unet).forward.__get__(pipe.unet)
        return latents()
    finally:
        pipe.unet.forward = forward


@pytest.mark.parametrize(("times", "taken"), [(2.0, "int8"), (0.5, "fp32")])
def test_the_preset_fast_runs_in_an_engine_that_was_measured_to_be_faster(
    models, shared, directory, tmp_path, times, taken
):
    """The engine in 8 bits and its time are real; beside it stands what a build in fp32 would have measured."""
    built = engine(models[0], shared, "int8")
    directory.path.mkdir(mode=0o700)
    shutil.copytree(built.path, directory.path / built.name)
    usual = BuildSpec(ExportSpec(models[0].spec, "unet", "fp32"), "inductor", (Profile.of(SIZES),))
    facts = {"step_ms": times * built.info["step_ms"], "step_sizes": built.step_sizes}
    directory.obtain("engine", engine_key(models[0], usual, directory).to_json(), lambda folder: facts)
    spec = GenerateSpec(
        ("a red circle", "a star"),
        models[0].spec,
        "inductor",
        steps=2,
        batch_size=2,
        guidance_scale=1.0,
        height=64,
        width=64,
        quality="fast",
        savings=Savings(caching=DeepCaching(5)),
        components=("unet",),
        output=tmp_path / "out",
        allow_build=False,
    )
    assert resolve_fastest(spec, models[0], directory, QUIET).precision == taken
    if taken == "int8":
        report = sdtrt.generate(spec, engine_dir=directory.path, progress=False)
        settings = read_metadata(report.images[0].path).details
        assert (settings["precision"], settings["quality"]) == ("int8", "fast")
