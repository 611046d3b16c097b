"""Does the imagined arm go where it is told? python -m evaluation.obedience

Pictures alone cannot say: a sharp picture of a gripper in the wrong place looks right. So a small network learns to read the
gripper's place off recorded frames, whose true place the simulator knew, and then reads it off imagined ones:

    own actions       from an episode's first frame, under its actions: how far is the gripper from where it really was?
    another's         under the actions of another episode: how far, if the actions were ignored or unknown?
    sweeps            from one frame, 8 steps of full speed along +x, -x, +y, -y, +z, -z: does it go to that side?

for several strengths of guidance, since the claim of guidance is that it sharpens obedience.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import DataError, Episodes, default_root, open_episodes
from dynamicrafter.model import to_pixels
from evaluation.evaluate import add_world_options, check_actions, imagine, open_held_out, read_batches
from evaluation.metrics import psnr
from evaluation.pictures import save_curves, save_strip
from sample import RequestError, WorldModel, load_world
from unet import CheckpointError

PIXEL, POSITION = "steps/observation/gripper_pixel", "steps/observation/gripper_position"
WORLD_VECTOR = slice(10, 13)  # of RT-1's 13 action numbers: the gripper's motion along x, y, z
SWEEPS = {f"{sign}{axis}": (i, 1 if sign == "+" else -1) for i, axis in enumerate("xyz") for sign in "+-"}
SWEEP_FRAMES = 8


class GripperReader(nn.Module):
    """Frames -> the gripper's pixel: convolutions make a map of where it might be, whose centre of mass is the answer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2), nn.SiLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=2, dilation=2), nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=4, dilation=4), nn.SiLU(), nn.Conv2d(64, 1, 3, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, 2], x and y
        where = self.layers(pixels)[:, 0]  # [N, H/4, W/4]
        N, h, w = where.shape
        where = where.flatten(1).softmax(dim=1).view(N, h, w)
        x, y = 4 * torch.arange(w, device=where.device) + 2, 4 * torch.arange(h, device=where.device) + 2
        return torch.stack([(where.sum(1) * x).sum(1), (where.sum(2) * y).sum(1)], dim=1)

    @torch.no_grad()
    def read(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [..., H, W, 3] -> [..., 2]."""
        pixels = to_pixels(torch.tensor(frames.reshape(1, -1, *frames.shape[-3:])))[0]
        return self(pixels).numpy().reshape(*frames.shape[:-3], 2)


def recorded(episodes: Episodes) -> tuple[Tensor, Tensor]:
    """All frames [N, 3, H, W] in [-1, 1], and the gripper's true pixel in each."""
    chosen = [episodes[i] for i in range(len(episodes))]
    frames = np.concatenate([episode.frames for episode in chosen])
    return to_pixels(torch.from_numpy(frames)[None])[0], torch.from_numpy(
        np.concatenate([episode.feature(PIXEL) for episode in chosen])).float()


def train_reader(episodes: Episodes, steps: int = 800) -> GripperReader:
    """On frames shifted by up to 8 pixels and a little blurred or noisy, since imagined ones are no better."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    reader = GripperReader()
    frames, places = recorded(episodes)
    optimizer = torch.optim.Adam(reader.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(frames), (32,), generator=generator)
        x, y = torch.randint(-8, 9, (2,), generator=generator).tolist()
        batch = F.pad(frames[chosen], (8, 8, 8, 8), mode="replicate")[:, :, 8 - y : 8 - y + frames.shape[2], 8 - x : 8 - x + frames.shape[3]]
        blurred = F.avg_pool2d(batch, 3, stride=1, padding=1, count_include_pad=False)
        batch = batch.lerp(blurred, torch.rand(32, 1, 1, 1, generator=generator))
        batch = batch + 0.1 * torch.rand(32, 1, 1, 1, generator=generator) * torch.randn(batch.shape, generator=generator)
        loss = F.smooth_l1_loss(reader(batch), places[chosen] + torch.tensor([x, y]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return reader.eval()


def directions(episodes: Episodes) -> np.ndarray:
    """How the gripper's pixel moves with its position: [2, 3], pixels per metre, by least squares over recorded frames."""
    pixels, positions = (np.concatenate([episodes[i].feature(name) for i in range(len(episodes))]) for name in (PIXEL, POSITION))
    columns = np.concatenate([positions, np.ones((len(positions), 1))], axis=1)
    return np.linalg.lstsq(columns, pixels, rcond=None)[0][:3].T


def central_frames(episodes: Episodes) -> np.ndarray:
    """From each episode the frame whose gripper is nearest to the middle of its reach, so that there is room on all sides."""
    positions = [episodes[i].feature(POSITION) for i in range(len(episodes))]
    everywhere = np.concatenate(positions)
    middle, reach = (everywhere.max(0) + everywhere.min(0)) / 2, everywhere.max(0) - everywhere.min(0)
    nearest = [np.abs((rows - middle) / reach).max(axis=1).argmin() for rows in positions]
    return np.stack([episodes[i].read(t, t + 1)[0] for i, t in enumerate(nearest)])  # [N, 1, H, W, 3]


def follow(world: WorldModel, reader: GripperReader, episodes: Episodes, frames: int, batch: int) -> dict[str, tuple[float, float]]:
    """Under own and under another's actions: distance in pixels of the imagined gripper from the true one at the last frame, and
    PSNR of all imagined frames, both means over episodes."""
    truth = np.stack([episodes[i].feature(PIXEL)[:frames] for i in range(len(episodes))])
    clips, actions = map(np.concatenate, zip(*read_batches(episodes, frames, batch, world.model.config.size)))
    result = {}
    for whose, chosen in (("own", actions), ("another's", np.roll(actions, 1, axis=0))):
        imagined = np.concatenate([imagine(world, clips[i : i + batch], chosen[i : i + batch, :-1]) for i in range(0, len(clips), batch)])
        error = np.linalg.norm(reader.read(imagined[:, -1]) - truth[:, -1], axis=-1)
        result[whose] = error.mean(), psnr(imagined, clips)[:, 1:].mean()
    return result


def sweep(world: WorldModel, starts: np.ndarray, action_dim: int, batch: int) -> dict[str, np.ndarray]:
    """From each start [N, 1, H, W, 3], SWEEP_FRAMES frames in each direction: name -> uint8 [N, 1 + SWEEP_FRAMES, H, W, 3]."""
    swept = {}
    for name, (axis, sign) in SWEEPS.items():
        actions = np.zeros((len(starts), SWEEP_FRAMES, action_dim), np.float32)
        actions[:, :, WORLD_VECTOR.start + axis] = sign
        swept[name] = np.concatenate([imagine(world, starts[i : i + batch], actions[i : i + batch])
                                      for i in range(0, len(starts), batch)])
    return swept


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure how well the bundled world obeys.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_world_options(parser, steps=6, eta=0.0)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--sweeps", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", default="evaluations/obedience", help="folder for the pictures")
    args = parser.parse_args(argv)
    try:
        episodes = open_held_out(args, args.frames)
        training = open_episodes(args.data, args.root or default_root(args.data), "train")
        if training.dataset.action_dim != WORLD_VECTOR.stop:
            raise DataError(f"obedience is measured on the drawer's episodes; {args.data} does not say where the gripper is")
        reader = train_reader(training)
        frames, places = recorded(episodes)
        with torch.no_grad():
            errors = (reader(frames) - places).norm(dim=1)
        print(f"gripper reader: trained on {len(training)} recorded episodes, off by {errors.mean():.2f} pixels (median "
              f"{errors.median():.2f}) on {len(episodes)} held-out ones")
        starts, axes = central_frames(episodes), directions(training)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        print(f"\n| guidance | gripper error at frame {args.frames - 1}, own actions (pixels) | another's | ratio | PSNR, own (dB) | another's "
              f"| right side of the sweep (%) | {' | '.join(SWEEPS)} |\n|{' --- |' * (7 + len(SWEEPS))}")
        curves: dict[str, list[tuple[float, float]]] = {"gripper error, pixels": [], "PSNR, dB": []}
        for guidance in args.guidance:
            world = load_world(args.checkpoint, guidance=guidance, steps=args.steps, eta=args.eta, seed=args.seed, history_level=args.history_level)
            check_actions(world, args.data)
            (own, own_psnr), (other, other_psnr) = follow(world, reader, episodes, args.frames, args.batch).values()
            curves["gripper error, pixels"].append((guidance, own))
            curves["PSNR, dB"].append((guidance, own_psnr))
            right = []
            if args.sweeps:
                swept = sweep(world, starts, training.dataset.action_dim, args.batch)
                for name, (axis, sign) in SWEEPS.items():
                    moved = reader.read(swept[name][:, -1]) - reader.read(swept[name][:, 0])
                    right.append(100 * np.mean(sign * moved @ axes[:, axis] > 0))
                save_strip(out / f"sweeps_guidance{guidance:g}.png", {name: clips[0] for name, clips in swept.items()})
            print(f"| {guidance:g} | {own:.2f} | {other:.2f} | {own / other:.2f} | {own_psnr:.2f} | {other_psnr:.2f} | "
                  f"{np.mean(right) if right else np.nan:.1f} | {' | '.join(f'{share:.0f}' for share in right)} |", flush=True)
        save_curves(out / "guidance.png", curves, "guidance")
    except (DataError, CheckpointError, RequestError, OSError) as error:
        print(f"obedience: {error}", file=sys.stderr)
        return 2
    print(f"\npictures: {out}/guidance.png and the sweeps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
