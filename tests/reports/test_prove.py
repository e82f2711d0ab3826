"""`sdtrt doctor --prove`: what runs here is proven, and a backend that fails is told beside those that don't."""

from __future__ import annotations

import json
import resource

import pytest

from sdtrt.backends import registry
from sdtrt.backends.onnxruntime.backend import OnnxRuntime
from sdtrt.common.errors import BuildError, EngineError
from sdtrt.reports import prove as proving
from sdtrt.reports.prove import HEAD, Proof, ProofReport
from sdtrt.specs import BenchSpec, VerifySpec

MACHINE = {"versions": {"torch": "2.13"}, "gpus": [], "system": "Linux", "python": "3.11", "processor": "A, 2 cores"}
GOOD = Proof("onnxruntime", "1.31", "fp32", 3.2, 0.9999999, 1e-7, 120.5, 19.55, 1.234)


def test_the_report_is_markdown_that_can_be_pasted_whole(capsys):
    bad = Proof("tensorrt", "10.13.3", "fp16", failures=("no tactic was found (use --precision fp32)",))
    report = ProofReport((GOOD, bad), (("inductor", "there is no C++ compiler"),), MACHINE, 61.0)
    report.print()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("### sdtrt ")
    assert lines[0].endswith(": failed in 61 s")
    assert "- not here: inductor: there is no C++ compiler" in lines
    assert "| onnxruntime | 1.31 | fp32 | 3.2 | 0.9999999 | 1.0e-07 | 120.5 | 19.55 | 1.234 | passed |" in lines
    assert "| tensorrt | 10.13.3 | fp16 | – | – | – | – | – | – | failed |" in lines
    assert "- tensorrt: no tactic was found (use --precision fp32)" in lines
    with pytest.raises(EngineError, match="not proven: tensorrt"):
        report.raise_on_failure()
    ProofReport((GOOD,), (), MACHINE, 1.0).raise_on_failure()
    with pytest.raises(EngineError, match="no backend with engines runs here"):
        ProofReport((), (), MACHINE, 1.0).raise_on_failure()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BuildError("it can't be built", hint="get more memory"), "it can't be built (get more memory)"),
        (AttributeError("no such flag"), "a bug: AttributeError: no such flag"),
    ],
)
def test_a_backend_that_fails_ends_no_other_proof(run, monkeypatch, error, said):
    """Neither with an error of ours nor with one that nobody foresaw."""
    running = [registry.get(name) for name in ("onnxruntime", "torch")]
    monkeypatch.setattr(registry, "running_here", lambda: iter(running))

    def fail(*_):
        raise error

    monkeypatch.setattr(proving, "_verified", fail)
    code, out, err = run("doctor", "--prove", "--json")
    assert code == 1
    (proof,) = json.loads(out)["proofs"]
    assert (proof["backend"], proof["failures"], proof["step_ms"]) == ("onnxruntime", [said], None)
    assert "not proven: onnxruntime" in err


def test_a_proof_asks_for_what_is_verified_and_timed_at_one_size(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("sdtrt.reports.verify.verify", lambda spec, *_: asked.append(spec) or 1 / 0)
    proof = proving._proof(OnnxRuntime("onnxruntime"), tmp_path, proving.Console(quiet=True))
    (spec,) = asked
    assert isinstance(spec, VerifySpec)
    assert (spec.image.backend, spec.image.precision, spec.output) == ("onnxruntime", "fp32", tmp_path)
    assert spec.image.steps == proving.STEPS == BenchSpec(steps=proving.STEPS).request("txt2img").steps
    assert proof.failures == ("a bug: ZeroDivisionError: division by zero",)
    assert len(proof.row) == len(HEAD)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_backend_of_this_machine_is_proven_in_three_minutes(run, tmp_path, monkeypatch):
    """By processor time, all that one core would need, as other programs may run here; compilers' processes count."""
    monkeypatch.chdir(tmp_path)
    names = {backend.name for backend in registry.running_here() if backend.source}
    begin = processor_seconds()
    code, out, err = run("doctor", "--prove", "--json")
    report = json.loads(out)
    assert code == 0, err
    assert {proof["backend"] for proof in report["proofs"]} == names >= {"onnxruntime", "openvino"}
    assert all(proof["cosine"] > 0.9999 and proof["picture_seconds"] > 0 for proof in report["proofs"])
    assert processor_seconds() - begin < 180
    assert list(tmp_path.iterdir()) == []


def processor_seconds():
    """Of this process and all that it has started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
