"""The UNet's two programs beside the UNet itself: the same noise, at every depth, with all that goes with them."""

from __future__ import annotations

import importlib.util
import json

import factories
import pytest
import torch
from exports import DTYPES
from trt_fakes import fake_library

from sdtrt.backends.tensorrt.build import Request
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.backends.tensorrt.worker import build_here
from sdtrt.common.errors import ModelError, UsageError
from sdtrt.exports.component import write_onnx
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.parity import check_onnx
from sdtrt.exports.tracing import component_call
from sdtrt.models.image_prompts import add_layers
from sdtrt.specs import BuildSpec, ExportSpec, Profile, Sizes
from sdtrt.specs.contract import Contract, unet_contract
from sdtrt.specs.deep_features import DEEP_OUT, default_depth, depth_of, shallow_groups, whole_group, with_deep_features
from sdtrt.specs.groups import residual_shapes, with_groups

SIZES = Sizes(2, 72, 104)  # odd at every level
PROFILE = Profile.of(Sizes(2, 128, 128))
GROUPS = [
    ("controlnet", "ip_adapter:3+4"),
    *(pytest.param(one, marks=pytest.mark.slow) for one in ((), ("controlnet",), ("ip_adapter:4",))),
]
NO_RTX = importlib.util.find_spec("tensorrt_rtx") is None


def contracts(config, depth, groups=(), precision="fp32"):
    """The contracts of the UNet, of the whole program and of the shallow one."""
    base = with_groups(unet_contract(config, precision), config, groups)
    whole = (*groups, whole_group(depth))
    return base, *(with_deep_features(base, config, own) for own in (whole, shallow_groups(whole)))


def smallest(kind, groups=()):
    unet = factories.small_unet(kind, **factories.SMALLEST[kind])
    counts = [int(one) for name in groups if name.startswith("ip_") for one in name.partition(":")[2].split("+")]
    if counts:
        add_layers(unet, counts)
    return unet


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_both_programs_give_the_noise_that_the_unet_gives(kind, groups):
    unet = smallest(kind, groups)
    depths = range(1, len(residual_shapes(unet.config)) - 1)
    for depth in depths:
        base, whole, shallow = contracts(unet.config, depth, groups)
        feeds = seeded_feeds(base, SIZES)
        with torch.no_grad():
            expected = component_call(unet, base)(*feeds.values())
            noise, feature = component_call(unet, whole)(*feeds.values())
            given = {**feeds, f"deep_feature_{depth}": feature}
            call = component_call(unet, shallow)
            found = call(*(given[spec.name] for spec in shallow.inputs))
        assert torch.equal(noise, expected)
        assert tuple(feature.shape) == whole.output_shapes(SIZES)[f"deep_feature_{depth}"]
        assert torch.equal(found, expected)
        assert len(list(call.parameters())) < len(list(unet.parameters())) * (depth + 1) / (len(depths) + 1)


def test_a_contract_has_what_the_outer_layers_take_and_no_more():
    config = {**factories.UNET_CONFIGS["sdxl"], "in_channels": 4, "out_channels": 4}
    _, whole, shallow = contracts(config, 3, ("controlnet", "ip_adapter:4"))
    assert [spec.name for spec in whole.outputs] == ["out_sample", "deep_feature_3"]
    names = [spec.name for spec in shallow.inputs]
    residuals = [f"down_residual_0{number}" for number in range(3)]
    assert names == ["sample", "timestep", "text_embeds", "time_ids", *residuals, "deep_feature_3"]
    _, _, deeper = contracts(config, 4, ("ip_adapter:4",))
    assert {"encoder_hidden_states", "image_tokens_0", "ip_adapter_scale"} <= {spec.name for spec in deeper.inputs}


def test_the_default_depth_is_that_of_an_architecture():
    assert [default_depth(factories.UNET_CONFIGS[kind]) for kind in ("sd1", "sd2", "sdxl")] == [1, 1, 3]


def test_groups_that_say_nothing_are_refused_and_shallow_ones_go_by_the_whole_ones():
    for name in ("deep_out", "deep_in:", "deep_out:0", "deep_in:one"):
        with pytest.raises(UsageError, match=f"{name} doesn't say how deep it is"):
            ExportSpec(groups=(name,))
    assert shallow_groups(("controlnet", "deep_out:2")) == ("controlnet", "deep_in:2")
    assert shallow_groups(("controlnet",)) == ()
    assert depth_of(("ip_adapter:4", "deep_out:2"), DEEP_OUT) == 2
    odd = {**factories.UNET_CONFIGS["sd1"], "up_block_types": ("UpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",)}
    with pytest.raises(ModelError, match="has a ResnetUpsampleBlock2D"):
        contracts({**odd, "in_channels": 4, "out_channels": 4}, 1)


@pytest.mark.feature(
    "Deep caching (`cache_interval`, `--cache-interval`)",
    "sd1 sd2 sdxl",
    "tensorrt86",
    error="builds no engine whose unet",
)
def test_tensorrt_8_refuses_both_programs_with_the_way_out(monkeypatch):
    monkeypatch.setattr(libraries, "open_library", lambda backend: fake_library("tensorrt 8.6.1"))
    for group in ("deep_out:1", "deep_in:1"):
        with pytest.raises(UsageError, match="builds no engine whose unet has inputs for") as caught:
            factories.checked_spec(ExportSpec(groups=(group,)), "tensorrt", (PROFILE,))
        assert "inductor, TensorRT 10 or later" in caught.value.hint


@pytest.fixture
def exported(tmp_path):
    """Write one of the two programs of a small UNet; returns the file, its contract and the UNet."""

    def write(kind, number, depth, precision="fp32", groups=()):
        unet = smallest(kind, groups)
        torch.nn.Module.to(unet, DTYPES[precision])
        contract = contracts(unet.config, depth, groups, precision)[number]
        path = tmp_path / f"{number}.onnx"
        write_onnx(unet, contract, path)
        return path, contract, unet

    return write


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number", "depth"), [("sd1", 1, 3), ("sd1", 2, 3), ("sdxl", 2, 1)])
def test_their_graphs_compute_it_at_every_size(exported, kind, number, depth):
    path, contract, unet = exported(kind, number, depth, groups=("controlnet",))
    report = check_onnx(path, unet, contract)
    assert report.worst.relative_l2 < 1e-4
    assert Contract.from_json(json.loads(json.dumps(contract.to_json()))) == contract


@pytest.mark.slow
@pytest.mark.skipif(NO_RTX, reason="TensorRT for RTX is not installed")
@pytest.mark.parametrize(("kind", "number"), [("sd1", 1), ("sd1", 2), ("sdxl", 2)])
def test_a_newer_tensorrt_builds_them(exported, tmp_path, kind, number):
    path, contract, _ = exported(kind, number, 1, "fp16")
    spec = BuildSpec(ExportSpec(), "tensorrt-rtx", (PROFILE,), compute_capability=(8, 9), optimization_level=0)
    info = build_here(Request(path, tmp_path, contract, spec, None, False), lambda message: None)
    assert info["plan_bytes"] > 10_000
