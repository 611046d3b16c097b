"""Streaming: one new frame at a time, and a cache of what the frames before leave behind.

A causal network never looks ahead, so a new frame changes nothing about those before it. A rollout
runs the network on the new frame alone, and each temporal layer caches what it needs of the past:

    frames    0   1   2   3   4  |  5        convolution   its inputs at 3 and 4 (kernel of 3)
              ────────────────── |  ─        attention     keys and values of 0 .. 4
              cached             |  new      norm "past"   mean and variance of each of 0 .. 4

Guidance needs two branches of frame 5: conditional, with its action, and unconditional. Both stand
at the same place: each sees the cached frames and itself, and neither sees the other.

    a pass over frame 4 and the two branches         sees    0  1  2  3   4   5  5'
    of frame 5, while 0 .. 3 are cached                 4    ■  ■  ■  ■   ■
                                                        5    ■  ■  ■  ■   ■   ■
                                                        5'   ■  ■  ■  ■   ■      ■

Frame 4 is appended to the cache; the branches are not.

Below the cache stands what each temporal layer does with it: `stream_conv`, `stream_attention`,
`stream_statistics`. Frame by frame they give what the layers give for the whole clip
(causal_conv.py, causal_attention.py, temporal/norm.py). Not in the paper.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Cache:
    """What one rollout (or B rollouts side by side) has cached.

    capacity  frames that fit, next to one branch more
    branches  how many of the last frames of the next pass are branches of one next frame

    With a full window it holds, in numbers per rollout:

        2 (capacity + 1) · Σ H·W·inner      temporal attention: keys and values
        3 · Σ H·W·channels                  temporal convolution: two inputs and their contribution
        2 · frames · Σ 32                   norms of scope "past": mean and variance of each group

    For DynamiCrafter-512 with 16 frames these are 580 M + 90 M numbers: 1.34 GB in bfloat16.
    """

    def __init__(self, capacity: int):
        self.capacity, self.frames = capacity, 0
        self.branches, self.appended = 0, 0
        self.cached: dict[nn.Module, tuple[Tensor, ...]] = {}
        self.pending: dict[nn.Module, tuple[Tensor, ...]] = {}
        self.mask: Tensor | None = None  # which frames see which in the present pass

    def begin(self, frames: int) -> None:
        """Start a pass over new frames, the branches among them.

        Raises ValueError if the frames do not fit, or if the branches have no frame to follow.
        """
        if not self.frames and frames == self.branches:
            raise ValueError("the cache is empty: append a frame before reading it")
        free = self.capacity - self.frames + (self.branches > 0)
        if frames > free:
            raise ValueError(f"{frames} frames do not fit into the cache, which has room for "
                             f"{free}")
        self.appended = frames - self.branches
        self.pending, self.mask = {}, None

    def put(self, layer: nn.Module, *tensors: Tensor) -> None:
        """Cache tensors for a layer, once the whole pass has succeeded."""
        self.pending[layer] = tensors

    def commit(self) -> None:
        """The pass has succeeded: from now on its appended frames belong to the past."""
        self.cached |= self.pending
        self.frames += self.appended
        self.pending = {}

    def visible(self, device: torch.device) -> Tensor:
        """Which frames each new frame sees, bool [new, cached + new]."""
        if self.mask is None:  # the same for all layers of a pass
            new = self.appended + self.branches
            mask = torch.ones(new, self.frames + new, dtype=torch.bool, device=device)
            mask = mask.tril(self.frames)
            itself = torch.eye(self.branches, dtype=torch.bool, device=device)
            mask[self.appended :, self.frames + self.appended :] = itself
            self.mask = mask
        return self.mask

    @property
    def nbytes(self) -> int:
        tensors = [tensor for layer in self.cached.values() for tensor in layer]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --------------------------------------------------------------------------------------------------
# Convolution


def stream_conv(conv: nn.Conv3d, x: Tensor, cache: Cache) -> Tensor:
    """`causal_conv.TemporalConv` on new frames x [B, C, T, H, W]: those to append, then branches.

    A convolution is linear, so the output at the next frame is what the past contributes, which is
    the same in all denoising steps, plus the kernel's last column times the frame itself:

        y[t+1] = (w₋₂ x[t-1] + w₋₁ x[t] + b)  +  w₀ x[t+1]
                  from_past: cached              every denoising step
    """
    B, C, _, H, W = x.shape
    n = conv.kernel_size[0]
    appended, branches = x.split([cache.appended, cache.branches], dim=2)
    past, from_past = cache.cached.get(conv) or (x.new_zeros(B, C, n - 1, H, W), None)
    outputs = []
    if cache.appended:
        # one frame of zeros more: its output is what the past contributes to the next frame
        frames = torch.cat([past, appended, x.new_zeros(B, C, 1, H, W)], dim=2)
        outputs = [conv_at_last(conv, frames[:, :, t : t + n]) for t in range(cache.appended + 1)]
        from_past = outputs.pop()  # [B, C, 1, H, W]
        cache.put(conv, frames[:, :, cache.appended : -1].clone(), from_past)
    if cache.branches:
        from_itself = torch.matmul(conv.weight[:, :, -1, 0, 0], branches.flatten(2))
        outputs.append(from_past + from_itself.view_as(branches))
    return torch.cat(outputs, dim=2)


def conv_at_last(conv: nn.Conv3d, frames: Tensor) -> Tensor:
    """The output [B, C, 1, H, W] at the last of n frames [B, C, n, H, W], n the kernel's size."""
    B, C, n, H, W = frames.shape
    weight = conv.weight.flatten(1).expand(B, -1, -1)  # [B, C, C·n]
    output = torch.baddbmm(conv.bias[:, None], weight, frames.reshape(B, C * n, H * W))
    return output.view(B, C, 1, H, W)


# --------------------------------------------------------------------------------------------------
# Attention


def stream_attention(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> Tensor:
    """Attention of the new frames to the cached ones and to themselves: q, k, v [N, heads, T, d] of
    the new ones -> [N, heads, T, d].

    Keys and values lie in buffers of the cache's capacity. New ones are written behind the cached
    ones; what a branch or a failed pass wrote, the next pass overwrites.
    """
    N, heads, T, d = k.shape
    slots = cache.capacity + 1  # one branch more
    buffers = cache.cached.get(layer) or [k.new_empty(N, heads, slots, d) for _ in range(2)]
    cache.put(layer, *buffers)
    visible = cache.visible(q.device)  # [T, past + T]
    keys, values = (buffer[:, :, : visible.shape[1]] for buffer in buffers)
    keys[:, :, -T:] = k
    values[:, :, -T:] = v
    return attend(q, keys, values, visible)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attention of few queries to all frames. A single one sees every frame and needs no mask; with
    a mask, written out is faster than the fused kernel (`python -m testing.speed --layers`)."""
    if len(visible) == 1:
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # [N, heads, T, past + T]
    return scores.masked_fill(~visible, -torch.inf).softmax(dim=-1) @ v


# --------------------------------------------------------------------------------------------------
# Norm


def stream_statistics(norm: nn.Module, mean: Tensor, var: Tensor, cache: Cache
                      ) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, groups, T] of each new frame -> those of each cached and new one,
    [B, groups, past + T]."""
    if past := cache.cached.get(norm):
        mean = torch.cat([past[0], mean], dim=-1)
        var = torch.cat([past[1], var], dim=-1)
    frames = mean.shape[-1] - cache.branches
    cache.put(norm, mean[..., :frames], var[..., :frames])
    return mean, var
