"""What modules without weights do with all that diffusers and its users ask of the originals."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from dataclasses import replace
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.configuration_utils import ConfigMixin
from factories import small_text_encoder, small_unet, small_vae
from test_modules import facade_of, make_pipeline, picture
from torch.autograd import forward_ad

from sdtrt.backends.gradients import refuse_gradients
from sdtrt.backends.session import Session, check_feeds
from sdtrt.common.console import QUIET
from sdtrt.common.errors import EngineError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening.open import open_pipeline
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.pipeline.parts.facades import TextEncoderFacade, VaeFacade
from sdtrt.pipeline.parts.finite import Finite
from sdtrt.pipeline.parts.hooks import hooked
from sdtrt.pipeline.parts.refusals import AS_A_WHOLE, refuse_as_a_whole
from sdtrt.specs import ModelSpec, Sizes
from sdtrt.specs.contract import text_encoder_contract, vae_contract

pytestmark = pytest.mark.usefixtures("on_the_cpu")
CPU = torch.device("cpu")
LATENTS, STATES, PIXELS = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32), torch.rand(1, 3, 64, 64)
IDS = torch.zeros(1, 77, dtype=torch.int64)


class PartSession(Session):
    """An engine by a function, with the checks of a real one. It can't be copied."""

    def __init__(self, contract, compute):
        self.contract, self.compute = contract, compute

    def run(self, feeds):
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in feeds.items()}
        check_feeds(self.inputs, {name: tuple(tensor.shape) for name, tensor in feeds.items()}, dtypes)
        refuse_gradients(self.contract.component, feeds)
        with torch.no_grad():
            return dict(zip((spec.name for spec in self.outputs), self.compute(*feeds.values()), strict=True))

    def __reduce__(self):
        raise TypeError("cannot pickle an engine")


def vae_facade(vae, *, rest=None, decoder=True, encoder=True):
    decode = PartSession(vae_contract(vae.config, "fp32", "vae_decoder"), lambda z: [vae.decode(z).sample])
    encode = PartSession(vae_contract(vae.config, "fp32", "vae_encoder"), lambda x: [vae._encode(x)])
    sessions = {"decoder": decode if decoder else None, "encoder": encode if encoder else None}
    return VaeFacade(vae.config, CPU, **sessions, rest=rest)


def text_facade(encoder):
    component = "text_encoder_2" if "Projection" in type(encoder).__name__ else "text_encoder"

    def compute(ids):
        result = encoder(ids, output_hidden_states=True)
        named = {"penultimate_hidden_state": result.hidden_states[-2], **result}
        return [named[spec.name] for spec in contract.outputs]

    contract = text_encoder_contract(encoder.config.to_dict(), "fp32", component)
    return TextEncoderFacade(PartSession(contract, compute), encoder.config.to_dict(), CPU, torch.float32)


@pytest.fixture(scope="module")
def originals():
    return {
        "unet": small_unet("sd1"),
        "vae": small_vae(),
        "text_encoder": small_text_encoder(),
        "text_encoder_2": small_text_encoder(projection=True),
    }


MAKE = {"unet": facade_of, "vae": vae_facade, "text_encoder": text_facade, "text_encoder_2": text_facade}
PARTS = tuple(MAKE)


@pytest.fixture
def facades(originals):
    """Their modules, none of a test before."""
    return {name: MAKE[name](original) for name, original in originals.items()}


# --- all that the originals have ------------------------------------------------------------------------------------

# What works, and how it may be called. A method of the originals that is neither here nor refused fails the test.
FORWARDS = {"unet": (LATENTS, 3, STATES), "vae": (PIXELS,), "text_encoder": (IDS,), "text_encoder_2": (IDS,)}
WORKS = {
    "forward": lambda facade, part: facade.forward(*FORWARDS[part]),
    "decode": lambda vae, _: vae.decode(LATENTS),
    "encode": lambda vae, _: vae.encode(PIXELS),
    "set_attention_slice": lambda unet, _: unet.set_attention_slice("auto"),
    "register_to_config": lambda facade, _: facade.register_to_config(sample_size=9),
    "to": lambda facade, _: facade.to("cpu", torch.float32),
    "float": lambda facade, _: facade.float(),
    "eval": lambda facade, _: facade.eval(),
    "train": lambda facade, _: facade.train(),
    "to_json_string": lambda facade, _: facade.to_json_string(),
    "cuda": None,  # as `to`, where there is a GPU
    "save_config": None,  # tests of their own
    "to_json_file": None,
    "set_use_memory_efficient_attention_xformers": None,
    **{
        name: lambda facade, _, name=name: getattr(facade, name)()
        for name in (
            "enable_tiling",
            "disable_tiling",
            "enable_slicing",
            "disable_slicing",
            "disable_freeu",
            "unfuse_qkv_projections",
            "disable_xformers_memory_efficient_attention",
        )
    },
}


