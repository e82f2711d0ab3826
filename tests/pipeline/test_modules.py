"""The UNet facade inside diffusers' own pipelines, against the same pipelines untouched."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping

import diffusers
import numpy as np
import pytest
import torch
from factories import SMALLEST, small_text_encoder, small_unet, small_vae
from PIL import Image

from sdtrt.backends import unchanged
from sdtrt.backends.onnxruntime.session import OnnxRuntimeSession
from sdtrt.backends.session import Session, check_feeds
from sdtrt.common.errors import EngineError
from sdtrt.exports.component import write_onnx
from sdtrt.pipeline.parts import forwards
from sdtrt.pipeline.parts.facades import TextEncoderFacade, UNetFacade, VaeFacade
from sdtrt.specs.contract import CONDITIONING, text_encoder_contract, unet_contract, vae_contract

CPU = torch.device("cpu")
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


class TorchSession:
    """A session that runs a PyTorch UNet, with the checks of a real one; remembers what it was fed."""

    def __init__(self, unet, precision="fp32"):
        self.unet = unet
        self.contract = unet_contract(dict(unet.config), precision)
        self.fed: list[Mapping[str, torch.Tensor]] = []

    @property
    def inputs(self):
        return self.contract.inputs

    @property
    def outputs(self):
        return self.contract.outputs

    def run(self, feeds):
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in feeds.items()}
        check_feeds(self.inputs, {name: tuple(tensor.shape) for name, tensor in feeds.items()}, dtypes)
        self.fed.append(feeds)
        added = {name: feeds[name] for name in ("text_embeds", "time_ids") if name in feeds}
        given, guidance = (
            (feeds["sample"], feeds["timestep"], feeds["encoder_hidden_states"]),
            feeds.get("timestep_cond"),
        )
        with torch.no_grad():
            result = self.unet(*given, timestep_cond=guidance, added_cond_kwargs=added or None).sample
        return {"out_sample": result}

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def facade_of(unet, precision="fp32"):
    session = TorchSession(unet, precision)
    return UNetFacade(session, session.contract, dict(unet.config), CPU)


@pytest.fixture(scope="module")
def unets():
    return {kind: small_unet(kind) for kind in ("sd1", "sd2", "sdxl")}


def make_pipeline(unet, tokenizer, *, img2img=False, scheduler=None):
    """diffusers' own pipeline for what kind of UNet it is given."""
    scheduler = scheduler or diffusers.PNDMScheduler(**SCHEDULE, skip_prk_steps=True)
    parts = {"vae": small_vae(), "text_encoder": small_text_encoder(), "tokenizer": tokenizer, "unet": unet}
    if unet.config.addition_embed_type == "text_time":
        parts |= {"text_encoder_2": small_text_encoder(seed=1, projection=True), "tokenizer_2": tokenizer}
        name = "StableDiffusionXLImg2ImgPipeline" if img2img else "StableDiffusionXLPipeline"
        parts |= {"add_watermarker": False}
    else:
        name = "StableDiffusionImg2ImgPipeline" if img2img else "StableDiffusionPipeline"
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, name)(scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, *, img2img=False, **overrides):
    """A seeded call of a pipeline, as floats."""
    arguments = {"prompt": "red on blue", "negative_prompt": "blue", "num_inference_steps": 4, "output_type": "np"}
    arguments["generator"] = torch.Generator().manual_seed(7)
    if img2img:
        pixels = np.random.default_rng(0).integers(0, 255, (72, 88, 3), dtype=np.uint8)
        arguments |= {"image": Image.fromarray(pixels), "strength": 0.6}
    else:
        arguments |= {"height": 72, "width": 88}
    return pipe(**{**arguments, **overrides}).images


