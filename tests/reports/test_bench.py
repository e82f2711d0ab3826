"""What `sdtrt bench` measures and reports: on the CPU with a small model, baselines that fail, files, meters."""

from __future__ import annotations

import ast
import errno
import importlib.util
import inspect
import json
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime
import pynvml
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from factories import SMALL, engines_wanted, sd1_folder, sdxl_folder, small_unet
from PIL import Image
from test_controlnet import small_controlnet

from sdtrt.backends import registry
from sdtrt.backends.onnxruntime.fused_attention import fuse
from sdtrt.backends.onnxruntime.session import OnnxRuntimeSession
from sdtrt.cli.options import BackendOptions
from sdtrt.cli.report_options import BenchOptions
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import EngineError, OutputError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.exports.component import FILE_NAME, export_component
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening import engines, request
from sdtrt.pipeline.opening import open as pipeline_open
from sdtrt.pipeline.parts.facades import UNetFacade
from sdtrt.reports import bench_baselines, bench_compile, bench_parts, meters
from sdtrt.reports.bench import FILES, run_bench
from sdtrt.reports.bench_baselines import BASELINES, BoundSession, GraphedForward
from sdtrt.reports.bench_compile import FORMS
from sdtrt.reports.bench_report import COLUMNS, BenchReport, Measured, Row, Runner
from sdtrt.reports.energy import EnergyMeter, PowerLog
from sdtrt.reports.meters import MemoryMeter, Timing, time_calls
from sdtrt.specs import BASELINES as BASELINE_NAMES
from sdtrt.specs import BenchSpec, ExportSpec, ModelSpec, NoiseSpec, Sizes
from sdtrt.specs.contract import Contract
from sdtrt.specs.groups import residual_shapes

pytestmark = pytest.mark.usefixtures("on_the_cpu")
ROW_KEYS = {
    "task",
    "backend",
    "precision",
    "steps",
    "height",
    "width",
    "batch",
    "latency_s",
    "unet_step_ms",
    "images_per_s",
    "peak_bytes",
    "speedup",
}


@pytest.fixture(scope="module", autouse=True)
def _briefly():
    """Parts are timed for a moment only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdtrt.reports.bench_parts.COMPONENT_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return sd1_folder(tmp_path_factory.mktemp("models") / "sd1", **SMALL)


@pytest.fixture(scope="module")
def directory(small, tmp_path_factory):
    """With the engines of a text's pictures in it."""
    directory = EngineDirectory(tmp_path_factory.mktemp("engines"))
    model, parts = resolve_model(ModelSpec(str(small))), ("text_encoder", "unet", "vae_decoder")
    engines.ensure_engines(engines_wanted(model, "onnxruntime", "fp32", Sizes(2, 64, 64), parts), directory)
    return directory


@pytest.fixture
def spec(small):
    model = ModelSpec(str(small))
    return BenchSpec(model, backend="onnxruntime", tasks=("txt2img", "img2img"), steps=3, strength=0.7, repeats=3)


# Reports


@pytest.mark.slow
def test_a_controlnet_is_timed_with_the_pipeline_and_by_itself(small, tmp_path, engine_dir, run):
    net, picture = tmp_path / "net", tmp_path / "map.png"
    small_controlnet(small_unet("sd1", **SMALL)).save_pretrained(net)
    Image.effect_noise((64, 64), 90).point(lambda level: 255 * (level > 128)).save(picture)
    given = ("--controlnet", f"{net}:0.5", "--control-image", str(picture))
    words = ("--model", str(small), "--task", "txt2img", "--steps", "2", "--repeats", "1", "--warmups", "1")
    words += ("--backend", "onnxruntime", "--baselines", "torch-fp32", "--engine-dir", str(engine_dir), "--json")
    code, out, _ = run(*words, *given, *given)
    assert code == 0
    for row in json.loads(out)["rows"]:
        parts = {name: timing["median"] / 1000 for name, timing in row["components_ms"].items()}
        assert set(parts) == {"text_encoder", "unet", "controlnet", "controlnet_2", "vae_decoder"}
        steps = row["unet_calls"] * sum(parts[name] for name in ("unet", "controlnet", "controlnet_2"))
        once = parts["text_encoder"] + parts["vae_decoder"]
        assert row["component_share"] == pytest.approx((once + steps) / row["latency_s"]["median"])
    code, _, err = run(*words, "--controlnet", str(net))
    assert (code, "1 ControlNet and 0 control images were given" in err) == (2, True)