def public(cls):
    """What a class has beside PyTorch's modules, or otherwise."""
    names = [name for name in dir(cls) if not name.startswith("_")]
    return [name for name in names if getattr(cls, name) is not getattr(torch.nn.Module, name, None)]


def asked(facade, part, name):
    """What becomes of a use of it: "refused", or what it gives."""
    try:
        found = getattr(facade, name)
        own = inspect.getattr_static(facade._original, name)
        if not inspect.isfunction(own):
            return found
        if name not in WORKS:
            found()
            pytest.fail(f"{name} is neither refused nor known to work")
        return WORKS[name] and WORKS[name](facade, part)
    except EngineError as error:
        return "refused" if "--component" in error.hint or "--backend" in error.hint else error


@pytest.mark.parametrize("part", PARTS)
def test_every_method_of_the_originals_works_or_is_refused_with_a_hint(part, originals, facades):
    """A method that diffusers adds is refused, as long as no facade has one of that name."""
    facade, names = facades[part], public(type(originals[part]))
    results = {name: asked(facade, part, name) for name in names}
    refused = {name for name, result in results.items() if isinstance(result, str) and result == "refused"}
    assert not refused & WORKS.keys()
    assert not [result for result in results.values() if isinstance(result, Exception)]
    assert results["config_class"] is transformers.CLIPTextConfig if "text" in part else results["config_name"]
    expected = {"half", "num_parameters", "get_memory_footprint", "save_pretrained", "add_adapter"}
    expected |= {"get_input_embeddings"} if "text" in part else {"enable_layerwise_casting", "attn_processors"}
    expected |= {"enable_freeu", "load_lora_adapter", "load_attn_procs"} if part == "unet" else set()
    assert expected <= refused


@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_there_is_absent_for_who_only_asks(part, facades):
    """diffusers asks by `hasattr`; private names and layers are the same."""
    for name in ("fuse_lora", "_load_ip_adapter_weights", "encoder_hid_proj", "down_blocks", "_hf_hook", "anything"):
        assert not hasattr(facades[part], name)
        assert getattr(facades[part], name, 3) == 3
        with pytest.raises(EngineError, match=f"the engine of the .* has no {name}"):
            getattr(facades[part], name)
    with pytest.raises(EngineError, match=r"has no conv_in\.weight|has no conv_in"):
        facades[part].get_parameter("conv_in.weight")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_configurations_are_diffusers_own(part, originals, facades, tmp_path):
    facade, original = facades[part], originals[part]
    facade.save_config(tmp_path)
    again = type(original).from_config(type(original).load_config(tmp_path))
    assert again.to_json_string() == original.to_json_string()
    assert type(facade.from_config(facade.config)) is type(original)
    facade.to_json_file(tmp_path / "other.json")
    assert facade.to_json_string() == original.to_json_string() == (tmp_path / "other.json").read_text()
    facade.register_to_config(sample_size=99)
    assert facade.config.sample_size == 99
    assert isinstance(facade.config, type(original.config))
    name = "in_channels"
    assert getattr(facade, name) == facade.config[name]
    assert not issubclass(type(facade), ConfigMixin)


@pytest.mark.parametrize("part", PARTS)
def test_a_loop_over_parameters_ends_and_the_first_one_is_an_error(part, facades):
    assert list(facades[part].parameters()) == []
    with pytest.raises(EngineError, match="has no parameters"):
        next(facades[part].parameters())
    with pytest.raises(EngineError, match="has no load_state_dict"):
        facades[part].load_state_dict({}, strict=False)


