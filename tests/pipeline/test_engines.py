"""Which backend and which engine serve a request."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import factories
import pytest
import torch

from sdtrt.backends import build as engine_build
from sdtrt.backends import registry
from sdtrt.backends.backend import Backend
from sdtrt.backends.inductor.backend import Inductor
from sdtrt.backends.onnxruntime.backend import OnnxRuntime
from sdtrt.backends.open import open_session
from sdtrt.backends.tensorrt.backend import TensorRT
from sdtrt.cli.main import main
from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.common.errors import BuildError, EngineError, UsageError
from sdtrt.engines import find, trust
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import entry_of
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.live import accepted
from sdtrt.models import components
from sdtrt.models.loading import load_unet
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening import engines
from sdtrt.specs import BuildSpec, ExportSpec, ModelSpec, Profile, Range, Sizes
from sdtrt.specs.contract import Contract

CPU = torch.device("cpu")
SMALL = Sizes(2, 64, 64)


def wanting(model, wanted, precision="fp32", sizes=SMALL):
    """A pipeline of which these components are to be ONNX Runtime's."""
    return factories.engines_wanted(model, "onnxruntime", precision, sizes, wanted)


@pytest.fixture(autouse=True)
def tensorrt_is_not_asked(monkeypatch):
    """Keys of TensorRT's engines are made without TensorRT here."""
    monkeypatch.setattr(type(registry.get("tensorrt")), "options_key", Backend.options_key)


@pytest.fixture(scope="module")
def model(smallest):
    return resolve_model(ModelSpec(str(smallest)))


@pytest.fixture(scope="module")
def directory(engine_dir):
    return EngineDirectory(engine_dir)


@pytest.fixture(scope="module")
def entry(model, directory):
    return factories.unet_engine(model, "onnxruntime", "fp32", SMALL, directory)


def test_without_a_gpu_auto_is_onnxruntime_and_says_why(capsys, monkeypatch):
    monkeypatch.setattr(host, "gpus", lambda: ())
    assert registry.choose_backend("auto", Console()) == "onnxruntime"
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_auto_goes_by_what_pytorch_and_tensorrt_can_do_here(capsys, monkeypatch):
    monkeypatch.setattr(host, "gpus", lambda: (host.Gpu("Some RTX", (8, 9), 2**34),))
    assert registry.choose_backend("auto", Console()) == "onnxruntime"
    assert "this PyTorch can't use it" in capsys.readouterr().err
    monkeypatch.setattr(host, "torch_sees_gpu", lambda: True)
    monkeypatch.setattr(Inductor, "why_not", lambda self: BuildError("there is no C++ compiler", hint="get one"))
    monkeypatch.setattr(TensorRT, "why_not", lambda self: EngineError("it is broken", hint="mend it"))
    assert registry.choose_backend("auto", Console(verbose=True)) == "torch"
    said = capsys.readouterr().err
    assert "not tensorrt: it is broken" in said
    assert "backend: torch (Some RTX, but no engines run on it: see sdtrt doctor)" in said
    monkeypatch.setattr(TensorRT, "why_not", lambda self: None)
    monkeypatch.setattr(TensorRT, "version", lambda self: "10.13.3")
    assert registry.choose_backend("auto", Console()) == "tensorrt"
    said = capsys.readouterr().err
    assert "Some RTX, TensorRT 10.13.3; not inductor: there is no C++ compiler" in said, "what should be faster"


def test_auto_on_a_gpu_is_what_was_measured_to_be_the_fastest(capsys, monkeypatch):
    monkeypatch.setattr(host, "gpus", lambda: (host.Gpu("Some RTX", (8, 9), 2**34),))
    monkeypatch.setattr(host, "torch_sees_gpu", lambda: True)
    monkeypatch.setattr(Inductor, "why_not", lambda self: None)
    monkeypatch.setattr(TensorRT, "why_not", lambda self: pytest.fail("TensorRT is asked in vain"))
    assert registry.choose_backend("auto", Console()) == "inductor"
    said = capsys.readouterr().err
    assert said.count("backend: ") == 1
    assert f"Some RTX, PyTorch Inductor {torch.__version__.partition('+')[0]}" in said
    assert "measured on an H200: faster than TensorRT 8.6" in said


def test_auto_on_a_cpu_never_compiles_unasked(monkeypatch):
    monkeypatch.setattr(host, "gpus", lambda: ())
    monkeypatch.setattr(Inductor, "why_not", lambda self: None)
    monkeypatch.setattr(OnnxRuntime, "why_not", lambda self: BuildError("not installed", hint="pip install"))
    assert registry.choose_backend("auto") == "torch"


