"""What diffusers' own calls do to an accelerated pipeline: each against the same call on a plain one, with one seed.

With `on_miss="torch"` PyTorch runs what no engine may, and says so; without, it is an error (`test_accelerate.py`). One
backend's engines hold their weights (ONNX Runtime), the other's do not (Inductor's, which PyTorch runs here).
"""

from __future__ import annotations

import json

import diffusers
import factories
import pytest
import torch
import torch_engines
from diffusers import (
    AsymmetricAutoencoderKL,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from diffusers.utils import is_accelerate_available
from test_accelerate import NOISE, differ, latents
from trt_fakes import fake_library

import sdtrt
from sdtrt.backends import registry
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.common.errors import EngineError, UnservedCallError, UsageError
from sdtrt.specs import ExportSpec, Profile, Sizes

pytestmark = pytest.mark.usefixtures("on_the_cpu")
TOLERANCE = 1e-4  # of latents in fp32 on the CPU
LEVELS = 2 / 255
GIVEN = {"height": 64, "width": 64, "backend": "inductor"}
CLASSES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
SMALL_VAE = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
SLOW = pytest.mark.slow  # where ONNX Runtime's engine of a UNet is built
BACKENDS = [pytest.param("onnxruntime", marks=SLOW), "inductor"]
KINDS = ["sd1", pytest.param("sd2", marks=SLOW), pytest.param("sdxl", marks=SLOW)]
by_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture
def both(tokenizer, directory, monkeypatch):
    """Make a plain pipeline and the same one accelerated."""

    def made(backend="inductor", kind="sd1", cls=None, parts=None, **options):
        if backend == "inductor":
            torch_engines.instead_of_inductor(monkeypatch)
        plain, pipe = (
            factories.live_pipeline(cls or CLASSES[kind], kind, **{"tokenizer": tokenizer, **(parts or dict)()})
            for _ in range(2)
        )
        given = {**GIVEN, "engine_dir": directory, "backend": backend, "on_miss": "torch", **options}
        return plain, sdtrt.accelerate(pipe, **given)

    return made


def with_a_vae():
    """Parts of a pipeline whose VAE is a full one."""
    return {"vae": factories.small_vae(**SMALL_VAE)}


def same(plain, pipe, **options):
    """Whether both give the same picture, to the tolerance; the accelerated one's latents."""
    found, expected = latents(pipe, **options), latents(plain, **options)
    assert differ(found, expected) <= TOLERANCE * max(1.0, float(expected.abs().max()))
    return found


def why(pipe, part="unet"):
    """Why PyTorch runs a part that has engines; empty where they run it."""
    status = sdtrt.status(pipe)[part]
    assert status.engines
    assert status.is_in_engine != status.is_left
    return status.reason if status.is_left else ""


# What changes results and no tensor


@pytest.mark.feature("FreeU (`enable_freeu`)", "sd1 sd2 sdxl", "onnxruntime inductor")
@by_backend
@pytest.mark.parametrize("kind", KINDS)
def test_freeu_is_an_input_of_an_engine_of_its_own_and_gone_again(both, backend, kind):
    plain, pipe = both(backend, kind, components=("unet",), on_miss="build")
    before = same(plain, pipe)
    built = []
    for given in ({"s1": 0.9, "s2": 0.2, "b1": 1.4, "b2": 1.6}, {"s1": 0.2, "s2": 1, "b1": 1, "b2": 2}):
        for one in (plain, pipe):
            one.enable_freeu(**given)
        assert differ(same(plain, pipe), before) > 100 * TOLERANCE
        built.append({one.name for one in sdtrt.status(pipe)["unet"].engines})
        assert why(pipe) == ""
    assert built[0] == built[1], "other numbers build none"
    assert len(sdtrt.status(pipe)["unet"].engines) == 2
    for one in (plain, pipe):
        one.disable_freeu()
    assert torch.equal(latents(pipe), before)
    _, freed = both(backend, kind, components=("unet",), on_miss="error")
    freed.enable_freeu(**given)
    with pytest.raises(EngineError, match="no engine of the unet with inputs for free_u is open"):
        latents(freed)


@pytest.mark.feature(
    "FreeU (`enable_freeu`)", "sd1 sd2 sdxl", "tensorrt86", error="no engine whose unet has inputs for free_u"
)
def test_tensorrt_86_refuses_freeu_with_the_way_out(monkeypatch):
    monkeypatch.setattr(libraries, "open_library", lambda _: fake_library("tensorrt 8.6.1"))
    with pytest.raises(UsageError, match="no engine whose unet has inputs for free_u") as caught:
        factories.checked_spec(ExportSpec(groups=("free_u",)), "tensorrt", (Profile.of(Sizes(2, 512, 512)),))
    assert "inductor" in caught.value.hint


@pytest.mark.slow
def test_a_pipeline_with_freeu_gets_such_an_engine_at_once(both, directory):
    plain, pipe = both()
    sdtrt.restore(pipe)
    for one in (plain, pipe):
        one.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    sdtrt.accelerate(pipe, **GIVEN, engine_dir=directory, components=("unet",), on_miss="error")
    same(plain, pipe)
    for one in (plain, pipe):
        one.disable_freeu()
    same(plain, pipe)  # it gets ones
    pipe.unet.up_blocks[0].s1 = "much"
    pipe.unet.up_blocks[0].s2 = pipe.unet.up_blocks[0].b1 = pipe.unet.up_blocks[0].b2 = 1.0
    with pytest.raises(EngineError, match="FreeU with 'much', which is no number"):
        latents(pipe)


@pytest.mark.slow
def test_a_call_with_freeu_is_pytorchs_where_no_engine_is_open_for_it(both, capsys):
    plain, pipe = both(components=("unet",))
    for one in (plain, pipe):
        one.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    same(plain, pipe)
    same(plain, pipe)
    assert capsys.readouterr().err.count("no engine of the unet with inputs for free_u is open") == 1


def fused(pipe):
    """A layer that diffusers makes of three others."""
    return pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_qkv


@pytest.mark.feature("Fused projections (`fuse_qkv_projections`)", "sd1 sd2 sdxl", "onnxruntime inductor")
@by_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_fused_projections_are_those_of_the_engine_until_they_are_changed(both, backend, kind):
    plain, pipe = both(backend, kind, parts=with_a_vae)
    before = same(plain, pipe)
    for one in (plain, pipe):
        one.fuse_qkv_projections()
    same(plain, pipe)
    assert why(pipe) == why(pipe, "vae_decoder") == ""
    assert torch.equal(latents(pipe), before)
    with torch.no_grad():
        for one in (plain, pipe):
            fused(one).weight.mul_(-5)
    assert why(pipe) == "the unet has the attention processor FusedAttnProcessor2_0"
    assert differ(same(plain, pipe), before) > 10 * TOLERANCE
    for one in (plain, pipe):
        one.unfuse_qkv_projections()
    assert why(pipe) == why(pipe, "vae_decoder") == ""
    assert torch.equal(latents(pipe), before)
    sdtrt.restore(pipe)
    assert torch.equal(latents(pipe), latents(plain))


@pytest.mark.slow
def test_what_is_left_of_fused_projections_is_not_refused_and_the_way_out_works(both, directory):
    """diffusers leaves the fused layers where they are, with nothing that runs them."""
    plain, pipe = both(components=("unet",), on_miss="error")
    pipe.unet.fuse_qkv_projections()
    same(plain, pipe)
    fused(pipe).weight.data.mul_(2)
    fused(pipe).weight.data = fused(pipe).weight.data.clone()
    with pytest.raises(EngineError, match="FusedAttnProcessor2_0") as caught:
        latents(pipe)
    assert "pipe.unfuse_qkv_projections()" in caught.value.hint
    pipe.unet.unfuse_qkv_projections()
    same(plain, pipe)
    engines = sdtrt.status(pipe)["unet"].engines
    sdtrt.accelerate(pipe, **GIVEN, components=("unet",), engine_dir=directory)
    assert sdtrt.status(pipe)["unet"].engines == engines


@pytest.mark.feature("Attention processors (`set_attn_processor`, slicing)", "sd1", "onnxruntime inductor")
@by_backend
@pytest.mark.slow
def test_processors_that_compute_the_same_leave_the_engine_and_others_do_not(both, backend):
    plain, pipe = both(backend, components=("unet",))
    before = same(plain, pipe)
    processors = pipe.unet.attn_processors
    assert processors.keys() == plain.unet.attn_processors.keys()
    for processor in (AttnProcessor(), SlicedAttnProcessor(1)):
        pipe.unet.set_attn_processor(processor)
        assert why(pipe) == ""
        assert torch.equal(latents(pipe), before)
    pipe.enable_attention_slicing()
    assert torch.equal(latents(pipe), before)
    pipe.disable_attention_slicing()

    class Half(AttnProcessor):
        def __call__(self, *args, **kwargs):
            return 0.5 * super().__call__(*args, **kwargs)

    for one in (plain, pipe):
        one.unet.set_attn_processor(Half())
    assert why(pipe) == "the unet has the attention processor Half"
    assert differ(same(plain, pipe), before) > 10 * TOLERANCE
    pipe.unet.set_attn_processor(processors)
    pipe.unet.set_default_attn_processor()
    assert why(pipe) == ""
    assert torch.equal(latents(pipe), before)


@pytest.mark.feature("Hooks on layers", "sd1", "onnxruntime inductor", pytorch="hooks on mid_block")
@by_backend
@pytest.mark.slow
def test_hooks_on_layers_are_called(both, backend):
    plain, pipe = both(backend, components=("unet",))
    before = same(plain, pipe)
    handles = [
        one.unet.mid_block.register_forward_hook(lambda module, given, result: 1.5 * result) for one in (plain, pipe)
    ]
    assert "hooks on mid_block" in why(pipe)
    assert differ(same(plain, pipe), before) > 10 * TOLERANCE
    for one in handles:
        one.remove()
    assert torch.equal(latents(pipe), before)


# What changes weights, their dtype or their place


@pytest.mark.feature("Another dtype (`.to(torch.bfloat16)`)", "sd1", "onnxruntime", pytorch="it was cast to bfloat16")
@pytest.mark.slow
def test_a_pipeline_that_is_cast_runs_in_its_dtype(both):
    plain, pipe = both("onnxruntime", parts=with_a_vae)
    same(plain, pipe)
    for one in (plain, pipe):
        one.to(torch.bfloat16)
    assert torch.equal(latents(pipe), latents(plain))
    assert "it was cast to bfloat16" in why(pipe)
    assert torch.equal(latents(pipe, output_type="pt"), latents(plain, output_type="pt"))


@pytest.mark.feature("Another dtype (`.to(torch.bfloat16)`)", "sd1", "inductor")
@pytest.mark.slow
def test_engines_without_weights_take_them_as_they_were_cast(both):
    plain, pipe = both()
    for one in (plain, pipe):
        one.to(torch.float64)
    assert why(pipe) == ""
    assert differ(latents(pipe), latents(plain)) <= TOLERANCE
    assert latents(pipe).dtype == torch.float64
    for one in (plain, pipe):
        one.to(torch.float32)
    same(plain, pipe)


def change(unet):
    unet.conv_in.weight.data.mul_(1.1)


@pytest.mark.feature("Changed weights", "sd1", "onnxruntime", pytorch="they were changed after sdtrt.accelerate")
@pytest.mark.feature("Changed weights", "sd1", "inductor")
@by_backend
@pytest.mark.slow
def test_changed_weights_are_in_the_next_picture(both, backend):
    plain, pipe = both(backend, components=("unet",))
    before = same(plain, pipe)
    for one in (plain, pipe):
        change(one.unet)
    assert differ(same(plain, pipe), before) > 10 * TOLERANCE
    reason = "" if backend == "inductor" else "they were changed after sdtrt.accelerate"
    assert reason in why(pipe)
    assert bool(why(pipe)) == bool(reason)


@pytest.mark.feature("Layerwise casting", "sd1", "onnxruntime inductor", pytorch="has hooks of diffusers")
@by_backend
@pytest.mark.slow
def test_layerwise_casting_runs_in_pytorch(both, backend):
    plain, pipe = both(backend, components=("unet",))
    before = same(plain, pipe)
    for one in (plain, pipe):
        one.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    found = latents(pipe)
    assert torch.equal(found, latents(plain))
    assert differ(found, before) > 10 * TOLERANCE
    assert "has hooks of diffusers" in why(pipe)


needs_accelerate = pytest.mark.skipif(not is_accelerate_available(), reason="diffusers offloads with accelerate alone")


@pytest.mark.feature(
    "Offloading (by group, model, layer)", "sd1", "onnxruntime inductor", pytorch="has hooks of diffusers"
)
@needs_accelerate
@by_backend
@pytest.mark.slow
def test_a_unet_that_is_offloaded_runs_in_pytorch(both, backend):
    plain, pipe = both(backend, components=("unet",))
    before = same(plain, pipe)
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert "has hooks of diffusers" in why(pipe)
    assert torch.equal(latents(pipe), latents(plain))
    sdtrt.restore(pipe)
    assert torch.equal(latents(pipe), latents(plain))
    assert differ(before, latents(plain)) <= TOLERANCE


# VAEs


@pytest.mark.feature("VAE tiling and slicing", "sd1", "onnxruntime inductor")
@pytest.mark.parametrize("vae", [with_a_vae, dict], ids=["full", "tiny"])
@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
@pytest.mark.slow
def test_tiles_and_slices_are_diffusers_own_and_engines_compute_each(both, backend, vae, monkeypatch):
    halves = ("vae_decoder", "vae_encoder")
    cls = StableDiffusionImg2ImgPipeline
    plain, pipe = both(backend, cls=cls, parts=vae, components=halves, on_miss="build", progress=False)
    size = {"tile_latent_min_size": 16, "tile_sample_min_size": 128}
    for one in (plain, pipe):
        vars(one.vae).update(size)
        one.vae.enable_tiling()
    generator = torch.Generator().manual_seed(1)
    code, image = torch.randn(1, 4, 21, 18, generator=generator), torch.rand(1, 3, 168, 144, generator=generator)

    def pairs(call):
        with torch.no_grad():
            return [call(one.vae) for one in (plain, pipe)]

    def encoded(vae, images):
        found = vae.encode(images)
        return found.latents if hasattr(found, "latents") else found.latent_dist.parameters

    decoded = pairs(lambda one: one.decode(code).sample)
    assert differ(*decoded) <= TOLERANCE
    assert differ(*pairs(lambda one: encoded(one, image))) <= TOLERANCE
    whole = pairs(lambda one: one.disable_tiling() or one.decode(code).sample)
    assert differ(*whole) <= TOLERANCE
    assert differ(whole[0], decoded[0]) > 10 * TOLERANCE, "tiles are seen, or this proves nothing"
    plain.vae.enable_slicing()
    pipe.vae.enable_slicing()
    two = torch.cat([code, -code])
    rows, opened = [], pipe.vae.decode.engines[0]
    run = opened.session.run
    monkeypatch.setattr(opened.session, "run", lambda feeds: rows.append(len(next(iter(feeds.values())))) or run(feeds))
    assert differ(*pairs(lambda one: one.decode(two).sample)) <= TOLERANCE
    assert differ(*pairs(lambda one: one.decode(two, return_dict=False)[0])) <= TOLERANCE
    if backend == "onnxruntime":
        assert rows == [1, 1, 1, 1], "the engine takes any size, and these one by one"
    assert differ(*pairs(lambda one: encoded(one, torch.cat([image, 1 - image])))) <= TOLERANCE


@pytest.mark.feature("VAEs of other classes and factors", "sd1", "inductor", pytorch="engines run AutoencoderKL")
@pytest.mark.parametrize("factor", [4, 8])
@pytest.mark.slow
def test_a_vae_that_engines_do_not_know_runs_in_pytorch_beside_them(both, factor):
    def parts():
        if factor == 4:
            return {"vae": factories.small_vae(block_out_channels=(8, 8, 8), **_three_blocks())}
        with factories.seeded(0):
            blocks = {"down_block_out_channels": (8,) * 4, "up_block_out_channels": (8,) * 4, "norm_num_groups": 4}
            kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
            return {"vae": AsymmetricAutoencoderKL(**blocks, **kinds).eval()}

    options = {"height": 16 * factor, "width": 16 * factor}
    plain, pipe = both(parts=parts, **options)
    found = sdtrt.status(pipe)
    assert found["unet"].is_in_engine
    expected = "engines need a VAE of factor 8, this has 4" if factor == 4 else "engines run AutoencoderKL"
    assert expected in found["vae_decoder"].reason
    assert differ(*(latents(one, output_type="pt", **options) for one in (plain, pipe))) <= LEVELS
    with pytest.raises(EngineError, match="no engine runs the vae of"):
        sdtrt.accelerate(pipe, components=("vae_decoder",), backend="inductor")


def _three_blocks():
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return {**kinds, "norm_num_groups": 4, "layers_per_block": 1}


# Calls


def call_of(name):
    """The options of a call of a pipeline, of which some need the pipeline."""

    def interrupt(pipe, step, time, tensors):
        pipe._interrupt = step == 1
        return tensors

    def turn(pipe, step, time, tensors):
        return {"latents": 0.9 * tensors["latents"]}

    def no_guidance(pipe, step, time, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0
            return {name: one.chunk(2)[-1] for name, one in tensors.items() if name != "latents"}
        return {}

    states = torch.Generator().manual_seed(4)
    return {
        "several images of a prompt": {"num_images_per_prompt": 3},
        "several prompts": {"prompt": ["a red circle", "a blue square"], "negative_prompt": ["green", ""]},
        "both": {"prompt": ["a", "b"], "num_images_per_prompt": 2},
        "no guidance": {"guidance_scale": 1.0},
        "embeddings": {
            "prompt": None,
            "prompt_embeds": torch.randn(2, 77, 32, generator=states),
            "negative_prompt_embeds": torch.randn(2, 77, 32, generator=states),
        },
        "latents given": {"latents": torch.randn(1, 4, 8, 8, generator=states)},
        "latents changed at a step": {"callback_on_step_end": turn, "num_inference_steps": 3},
        "interrupted": {"callback_on_step_end": interrupt, "num_inference_steps": 4},
        "guidance ends at a step": {
            "callback_on_step_end": no_guidance,
            "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
            "num_inference_steps": 4,
        },
        "eta": {"eta": 0.7, "num_inference_steps": 3},
        "timesteps": {"timesteps": [801, 401], "scheduler": LCMScheduler},
        "guidance rescaled": {"guidance_rescale": 0.5},
        "other keywords of attention": {"cross_attention_kwargs": {"mask": 1}},
    }[name]


CALLS = [
    "several images of a prompt",
    "several prompts",
    "both",
    "no guidance",
    "embeddings",
    "latents given",
    "latents changed at a step",
    "interrupted",
    "guidance ends at a step",
    "eta",
    "timesteps",
    "guidance rescaled",
]


@pytest.mark.feature("Calls: batches, embeddings, callbacks, `interrupt`", "sd1", "onnxruntime inductor")
@by_backend
@pytest.mark.slow
def test_what_a_call_is_given_has_diffusers_effect(both, backend):
    plain, pipe = both(backend)
    for name in CALLS:
        options = dict(call_of(name))
        if scheduler := options.pop("scheduler", None):
            for one in (plain, pipe):
                one.scheduler = scheduler.from_config(one.scheduler.config)
        seen = [latents(one, **options) for one in (pipe, plain)]
        scale = max(1.0, float(seen[1].abs().max()))
        assert differ(*seen) <= TOLERANCE * scale, name
    assert why(pipe) == ""


@pytest.mark.feature("Arguments that engines have no input for", "sd1", "inductor", pytorch="no input for")
def test_a_call_with_an_argument_that_no_engine_takes_runs_in_pytorch(both, capsys):
    plain, pipe = both(components=("unet",))
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    mask = torch.zeros(2, 77)
    mask[:, :5] = 1
    with torch.no_grad():
        given = {"encoder_attention_mask": mask}
        expected = plain.unet(sample, 1, states, **given).sample
        assert torch.equal(pipe.unet(sample, 1, states, **given).sample, expected)
        assert "the engine of the unet has no input for encoder_attention_mask" in capsys.readouterr().err
        found = pipe.unet(sample, 1, states.clone()).sample
        assert differ(found, plain.unet(sample, 1, states).sample) <= TOLERANCE
    assert why(pipe) == ""


@pytest.mark.feature("Gradients", "sd1", "inductor", pytorch="a gradient is wanted")
@pytest.mark.slow
def test_a_gradient_comes_from_pytorch_where_that_may_run(both, directory, capsys):
    plain, pipe = both(components=("unet",))
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    found = []
    for one in (plain, pipe):
        leaf = sample.clone().requires_grad_(True)
        one.unet(leaf, 1, states).sample.square().sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)
    assert "a gradient is wanted" in capsys.readouterr().err
    sdtrt.accelerate(pipe, **GIVEN, engine_dir=directory, components=("unet",), on_miss="error")
    with pytest.raises(UnservedCallError, match="a gradient is wanted"):
        pipe.unet(sample.clone().requires_grad_(True), 1, states.clone())


@pytest.mark.feature("`encode_prompt` apart, in a pipeline without a UNet", "sd1 sdxl", "onnxruntime")
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.slow
def test_prompts_are_encoded_by_a_pipeline_of_its_own(both, kind):
    plain, pipe = both("onnxruntime", kind, parts=lambda: {"unet": None, "vae": None})
    text = {"prompt": "a red circle", "device": torch.device("cpu"), "num_images_per_prompt": 1}
    found, expected = (one.encode_prompt(**text, do_classifier_free_guidance=True) for one in (pipe, plain))
    assert all(differ(*tensors) <= TOLERANCE for tensors in zip(found, expected, strict=True))
    names = ("text_encoder", "text_encoder_2")[: 1 + (kind == "sdxl")]
    assert all(sdtrt.status(pipe)[name].is_in_engine for name in names)
    assert "unet" not in {part.part for part in sdtrt.status(pipe).parts}


@pytest.mark.feature("SDXL's size, crop and score conditioning", "sdxl", "inductor")
@pytest.mark.slow
def test_numbers_of_size_and_score_condition_sdxl(both):
    plain, pipe = both(kind="sdxl", components=("unet",))
    before = same(plain, pipe)
    sizes = {"original_size": (32, 48), "crops_coords_top_left": (8, 0), "negative_target_size": (16, 16)}
    assert differ(same(plain, pipe, **sizes), before) > TOLERANCE

    def refiner():
        config = {**factories.SMALLEST["sdxl"], **factories._REFINER}
        return {
            "unet": factories.small_unet("sdxl", **config),
            "text_encoder": None,
            "requires_aesthetics_score": True,
        }

    plain, pipe = both(kind="sdxl", cls=StableDiffusionXLImg2ImgPipeline, parts=refiner, components=("unet",))
    options = {"image": NOISE, "strength": 0.9, "num_inference_steps": 2}
    before = same(plain, pipe, **options)
    assert differ(same(plain, pipe, aesthetic_score=2.0, **options), before) > TOLERANCE


# Saving, loading, other pipelines


@pytest.mark.feature("Saving and loading, `from_pipe`", "sd1 sdxl", "inductor")
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"safe_serialization": False}], ids=["variant", "pickles"])
@pytest.mark.slow
def test_what_is_saved_is_the_pipeline(both, kind, options, tmp_path):
    plain, pipe = both(kind=kind, parts=with_a_vae)
    pipe.save_pretrained(tmp_path, **options)
    again = type(pipe).from_pretrained(tmp_path, variant=options.get("variant"))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again), latents(plain))
    own, read = (json.loads(json.dumps(dict(one.unet.config))) for one in (pipe, again))
    assert all(value == own[name] for name, value in read.items() if name[0] != "_")
    assert type(again.unet) is type(pipe.unet) is diffusers.UNet2DConditionModel
    assert pipe.components.keys() == plain.components.keys()
    task = {"sd1": StableDiffusionImg2ImgPipeline, "sdxl": StableDiffusionXLImg2ImgPipeline}[kind]
    others = [task.from_pipe(one) for one in (plain, pipe)]
    for one in others:
        one.set_progress_bar_config(disable=True)
    same(*others, image=NOISE, strength=0.9)
    assert sdtrt.status(others[1])["unet"].is_in_engine


def test_engines_with_weights_of_any_backend_refuse_what_these_do():
    """The code asks a backend whether its engines hold their weights, never its name."""
    inside = {name: registry.get(name).weights_inside for name in ("onnxruntime", "inductor", "tensorrt")}
    assert inside == {"onnxruntime": True, "inductor": False, "tensorrt": True}
