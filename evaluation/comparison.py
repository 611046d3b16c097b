"""What comparisons share: training, held-out episodes, results that are kept, tables over seeds."""
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

import train
from data import Episodes, open_episodes
from evaluation.controllability import PIXEL, GripperReader, has_gripper, recorded, train_reader
from evaluation.evaluate import read_batches
from evaluation.intervals import mean_and_deviation
from evaluation.metrics import ssim
from model.saving import TINY_BASE, preset_of
from model.vid2world import PRESETS
from support.errors import DataError
from support.options import option
from support.pictures import psnr
from training import settings as training
from training.run_folder import read_settings
from training.start import Recipe

# settings on which no single result depends
FREE = {"rows", "variants", "methods", "seeds", "starts", "workers", "out", "resume", "overwrite",
        "table2"}
COLUMNS = {"loss": ("held-out loss", 4), "psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 3),
           "off": ("gripper off (pixels)", 2)}


@dataclass
class StartSettings:
    """What a comparison of trained models starts from."""
    base: str = option(str(TINY_BASE), "passive model to start from")
    data: str = option("rt1", "data set")
    root: str | None = option(None, "its folder; if left out, datasets/ or else the bundled "
                                    "episodes")


@dataclass
class TrainingSettings(StartSettings):
    """How all of its models are trained and measured."""
    seeds: int = option(3, "runs of every row")
    steps: int = option(training.LAPTOP["steps"], "of training")
    cooldown: int = option(training.LAPTOP["cooldown"], "as in train.py", least=0)
    batch: int = option(training.LAPTOP["batch"], "clips per step")
    decoder_steps: int = option(training.LAPTOP_WORLD["decoder_steps"], "as in train.py", least=0)
    frames: int = option(16, "frames per clip in training", least=2)
    val_clips: int = option(16, "held-out clips in a validation loss")
    episodes: int = option(32, "held-out episodes to imagine")


