"""Models: every kind of name, parts equal to diffusers' own loading, and an error for all that is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from factories import sd1_folder, sd1_single_file, sdxl_folder, sdxl_single_file
from safetensors.torch import load_file, save_file

from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import ModelError, SdtrtError, UsageError
from sdtrt.common.files import sha256_file
from sdtrt.models import loading, weights
from sdtrt.models.loading import check_part, load_parts, load_unet
from sdtrt.models.resolve import SD_PARTS, SDXL_PARTS, resolve_model
from sdtrt.pipeline.opening.request import resolve_request
from sdtrt.reports.inspection import inspect_model
from sdtrt.specs import GenerateSpec, ModelSpec

ROOT = Path(__file__).parents[2]
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One of each kind, made once and never written to."""
    path = tmp_path_factory.mktemp("models")
    sd1_folder(path / "sd1")
    sdxl_folder(path / "sdxl")
    sd1_single_file(path / "sd1.safetensors")
    sdxl_single_file(path / "sdxl.safetensors")
    return path


@pytest.fixture
def folder(made, tmp_path):
    """An SD 1.x folder of the test's own, to be damaged."""
    return shutil.copytree(made / "sd1", tmp_path / "model")


@pytest.fixture
def checkpoint(made, tmp_path):
    """A single-file checkpoint of the test's own."""
    return Path(shutil.copy(made / "sd1.safetensors", tmp_path / "model.safetensors"))