def test_a_live_pipeline_goes_to_the_backend_of_its_device(monkeypatch):
    monkeypatch.setattr(TensorRT, "why_not", lambda self: BuildError("TensorRT is not installed", hint="pip install"))
    monkeypatch.setattr(Inductor, "why_not", lambda self: None)
    assert accepted.choose_backend("auto", CPU)[0] == "onnxruntime"
    with pytest.raises(EngineError, match=r"serves a pipeline on cuda \(inductor: it runs on cpu; tensorrt: "):
        accepted.choose_backend("auto", torch.device("cuda"))
    with pytest.raises(EngineError, match="no backend serves a pipeline on mps"):
        accepted.choose_backend("auto", torch.device("mps"))
    with pytest.raises(EngineError, match=r"inductor can't run: no engine serves .* on cuda \(it runs on cpu\)"):
        accepted.choose_backend("inductor", torch.device("cuda"))
    monkeypatch.setattr(host, "gpus", lambda: (host.Gpu("Some RTX", (8, 9), 2**34),))
    monkeypatch.setattr(host, "torch_sees_gpu", lambda: True)
    name, why = accepted.choose_backend("auto", torch.device("cuda"))
    assert name == "inductor"
    assert "faster than TensorRT 8.6" in why
    assert accepted.choose_backend("auto", CPU)[0] == "onnxruntime", "of a pipeline that was left on the CPU"


def test_a_named_backend_is_taken_as_it_is(capsys):
    assert registry.choose_backend("torch", Console()) == "torch"
    assert capsys.readouterr().err == ""


def test_an_engine_is_built_once_and_serves_other_sizes(model, directory, entry):
    assert factories.find_engine(model, "onnxruntime", "fp32", Sizes(5, 72, 104, 154), directory) == entry
    assert factories.unet_engine(model, "onnxruntime", "fp32", SMALL, directory) == entry
    assert factories.find_engine(model, "onnxruntime", "fp16", SMALL, directory) is None


def test_the_engine_computes_what_pytorch_computes(model, entry):
    contract = Contract.from_json(entry.info["contract"])
    feeds = seeded_feeds(contract, Sizes(3, 72, 104, 154))
    unet = load_unet(model, torch.float32)
    with torch.inference_mode():
        wanted = unet(feeds["sample"], feeds["timestep"], feeds["encoder_hidden_states"]).sample
    with open_session(entry, CPU) as session:
        got = session.run(feeds)["out_sample"]
    assert torch.linalg.vector_norm(got - wanted) < 1e-4 * torch.linalg.vector_norm(wanted)


def test_outputs_of_a_session_do_not_alias(entry):
    contract = Contract.from_json(entry.info["contract"])
    with open_session(entry, CPU) as session:
        first = session.run(seeded_feeds(contract, SMALL, seed=1))["out_sample"]
        kept = first.clone()
        session.run(seeded_feeds(contract, SMALL, seed=2))
        assert torch.equal(first, kept)


@pytest.mark.parametrize("wrong", ["name", "dtype", "rank", "channels", "batch"])
def test_wrong_inputs_are_named_before_anything_runs(entry, wrong):
    contract = Contract.from_json(entry.info["contract"])
    feeds = seeded_feeds(contract, SMALL)
    if wrong == "name":
        feeds["smaple"] = feeds.pop("sample")
    elif wrong == "dtype":
        feeds["sample"] = feeds["sample"].double()
    elif wrong == "rank":
        feeds["timestep"] = feeds["timestep"][0]
    elif wrong == "channels":
        feeds["sample"] = feeds["sample"][:, :3]
    elif wrong == "batch":
        feeds["timestep"] = feeds["timestep"][:1]
    with open_session(entry, CPU) as session, pytest.raises(EngineError):
        session.run(feeds)


def test_the_engine_is_at_least_as_fast_as_pytorch(model, entry):
    """Best of several runs each, in turns, one thread each, in processor time: other processes don't matter."""
    from sdtrt.backends.onnxruntime.session import OnnxRuntimeSession

    contract = Contract.from_json(entry.info["contract"])
    feeds = seeded_feeds(contract, Sizes(2, 128, 128))
    unet = load_unet(model, torch.float32)
    best = {"engine": math.inf, "torch": math.inf}
    with OnnxRuntimeSession(entry.file("engine.onnx"), contract, threads=1) as session, torch.inference_mode():
        calls = {"engine": lambda: session.run(feeds), "torch": lambda: unet(*feeds.values(), return_dict=False)}
        for _ in range(8):
            for name, call in calls.items():
                start = time.process_time()
                call()
                best[name] = min(best[name], time.process_time() - start)
    assert best["engine"] <= best["torch"], best


