"""What can be known of the hall, and where does a world lose it?

    python -m testing.hall --root recorded/arena

    turns        are turns to the left and to the right as frequent and as fast in the recordings?
    sides        and does the world follow both alike? From four frames of every episode, with a
                 seed each
    autoencoder  frames encoded and decoded: no world is sharper than its decoder
    bound        a network of a world's size draws the frame from the player's true place and
                 direction: what it is worth to know the hall by heart
    blur         the first imagined frame and the twelfth, with 1, 2 and 4 steps: one step gives the
                 mean of what might come; what the twelfth lacks beyond the first is the place
    places       how far is the imagined player from the true one, frame by frame? Beside it one who
                 stands still, and the true frames, encoded and decoded: what the reader can know
    memory       72 frames of five degrees each: is the first frame back, if the window keeps 4, 8
                 or 12 of its 16 frames when it slides, and if the anchor stays when it does?
"""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import Episodes, open_episodes
from episodes.csgo import FIRST_X, FIRST_Y, MOUSE_X, csgo_action
from evaluation.evaluate import WorldSettings, open_held_out, read_batches, rollout_batch
from evaluation.game import (GIVEN, POSE, SHORT, InitialStates, apart, open_reader, read_poses,
                             rollout_action, seen_from, turn)
from evaluation.intervals import wilson
from evaluation.metrics import sharpness
from evaluation.readers import FrameReader
from model.memory import keep_malloc_heap
from model.vid2world import to_frames, to_pixels
from sample import Window, WorldModel
from support.options import option, program
from support.pictures import psnr

PARTS = ("turns", "sides", "autoencoder", "bound", "blur", "places", "memory")


@dataclass
class Settings(WorldSettings):
    data: str = option("csgo", "data set", choices=["csgo"])
    frames: int = option(GIVEN + SHORT, "frames of an episode, given ones included",
                         least=GIVEN + 1)
    parts: list[str] = option(PARTS, f"which: {', '.join(PARTS)}", nargs="+", metavar="NAME",
                              type=str, choices=PARTS)
    bound_steps: int = option(3000, "to train the network of the pose bound")
    reader: str = option("evaluations/game/reader.pt",
                         "file of the pose reader; trained, if there is none")


class Draw(nn.Module):
    """Place and direction [N, 4] -> what is seen from there, [N, 3, 64, 80]; 6 M parameters."""

    def __init__(self, waves: int = 6):
        super().__init__()
        self.frequencies = 2.0 ** torch.arange(waves)
        self.enter = nn.Sequential(nn.Linear(8 * waves, 512), nn.SiLU(), nn.Linear(512, 512),
                                   nn.SiLU(), nn.Linear(512, 128 * 8 * 10))
        self.grow = nn.Sequential()
        for channels, fewer in ((128, 64), (64, 32), (32, 16)):
            self.grow.extend([nn.Upsample(scale_factor=2), nn.SiLU(),
                              nn.Conv2d(channels, fewer, 3, padding=1), nn.SiLU(),
                              nn.Conv2d(fewer, fewer, 3, padding=1)])
        self.leave = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, poses: Tensor) -> Tensor:
        phases = (poses[..., None] * self.frequencies).flatten(1)
        entered = self.enter(torch.cat([phases.sin(), phases.cos()], dim=1))
        return self.leave(self.grow(entered.view(-1, 128, 8, 10)))


def measure_turns(episodes: Episodes) -> None:
    actions = np.concatenate([episodes[i].actions for i in range(len(episodes))])
    counts = np.array(MOUSE_X)[actions[:, FIRST_X:FIRST_Y].argmax(axis=1)]
    for side, chosen in (("left", counts < 0), ("right", counts > 0)):
        print(f"turns to the {side}: {100 * chosen.mean():.1f} % of the frames, by "
              f"{abs(counts[chosen]).mean():.1f} counts")


def measure_sides(world: WorldModel, held_out: Episodes, reader: FrameReader) -> None:
    turned = {"right": [], "left": []}
    for seed, first in enumerate((0, 25, 50, 75)):
        begun = [held_out[i].read(first, first + GIVEN) for i in range(len(held_out))]
        frames, actions = (np.stack(clips) for clips in zip(*begun, strict=True))
        starts = InitialStates(frames, actions, None)
        for side, counts in (("right", 60), ("left", -60)):
            to_left = turn(WorldModel(world.model, seed=seed), starts, reader, len(begun), counts)
            turned[side].append(-np.sign(counts) * to_left)
    for side, runs in turned.items():
        degrees = np.concatenate(runs)
        low, high = wilson(followed := int((degrees > 0).sum()), len(degrees))
        print(f"sides: {side} turns {side} from {followed} of {len(degrees)} starts "
              f"({100 * low:.0f} to {100 * high:.0f} %), by {np.median(degrees):.0f} of 36 degrees",
              flush=True)


