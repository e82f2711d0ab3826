"""A VAE of the user's own in the place of the model's: every form of it, full and tiny, and in engines."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import factories
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from factories import small_tiny_vae, small_vae
from PIL import Image
from safetensors.torch import save_file

from sdtrt.backends.onnxruntime.session import OnnxRuntimeSession
from sdtrt.common.console import Console
from sdtrt.common.errors import ModelError, SdtrtError, UsageError
from sdtrt.common.files import sha256_file
from sdtrt.exports.component import write_onnx
from sdtrt.exports.parity import check_onnx
from sdtrt.models.components import contract_of, precision_of
from sdtrt.models.loading import check_part, load_parts
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.parts.facades import VaeFacade
from sdtrt.specs import ModelSpec, Sizes
from sdtrt.specs.contract import vae_contract

CPU = torch.device("cpu")
SIZES = Sizes(3, 72, 104)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of two kinds, and VAEs in every form that they are handed about in; tests must not change them."""
    path = tmp_path_factory.mktemp("vaes")
    factories.sd1_folder(path / "sd1", **factories.SMALL)
    factories.sd1_single_file(path / "sd1.safetensors", **factories.SMALL)
    factories.sdxl_folder(path / "sdxl", **factories.SMALLEST["sdxl"])
    factories.vae_folder(path / "full", small_vae(seed=5))
    factories.vae_folder(path / "whole model" / "vae", small_vae(seed=5))
    factories.vae_file(path / "original.safetensors", small_vae(seed=5))
    factories.vae_file(path / "inside.safetensors", small_vae(seed=5), prefix="first_stage_model.")
    factories.vae_folder(path / "tiny", small_tiny_vae(seed=5))
    return path


def resolve(models: Path, vae: str | None, name: str = "sd1", console: Console | None = None):
    spec = ModelSpec(str(models / name), config=str(models / "sd1") if name.endswith("safetensors") else None)
    spec = ModelSpec(spec.name, config=spec.config, vae=vae and str(models / vae))
    return resolve_model(spec) if console is None else resolve_model(spec, console)


def fingerprint(models: Path, vae: str | None, part: str = "vae") -> str:
    return resolve(models, vae).fingerprint(part, sha256_file)


FORMS = (
    "full",
    "whole model",
    "original.safetensors",
    "inside.safetensors",
    "full/diffusion_pytorch_model.safetensors",
)
TINY_FORMS = ("tiny", "tiny/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", ["sd1", "sd1.safetensors"])
@pytest.mark.parametrize("vae", [*FORMS, *TINY_FORMS])
def test_every_form_of_a_vae_is_read(models, name, vae):
    model = resolve(models, vae, name)
    check_part(model, "vae")
    loaded = load_parts(model, ("vae",), torch.float16)["vae"]
    expected = small_tiny_vae(seed=5) if vae in TINY_FORMS else small_vae(seed=5)
    assert type(loaded) is type(expected)
    state = expected.half().state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert model.vae_scale_factor == 8


def test_a_tiny_file_without_a_configuration_has_its_classs_own(models, tmp_path):
    vae = AutoencoderTiny().half()
    save_file(vae.state_dict(), tmp_path / "taesd.safetensors")
    model = resolve_model(ModelSpec(str(models / "sd1"), vae=str(tmp_path / "taesd.safetensors")))
    loaded = load_parts(model, ("vae",), torch.float16)["vae"]
    assert all(torch.equal(value, vae.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_models_own_vae_may_be_tiny(models, tmp_path):
    folder = factories.sd1_folder(tmp_path / "model", **factories.SMALL)
    factories.vae_folder(folder / "vae", small_tiny_vae())
    index = json.loads((folder / "model_index.json").read_text())
    said_otherwise = resolve_error(ModelSpec(str(folder)))
    assert "is said to be an AutoencoderKL" in said_otherwise.message
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]}))
    model = resolve_model(ModelSpec(str(folder)))
    assert type(load_parts(model, ("vae",), torch.float32)["vae"]) is AutoencoderTiny


def test_a_model_without_a_vae_of_its_own_takes_any_that_says_how_it_is_made(models, tmp_path):
    index = json.loads((models / "sd1/model_index.json").read_text())
    for name in ("unet", "text_encoder", "tokenizer", "scheduler"):
        (tmp_path / name).symlink_to(models / "sd1" / name)
    for entry in ([None, None], ["diffusers", "ConsistencyDecoderVAE"]):
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"vae": entry}))
        for vae in ("full", "tiny", "full/diffusion_pytorch_model.safetensors"):
            model = resolve_model(ModelSpec(str(tmp_path), vae=str(models / vae)))
            assert load_parts(model, ("vae",), torch.float16)
        found = resolve_error(ModelSpec(str(tmp_path), vae=str(models / "original.safetensors")))
        assert "does not say how its VAE is made" in found.message


