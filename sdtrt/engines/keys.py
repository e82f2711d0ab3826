"""What identifies an export and an engine, and whether a model's files are still those that a key was made from.

Apart from `exports`: who looks for an engine needs neither ONNX nor an exporter. Entries are not known here.

Between a look at a model's weights and their use others may replace them. So whatever is given a key, or named by a
fingerprint, is read inside `Sight.steady`, which begins before the fingerprint is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from sdtrt.common.console import Console
from sdtrt.common.errors import MALFORMED, ModelChangedError, SdtrtError
from sdtrt.engines.digests import Identity, identity
from sdtrt.models.architecture import architecture_fingerprint
from sdtrt.models.components import contract_of, part_of
from sdtrt.models.live import LiveModel
from sdtrt.models.resolve import Model
from sdtrt.models.source import ModelSource
from sdtrt.specs import COMPONENTS, PRECISIONS, QUANTISED, Component, ExportSpec, Group, Precision, Profile
from sdtrt.specs.calibration import Calibration

FORMAT = 5  # of exports: raise it when `export` writes something else for the same request
MOST = 2**62  # of a number in a key: more is nobody's size
TRIES = 3  # of work whose files change meanwhile

T = TypeVar("T")


@dataclass(frozen=True)
class ExportKey:
    """What an export is identified by: the component's configuration and weights, and how it is written.

    Args:
        format: of exports; another number is another sdtrt's.
        fingerprint: of the configuration and weights (`Model.fingerprint`).
        groups: optional ones of a UNet's inputs; a key without any does not mention them.
        calibration: of a graph in 8 bits; None for others, whose keys do not mention it.
    """

    component: Component
    precision: Precision
    exporter: str
    opset: int
    format: int
    fingerprint: str
    groups: tuple[Group, ...] = ()
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        _check_what(self.component, self.precision)
        _check_types((self.exporter, self.fingerprint, *self.groups), (self.opset, self.format))
        if self.calibration is not None:
            _check_types((*self.calibration.prompts, *self.calibration.kept), (self.calibration.steps,))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExportKey:
        """Read a key's plain data. Raises one of `MALFORMED` for what no export of this format has."""
        calibration = Calibration.from_json(data["calibration"]) if "calibration" in data else None
        return cls(**{**data, "groups": tuple(data.get("groups", ())), "calibration": calibration})

    def to_json(self) -> dict[str, Any]:
        """Plain data, as they are written on the disk."""
        data = asdict(self)
        groups, calibration = data.pop("groups"), data.pop("calibration")
        data |= {"groups": list(groups)} if groups else {}
        return data | ({"calibration": self.calibration.to_json()} if calibration and self.calibration else {})

    def has_weights_of(self, other: ExportKey) -> bool:
        """Whether both are of the same weights, in 16 bits and in 8.

        Exporter and opset may differ, and the pictures that 8 bits are scaled by: a user's choices at build time.
        """
        calibration = self.calibration
        if calibration is not None and other.calibration is not None:
            calibration = replace(other.calibration, kept=calibration.kept)
        return replace(self, exporter=other.exporter, opset=other.opset, calibration=calibration) == other


