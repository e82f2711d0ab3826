"""What several test modules share: one small random model, and one engine directory, so that engines are built once."""

from __future__ import annotations

import signal

import factories
import pytest
import torch

# Jobs in the background ignore it, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # small models; more threads only wait for each other where the cores are shared


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    """A diffusers folder in Stable Diffusion 1.x format with small random weights; tests must not change it."""
    return factories.sd1_folder(tmp_path_factory.mktemp("models") / "sd1")


@pytest.fixture(scope="session")
def engine_dir(tmp_path_factory):
    """The engine directory that tests share; it gains engines and must lose none."""
    return tmp_path_factory.mktemp("shared") / "engines"
