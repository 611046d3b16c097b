"""Stable Diffusion's autoencoder: 8×8 pixels become one latent of 4 numbers, frame by frame.

Diffusion happens in its latents, where a frame is 64 times smaller. It is inherited and stays
frozen. Parameter names are those of the checkpoint, below `first_stage_model.`.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamicrafter.layers import Upsample


@dataclass(frozen=True)
class AutoencoderConfig:
    channels: int = 128
    # halves the resolution at every entry but the last
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 4
    latent_scale: float = 0.18215  # brings the latents to unit standard deviation

    @property
    def factor(self) -> int:
        return 2 ** (len(self.channel_mult) - 1)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.norm1, self.norm2 = norm(channels_in), norm(channels)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        if channels_in != channels:
            self.nin_shortcut = nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PixelAttention(nn.Module):
    """Self-attention among the pixels of a frame, one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        h = self.norm(x)
        # [N, HW, C]
        q, k, v = (to(h).flatten(2).transpose(1, 2) for to in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(h.transpose(1, 2).view_as(x))


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = PixelAttention(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only


def level(channels_in: int, channels: int, blocks: int) -> nn.Module:
    """A resolution level; `downsample` or `upsample` is added where there is a next one."""
    module = nn.Module()
    module.block = nn.ModuleList(ResnetBlock(channels_in if i == 0 else channels, channels)
                                 for i in range(blocks))
    return module


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, multiplier in enumerate(config.channel_mult):
            self.down.append(level(channels, multiplier * config.channels, config.num_res_blocks))
            channels = multiplier * config.channels
            if i < len(config.channel_mult) - 1:
                self.down[i].downsample = Downsample(channels)
        self.mid = Middle(channels)
        self.norm_out = norm(channels)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.channel_mult[-1] * config.channels
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = Middle(channels)
        stages = []  # from the lowest resolution up, one more block per level than the encoder
        for i, multiplier in reversed(list(enumerate(config.channel_mult))):
            stages.append(level(channels, multiplier * config.channels, config.num_res_blocks + 1))
            channels = multiplier * config.channels
            if i > 0:
                stages[-1].upsample = Upsample(channels)
        # the checkpoint counts levels from the highest resolution
        self.up = nn.ModuleList(reversed(stages))
        self.norm_out = norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


AT_ONCE = 2**20  # pixels: a clip of 16 large frames at once would take several GB


class Autoencoder(nn.Module):
    def __init__(self, config: AutoencoderConfig = AutoencoderConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] in [-1, 1] -> [N, 2·C, H/f, W/f]: the posterior's mean and log-variance."""
        return self.quant_conv(self.encoder(pixels))

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, T, 3, H, W] in [-1, 1] -> latents [B, T, C, h, w] of about unit standard deviation.

        noise  standard Gaussian, in the latents' shape: a sample of the posterior; None: its mean
        """
        moments = self.frames_at_a_time(self.moments, pixels, pixels[0, 0, 0].numel())
        mean, log_variance = moments.chunk(2, dim=2)  # [B, T, C, h, w]
        if noise is not None:
            mean = mean + noise * (0.5 * log_variance.clamp(-30, 20)).exp()
        return mean * self.config.latent_scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> pixels [B, T, 3, H, W], about [-1, 1]."""
        pixels = latents[0, 0, 0].numel() * self.config.factor**2
        return self.frames_at_a_time(lambda z: self.decoder(self.post_quant_conv(z)),
                                     latents / self.config.latent_scale, pixels)

    def frames_at_a_time(self, work: Callable[[Tensor], Tensor], x: Tensor, pixels: int) -> Tensor:
        """Work on the frames of x [B, T, ...], which have so many pixels each."""
        frames = x.flatten(0, 1).split(max(1, AT_ONCE // pixels))
        return torch.cat([work(some) for some in frames]).unflatten(0, x.shape[:2])

