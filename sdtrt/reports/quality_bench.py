"""Speed and loss side by side: each choice of savings, timed and judged beside the request without any, in one run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sdtrt.backends import registry
from sdtrt.common import host
from sdtrt.common.console import Console, print_table, quiet_libraries
from sdtrt.common.errors import EngineError, SdtrtError, UsageError
from sdtrt.common.version import __version__
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models import resolve
from sdtrt.models.loading import check_loras
from sdtrt.models.resolve import Model
from sdtrt.pipeline.opening.open import engine_facts
from sdtrt.pipeline.runs import saving
from sdtrt.reports import meters
from sdtrt.reports.losses import Array, Judges, Loss, Picture, find_judges, mean_loss
from sdtrt.reports.meters import Timing
from sdtrt.reports.quality import MOST_ROWS, check_exact, compare, settings_of
from sdtrt.reports.quality_report import Compared, cells_of, figures_of
from sdtrt.reports.quality_runs import Way, make_pictures, opened_way, settle_way, time_way
from sdtrt.reports.verify_pictures import sheet
from sdtrt.specs import GenerateSpec, QualityBenchSpec
from sdtrt.specs.presets import describe
from sdtrt.specs.savings import Savings

FILES = ("quality.json", "quality.md", "quality.png")
EXACT = "exact"


@dataclass(frozen=True)
class ChoiceRow:
    """One choice: how long a call takes, and what its pictures lose.

    Args:
        what: what it saves, in a few words.
        savings: the same as plain data.
        prompts: each prompt's picture beside the exact one; those of `exact` itself have their CLIP scores alone.
        error, hint: why it was not measured.
    """

    choice: str
    what: str
    savings: Mapping[str, Any]
    precision: str
    steps: int
    batch: int
    latency: Timing | None = None
    prompts: tuple[Compared, ...] = ()
    engines: Mapping[str, Mapping[str, str]] | None = None
    error: str | None = None
    hint: str | None = None

    @property
    def mean(self) -> Loss:
        """Over the prompts."""
        return mean_loss([one.loss for one in self.prompts]) if self.prompts else Loss()

    @property
    def broken(self) -> str | None:
        """How many pictures have values that are not finite, in words; None for none."""
        count = sum(not one.loss.is_finite for one in self.prompts)
        return f"{count} of {len(self.prompts)} pictures have values that are not finite" if count else None

    def speedup(self, exact: ChoiceRow) -> float | None:
        """How many times as fast as without any saving."""
        if self.latency is None or exact.latency is None:
            return None
        return exact.latency.median / self.latency.median

    def to_json(self, exact: ChoiceRow) -> dict[str, Any]:
        """Plain data; figures that there are not are None."""
        latency = self.latency
        return {
            "choice": self.choice,
            "what": self.what,
            "savings": dict(self.savings),
            "precision": self.precision,
            "steps": self.steps,
            "batch": self.batch,
            "latency_s": latency and latency.to_json(),
            "images_per_s": latency and self.batch / latency.median,
            "speedup": self.speedup(exact),
            "mean": self.mean.to_json(),
            "prompts": [one.to_json() for one in self.prompts],
            "engines": {name: dict(engine) for name, engine in (self.engines or {}).items()},
            "error": self.error,
        }


@dataclass(frozen=True)
class QualityBenchReport:
    """All choices of a run, the exact one first, with what they were measured on.

    Args:
        settings: what they have in common, as plain data.
        left_out: why metrics are left out, by their names.
    """

    rows: tuple[ChoiceRow, ...]
    settings: Mapping[str, Any]
    host: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    left_out: Mapping[str, str]

    def table(self) -> list[tuple[str, ...]]:
        """Its head and its lines."""
        figures = figures_of(next((row.mean for row in self.rows[1:] if row.prompts), Loss()))
        lines = [("choice", "what it saves", "call, s", "images/s", "speed-up", *(one.title for one in figures))]
        for row in self.rows:
            speed: tuple[str, ...] = ("failed", "", "")
            if row.latency is not None:
                faster = row.speedup(self.rows[0])
                rate = row.batch / row.latency.median
                speed = (f"{row.latency.median:.3f}", f"{rate:.2f}", "" if faster is None else f"{faster:.2f}×")
            lines.append((row.choice, row.what, *speed, *cells_of(row.mean, figures)))
        return lines

    def remarks(self) -> list[str]:
        """What the table does not show."""
        lines = [f"{name} is left out: {why}" for name, why in self.left_out.items()]
        return lines + [f"failed: {row.choice}: {why}" for row in self.rows if (why := row.error or row.broken)]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "host": dict(self.host),
            "versions": dict(self.versions),
            "command": self.command,
            **self.settings,
            "left_out": dict(self.left_out),
            "rows": [row.to_json(self.rows[0]) for row in self.rows],
        }

    @property
    def title(self) -> str:
        """What was made, in one line."""
        size = f"{self.settings['width']}×{self.settings['height']}"
        count = len(self.rows[0].prompts)
        return f"{self.settings['model']}: {size}, {self.settings['steps']} steps, {count} prompt{'s' * (count != 1)}"

    def markdown(self) -> str:
        """A table for a page or an issue."""
        columns, *lines = self.table()
        shown = (columns, ("---",) * len(columns), *lines)
        table = "".join(f"| {' | '.join(cells)} |\n" for cells in shown)
        machine = ", ".join(gpu["name"] for gpu in self.host["gpus"]) or self.host["processor"]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        notes = "".join(f"- {line}\n" for line in self.remarks())
        return (
            f"# sdtrt bench --quality\n\n`{self.command}`\n\n{self.title}\n\n{machine}; {versions}\n\n{table}\n{notes}"
        )

    def print(self) -> None:
        """The table on stdout."""
        head, *lines = self.table()
        print_table(head, lines, self.title)
        for line in self.remarks():
            print(line)

    def check(self) -> None:
        """Raise `EngineError` unless all choices were measured, and gave pictures."""
        for row in self.rows:
            if row.error is not None:
                raise EngineError(
                    f"{row.choice} was not measured: {row.error}",
                    hint=row.hint or "run: sdtrt doctor; or try a smaller size or batch",
                )
            if row.broken is not None:
                raise EngineError(f"{row.choice} spoils pictures: {row.broken}", hint="leave it out; or save less")


def bench_quality(
    spec: QualityBenchSpec, directory: EngineDirectory, console: Console, command: str
) -> QualityBenchReport:
    """Time and judge each choice of a request, and write the files that it asks for.

    The exact request comes first. A choice that can't run is a row with the reason (`QualityBenchReport.check` then
    raises).

    Args:
        command: as it was typed, for the report.

    Raises:
        UsageError, OutputError, ModelError: for a wrong request, before anything is timed.
        SdtrtError: where the exact request can't run, or a metric that was asked for by name can't be had.
    """
    if spec.output is not None:
        saving.check_files(spec.output, FILES, overwrite=spec.overwrite)
    facts = host.facts()
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' advice on a model's configuration files
        model = resolve.resolve_model(spec.image.model, console)
        check_loras(model)
        exact = settle_way(spec.image, model, directory, console)
        judges = find_judges(spec.metrics, (exact.spec.sizes.height, exact.spec.sizes.width), console)
        rows, pictures = _Bench(spec, model, directory, console, judges, exact).all()
    versions = {"sdtrt": __version__, **host.library_versions(), **_versions(exact)}
    settings = settings_of(exact)
    del settings["savings"], settings["quality"]  # they are the rows'
    report = QualityBenchReport(tuple(rows), settings, facts, versions, command, judges.left_out)
    if spec.output is not None:
        for path in saving.write_files(spec.output, _files(report, pictures), overwrite=spec.overwrite):
            console.note(f"wrote {path}")
    return report


def _versions(way: Way) -> dict[str, str]:
    """Of the backend's library, and of the GPU's driver, where there are such."""
    driver = meters.driver_version()
    found = {} if driver is None else {"driver": driver}
    try:
        version = registry.get(way.spec.backend).version()
    except SdtrtError:
        return found
    return found | ({way.spec.backend: version} if version else {})


def _files(report: QualityBenchReport, pictures: Mapping[str, Sequence[Array]]) -> dict[str, bytes]:
    """The report as JSON, as Markdown, and its pictures: a line a prompt, a column a choice."""
    rows = list(zip(*pictures.values(), strict=True))[:MOST_ROWS]
    document = json.dumps(report.to_json(), indent=1) + "\n"
    picture = sheet(rows, tuple(pictures))
    return dict(zip(FILES, (document.encode(), report.markdown().encode(), picture), strict=True))


@dataclass(frozen=True)
class _Bench:
    """One run's request, on one model."""

    spec: QualityBenchSpec
    model: Model
    directory: EngineDirectory
    console: Console
    judges: Judges
    exact: Way

    def all(self) -> tuple[list[ChoiceRow], dict[str, list[Array]]]:
        """The rows, and the pixels of those that ran, by their choices."""
        first, expected = self._measured(EXACT, self.exact, None)
        rows, pictures = [first], {EXACT: [one.pixels for one in expected]}
        base = replace(self.spec.image, backend=self.exact.spec.backend, precision=self.exact.spec.precision)
        for choice in self.spec.choices:
            row, made = self._tried(choice.text, choice.of(base), expected)
            rows.append(row)
            pictures |= {choice.text: [one.pixels for one in made]} if made else {}
        return rows, pictures

    def _tried(self, name: str, image: GenerateSpec, expected: list[Picture]) -> tuple[ChoiceRow, list[Picture]]:
        """Measure one choice, or say why it can't be."""
        try:
            return self._measured(name, settle_way(image, self.model, self.directory, self.console), expected)
        except UsageError:
            raise
        except (SdtrtError, MemoryError) as error:
            reason = error.message if isinstance(error, SdtrtError) else "no memory is left"
            hint = error.hint if isinstance(error, SdtrtError) else None
            self.console.warn(f"{name} failed: {reason}")
            return replace(self._row(name, image), error=reason, hint=hint), []

    def _measured(self, name: str, way: Way, expected: list[Picture] | None) -> tuple[ChoiceRow, list[Picture]]:
        """Open its pipeline, warm it up, time it, and make the pictures.

        Args:
            expected: the exact pictures; None where these are they.
        """
        row = self._row(name, replace(way.image, precision=way.spec.precision, savings=way.spec.savings))
        self.console.note(f"{name}: {row.what} ...")
        with opened_way(way, self.directory, self.console) as opened:
            latency = time_way(way, opened, self.spec.repeats, self.spec.warmups)
            made = make_pictures(way, opened, name, self.console)
            engines = {part: engine_facts(entry) for part, entry in opened.entries.items()}
        if expected is None:
            check_exact(way, made)
        found = compare(way.image, self.judges, made, expected)
        return replace(row, batch=way.spec.images, latency=latency, prompts=found, engines=engines), made

    def _row(self, name: str, image: GenerateSpec) -> ChoiceRow:
        """A choice without its figures: what it saves beside the exact request."""
        precision = image.precision or self.exact.spec.precision
        words = [] if image.savings == Savings() else [describe(image.savings)]
        words += [f"{image.steps} steps"] if image.steps != self.spec.image.steps else []
        words += [precision] if precision != self.exact.spec.precision else []
        savings, batch = asdict(image.savings), image.images_at_once
        return ChoiceRow(name, "; ".join(words) or "nothing", savings, precision, image.steps, batch)
