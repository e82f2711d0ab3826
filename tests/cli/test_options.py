"""Groups of options: typer sees their fields, commands get the dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from sdtrt.cli.build_options import ExporterOptions, ProfileOptions
from sdtrt.cli.groups import grouped
from sdtrt.cli.image_options import GenerateOptions
from sdtrt.cli.options import BackendOptions, ModelOptions
from sdtrt.common.errors import UsageError
from sdtrt.specs import ExportSpec, GenerateSpec, ModelSpec, Profile, Range, Sizes

NATIVE = Sizes(2, 512, 512)


@dataclass(frozen=True)
class Pair:
    one: Annotated[int, typer.Option(help="the one")] = 1
    other: Annotated[str, typer.Option("--other", "-o")] = "x"


def test_a_group_becomes_options_and_comes_back_whole():
    app, got = typer.Typer(), []

    @app.command()
    @grouped
    def command(name: str, pair: Pair, flag: bool = False) -> None:
        """Says something."""
        got.append((name, pair, flag))

    runner = CliRunner()
    assert runner.invoke(app, ["me", "--one", "5", "-o", "y", "--flag"]).exit_code == 0
    assert runner.invoke(app, ["me"]).exit_code == 0
    assert got == [("me", Pair(5, "y"), True), ("me", Pair(), False)]
    assert "the one" in runner.invoke(app, ["--help"]).output


def test_options_default_to_the_specs_own_defaults():
    spec = GenerateOptions(prompt=["a star"]).spec(ModelSpec(), BackendOptions())
    assert spec == GenerateSpec(("a star",))
    assert ModelOptions().spec() == ModelSpec()
    assert ExporterOptions().request(ModelSpec(), "fp16").common == ExportSpec()
    assert ExportSpec().resolved_opset == 17


@pytest.mark.parametrize(
    ("options", "profiles"),
    [
        (ProfileOptions(), (Profile.of(NATIVE),)),
        (ProfileOptions(batch="1:2:4", height="768"), (Profile(Range(1, 2, 4), Range.of(768), Range.of(512)),)),
        (
            ProfileOptions(profile=["height=512", "height=768,batch=4"]),
            (Profile.of(NATIVE), Profile(Range.of(4), Range.of(768), Range.of(512))),
        ),
    ],
)
def test_profiles_start_from_the_models_own_size(options, profiles):
    assert options.request().profiles(NATIVE) == profiles


def test_a_prompt_may_stand_without_its_option():
    def prompts(**given):
        return GenerateOptions(**given).spec(ModelSpec(), BackendOptions()).prompts

    assert prompts(text="a star") == prompts(prompt=["a star"]) == ("a star",)
    assert prompts(text="a star", prompt=["a circle", "a square"]) == ("a star", "a circle", "a square")
    assert prompts(text="") == ("",)  # a prompt, if an empty one
    with pytest.raises(UsageError, match="no prompt was given"):
        prompts()


def test_sizes_that_were_given_are_named_as_options():
    assert ProfileOptions().request().given() == ""
    assert ProfileOptions(batch="2", height="512", profile=["width=64"]).request().given() == "--height, --profile"


@pytest.mark.parametrize("options", [{"height": "512:"}, {"tokens": "x"}, {"profile": ["hight=512"]}, {"width": "500"}])
def test_sizes_that_no_engine_has_are_refused_before_the_model_is_read(options):
    with pytest.raises(UsageError):
        ProfileOptions(**options).request()
