"""OpenVINO: what its sessions promise, what an engine is bound to, and that it tells nobody and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import factories
import numpy as np
import pytest
import torch
from PIL import Image
from pixel_checker import Scene, Shape, judge

from sdtrt.backends import registry
from sdtrt.backends.build import build_engine
from sdtrt.backends.open import open_session
from sdtrt.backends.openvino import backend as backends
from sdtrt.backends.openvino import build, library, mapped
from sdtrt.backends.openvino.session import OPENVINO_FILE, OpenVinoSession
from sdtrt.common import host
from sdtrt.common.console import QUIET
from sdtrt.common.errors import BuildError, CacheError, EngineError, UnservedCallError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.exports.component import write_onnx
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.models.resolve import resolve_model
from sdtrt.specs import BuildSpec, ExportSpec, ModelSpec, Profile, Range, Sizes
from sdtrt.specs.contract import text_encoder_contract

pytest.importorskip("openvino", reason="needs the extra openvino")

CPU = torch.device("cpu")
RANGE = Profile(Range(1, 2, 2), Range.of(64), Range.of(64), Range.of(77))
HAS_BF16 = bool(host.processor_flags() & backends.BF16_FLAGS)
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def contract():
    return text_encoder_contract(factories.small_text_encoder().config.to_dict(), "fp32")


@pytest.fixture(scope="module")
def source(tmp_path_factory, contract):
    """A text encoder as ONNX."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    write_onnx(factories.small_text_encoder(), contract, path)
    return path


@pytest.fixture(scope="module")
def found(source, contract, tmp_path_factory):
    """What a build measured, and the file that it wrote."""
    folder = tmp_path_factory.mktemp("built")
    return build.build(source, folder, contract, RANGE, QUIET), folder / OPENVINO_FILE


@pytest.fixture
def session(found, contract):
    with OpenVinoSession(found[1], contract) as opened:
        yield opened


@pytest.fixture(scope="module")
def entry(tmp_path_factory, smallest):
    """A text encoder's engine, published."""
    model, directory = resolve_model(ModelSpec(str(smallest))), EngineDirectory(tmp_path_factory.mktemp("engines"))
    return build_engine(model, spec_of(model, "text_encoder"), directory)


def spec_of(model, component, precision="fp32", sizes=Sizes(1, 64, 64)):
    return BuildSpec(ExportSpec(model.spec, component, precision), "openvino", (Profile.of(sizes),))


def test_a_build_is_held_against_its_onnx_at_the_ends_of_its_sizes(found):
    measured, file = found
    assert [one["sizes"] for one in measured["parity"]] == [str(RANGE.optimum), str(RANGE.minimum)]
    assert all(one["relative_l2"] < 1e-5 for one in measured["parity"])
    assert measured["step_sizes"] == str(RANGE.optimum)
    weights = sum(one.numel() * 4 for one in factories.small_text_encoder().parameters())
    assert file.stat().st_size >= weights
    assert {one.name for one in file.parent.iterdir()} == {file.name}


def test_it_computes_what_pytorch_computes(session, contract):
    feeds = seeded_feeds(contract, Sizes(2, 64, 64), seed=5)
    with torch.no_grad():
        wanted = factories.small_text_encoder()(feeds["input_ids"]).last_hidden_state
    assert torch.allclose(session.run(feeds)["last_hidden_state"], wanted, atol=1e-5)


def test_outputs_are_nobody_elses_and_inputs_stay(session, contract):
    one, other = (seeded_feeds(contract, Sizes(2, 64, 64), seed=seed) for seed in (1, 2))
    given = one["input_ids"].clone()
    first = session.run(one)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    second = session.run(other)
    assert all(torch.equal(first[name], kept[name]) for name in kept)
    assert not torch.equal(first["last_hidden_state"], second["last_hidden_state"])
    assert torch.equal(one["input_ids"], given)
    again = session.run({"input_ids": one["input_ids"].repeat(1, 2)[:, ::2]})  # not contiguous
    assert not torch.equal(again["last_hidden_state"], second["last_hidden_state"])
    assert torch.equal(session.run(one)["last_hidden_state"], kept["last_hidden_state"])


