"""Attention over time that looks only back.

At every pixel of the feature map the T frames form a short sequence, and each frame asks the others
what they know: that is how DynamiCrafter keeps a scene consistent. A world model keeps the question
and forbids the answers from the future, with the mask of a language model:

                 key frame            Frame t attends to frames 0 .. t. No weight changes: a softmax
                 0  1  2  3           over fewer frames is still a softmax, so pretrained queries,
       query  0  ■                    keys and values mean what they meant before.
       frame  1  ■  ■
              2  ■  ■  ■              There is no positional encoding of time: order reaches the
              3  ■  ■  ■  ■           network through the convolutions (causal_conv.py) alone.

In a rollout the keys and values of finished frames are kept, as a language model keeps those of the
words so far, and only the new frame asks (temporal/cache.py).

    python causal_attention.py        shows the weights with and without the mask

Paper: section 4.1. The classes carry DynamiCrafter's parameter names: its weights load as they are.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamicrafter.layers import FeedForward, merge_heads, split_heads, zero_init
from temporal.cache import Cache
from temporal.norm import TemporalNorm


class Attention(nn.Module):
    """Multi-head self-attention; if `causal`, each position sees itself and those before it."""

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
        if cache is None:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            k, v = self.past_and_present(k, v, cache)  # [N, heads, past + L, d]
            attended = attend_past(q, k, v, cache.sees(x.device))
        return self.to_out(merge_heads(attended))

    def past_and_present(self, k: Tensor, v: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """Keys and values of the remembered frames and of the new ones, in buffers of the cache's
        capacity.

        The new ones are written behind the remembered ones; those of an alternative, or of a pass
        that failed, are overwritten by the next pass.
        """
        N, heads, L, d = k.shape
        room = cache.capacity + 1  # one alternative more
        keys, values = cache.recall(self) or (k.new_empty(N, heads, room, d),
                                              v.new_empty(N, heads, room, d))
        start, end = cache.frames, cache.frames + L
        keys[:, :, start:end], values[:, :, start:end] = k, v
        cache.keep(self, keys, values)
        return keys[:, :, :end], values[:, :, :end]


def attend_past(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    """Attention of few frames to many, at each of thousands of pixels. One frame sees all others,
    so it needs no mask; with a mask, written out is faster than the fused kernel (CPU, `python -m
    evaluation.speed --layers`)."""
    if len(sees) == 1:
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # [N, heads, L, past + L]
    return scores.masked_fill(~sees, -torch.inf).softmax(dim=-1) @ v


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
    out.

    From scratch the projection out is zero, so that a new transformer changes nothing.
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

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # [B, C, T, H, W]
        B, C, T, H, W = x.shape
        h = self.norm(x, cache).permute(0, 3, 4, 2, 1)  # [B, H, W, T, C]
        h = self.proj_in(h.flatten(0, 2))  # [B·H·W, T, C]: a sequence of frames at every pixel
        for block in self.transformer_blocks:
            h = block(h, cache)
        h = self.proj_out(h).view(B, H, W, T, C)
        return x + h.permute(0, 4, 3, 1, 2)  # [B, C, T, H, W]


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
    print(f"frame by frame over the cache, against the whole clip: they differ by {difference:.1f}")


if __name__ == "__main__":
    with torch.no_grad():
        demo()
