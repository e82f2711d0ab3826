"""`--from FILE`: what a picture's file says stands in for the options that nobody typed.

How files are read is not known here (`pipeline.recipes.reading`, which is loaded when a file is named).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from sdtrt.common.errors import UsageError, quote
from sdtrt.specs import Recipe

# Options that mean something beside others only: where one of those is typed, the file's value does not stand.
_OF = {
    "prompt": ("text",),
    "precision": ("backend",),
    "num_images": ("prompt", "text", "seed"),
    **dict.fromkeys(("revision", "variant", "config"), ("model",)),
    "refiner_start": ("refiner",),
    **dict.fromkeys(("upscaler", "upscale_steps", "upscale_strength"), ("upscale",)),
    **dict.fromkeys(("timestep_spacing", "sigmas", "eta"), ("scheduler",)),
    **dict.fromkeys([f"control_{one}" for one in ("image", "start", "end", "preprocessor", "mode")], ("controlnet",)),
    "ip_image": ("ip_adapter",),
    **dict.fromkeys(("cache_depth", "cache_schedule"), ("cache_interval", "quality")),
    **dict.fromkeys(("guidance_interval", "cache_interval"), ("quality",)),
    "t2i_image": ("t2i_adapter",),
}


class _Taken(dict[str, Any]):
    """A file's values: click asks for those of the options that were not typed, once it has read all that were."""

    def __init__(self, context: typer.Context, recipe: Recipe) -> None:
        super().__init__(recipe.options)
        self._context, self._recipe = context, recipe

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or None where the file says nothing that holds here."""
        if any(_is_typed(self._context, one) for one in _OF.get(name, ())):
            return default
        if name == "model" and name not in self and self._recipe.model_title is not None:
            path, title = self._recipe.path, self._recipe.model_title
            raise UsageError(
                f"{path} was made with the model {title}, which is neither here nor beside it",
                hint=f"name it: --model FOLDER/{quote(title)}.safetensors, or another --model",
            )
        if name in self._recipe.absent and name not in self:
            raise UsageError(
                f"{self._recipe.path} was made from {self._recipe.absent[name]}",
                hint=f"name it: --{name.replace('_', '-')} FILE",
            )
        return super().get(name, default)


def _is_typed(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _read(text: str) -> Recipe:
    """The recipe in a file."""
    from sdtrt.pipeline.recipes.reading import read_recipe

    return read_recipe(Path(text).expanduser())


def _take(context: typer.Context, recipe: Recipe | None) -> Recipe | None:
    """Let a recipe's values be the options' defaults; what the command has no option for, is said with the rest."""
    if recipe is None:
        return None
    from dataclasses import replace

    known = {one.name for one in context.command.params}
    foreign = sorted(set(recipe.options) - known)
    taken = {name: value for name, value in recipe.options.items() if name in known}
    left = tuple(f"{name}: {recipe.options[name]} (sdtrt {context.info_name} has no such option)" for name in foreign)
    recipe = replace(recipe, options=taken, left=(*recipe.left, *left))
    context.default_map = _Taken(context, recipe)
    return recipe


FromFile = Annotated[
    Recipe | None,
    Option(
        "--from",
        metavar="FILE",
        help="make a picture anew: settings of its PNG, JPEG, WebP or JSON, or of a web UI's; options given here win",
        parser=_read,
        callback=_take,
        is_eager=True,
        show_default=False,
    ),
]
