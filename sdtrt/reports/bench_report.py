"""What a benchmark found, as a table, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sdtrt.backends import registry
from sdtrt.backends.native import NATIVE
from sdtrt.common.console import print_table
from sdtrt.common.errors import EngineError
from sdtrt.pipeline.opening.request import PROMPT_ROWS
from sdtrt.reports import charts
from sdtrt.reports.bench_baselines import Baseline, code_of
from sdtrt.reports.energy import POWER
from sdtrt.reports.meters import Timing
from sdtrt.specs import BenchTask, Precision

MIB = 2**20

COLUMNS = (
    *("task", "size", "steps", "batch", "what", "median s", "p90 s", "images/s", "UNet ms", "peak MiB", "J/image"),
    "speed-up",
)

SHARED = 3  # columns that all rows of a task have in common


@dataclass(frozen=True)
class Runner:
    """What is timed: the backend that was asked for, or a baseline beside it."""

    backend: str
    precision: Precision
    variant: str | None
    baseline: Baseline | None
    asked: bool

    @property
    def code(self) -> str | None:
        """The Python that makes the baseline; None for what is no baseline."""
        if self.baseline is None:
            return None
        return code_of(self.baseline, self.precision, registry.get(NATIVE).device())

    @property
    def title(self) -> str:
        """In one line."""
        return " ".join(filter(None, (self.backend, self.precision, self.variant and f"({self.variant})")))


@dataclass(frozen=True)
class Measured:
    """The figures of one row.

    Args:
        latency: seconds of a whole pipeline call, from the prompt to the PIL images.
        components: seconds of one call of each part; the UNet's is one denoising step with guidance, that of its
            `PROMPT_ROWS` one without.
        unet_calls: of one pipeline call: PNDM has one more than steps, Heun nearly twice as many.
        memory: peaks in bytes while generating; `peak_bytes` is that of the device that computes.
        energy_joules: of one pipeline call, all of the GPU; None where nobody counts.
        engine: name and key of the engine's entry.
        energy_source: who counted: the GPU's `counter`, or its `power` over time; None where nobody did.
    """

    device: str
    latency: Timing
    components: Mapping[str, Timing]
    unet_calls: int
    memory: Mapping[str, int | None]
    peak_bytes: int
    energy_joules: float | None
    engine: Mapping[str, str] | None
    energy_source: str | None = None


@dataclass(frozen=True)
class Row:
    """One runner at one request; either measured, or the reason why not."""

    task: BenchTask
    runner: Runner
    steps: int
    height: int
    width: int
    batch: int
    measured: Measured | None = None
    error: str | None = None
    hint: str | None = None
    speedup: float | None = None

    @property
    def images_per_second(self) -> float | None:
        """By the median call."""
        return None if self.measured is None else self.batch / self.measured.latency.median

    @property
    def energy_per_image(self) -> float | None:
        """In joules; None where nobody counted."""
        if self.measured is None or self.measured.energy_joules is None:
            return None
        return self.measured.energy_joules / self.batch

    @property
    def component_share(self) -> float | None:
        """How much of the call its components' own times make up: 1 would be no time between them.

        None where steps take different times.
        """
        if self.measured is None or f"unet{PROMPT_ROWS}" in self.measured.components:
            return None
        parts = {name: timing.median for name, timing in self.measured.components.items()}
        steps = sum(median for name, median in parts.items() if name == "unet" or name.startswith("controlnet"))
        return (sum(parts.values()) + steps * (self.measured.unet_calls - 1)) / self.measured.latency.median

    def to_json(self) -> dict[str, Any]:
        """Plain data; figures that there are not are None."""
        found = self.measured
        unet = None if found is None else found.components["unet"].scaled(1000)
        components = {} if found is None else found.components
        return {
            "task": self.task,
            "backend": self.runner.backend,
            "precision": self.runner.precision,
            "variant": self.runner.variant,
            "baseline": None if self.runner.asked else self.runner.baseline and self.runner.baseline.name,
            "device": found and found.device,
            "steps": self.steps,
            "height": self.height,
            "width": self.width,
            "batch": self.batch,
            "latency_s": found and found.latency.to_json(),
            "unet_step_ms": unet and unet.median,
            "components_ms": {name: timing.scaled(1000).to_json() for name, timing in components.items()},
            "unet_calls": found and found.unet_calls,
            "component_share": self.component_share,
            "images_per_s": self.images_per_second,
            "peak_bytes": found and found.peak_bytes,
            "memory": found and dict(found.memory),
            "energy_j": found and found.energy_joules,
            "energy_per_image_j": self.energy_per_image,
            "energy_source": found and found.energy_source,
            "speedup": self.speedup,
            "engine": found and found.engine,
            "error": self.error,
        }

    def cells(self) -> tuple[str, ...]:
        """The row of a table, in the order of `COLUMNS`."""
        size = f"{self.width}×{self.height}"
        head = (self.task, size, str(self.steps), str(self.batch), self.runner.title)
        found = self.measured
        if found is None:
            return (*head, "failed", *[""] * (len(COLUMNS) - len(head) - 1))
        return (
            *head,
            f"{found.latency.median:.3f}",
            f"{found.latency.p90:.3f}",
            f"{self.batch / found.latency.median:.2f}",
            f"{found.components['unet'].median * 1000:.2f}",
            f"{found.peak_bytes / MIB:.0f}",
            "–" if self.energy_per_image is None else f"{self.energy_per_image:.1f}",
            "" if self.speedup is None else f"{self.speedup:.2f}×",
        )


@dataclass(frozen=True)
class BenchReport:
    """All rows of a run, with what they were measured on."""

    rows: tuple[Row, ...]
    host: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    model: str

    @property
    def failures(self) -> tuple[Row, ...]:
        """Rows without figures."""
        return tuple(row for row in self.rows if row.measured is None)

    @property
    def energy_sources(self) -> set[str | None]:
        """Who counted the energy of the rows; None among them where nobody did."""
        return {row.measured.energy_source for row in self.rows if row.measured is not None}

    def best_batches(self) -> dict[str, int]:
        """The batch size with the most images a second of the backend that was asked for, by task."""
        best: dict[str, Row] = {}
        for row in self.rows:
            rate = row.images_per_second
            known = best[row.task].images_per_second if row.task in best else None
            if row.runner.asked and rate is not None and (known is None or rate > known):
                best[row.task] = row
        return {task: row.batch for task, row in best.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "host": dict(self.host),
            "versions": dict(self.versions),
            "command": self.command,
            "model": self.model,
            "best_batch": self.best_batches(),
            "code": self.code(),
            "rows": [row.to_json() for row in self.rows],
        }

    def code(self) -> dict[str, str]:
        """The Python of each baseline, by its title."""
        return {row.runner.title: code for row in self.rows if (code := row.runner.code) is not None}

    def remarks(self) -> list[str]:
        """What the table does not show: the best batch, why rows failed, and who counted the energy."""
        best = self.best_batches() if len({row.batch for row in self.rows}) > 1 else {}
        lines = [f"most images a second in {task}: batch {batch}" for task, batch in best.items()]
        lines += [f"failed: {row.task}, batch {row.batch}, {row.runner.title}: {row.error}" for row in self.failures]
        by_power = POWER in self.energy_sources
        return lines + (["J/image: the GPU's power over time, as it has no energy counter"] if by_power else [])

    def markdown(self) -> str:
        """A table for a README or an issue."""
        rows = [COLUMNS, ["---"] * len(COLUMNS), *(row.cells() for row in self.rows)]
        table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
        machine = ", ".join(gpu["name"] for gpu in self.host["gpus"]) or self.host["processor"]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        notes = "".join(f"- {line}\n" for line in self.remarks())
        code = "".join(f"\n## {title}\n\n```python\n{text}```\n" for title, text in self.code().items())
        return f"# sdtrt bench\n\n`{self.command}`\n\n{machine}; {versions}\n\n{table}\n{notes}{code}"

    def chart(self) -> Image.Image:
        """Seconds of each row as bars, one group for each request."""
        groups: dict[str, list[charts.Bar]] = {}
        for row in self.rows:
            title = f"{self.model} {row.task}, {row.width}x{row.height}, {row.steps} steps, batch {row.batch}: seconds"
            median = None if row.measured is None else row.measured.latency.median
            speedup = "" if row.speedup is None else f" ({row.speedup:.2f}x)"
            note = "failed" if median is None else f"{median:.3f}{speedup}"
            groups.setdefault(title, []).append(charts.Bar(row.runner.title, median, note, row.runner.asked))
        return charts.bar_chart([charts.Group(title, tuple(bars)) for title, bars in groups.items()])

    def print(self) -> None:
        """One table for each task on stdout: what all its rows have in common stands above it."""
        first = {row.task: row for row in reversed(self.rows)}
        for task in dict.fromkeys(row.task for row in self.rows):
            title = f"{self.model}: {task}, {first[task].width}×{first[task].height}, {first[task].steps} steps"
            rows = (row.cells() for row in self.rows if row.task == task)
            print_table(COLUMNS[SHARED:], (cells[SHARED:] for cells in rows), title)
        for line in self.remarks():
            print(line)

    def check(self) -> None:
        """Raise `EngineError` unless all rows of the backend that was asked for were measured."""
        for row in self.failures:
            if row.runner.asked:
                raise EngineError(
                    f"{row.runner.title} was not measured in {row.task} at batch {row.batch}: {row.error}",
                    hint=row.hint or "run: sdtrt doctor; or try a smaller size or batch",
                )
