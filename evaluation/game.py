"""Does the imagined hall follow actions? python -m evaluation.game --root recorded/arena

A small network learns to read the player's place and direction off recorded frames, whose truth the
game knew, and then reads them off imagined ones:

    recorded      under an episode's actions: how like what happened are the pictures (PSNR, SSIM),
                  and how far is the player from where they were, after 12 and after 60 frames?
    turning       12 frames of turning to one side: does the view turn to that side?
    walls         24 frames straight on: does the player come to a stop?
    return        72 frames of 5 degrees each: is the first frame back? It left the window long ago,
                  so this asks whether the network knows the hall by heart.
    holds         100 frames, a key or a turn held for ten at a time: a strip and an animation

for the world model, for DIAMOND where a checkpoint is named, and for a frame that stands still.
"""
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from baselines.diamond import STEPS, DiamondWorld
from baselines.train_diamond import load_diamond
from data import Episodes, open_episodes
from dynamicrafter.checkpoint import load_weights, read_checkpoint
from episodes.csgo import csgo_action, describe
from evaluation.evaluate import (RepeatLastFrame, WorldSettings, open_held_out, read_batches,
                                 rollout_batch)
from evaluation.intervals import mean_and_deviation
from evaluation.metrics import ssim
from evaluation.readers import FrameReader, fit
from model.saving import save
from sample import WorldModel
from support.errors import CheckpointError, reading
from support.options import option, program
from support.pictures import psnr, save_gif, save_strip

POSE = "steps/observation/pose"  # x and y in map units, and the direction in degrees
GIVEN, SHORT, LONG = 4, 12, 60  # frames given, and imagined
HOLDS = ((["w"], 0), ([], 60), (["w"], 0), (["a"], 0), ([], -60),  # keys and mouse, for ten frames
         (["s"], 0), (["d"], 0), ([], 60), ([], 60), (["w"], 0))  # each
UNITS = 256.0  # half a side of the hall


def pose_reader() -> FrameReader:
    """Frames -> x and y in halves of the hall, cosine and sine of the direction."""
    torch.manual_seed(0)
    return FrameReader(4, widths=(32, 64, 96, 128), hidden=256)


def read_poses(reader: FrameReader, frames: np.ndarray) -> np.ndarray:
    """uint8 [..., 64, 80, 3] -> poses [..., 3]: x and y in map units, degrees."""
    x, y, cosine, sine = np.moveaxis(reader.read(frames), -1, 0)
    return np.stack([UNITS * x, UNITS * y, np.degrees(np.arctan2(sine, cosine))], axis=-1)


def seen_from(episodes: Episodes) -> tuple[np.ndarray, np.ndarray]:
    """All frames uint8 [N, 64, 80, 3], and where each is seen from, [N, 4]: x and y in halves of
    the hall, cosine and sine of the direction."""
    every = [episodes[i] for i in range(len(episodes))]
    x, y, degrees = np.concatenate([episode.feature(POSE) for episode in every]).T
    angle = np.radians(degrees)
    poses = np.stack([x / UNITS, y / UNITS, np.cos(angle), np.sin(angle)], axis=1)
    return np.concatenate([episode.frames for episode in every]), poses


def open_reader(path: Path, episodes: Episodes, steps: int, source: str | None = None
                ) -> FrameReader:
    """The reader of poses in a file, or a new one, which is then kept there.

    source  what the reader has to have learned from; None takes any
    """
    known = read_checkpoint(path) if path.exists() else {}
    if known and source in (None, known.get("source")):
        with reading(path, CheckpointError):
            return load_weights(pose_reader(), known["weights"], str(path)).eval()
    reader = pose_reader()
    for _ in tqdm(fit(reader, *seen_from(episodes), steps), "pose reader", steps, disable=None):
        pass
    save(path, {"weights": reader.state_dict(), "source": source})
    return reader.eval()


