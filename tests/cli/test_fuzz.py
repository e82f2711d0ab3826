"""Whatever comes in from outside: only clean errors.

`SDTRT_FUZZ_SECONDS=600 pytest -s tests/cli/test_fuzz.py` runs each target for ten minutes.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import string
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import factories
import pytest
import torch
from factories import sd1_folder, unet_engine
from fault_server import UNET
from fuzzing import fuzz, only_clean_errors
from hypothesis import strategies as st
from PIL import Image

from sdtrt.backends import registry
from sdtrt.backends.onnxruntime.build import optimize
from sdtrt.backends.open import open_session
from sdtrt.cli.main import main
from sdtrt.common.console import QUIET
from sdtrt.common.errors import MALFORMED, BuildError, EngineError, ModelError, UsageError
from sdtrt.engines import upkeep
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import SIDECAR, entry_name, seal_of
from sdtrt.engines.publish import seal
from sdtrt.models.loading import load_parts
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.inputs import images
from sdtrt.pipeline.parts.scheduler_checks import check_steps
from sdtrt.pipeline.runs.generate import generate
from sdtrt.reports.inspection import inspect_engine
from sdtrt.specs import GenerateSpec, ModelSpec, PruneSpec, Sizes, bytes_of

SIZES = Sizes(2, 64, 64)
CPU = torch.device("cpu")

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
TEXTS = st.text(max_size=300) | st.text(alphabet=string.printable + "\x00\x1b\x7f\x9b\u202e\u200d🎨é", max_size=100)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The smallest model there is."""
    return sd1_folder(tmp_path_factory.mktemp("models") / "sd1", cross_attention_dim=32, **UNET)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    """An engine directory with an export and an engine of it; tests give back what they change."""
    found = EngineDirectory(tmp_path_factory.mktemp("shared") / "engines")
    unet_engine(resolve_model(ModelSpec(str(model))), "onnxruntime", "fp32", SIZES, found)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


