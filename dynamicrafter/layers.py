"""Small layers that several inherited networks share, with DynamiCrafter's parameter names."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def zero_init(layer: nn.Module) -> nn.Module:
    """Start at zero, so that a new residual branch changes nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def sinusoidal_embedding(value: Tensor, dim: int) -> Tensor:
    """[...] -> [..., dim]: cosines, then sines (Vaswani et al. 2017, section 3.5)."""
    half = dim // 2
    frequencies = (-math.log(10000) * torch.arange(half, device=value.device) / half).exp()
    angles = value[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [N, L, heads·d] -> [N, heads, L, d]


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [N, heads, L, d] -> [N, L, heads·d]


class GEGLU(nn.Module):
    """One linear layer for value and gate; the gate goes through an exact GELU (Shazeer 2020)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        # DynamiCrafter's dropout of 0 in the middle: Identity keeps its place in parameter names
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(),
                                 nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Every pixel asks two sources, the caption, which all frames of a clip share, and the image
    tokens of its frame; the answers are added."""

    def __init__(self, channels: int, heads: int, head_channels: int, context_dim: int):
        super().__init__()
        inner = heads * head_channels
        self.heads = heads
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_k_ip = nn.Linear(context_dim, inner, bias=False)
        self.to_v_ip = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, channels))

    # [B, 77, D], [B, T, L, D]
    def project(self, text: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of both sources: one projection serves all denoising steps."""
        image = image.flatten(0, 1)  # [B·T, L, D]
        return self.to_k(text), self.to_v(text), self.to_k_ip(image), self.to_v_ip(image)

    def forward(self, x: Tensor, context: tuple[Tensor, ...]) -> Tensor:  # [B·T, HW, C]
        k_text, v_text, k_image, v_image = context
        q = self.to_q(x)
        q_of_clip = q.view(len(k_text), -1, q.shape[-1])  # [B, T·HW, heads·d]
        from_text = self.attend(q_of_clip, k_text, v_text).view_as(q)
        return self.to_out(from_text + self.attend(q, k_image, v_image))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (split_heads(x, self.heads) for x in (q, k, v))
        return merge_heads(F.scaled_dot_product_attention(*heads))


class InputConv(nn.Conv2d):
    """The first convolution of the U-Net. Like the two below, it needs no conditions."""

    def forward(self, x: Tensor, *_) -> Tensor:
        return super().forward(x)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, *_) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, *_) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class HeightCausalConv2d(nn.Conv2d):
    """The released Vid2World's output convolution, which takes image *height* for time: it pads two
    rows on top and none below. The released weights were trained around that, so they need it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 2, 0)))
