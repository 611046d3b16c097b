"""How well a world model predicts held-out episodes, by the paper's metrics.

    python -m evaluation.evaluate               (the bundled world, in a few minutes)
    torchrun --nproc_per_node=4 -m evaluation.evaluate --root /data/fractal20220817_data \\
        --checkpoint runs/rt1 --episodes 1024 --inception inception-2015-12-05.pt \\
        --lpips vgg16.pt --i3d i3d_torchscript.pt

Every episode's first frames are given, the rest is imagined from its actions, and what was imagined
is compared with what happened (evaluation/metrics.py). Beside it stand the PSNR of repeating the
last given frame, and of what is imagined under the actions of other episodes: a world that does not
follow its actions loses nothing by them (the paper's D.9, Table 4).

The scores of every batch are kept, so that an interrupted run resumes. A batch draws the same noise
whichever process it falls to. Paper: section 5.1, metrics in C.2.
"""
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from baselines.clips import sample_jointly
from data import DATA_SETS, DataSet, Episodes, bundled_world, fit_frames, open_episodes
from episodes.frames import cut_bars, for_metrics
from evaluation.intervals import deviation
from evaluation.metrics import (ENOUGH, FeatureNetwork, colour_shift, frechet_distance, sharpness,
                                ssim)
from model.vid2world import ModelConfig
from sample import WorldModel, compare_actions, load_world
from support.errors import DataError, RequestError
from support.options import option, program
from support.pictures import psnr, save_curves
from training.processes import join_processes, leave_processes, wait_for_all

BETTER = {"psnr": "dB, higher is better", "ssim": "higher is better", "lpips": "lower is better",
          "fid": "lower is better", "fvd": "lower is better"}


@dataclass
class WorldSettings:
    """What every measurement of a world model can be told."""
    checkpoint: str | None = option(None, "as in sample.py; if left out, the bundled world")
    data: str = option("rt1", "data set", choices=DATA_SETS)
    root: str | None = option(None, "its folder; if left out, datasets/ or else the bundled "
                                    "episodes")
    episodes: int | None = option(None, "held-out episodes; if left out, all", type=int)
    frames: int = option(16, "frames of an episode, given ones included", least=2)
    steps: int | None = option(None, "denoising steps per frame; if left out, the checkpoint's",
                               type=int)
    eta: float | None = option(None, "fresh noise per step; if left out, the checkpoint's",
                               type=float)
    batch: int = option(8, "worlds side by side")
    seed: int = option(0, "random seed", least=0)

    def load_world(self, device: torch.device | None = None, **options: object) -> WorldModel:
        """The world model that is measured; `options` are further ones of WorldModel."""
        return load_world(self.checkpoint or bundled_world(self.data), device, steps=self.steps,
                          eta=self.eta, seed=self.seed, **options)


# Metric -> its value at every frame of every episode [N, T]; and of a network that compares sets,
# "fid, true" and so on -> features [frames or videos, size].
Scores = dict[str, np.ndarray]