def change_tensors(path: Path, change) -> None:
    """Rewrite a safetensors file after `change(tensors)`."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# --- loading ---


@pytest.mark.parametrize(
    ("name", "config", "cls"),
    [
        ("sd1", None, StableDiffusionPipeline),
        ("sdxl", None, StableDiffusionXLPipeline),
        ("sd1.safetensors", "sd1", StableDiffusionPipeline),
        ("sdxl.safetensors", "sdxl", StableDiffusionXLPipeline),
    ],
)
def test_parts_are_those_that_diffusers_loads(made, name, config, cls):
    model = resolve_model(ModelSpec(str(made / name), config=str(made / config) if config else None))
    assert model.is_sdxl is (cls is StableDiffusionXLPipeline)
    assert model.parts == (SDXL_PARTS if model.is_sdxl else SD_PARTS)
    assert (model.default_size(), model.vae_scale_factor) == ((128, 128), 8)
    parts = load_parts(model, model.parts, torch.float32)
    reference = cls.from_pretrained(made / (config or name), dtype=torch.float32)
    for part in model.parts:
        mine, theirs = parts[part], getattr(reference, part)
        assert type(mine) is type(theirs)
        if isinstance(mine, torch.nn.Module):
            assert same_weights(mine, theirs), part
            assert not mine.training
            assert not any(parameter.requires_grad for parameter in mine.parameters())
    prompt = "a red circle on blue"
    assert parts["tokenizer"](prompt).input_ids == reference.tokenizer(prompt).input_ids
    assert dict(parts["scheduler"].config) == dict(reference.scheduler.config)


def test_a_pipeline_of_the_parts_makes_the_same_image(made):
    model = resolve_model(ModelSpec(str(made / "sd1")))
    parts = load_parts(model, (*model.parts, "safety_checker", "feature_extractor"), torch.float32)
    mine = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    theirs = StableDiffusionPipeline.from_pretrained(made / "sd1", dtype=torch.float32)
    images = []
    for pipeline in (mine, theirs):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        call = pipeline(
            "a red circle", num_inference_steps=2, height=64, width=72, generator=generator, output_type="pt"
        )
        images.append(call.images)
    assert torch.equal(*images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_come_in_the_dtype_asked_for(made, dtype):
    unet = load_unet(resolve_model(ModelSpec(str(made / "sd1"))), dtype)
    assert {parameter.dtype for parameter in unet.parameters()} == {dtype}
    assert unet.config.cross_attention_dim == 32
    reference = load_file(made / "sd1" / UNET)
    assert all(torch.equal(value, reference[name].to(dtype)) for name, value in unet.state_dict().items())


def test_a_part_needs_no_other_parts_weights(folder):
    for name in (VAE, TEXT):
        (folder / name).unlink()
    model = resolve_model(ModelSpec(str(folder)))
    assert load_unet(model, torch.float32).config.in_channels == 4
    with pytest.raises(ModelError, match="no safetensors weights for its vae"):
        load_parts(model, ("vae",), torch.float32)


def test_of_a_single_file_only_the_asked_tensors_are_read(made, monkeypatch):
    read = []
    original = weights.read_tensors
    monkeypatch.setattr(loading, "read_tensors", lambda path, names: read.extend(names) or original(path, names))
    model = resolve_model(ModelSpec(str(made / "sd1.safetensors"), config=str(made / "sd1")))
    assert read == []
    load_unet(model, torch.float16)
    assert read
    assert all(name.startswith("model.diffusion_model.") for name in read)


def test_shards_are_put_together(folder):
    unet = load_unet(resolve_model(ModelSpec(str(folder))), torch.float32)
    (folder / UNET).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="3MB")
    model = resolve_model(ModelSpec(str(folder)))
    assert len(model.weight_files("unet")) > 1
    assert same_weights(load_unet(model, torch.float32), unet)

    model.weight_files("unet")[-1].unlink()
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model-\d+-of-\d+\.safetensors is missing"):
        resolve_model(ModelSpec(str(folder)))


def test_shards_outside_the_folder_are_refused(folder):
    index = {"weight_map": {"conv_in.weight": "../../secret.safetensors"}}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="no index of safetensors files"):
        resolve_model(ModelSpec(str(folder)))


def test_variants_are_taken_by_name(folder):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    model = resolve_model(ModelSpec(str(folder), variant="fp16"))
    assert load_unet(model, torch.float16).dtype is torch.float16
    with pytest.raises(ModelError, match="no safetensors weights for its unet") as caught:
        resolve_model(ModelSpec(str(folder)))
    assert "--variant fp16" in caught.value.hint
    with pytest.raises(ModelError, match="no fp32 weights for its unet"):
        resolve_model(ModelSpec(str(folder), variant="fp32"))


def test_a_part_without_the_variant_has_its_plain_weights(made, folder, capsys):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    (folder / TEXT).rename(folder / "text_encoder/model.fp16.safetensors")
    model = resolve_model(ModelSpec(str(folder), variant="fp16"), Console())
    assert capsys.readouterr().err == f"vae of {folder}: no fp16 weights, the plain ones are taken\n"
    whole = resolve_model(ModelSpec(str(made / "sd1")))
    mine, theirs = (load_parts(one, one.parts, torch.float16) for one in (model, whole))
    assert all(same_weights(mine[part], theirs[part]) for part in ("unet", "text_encoder", "vae"))
    (folder / VAE).unlink()
    with pytest.raises(ModelError, match="no fp16 weights for its vae"):
        load_parts(resolve_model(ModelSpec(str(folder), variant="fp16")), ("vae",), torch.float16)


def test_old_names_of_vae_attention_and_text_encoder_load(made, folder):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename_vae(tensors):
        for name in [name for name in tensors if ".attentions.0.to_" in name]:
            tensors[re.sub("|".join(map(re.escape, old)), lambda match: old[match[0]], name)] = tensors.pop(name)

    def drop_prefix(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("text_model.")] = tensors.pop(name)

    change_tensors(folder / VAE, rename_vae)
    change_tensors(folder / TEXT, drop_prefix)
    names = ("vae", "text_encoder")
    mine = load_parts(resolve_model(ModelSpec(str(folder))), names, torch.float32)
    reference = load_parts(resolve_model(ModelSpec(str(made / "sd1"))), names, torch.float32)
    assert all(same_weights(mine[name], reference[name]) for name in names)


def test_loads_without_accelerate_and_without_a_word(made, monkeypatch, capfd):
    monkeypatch.setattr("diffusers.utils.import_utils._accelerate_available", False)
    for name, config in ((made / "sd1", None), (made / "sdxl.safetensors", str(made / "sdxl"))):
        model = resolve_model(ModelSpec(str(name), config=config))
        load_parts(model, model.parts, torch.float16)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_process_without_accelerate_loads_without_a_word(made):
    script = f"""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "accelerate" else find(name, *rest)
