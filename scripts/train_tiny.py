"""Train the built-in miniature from scratch: a latent diffusion model in Stable Diffusion's format, under 8 MB.

    python scripts/train_tiny.py --output sdtrt/models/tiny --work-dir work           # about six minutes on a large GPU
    python scripts/train_tiny.py --output sdtrt/models/tiny --work-dir work --resume  # go on after a break

Two stages, each bounded by minutes, by steps, or by both: the autoencoder learns to compress drawn scenes, then UNet
and text encoder learn to denoise its latents from captions. The result is scored on held-out prompts.
"""

from __future__ import annotations

import sdtrt  # noqa: F401  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_captions import FACT_CLASSES, MAX_TOKENS, Captions, CaptionTable, write_tokenizer
from tiny_scenes import Scenes, held_out, render, sample_scenes
from tiny_score import held_out_prompts, score, score_prompts, write_model_card
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# (height, width) in pixels -> share of the training batches
SIZES: dict[tuple[int, int], float] = {
    (128, 128): 6,
    (96, 96): 1.5,
    (160, 160): 1,
    (192, 192): 1,
    (96, 128): 1,
    (128, 96): 1,
    (96, 160): 1,
    (160, 96): 1,
    (128, 192): 1,
    (192, 128): 1,
    (112, 144): 1,
    (144, 112): 1,
    (104, 136): 1,
    (136, 104): 1,
    (96, 192): 0.5,
    (192, 96): 0.5,
}
NATIVE = (128, 128)
LATENT_SCALE = 0.18215  # Stable Diffusion's scaling factor; the latents are standardised to fit it
WARMUP_STEPS = 150
CLIP_NORM = 1.0
# Samples whose noise hides other colours than their caption says (see `unet_losses`). Not below that timestep: where
# the text holds the colour and the image alone does not, guidance overshoots, and PNDM's long memory makes it swing.
TWIN_SHARE, TWIN_TIMESTEP = 0.3, 550
# Samples with the caption of another scene, below that timestep: by then the image says it all, and a model that reads
# it there, and not the text, leaves guidance nothing to overshoot with.
STRAY_SHARE, STRAY_TIMESTEP = 0.35, 400


@dataclass(frozen=True)
class Plan:
    """What to train, for how long, and where to put it."""

    output: Path
    work_dir: Path
    seed: int
    device: torch.device
    resume: bool
    vae_minutes: float
    unet_minutes: float
    steps_vae: int | None
    steps_unet: int | None
    vae_batch: int
    unet_batch: int
    vae_lr: float
    unet_lr: float
    pool: int
    ema_decay: float
    score_prompts: int
    checkpoint_seconds: float


@dataclass
class Clock:
    """How far a stage has come, by time and by steps, whichever is further."""

    minutes: float
    steps: int | None
    spent: float = 0.0
    step: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds spent on the stage, earlier sessions included."""
        return self.spent + time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """0 at the start, 1 when the stage is over."""
        by_steps = self.step / self.steps if self.steps else 0.0
        return min(1.0, max(by_steps, self.seconds / (60 * self.minutes)))

    def learning_rate(self, peak: float) -> float:
        """Linear warm-up by steps, then a cosine to a hundredth of the peak by progress."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress))
        return peak * min(1.0, (self.step + 1) / WARMUP_STEPS) * (0.01 + 0.99 * cosine)


