"""Building: real TensorRT for RTX plans of real exports, with no GPU; and what happens when a build goes wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import factories
import onnx
import pytest
import torch
from exports import EACH_BY_BOTH, exported_unet, make
from test_trt_api import save_graph
from trt_fakes import fake_library

from sdtrt.backends import child
from sdtrt.backends.checking import check_parity
from sdtrt.backends.tensorrt import build
from sdtrt.backends.tensorrt.build import Request, build_plan
from sdtrt.backends.tensorrt.checking import check_precision, reference_of, why_not_runnable
from sdtrt.backends.tensorrt.versions import libraries, running
from sdtrt.backends.tensorrt.versions.header import read_header
from sdtrt.backends.tensorrt.worker import build_here
from sdtrt.common import host
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import BuildError, EngineError
from sdtrt.exports.component import write_onnx
from sdtrt.models import components
from sdtrt.specs import BuildSpec, ExportSpec, Profile, Range, Sizes
from sdtrt.specs.contract import text_encoder_contract, vae_contract

SM89 = (8, 9)
PROFILE = Profile(Range(1, 2, 4), Range(96, 128, 192), Range(96, 128, 192))
KINDS = {
    "smallest": factories.SMALLEST["sd1"],
    "sd1": {},
    "sd2": {"upcast_attention": True},
    "sdxl": {"transformer_layers_per_block": [1, 1, 2]},
}

NO_RTX = importlib.util.find_spec("tensorrt_rtx") is None
needs_rtx = pytest.mark.skipif(NO_RTX, reason="TensorRT for RTX is not installed")


def rtx_spec(precision="fp16", profiles=(PROFILE,), **values):
    export = ExportSpec(precision=precision)
    return BuildSpec(
        export, "tensorrt-rtx", profiles, **{"compute_capability": SM89, "optimization_level": 0, **values}
    )


def export_to(folder, kind="sd1", precision="fp16", **overrides):
    """Export a small UNet; returns the file and its contract."""
    it = make(folder, "sd1" if kind == "smallest" else kind, precision, **{**KINDS[kind], **overrides})
    return it.path, it.contract


@pytest.fixture(scope="module")
def tiny_onnx(tmp_path_factory):
    """A UNet as small as they come."""
    sizes = {
        "block_out_channels": (32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return export_to(tmp_path_factory.mktemp("tiny"), **sizes)


def request_for(tiny_onnx, folder, spec=None, **values):
    path, contract = tiny_onnx
    return Request(path, folder, contract, spec or rtx_spec(), values.get("timing_cache"), False)


# ------------------------------------------------------------------------------------------------------ real builds


@needs_rtx
@pytest.mark.parametrize(
    ("kind", "exporter"),
    [("smallest", "torchscript"), *(pytest.param(*one.values, marks=pytest.mark.slow) for one in EACH_BY_BOTH)],
)
def test_every_kind_of_unet_builds(kind, exporter, tmp_path, shared):
    """Parsed and built by a real TensorRT from the real export: convolutional and linear projections, SDXL's inputs."""
    if exporter == "dynamo":
        it = exported_unet(shared, kind, "fp16", exporter)
        path, contract = it.path, it.contract
    else:
        path, contract = export_to(tmp_path, kind)
    info = build_here(Request(path, tmp_path, contract, rtx_spec(), None, False), lambda message: None)
    layers = info["precision"]["layers"]
    assert layers["fp16"] > 5 * layers["fp32"] > 0, "but for the timestep and the ends of the U, all computes in fp16"
    assert info["plan_bytes"] == (tmp_path / "engine.plan").stat().st_size > 100_000
    assert read_header(tmp_path / "engine.plan").size_bytes == info["plan_bytes"]


@needs_rtx
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder"])
def test_the_other_components_build(component, precision, tmp_path):
    """By a real TensorRT, from the real export, with the profile that stands beside a UNet's."""
    if component in components.VAE_HALVES:
        module = factories.small_vae(layers_per_block=1)
        contract = vae_contract(module.config, precision, component)
    else:
        module = factories.small_text_encoder(projection=component == "text_encoder_2")
        contract = text_encoder_contract(module.config.to_dict(), precision, component)
    torch.nn.Module.to(module, getattr(torch, contract.outputs[0].dtype))
    write_onnx(module, contract, tmp_path / "model.onnx")
    spec = rtx_spec(precision, (components.profile_of(component, PROFILE),))
    spec = replace(spec, export=replace(spec.export, component=component))
    info = build_here(Request(tmp_path / "model.onnx", tmp_path, contract, spec, None, False), lambda message: None)
    layers = info["precision"]["layers"]
    assert layers[precision] > 10 * layers.get("fp32" if precision == "fp16" else "fp16", 0)
    assert info["plan_bytes"] > 10_000