import torch
from sdtrt.models.loading import load_parts
from sdtrt.models.resolve import resolve_model
from sdtrt.specs import ModelSpec
for name, config in ({str(made / "sd1")!r}, None), ({str(made / "sdxl.safetensors")!r}, {str(made / "sdxl")!r}):
    model = resolve_model(ModelSpec(name, config=config))
    load_parts(model, model.parts, torch.float16)
from diffusers.utils import is_accelerate_available
print(is_accelerate_available())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (result.stdout, result.stderr) == ("False\n", "")


# --- fingerprints ---


def test_fingerprint_is_of_the_content(folder, tmp_path):
    def fingerprint(path: Path, part: str = "unet") -> str:
        return resolve_model(ModelSpec(str(path))).fingerprint(part, sha256_file)

    before = fingerprint(folder)
    assert re.fullmatch("[0-9a-f]{64}", before)
    folder = folder.rename(tmp_path / "renamed")
    change_json(folder / "unet/config.json", _name_or_path="elsewhere", _diffusers_version="0.1")
    change_json(folder / "vae/config.json", scaling_factor=0.5)
    assert fingerprint(folder) == before, "neither the place nor other parts count"
    assert fingerprint(folder, "vae") != before

    change_json(folder / "unet/config.json", norm_eps=1e-4)
    configured = fingerprint(folder)
    assert configured != before
    change_tensors(folder / UNET, lambda tensors: tensors["conv_in.bias"].add_(0.01))
    assert fingerprint(folder) not in (before, configured)


# --- names ---


@pytest.mark.parametrize(
    ("name", "error", "message", "hint"),
    [
        ("tinny", UsageError, "unknown model: 'tinny'", "did you mean tiny?"),
        ("", UsageError, "unknown model: ''", "pass tiny"),
        ("stable diffusion", UsageError, "unknown model: 'stable diffusion'", "owner/name"),
        ("https://huggingface.co/owner/name", UsageError, "takes no web address", "owner/name"),
        ("./nowhere", UsageError, "unknown model: './nowhere'", "a diffusers folder"),
        ("nowhere/models/x", ModelError, "there is no model at nowhere/models/x", "a diffusers folder"),
        ("nowhere/x.safetensors", ModelError, "there is no model at nowhere/x.safetensors", "a .safetensors file"),
        ("nul\0byte", UsageError, "unknown model", "pass tiny"),
        ("x" * 5000, UsageError, "unknown model", "pass tiny"),
    ],
)
def test_unknown_names(name, error, message, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        resolve_model(ModelSpec(name))
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_misspelt_path_names_its_neighbour(made):
    with pytest.raises(SdtrtError) as caught:
        resolve_model(ModelSpec(str(made / "sdlx")))
    assert f"did you mean {made / 'sdxl'}?" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sd1", {"revision": "main"}, "--revision does not apply to a local folder"),
        ("sd1", {"config": "tiny"}, "--config does not apply to a local folder"),
        ("sd1.safetensors", {"variant": "fp16"}, "--variant does not apply to a single file"),
    ],
)
def test_options_that_mean_nothing_are_refused(made, name, options, message):
    with pytest.raises(UsageError, match=message):
        resolve_model(ModelSpec(str(made / name), **options))


# --- folders that are wrong ---


def test_a_folder_that_is_no_model_says_what_to_pass(made, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = {tmp_path / "empty": "save_pretrained", made / "sd1" / "unet": "the folder above", made: str(made / "sd1")}
    for path, hint in cases.items():
        with pytest.raises(ModelError, match=r"it has no model_index\.json") as caught:
            resolve_model(ModelSpec(str(path)))
        assert hint in caught.value.hint


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline", "StableDiffusion3InpaintPipeline", None])
def test_unsupported_pipelines_are_named(folder, name):
    change_json(folder / "model_index.json", _class_name=name)
    with pytest.raises(ModelError, match=f"is a {name}, which sdtrt does not support") as caught:
        resolve_model(ModelSpec(str(folder)))
    assert "StableDiffusionXLPipeline" in caught.value.hint


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("unet", ["my_code", "UNet2DConditionModel"]),
        ("unet", ["diffusers", "UNet3DConditionModel"]),
        ("text_encoder", ["transformers", "T5EncoderModel"]),
        ("scheduler", ["os", "system"]),
        ("scheduler", ["my_code", "MyScheduler"]),
        ("vae", [None, None]),
        ("tokenizer", "CLIPTokenizer"),
    ],
)
def test_parts_of_other_classes_are_refused(folder, part, entry):
    change_json(folder / "model_index.json", **{part: entry})
    with pytest.raises(ModelError, match=part):
        resolve_model(ModelSpec(str(folder)))