def test_a_closed_session_says_so(entry):
    session = open_session(entry, CPU)
    session.close()
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.run(seeded_feeds(Contract.from_json(entry.info["contract"]), SMALL))


def test_an_engine_that_cannot_be_read_is_an_error_with_the_check(entry, tmp_path):
    from sdtrt.backends.onnxruntime.session import OnnxRuntimeSession

    (tmp_path / "engine.onnx").write_bytes(b"not a model")
    with pytest.raises(EngineError) as caught:
        OnnxRuntimeSession(tmp_path / "engine.onnx", Contract.from_json(entry.info["contract"]))
    assert "sdtrt engines verify" in caught.value.hint
    assert " rm " not in caught.value.hint  # nothing has proven that it is damaged


def test_no_build_names_the_command_that_builds(model, tmp_path):
    empty = EngineDirectory(tmp_path / "empty folder")
    with pytest.raises(EngineError) as caught:
        factories.unet_engine(model, "onnxruntime", "fp32", SMALL, empty, allow_build=False)
    words = shlex.split(caught.value.hint)
    assert words[:2] == ["sdtrt", "build"]
    assert words[words.index("--engine-dir") + 1] == str(empty.path)
    assert not empty.path.exists()


def test_an_engine_that_others_can_change_is_not_just_missing(model, entry, tmp_path, capsys):
    found = EngineDirectory(tmp_path / "engines")
    shutil.copytree(entry.path, found.path / entry.name)
    (found.path / entry.name).chmod(0o777)
    with pytest.raises(EngineError, match="fits"):
        factories.unet_engine(model, "onnxruntime", "fp32", SMALL, found, allow_build=False, console=Console())
    assert f"chmod -R go-w {found.path} mends that" in capsys.readouterr().err


def test_all_that_is_missing_is_said_at_once_with_the_command_that_builds_it(model, entry, tmp_path):
    wanted = ("text_encoder", "unet", "vae_decoder")
    empty, partial = EngineDirectory(tmp_path / "none"), EngineDirectory(tmp_path / "partial")
    shutil.copytree(entry.path, partial.path / entry.name)
    for found, missing in ((empty, wanted), (partial, ("text_encoder", "vae_decoder"))):
        with pytest.raises(EngineError, match=f"for the {', '.join(missing)} of ") as caught:
            engines.ensure_engines(wanting(model, wanted), found, allow_build=False)
        words = shlex.split(caught.value.hint)
        assert tuple(words[i + 1] for i, word in enumerate(words) if word == "--component") == missing
    assert not empty.path.exists()


def test_engines_of_all_components_are_built_once_and_found_again(model, tmp_path):
    found = EngineDirectory(tmp_path / "engines")
    wanted = ("text_encoder", "vae_decoder", "vae_encoder")
    made = engines.ensure_engines(wanting(model, wanted), found)
    assert tuple(made) == wanted
    assert [made[name].key["component"] for name in wanted] == list(wanted)
    assert len(found.entries("onnx")) == len(found.entries("engine")) == 3
    larger = wanting(model, wanted, sizes=Sizes(4, 72, 96))
    again = engines.ensure_engines(larger, found, allow_build=False)
    assert again == made


def test_an_engine_of_another_component_is_never_taken(model, entry, tmp_path):
    directory = EngineDirectory(tmp_path / "one")
    shutil.copytree(entry.path, directory.path / entry.name)
    assert factories.find_engine(model, "onnxruntime", "fp32", SMALL, directory).name == entry.name
    for component in ("text_encoder", "vae_decoder", "vae_encoder"):
        assert factories.find_engine(model, "onnxruntime", "fp32", SMALL, directory, component) is None


def test_sdxls_vae_is_built_in_fp32_where_fp16_is_asked_for(tmp_path):
    model = resolve_model(ModelSpec(str(factories.sdxl_folder(tmp_path / "sdxl", layers_per_block=1))))
    found = EngineDirectory(tmp_path / "engines")
    wanted = wanting(model, ("text_encoder_2", "vae_decoder"), precision="fp16")
    made = engines.ensure_engines(wanted, found)
    assert [entry.key["precision"] for entry in made.values()] == ["fp16", "fp32"]
    assert engines.ensure_engines(wanted, found, allow_build=False) == made
    assert factories.find_engine(model, "onnxruntime", "fp32", SMALL, found, "vae_decoder") == made["vae_decoder"]


