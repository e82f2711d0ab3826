"""What a single-file checkpoint says of its noise: marker tensors among its keys, and its header's texts.

Knows nothing of schedulers; what is said is a `NoiseSpec`, which goes over the scheduler's configuration.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from sdtrt.models.weights import is_pickle
from sdtrt.specs import NoiseSpec, PredictionType

# Tensors without a use of their own: trainers and ComfyUI write them, and web UIs go by them.
V_PREDICTION_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"
EDM_KEYS = ("edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
# The ModelSpec of Stability AI, what ComfyUI writes instead, and kohya's own.
PREDICTION_TEXTS = ("modelspec.prediction_type", "modelspec.predict_key")
PREDICTIONS: dict[str, PredictionType] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_pred": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}
V_PREDICTION_TEXT, ZERO_SNR_TEXT = "ss_v_parameterization", "ss_zero_terminal_snr"


def stated_noise(keys: Collection[str], texts: Mapping[str, str]) -> NoiseSpec:
    """What a checkpoint says of its noise; its keys go before its texts.

    Args:
        keys: names of its tensors.
        texts: of its header (`header_texts`).
    """
    prediction: tuple[PredictionType, str] | None = None
    if V_PREDICTION_KEY in keys:
        prediction = "v_prediction", f"the checkpoint's key {V_PREDICTION_KEY}"
    elif found := next((name for name in PREDICTION_TEXTS if texts.get(name, "").lower() in PREDICTIONS), None):
        prediction = PREDICTIONS[texts[found].lower()], f"the checkpoint's {found}"
    elif texts.get(V_PREDICTION_TEXT, "").lower() == "true":
        prediction = "v_prediction", f"the checkpoint's {V_PREDICTION_TEXT}"
    zero_snr = None
    if ZERO_SNR_KEY in keys:
        zero_snr = f"the checkpoint's key {ZERO_SNR_KEY}"
    elif texts.get(ZERO_SNR_TEXT, "").lower() == "true":
        zero_snr = f"the checkpoint's {ZERO_SNR_TEXT}"
    sources = {"prediction_type": prediction and prediction[1], "zero_snr": zero_snr}
    return NoiseSpec(
        prediction_type=prediction and prediction[0],
        zero_snr=True if zero_snr else None,
        sources={name: source for name, source in sources.items() if source},
    )


def foreign_noise(keys: Collection[str], scheduler: str) -> str | None:
    """A warning where a checkpoint has noise levels of its own kind (CosXL, Playground 2.5), and no scheduler for them.

    Args:
        keys: names of its tensors.
        scheduler: the class of its scheduler.
    """
    found = [key for key in EDM_KEYS if key in keys]
    if not found or scheduler.startswith("EDM"):
        return None
    return (
        f"the checkpoint has noise levels of EDM's kind (its key {found[0]}), which {scheduler} makes noise of: pass a"
        " folder whose scheduler is an EDMEulerScheduler as --config"
    )


def header_texts(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's header; none in a pickle, nor where they can't be read."""
    if is_pickle(path):
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):  # whoever needs its tensors says what is wrong with it
        return {}