@pytest.mark.slow
def test_rows_have_figures_of_the_backend_and_of_pytorch(spec, directory):
    report = run_bench(replace(spec, batch_sizes=(1, 2)), directory, QUIET, "sdtrt bench")
    data = json.loads(json.dumps(report.to_json()))
    assert {"host", "versions", "rows", "command"} <= data.keys()
    assert data["host"]["torch_threads"] == torch.get_num_threads()
    assert [(row["task"], row["batch"], row["backend"]) for row in data["rows"]] == [
        (task, batch, backend)
        for task in ("txt2img", "img2img")
        for batch in (1, 2)
        for backend in ("onnxruntime", "torch")
    ]
    for row in data["rows"]:
        assert row.keys() >= ROW_KEYS
        assert len(row["latency_s"]["samples"]) == 3
        assert min(row["latency_s"]["samples"]) <= row["latency_s"]["median"] <= row["latency_s"]["p90"]
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["latency_s"]["median"])
        assert 0 < row["unet_step_ms"] / 1000 < row["latency_s"]["median"]
        assert row["peak_bytes"] > 2**27  # PyTorch alone is more
        assert (row["error"], row["energy_j"], row["device"]) == (None, None, "cpu")
        assert (row["energy_per_image_j"], row["energy_source"]) == (None, None)
    fast, plain = data["rows"][:2]
    assert (plain["variant"], plain["speedup"]) == ("TF32 off", 1.0)
    assert fast["speedup"] == pytest.approx(plain["latency_s"]["median"] / fast["latency_s"]["median"])
    (engine,) = [entry for entry in directory.entries("engine") if entry.key["component"] == "unet"]
    assert fast["engine"]["digest"] == engine.digest
    assert [row["steps"] for row in data["rows"]] == [3] * 4 + [2] * 4
    assert [row["unet_calls"] for row in data["rows"][::4]] == [4, 3]  # PNDM has one call more than steps
    assert set(fast["components_ms"]) == {"text_encoder", "unet", "vae_decoder"}
    assert set(data["rows"][-1]["components_ms"]) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    parts = {name: timing["median"] / 1000 for name, timing in fast["components_ms"].items()}
    once, call = parts["text_encoder"] + parts["vae_decoder"], fast["latency_s"]["median"]
    assert fast["component_share"] == pytest.approx((once + 4 * parts["unet"]) / call)
    assert set(data["best_batch"]) == {"txt2img", "img2img"}
    report.check()


