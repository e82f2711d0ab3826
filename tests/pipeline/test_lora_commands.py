"""`--lora`: LoRAs merged into a model's weights for the commands, against plain diffusers; what is refused, and how."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import factories
import numpy as np
import pytest
import torch
import torch_engines
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from test_lora import ATTENTION, TEXT, kohya, random_adapter

import sdtrt
from sdtrt.backends.inductor.build import Request
from sdtrt.common.errors import ModelError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.keys import export_key
from sdtrt.exports.request import export_specs
from sdtrt.models import loading, lora_loading, loras
from sdtrt.models.components import contract_of
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.runs import settings
from sdtrt.specs import ExportRequest, ExportSpec, LoraSpec, ModelSpec, Profile, Sizes

pytestmark = pytest.mark.usefixtures("on_the_cpu")
FILE = "pytorch_lora_weights.safetensors"
TARGETS = [*ATTENTION, "conv1", "ff.net.2"]
CLASSES = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of small models of each kind, in fp32."""
    folder = tmp_path_factory.mktemp("lora-models")
    common = {"dtype": torch.float32, "norm_num_groups": 8}
    return {
        "sd1": factories.sd1_folder(folder / "sd1", **factories.SMALLEST["sd1"], **common),
        "sdxl": factories.sdxl_folder(folder / "sdxl", **factories.SMALLEST["sdxl"], **common),
    }


@pytest.fixture(scope="module")
def lora(models, tmp_path_factory):
    """Folders of LoRAs of each kind, as diffusers writes them."""
    folder = tmp_path_factory.mktemp("loras")

    def written(kind="sd1", seed=1):
        path = folder / f"{kind}-{seed}"
        if not path.exists():
            pipe = CLASSES[kind].from_pretrained(models[kind])
            layers = {"unet_lora_layers": random_adapter(pipe.unet, LoraConfig(r=4, target_modules=TARGETS), seed)}
            config = LoraConfig(r=2, target_modules=TEXT)
            for part in ("text_encoder", "text_encoder_2")[: 1 + (kind == "sdxl")]:
                layers[f"{part}_lora_layers"] = random_adapter(getattr(pipe, part), config, seed)
            type(pipe).save_lora_weights(path, **layers)
        return path

    return written


def spec_of(model, *texts):
    return ModelSpec(str(model), loras=tuple(map(LoraSpec.parse, texts)))


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("style.safetensors", "style.safetensors", 1),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("owner/name:-1", "owner/name", -1),
        ("C:/style.safetensors", "C:/style.safetensors", 1),
        ("a:b:2", "a:b", 2),
        ("a:b:1", "a:b", 1),
        ("a:2:1", "a:2", 1),
        ("style.safetensors:0.12345678", "style.safetensors", 0.12345678),
    ],
)
def test_a_name_may_have_a_weight(text, name, weight):
    assert LoraSpec.parse(text) == LoraSpec(name, weight)
    assert LoraSpec.parse(str(LoraSpec(name, weight))) == LoraSpec(name, weight)
    spec = ModelSpec("tiny", loras=(LoraSpec(name, weight),))
    assert ModelSpec.from_json(json.loads(json.dumps(asdict(spec)))) == spec
    contract = contract_of(resolve_model(ModelSpec("tiny")), "unet", "fp32")
    request = Request(ExportSpec(spec), Profile.of(Sizes(2, 64, 64)), contract, Path("folder"), "cpu")
    assert Request.from_json(json.loads(json.dumps(request.to_json()))).export.model == spec


@pytest.mark.parametrize("text", ["a:nan", "a:inf", " "])
def test_weights_that_are_no_numbers_are_refused(text):
    with pytest.raises(UsageError):
        LoraSpec.parse(text)


@pytest.mark.parametrize("loras", ["style.safetensors", ("style.safetensors",), (("style.safetensors", 0.8),)])
def test_loras_that_are_no_specs_are_refused(loras):
    with pytest.raises(UsageError, match="must be a LoraSpec, got") as caught:
        ModelSpec("tiny", loras=loras)
    assert "LoraSpec(" in caught.value.hint