@needs_rtx
@pytest.mark.slow
def test_build_in_a_child_process(tiny_onnx, tmp_path, capfd):
    """The whole way: warned that nothing ran, the log beside the plan, timings kept, progress shown."""
    path, contract = tiny_onnx
    timings = tmp_path / "timings.cache"
    shown = []
    console = Console()
    console.activity = recording(shown)
    folder = tmp_path / "entry"
    folder.mkdir()
    info = build_plan(path, folder, contract, rtx_spec(), timing_cache=timings, console=console)
    if not host.has_gpu():
        assert info["unchecked"] == "there is no NVIDIA GPU here"
        assert "warning: the engine was built but not run: there is no NVIDIA GPU here" in capfd.readouterr().err
    assert sorted(file.name for file in folder.iterdir()) == ["build.log", "engine.plan"]
    assert "[INFO]" in (folder / "build.log").read_text()
    assert timings.stat().st_size > 0
    assert [file.name for file in sorted(tmp_path.iterdir()) if "timings" in file.name] == [
        "timings.cache",
        "timings.cache.lock",
    ]
    assert json.loads(json.dumps(info)) == info
    assert shown[0] == "reading the ONNX"
    assert len(shown) > 2, "the progress monitor says what goes on"


def recording(shown, then=lambda text: None):
    """A `Console.activity` that notes what it is shown."""
    from contextlib import contextmanager

    @contextmanager
    def activity(name):
        def show(text):
            shown.append(text)
            then(text)

        yield show

    return activity


@needs_rtx
@pytest.mark.slow
def test_several_profiles_and_external_data(tmp_path, tiny_onnx):
    path, contract = tiny_onnx
    outside = tmp_path / "outside" / "model.onnx"
    outside.parent.mkdir()
    onnx.save(onnx.load(path), outside, save_as_external_data=True, location="model.onnx.data", size_threshold=64)
    spec = rtx_spec(profiles=(Profile.of(Sizes(2, 128, 128)), Profile.of(Sizes(2, 128, 192, 154))))
    info = build_here(Request(outside, tmp_path, contract, spec, None, False), lambda message: None)
    assert len(info["profiles"]) == 2


@needs_rtx
@pytest.mark.slow
def test_attention_that_overflows_builds_with_fp32_inside(tmp_path):
    """SD 2.1's kind: the casts around QKᵀ and softmax are there in the built plan's layers."""
    layers = {}
    for upcast in (False, True):
        folder = tmp_path / str(upcast)
        folder.mkdir()
        path, contract = export_to(folder, "sd2", **{**factories.SMALLEST["sd2"], "upcast_attention": upcast})
        info = build_here(Request(path, folder, contract, rtx_spec(), None, False), lambda message: None)
        layers[upcast] = info["precision"]["layers"]
    assert layers[True]["fp32"] > layers[False]["fp32"]
    assert layers[True]["fp16"] > layers[True]["fp32"]


