"""Does it matter? Leave out one idea at a time, and see: python -m evaluation.ablations [--quick]

Every variant is post-trained by train.py from the bundled base (or with another in --base), for the same few steps on the same
clips in the same order with the same noise, once per seed; then all are compared on held-out episodes:

    held-out loss    of the velocity, every frame at a level of its own
    rollout          PSNR of autoregressive rollouts, which is what counts

Seeds differ by their held-out clips and noise as well, so a variant is compared with the method as it is seed by seed.

What is done is kept (--out), so an interrupted comparison goes on where it was. Paper: section 5.4 (ablations).
"""
import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import DataError
from dynamicrafter.model import TINY_BASE
from evaluation.evaluate import evaluate, open_held_out
from evaluation.pictures import save_curves
from sample import RequestError, load_world
from unet import CheckpointError

VARIANTS = {  # name -> arguments of train.py
    "as it is": [],
    "extrapolative transfer": ["--transfer", "extrapolative"],
    "masked transfer": ["--transfer", "masked"],
    "shift transfer": ["--transfer", "shift"],
    "norms over the past": ["--norm-scope", "past"],
    "norms over the clip": ["--norm-scope", "clip"],  # the released code's: reads the future in training
    "no action dropout": ["--action-dropout", "0"],  # and so no guidance
    "no diffusion forcing": ["--shared-level"],
    "clear frames": ["--clear-frames", "0.6"],  # not the paper's: levels as a rollout's history has them, more often
    "clear frames, clean measure": ["--clear-frames", "0.6", "--measure", "clean"],  # and nearly clean frames count little
    "from scratch": ["--scratch"],  # but for the autoencoder and the image tower
}


def post_train(run: Path, variant: str, seed: int, args: argparse.Namespace) -> dict[int, float]:
    """Train this variant, or the rest of it; held-out loss by step."""
    every = max(1, args.steps // 5)
    words = ["--data", args.data, "--base", args.base, "--out", run, "--steps", args.steps, "--batch", args.batch, "--frames", args.frames,
             "--warmup", min(50, args.steps // 4), "--cooldown", args.cooldown, "--val-every", every, "--val-clips", args.val_clips, "--save-every", every,
             "--sample-every", 10**9, "--sample-steps", 1, "--dropout", 0, "--seed", seed, "--workers", args.workers, "--resume", *VARIANTS[variant]]
    words += (["--root", args.root] if args.root else []) + (["--bf16"] if args.bf16 else [])
    if subprocess.run([sys.executable, Path(__file__).parent.parent / "train.py", *map(str, words)]).returncode:
        raise DataError(f"post-training {variant!r} failed or was interrupted; the same command goes on with it")
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {row["step"]: row["val"] for row in rows if "val" in row}


def measure(variant: str, seed: int, args: argparse.Namespace) -> dict:
    """{"loss": {step: loss}, "psnr": dB} of a variant and seed, from its result file or made now."""
    run = Path(args.out) / f"{re.sub(r'[^a-z]+', '_', variant)}_{seed}"
    result = run / "result.json"
    if not result.exists():
        losses = post_train(run, variant, seed, args)
        guidance = 1.0 if variant == "no action dropout" else args.guidance
        world = load_world(run, guidance=guidance, steps=args.denoising_steps, seed=seed, history_level=39)
        tally = evaluate(world, open_held_out(args, 16), 16, context=1)
        result.write_text(json.dumps({"loss": losses, "psnr": float(tally.sums["psnr"].mean() / tally.episodes)}))
    content = json.loads(result.read_text())
    return {"loss": {int(step): loss for step, loss in content["loss"].items()}, "psnr": content["psnr"]}


def compare(values: dict[str, list[float]], variant: str, digits: int) -> str:
    """Two cells of the table: a variant's mean and spread over seeds, and by how much it is more than the method as it is."""
    def spread(numbers: Sequence[float], sign: str = "") -> str:
        return f"{np.mean(numbers):{sign}.{digits}f} ± {np.std(numbers):.{digits}f}"

    more = spread(np.subtract(values[variant], values["as it is"]), "+") if "as it is" in values and variant != "as it is" else ""
    return f"{spread(values[variant])} | {more}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare variants of the method.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--base", default=str(TINY_BASE))
    add("--data", default="rt1")
    add("--root", help="the data set's folder; if left out, datasets/ or else the bundled episodes")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=80, help="of post-training")
    add("--cooldown", type=int, default=40, help="as in train.py")
    add("--batch", type=int, default=2)
    add("--frames", type=int, default=16, help="frames per clip in training")
    add("--val-clips", type=int, default=16)
    add("--workers", type=int, default=0)
    add("--bf16", action="store_true")
    add("--episodes", type=int, default=16, help="held-out episodes to roll out")
    add("--denoising-steps", type=int, default=6)
    add("--guidance", type=float, default=1.0)
    add("--quick", action="store_true", help="one seed and 20 steps: minutes, and not to be believed")
    add("--out", default="runs/ablations", help="folder for runs, table and plot")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.steps, args.cooldown, args.frames, args.val_clips, args.episodes = 1, 20, 10, 8, 8, 2
    out = Path(args.out)
    try:
        results = {variant: [measure(variant, seed, args) for seed in range(args.seeds)] for variant in args.variants}
    except (DataError, CheckpointError, RequestError, OSError) as error:
        print(f"ablations: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on")
        return 130
    lines = ["| variant | held-out loss | more than as it is | rollout PSNR (dB) | more than as it is |", "| --- | --- | --- | --- | --- |"]
    losses = {variant: [list(run["loss"].values())[-1] for run in runs] for variant, runs in results.items()}
    scores = {variant: [run["psnr"] for run in runs] for variant, runs in results.items()}
    lines += [f"| {variant} | {compare(losses, variant, 4)} | {compare(scores, variant, 2)} |" for variant in results]
    lines.append(f"\nmean ± standard deviation of {args.seeds} seeds; {args.steps} steps of {args.batch} clips of {args.frames} frames; "
                 f"{args.episodes} episodes rolled out, guidance {args.guidance:g}")
    print("\n" + "\n".join(lines))
    (out / "ablations.md").write_text("\n".join(lines) + "\n")
    save_curves(out / "ablations.png", {variant: [(step, np.mean([run["loss"][step] for run in runs])) for step in runs[0]["loss"]]
                                        for variant, runs in results.items()}, "step")
    print(f"plot: {out}/ablations.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
