"""Which transfer, which norm scope? python -m evaluation.transfers

Making a pretrained network causal takes knowledge away from it: how much, before any training? The same held-out clips, noised
at one shared level, go through the passive base and through its causal versions; the distance of their velocities, relative to
the base's, says how far the network was thrown from what it had learned.

How well they learn afterwards is measured by evaluation/ablations.py.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from causal_conv import TRANSFER_METHODS
from data import Clips, DataError, collate, default_root, open_episodes
from dynamicrafter.model import PRESETS, TINY_BASE, Model, from_dynamicrafter, preset_of, to_pixels
from evaluation.pictures import save_curves
from unet import CheckpointError

LEVELS = (100, 300, 500, 700, 900)


@torch.inference_mode()
def velocities(model: Model, frames: torch.Tensor) -> torch.Tensor:
    """What the network predicts for clips uint8 [B, T, H, W, 3] at each shared level, [levels, B, T, C, h, w]."""
    pixels = to_pixels(frames)
    latents = model.encode(pixels)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    context = model.context(model.image_tokens(pixels[:, 0]), frames.shape[1])
    return torch.stack([model.denoise(model.schedule.add_noise(latents, k, noise), torch.full((len(frames),), k), latents[:, :1],
                                      context) for k in LEVELS])


def distances(base: Path, clips: Clips, number: int) -> dict[str, np.ndarray]:
    """Relative distance from the passive network's velocity, by frame, for every transfer and norm scope."""
    config = PRESETS[preset_of(base)]
    frames = collate([clips[i] for i in range(number)])["frames"]
    passive = velocities(from_dynamicrafter(base, config).eval(), frames)
    size = passive.square().sum((0, 1, 3, 4, 5))  # of every frame
    result = {}
    for scope in ("past", "frame"):
        for transfer in TRANSFER_METHODS:
            causal = from_dynamicrafter(base, replace(config, unet=replace(config.unet, causal=True, norm_scope=scope)), transfer)
            off = (velocities(causal.eval(), frames) - passive).square().sum((0, 1, 3, 4, 5))
            result[f"{transfer}, {scope}"] = (off / size).sqrt().numpy()
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare transfers and norm scopes.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--base", type=Path, default=TINY_BASE)
    parser.add_argument("--data", default="rt1")
    parser.add_argument("--root")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--out", default="evaluations/transfers", help="folder for the plot")
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        held_out = open_episodes(args.data, args.root or default_root(args.data), "val", min_length=16)
        table = distances(args.base, Clips(held_out, 16, PRESETS[preset_of(args.base)].size, seed=0), args.clips)
        print("\n| transfer, norm scope | distance from the passive velocity | at frame 0 | 1 | 7 | 15 |\n| --- | --- | --- | --- | --- | --- |")
        for name, row in table.items():
            print(f"| {name} | **{np.sqrt(np.mean(row**2)):.3f}** | {' | '.join(f'{row[t]:.3f}' for t in (0, 1, 7, 15))} |")
        save_curves(out / "distance.png", {name: list(enumerate(row)) for name, row in table.items()}, "frame")
    except (DataError, CheckpointError, OSError) as error:
        print(f"transfers: {error}", file=sys.stderr)
        return 2
    print(f"\nplot: {out}/distance.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