def test_the_parts_of_a_pipeline_are_put_back_as_they_were(spec, directory):
    """A baseline leaves nothing behind: not in PyTorch's settings, and not in the model that the next one opens."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with meters.tf32(not before[0]):
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is not before[0]
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_calls_are_warmed_up_counted_and_without_tf32(spec, directory, monkeypatch):
    """TF32 is on before, as a program may have it; each runner's calls are so many, and have it off."""
    calls = []
    inner = StableDiffusionPipeline.__call__

    def call(pipe, *given, **named):
        calls.append((type(pipe.unet), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return inner(pipe, *given, **named)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    with meters.tf32(True):
        run_bench(replace(spec, tasks=("txt2img",), warmups=4, repeats=3), directory, QUIET, "")
    assert calls == [(UNetFacade, False, False)] * 7 + [(UNet2DConditionModel, False, False)] * 7


def test_parts_are_warm_when_they_are_timed(monkeypatch):
    """Sessions capture a CUDA graph in their third call."""
    timed = []
    monkeypatch.setattr(
        "sdtrt.reports.bench_parts.time_queued_calls", lambda call, repeats, device: timed.append(len(calls))
    )
    calls = []
    bench_parts.time_component(lambda: calls.append(None), torch.device("cpu"))
    assert timed == [3]


@pytest.mark.parametrize(
    ("batch", "kind"),
    [(1, "sd1"), (3, "sdxl"), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((3, "sd1"), (1, "sdxl")))],
)
def test_parts_are_timed_with_what_the_pipeline_gives_them(kind, batch, small, tmp_path, monkeypatch):
    """Images one by one to the encoder; SDXL's VAE in fp32, as it would overflow in fp16."""
    folder = small if kind == "sd1" else sdxl_folder(tmp_path / "sdxl")
    pipeline_spec = request.PipelineSpec(
        resolve_model(ModelSpec(str(folder))), "torch", "fp16", Sizes(2 * batch, 64, 64), 2, img2img=True, images=batch
    )
    seen = []

    def note(name, inner):
        def call(self, given, *more, **named):
            seen.append((name, tuple(given.shape), given.dtype, self.dtype))
            return inner(self, given, *more, **named)

        return call

    for part, name in ((AutoencoderKL, "encode"), (AutoencoderKL, "decode"), (UNet2DConditionModel, "forward")):
        monkeypatch.setattr(part, name, note(name, getattr(part, name)))
    with pipeline_open.open_pipeline(pipeline_spec, EngineDirectory(tmp_path / "engines"), QUIET) as opened:
        pictures = [Image.new("RGB", (64, 64))] * batch
        generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        opened.pipe(["red"] * batch, image=pictures, num_inference_steps=2, strength=1.0, generator=generators)
        asked, seen[:] = Counter(seen), []
        for name, part in bench_parts.parts_of(opened).items():
            assert (name, part()) is not None
        assert opened.pipe.vae.dtype == torch.float16
    unet = next(one for one in asked if one[0] == "forward")
    assert Counter(seen) == asked - Counter({unet: asked[unet] - 1})


def test_a_baseline_that_fails_is_a_row_with_the_reason(spec, directory, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore of it")

    monkeypatch.setattr("sdtrt.reports.bench_baselines.compile_pipeline", fail)
    names = ("torch-compile", "torch-graph", "onnxruntime-cuda", "torch-fp32")
    report = run_bench(replace(spec, tasks=("txt2img",), baselines=names), directory, QUIET, "")
    rows = report.to_json()["rows"]
    assert [row["baseline"] for row in rows] == [None, *names]
    assert rows[1]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"
    assert "GPU" in rows[2]["error"]
    assert "GPU" in rows[3]["error"]
    assert (rows[1]["latency_s"], rows[1]["speedup"], rows[1]["images_per_s"]) == (None, None, None)
    assert rows[0]["speedup"] > 0
    assert sum(line.startswith("failed: ") for line in report.remarks()) == 3
    assert "9 GiB" in report.markdown()
    report.check()


def test_the_asked_backend_must_be_measured(spec, directory):
    spec = replace(spec, backend="tensorrt", tasks=("txt2img",))
    report = run_bench(spec, directory, QUIET, "")
    assert [row.measured is None for row in report.rows] == [True, False]
    with pytest.raises(EngineError, match=r"tensorrt fp16 was not measured in txt2img at batch 1: .*GPU"):
        report.check()


def test_a_bug_in_the_asked_backend_keeps_its_traceback(spec, directory, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(OnnxRuntimeSession, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run_bench(replace(spec, baselines=()), directory, QUIET, "")


def test_too_little_memory_is_a_row(spec, directory, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("no more")

    monkeypatch.setattr(OnnxRuntimeSession, "run", fail)
    report = run_bench(replace(spec, tasks=("txt2img",)), directory, QUIET, "")
    assert "out of memory" in report.rows[0].error
    assert report.rows[1].measured is not None


def test_pytorch_that_is_asked_for_is_not_measured_twice(spec, directory):
    report = run_bench(replace(spec, backend="torch", precision="fp32", tasks=("txt2img",)), directory, QUIET, "")
    assert [(row.runner.asked, row.speedup) for row in report.rows] == [(True, 1.0)]


def test_what_a_cpu_has_no_use_for_is_left_out_and_named(spec, directory, monkeypatch):
    class Notes(type(QUIET)):
        said = ()

        def note(self, text):
            self.said += (text,)

    console = Notes(quiet=True)
    run_bench(replace(spec, tasks=("txt2img",), repeats=1), directory, console, "")
    text = next(note for note in console.said if note.startswith("baselines left out"))
    assert all(name in text for name in BASELINE_NAMES if name != "torch-fp32")
    assert "no joules an image: nobody counts a CPU's energy, nor this GPU's" in console.said


def test_the_best_batch_is_that_of_the_asked_backend():
    def row(batch, median, *, asked=True):
        runner = Runner("tensorrt", "fp16", None, None, asked)
        measured = None if median is None else FakeMeasured(Timing((median,)))
        return Row("txt2img", runner, 50, 512, 512, batch, measured)

    rows = (row(1, 1.0), row(2, 1.5), row(4, 3.5), row(8, None), row(4, 0.1, asked=False))
    report = BenchReport(rows, {}, {}, "", "tiny")
    assert report.best_batches() == {"txt2img": 2}
    assert report.remarks()[0] == "most images a second in txt2img: batch 2"


class FakeMeasured:
    """As much of a measurement as a rate needs."""

    energy_source = None

    def __init__(self, latency):
        self.latency = latency


# Files


def test_json_markdown_and_a_chart_are_written(spec, directory, tmp_path):
    spec = replace(spec, tasks=("txt2img",), repeats=1, output=tmp_path / "new" / "folder")
    report = run_bench(spec, directory, QUIET, "sdtrt bench --repeats 1")
    assert sorted(path.name for path in spec.output.iterdir()) == sorted(FILES)
    assert json.loads((spec.output / "bench.json").read_text()) == json.loads(json.dumps(report.to_json()))
    text = (spec.output / "bench.md").read_text()
    assert "`sdtrt bench --repeats 1`" in text
    assert text.count("\n| txt2img |") == 2
    assert "\n## torch fp32 (TF32 off)\n\n```python\npipe = DiffusionPipeline." in text
    pixels = np.asarray(Image.open(spec.output / "bench.png").convert("RGB")).astype(int)
    green = (np.abs(pixels - [0x2F, 0x7D, 0x4F]).sum(-1) == 0).sum(0)
    grey = (np.abs(pixels - [0xA9, 0xB4, 0xC0]).sum(-1) == 0).sum(0)
    lengths = (green >= 20).sum(), (grey >= 20).sum()
    ratio = report.rows[0].measured.latency.median / report.rows[1].measured.latency.median
    assert lengths[0] / lengths[1] == pytest.approx(ratio, rel=0.05)
    with pytest.raises(OutputError, match="exists"):
        run_bench(spec, directory, QUIET, "")
    run_bench(replace(spec, overwrite=True, baselines=()), directory, QUIET, "again")
    assert json.loads((spec.output / "bench.json").read_text())["command"] == "again"


def test_a_chart_of_nothing_but_failures_can_be_drawn():
    rows = tuple(Row("txt2img", Runner("torch", "fp16", None, None, asked), 1, 8, 8, 1) for asked in (True, False))
    assert BenchReport(rows, {}, {}, "", "tiny").chart().size[0] == 1200


# Wrong requests


@pytest.mark.parametrize(
    "wrong",
    [
        {"tasks": ("inpaint",)},
        {"baselines": ("torch-fp8",)},
        {"batch_sizes": (0,)},
        {"batch_sizes": ()},
        {"repeats": 0},
        {"warmups": 0},
        {"steps": 0},
        {"height": 100},
        {"tasks": ("img2img",), "strength": 0.01},
    ],
)
def test_a_wrong_request_is_a_usage_error(wrong):
    with pytest.raises(UsageError):
        BenchSpec(**wrong)


def test_a_backend_that_there_is_not_is_a_usage_error(spec, directory):
    with pytest.raises(UsageError, match="backend"):
        run_bench(replace(spec, backend="gpu"), directory, QUIET, "")


def test_every_baseline_has_its_description():
    assert set(BASELINES) == set(BASELINE_NAMES)


GRAPHED = ("torch-compile", "torch-compile-max", "torch-compile-regional")


@pytest.mark.parametrize("name", BASELINE_NAMES)
def test_the_code_of_a_baseline_is_python_and_its_own(name):
    """What the report shows is what runs: the form's own source, with all that it calls."""
    text = bench_baselines.code_of(BASELINES[name], "fp16", "cuda")
    tree = ast.parse(text)
    assert text.startswith("pipe = DiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float16).to")
    assert f"allow_tf32 = {name == 'torch-tf32'}" in text
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    form = FORMS.get(name)
    assert form is None or inspect.getsource(form) in text
    assert ("compile_others" in functions) == (name in GRAPHED)
    assert ("capture_graph" in functions) == (form is not None and "graphed(" in text)
    assert ("capture_graph" in functions) == (name in {"torch-graph", *GRAPHED})
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert classes == ({"GraphedForward"} if "capture_graph" in functions else set())
    assert form is None or text.splitlines()[-1] == f"{form.__name__}(pipe, GraphedForward)"


def test_the_code_of_a_baseline_on_a_cpu_has_no_graph():
    text = bench_baselines.code_of(BASELINES["torch-compile"], "fp32", "cpu")
    assert "capture_graph" not in text
    assert text.endswith("\ncompiled(pipe, lambda forward: forward)\n")


def test_a_form_changes_what_its_code_says(monkeypatch):
    """Each form on a real pipeline's parts, PyTorch's compiler noted in the place of run."""
    compiled, graphs = [], []
    monkeypatch.setattr(torch, "compile", lambda forward, **options: compiled.append(options) or forward)
    for name in ("torch-graph", "torch-compile", "torch-compile-max", "torch-compile-unet"):
        unet, vae, text = small_unet("sd1"), AutoencoderKL(), torch.nn.Linear(2, 2)
        pipe = SimpleNamespace(unet=unet, vae=vae, text_encoder=text)
        graphed = partial(lambda name, forward: graphs.append(name) or forward, name)
        bench_compile.compile_pipeline(pipe, name, torch.device("cuda"), graphed)
        assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert hasattr(unet.mid_block.attentions[0].transformer_blocks[0].attn1, "to_qkv") == (
            name in ("torch-compile", "torch-compile-max")
        )
    assert graphs == ["torch-graph", "torch-compile", "torch-compile-max"]
    strong, tuned, alone = compiled[0], compiled[4], compiled[8]
    assert len(compiled) == 9
    assert strong == {"fullgraph": True, "dynamic": False}
    assert tuned == {**strong, "mode": "max-autotune-no-cudagraphs"}
    assert alone == {"mode": "default", "dynamic": False}


def test_torch_tensorrt_compiles_the_unet_in_its_own_precision(monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, "torch_tensorrt", ModuleType("torch_tensorrt"))
    monkeypatch.setattr(torch, "compile", lambda forward, **options: asked.append((forward, options)) or forward)
    unet = small_unet("sd1")
    before = unet.forward
    bench_compile.compile_pipeline(SimpleNamespace(unet=unet), "torch-tensorrt", torch.device("cuda"), None)
    ((forward, options),) = asked
    assert forward == before
    assert options["backend"] == "torch_tensorrt"
    assert "enabled_precisions" not in options["options"]  # beside explicit types, fp16 among them is refused


# The CUDA graph around PyTorch's UNet (its capture runs on GPUs only; what is around it runs here)


class FakeGraph:
    """A capture as CUDA makes it: a replay computes the same call again, into the same memory."""

    def __init__(self):
        self.captures = 0

    def __call__(self, call):
        self.captures += 1
        output = call()
        return (lambda: output.copy_(call())), output


def residuals(unet, rows, side, generator):
    """What ControlNets would give a UNet, by its arguments' names."""
    *down, middle = (
        torch.randn(rows, channels, side // factor, side // factor, generator=generator)
        for channels, factor in residual_shapes(unet.config)
    )
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


@torch.no_grad()
@pytest.mark.parametrize(("kind", "controlled"), [("sd1", False), ("sdxl", False), ("sdxl", True)])
def test_a_graphed_unet_computes_what_the_plain_one_does(kind, controlled):
    plain, graphed, capture = small_unet(kind), small_unet(kind), FakeGraph()
    graphed.to(memory_format=torch.channels_last)
    graphed.forward = GraphedForward(graphed.forward, capture)
    width = plain.config.cross_attention_dim
    results = []
    for seed, (rows, side) in enumerate(((2, 16), (2, 16), (4, 8), (2, 16))):
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randn(rows, 4, side, side, generator=generator)
        states = torch.randn(rows, 7, width, generator=generator)
        added = {"text_embeds": torch.randn(rows, 32, generator=generator), "time_ids": torch.full((rows, 6), 8.0)}
        conditions = added if kind == "sdxl" else None
        moment = torch.tensor(900 - 100 * seed)
        arguments = {"added_cond_kwargs": conditions, "timestep_cond": None, "cross_attention_kwargs": None}
        arguments |= residuals(plain, rows, side, generator) if controlled else {}
        expected = plain(sample, moment, encoder_hidden_states=states, return_dict=False, **arguments)[0]
        result = graphed(sample, moment, encoder_hidden_states=states, return_dict=False, **arguments)[0]
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
        results.append((result, expected))
    assert capture.captures == 3  # the second call replays; other shapes are captured anew
    for result, expected in results:  # and no later call has written into an earlier output
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_graph_refuses_what_it_did_not_capture():
    graphed = GraphedForward(small_unet("sd1").forward, FakeGraph())
    with pytest.raises(AssertionError, match="class_labels"):
        graphed(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 7, 32), class_labels=torch.zeros(2), return_dict=False)


# ONNX Runtime's IO binding (its CUDA provider is the baseline; the CPU's takes the same path)


@pytest.mark.slow
def test_a_bound_session_computes_what_a_plain_one_does(small, directory):
    model = resolve_model(ModelSpec(str(small)))
    entry = export_component(model, ExportSpec(model.spec, precision="fp32"), directory, QUIET)
    contract = Contract.from_json(entry.info["contract"])
    feeds = seeded_feeds(contract, Sizes(2, 64, 72))
    with OnnxRuntimeSession(entry.file(FILE_NAME), contract) as session:
        expected = session.run(feeds)["out_sample"]
    with BoundSession(entry.file(FILE_NAME), contract, torch.device("cpu")) as session:
        result = session.run(feeds)["out_sample"]
        session.run(seeded_feeds(contract, Sizes(2, 64, 72), seed=1))
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture
def onnxruntime_spec(small, monkeypatch):
    """A pipeline for the baseline of ONNX Runtime, in its CPU provider, for there is no other here."""
    monkeypatch.setattr(bench_baselines, "CUDA_PROVIDER", "CPUExecutionProvider")
    return request.PipelineSpec(resolve_model(ModelSpec(str(small))), "torch", "fp32", Sizes(2, 64, 64), steps=2)


def test_the_baseline_of_onnx_runtime_makes_the_picture_of_pytorch(onnxruntime_spec, directory, monkeypatch, capsys):
    counts = []

    def noted(*arguments):
        model, count = fuse(*arguments)
        counts.append(count)
        return model, count

    monkeypatch.setattr(bench_baselines, "fuse", noted)
    size, pictures = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}, []
    for name in ("torch-fp32", "onnxruntime-cuda"):
        with bench_baselines.open_baseline(BASELINES[name], onnxruntime_spec, directory, Console(quiet=True)) as opened:
            pictures.append(opened.pipe("red", generator=torch.Generator().manual_seed(3), **size).images)
    assert counts[0] > 0
    np.testing.assert_allclose(*pictures, atol=1e-3)
    assert capsys.readouterr().err == ""


def test_a_baseline_whose_attentions_are_not_fused_says_so(onnxruntime_spec, directory, monkeypatch, capsys):
    monkeypatch.setattr(bench_baselines, "fuse", lambda source, *_: (source, 0))
    baseline = BASELINES["onnxruntime-cuda"]
    with bench_baselines.open_baseline(baseline, onnxruntime_spec, directory, Console(quiet=True)):
        assert capsys.readouterr().err.startswith("warning: ONNX Runtime's baseline has its attentions as they were")


def test_a_baseline_without_room_for_its_copy_names_the_place(onnxruntime_spec, directory, monkeypatch):
    def fail(_, folder, *__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)

    monkeypatch.setattr(bench_baselines, "fuse", fail)
    opening = bench_baselines.open_baseline(BASELINES["onnxruntime-cuda"], onnxruntime_spec, directory, QUIET)
    with pytest.raises(EngineError, match="No space left") as caught, opening:
        pass
    assert "TMPDIR" in caught.value.hint


def test_a_provider_that_refuses_says_why_and_is_not_replaced(small, directory, monkeypatch, capsys):
    """ONNX Runtime's own way is to print to stdout and go on with another one."""

    def refuse(*_, **__):
        raise RuntimeError("this build has no NHWC operators")

    model = resolve_model(ModelSpec(str(small)))
    entry = export_component(model, ExportSpec(model.spec, precision="fp32"), directory, QUIET)
    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", refuse)
    with pytest.raises(EngineError, match="no NHWC operators"):
        BoundSession(entry.file(FILE_NAME), Contract.from_json(entry.info["contract"]), torch.device("cpu"))
    assert capsys.readouterr().out == ""


def test_a_provider_that_is_missing_is_named():
    bench_baselines.require_provider("CPUExecutionProvider")
    with pytest.raises(EngineError, match="NoSuchExecutionProvider"):
        bench_baselines.require_provider("NoSuchExecutionProvider")


# Meters


@pytest.mark.parametrize(
    ("count", "rank"), [(1, 1), (3, 3), (6, 6), (7, 7), (9, 9), (10, 9), (11, 10), (20, 18), (110, 99)]
)
def test_nine_in_ten_do_not_exceed_the_p90(count, rank):
    assert Timing(tuple(float(number) for number in range(count, 0, -1))).p90 == rank


def test_the_clock_runs_while_the_gpu_works_and_no_longer(monkeypatch):
    done = []
    monkeypatch.setattr(meters, "synchronize", lambda device: done.append("wait"))
    monkeypatch.setattr(meters.time, "perf_counter", lambda: done.append("clock") or 0.0)
    time_calls(lambda: done.append("call"), 2, torch.device("cpu"))
    assert done == ["wait", "clock", "call", "wait", "clock"] * 2


def test_percentiles_are_samples():
    timing = Timing((5.0, 1.0, 4.0, 2.0, 3.0))
    assert (timing.median, timing.p90) == (3.0, 5.0)
    assert Timing(tuple(float(number) for number in range(1, 11))).p90 == 9.0
    assert timing.scaled(1000).to_json() == {"median": 3000, "p90": 5000, "samples": [5000, 1000, 4000, 2000, 3000]}
    assert Timing((7.0,)).p90 == 7.0


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
def test_the_memory_peak_is_that_of_the_time_since():
    size = 2**27
    np.ones(2 * size, dtype=np.uint8)
    meter = MemoryMeter(torch.device("cpu"))
    before = meters.process_peak_bytes()
    with meter.watching():
        np.ones(size, dtype=np.uint8)
    assert size * 0.9 < meter.peak_bytes - before < size * 1.5
    assert meter.to_json() == {
        "process_peak_bytes": meter.peak_bytes,
        "gpu_peak_bytes": None,
        "torch_peak_bytes": None,
    }


@pytest.fixture
def management(monkeypatch):
    """NVML on a machine with one GPU."""
    handle = object()

    def handle_of(uuid):
        if uuid != "GPU-1b2c":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return handle

    def energy(asked):
        assert asked is handle
        return 12_500

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.1")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", handle_of)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", energy)
    meters.nvml.cache_clear()
    yield
    meters.nvml.cache_clear()


@pytest.mark.usefixtures("management")
def test_energy_and_driver_come_from_the_drivers_library():
    assert meters.driver_version() == "580.1"
    assert meters.energy_of("GPU-1b2c") == 12.5
    assert meters.energy_of("GPU-other") is None
    assert meters.energy_joules(torch.device("cpu")) is None


@pytest.mark.usefixtures("management")
def test_without_a_driver_there_is_no_energy_and_no_version(monkeypatch):
    def missing():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert meters.driver_version() is None
    assert meters.energy_of("GPU-1b2c") is None


@pytest.fixture
def gpu(monkeypatch):
    """A device that NVML knows."""
    monkeypatch.setattr(meters, "gpu_uuid", lambda device: "GPU-1b2c")
    return torch.device("cuda")


@pytest.mark.usefixtures("management")
def test_a_gpus_counter_says_what_was_used_meanwhile(gpu, monkeypatch):
    counts = iter([12_500, 15_000])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: next(counts))
    meter = EnergyMeter(gpu)
    with meter.watching():
        pass
    assert (meter.joules, meter.source) == (2.5, "counter")


def no_counter(_):
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


@pytest.mark.usefixtures("management")
def test_without_a_counter_the_power_is_integrated(gpu, monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", no_counter)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda handle: 300_000)
    meter, start = EnergyMeter(gpu), time.perf_counter()
    with meter.watching():
        time.sleep(0.1)
    assert 30 <= meter.joules <= 300 * (time.perf_counter() - start)
    assert meter.source == "power"


def test_power_that_changes_is_integrated_between_its_moments():
    log = PowerLog("GPU-1b2c", [(1.0, 100.0), (3.0, 300.0), (3.5, 300.0)])
    assert log.joules == 2 * 200 + 0.5 * 300


@pytest.mark.usefixtures("management")
def test_a_gpu_that_counts_nothing_has_no_energy(gpu, monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", no_counter)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", no_counter)
    meter = EnergyMeter(gpu)
    with meter.watching():
        pass
    assert (meter.joules, meter.source) == (None, None)


@pytest.mark.parametrize(("source", "remark"), [("counter", []), ("power", ["J/image: the GPU's power over time"])])
def test_the_energy_of_a_picture_is_in_the_table(source, remark):
    timings = {"unet": Timing((0.01,))}
    measured = Measured("GPU", Timing((2.0,)), timings, 1, {}, 2**20, 100.0, None, source)
    row = Row("txt2img", Runner("tensorrt", "fp16", None, None, True), 50, 512, 512, 8, measured)
    assert dict(zip(COLUMNS, row.cells(), strict=True))["J/image"] == "12.5"
    assert row.to_json()["energy_per_image_j"] == 12.5
    assert [line.split(",")[0] for line in BenchReport((row,), {}, {}, "", "tiny").remarks()] == remark


# The command


@pytest.fixture
def run(run, folder):
    """`sdtrt bench`, in an empty folder, with the shared engines."""
    return lambda *arguments: run("bench", *arguments)


FAST = ("--steps", "2", "--repeats", "1", "--height", "64", "--width", "64", "--quiet")


@pytest.mark.slow
def test_the_command_prints_a_table_or_json(run):
    code, out, err = run(*FAST, "--task", "txt2img")
    assert (code, err) == (0, "")
    title, head, *rows = out.splitlines()
    assert title.strip() == "tiny: txt2img, 64×64, 2 steps"
    assert head.split()[:3] == ["batch", "what", "median"]
    assert [line.split()[:2] for line in rows] == [["1", "onnxruntime"], ["1", "torch"]]
    code, out, err = run(*FAST, "--json", "--baselines", "none", "--batch-size", "1,2")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert [(row["task"], row["batch"]) for row in report["rows"]] == [
        ("txt2img", 1),
        ("txt2img", 2),
        ("img2img", 1),
        ("img2img", 2),
    ]
    assert report["command"].startswith("sdtrt bench --steps 2")


def test_the_code_of_the_baselines_is_printed_without_a_measurement(run):
    code, out, err = run("--show-baselines", "--baselines", "torch-compile,torch-fp32", "--quiet", "--model", "nowhere")
    assert (code, err) == (0, "")
    assert out.startswith("# torch fp32 (torch.compile of all parts, fused QKV, channels last, one graph)\npipe = ")
    assert "torch.compile(pipe.unet.forward, fullgraph=True, dynamic=False)" in out
    code, out, err = run("--show-baselines", "--baselines", "torch-fp32", "--json")
    loaded = 'pipe = DiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32).to("cpu")\n'
    assert json.loads(out) == {"torch fp32 (TF32 off)": loaded}


def test_a_backend_that_can_not_run_is_exit_1_with_the_table(run):
    code, out, err = run(*FAST, "--task", "txt2img", "--backend", "tensorrt")
    assert code == 1
    assert "failed" in out.splitlines()[2]
    assert err.splitlines()[-2].startswith("error: tensorrt fp16 was not measured")


@pytest.mark.parametrize(
    "arguments", [("--batch-size", "1,x"), ("--baselines", "x"), ("--task", "x"), ("--repeats", "0")]
)
def test_wrong_options_are_exit_2(run, arguments):
    assert run(*arguments)[0] == 2


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("auto", None),
        ("all", BASELINE_NAMES),
        ("none", ()),
        ("torch-graph, torch-fp32,torch-graph", ("torch-graph", "torch-fp32")),
    ],
)
def test_baselines_are_named_or_left_to_the_machine(asked, found):
    assert BenchOptions(baselines=asked).spec(ModelSpec(), BackendOptions(), NoiseSpec()).baselines == found


@pytest.mark.slow
def test_on_a_cpu_the_miniature_is_faster_than_pytorch(engine_dir, monkeypatch):
    """Half as fast again in a quiet minute (benchmarks/); the bound leaves room for a busy machine."""
    spec = BenchSpec(backend="onnxruntime", tasks=("txt2img", "img2img"), steps=10, repeats=9, warmups=2)
    report = run_bench(spec, EngineDirectory(engine_dir), QUIET, "")
    assert all(row.speedup > 1 for row in report.rows if row.runner.asked)


# On a GPU


@pytest.mark.gpu
@pytest.mark.timeout(1200)  # builds the engines
def test_on_a_gpu_all_baselines_are_measured_beside_tensorrt(small, directory):
    backend = next((one.name for one in registry.with_engines_on_gpu() if one.why_not() is None), "torch")
    spec = BenchSpec(ModelSpec(str(small)), backend=backend, tasks=("txt2img",), steps=5, repeats=3)
    report = run_bench(spec, directory, QUIET, "")
    rows = {row.runner.baseline.name: row for row in report.rows if row.runner.baseline is not None}
    for name in ("torch-fp32", "torch-tf32", "torch-fp16", "torch-graph"):
        assert rows[name].measured is not None, rows[name].error
    assert report.rows[0].measured is not None, report.rows[0].error
    assert report.rows[0].measured.memory["gpu_peak_bytes"] > 0
    report.check()


NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch.compile needs Triton")
NEEDS_TORCH_TENSORRT = pytest.mark.skipif(
    importlib.util.find_spec("torch_tensorrt") is None, reason="needs torch-tensorrt"
)
NEEDS_PROVIDER = pytest.mark.skipif(
    not bench_baselines.has_provider(bench_baselines.CUDA_PROVIDER), reason="needs onnxruntime-gpu"
)
ON_A_GPU = (
    "torch-graph",
    pytest.param("torch-compile", marks=NEEDS_TRITON),
    pytest.param("torch-compile-regional", marks=NEEDS_TRITON),
    pytest.param("torch-compile-unet", marks=NEEDS_TRITON),
    pytest.param("torch-tensorrt", marks=NEEDS_TORCH_TENSORRT),
    pytest.param("onnxruntime-cuda", marks=NEEDS_PROVIDER),
)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu_a_baseline_makes_the_picture_of_plain_pytorch(name, small, directory):
    model = resolve_model(ModelSpec(str(small)))
    spec = request.PipelineSpec(model, "torch", "fp16", Sizes(2, 64, 64), steps=5)
    pictures = []
    for baseline in ("torch-fp16", name):
        with bench_baselines.open_baseline(BASELINES[baseline], spec, directory, QUIET) as opened:
            for _ in range(2):
                generator = torch.Generator().manual_seed(3)
                made = opened.pipe("red", num_inference_steps=5, height=64, width=64, generator=generator)
            pictures.append(np.asarray(made.images[0]).astype(int))
    assert np.abs(pictures[0] - pictures[1]).mean() < 4
