"""DIAMOND: a world model without a pretrained one, in pixels, for comparison.

    python -m baselines.train_diamond --data csgo --minutes 60 --out runs/diamond
    python -m evaluation.game --diamond runs/diamond/checkpoint.pt

Alonso et al. 2024 (arXiv 2405.12399). Vid2World bends a video model; DIAMOND trains an image model
from scratch. It sees the last four frames as more channels of one picture, and the actions taken at
them as a vector that scales and shifts every normalised feature map:

    frames  t-4 t-3 t-2 t-1  ┐                        actions t-4 … t-1 ┐
    noisy frame  t           ┴▶ 15 channels ─▶ U-Net ◀─ scale and shift ┴ noise levels

Its diffusion is EDM's (Karras et al. 2022): frame + σ · noise, for any σ, and a network whose input
and output are scaled so that both have unit variance whatever σ is.

Two things keep a rollout from drifting away. In training a clip goes on from the network's own
predictions, as a rollout does. And the past frames are given with noise as well, whose level the
network is told, so that it learns not to trust them to the last pixel.

Sampling takes few Euler steps: one ("fast") or three ("hq"). At full size an upsampler follows; at
64×80 pixels there is nothing to upsample. The network, its start, the noise and the loss are those
of the released code (eloialonso/diamond, branch csgo); its widths are smaller.
"""
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.vid2world import to_frames, to_pixels
from support.errors import RequestError

PAST = 4  # frames that the network sees
SIGMA_DATA, OFFSET = 0.5, 0.1  # standard deviation of pixels; noise shared by a colour channel
STEPS = {"fast": 1, "hq": 3}


@dataclass(frozen=True)
class DiamondConfig:
    action_dim: int
    size: tuple[int, int] = (64, 80)  # multiples of 2 ** (levels - 1)
    channels: tuple[int, ...] = (32, 64, 96, 128)  # multiples of 32; 7.2 M parameters
    attention: tuple[bool, ...] = (False, False, True, True)
    blocks: int = 2
    cond: int = 256  # width of the vector that actions and noise levels make


# --------------------------------------------------------------------------------------------------
# The network


def groups(channels: int) -> int:
    """Channels are normalised 32 at a time."""
    return max(1, channels // 32)


class AdaptiveNorm(nn.Module):
    """A GroupNorm whose scale and shift come from the conditions."""

    def __init__(self, channels: int, cond: int):
        super().__init__()
        self.linear = nn.Linear(cond, 2 * channels)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.linear(cond)[:, :, None, None].chunk(2, dim=1)
        return F.group_norm(x, groups(x.shape[1])) * (1 + scale) + shift


class Block(nn.Module):
    """Two conditioned 3×3 convolutions as a residual, and attention among the pixels."""

    def __init__(self, channels_in: int, channels: int, cond: int, attention: bool):
        super().__init__()
        self.norm1, self.norm2 = AdaptiveNorm(channels_in, cond), AdaptiveNorm(channels, cond)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        self.skip = nn.Identity()
        if channels_in != channels:
            self.skip = nn.Conv2d(channels_in, channels, 1)
        self.heads = channels // 8 if attention else 0
        if attention:
            self.norm = nn.GroupNorm(groups(channels), channels)
            self.qkv, self.out = (nn.Conv2d(channels, n * channels, 1) for n in (3, 1))
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x, cond)))
        x = self.skip(x) + self.conv2(F.silu(self.norm2(h, cond)))
        if self.heads:
            x = self.norm(x)  # and stays so: as published, the residual is the normalised one
            qkv = self.qkv(x).flatten(2).unflatten(1, (3, self.heads, -1))
            q, k, v = qkv.transpose(-1, -2).unbind(1)  # [B, heads, H·W, 8]
            attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
            x = x + self.out(attended.reshape(x.shape))
        return x


