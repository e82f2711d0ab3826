"""A proof of this machine: the built-in model built, verified and timed on every backend that runs here, as one text.

Knows reports; what builds, verifies and times is elsewhere. It is for machines that nobody of this project has.
"""

from __future__ import annotations

import platform
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sdtrt.backends import registry
from sdtrt.backends.backend import Backend
from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.common.errors import EngineError, SdtrtError
from sdtrt.common.version import __version__
from sdtrt.engines.directory import EngineDirectory
from sdtrt.specs import SAMPLE_PROMPT, BenchSpec, GenerateSpec, Precision, VerifySpec

STEPS, TIMESTEPS = 20, 5  # of the picture that is verified and timed; of those, how many are compared
REPEATS = 3
HEAD = ("backend", "version", "in", "built, s", "cosine", "error", "PSNR, dB", "step, ms", "picture, s", "")


@dataclass(frozen=True)
class Proof:
    """What one backend did with the built-in model; figures are None from where it failed.

    Args:
        build_seconds: of all its engines; their exports are not in it.
        cosine, relative_l2: the worst over the timesteps, against PyTorch in fp32.
        psnr_db: of the final image, against PyTorch's in fp32.
        step_ms: the median of a UNet call with guidance.
        picture_seconds: the median of a whole pipeline call of `STEPS` steps.
        failures: what missed a threshold of `verify`, or the error that ended it, in words.
    """

    backend: str
    version: str
    precision: Precision
    build_seconds: float | None = None
    cosine: float | None = None
    relative_l2: float | None = None
    psnr_db: float | None = None
    step_ms: float | None = None
    picture_seconds: float | None = None
    failures: tuple[str, ...] = ()

    @property
    def row(self) -> tuple[str, ...]:
        """Its line of the report."""
        figures = (
            _text(self.build_seconds, ".1f"),
            _text(self.cosine, ".7f"),
            _text(self.relative_l2, ".1e"),
            _text(self.psnr_db, ".1f"),
            _text(self.step_ms, ".2f"),
            _text(self.picture_seconds, ".3f"),
        )
        return self.backend, self.version, self.precision, *figures, "failed" if self.failures else "passed"


@dataclass(frozen=True)
class ProofReport:
    """All proofs of a machine, and what it is.

    Args:
        seconds: that it all took.
        machine: `host.facts()`.
        absent: backends with engines that don't run here, and why.
    """

    proofs: tuple[Proof, ...]
    absent: tuple[tuple[str, str], ...]
    machine: dict[str, Any]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether there is a backend with engines, and each did what it should."""
        return bool(self.proofs) and not any(proof.failures for proof in self.proofs)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"passed": self.passed, "sdtrt": __version__, **asdict(self)}

    def print(self) -> None:
        """Print it on stdout, as Markdown that can be pasted whole."""
        print("\n".join(self._lines()))

    def _lines(self) -> Iterable[str]:
        """The text, line by line: plain Markdown, as no terminal's width may cut it."""
        yield f"### sdtrt {__version__}: {'passed' if self.passed else 'failed'} in {self.seconds:.0f} s\n"
        versions = ", ".join(f"{name} {version}" for name, version in self.machine["versions"].items())
        gpus = ", ".join(gpu["name"] for gpu in self.machine["gpus"]) or "no NVIDIA GPU"
        yield f"- {self.machine['system']}, Python {self.machine['python']}; {self.machine['processor']}; {gpus}"
        yield f"- {versions}"
        yield from (f"- not here: {name}: {why}" for name, why in self.absent)
        yield ""
        rows = [HEAD, ("---",) * len(HEAD), *(proof.row for proof in self.proofs)]
        yield from (f"| {' | '.join(row)} |" for row in rows)
        failures = [f"- {proof.backend}: {line}" for proof in self.proofs for line in proof.failures]
        yield from ("", *failures) if failures else ()
        yield f"\nThe built-in model, a picture of {STEPS} steps, against PyTorch in fp32."

    def raise_on_failure(self) -> None:
        """Raise `EngineError` where a backend failed; what is to be done stands in the report."""
        if self.passed:
            return
        failed = [proof.backend for proof in self.proofs if proof.failures] or ["no backend with engines runs here"]
        raise EngineError(f"not proven: {', '.join(failed)}", hint="docs/what-ran-where.md says how to send the report")


