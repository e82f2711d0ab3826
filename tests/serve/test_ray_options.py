"""What `sdtrt serve --ray` is asked for, and what it refuses; no Ray is started."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdtrt.cli import serve_command
from sdtrt.cli.serve_command import RayOptions
from sdtrt.common.errors import UsageError
from sdtrt.specs.replicas import RaySpec
from sdtrt.specs.serve import ServeSpec

CONFIG = Path(__file__).parents[2] / "scripts" / "ray_serve.yaml"


@pytest.mark.parametrize(
    ("options", "gpus", "message"),
    [
        ({"ray": True}, "0,1", "--gpus is of a server without --ray"),
        ({"replicas": "2"}, None, "--replicas is of a server with --ray"),
        ({"ray_address": "auto"}, None, "--ray-address is of a server with --ray"),
        ({"ray": True, "replicas": "two"}, None, "--replicas takes one number or two, got 'two'"),
        ({"ray": True, "replicas": "1-2-3"}, None, "--replicas takes one number or two, got '1-2-3'"),
        ({"ray": True, "replicas": "4-1"}, None, "there are no replicas from 4 to 1"),
        ({"ray": True, "replicas": "0"}, None, "there are no replicas from 0 to 0"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options, gpus, message):
    with pytest.raises(UsageError, match=message) as caught:
        RayOptions(**options).spec(gpus)
    assert caught.value.hint


def test_replicas_are_a_number_or_two():
    assert RayOptions(ray=True, replicas="2").spec(None) == RaySpec(None, 2, 2)
    assert RayOptions(ray=True, replicas="1-4", ray_address="auto").spec(None) == RaySpec("auto", 1, 4)
    assert RayOptions(ray=True).spec(None) == RaySpec()
    assert RayOptions().spec("0,1") is None


def test_replicas_get_neither_the_key_nor_the_cluster():
    spec = ServeSpec(api_key="x" * 32, ray=RaySpec("auto", 1, 4))
    assert "x" * 32 not in str(spec.to_json())
    assert ServeSpec.from_json(spec.to_json()).ray is None


def test_without_ray_the_error_has_the_command_that_installs_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    with pytest.raises(UsageError, match="sdtrt serve --ray needs ray, which is not installed") as caught:
        serve_command.check_packages(ray=True)
    assert caught.value.hint.startswith('pip install "sdtrt[serve,ray]"')
    serve_command.check_packages()


@pytest.mark.slow
def test_a_folder_whose_name_leaves_rays_sockets_no_room_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from sdtrt.cli.main import app

    (long := tmp_path / ("x" * 40)).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    ended = CliRunner().invoke(app, ["serve", "--ray", "--port", "0", "--engine-dir", str(tmp_path / "engines")])
    assert isinstance(ended.exception, UsageError)
    assert ended.exception.hint == "use a shorter one: TMPDIR=/tmp"
    assert list(long.iterdir()) == []


@pytest.mark.slow
def test_the_configuration_of_a_cluster_is_what_the_application_reads(monkeypatch):
    pytest.importorskip("ray")
    import yaml

    from sdtrt.serve.ray_app import KEY_VARIABLE, Arguments, FrontDoor, application

    (configured,) = yaml.safe_load(CONFIG.read_text())["applications"]
    module, _, name = configured["import_path"].partition(":")
    assert (module, name) == (application.__module__, application.__name__)
    spec = Arguments(**configured["args"]).spec()
    assert (spec.warm, spec.ray) == (((512, 512),), RaySpec("auto", 1, 8))
    application(configured["args"])
    for wrong in ({"modell": ["x"]}, {"replicas": 0}, {"engine_dir": "engines"}, {"precision": "fp7"}):
        with pytest.raises((UsageError, ValueError)):
            application({**configured["args"], **wrong})
    for key, host in ((None, "127.0.0.1"), ("k" * 32, "0.0.0.0")):
        monkeypatch.setenv(KEY_VARIABLE, key) if key else monkeypatch.delenv(KEY_VARIABLE, raising=False)
        spec_of_front = asyncio.run(_front(FrontDoor, spec))
        assert (spec_of_front.api_key, spec_of_front.host) == (key, host)


async def _front(door, spec):
    return door(spec.to_json(), (), 1, None)._dispatcher.spec
