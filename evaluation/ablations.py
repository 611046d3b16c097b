"""Does it matter? Change one idea at a time, and see: python -m evaluation.ablations [--quick]

    python -m evaluation.ablations --variants baseline "batch=2 steps=600" base=runs/other.pt

Every variant is post-trained by train.py from the bundled base (or another in --base), for the same
few steps on the same clips in the same order with the same noise, once per seed; then all are
compared on held-out episodes:

    held-out loss    of the velocity, every frame at a level of its own
    rollout          PSNR of autoregressive rollouts, which is what counts

Seeds differ by their held-out clips and noise as well, so a variant is compared with the baseline
seed by seed.

What is done is kept (--out), so an interrupted comparison resumes where it was. Paper: section 5.4,
D.10 and D.11.
"""
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

import train
from evaluation.evaluate import WorldSettings, evaluate, open_held_out
from evaluation.kept import decisive, kept, require_same
from evaluation.transfers import StartSettings
from model.saving import TINY_BASE, preset_of
from sample import load_world
from support.errors import DataError
from support.options import option, program
from support.pictures import save_curves
from training import settings as training
from training.start import Recipe

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
    # not the paper's: more clear histories, as a rollout has
    "low-noise frames": {"low_noise_prob": 0.6},
    # nearly clean frames count little
    "low-noise frames, x0 loss": {"low_noise_prob": 0.6, "loss_weighting": "x0"},
    "temporal layers alone": {"trainable": "temporal"},  # not the paper's: half of the memory
    "PyTorch's action initialisation": {"action_init": "pytorch"},  # as at full size
    "from scratch": {"scratch": True},  # except the autoencoder and the image tower
}


@dataclass
class Settings(StartSettings):
    variants: list[str] = option(None, f"which: {', '.join(VARIANTS)}, or settings of train.py "
                                       "as \"lr=5e-4 batch=2\"; if left out, all with names",
                                 nargs="+", metavar="NAME", type=str)
    seeds: int = option(3, "runs of every variant")
    steps: int = option(80, "of post-training")
    cooldown: int = option(40, "as in train.py", least=0)
    batch: int = option(2, "clips per step")
    frames: int = option(16, "frames per clip in training")
    val_clips: int = option(16, "held-out clips in a validation loss")
    workers: int = option(0, "processes that decode frames", least=0)
    bf16: bool = option(False, "train in bfloat16")
    episodes: int = option(16, "held-out episodes to roll out")
    denoising_steps: int | None = option(None, "if left out, those of a small world", type=int)
    guidance: float = option(1.0, "of the rollouts")
    quick: bool = option(False, "one seed and 20 steps: minutes, and not to be believed")
    out: str | None = option(None, "folder for runs, table and plot; if left out, runs/ablations, "
                                   "and for --quick runs/ablations_quick")


def complete(settings: Settings) -> None:
    settings.base = settings.base or str(TINY_BASE)
    settings.variants = settings.variants or list(VARIANTS)
    settings.out = settings.out or "runs/ablations" + "_quick" * settings.quick
    for variant in settings.variants:
        changes(variant)
    if settings.quick:
        settings.seeds, settings.steps, settings.cooldown, settings.frames = 1, 20, 10, 8
        settings.val_clips, settings.episodes = 8, 2


def changes(variant: str) -> dict:
    """Settings of train.py that a variant changes. Raises DataError for one that nobody knows."""
    if variant in VARIANTS:
        return VARIANTS[variant]
    known = {each.name: each for each in fields(training.Settings)}
    pairs = [assignment.partition("=") for assignment in variant.split()]
    if not all(name in known and value for name, _, value in pairs):
        raise DataError(f"there is no variant {variant!r}; known are {', '.join(VARIANTS)}, and "
                        "settings of train.py such as lr=5e-4")
    return {name: training.convert(known[name], value) for name, _, value in pairs}


