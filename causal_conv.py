"""Convolution over time that looks only back, and how a pretrained one is carried over to it.

DynamiCrafter is a passive video model: it denoises all frames of a clip together, so its temporal layers
may look ahead. A world model may not. The next frame has to be imagined before the action after it is
known, and whatever reads the future in training has nothing to read in use. So a kernel that is centred
on its frame has to become one that ends there:

        DynamiCrafter            world model               shift    every weight kept, one frame late
          w₋₁ w₀ w₊₁              ?   ?   ?                masked   the future dropped
           │  │  │                │   │   │                mixed    ... and the mean of the kernel on the unseen frame
    frame t-1 t  t+1      frame  t-2 t-1  t                extrapolative   the future replaced by a line through the past

The new kernel sees one frame that the old one never saw (t-2) and loses one that it was trained to see
(t+1). `transfer_weights` holds the four ways to fill in the question marks; without any of them the
pretrained knowledge about motion is lost.

Convolution is not all. A GroupNorm that takes its statistics over the whole clip tells the past about the
future as well: change the last frame, and the mean of the clip, and with it every earlier frame, moves.
`TemporalNorm` says over which frames the statistics run:

    scope       frames that the statistics of frame t see        causal
    "clip"      0 1 2 ... T-1   (DynamiCrafter and the released Vid2World)   no
    "past"      0 1 ... t       (the same as "clip" at the last frame)       yes
    "frame"     t                                                            yes

Neither change adds, removes or renames a parameter. Paper: section 4.1 (video diffusion causalization).

What never looks ahead never has to look twice. Nothing that happens at frame t can change what a layer made of the
frames before, so in a rollout those frames are not run again: each layer keeps the little that frame t will ask of
them, and the network runs on frame t alone. That is the `Cache`:

    frames    0   1   2   3   4  |  5                    convolution   its inputs at 3 and 4   (the kernel reaches no further)
              ────────────────── |  ─                    attention     keys and values of 0 .. 4
              remembered         |  new                  norm "past"   mean and variance of each of 0 .. 4
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRANSFER_METHODS = ("mixed", "shift", "masked", "extrapolative")
NORM_SCOPES = ("clip", "past", "frame")


def transfer_weights(kernel: Tensor, method: str) -> Tensor:
    """Turn a centred temporal kernel into a causal one of the same size.

    kernel  [out, in, n, ...], n odd: the weights on frames t-m .. t+m, with m = (n-1)/2
    returns [out, in, n, ...]: the weights on frames t-2m .. t, to be used with n-1 zero frames on the left

    Raises ValueError for an unknown method or an even kernel size. Paper: section 4.1.
    """
    if method not in TRANSFER_METHODS:
        raise ValueError(f"transfer is {method!r}; it must be one of {', '.join(TRANSFER_METHODS)}")
    n = kernel.shape[2]
    if n % 2 == 0:
        raise ValueError(f"a centred kernel has an odd number of frames, this one has {n}")
    if method == "shift":
        return kernel.clone()

    m = (n - 1) // 2
    past_and_present, future = kernel[:, :, : m + 1], kernel[:, :, m + 1 :]  # frames t-m .. t and t+1 .. t+m
    causal = torch.zeros_like(kernel)
    causal[:, :, m:] = past_and_present
    if method == "mixed":
        causal[:, :, :m] = kernel.mean(dim=2, keepdim=True)
    if method == "extrapolative":
        # The line through the last two frames, x[t+j] ≈ x[t] + j (x[t] - x[t-1]), moves the weight of every
        # future frame onto those two.
        for j in range(1, m + 1):
            causal[:, :, -1] += (1 + j) * future[:, :, j - 1]
            causal[:, :, -2] -= j * future[:, :, j - 1]
    return causal


class Cache(dict):
    """What the frames so far leave behind for the next one: temporal layer -> what it keeps.

    A pass through the network adds its frames to the memory, but for the last `alternatives` of them. These are not each other's
    successors but alternatives for one next frame: each sees what is remembered, what the pass adds, and itself. So
    guidance runs its two versions of a new frame, with and without the action, over one shared past.

    capacity  frames that the memory can hold, with one alternative more

    It holds, for one clip:

        2 (capacity + 1) · Σ H·W·inner      over temporal attentions: keys and values, one more for an alternative
        3 · Σ H·W·channels                  over temporal convolutions: two inputs, and what they add to the next frame
        2 · frames · Σ 32                   over norms of scope "past": mean and variance of each group

    numbers; in DynamiCrafter-512, 40×64 latents and 16 frames, 580 M + 90 M: 1.34 GB in bfloat16.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.frames, self.alternatives = capacity, 0, 0

    @property
    def nbytes(self) -> int:
        tensors = [tensor for kept in self.values() for tensor in ([kept] if isinstance(kept, Tensor) else kept)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def sees(self, new: int, device: torch.device) -> Tensor:
        """Which frames each frame of a pass sees, bool [new, frames + new]."""
        appended = new - self.alternatives
        sees = torch.ones(new, self.frames + new, dtype=torch.bool, device=device).tril(self.frames)
        sees[appended:, self.frames + appended :] = torch.eye(self.alternatives, dtype=torch.bool, device=device)
        return sees


class TemporalConv(nn.Conv3d):
    """Convolution over time at every pixel, kernel (n, 1, 1): centred, or ending at its own frame if `causal`."""

    def __init__(self, channels: int, kernel_size: int = 3, causal: bool = False):
        super().__init__(channels, channels, (kernel_size, 1, 1))
        self.pad_frames = (kernel_size - 1, 0) if causal else (kernel_size // 2, kernel_size // 2)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # [B, C, T, H, W]
        if cache is None:
            return self.convolve(F.pad(x, (0, 0, 0, 0, *self.pad_frames)), self.weight)
        appended, alternatives = x.split([x.shape[2] - cache.alternatives, cache.alternatives], dim=2)
        outputs = []
        if appended.shape[2]:
            past = cache[self][0] if self in cache else F.pad(x[:, :, :0], (0, 0, 0, 0, *self.pad_frames))  # zeros
            appended = torch.cat([past, appended], dim=2)
            past = appended[:, :, -past.shape[2] :].clone()
            cache[self] = past, self.convolve(past, self.weight[:, :, :-1])
            outputs.append(self.convolve(appended, self.weight))
        if cache.alternatives:  # the past's share is known already; only the last column of the kernel is left
            own = torch.matmul(self.weight[:, :, -1, 0, 0], alternatives.flatten(2)).view_as(alternatives)
            outputs.append(own + cache[self][1])
        return torch.cat(outputs, dim=2)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """In two dimensions, time and pixel: PyTorch's 3-D convolution is slow for a single clip on the CPU."""
        return F.conv2d(x.flatten(3), weight[..., 0], self.bias).unflatten(3, x.shape[3:])


class TemporalNorm(nn.GroupNorm):
    """GroupNorm of a video whose statistics run over the frames that `scope` names. Computes in float32."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, scope: str = "clip"):
        super().__init__(groups, channels, eps)
        if scope not in NORM_SCOPES:
            raise ValueError(f"norm_scope is {scope!r}; it must be one of {', '.join(NORM_SCOPES)}")
        self.scope = scope

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # [B, C, T, H, W]
        if self.scope == "clip" and cache is None:
            return super().forward(x)
        if self.scope == "frame":
            return super().forward(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)

        groups = x.float().unflatten(1, (self.num_groups, -1))  # [B, G, C/G, T, H, W]
        frame_mean = groups.mean((2, 4, 5), keepdim=True)  # [B, G, 1, T, 1, 1]
        frame_var = (groups - frame_mean).square().mean((2, 4, 5))  # [B, G, T]
        statistics = torch.stack([frame_mean.flatten(2), frame_var])  # [2, B, G, T]
        if cache is None:
            sees = torch.ones(x.shape[2], x.shape[2], device=x.device).tril()
        else:  # here a norm over the whole clip, too, sees no more than the past
            sees = cache.sees(x.shape[2], x.device)
            statistics = torch.cat([cache[self], statistics], dim=-1) if self in cache else statistics
            cache[self] = statistics[..., : statistics.shape[-1] - cache.alternatives]
        mean, var = pool(*statistics, sees)  # [B, G, T]

        scale = (var + self.eps).rsqrt()[:, :, None] * self.weight.view(self.num_groups, -1, 1)  # [B, G, C/G, T]
        shift = self.bias.view(self.num_groups, -1, 1) - mean[:, :, None] * scale
        return torch.addcmul(shift[..., None, None], groups, scale[..., None, None]).flatten(1, 2)


def pool(mean: Tensor, var: Tensor, sees: Tensor) -> tuple[Tensor, Tensor]:
    """From each frame's own mean and variance, [..., P + T], to those of all the frames that each new one sees, [..., T].

    The pooled variance is the mean of the variances plus the spread of the means around the pooled mean.
    """
    share = sees / sees.sum(dim=1, keepdim=True)  # [T, P + T]: equal weights
    pooled = mean @ share.T
    spread = (mean[..., None, :] - pooled[..., None]).square()  # [..., T, P + T]
    return pooled, ((var[..., None, :] + spread) * share).sum(-1)


class TemporalConvBlock(nn.Module):
    """Four times norm, SiLU, temporal convolution, in one residual: what every residual block of the U-Net ends with.

    DynamiCrafter's dropout of 0.1 from the second on is part of the block. From scratch the last convolution is zero,
    so that a new block changes nothing.
    """

    def __init__(self, channels: int, causal: bool, norm_scope: str):
        super().__init__()

        def layer(*dropout: nn.Module) -> nn.Sequential:
            norm = TemporalNorm(32, channels, scope=norm_scope)
            return nn.Sequential(norm, nn.SiLU(), *dropout, TemporalConv(channels, causal=causal))

        self.conv1 = layer()
        self.conv2 = layer(nn.Dropout(0.1))
        self.conv3 = layer(nn.Dropout(0.1))
        self.conv4 = layer(nn.Dropout(0.1))
        nn.init.zeros_(self.conv4[-1].weight)
        nn.init.zeros_(self.conv4[-1].bias)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # [B, C, T, H, W]
        h = x
        for norm, *pointwise, conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            h = norm(h, cache)
            for layer in pointwise:
                h = layer(h)
            h = conv(h, cache)
        return x + h