@pytest.fixture
def run_build(monkeypatch):
    """Run a command as the shell would, TensorRT left out: its engines are empty. Returns their specs by component."""
    monkeypatch.setattr(host, "gpus", lambda: (host.Gpu("Some GPU", (8, 9), 2**34),))
    monkeypatch.setattr(TensorRT, "version", lambda self: "8.6.1")
    specs = {}

    def publish(model, spec, directory, console):
        specs[spec.export.component] = spec
        return directory.obtain("engine", engine_build.engine_key(model, spec, directory).to_json(), _empty)

    monkeypatch.setattr(engine_build, "build_engine", publish)

    def run(command):
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return dict(specs)

    return run


ALL = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
REQUESTS = {  # the UNet's size, how many images at once, what is missing → sizes in the command, sizes in the error
    "unet": (SMALL, 1, ("unet",), "--batch 2 --height 64 --width 64 --tokens 77", " batch 2, height 64, width 64, to"),
    "text": (Sizes(2, 64, 72, 154), 1, ("text_encoder",), "", " batch 1"),
    "decoder": (Sizes(2, 64, 72, 154), 1, ("vae_decoder",), "--height 64 --width 72", " batch 1, height 64, width 72"),
    "decoder of 4": (Sizes(4, 64, 72), 4, ("vae_decoder",), "--batch 8 --height 64 --width 72", " batch 4, height 64"),
    "encoder": (Sizes(8, 64, 72), 4, ("vae_encoder",), "--height 64 --width 72", " batch 1, height 64, width 72"),
    "unet of 4": (Sizes(4, 64, 64), 4, ("unet", "vae_encoder"), "--batch 4 --height 64 --width 64 --tokens 77", ": un"),
    "guided": (
        Sizes(8, 64, 64),
        4,
        ALL,
        "--batch 8 --height 64 --width 64 --tokens 77",
        ": text_encoder at batch 4; unet at batch 8, height 64, width 64, tokens 77; vae_decoder at batch 4, height 64,"
        " width 64; vae_encoder at batch 1, height 64, width 64",
    ),
    # Without guidance the UNet's batch is that of the images, and one range must do for all.
    "unguided": (Sizes(4, 64, 64), 4, ALL, "--batch 4:4:8 --height 64 --width 64 --tokens 77", ": text_encoder at b"),
    "unguided, one": (Sizes(1, 64, 64), 1, ALL, "--batch 1 --height 64 --width 64 --tokens 77", ": text_encoder at b"),
}

# Where a part's engine takes other batches than the request's own: `--batch 4:4:8`, and half of it.
BATCHES = {
    "unguided": {"unet": Range(4, 4, 8), "text_encoder": Range(2, 2, 4), "vae_decoder": Range(2, 2, 4)},
}


@pytest.mark.parametrize("case", REQUESTS)
def test_the_hinted_command_builds_what_is_missing(model, run_build, tmp_path, case):
    sizes, images, missing, options, words = REQUESTS[case]
    wanted = factories.engines_wanted(model, "tensorrt", "fp16", sizes, missing, images)
    request = (wanted, EngineDirectory(tmp_path / "engines"))
    with pytest.raises(EngineError) as caught:
        engines.ensure_engines(*request, allow_build=False)
    assert f"for the {', '.join(missing)} of {model.spec.name} fits{words}" in caught.value.message
    given = caught.value.hint.partition(f"--component {missing[-1]} ")[2]
    assert given.partition("--engine-dir")[0].strip() == options
    for name, spec in run_build(caught.value.hint).items():
        own = Profile.of(components.sizes_of(name, sizes, images))
        assert spec.profiles == (replace(own, batch=BATCHES.get(case, {}).get(name, own.batch)),)
    assert tuple(engines.ensure_engines(*request, allow_build=False)) == missing


