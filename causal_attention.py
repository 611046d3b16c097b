"""Attention over time that looks only back.

At every pixel of the feature map the T frames form a short sequence, and each frame asks the others what
they know: that is how DynamiCrafter keeps a scene consistent. A world model keeps the question and forbids
the answers from the future, with the mask of a language model:

                 key frame                 Frame t attends to frames 0 .. t. No weight changes: a softmax
                 0  1  2  3                over fewer frames is still a softmax, so the pretrained queries,
       query  0  ■                         keys and values mean what they meant before.
       frame  1  ■  ■
              2  ■  ■  ■                   There is no positional encoding of time; order reaches the
              3  ■  ■  ■  ■                network through the convolutions (causal_conv.py) alone.

In a rollout the keys and values of frames that are done are kept (`Cache`, causal_conv.py), as a language model keeps
those of the words so far, and only the new frame asks.

Paper: section 4.1. The classes carry DynamiCrafter's parameter names, so its weights load as they are.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_conv import Cache, TemporalNorm


class Attention(nn.Module):
    """Multi-head self-attention, each position seeing itself and those before it if `causal`."""

    def __init__(self, channels: int, heads: int, head_channels: int, causal: bool = False):
        super().__init__()
        inner = heads * head_channels
        self.heads, self.causal = heads, causal
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, channels))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # [N, L, C]
        q, k, v = (split_heads(to(x), self.heads) for to in (self.to_q, self.to_k, self.to_v))  # [N, heads, L, d]
        sees = None
        if cache is not None:
            k, v = self.past_and_present(cache, k, v)  # [N, heads, past + L, d]
            sees = cache.sees(x.shape[1], x.device)
        if sees is not None and len(sees) <= 3:
            return self.to_out(merge_heads(attend_plainly(q, k, v, sees)))
        return self.to_out(merge_heads(F.scaled_dot_product_attention(q, k, v, sees, is_causal=self.causal and sees is None)))

    def past_and_present(self, cache: Cache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind the remembered ones. A pass that does not append leaves the count of
        frames as it was, so that the next pass writes over what it wrote."""
        if self not in cache:
            N, heads, _, d = k.shape
            cache[self] = [k.new_empty(N, heads, cache.capacity + 1, d) for _ in range(2)]
        end = cache.frames + k.shape[2]
        for buffer, new in zip(cache[self], (k, v)):
            buffer[:, :, cache.frames : end] = new
        keys, values = cache[self]
        return keys[:, :, :end], values[:, :, :end]


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    """Attention written out: for a few queries at each of thousands of pixels, the fused kernel's overhead is the cost."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # [N, heads, L, past + L]
    return scores.masked_fill(~sees, -torch.inf).softmax(dim=-1) @ v


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [N, L, heads·d] -> [N, heads, L, d]


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [N, heads, L, d] -> [N, L, heads·d]


class GEGLU(nn.Module):
    """One linear layer for value and gate; the gate goes through an exact GELU."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = (F.linear(x, *half) for half in zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2)))
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        # DynamiCrafter has a dropout of 0 in the middle; the Identity keeps its place in the parameter names.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TemporalBlock(nn.Module):
    """Two self-attentions over time and a feed-forward, each behind a LayerNorm and added to its input."""

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
    """Attention over time at every pixel, as a residual: norm, projection in, block, projection out.

    From scratch the projection out is zero, so that a new transformer changes nothing.
    """

    def __init__(self, channels: int, heads: int, head_channels: int, causal: bool, norm_scope: str,
                 projection: type[nn.Module] = nn.Linear):
        super().__init__()
        inner = heads * head_channels
        self.norm = TemporalNorm(32, channels, eps=1e-6, scope=norm_scope)
        self.proj_in = projection(channels, inner)
        self.transformer_blocks = nn.ModuleList([TemporalBlock(inner, heads, head_channels, causal)])
        self.proj_out = projection(inner, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # [B, C, T, H, W]
        B, C, T, H, W = x.shape
        h = self.norm(x, cache).permute(0, 3, 4, 2, 1).flatten(0, 2)  # [B·H·W, T, C], a sequence of frames at every pixel
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, cache)
        h = self.proj_out(h)
        return x + h.view(B, H, W, T, C).permute(0, 4, 3, 1, 2)
