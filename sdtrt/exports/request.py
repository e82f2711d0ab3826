"""From a request to exports: which components it means, and in which precision each is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from sdtrt.common.console import QUIET, Console
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.models.components import choose_components, groups_of, precision_of
from sdtrt.models.loading import check_ip_adapters, check_loras
from sdtrt.models.resolve import Model, resolve_model
from sdtrt.models.source import ModelSource
from sdtrt.specs import Component, ExportRequest, ExportSpec, Precision

Fitting = Callable[[ModelSource, Component, Precision], Precision]


def export_specs(
    model: Model, request: ExportRequest, console: Console = QUIET, fitting: Fitting = precision_of
) -> Iterator[ExportSpec]:
    """The exports that a request means, of a model that has been found. Says what differs from what was asked for.

    Args:
        fitting: what gives a component's precision, of the one that is asked for.

    Raises:
        UsageError: for a component that the model has not.
    """
    if model.missing and not request.components:
        console.note(f"{model.name} has no {' and no '.join(model.missing)}: nothing is made of that")
    check_loras(model)
    check_ip_adapters(model)
    asked = request.common.precision
    for name in choose_components(model, request.components):
        own = fitting(model, name, asked)
        if own != asked:
            console.note(f"{name}: in {own}, as this model's VAE overflows in {asked} (force_upcast)")
        groups = (request.common.groups or (*groups_of(model), *model.groups)) if name == "unet" else ()
        yield replace(request.common, component=name, precision=own, groups=groups)


def export_all(request: ExportRequest, directory: EngineDirectory, console: Console = QUIET) -> list[Entry]:
    """Find or make the exports of a request in the engine directory. Raises as `export_component`."""
    from sdtrt.exports.component import export_component

    model = resolve_model(request.common.model, console)
    specs = list(export_specs(model, request, console))
    return [export_component(model, spec, directory, console) for spec in specs]


def export_to_file(request: ExportRequest, console: Console = QUIET) -> tuple[Path, ExportSpec]:
    """Write the one component of a request to the request's file. Raises as `export_file`.

    Returns:
        The file, and what was made, which may have another precision than was asked for.
    """
    from sdtrt.exports.to_file import export_file

    model = resolve_model(request.common.model, console)
    (spec,) = export_specs(model, request, console)
    return export_file(model, spec, console), spec