def test_a_part_that_is_built_in_another_precision_is_asked_for_in_that(run_build, tmp_path):
    """SDXL's VAE, which is in fp32 where fp16 is asked for."""
    model = resolve_model(ModelSpec(str(factories.sdxl_folder(tmp_path / "sdxl", layers_per_block=1))))
    for missing, words in (
        (("unet", "vae_decoder"), "no tensorrt fp16 engine for the unet, vae_decoder of"),
        (("vae_decoder",), "no tensorrt fp32 engine for the vae_decoder of"),
    ):
        wanted = factories.engines_wanted(model, "tensorrt", "fp16", SMALL, missing)
        request = (wanted, EngineDirectory(tmp_path / f"{len(missing)}"))
        with pytest.raises(EngineError, match=words) as caught:
            engines.ensure_engines(*request, allow_build=False)
        assert ("vae_decoder in fp32 at batch 1" in caught.value.message) == (len(missing) > 1)
        assert run_build(caught.value.hint)["vae_decoder"].export.precision == "fp32"
        assert tuple(engines.ensure_engines(*request, allow_build=False)) == missing


def test_a_text_encoders_engine_serves_every_size_of_image(model, monkeypatch, tmp_path):
    monkeypatch.setattr(host, "gpus", lambda: (host.Gpu("Some GPU", (8, 9), 2**34),))
    monkeypatch.setattr(TensorRT, "version", lambda self: "8.6.1")
    found = EngineDirectory(tmp_path / "engines")
    profiles = (Profile.of(Sizes(2, 512, 512)),)
    for component in ("text_encoder", "vae_decoder"):
        spec = BuildSpec(ExportSpec(model.spec, component), "tensorrt", components.profiles_of(component, profiles))
        found.obtain("engine", engine_build.engine_key(model, spec, found).to_json(), _empty)

    def finds(component, sizes):
        own = components.sizes_of(component, sizes)
        return factories.find_engine(model, "tensorrt", "fp16", own, found, component) is not None

    assert finds("text_encoder", Sizes(2, 768, 512))
    assert finds("vae_decoder", Sizes(1, 512, 512))
    assert not finds("vae_decoder", Sizes(2, 768, 512))


@pytest.mark.slow
def test_of_engines_that_fit_alike_the_newest_is_used(model, tmp_path):
    found = EngineDirectory(tmp_path / "engines")
    first = factories.unet_engine(model, "onnxruntime", "fp32", SMALL, found)
    options = dict(first.key["options"])
    for level in range(3):  # whichever way their names sort
        made = found.obtain("engine", dict(first.key) | {"options": options | {"level": level}}, _empty)
        assert factories.find_engine(model, "onnxruntime", "fp32", SMALL, found) == made


def test_an_engine_of_an_older_build_format_is_not_used(model, directory, entry, monkeypatch):
    assert factories.find_engine(model, "onnxruntime", "fp32", SMALL, directory) is not None
    assert not registry.is_foreign(entry)
    monkeypatch.setattr(OnnxRuntime, "format", entry.key["format"] + 1)
    assert factories.find_engine(model, "onnxruntime", "fp32", SMALL, directory) is None
    assert registry.is_foreign(entry)


def _empty(folder):
    (folder / "engine.onnx").write_bytes(b"")
    return {}


def test_an_unchecked_engine_is_used_with_a_warning(model, entry, tmp_path, capsys):
    found = EngineDirectory(tmp_path / "engines")
    first = factories.tampered_engine(found, entry, lambda _: None)
    found.obtain("engine", first.key, lambda folder: {"unchecked": "no GPU there"}, force=True)
    factories.unet_engine(model, "onnxruntime", "fp32", SMALL, found, console=Console())
    said = capsys.readouterr().err
    assert f"never checked (no GPU there): sdtrt engines rm {first.name} --engine-dir {found.path} drops it" in said


def test_the_build_command_names_all_that_the_model_needs(model):
    named = replace(model, spec=ModelSpec("some/model", revision="main", variant="fp16", offline=True))
    wanted = factories.engines_wanted(named, "tensorrt", "fp16", SMALL, ("unet",))
    words = engines.build_command(wanted, EngineDirectory(Path("my engines")))
    assert "--revision main --variant fp16 --offline" in words
    assert "--batch 2 --height 64 --width 64 --tokens 77" in words
    assert shlex.split(words)[-1].endswith("my engines")


def test_bf16_is_refused_on_onnxruntime(model, directory):
    with pytest.raises(UsageError, match="bf16"):
        factories.unet_engine(model, "onnxruntime", "bf16", SMALL, directory)


@pytest.mark.skipif(host.has_gpu(), reason="needs a machine without a GPU")
def test_tensorrt_without_a_gpu_says_what_to_use_instead(model, directory):
    with pytest.raises(BuildError) as caught:
        factories.unet_engine(model, "tensorrt-rtx", "fp16", SMALL, directory)
    assert "onnxruntime" in caught.value.hint


