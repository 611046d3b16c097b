"""Feature networks that answer to the calls of Inception, VGG and I3D."""
from pathlib import Path

import torch
from torch import Tensor, nn

from testing.commands import folder


class Inception(nn.Module):
    """Answers as the real one, with fewer features; in training mode it would add noise."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert images.dtype == torch.uint8 and return_features
        pooled = nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
        return nn.functional.dropout(pooled, 0.5, self.training)


class Vgg(nn.Module):
    def forward(self, images: Tensor, resize_images: bool = True,
                return_lpips: bool = False) -> Tensor:
        assert not resize_images and return_lpips
        return images.flatten(1) / 1000


class I3d(nn.Module):
    def forward(self, videos: Tensor, rescale: bool = False, resize: bool = False,
                return_features: bool = False) -> Tensor:
        assert rescale and resize and return_features and videos.size(1) == 3
        return videos.flatten(3).mean(3).flatten(1)


class Flat(nn.Module):
    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return images.float().flatten()


def small_networks() -> dict[str, Path]:
    paths = {"--inception": Inception, "--lpips": Vgg, "--i3d": I3d, "flat": Flat}
    out = folder()
    for name, network in paths.items():
        torch.jit.script(network().train()).save(str(out / f"{name.strip('-')}.pt"))
    return {name: out / f"{name.strip('-')}.pt" for name in paths}