def test_a_vae_gives_what_the_original_gives(originals, facades):
    with torch.no_grad():
        for options in ({}, {"sample_posterior": True}, {"return_dict": False}):
            ours, theirs = (
                parts["vae"](PIXELS, **options, generator=torch.Generator().manual_seed(1))[0]
                for parts in (facades, originals)
            )
            torch.testing.assert_close(ours, theirs)


CONVERSIONS = {
    "half": lambda facade: facade.half(),
    "bfloat16": lambda facade: facade.bfloat16(),
    "to dtype": lambda facade: facade.to(torch.float16),
    "to device": lambda facade: facade.to("meta"),
    "both": lambda facade: facade.to("cpu", torch.float64),
    "like a tensor": lambda facade: facade.to(torch.zeros(1, dtype=torch.float16)),
    "type": lambda facade: facade.type(torch.float64),
    "to_empty": lambda facade: facade.to_empty(device="meta"),
}


@pytest.mark.parametrize("how", CONVERSIONS)
@pytest.mark.parametrize("part", PARTS)
def test_no_engine_changes_its_dtype_or_device(part, how, facades):
    with pytest.raises(EngineError, match="can't go from float32 on cpu to") as caught:
        CONVERSIONS[how](facades[part])
    assert "--precision" in caught.value.hint
    facade = facades[part]
    assert facade.to(memory_format=torch.channels_last) is facade is facade.to("cpu").float()
    assert (facade.dtype, facade.device) == (torch.float32, CPU)


# --- gradients --------------------------------------------------------------------------------------------------------


def by_autograd(call, tensor):
    return call(tensor.clone().requires_grad_())


def by_func(call, tensor):
    return torch.func.grad(lambda one: call(one).sum())(tensor)


def forward_mode(call, tensor):
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(tensor, torch.ones_like(tensor)))


CALLS = {
    "sample": lambda parts, tensor: parts["unet"](tensor, 3, STATES).sample,
    "encoder_hidden_states": lambda parts, tensor: parts["unet"](LATENTS, 3, tensor).sample,
    "timestep": lambda parts, tensor: parts["unet"](LATENTS, tensor, STATES).sample,
    "latent": lambda parts, tensor: parts["vae"].decode(tensor).sample,
    "image": lambda parts, tensor: parts["vae"].encode(tensor).latent_dist.mode(),
}
INPUTS = {
    "sample": LATENTS,
    "encoder_hidden_states": STATES,
    "timestep": torch.tensor(3.0),
    "latent": LATENTS,
    "image": PIXELS,
}


@pytest.mark.parametrize("way", [by_autograd, by_func, forward_mode])
@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_through_an_engine_is_refused(name, way, facades):
    call = partial(CALLS[name], facades)
    with pytest.raises(EngineError, match=name) as caught, torch.enable_grad():
        way(call, INPUTS[name])
    assert "no_grad" in caught.value.hint
    assert "--component" in caught.value.hint


@pytest.mark.parametrize("name", CALLS)
def test_where_no_gradient_is_recorded_inputs_may_require_one(name, facades, originals):
    """As in diffusers' pipelines; and frozen inputs where gradients are on."""
    tensor = INPUTS[name].clone().requires_grad_()
    with torch.no_grad():
        expected = CALLS[name](originals, tensor)
        torch.testing.assert_close(CALLS[name](facades, tensor), expected)
    with torch.enable_grad():
        result = CALLS[name](facades, tensor.detach())
        torch.testing.assert_close(result, expected)
        assert not result.requires_grad
        bias = torch.zeros((), requires_grad=True)
        (result + bias).sum().backward()  # gradients go on behind the engine
        assert bias.grad == result.numel()


# --- pipelines --------------------------------------------------------------------------------------------------------


@pytest.fixture
def swapped(originals, facades, tokenizer):
    """A pipeline of facades alone."""
    pipe = make_pipeline(facades["unet"], tokenizer)
    pipe.vae, pipe.text_encoder = facades["vae"], facades["text_encoder"]
    refuse_as_a_whole(pipe, ["unet", "text_encoder", "vae_decoder", "vae_encoder"])
    return pipe