def merged_by_diffusers(kind, model, adapters):
    """The parts of a pipeline with LoRAs fused by diffusers, by name."""
    pipe = CLASSES[kind].from_pretrained(model)
    for number, (path, _) in enumerate(adapters):
        pipe.load_lora_weights(str(path), adapter_name=f"of_{number}")
    pipe.set_adapters([f"of_{number}" for number in range(len(adapters))], [weight for _, weight in adapters])
    parts = [name for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, name)]
    pipe.fuse_lora(components=parts)
    pipe.unload_lora_weights()
    return {name: getattr(pipe, name).state_dict() for name in parts}


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_parts_are_loaded_with_loras_merged_as_diffusers_fuses_them(models, lora, kind):
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    texts = (f"{lora(kind)}:0.7", f"{lora(kind, 2) / FILE}:-0.4")
    model = resolve_model(spec_of(models[kind], *texts))
    loading.check_loras(model)
    expected = merged_by_diffusers(kind, models[kind], ((lora(kind), 0.7), (lora(kind, 2), -0.4)))
    plain = loading.load_parts(resolve_model(spec_of(models[kind])), [*expected, "vae"], torch.float32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = loading.load_parts(model, [*expected, "vae"], torch.float32)
    assert not [one for one in said if "peft" in one.filename], "that is advice for who writes Python"
    for name, state in expected.items():
        own = found[name].state_dict()
        assert own.keys() == state.keys()
        assert all(torch.allclose(own[key], one, atol=1e-6) for key, one in state.items())
        assert any(not torch.equal(own[key], one) for key, one in plain[name].state_dict().items())
        assert not any(one.requires_grad for one in found[name].parameters())
    assert all(torch.equal(one, found["vae"].state_dict()[key]) for key, one in plain["vae"].state_dict().items())


def test_kohyas_files_are_merged_with_their_alphas(models, lora, tmp_path):
    path = kohya(lora(), tmp_path / "kohya.safetensors")
    (own,) = resolve_model(spec_of(models["sd1"], path)).loras
    assert own.parts == ("unet", "text_encoder")
    expected = merged_by_diffusers("sd1", models["sd1"], ((path, 0.5),))
    found = loading.load_parts(resolve_model(spec_of(models["sd1"], f"{path}:0.5")), list(expected), torch.float32)
    for name, state in expected.items():
        own_state = found[name].state_dict()
        assert all(torch.allclose(own_state[key], one, atol=1e-6) for key, one in state.items())


def test_original_names_of_sdxls_blocks_are_merged_as_diffusers_fuses_them(models, lora, tmp_path):
    config, tensors = json.loads((models["sdxl"] / "unet" / "config.json").read_text()), {}
    for name, one in load_file(lora("sdxl") / FILE).items():
        if name.startswith("unet.") and "attentions" in name:
            layer, _, kind = name.removeprefix("unet.").partition(".lora_")
            original = factories.ldm_unet_key(f"{layer}.weight", config).removesuffix(".weight").replace(".", "_")
            tensors[f"lora_unet_{original}.{'lora_down' if kind[0] == 'A' else 'lora_up'}.weight"] = one
            tensors[f"lora_unet_{original}.alpha"] = torch.tensor(2.0)
    assert any("input_blocks" in name for name in tensors)
    save_file(tensors, path := tmp_path / "original.safetensors")
    model = resolve_model(spec_of(models["sdxl"], f"{path}:0.5"))
    loading.check_loras(model)
    assert model.loras[0].parts == ("unet",)
    expected = merged_by_diffusers("sdxl", models["sdxl"], ((path, 0.5),))["unet"]
    plain, found = (loading.load_unet(one, torch.float32).state_dict() for one in (replace(model, loras=()), model))
    assert all(torch.allclose(found[key], one, atol=1e-6) for key, one in expected.items())
    assert sum(not torch.equal(found[key], one) for key, one in plain.items()) == len(tensors) / 3


def test_a_fingerprint_has_what_is_merged_and_no_other_key_changes(models, lora):
    digest = EngineDirectory(models["sd1"].parent / "engines").file_digest
    plain = resolve_model(spec_of(models["sd1"]))
    one = resolve_model(spec_of(models["sd1"], str(lora())))
    half = resolve_model(spec_of(models["sd1"], f"{lora()}:0.5"))
    other = resolve_model(spec_of(models["sd1"], str(lora("sd1", 2))))
    prints = {part: [model.fingerprint(part, digest) for model in (plain, one, half, other)] for part in plain.parts}
    assert {part: len(set(found)) for part, found in prints.items() if part in ("unet", "text_encoder", "vae")} == {
        "unet": 4,
        "text_encoder": 4,
        "vae": 1,
    }
    assert export_key(plain, ExportSpec(), digest) != export_key(one, ExportSpec(), digest)
    whole = resolve_model(ModelSpec(str(models["sd1"]), loras=(LoraSpec(str(lora()), 1),)))  # not 1.0, as of a command
    assert whole.fingerprint("unet", digest) == one.fingerprint("unet", digest)
    assert lora() / FILE in one.files("unet")
    assert lora() / FILE not in one.files("vae")


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


COMMON = ("--prompt", "a red circle", "--steps", "2", "--seed", "1", "--height", "64", "--width", "64")


@pytest.mark.feature("LoRA, `--lora`", "sd1", "inductor")
def test_pictures_of_loras_in_pytorch_and_in_engines_without_weights(models, lora, run, tmp_path, monkeypatch):
    """And one engine for all of them, none of which `build` of an engine with weights has to make anew."""
    torch_engines.instead_of_inductor(monkeypatch)
    engines = ("--engine-dir", str(tmp_path / "engines"), "--model", str(models["sd1"]))
    shown, count = {}, 0
    for name, texts in {"bare": (), "one": (lora(),), "both": (f"{lora()}:0.5", lora("sd1", 2))}.items():
        options = [word for text in texts for word in ("--lora", str(text))]
        for backend in ("torch", "inductor"):
            file = tmp_path / f"{name}-{backend}.png"
            given = (*COMMON, *engines, *options, "--backend", backend, "--output", str(file), "--json")
            code, out, err = run("txt2img", *given)
            assert code == 0, err
            shown[name, backend] = pixels(file)
        assert np.abs(shown[name, "torch"] - shown[name, "inductor"]).max() <= 2
        entries = EngineDirectory(tmp_path / "engines").entries("engine")
        count = count or len(entries)
        assert len(entries) == count
    assert len({picture.tobytes() for picture in shown.values()}) >= 3
    facts = json.loads(out)["model"]["loras"]
    assert [(one["name"], one["weight"]) for one in facts] == [("sd1-1", 0.5), ("sd1-2", 1.0)]
    assert facts[0]["sha256"] == factories.sha256_of(lora() / FILE)
    text = Image.open(tmp_path / "both-inductor.png").text["parameters"]
    assert f'Lora hashes: "sd1-1: {facts[0]["web_ui_hash"]}, sd1-2: {facts[1]["web_ui_hash"]}"' in text
    assert 'Lora weights: "sd1-1: 0.5, sd1-2: 1.0"' in text


def test_names_in_lists_of_hashes_are_as_web_uis_write_and_find_them():
    own = {"name": "night, city: 2", "web_ui_hash": "12ab", "weight": 0.5}
    facts = {"model": {"loras": [own, {**own, "name": "plain"}]}}
    assert settings._listed(facts, "web_ui_hash") == "night city 2: 12ab, plain: 12ab"
    assert settings._listed(facts, "weight") == "night city 2: 0.5, plain: 0.5"


@pytest.mark.parametrize("alpha", [2.0, 4.0])
def test_a_lora_of_a_text_encoders_attention_without_its_output_is_whole(models, tmp_path, alpha):
    """diffusers drops it, or can't tell what it is: `to_out` is what it tells such names by."""
    layer, generator = "lora_te_text_model_encoder_layers_0_self_attn_{}_proj", torch.Generator().manual_seed(0)
    tensors = {}
    for name in ("q", "v"):
        tensors[f"{layer.format(name)}.lora_down.weight"] = torch.randn(2, 32, generator=generator)
        tensors[f"{layer.format(name)}.lora_up.weight"] = torch.randn(32, 2, generator=generator)
        tensors[f"{layer.format(name)}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "text.safetensors")
    bare, model = (resolve_model(spec_of(models["sd1"], *own)) for own in ((), (f"{tmp_path}/text.safetensors:0.5",)))
    loading.check_loras(model)
    before, after = (
        loading.load_parts(one, ["text_encoder"], torch.float32)["text_encoder"].state_dict() for one in (bare, model)
    )
    changed = {name for name, one in after.items() if not torch.equal(one, before[name])}
    assert {name.rpartition("self_attn.")[2] for name in changed} == {"q_proj.weight", "v_proj.weight"}
    for name in changed:
        key = layer.format(name.rpartition("self_attn.")[2][0])
        added = 0.5 * alpha / 2 * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
        assert torch.allclose(after[name], before[name] + added, atol=1e-6)


def test_layers_that_diffusers_leaves_out_are_named(models, lora, monkeypatch):
    model = resolve_model(spec_of(models["sd1"], str(lora())))
    loader, own = lora_loading._loader(model.config("unet")), lora_loading._loader

    class Forgetful(loader):
        @classmethod
        def load_lora_into_unet(cls, state, *args, **options):
            super().load_lora_into_unet(
                {name: one for name, one in state.items() if "conv1" not in name}, *args, **options
            )

    monkeypatch.setattr(lora_loading, "_loader", lambda unet: Forgetful if own(unet) is loader else own(unet))
    with pytest.raises(ModelError, match=r"diffusers leaves \d+ layers of .* for the unet out \(.*conv1"):
        loading.load_parts(model, ["unet"], torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_verify_and_bench_take_loras(models, lora, run, tmp_path, command):
    common = ("--model", str(models["sd1"]), "--steps", "2", "--height", "64", "--width", "64", "--json")
    common += ("--engine-dir", str(tmp_path / "engines"), "--output", str(tmp_path / "out"), "--backend", "onnxruntime")
    if command == "bench":
        common += ("--baselines", "none", "--task", "txt2img", "--repeats", "1", "--warmups", "1")
    code, out, err = run(command, *common, "--lora", f"{lora()}:0.5")
    assert code == 0, err
    engines = [one for one in EngineDirectory(tmp_path / "engines").entries("engine") if "unet" in one.name]
    assert [one.info["loras"] for one in engines] == [[f"{lora()}:0.5"]]
    assert command == "bench" or json.loads(out)["loras"] == [f"{lora()}:0.5"]
    others = [word if word != str(tmp_path / "out") else str(tmp_path / "none") for word in common]
    code, _, err = run(command, *others, "--lora", str(tmp_path / "none.safetensors"))
    assert code == 1
    assert "there is no LoRA at" in err


def test_load_takes_loras_by_the_models_spec(models, lora, tmp_path, monkeypatch):
    torch_engines.instead_of_inductor(monkeypatch)
    plain = StableDiffusionPipeline.from_pretrained(models["sd1"])
    plain.load_lora_weights(str(lora()), adapter_name="own")
    plain.set_adapters("own", 0.5)
    given = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
    options = {"height": 64, "width": 64, "backend": "inductor", "engine_dir": tmp_path, "progress": False}
    with contextlib.closing(sdtrt.load(spec_of(models["sd1"], f"{lora()}:0.5"), **options)) as pipe:
        found, expected = (
            one("a red circle", **given, generator=torch.Generator().manual_seed(1)).images for one in (pipe, plain)
        )
    assert float((found - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.feature("LoRA, `--lora`", "sd1", "onnxruntime")
def test_engines_with_weights_are_built_for_loras_and_say_what_that_costs(models, lora, run, tmp_path):
    engines = ("--engine-dir", str(tmp_path / "engines"), "--model", str(models["sd1"]), "--backend", "onnxruntime")
    once = ("--component", "unet", "--lora", str(lora()), "--output")
    code, _, err = run("txt2img", *COMMON, *engines, *once, str(tmp_path / "one.png"))
    assert code == 0, err
    assert "takes minutes" in err
    assert "--backend inductor takes any without a build" in err
    code, _, err = run("build", *engines, "--component", "unet", "--lora", f"{lora()}:0.5", "--precision", "fp32")
    assert code == 0, err
    assert len(EngineDirectory(tmp_path / "engines").entries("engine")) == 2
    code, _, err = run("txt2img", *COMMON, *engines, *once, str(tmp_path / "two.png"), "--no-build")
    assert code == 0, err
    torch_options = ("--model", str(models["sd1"]), "--backend", "torch", "--lora", str(lora()))
    assert run("txt2img", *COMMON, *torch_options, "--output", str(tmp_path / "plain.png"))[0] == 0
    assert np.abs(pixels(tmp_path / "two.png") - pixels(tmp_path / "plain.png")).max() <= 2
    missing = ("--component", "unet", "--lora", f"{lora()}:2", "--output", str(tmp_path / "no.png"), "--no-build")
    code, _, err = run("txt2img", *COMMON, *engines, *missing)
    assert code == 1
    assert f"--lora {lora()}:2" in err


def rewritten(lora, path, change):
    """A LoRA's file with other tensors."""
    tensors = load_file(lora / FILE)
    save_file(change(tensors), path)
    return str(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tensors: {name.replace("conv1", "conv7"): one for name, one in tensors.items()},
            r"layers that the unet has not \(.*conv7",
        ),
        (
            lambda tensors: {name.replace("unet.", "transformer."): one for name, one in tensors.items()},
            r"match nothing of Stable Diffusion \(transformer\.",
        ),
        (
            lambda tensors: {
                name: torch.zeros(4, 7) if name.endswith("to_q.lora_A.weight") else one for name, one in tensors.items()
            },
            r"layers of another shape \(.*to_q",
        ),
        (
            lambda tensors: {f"{name.rpartition('.')[0]}.hada_w1_a": one for name, one in tensors.items()},
            "is a LoHa, which diffusers doesn't read",
        ),
        (
            lambda tensors: tensors | {"unet.mid_block.resnets.0.conv1.dora_scale": torch.ones(32)},
            "is a DoRA with dora_scale, which diffusers doesn't read",
        ),
        (lambda tensors: {}, "has no tensors"),
        (
            lambda tensors: {
                name: one for name, one in tensors.items() if not name.endswith("attn1.to_q.lora_B.weight")
            },
            r"has no pair of matrices of one rank for \d+ layers of the unet \(.*attn1\.to_q",
        ),
        (
            lambda tensors: {
                name: torch.cat([one, one]) if name.endswith("to_k.lora_A.weight") else one
                for name, one in tensors.items()
            },
            r"no pair of matrices of one rank .*to_k",
        ),
    ],
    ids=["layers", "names", "shapes", "kinds", "scales that are dropped", "nothing", "one matrix alone", "ranks"],
)
def test_keys_that_match_nothing_are_named_before_anything_heavy(models, lora, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(loading, "_load_module", pytest.fail)
    path = rewritten(lora(), tmp_path / "odd.safetensors", change)
    request = ExportRequest(ExportSpec(spec_of(models["sd1"], path)))
    with pytest.raises(ModelError, match=words) as caught:
        list(export_specs(resolve_model(request.common.model), request))
    assert str(path) in caught.value.message


def test_loras_for_another_architecture_are_refused_by_name(models, lora):
    with pytest.raises(ModelError, match=r"sdxl-1.* is for a model whose text has the width 64, and .*sd1 is"):
        resolve_model(spec_of(models["sd1"], str(lora("sdxl"))))
    with pytest.raises(ModelError, match=r"sd1-1.* is for a model whose text has the width 32, and .*sdxl is"):
        resolve_model(spec_of(models["sdxl"], str(lora())))
    assert loras.kind_of_width(2048) == "Stable Diffusion XL (text of width 2048)"


def test_a_lora_of_the_second_text_encoder_is_for_sdxl_alone(models, lora, tmp_path):
    path = rewritten(
        lora("sdxl"),
        tmp_path / "encoder.safetensors",
        lambda tensors: {name: one for name, one in tensors.items() if name.startswith("text_encoder_2.")},
    )
    assert resolve_model(spec_of(models["sdxl"], path)).loras[0].parts == ("text_encoder_2",)
    with pytest.raises(ModelError, match=r"for a model with a text_encoder_2, which .*sd1 has not"):
        resolve_model(spec_of(models["sd1"], path))


def test_files_that_are_no_loras_are_refused(models, lora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "several").mkdir()
    for name in ("a", "b"):
        save_file({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path / "several" / f"{name}.safetensors")
    torch.save({}, tmp_path / "lora.bin")
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path / "here.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    cases = {
        "nowhere.safetensors": (ModelError, "there is no LoRA at nowhere.safetensors"),
        "here.safetensors:abc": (UsageError, "the weight of here.safetensors must be a number, got 'abc'"),
        "here.safetensors:": (UsageError, "the weight of here.safetensors must be a number, got ''"),
        "tests/at/all.safetensors": (ModelError, "there is no LoRA at"),
        "owner/name/all.txt": (ModelError, "there is no LoRA at"),
        "https://huggingface.co/a/b": (UsageError, "takes no web address"),
        str(tmp_path / "empty"): (ModelError, "has no .safetensors file"),
        str(tmp_path / "several"): (ModelError, r"has 2 .safetensors files \(a.safetensors, b"),
        str(tmp_path / "lora.bin"): (ModelError, "is a pickle file"),
        str(tmp_path / "text.safetensors"): (ModelError, "is not a safetensors file"),
        str(models["sd1"] / "unet"): (ModelError, "match nothing of Stable Diffusion"),
    }
    for text, (error, words) in cases.items():
        with pytest.raises(error, match=words) as caught:
            resolve_model(spec_of(models["sd1"], text))
        assert "checkpoint" not in caught.value.hint, "a LoRA is none"
    monkeypatch.setattr(loras, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="need peft") as caught:
        resolve_model(spec_of(models["sd1"], str(lora())))
    assert "pip install" in caught.value.hint


def test_numbers_that_overflow_are_refused(models, lora):
    model = resolve_model(spec_of(models["sd1"], f"{lora()}:1e38"))
    with pytest.raises(ModelError, match="not finite in float16") as caught:
        loading.load_parts(model, ["text_encoder"], torch.float16)
    assert "smaller weights" in caught.value.hint


def test_what_peft_can_not_merge_is_refused_by_its_file(models, lora, tmp_path):
    key = next(name for name in load_file(lora() / FILE) if name.endswith("to_q.lora_B.weight"))
    bias = {key.replace("weight", "bias"): torch.zeros(32)}  # the layer has none
    path = rewritten(lora(), tmp_path / "biased.safetensors", lambda tensors: tensors | bias)
    with pytest.raises(ModelError, match=r"biased.safetensors: peft can't merge .*to_q") as caught:
        loading.load_unet(resolve_model(spec_of(models["sd1"], path)), torch.float32)
    assert "pipe" not in caught.value.hint


def test_a_web_uis_hash_is_of_the_tensors_alone_or_of_the_training(lora, tmp_path):
    tensors = load_file(lora() / FILE)
    notes = {"a": {"note": "1"}, "b": {"note": "another"}, "c": {"sshs_model_hash": "0123456789abcdef"}}
    for name, metadata in notes.items():
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
    a, b, c = (loras.web_ui_hash(tmp_path / f"{name}.safetensors") for name in "abc")
    assert a == b
    assert c == "0123456789ab"
