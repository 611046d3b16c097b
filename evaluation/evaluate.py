"""How well a world model foretells held-out episodes, by the paper's metrics.

    python -m evaluation.evaluate                                         (the bundled world, in a few minutes)
    torchrun --nproc_per_node=4 -m evaluation.evaluate --data rt1 --root /data/fractal20220817_data --checkpoint runs/rt1 \\
        --episodes 1024 --inception inception-2015-12-05.pt --lpips vgg16.pt --i3d i3d_torchscript.pt

Every episode's first frames are given, the rest is imagined from its actions, and what was imagined is compared with what happened
(evaluation/metrics.py). Beside it stands the PSNR of a model that knows nothing and repeats the last given frame.

Nothing grows with the number of episodes: scores are summed up by frame, features into a mean and a covariance. The sums are
saved after every batch, so that a run that was interrupted goes on. Batch b is always made of the same episodes and always draws the
same noise, whichever process it falls to: any number of processes gives the same figures. Paper: section 5.1.
"""
import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import DATA_SETS, DataError, Episodes, default_root, fit_frames, open_episodes
from dynamicrafter.model import TINY_WORLD, save
from evaluation.metrics import FeatureNetwork, MetricError, Statistics, frechet_distance, i3d, inception, lpips, psnr, ssim
from evaluation.pictures import save_curves
from sample import RequestError, WorldModel, load_world
from tools.processes import join_processes
from unet import CheckpointError, read_checkpoint

BETTER = {"psnr": "dB, higher is better", "ssim": "higher is better", "lpips": "lower is better", "fid": "lower is better",
          "fvd": "lower is better"}


@dataclass
class Tally:
    """All that is kept of the batches so far."""
    batches: int = 0
    episodes: int = 0
    sums: dict[str, np.ndarray] = field(default_factory=dict)  # metric -> sum over episodes, by frame
    crowds: dict[str, Statistics] = field(default_factory=dict)  # "fid of truth", … -> features

    def add(self, scores: dict[str, np.ndarray]) -> None:
        """Scores of a batch, [B, frames] each."""
        for name, rows in scores.items():
            self.sums[name] = self.sums.get(name, 0) + rows.sum(axis=0)

    def add_features(self, name: str, features: torch.Tensor) -> None:
        self.crowds.setdefault(name, Statistics(features.shape[1])).add(features)

    def merge(self, other: "Tally") -> None:
        self.episodes += other.episodes
        for name, row in other.sums.items():
            self.sums[name] = self.sums.get(name, 0) + row
        for name, crowd in other.crowds.items():
            self.crowds.setdefault(name, Statistics(len(crowd.mean))).merge(crowd.count, crowd.mean, crowd.scatter)

    def state(self) -> dict:
        return {"batches": self.batches, "episodes": self.episodes,
                "sums": {name: torch.from_numpy(row) for name, row in self.sums.items()},
                "crowds": {name: (crowd.count, crowd.mean, crowd.scatter) for name, crowd in self.crowds.items()}}

    @classmethod
    def from_state(cls, state: dict) -> "Tally":
        tally = cls(state["batches"], state["episodes"], {name: row.numpy() for name, row in state["sums"].items()})
        for name, crowd in state["crowds"].items():
            tally.crowds[name] = Statistics(len(crowd[1]))
            tally.crowds[name].merge(*crowd)
        return tally