@pytest.fixture
def plain(originals, tokenizer):
    pipe = make_pipeline(copy.deepcopy(originals["unet"]), copy.deepcopy(tokenizer))
    pipe.vae, pipe.text_encoder = copy.deepcopy(originals["vae"]), copy.deepcopy(originals["text_encoder"])
    return pipe


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_pipeline_runs_the_same_engines(how, swapped):
    expected = picture(swapped)
    copied = how(swapped)
    assert (copied.unet is swapped.unet) == (how is copy.copy)
    copied.scheduler.set_timesteps(9)
    np.testing.assert_array_equal(picture(copied), expected)
    assert copied.unet.session is swapped.unet.session
    alone = how(swapped.vae)
    alone.enable_tiling()
    assert alone is not swapped.vae
    assert not swapped.vae.use_tiling
    with pytest.raises(EngineError, match="save_pretrained"):
        copied.save_pretrained("never")


@pytest.mark.parametrize("part", PARTS)
def test_a_pickle_says_what_to_do_instead(part, facades):
    for call in (pickle.dumps, lambda facade: torch.save(facade, io.BytesIO())):
        with pytest.raises(EngineError, match="pickled") as caught:
            call(facades[part])
        assert "open it in the other process" in caught.value.hint


def test_what_watches_a_module_leaves_it_and_its_copies_alone(swapped):
    """Whatever was there before, and whoever copies it meanwhile."""
    seen, own = [], swapped.vae.decode
    swapped.vae.decode = own  # the user's own attribute
    finite = Finite()
    with finite.watching(swapped), hooked(swapped.unet, lambda *_: seen.append(1)):
        copied, alike = copy.deepcopy(swapped.unet), copy.copy(swapped.unet)
        picture(swapped, num_inference_steps=2)
        count = len(seen)
        copied(LATENTS, 3, STATES)
        alike(LATENTS, 3, STATES)
        assert pickle.loads(pickle.dumps(next(iter(swapped.unet._forward_hooks.values())))) is not None
    copied(LATENTS, 3, STATES)
    assert len(seen) == count >= 2
    assert swapped.vae.decode == own
    assert not swapped.vae.decoder._forward_hooks
    assert "vae_decoder" in finite.sources
    assert finite.first_bad() is None


TOKEN = {"<c>": torch.randn(32)}
PIPELINE_CALLS = {
    "disable_attention_slicing": {},
    "disable_freeu": {},
    "disable_xformers_memory_efficient_attention": {},
    "enable_attention_slicing": {},
    "enable_freeu": {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4},
    "enable_group_offload": {"onload_device": CPU},
    "enable_model_cpu_offload": {"device": "cpu"},
    "enable_sequential_cpu_offload": {"device": "cpu"},
    "enable_xformers_memory_efficient_attention": {},
    "fuse_qkv_projections": {},
    "load_ip_adapter": {
        "pretrained_model_name_or_path_or_dict": {"image_proj": {}, "ip_adapter": {}},
        "subfolder": "",
        "weight_name": "",
        "image_encoder_folder": None,
        "low_cpu_mem_usage": False,
    },
    "load_lora_weights": {"pretrained_model_name_or_path_or_dict": {}},
    "load_textual_inversion": {"pretrained_model_name_or_path": TOKEN, "token": "<c>"},
    "maybe_free_model_hooks": {},
    "remove_all_hooks": {},
    "set_ip_adapter_scale": {"scale": 0.5},
    "set_use_memory_efficient_attention_xformers": {"valid": True},
    "unfuse_qkv_projections": {},
    "unload_ip_adapter": {},
    "unload_textual_inversion": {},
    **{name: {} for name in ("disable_lora", "enable_lora", "enable_lora_hotswap", "unfuse_lora")},
    **{name: {} for name in ("get_active_adapters", "get_list_adapters", "unload_lora_weights")},
    **{name: {"adapter_names": "x"} for name in ("delete_adapters", "set_adapters")},
}
# Theirs have nothing to do with a part of the pipeline, or are called by other tests or by every picture; `fuse_lora`
# has nothing to fuse, as none can be loaded (without peft it is an error beside that).
NO_PARTS = """
check_inputs clip_skip components config config_name cross_attention_kwargs decode_latents device
do_classifier_free_guidance download dtype encode_image encode_prompt extract_init_dict from_config from_pipe
from_pretrained from_single_file fused_loras get_config_dict get_guidance_scale_embedding guidance_rescale
guidance_scale get_timesteps has_compatibles hf_device_map ignore_for_config interrupt load_config
load_lora_into_text_encoder load_lora_into_unet lora_scale lora_state_dict maybe_convert_prompt model_cpu_offload_seq
name_or_path num_fused_loras num_timesteps numpy_to_pil pack_weights parameters prepare_extra_step_kwargs
prepare_ip_adapter_image_embeds prepare_latents progress_bar push_to_hub register_for_auto_class register_modules
register_to_config reset_device_map run_safety_checker save_config save_lora_weights save_pretrained
set_attention_slice set_lora_device set_progress_bar_config text_encoder_name to to_json_file to_json_string unet_name
write_lora_layers upcast_vae denoising_end denoising_start enable_vae_slicing enable_vae_tiling disable_vae_slicing
disable_vae_tiling load_lora_into_transformer fuse_lora
""".split()  # noqa: SIM905
PIPELINES = [getattr(diffusers, f"StableDiffusion{kind}Pipeline") for kind in ("", "Img2Img", "XL", "XLImg2Img")]


