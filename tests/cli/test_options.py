"""Groups of options: typer sees their fields, commands get the dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from sdtrt.cli.options import ExporterOptions, GenerateOptions, ModelOptions, ProfileOptions, grouped
from sdtrt.specs import GenerateSpec, ModelSpec, Profile, Range, Sizes

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
    spec = GenerateOptions(prompt=["a star"]).spec(ModelSpec(), _backend())
    assert spec == GenerateSpec(("a star",))
    assert ModelOptions().spec() == ModelSpec()
    assert ExporterOptions().spec(ModelSpec(), "fp16").resolved_opset == 17


def _backend():
    from sdtrt.cli.options import BackendOptions

    return BackendOptions()


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
    assert options.profiles(NATIVE) == profiles