def read_batches(episodes: Episodes, frames: int, batch: int, config: ModelConfig,
                 numbers: Sequence[int] | None = None
                 ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first frames [B, T, H, W, 3] of episodes at a model's size, and their actions [B, T, A].

    numbers  which of the batches; None means all
    """
    for b in range(-(-len(episodes) // batch)) if numbers is None else numbers:
        chosen = range(b * batch, min((b + 1) * batch, len(episodes)))
        read = [episodes[i].read(0, frames) for i in chosen]
        clips, actions = zip(*read, strict=True)
        yield np.stack([fit_frames(clip, *config.size, config.fit)
                        for clip in clips]), np.stack(actions)


class RepeatLastFrame:
    """The world in which nothing ever happens."""

    def reset(self, frames: np.ndarray, actions: np.ndarray | None = None) -> None:
        self.frame = frames[:, -1]

    def step(self, action: np.ndarray) -> np.ndarray:
        return self.frame


def rollout_batch(world: WorldModel, frames: np.ndarray, actions: np.ndarray,
                  context_frames: int = 1, nar: bool = False, batch: int | None = None
                  ) -> np.ndarray:
    """Episodes side by side, `batch` at a time: uint8 [N, T, H, W, 3], the given frames included,
    from those and actions [N, T - 1, A]."""
    if batch and len(frames) > batch:
        return np.concatenate([rollout_batch(world, frames[i : i + batch], actions[i : i + batch],
                                             context_frames, nar)
                               for i in range(0, len(frames), batch)])
    if nar:
        return sample_jointly(world, frames, actions)
    given = frames[:, :context_frames]
    world.reset(given, actions[:, : context_frames - 1])
    steps = tqdm(range(context_frames - 1, actions.shape[1]), unit="frame", leave=False,
                 disable=None)
    predicted = np.stack([world.step(actions[:, t]) for t in steps], axis=1)
    return np.concatenate([given, predicted], axis=1)


def score(imagined: np.ndarray, truth: np.ndarray, given: np.ndarray,
          networks: dict[str, FeatureNetwork], dataset: DataSet) -> Scores:
    """Of a batch uint8 [B, T, H, W, 3]; given [B, 1, H, W, 3] is the last frame before it."""
    scores: Scores = {}
    if dataset.fit == "pad" and not dataset.compare_at:
        # published with the black bars, which are easy to predict
        inner = cut_bars(imagined, dataset.aspect), cut_bars(truth, dataset.aspect)
        if inner[0].shape != imagined.shape:
            scores["psnr without bars"] = psnr(*inner)
    imagined, truth, given = (for_metrics(clips, dataset.aspect, dataset.compare_at)
                              for clips in (imagined, truth, given))
    scores |= {"psnr": psnr(imagined, truth), "ssim": ssim(imagined, truth),
               "psnr of repeating": psnr(given, truth),
               "colour shift": colour_shift(imagined, given),
               "true colour shift": colour_shift(truth, given),
               "sharpness": sharpness(imagined), "true sharpness": sharpness(truth)}
    B, T = truth.shape[:2]
    pictures = {"imagined": imagined.reshape(B * T, *truth.shape[2:]),
                "true": truth.reshape(B * T, *truth.shape[2:])}
    if "lpips" in networks:
        ours, theirs = (networks["lpips"](those) for those in pictures.values())
        scores["lpips"] = (ours - theirs).square().sum(dim=1).view(B, T).cpu().double().numpy()
    for whose, clips in (("imagined", imagined), ("true", truth)):
        if "fid" in networks:
            scores[f"fid, {whose}"] = networks["fid"](pictures[whose]).cpu().numpy()
        if "fvd" in networks:
            scores[f"fvd, {whose}"] = networks["fvd"](clips).cpu().numpy()
    return scores


def evaluate(world: WorldModel, episodes: Episodes, frames: int, context_frames: int,
             batch: int = 8, nar: bool = False, networks: dict[str, FeatureNetwork] | None = None,
             folder: Path | None = None, rank: int = 0, processes: int = 1, shuffled: bool = False
             ) -> Scores:
    """Roll out all batches, this process its share of them, and score them.

    folder    where the scores of batches are kept; those that are there already are not made again
    shuffled  once more, each under the actions of the next episode
    """
    numbers, done = range(-(-len(episodes) // batch)), {}
    mine = numbers[rank::processes]
    todo = [b for b in mine if not (folder and (folder / f"{b}.npz").exists())]
    if len(todo) < len(mine):
        print(f"going on after {len(mine) - len(todo)} batches ({folder})")
    batches = read_batches(episodes, frames, batch, world.model.config, todo)
    for b, (truth, actions) in tqdm(zip(todo, batches, strict=True), total=len(todo), unit="batch",
                                    disable=None if rank == 0 else True):
        imagined = rollout_batch(world, truth, actions[:, :-1], context_frames, nar)
        # without autoregression one frame is given, however many the others get
        first = 1 if nar else context_frames
        done[b] = score(imagined[:, first:], truth[:, first:], truth[:, first - 1 : first],
                        networks or {}, episodes.dataset)
        if shuffled:
            following = np.arange(b * batch, b * batch + len(truth)) + 1
            others = [episodes[i].open(0, frames)[1] for i in following % len(episodes)]
            misled = rollout_batch(world, truth, np.stack(others)[:, :-1], context_frames, nar)
            misled, truth = (for_metrics(clips[:, first:], episodes.dataset.aspect,
                                         episodes.dataset.compare_at) for clips in (misled, truth))
            done[b]["psnr under other actions"] = psnr(misled, truth)
        if folder:
            np.savez(partial := folder / f"{b}.partial.npz", **done[b])
            partial.replace(folder / f"{b}.npz")
    if folder:
        wait_for_all()
        done = {b: dict(np.load(folder / f"{b}.npz")) for b in numbers}
    return {name: np.concatenate([done[b][name] for b in numbers]) for name in done[0]}


def open_held_out(settings: WorldSettings, world: WorldModel) -> Episodes:
    """The first `episodes` held-out episodes, or all. Raises DataError if they do not fit."""
    episodes = open_episodes(settings.data, settings.root, "val", min_length=settings.frames)
    number = len(episodes) if settings.episodes is None else settings.episodes
    if not 1 <= number <= len(episodes):
        raise DataError(f"{number} episodes were asked for, but {len(episodes)} of at least "
                        f"{settings.frames} frames are held out")
    compare_actions(settings.data, episodes.dataset, world.model)
    return episodes.select(np.arange(number))


@dataclass
class Settings(WorldSettings):
    guidance: float | None = option(None, "as in sample.py; if left out, the checkpoint's",
                                    type=float)
    guidance_levels: list[int] | None = option(None, "as in sample.py", type=int, nargs=2, least=0)
    context_frames: int | None = option(None, "frames given; if left out, as the data set has it",
                                 type=int)
    nar: bool = option(False, "sample all frames together (the paper's Vid2World-NAR)")
    shuffled: bool | None = option(None, "also under the actions of other episodes; if left out, "
                                         "in small worlds", type=bool)
    inception: str | None = option(None, "network for FID: see evaluation/metrics.py")
    lpips: str | None = option(None, "network for LPIPS")
    i3d: str | None = option(None, "network for FVD")
    out: str = option("evaluations/default", "folder for the results")


def complete(settings: Settings) -> None:
    if settings.context_frames is None:
        settings.context_frames = DATA_SETS[settings.data].context_frames
    if settings.context_frames >= settings.frames:
        raise RequestError(f"--context-frames is {settings.context_frames}; it must be less than "
                           "--frames")


def report(scores: Scores, settings: Settings, world: WorldModel, names: Sequence[str]) -> None:
    """The results as JSON, Markdown, and curves over frames; `names` are the episodes'."""
    out = Path(settings.out)
    by_frame = {name: rows.mean(axis=0) for name, rows in scores.items() if "," not in name}
    result = {name: float(row.mean()) for name, row in by_frame.items()}
    reasons = {"lpips": "no --lpips network", "fid": "no --inception network",
               "fvd": "no --i3d network"}
    caveats = {}
    for name, what in (("fid", "frames"), ("fvd", "videos")):
        if f"{name}, true" not in scores:
            continue
        ours, theirs = (scores[f"{name}, {whose}"] for whose in ("imagined", "true"))
        if len(theirs) < 2:
            reasons[name] = f"one of the {what} has no covariance"
            continue
        result[name] = frechet_distance(torch.from_numpy(ours), torch.from_numpy(theirs))
        if len(theirs) < ENOUGH:
            caveats[name] = (f", of {len(theirs)} {what}: too few to be compared with published "
                             f"figures (at least {ENOUGH}, and as many as theirs)")
    number = len(scores["psnr"])
    together = "all frames together, " if settings.nar else ""
    lines = [f"{number} held-out episodes of {settings.data}, {settings.frames} frames, "
             f"{settings.context_frames} given; {together}{world.sampling}", "",
             "| metric | value ± 95 % over episodes | |", "| --- | --- | --- |"]
    for name, better in BETTER.items():
        value = f"absent | {reasons.get(name)}"
        if name in result:
            spread = ""
            if name in by_frame:
                spread = 1.96 * deviation(scores[name].mean(axis=1)) / number**0.5
                spread = f" ± {spread:.3f}"
            value = f"{result[name]:.3f}{spread} | {better}{caveats.get(name, '')}"
        lines.append(f"| {name.upper()} | {value} |")
    for name, words in (("of repeating", "of repeating the last given frame"),
                        ("under other actions", "under the actions of other episodes"),
                        ("without bars", "without the black bars")):
        if f"psnr {name}" in result:
            lines.append(f"| PSNR {words} | {result[f'psnr {name}']:.3f} | dB |")
    for name, words in (("colour shift", "from the last given frame's mean colour, of 255"),
                        ("sharpness", "mean difference of neighbouring pixels")):
        lines.append(f"| {name} | {result[name]:.2f} | {words}; of what happened "
                     f"{result[f'true {name}']:.2f} |")
    first = settings.frames - len(by_frame["psnr"])
    lines += ["", f"| frame | {' | '.join(by_frame)} |", f"|{' --- |' * (1 + len(by_frame))}"]
    for t in range(len(by_frame["psnr"])):
        lines.append(f"| {first + t} | {' | '.join(f'{row[t]:.3f}' for row in by_frame.values())} "
                     "|")
    worst = scores["psnr"].mean(axis=1).argsort()[:3]
    lines += ["", "worst predicted: " + ", ".join(
        f"episode {names[i]} ({scores['psnr'][i].mean():.1f} dB)" for i in worst)]
    print("\n" + "\n".join(lines))
    (out / "result.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "result.json").write_text(json.dumps(
        {"settings": asdict(settings), "sampling": asdict(world.sampling),
         "episodes": number, "result": result,
         "absent": [name for name in BETTER if name not in result],
         "by_frame": {name: row.tolist() for name, row in by_frame.items()}}, indent=1),
        encoding="utf-8")
    for name in ("psnr", "ssim", "lpips", "colour shift", "sharpness"):
        curves = {label: list(enumerate(row, start=first)) for label, row in by_frame.items()
                  if name in label}
        if curves:
            save_curves(out / f"{name.replace(' ', '_')}.png", curves, "frame")
    print(f"\nwritten: {out}/result.json, result.md, and curves over frames")


def run(settings: Settings) -> None:
    rank, processes, device = join_processes()
    paths = {"lpips": settings.lpips, "fid": settings.inception, "fvd": settings.i3d}
    networks = {metric: FeatureNetwork(path, metric, device)
                for metric, path in paths.items() if path}
    levels = settings.guidance_levels and tuple(settings.guidance_levels)
    world = settings.load_world(device, guidance=settings.guidance, guidance_levels=levels)
    episodes = open_held_out(settings, world)
    shuffled = world.model.config.small if settings.shuffled is None else settings.shuffled
    known = zlib.crc32(json.dumps(asdict(settings)).encode())  # other settings, another folder
    (partial := Path(settings.out) / f"partial_{known:08x}").mkdir(parents=True, exist_ok=True)
    scores = evaluate(world, episodes, settings.frames, settings.context_frames, settings.batch,
                      settings.nar, networks, partial, rank, processes,
                      shuffled and len(episodes) > 1)
    wait_for_all()  # until everybody has read what is about to go
    leave_processes()
    if rank == 0:
        report(scores, settings, world, [episode.name for episode in episodes])
        shutil.rmtree(partial)


main = program(__name__, "evaluate", run, Settings, "Measure predictions on held-out episodes.",
               complete)
