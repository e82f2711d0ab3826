"""What inspect reports of models and engines, and that it reads no weights for it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from factories import sd1_single_file, sdxl_folder, small_text_encoder, small_unet, small_vae
from safetensors.torch import load_file, save_file

from sdtrt.common.errors import UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models import loading
from sdtrt.models.resolve import resolve_model
from sdtrt.reports.inspection import human_bytes, human_count, inspect_engine, inspect_model
from sdtrt.specs import ModelSpec, Profile, Range, Sizes
from sdtrt.specs.contract import unet_contract


@pytest.fixture
def model(sd1):
    return resolve_model(ModelSpec(str(sd1)))


@pytest.fixture(autouse=True)
def no_tensor_is_read(monkeypatch):
    monkeypatch.setattr(loading, "read_tensors", lambda *_: pytest.fail("a tensor was read"))


def parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


UNET = small_unet("sd1", layers_per_block=1)  # as of the fixture sd1
EXPECTED = {"unet": parameters(UNET), "vae": parameters(small_vae())}
EXPECTED["text_encoder"] = parameters(small_text_encoder())


def test_reports_every_part_with_its_size(model, sd1):
    report = inspect_model(model)
    assert (report.pipeline, report.layout, report.height, report.width) == (
        "StableDiffusionPipeline",
        "folder",
        128,
        128,
    )
    parts = {part.name: part for part in report.parts}
    assert list(parts) == ["tokenizer", "text_encoder", "unet", "vae", "scheduler"]
    assert {name: parts[name].parameters for name in EXPECTED} == EXPECTED
    unet = parts["unet"]
    assert unet.class_name == "UNet2DConditionModel"
    assert unet.dtypes == ("float16",)
    assert unet.size_bytes == (sd1 / "unet/diffusion_pytorch_model.safetensors").stat().st_size
    assert unet.sizes["block_out_channels"] == [32, 32, 64, 64]
    assert unet.sizes["cross_attention_dim"] == 32
    assert parts["scheduler"].sizes["prediction_type"] == "epsilon"
    assert parts["scheduler"].parameters is None
    assert report.tree is None


def test_reports_a_single_file_part_by_part(sd1, tmp_path):
    file = sd1_single_file(tmp_path / "model.safetensors", layers_per_block=1)
    report = inspect_model(resolve_model(ModelSpec(str(file), config=str(sd1))))
    parts = {part.name: part for part in report.parts}
    assert {name: parts[name].parameters for name in EXPECTED} == EXPECTED
    assert parts["unet"].size_bytes == 2 * EXPECTED["unet"]
    assert parts["unet"].files == (file,)


def test_reports_mixed_dtypes_the_most_frequent_first(sd1, tmp_path):
    folder = shutil.copytree(sd1, tmp_path / "mixed")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] = tensors["conv_in.bias"].float()
    save_file(tensors, weights)
    report = inspect_model(resolve_model(ModelSpec(str(folder))), "unet")
    assert report.parts[0].dtypes == ("float16", "float32")


def test_reports_a_part_whose_weights_are_not_here(sd1, tmp_path):
    folder = shutil.copytree(sd1, tmp_path / "bare")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    (part,) = inspect_model(resolve_model(ModelSpec(str(folder))), "vae").parts
    assert (part.parameters, part.size_bytes, part.dtypes, part.files) == (EXPECTED["vae"], None, (), ())
    assert part.cells[3] == "not found"
    assert replace(part, fetchable=True).cells[3] == "not downloaded"


@pytest.mark.parametrize(
    ("part", "reference", "line"),
    [
        ("text_encoder", small_text_encoder(), f"{10 * ' '}k_proj: Linear, 1.1 k parameters (weight 32x32, bias 32)"),
        ("unet", UNET, "  conv_in: Conv2d, 1.2 k parameters (weight 32x4x3x3, bias 32)"),
    ],
    ids=["text_encoder", "unet"],
)
def test_the_tree_is_pytorchs_own(model, part, reference, line):
    tree = inspect_model(model, part, tree=True).tree

    def walk(node, prefix=""):
        yield prefix, node.class_name, node.parameters
        for child in node.children:
            yield from walk(child, f"{prefix}.{child.name}" if prefix else child.name)

    expected = [(name, type(module).__name__, parameters(module)) for name, module in reference.named_modules()]
    assert list(walk(tree)) == expected
    lines = list(tree.lines())
    assert len(lines) == len(expected)
    assert line in lines


def test_reports_go_to_json_and_to_the_screen(tmp_path, capsys):
    model = resolve_model(ModelSpec(str(sdxl_folder(tmp_path / "xl"))))
    report = inspect_model(model, "text_encoder_2", tree=True)
    data = json.loads(json.dumps(report.to_json()))
    assert data["parts"][0]["name"] == "text_encoder_2"
    assert data["tree"]["class_name"] == "CLIPTextModelWithProjection"
    assert Path(data["parts"][0]["files"][0]).is_file()
    report.print()
    shown = capsys.readouterr().out
    for text in ("StableDiffusionXLPipeline", "text_encoder_2", "45.9 k", "float16", "text_projection: Linear"):
        assert text in shown


@pytest.mark.parametrize(
    ("part", "tree", "message"),
    [
        ("unnet", False, "unknown part: 'unnet'"),
        ("text_encoder_2", False, "unknown part: 'text_encoder_2'"),
        ("scheduler", True, "the scheduler is no PyTorch module"),
        (None, True, "a module tree is of one part"),
    ],
)
def test_parts_that_cannot_be_shown(model, part, tree, message):
    with pytest.raises(UsageError, match=message):
        inspect_model(model, part, tree=tree)


def test_reports_an_engine(tmp_path, capsys):
    contract = unet_contract(dict(small_unet("sdxl").config), "fp16")
    profiles = (
        Profile.of(Sizes(2, 512, 768)),
        Profile(Range(1, 2, 4), Range(256, 512, 768), Range(256, 512, 768), Range(77, 77, 154)),
    )
    key = {
        "component": "unet",
        "precision": "fp16",
        "backend": "tensorrt",
        "backend_version": "10.9",
        "host": {"gpu": "NVIDIA L4", "compute_capability": [8, 9]},
        "profiles": [asdict(profile) for profile in profiles],
    }

    def make(folder):
        (folder / "engine.plan").write_bytes(b"x" * 1500)
        return {"contract": contract.to_json(), "model": "owner/name"}

    report = inspect_engine(EngineDirectory(tmp_path).obtain("engine", key, make))
    assert (report.backend, report.precision, report.model) == ("tensorrt", "fp16", "owner/name")
    assert [spec.name for spec in report.inputs] == [
        "sample",
        "timestep",
        "encoder_hidden_states",
        "text_embeds",
        "time_ids",
    ]
    assert report.profiles == profiles
    data = json.loads(json.dumps(report.to_json()))
    assert data["profiles"][0]["shapes"]["sample"] == [[2, 4, 64, 96]] * 3
    assert data["profiles"][1]["height"] == {"min": 256, "opt": 512, "max": 768}
    report.print()
    shown = capsys.readouterr().out
    for text in ("owner/name", "NVIDIA L4", "8x9", "1.5 kB", "encoder_hidden_states", "tokens 77:77:154"):
        assert text in shown


def test_an_engine_for_any_size_says_so(tmp_path, capsys):
    contract = unet_contract(dict(small_unet("sd1", layers_per_block=1).config), "fp32")
    key = {"component": "unet", "precision": "fp32"}
    report = inspect_engine(EngineDirectory(tmp_path).obtain("onnx", key, lambda _: {"contract": contract.to_json()}))
    report.print()
    assert "it takes any size" in capsys.readouterr().out
    assert report.to_json()["profiles"] == []


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, ""), (0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_960, "1.0 MB"), (3_438_000_000, "3.4 GB")],
)
def test_bytes_are_written_for_people(size, text):
    assert human_bytes(size) == text


@pytest.mark.parametrize(
    ("count", "text"), [(None, ""), (64, "64"), (1500, "1.5 k"), (859_520_964, "859.5 M"), (2_567_463_684, "2.6 G")]
)
def test_counts_are_written_for_people(count, text):
    assert human_count(count) == text
