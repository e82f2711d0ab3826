"""Which backend `auto` takes where engines are there. No engine here is run: entries say how fast they are."""

from __future__ import annotations

import pytest
import torch

from sdtrt.backends import build, registry
from sdtrt.backends.build import engine_key
from sdtrt.common import host
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import EngineError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models.components import components_of, profile_of
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening.fastest import resolve_fastest
from sdtrt.specs import BuildSpec, ExportSpec, GenerateSpec, ModelSpec, Profile, Sizes

pytestmark = pytest.mark.usefixtures("on_the_cpu")
SIZES = Sizes(2, 128, 128)
AT = str(SIZES)


@pytest.fixture(scope="module")
def model(sd1):
    return resolve_model(ModelSpec(str(sd1)))


@pytest.fixture(autouse=True)
def both_run_here(monkeypatch):
    monkeypatch.setattr(type(registry.get("inductor")), "why_not", lambda self: None)


def publish(directory, model, backend, component="unet", precision="fp32", **info):
    """An engine that fits, and says how fast it is."""
    whole = registry.get(backend).takes_any_size
    profiles = () if whole else (profile_of(component, Profile.of(SIZES)),)
    spec = BuildSpec(ExportSpec(model.spec, component, precision), backend, profiles)
    return directory.obtain("engine", engine_key(model, spec, directory).to_json(), lambda folder: info)


def chosen(model, directory, capsys, **options):
    """The backend that a request is resolved to, and what is said of it last."""
    given = {"components": ("unet",), "height": 128, "width": 128, **options}
    spec = GenerateSpec(prompts=("red",), model=model.spec, backend="auto", **given)
    found = resolve_fastest(spec, model, directory, Console())
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("backend: ")]
    assert len(said) == 1
    return found.backend, said[-1]


def test_where_no_engines_are_there_it_is_as_it_was(model, directory, capsys):
    assert chosen(model, directory, capsys)[0] == "onnxruntime"
    publish(directory, model, "onnxruntime", step_ms=9.0, step_sizes=AT)
    name, said = chosen(model, directory, capsys)
    assert (name, said.count("ms")) == ("onnxruntime", 0)


@pytest.mark.parametrize(("ms", "wanted"), [(5.0, "inductor"), (20.0, "onnxruntime")])
def test_the_faster_of_two_is_taken_which_says_why(model, directory, capsys, ms, wanted):
    publish(directory, model, "onnxruntime", step_ms=9.0, step_sizes=AT)
    publish(directory, model, "inductor", step_ms=ms)  # at the optimum of its profile, unless it says another
    name, said = chosen(model, directory, capsys)
    assert name == wanted
    assert f"{ms:.2f} ms" in said
    assert "9.00 ms" in said


@pytest.mark.parametrize("info", [{}, {"step_ms": 99.0, "step_sizes": "another"}])
def test_steps_that_can_not_be_compared_change_nothing(model, directory, capsys, info):
    publish(directory, model, "onnxruntime", **info)
    publish(directory, model, "inductor", step_ms=1.0)
    name, said = chosen(model, directory, capsys)
    assert name == "onnxruntime"
    assert "not measured at one size" in said


def test_engines_that_are_there_are_taken_where_the_usual_backend_has_none(model, directory, capsys):
    publish(directory, model, "inductor", step_ms=1.0)
    name, said = chosen(model, directory, capsys)
    assert (name, said) == ("inductor", "backend: inductor (its engines are there)")
    assert chosen(model, directory, capsys, width=64)[0] == "onnxruntime", "of another size"
    assert chosen(model, directory, capsys, components=("unet", "text_encoder"))[0] == "onnxruntime", "of a part"


