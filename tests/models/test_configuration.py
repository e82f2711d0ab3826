"""What a model's files may say: values that can't be are refused in two lines, before anything is built or loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time

import pytest
import torch
from factories import SDXL_TIME_WIDTH, sdxl_folder
from transformers import CLIPTextModel, CLIPTokenizer

from sdtrt.common.errors import ModelError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models.loading import check_part, check_words, load_parts
from sdtrt.models.resolve import resolve_model
from sdtrt.specs import ModelSpec


@pytest.fixture
def folder(sd1, tmp_path):
    """A model that a test may change."""
    return shutil.copytree(sd1, tmp_path / "model")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def load(folder, *names):
    return load_parts(resolve_model(ModelSpec(str(folder))), names, torch.float32)


# --- values ---


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        *(("unet", "sample_size", value) for value in ("x", [8], [8, 8, 8], [], -1, 0, 1e30, 2**40, True, {})),
        *(("unet", "block_out_channels", value) for value in (8, [], "x", [0], [8] * 1000)),
        *(("unet", "cross_attention_dim", value) for value in (None, "x", [], 0, [32, "x"])),
        ("unet", "out_channels", 0),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "addition_embed_type", "image"),
        *(("unet", "_diffusers_version", value) for value in ([], "x", None)),
        *(("vae", "block_out_channels", value) for value in (8, None, [8] * 1000, [8, "x"])),
        *(("vae", "scaling_factor", value) for value in ("x", None, 0, float("nan"), [1])),
        ("vae", "shift_factor", "x"),
        ("vae", "latents_mean", ["x"]),
        ("vae", "out_channels", 1),
        *(("text_encoder", "max_position_embeddings", value) for value in ("x", 0, None, 10**30)),
        ("text_encoder", "num_hidden_layers", 0),
        *(("tokenizer", "model_max_length", value) for value in (-5, 1, "x", [77], float("inf"))),
    ],
)
def test_values_that_sdtrt_computes_with_are_checked_when_they_are_read(folder, part, name, value):
    file = folder / part / ("tokenizer_config.json" if part == "tokenizer" else "config.json")
    change(file, **{name: value})
    with pytest.raises(ModelError, match=rf"the configuration of the {part} has {name} = .*, not ") as caught:
        resolve_model(ModelSpec(str(folder)))
    assert str(file) in caught.value.hint
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(("part", "name"), [("unet", "cross_attention_dim"), ("vae", "block_out_channels")])
def test_values_that_sdtrt_needs_are_there(folder, part, name):
    file = folder / part / "config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != name}))
    with pytest.raises(ModelError, match=f"the configuration of the {part} says nothing of {name}"):
        resolve_model(ModelSpec(str(folder)))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("unet", "norm_eps", "x"),
        ("unet", "norm_eps", None),
        ("unet", "freq_shift", "x"),
        ("unet", "center_input_sample", "yes"),
        ("unet", "attention_head_dim", [2, "x"]),
        ("unet", "downsample_padding", 1e300),
        ("unet", "downsample_padding", [1]),
        ("vae", "norm_num_groups", -1),
        ("vae", "force_upcast", "x"),
        ("text_encoder", "layer_norm_eps", "x"),
        ("text_encoder", "attention_dropout", [0]),
    ],
)
def test_values_of_another_kind_than_the_classes_are_refused(folder, part, name, value):
    """Constructors take them, and the module fails when it runs."""
    change(folder / part / "config.json", **{name: value})
    with pytest.raises(ModelError, match=rf"the configuration of the {part} of .* makes no .*: {name} is "):
        load(folder, part)


def test_what_was_checked_is_what_is_used(folder):
    model = resolve_model(ModelSpec(str(folder)))
    change(folder / "unet/config.json", sample_size="x")
    assert model.default_size() == (128, 128)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("unet", {"cross_attention_dim": 64}, "cross_attention_dim is 64, where 32 fits"),
        ("unet", {"out_channels": 8}, "out_channels is 8, where 4 fits"),
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time', where None or 'text' fits"),
        ("text_encoder", {"hidden_size": 64}, "cross_attention_dim is 32, where 64 fits"),
    ],
)
def test_parts_that_do_not_fit_each_other(folder, part, values, message):
    change(folder / part / "config.json", **values)
    with pytest.raises(ModelError, match=message):
        resolve_model(ModelSpec(str(folder)))


def test_parts_of_sdxl_that_do_not_fit_each_other(tmp_path):
    folder = sdxl_folder(tmp_path / "sdxl")
    resolve_model(ModelSpec(str(folder)))
    file = folder / "unet/config.json"
    width = json.loads(file.read_text())["projection_class_embeddings_input_dim"]
    change(file, projection_class_embeddings_input_dim=width - SDXL_TIME_WIDTH)  # the refiner has five time ids
    resolve_model(ModelSpec(str(folder)))
    change(file, projection_class_embeddings_input_dim=width + 1)
    with pytest.raises(ModelError, match="takes 81 numbers of added conditioning") as caught:
        resolve_model(ModelSpec(str(folder)))
    assert "projection_class_embeddings_input_dim" in caught.value.hint
    change(file, addition_embed_type=None, projection_class_embeddings_input_dim=None)
    with pytest.raises(ModelError, match="addition_embed_type is None, where 'text_time' fits"):
        resolve_model(ModelSpec(str(folder)))


# --- how much a configuration may ask for ---


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("text_encoder", {"num_hidden_layers": 10**6}),
        ("text_encoder", {"num_hidden_layers": 50}),
        ("unet", {"layers_per_block": 10**6}),
        ("unet", {"layers_per_block": [2, 2, 2, 10**12]}),
        ("unet", {"transformer_layers_per_block": 10**9}),
        ("unet", {"layers_per_block": 600, "transformer_layers_per_block": 600}),  # each fewer than there are tensors
        ("vae", {"layers_per_block": 200}),
    ],
)
def test_no_more_layers_are_built_than_the_weights_may_have(folder, part, values):
    change(folder / part / "config.json", **values)
    model = resolve_model(ModelSpec(str(folder)))
    start = time.process_time()
    with pytest.raises(ModelError, match=rf"the {part} .*(tensors of the weights|the weights have|are missing)"):
        check_part(model, part)
    assert time.process_time() - start < 5


# --- clip skip ---


def test_a_text_encoder_of_fewer_layers_than_its_file_is_what_diffusers_loads(folder):
    change(folder / "text_encoder/config.json", num_hidden_layers=2)
    mine = load(folder, "text_encoder")["text_encoder"]
    theirs = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    ids = torch.tensor([[520, 3, 4, 5, 521]])
    with torch.no_grad():
        assert torch.equal(mine(ids).last_hidden_state, theirs(ids).last_hidden_state)


# --- tokenizers ---


def write_tokenizer(folder, *, drop=lambda _: False, **config):
    """Change the tokenizer; the legacy map of special tokens would have the last word."""
    (folder / "tokenizer/special_tokens_map.json").unlink()
    change(folder / "tokenizer/tokenizer_config.json", **config)
    file = folder / "tokenizer/vocab.json"
    file.write_text(json.dumps({word: row for word, row in json.loads(file.read_text()).items() if not drop(word)}))


@pytest.mark.parametrize(
    ("drop", "config", "message"),
    [
        (lambda word: ord(word[0]) > 200, {"unk_token": "<none>"}, "Unk token `<none>` not found"),
        (lambda _: False, {"pad_token": "<pad>"}, r"its token '<pad>' is number 522, and the text encoder knows 522"),
        (lambda _: False, {"eos_token": "<end>"}, r"its token '<end>' is number 522"),
        (lambda _: False, {"pad_token": None}, "padding token"),
    ],
)
def test_a_tokenizer_that_fails_at_some_prompt_fails_at_once(folder, drop, config, message):
    write_tokenizer(folder, drop=drop, **config)
    with pytest.raises(ModelError, match=rf"can't read the tokenizer in .*/model/tokenizer: .*{message}"):
        load(folder, "tokenizer")


def test_a_token_that_no_prompt_uses_does_no_harm(folder):
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<my-cat>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    mine = load(folder, "tokenizer")["tokenizer"]
    assert mine.name_or_path == str(folder / "tokenizer")
    check_words(mine, ["a red circle", ""], 522)
    with pytest.raises(ModelError, match="'<my-cat>' as token 522, and its text encoder knows 522 tokens") as caught:
        check_words(mine, ["", "a <my-cat>"], 522)
    assert "leave <my-cat> out" in caught.value.hint


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json"])
@pytest.mark.parametrize("kind", ["fifo", "endless"])
def test_tokenizer_files_that_never_end_are_named(folder, name, kind):
    file = folder / "tokenizer" / name
    file.unlink(missing_ok=True)
    os.mkfifo(file) if kind == "fifo" else file.symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=f"can't read .*/{name}: it is no regular file"):
        load(folder, "tokenizer")


def test_a_tokenizer_names_no_other_files(folder):
    names = ("vocab_file", "merges_file", "tokenizer_file", "added_tokens_file", "special_tokens_map_file")
    values = {"fast_tokenizer_files": ["/dev/zero"], **dict.fromkeys(names, "/dev/zero")}
    change(folder / "tokenizer/tokenizer_config.json", **values)
    assert load(folder, "tokenizer")["tokenizer"]("red").input_ids[0] == 520


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"])
def test_configuration_that_never_ends_is_named(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=r"model_index\.json|it is no regular file"):
        resolve_model(ModelSpec(str(folder)))


def test_a_folder_of_links_is_a_model(folder, tmp_path):
    """As in the hub's cache."""
    links = tmp_path / "links"
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        link = links / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    assert load(links, "tokenizer", "scheduler", "text_encoder").keys() == {"tokenizer", "scheduler", "text_encoder"}


