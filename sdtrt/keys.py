"""What identifies an export. Apart from `export`: who looks for an engine needs neither ONNX nor an exporter."""

from __future__ import annotations

from typing import Any

from sdtrt.cache import EngineDirectory
from sdtrt.models import Model
from sdtrt.parts import part_of
from sdtrt.specs import ExportSpec

FORMAT = 5  # of exports: raise it when `export` writes something else for the same request


def export_key(model: Model, spec: ExportSpec, directory: EngineDirectory) -> dict[str, Any]:
    """What an export is identified by: the component's configuration and weights, and how it is written.

    The versions of PyTorch and diffusers are not in it: an export is checked against them when it is made, and computes
    the same ever after. They are in the entry's `info`.
    """
    return {
        "component": spec.component,
        "precision": spec.precision,
        "exporter": spec.exporter,
        "opset": spec.resolved_opset,
        "format": FORMAT,
        "fingerprint": model.fingerprint(part_of(spec.component), directory.file_digest),
    }