def say(name: str, imagined: np.ndarray, truth: np.ndarray) -> None:
    print(f"{name}: {psnr(imagined, truth).mean():.2f} dB, sharpness "
          f"{sharpness(imagined).mean():.2f} of {sharpness(truth).mean():.2f}", flush=True)


@torch.no_grad()
def encode_and_decode(world: WorldModel, clips: np.ndarray) -> np.ndarray:
    """uint8 [N, T, 64, 80, 3] -> the same frames, as the autoencoder gives them back."""
    decoded = [to_frames(world.model.decode(world.model.encode(to_pixels(torch.from_numpy(clip)))))
               for clip in clips[:, None]]
    return np.concatenate(decoded)


def measure_pose_bound(training: Episodes, held_out: Episodes, steps: int) -> None:
    torch.manual_seed(0)
    frames, poses = seen_from(training)
    poses = torch.from_numpy(poses).float()
    network = Draw()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for step in tqdm(range(steps), "pose bound", disable=None):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + np.cos(np.pi * step / steps)) / 2
        some = torch.randint(len(frames), (32,))
        loss = F.mse_loss(network(poses[some]), to_pixels(torch.from_numpy(frames[some])[None])[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    truth, poses = seen_from(held_out)
    with torch.no_grad():
        drawn = torch.cat([network(some) for some in torch.from_numpy(poses).float().split(256)])
        drawn = drawn.clamp(-1, 1)
    say("pose bound", to_frames(drawn[:, None])[:, 0], truth)


def measure_blur(world: WorldModel, truth: np.ndarray, actions: np.ndarray, batch: int) -> None:
    for steps in (1, 2, 4):
        several = WorldModel(world.model, steps=steps)
        imagined = rollout_batch(several, truth, actions[:, :-1], GIVEN, batch=batch)
        for name, t in (("first", GIVEN), ("last", truth.shape[1] - 1)):
            say(f"blur, {steps} steps, {name} imagined frame", imagined[:, t], truth[:, t])


def measure_places(world: WorldModel, starts: InitialStates, reader: FrameReader, batch: int
                   ) -> None:
    imagined = [rollout_action(WorldModel(world.model, seed=seed), starts, batch, new=SHORT)
                for seed in range(3)]
    off = {"imagined": apart(read_poses(reader, np.stack(imagined)), starts.poses),
           "standing still": apart(starts.poses[:, GIVEN - 1, None], starts.poses),
           "encoded": apart(read_poses(reader, encode_and_decode(world, starts.frames)),
                            starts.poses)}
    for new in (1, 2, 4, 8, SHORT):
        medians = [f"{name} {np.median(distance[..., GIVEN + new - 1]):.0f} units and "
                   f"{np.median(abs(turned[..., GIVEN + new - 1])):.1f} degrees"
                   for name, (distance, turned) in off.items()]
        print(f"places, frame {new}: {'; '.join(medians)}", flush=True)


class KeptAnchor(WorldModel):
    """Beside the noisy frames stays what was seen first, wherever the window has slid."""

    def slide(self, window: Window, length: int) -> Window:
        slid = super().slide(window, length)
        return slid if window.anchor is None else replace(slid, anchor=window.anchor,
                                                          tokens=window.tokens)


def measure_memory(world: WorldModel, starts: InitialStates, batch: int) -> None:
    for overlap, kind, kept in ((4, WorldModel, ""), (8, WorldModel, ""), (12, WorldModel, ""),
                                (8, KeptAnchor, " and the anchor")):
        again = kind(world.model, overlap=overlap)
        circle = rollout_action(again, starts, batch, csgo_action(x=100), 72)[:, GIVEN - 1 :]
        back, half = (psnr(circle[:, t], circle[:, 0]).mean() for t in (72, 36))
        print(f"memory, {overlap} frames{kept} kept: {back:.2f} dB after 360 degrees, "
              f"{half:.2f} half way", flush=True)


def run(settings: Settings) -> None:
    keep_malloc_heap()
    world = settings.load_world()
    held_out = open_held_out(settings, world)
    training = open_episodes(settings.data, settings.root, "train")
    (truth, actions), = read_batches(held_out, settings.frames, len(held_out), world.model.config)
    poses = np.stack([held_out[i].feature(POSE)[: settings.frames] for i in range(len(held_out))])
    starts = InitialStates(truth, actions, poses)
    reader = None
    if {"sides", "places"} & set(settings.parts):
        reader = open_reader(Path(settings.reader), training, steps=3000)
    work = {"turns": lambda: measure_turns(training),
            "sides": lambda: measure_sides(world, held_out, reader),
            "autoencoder": lambda: say("autoencoder", encode_and_decode(world, truth), truth),
            "bound": lambda: measure_pose_bound(training, held_out, settings.bound_steps),
            "blur": lambda: measure_blur(world, truth, actions, settings.batch),
            "places": lambda: measure_places(world, starts, reader, settings.batch),
            "memory": lambda: measure_memory(world, starts, settings.batch)}
    for part in settings.parts:
        work[part]()


main = program(__name__, "hall", run, Settings, "Measure what can be known of the hall.")