@pytest.mark.parametrize("img2img", [False, True], ids=["txt2img", "img2img"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_pipeline_with_facade_equals_the_untouched_pipeline(kind, img2img, unets, tokenizer):
    untouched = picture(make_pipeline(unets[kind], tokenizer, img2img=img2img), img2img=img2img)
    swapped = picture(make_pipeline(facade_of(unets[kind]), tokenizer, img2img=img2img), img2img=img2img)
    assert untouched.std() > 0.01  # a picture, not one colour
    np.testing.assert_allclose(swapped, untouched, atol=1e-4)  # convolutions round by memory layout


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "LCMScheduler"])
def test_fractional_and_other_timesteps_reach_the_engine_as_float32(name, unets, tokenizer):
    scheduler = getattr(diffusers, name)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    facade = facade_of(unets["sd1"])
    untouched = picture(make_pipeline(unets["sd1"], tokenizer, scheduler=copy.deepcopy(scheduler)))
    swapped = picture(make_pipeline(facade, tokenizer, scheduler=scheduler))
    np.testing.assert_allclose(swapped, untouched, atol=1e-5)
    assert all(feeds["timestep"].dtype == torch.float32 for feeds in facade.session.fed)
    assert all(feeds["timestep"].shape == (2,) for feeds in facade.session.fed)


def test_without_guidance_the_batch_is_one(unets, tokenizer):
    facade = facade_of(unets["sd1"])
    picture(make_pipeline(facade, tokenizer), guidance_scale=1.0)
    assert {tuple(feeds["sample"].shape) for feeds in facade.session.fed} == {(1, 4, 9, 11)}


@pytest.mark.slow
def test_an_onnx_runtime_session_gives_the_same_picture(unets, tokenizer, tmp_path):
    unet, path = unets["sd1"], tmp_path / "unet.onnx"
    contract = unet_contract(unet.config, "fp32")
    write_onnx(unet, contract, path)
    with OnnxRuntimeSession(path, contract, threads=1, optimized=False) as session:
        facade = UNetFacade(session, contract, unet.config, CPU)
        for img2img in (False, True):
            untouched = picture(make_pipeline(unet, tokenizer, img2img=img2img), img2img=img2img)
            swapped = picture(make_pipeline(facade, tokenizer, img2img=img2img), img2img=img2img)
            np.testing.assert_allclose(swapped, untouched, atol=1e-3)


def test_casts_to_the_engine_and_back(unets):
    session = TorchSession(unets["sd1"], "bf16")
    session.unet = copy.deepcopy(unets["sd1"]).bfloat16()
    facade = UNetFacade(session, session.contract, unets["sd1"].config, CPU)
    sample, states = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    noise = facade(sample, 3, states, return_dict=False)[0]
    assert noise.dtype == torch.float32
    fed = session.fed[0]
    assert (fed["sample"].dtype, fed["encoder_hidden_states"].dtype) == (torch.bfloat16, torch.bfloat16)
    assert fed["timestep"].dtype == torch.float32
    assert facade.dtype == torch.bfloat16


@pytest.fixture
def seen(monkeypatch):
    """Changes of tensors on the CPU are taken to be seen, as they are on a GPU."""
    monkeypatch.setattr(unchanged, "HOST", "none")


class NoisySession(TorchSession):
    """Gives noise at once, of any precision."""

    def run(self, feeds):
        self.fed.append(feeds)
        return {"out_sample": torch.randn_like(feeds["sample"])}


def noisy_facade(unet, precision):
    session = NoisySession(unet, precision)
    return UNetFacade(session, session.contract, dict(unet.config), CPU)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_denoising_loop_feeds_the_same_conditioning_tensors(kind, precision, unets, tokenizer, seen):
    """The session tells by the object that it need not copy: diffusers' own, or one cast of it for all steps."""
    facade = noisy_facade(unets[kind], precision)
    pipe = make_pipeline(facade, tokenizer)
    for _ in range(2):
        picture(pipe, output_type="latent")
    names = [name for name in facade.session.fed[0] if name in CONDITIONING]
    assert len(names) == {"sd1": 1, "sdxl": 3}[kind]
    for name in names:
        tensors = [feeds[name] for feeds in facade.session.fed]
        steps = len(tensors) // 2
        assert steps >= 4
        assert len({id(tensor) for tensor in tensors[:steps]}) == 1, name
        assert len({id(tensor) for tensor in tensors}) == 2, "another call has its own"
    latents = [feeds["sample"] for feeds in facade.session.fed]
    assert len({id(tensor) for tensor in latents}) == len(latents)


