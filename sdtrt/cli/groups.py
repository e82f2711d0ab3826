"""Groups of options: a command takes dataclasses, and typer sees their fields. Knows no option."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from sdtrt.common.errors import UsageError

CommandT = TypeVar("CommandT", bound=Callable[..., None])


def grouped(command: CommandT) -> CommandT:
    """Let a command take dataclasses of options: typer sees their fields, the command gets the dataclasses."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        own = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        parameters += _field_parameters(groups[name]) if name in groups else [own]

    @wraps(command)
    def flat(**values: Any) -> None:
        values = {name: _in_home(name, value) if isinstance(value, Path) else value for name, value in values.items()}
        taken = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **taken)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return cast(CommandT, flat)


def _in_home(name: str, path: Path) -> Path:
    """A path that was typed. Shells leave the `~` of `--output=~/x` to us: it is a home directory, not a folder."""
    if name == "engine_dir":  # the directory's own error names all the ways to say it
        return path
    try:
        return path.expanduser()
    except RuntimeError as error:  # containers run users that the system doesn't know
        raise UsageError(
            f"--{name.replace('_', '-')} is {path}, and no home directory is known for {path.parts[0]}",
            hint=f"give the whole path, or ./{path} for a folder of that name",
        ) from error


def _field_parameters(group: Any) -> list[inspect.Parameter]:
    """One keyword parameter for each field of a group."""
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]