def damaged(draw, data: bytes) -> bytes:
    """Some bytes changed, cut out, put in or doubled."""
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, max(0, len(data) - 1)))
        noise = draw(st.binary(max_size=16) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff"]))
        cut = draw(st.integers(0, 16) | st.integers(0, len(data)))
        data = data[:position] + noise + data[position + cut :]
    return data


# ---------------------------------------------------------------------------------------------------------- sidecars


@st.composite
def changes(draw):
    """Where in a sidecar something else is put, and what."""
    keys = ("key", "info", "files", "kind", "created", "format", "export", "profiles", "contract", "options", "host")
    names = (*keys, "inputs", "dims", "backend", "precision", "size_bytes", "sha256", "engine.onnx", "component")
    return [(draw(st.sampled_from(names)), draw(JSON_VALUES)) for _ in range(draw(st.integers(1, 3)))]


def put(data, name, value):
    """Put a value in place of every one of that name, wherever it is."""
    if isinstance(data, dict):
        return {key: value if key == name else put(inner, name, value) for key, inner in data.items()}
    return [put(inner, name, value) for inner in data] if isinstance(data, list) else data


def use_everything(directory, model):
    """All that reads sidecars."""
    resolved = resolve_model(ModelSpec(str(model)))
    list(upkeep.check(directory))
    upkeep.prunable(directory, PruneSpec(older_than_days=1, keep_bytes=10, foreign=True), registry.is_foreign)
    entry = factories.find_engine(resolved, "onnxruntime", "fp32", SIZES, directory)
    for found in directory.entries():
        json.dumps(found.to_json())
        with only_clean_errors():
            inspect_engine(found).print()
        with only_clean_errors(), open_session(found, CPU):
            pass
    if entry is not None:
        with only_clean_errors(), open_session(entry, CPU):
            pass


@fuzz(changes=changes(), sealed=st.booleans())
def test_sidecars_that_lie(directory, model, changes, sealed):
    for entry in directory.entries():
        sidecar = entry.path / SIDECAR
        before = sidecar.read_bytes()
        data = json.loads(before)
        for name, value in changes:
            data = put(data, name, value)
        folder = entry.path
        try:
            if sealed and isinstance(data, dict):
                with contextlib.suppress(*MALFORMED):
                    data["seal"] = seal_of(data)
                with contextlib.suppress(*MALFORMED, OSError):  # a liar would name the folder to fit
                    folder = entry.path.rename(entry.path.with_name(entry_name(data["kind"], data["key"])))
            (folder / SIDECAR).write_text(json.dumps(data))
            with contextlib.redirect_stdout(io.StringIO()), only_clean_errors():
                use_everything(directory, model)
        finally:
            folder.rename(entry.path)
            sidecar.write_bytes(before)


@st.composite
def damages(draw, data):
    return damaged(draw, data)


@fuzz(data=st.data())
def test_sidecars_that_are_damaged(directory, model, data):
    entry = directory.entries("engine")[0]
    sidecar = entry.path / SIDECAR
    before = sidecar.read_bytes()
    try:
        sidecar.write_bytes(data.draw(damages(before) | st.sampled_from([b"[" * 100_000, b"{}", b"1e999"])))
        with contextlib.redirect_stdout(io.StringIO()), only_clean_errors():
            use_everything(directory, model)
    finally:
        sidecar.write_bytes(before)


# -------------------------------------------------------------------------------------------------------- ONNX files


@fuzz(data=st.data(), sealed=st.booleans())
def test_onnx_files_that_are_damaged(directory, place, data, sealed):
    """`sealed`: with digests that fit, as a liar would write them."""
    copied = EngineDirectory(place / "onnx")
    shutil.rmtree(copied.path, ignore_errors=True)
    shutil.copytree(directory.path, copied.path)
    entry = copied.entries("engine")[0]
    path = entry.file("engine.onnx")
    path.write_bytes(data.draw(damages(path.read_bytes())))
    if sealed:
        (entry.path / SIDECAR).unlink()
        seal(entry.path, entry.kind, entry.key, entry.info)
    for found in copied.entries("engine"):
        with only_clean_errors(), open_session(found, CPU) as session:
            session.run({})


@fuzz(examples=15, data=st.data())
def test_exports_that_are_damaged(directory, place, data):
    source = directory.entries("onnx")[0]
    path = place / "model.onnx"
    path.write_bytes(data.draw(damages(source.file("model.onnx").read_bytes())))
    contract = engines_contract(source)
    (place / "engine.onnx").unlink(missing_ok=True)
    with only_clean_errors():
        optimize(path, place, contract, QUIET)


def engines_contract(entry):
    from sdtrt.engines.entry import stored_contract

    return stored_contract(entry)


# ------------------------------------------------------------------------------------------------------------ models


@fuzz(data=st.data(), name=st.sampled_from(["unet", "vae", "text_encoder", "tokenizer", "scheduler", ""]))
def test_models_that_are_damaged(model, place, data, name):
    folder = place / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    path = data.draw(st.sampled_from(sorted(path for path in (folder / name).iterdir() if path.is_file())))
    content = path.read_bytes()
    if path.suffix == ".json" and data.draw(st.booleans()):
        values = json.loads(content)
        key = data.draw(st.sampled_from(sorted(values)))
        values[key] = data.draw(JSON_VALUES)
        content = json.dumps(values).encode()
    else:
        length = 4096 if path.suffix == ".safetensors" else len(content)  # the header, not the numbers
        content = data.draw(damages(content[:length])) + content[length:]
    path.write_bytes(content)
    with only_clean_errors():
        resolved = resolve_model(ModelSpec(str(folder)))
        check_steps(load_parts(resolved, resolved.parts, torch.float32)["scheduler"], 3)


# ------------------------------------------------------------------------------------------------------------ images


def encoded(image_format: str) -> bytes:
    buffer = io.BytesIO()
    picture = Image.effect_noise((24, 16), 50).convert("P" if image_format == "GIF" else "RGB")
    picture.save(buffer, image_format)
    return buffer.getvalue()


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA")
ENCODED = {name: encoded(name) for name in FORMATS}


@fuzz(examples=200, data=st.data(), image_format=st.sampled_from(FORMATS))
def test_images_that_are_damaged(place, data, image_format):
    path = place / f"init.{image_format.lower()}"
    path.write_bytes(data.draw(damages(ENCODED[image_format])))
    with only_clean_errors():
        init = images.read_init_image(path)
        assert init.pixels.width * init.pixels.height <= images.MAX_INIT_PIXELS
    with only_clean_errors():
        images.read_metadata(path)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


KEYWORDS = st.sampled_from([b"parameters", b"sdtrt", b"XML:com.adobe.xmp", b"Raw profile type exif", b"", b"x" * 90])


@fuzz(
    examples=200,
    kind=st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP"]),
    keyword=KEYWORDS,
    text=st.binary(max_size=200) | TEXTS.map(str.encode) | JSON_VALUES.map(lambda value: json.dumps(value).encode()),
    packed=st.booleans(),
    noise=st.binary(max_size=4),
)
def test_texts_in_png_files(place, kind, keyword, text, packed, noise):
    body = keyword + b"\0" + noise + (zlib.compress(text) if packed else text)
    path = place / "text.png"
    data = ENCODED["PNG"]
    path.write_bytes(data[:33] + chunk(kind, body) + data[33:])
    with only_clean_errors():
        images.read_metadata(path)
    with only_clean_errors():
        images.read_parameters(path)
    with only_clean_errors():
        images.read_init_image(path)


# ----------------------------------------------------------------------------------------------------------- prompts


@fuzz(examples=8, prompt=TEXTS, negative=TEXTS)
def test_prompts(directory, model, place, prompt, negative):
    output = place / "pictures"
    shutil.rmtree(output, ignore_errors=True)
    with only_clean_errors():
        spec = GenerateSpec((prompt,), ModelSpec(str(model)), "onnxruntime", "fp32", negative, steps=1, output=output)
        report = generate(replace(spec, height=64, width=64), directory, QUIET)
        path = report.images[0].path
        assert path.parent == output
        assert [path] == list(output.iterdir())
        assert images.read_metadata(path).details["prompt"] == prompt


# ----------------------------------------------------------------------------------------------------------- options

WORDS = st.sampled_from(["", "0", "-1", "nan", "1e400", "8:8", "1:2:3", "9" * 30, "tiny", "../..", "\x1b[31m", "é"])
VALUES = WORDS | st.integers().map(str) | st.floats().map(str) | TEXTS.filter(lambda text: "\0" not in text)
OPTIONS = {
    "txt2img": ("-p", "-n", "--steps", "--cfg-scale", "-H", "-W", "--seed", "--num-images", "--scheduler", "-o"),
    "img2img": ("-p", "-i", "--strength", "--steps", "-H", "-W", "-o", "--embedding", "--clip-skip", "--prompt-syntax"),
    "inpaint": ("-p", "-i", "--mask", "--mask-blur", "--padding-crop", "--strength", "-o"),
    "export": ("--precision", "-o", "--component", "--exporter", "--opset"),
    "build": ("--batch", "-H", "-W", "--tokens", "--profile", "--optimization-level", "--workspace-gib", "--precision"),
    "inspect": ("--engine", "--part"),
    "engines list": (),
    "engines verify": (),
    "engines rm": (),
    "engines prune": ("--older-than-days", "--keep-gib"),
}
COMMON = ("--backend", "--engine-dir", "--revision", "--variant", "--config", "--json", "--quiet", "--no-such-option")


@st.composite
def command_lines(draw):
    """A command with some of its options, each with some value; the model is always one that isn't there."""
    command = draw(st.sampled_from(sorted(OPTIONS)))
    words = command.split()
    for _ in range(draw(st.integers(0, 4))):
        option = draw(st.sampled_from((*OPTIONS[command], *COMMON)))
        words += [option] if option in ("--json", "--quiet") else [option, draw(VALUES)]
    if command == "engines rm":
        words.append(draw(VALUES))
    return [*words, "--model", "./nowhere"] if not command.startswith("engines") else words


@fuzz(examples=150, words=command_lines())
@pytest.mark.slow
def test_option_values(place, words):
    here = Path.cwd()
    work = place / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    os.chdir(work)
    os.environ["SDTRT_ENGINE_DIR"] = str(work / "none")
    sys.argv = ["sdtrt", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = argv
        os.chdir(here)
        del os.environ["SDTRT_ENGINE_DIR"]
    assert ended.value.code in (0, 1, 2)
    starts = [line.split(":")[0] for line in err.getvalue().splitlines()]
    assert ended.value.code == 0 or starts[-2:] == ["error", "hint"], err.getvalue()
    assert list(work.iterdir()) == []


# ---------------------------------------------------------------------------------------- what the long runs have found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta_start", [1, 2]),
        ("num_train_timesteps", None),
        ("num_train_timesteps", 10**13),
        ("_class_name", 7),
        ("beta_end", "0.5"),
    ],
)
def test_a_scheduler_that_computes_with_nonsense(model, tmp_path, name, value):
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    resolved = resolve_model(ModelSpec(str(folder)))
    with pytest.raises(ModelError, match="configuration of the scheduler"):
        load_parts(resolved, ["scheduler"], torch.float32)


