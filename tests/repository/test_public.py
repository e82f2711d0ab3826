"""The public names: loaded when they are asked for, none of them a folder, each example run."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import sdtrt
from sdtrt.common import errors
from sdtrt.pipeline import front
from sdtrt.pipeline.opening import opened
from sdtrt.specs import GenerateSpec

PACKAGE = Path(sdtrt.__file__).parent
FUNCTIONS = ("accelerate", "build", "export", "generate", "load", "open_session", "preview", "restore", "status")


@pytest.mark.parametrize("name", sdtrt.__all__)
def test_every_public_name_is_there_and_explained(name):
    assert inspect.getdoc(getattr(sdtrt, name))
    assert name in dir(sdtrt)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'speed'"):
        sdtrt.speed  # noqa: B018


def test_no_public_name_but_specs_is_a_file_or_folder():
    there = {path.stem for path in PACKAGE.iterdir()}
    assert there & set(sdtrt.__all__) == {"specs"}


def test_all_errors_are_public():
    own = {name for name, one in vars(errors).items() if inspect.isclass(one) and issubclass(one, errors.SdtrtError)}
    assert own <= set(sdtrt.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_tell_their_arguments_errors_and_an_example(name):
    function = getattr(sdtrt, name)
    text = inspect.getdoc(function)
    assert "Args:" in text
    assert "Example:" in text
    annotations = inspect.signature(function).parameters.values()
    assert all(one.annotation is not one.empty for one in annotations)


def test_importing_loads_no_torch():
    code = "import sys, sdtrt; sdtrt.SdtrtError; print(sorted({'torch', 'diffusers'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("function", [front.export, front.build, front.open_session, front.generate, opened.load])
def test_the_examples_run(function, folder):
    found = doctest.DocTestFinder().find(function, function.__name__, globs={})
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert [runner.run(one) for one in found]
    assert runner.summarize(verbose=False).failed == 0


def test_generate_takes_the_fields_of_its_spec():
    fields = {field.name: field.type for field in dataclasses.fields(GenerateSpec) if field.name != "prompts"}
    own = {name: one.__forward_arg__ for name, one in front.GenerateOptions.__annotations__.items()}
    assert own == fields | {"model": "str | ModelSpec"}


def test_generate_refuses_what_it_does_not_know():
    with pytest.raises(sdtrt.UsageError, match="generate has no step") as caught:
        sdtrt.generate("a red circle", step=2)
    assert "steps" in caught.value.hint
    with pytest.raises(sdtrt.UsageError, match="steps beside a GenerateSpec"):
        sdtrt.generate(GenerateSpec(("a red circle",)), steps=2)
