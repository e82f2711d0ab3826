"""The engine directory that all GPU tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gpu_engines import DIRECTORY_VARIABLE

from sdtrt.engines.directory import EngineDirectory


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    named = os.environ.get(DIRECTORY_VARIABLE)
    return EngineDirectory(Path(named) if named else tmp_path_factory.mktemp("gpu") / "engines")