def post_train(run: Path, changes: dict, seed: int, settings: Settings,
               recipe: Recipe = train.WORLD) -> dict[int, float]:
    """Train with these changes, or the rest of it; held-out loss by step. Raises DataError if the
    run was begun with other settings."""
    every = max(1, settings.steps // 5)
    chosen = training.Settings(
        data=settings.data, root=settings.root, base=settings.base,
        preset=preset_of(settings.base), out=str(run),
        resume=(run / "checkpoint.pt").exists(), overwrite=True, steps=settings.steps,
        batch=settings.batch, frames=settings.frames, warmup=min(50, settings.steps // 4),
        cooldown=settings.cooldown, val_every=every, val_clips=settings.val_clips,
        save_every=every, sample_every=10**9, dropout=0.0, augment=False, seed=seed,
        workers=settings.workers, bf16=settings.bf16, lr=training.LAPTOP["lr"])
    chosen = replace(chosen, **changes)
    training.complete(chosen)
    if chosen.resume:
        require_same(run, chosen)
    if train.train(chosen, recipe):
        raise DataError(f"the training in {run} was interrupted; the same command resumes it")
    rows = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["val"] for row in rows if "val" in row}


def measure(variant: str, seed: int, settings: Settings) -> dict:
    """{"loss": {step: loss}, "psnr": dB} of a variant and seed, from its result file or made now.
    """
    run = Path(settings.out) / f"{re.sub(r'[^a-z0-9.]+', '_', variant)}_{seed}"

    def make() -> dict:
        losses = post_train(run, changes(variant), seed, settings)
        guidance = 1.0 if variant == "no action dropout" else settings.guidance
        world = load_world(run, guidance=guidance, steps=settings.denoising_steps, seed=seed)
        rolled_out = WorldSettings(data=settings.data, root=settings.root,
                                   episodes=settings.episodes)
        tally = evaluate(world, open_held_out(rolled_out, world), 16, context_frames=1)
        return {"loss": losses, "psnr": float(tally.sums["psnr"].mean() / tally.episodes)}

    result = kept(run / "result.json", decisive(settings), make)
    return result | {"loss": {int(step): loss for step, loss in result["loss"].items()}}


def compare(values: dict[str, list[float]], variant: str, digits: int) -> str:
    """Two cells of the table: mean and spread over seeds, and the difference from the baseline."""
    def spread(numbers: Sequence[float], sign: str = "") -> str:
        return f"{np.mean(numbers):{sign}.{digits}f} ± {np.std(numbers):.{digits}f}"

    difference = ""
    if "baseline" in values and variant != "baseline":
        difference = spread(np.subtract(values[variant], values["baseline"]), "+")
    return f"{spread(values[variant])} | {difference}"


def run(settings: Settings) -> None:
    out = Path(settings.out)
    results = {variant: [measure(variant, seed, settings) for seed in range(settings.seeds)]
               for variant in settings.variants}
    lines = ["| variant | held-out loss | difference | rollout PSNR (dB) | difference |",
             "| --- | --- | --- | --- | --- |"]
    losses = {variant: [list(run["loss"].values())[-1] for run in runs]
              for variant, runs in results.items()}
    scores = {variant: [run["psnr"] for run in runs] for variant, runs in results.items()}
    lines += [f"| {variant} | {compare(losses, variant, 4)} | {compare(scores, variant, 2)} |"
              for variant in results]
    lines.append(f"\nmean ± standard deviation of {settings.seeds} seeds, differences from the "
                 "baseline seed by seed; "
                 f"{settings.steps} steps of {settings.batch} clips of {settings.frames} frames; "
                 f"{settings.episodes} episodes rolled out, guidance {settings.guidance:g}")
    print("\n" + "\n".join(lines))
    (out / "ablations.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_curves(out / "ablations.png", {
        variant: [(step, np.mean([run["loss"][step] for run in runs])) for step in runs[0]["loss"]]
        for variant, runs in results.items()}, "step")
    print(f"plot: {out}/ablations.png")


main = program(__name__, "ablations", run, Settings, "Compare variants of the method.", complete)
