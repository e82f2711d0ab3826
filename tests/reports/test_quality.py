"""What savings lose, measured: real models of the real format, small and random; the same request twice."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import alexnet_file, clip_folder
from PIL import Image

from sdtrt.cli.saving_options import PresetOptions, SavingOptions
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import EngineError, ModelError, SdtrtError, UsageError
from sdtrt.reports import clip_score, lpips
from sdtrt.reports.clip_score import load_clip_score
from sdtrt.reports.losses import Judges, Loss, Picture, find_judges, mean_loss
from sdtrt.reports.lpips import load_lpips
from sdtrt.reports.quality import verify_quality
from sdtrt.reports.quality_bench import bench_quality
from sdtrt.reports.quality_report import Compared, judge_loss
from sdtrt.specs import (
    PRESETS,
    DeepCaching,
    GenerateSpec,
    GuidanceInterval,
    LossLimits,
    MetricsSpec,
    ModelSpec,
    QualityBenchSpec,
    QualitySpec,
    Savings,
)
from sdtrt.specs.presets import settle, told
from sdtrt.specs.quality import parse_choices

pytestmark = pytest.mark.usefixtures("on_the_cpu")
PROMPTS = ("a red circle on a blue background", "a small green star")
PLAIN = MetricsSpec(("latents", "psnr", "ssim"))


def noise(seed, height=40, width=48):
    return np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)


# --- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lpips_is_that_of_torchmetrics(tmp_path, monkeypatch):
    """With the same random network, as torchvision's own can't be imported beside a CPU's PyTorch of PyPI."""
    from torchmetrics.functional.image import lpips as theirs

    own = load_lpips(alexnet_file(tmp_path / "alexnet.pth"))
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: own.features)
    reference = theirs._LPIPS(pretrained=True, net="alex")
    for one, other in ((noise(0), noise(1)), (noise(2, 31, 31), noise(2, 31, 31) / 2)):
        pair = (torch.from_numpy(pixels).permute(2, 0, 1)[None] for pixels in (one, other))
        assert own(one, other) == pytest.approx(float(reference(*pair, normalize=True)), rel=1e-6)


def test_lpips_by_a_network_made_by_hand():
    """One layer of one weight, two channels that differ by what can be counted on paper."""
    layer = torch.nn.Conv2d(3, 2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])[:, :, None, None]
    one, other = np.zeros((1, 1, 3)), np.zeros((1, 1, 3))
    one[..., 0] = other[..., 1] = 1  # red: (1.030 / 0.458, 0), green: (0, 1.088 / 0.448) behind the ReLU
    made = lpips.Lpips(torch.nn.Sequential(layer, torch.nn.ReLU()), [torch.tensor([3.0, 0.5])[None, :, None, None]])
    assert made(one, other) == pytest.approx(3 * 1 + 0.5 * 1)  # unit vectors along either axis
    assert made(one, one) == 0


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_lpips_takes_a_file_of_alexnet(tmp_path, suffix):
    made = load_lpips(alexnet_file(tmp_path / f"alexnet{suffix}"))
    assert made(noise(0), noise(0)) == 0
    assert made(noise(0), noise(1)) > made(noise(0), 0.9 * noise(0) + 0.1 * noise(1)) > 0