def post_train(run: Path, changes: dict, seed: int, settings: TrainingSettings,
               recipe: Recipe = train.WORLD) -> dict[int, float]:
    """Train as `python train.py --data rt1` does, but for these changes, or the rest of it;
    held-out loss by step. Raises DataError if the run was begun with other settings."""
    every = max(1, settings.steps // 5)
    named = {each.name: getattr(settings, each.name) for each in fields(TrainingSettings)
             if each.name not in ("seeds", "episodes")}  # which train.py does not know
    chosen = training.Settings(**training.LAPTOP_WORLD | named | {
        "out": str(run), "overwrite": True, "resume": (run / "checkpoint.pt").exists(),
        "warmup": min(50, settings.steps // 4), "val_every": every, "save_every": every,
        "sample_every": 10**9, "seed": seed, "workers": 0} | changes)
    chosen.preset = preset_of(chosen.base)
    training.complete(chosen)
    if chosen.resume:
        require_same(run, chosen)
    if train.train(chosen, recipe):
        raise DataError(f"the training in {run} was interrupted; the same command resumes it")
    rows = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["val"] for row in rows if "val" in row}


def require_same(run: Path, chosen: training.Settings) -> None:
    """Raises DataError for a run begun otherwise: its hours are neither mixed nor thrown away."""
    begun = read_settings(run)
    for name, value in decisive(chosen).items():
        if begun.get(name) != value:
            raise DataError(f"the run in {run} has {name} {begun.get(name)}, and here it is "
                            f"{value}: --out names a folder for other settings")


# --------------------------------------------------------------------------------------------------
# What is measured


@dataclass
class HeldOut:
    """Held-out episodes side by side, and a reader of the gripper's place, where that is known."""
    episodes: Episodes
    truth: np.ndarray  # uint8 [N, T, H, W, 3]
    actions: np.ndarray  # [N, T - 1, A], of the motion
    reader: GripperReader | None = None
    places: np.ndarray | None = None  # [N, 2], the gripper's pixel at the last frame

    def score(self, imagined: np.ndarray) -> dict[str, float]:
        """Of imagined clips [N, T, H, W, 3], whose first frames are given: PSNR, SSIM, and how far
        the gripper is from its place at the last frame."""
        scores = {"psnr": float(psnr(imagined, self.truth)[:, 1:].mean()),
                  "ssim": float(ssim(imagined, self.truth)[:, 1:].mean())}
        if self.reader:
            off = np.linalg.norm(self.reader.read(imagined[:, -1]) - self.places, axis=-1)
            scores["off"] = float(off.mean())
        return scores

    @property
    def reader_off(self) -> float:
        """What the reader is off by on recorded frames, in pixels."""
        frames, places = recorded(self.episodes)
        return float(np.linalg.norm(self.reader.read(frames) - places, axis=1).mean())


def open_held_out(settings: TrainingSettings, frames: int) -> HeldOut:
    """The first frames of the held-out episodes."""
    episodes = open_episodes(settings.data, settings.root, "val", frames)
    episodes = episodes.select(np.arange(min(settings.episodes, len(episodes))))
    config = PRESETS[preset_of(settings.base)]
    (truth, actions), = read_batches(episodes, frames, len(episodes), config)
    held_out = HeldOut(episodes, truth, actions[:, :-1])
    if has_gripper(episodes):
        held_out.reader = train_reader(open_episodes(settings.data, settings.root, "train"))
        held_out.places = np.stack([episode.feature(PIXEL)[frames - 1] for episode in episodes])
    return held_out


# --------------------------------------------------------------------------------------------------
# Results of rows and seeds


def decisive(settings: object) -> dict:
    """The settings of a comparison or a training on which one of its results depends."""
    return {name: value for name, value in asdict(settings).items() if name not in FREE}


def kept(path: Path, settings: dict, make: Callable[[], dict]) -> dict:
    """The result in a JSON file, if these settings made it; else it is made now, and written.
    Always as JSON gives it back: keys are text."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("settings") != settings:
        known = {"settings": settings, "result": make()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))["result"]


def measure_all(rows: Sequence[str], seeds: int, measure: Callable[[str, int], dict]
                ) -> dict[str, list[dict]]:
    """By row, the results of all seeds. The first seed of every row comes first; after what takes
    its time, it says how long the rest will."""
    results, took = {row: [] for row in rows}, []
    for seed in range(seeds):
        for row in rows:
            began = time.monotonic()
            results[row].append(measure(row, seed))
            minutes = (time.monotonic() - began) / 60
            if minutes > 0.2:  # and so was not kept
                took.append(minutes)
                left = len(rows) * seeds - sum(map(len, results.values()))
                print(f"{row}, seed {seed}: {minutes:.0f} minutes; {left} more to go, about "
                      f"{left * np.mean(took) / 60:.1f} hours", flush=True)
    return results


def table(results: dict[str, list[dict]], published: dict[str, str] | None = None,
          baseline: str = "baseline") -> list[str]:
    """Markdown: every row's mean ± deviation over seeds, and if there is a row of the baseline's
    name, the difference from it seed by seed.

    published  by row, what the paper has
    """
    columns = [name for name in COLUMNS if any(name in runs[0] for runs in results.values())]
    compared = results.get(baseline)
    heads = ["", *(head for name in columns for head in (
        COLUMNS[name][0], "difference")[: 1 + bool(compared)])]
    lines = []
    for row, runs in results.items():
        cells = [row]
        for name in columns:
            numbers, digits = [run.get(name, np.nan) for run in runs], COLUMNS[name][1]
            cells.append("" if name not in runs[0] else mean_and_deviation(numbers, digits))
            if compared:
                less = np.subtract(numbers, [run[name] for run in compared])
                same = runs is compared or name not in runs[0]
                cells.append("" if same else mean_and_deviation(less, digits, "+"))
        lines.append(cells + ([published.get(row, "")] if published else []))
    heads += ["published (FVD / FID / SSIM / LPIPS / PSNR)"] if published else []
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines)]