def test_a_scheduler_that_diffusers_does_not_have(folder):
    change_json(folder / "model_index.json", scheduler=["diffusers", "TomorrowsScheduler"])
    with pytest.raises(ModelError, match="has no TomorrowsScheduler") as caught:
        load_parts(resolve_model(ModelSpec(str(folder))), ("scheduler",), torch.float32)
    assert caught.value.hint == "pip install --upgrade diffusers; or use --scheduler, as in --scheduler euler"


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "\xff\xfe"])
def test_damaged_configuration_is_named(folder, name, content):
    (folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match=name):
        resolve_model(ModelSpec(str(folder)))


def test_missing_configuration_is_named(folder):
    (folder / "text_encoder/config.json").unlink()
    with pytest.raises(ModelError, match=r"text_encoder/config\.json is missing"):
        resolve_model(ModelSpec(str(folder)))


def test_a_configuration_that_makes_no_unet(folder):
    change_json(folder / "unet/config.json", down_block_types=["NoSuchBlock"] * 4)
    with pytest.raises(ModelError, match=r"the configuration of the unet of .* makes no UNet2DConditionModel"):
        load_unet(resolve_model(ModelSpec(str(folder))), torch.float32)


@pytest.mark.parametrize("own", [None, 10**30, 128, 20])
def test_a_tokenizer_makes_no_more_tokens_than_the_text_encoder_takes(folder, own):
    """transformers takes 1e30 where the tokenizer does not say; fewer are its own choice."""
    file = folder / "tokenizer/tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config | ({} if own is None else {"model_max_length": own})))
    tokenizer = load_parts(resolve_model(ModelSpec(str(folder))), ("tokenizer",), torch.float32)["tokenizer"]
    wanted = min(own or 77, 77)
    assert len(tokenizer("a circle", padding="max_length", return_tensors="pt").input_ids[0]) == wanted
    assert len(tokenizer("a circle " * 99, truncation=True).input_ids) == wanted


def test_damaged_tokenizer_is_named(folder):
    (folder / "tokenizer/vocab.json").write_text('{"red": ')
    with pytest.raises(ModelError, match=r"can't read the tokenizer in .*/tokenizer"):
        load_parts(resolve_model(ModelSpec(str(folder))), ("tokenizer",), torch.float32)


@pytest.mark.parametrize("channels", [5, 8])
def test_editing_and_upscaling_models_are_refused(folder, channels):
    change_json(folder / "unet/config.json", in_channels=channels)
    with pytest.raises(ModelError, match=f"takes {channels} channels where the vae makes 4: a model for editing"):
        resolve_model(ModelSpec(str(folder)))


def test_inpainting_models_are_told_by_their_channels(folder):
    assert not resolve_model(ModelSpec(str(folder))).is_inpainting
    change_json(folder / "unet/config.json", in_channels=9)
    assert resolve_model(ModelSpec(str(folder))).is_inpainting
    change_json(folder / "unet/config.json", out_channels=9)
    with pytest.raises(ModelError, match="the unet's out_channels is 9, where 4 fits"):
        resolve_model(ModelSpec(str(folder)))


@pytest.mark.parametrize("name", [UNET, VAE, TEXT])
def test_truncated_weights_are_found_at_once(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-100])
    with pytest.raises(ModelError, match=f"{name} is truncated"):
        resolve_model(ModelSpec(str(folder)))


# --- weights that don't fit ---


def drop(tensors):
    del tensors["conv_in.weight"]


def add(tensors):
    tensors["down_blocks.9.conv.weight"] = torch.zeros(1)


def reshape(tensors):
    tensors["conv_in.bias"] = torch.zeros(7)


