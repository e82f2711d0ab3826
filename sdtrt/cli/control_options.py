"""The options of ControlNets and IP-Adapters: those of pictures, and those of what is built or shown beside a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from typer import Option

from sdtrt.specs import (
    PREPROCESSORS,
    AdapterSpec,
    ControlSpec,
    ExportRequest,
    ImagePromptSpec,
    ModelSpec,
    controlnet_names,
)

ControlNet = Annotated[
    str | None, Option("--controlnet", metavar="ID|FOLDER|FILE", help="a ControlNet beside the model, too")
]
IpAdapter = Annotated[
    list[str] | None,
    Option("--ip-adapter", metavar="FILE|FOLDER|ID", help="an IP-Adapter, which takes a picture; again for more"),
]
IpImage = Annotated[
    list[str] | None,
    Option(
        "--ip-image",
        "--ip-embeds",
        metavar="FILE[:SCALE]",
        help="the picture for it, or a face's embedding, and how much it counts; one for each",
    ),
]


@dataclass(frozen=True)
class ControlOptions:
    """These options name ControlNets, and the pictures that they go by."""

    controlnet: Annotated[
        list[str] | None,
        Option("--controlnet", metavar="ID|FOLDER|FILE[:SCALE]", help="a ControlNet, and its scale; again for more"),
    ] = None
    control_image: Annotated[
        list[Path] | None,
        Option("--control-image", metavar="FILE", help="the map that it goes by; one for each, in their order"),
    ] = None
    control_start: Annotated[
        list[float] | None, Option(help="from which part of the steps it counts, 0 to 1; again for each")
    ] = None
    control_end: Annotated[list[float] | None, Option(help="up to which part; again for each")] = None
    control_preprocessor: Annotated[
        list[str] | None,
        Option(help=f"{' or '.join(PREPROCESSORS)}: canny makes a map of edges, none takes any picture"),
    ] = None
    control_mode: Annotated[
        int | None, Option(help="of a union of ControlNets, which of them; of xinsir's 1 is depth, 3 canny")
    ] = None

    def specs(self) -> tuple[ControlSpec, ...]:
        """The ControlNets that are asked for."""
        return ControlSpec.parse_all(
            self.controlnet or (),
            [path.expanduser() for path in self.control_image or ()],
            self.control_start or (),
            self.control_end or (),
            self.control_preprocessor or (),
            self.control_mode,
        )


@dataclass(frozen=True)
class AdapterOptions:
    """These options name T2I-Adapters, and the pictures that they go by."""

    t2i_adapter: Annotated[
        list[str] | None,
        Option("--t2i-adapter", metavar="ID|FOLDER[:SCALE]", help="a T2I-Adapter, and its scale; again for more"),
    ] = None
    t2i_image: Annotated[
        list[Path] | None,
        Option("--t2i-image", metavar="FILE", help="the picture that it goes by; one for each, in their order"),
    ] = None

    def specs(self) -> tuple[AdapterSpec, ...]:
        """The T2I-Adapters that are asked for."""
        return AdapterSpec.parse_all(self.t2i_adapter or (), [path.expanduser() for path in self.t2i_image or ()])


@dataclass(frozen=True)
class ImagePromptOptions:
    """These options name IP-Adapters, and the pictures that they take."""

    ip_adapter: IpAdapter = None
    ip_image: IpImage = None

    def into(self, model: ModelSpec) -> ModelSpec:
        """The model with the adapters."""
        return replace(model, ip_adapters=tuple(self.ip_adapter or ()))

    def specs(self) -> tuple[ImagePromptSpec, ...]:
        """The pictures that are asked for."""
        return tuple(map(ImagePromptSpec.parse, self.ip_image or ()))


@dataclass(frozen=True)
class BesideOptions:
    """These options name what is beside the model that engines are built for."""

    controlnet: Annotated[
        list[str] | None,
        Option(
            "--controlnet",
            metavar="ID|FOLDER|FILE",
            help="a ControlNet that the UNet serves; again for more",
        ),
    ] = None
    ip_adapter: Annotated[
        list[str] | None,
        Option("--ip-adapter", metavar="FILE|FOLDER|ID", help="an IP-Adapter that the UNet serves; again for more"),
    ] = None
    t2i_adapter: Annotated[
        str | None,
        Option("--t2i-adapter", metavar="ID|FOLDER", help="a T2I-Adapter that the UNet serves, with all others"),
    ] = None

    def into(self, model: ModelSpec) -> ModelSpec:
        """The model with the adapters; ControlNets come one by one (`beside`)."""
        return replace(model, ip_adapters=tuple(self.ip_adapter or ()), t2i_adapter=self.t2i_adapter)

    def beside(self, exports: ExportRequest) -> list[ExportRequest]:
        """What is to be exported with each ControlNet: all for the first, for the next ones what is theirs alone."""
        names = controlnet_names(self.controlnet or ())
        wanted = not exports.components or "controlnet" in exports.components
        first, *others = [_with(exports, name) for name in names] or [exports]
        return [first, *(replace(one, components=("controlnet",)) for one in others if wanted)]


def _with(exports: ExportRequest, name: str) -> ExportRequest:
    model = replace(exports.common.model, controlnet=name)
    return replace(exports, common=replace(exports.common, model=model))
