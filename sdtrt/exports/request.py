"""From a request to exports: which components it means, and in which precision each is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.models.components import choose_components, graph_precision, groups_of, precision_of
from sdtrt.models.loading import check_ip_adapters, check_loras
from sdtrt.models.resolve import Model, resolve_model
from sdtrt.models.source import ModelSource
from sdtrt.specs import QUANTISED, Component, ExportRequest, ExportSpec, Group, Precision
from sdtrt.specs.calibration import Calibration
from sdtrt.specs.deep_features import default_depth, shallow_groups, whole_group

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
            console.note(f"{name}: in {own}, as {_why_not(asked)}")
        for groups in _groups(model, request) if name == "unet" else ((),):
            yield replace(request.common, component=name, precision=own, groups=groups)


def _groups(model: Model, request: ExportRequest) -> tuple[tuple[Group, ...], ...]:
    """The optional groups of each of the UNet's programs: of one, or with deep caching of two."""
    groups, caching = request.common.groups or (*groups_of(model), *model.groups), request.caching
    if caching.is_off:
        return (groups,)
    whole = (*groups, whole_group(caching.depth or default_depth(model.config("unet"))))
    return whole, shallow_groups(whole)


def _why_not(asked: Precision) -> str:
    """Why a component is not made in the precision that is asked for."""
    if asked in QUANTISED:
        return f"only what runs at each step gains by {asked}"
    return f"this model's VAE overflows in {asked} (force_upcast)"


def _check_onnx(request: ExportRequest) -> None:
    """Raise `UsageError` where no component that is asked for is written in that precision, or by a calibration."""
    precision, components = request.common.precision, request.components
    if precision not in QUANTISED and request.common.calibration != Calibration():
        raise UsageError(
            f"a graph in {precision} is not calibrated",
            hint="use --precision int8 or fp8, or leave --calibration-prompt out",
        )
    if precision in QUANTISED and components and "unet" not in components:
        raise UsageError(
            f"no ONNX graph of the {components[0]} is written in {precision}",
            hint=f"export it in fp16, which runs beside a UNet in {precision}",
        )


def export_all(request: ExportRequest, directory: EngineDirectory, console: Console = QUIET) -> list[Entry]:
    """Find or make the exports of a request in the engine directory. Raises as `export_component`."""
    from sdtrt.exports.component import export_component

    _check_onnx(request)
    model = resolve_model(request.common.model, console)
    specs = list(export_specs(model, request, console, graph_precision))
    return [export_component(model, spec, directory, console) for spec in specs]


def export_to_file(request: ExportRequest, console: Console = QUIET) -> tuple[Path, ExportSpec]:
    """Write the one component of a request to the request's file. Raises as `export_file`.

    Returns:
        The file, and what was made, which may have another precision than was asked for.
    """
    from sdtrt.exports.to_file import export_file

    _check_onnx(request)
    model = resolve_model(request.common.model, console)
    (spec,) = export_specs(model, request, console, graph_precision)
    return export_file(model, spec, console), spec