def quantise(tensors):
    tensors["conv_in.weight"] = tensors["conv_in.weight"].to(torch.int8)


def poison(tensors):
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")


def infinite(tensors):
    tensors["conv_in.weight"][0, 0, 0, 0] = float("-inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"1 are missing \(conv_in\.weight\)"),
        (add, r"1 are not of this architecture \(down_blocks\.9\.conv\.weight\)"),
        (reshape, r"1 have another shape \(conv_in\.bias \[7\] instead of \[32\]\)"),
        (quantise, r"1 are quantised \(conv_in\.weight\)"),
        (poison, r"conv_in\.weight of the unet of .* holds numbers that are not finite"),
        (infinite, r"conv_in\.weight of the unet of .* holds numbers that are not finite"),
    ],
)
def test_no_weight_is_left_to_chance(folder, change, message):
    change_tensors(folder / UNET, change)
    with pytest.raises(ModelError, match=message):
        load_unet(resolve_model(ModelSpec(str(folder))), torch.float32)


def test_all_parts_are_checked_before_one_is_loaded(folder, monkeypatch):
    change_tensors(folder / VAE, lambda tensors: tensors.pop("decoder.conv_in.weight"))
    model = resolve_model(ModelSpec(str(folder)))
    check_part(model, "unet")
    monkeypatch.setattr(loading, "read_tensors", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ModelError, match=r"the vae weights of .* 1 are missing \(decoder\.conv_in\.weight\)"):
        load_parts(model, ("unet", "vae"), torch.float32)


def test_weights_too_large_for_the_dtype_are_refused(folder):
    def enlarge(tensors):
        tensors["conv_in.weight"] = tensors["conv_in.weight"].float().fill_(70000)

    change_tensors(folder / UNET, enlarge)
    model = resolve_model(ModelSpec(str(folder)))
    assert load_unet(model, torch.float32).conv_in.weight.max() == 70000
    with pytest.raises(ModelError, match=r"conv_in\.weight of the unet of .* does not fit into float16") as caught:
        load_unet(model, torch.float16)
    assert "--precision" in caught.value.hint


# --- pickles ---


