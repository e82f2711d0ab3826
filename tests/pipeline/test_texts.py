"""What the commands make of texts: embeddings, web UIs' weights, long prompts and skipped layers, against diffusers."""

from __future__ import annotations

import contextlib
import json
import time

import factories
import numpy as np
import pytest
import torch
import torch_engines
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from test_textual_inversion import vectors

import sdtrt
from sdtrt.common.errors import ModelError, UsageError
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.inputs.images import read_metadata, read_parameters
from sdtrt.pipeline.inputs.text_states import plan_texts
from sdtrt.pipeline.inputs.weighted_prompts import check_syntax, chunks_of, sections
from sdtrt.specs import EmbeddingSpec, GenerateSpec, ModelSpec

pytestmark = pytest.mark.usefixtures("on_the_cpu")
CLASSES = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
BACKENDS = ["torch", "inductor", pytest.param("onnxruntime", marks=pytest.mark.slow)]  # PyTorch for Inductor
LONG = ", ".join(["a red circle on a blue background"] * 12)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of small models of each kind, in fp32."""
    folder, common = tmp_path_factory.mktemp("text-models"), {"dtype": torch.float32, "norm_num_groups": 8}
    made = {
        "sd1": factories.sd1_folder(folder / "sd1", **factories.SMALLEST["sd1"], **common),
        "sdxl": factories.sdxl_folder(folder / "sdxl", **factories.SMALLEST["sdxl"], **common),
    }
    file = made["sd1"] / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["text_model.final_layer_norm.bias"] += 0.1  # else the mean of all states, which web UIs keep, is none
    save_file(tensors, file, metadata={"format": "pt"})
    return made


@pytest.fixture
def make(models, run, tmp_path):
    """Make one picture by `sdtrt txt2img`; returns its values, what it carries, and what was said."""

    def made(text, *options, kind="sd1", backend="torch"):
        file = tmp_path / "made.png"
        given = (
            "--model",
            str(models[kind]),
            "--backend",
            backend,
            "--output",
            str(file),
            "--overwrite",
            "--steps",
            "2",
        )
        engines = ("--engine-dir", str(tmp_path / "engines"), "--precision", "fp32")
        code, _, err = run(
            "txt2img", text, *given, *engines, "--seed", "3", "--height", "64", "--width", "64", *options
        )
        assert code == 0, err
        return np.asarray(Image.open(file)).astype(int), file, err

    return made


def plain(pipe, prompt=None, **options):
    """The picture of plain diffusers."""
    pipe.set_progress_bar_config(disable=True)
    given = {
        "num_inference_steps": 2,
        "height": 64,
        "width": 64,
        "output_type": "pil",
        "guidance_scale": 7.5,
        **options,
    }
    return np.asarray(pipe(prompt, **given, generator=torch.Generator().manual_seed(3)).images[0]).astype(int)


def opened(models, kind="sd1"):
    return CLASSES[kind].from_pretrained(models[kind], torch_dtype=torch.float32)


def differ(found, expected):
    return int(np.abs(found - expected).max())


def written(folder, form):
    """A file of a textual inversion in one of the formats that there are, and its word."""
    if form == "diffusers":
        save_file({"<cat>": vectors(1)[0]}, path := folder / "learned_embeds.safetensors")
        return path, "<cat>"
    if form == "emb_params":
        save_file({"emb_params": vectors(3)}, path := folder / "fluffy.safetensors")
        return path, "fluffy"
    if form == "sdxl":
        save_file({"clip_l": vectors(2), "clip_g": vectors(2, seed=8)}, path := folder / "puffy.safetensors")
        return path, "puffy"
    own = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors(2)}, "name": "furry", "step": 100}
    torch.save({**own, "sd_checkpoint": None}, path := folder / "other.pt")
    return path, "furry"


@pytest.mark.parametrize("form", ["diffusers", "emb_params", "web-ui"])
def test_an_embedding_of_each_format_gives_diffusers_picture(make, models, tmp_path, form):
    path, word = written(tmp_path, form)
    pipe = opened(models)
    if form == "emb_params":
        pipe.load_textual_inversion(str(path), token="fluffy")
    else:
        pipe.load_textual_inversion(str(path))
    text = f"a {word} circle"
    found, file, _ = make(text, "--embedding", str(path))
    assert differ(found, plain(pipe, text)) <= 1
    assert differ(found, plain(opened(models), text)) > 1
    assert read_parameters(file).fields["TI hashes"].startswith(f"{path.stem}: ")
    (facts,) = read_metadata(file).details["embeddings"]
    assert facts["token"] == word
    named, _, _ = make("a dog2 circle", "--embedding", f"{path}:dog2")
    assert differ(named, found) <= 1


def test_sdxls_embeddings_are_for_both_encoders(make, models, tmp_path):
    path, _ = written(tmp_path, "sdxl")
    pipe = opened(models, "sdxl")
    for end, seed in (("", 7), ("_2", 8)):
        own = {"text_encoder": getattr(pipe, f"text_encoder{end}"), "tokenizer": getattr(pipe, f"tokenizer{end}")}
        pipe.load_textual_inversion(vectors(2, seed=seed), token="puffy", **own)
    found, _, _ = make("a puffy circle", "--embedding", str(path), kind="sdxl")
    assert differ(found, plain(pipe, "a puffy circle")) <= 1


def spec_of(models, kind="sd1", **options):
    return GenerateSpec(("a circle",), model=ModelSpec(str(models[kind])), **options)


def refused(models, *paths, kind="sd1", **options):
    spec = spec_of(models, kind, embeddings=tuple(EmbeddingSpec.parse(str(path)) for path in paths), **options)
    with pytest.raises((ModelError, UsageError)) as caught:
        plan_texts(spec, resolve_model(spec.model))
    return caught.value.message


def test_embeddings_that_do_not_fit_are_refused_by_name(models, tmp_path):
    save_file({"wide": vectors(2, width=48)}, tmp_path / "wide.safetensors")
    save_file({"a": vectors(2), "b": vectors(2)}, tmp_path / "two.safetensors")
    save_file({"nan": vectors(2) / 0 * 0}, tmp_path / "nan.safetensors")
    (tmp_path / "text.pt").write_text("text")
    (diffusers, _), (sdxl, _) = written(tmp_path, "diffusers"), written(tmp_path, "sdxl")
    assert "vectors of width 48, and the text_encoder of" in refused(models, tmp_path / "wide.safetensors")
    assert "text encoders clip_l and clip_g, and" in refused(models, sdxl)
    assert "is for the text encoder clip_l, and" in refused(models, diffusers, kind="sdxl")
    assert "is no embedding" in refused(models, tmp_path / "two.safetensors")
    assert "not finite" in refused(models, tmp_path / "nan.safetensors")
    assert "can't read the embedding" in refused(models, tmp_path / "text.pt")
    assert "there is no embedding at" in refused(models, tmp_path / "missing.pt")
    assert "'<cat>' of" in refused(models, diffusers, diffusers)
    assert "'a</w>' of" in refused(models, f"{diffusers}:a</w>")


class Hostile:
    def __reduce__(self):
        return print, ("code ran",)


def test_an_embedding_runs_no_code(models, tmp_path, capsys):
    torch.save({"string_to_param": {"*": Hostile()}, "name": "x"}, tmp_path / "bad.pt")
    assert "can't read the embedding" in refused(models, tmp_path / "bad.pt")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "name", "token"),
    [
        ("cat.safetensors", "cat.safetensors", None),
        ("cat.pt:<cat>", "cat.pt", "<cat>"),
        ("C:/cat.bin", "C:/cat.bin", None),
        ("a:b.pt:c", "a:b.pt", "c"),
    ],
)
def test_a_file_may_have_a_token(text, name, token):
    assert EmbeddingSpec.parse(text) == EmbeddingSpec(name, token)
    assert str(EmbeddingSpec(name, token)) == text


# --- web UIs' syntax ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog", [[("a dog", 1)]]),
        ("a (red) dog", [[("a ", 1), ("red", 1.1), (" dog", 1)]]),
        ("((red))", [[("red", 1.21)]]),
        ("[red]", [[("red", 1 / 1.1)]]),
        ("(red:1.5), (a (b:2):0.5)", [[("red", 1.5), (", ", 1), ("a ", 0.5), ("b", 1)]]),
        (r"a \(red\) (b\\:1.2)", [[("a (red) ", 1), ("b\\", 1.2)]]),
        ("(open [and", [[("open ", 1.1), ("and", 1)]]),
        ("closed) ] :1.3)", [[("closed) ] :1.3)", 1)]]),
        ("a BREAK b BREAK", [[("a", 1)], [("b", 1)], []]),
        ("", [[]]),
        ("time: 10:30", [[("time: 10:30", 1)]]),
    ],
)
def test_weights_are_read_as_web_uis_do(text, expected):
    found = sections(text)
    assert [[one for one, _ in section] for section in found] == [[one for one, _ in section] for section in expected]
    weights = [[weight for _, weight in section] for section in found]
    assert weights == [[pytest.approx(weight) for _, weight in section] for section in expected]


def test_syntax_that_is_not_read_is_refused(models):
    for text in ("a <lora:b:1>", "[cat:dog:0.5]", "[cat:0.5]", "[a|b]", "a AND b"):
        spec = GenerateSpec((text,), model=ModelSpec(str(models["sd1"])), prompt_syntax="webui")
        with pytest.raises(UsageError, match="reads weights and BREAK, not"):
            plan_texts(spec, resolve_model(spec.model))
    with pytest.raises(UsageError, match="opens more than 100 brackets"):
        sections("(" * 101)
    spec = GenerateSpec(("a " * 2500,), model=ModelSpec(str(models["sd1"])), prompt_syntax="webui")
    with pytest.raises(UsageError, match="a prompt takes 34 chunks"):
        plan_texts(spec, resolve_model(spec.model))


def test_chunks_end_at_commas_and_keep_an_embedding_whole(models):
    tokenizer = opened(models).tokenizer
    tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2"])
    words = [len(one) for one in chunks_of(tokenizer, "a " * 60 + ", " + "a " * 60)]
    assert words == [61, 60]
    assert [len(one) for one in chunks_of(tokenizer, "a " * 160)] == [75, 75, 10]
    assert [len(one) for one in chunks_of(tokenizer, "a " * 73 + "<cat> a")] == [73, 4]
    assert [len(one) for one in chunks_of(tokenizer, "a BREAK a a BREAK")] == [1, 2]
    assert chunks_of(tokenizer, "") == [[]]


def test_a_hostile_prompt_takes_no_time():
    many, start = 100_000, time.process_time()
    for text in ("a", "()", "a:", "[]", "\\", "a:1", "(a", ":", "[:1", "[a|"):
        with contextlib.suppress(UsageError):
            check_syntax(text * many)
            sections(text * many)
    for text in ("(a:" + "1" * many, "[a:" + "1" * many, "(a:" + " " * many, "[a:" + " " * many):
        check_syntax(text)
        sections(text)
    assert time.process_time() - start < 5
    with pytest.raises(UsageError, match="the weight 9999 is beyond 1000"):
        sections("(a:9999)")


def states(pipe, rows, part="text_encoder"):
    """A web UI's states of chunks of tokens and weights, by its own formula."""
    encoder, tokenizer, found = getattr(pipe, part), getattr(pipe, part.replace("text_encoder", "tokenizer")), []
    for row in rows:
        ids = [tokenizer.bos_token_id, *(one for one, _ in row), tokenizer.eos_token_id]
        weights = torch.tensor([1.0, *(weight for _, weight in row), 1.0] + [1.0] * (77 - len(ids)))
        ids += [tokenizer.pad_token_id] * (77 - len(ids))
        with torch.no_grad():
            output = encoder(torch.tensor([ids]), output_hidden_states=True)
        own = output.last_hidden_state if isinstance(pipe, StableDiffusionPipeline) else output.hidden_states[-2]
        heavy = own * weights[None, :, None]
        found.append((heavy * own.mean() / heavy.mean(), output[0]))
    return torch.cat([one for one, _ in found], dim=1), found[0][1]