def test_the_tightest_profile_wins():
    static = Profile.of(Sizes(2, 512, 512))
    wide = Profile(Range(1, 2, 8), Range(256, 512, 1024), Range(256, 512, 1024))
    elsewhere = Profile(Range(1, 2, 8), Range(256, 768, 1024), Range(256, 768, 1024))

    def slack(*profiles, sizes=Sizes(2, 512, 512)):
        return find.slack(profiles, sizes)

    assert slack(static) == 0
    assert slack() == 0  # takes any size
    assert slack(static) < slack(wide) < slack(elsewhere)
    assert slack(elsewhere, static) == 0
    assert slack(static, sizes=Sizes(2, 512, 520)) is None


def test_an_engine_is_bound_to_what_its_backend_needs(monkeypatch):
    monkeypatch.setattr(host, "gpus", lambda: (host.Gpu("Some RTX", (8, 9), 2**34),))
    assert registry.get("tensorrt").host_key() == {"gpu": "Some RTX", "compute_capability": [8, 9]}
    rtx = registry.get("tensorrt-rtx")
    assert rtx.host_key() == rtx.host_key((8, 9)), "built ahead of time elsewhere, it serves here"
    assert set(registry.get("onnxruntime").host_key()) == {"processor", "instructions"}


def test_an_export_of_another_format_is_foreign(model, directory, entry, monkeypatch):
    (exported,) = (one for one in directory.entries("onnx") if one.name == entry.info["onnx"])
    assert not registry.is_foreign(exported)
    assert registry.is_foreign(replace(exported, kind="of a later sdtrt"))
    monkeypatch.setattr(registry, "EXPORT_FORMAT", -1)
    assert registry.is_foreign(exported)


def test_the_engines_of_a_request_are_found_with_one_reading_of_the_directory(model, tmp_path, monkeypatch):
    found = EngineDirectory(tmp_path / "engines")
    for component in components.components_of(model):
        spec = BuildSpec(ExportSpec(model.spec, component, "fp32"), "onnxruntime")
        found.obtain("engine", engine_build.engine_key(model, spec, found).to_json(), _empty)
    read, real = [], entry_of
    monkeypatch.setattr(trust, "entry_of", lambda folder, data: (read.append(folder), real(folder, data))[1])
    found = EngineDirectory(found.path)
    find.likely(found, model.spec, "onnxruntime")
    wanted = ("text_encoder", "unet", "vae_decoder")
    assert list(engines.ensure_engines(wanting(model, wanted), found)) == list(wanted)
    assert sorted(read) == sorted(entry.path for entry in found.entries())


def test_an_engine_of_another_version_is_foreign(model, directory, entry, monkeypatch):
    assert not registry.is_foreign(entry)
    monkeypatch.setattr(OnnxRuntime, "version", lambda self: "0.0")
    assert registry.is_foreign(entry)
    assert factories.find_engine(model, "onnxruntime", "fp32", SMALL, directory) is None


@pytest.mark.parametrize(("version", "runs"), [("8.6.1", True), ("10.15.1.29", True), ("8.5.3", False)])
def test_a_version_compatible_plan_serves_later_versions(monkeypatch, model, tmp_path, version, runs):
    monkeypatch.setattr(host, "gpus", lambda: (host.Gpu("Some GPU", (8, 9), 2**34),))
    found = EngineDirectory(tmp_path / "engines")
    export = ExportSpec(model.spec)
    for compatible in (True, False):
        spec = BuildSpec(export, "tensorrt", (Profile.of(SMALL),), version_compatible=compatible)
        monkeypatch.setattr(TensorRT, "version", lambda self: "8.6.1")
        made = found.obtain("engine", engine_build.engine_key(model, spec, found).to_json(), _empty)
        monkeypatch.setattr(TensorRT, "version", lambda self: version)
        assert registry.is_foreign(made) != (runs if compatible else version == "8.6.1")
    best = factories.find_engine(model, "tensorrt", "fp16", SMALL, found)
    assert (best is not None) == runs


def test_export_and_build_options_are_part_of_the_key(model, directory):
    from sdtrt.backends.build import engine_key

    keys = [
        engine_key(model, BuildSpec(ExportSpec(model.spec, precision=precision, opset=opset), "onnxruntime"), directory)
        for precision, opset in (("fp32", None), ("fp16", None), ("fp32", 16))
    ]
    assert keys[0] != keys[1]
    assert keys[0] != keys[2]