# --- schedulers ---


@pytest.mark.parametrize(
    "values", [{"solver_order": 10**9}, {"steps_offset": -(10**9)}, {"beta_start": "x"}, {"skip_prk_steps": "no"}]
)
def test_a_scheduler_of_nonsense_is_refused(folder, values):
    change(folder / "scheduler/scheduler_config.json", **values)
    with pytest.raises(ModelError, match=f"the configuration of the scheduler of .*: {next(iter(values))} is "):
        load(folder, "scheduler")


def test_a_scheduler_whose_package_is_missing_names_it(folder, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "torchsde" else real(name))
    monkeypatch.setattr("diffusers.DPMSolverSDEScheduler", type("Standin", (), {"_backends": ["torch", "torchsde"]}))
    change(folder / "model_index.json", scheduler=["diffusers", "DPMSolverSDEScheduler"])
    with pytest.raises(ModelError, match="needs a package that is not installed: torchsde") as caught:
        load(folder, "scheduler")
    assert caught.value.hint == "pip install torchsde; or use --scheduler, as in --scheduler euler"


# --- the commands ---


def test_nothing_is_built_for_what_cannot_run(run, folder, tmp_path):
    """A scheduler that fails at its first step, a word that the text encoder lacks, a scheduler of another name."""
    engines = tmp_path / "engines"
    request = ["txt2img", "-m", str(folder), "-b", "onnxruntime", "--steps", "2", "-o", str(tmp_path / "x.png")]
    request += ["--engine-dir", str(engines), "-p"]
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<my-cat>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    code, _, err = run(*request, "a <my-cat>")
    assert (code, err.splitlines()[-2].split(": ")[0]) == (1, "error")
    assert "'<my-cat>' as token 522" in err
    change(folder / "scheduler/scheduler_config.json", prediction_type="evil")
    code, _, err = run(*request, "a circle")
    assert code == 1
    assert "the model's scheduler configuration does not do for PNDMScheduler: prediction_type given as evil" in err
    assert EngineDirectory(engines).entries() == []


def test_a_scheduler_of_another_name_does_without_the_models_class(run, folder, tmp_path):
    change(folder / "model_index.json", scheduler=["diffusers", "TomorrowsScheduler"])
    output = tmp_path / "x.png"
    request = ["txt2img", "-m", str(folder), "-b", "torch", "--steps", "1", "-p", "x", "-o", str(output)]
    code, _, err = run(*request, "--width", "64", "--height", "64", "--scheduler", "euler", "--seed", "1")
    assert code == 0, err
    assert output.exists()