def test_a_vaes_identity_is_that_of_its_components_alone(models):
    """Engines of the UNet and the text encoder serve any VAE; those of the VAE are for one."""
    own = {part: fingerprint(models, None, part) for part in ("unet", "text_encoder", "vae")}
    for vae in (*FORMS, *TINY_FORMS):
        assert fingerprint(models, vae) != own["vae"]
        assert {part: fingerprint(models, vae, part) for part in ("unet", "text_encoder")} == {
            part: own[part] for part in ("unet", "text_encoder")
        }
    assert fingerprint(models, "sd1") == fingerprint(models, "sd1/vae") == own["vae"], "the same VAE, named"
    assert fingerprint(models, "full") == fingerprint(models, "whole model") == fingerprint(models, FORMS[-1])


def test_fingerprints_without_a_vae_are_what_they_were(models):
    """Another form of what is hashed would make everybody build again."""

    def was(part: str, layout: str, file: Path) -> str:
        config = json.loads((models / "sd1" / part / "config.json").read_text())
        left_out = ("_name_or_path", "_diffusers_version", "_commit_hash", "transformers_version")
        content = {
            "part": part,
            "layout": layout,
            "config": {name: value for name, value in config.items() if name not in left_out},
            "weights": [sha256_file(file)],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    files = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    single = resolve(models, None, "sd1.safetensors")
    for part, stem in files.items():
        assert fingerprint(models, None, part) == was(part, "folder", models / f"sd1/{part}/{stem}.safetensors")
        assert single.fingerprint(part, sha256_file) == was(part, "single-file", models / "sd1.safetensors")


def test_a_vae_that_scales_latents_otherwise_is_warned_of(models, capsys):
    resolve(models, "full", "sdxl", Console(quiet=True))
    assert "scales its latents by 0.18215, the model's own VAE by 0.13025" in capsys.readouterr().err
    for vae in ("original.safetensors", "tiny"):  # one has the model's own configuration, the other a scale of its own
        resolve(models, vae, "sdxl", Console(quiet=True))
        assert capsys.readouterr().err == ""


def resolve_error(spec: ModelSpec) -> SdtrtError:
    with pytest.raises(SdtrtError) as caught:
        resolve_model(spec)
    return caught.value


@pytest.mark.parametrize(
    ("vae", "error", "message", "hint"),
    [
        ("nowhere/at/all", ModelError, "there is no VAE at nowhere/at/all", "--vae"),
        ("https://huggingface.co/a/b", UsageError, "--vae takes no web address", "--vae owner/name"),
        (
            "{models}/sd1/unet",
            ModelError,
            "is a UNet2DConditionModel, not an AutoencoderKL or AutoencoderTiny",
            "--vae",
        ),
        ("{models}", ModelError, "is no VAE's folder: it has no config.json", "inside.safetensors"),
        ("{tmp}/lora.safetensors", ModelError, "holds no VAE: it looks like a LoRA", "--vae"),
        ("{tmp}/half.safetensors", ModelError, "one half of a tiny VAE in its original format", "madebyollin/taesd"),
        ("{tmp}/pipe.safetensors", ModelError, "there is no VAE at", "--vae"),
        ("{tmp}/vae.pt", ModelError, "is a pickle file", "--allow-pickle vae.pt"),
        ("{tmp}/large", ModelError, "takes 4 channels where the vae {tmp}/large makes 16", "--vae"),
        ("owner/name", ModelError, "not in the hub cache", "hf download owner/name"),
    ],
)
def test_what_is_no_vae_is_said_so(models, tmp_path, monkeypatch, vae, error, message, hint):
    monkeypatch.chdir(tmp_path)
    save_file({"x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    save_file({"1.weight": torch.zeros(1), "3.conv.0.bias": torch.zeros(1)}, tmp_path / "half.safetensors")
    torch.save({}, tmp_path / "vae.pt")
    os.mkfifo(tmp_path / "pipe.safetensors")
    factories.vae_folder(tmp_path / "large", small_tiny_vae(latent_channels=16))
    spec = ModelSpec(str(models / "sd1"), vae=vae.format(models=models, tmp=tmp_path), offline=True)
    found = resolve_error(spec)
    assert type(found) is error
    assert message.format(tmp=tmp_path) in found.message
    assert hint in found.hint


def test_a_vae_that_does_not_fit_its_configuration_is_named(models, tmp_path):
    factories.vae_file(tmp_path / "other.safetensors", small_vae(block_out_channels=(8, 8, 8, 8)))
    model = resolve_model(ModelSpec(str(models / "sd1"), vae=str(tmp_path / "other.safetensors")))
    with pytest.raises(ModelError, match=r"vae weights of .*other\.safetensors don't fit") as caught:
        check_part(model, "vae")
    assert "--vae" in caught.value.hint


# --- tiny VAEs in engines ---


def test_the_contract_of_a_tiny_vae_has_neither_moments_nor_a_scale(models):
    model = resolve(models, "tiny")
    decoder, encoder = (contract_of(model, name, "fp16") for name in ("vae_decoder", "vae_encoder"))
    assert decoder.input_shapes(SIZES) == encoder.output_shapes(SIZES) == {"scaled_latents": (3, 4, 9, 13)}
    assert decoder.output_shapes(SIZES) == encoder.input_shapes(SIZES) == {"image": (3, 3, 72, 104)}


def test_a_tiny_vae_stays_in_fp16_in_sdxl_too(models):
    assert precision_of(resolve(models, None, "sdxl"), "vae_decoder", "fp16") == "fp32"
    assert precision_of(resolve(models, "tiny", "sdxl"), "vae_decoder", "fp16") == "fp16"


def session_of(vae, component, path, precision="fp32"):
    contract = vae_contract(dict(vae.config), precision, component)
    write_onnx(vae, contract, path)
    return contract, OnnxRuntimeSession(path, contract, threads=1, optimized=False)


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
@pytest.mark.parametrize("exporter", ["torchscript", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_the_graph_of_a_tiny_vae_computes_what_diffusers_does(tmp_path, component, exporter):
    vae = small_tiny_vae().half()
    contract = vae_contract(dict(vae.config), "fp16", component)
    write_onnx(vae, contract, tmp_path / "model.onnx", exporter=exporter, opset=18 if exporter == "dynamo" else 17)
    assert check_onnx(tmp_path / "model.onnx", vae, contract).worst.relative_l2 < 2e-3


def test_the_facade_of_a_tiny_vae_is_as_diffusers_own(tmp_path):
    vae = small_tiny_vae()
    halves = {half: session_of(vae, f"vae_{half}", tmp_path / f"{half}.onnx")[1] for half in ("decoder", "encoder")}
    facade = VaeFacade(dict(vae.config), CPU, **halves)
    latents, pixels = torch.randn(1, 4, 9, 11), 2 * torch.rand(1, 3, 72, 88) - 1
    with torch.no_grad():
        torch.testing.assert_close(facade.decode(latents).sample, vae.decode(latents).sample, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(facade.encode(pixels).latents, vae.encode(pixels).latents, atol=1e-4, rtol=1e-3)
        assert torch.equal(facade.encode(pixels, return_dict=False)[0], facade.encode(pixels).latents)
        # Between its halves latents are bytes: one that is rounded the other way moves a pixel a little.
        assert (facade(pixels).sample - vae(pixels).sample).abs().mean() < 1e-3
    own = vae.config
    assert not hasattr(facade.encode(pixels), "latent_dist")
    names = ("scaling_factor", "force_upcast", "latent_channels", "block_out_channels")
    assert [facade.config[name] for name in names] == [own[name] for name in names]
    bare = VaeFacade({"_class_name": "AutoencoderTiny"}, CPU, **halves)
    assert (bare.config.scaling_factor, len(bare.config.block_out_channels)) == (1.0, 4)


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_images_with_engines_of_a_named_vae_are_pytorchs(models, run, folder):
    """img2img calls both halves."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save("init.png")
    common = ("--model", str(models / "sd1"), "--vae", str(models / "tiny"), "--prompt", "a red circle", "--steps", "2")
    common = ("img2img", "--init-image", "init.png", "--seed", "1", *common)
    halves = ("--component", "vae_decoder", "--component", "vae_encoder")
    made = {}
    for backend, more in (("torch", ()), ("onnxruntime", halves)):
        code, _, err = run(*common, "--backend", backend, "--precision", "fp32", *more, "--output", f"{backend}.png")
        assert code == 0, err
        made[backend] = pixels_of(folder / f"{backend}.png")
    assert np.abs(made["torch"] - made["onnxruntime"]).max() <= 2
    code, _, err = run(*common, "--vae", str(models / "sd1"), "--backend", "torch", "--output", "own.png")
    assert np.abs(pixels_of(folder / "own.png") - made["torch"]).max() > 2, "another VAE, another image"


def test_a_missing_engine_of_a_named_vae_is_built_by_the_command_in_the_hint(models, run, folder):
    options = ("--model", str(models / "sd1"), "--vae", str(models / "tiny"), "--backend", "onnxruntime")
    request = ("txt2img", *options, "--prompt", "x", "--component", "vae_decoder", "--steps", "1", "--no-build")
    own = ("--engine-dir", str(folder / "engines"))
    code, _, err = run(*request, *own)
    assert code == 1
    command = err.split("hint: ")[1].split("\n")[0].split()
    assert f"--vae {models / 'tiny'}" in " ".join(command)
    assert run(*command[1:])[0] == 0
    assert run(*request, *own)[0] == 0


def test_inspect_shows_the_named_vae(models, run):
    code, out, _ = run("inspect", "--model", str(models / "sd1"), "--vae", str(models / "tiny"), "--json")
    (part,) = [part for part in json.loads(out)["parts"] if part["name"] == "vae"]
    assert (code, part["class_name"]) == (0, "AutoencoderTiny")
    assert part["parameters"] == sum(parameter.numel() for parameter in small_tiny_vae().parameters())
    assert part["sizes"]["decoder_block_out_channels"] == [8, 8, 8, 8]
