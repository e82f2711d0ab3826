"""What a checkpoint says of its noise, by keys and texts, and what an option says over it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from sdtrt.common.errors import UsageError
from sdtrt.models.prediction import foreign_noise, header_texts, stated_noise
from sdtrt.specs import NoiseSpec


@pytest.mark.parametrize(
    ("keys", "texts", "prediction", "zero_snr"),
    [
        ((), {}, None, None),
        (("v_pred",), {}, "v_prediction", None),
        (("v_pred", "ztsnr"), {}, "v_prediction", True),
        ((), {"modelspec.prediction_type": "v"}, "v_prediction", None),
        ((), {"modelspec.prediction_type": "epsilon"}, "epsilon", None),
        ((), {"modelspec.predict_key": "v"}, "v_prediction", None),
        ((), {"modelspec.predict_key": "epsilon"}, "epsilon", None),
        ((), {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "v_prediction", True),
        ((), {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"}, None, None),
        ((), {"modelspec.prediction_type": "flow", "modelspec.predict_key": "v"}, "v_prediction", None),
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, "v_prediction", None),
        (("model.diffusion_model.v_pred.weight",), {"title": "v_pred"}, None, None),
    ],
)
def test_keys_and_texts_say_what_the_unet_predicts(keys, texts, prediction, zero_snr):
    stated = stated_noise(keys, texts)
    assert (stated.prediction_type, stated.zero_snr, stated.timestep_spacing) == (prediction, zero_snr, None)
    assert set(stated.sources) == {
        name for name in ("prediction_type", "zero_snr") if getattr(stated, name) is not None
    }


def test_noise_levels_of_another_kind_are_warned_of():
    keys = ("edm_vpred.sigma_max", "edm_vpred.sigma_min")
    assert "EDMEulerScheduler as --config" in foreign_noise(keys, "EulerDiscreteScheduler")
    assert foreign_noise(keys, "EDMEulerScheduler") is None
    assert foreign_noise(("v_pred",), "EulerDiscreteScheduler") is None


def test_the_texts_are_those_of_the_header(tmp_path):
    tensors = {"a": torch.zeros(1)}
    save_file(tensors, tmp_path / "said.safetensors", metadata={"modelspec.predict_key": "v"})
    save_file(tensors, tmp_path / "plain.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no header")
    torch.save(tensors, tmp_path / "pickle.ckpt")
    assert header_texts(tmp_path / "said.safetensors") == {"modelspec.predict_key": "v"}
    for name in ("plain.safetensors", "damaged.safetensors", "pickle.ckpt", "missing.safetensors"):
        assert header_texts(tmp_path / name) == {}


def test_an_option_goes_before_what_the_checkpoint_says():
    stated = stated_noise(("v_pred", "ztsnr"), {})
    assert NoiseSpec().over(stated) == NoiseSpec("v_prediction", None, True)
    assert NoiseSpec("epsilon", "leading", False).over(stated) == NoiseSpec("epsilon", "leading", False)
    assert NoiseSpec(timestep_spacing="linspace").over(stated) == NoiseSpec("v_prediction", "linspace", True)


def test_what_is_taken_is_said_with_who_said_so():
    stated = stated_noise(("v_pred", "ztsnr"), {})
    assert NoiseSpec().describe() == ""
    assert NoiseSpec().over(stated).describe() == (
        "v_prediction (the checkpoint's key v_pred), zero terminal SNR (the checkpoint's key ztsnr),"
        " trailing timesteps (zero terminal SNR needs the last one)"
    )
    assert NoiseSpec("epsilon", "leading", False).over(stated).describe() == (
        "epsilon (--prediction-type), no zero terminal SNR (--no-zero-snr), leading timesteps (--timestep-spacing)"
    )


@pytest.mark.parametrize("wrong", [{"prediction_type": "v"}, {"timestep_spacing": "trailin"}])
def test_unknown_words_are_refused_with_those_that_are_known(wrong):
    with pytest.raises(UsageError) as caught:
        NoiseSpec(**wrong)
    assert "choose one of" in caught.value.hint
