"""Several futures of one past (the paper's D.7): python -m evaluation.futures

The same first frame and the same actions, and other noise: where the past does not decide what
comes, imagined futures part. Does their spread say where the world errs?

    spread    standard deviation over the seeds, of a pixel, of 255
    error     of the mean over seeds, from what came
    ratio     of the two, 1 where what came is like one draw more
    pixels    correlation of spread and error among the pixels of a frame, mean over episodes
    episodes  correlation of their means, among episodes: does a doubtful future turn out wrong?
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.evaluate import WorldSettings, open_held_out, read_batches, rollout_batch
from evaluation.policies import pearson
from sample import WorldModel
from support.options import option, program
from support.pictures import save_strip


@dataclass
class Settings(WorldSettings):
    guidance: float | None = option(None, "as in sample.py", type=float)
    context_frames: int = option(1, "frames given")
    seeds: int = option(6, "futures of each past", least=2)
    out: str = option("evaluations/futures", "folder for the pictures")


def spread_and_error(imagined: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of futures [S, N, T, H, W, 3] and what came [N, T, H, W, 3], by pixel [N, T, H, W]. A mean of
    S draws is off by √(1 + 1/S) of their deviation, which the spread contains."""
    S = len(imagined)
    mean = imagined.mean(axis=0, dtype=np.float32)
    variance = sum((future - mean) ** 2 for future in imagined) / (S - 1)
    return (np.sqrt((1 + 1 / S) * variance.mean(axis=-1)),
            np.sqrt(((mean - truth) ** 2).mean(axis=-1)))


def size(pixels: np.ndarray) -> np.ndarray:
    """Root mean square of pictures [..., H, W]."""
    return np.sqrt((pixels**2).mean(axis=(-2, -1)))


def run(settings: Settings) -> None:
    world, given = settings.load_world(guidance=settings.guidance), settings.context_frames
    episodes = open_held_out(settings, world)
    (truth, actions), = read_batches(episodes, settings.frames, len(episodes), world.model.config)
    worlds = [WorldModel(world.model, settings.guidance, steps=settings.steps, eta=settings.eta,
                         seed=settings.seed + i) for i in range(settings.seeds)]
    imagined = np.stack([rollout_batch(world, truth, actions[:, :-1], given, batch=settings.batch)
                         for world in worlds])
    spread, error = spread_and_error(imagined, truth)
    doubts, faults = size(spread), size(error)  # [N, T]
    print(f"\n{len(episodes)} episodes, {settings.seeds} seeds, {given} frames given; "
          f"{world.sampling}\n\n| frame | spread | error | ratio | pixels | episodes |\n"
          f"|{' --- |' * 6}")
    for t in sorted({given, *range(given + 4, settings.frames, 5), settings.frames - 1}):
        among = np.nanmean([pearson(spread[i, t].ravel(), error[i, t].ravel())
                            for i in range(len(truth))])
        doubt, fault = doubts[:, t], faults[:, t]
        print(f"| {t} | {size(doubt[None]):.2f} | {size(fault[None]):.2f} | "
              f"{size(doubt[None]) / size(fault[None]):.2f} | {among:.2f} | "
              f"{pearson(doubt, fault):.2f} |")
    (out := Path(settings.out)).mkdir(parents=True, exist_ok=True)
    i = doubts[:, -1].argmax()
    maps = {name: np.repeat((4 * each[i]).clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)
            for name, each in (("spread, times 4", spread), ("error, times 4", error))}
    save_strip(out / "futures.png", {"truth": truth[i]} | {
        f"seed {settings.seed + n}": future[i] for n, future in enumerate(imagined)} | maps)
    print(f"\npicture: {out}/futures.png, the most doubtful episode")


main = program(__name__, "futures", run, Settings, "Imagine several futures of one past.")