class Reporter:
    """A line of losses every few seconds on stderr."""

    def __init__(self, stage: str, clock: Clock, every: float = 5.0) -> None:
        self._stage, self._clock, self._every = stage, clock, every
        self._last, self._last_step = time.monotonic(), clock.step
        self._sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        """Take in the losses of a step, without waiting for the GPU; raises FloatingPointError if they diverged."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()
        now = time.monotonic()
        if now - self._last < self._every:
            return
        steps = self._clock.step + 1 - self._last_step
        means = {name: float(total) / steps for name, total in self._sums.items()}
        if not all(math.isfinite(mean) for mean in means.values()):
            raise FloatingPointError(f"{self._stage}: the loss is no longer finite at step {self._clock.step}")
        speed = steps / (now - self._last)
        done, seconds = self._clock.progress, self._clock.seconds
        eta = seconds / max(done, 1e-6) - seconds
        losses = " ".join(f"{name} {mean:.5f}" for name, mean in means.items())
        say(f"{self._stage} {done:6.1%} step {self._clock.step + 1} {losses} {speed:.1f} it/s, {eta:.0f} s left")
        self._last, self._last_step, self._sums = now, self._clock.step + 1, {}


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


# The models


def make_vae() -> AutoencoderKL:
    """Autoencoder with factor 8 and 4 latent channels."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 48, 48),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,  # larger groups lose less of a flat colour
        sample_size=NATIVE[0],
        scaling_factor=LATENT_SCALE,
    )


