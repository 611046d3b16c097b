"""How long does an imagined world hold? python -m evaluation.drift --data csgo

Every frame is imagined from imagined frames, so an error may grow without end. 100 frames of
held-out episodes under their recorded actions; curves over time, of what was predicted and of what
happened:

    PSNR        against the true frame; and that of repeating the last given frame
    colour      how far the mean colour has gone from the first frame's, of 255
    sharpness   mean difference of neighbouring pixels: a world that blurs loses it
"""
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data import DATA_SETS
from evaluation.evaluate import WorldSettings, rollout_batch, open_held_out, read_batches
from support.options import option, program
from support.pictures import psnr, save_curves, save_strip


def colour_shift(frames: np.ndarray) -> np.ndarray:
    """uint8 [..., T, H, W, 3] -> [..., T]: distance of the mean colour from the first frame's."""
    mean = frames.mean(axis=(-3, -2))  # [..., T, 3]
    return np.linalg.norm(mean - mean[..., :1, :], axis=-1)


def sharpness(frames: np.ndarray) -> np.ndarray:
    """uint8 [..., T, H, W, 3] -> [..., T]: mean difference of neighbouring pixels."""
    pixels = frames.astype(np.float32)
    return (np.abs(np.diff(pixels, axis=-2)).mean(axis=(-3, -2, -1))
            + np.abs(np.diff(pixels, axis=-3)).mean(axis=(-3, -2, -1))) / 2


@dataclass
class Settings(WorldSettings):
    episodes: int | None = option(8, "held-out episodes", type=int)
    # a game is given four
    frames: int = option(104, "frames of an episode, given ones included", least=5)
    out: str = option("evaluations/drift", "folder for the results")


def run(settings: Settings) -> None:
    world = settings.load_world()
    episodes = open_held_out(settings, world)
    given_frames = DATA_SETS[settings.data].context_frames
    (truth, actions), = read_batches(episodes, settings.frames, len(episodes), world.model.config)
    imagined = rollout_batch(world, truth, actions[:, :-1], given_frames, batch=settings.batch)
    given = truth[:, given_frames - 1, None]
    curves = {
        "psnr": {"imagined": psnr(imagined, truth), "repeating": psnr(given, truth)},
        "colour": {"imagined": colour_shift(imagined), "true": colour_shift(truth)},
        "sharpness": {"imagined": sharpness(imagined), "true": sharpness(truth)}}
    means = {measure: {name: rows.mean(axis=0) for name, rows in pair.items()}
             for measure, pair in curves.items()}
    (out := Path(settings.out)).mkdir(parents=True, exist_ok=True)
    for measure, pair in means.items():
        save_curves(out / f"{measure}_{settings.data}.png",
                    {f"{measure}, {name}": list(enumerate(row))[given_frames:]
                     for name, row in pair.items()}, "frame")
    save_strip(out / f"strip_{settings.data}.png",
               {"truth": truth[0, ::8], "imagined": imagined[0, ::8]}, columns=14)

    print(f"{len(episodes)} episodes of {settings.data}, {given_frames} frames given; "
          f"{world.sampling}")
    print("\n| frame | PSNR (dB) | repeating | colour shift | true | sharpness | true |\n|"
          f"{' --- |' * 7}")
    for t in sorted({*range(given_frames + 9, settings.frames - 1, 15), settings.frames - 1}):
        cells = [f"{row[t]:.2f}" for pair in means.values() for row in pair.values()]
        print(f"| {t} | {' | '.join(cells)} |")
    (out / f"drift_{settings.data}.json").write_text(json.dumps({
        "settings": asdict(settings), "means": {measure: {name: row.tolist() for name, row in
                                                          pair.items()}
                                                for measure, pair in means.items()}}),
        encoding="utf-8")
    print(f"\ncurves and a strip: {out}")


main = program(__name__, "drift", run, Settings, "Measure how a world holds in long rollouts.")
