"""Group norms in two stages: the same numbers, at any layout, and none of a module's own is changed for good."""

from __future__ import annotations

import pytest
import torch

from sdtrt.exports.split_norms import split_norms


def relative(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("offset", [0.0, 100.0], ids=["around zero", "far from zero"])
@pytest.mark.parametrize("shape", [(2, 64, 12, 20), (1, 32, 7, 5), (3, 64, 1, 1)])
def test_statistics_in_two_stages_are_those_of_all_values(shape, offset):
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.GroupNorm(8, shape[1], eps=1e-6)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    values = (
        torch.randn(shape, generator=generator) * 3 + offset * torch.randn(shape[1], generator=generator)[:, None, None]
    )
    values = values.to(memory_format=torch.channels_last)
    exact = torch.nn.functional.group_norm(values.double(), 8, norm.weight.double(), norm.bias.double(), 1e-6)
    with split_norms(norm):
        found = norm(values)
    assert relative(found, exact) <= max(2 * relative(norm(values), exact), 1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_a_norm_in_fp16_computes_in_fp32_within():
    norm = torch.nn.GroupNorm(4, 16).half()
    values = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)).half() * 3000  # squares leave fp16
    exact = torch.nn.functional.group_norm(values.double(), 4)
    with split_norms(norm):
        found = norm(values)
    assert found.dtype == torch.float16
    assert relative(found, exact) < 1e-3


def test_a_norm_of_tokens_and_one_without_weights_are_served():
    norm = torch.nn.GroupNorm(4, 16, affine=False)
    tokens, pixels = torch.randn(2, 16, 9), torch.randn(2, 16, 4, 4)
    with split_norms(norm):
        assert torch.equal(norm(tokens), torch.nn.functional.group_norm(tokens, 4))
        assert torch.allclose(norm(pixels), torch.nn.functional.group_norm(pixels, 4), atol=1e-5)
    assert "forward" not in vars(norm)