def evil_pickle(path: Path, mark: Path) -> None:
    """A file that would create `mark` if it were unpickled."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (mark,))

    torch.save({"state_dict": Evil()}, path)


def test_pickle_checkpoints_are_refused_unless_named(made, tmp_path):
    path, mark = tmp_path / "model.ckpt", tmp_path / "ran"
    evil_pickle(path, mark)
    for allowed in (None, "other.ckpt"):
        with pytest.raises(ModelError, match="is a pickle file") as caught:
            resolve_model(ModelSpec(str(path), config=str(made / "sd1"), allow_pickle=allowed))
        assert "--allow-pickle model.ckpt" in caught.value.hint
    assert not mark.exists()

    torch.save({"state_dict": load_file(made / "sd1.safetensors"), "global_step": 1}, path)
    model = resolve_model(ModelSpec(str(path), config=str(made / "sd1"), allow_pickle="model.ckpt"))
    reference = load_unet(resolve_model(ModelSpec(str(made / "sd1"))), torch.float16)
    assert same_weights(load_unet(model, torch.float16), reference)


def test_pickle_weights_in_a_folder_are_refused_unless_named(folder):
    reference = load_unet(resolve_model(ModelSpec(str(folder))), torch.float16)
    torch.save(load_file(folder / UNET), folder / "unet/diffusion_pytorch_model.bin")
    (folder / UNET).unlink()
    with pytest.raises(ModelError, match=r"unet of .* has pickle weights only") as caught:
        resolve_model(ModelSpec(str(folder)))
    assert f"--allow-pickle {folder}" in caught.value.hint
    for allowed in (str(folder), "diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.bin"):
        model = resolve_model(ModelSpec(str(folder), allow_pickle=allowed))
        assert same_weights(load_unet(model, torch.float16), reference)


def test_safetensors_are_preferred_to_pickle(folder, tmp_path):
    evil_pickle(folder / "unet/diffusion_pytorch_model.bin", tmp_path / "ran")
    load_unet(resolve_model(ModelSpec(str(folder), allow_pickle=str(folder))), torch.float16)
    assert not (tmp_path / "ran").exists()


# --- single files that are wrong ---


def test_a_truncated_checkpoint(made, checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
        resolve_model(ModelSpec(str(checkpoint), config=str(made / "sd1")))


def test_a_checkpoint_of_ema_weights_alone_is_called_that(made, tmp_path):
    def as_ema(name: str) -> str:
        name = name.removeprefix("model.")
        return f"model_ema.{name.replace('.', '')}" if name.startswith("diffusion_model") else name

    tensors = {as_ema(name): value for name, value in load_file(made / "sd1.safetensors").items()}
    save_file(tensors, tmp_path / "ema.safetensors")
    with pytest.raises(ModelError, match="a file of EMA weights alone") as caught:
        resolve_model(ModelSpec(str(tmp_path / "ema.safetensors")))
    assert "model.diffusion_model" in caught.value.hint


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale", "weight.absmax"])
@pytest.mark.parametrize("pickled", [False, True])
def test_fp8_with_scales_is_called_that(made, checkpoint, scale, pickled):
    def quantise(tensors):
        name = "model.diffusion_model.time_embed.0.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name.replace("weight", scale)] = torch.ones(1)

    change_tensors(checkpoint, quantise)
    if pickled:
        torch.save(load_file(checkpoint), checkpoint := checkpoint.with_suffix(".ckpt"))
    model = resolve_model(ModelSpec(str(checkpoint), config=str(made / "sd1"), allow_pickle=str(checkpoint)))
    with pytest.raises(ModelError, match=rf"unet weights of .* are fp8 with scales \(.*{scale}") as caught:
        load_unet(model, torch.float16)
    assert "--config" not in caught.value.hint
    assert "fp16" in caught.value.hint


def test_fp8_without_scales_is_read(made, checkpoint):
    name = "model.diffusion_model.time_embed.0.weight"
    change_tensors(checkpoint, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    unet = load_unet(resolve_model(ModelSpec(str(checkpoint), config=str(made / "sd1"))), torch.float16)
    assert torch.equal(unet.time_embedding.linear_1.weight, load_file(checkpoint)[name].half())


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lora_unet_down_blocks_0.lora_down.weight", "a LoRA"),
        ("double_blocks.0.img_attn.qkv.weight", "a Flux model"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "a Stable Diffusion 3 model"),
        ("down_blocks.0.resnets.0.conv1.weight", "a diffusers UNet"),
        ("decoder.conv_in.weight", "a VAE alone"),
        ("first_stage_model.decoder.conv_in.weight", "a VAE alone"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", "a text encoder alone"),
        ("first_stage_model.decoder.conv_in.weight cond_stage_model.x", "no unet, only a vae and a text encoder"),
        ("model.layers.0.mlp.weight", "it has no model.diffusion_model.input_blocks.0.0.weight"),
    ],
)
def test_a_safetensors_file_that_is_no_stable_diffusion(tmp_path, name, what):
    save_file({one: torch.zeros(2, 2) for one in name.split()}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=f"is no Stable Diffusion checkpoint: .*{re.escape(what)}"):
        resolve_model(ModelSpec(str(tmp_path / "other.safetensors")))


def test_an_editing_checkpoint(checkpoint):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    change_tensors(checkpoint, lambda tensors: tensors.update({key: torch.zeros(32, 8, 3, 3)}))
    with pytest.raises(ModelError, match="takes 8 channels instead of 4"):
        resolve_model(ModelSpec(str(checkpoint)))


@pytest.mark.parametrize("config", ["sdxl", "sd2"])
def test_a_configuration_of_another_kind_of_model(made, checkpoint, config, tmp_path):
    if config == "sd2":
        shutil.copytree(made / "sd1", tmp_path / "sd2")
        change_json(tmp_path / "sd2" / "unet/config.json", use_linear_projection=True, cross_attention_dim=64)
        change_json(tmp_path / "sd2" / "text_encoder/config.json", hidden_size=64)
    path = (made if config == "sdxl" else tmp_path) / config
    model = resolve_model(ModelSpec(str(checkpoint), config=str(path)))
    with pytest.raises(ModelError, match=r"the unet weights of .* don't fit its configuration") as caught:
        load_unet(model, torch.float16)
    assert "--config" in caught.value.hint


LACKING = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
    "vae": ("first_stage_model.",),
}


def lacking(made, path: Path, kind: str, *parts: str) -> Path:
    """A single file without some parts."""
    prefixes = tuple(prefix for part in parts for prefix in LACKING[part])
    tensors = load_file(made / f"{kind}.safetensors")
    save_file({name: value for name, value in tensors.items() if not name.startswith(prefixes)}, path)
    return path


EACH_LACK = [
    ("sd1", ("text_encoder",)),
    ("sd1", ("text_encoder", "vae")),
    ("sdxl", ("text_encoder", "text_encoder_2")),
    ("sdxl", ("text_encoder",)),
    ("sdxl", ("text_encoder_2",)),
    ("sdxl", ("vae",)),
]


@pytest.mark.parametrize(("kind", "parts"), EACH_LACK)
def test_what_a_single_file_lacks_comes_from_its_configuration(made, tmp_path, kind, parts, capsys):
    path = lacking(made, tmp_path / "model.safetensors", kind, *parts)
    model = resolve_model(ModelSpec(str(path), config=str(made / kind)), Console())
    assert f"{' and '.join(sorted(parts))} of {path}: from {made / kind}" in capsys.readouterr().err
    whole = resolve_model(ModelSpec(str(made / kind)))
    assert (model.parts, model.missing) == (whole.parts, ())
    mine, theirs = (load_parts(one, parts, torch.float16) for one in (model, whole))
    assert all(same_weights(mine[part], theirs[part]) for part in parts)
    assert [model.fingerprint(part, sha256_file) for part in parts] == [
        whole.fingerprint(part, sha256_file) for part in parts
    ], "one engine serves both"


@pytest.mark.parametrize(("kind", "parts"), EACH_LACK)
def test_what_a_single_file_lacks_is_named_where_it_lies_nowhere(made, tmp_path, kind, parts):
    config = tmp_path / "config"
    shutil.copytree(made / kind, config, ignore=shutil.ignore_patterns("*.safetensors"))
    path = lacking(made, tmp_path / "model.safetensors", kind, *parts)
    model = resolve_model(ModelSpec(str(path), config=str(config)))
    assert set(model.missing) == set(parts)
    assert load_unet(model, torch.float16), "what is there can be used"
    assert {part.name for part in inspect_model(model).parts if part.parameters and not part.files} == set(parts)
    request = GenerateSpec(prompts=("red",), model=model.spec, backend="torch")
    with pytest.raises(ModelError, match=f"has no {' and no '.join(model.missing)}") as caught:
        resolve_request(request, model, QUIET)
    assert ("--vae" in caught.value.hint, "--config FOLDER" in caught.value.hint) == ("vae" in parts, parts != ("vae",))
    with pytest.raises(ModelError, match=f"has no {parts[0]}"):
        load_parts(model, parts[:1], torch.float16)


def test_a_part_that_a_single_file_lacks_may_be_a_variant(made, tmp_path):
    config = shutil.copytree(made / "sd1", tmp_path / "config")
    (config / TEXT).rename(config / "text_encoder/model.fp16.safetensors")
    path = lacking(made, tmp_path / "model.safetensors", "sd1", "text_encoder")
    model = resolve_model(ModelSpec(str(path), config=str(config), variant="fp16"))
    assert load_parts(model, ("text_encoder",), torch.float16)
    with pytest.raises(UsageError, match="--variant does not apply"):
        resolve_model(ModelSpec(str(made / "sd1.safetensors"), config=str(config), variant="fp16"))


def test_configuration_of_a_checkpoint_comes_from_where_diffusers_looks(checkpoint):
    with pytest.raises(
        ModelError, match=r"stable-diffusion-v1-5/stable-diffusion-v1-5: not in the hub cache"
    ) as caught:
        resolve_model(ModelSpec(str(checkpoint), offline=True))
    assert "--config FOLDER" in caught.value.hint


def test_a_configuration_that_is_nowhere(checkpoint):
    with pytest.raises(ModelError, match="there is no configuration at no/such/folder"):
        resolve_model(ModelSpec(str(checkpoint), config="no/such/folder"))