@pytest.mark.parametrize(("part", "name"), [("text_encoder", "hidden_act"), ("unet", "block_out_channels")])
def test_a_part_whose_configuration_has_a_value_of_another_kind(model, tmp_path, part, name):
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: None}))
    with pytest.raises(ModelError, match=f"configuration of the {part}"):
        load_parts(resolve_model(ModelSpec(str(folder))), [part], torch.float32)


def test_an_engine_whose_host_is_nothing(directory, tmp_path, capsys):
    found = directory.entries("engine")[0]
    inspect_engine(replace(found, key={**found.key, "host": None})).print()
    assert found.name in capsys.readouterr().out


@pytest.mark.parametrize("info", [{}, {"contract": None}, {"contract": {"inputs": [1]}}, {"contract": []}])
def test_an_engine_that_does_not_say_what_it_takes(directory, info):
    found = replace(directory.entries("engine")[0], info=info)
    for use in (inspect_engine, lambda entry: open_session(entry, CPU)):
        with pytest.raises(EngineError, match="does not say what its inputs and outputs are") as caught:
            use(found)
        assert caught.value.hint == f"sdtrt engines rm {found.name} --engine-dir {directory.path}"


def test_a_number_of_images_that_fills_the_memory():
    with pytest.raises(UsageError, match="at most 100000"):
        GenerateSpec(("x",), num_images=10**12)


@pytest.mark.parametrize("gib", [1e300, 1e308, math.inf, math.nan, -1e308])
def test_a_size_that_no_number_counts(gib):
    with pytest.raises(UsageError, match="must be a number of GiB"):
        bytes_of("--keep-gib", gib)


def test_a_damaged_model_prints_nothing_on_stdout(directory, tmp_path, capfd):
    """ONNX Runtime's own words on a failed load went there."""
    source = directory.entries("onnx")[0]
    data = source.file("model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(data.replace(b"sample", b"s\xff\xfeple"))
    with contextlib.suppress(BuildError):
        optimize(tmp_path / "model.onnx", tmp_path, engines_contract(source), QUIET)
    assert capfd.readouterr().out == ""
