"""Which transfer, which norm scope? python -m evaluation.transfers

Making a pretrained network causal takes knowledge away from it: how much, before any training (and
after: `--trained runs/ablations/*_0`)? The same held-out clips, noised at one shared level, go
through the passive base and its causal versions. Two figures say how far a network was thrown: the
distance of its velocities from the base's, relative to their size, and the cosine of the two
outputs of the first temporal convolution (the paper's D.11).

The theory (A.1 to A.3) is about features that are linear in time: there extrapolative transfer is
exact, and shift is off by the slope times Σw (`python causal_conv.py`). How linear are those of
this base? Printed is how far a frame's features are from the line through the two before, and from
zero, which masked transfer puts in their place.
"""
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from causal_conv import TRANSFER_METHODS, TemporalConv
from data import Clips, collate, open_episodes, require_clips
from evaluation.comparison import StartSettings
from model.saving import from_dynamicrafter, load_model, preset_of
from model.vid2world import PRESETS, Model, to_pixels
from support.options import option, program
from support.pictures import save_curves
from temporal.norm import CAUSAL_SCOPES

LEVELS = (100, 300, 500, 700, 900)


@dataclass
class Seen:
    """What a network does with clips."""
    velocities: Tensor  # [levels, B, T, C, h, w]
    inputs: Tensor  # [levels, B, C, T, h, w], of the first temporal convolution
    features: Tensor  # its outputs


@torch.inference_mode()
def look(model: Model, frames: Tensor) -> Seen:
    """Clips uint8 [B, T, H, W, 3] at every level, under no action."""
    pixels = to_pixels(frames)
    latents = model.encode(pixels)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    context = model.context(model.image_tokens(pixels[:, 0]), range(frames.shape[1]))
    first = next(layer for layer in model.modules() if isinstance(layer, TemporalConv))
    seen, velocities = [], []
    hook = first.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    for k in LEVELS:
        x = model.schedule.add_noise(latents, k, noise)
        levels = torch.full((len(frames),), k)
        velocities.append(model.denoise(x, levels, latents[:, :1], context))
    hook.remove()
    return Seen(torch.stack(velocities), *map(torch.stack, zip(*seen, strict=True)))


def compare(passive: Seen, causal: Seen) -> tuple[np.ndarray, float]:
    """Relative distance of the velocities by frame [T], and the mean cosine of the features."""
    off, size = ((v**2).sum((0, 1, 3, 4, 5)) for v in (
        causal.velocities - passive.velocities, passive.velocities))
    cosine = F.cosine_similarity(causal.features, passive.features, dim=2).mean()
    return (off / size).sqrt().numpy(), cosine.item()


def from_line_and_from_zero(x: Tensor) -> tuple[float, float]:
    """Distance of features x [levels, B, C, T, h, w] from the line through the two frames before,
    and from zero."""
    line = 2 * x[:, :, :, 1:-1] - x[:, :, :, :-2]
    return (x[:, :, :, 2:] - line).norm().item(), x[:, :, :, 2:].norm().item()


@dataclass
class Settings(StartSettings):
    clips: int = option(16, "held-out clips")
    frames: int = option(16, "frames per clip")
    trained: list[str] | None = option(None, "run folders, to be compared as well", nargs="+")
    out: str = option("evaluations/transfers", "folder for the plot")


def run(settings: Settings) -> None:
    base = Path(settings.base)
    config = PRESETS[preset_of(base)]
    held_out = open_episodes(settings.data, settings.root, "val", min_length=settings.frames)
    clips = Clips(held_out, settings.frames, config.size, seed=0)
    frames = require_clips(collate([clips[i] for i in range(settings.clips)]))["frames"]
    passive = look(from_dynamicrafter(base, config).eval(), frames)

    def versions() -> Iterator[tuple[str, Model]]:
        for scope in CAUSAL_SCOPES:
            for transfer in TRANSFER_METHODS:
                unet = replace(config.unet, causal=True, norm_scope=scope)
                yield (f"{transfer}, {scope}",
                       from_dynamicrafter(base, replace(config, unet=unet), transfer))
        for folder in settings.trained or []:
            yield Path(folder).name, load_model(folder)

    shown, curves = [0, 1, settings.frames // 2 - 1, settings.frames - 1], {}
    heads = " | ".join(map(str, shown[1:]))
    print(f"\n| transfer, norm scope | features | distance of velocities | at frame 0 | {heads} |\n"
          f"|{' --- |' * 7}")
    for name, model in versions():
        row, cosine = compare(passive, look(model.eval(), frames))
        curves[name] = list(enumerate(row))
        cells = " | ".join(f"{row[t]:.3f}" for t in shown)
        print(f"| {name} | {cosine:.3f} | {np.sqrt(np.mean(row**2)):.3f} | {cells} |", flush=True)
    line, zero = from_line_and_from_zero(passive.inputs)
    print(f"\nthe features of a frame are {line / zero:.2f} times as far from the line through the "
          "two before as from zero")
    (out := Path(settings.out)).mkdir(parents=True, exist_ok=True)
    save_curves(out / "distance.png", curves, "frame")
    print(f"plot: {out}/distance.png")


main = program(__name__, "transfers", run, Settings, "Compare transfers and norm scopes.")