@dataclass(frozen=True)
class EngineKey:
    """What an engine is identified by: all that its bytes depend on.

    Args:
        format: of the backend's engines; another number is another sdtrt's.
        host: what the engine is bound to; only its backend knows what that is.
        profiles: the sizes that it takes; none for all sizes.
        options: how it was built; only its backend knows what that is.
        export: of the export that it was built from, which stands for the weights.
    """

    format: int
    component: Component
    precision: Precision
    backend: str
    backend_version: str
    host: Mapping[str, Any]
    profiles: tuple[Profile, ...]
    options: Mapping[str, Any]
    export: ExportKey

    def __post_init__(self) -> None:
        _check_what(self.component, self.precision)
        bounds = [value for profile in self.profiles for one in vars(profile).values() for value in vars(one).values()]
        _check_types((self.backend, self.backend_version), (self.format, *bounds))
        if not (isinstance(self.host, Mapping) and isinstance(self.options, Mapping)):
            raise TypeError("host and options must be objects")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineKey:
        """Read a key's plain data. Raises `SdtrtError` or one of `MALFORMED` for what no engine has."""
        return cls(
            format=data["format"],
            component=data["component"],
            precision=data["precision"],
            backend=data["backend"],
            backend_version=data["backend_version"],
            host=data["host"],
            profiles=tuple(Profile.from_json(profile) for profile in data["profiles"]),
            options=data["options"],
            export=ExportKey.from_json(data["export"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, as they are written on the disk."""
        return {
            "format": self.format,
            "component": self.component,
            "precision": self.precision,
            "backend": self.backend,
            "backend_version": self.backend_version,
            "host": self.host,
            "profiles": [asdict(profile) for profile in self.profiles],
            "options": self.options,
            "export": self.export.to_json(),
        }

    @property
    def is_version_compatible(self) -> bool:
        """Whether later versions of its backend may run it, too."""
        return bool(self.options.get("version_compatible"))


def parse_key(kind: str, key: Mapping[str, Any]) -> EngineKey | ExportKey | None:
    """The key of an entry of a kind, parsed; None for one that this version of sdtrt does not write."""
    try:
        if kind == "engine":
            return EngineKey.from_json(key)
        return ExportKey.from_json(key) if kind == "onnx" else None
    except (SdtrtError, *MALFORMED):
        return None


def _check_what(component: object, precision: object) -> None:
    """Raise `ValueError` for what is no component or no precision."""
    if component not in COMPONENTS or precision not in PRECISIONS:
        raise ValueError(f"a key is of {component!r} in {precision!r}")


def _check_types(texts: Iterable[object], numbers: Iterable[object]) -> None:
    """Raise `TypeError` or `ValueError` for what is not the text or the number that a key has in its place."""
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"a key has {text!r} in the place of a text")
    for number in numbers:
        if type(number) is not int:
            raise TypeError(f"a key has {number!r} in the place of a number")
        if abs(number) > MOST:
            raise ValueError(f"a key has {number} where less is possible")


def export_key(model: ModelSource, spec: ExportSpec, digest: Callable[[Path], str]) -> ExportKey:
    """The key of the export of a model's component, with the weights that the model has now.

    Args:
        digest: sha256 of a file (the engine directory's memoises it).

    The versions of PyTorch and diffusers are not in it: an export is checked against them when it is made, and computes
    the same ever after. They are in the entry's `info`.
    """
    return ExportKey(
        component=spec.component,
        precision=spec.precision,
        exporter=spec.exporter,
        opset=spec.resolved_opset,
        format=FORMAT,
        fingerprint=_fingerprint(model, spec, digest),
        groups=spec.groups,
        calibration=spec.calibration if spec.precision in QUANTISED else None,
    )


def _fingerprint(model: ModelSource, spec: ExportSpec, digest: Callable[[Path], str]) -> str:
    """What stands for the weights: a file's content, or the tensors of a live module as the engine takes them."""
    if isinstance(model, LiveModel):
        return model.fingerprint(spec.component, spec.precision)
    assert isinstance(model, Model)
    return model.fingerprint(part_of(spec.component), digest)


def program_key(model: ModelSource, spec: ExportSpec) -> ExportKey:
    """What an engine free of weights is built from: like `export_key`, but of any weights of the architecture."""
    contract = contract_of(model, spec.component, spec.precision, spec.groups)
    return ExportKey(
        component=spec.component,
        precision=spec.precision,
        exporter="program",
        opset=0,
        format=FORMAT,
        fingerprint=architecture_fingerprint(model, part_of(spec.component), contract),
        groups=spec.groups,
    )


def source_key(model: ModelSource, spec: ExportSpec, digest: Callable[[Path], str], *, weights: bool) -> ExportKey:
    """What an engine is built from.

    Args:
        digest: sha256 of a file.
        weights: whether they are inside it.
    """
    return export_key(model, spec, digest) if weights else program_key(model, spec)


class Sight:
    """How the files that parts of a model are read from are at one moment; later it tells whether they still are.

    Files are told apart by size, times and inode: one that is replaced and put back counts as changed, too.

    Args:
        parts: those with weights; what is missing of them on this machine is downloaded first.

    Raises:
        ModelError: where a part's weights can't be had.
    """

    def __init__(self, model: ModelSource, parts: Iterable[str]) -> None:
        self._model = model
        self._seen = {part: self._look(part) for part in dict.fromkeys(parts)}

    def check(self) -> None:
        """Raise `ModelChangedError` where a file has been replaced, written or removed since."""
        for part, seen in self._seen.items():
            try:
                same = self._look(part) == seen
            except SdtrtError as error:  # it has no weights at the moment
                raise self._changed(part) from error
            if not same:
                raise self._changed(part)

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Hold what is read inside the block to this sight, before it and after it.

        Weights are mapped into memory, not copied, so that they may be read to the end of the block. Where it fails and
        the files have changed, that is why.

        Raises:
            ModelChangedError: as of `check`.
        """
        self.check()
        try:
            yield
        except SdtrtError:
            self.check()
            raise
        self.check()

    def check_mapped(self, parts: Iterable[str]) -> None:
        """Raise `ModelChangedError` where weights were written in place: what is mapped into memory changes with them.

        A file that was replaced, as by a download, stays what it was for who has mapped it.
        """
        for part in parts:
            for seen in filter(None, self._seen[part]):
                now = _identity_or_none(Path(seen[0]))
                if now and now[-1] == seen[-1] and now[:3] != seen[:3]:  # the same inode, of another size or time
                    raise self._changed(part)

    def _look(self, part: str) -> list[Identity | None]:
        return [_identity_or_none(path) for path in self._model.files(part)]

    def _changed(self, part: str) -> ModelChangedError:
        return ModelChangedError(
            f"the files of the {part} of {self._model.name} changed while they were being read",
            hint="run the command again once nothing writes to them any more",
        )


def _identity_or_none(path: Path) -> Identity | None:
    try:
        return identity(path)
    except OSError:
        return None


def steadily(work: Callable[[], T], console: Console) -> T:
    """Do some work that looks at a model and reads it; again, where its files changed meanwhile.

    Raises:
        ModelChangedError: where they did each time.
    """
    for _ in range(TRIES - 1):
        try:
            return work()
        except ModelChangedError as error:
            console.note(f"{error.message}: beginning again")
    return work()
