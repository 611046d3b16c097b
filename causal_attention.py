"""Attention over time that looks only back.

At every pixel of the feature map the T frames form a short sequence. Self-attention over it keeps
the scene consistent from frame to frame. A world model keeps the layer and adds the causal mask of
a language model:

                 key frame            Frame t attends to frames 0 .. t. No weight changes: a softmax
                 0  1  2  3           over fewer frames is still a softmax, so pretrained queries,
       query  0  ■                    keys and values mean what they meant before.
       frame  1  ■  ■
              2  ■  ■  ■              There is no positional encoding of time: order reaches the
              3  ■  ■  ■  ■           network through the convolutions (causal_conv.py) alone.

In a rollout the keys and values of finished frames are cached, as in a language model, and only the
new frame has a query (temporal/streaming.py).

    python causal_attention.py        shows the weights with and without the mask

Paper: section 4.1. The classes carry DynamiCrafter's parameter names: its weights load as they are.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamicrafter.layers import FeedForward, merge_heads, split_heads, zero_init
from temporal.norm import TemporalNorm
from temporal.streaming import Cache, stream_attention


class Attention(nn.Module):
    """Multi-head self-attention; if `causal`, each position sees itself and those before it.

    softmax(q kᵀ / √d + M) v, M[t, s] = -∞ for s > t. Paper: section 4.1.
    """

    def __init__(self, channels: int, heads: int, head_channels: int, causal: bool = False):
        super().__init__()
        inner = heads * head_channels
        self.heads, self.causal = heads, causal
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, channels))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # [N, L, C]
        q = split_heads(self.to_q(x), self.heads)  # [N, heads, L, d]
        k = split_heads(self.to_k(x), self.heads)
        v = split_heads(self.to_v(x), self.heads)
        if cache is not None:  # new frames alone: temporal/streaming.py
            attended = stream_attention(self, q, k, v, cache)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.to_out(merge_heads(attended))


class TemporalBlock(nn.Module):
    """Two self-attentions over time and a feed-forward, each normalised and added to its input."""

    def __init__(self, channels: int, heads: int, head_channels: int, causal: bool):
        super().__init__()
        self.attn1 = Attention(channels, heads, head_channels, causal)
        self.attn2 = Attention(channels, heads, head_channels, causal)
        self.ff = FeedForward(channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # [N, T, C]
        x = x + self.attn1(self.norm1(x), cache)
        x = x + self.attn2(self.norm2(x), cache)
        return x + self.ff(self.norm3(x))


class PointwiseConv1d(nn.Conv1d):
    """A linear layer that DynamiCrafter stores as a convolution of kernel 1."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:  # [..., C]
        return F.linear(x, self.weight.squeeze(-1), self.bias)


class TemporalTransformer(nn.Module):
    """Attention over time at every pixel, as a residual: norm, projection in, block, projection
    out. From scratch the projection out is zero, so that a new transformer changes nothing.
    """

    def __init__(self, channels: int, heads: int, head_channels: int, causal: bool, norm_scope: str,
                 projection: type[nn.Module] = nn.Linear):
        super().__init__()
        inner = heads * head_channels
        self.norm = TemporalNorm(32, channels, eps=1e-6, scope=norm_scope)
        self.proj_in = projection(channels, inner)
        block = TemporalBlock(inner, heads, head_channels, causal)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = zero_init(projection(inner, channels))

    def forward(self, x: Tensor, conditions) -> Tensor:
        """x [B·T, C, H, W] -> the same. Of the conditions (unet.py), `.frames` is T, `.cache` that
        of the frames before."""
        clip = x.unflatten(0, (-1, conditions.frames)).transpose(1, 2)  # [B, C, T, H, W]
        B, C, T, H, W = clip.shape
        h = self.norm(clip, conditions.cache).permute(0, 3, 4, 2, 1)  # [B, H, W, T, C]
        h = self.proj_in(h.flatten(0, 2))  # [B·H·W, T, C]: a sequence of frames at every pixel
        for block in self.transformer_blocks:
            h = block(h, conditions.cache)
        h = self.proj_out(h).view(B, H, W, T, C)
        return x + h.permute(0, 3, 4, 1, 2).flatten(0, 1)  # [B·T, C, H, W]


def demo() -> None:
    """The weights of one head over four frames, and streaming against the whole clip."""
    torch.manual_seed(0)
    attention, x = Attention(8, 1, 8, causal=True), torch.randn(1, 4, 8)
    scores = attention.to_q(x) @ attention.to_k(x).transpose(1, 2) / 8**0.5  # [1, 4, 4]
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    full = scores.softmax(dim=-1)[0].tolist()
    masked = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)[0].tolist()
    print("query frame    weights without the mask        with it")
    for t in range(4):
        rows = ("  ".join(f"{weight:.2f}" for weight in row[t]) for row in (full, masked))
        print(f"{t:11}    {'          '.join(rows)}")
    cache, streamed = Cache(capacity=4), []
    for t in range(4):
        cache.begin(frames=1)
        streamed.append(attention(x[:, t : t + 1], cache))
        cache.commit()
    difference = (torch.cat(streamed, dim=1) - attention(x)).abs().max().item()
    print(f"frame by frame with a cache, against the whole clip: they differ by {difference:.1f}")


if __name__ == "__main__":
    with torch.no_grad():
        demo()
