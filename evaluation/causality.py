"""How much of the future reaches the past, by norm scope: python -m evaluation.causality

A causal U-Net with random weights sees 8 frames, and then the same with another last frame. Printed
is how far the outputs of the earlier frames move, relative to their norm. It should be nothing.
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from support.options import option, program
from support.pictures import save_curves
from temporal.norm import NORM_SCOPES
from unet import UNetConfig, leaks

SIZE = UNetConfig(model_channels=64, channel_mult=(1, 2, 4), head_channels=32, context_dim=64)


@dataclass
class Settings:
    frames: int = option(8, "in the clip", least=2)
    out: str = option("evaluations/causality", "folder for the picture")


def run(settings: Settings) -> None:
    moves = {}
    with torch.no_grad():
        for scope in NORM_SCOPES:
            moved = leaks(scope, settings.frames, SIZE, pixels=16)
            moves[scope] = [100 * share for share in moved[:-1]]
            print(f"norms over {scope:5}  the last frame moves earlier outputs by up to "
                  f"{max(moves[scope]):.2f} %")
    (out := Path(settings.out)).mkdir(parents=True, exist_ok=True)
    save_curves(out / "causality.png", {f"norms over {scope}: moves by %": list(enumerate(row))
                                        for scope, row in moves.items()}, "frame")
    print(f"picture: {out}/causality.png")


main = program(__name__, "causality", run, Settings, "Measure the leak.")