@needs_rtx
@pytest.mark.slow
def test_fp32_computes_in_fp32(tmp_path):
    path, contract = export_to(
        tmp_path,
        precision="fp32",
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    info = build_here(Request(path, tmp_path, contract, rtx_spec("fp32"), None, False), lambda message: None)
    assert set(info["precision"]["layers"]) == {"fp32"}


@needs_rtx
def test_an_unknown_operator_is_named(tmp_path, tiny_onnx):
    """By the real parser: node, operator, reason."""
    request = replace(request_for(tiny_onnx, tmp_path), onnx=save_graph(tmp_path / "odd.onnx", "Frobnicate"))
    with pytest.raises(BuildError, match=r"node /down/odd \(Frobnicate\): .*") as caught:
        build_here(request, lambda message: None)
    assert "--exporter torchscript" in caught.value.hint


@needs_rtx
def test_other_inputs_than_the_contract_are_refused(tmp_path, tiny_onnx):
    request = replace(request_for(tiny_onnx, tmp_path), onnx=save_graph(tmp_path / "relu.onnx", "Relu"))
    with pytest.raises(BuildError, match=r"the ONNX takes .*'x': 'float32'.* and not .*sample"):
        build_here(request, lambda message: None)


@needs_rtx
@pytest.mark.slow
def test_a_damaged_timing_cache_is_replaced(tmp_path, tiny_onnx):
    file = tmp_path / "t.cache"
    file.write_bytes(b"not a timing cache")
    build_here(request_for(tiny_onnx, tmp_path, timing_cache=file), lambda message: None)
    assert file.read_bytes() != b"not a timing cache"


@needs_rtx
def test_an_impossible_profile_is_the_builders_error(tmp_path, tiny_onnx):
    """What TensorRT says is in the error: 8 pixels are too few for two resolutions and a skip connection."""
    path, contract = tiny_onnx
    other = replace(contract, inputs=(*contract.inputs[:2], replace(contract.inputs[2], dims=("batch", "tokens", 999))))
    request = Request(path, tmp_path, other, rtx_spec(), None, False)
    with pytest.raises(BuildError) as caught:
        build_here(request, lambda message: None)
    assert "encoder_hidden_states" in caught.value.message


@needs_rtx
@pytest.mark.slow
def test_without_a_gpu_the_plan_cannot_be_opened(tmp_path, tiny_onnx):
    if host.has_gpu():
        pytest.skip("there is a GPU")
    build_here(request_for(tiny_onnx, tmp_path), lambda message: None)
    with pytest.raises(EngineError, match="needs an NVIDIA GPU"):
        running.load_engine(libraries.open_library("tensorrt-rtx"), tmp_path / "engine.plan")


# ------------------------------------------------------------------------------------------- when it goes wrong


def test_no_gpu_is_said_at_once(tiny_onnx, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "gpus", lambda: ())
    monkeypatch.setattr(libraries, "open_library", lambda backend: fake_library("tensorrt 8.6.1"))
    path, contract = tiny_onnx
    spec = BuildSpec(ExportSpec(), "tensorrt", (PROFILE,))
    with pytest.raises(EngineError, match=r"TensorRT 8\.6\.1 needs an NVIDIA GPU"):
        build_plan(path, tmp_path, contract, spec, timing_cache=None, console=QUIET)


@pytest.mark.parametrize(
    ("label", "precision", "message"),
    [("tensorrt 8.6.1", "bf16", "has no bf16"), ("tensorrt_lean 10.15.1.29", "fp16", "runs engines and builds none")],
)
def test_what_a_library_cannot_build_is_said_at_once(label, precision, message, tiny_onnx, tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "open_library", lambda backend: fake_library(label))
    path, contract = tiny_onnx
    spec = BuildSpec(ExportSpec(precision=precision), "tensorrt", (PROFILE,))
    with pytest.raises(BuildError, match=message):
        build_plan(path, tmp_path, contract, spec, timing_cache=None, console=QUIET)


@needs_rtx
@pytest.mark.slow
def test_ctrl_c_ends_the_build_at_once(tiny_onnx, tmp_path, monkeypatch):
    children = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            children.append(self)

    def interrupt(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(child.subprocess, "Popen", Popen)
    console = Console(quiet=True)
    console.activity = recording([], interrupt)
    path, contract = tiny_onnx
    with pytest.raises(KeyboardInterrupt):
        build_plan(path, tmp_path, contract, rtx_spec(), timing_cache=None, console=console)
    assert children[0].poll() == -signal.SIGKILL


@needs_rtx
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.slow
def test_the_build_ends_with_its_parent(tiny_onnx, tmp_path):
    """However that ends: here it is killed while it waits for the build."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import pickle, sys\n"
        "from sdtrt.backends.tensorrt import build\n"
        "from sdtrt.common.console import QUIET\n"
        "request = pickle.load(open(sys.argv[1], 'rb'))\n"
        "build.build_in_child(request, QUIET, lambda text: print(text, flush=True))\n"
    )
    import pickle

    (tmp_path / "request").write_bytes(pickle.dumps(request_for(tiny_onnx, tmp_path)))
    command = [sys.executable, str(script), str(tmp_path / "request")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout.readline(), "the build runs"
        (child,) = children_of(parent.pid)
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def children_of(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_dead_builder_leaves_its_last_words(tiny_onnx, tmp_path, monkeypatch):
    """A builder that crashes takes nothing with it; what it said is in the error."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'corrupted size vs. prev_size' >&2\nkill -SEGV $$\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(BuildError, match=r"died \(SIGSEGV\).*corrupted size vs\. prev_size"):
        build.build_in_child(request_for(tiny_onnx, tmp_path), QUIET, lambda text: None)


def test_a_builder_that_died_before_its_request_is_no_broken_pipe(tmp_path, tiny_onnx):
    """Whether the request still gets through is a matter of microseconds; here it never does."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        child.send(request_for(tiny_onnx, tmp_path), pipe)
    assert pipe.closed


@needs_rtx
@pytest.mark.slow
def test_errors_and_bugs_of_the_child_come_back(tiny_onnx, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    odd = replace(request_for(tiny_onnx, tmp_path), onnx=save_graph(tmp_path / "odd.onnx", "Frobnicate"))
    with pytest.raises(BuildError, match=r"\(Frobnicate\)") as caught:
        build.build_in_child(odd, Console(quiet=True), lambda text: None)
    assert caught.value.hint
    (kept,) = tmp_path.glob("sdtrt-build-*.log")
    assert str(kept) in capsys.readouterr().err.replace("\n", "")
    assert "[ERROR]" in kept.read_text()
    request = request_for(tiny_onnx, tmp_path)
    odd = replace(request, contract=replace(request.contract, inputs=None))
    with pytest.raises(RuntimeError, match="the build process failed:\nTraceback"):
        build.build_in_child(odd, QUIET, lambda text: None)


def test_a_request_comes_out_of_the_pipe_as_it_went_in(tiny_onnx, tmp_path):
    request = request_for(tiny_onnx, tmp_path, timing_cache=tmp_path / "cache")
    request = replace(request, spec=replace(request.spec, compute_capability=(8, 9), workspace_bytes=2**30))
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request


# ---------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("precision", "layers", "right"),
    [
        ("fp16", {"fp16": 100, "fp32": 3}, True),
        ("fp16", {"fp32": 103}, False),
        ("fp16", {}, False),
        ("fp32", {"fp32": 103}, True),
        ("fp32", {"fp32": 102, "fp16": 1}, False),
        ("bf16", {"bf16": 90, "fp32": 3}, True),
        ("bf16", {"fp16": 90}, False),
    ],
)
def test_check_precision(precision, layers, right):
    spec = rtx_spec(precision)
    for label in ("tensorrt 8.6.1", "tensorrt 10.13.3.9"):
        library = fake_library(label)
        if right:
            check_precision(library, spec, layers)
            continue
        with pytest.raises(BuildError, match=f"an engine in {precision} was asked for") as caught:
            check_precision(library, spec, layers)
        assert ("by timings" in caught.value.hint) == label.startswith("tensorrt 8")


@pytest.mark.parametrize(("error", "right"), [(0.008, True), (0.06, False), (float("nan"), False)])
def test_check_parity(error, right, tiny_onnx, tmp_path):
    figures = {"relative_l2": error, "cosine": 1.0, "max_abs": 0.1}
    reference = reference_of(request_for(tiny_onnx, tmp_path))
    if right:
        check_parity(figures, reference)
        return
    with pytest.raises(BuildError, match="differs from its ONNX"):
        check_parity(figures, reference)


def test_why_an_engine_is_not_run(monkeypatch):
    library = fake_library("tensorrt_rtx 1.7.1.116")
    gpu = host.Gpu("Fake", (8, 9), 2**30)
    monkeypatch.setattr(host, "gpus", lambda: (gpu,))
    assert why_not_runnable(library, rtx_spec()) is None
    assert "for compute capability 12.0" in why_not_runnable(library, rtx_spec(compute_capability=(12, 0)))
    monkeypatch.setattr(host, "gpus", lambda: (replace(gpu, compute_capability=(9, 0)),))
    assert "does not serve Fake" in why_not_runnable(library, rtx_spec(compute_capability=(9, 0)))