@pytest.mark.parametrize("change", ["in place", "another tensor", "inference mode", "another stream", "on the CPU"])
def test_conditioning_is_cast_anew(change, unets, seen, monkeypatch):
    facade = noisy_facade(unets["sd1"], "fp16")
    sample, states = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)

    def fed():
        facade(sample, 3, states)
        tensor = facade.session.fed[-1]["encoder_hidden_states"]
        assert torch.equal(tensor, states.half())
        return tensor

    first = fed()
    assert fed() is first
    if change == "in place":
        states += 1
    elif change == "another tensor":
        states = states.clone()
    elif change == "inference mode":
        with torch.inference_mode():
            states = states.clone()
            assert fed() is not fed()
            states += 1
    elif change == "another stream":
        monkeypatch.setattr(forwards, "_current_stream", lambda device: 7)
    else:
        monkeypatch.setattr(unchanged, "HOST", "cpu")
        states = states.clone()
        first = fed()
        states.numpy()[...] += 1
    assert fed() is not first


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_the_last_cast_is_kept_and_no_tensor_of_the_pipelines(precision, unets, seen):
    facade = noisy_facade(unets["sd1"], precision)
    kept = []
    for _ in range(3):
        states = torch.randn(1, 77, 32)
        facade(torch.randn(1, 4, 8, 8), 3, states)
        kept += [weakref.ref(states), weakref.ref(facade.session.fed.pop()["encoder_hidden_states"])]
        del states
    assert [tensor() is not None for tensor in kept] == [False] * 5 + [precision == "fp16"]


@pytest.mark.parametrize(
    "timestep",
    [981, 980.5, torch.tensor(981), torch.tensor(980.5, dtype=torch.float64), torch.tensor([7]), torch.tensor([7, 9])],
    ids=["int", "float", "scalar int64", "scalar float64", "one", "one a row"],
)
def test_takes_every_form_of_timestep(timestep, unets):
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    expected = unets["sd1"](sample, timestep, states).sample
    torch.testing.assert_close(facade_of(unets["sd1"])(sample, timestep, states).sample, expected)


def test_returns_a_tuple_or_an_output_with_sample(unets):
    arguments = (torch.randn(1, 4, 8, 8), 5, torch.randn(1, 77, 32))
    facade = facade_of(unets["sd1"])
    assert isinstance(facade(*arguments, return_dict=False), tuple)
    torch.testing.assert_close(facade(*arguments).sample, facade(*arguments, return_dict=False)[0])


