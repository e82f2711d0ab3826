"""What savings lose: a request's pictures beside those of the same request without any, from the same noise.

It chooses what is made and says what came out; the pictures and the metrics have modules of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from sdtrt.common.console import Console, quiet_libraries
from sdtrt.common.errors import EngineError
from sdtrt.common.metrics import count_non_finite
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models import resolve
from sdtrt.models.resolve import Model
from sdtrt.pipeline.opening.all_engines import ensure_all
from sdtrt.pipeline.opening.open import engine_facts
from sdtrt.pipeline.runs import saving
from sdtrt.reports.losses import Judges, Picture, find_judges
from sdtrt.reports.quality_report import Compared, QualityReport, judge_loss
from sdtrt.reports.quality_runs import Way, make_pictures, opened_way, settle_way
from sdtrt.reports.verify_pictures import differences
from sdtrt.reports.verify_runs import seed_of
from sdtrt.specs import GenerateSpec, QualitySpec
from sdtrt.specs.presets import describe
from sdtrt.specs.quality import exact_of

MOST_ROWS = 12  # of a picture grid


def verify_quality(spec: QualitySpec, directory: EngineDirectory, console: Console) -> QualityReport:
    """Hold a request with savings against the same one without any.

    Raises:
        UsageError, OutputError: for a wrong request, before any heavy work.
        SdtrtError: where a metric that was asked for by name can't be had, or an engine can't be had or run.
    """
    output = saving.plan_output(spec.output, count=2, overwrite=False)
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = resolve.resolve_model(spec.image.model, console)
        way = settle_way(spec.image, model, directory, console)
        exact = exact_way(way, model, directory, console)
        exact = exact.in_fp32() if spec.in_fp32 else exact
        judges = find_judges(spec.metrics, (way.spec.sizes.height, way.spec.sizes.width), console)
        for one in (exact, way):  # all that the pictures need, before the long part begins
            ensure_all(one.spec, directory, console, allow_build=spec.image.allow_build)
        expected = exact_pictures(exact, directory, console)
        with opened_way(way, directory, console) as opened:
            made = make_pictures(way, opened, "with savings", console)
            engines = {name: engine_facts(entry) for name, entry in opened.entries.items()}
        compared = compare(way.image, judges, made, expected)
    failures = tuple(judge_loss(spec.limits, compared))
    against = f"{exact.spec.backend} {exact.spec.precision}, exact"
    pairs = [(one.pixels, other.pixels) for one, other in zip(expected, made, strict=True)][:MOST_ROWS]
    picture = differences(pairs, against, described(way))
    files = {"grid": saving.save_new(picture, output.folder, f"verify-{way.spec.backend}-{way.spec.precision}-loss")}
    settings = {**settings_of(way), "against": against}
    return QualityReport(settings, spec.limits, compared, failures, judges.left_out, files, engines)


def exact_way(way: Way, model: Model, directory: EngineDirectory, console: Console) -> Way:
    """The same request without any saving, in the same backend, and in the same precision where that saves nothing."""
    image = exact_of(replace(way.image, backend=way.spec.backend, precision=way.spec.precision))
    return settle_way(replace(image, init_image=None, mask=None, edit=False), model, directory, console)


def exact_pictures(exact: Way, directory: EngineDirectory, console: Console) -> list[Picture]:
    """The pictures that others are held against."""
    with opened_way(exact, directory, console) as opened:
        made = make_pictures(exact, opened, "exact", console)
    check_exact(exact, made)
    return made


def check_exact(exact: Way, made: Sequence[Picture]) -> None:
    """Refuse exact pictures that aren't finite themselves: nothing can be held against them."""
    if any(count_non_finite(one.pixels) for one in made):
        raise EngineError(
            f"{exact.spec.model.name} gives values that are not finite without any saving"
            f" ({exact.spec.backend}, {exact.spec.precision})",
            hint="use --precision fp32; sdtrt verify holds the engine against PyTorch",
        )


def compare(
    image: GenerateSpec, judges: Judges, made: Sequence[Picture], expected: Sequence[Picture] | None
) -> tuple[Compared, ...]:
    """Each prompt's picture beside the exact one; with None for these, only how well it fits the prompt."""
    others = [None] * len(made) if expected is None else expected
    numbered = enumerate(zip(image.prompts, made, others, strict=True), seed_of(image))
    return tuple(Compared(text, seed, judges.loss(own, exact, text)) for seed, (text, own, exact) in numbered)


def settings_of(way: Way) -> dict[str, Any]:
    """What was run, as plain data."""
    image, spec = way.image, way.spec
    return {
        "model": spec.model.name,
        "backend": spec.backend,
        "precision": spec.precision,
        "negative_prompt": image.negative_prompt,
        "seed": seed_of(image),
        "steps": image.steps,
        "guidance_scale": image.guidance_scale,
        "scheduler": image.scheduler,
        "height": spec.sizes.height,
        "width": spec.sizes.width,
        "batch_size": spec.images,
        "quality": image.quality,
        "savings": {**asdict(spec.savings), "described": described(way)},
    }


def described(way: Way) -> str:
    """What a request comes to save, in a few words: of its steps, or by its precision alone."""
    words = describe(way.spec.savings)  # of few steps less than was asked for
    return words if words != "nothing" else f"{way.spec.backend} {way.spec.precision}"
