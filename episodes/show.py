"""What was read, before hours are trained on it: python -m episodes.show --root my_robot

How many episodes, and which were left out; what every number of an action is like; a strip with
every action in words under the picture that it led to; and whether the actions stand beside the
right pictures. That is seen in what moves between pictures t and t + 1, left and right, up and
down, part by part: linear regression says it from the actions of rows t - 3, t - 2 and so on, each
added to those before, and is measured on episodes that it has not seen. The last row that helps
should be t, which was taken at picture t. If t + 1 still helps, rows come one too late; if t does
not, they come one too early, or the robot takes a frame to obey.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data import DATA_SETS, Episodes, describe_action, open_episodes
from support.options import option, program
from support.pictures import save_strip

ROWS, FOLDS, RIDGE = range(-3, 3), 5, 0.01
HELPS, FOLLOWS = 0.04, 0.02  # share of what is explained that a row adds; share that is explained


@dataclass
class Settings:
    data: str = option("folder", "data set", choices=DATA_SETS)
    root: str | None = option(None, "its folder")
    fps: float | None = option(None, "frames per second, if a folder does not say", type=float)
    most: int = option(200, "episodes that are read for the numbers and the alignment")
    out: str = option("rollouts", "folder for the picture")


def motion(frames: np.ndarray) -> np.ndarray:
    """How uint8 frames [T, H, W, 3] move: [T - 1, 40], sideways and down in 20 parts, from how
    light changes where it has a slope."""
    grey = np.stack([np.asarray(Image.fromarray(frame).convert("L").resize(
        (40, 32), Image.Resampling.BOX)) for frame in frames]).astype(np.float32)
    change = np.diff(grey, axis=0)
    down, right = np.gradient((grey[1:] + grey[:-1]) / 2, axis=(1, 2))

    def parts(values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, 4, 8, 5, 8).sum(axis=(2, 4)).reshape(len(values), -1)

    slope = parts(right**2 + down**2) + 100  # what has none says nothing
    return np.concatenate([parts(change * right) / slope, parts(change * down) / slope], axis=1)


def explained(x: np.ndarray, y: np.ndarray, group: np.ndarray) -> float:
    """Share of the variance of y [N, m], each of unit size, that ridge regression on x [N, n]
    explains in groups that it has not seen."""
    x = (x - x.mean(axis=0)) / x.std(axis=0).clip(1e-6)
    left = np.empty_like(y)
    for fold in range(FOLDS):
        seen = group % FOLDS != fold
        a, mean = x[seen], y[seen].mean(axis=0)
        weights = np.linalg.solve(a.T @ a + RIDGE * len(a) * np.eye(x.shape[1]),
                                  a.T @ (y[seen] - mean))
        left[~seen] = y[~seen] - mean - x[~seen] @ weights
    return float(np.maximum(1 - (left**2).mean(axis=0), 0).mean())


def alignment(episodes: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """Of (frames, actions), what all of ROWS up to each explain of the motion."""
    x, y, group = [], [], []
    for i, (frames, actions) in enumerate(episodes):
        t = np.arange(-ROWS[0], len(frames) - 1 - ROWS[-1])
        x.append(np.stack([actions[t + row] for row in ROWS], axis=1).astype(np.float64))
        y.append(motion(frames)[t])
        group.append(np.full(len(t), i))
    x, y, group = map(np.concatenate, (x, y, group))
    x, y = x[:, :, x.std(axis=(0, 1)) > 1e-6], y[:, y.std(axis=0) > 1e-6]
    y = (y - y.mean(axis=0)) / y.std(axis=0)
    return [explained(x[:, : n + 1].reshape(len(x), -1), y, group) for n in range(len(ROWS))]


def say_alignment(shares: list[float]) -> str:
    whole, gains = max(shares), np.diff([0, *shares])
    if whole < FOLLOWS:
        return (f"alignment: the actions explain {100 * whole:.0f} % of what moves, too little to "
                "say whether they stand beside the right pictures")
    name = {row: f"t{row:+d}" if row else "t" for row in ROWS}
    last = ROWS[int(np.flatnonzero(gains > HELPS * whole)[-1])]
    verdict = "as it should be, row t was taken at picture t"
    if last > 0:
        verdict = f"rows come {last} too late: row t led to picture {name[1 - last]}; move them up"
    if last < 0:
        verdict = f"rows come {-last} too early, or the robot takes so long to obey"
    shown = ", ".join(f"{name[row]} {100 * share:.1f} %"
                      for row, share in zip(ROWS, shares, strict=True))
    return (f"alignment: what moves from picture t to t+1 is explained by rows up to {name[last]} "
            f"({shown}): {verdict}")


def show_numbers(actions: np.ndarray, names: tuple[str, ...]) -> None:
    print(f"| action | min | mean | max | std | |\n|{' --- |' * 6}")
    for i, column in enumerate(actions.T):
        note = "never varies" if np.ptp(column) < 1e-6 * max(1, abs(column[0])) else ""
        print(f"| {names[i] if names else i} | {column.min():.4g} | {column.mean():.4g} | "
              f"{column.max():.4g} | {column.std():.3g} | {note} |")


def run(settings: Settings) -> None:
    parts = {split: open_episodes(settings.data, settings.root, split, fps=settings.fps)
             for split in ("train", "val")}
    episodes: Episodes = parts["train"]
    lengths = np.concatenate([part.records[:, 4] for part in parts.values()])
    shown = episodes[0]
    height, width = shown.read(0, 1)[0].shape[1:3]
    print(f"{len(episodes)} episodes to train on, {len(parts['val'])} held out; {lengths.min()} to "
          f"{lengths.max()} frames, half of them {np.median(lengths):.0f} or more; pictures of "
          f"{height}×{width}, {episodes.dataset.fps:g} a second")
    for part in parts.values():
        for problem in part.problems:
            print(f"left out: {problem}")
    read = [episodes[i].read(0, episodes[i].length)
            for i in range(min(settings.most, len(episodes)))]
    print()
    show_numbers(np.concatenate([actions for _, actions in read]), episodes.dataset.names)
    long = [each for each in read if len(each[0]) > len(ROWS) + 1]
    print("\n" + (say_alignment(alignment(long)) if len(long) >= FOLDS else
                  f"alignment: it takes {FOLDS} episodes of {len(ROWS) + 2} frames to say"))
    frames, actions = shown.read(0, min(16, shown.length))
    words = ["", *(describe_action(episodes.dataset, action) for action in actions[:-1])]
    (out := Path(settings.out)).mkdir(parents=True, exist_ok=True)
    save_strip(picture := out / "episode.png",
               {f"{shown.name}, and what led to each picture": frames}, captions=words)
    print(f"{picture}: the first pictures of {shown.name}")


main = program(__name__, "show", run, Settings, "Look at what is read.")
