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


class TemporalConv(nn.Conv3d):
    """Convolution over time at every pixel, kernel (n, 1, 1): centred, or ending at its own frame if `causal`."""

    def __init__(self, channels: int, kernel_size: int = 3, causal: bool = False):
        super().__init__(channels, channels, (kernel_size, 1, 1))
        self.pad_frames = (kernel_size - 1, 0) if causal else (kernel_size // 2, kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T, H, W]
        return super().forward(F.pad(x, (0, 0, 0, 0, *self.pad_frames)))


class TemporalNorm(nn.GroupNorm):
    """GroupNorm of a video whose statistics run over the frames that `scope` names. Computes in float32."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, scope: str = "clip"):
        super().__init__(groups, channels, eps)
        if scope not in NORM_SCOPES:
            raise ValueError(f"norm_scope is {scope!r}; it must be one of {', '.join(NORM_SCOPES)}")
        self.scope = scope

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T, H, W]
        if self.scope == "clip":
            return super().forward(x)
        if self.scope == "frame":
            return super().forward(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)

        groups = x.float().unflatten(1, (self.num_groups, -1))  # [B, G, C/G, T, H, W]
        frame_mean = groups.mean((2, 4, 5), keepdim=True)  # [B, G, 1, T, 1, 1]
        frame_var = (groups - frame_mean).square().mean((2, 4, 5))  # [B, G, T]
        mean, var = pool_over_past(frame_mean.flatten(2), frame_var)  # [B, G, T]

        scale = (var + self.eps).rsqrt()[:, :, None] * self.weight.view(self.num_groups, -1, 1)  # [B, G, C/G, T]
        shift = self.bias.view(self.num_groups, -1, 1) - mean[:, :, None] * scale
        return torch.addcmul(shift[..., None, None], groups, scale[..., None, None]).flatten(1, 2)


def pool_over_past(frame_mean: Tensor, frame_var: Tensor) -> tuple[Tensor, Tensor]:
    """From each frame's own mean and variance, [..., T], to those of all pixels of frames 0 .. t, for every t.

    The pooled variance is the mean of the variances plus the spread of the means around the pooled mean.
    """
    T = frame_mean.shape[-1]
    past = torch.ones(T, T, device=frame_mean.device).tril()  # row t sees frames 0 .. t, with equal weights
    past = past / past.sum(dim=1, keepdim=True)
    mean = (frame_mean[..., None, :] * past).sum(-1)
    spread = (frame_mean[..., None, :] - mean[..., None]).square()  # [..., T, T]
    return mean, ((frame_var[..., None, :] + spread) * past).sum(-1)


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

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T, H, W]
        return x + self.conv4(self.conv3(self.conv2(self.conv1(x))))
