"""Write a diffusers folder with random weights and the architecture of Stable Diffusion 1.5, SDXL, or a latent
consistency model with a tiny VAE: for timing, where no checkpoint can be had. Speed does not depend on the values of
weights; pictures and fidelity do.

    python scripts/make_random_model.py FOLDER
    python scripts/make_random_model.py FOLDER --residual-gain 16
    python scripts/make_random_model.py FOLDER --architecture sdxl --vae-gain 1e5
    python scripts/make_random_model.py FOLDER --architecture lcm

The UNet's activations then are of the order of 1, and a trained model's are larger: what each layer adds to the last
one's result grows in training. `--residual-gain` multiplies that. With 16, the layers' results have a standard
deviation of 5 to 50 and go up to 260 (at 128x128; with 1: 0.5 and 4), which is where variances in fp16 would begin to
overflow. `--vae-gain` is the VAE's: with 1e5 it leaves fp16, as SDXL's does.
"""

from __future__ import annotations

import sdtrt  # noqa: F401  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

RESIDUAL_ENDS = ("conv2", "to_out.0", "net.2", "proj_out")  # what the UNet's residual branches end with
VAE_ENDS = ("conv_in", "conv2", "to_out.0")  # and what adds to the stream of the VAE, whose every reader is a norm
TOKENIZER = (
    Path(__file__).resolve().parents[1] / "sdtrt" / "models" / "tiny" / "tokenizer"
)  # CLIP's own 49 408 words need a hub


def make_unet(**config: Any) -> UNet2DConditionModel:
    """860 M parameters."""
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
        **config,
    )


def make_xl_unet() -> UNet2DConditionModel:
    """2.6 billion parameters."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def amplify(module: torch.nn.Module, gain: float, ends: tuple[str, ...] = RESIDUAL_ENDS) -> None:
    """Multiply what a module's residual branches add."""
    with torch.no_grad():
        for name, layer in module.named_modules():
            if name.endswith(ends):
                for parameter in layer.parameters():
                    parameter *= gain


def make_vae(sample_size: int = 512, **config: Any) -> AutoencoderKL:
    """84 M parameters, factor 8."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=sample_size,
        **config,
    )


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int, **config: Any) -> CLIPTextConfig:
    """A CLIP text model's configuration."""
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **config,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """123 M parameters: CLIP ViT-L's text model."""
    return CLIPTextModel(text_config(tokenizer, 768, 12, 12))


def make_text_encoder_2(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """695 M parameters: OpenCLIP ViT-bigG's text model."""
    return CLIPTextModelWithProjection(text_config(tokenizer, 1280, 32, 20, hidden_act="gelu"))


def make_pipeline(tokenizer: CLIPTokenizer, gain: float, device: str) -> DiffusionPipeline:
    """Stable Diffusion 1.5, in float16."""
    with torch.device(device):
        unet, vae, text_encoder = make_unet(), make_vae(), make_text_encoder(tokenizer)
    amplify(unet, gain)
    return StableDiffusionPipeline(
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


def make_xl_pipeline(tokenizer: CLIPTokenizer, gain: float, device: str) -> DiffusionPipeline:
    """SDXL, in float16."""
    with torch.device(device):
        unet, vae = make_xl_unet(), make_vae(1024, scaling_factor=0.13025, force_upcast=True)
        text_encoder, text_encoder_2 = make_text_encoder(tokenizer), make_text_encoder_2(tokenizer)
    amplify(unet, gain)
    return StableDiffusionXLPipeline(
        unet=unet.half(),
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        text_encoder_2=text_encoder_2.half(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


def make_lcm_pipeline(tokenizer: CLIPTokenizer, gain: float, device: str) -> DiffusionPipeline:
    """Stable Diffusion 1.5 distilled to few steps, as LCM Dreamshaper is, with TAESD's architecture, in float16."""
    with torch.device(device):
        unet, vae, text_encoder = make_unet(time_cond_proj_dim=256), AutoencoderTiny(), make_text_encoder(tokenizer)
    amplify(unet, gain)
    return LatentConsistencyModelPipeline(
        unet=unet.half(),
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        scheduler=LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


PIPELINES = {"sd15": make_pipeline, "sdxl": make_xl_pipeline, "lcm": make_lcm_pipeline}


def main() -> None:
    """Write the folder in float16, complete or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--architecture", choices=PIPELINES, default="sd15")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--residual-gain", type=float, default=1.0)
    parser.add_argument("--vae-gain", type=float, default=1.0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_default_dtype(torch.float16 if torch.cuda.is_available() else torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # random numbers for a billion weights
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    pipeline: Any = PIPELINES[args.architecture](tokenizer, args.residual_gain, device)
    amplify(pipeline.vae, args.vae_gain, VAE_ENDS)
    draft = args.folder.with_name(args.folder.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    pipeline.save_pretrained(draft)
    draft.rename(args.folder)
    print(args.folder)


if __name__ == "__main__":
    main()