def test_what_does_not_fit_is_refused(session, contract):
    feeds = seeded_feeds(contract, Sizes(2, 64, 64))
    with pytest.raises(EngineError, match="input_ids must be int32, got int64"):
        session.run({"input_ids": feeds["input_ids"].long()})
    with pytest.raises(EngineError, match=r"the engine takes input_ids of \[1\.\.2,77\], got \[3, 77\]") as caught:
        session.run(seeded_feeds(contract, Sizes(3, 64, 64)))
    assert "sdtrt build" in caught.value.hint
    with pytest.raises(EngineError, match="the engine takes input_ids; got nothing"):
        session.run({})


def test_a_closed_session_is_free_and_says_so(found, contract):
    session = OpenVinoSession(found[1], contract)
    session.close()
    session.close()
    with pytest.raises(EngineError, match="the session is closed"):
        session.run(seeded_feeds(contract, Sizes(1, 64, 64)))


@pytest.mark.slow
def test_the_memory_of_a_session_comes_back(found, contract):
    """Opening and closing many times grows nothing: of a megabyte each, no more than five stay."""

    def opened():
        with OpenVinoSession(found[1], contract) as session:
            session.run(seeded_feeds(contract, Sizes(2, 64, 64)))

    for _ in range(3):
        opened()
    before = resident_bytes()
    for _ in range(20):
        opened()
    assert resident_bytes() - before < 5 * found[1].stat().st_size


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's list of mappings")
def test_the_pages_of_an_engines_file_are_given_back_and_nothing_was_written_into_them(found, contract, monkeypatch):
    feeds = seeded_feeds(contract, Sizes(2, 64, 64))
    with OpenVinoSession(found[1], contract) as session:
        given_back, answer = mapped_kb(found[1]), session.run(feeds)
    monkeypatch.setattr(mapped.MappedModel, "let_pages_go", lambda self: None)
    with OpenVinoSession(found[1], contract) as session:
        wanted = session.run(feeds)
        kept = mapped_kb(found[1])
    assert given_back["Rss"] < kept["Rss"] / 4
    assert kept["Anonymous"] == 0  # what OpenVINO writes there would be lost with its page
    assert torch.equal(answer["last_hidden_state"], wanted["last_hidden_state"])
    assert mapped_kb(found[1])["Size"] == 0


