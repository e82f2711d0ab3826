"""Print a command's result on stdout, as lines or as one JSON document. Nothing else goes to stdout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdtrt.cli.options import OutputOptions
from sdtrt.engines.entry import Entry

if TYPE_CHECKING:
    from sdtrt.reports.bench_report import BenchReport
    from sdtrt.reports.inspection import EngineReport, ModelReport
    from sdtrt.reports.prove import ProofReport
    from sdtrt.reports.quality_bench import QualityBenchReport
    from sdtrt.reports.quality_report import QualityReport
    from sdtrt.reports.verify_report import VerifyReport

    Report = EngineReport | ModelReport | VerifyReport | BenchReport | ProofReport | QualityReport | QualityBenchReport


def document(entries: Sequence[Entry]) -> dict[str, Any]:
    """Write entries as one JSON document: one entry as it is, several as a list."""
    documents = [{"path": str(entry.path), **entry.to_json()} for entry in entries]
    return documents[0] if len(documents) == 1 else {"entries": documents}


def show(report: Report, output: OutputOptions) -> None:
    """Print a report on stdout: as a table, or as one JSON document."""
    if output.as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        report.print()


def render(lines: Sequence[str], document: Mapping[str, Any], output: OutputOptions) -> None:
    """Print a command's result on stdout: lines, or one JSON document."""
    if output.as_json:
        print(json.dumps(document, indent=2))
    elif lines:
        print("\n".join(lines))
