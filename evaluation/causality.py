"""How much of the future reaches the past, by norm scope: python -m evaluation.causality

A causal U-Net with random weights sees 8 frames, and then the same with another last frame. Printed
is how far the outputs of the earlier frames moved, relative to their norm. It should be nothing.
"""
import torch
from torch import nn

from unet import UNet, UNetConfig


@torch.no_grad()
def leak(scope: str) -> float:
    """Largest relative move of an earlier frame's output."""
    torch.manual_seed(0)
    network = UNet(UNetConfig(model_channels=64, channel_mult=(1, 2, 4), head_channels=32,
                              context_dim=64, causal=True,
                              norm_scope=scope)).eval()
    # random everywhere: a new network's zeros would hide a leak
    for name, w in network.named_parameters():
        if w.ndim > 1:
            nn.init.normal_(w, std=w[0].numel() ** -0.5)
    x, other = torch.randn(2, 1, 8, 8, 16, 16)
    other[:, :-1] = x[:, :-1]
    k, text, image = torch.full((1,), 300), torch.randn(1, 77, 64), torch.randn(1, 8, 16, 64)
    before, after = (network(clip, k, text, image)[0, :-1].flatten(1) for clip in (x, other))
    return ((after - before).norm(dim=1) / before.norm(dim=1)).max().item()


if __name__ == "__main__":
    for scope in ("clip", "past", "frame"):
        print(f"norms over {scope:5s}  the last frame moves earlier outputs by up to "
              f"{100 * leak(scope):.2f} %")
