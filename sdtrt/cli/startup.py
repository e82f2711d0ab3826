"""A quick start: nine tenths of it are the imports of torch, transformers and diffusers."""

from __future__ import annotations