def mapped_kb(file):
    """What this process has of a file: mapped, in memory, and written to."""
    sums, mine = {"Size": 0, "Rss": 0, "Anonymous": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in sums and mine:
            sums[name] += int(value.split()[0])
        elif "-" in line.split()[0]:
            mine = line.endswith(str(file))
    return sums


def test_a_session_lets_the_cores_go_after_a_run(found, contract):
    with OpenVinoSession(found[1], contract, threads=3) as session:
        assert min(processor_seconds_after(session) for _ in range(5)) < 0.01


def processor_seconds_after(session):
    session.run(seeded_feeds(session.contract, Sizes(2, 64, 64)))
    start = time.process_time()
    time.sleep(0.05)
    return time.process_time() - start


def test_no_gradient_passes_it(session, contract):
    feeds = seeded_feeds(contract, Sizes(1, 64, 64))
    feeds["input_ids"] = feeds["input_ids"].float().requires_grad_()
    with pytest.raises(UnservedCallError, match="a gradient is wanted"):
        session.run(feeds)


def test_a_file_of_nonsense_is_to_be_verified_and_not_removed_unproven(tmp_path, contract, capfd):
    file = tmp_path / "engines" / "entry" / OPENVINO_FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not a model" * 100)
    with pytest.raises(EngineError, match="OpenVINO can't load") as caught:
        OpenVinoSession(file, contract)
    assert "engines verify" in caught.value.hint
    assert " rm " not in caught.value.hint
    assert capfd.readouterr() == ("", "")


def test_an_export_that_is_none_is_an_error_of_one_line(tmp_path, contract):
    source = tmp_path / "model.onnx"
    source.write_bytes(b"not a model")
    with pytest.raises(BuildError, match="OpenVINO can't compile") as caught:
        build.build(source, tmp_path, contract, RANGE, QUIET)
    assert "\n" not in caught.value.message


def test_an_engine_that_computes_something_else_is_not_published(source, contract, tmp_path, monkeypatch):
    real = OpenVinoSession.run

    def wrong(self, feeds):
        return {name: tensor * 1.001 for name, tensor in real(self, feeds).items()}

    monkeypatch.setattr(OpenVinoSession, "run", wrong)
    with pytest.raises(BuildError, match=r"the engine differs from its ONNX: relative L2 error 1\.00e-03"):
        build.build(source, tmp_path, contract, RANGE, QUIET)


def test_a_full_disk_is_told_as_one(source, contract, tmp_path, monkeypatch):
    """OpenVINO says nothing of what it could not write."""
    real = build.compile_to_file

    def cut(source, target, *rest):
        real(source, target, *rest)
        target.write_bytes(target.read_bytes()[:1000])

    monkeypatch.setattr(build, "compile_to_file", cut)
    monkeypatch.setattr(build, "require_room", lambda path: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        build.build(source, tmp_path, contract, RANGE, QUIET)
    monkeypatch.setattr(build, "require_room", lambda path: None)
    with pytest.raises(BuildError, match="the compiled model can't be used"):
        build.build(source, tmp_path, contract, RANGE, QUIET)


def test_an_engine_is_found_and_opened_and_its_flipped_bit_is_seen(entry, tmp_path, smallest):
    with open_session(entry, CPU) as session:
        assert session.run(seeded_feeds(session.contract, Sizes(1, 64, 64)))
    model, directory = resolve_model(ModelSpec(str(smallest))), EngineDirectory(entry.path.parent)
    assert factories.find_engine(model, "openvino", "fp32", Sizes(1, 64, 64), directory, "text_encoder") == entry
    file = entry.file(OPENVINO_FILE)
    intact = file.read_bytes()
    factories.flip(file)
    try:
        with pytest.raises(CacheError, match=f"{file.name} is damaged"):
            open_session(entry, CPU)
    finally:
        file.write_bytes(intact)


@pytest.mark.parametrize("changed", ["version", "processor"])
def test_an_engine_of_another_version_or_processor_is_foreign(entry, smallest, monkeypatch, changed):
    if changed == "version":
        monkeypatch.setattr(host, "library_version", lambda name: "2027.1.0")
    else:
        monkeypatch.setattr(host, "processor_flags", lambda: frozenset({"avx2"}))
    model, directory = resolve_model(ModelSpec(str(smallest))), EngineDirectory(entry.path.parent)
    assert factories.find_engine(model, "openvino", "fp32", Sizes(1, 64, 64), directory, "text_encoder") is None
    assert registry.is_foreign(entry)
    with pytest.raises(EngineError, match="compiled for another processor or version of OpenVINO") as caught:
        open_session(entry, CPU)
    assert "sdtrt build --backend openvino" in caught.value.hint


def test_what_it_lacks_is_said_before_anything_is_loaded(monkeypatch, smallest):
    found = registry.get("openvino")
    with pytest.raises(UsageError, match="fp32 or bf16 on a CPU, not in fp16"):
        found.check_precision("fp16")
    monkeypatch.setattr(host, "processor_flags", lambda: frozenset({"avx512f"}))
    with pytest.raises(UsageError, match="has no instructions for bf16"):
        found.check_precision("bf16")
    monkeypatch.setattr(host, "processor_flags", lambda: frozenset({"avx512_bf16"}))
    found.check_precision("bf16")
    model = resolve_model(ModelSpec(str(smallest)))
    assert [found.precision_of(model, part, "bf16") for part in ("unet", "vae_decoder")] == ["bf16", "fp32"]
    spec = spec_of(model, "unet")
    with pytest.raises(UsageError, match="for one profile, got 2"):
        found.check(replace(spec, profiles=spec.profiles * 2))
    with pytest.raises(UsageError, match="no optimization level"):
        found.check(replace(spec, optimization_level=3))
    monkeypatch.setattr(host, "library_version", lambda name: None)
    assert "sdtrt[openvino]" in found.why_not().hint


def test_another_device_is_looked_for_and_is_part_of_the_key(monkeypatch, smallest):
    """There is none here: its name is all that is taken for true."""
    found, spec = registry.get("openvino"), spec_of(resolve_model(ModelSpec(str(smallest))), "unet", "fp16")
    monkeypatch.setenv(library.DEVICE_VARIABLE, "")
    processor = found.host_key()
    with pytest.raises(UsageError, match=r"no device GPU\.7 here, only .*CPU") as caught:
        registry.choose_device("openvino", "GPU.7")
    assert "--device" in caught.value.hint
    assert found.device_title() is None
    registry.choose_device("openvino", "CPU")
    assert found.host_key() == processor
    with pytest.raises(UsageError, match="not in fp16"):
        found.check(spec)
    monkeypatch.setattr(library, "core", lambda: SimpleNamespace(available_devices=["CPU", "GPU.0"], get_property=told))
    registry.choose_device("openvino", "GPU.0")
    assert found.host_key() == {"device": "GPU.0", "device_name": "GPU.0 FULL_DEVICE_NAME"}
    assert (found.device_title(), found.default_precision()) == ("OpenVINO GPU.0", "fp16")
    found.check(spec)
    assert "INFERENCE_NUM_THREADS" not in library.settings(2)


def told(device, name):
    return f"{device} {name}"


@pytest.mark.parametrize(("backend", "wrong"), [("onnxruntime", "ONNX Runtime has no"), ("auto", "not for auto")])
def test_a_device_is_for_openvino_alone(backend, wrong):
    with pytest.raises(UsageError, match=wrong) as caught:
        registry.choose_device(backend, "NPU")
    assert "--backend openvino" in caught.value.hint


def test_the_telemetry_package_is_not_even_imported(tmp_path, found, contract):
    """One that writes a file when it is imported lies on the path."""
    package = tmp_path / library.TELEMETRY
    package.mkdir()
    package.joinpath("__init__.py").write_text("import pathlib; pathlib.Path('told').touch(); raise SystemExit(1)")
    code = (
        "import sys; from sdtrt.backends.openvino import library; print(library.core().available_devices);"
        f"import importlib.util; assert importlib.util.find_spec({library.TELEMETRY!r}) is not None"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(REPOSITORY))), "HOME": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert "CPU" in ended.stdout, ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == [library.TELEMETRY]


@pytest.mark.slow
@pytest.mark.feature("Text to image", "sd1", "openvino")
@pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not HAS_BF16, reason="no bf16"))]
)
def test_the_built_in_model_draws_what_it_is_asked_for(folder, run, precision):
    arguments = ("--seed", "1", "-b", "openvino", "--precision", precision, "-o", "x.png")
    assert run("txt2img", "-p", "a red circle on a blue background", *arguments)[0] == 0
    assert judge(Image.open("x.png"), Scene((Shape("circle", "red"),), "blue")).all_right


@pytest.mark.slow
def test_torch_and_engine_draw_the_same(folder, run):
    for backend in ("torch", "openvino"):
        arguments = ("--steps", "10", "--seed", "3", "-b", backend, "-o", f"{backend}.png")
        assert run("txt2img", "-p", "a red circle on a blue background", *arguments)[0] == 0
    one, other = (np.asarray(Image.open(f"{name}.png")).astype(int) for name in ("torch", "openvino"))
    assert np.abs(one - other).max() <= 2
