"""The scripts that judge many pictures, on stand-ins: the miniature, a small CLIP, a network made by hand."""

import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from benchmark_scripts import ROOT, module
from factories import clip_folder
from PIL import Image

from sdtrt.specs import PRESETS

fid, quality_curve = map(module, ("fid", "quality_curve"))


class _Features(torch.nn.Module):
    """The mean of each channel, and of its left half: six numbers a picture."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        values = pictures.to(torch.float64) / 255
        half = values[..., : values.shape[-1] // 2]
        return torch.cat([values.mean((2, 3)), half.mean((2, 3))], dim=1)


def moments(pictures):
    """The mean and the covariance of these features, by NumPy."""
    values = np.stack(
        [np.concatenate([one.mean((0, 1)), one[:, : one.shape[1] // 2].mean((0, 1))]) for one in pictures]
    )
    return values.mean(0) / 255, np.cov(values / 255, rowvar=False)


def distance(one, other):
    """The Fréchet distance of two normal distributions, by NumPy."""
    (mean, covariance), (other_mean, other_covariance) = one, other
    roots = np.sqrt(np.linalg.eigvals(covariance @ other_covariance).astype(complex)).real
    return np.sum((mean - other_mean) ** 2) + np.trace(covariance) + np.trace(other_covariance) - 2 * roots.sum()


@pytest.fixture
def real(tmp_path):
    """Ten pictures, of two sizes."""
    folder, generator = tmp_path / "real", np.random.default_rng(0)
    folder.mkdir()
    for number in range(10):
        picture = generator.integers(0, 40 + 20 * number, (32, 40 + 8 * (number % 2), 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


@pytest.mark.slow
def test_the_scores_of_a_file_of_captions(fid, tmp_path, real, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, arguments)])
        fid.main()

    captions = tmp_path / "captions.tsv"
    texts = ("a red circle on a blue background", "a green star, white background", "a ring", "a yellow square")
    captions.write_text("id\tcaption\n" + "".join(f"{number}\t{text}\n" for number, text in enumerate(texts)))
    torch.jit.script(_Features()).save(tmp_path / "features.pt")
    shown = [np.asarray(Image.open(path)) for path in sorted(real.iterdir())]
    mean, covariance = moments(shown)
    np.savez(tmp_path / "real.npz", mu=mean, sigma=covariance)
    common = ("--captions", captions, "--pictures", tmp_path / "made", "--inception", tmp_path / "features.pt")
    common += ("--clip-model", clip_folder(tmp_path / "clip"), "--count", 3, "--height", 64, "--width", 64)
    common += ("--backend", "torch", "--steps", 2, "--batch-size", 2, "--engine-dir", tmp_path / "engines")
    run(*common, "--statistics", tmp_path / "real.npz", "--output", tmp_path / "one.json")
    report = json.loads((tmp_path / "one.json").read_text())
    made = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "made").iterdir())]
    assert [path.name for path in sorted((tmp_path / "made").iterdir())] == ["00000.png", "00001.png", "00002.png"]
    assert report["pictures"] == 3
    assert report["fid"] == pytest.approx(distance(moments(made), (mean, covariance)), rel=1e-3)
    assert 0 <= report["clip"] <= 100
    assert report["inside"] == {"fid": False, "clip": False}

    kept = (tmp_path / "made" / "00000.png").stat().st_mtime_ns
    (tmp_path / "made" / "00001.png").unlink()
    run(*common, "--real", real, "--output", tmp_path / "two.json")  # goes on, and looks at pictures
    again = json.loads((tmp_path / "two.json").read_text())
    assert (tmp_path / "made" / "00000.png").stat().st_mtime_ns == kept
    assert again["fid"] == pytest.approx(report["fid"], rel=1e-6)
    assert again["clip"] == pytest.approx(report["clip"], abs=1e-3)


def test_captions_are_a_table_or_lines(fid, tmp_path):
    (tmp_path / "lines.txt").write_text("a ring\n\na star\n")
    (tmp_path / "table.tsv").write_text("id\timage_id\tcaption\n1\t7\tA man, a plan.\n2\t8\ta star\n")
    assert fid.read_captions(tmp_path / "lines.txt") == ["a ring", "a star"]
    assert fid.read_captions(tmp_path / "table.tsv") == ["A man, a plan.", "a star"]


@pytest.mark.slow
def test_a_curve_goes_on_where_another_run_ended(quality_curve, tmp_path, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["quality_curve.py", *map(str, arguments)])
        quality_curve.main()
        return json.loads((tmp_path / "curve.json").read_text())

    common = ("--folder", tmp_path / "kept", "--output", tmp_path / "curve.json", "--backend", "torch", "--count", 2)
    common += ("--steps", 3, "--height", 64, "--width", 64, "--repeats", 1)
    first = run(*common, "--choices", "steps=2")
    assert [row["choice"] for row in first["rows"]] == ["exact", "steps=2"]
    assert set(first["rows"][1]["scores"]) == set(first["rows"][1]["scores_lost"]) >= {"kind", "colour", "all_right"}
    assert first["rows"][0]["scores_lost"]["colour"] == 0
    assert first["rows"][1]["mean"]["psnr_db"] < 200
    made = {path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*.npz")}
    second = run(*common, "--choices", "steps=2,steps=1")
    for name in ("mean", "scores", "scores_lost"):
        assert [row[name] for row in second["rows"][:2]] == [row[name] for row in first["rows"]]
    assert {path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*.npz")} > made  # nothing was made again
    assert second["rows"][2]["mean"]["psnr_db"] < 200


def test_another_model_needs_prompts_of_its_own(quality_curve, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a ring\n\na star\n")
    words = ["quality_curve.py", "--folder", "x", "--output", "y", "--model", "other"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="--prompts FILE says what another model than tiny draws"):
        quality_curve.prompts_of(quality_curve.parsed())
    monkeypatch.setattr(sys, "argv", [*words, "--prompts", str(tmp_path / "prompts.txt"), "--count", "1"])
    assert [one.text for one in quality_curve.prompts_of(quality_curve.parsed())] == ["a ring"]


def test_presets_lose_no_more_than_is_said():
    """As they were measured (docs/quality.md): the figures are of the numbers that the presets have now."""
    report = json.loads((ROOT / "benchmarks" / "quality-tiny-cpu.json").read_text())
    rows = {row["choice"]: row for row in report["rows"]}
    assert report["prompts"] >= 100
    for name, most in (("high", 1), ("balanced", 3)):
        assert rows[name]["savings"] == asdict(PRESETS[name].savings)
        assert max(rows[name]["scores_lost"].values()) <= most
    assert rows["exact"]["cpu_s"] > rows["high"]["cpu_s"] > rows["balanced"]["cpu_s"]