def apart(poses: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far poses [..., 3] are from others: map units, and degrees to the left (-180 .. 180)."""
    distance = np.linalg.norm(poses[..., :2] - others[..., :2], axis=-1)
    return distance, (poses[..., 2] - others[..., 2] + 180) % 360 - 180


# --------------------------------------------------------------------------------------------------
# What is measured


@dataclass
class InitialStates:
    """Held-out episodes side by side."""
    frames: np.ndarray  # uint8 [N, T, 64, 80, 3]
    actions: np.ndarray  # [N, T, 51]
    poses: np.ndarray  # [N, T, 3]


def rollout_action(world: object, starts: InitialStates, batch: int,
                   action: np.ndarray | None = None, new: int = LONG) -> np.ndarray:
    """All starts under their recorded actions, or one repeated, or others [new, 51]: uint8
    [N, GIVEN + new, 64, 80, 3], the given frames included."""
    actions = starts.actions[:, : GIVEN + new - 1].copy()
    if action is not None:
        known = starts.actions[:, : GIVEN - 1]
        repeated = np.broadcast_to(action, (len(known), new, action.shape[-1]))
        actions = np.concatenate([known, repeated], axis=1)
    return rollout_batch(world, starts.frames[:, :GIVEN], actions, GIVEN, batch=batch)


def follow(world: object, starts: InitialStates, reader: FrameReader, batch: int, new: int
           ) -> dict[str, float]:
    """Under the recorded actions: pictures, and where the player is at the last frame."""
    imagined = rollout_action(world, starts, batch, new=new)[:, GIVEN:]
    truth, last = starts.frames[:, GIVEN : GIVEN + new], GIVEN + new - 1
    repeated = psnr(starts.frames[:, GIVEN - 1, None], truth).mean(axis=0)
    ours = psnr(imagined, truth).mean(axis=0)
    distance, turned = apart(read_poses(reader, imagined[:, -1]), starts.poses[:, last])
    return {"PSNR": ours.mean(), "SSIM": ssim(imagined, truth).mean(), "last PSNR": ours[-1],
            "frames above repeating": float((ours > repeated).sum()),
            "units off": np.median(distance), "degrees off": np.median(abs(turned))}


def turn(world: object, starts: InitialStates, reader: FrameReader, batch: int, counts: int
         ) -> np.ndarray:
    """Degrees to the left by which the view has turned in 12 frames of so many counts, [N]."""
    clips = rollout_action(world, starts, batch, csgo_action(x=counts), SHORT)
    return apart(read_poses(reader, clips[:, -1]), read_poses(reader, clips[:, GIVEN - 1]))[1]


def follow_repeated(world: object, starts: InitialStates, reader: FrameReader, batch: int
                    ) -> dict[str, float]:
    """Under one action, repeated: turning, walls, return."""
    turned_right, turned_left = (turn(world, starts, reader, batch, x) for x in (60, -60))
    walked = rollout_action(world, starts, batch, csgo_action(["w"]), 24)
    ahead = read_poses(reader, walked[:, GIVEN - 1 :])
    first, last = (apart(ahead[:, t + 6], ahead[:, t])[0] for t in (0, 18))
    circle = rollout_action(world, starts, batch, csgo_action(x=100), 72)[:, GIVEN - 1 :]
    missing = apart(read_poses(reader, circle[:, 72]), read_poses(reader, circle[:, 0]))[1]
    return {"right turns right, %": 100 * (turned_right < 0).mean(),
            "left turns left, %": 100 * (turned_left > 0).mean(),
            "degrees of 36": np.median(np.concatenate([-turned_right, turned_left])),
            "units in 6 frames ahead": np.median(first), "after 18": np.median(last),
            "back after 360°, PSNR": psnr(circle[:, 72], circle[:, 0]).mean(),
            "half way": psnr(circle[:, 36], circle[:, 0]).mean(),
            "degrees off then": np.median(abs(missing))}


def seconds_a_frame(world: object, starts: InitialStates) -> float:
    """Of one world by itself: the median of six frames, after three to warm up."""
    world.reset(starts.frames[:1, :GIVEN], starts.actions[:1, : GIVEN - 1])
    times = []
    for t in range(GIVEN - 1, GIVEN + 8):
        begun = time.perf_counter()
        world.step(starts.actions[:1, t])
        times.append(time.perf_counter() - begun)
    return float(np.median(times[3:]))


@dataclass
class Settings(WorldSettings):
    data: str = option("csgo", "data set", choices=["csgo"])
    frames: int = option(GIVEN + LONG, "frames of an episode, given ones included",
                         least=GIVEN + SHORT)
    guidance: float | None = option(None, "as in sample.py", type=float)
    diamond: str | None = option(None, "checkpoint of baselines/train_diamond.py")
    seeds: int = option(1, "rollouts of recorded actions, each with noise of its own")
    quick: bool = option(False, "12 frames of recorded actions and nothing else")
    reader: str | None = option(None, "file of the pose reader; if left out, in --out")
    reader_steps: int = option(3000, "to train it, where there is none")
    out: str = option("evaluations/game", "folder for the results")


def contenders(settings: Settings, world: WorldModel) -> dict[str, Callable[[int], object]]:
    """Name -> from a seed to a world."""
    worlds: dict[str, Callable[[int], object]] = {"repeating": lambda seed: RepeatLastFrame()}
    if settings.diamond:
        network = load_diamond(settings.diamond)
        for name, steps in STEPS.items():
            worlds[f"DIAMOND, {name}"] = lambda seed, n=steps: DiamondWorld(network, n, seed)
    options = {"guidance": settings.guidance, "steps": settings.steps, "eta": settings.eta}
    worlds["Vid2World"] = lambda seed: WorldModel(world.model, seed=seed, **options)
    return worlds


def table(rows: dict[str, list[dict[str, float]]]) -> list[str]:
    """Markdown: a row per world, a column per measurement, its mean ± deviation over seeds."""
    heads = list(next(iter(rows.values()))[0])
    lines = [f"| | {' | '.join(heads)} |", f"|{' --- |' * (1 + len(heads))}"]
    for name, runs in rows.items():
        columns = [[run[head] for run in runs] for head in heads]
        cells = [mean_and_deviation(column, 3 if abs(column[0]) < 1 else 2) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def run(settings: Settings) -> None:
    world = settings.load_world(guidance=settings.guidance)
    if settings.quick:
        settings.frames = GIVEN + SHORT
    held_out = open_held_out(settings, world)
    training = open_episodes(settings.data, settings.root, "train")
    (out := Path(settings.out)).mkdir(parents=True, exist_ok=True)
    source = None if settings.reader else f"{settings.root}, {settings.reader_steps} steps"
    reader = open_reader(Path(settings.reader or out / "reader.pt"), training,
                         settings.reader_steps, source)
    (frames, actions), = read_batches(held_out, settings.frames, len(held_out), world.model.config)
    poses = np.stack([held_out[i].feature(POSE)[: settings.frames] for i in range(len(held_out))])
    starts = InitialStates(frames, actions, poses)
    distance, turned = apart(read_poses(reader, frames), poses)
    print(f"pose reader: off by {np.median(distance):.1f} units of {2 * UNITS:g} and "
          f"{np.median(abs(turned)):.1f} degrees (medians) on {len(held_out)} held-out episodes; "
          f"{world.sampling}", flush=True)

    short, long, repeated, pictures = {}, {}, {}, {"truth": frames[0, GIVEN - 1 :]}
    first = InitialStates(frames[:1], actions[:1], poses[:1])
    for name, make in contenders(settings, world).items():
        short[name] = [follow(make(seed), starts, reader, settings.batch, SHORT)
                       | {"seconds a frame": seconds_a_frame(make(seed), starts)}
                       for seed in range(settings.seeds)]
        print(f"{name}: {np.mean([run['PSNR'] for run in short[name]]):.2f} dB", flush=True)
        if not settings.quick:
            long[name] = [follow(make(0), starts, reader, settings.batch, LONG)]
            repeated[name] = [follow_repeated(make(0), starts, reader, settings.batch)]
            pictures[name] = rollout_action(make(0), first, batch=1)[0, GIVEN - 1 :]
            holds = np.repeat([csgo_action(keys, x=x) for keys, x in HOLDS], 10, axis=0)
            clip = rollout_action(make(0), first, 1, holds, len(holds))[0, GIVEN - 1 :]
            path, fps = out / f"{name.replace(', ', '_')}_holds", held_out.dataset.fps
            save_strip(f"{path}.png", {name: clip[::5]}, columns=11)
            save_gif(f"{path}.gif", {name: clip}, fps, ["", *map(describe, holds)])
    if not settings.quick:
        save_strip(out / "side_by_side.png",
                   {name: clip[::5] for name, clip in pictures.items()}, columns=13)
    lines = [f"{len(held_out)} held-out episodes, {GIVEN} frames given; {world.sampling}"]
    for title, rows in ((f"{SHORT} frames of recorded actions, {settings.seeds} seeds", short),
                        (f"{LONG} frames of recorded actions", long),
                        ("one action, repeated", repeated)):
        lines += ["", f"{title}:", "", *table(rows)] if rows else []
    print("\n" + "\n".join(lines))
    (out / "result.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\nwritten: {out}/result.md and strips")


main = program(__name__, "game", run, Settings, "Measure whether an imagined game follows actions.")