class Waves(nn.Module):
    """A number as sines and cosines of random frequencies."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width // 2))

    def forward(self, value: Tensor) -> Tensor:  # [B] -> [B, width]
        angles = 2 * math.pi * value[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Diamond(nn.Module):
    """Predicts a frame from a noisy one, the four before, and the actions taken at those."""

    def __init__(self, config: DiamondConfig):
        super().__init__()
        self.config, cond, widths = config, config.cond, config.channels
        self.noise, self.past_noise = Waves(cond), Waves(cond)
        # a row for each number of an action, as loud as the waves
        self.action = nn.Parameter(torch.randn(config.action_dim, cond // PAST))
        self.mix = nn.Sequential(nn.Linear(cond, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.first = nn.Conv2d(3 * (PAST + 1), widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        above = widths[0]
        for width, attention in zip(widths, config.attention, strict=True):
            block = partial(Block, cond=cond, attention=attention)
            halve, double = nn.Identity(), nn.Identity()
            if self.down:  # not at the first level
                halve = nn.Conv2d(above, above, 3, stride=2, padding=1)
                nn.init.orthogonal_(halve.weight)
            if len(self.down) < len(widths) - 1:
                double = nn.Sequential(nn.Upsample(scale_factor=2),
                                       nn.Conv2d(width, width, 3, padding=1))
            same = range(config.blocks - 1)
            self.down.append(nn.ModuleList([halve, block(above, width),
                                            *(block(width, width) for _ in same)]))
            # the way up takes the output of each block, the last one first, then their input
            self.up.insert(0, nn.ModuleList([
                double, *(block(2 * width, width) for _ in range(config.blocks)),
                block(width + above, above)]))
            above = width
        self.middle = nn.ModuleList(Block(above, above, cond, True) for _ in range(2))
        self.norm = nn.GroupNorm(groups(widths[0]), widths[0])
        self.last = nn.Conv2d(widths[0], 3, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, noisy: Tensor, sigma: Tensor, past: Tensor, past_sigma: Tensor,
                actions: Tensor) -> Tensor:
        """noisy [B, 3, H, W], sigma [B], past [B, 4, 3, H, W], past_sigma [B], actions [B, 4, A]
        -> the clean frame [B, 3, H, W], pixels in [-1, 1]."""
        total = (sigma**2 + OFFSET**2).sqrt()
        root = (total**2 + SIGMA_DATA**2).sqrt()
        c_in, c_skip, c_out = (c[:, None, None, None] for c in (
            1 / root, SIGMA_DATA**2 / root**2, total * SIGMA_DATA / root))
        cond = self.mix(self.noise(total.log() / 4) + self.past_noise(past_sigma.log() / 4)
                        + (actions @ self.action).flatten(1))
        h = self.first(torch.cat([past.flatten(1, 2) / SIGMA_DATA, c_in * noisy], dim=1))
        skips = []
        for halve, *blocks in self.down:
            skips.append(h := halve(h))
            for block in blocks:
                skips.append(h := block(h, cond))
        for block in self.middle:
            h = block(h, cond)
        for double, *blocks in self.up:
            h = double(h)
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), cond)
        return c_skip * noisy + c_out * self.last(F.silu(self.norm(h)))


# --------------------------------------------------------------------------------------------------
# Diffusion


def add_noise(frames: Tensor, sigma: Tensor) -> Tensor:
    """Frames [B, 3 or 4·3, H, W] and noise, a little of which a whole channel shares."""
    B, C, H, W = frames.shape
    shared, own = torch.randn(B, C, 1, 1), torch.randn(B, C, H, W)
    return frames + OFFSET * shared + sigma[:, None, None, None] * own


def draw_sigma(n: int) -> Tensor:
    """Noise levels of training: log-normal, as published for CS:GO."""
    return (1.2 * torch.randn(n) - 1.2).exp().clamp(2e-3, 20)


def rounded(frames: Tensor) -> Tensor:
    """As a picture of 8 bits would hold them."""
    return ((frames.clamp(-1, 1) + 1) * 127.5).floor() / 127.5 - 1


def loss_of(network: Diamond, pixels: Tensor, actions: Tensor) -> Tensor:
    """Of clips [B, T, 3, H, W], T > 4, and the actions [B, T, A] taken at their frames. From the
    fifth frame on, each is predicted from the four before, those predicted earlier included."""
    pixels, losses = list(pixels.unbind(1)), []
    for t in range(PAST, len(pixels)):
        sigma, past_sigma = draw_sigma(len(actions)), draw_sigma(len(actions))
        past = add_noise(torch.cat(pixels[t - PAST : t], dim=1), past_sigma)
        clean = network(add_noise(pixels[t], sigma), sigma, past.unflatten(1, (PAST, 3)),
                        past_sigma, actions[:, t - PAST : t])
        total = sigma**2 + OFFSET**2  # the error of the network's own output, before c_out
        weight = (total + SIGMA_DATA**2) / (total * SIGMA_DATA**2)
        losses.append((weight * (clean - pixels[t]).square().mean((1, 2, 3))).mean())
        pixels[t] = rounded(clean.detach())
    return torch.stack(losses).mean()


def noise_levels(steps: int, largest: float = 5.0, smallest: float = 2e-3, rho: float = 7
                 ) -> list[float]:
    """From the largest to the smallest, then 0 (Karras et al., equation 5)."""
    ends = torch.tensor([largest, smallest], dtype=torch.float64) ** (1 / rho)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return [*((ends[0] + ramp * (ends[1] - ends[0])) ** rho).tolist(), 0.0]


class DiamondWorld:
    """An environment that is imagined, as `sample.WorldModel` is: reset(frames, actions), step."""

    def __init__(self, network: Diamond, steps: int = 3, seed: int = 0, past_noise: float = 0.005):
        self.network, self.steps, self.seed = network.eval(), steps, seed
        self.past_noise = past_noise

    @torch.inference_mode()
    def reset(self, frames: np.ndarray, actions: np.ndarray) -> None:
        """frames uint8 [B, T0, H, W, 3], at the network's size, actions [B, T0 - 1, A]."""
        if frames.shape[1] < PAST:
            raise RequestError(f"{frames.shape[1]} frames are given; DIAMOND needs {PAST}")
        self.generator = torch.Generator().manual_seed(self.seed)
        self.past = to_pixels(torch.from_numpy(frames[:, -PAST:].copy()))
        self.actions = torch.from_numpy(actions[:, -(PAST - 1) :].copy()).float()

    @torch.inference_mode()
    def step(self, action: np.ndarray) -> np.ndarray:
        """Take an action [B, A]; gives the next frame, uint8 [B, H, W, 3]."""
        actions = torch.cat([self.actions, torch.from_numpy(action).float()[:, None]], dim=1)
        B, _, _, H, W = self.past.shape
        # as published: noise of standard deviation 1, though the first level is 5
        x = torch.randn(B, 3, H, W, generator=self.generator)
        past_sigma = torch.full((B,), self.past_noise)
        levels, past = noise_levels(self.steps), self.past
        for sigma, smaller in zip(levels, levels[1:], strict=False):
            # as published: every step adds noise to the past, and is told of its own alone
            past = past + self.past_noise * torch.randn(past.shape, generator=self.generator)
            clean = rounded(self.network(x, torch.full((B,), sigma), past, past_sigma, actions))
            x = x + (x - clean) / sigma * (smaller - sigma)  # Euler
        self.past = torch.cat([self.past[:, 1:], x[:, None]], dim=1)
        self.actions = actions[:, 1:]
        return to_frames(x[:, None])[:, 0]
