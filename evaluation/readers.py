"""Networks that read numbers off a frame: the player's place, a drawer's opening, an action."""
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.vid2world import to_pixels
from support.errors import require_finite


class Reader(nn.Module):
    """Pixels [N, 3, H, W] in [-1, 1] -> [N, numbers]."""

    @torch.no_grad()
    def read(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [..., H, W, 3] -> [..., numbers]."""
        flat = torch.from_numpy(frames.reshape(-1, *frames.shape[-3:]))
        found = torch.cat([self(to_pixels(some[None])[0]) for some in flat.split(256)])
        return found.numpy().reshape(*frames.shape[:-3], -1)


class FrameReader(Reader):
    """Frames, seen at 64×80 pixels -> numbers of about unit size."""

    def __init__(self, numbers: int, widths: tuple[int, ...] = (32, 64, 64, 64), hidden: int = 128):
        super().__init__()
        halve = [layer for a, b in zip((3, *widths), widths, strict=False)
                 for layer in (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.SiLU())]
        self.layers = nn.Sequential(*halve, nn.Flatten(), nn.Linear(widths[-1] * 4 * 5, hidden),
                                    nn.SiLU(), nn.Linear(hidden, numbers))

    def forward(self, pixels: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, numbers]
        if pixels.shape[2:] != (64, 80):
            pixels = F.interpolate(pixels, (64, 80), mode="area")
        return self.layers(pixels)


def fit(reader: Reader, frames: np.ndarray, targets: np.ndarray, steps: int, size: int = 64,
        cooldown: bool = True) -> Iterator[int]:
    """Train a reader on frames uint8 [N, H, W, 3] and numbers [N, n]; yields every step's number.

    The frames are blurred and noisy, since imagined ones are no better.
    """
    generator = torch.Generator().manual_seed(0)
    wanted = torch.from_numpy(targets).float()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3)
    for step in range(steps):
        rate = (1 + np.cos(np.pi * step / steps)) / 2 if cooldown else 1
        optimizer.param_groups[0]["lr"] = 1e-3 * rate
        picked = torch.randint(len(frames), (size,), generator=generator)
        pixels = to_pixels(torch.from_numpy(frames[picked.numpy()])[None])[0]
        blurred = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
        pixels = pixels.lerp(blurred, torch.rand(size, 1, 1, 1, generator=generator))
        strength = 0.1 * torch.rand(size, 1, 1, 1, generator=generator)
        pixels = pixels + strength * torch.randn(pixels.shape, generator=generator)
        loss = F.smooth_l1_loss(reader(pixels), wanted[picked], beta=0.1)
        optimizer.zero_grad()
        loss.backward()
        require_finite("the loss of a reader of frames", loss.item())
        optimizer.step()
        yield step + 1