def test_all_methods_of_pipelines_are_looked_at():
    names = {name for cls in PIPELINES for name in dir(cls) if not name.startswith("_")}
    assert names <= PIPELINE_CALLS.keys() | {*NO_PARTS}


def outcome(pipe, name):
    if not hasattr(type(pipe), name):
        return "nothing"
    try:
        getattr(pipe, name)(**PIPELINE_CALLS[name])
    except Exception as error:
        return error
    return "works"


@pytest.mark.parametrize("name", PIPELINE_CALLS)
def test_a_pipelines_method_does_what_it_does_without_engines_or_is_refused(name, swapped, plain):
    expected, got = outcome(plain, name), outcome(swapped, name)
    if isinstance(got, EngineError):
        assert "backend torch" in got.hint
        return
    assert type(got) is type(expected), (got, expected)
    assert str(got) == str(expected)


def test_a_refused_textual_inversion_leaves_the_tokenizer_alone(swapped):
    before = len(swapped.tokenizer)
    with pytest.raises(EngineError, match="get_input_embeddings"):
        swapped.load_textual_inversion(TOKEN, token="<c>")
    assert len(swapped.tokenizer) == before


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_lora_for_a_text_encoders_engine_is_refused(part, facades, monkeypatch):
    monkeypatch.setattr("diffusers.loaders.lora_base.USE_PEFT_BACKEND", True)  # refused before it is called
    layer = f"{part}.text_model.encoder.layers.0.self_attn.q_proj.lora"
    lora = {f"{layer}_A.weight": torch.zeros(4, 32), f"{layer}_B.weight": torch.zeros(32, 4)}
    load = diffusers.StableDiffusionXLPipeline.load_lora_into_text_encoder
    with pytest.raises(EngineError, match=f"engine of the {part} has no text_model") as caught:
        load(lora, network_alphas=None, text_encoder=facades[part], prefix=part)
    assert f"without {part}" in caught.value.hint


@pytest.mark.parametrize("name", AS_A_WHOLE)
def test_what_would_take_half_of_a_pipeline_is_refused_before_it_does_anything(name, swapped, tmp_path):
    method = getattr(swapped, name)
    assert inspect.signature(method) == inspect.signature(partial(getattr(type(swapped), name), swapped))
    with pytest.raises(EngineError, match=name) as caught:
        method(tmp_path / "saved")
    assert caught.value.hint == "open the pipeline with the backend torch"
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_of_another_class_takes_the_parts(swapped):
    """They are nobody's own: img2img with the same engines."""
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(swapped)
    other.set_progress_bar_config(disable=True)
    assert other.unet is swapped.unet
    assert picture(other, img2img=True).shape == (1, 72, 88, 3)
    with pytest.raises(EngineError, match="float16"):
        other.to(torch.float16)


# --- the ways that hints name -----------------------------------------------------------------------------------------


@pytest.fixture
def spec(smallest):
    return PipelineSpec(
        resolve_model(ModelSpec(str(smallest))), "onnxruntime", "fp32", Sizes(2, 64, 64), steps=2, scheduler="euler"
    )


