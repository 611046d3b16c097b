"""The resampler: 257 tokens of the anchor image in, 16 tokens for each of 16 frames out.

Learned queries ask the image tower's tokens (a perceiver). The first 16 answers belong to time slot
0, the next to slot 1, and so on. Inherited, and trained along with the U-Net. Parameter names are
those of the checkpoint, below `image_proj_model.`.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamicrafter.layers import merge_heads, split_heads


@dataclass(frozen=True)
class ResamplerConfig:
    dim: int = 1024
    depth: int = 4
    heads: int = 12
    head_channels: int = 64
    num_queries: int = 16  # per time slot
    embedding_dim: int = 1280  # the image tower's width
    output_dim: int = 1024
    num_frames: int = 16


class PerceiverAttention(nn.Module):
    """Queries attend to the image's tokens and to each other."""

    def __init__(self, dim: int, heads: int, head_channels: int):
        super().__init__()
        inner = heads * head_channels
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        tokens, queries = self.norm1(tokens), self.norm2(queries)
        k, v = self.to_kv(torch.cat([tokens, queries], dim=1)).chunk(2, dim=-1)
        q, k, v = (split_heads(x, self.heads) for x in (self.to_q(queries), k, v))
        return self.to_out(merge_heads(F.scaled_dot_product_attention(q, k, v)))


def feed_forward(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(),
                         nn.Linear(4 * dim, dim, bias=False))


class Resampler(nn.Module):
    def __init__(self, config: ResamplerConfig = ResamplerConfig()):
        super().__init__()
        self.config = config
        dim = config.dim
        self.latents = nn.Parameter(torch.randn(1, config.num_queries * config.num_frames,
                                                dim) * dim**-0.5)
        self.proj_in = nn.Linear(config.embedding_dim, dim)
        self.proj_out = nn.Linear(dim, config.output_dim)
        self.norm_out = nn.LayerNorm(config.output_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, config.heads, config.head_channels),
                           feed_forward(dim)])
            for _ in range(config.depth))

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, 257, embedding_dim] -> [N, slots · 16, output_dim], slot after slot."""
        tokens = self.proj_in(tokens)
        queries = self.latents.expand(len(tokens), -1, -1)
        for attention, feed in self.layers:
            queries = queries + attention(tokens, queries)
            queries = queries + feed(queries)
        return self.norm_out(self.proj_out(queries))

