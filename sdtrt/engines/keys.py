"""What identifies an export. Apart from `export`: who looks for an engine needs neither ONNX nor an exporter.

Between a look at a model's weights and their use others may replace them. So whatever is given a key, or named by a
fingerprint, is read inside `Sight.steady`, which begins before the fingerprint is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sdtrt.common.console import Console
from sdtrt.common.errors import ModelChangedError, SdtrtError
from sdtrt.engines.digests import Identity, identity
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models.architecture import architecture_fingerprint
from sdtrt.models.components import contract_of, part_of
from sdtrt.models.resolve import Model
from sdtrt.specs import ExportSpec

FORMAT = 5  # of exports: raise it when `export` writes something else for the same request
TRIES = 3  # of work whose files change meanwhile

T = TypeVar("T")


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


def program_key(model: Model, spec: ExportSpec) -> dict[str, Any]:
    """What an engine free of weights is built from: like `export_key`, but of any weights of the architecture."""
    contract = contract_of(model, spec.component, spec.precision)
    return {
        "component": spec.component,
        "precision": spec.precision,
        "exporter": "program",
        "opset": 0,
        "format": FORMAT,
        "fingerprint": architecture_fingerprint(model, part_of(spec.component), contract),
    }


def source_key(model: Model, spec: ExportSpec, directory: EngineDirectory, *, weights: bool) -> dict[str, Any]:
    """What an engine is built from.

    Args:
        weights: whether they are inside it.
    """
    return export_key(model, spec, directory) if weights else program_key(model, spec)


class Sight:
    """How the files that parts of a model are read from are at one moment; later it tells whether they still are.

    Files are told apart by size, times and inode: one that is replaced and put back counts as changed, too.

    Args:
        parts: those with weights; what is missing of them on this machine is downloaded first.

    Raises:
        ModelError: where a part's weights can't be had.
    """

    def __init__(self, model: Model, parts: Iterable[str]) -> None:
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
        files = (self._model.config_file(part), *self._model.weight_files(part))
        return [_identity_or_none(path) for path in files]

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
