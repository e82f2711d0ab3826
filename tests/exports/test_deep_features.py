"""The UNet's two programs against the UNet itself: the same noise, at every depth, with what else goes with them."""

from __future__ import annotations

import factories
import ip_adapters  # noqa: F401
import pytest
import torch