def opened(spec, engine_dir, **changes):
    return open_pipeline(replace(spec, **changes), EngineDirectory(engine_dir), QUIET)


SMALL_CALL = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}


def test_grad_mode_is_the_callers_own(spec, engine_dir):
    first, second = (opened(spec, engine_dir, backend="torch") for _ in range(2))
    with torch.enable_grad():
        one, _two = first.__enter__(), second.__enter__()
        assert torch.is_grad_enabled()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
        assert torch.is_grad_enabled()
        modules = [part for part in one.pipe.components.values() if isinstance(part, torch.nn.Module)]
        assert len(modules) == 3
        assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
        sample = LATENTS.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(one.pipe.unet(sample, 3, STATES).sample.sum(), sample)
        assert gradient.abs().max() > 0
    with torch.no_grad(), opened(spec, engine_dir, backend="torch"):
        assert not torch.is_grad_enabled()


def test_a_unet_in_pytorch_does_what_its_engine_refuses(spec, engine_dir):
    """And gradients pass."""
    with opened(spec, engine_dir, components=("text_encoder", "vae_decoder")) as running:
        pipe = running.pipe
        before = pipe("red", **SMALL_CALL, generator=torch.Generator().manual_seed(1)).images
        pipe.enable_freeu(s1=0.5, s2=0.5, b1=1.5, b2=1.5)
        pipe.unet.set_default_attn_processor()
        assert pipe.unet.num_parameters() > 5e5
        after = pipe("red", **SMALL_CALL, generator=torch.Generator().manual_seed(1)).images
        assert np.abs(after - before).max() > 0.001
        with pytest.raises(EngineError, match="text_encoder"):
            pipe.text_encoder.resize_token_embeddings(3)


def test_a_text_encoder_in_pytorch_learns_words(spec, engine_dir):
    with opened(spec, engine_dir, components=("vae_decoder",)) as running:
        pipe = running.pipe
        pipe.load_textual_inversion({"<c>": torch.randn(32)}, token="<c>")
        assert pipe("a <c>", **SMALL_CALL).images.shape == (1, 64, 64, 3)


def test_a_vaes_half_in_pytorch_is_tiled(originals):
    rest = copy.deepcopy(originals["vae"])
    facade = vae_facade(originals["vae"], rest=rest, decoder=False)
    latents = torch.randn(2, 4, 40, 40)
    whole = facade.decode(latents).sample
    facade.enable_tiling()
    facade.enable_slicing()
    assert rest.use_tiling
    assert rest.use_slicing
    tiled = facade.decode(latents).sample
    assert (tiled - whole).abs().max() > 1e-4  # tiles of this VAE are of 16 latents
    facade.disable_tiling()
    facade.disable_slicing()
    torch.testing.assert_close(facade.decode(latents).sample, whole)


@pytest.mark.parametrize("base", [diffusers.StableDiffusionPipeline, diffusers.AutoPipelineForImage2Image])
def test_pipelines_made_of_one_with_engines_are_not_saved_without_what_engines_have(swapped, base, tmp_path):
    other = base.from_pipe(swapped)
    assert other.unet is swapped.unet
    with pytest.raises(EngineError, match="has no save_pretrained") as caught:
        other.save_pretrained(tmp_path)
    assert "with the backend torch" in caught.value.hint
    assert not (tmp_path / "model_index.json").exists()


@pytest.mark.parametrize("name", ["config_name", "compatibles", "push_to_hub", "_compatibles", "_upload_folder"])
def test_facades_have_no_names_of_a_scheduler(swapped, name):
    for part in (swapped.unet, swapped.vae, swapped.text_encoder):
        assert getattr(part, name, None) is getattr(part._original, name, None) or not hasattr(part, name)
    assert swapped.unet.from_pretrained == diffusers.UNet2DConditionModel.from_pretrained


def test_the_torch_backend_saves_the_whole_pipeline(spec, engine_dir, tmp_path):
    with opened(spec, engine_dir, backend="torch") as running:
        running.pipe.save_pretrained(tmp_path)
        running.pipe.to(torch.float32)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert again.unet.num_parameters() == running.pipe.unet.num_parameters()
