"""Textual inversion: longer token tables on live pipelines and in the commands, against plain diffusers."""

from __future__ import annotations

from itertools import pairwise

import factories
import pytest
import torch
import torch_engines
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from test_lora import random_adapter

import sdtrt
from sdtrt.common.errors import EngineError
from sdtrt.pipeline.parts import parked

pytestmark = pytest.mark.usefixtures("on_the_cpu")
TOLERANCE = 1e-4  # of latents in fp32 on the CPU
TEXT = "a <cat> circle"


@pytest.fixture
def make(tmp_path):
    """Make a pipeline in memory, the same one each time, with tokenizers of its own."""

    def made(kind="sd1"):
        tokenizer = factories.write_tokenizer(tmp_path / "tokenizer")
        if kind == "sd1":
            return factories.live_pipeline(StableDiffusionPipeline, kind, tokenizer)
        second = factories.write_tokenizer(tmp_path / "tokenizer_2")
        return factories.live_pipeline(StableDiffusionXLPipeline, kind, tokenizer, tokenizer_2=second)

    return made


def latents(pipe, prompt=TEXT, **options):
    given = {"num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 64}
    return pipe(prompt, **{**given, **options, "generator": torch.Generator().manual_seed(3)}).images


def differ(found, expected):
    return float((found - expected).abs().max())


def vectors(count, width=32, seed=7):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def with_tokens(pipe):
    """The pipeline with two textual inversions, of one vector and of three."""
    pipe.load_textual_inversion(vectors(3), token="<cat>")
    pipe.load_textual_inversion({"<dog>": vectors(1, seed=8)[0]})
    return pipe


@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
@pytest.mark.feature("Textual inversion", "sd1", "onnxruntime inductor")
def test_tokens_come_to_a_live_pipeline_and_go_without_a_build(make, backend, engine_dir, monkeypatch, capsys):
    if backend == "inductor":
        torch_engines.instead_of_inductor(monkeypatch)
    pipe = make()
    plain = latents(pipe)
    options = {"backend": backend, "engine_dir": engine_dir, "height": 64, "width": 64, "on_miss": "error"}
    options |= {"components": ("text_encoder",)} if backend == "onnxruntime" else {}  # whose UNet's takes seconds
    sdtrt.accelerate(pipe, **options)
    before = latents(pipe)
    assert differ(before, plain) <= TOLERANCE
    expected = latents(with_tokens(make()), TEXT + " <dog>")
    with_tokens(pipe)
    capsys.readouterr()
    found = latents(pipe, TEXT + " <dog>")
    assert differ(found, expected) <= TOLERANCE
    assert differ(found, before) > 100 * TOLERANCE
    latents(pipe)
    assert capsys.readouterr().err.count("text_encoder: PyTorch runs it, as its token table is another one") == 1
    pipe.unload_textual_inversion("<dog>")
    assert differ(latents(pipe), latents(with_tokens(make()))) <= TOLERANCE
    pipe.unload_textual_inversion()
    assert torch.equal(latents(pipe), before)
    monkeypatch.setattr(type(pipe.text_encoder), "forward", None)  # the engine runs it again
    assert torch.equal(latents(pipe), before)
    names = sdtrt.status(pipe)["text_encoder"].engines
    sdtrt.accelerate(pipe, **options)
    assert sdtrt.status(pipe)["text_encoder"].engines == names
    monkeypatch.undo()
    sdtrt.restore(pipe)
    assert torch.equal(latents(pipe), plain)


@pytest.mark.feature("Textual inversion", "sdxl", "onnxruntime")
def test_both_encoders_of_sdxl_look_tokens_up_in_pytorch(make, engine_dir):
    def grown(pipe):
        for number, end in enumerate(("", "_2")):
            own = {"text_encoder": getattr(pipe, f"text_encoder{end}"), "tokenizer": getattr(pipe, f"tokenizer{end}")}
            pipe.load_textual_inversion(vectors(2, seed=number), token="<cat>", **own)
        return pipe

    pipe, components = make("sdxl"), ("text_encoder", "text_encoder_2")
    sdtrt.accelerate(pipe, backend="onnxruntime", engine_dir=engine_dir, components=components, progress=False)
    assert differ(latents(grown(pipe)), latents(grown(make("sdxl")))) <= TOLERANCE


def test_another_table_of_the_same_size_is_told(make, engine_dir):
    pipe = make()
    components = ("text_encoder",)
    sdtrt.accelerate(pipe, backend="onnxruntime", engine_dir=engine_dir, components=components, progress=False)
    latents(pipe)
    old = pipe.text_encoder.get_input_embeddings()
    new = torch.nn.Embedding(*old.weight.shape)
    pipe.text_encoder.set_input_embeddings(new)
    with pytest.raises(EngineError, match="the text_encoder has other weights than its engine"):
        latents(pipe)
    with torch.no_grad():
        new.weight.copy_(old.weight)
    latents(pipe)


def test_an_engine_of_a_longer_table_can_be_had(make, engine_dir):
    pipe = with_tokens(make())
    expected = latents(pipe)
    components = ("text_encoder",)
    sdtrt.accelerate(pipe, backend="onnxruntime", engine_dir=engine_dir, components=components, progress=False)
    assert sdtrt.status(pipe)["text_encoder"].is_in_engine
    assert differ(latents(pipe), expected) <= TOLERANCE


def test_weights_that_left_the_gpu_come_back_for_more_tokens(make, engine_dir, monkeypatch):
    """Here another dtype stands for the host's memory."""
    pipe, components = make(), ("text_encoder",)
    monkeypatch.setattr(parked, "is_on_gpu", lambda tensor: tensor.dtype == torch.float32)
    monkeypatch.setattr(parked, "to_host", lambda data: data.double())
    monkeypatch.setattr(parked, "to_device", lambda data, device: data.float())
    before = latents(pipe)
    sdtrt.accelerate(pipe, backend="onnxruntime", engine_dir=engine_dir, components=components, progress=False)
    assert any(one.dtype == torch.float64 for one in pipe.text_encoder.parameters())
    expected = latents(with_tokens(make()))
    assert differ(latents(with_tokens(pipe)), expected) <= TOLERANCE
    assert all(one.dtype == torch.float32 for one in pipe.text_encoder.parameters())
    pipe.unload_textual_inversion()
    assert differ(latents(pipe), before) <= TOLERANCE


def test_an_adapter_of_a_text_encoder_stays_beside_more_tokens(make, engine_dir, monkeypatch):
    torch_engines.instead_of_inductor(monkeypatch)
    found = {}
    for name in ("plain", "engines"):
        pipe = make()
        if name == "engines":
            sdtrt.accelerate(pipe, backend="inductor", engine_dir=engine_dir, height=64, width=64, progress=False)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        bare, state = latents(pipe), random_adapter(pipe.text_encoder, config, 1)
        inject_adapter_in_model(config, pipe.text_encoder, adapter_name="one")
        set_peft_model_state_dict(pipe.text_encoder, state, adapter_name="one")
        found[name] = [bare, latents(pipe), latents(with_tokens(pipe))]
        pipe.unload_textual_inversion()
        found[name].append(latents(pipe))
    assert all(differ(one, other) <= TOLERANCE for one, other in zip(*found.values(), strict=True))
    assert all(differ(one, other) > 100 * TOLERANCE for one, other in pairwise(found["plain"]))
