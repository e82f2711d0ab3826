"""Write a diffusers folder with the architecture of Stable Diffusion 1.5 and random weights: for timing, where no
checkpoint can be had. Speed does not depend on the values of weights; pictures and fidelity do.

    python scripts/make_random_model.py FOLDER
    python scripts/make_random_model.py FOLDER --residual-gain 16

The UNet's activations then are of the order of 1, and a trained model's are larger: what each layer adds to the last
one's result grows in training. `--residual-gain` multiplies that. With 16, the layers' results have a standard
deviation of 5 to 50 and go up to 260 (at 128x128; with 1: 0.5 and 4), which is where variances in fp16 would begin to
overflow.
"""

from __future__ import annotations

import sdtrt  # noqa: F401  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

RESIDUAL_ENDS = ("conv2", "to_out.0", "net.2", "proj_out")  # what the UNet's residual branches end with
# CLIP's own 49 408 words need a hub.
TOKENIZER = Path(__file__).resolve().parents[1] / "sdtrt" / "models" / "tiny" / "tokenizer"


def make_unet() -> UNet2DConditionModel:
    """860 M parameters."""
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
    )


def amplify(unet: UNet2DConditionModel, gain: float) -> None:
    """Multiply what the UNet's residual branches add."""
    with torch.no_grad():
        for name, module in unet.named_modules():
            if name.endswith(RESIDUAL_ENDS):
                for parameter in module.parameters():
                    parameter *= gain


def make_vae() -> AutoencoderKL:
    """84 M parameters, factor 8."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """123 M parameters: CLIP ViT-L's text model."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def main() -> None:
    """Write the folder in float16, complete or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--residual-gain", type=float, default=1.0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_default_dtype(torch.float16 if torch.cuda.is_available() else torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # random numbers for a billion weights
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    with torch.device(device):
        unet, vae, text_encoder = make_unet(), make_vae(), make_text_encoder(tokenizer)
    amplify(unet, args.residual_gain)
    pipeline = StableDiffusionPipeline(
        unet=unet.half(),
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    draft = args.folder.with_name(args.folder.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    pipeline.save_pretrained(draft)
    draft.rename(args.folder)
    print(args.folder)


if __name__ == "__main__":
    main()
