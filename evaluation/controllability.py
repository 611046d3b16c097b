"""Controllability: does the predicted arm follow its actions? python -m evaluation.controllability

Pictures alone cannot say: a sharp picture of a gripper in the wrong place looks right. So a small
probe is trained to read the gripper's place off recorded frames, where the simulator knows it, and
then reads it off predicted ones:

    recorded   actions from an episode's first frame: how far is the gripper from where it was?
    shuffled   the actions of another episode: how far, if actions were ignored or unknown?
    sweeps     from one frame, 8 steps at full speed along +x, -x, +y, -y, +z, -z: does it go there?

for several strengths of guidance and ranges of noise levels at which guidance applies.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import Episodes, open_episodes
from evaluation.evaluate import WorldSettings, rollout_batch, open_held_out, read_batches
from evaluation.intervals import bootstrap, mean_and_interval
from evaluation.readers import Reader, fit
from sample import WorldModel
from support.errors import DataError
from support.options import option, program
from support.pictures import psnr, save_curves, save_strip

PIXEL, POSITION = "steps/observation/gripper_pixel", "steps/observation/gripper_position"
WORLD_VECTOR = slice(10, 13)  # of RT-1's 13 action numbers: the gripper's motion along x, y, z
SWEEPS = {f"{sign}{axis}": (i, 1 if sign == "+" else -1) for i, axis in enumerate("xyz")
          for sign in "+-"}
SWEEP_FRAMES = 8


class GripperReader(Reader):
    """Frames -> the gripper's pixel: the centre of mass of a map that convolutions make."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2), nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=2, dilation=2),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=4, dilation=4), nn.SiLU(), nn.Conv2d(64, 1, 3, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, 2], x and y
        where = self.layers(pixels)[:, 0]  # [N, H/4, W/4]
        N, h, w = where.shape
        where = where.flatten(1).softmax(dim=1).view(N, h, w)
        x = 4 * torch.arange(w, device=where.device) + 2
        y = 4 * torch.arange(h, device=where.device) + 2
        return torch.stack([(where.sum(1) * x).sum(1), (where.sum(2) * y).sum(1)], dim=1)


def has_gripper(episodes: Episodes) -> bool:
    """Whether they say where it is, as the drawer's do and RT-1's do not."""
    try:
        return episodes.dataset.action_dim == WORLD_VECTOR.stop and len(episodes[0].feature(PIXEL))
    except DataError:
        return False


def recorded(episodes: Episodes) -> tuple[np.ndarray, np.ndarray]:
    """All frames uint8 [N, H, W, 3], and the gripper's true pixel in each [N, 2]."""
    chosen = [episodes[i] for i in range(len(episodes))]
    return tuple(np.concatenate(arrays) for arrays in zip(
        *((episode.frames, episode.feature(PIXEL)) for episode in chosen), strict=True))


def train_reader(episodes: Episodes, steps: int = 800, size: int = 32) -> GripperReader:
    torch.manual_seed(0)
    reader = GripperReader()
    for _ in fit(reader, *recorded(episodes), steps, size):
        pass
    return reader.eval()


def directions(episodes: Episodes) -> np.ndarray:
    """How the gripper's pixel moves with its position, [2, 3] pixels per metre: least squares."""
    pixels, positions = (np.concatenate([episodes[i].feature(name) for i in range(len(episodes))])
                         for name in (PIXEL, POSITION))
    columns = np.concatenate([positions, np.ones((len(positions), 1))], axis=1)
    return np.linalg.lstsq(columns, pixels, rcond=None)[0][:3].T


def central_frames(episodes: Episodes) -> np.ndarray:
    """From each of N episodes the frame whose gripper has most room on all sides,
    [N, 1, H, W, 3]."""
    positions = [episodes[i].feature(POSITION) for i in range(len(episodes))]
    everywhere = np.concatenate(positions)
    low, high = everywhere.min(axis=0), everywhere.max(axis=0)
    nearest = [np.abs((rows - (low + high) / 2) / (high - low)).max(axis=1).argmin()
               for rows in positions]
    return np.stack([episodes[i].read(t, t + 1)[0] for i, t in enumerate(nearest)])