def test_lpips_without_what_it_needs_says_what_that_is(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(SdtrtError, match="PyTorch's cache has no alexnet") as caught:
        load_lpips(None)
    assert "--lpips-weights" in caught.value.hint
    (tmp_path / "checkpoints").mkdir()
    alexnet_file(tmp_path / "checkpoints" / lpips.ALEXNET)
    assert load_lpips(None)(noise(0), noise(0)) == 0
    with pytest.raises(SdtrtError, match=r"there is no file .*nothing\.pth"):
        load_lpips(tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ModelError, match=r"can't read .*text.pth"):
        load_lpips(tmp_path / "text.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"other.pth is no AlexNet"):
        load_lpips(tmp_path / "other.pth")
    monkeypatch.setattr(lpips, "find_spec", lambda name: None)
    with pytest.raises(SdtrtError, match="needs torchmetrics") as caught:
        load_lpips(None)
    assert caught.value.hint == 'pip install "sdtrt[quality]"'


@pytest.mark.slow
def test_the_clip_score_is_the_cosine_of_transformers_own_embeddings(tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    folder = clip_folder(tmp_path / "clip")
    score = load_clip_score(str(folder), QUIET, offline=True)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    found = []
    for seed, text in ((0, "a red circle"), (1, "a blue background " * 60)):
        picture = Image.fromarray((noise(seed) * 255).round().astype(np.uint8))
        given = processor(text=[text], images=[picture], return_tensors="pt", truncation=True)
        with torch.no_grad():
            cosine = float(model(**given).logits_per_image / model.logit_scale.exp())
        found.append(score(noise(seed), text))
        assert found[-1] == pytest.approx(max(0, 100 * cosine), abs=1e-3)
    assert max(found) > 0


def test_a_clip_model_that_is_none_is_named(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no folder nowhere with a CLIP model"):
        load_clip_score("nowhere", QUIET, offline=True)
    with pytest.raises(ModelError, match="can't read a CLIP model of"):
        load_clip_score(str(tmp_path), QUIET, offline=True)
    with pytest.raises(ModelError, match="not in the hub cache"):
        load_clip_score("nobody/nothing", QUIET, offline=True)
    monkeypatch.setattr(clip_score, "find_spec", lambda name: None)
    with pytest.raises(SdtrtError, match="needs torchmetrics"):
        load_clip_score(str(tmp_path), QUIET, offline=True)


def test_what_can_not_be_had_is_left_out_with_a_word_and_an_error_where_it_was_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    judges = find_judges(MetricsSpec(), (64, 64), Console())
    assert judges.names == ("latents", "psnr", "ssim")
    assert set(judges.left_out) == {"lpips", "clip"}
    said = capsys.readouterr().err
    assert "lpips is left out: LPIPS needs AlexNet's weights" in said
    assert "clip is left out: no CLIP model was named (--clip-model" in said
    for name, message in (("lpips", "AlexNet's weights"), ("clip", "no CLIP model was named")):
        with pytest.raises(SdtrtError, match=message):
            find_judges(MetricsSpec((name,)), (64, 64), QUIET)
    with pytest.raises(SdtrtError, match="at least 31 pixels a side, these are 24x64"):
        find_judges(MetricsSpec(("lpips",)), (64, 24), QUIET)
    assert find_judges(PLAIN, (64, 64), QUIET).left_out == {}


def test_the_loss_of_a_picture_is_counted_and_a_broken_one_is_seen():
    judges = Judges(("latents", "psnr", "ssim"), None, lambda pixels, text: 10 * float(pixels.mean()), {})
    exact = Picture(np.ones((4, 2, 2)), np.full((20, 20, 3), 0.5))
    own = Picture(np.full((4, 2, 2), 1.5), np.full((20, 20, 3), 0.6))
    loss = judges.loss(own, exact, "x")
    assert loss.relative_l2 == pytest.approx(0.5)
    assert loss.cosine == pytest.approx(1)
    assert loss.psnr_db == pytest.approx(20)
    assert 0 < loss.ssim < 1
    assert loss.clip_loss == pytest.approx(-1)
    assert loss.lpips is None
    same = judges.loss(exact, exact, "x")
    assert (same.relative_l2, same.psnr_db, same.ssim, same.clip_loss) == (0, 200, 1, 0)
    assert judges.loss(exact, None, "x") == Loss(clip=5)
    broken = judges.loss(replace(own, pixels=np.full((20, 20, 3), np.nan)), exact, "x")
    assert not broken.is_finite
    assert broken.to_json()["psnr_db"] is None


def test_means_are_of_all_prompts_or_none():
    mean = mean_loss([Loss(ssim=0.5, clip=3), Loss(ssim=1.0)])
    assert (mean.ssim, mean.clip) == (0.75, None)


def test_each_limit_is_judged_by_the_mean():
    def found(limits, *losses):
        return list(judge_loss(limits, [Compared(f"prompt {n}", n, loss) for n, loss in enumerate(losses)]))

    good, bad = Loss(0.1, 0.99, 30, 0.9, 0.1, 30, 30), Loss(0.5, 0.5, 10, 0.3, 0.9, 20, 30)
    assert found(LossLimits(), good) == []
    assert found(LossLimits(0.8, 0.2, 25, 0.7, 0.4, 1), good, bad) == [
        "the mean cosine of the latents is 0.745, below 0.8",
        "the mean PSNR is 20, below 25",
        "the mean SSIM is 0.6, below 0.7",
        "the mean relative L2 error of the latents is 0.3, above 0.2",
        "the mean LPIPS is 0.5, above 0.4",
        "the mean loss of the CLIP score is 5, above 1",
    ]
    assert found(LossLimits(), Loss(relative_l2=9.0)) == []  # nothing else was computed
    nothing = LossLimits(None, None, None, None, None, None)
    assert found(nothing, good, Loss(psnr_db=math.nan)) == [
        "1 of 2 pictures have values that are not finite, first 'prompt 1'"
    ]


# --- the same request twice ------------------------------------------------------------------------------------------


@pytest.fixture
def image(smallest):
    """Quick: PyTorch alone, two steps."""
    names = {"model": ModelSpec(str(smallest)), "backend": "torch", "precision": "fp32", "seed": 3}
    return GenerateSpec(PROMPTS, steps=2, height=64, width=64, **names)


def test_half_precision_beside_the_exact_run_in_fp32(image, directory, tmp_path):
    spec = QualitySpec(replace(image, precision="bf16"), in_fp32=True, metrics=PLAIN, output=tmp_path / "out")
    report = verify_quality(spec, directory, QUIET)
    assert report.passed, report.failures
    assert [(one.prompt, one.seed) for one in report.prompts] == [(PROMPTS[0], 3), (PROMPTS[1], 4)]
    for one in report.prompts:
        assert 1e-4 < one.loss.relative_l2 < 0.1
        assert one.loss.cosine > 0.99
        assert 25 < one.loss.psnr_db < 200
    with Image.open(report.files["grid"]) as grid:
        assert grid.size == (3 * 320, 2 * 320 + 24)  # exact, with savings, difference; a line a prompt
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (data["against"], data["backend"], data["precision"]) == ("torch fp32, exact", "torch", "bf16")
    assert data["mean"]["psnr_db"] == pytest.approx(np.mean([one["psnr_db"] for one in data["prompts"]]))

    strict = replace(spec, limits=LossLimits(min_psnr_db=190))
    with pytest.raises(EngineError, match="loses too much: the mean PSNR is") as caught:
        verify_quality(strict, directory, QUIET).raise_on_failure()
    assert "--quality high" in caught.value.hint


def test_guidance_in_a_part_of_the_run_is_held_against_all_of_it(image, directory, tmp_path):
    spec = QualitySpec(replace(image, prompts=PROMPTS[:1], quality="high"), metrics=PLAIN, output=tmp_path)
    report = verify_quality(spec, directory, QUIET)
    assert report.mean.relative_l2 > 1e-4  # random weights hardly heed a prompt
    assert report.mean.psnr_db < 100
    data = report.to_json()
    assert data["against"] == "torch fp32, exact"
    assert (data["quality"], data["savings"]["guidance"]["stop"]) == ("high", spec.image.savings.guidance.stop)
    plain = QualitySpec(replace(image, prompts=PROMPTS[:1]), in_fp32=True, metrics=PLAIN, output=tmp_path)
    assert verify_quality(plain, directory, QUIET).mean.psnr_db == 200  # the loss is the savings' alone


@pytest.mark.slow
def test_the_same_picture_loses_nothing_and_the_last_batch_is_filled_up(image, directory, tmp_path):
    three = replace(image, prompts=(*PROMPTS, "a ring"), batch_size=2)
    report = verify_quality(QualitySpec(three, in_fp32=True, metrics=PLAIN, output=tmp_path), directory, QUIET)
    assert [one.seed for one in report.prompts] == [3, 4, 5]
    for one in report.prompts:
        assert (one.loss.relative_l2, one.loss.psnr_db, one.loss.ssim) == (0, 200, 1)
        assert one.loss.cosine == pytest.approx(1)


def test_choices_are_timed_and_judged_side_by_side(image, directory, tmp_path):
    choices = parse_choices("steps=1,precision=bf16")
    spec = QualityBenchSpec(image, choices, PLAIN, repeats=2, warmups=1, output=tmp_path / "out")
    report = bench_quality(spec, directory, QUIET, "sdtrt bench --quality steps=1,precision=bf16")
    exact, fewer, half = report.rows
    assert [row.what for row in report.rows] == ["nothing", "1 steps", "bf16"]
    assert len(exact.latency.samples) == 2
    assert exact.mean == Loss()
    assert fewer.mean.psnr_db < half.mean.psnr_db
    data = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert data == json.loads(json.dumps(report.to_json()))
    assert [row["choice"] for row in data["rows"]] == ["exact", "steps=1", "precision=bf16"]
    assert data["rows"][1]["speedup"] == pytest.approx(exact.latency.median / fewer.latency.median)
    page = (tmp_path / "out" / "quality.md").read_text()
    assert "| steps=1 | 1 steps |" in page
    with Image.open(tmp_path / "out" / "quality.png") as grid:
        assert grid.size == (3 * 320, 2 * 320 + 24)  # a column a choice, a line a prompt
    report.check()
    spoilt = replace(half, prompts=(half.prompts[0], replace(half.prompts[1], loss=Loss(psnr_db=math.nan))))
    broken = replace(report, rows=(exact, fewer, spoilt))
    assert "failed: precision=bf16: 1 of 2 pictures have values that are not finite" in broken.remarks()
    with pytest.raises(EngineError, match="precision=bf16 spoils pictures: 1 of 2"):
        broken.check()


@pytest.mark.slow
def test_a_choice_that_can_not_run_is_a_row_with_the_reason(image, directory):
    own = replace(image, backend="onnxruntime", prompts=PROMPTS[:1])
    twelve = QualityBenchSpec(replace(own, steps=12), parse_choices("balanced,steps=12"), PLAIN, 1, 1)
    built = bench_quality(twelve, directory, QUIET, "builds them")
    built.check()
    assert built.rows[1].savings["caching"]["interval"] == PRESETS["balanced"].savings.caching.interval
    assert built.rows[1].mean.psnr_db < built.rows[2].mean.psnr_db == 200
    spec = QualityBenchSpec(replace(own, allow_build=False), parse_choices("precision=fp16,steps=1"), PLAIN, 1, 1)
    report = bench_quality(spec, directory, QUIET, "has those in fp32 alone")
    exact, half, fewer = report.rows
    assert exact.latency is not None
    assert fewer.latency is not None
    assert half.latency is None
    assert half.error.startswith("no onnxruntime fp16 engine")
    assert report.to_json()["rows"][1]["speedup"] is None
    assert "| precision=fp16 | fp16 | failed |" in report.markdown()
    with pytest.raises(EngineError, match="precision=fp16 was not measured: no onnxruntime fp16 engine"):
        report.check()
    with pytest.raises(EngineError, match="no onnxruntime fp16 engine"):  # the exact one itself
        bench_quality(replace(spec, image=replace(spec.image, precision="fp16")), directory, QUIET, "x")


# --- the commands ----------------------------------------------------------------------------------------------------

QUICK = ("--steps", "2", "--height", "64", "--width", "64", "-q", "--backend", "torch")


def test_the_command_compares_savings_and_prints_json(run, folder, smallest):
    metrics = ("--metrics", "psnr,ssim", "--json", "-p", PROMPTS[0], "-p", PROMPTS[1])
    code, out, err = run("verify", "--against", "exact-fp32", "-m", str(smallest), *QUICK, *metrics)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["passed"] is True
    assert [one["psnr_db"] for one in report["prompts"]] == [200, 200]
    assert report["mean"]["relative_l2"] is None  # not among the metrics
    code, out, err = run(
        "bench", "--quality", "steps=1", "-m", str(smallest), *QUICK, *metrics, "--repeats", "1", "--warmups", "1"
    )
    assert (code, err) == (0, "")
    assert [row["choice"] for row in json.loads(out)["rows"]] == ["exact", "steps=1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("verify", "--against", "exactly"), "unknown against: 'exactly'"),
        (("verify", "--against", "exact"), "the request saves nothing"),
        (("verify", "--against", "exact-fp32", "--timesteps", "3"), "--timesteps 3 is about an engine"),
        (("verify", "--max-lpips", "0.3"), "--max-lpips 0.3 is about savings"),
        (("verify", "--metrics", "psnr"), "--metrics is about savings"),
        (("verify", "--quality", "high"), "--quality is about savings"),
        (("bench", "--metrics", "psnr"), "--metrics is about savings"),
        (("bench", "--prompt", "x"), "--prompt is about pictures that are judged"),
        (("bench", "--seed", "1"), "--seed is about pictures that are judged"),
        (("bench", "--quality", "high", "--seed", "-1"), "--quality takes no random seed"),
        (("bench", "--quality", "high", "--show-baselines"), "--show-baselines has no effect beside --quality"),
        (("bench", "--quality", "high", "--task", "img2img"), "--task img2img has no effect beside --quality"),
        (("bench", "--quality", "high", "--baselines", "all"), "--baselines all has no effect beside --quality"),
        (("bench", "--quality", "high", "--batch-size", "1,2"), "--quality takes one batch size, got 1,2"),
        (("bench", "--quality", "low"), "unknown quality: 'low'"),
        (
            ("bench", "--quality", "high", "--guidance-interval", "0:0.5"),
            "--guidance-interval has no effect beside --quality",
        ),
        (("verify", "--against", "exact", "--quality", "exact"), "the request saves nothing"),
        (("txt2img", "x", "--quality", "hihg"), "unknown quality: 'hihg'"),
        (("bench", "--quality", "high", "--metrics", "fid"), "unknown metric: 'fid'"),
    ],
)
def test_the_commands_wrong_input_is_told(run, folder, words, message):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")


# --- presets ---------------------------------------------------------------------------------------------------------


def test_a_preset_is_told_kept_in_the_picture_and_taken_from_it(run, folder, smallest):
    quick = ("-m", str(smallest), "--steps", "4", "-H", "64", "-W", "64", "--backend", "torch", "--seed", "1", "--json")
    code, out, err = run("txt2img", "x", *quick, "--quality", "high", "-o", "one.png")
    assert code == 0
    stop = PRESETS["high"].savings.guidance.stop
    assert f"quality high: guidance in 0:{stop:g} of the run" in err
    said = json.loads(out)
    assert (said["quality"], said["guidance_interval"]) == ("high", [0.0, stop])
    with Image.open("one.png") as picture:
        assert "Quality preset: high" in picture.text["parameters"]
        pixels = np.asarray(picture)
    again = json.loads(run("txt2img", "--from", "one.png", "--backend", "torch", "--json", "-o", "two.png")[1])
    assert (again["quality"], again["guidance_interval"]) == ("high", [0.0, stop])
    with Image.open("two.png") as picture:
        assert np.array_equal(np.asarray(picture), pixels)
    code, out, err = run("txt2img", "--from", "one.png", "--quality", "exact", "--json", "-o", "three.png")
    assert "guidance_interval" not in json.loads(out)  # what the file says of its own preset gave way
    assert "quality exact: nothing is saved" in err


def test_a_number_beside_a_preset_wins_and_that_is_said():
    savings = settle("high", GuidanceInterval(0.1, 0.9))
    text = told("high", savings)
    assert text.startswith("quality high: guidance in 0.1:0.9 of the run (what was given beside it wins over its own:")
    saving = SavingOptions(guidance_interval="0:1")
    assert PresetOptions("high").fields(saving) == {"savings": Savings(), "quality": "exact"}
    assert PresetOptions("high").fields(SavingOptions())["quality"] == "high"
    assert PresetOptions().fields(SavingOptions(cache_interval=3)) == {
        "savings": Savings(caching=DeepCaching(3)),
        "quality": None,
    }
    assert settle("fast", guided=False) == Savings(caching=PRESETS["fast"].savings.caching)