def ids(pipe, text, weight=1.0, end=""):
    tokens = getattr(pipe, f"tokenizer{end}")(text, add_special_tokens=False).input_ids
    return [(token, weight) for token in tokens]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.feature("Weighted and long prompts (`--prompt-syntax webui`)", "sd1", "onnxruntime inductor")
def test_weights_and_chunks_are_a_web_uis(make, models, backend, monkeypatch):
    torch_engines.instead_of_inductor(monkeypatch)
    pipe = opened(models)
    rows = [[*ids(pipe, "a "), *ids(pipe, "red", 1.4), *ids(pipe, " circle")], ids(pipe, "on blue")]
    negative = [ids(pipe, "green", 1.1), []]
    embeds = {"prompt_embeds": states(pipe, rows)[0], "negative_prompt_embeds": states(pipe, negative)[0]}
    options = ("--prompt-syntax", "webui", "--negative-prompt", "(green)")
    found, file, _ = make("a (red:1.4) circle BREAK on blue", *options, backend=backend)
    assert differ(found, plain(pipe, **embeds)) <= 2
    assert "Emphasis" not in read_parameters(file).fields
    assert read_metadata(file).details["tokens"] == 154


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.feature("Weighted and long prompts (`--prompt-syntax webui`)", "sdxl", "onnxruntime inductor")
def test_weights_of_sdxl_are_a_web_uis(make, models, backend, monkeypatch):
    torch_engines.instead_of_inductor(monkeypatch)
    pipe = opened(models, "sdxl")
    rows = [[*ids(pipe, "a "), *ids(pipe, "red", 1.4), *ids(pipe, " circle")]]
    (one, _), (two, pooled) = states(pipe, rows), states(pipe, rows, "text_encoder_2")
    whole = torch.cat([one, two], dim=-1)
    nothing = {"negative_prompt_embeds": whole * 0, "negative_pooled_prompt_embeds": pooled * 0}
    found, _, _ = make("a (red:1.4) circle", "--prompt-syntax", "webui", kind="sdxl", backend=backend)
    assert differ(found, plain(pipe, prompt_embeds=whole, pooled_prompt_embeds=pooled, **nothing)) <= 2


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_text_without_syntax_is_the_same_in_both(make, kind):
    assert np.array_equal(
        make("a red circle", kind=kind)[0], make("a red circle", "--prompt-syntax", "webui", kind=kind)[0]
    )