def test_a_guidance_embedding_is_an_input_of_consistency_models(unets):
    """One for all rows, one a row, or none."""
    unet = small_unet("sd1", **SMALLEST["sd1"], time_cond_proj_dim=8)
    facade, given = facade_of(unet), (torch.randn(2, 4, 8, 8), torch.tensor(5), torch.randn(2, 77, 32))
    seen = []
    for one in (None, torch.randn(1, 8), torch.randn(2, 8)):
        seen.append(unet(*given, timestep_cond=one).sample)
        torch.testing.assert_close(facade(*given, timestep_cond=one).sample, seen[-1])
    assert (seen[0] - seen[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "argument",
    [
        {"class_labels": torch.zeros(1)},
        {"timestep_cond": torch.zeros(1, 8)},
        {"attention_mask": torch.ones(1, 77)},
        {"encoder_attention_mask": torch.ones(1, 77)},
        {"cross_attention_kwargs": {"scale": 0.5}},
        {"down_block_additional_residuals": (torch.zeros(1),)},
        {"mid_block_additional_residual": torch.zeros(1)},
        {"down_intrablock_additional_residuals": (torch.zeros(1),)},
        {"added_cond_kwargs": {"image_embeds": torch.zeros(1)}},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_refuses_by_name_what_the_engine_has_no_input_for(argument, unets):
    name = "image_embeds" if "added_cond_kwargs" in argument else next(iter(argument))
    with pytest.raises(EngineError, match=name) as caught:
        facade_of(unets["sd1"])(torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 77, 32), **argument)
    assert "--backend torch" in caught.value.hint


def test_sdxl_without_its_added_conditioning_is_refused(unets):
    embeds = {"text_embeds": torch.zeros(1, 32)}
    with pytest.raises(EngineError, match="time_ids"):
        facade_of(unets["sdxl"])(torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 77, 64), added_cond_kwargs=embeds)


def test_latents_that_the_engine_does_not_take_are_refused(unets):
    with pytest.raises(EngineError, match="sample"):
        facade_of(unets["sd1"])(torch.zeros(1, 9, 8, 8), 5, torch.zeros(1, 77, 32))


def test_old_configurations_get_the_defaults_of_the_class(unets):
    session = TorchSession(unets["sd1"])
    old = {"in_channels": 4, "sample_size": 64, "_diffusers_version": "0.2.2"}  # SD 1.4's file has no newer entries
    config = UNetFacade(session, session.contract, old, CPU).config
    assert config.time_cond_proj_dim is None
    assert config.addition_embed_type is None
    assert config.sample_size == 64
    assert config["_diffusers_version"] == "0.2.2"


def test_holds_no_weights(unets):
    facade = facade_of(unets["sd1"])
    assert list(facade.parameters()) == []
    assert list(facade.state_dict()) == []


# Text encoders and VAE


def text_facade(module, path, *, dtype=torch.float32, precision="fp32"):
    """A text encoder's facade on ONNX Runtime."""
    component = "text_encoder_2" if "Projection" in type(module).__name__ else "text_encoder"
    config = module.config.to_dict()
    contract = text_encoder_contract(config, precision, component)
    write_onnx(torch.nn.Module.to(copy.deepcopy(module), getattr(torch, contract.outputs[0].dtype)), contract, path)
    return TextEncoderFacade(OnnxRuntimeSession(path, contract, threads=1, optimized=False), config, CPU, dtype)


def vae_session(vae, component, path, precision="fp32"):
    contract = vae_contract(vae.config, precision, component)
    write_onnx(torch.nn.Module.to(copy.deepcopy(vae), getattr(torch, contract.outputs[0].dtype)), contract, path)
    return OnnxRuntimeSession(path, contract, threads=1, optimized=False)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The VAE of the tests' pipelines, and the sessions of its halves."""
    vae, folder = small_vae(), tmp_path_factory.mktemp("vae")
    return vae, {half: vae_session(vae, f"vae_{half}", folder / f"{half}.onnx") for half in ("decoder", "encoder")}


@pytest.mark.parametrize("img2img", [False, True], ids=["txt2img", "img2img"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_pipeline_of_nothing_but_facades_equals_the_untouched_one(kind, img2img, unets, tokenizer, tmp_path, halves):
    pipe = make_pipeline(unets[kind], tokenizer, img2img=img2img)
    untouched = picture(pipe, img2img=img2img)
    pipe = make_pipeline(facade_of(unets[kind]), tokenizer, img2img=img2img)
    for name in [name for name in pipe.components if name.startswith("text_encoder")]:
        encoder = getattr(pipe, name)
        setattr(pipe, name, text_facade(encoder, tmp_path / f"{name}.onnx"))
    vae, sessions = halves
    pipe.vae = VaeFacade(vae.config, CPU, decoder=sessions["decoder"], encoder=sessions["encoder"] if img2img else None)
    assert (
        sum(
            parameter.numel()
            for part in pipe.components.values()
            if isinstance(part, torch.nn.Module) and part is not pipe.unet
            for parameter in part.parameters()
        )
        == 0
    )
    np.testing.assert_allclose(picture(pipe, img2img=img2img), untouched, atol=1e-3)


@pytest.mark.parametrize("half", ["decoder", "encoder"])
def test_the_other_half_of_a_vae_stays_pytorchs(half, halves):
    vae, sessions = halves
    rest = copy.deepcopy(vae)
    setattr(rest, half, None)  # as a pipeline leaves it
    facade = VaeFacade(vae.config, CPU, **{half: sessions[half]}, rest=rest)
    latents, pixels = torch.randn(1, 4, 9, 11), torch.rand(1, 3, 72, 88)
    with torch.no_grad():
        torch.testing.assert_close(facade.decode(latents).sample, vae.decode(latents).sample, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(facade.decode(latents, return_dict=False)[0], facade.decode(latents).sample)
        distributions = facade.encode(pixels).latent_dist, facade.encode(pixels, return_dict=False)[0]
        for got in distributions:
            wanted = vae.encode(pixels).latent_dist
            torch.testing.assert_close(got.parameters, wanted.parameters, atol=1e-4, rtol=1e-3)
            same = [d.sample(torch.Generator().manual_seed(1)) for d in (got, wanted)]
            torch.testing.assert_close(*same, atol=1e-4, rtol=1e-3)


def test_a_decoder_in_fp32_is_not_narrowed_by_fp16_latents(halves):
    """SDXL's: the pipeline need not widen it, and what it gives keeps its precision."""
    vae, sessions = halves
    facade = VaeFacade({**vae.config, "force_upcast": True}, CPU, decoder=sessions["decoder"])
    assert facade.dtype == torch.float32
    assert facade.config.force_upcast
    image = facade.decode(torch.randn(1, 4, 8, 8).half()).sample
    assert image.dtype == torch.float32
    assert (image != image.half().float()).any()


def test_a_vae_in_fp16_gives_what_the_pipeline_computes_in(halves, tmp_path):
    session = vae_session(halves[0], "vae_encoder", tmp_path / "fp16.onnx", "fp16")
    facade = VaeFacade(halves[0].config, CPU, encoder=session)
    assert facade.dtype == torch.float16
    assert facade.encode(torch.rand(1, 3, 64, 64)).latent_dist.parameters.dtype == torch.float32
    assert halves[0].config.force_upcast
    assert not facade.config.force_upcast, "SDXL's pipelines would want to widen it, which no engine can be"


@pytest.mark.parametrize(("precision", "widened"), [("fp32", True), ("fp16", False), ("bf16", False)])
@pytest.mark.parametrize("half", ["decoder", "encoder"])
def test_sdxls_pipelines_do_not_widen_what_no_engine_can_be_widened_to(halves, half, precision, widened):
    """Where a configuration asks for it, their img2img does so whatever the dtype is."""

    class InPrecision(Session):
        contract = vae_contract(halves[0].config, precision, f"vae_{half}")

    facade = VaeFacade({**halves[0].config, "force_upcast": True}, CPU, **{half: InPrecision()})
    assert facade.config.force_upcast == widened
    assert facade.dtype == getattr(torch, InPrecision.contract.outputs[0].dtype)
    if widened:
        facade.to(torch.float32)


def test_a_half_that_is_not_there_is_named(halves):
    vae, sessions = halves
    facade = VaeFacade(vae.config, CPU, decoder=sessions["decoder"])
    with pytest.raises(EngineError, match="without the VAE's encoder") as caught:
        facade.encode(torch.rand(1, 3, 64, 64))
    assert "img2img" in caught.value.hint


def test_an_old_vaes_configuration_gets_the_defaults_of_the_class(halves):
    config = VaeFacade({"block_out_channels": [8, 16]}, CPU, decoder=halves[1]["decoder"]).config
    assert (config.scaling_factor, config.latents_mean, config.force_upcast) == (0.18215, None, True)


def test_a_text_encoder_gives_the_pipelines_dtype_and_takes_any_ids(tmp_path):
    encoder = small_text_encoder()
    facade = text_facade(encoder, tmp_path / "text.onnx", dtype=torch.float64, precision="fp16")
    ids = torch.randint(0, 500, (2, 77))
    with torch.no_grad():
        expected = encoder(ids).last_hidden_state
    for given in (ids, ids.int()):
        got = facade(given, attention_mask=None)
        assert (got[0].dtype, facade.dtype) == (torch.float64, torch.float64)
        torch.testing.assert_close(got[0].float(), expected, atol=2e-2, rtol=1e-2)
    assert got.last_hidden_state is got[0]
    assert not hasattr(got, "text_embeds")
    assert facade.config.hidden_size == encoder.config.hidden_size


def test_what_a_text_encoders_engine_does_not_give_is_refused(unets, tokenizer, tmp_path):
    facade = text_facade(small_text_encoder(), tmp_path / "text.onnx")
    ids = torch.zeros(1, 77, dtype=torch.int64)
    for argument in ({"attention_mask": torch.ones(1, 77)}, {"position_ids": ids}, {"output_attentions": True}):
        with pytest.raises(EngineError, match=next(iter(argument))):
            facade(ids, **argument)
    with pytest.raises(EngineError, match=r"hidden states -3"):
        _ = facade(ids, output_hidden_states=True).hidden_states[-3]
    with pytest.raises(EngineError, match="input_ids must have the shape"):
        facade(ids[:, :50])
    pipe = make_pipeline(unets["sd1"], tokenizer)
    pipe.text_encoder = facade
    with pytest.raises(EngineError, match="does not give") as caught:
        picture(pipe, clip_skip=1)
    assert "clip_skip" in caught.value.hint
