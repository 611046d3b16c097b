"""How fast it is, in ratios measured in one run: python -m evaluation.speed --size small

    small   64 channels, 16×20 latents: the size at which the ratios of the README were measured
    tiny    what train.py makes from scratch          full   DynamiCrafter-512, 320×512

Weights are random: they take the same time. Streaming and recomputing imagine the same rollout, frame by frame in turn;
then one long rollout, streaming, and training steps. `--against` compares with another version of this
repository: passes and training steps of both in turn, so that a noisy machine is noisy to both.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from dynamicrafter.model import PRESETS, Model, keep_freed_memory
from evaluation.pictures import save_curves
from sample import WorldModel
from unet import UNet, UNetConfig

SIZES = {
    "tiny": PRESETS["tiny"],
    "small": replace(PRESETS["tiny"], unet=UNetConfig(model_channels=64, channel_mult=(1, 2, 4), context_dim=64)),
    "full": PRESETS["512"],
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 operations per second, as the maker states them


def build(size: str, norm_scope: str, device: torch.device) -> Model:
    config = SIZES[size]
    config = replace(config, unet=replace(config.unet, causal=True, norm_scope=norm_scope, action_dim=13, dropout=0.0))
    torch.manual_seed(0)
    with device:
        return Model(config)


def seconds(device: torch.device, work) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(device: torch.device) -> float:
    """Peak memory in GB: of the device since its statistics were reset, or of this process since it began."""
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak / 1e9


def time_frames(model: Model, modes: dict[str, bool], frames: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each new frame of rollouts from one given frame, decoding included: name of a mode -> its times.

    modes  name -> streaming. Their frames are imagined in turn, so that all meet the same moods of the machine.
    """
    random = np.random.default_rng(0)
    given = random.integers(0, 256, (1, *model.config.size, 3), dtype=np.uint8)
    worlds = {mode: WorldModel(model, guidance=args.guidance, steps=args.steps, streaming=modes[mode]) for mode in modes}
    for world in worlds.values():
        world.reset(given)
        world.step(np.zeros(13))  # to warm up
        world.reset(given)
    times = {mode: [] for mode in modes}
    for action in random.standard_normal((frames, 13)):
        for mode, world in worlds.items():
            times[mode].append(seconds(model.device, lambda: world.step(action)))
    return times


def time_training(unet: UNet, latents: tuple[int, int], batch: int, rounds: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a training step of the U-Net on clips of 16 frames (the fastest of a few), and its operations."""
    T, config = unet.config.num_frames, unet.config
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    inputs = [torch.randn(batch, T, config.in_channels, *latents, device=device), torch.full((batch, T), 500, device=device),
              torch.randn(batch, 77, config.context_dim, device=device), torch.randn(batch, T, 16, config.context_dim, device=device)]

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = unet(*inputs, actions=torch.zeros(batch, T, config.action_dim, device=device)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(*inputs)
    return min(seconds(device, step) for _ in range(rounds)), 3 * counter.get_total_flops()


def measure(args: argparse.Namespace) -> None:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    keep_freed_memory()
    model = build(args.size, args.norm_scope, device).eval()
    print(f"{args.size}, a U-Net of {sum(p.numel() for p in model.unet.parameters()) / 1e6:.1f} M parameters, on {name}; norms over "
          f"{args.norm_scope}, {args.steps} steps, guidance {args.guidance:g}")

    times = time_frames(model, {"streaming": True, "recomputing": False}, args.frames - 1, args)
    print("\n| frame | streaming (s) | recomputing (s) | ratio |\n| --- | --- | --- | --- |")
    for t, (a, b) in enumerate(zip(times["streaming"], times["recomputing"]), start=2):
        print(f"| {t} | {a:.3f} | {b:.3f} | {b / a:.1f} |")
    total = [sum(times[mode]) for mode in times]
    print(f"\nrollout of {args.frames} frames: {total[0]:.2f} s streaming, {total[1]:.2f} s recomputing, "
          f"{total[1] / total[0]:.1f} times; frame {args.frames}: {times['recomputing'][-1] / times['streaming'][-1]:.1f} times")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_curves(out / f"speed_{args.size}.png", {f"{mode}, seconds": list(enumerate(times[mode], start=2)) for mode in times},
                "frame")
    world = WorldModel(model, steps=1)
    window = world.num_frames - world.overlap  # frames from one window shift to the next
    world.reset(np.zeros((world.num_frames - 1, *model.config.size, 3), np.uint8))
    world.step(np.zeros(13))
    print(f"plot: {out / f'speed_{args.size}.png'}; the cache takes {world.cache.nbytes / 1e6:.1f} MB")

    if args.long:
        long = time_frames(model, {"streaming": True}, args.long, args)["streaming"]
        early, late = (np.mean(long[t - window : t + window]) for t in (20, args.long - window))
        print(f"streaming, mean of two windows: {early:.3f} s around frame 20, {late:.3f} s around frame {args.long - window}, "
              f"ratio {late / early:.3f}; peak memory {memory(device):.2f} GB")

    latents = model.latent_shape[1:]
    unet = model.unet.train()
    for batch in args.batch:
        for checkpointing in ([False, True] if args.size == "full" else [False]):
            unet.checkpointing = checkpointing
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took, operations = time_training(unet, latents, batch, args.rounds, device)
            peak = next((peak for key, peak in PEAKS.items() if key in name), None)
            share = f", {100 * operations / took / peak:.0f} % of the device's peak" if peak else ""
            print(f"training step, {batch} clips of 16 frames{', recomputing activations' if checkpointing else ''}: {took:.2f} s, "
                  f"{batch / took:.2f} clips/s, {operations / took / 1e12:.2f} TFLOP/s{share}, peak memory {memory(device):.2f} GB")


def compare(args: argparse.Namespace) -> None:
    """Passes over two clips and training steps of one, of this version and another, in turn, in processes of their own."""
    trees = {"here": Path(__file__).parent.parent, "there": Path(args.against).resolve()}
    results = {which: [] for which in trees}
    for _ in range(args.rounds):
        for which, tree in trees.items():
            command = [sys.executable, Path(__file__).with_name("speed_worker.py"), args.norm_scope]
            worker = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True)
            if worker.returncode:
                sys.exit(worker.stderr)
            results[which].append(json.loads(worker.stdout))
    for what, unit in (("pass", "s"), ("training", "s"), ("memory", "GB")):
        here, there = (np.median([result[what] for result in results[which]]) for which in trees)
        print(f"{what}: {here:.3f} {unit} here, {there:.3f} {unit} there, ratio {there / here:.2f} (medians of {args.rounds})")
    here, there = (np.array(results[which][0]["output"]) for which in trees)
    print(f"outputs differ by {np.linalg.norm(here - there) / np.linalg.norm(there):.1e} of their norm")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure speed and memory.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--norm-scope", choices=["frame", "past"], default="frame")
    parser.add_argument("--frames", type=int, default=16, help="of the rollout that is timed, the given one included")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--long", type=int, default=0, help="frames of a long rollout; 0 for none")
    parser.add_argument("--batch", type=int, nargs="*", default=[1], help="clips per training step; none for no training")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--against", help="folder with another version of this repository")
    parser.add_argument("--out", default="rollouts", help="folder for the plot")
    args = parser.parse_args()
    compare(args) if args.against else measure(args)