def test_prompts_of_a_batch_are_filled_up_to_the_longest(models, tmp_path):
    """And each is the picture that it is alone beside the same ones; from an image, too."""
    Image.new("RGB", (64, 64), "red").save(start := tmp_path / "start.png")
    prompts = ("a (red:1.3) circle", "a BREAK star", "a circle")
    common = {"backend": "torch", "steps": 4, "height": 64, "width": 64, "seed": 1, "prompt_syntax": "webui"}
    for number, more in enumerate(({}, {"init_image": start, "strength": 0.5})):
        made = []
        for size in (1, 3):
            output = tmp_path / f"{number}-{size}"
            spec = GenerateSpec(
                prompts, ModelSpec(str(models["sd1"])), batch_size=size, output=output, **common, **more
            )
            made.append([np.asarray(Image.open(one.path)).astype(int) for one in sdtrt.generate(spec).images])
        assert all(differ(one, other) <= 1 for one, other in zip(*made, strict=True))


def test_what_plain_text_leaves_out_is_said_with_the_way(make):
    _, _, err = make(LONG)
    assert "this part of it is ignored" in err
    assert "--prompt-syntax webui" in err
    _, _, err = make("a (red:1.3) circle")
    assert "taken literally: '(red:1.3)'" in err
    assert "--prompt-syntax webui" in err
    _, file, err = make(LONG, "--prompt-syntax", "webui")
    assert "ignored" not in err
    assert read_metadata(file).details["tokens"] == 4 * 77