def read_batches(episodes: Episodes, frames: int, batch: int, size: tuple[int, int], numbers: range | None = None
                 ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first frames [B, T, H, W, 3] of episodes at a model's size, and the actions [B, T, A] taken at them.

    numbers  which of the batches; None means all
    """
    for b in numbers or range(-(-len(episodes) // batch)):
        read = [episodes[i].read(0, frames) for i in range(b * batch, min((b + 1) * batch, len(episodes)))]
        yield np.stack([fit_frames(clip, *size) for clip, _ in read]), np.stack([actions for _, actions in read])


def imagine(world: WorldModel, frames: np.ndarray, actions: np.ndarray, context: int = 1, nar: bool = False) -> np.ndarray:
    """Episodes side by side: uint8 [B, T, H, W, 3], the given frames included, from those and actions [B, T - 1, A]."""
    if nar:
        return np.stack([world.imagine_together(clip, taken) for clip, taken in zip(frames, actions)])
    world.reset(frames[:, :context], actions[:, : context - 1])
    steps = tqdm(range(context - 1, actions.shape[1]), unit="frame", leave=False, disable=None)
    return np.concatenate([frames[:, :context], np.stack([world.step(actions[:, t]) for t in steps], axis=1)], axis=1)


def score(tally: Tally, imagined: np.ndarray, truth: np.ndarray, given: np.ndarray, networks: dict[str, FeatureNetwork]) -> None:
    """Add a batch of imagined frames to the tally, uint8 [B, T, H, W, 3]; given [B, 1, H, W, 3] is the last frame before them."""
    tally.add({"psnr": psnr(imagined, truth), "ssim": ssim(imagined, truth), "psnr of repeating": psnr(given, truth)})
    B, T = truth.shape[:2]
    if "lpips" in networks:
        ours, theirs = (networks["lpips"](clips.reshape(B * T, *clips.shape[2:])) for clips in (imagined, truth))
        tally.add({"lpips": (ours - theirs).square().sum(dim=1).view(B, T).double().cpu().numpy()})
    for whose, clips in (("imagined", imagined), ("true", truth)):
        if "fid" in networks:
            tally.add_features(f"fid, {whose}", networks["fid"](clips.reshape(B * T, *clips.shape[2:])))
        if "fvd" in networks:
            tally.add_features(f"fvd, {whose}", networks["fvd"](clips))
    tally.episodes += B


def evaluate(world: WorldModel, episodes: Episodes, frames: int, context: int, batch: int = 8, nar: bool = False,
             networks: dict[str, FeatureNetwork] | None = None, partial: Path | None = None, settings: dict | None = None,
             rank: int = 0, processes: int = 1) -> Tally:
    """Roll out this process's share of the batches. With `partial`, go on from that file where its settings are these."""
    tally = Tally()
    if partial and partial.exists():
        saved = read_checkpoint(partial)
        if saved.get("settings") == settings:
            tally = Tally.from_state(saved["tally"])
            print(f"going on after {tally.batches} batches ({partial})")
    mine = range(rank, -(-len(episodes) // batch), processes)[tally.batches :]
    size = world.model.config.size
    for truth, actions in tqdm(read_batches(episodes, frames, batch, size, mine) if len(mine) else [], total=len(mine), unit="batch",
                               disable=None if rank == 0 else True):
        imagined = imagine(world, truth, actions[:, :-1], context, nar)
        first = 1 if nar else context  # without autoregression one frame is given, however many the others get
        score(tally, imagined[:, first:], truth[:, first:], truth[:, first - 1 : first], networks or {})
        tally.batches += 1
        if partial:
            save(partial, {"settings": settings, "tally": tally.state()})
    return tally


def open_held_out(args: argparse.Namespace, frames: int) -> Episodes:
    """The first --episodes episodes of the validation split, or all of it."""
    episodes = open_episodes(args.data, args.root or default_root(args.data), "val", min_length=frames)
    number = len(episodes) if args.episodes is None else args.episodes
    if not 1 <= number <= len(episodes):
        raise DataError(f"{number} episodes were asked for, but {len(episodes)} of at least {frames} frames are held out")
    return episodes.where(np.arange(number))


def check_actions(world: WorldModel, data: str) -> None:
    if world.action_dim != DATA_SETS[data].action_dim:
        raise DataError(f"{data} has actions of {DATA_SETS[data].action_dim} numbers, but this model takes {world.action_dim}")


def add_world_options(parser: argparse.ArgumentParser, steps: int, eta: float = 1.0) -> None:
    parser.add_argument("--checkpoint", default=str(TINY_WORLD), help="as in sample.py")
    parser.add_argument("--data", choices=DATA_SETS, default="rt1")
    parser.add_argument("--root", help="the data set's folder; if left out, datasets/ or else the bundled episodes")
    parser.add_argument("--episodes", type=int, help="held-out episodes; if left out, all")
    parser.add_argument("--frames", type=int, default=16, help="of an episode, given ones included")
    parser.add_argument("--steps", type=int, default=steps, help="denoising steps per frame")
    parser.add_argument("--eta", type=float, default=eta)
    parser.add_argument("--history-level", type=int, default=39, help="noise level at which the history is held")
    parser.add_argument("--batch", type=int, default=8, help="worlds side by side")
    parser.add_argument("--seed", type=int, default=0)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure imagined frames of held-out episodes.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_world_options(parser, steps=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--context", type=int, help="frames given; if left out, as the data set has it")
    parser.add_argument("--nar", action="store_true", help="sample all frames together (the paper's Vid2World-NAR)")
    parser.add_argument("--inception", help="network for FID: see evaluation/metrics.py")
    parser.add_argument("--lpips", help="network for LPIPS")
    parser.add_argument("--i3d", help="network for FVD")
    parser.add_argument("--out", default="evaluations/default", help="folder for the results")
    args = parser.parse_args(argv)
    args.context = args.context or DATA_SETS[args.data].context
    if not 1 <= args.context < args.frames or args.batch < 1:
        parser.error("--context must be at least 1 and less than --frames, and --batch at least 1")
    return args


def report(tally: Tally, args: argparse.Namespace, out: Path) -> None:
    """The results as JSON, as a Markdown table, and as a curve over frames for every metric that has one."""
    by_frame = {name: row / tally.episodes for name, row in tally.sums.items()}
    result = {name: float(row.mean()) for name, row in by_frame.items()}
    reasons = {"lpips": "no --lpips network", "fid": "no --inception network", "fvd": "no --i3d network"}
    for name in ("fid", "fvd"):
        if f"{name}, true" in tally.crowds:
            result[name] = frechet_distance(tally.crowds[f"{name}, imagined"], tally.crowds[f"{name}, true"])
    lines = [f"{tally.episodes} held-out episodes of {args.data}, {args.frames} frames, {args.context} given; "
             f"{'all frames together, ' if args.nar else ''}guidance {args.guidance:g}, {args.steps} steps", "",
             "| metric | value | |", "| --- | --- | --- |"]
    for name, better in BETTER.items():
        lines.append(f"| {name.upper()} | {result[name]:.3f} | {better} |" if name in result else
                     f"| {name.upper()} | absent | {reasons[name]} |")
    lines.append(f"| PSNR of repeating the last given frame | {result['psnr of repeating']:.3f} | dB |")
    first = args.frames - len(by_frame["psnr"])
    lines += ["", f"| frame | {' | '.join(by_frame)} |", f"|{' --- |' * (1 + len(by_frame))}"]
    lines += [f"| {first + t} | {' | '.join(f'{row[t]:.3f}' for row in by_frame.values())} |" for t in range(len(by_frame["psnr"]))]
    print("\n" + "\n".join(lines))
    (out / "result.md").write_text("\n".join(lines) + "\n")
    (out / "result.json").write_text(json.dumps(
        {"settings": vars(args), "episodes": tally.episodes, "result": result, "absent": [n for n in BETTER if n not in result],
         "by_frame": {name: row.tolist() for name, row in by_frame.items()}}, indent=1))
    for name in ("psnr", "ssim", "lpips"):
        curves = {label: list(enumerate(row, start=first)) for label, row in by_frame.items() if label.startswith(name)}
        if curves:
            save_curves(out / f"{name}.png", curves, "frame")
    print(f"\nwritten: {out}/result.json, result.md, and curves over frames")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 2 if it cannot be done, after one sentence that says why."""
    args = parse_arguments(argv)
    try:
        rank, processes, device = join_processes()
        networks = {name: load(path, device) for name, load, path in (
            ("lpips", lpips, args.lpips), ("fid", inception, args.inception), ("fvd", i3d, args.i3d)) if path}
        world = load_world(args.checkpoint, device, guidance=args.guidance, steps=args.steps, eta=args.eta, seed=args.seed, history_level=args.history_level)
        check_actions(world, args.data)
        episodes = open_held_out(args, args.frames)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        partial = out / f"partial_{rank}_of_{processes}.pt"
        tally = evaluate(world, episodes, args.frames, args.context, args.batch, args.nar, networks, partial, vars(args), rank, processes)
        if processes > 1:
            tallies: list = [None] * processes
            dist.all_gather_object(tallies, tally.state())
            tally = Tally.from_state(tallies[0])
            for other in tallies[1:]:
                tally.merge(Tally.from_state(other))
            dist.destroy_process_group()
        if rank == 0:
            report(tally, args, out)
        partial.unlink(missing_ok=True)
        return 0
    except (DataError, CheckpointError, RequestError, MetricError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
