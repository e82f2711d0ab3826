"""What a file says of how its picture was made, as options of the commands. Reads no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How a picture was made, as far as its file tells.

    Args:
        path: of the file.
        options: values of the commands' options, by their names in Python.
        recorded: of a picture of ours, the facts that a new one is compared with.
        model_title: what the file calls its model, where that is no name that finds it.
        model_hash: sha256 of a checkpoint's file, or its beginning.
        last_layer: of the text encoder, counted from the end as web UIs do (`Clip skip`); None where nothing is said.
        absent: the pictures that it was made from and that are not found, in words, by the name of their option.
        left: settings of the file that have no option here, or can't be had, each with the reason.
    """

    path: Path
    options: Mapping[str, Any]
    recorded: Mapping[str, Any] = field(default_factory=dict)
    model_title: str | None = None
    model_hash: str | None = None
    last_layer: int | None = None
    absent: Mapping[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()