# --- skipped layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.feature("`clip_skip`", "sd1", "onnxruntime inductor")
def test_skipped_layers_are_diffusers(make, models, backend, monkeypatch):
    """Stable Diffusion's pipelines of diffusers fail at it with transformers 5: its states are made here by hand."""
    torch_engines.instead_of_inductor(monkeypatch)
    pipe = opened(models)
    encoder = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    tokens = pipe.tokenizer("a circle", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        skipped = encoder.final_layer_norm(pipe.text_encoder(tokens, output_hidden_states=True).hidden_states[-2])
    _, nothing = pipe.encode_prompt("", pipe.device, 1, True)
    found, file, err = make("a circle", "--clip-skip", "1", backend=backend)
    assert differ(found, plain(pipe, prompt_embeds=skipped, negative_prompt_embeds=nothing)) <= 2
    assert read_parameters(file).fields["Clip skip"] == "2"
    assert ("text_encoder: in PyTorch, in fp32, for --clip-skip" in err) == (backend != "torch")


def test_skipped_layers_of_sdxl_are_diffusers(make, models):
    found, file, _ = make("a circle", "--clip-skip", "1", "--negative-prompt", "blue", kind="sdxl")
    assert differ(found, plain(opened(models, "sdxl"), "a circle", negative_prompt="blue", clip_skip=1)) <= 1
    assert read_parameters(file).fields["Clip skip"] == "3"


def test_more_layers_than_there_are_is_refused(models):
    assert "skips more layers than" in refused(models, clip_skip=4)
    assert "has to skip, 2" in refused(models, clip_skip=3, kind="sdxl")
    with pytest.raises(UsageError, match="clip-skip must be at least 0"):
        spec_of(models, clip_skip=-1)


def test_generate_takes_them_too(models, tmp_path):
    path, word = written(tmp_path, "emb_params")
    options = {"embeddings": (EmbeddingSpec(str(path)),), "clip_skip": 1, "prompt_syntax": "webui", "backend": "torch"}
    given = {"model": str(models["sd1"]), "steps": 1, "height": 64, "width": 64, "output": tmp_path / "x.png"}
    report = sdtrt.generate(f"a ({word}:1.2)", progress=False, **options, **given)
    data = json.loads(json.dumps(report.to_json()))
    assert (data["clip_skip"], data["prompt_syntax"]) == (1, "webui")
