"""What is left out of the libraries' imports, and comes when it is used; the whole of it in a process of its own."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from sdtrt.cli import lean_imports as lean
from sdtrt.cli.lean_imports import lean_imports, reexports

ROOT = Path(__file__).resolve().parents[2]
# What a picture needs none of. PyTorch's compiler brings SymPy and its distributed training along.
LEFT_OUT = (
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "torch.distributed.fsdp",
    "scipy.stats",
    "scipy.optimize",
    "onnx",
)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from .one import A, B as C", {"A": ("one", "A"), "C": ("one", "B")}),
        (
            "from ...utils import is_torch_available\nif is_torch_available():\n    from .one import A",
            {"A": ("one", "A")},
        ),
        ("if is_flax_available():\n    from .one import A", None),
        ("if is_torch_available():\n    from .one import A\nelse:\n    A = None", None),
        ("from .one import *", None),
        ("from . import one", None),
        ("from .one import A\nregister(A)", None),
        ("import os", None),
    ],
)
def test_a_package_is_lazy_only_where_it_does_nothing_but_give_names(source, names):
    assert reexports(source) == names


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of a module whose import is noted, and of one that takes a function from it."""
    folder = tmp_path / "package_of_test_lean"
    folder.mkdir()
    (folder / "__init__.py").write_text("from .late import double\n")
    (folder / "late.py").write_text("def double(number):\n    return 2 * number\n\nclass Thing:\n    pass\n")
    (folder / "taker.py").write_text("from package_of_test_lean.late import Thing, double\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder.name
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]


def imported(name):
    """Whether a module was executed, and is no stand for one."""
    return "double" in vars(sys.modules.get(name, sys))


def test_a_package_gives_a_name_when_it_is_asked_for(package, monkeypatch):
    monkeypatch.setitem(lean._EXECUTE, package, lean._reexports_lazily)
    with lean_imports():
        module = importlib.import_module(package)
        assert f"{package}.late" not in sys.modules
        with pytest.raises(AttributeError, match="no attribute 'triple'"):
            _ = module.triple
    assert module.double(4) == 8
    assert imported(f"{package}.late")


def test_a_function_is_imported_when_it_is_called(package, monkeypatch):
    monkeypatch.setitem(lean._EXECUTE, package, lean._reexports_lazily)
    monkeypatch.setitem(lean._EXECUTE, f"{package}.taker", lean._with_late_functions)
    monkeypatch.setitem(lean.LATE, f"{package}.taker", (f"{package}.late",))
    with lean_imports():
        taker = importlib.import_module(f"{package}.taker")
        assert not isinstance(4, taker.Thing)
        assert f"{package}.late" not in sys.modules
    assert taker.double(4) == 8
    assert imported(f"{package}.late")
    assert isinstance(sys.modules[f"{package}.late"].Thing(), taker.Thing)
    assert isinstance(taker.Thing(), taker.Thing)
    assert not isinstance(4, taker.Thing)


def test_afterwards_imports_and_decorators_are_as_before():
    before, finders = (torch.compiler.disable, torch.compiler.allow_in_graph), [*sys.meta_path]

    def fail():
        with lean_imports():
            assert torch.compiler.disable(len) is len
            assert torch.compiler.disable(recursive=False)(len) is len
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (torch.compiler.disable, torch.compiler.allow_in_graph) == before
    assert sys.meta_path == finders


SCRIPT = """
import sys
from sdtrt.cli.lean_imports import lean_imports
with lean_imports():
    from sdtrt.pipeline.generate import generate
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTokenizer
there = [name for name in LEFT_OUT if getattr(sys.modules.get(name), "__file__", None)]
assert not there, there
import diffusers, torch
from diffusers.utils.torch_utils import is_compiled_module
from diffusers.models.transformers import SanaTransformer2DModel
betas = diffusers.EulerDiscreteScheduler(use_beta_sigmas=True)
betas.set_timesteps(4)
assert torch.isfinite(betas.sigmas).all()
diffusers.LMSDiscreteScheduler().set_timesteps(4)
from transformers.loss.loss_rt_detr import linear_sum_assignment
assert [one.tolist() for one in linear_sum_assignment([[2, 1], [1, 2]])] == [[0, 1], [1, 0]]
module = torch.nn.Linear(1, 1)
assert not is_compiled_module(module)
assert "torch._dynamo" not in sys.modules
assert is_compiled_module(torch.compile(module))
from transformers.masking_utils import TransformGetItemToIndex
with TransformGetItemToIndex():
    pass
"""


@pytest.mark.slow
def test_what_is_left_out_is_there_when_it_is_used():
    script = SCRIPT.replace("LEFT_OUT", repr(LEFT_OUT))
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_command_makes_the_same_picture(tmp_path, run):
    """This process has imported all of diffusers long ago; and it has one thread, as sums depend on their number."""
    import diffusers.models.transformers.sana_transformer  # noqa: F401

    words = ["txt2img", "--backend", "torch", "--steps", "2", "--seed", "1", "a red circle"]
    code, _, err = run(*words, "--output", str(tmp_path / "here.png"))
    assert code == 0, err
    command = [sys.executable, "-m", "sdtrt", *words, "--output", str(tmp_path / "there.png")]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command, env=variables, check=True, capture_output=True)
    pictures = [Image.open(tmp_path / f"{name}.png") for name in ("here", "there")]
    assert ImageChops.difference(*pictures).getbbox() is None
