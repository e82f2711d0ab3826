"""The digests of keys of engines in pieces, as they were when the first were made."""

import pytest
from test_key_digests import FIXED, ONE, check_engine_key
from test_key_digests import model as model


@pytest.mark.parametrize(
    ("label", "component", "precision", "options", "digest"),
    [
        ("tensorrt 8.6.1", "unet", "fp16", {"profiles": FIXED}, "ca33b7f5ae6251ad"),  # in pieces
        ("tensorrt 8.6.1", "unet", "fp16", {"profiles": FIXED, "channels_last": True}, "a56fe0ba9834a8e1"),
        ("tensorrt 8.6.1", "vae_decoder", "fp16", {"profiles": ONE}, "e918e2161143a10d"),  # its norms are PyTorch's
    ],
)
def test_engines_in_pieces_are_found_under_the_keys_that_they_always_had(
    model, directory, monkeypatch, label, component, precision, options, digest
):
    check_engine_key(model, directory, monkeypatch, label, component, precision, options, digest)