def prove(console: Console) -> ProofReport:
    """Build, verify and time the built-in model on every backend with engines that runs here.

    Engines go into a folder that is removed at the end: all is built anew, and nothing is left.

    Raises:
        SdtrtError: where what `verify` needs is not installed.
    """
    from sdtrt.reports.verify import require_extras

    require_extras()
    begin, machine = time.perf_counter(), host.facts()
    running = {backend.name: backend for backend in registry.running_here() if backend.source}
    others = [(one.name, one.why_not()) for one in registry.with_engines() if one.name not in running]
    absent = tuple((name, problem.message if problem else "it needs a GPU") for name, problem in others)
    with tempfile.TemporaryDirectory(prefix="sdtrt-prove-") as folder:
        place = Path(folder)
        proofs = tuple(_proof(backend, place, console) for backend in running.values())
    return ProofReport(proofs, absent, {**machine, "system": platform.platform()}, time.perf_counter() - begin)


def _proof(backend: Backend, place: Path, console: Console) -> Proof:
    """What one backend does. An error ends this proof, and no other; a bug, too, whose traceback goes to stderr."""
    precision = backend.default_precision()
    proof = Proof(backend.name, backend.version(), precision)
    console.note(f"proving {backend.name} {proof.version} in {precision}")
    try:
        proof = _verified(proof, place, console)
        return _timed(proof, place, console)
    except SdtrtError as error:
        return replace(proof, failures=(*proof.failures, f"{error.message} ({error.hint})"))
    except Exception as error:  # what a library does in a version that nobody has tried yet
        console.warn(traceback.format_exc())
        return replace(proof, failures=(*proof.failures, f"a bug: {type(error).__name__}: {error}"))


def _verified(proof: Proof, place: Path, console: Console) -> Proof:
    """Build the engines and verify them."""
    from sdtrt.reports.verify import verify

    directory = EngineDirectory(place / "engines")
    image = GenerateSpec(
        prompts=(SAMPLE_PROMPT,), backend=proof.backend, precision=proof.precision, steps=STEPS, seed=0
    )
    report = verify(VerifySpec(image, timesteps=TIMESTEPS, output=place), directory, console)
    own = [entry for entry in directory.entries("engine") if entry.key["backend"] == proof.backend]
    return replace(
        proof,
        build_seconds=sum(float(entry.info.get("seconds", 0)) for entry in own),
        cosine=min(error.cosine for error in report.timesteps),
        relative_l2=max(error.relative_l2 for error in report.timesteps),
        psnr_db=report.image.psnr_db,
        failures=report.failures,
    )


def _timed(proof: Proof, place: Path, console: Console) -> Proof:
    """Time whole pipeline calls and the UNet's."""
    from sdtrt.reports.bench import run_bench

    spec = BenchSpec(
        backend=proof.backend,
        precision=proof.precision,
        baselines=(),
        steps=STEPS,
        repeats=REPEATS,
        warmups=1,
        allow_build=False,
    )
    (row,) = run_bench(spec, EngineDirectory(place / "engines"), console, "sdtrt doctor --prove").rows
    if row.measured is None:
        return replace(proof, failures=(*proof.failures, f"not timed: {row.error} ({row.hint})"))
    step, picture = row.measured.components["unet"].median, row.measured.latency.median
    return replace(proof, step_ms=1000 * step, picture_seconds=picture)


def _text(value: float | None, form: str) -> str:
    """A figure of the report; a dash where there is none."""
    return "–" if value is None else format(value, form)
