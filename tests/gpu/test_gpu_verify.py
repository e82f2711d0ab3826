"""The miniature's TensorRT engine against PyTorch in fp32, by `verify`, over ten pictures."""

from __future__ import annotations

import gpu_engines
import pytest
import torch
from factories import TEN_PROMPTS
from gpu_engines import NEEDS_GPU, NEEDS_TENSORRT

from sdtrt.common.console import QUIET
from sdtrt.reports.verify import verify
from sdtrt.specs import GenerateSpec, VerifySpec

pytestmark = [*NEEDS_GPU, NEEDS_TENSORRT, pytest.mark.timeout(1200)]


def test_ten_pictures_are_faithful(directory, tmp_path):
    """Ten prompts with the defaults of txt2img, every timestep of each."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    gpu_engines.engine("dynamic", directory)
    figures = []
    for seed, prompt in enumerate(TEN_PROMPTS):
        image = GenerateSpec((prompt,), backend="tensorrt", precision="fp16", seed=seed, height=128, width=128)
        report = verify(VerifySpec(image, output=tmp_path, timesteps=None), directory, QUIET)
        assert report.passed, (prompt, report.failures)
        figures.append((report.image.psnr_db, min(error.cosine for error in report.timesteps)))
        figures[-1] += (max(error.noise_ratio for error in report.timesteps), report.image.ssim)
    print(f"PSNR, cosine, noise ratio, SSIM: {figures}")  # with pytest -rP
    assert min(psnr for psnr, _, _, _ in figures) >= 40
    assert min(cosine for _, cosine, _, _ in figures) >= 0.9999
    assert max(ratio for _, _, ratio, _ in figures) <= 2