def follow(worlds: Sequence[WorldModel], reader: GripperReader, clips: np.ndarray,
           actions: np.ndarray, truth: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Roll all episodes out under these actions in every world: of each episode the distance in
    pixels of the imagined gripper from its true place at the last frame, and the PSNR of its
    imagined frames, [N] each, means over worlds.

    worlds  alike but for their noise
    clips uint8 [N, T, H, W, 3], actions [N, T, A], truth [N, T, 2] the true place of the gripper
    """
    errors, psnrs = [], []
    for world in worlds:
        imagined = rollout_batch(world, clips, actions[:, :-1], batch=batch)
        errors.append(np.linalg.norm(reader.read(imagined[:, -1]) - truth[:, -1], axis=-1))
        psnrs.append(psnr(imagined, clips)[:, 1:].mean(axis=1))
    return np.mean(errors, axis=0), np.mean(psnrs, axis=0)


def sweep(world: WorldModel, starts: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    """From starts [N, 1, H, W, 3]: name -> uint8 [N, 1 + SWEEP_FRAMES, H, W, 3]."""
    swept = {}
    for name, (axis, sign) in SWEEPS.items():
        actions = np.zeros((len(starts), SWEEP_FRAMES, world.model.action_dim), np.float32)
        actions[:, :, WORLD_VECTOR.start + axis] = sign
        swept[name] = rollout_batch(world, starts, actions, batch=batch)
    return swept


def right_side(swept: dict[str, np.ndarray], reader: GripperReader,
               axes: np.ndarray) -> list[float]:
    """For each sweep, in what share of the starts (%) the gripper went to its side."""
    shares = []
    for name, (axis, sign) in SWEEPS.items():
        moved = reader.read(swept[name][:, -1]) - reader.read(swept[name][:, 0])
        shares.append(100 * np.mean(sign * moved @ axes[:, axis] > 0))
    return shares


@dataclass
class Settings(WorldSettings):
    guidance: list[float] = option(None, "one row of the table each (default: 1 2)", type=float,
                                   nargs="+")
    guidance_levels: list[list[int]] | None = option(
        None, "LOW HIGH, once or several times: rows for each; if left out, the checkpoint's",
        type=int, nargs=2, least=0,
        action="append", metavar=("LOW", "HIGH"))
    own: bool = option(False, "recorded actions alone: a third of the time")
    seeds: int = option(4, "rollouts of each, with noise of their own")
    out: str = option("evaluations/controllability", "folder for the pictures")


def run(settings: Settings) -> None:
    world = settings.load_world()
    episodes = open_held_out(settings, world)
    training = open_episodes(settings.data, settings.root, "train")
    if not has_gripper(training):
        raise DataError(f"controllability is measured on the drawer's episodes; {settings.data} "
                        "does not say where the gripper is")
    reader = train_reader(training)
    frames, places = recorded(episodes)
    errors = np.linalg.norm(reader.read(frames) - places, axis=1)
    print(f"gripper reader: trained on {len(training)} recorded episodes, off by "
          f"{errors.mean():.2f} pixels (median {np.median(errors):.2f}) on {len(episodes)} "
          f"held-out ones; {world.sampling.steps} steps, η {world.sampling.eta:g}")
    starts, axes = central_frames(episodes), directions(training)
    truth = np.stack([episodes[i].feature(PIXEL)[: settings.frames] for i in range(len(episodes))])
    (clips, actions), = read_batches(episodes, settings.frames, len(episodes), world.model.config)
    (out := Path(settings.out)).mkdir(parents=True, exist_ok=True)
    print(f"means of {settings.seeds} seeds of the noise (95 % over episodes)\n\n"
          f"| guidance | at levels | gripper error at frame {settings.frames - 1} (pixels) | less "
          "the first row's | PSNR (dB) | less the first row's | error under shuffled actions | "
          f"PSNR | correct direction of the sweep (%) | {' | '.join(SWEEPS)} |\n"
          f"|{' --- |' * (9 + len(SWEEPS))}")
    first, curves = None, {"gripper_error": {}, "psnr": {}}
    for low, high in settings.guidance_levels or [world.sampling.guidance_levels]:
        for guidance in settings.guidance or [1.0, 2.0]:
            worlds = [WorldModel(world.model, guidance, (low, high), settings.steps, settings.eta,
                                 seed=settings.seed + i) for i in range(settings.seeds)]
            own = follow(worlds, reader, clips, actions, truth, settings.batch)
            first = first or own
            for curve, ours in zip(curves.values(), own, strict=True):
                point = guidance, ours.mean(), *bootstrap(ours)
                curve.setdefault(f"levels {low} to {high}", []).append(point)
            cells = [f"{guidance:g}", f"{low}–{high}"]
            for ours, theirs in zip(own, first, strict=True):
                less = mean_and_interval(ours - theirs, "+") if own is not first else ""
                cells += [mean_and_interval(ours), less]
            if not settings.own:
                others = follow(worlds, reader, clips, np.roll(actions, 1, axis=0), truth,
                                settings.batch)
                swept = sweep(worlds[0], starts, settings.batch)
                right = right_side(swept, reader, axes)
                save_strip(out / f"sweeps_guidance{guidance:g}.png",
                           {name: video[0] for name, video in swept.items()}, columns=9)
                cells += [f"{figure.mean():.2f}" for figure in others]
                cells += [f"{np.mean(right):.1f}"] + [f"{r:.0f}" for r in right]
            print(f"| {' | '.join(cells)} |", flush=True)
    for name, curve in curves.items():  # the paper's Figure 8
        lowest = min(point[2] for points in curve.values() for point in points)
        save_curves(out / f"guidance_{name}.png", curve, "guidance", least=np.floor(lowest))
    print(f"\npictures: {out}")


main = program(__name__, "controllability", run, Settings, "Measure controllability.")
