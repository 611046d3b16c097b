"""How well a world model foretells held-out episodes: python -m evaluation.evaluate --episodes 32

Every episode's first frames are given, the rest is imagined from its actions, and each imagined frame is compared with what
happened. Beside it stands the score of a model that knows nothing: it repeats the last given frame.
"""
import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import DATA_SETS, DataError, Episodes, default_root, fit_frames, open_episodes
from dynamicrafter.model import TINY_WORLD
from evaluation.pictures import save_curves
from sample import RequestError, WorldModel, load_world, psnr
from unet import CheckpointError


def read_batches(episodes: Episodes, frames: int, batch: int, size: tuple[int, int]
                 ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first frames [B, T, H, W, 3] of episodes at a model's size, and the actions [B, T, A] taken at them."""
    for first in range(0, len(episodes), batch):
        read = [episodes[i].read(0, frames) for i in range(first, min(first + batch, len(episodes)))]
        yield np.stack([fit_frames(clip, *size) for clip, _ in read]), np.stack([actions for _, actions in read])


def imagine(world: WorldModel, frames: np.ndarray, actions: np.ndarray, context: int = 1) -> np.ndarray:
    """Episodes side by side: uint8 [B, T, H, W, 3], the given frames included, from those and actions [B, T - 1, A]."""
    world.reset(frames[:, :context], actions[:, : context - 1])
    steps = tqdm(range(context - 1, actions.shape[1]), unit="frame", leave=False, disable=None)
    return np.concatenate([frames[:, :context], np.stack([world.step(actions[:, t]) for t in steps], axis=1)], axis=1)


def scores(world: WorldModel, episodes: Episodes, frames: int, context: int, batch: int) -> dict[str, np.ndarray]:
    """PSNR in dB of every imagined frame of every episode, and of the last given frame in its place: [N, T - context]."""
    imagined, repeated = [], []
    for truth, actions in read_batches(episodes, frames, batch, world.model.config.size):
        for clip, right in zip(imagine(world, truth, actions[:, :-1], context), truth):
            imagined.append(psnr(clip, right)[context:])
            repeated.append(psnr(np.repeat(right[context - 1 : context], frames, axis=0), right)[context:])
    return {"imagined": np.array(imagined), "repeating": np.array(repeated)}


def open_held_out(args: argparse.Namespace, frames: int) -> Episodes:
    """The first --episodes episodes of the validation split."""
    episodes = open_episodes(args.data, args.root or default_root(args.data), "val", min_length=frames)
    if args.episodes > len(episodes):
        raise DataError(f"{args.episodes} episodes were asked for, but only {len(episodes)} are held out")
    return episodes.where(np.arange(args.episodes))


def add_world_options(parser: argparse.ArgumentParser, steps: int) -> None:
    parser.add_argument("--checkpoint", default=str(TINY_WORLD), help="as in sample.py")
    parser.add_argument("--data", choices=DATA_SETS, default="rt1")
    parser.add_argument("--root")
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--steps", type=int, default=steps, help="denoising steps per frame")
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=8, help="worlds side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="rollouts", help="folder for the picture")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure imagined frames of held-out episodes.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_world_options(parser, steps=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--frames", type=int, default=16, help="of an episode, given ones included")
    parser.add_argument("--context", type=int, help="frames given; if left out, as the data set has it")
    args = parser.parse_args(argv)
    try:
        world = load_world(args.checkpoint, guidance=args.guidance, steps=args.steps, eta=args.eta, seed=args.seed)
        context = args.context or DATA_SETS[args.data].context
        episodes = open_held_out(args, args.frames)
        table = scores(world, episodes, args.frames, context, args.batch)
    except (DataError, CheckpointError, RequestError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    print(f"{len(episodes)} held-out episodes of {args.data}, {args.frames} frames, {context} given; guidance {args.guidance:g}, "
          f"{args.steps} steps\n\n| frame | PSNR, imagined (dB) | repeating frame {context - 1} (dB) |\n| --- | --- | --- |")
    by_frame = {name: rows.mean(axis=0) for name, rows in table.items()}
    for t in range(args.frames - context):
        print(f"| {t + context} | {by_frame['imagined'][t]:.2f} | {by_frame['repeating'][t]:.2f} |")
    ours, theirs = (rows.mean() for rows in table.values())
    print(f"| mean | **{ours:.2f}** | {theirs:.2f} |\n\n{ours - theirs:+.2f} dB")
    out = Path(args.out) / "psnr_by_frame.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    save_curves(out, {f"{name}, dB": list(enumerate(row, start=context)) for name, row in by_frame.items()}, "frame")
    print(f"plot: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
