"""TensorRT on a real GPU: `pytest -m gpu`. The engines are those of `gpu_engines.py`."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_engines
import numpy as np
import pytest
import torch
from factories import in_threads
from gpu_engines import LARGE_VARIABLE, NEEDS_GPU, NEEDS_TENSORRT
from PIL import Image
from pixel_checker import Scene, Shape, judge

from sdtrt.backends.open import open_session
from sdtrt.backends.scratch import Scratch
from sdtrt.backends.tensorrt.session import TensorRTSession
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.backends.tensorrt.versions.header import read_header
from sdtrt.common import host
from sdtrt.common.console import QUIET
from sdtrt.common.errors import EngineError
from sdtrt.common.metrics import relative_l2
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.models import loading
from sdtrt.models.loading import load_unet
from sdtrt.specs import GenerateSpec, Sizes
from sdtrt.specs.contract import Contract

pytestmark = [*NEEDS_GPU, NEEDS_TENSORRT, pytest.mark.timeout(1200)]
CUDA = torch.device("cuda")
ROOT = Path(__file__).resolve().parents[2]
MIN, OPT, MAX, ODD = Sizes(1, 96, 96), Sizes(2, 128, 128), Sizes(4, 192, 192), Sizes(3, 104, 168)
FP16_ERROR = 2e-2  # relative L2 against PyTorch in fp32; PyTorch's own fp16 is at 0.002 and more


@pytest.fixture(scope="session")
def dynamic(directory):
    """The miniature's engine with two profiles: its model and its entry."""
    return gpu_engines.engine("dynamic", directory)


@pytest.fixture(scope="session")
def entry(dynamic):
    return dynamic[1]


