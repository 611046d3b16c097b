"""Which transfer, which norm scope? python -m evaluation.transfers

Making a pretrained network causal takes knowledge away from it: how much, before any training? The
same held-out clips, noised at one shared level, go through the passive base and through its causal
versions; the distance of their velocities, relative to the base's, says how far the network was
thrown from what it had learned.

How well they learn afterwards is measured by evaluation/ablations.py.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from causal_conv import TRANSFER_METHODS
from data import Clips, collate, open_episodes, require_clips
from model.saving import TINY_BASE, from_dynamicrafter, preset_of
from model.vid2world import PRESETS, Model, to_pixels
from support.options import option, program
from support.pictures import save_curves
from temporal.norm import CAUSAL_SCOPES

LEVELS = (100, 300, 500, 700, 900)


@torch.inference_mode()
def velocities(model: Model, frames: torch.Tensor) -> torch.Tensor:
    """The velocities of clips uint8 [B, T, H, W, 3], [levels, B, T, C, h, w]."""
    pixels = to_pixels(frames)
    latents = model.encode(pixels)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    context = model.context(model.image_tokens(pixels[:, 0]), range(frames.shape[1]))
    return torch.stack([
        model.denoise(model.schedule.add_noise(latents, k, noise), torch.full((len(frames),), k),
                      latents[:, :1], context)
        for k in LEVELS])


def distances(base: Path, clips: Clips, number: int) -> dict[str, np.ndarray]:
    """Relative distance from the passive velocity, by frame, for every transfer and scope."""
    config = PRESETS[preset_of(base)]
    frames = require_clips(collate([clips[i] for i in range(number)]))["frames"]
    passive = velocities(from_dynamicrafter(base, config).eval(), frames)
    size = passive.square().sum((0, 1, 3, 4, 5))  # of every frame
    result = {}
    for scope in CAUSAL_SCOPES:
        for transfer in TRANSFER_METHODS:
            unet = replace(config.unet, causal=True, norm_scope=scope)
            causal = from_dynamicrafter(base, replace(config, unet=unet), transfer)
            off = (velocities(causal.eval(), frames) - passive).square().sum((0, 1, 3, 4, 5))
            result[f"{transfer}, {scope}"] = (off / size).sqrt().numpy()
    return result


@dataclass
class StartSettings:
    """What a comparison of trained models starts from."""
    base: str | None = option(None, "passive model to start from; if left out, the bundled one")
    data: str = option("rt1", "data set")
    root: str | None = option(None, "its folder; if left out, datasets/ or else the bundled "
                                    "episodes")


@dataclass
class Settings(StartSettings):
    clips: int = option(16, "held-out clips")
    frames: int = option(16, "frames per clip")
    out: str = option("evaluations/transfers", "folder for the plot")


def run(settings: Settings) -> None:
    base = Path(settings.base or TINY_BASE)
    size = PRESETS[preset_of(base)].size
    held_out = open_episodes(settings.data, settings.root, "val", min_length=settings.frames)
    table = distances(base, Clips(held_out, settings.frames, size, seed=0), settings.clips)
    shown = [0, 1, settings.frames // 2 - 1, settings.frames - 1]
    heads = " | ".join(map(str, shown[1:]))
    print(f"\n| transfer, norm scope | distance from the passive velocity | at frame 0 | {heads} "
          "|\n"
          "| --- | --- | --- | --- | --- | --- |")
    for name, row in table.items():
        cells = " | ".join(f"{row[t]:.3f}" for t in shown)
        print(f"| {name} | **{np.sqrt(np.mean(row**2)):.3f}** | {cells} |")
    (out := Path(settings.out)).mkdir(parents=True, exist_ok=True)
    save_curves(out / "distance.png", {name: list(enumerate(row)) for name, row in table.items()},
                "frame")
    print(f"\nplot: {out}/distance.png")


main = program(__name__, "transfers", run, Settings, "Compare transfers and norm scopes.")
