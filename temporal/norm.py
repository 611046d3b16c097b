"""Normalisation over time that looks only back: the third leak, which the paper does not mention.

A GroupNorm divides by the standard deviation of its whole input. Over a clip that includes the
future: change the last frame, and the statistics of the clip change, and with them every earlier
frame. So a network with causal convolutions and causal attention still uses a future that is not
there in a rollout.

`scope` says which frames the statistics of frame t include:

    scope     frames             causal
    "clip"    0 1 2 ... T-1      no      DynamiCrafter, and the released Vid2World
    "past"    0 1 ... t          yes     equal to "clip" at the last frame
    "frame"   t                  yes     stateless; the default

By definition, "past" at frame t is

    group_norm(x[:, :, : t + 1])[:, :, t]

which `past_by_definition` computes, frame after frame. `TemporalNorm` computes the same in one
pass: each frame's own mean and variance first, then those of all frames so far. No scope has
parameters of its own, so pretrained weights load into each. Not in the paper.
"""
import torch
from torch import Tensor, nn

from temporal.streaming import Cache, stream_statistics

NORM_SCOPES = ("clip", "past", "frame")
CAUSAL_SCOPES = NORM_SCOPES[1:]


def past_by_definition(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Scope "past" as defined, in T passes of an ordinary GroupNorm over x [B, C, T, ...]."""
    return torch.stack([norm(x[:, :, : t + 1])[:, :, t] for t in range(x.shape[2])], dim=2)


class TemporalNorm(nn.GroupNorm):
    """GroupNorm of a video with statistics over the frames that `scope` names, computed in float32.

    With a cache, x holds the new frames alone (temporal/streaming.py). Raises ValueError for an
    unknown scope.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, scope: str = "clip"):
        super().__init__(groups, channels, eps)
        if scope not in NORM_SCOPES:
            raise ValueError(f"norm_scope is {scope!r}; it must be one of {', '.join(NORM_SCOPES)}")
        self.scope = scope

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # [B, C, T, H, W]
        if self.scope == "clip" and cache is None:
            return super().forward(x)
        if self.scope == "frame":
            frames = x.transpose(1, 2)  # [B, T, C, H, W]
            return super().forward(frames.flatten(0, 1)).view_as(frames).transpose(1, 2)
        with torch.autocast(x.device.type, enabled=False):
            return self.over_past(x.float(), cache)

    def over_past(self, x: Tensor, cache: Cache | None) -> Tensor:  # [B, C, T, H, W] -> the same
        """Statistics over frames ≤ t. With a cache also for scope "clip", as an approximation: the
        frames after t are not there yet."""
        groups = x.unflatten(1, (self.num_groups, -1))  # [B, G, C/G, T, H, W]
        mean = groups.mean((2, 4, 5))  # [B, G, T], of each frame alone
        var = groups.var((2, 4, 5), correction=0)
        if cache is not None:
            mean, var = stream_statistics(self, mean, var, cache)
            visible = cache.visible(x.device)
        else:
            visible = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool, device=x.device).tril()
        mean, var = pool_statistics(mean, var, visible)  # [B, G, T], of all frames so far

        # y = (x - mean) / √(var + ε) · weight + bias, as one scale and one shift per channel
        weight = self.weight.view(self.num_groups, -1, 1)  # [G, C/G, 1]
        bias = self.bias.view(self.num_groups, -1, 1)
        scale = (var + self.eps).rsqrt()[:, :, None] * weight  # [B, G, C/G, T]
        shift = bias - mean[:, :, None] * scale
        return (groups * scale[..., None, None] + shift[..., None, None]).flatten(1, 2)


def pool_statistics(mean: Tensor, var: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Each frame's own mean and variance [..., F] -> those over the frames that each of T frames
    sees, [..., T]. visible is bool [T, F]."""
    share = visible / visible.sum(dim=1, keepdim=True)  # [T, F], equal weights
    pooled = mean @ share.T  # [..., T]
    # variance of a union = mean of the variances + variance of the means
    spread = (mean[..., None, :] - pooled[..., None]).square()  # [..., T, F]
    return pooled, ((var[..., None, :] + spread) * share).sum(-1)


def demo() -> None:
    """What every scope makes of a clip, and which frames move when the last one changes."""
    frames, pixels = torch.tensor([1.0, 2, 3, 10]), torch.tensor([-1.0, 1])
    x = (frames[:, None] + pixels).view(1, 1, 4, 1, 2)
    changed = x.clone()
    changed[:, :, 3] += 100
    print("scope    one pixel after the norm            moved when frame 3 changes")
    for scope in NORM_SCOPES:
        norm = TemporalNorm(1, 1, scope=scope)
        before, after = norm(x)[0, 0, :, 0, 0], norm(changed)[0, 0, :, 0, 0]
        moved = [t for t in range(4) if before[t] != after[t]]
        print(f"{scope:8} {'  '.join(f'{value:6.3f}' for value in before.tolist())}    frames "
              f"{moved}")
    norm = TemporalNorm(1, 1, scope="past")
    print("past against its definition: "
          f"{(norm(x) - past_by_definition(nn.GroupNorm(1, 1), x)).abs().max():.1e}")


if __name__ == "__main__":
    with torch.no_grad():
        demo()