@pytest.fixture(scope="session")
def reference(dynamic):
    """The same UNet in PyTorch, fp32 without TF32, on the GPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return Reference(load_unet(dynamic[0], torch.float32).to(CUDA))


class Reference:
    def __init__(self, unet):
        self.unet = unet

    def __call__(self, feeds):
        given = {name: tensor.to(CUDA, torch.float32) for name, tensor in feeds.items()}
        with torch.no_grad():
            return self.unet(given["sample"], given["timestep"], given["encoder_hidden_states"], return_dict=False)[0]


def contract_of(entry):
    return Contract.from_json(entry.info["contract"])


def on_gpu(entry, sizes, seed=0):
    return {name: tensor.to(CUDA) for name, tensor in seeded_feeds(contract_of(entry), sizes, seed).items()}


def error(actual, expected):
    return relative_l2(actual.float().cpu().numpy(), expected.float().cpu().numpy())


def run_python(code, *arguments, **environment):
    """Run code in a process of its own (what crashes there can't take the tests along); returns its JSON."""
    paths = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, f"exit {result.returncode}: {result.stderr[-3000:]}"
    return json.loads(result.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------- the build


def test_the_build_was_checked(entry):
    """Its precision as the inspector read it back, and its parity with the ONNX at both profiles."""
    precision = entry.info["precision"]
    assert precision["read_from"] == "inspector"
    # fp32: the timestep's embedding and the convolutions near the output, most convolutions of so small a model.
    assert set(precision["layers"]) == {"fp16", "fp32"}, precision
    assert entry.info["unchecked"] is None
    assert [figures["relative_l2"] < FP16_ERROR for figures in entry.info["parity"]] == [True, True]
    assert sorted(entry.files) == ["build.log", "engine.plan", "layers.json"]


def test_the_plans_header_is_understood(entry):
    header = read_header(entry.file("engine.plan"))
    assert header.version[:2] == libraries.open_library("tensorrt").version[:2], header
    with entry.file("engine.plan").open("rb") as file:
        print(f"a plan of {entry.files['engine.plan']} bytes begins with {file.read(32).hex(' ')}")


def test_fp32_engine_computes_in_fp32(directory, reference):
    _, entry = gpu_engines.engine("fp32", directory)
    assert set(entry.info["precision"]["layers"]) == {"fp32"}
    with open_session(entry, CUDA) as session:
        feeds = on_gpu(entry, OPT)
        assert error(session.run(feeds)["out_sample"], reference(feeds)) < 1e-3


def test_ctrl_c_stops_a_build_and_leaves_nothing(tmp_path):
    """A real build, interrupted as a terminal does it, while TensorRT is deep in its C++."""
    command = [sys.executable, "-m", "sdtrt", "build", "--model", "tiny", "--backend", "tensorrt", "--batch", "2"]
    command += ["--component", "unet", "--height", "160", "--width", "96", "--engine-dir", str(tmp_path / "engines")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            log = wait_for(lambda: next(tmp_path.glob("engines/.building/*/build.log"), None), 180)
            time.sleep(5)
            assert process.poll() is None, process.stderr.read()[-2000:]
            start = time.monotonic()
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(15) == -signal.SIGINT
        finally:
            process.kill()
    assert time.monotonic() - start < 10
    assert not log.parent.exists()
    assert not [path for path in (tmp_path / "engines").iterdir() if "tensorrt" in path.name]


def wait_for(find, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := find():
            return found
        time.sleep(0.2)
    raise AssertionError(f"did not happen within {seconds} s")


# -------------------------------------------------------------------------------------------------------- the session


@pytest.mark.parametrize("sizes", [MIN, OPT, MAX, ODD], ids=str)
def test_parity_with_pytorch(sizes, entry, reference):
    """On the stream, while captured, and from the CUDA graph."""
    with open_session(entry, CUDA) as session:
        for seed in range(4):
            feeds = on_gpu(entry, sizes, seed)
            outputs = session.run(feeds)["out_sample"]
            assert outputs.shape == feeds["sample"].shape
            assert error(outputs, reference(feeds)) < FP16_ERROR
        assert session.graph_count == 1


def test_graph_equals_stream(entry):
    feeds = on_gpu(entry, OPT)
    with open_session(entry, CUDA) as session:
        stream, captured, *graph = (session.run(feeds)["out_sample"] for _ in range(5))
        assert session.graph_count == 1
    for outputs in (captured, *graph):
        assert error(outputs, stream) < 1e-3


def test_outputs_do_not_alias(entry):
    with open_session(entry, CUDA) as session:
        kept = [session.run(on_gpu(entry, OPT, seed))["out_sample"] for seed in range(5)]
        copies = [tensor.clone() for tensor in kept]
        for seed in range(5, 9):
            session.run(on_gpu(entry, OPT, seed))
        torch.cuda.synchronize()
        assert len({tensor.data_ptr() for tensor in kept}) == 5
        for tensor, copy in zip(kept, copies, strict=True):
            assert torch.equal(tensor, copy)
        assert error(kept[0], kept[4]) > 0.1, "different inputs give different outputs"


def test_more_shapes_than_graphs(entry, reference):
    contract, plan = contract_of(entry), entry.file("engine.plan")
    with TensorRTSession(plan, contract, device=CUDA, graphs=2) as session:
        for seed in range(3):
            for sizes in (MIN, OPT, MAX, ODD):
                feeds = on_gpu(entry, sizes, seed)
                assert error(session.run(feeds)["out_sample"], reference(feeds)) < FP16_ERROR
        assert session.graph_count == 2


@pytest.mark.parametrize("side_stream", [False, True])
def test_the_current_stream_is_respected(side_stream, entry):
    """Inputs that are still being computed when `run` is called, and results that are read with no wait."""
    feeds, others = on_gpu(entry, OPT), on_gpu(entry, OPT, seed=1)
    stream = torch.cuda.Stream() if side_stream else torch.cuda.current_stream()
    with open_session(entry, CUDA) as session, torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        expected = session.run(others)["out_sample"].clone()
        for _ in range(4):
            late = {name: tensor.clone() for name, tensor in feeds.items()}
            torch.cuda._sleep(50_000_000)  # tens of milliseconds: whoever does not wait reads the wrong values
            for name, tensor in late.items():
                tensor.copy_(others[name])
            outputs = session.run(late)["out_sample"] + 0
            stream.synchronize()
            assert error(outputs, expected) < 1e-3


def test_out_of_profile(entry):
    with open_session(entry, CUDA) as session, pytest.raises(EngineError) as caught:
        session.run(on_gpu(entry, Sizes(2, 256, 128)))
    assert "height 96 to 192" in caught.value.message
    assert "got height 256" in caught.value.message
    assert "sdtrt build" in caught.value.hint


def test_text_that_stays_and_text_that_changes(entry, reference):
    """The text is copied once while it is the same tensor, and again when it was written or another one comes."""
    fixed = on_gpu(entry, OPT)["encoder_hidden_states"]
    with open_session(entry, CUDA) as session, torch.no_grad():
        for seed in range(12):
            if seed % 4 == 3:
                fixed.neg_()
            text = fixed if seed % 5 else fixed.flip(1)
            feeds = on_gpu(entry, OPT, seed) | {"encoder_hidden_states": text}
            assert error(session.run(feeds)["out_sample"], reference(feeds)) < FP16_ERROR
        assert session.graph_count == 1


def test_sessions_of_one_scratch_on_two_streams_and_threads(entry):
    """They have one memory for what they compute: without turns, each would spoil the other's."""
    sizes = (MAX, ODD)
    with open_session(entry, CUDA) as session:
        expected = {size: [session.run(on_gpu(entry, size, s))["out_sample"] for s in range(6)] for size in sizes}
    torch.cuda.synchronize()
    errors, scratch = [], Scratch()

    def work(session, size):
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(60):
                outputs = session.run(on_gpu(entry, size, turn % 6))["out_sample"]
                errors.append(error(outputs, expected[size][turn % 6]))

    with open_session(entry, CUDA, scratch) as one, open_session(entry, CUDA, scratch) as other:
        assert one._block.data_ptr() == other._block.data_ptr()
        in_threads(work, zip((one, other), sizes, strict=True))
    assert len(errors) == 120
    assert max(errors) < 1e-3


OPEN = """
import json, pathlib, sys, torch
from sdtrt.specs.contract import Contract
from sdtrt.common.errors import EngineError
from sdtrt.backends.tensorrt.session import TensorRTSession
contract = Contract.from_json(json.loads(pathlib.Path(sys.argv[2]).read_text()))
try:
    options = json.loads(sys.argv[3])
    with TensorRTSession(pathlib.Path(sys.argv[1]), contract, device=torch.device("cuda"), **options) as session:
        print(json.dumps({"message": "", "hint": ""}))
except EngineError as error:
    print(json.dumps({"message": error.message, "hint": error.hint}))
"""


def open_in_process(plan, entry, tmp_path, **options):
    """Open a plan that may crash TensorRT; returns the error's message and hint, empty where there is none."""
    (tmp_path / "contract.json").write_text(json.dumps(entry.info["contract"]))
    return run_python(OPEN, plan, tmp_path / "contract.json", json.dumps(options))


def test_truncated_plan(entry, tmp_path):
    plan = tmp_path / "engine.plan"
    plan.write_bytes(entry.file("engine.plan").read_bytes()[: entry.files["engine.plan"] // 2])
    sidecar = (entry.path / "entry.json").read_text()
    told = open_in_process(plan, entry, tmp_path)  # TensorRT itself has to find out
    print(f"half a plan: {told['message']}")
    assert told["message"]
    assert "sdtrt build --backend tensorrt --force" in told["hint"]
    (tmp_path / "entry.json").write_text(sidecar)
    assert "cut short" in open_in_process(plan, entry, tmp_path)["message"]


def test_plan_of_another_version(entry, tmp_path):
    """The version in the header is another one: refused, with both versions named (8.6 itself does not look)."""
    data = bytearray(entry.file("engine.plan").read_bytes())
    data[24:28] = bytes((10, 3, 0, 26))
    plan = tmp_path / "engine.plan"
    plan.write_bytes(data)
    told = open_in_process(plan, entry, tmp_path)
    assert "TensorRT 10.3.0.26" in told["message"]
    assert "--force" in told["hint"]


def test_loads_in_a_fresh_process(entry):
    code = """
import json, pathlib, sys, torch
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.engines.directory import EngineDirectory
from sdtrt.specs.contract import Contract
from sdtrt.backends.open import open_session
from sdtrt.specs import Sizes
entry = next(e for e in EngineDirectory(pathlib.Path(sys.argv[1])).entries("engine") if e.name == sys.argv[2])
feeds = seeded_feeds(Contract.from_json(entry.info["contract"]), Sizes(2, 128, 128))
with open_session(entry, torch.device("cuda")) as session:
    out = session.run({name: tensor.cuda() for name, tensor in feeds.items()})["out_sample"]
    print(json.dumps(out.float().cpu().flatten().tolist()))
"""
    there = np.array(run_python(code, entry.path.parent, entry.name))
    with open_session(entry, CUDA) as session:
        here = session.run(on_gpu(entry, OPT))["out_sample"].float().cpu().numpy().ravel()
    assert relative_l2(there, here) < 1e-3


def test_two_sessions_in_two_threads(entry):
    """Each with its own context, stream and graphs, at the same time, sharing the engine."""
    sizes = (OPT, ODD)
    with open_session(entry, CUDA) as session:
        expected = {size: [session.run(on_gpu(entry, size, s))["out_sample"] for s in range(6)] for size in sizes}
    torch.cuda.synchronize()
    errors, failures = [], []

    def work(size):
        try:
            with torch.cuda.stream(torch.cuda.Stream()), open_session(entry, CUDA) as session:
                for turn in range(30):
                    feeds = on_gpu(entry, size, turn % 6)
                    outputs = session.run(feeds)["out_sample"]
                    torch.cuda.current_stream().synchronize()
                    errors.append(error(outputs, expected[size][turn % 6]))
        except BaseException as problem:
            failures.append(problem)

    in_threads(work, ((size,) for size in sizes))
    assert not failures
    assert len(errors) == 60
    assert max(errors) < 1e-3


def test_close_gives_the_memory_back(entry):
    with open_session(entry, CUDA) as session:
        session.run(on_gpu(entry, OPT))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        with open_session(entry, CUDA) as session:
            for _ in range(3):
                session.run(on_gpu(entry, MAX))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    assert before - torch.cuda.mem_get_info()[0] < 64 * 2**20


# ------------------------------------------------------------------------------------------------------------- PyCUDA

PYCUDA = """
import json, pathlib, sys
import numpy as np
from sdtrt.engines.directory import EngineDirectory
from sdtrt.specs.contract import Contract
from sdtrt.backends.tensorrt.pycuda import PyCudaSession
entry = next(e for e in EngineDirectory(pathlib.Path(sys.argv[1])).entries("engine") if e.name == sys.argv[2])
feeds = dict(np.load(sys.argv[3]))
with PyCudaSession(entry.file("engine.plan"), Contract.from_json(entry.info["contract"])) as session:
    first = session.run(feeds)["out_sample"]
    second = session.run(feeds)["out_sample"]
assert "torch" not in sys.modules
assert (first == second).all() and first is not second
print(json.dumps(first.astype(float).ravel().tolist()))
"""


@pytest.mark.skipif(host.library_version("pycuda") is None, reason="PyCUDA is not installed")
@pytest.mark.parametrize("sizes", [OPT, ODD], ids=str)
def test_pycuda_equals_torch(sizes, entry, tmp_path):
    """Without torch in the process."""
    feeds = seeded_feeds(contract_of(entry), sizes)
    np.savez(tmp_path / "feeds.npz", **{name: tensor.numpy() for name, tensor in feeds.items()})
    there = np.array(run_python(PYCUDA, entry.path.parent, entry.name, tmp_path / "feeds.npz"))
    with open_session(entry, CUDA) as session:
        here = session.run({name: tensor.to(CUDA) for name, tensor in feeds.items()})["out_sample"]
    assert relative_l2(there, here.float().cpu().numpy().ravel()) < 1e-3


@pytest.mark.skipif(host.library_version("pycuda") is None, reason="PyCUDA is not installed")
def test_pycuda_beside_torch(entry):
    """In one process, in turns: both use the GPU's primary context."""
    from sdtrt.backends.tensorrt.pycuda import PyCudaSession

    feeds = seeded_feeds(contract_of(entry), OPT)
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    with open_session(entry, CUDA) as one, PyCudaSession(entry.file("engine.plan"), contract_of(entry)) as other:
        for _ in range(3):
            here = one.run({name: tensor.to(CUDA) for name, tensor in feeds.items()})["out_sample"]
            assert relative_l2(other.run(arrays)["out_sample"].astype(float), here.float().cpu().numpy()) < 1e-3
    assert float(torch.ones(8, device=CUDA).sum()) == 8


@pytest.mark.skipif(host.library_version("pycuda") is None, reason="PyCUDA is not installed")
def test_the_example_runs(entry):
    command = [sys.executable, str(ROOT / "scripts" / "run_engine_pycuda.py"), str(entry.path.parent), entry.name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"{entry.name}: out_sample float16 [2, 4, 16, 16]" in result.stdout


# ------------------------------------------------------------------------------------------ version-compatible plans


@pytest.fixture(scope="session")
def compatible(directory):
    library = libraries.open_library("tensorrt")
    if library.version < (10,) and not lean_library_is_here(library.version):
        pytest.skip(f"{library.name} embeds libnvinfer_lean in such a plan, and that library is not here")
    return gpu_engines.engine("compatible", directory)[1]


def lean_library_is_here(version):
    try:
        ctypes.CDLL(f"libnvinfer_lean.so.{version[0]}")
    except OSError:
        return False
    return True


def test_compatible_plan_runs_only_where_it_is_allowed_to(compatible, reference, tmp_path):
    """Such a plan brings the code that runs it: from one's own engine directory, and not from just anywhere."""
    with open_session(compatible, CUDA) as session:
        feeds = on_gpu(compatible, OPT)
        for _ in range(3):
            assert error(session.run(feeds)["out_sample"], reference(feeds)) < FP16_ERROR
    assert open_in_process(compatible.file("engine.plan"), compatible, tmp_path)["message"]


LEAN = """
import json, pathlib, sys, torch
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.backends.tensorrt.versions.header import read_header
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.engines.directory import EngineDirectory
from sdtrt.specs.contract import Contract
from sdtrt.backends.tensorrt.session import TensorRTSession
from sdtrt.specs import Sizes
library = libraries.library_of(sys.argv[3], "tensorrt_lean")
entry = next(e for e in EngineDirectory(pathlib.Path(sys.argv[1])).entries("engine") if e.name == sys.argv[2])
contract, plan = Contract.from_json(entry.info["contract"]), entry.file("engine.plan")
feeds = {name: tensor.cuda() for name, tensor in seeded_feeds(contract, Sizes(2, 128, 128)).items()}
options = {"device": torch.device("cuda"), "library": library, "allow_host_code": True}
with TensorRTSession(plan, contract, **options) as session:
    outs = [session.run(feeds)["out_sample"].float().cpu().flatten().tolist() for _ in range(4)]
    graphs = session.graph_count
print(json.dumps({"outs": outs, "library": library.name, "graphs": graphs}))
"""


def lean_module():
    from importlib.util import find_spec

    return next((name for name in ("tensorrt_lean", "tensorrt_lean_bindings") if find_spec(name)), None)


@pytest.mark.skipif(lean_module() is None, reason="no TensorRT lean runtime is installed")
def test_compatible_plan_in_a_newer_lean_runtime(compatible):
    """The session code on a modern TensorRT, with an engine of this version."""
    told = run_python(LEAN, compatible.path.parent, compatible.name, lean_module())
    print(f"ran in {told['library']}, {told['graphs']} graphs")
    with open_session(compatible, CUDA) as session:
        here = session.run(on_gpu(compatible, OPT))["out_sample"].float().cpu().numpy().ravel()
    for out in told["outs"]:
        assert relative_l2(np.array(out), here) < 1e-2


# ---------------------------------------------------------------------------------------------------------- pipelines

SCENES = {
    "a red circle on a blue background": Scene((Shape("circle", "red"),), "blue"),
    "a yellow square on a black background": Scene((Shape("square", "yellow"),), "black"),
    "a green star on a white background": Scene((Shape("star", "green"),), "white"),
    "a purple triangle on a yellow background": Scene((Shape("triangle", "purple"),), "yellow"),
}


@pytest.fixture
def no_torch_unet(monkeypatch):
    """When the engine is there, the PyTorch UNet is neither read nor put on the GPU."""

    def refuse(model, name, dtype, *rest, _load=loading._load_part):
        assert name != "unet", "the UNet's weights were read"
        return _load(model, name, dtype, *rest)

    monkeypatch.setattr(loading, "_load_part", refuse)


def right_share(report):
    """The share of images whose background and colours are what their prompts say."""
    verdicts = [judge(Image.open(image.path), SCENES[image.prompt]) for image in report.images]
    return sum(verdict.background and np.all(verdict.colours) for verdict in verdicts) / len(verdicts)


def test_txt2img_and_img2img(entry, directory, tmp_path, no_torch_unet):
    """The miniature draws what its prompts say, with the engine in place of its UNet."""
    from sdtrt.pipeline.runs.generate import generate

    prompts = tuple(SCENES)
    options = {"backend": "tensorrt", "height": 128, "width": 128, "seed": 1, "allow_build": False}
    options["components"] = ("unet",)  # what `entry` is of
    first = generate(GenerateSpec(prompts, num_images=4, output=tmp_path / "txt", **options), directory, QUIET)
    assert len(first.images) == 16
    assert first.engine["name"] == entry.name
    assert right_share(first) >= 0.85
    start = first.images[0].path
    changed = GenerateSpec(
        prompts[1:], num_images=4, init_image=start, strength=0.9, output=tmp_path / "img", **options
    )
    assert right_share(generate(changed, directory, QUIET)) >= 0.7


@pytest.mark.feature("Text to image", "sd1", "tensorrt86")
@pytest.mark.feature("Image to image", "sd1", "tensorrt86")
def test_the_whole_pipeline_in_engines(entry, directory, tmp_path, monkeypatch):
    """Nothing of the miniature is left to PyTorch, and it draws what its prompts say."""
    from sdtrt.pipeline.runs.generate import generate

    prompts = tuple(SCENES)
    options = {"backend": "tensorrt", "height": 128, "width": 128, "seed": 1}
    init = generate(GenerateSpec(prompts[:1], output=tmp_path / "init", **options), directory, QUIET).images[0].path
    options |= {"num_images": 4, "init_image": init, "strength": 0.9}
    generate(GenerateSpec(prompts[:1], output=tmp_path / "first", **options), directory, QUIET)  # builds the encoder's
    monkeypatch.setattr(loading, "read_tensors", None)  # any part that is read would fail
    report = generate(GenerateSpec(prompts[1:], output=tmp_path / "img", **options), directory, QUIET)
    assert sorted(report.engines) == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert right_share(report) >= 0.7


# -------------------------------------------------------------------------------------------- Stable Diffusion's size


@pytest.mark.skipif(
    not os.environ.get(LARGE_VARIABLE), reason=f"set {LARGE_VARIABLE}=1 for Stable Diffusion 1.x's size (minutes)"
)
def test_large_unet(directory):
    """860 M random parameters, static at 512x512: precision, parity on the stream and from the graph, time a step."""
    model, entry = gpu_engines.engine("large", directory)
    layers = entry.info["precision"]["layers"]
    assert layers["fp16"] > layers["fp32"] > 0, layers
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    reference = Reference(load_unet(model, torch.float32).to(CUDA))
    feeds = on_gpu(entry, Sizes(2, 512, 512))
    expected = reference(feeds)
    del reference
    with open_session(entry, CUDA) as session:
        for _ in range(4):
            assert error(session.run(feeds)["out_sample"], expected) < FP16_ERROR
        assert session.graph_count == 1
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        ends[0].record()
        for _ in range(50):
            session.run(feeds)
        ends[1].record()
        torch.cuda.synchronize()
        print(f"{ends[0].elapsed_time(ends[1]) / 50:.2f} ms a step from the CUDA graph, inputs and outputs copied")