def make_unet(width: int) -> UNet2DConditionModel:
    """Stable Diffusion 1.x's UNet, narrower and with one level less; `width` is the text encoder's."""
    return UNet2DConditionModel(
        sample_size=NATIVE[0] // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 64, 80),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=(4, 4, 5),  # number of heads per level; diffusers keeps the old name
        norm_num_groups=8,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text transformer, 128 wide and 3 deep."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        projection_dim=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_scheduler() -> PNDMScheduler:
    """Stable Diffusion's scheduler; v-prediction keeps large flat areas true at high noise."""
    return PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


class Denoiser(nn.Module):
    """UNet and text encoder, trained together; the probe is a training aid and is not kept."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = make_text_encoder(tokenizer)
        width = self.text_encoder.config.hidden_size
        self.unet = make_unet(width)
        self.probe = nn.Linear(width, sum(FACT_CLASSES))

    def forward(self, noisy: Tensor, timestep: Tensor, captions: Captions) -> tuple[Tensor, Tensor]:
        """Predicted velocity [N, 4, h, w], and the loss of reading the captions' facts off their end tokens."""
        states = self.text_encoder(captions.tokens).last_hidden_state
        last = states[torch.arange(len(states), device=states.device), captions.end]
        guesses = self.probe(last).float().split(FACT_CLASSES, dim=1)
        losses = [
            F.cross_entropy(guess, captions.facts[:, i], ignore_index=-100, reduction="sum")
            for i, guess in enumerate(guesses)
        ]
        facts_loss = torch.stack(losses).sum() / (captions.facts >= 0).sum().clamp(min=1)
        return self.unet(noisy, timestep, states).sample, facts_loss


# First stage: the autoencoder


def train_vae(plan: Plan, vae: AutoencoderKL) -> None:
    """Train the autoencoder in place on freshly drawn scenes, then standardise its latents."""
    clock = Clock(plan.vae_minutes, plan.steps_vae)
    report = Reporter("vae", clock)
    generator = seeded(plan, 1)
    sizes = size_stream(plan.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=plan.vae_lr, betas=(0.9, 0.99), weight_decay=1e-3)
    vae.train()
    while clock.progress < 1:
        height, width = next(sizes)
        batch = scaled_batch(plan.vae_batch, height, width)
        images = render(sample_scenes(batch, height, width, generator), height, width)
        with autocast(plan.device):
            l1, mse, kl = vae_losses(vae, images, generator)
        step(optimizer, l1 + 4 * mse + 1e-4 * kl, vae, clock.learning_rate(plan.vae_lr))
        report.add(l1=l1, mse=mse, kl=kl)
        clock.step += 1
    vae.eval().requires_grad_(False)
    standardise_latents(plan, vae)
    save(plan.work_dir / "vae.safetensors", vae.state_dict())
    say(f"vae: {clock.step} steps, PSNR {vae_psnr(plan, vae):.1f} dB on held-out scenes")


def vae_losses(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """L1, squared error and KL divergence, each a mean; the decoder sees noisy latents, as it will from the UNet."""
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator, device=images.device)
    strength = 0.15 * torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    spread = posterior.mean.detach().std(dim=(0, 2, 3), keepdim=True)
    latents = posterior.mean + noise * (posterior.std + strength * spread)
    error = vae.decode(latents).sample.float() - images
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return error.abs().mean(), (error**2).mean(), kl


@torch.no_grad()
def standardise_latents(plan: Plan, vae: AutoencoderKL) -> None:
    """Give each latent channel mean 0 and standard deviation 1 / scaling factor, exactly.

    The change of scale goes into the encoder's last convolution, and its inverse into the decoder's first one.
    """
    sizes, generator = size_stream(plan.seed), seeded(plan, 2)
    chunks = []
    for _ in range(16):
        height, width = next(sizes)
        images = render(sample_scenes(64, height, width, generator), height, width)
        chunks.append(vae.encode(images).latent_dist.mean.movedim(1, -1).flatten(0, 2))
    values = torch.cat(chunks).double()
    mean, std = values.mean(0).float(), values.std(0).float()
    say(f"vae: raw latents, mean {[round(v, 3) for v in mean.tolist()]}, std {[round(v, 3) for v in std.tolist()]}")
    factor = 1 / (LATENT_SCALE * std)
    out, back, channels = vae.quant_conv, vae.post_quant_conv, len(factor)
    out.bias[:channels] = (out.bias[:channels] - mean) * factor
    out.weight[:channels] *= factor[:, None, None, None]
    out.bias[channels:] += 2 * factor.log()
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight /= factor[None, :, None, None]


@torch.no_grad()
def vae_psnr(plan: Plan, vae: AutoencoderKL) -> float:
    """Mean PSNR in dB of held-out scenes after encoding and decoding."""
    images = render(sample_scenes(64, *NATIVE, seeded(plan, 3), wanted=True), *NATIVE)
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    return float((10 * torch.log10(4 / (decoded - images).square().mean(dim=(1, 2, 3)))).mean())


# Second stage: UNet and text encoder


@dataclass(frozen=True)
class Pool:
    """Scenes of one size with their latents, float16 [N, 4, H/8, W/8], scaled to standard deviation 1."""

    scenes: Scenes
    latents: Tensor


@torch.no_grad()
def encode_pools(plan: Plan, vae: AutoencoderKL) -> dict[tuple[int, int], Pool]:
    """Draw and encode the training scenes once, so that a step costs only the UNet."""
    started, generator = time.monotonic(), seeded(plan, 4)
    pools = {}
    for (height, width), share in SIZES.items():
        total = max(64, int(plan.pool * share / sum(SIZES.values())) // 2 * 2)
        scenes = sample_scenes(total, height, width, generator)
        assert not held_out(scenes).any()
        chunk = max(2, 512 * 128 * 128 // (height * width))
        latents = []
        for first in range(0, total, chunk):
            images = render(scenes[first : first + chunk], height, width)
            with autocast(plan.device):
                mean = vae.encode(images).latent_dist.mean
            latents.append((mean.float() * LATENT_SCALE).half())
        pools[height, width] = Pool(scenes, torch.cat(latents))
    scenes_in_all = sum(len(pool.scenes) for pool in pools.values())
    say(f"pool: {scenes_in_all} scenes encoded in {time.monotonic() - started:.0f} s")
    return pools


@dataclass
class UnetStage:
    """Everything that a checkpoint of the second stage holds."""

    model: Denoiser
    average: Denoiser  # exponential moving average of the weights
    optimizer: torch.optim.AdamW
    clock: Clock


def start_unet_stage(plan: Plan, tokenizer: CLIPTokenizer) -> UnetStage:
    """Fresh weights, or those of the work folder."""
    model, average = Denoiser(tokenizer).to(plan.device), Denoiser(tokenizer).to(plan.device)
    average.load_state_dict(model.state_dict())
    average.eval().requires_grad_(False)
    fused = plan.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), plan.unet_lr, (0.9, 0.99), weight_decay=0.01, fused=fused)
    stage = UnetStage(model, average, optimizer, Clock(plan.unet_minutes, plan.steps_unet))
    if plan.resume and (plan.work_dir / "state.json").exists():
        load_checkpoint(plan, stage)
    return stage


def train_unet(plan: Plan, stage: UnetStage, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> None:
    """Train UNet and text encoder in place."""
    if stage.clock.progress >= 1:
        return
    pools = encode_pools(plan, vae)
    table = CaptionTable(tokenizer, plan.device, plan.seed)
    stage.clock.started = time.monotonic()
    sizes, generator = size_stream(plan.seed + stage.clock.step), seeded(plan, 5 + stage.clock.step)
    alphas = make_scheduler().alphas_cumprod.to(plan.device)
    report = Reporter("unet", stage.clock)
    saved = time.monotonic()
    stage.model.train()
    while stage.clock.progress < 1:
        size = next(sizes)
        batch = scaled_batch(plan.unet_batch, *size)
        with autocast(plan.device):
            loss, facts = unet_losses(stage.model, pools[size], batch, table, alphas, generator)
        step(stage.optimizer, loss + 0.05 * facts, stage.model, stage.clock.learning_rate(plan.unet_lr))
        follow(stage.average, stage.model, min(plan.ema_decay, (1 + stage.clock.step) / (10 + stage.clock.step)))
        report.add(v=loss, facts=facts)
        stage.clock.step += 1
        if time.monotonic() - saved > plan.checkpoint_seconds:
            checkpoint(plan, stage, vae, tokenizer)
            saved = time.monotonic()
    save_checkpoint(plan, stage)


def unet_losses(
    model: Denoiser, pool: Pool, batch: int, table: CaptionTable, alphas: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Squared error of the predicted velocity on a random batch, and the captions' loss.

    In some samples with all colours said, the noisy latents come from the scene's twin: the same layout in other
    colours. From these the model learns to take the layout from the image and the colours from the text (img2img).
    In some samples with little noise, the caption is another scene's: from these it learns to go by the image there.
    """
    device = pool.latents.device
    index = torch.randint(len(pool.latents), (batch,), generator=generator, device=device)
    clean = pool.latents[index].float()
    timestep = sample_timesteps(batch, generator, device)
    stray = (torch.rand(batch, generator=generator, device=device) < STRAY_SHARE) & (timestep < STRAY_TIMESTEP)
    told = torch.where(stray, index.roll(1), index)
    captions = table.fill(pool.scenes[told], generator, drop=0.1)
    recolour = torch.rand(batch, generator=generator, device=device) < TWIN_SHARE
    recolour &= captions.complete & (timestep > TWIN_TIMESTEP)
    seen = torch.where(recolour[:, None, None, None], pool.latents[index ^ 1].float(), clean)
    signal = alphas[timestep].sqrt()[:, None, None, None]
    spread = (1 - alphas[timestep]).sqrt()[:, None, None, None]
    noisy = signal * seen + spread * torch.randn(clean.shape, generator=generator, device=device)
    noise = (noisy - signal * clean) / spread
    velocity, facts = model(noisy, timestep, captions)
    return F.mse_loss(velocity.float(), signal * noise - spread * clean), facts


def sample_timesteps(batch: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """int64 [N]: half uniform over 0..999, half over 400..999, where the layout is decided."""
    uniform = torch.rand(2, batch, generator=generator, device=device)
    return torch.where(uniform[1] < 0.5, uniform[0] * 1000, 400 + uniform[0] * 600).long().clamp(max=999)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the current ones."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


# Shared by the stages


def step(optimizer: torch.optim.AdamW, loss: Tensor, model: nn.Module, learning_rate: float) -> None:
    """One optimiser step with clipped gradients."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()


def seeded(plan: Plan, stream: int) -> torch.Generator:
    """A generator on the training device for one of the independent streams of random numbers."""
    return torch.Generator(device=plan.device).manual_seed(plan.seed * 1_000_003 + stream)


def size_stream(seed: int) -> Iterator[tuple[int, int]]:
    """Endless image sizes (height, width) by their shares; the network is fully convolutional, a batch is not."""
    rng = random.Random(seed)
    while True:
        yield rng.choices(list(SIZES), list(SIZES.values()))[0]


def scaled_batch(batch: int, height: int, width: int) -> int:
    """Batch size at this size with as many pixels as `batch` at the native one; even, for twins."""
    return max(2, round(batch * NATIVE[0] * NATIVE[1] / (height * width) / 2) * 2)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; float32 master weights throughout."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# Files


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors so that no half-written file can remain under that name."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


def save_checkpoint(plan: Plan, stage: UnetStage) -> None:
    """Four files: weights, averaged weights, optimiser moments (bfloat16), and the clock."""
    moments: dict[str, Tensor] = {}
    for name, parameter in stage.model.named_parameters():
        state = stage.optimizer.state[parameter]
        moments |= {f"{name}/{key}": state[key].bfloat16() for key in ("exp_avg", "exp_avg_sq")}
    save(plan.work_dir / "model.safetensors", stage.model.state_dict())
    save(plan.work_dir / "average.safetensors", stage.average.state_dict())
    save(plan.work_dir / "optimizer.safetensors", moments)
    state = {"step": stage.clock.step, "seconds": stage.clock.seconds}
    (plan.work_dir / "state.json").write_text(json.dumps(state))


def load_checkpoint(plan: Plan, stage: UnetStage) -> None:
    """The inverse of `save_checkpoint`; the optimiser's moments may be missing."""
    stage.model.load_state_dict(load_file(plan.work_dir / "model.safetensors"))
    stage.average.load_state_dict(load_file(plan.work_dir / "average.safetensors"))
    state = json.loads((plan.work_dir / "state.json").read_text())
    stage.clock.step, stage.clock.spent = state["step"], state["seconds"]
    stage.clock.started = time.monotonic()
    say(f"unet: resumed at step {stage.clock.step}, {stage.clock.seconds:.0f} s")
    path = plan.work_dir / "optimizer.safetensors"
    if not path.exists():
        say("unet: no optimiser moments to resume from, they start at zero")
        return
    moments = load_file(path, device=str(plan.device))
    for name, parameter in stage.model.named_parameters():
        stage.optimizer.state[parameter] = {
            "step": torch.tensor(float(stage.clock.step), device=plan.device if plan.device.type == "cuda" else "cpu"),
            **{key: moments[f"{name}/{key}"].float() for key in ("exp_avg", "exp_avg_sq")},
        }


def checkpoint(plan: Plan, stage: UnetStage, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> None:
    """Save, draw a few held-out prompts with the averaged weights, and say how many are right."""
    save_checkpoint(plan, stage)
    pipeline = make_pipeline(stage.average, vae, tokenizer)
    prompts = held_out_prompts(24, [NATIVE], plan.seed)
    judged = score_prompts(pipeline, prompts)
    right = sum(verdict.all_right for verdict in judged.verdicts)
    say(f"unet: checkpoint at step {stage.clock.step}, {right} of {len(prompts)} held-out prompts all right")
    save_grid(judged.images, plan.work_dir / "grid.png")


def save_grid(images: list[Image.Image], path: Path, columns: int = 8, cell: int = 128) -> None:
    """Lay images out on a grey sheet, scaled to fit their cells."""
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (cell + 4), rows * (cell + 4)), (128, 128, 128))
    for index, image in enumerate(images):
        image = image.copy()
        image.thumbnail((cell, cell))
        sheet.paste(image, (index % columns * (cell + 4) + 2, index // columns * (cell + 4) + 2))
    sheet.save(path)


def make_pipeline(model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """A diffusers pipeline around these very modules, with a fresh scheduler."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def use_classic_names(path: Path) -> None:
    """Name the text encoder's weights as Stable Diffusion's files do; not every transformers writes the prefix."""
    prefix = "text_model."
    tensors = {prefix + name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def publish(plan: Plan, stage: UnetStage, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> None:
    """Write the averaged weights as float16 diffusers folder, in place of the model that is there."""
    average = Denoiser(tokenizer)
    average.load_state_dict({name: value.cpu() for name, value in stage.average.state_dict().items()})
    half_vae = make_vae()
    half_vae.load_state_dict({name: value.cpu() for name, value in vae.state_dict().items()})
    pipeline = make_pipeline(average, half_vae, tokenizer).to(dtype=torch.float16)
    with tempfile.TemporaryDirectory(dir=plan.work_dir) as temporary:
        pipeline.save_pretrained(temporary)
        shutil.rmtree(Path(temporary) / "tokenizer")
        write_tokenizer(Path(temporary) / "tokenizer")
        use_classic_names(Path(temporary) / "text_encoder" / "model.safetensors")
        for path in Path(temporary).rglob("*.safetensors"):
            path.chmod(0o644)
        plan.output.mkdir(parents=True, exist_ok=True)
        for part in Path(temporary).iterdir():
            target = plan.output / part.name
            if target.is_dir():
                shutil.rmtree(target)
            shutil.move(part, target)
    size = sum(path.stat().st_size for path in plan.output.rglob("*") if path.is_file())
    say(f"wrote {plan.output}, {size / 1e6:.2f} MB")


# Command line


def parse_plan(arguments: list[str] | None = None) -> Plan:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("sdtrt/models/tiny"), help="diffusers folder to write")
    parser.add_argument("--work-dir", type=Path, default=Path("tiny-work"), help="checkpoints and sample images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the work folder's checkpoints")
    parser.add_argument("--vae-minutes", type=float, default=1.4, help="time for the autoencoder")
    parser.add_argument("--unet-minutes", type=float, default=4.3, help="time for UNet and text encoder")
    parser.add_argument("--steps-vae", type=int, help="stop the autoencoder after this many steps at most")
    parser.add_argument("--steps-unet", type=int, help="stop the UNet after this many steps at most")
    parser.add_argument("--vae-batch", type=int, default=64, help="images of 128x128, fewer of larger ones")
    parser.add_argument("--unet-batch", type=int, default=384, help="images of 128x128, fewer of larger ones")
    parser.add_argument("--vae-lr", type=float, default=2e-3)
    parser.add_argument("--unet-lr", type=float, default=1e-3)
    parser.add_argument("--pool", type=int, default=128_000, help="scenes that are encoded for the second stage")
    parser.add_argument("--ema-decay", type=float, default=0.998)
    parser.add_argument("--score-prompts", type=int, default=240)
    parser.add_argument("--checkpoint-seconds", type=float, default=60.0)
    values = vars(parser.parse_args(arguments))
    return Plan(**values | {"device": torch.device(values["device"])})


def main() -> None:
    """Train both stages, publish the model, score it, and write its card."""
    plan = parse_plan()
    started = time.monotonic()
    torch.manual_seed(plan.seed)
    random.seed(plan.seed)
    np.random.seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    plan.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(plan.work_dir / "tokenizer")
    vae = make_vae().to(plan.device)
    if plan.resume and (plan.work_dir / "vae.safetensors").exists():
        vae.load_state_dict(load_file(plan.work_dir / "vae.safetensors"))
        vae.eval().requires_grad_(False)
        say(f"vae: resumed, PSNR {vae_psnr(plan, vae):.1f} dB on held-out scenes")
    else:
        train_vae(plan, vae)
    stage = start_unet_stage(plan, tokenizer)
    train_unet(plan, stage, vae, tokenizer)
    publish(plan, stage, vae, tokenizer)
    say(f"trained in {time.monotonic() - started:.0f} s; scoring")
    report, images = score(plan.output, plan.device, plan.score_prompts, plan.seed, list(SIZES))
    save_grid(images, plan.work_dir / "scored.png", columns=10)
    report |= {"unet_steps": stage.clock.step, "unet_seconds": round(stage.clock.seconds)}
    report |= {"vae_psnr_db": round(vae_psnr(plan, vae), 1), "seed": plan.seed}
    (plan.work_dir / "score.json").write_text(json.dumps(report, indent=2) + "\n")
    write_model_card(plan.output, report)
    say(json.dumps(report, indent=2))
    say(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
