"""Does it matter? Change one idea at a time, and see: python -m evaluation.ablations

    python -m evaluation.ablations --table2                           the paper's Table 2
    python -m evaluation.ablations --variants baseline "batch=4 steps=500" base=runs/other.pt

Every variant is post-trained by train.py from the bundled base (or another in --base) with the
settings of a small model but for what it changes, for the same steps on the same clips in the same
order with the same noise, once per seed; then all are compared on held-out episodes: the loss,
every frame at a level of its own; PSNR and SSIM of autoregressive rollouts, 15 frames from one; and
how far the gripper is from its place at their end, where the data say. Seeds differ by their
held-out clips and noise as well, so a variant is compared with the baseline seed by seed. What is
done is kept (--out): an interrupted comparison resumes.

Table 2: every transfer, post-trained without hiding actions and rolled out without guidance, and
with both; and a network that was never pretrained. Paper: section 5.4, D.10 and D.11.
"""
import re
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from causal_conv import TRANSFER_METHODS
from evaluation.comparison import (HeldOut, TrainingSettings, decisive, kept, measure_all,
                                   open_held_out, post_train, table)
from evaluation.evaluate import rollout_batch
from sample import load_world
from support.errors import DataError
from support.options import option, program
from training import settings as training

REPEATING, FRAMES = "repeating", 16  # for comparison: the first frame, again and again
VARIANTS = {  # name -> settings of train.py
    "baseline": {},
    "extrapolative transfer": {"transfer": "extrapolative"},
    "masked transfer": {"transfer": "masked"},
    "shift transfer": {"transfer": "shift"},
    "norms over the past": {"norm_scope": "past"},
    # the released code's: reads the future in training
    "norms over the clip": {"norm_scope": "clip"},
    "no action dropout": {"action_dropout": 0.0},  # and so no guidance
    "no diffusion forcing": {"shared_level": True},
    "the paper's levels": {"low_noise_prob": 0.0},
    "the paper's levels and loss": {"low_noise_prob": 0.0, "loss_weighting": "velocity"},
    "temporal layers alone": {"trainable": "temporal"},  # not the paper's: half of the memory
    "PyTorch's action initialisation": {"action_init": "pytorch"},  # as at full size
    "from scratch": {"scratch": True},  # except the autoencoder and the image tower
}
TABLE2 = {f"{transfer}{words}": {"transfer": transfer} | dropout
          for words, dropout in ((", no guidance", {"action_dropout": 0.0}), (", guided", {}))
          for transfer in TRANSFER_METHODS} | {"from scratch": {"scratch": True}}
PUBLISHED = {  # the paper's Table 2, 30,000 steps of RT-1: FVD, FID, SSIM, LPIPS, PSNR
    "shift, no guidance": "29.9 / 7.85 / .799 / .185 / 21.5",
    "masked, no guidance": "29.4 / 7.07 / .824 / .169 / 22.9",
    "extrapolative, no guidance": "28.6 / 7.52 / .832 / .162 / 23.4",
    "masked, guided": "25.8 / 6.84 / .840 / .159 / 23.9",
    "extrapolative, guided": "22.4 / 6.16 / .839 / .159 / 23.9",
    "from scratch": "1769 / 469 / .065 / .818 / 8.3"}


@dataclass
class Settings(TrainingSettings):
    variants: list[str] = option(None, f"which: {', '.join(VARIANTS)}, or settings of train.py "
                                       "as \"lr=5e-4 batch=2\"; if left out, all with names",
                                 nargs="+", metavar="NAME", type=str)
    table2: bool = option(False, "the rows of the paper's Table 2 instead")
    denoising_steps: int | None = option(None, "if left out, those of a small world", type=int)
    guidance: float | None = option(None, "of the rollouts; if left out, 1, and in Table 2 2",
                                    type=float)
    out: str = option("runs/ablations", "folder for runs and the table")


def complete(settings: Settings) -> None:
    settings.variants = settings.variants or list(TABLE2 if settings.table2 else VARIANTS)
    if settings.guidance is None:
        settings.guidance = 2.0 if settings.table2 else 1.0
    for variant in settings.variants:
        changes(variant)


def changes(variant: str) -> dict:
    """Settings of train.py that a variant changes. Raises DataError for one that nobody knows."""
    if variant in VARIANTS | TABLE2:
        return (VARIANTS | TABLE2)[variant]
    known = {each.name: each for each in fields(training.Settings)}
    pairs = [assignment.partition("=") for assignment in variant.split()]
    if not all(name in known and value for name, _, value in pairs):
        raise DataError(f"there is no variant {variant!r}; known are {', '.join(VARIANTS)}, and "
                        "settings of train.py such as lr=5e-4")
    return {name: training.convert(known[name], value) for name, _, value in pairs}


def measure(variant: str, seed: int, settings: Settings, held_out: HeldOut) -> dict:
    """{"curve": {step: held-out loss}, "loss": the last, "psnr": dB, …}, kept or made now."""
    run = Path(settings.out) / f"{re.sub(r'[^a-z0-9.]+', '_', variant)}_{seed}"
    if variant == REPEATING:
        return held_out.score(np.repeat(held_out.truth[:, :1], FRAMES, axis=1))

    def make() -> dict:
        curve = post_train(run, changes(variant), seed, settings)
        knows_hidden = changes(variant).get("action_dropout") != 0
        world = load_world(run, guidance=settings.guidance if knows_hidden else 1.0,
                           steps=settings.denoising_steps, seed=seed)
        imagined = rollout_batch(world, held_out.truth, held_out.actions, batch=8)
        return held_out.score(imagined) | {"curve": curve, "loss": list(curve.values())[-1]}

    return kept(run / "result.json", decisive(settings), make)


def run(settings: Settings) -> None:
    out, held_out = Path(settings.out), open_held_out(settings, FRAMES)
    results = measure_all([REPEATING, *settings.variants], settings.seeds,
                          lambda variant, seed: measure(variant, seed, settings, held_out))
    baseline = "mixed, no guidance" if settings.table2 else "baseline"
    lines = table(results, PUBLISHED if settings.table2 else None, baseline)
    lines.append(f"\nmean ± standard deviation of {settings.seeds} seeds"
                 + f", differences from {baseline!r} seed by seed" * (baseline in results)
                 + f"; {settings.steps} steps of {settings.batch} clips of {settings.frames} "
                 f"frames; {len(held_out.truth)} episodes rolled out, guidance "
                 f"{settings.guidance:g}")
    print("\n" + "\n".join(lines))
    (out / "ablations.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


main = program(__name__, "ablations", run, Settings, "Compare variants of the method.", complete)
