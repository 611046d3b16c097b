"""Convolution over time that looks only back, and how the weights of a pretrained one transfer.

DynamiCrafter is a passive video model: it denoises all frames of a clip together, so its temporal
layers may look ahead. A world model must be causal: when it predicts frame t, frame t+1 does not
exist yet, so a kernel that learned to read t+1 would see padding at inference. So a kernel that is
centred on its frame becomes one that ends at its frame:

        DynamiCrafter            world model
          w₋₁ w₀ w₊₁              ?   ?   ?
           │  │  │                │   │   │
    frame t-1 t  t+1      frame  t-2 t-1  t

The new kernel sees one frame that the old one never saw (t-2), and loses one that the old one was
trained to see (t+1). `transfer_weights` has four ways to fill in the question marks:

    method          weight on t-2, t-1, t        what it keeps
    mixed           w̄,   w₋₁,        w₀          weights in place; t-2 gets their mean, w̄
    shift           w₋₁, w₀,         w₊₁         every weight, each one frame late
    masked          0,   w₋₁,        w₀          weights in place; the future is dropped
    extrapolative   0,   w₋₁ - w₊₁,  w₀ + 2w₊₁   weights in place; a line stands in for the future

`mixed` is the default here and in the paper's first version (v1). `extrapolative` is that of its
later ones (v2, v3) and of the released checkpoints. No method adds or renames a parameter.

    python causal_conv.py        shows the four on numbers

Paper: section 4.1, Figure 3; theory in appendix A.1 to A.3.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temporal.norm import TemporalNorm
from temporal.streaming import Cache, stream_conv

TRANSFER_METHODS = ("mixed", "shift", "masked", "extrapolative")


def transfer_weights(kernel: Tensor, method: str) -> Tensor:
    """Turn a centred temporal kernel into a causal one of the same size.

    kernel  [out, in, n, ...], n odd: the weights on frames t-m .. t+m, with m = (n-1)/2
    returns [out, in, n, ...], float32 or better: the weights on frames t-2m .. t, to be used with
            n-1 frames of zeros on the left

    Raises ValueError for an unknown method or an even kernel size. Paper: section 4.1.
    """
    if method not in TRANSFER_METHODS:
        raise ValueError(f"transfer is {method!r}; it must be one of {', '.join(TRANSFER_METHODS)}")
    n = kernel.shape[2]
    if n % 2 == 0:
        raise ValueError(f"a centred kernel has an odd number of frames, this one has {n}")
    kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float32))  # sums would round in half
    if method == "shift":
        return kernel.clone()

    m = (n - 1) // 2
    past_and_present = kernel[:, :, : m + 1]  # weights on t-m .. t
    future = kernel[:, :, m + 1 :]  # weights on t+1 .. t+m
    causal = torch.zeros_like(kernel)
    causal[:, :, m:] = past_and_present
    if method == "mixed":
        causal[:, :, :m] = kernel.mean(dim=2, keepdim=True)
    if method == "extrapolative":
        # x[t+j] ≈ x[t] + j (x[t] - x[t-1]), the line through the last two frames
        #        = (1 + j) x[t] - j x[t-1]: the weight of a future frame moves onto those two
        for j in range(1, m + 1):
            causal[:, :, -1] += (1 + j) * future[:, :, j - 1]
            causal[:, :, -2] -= j * future[:, :, j - 1]
    return causal


class TemporalConv(nn.Conv3d):
    """Convolution over time at every pixel: centred, or ending at its own frame if `causal`.
    Paper: section 4.1."""

    def __init__(self, channels: int, kernel_size: int = 3, causal: bool = False):
        super().__init__(channels, channels, (kernel_size, 1, 1))
        side = kernel_size // 2
        self.pad_frames = (kernel_size - 1, 0) if causal else (side, side)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # [B, C, T, H, W]
        if cache is not None:  # new frames alone: temporal/streaming.py
            return stream_conv(self, x, cache)
        x = F.pad(x, (0, 0, 0, 0, *self.pad_frames))  # zeros before the first frame
        # As a 2-D convolution over (time, pixel): the 3-D one takes 1.3 to 1.7 times as long in
        # training (CPU, `python -m testing.speed --layers`).
        y = F.conv2d(x.flatten(3), self.weight[..., 0], self.bias)  # [B, C, T, H·W]
        return y.unflatten(3, x.shape[3:])


class TemporalConvBlock(nn.Module):
    """Four times norm, SiLU, temporal convolution, in one residual: the end of every `ResBlock`.

    DynamiCrafter's dropout of 0.1, from the second on, is part of the block. From scratch the last
    convolution is zero, so that a new block changes nothing.
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


def demo() -> None:
    """The kernel (1, 2, 3) on the ramp x[t] = t, read off at t = 4."""
    ramp = torch.arange(8.0).view(1, 1, 8, 1, 1)
    kernel = torch.tensor([1.0, 2, 3]).view(1, 1, 3, 1, 1)
    notes = {"shift": "one frame late: off by the slope, 1, times Σw",
             "extrapolative": "exact on anything linear in time"}

    def output(weight: Tensor, causal: bool) -> float:
        conv = TemporalConv(1, causal=causal)
        conv.load_state_dict({"weight": weight, "bias": torch.zeros(1)})
        return conv(ramp)[0, 0, 4].item()

    print("method         kernel         on         output at t = 4")
    print(f"centred        ( 1,  2,  3)   3, 4, 5    {output(kernel, causal=False):4.0f}")
    for method in TRANSFER_METHODS:
        weight = transfer_weights(kernel, method)
        taps = ", ".join(f"{w:2.0f}" for w in weight.flatten().tolist())
        print(f"{method:14} ({taps})   2, 3, 4    {output(weight, causal=True):4.0f}  "
              f"{notes.get(method, '')}".rstrip())


if __name__ == "__main__":
    with torch.no_grad():
        demo()