def test_on_a_gpu_engines_that_are_there_go_before_those_that_should_be_faster(model, directory, capsys, monkeypatch):
    """And where none are, the backend that should be is taken, with one word on why."""
    monkeypatch.setattr(host, "gpus", lambda: (host.Gpu("Some RTX", (8, 9), 2**34),))
    monkeypatch.setattr(host, "torch_sees_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tensorrt = type(registry.get("tensorrt"))
    for name, value in {"version": "8.6.1", "why_not": None, "options_key": {}}.items():
        monkeypatch.setattr(tensorrt, name, lambda self, *_, value=value: value)
    name, said = chosen(model, directory, capsys)
    assert name == "inductor"
    assert said.startswith("backend: inductor (Some RTX, PyTorch Inductor ")
    assert "faster than TensorRT 8.6" in said
    publish(directory, model, "tensorrt", precision="fp16")
    assert chosen(model, directory, capsys) == ("tensorrt", "backend: tensorrt (its engines are there)")


def test_all_components_have_to_be_there_and_the_unet_decides(model, directory, capsys):
    for backend, unet_ms, other_ms in (("onnxruntime", 9.0, 1.0), ("inductor", 5.0, 50.0)):
        for component in components_of(model):
            publish(directory, model, backend, component, step_ms=unet_ms if component == "unet" else other_ms)
    assert chosen(model, directory, capsys, components=())[0] == "onnxruntime", "which does not say at which size"
    other = EngineDirectory(directory.path.with_name("other"))
    for backend, unet_ms in (("onnxruntime", 9.0), ("inductor", 5.0)):
        for component in components_of(model):
            ms = unet_ms if component == "unet" else 1.0
            publish(other, model, backend, component, step_ms=ms, step_sizes=AT)
    assert chosen(model, other, capsys, components=())[0] == "inductor"


def test_a_named_backend_is_taken_as_it_is(model, directory):
    publish(directory, model, "inductor", step_ms=1.0)
    spec = GenerateSpec(prompts=("red",), model=model.spec, backend="torch", height=128, width=128)
    assert resolve_fastest(spec, model, directory, QUIET).backend == "torch"


# ------------------------------------------------------------------------------------------------ build --backend all


def test_building_for_all_shows_a_table_on_stderr(run, model, directory, monkeypatch):
    """The result on stdout is the entries' paths, as ever."""
    built = []

    def publish_one(model, spec, folder, console):
        seconds, ms = (7.0, 3.25) if spec.backend == "inductor" else (2.0, 12.5)
        made = publish(folder, model, spec.backend, spec.export.component, step_ms=ms, seconds=seconds, step_sizes=AT)
        built.append(made)
        return made

    monkeypatch.setattr(build, "build_engine", publish_one)
    running = [registry.get(name) for name in ("inductor", "onnxruntime", "torch")]
    monkeypatch.setattr(registry, "running_here", lambda: iter(running))
    words = ["build", "--model", model.spec.name, "--backend", "all", "--component", "unet", "--height", "128"]
    code, out, err = run(*words, "--width", "128", "--engine-dir", str(directory.path))
    assert code == 0, err
    assert sorted(out.split()) == sorted(str(entry.path) for entry in built)
    assert {entry.key["backend"] for entry in built} == {"inductor", "onnxruntime"}
    rows = [line.split() for line in err.splitlines() if line.startswith("unet ")]
    assert [row[1:3] for row in rows] == [["inductor", "3.25"], ["onnxruntime", "12.50"]]
    assert [row[-1] for row in rows] == ["7", "2"]
    code, out, err = run(*words, "--precision", "bf16", "--width", "128", "--engine-dir", str(directory.path))
    assert "not for onnxruntime: ONNX Runtime's CPU provider does not compute in bf16" in err


def test_where_nothing_builds_it_says_so(model, directory, monkeypatch):
    from sdtrt.specs import BuildRequest

    monkeypatch.setattr(registry, "running_here", lambda: iter([registry.get("torch")]))
    request = BuildRequest(BuildSpec(ExportSpec(model.spec), "all"))
    with pytest.raises(EngineError, match="no backend here builds"):
        build.build_each(request, directory, QUIET)
