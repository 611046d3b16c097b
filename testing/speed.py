"""How fast it is, in ratios measured in one run: python -m testing.speed --size small

    small   64 channels, 16×20 latents: the size at which ratios are measured
    tiny    what train.py makes from scratch          full   DynamiCrafter-512, 320×512

Weights are random: they take the same time. Streaming and recomputing imagine the same rollout,
frame by frame in turn; then training steps.
"""
import resource
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model.device import best_device, math_attention_on_cpu
from model.memory import keep_malloc_heap, recompute_activations
from model.vid2world import PRESETS, Model
from sample import WorldModel
from support.options import option, program
from support.pictures import save_curves
from temporal.norm import CAUSAL_SCOPES
from temporal.streaming import attend
from unet import UNet, UNetConfig

SIZES = {
    "tiny": PRESETS["tiny"],
    "small": replace(PRESETS["tiny"], unet=UNetConfig(model_channels=64, channel_mult=(1, 2, 4),
                                                      context_dim=64)),
    "full": PRESETS["512"],
}
# dense bf16 operations per second, as the maker states them
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def build(size: str, norm_scope: str, device: torch.device) -> Model:
    config = SIZES[size]
    config = replace(config, unet=replace(config.unet, causal=True, norm_scope=norm_scope,
                                          action_dim=13, dropout=0.0))
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
    """Peak memory in GB: of the device since a reset, or of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def time_frames(model: Model, modes: dict[str, bool], frames: int,
                settings: "Settings") -> dict[str, list[float]]:
    """Seconds of each new frame of rollouts from one given frame, decoding included: name of a mode
    -> its times.

    modes  name -> streaming. Their frames are interleaved, so that machine load affects all alike.
    """
    random = np.random.default_rng(0)
    given = random.integers(0, 256, (1, *model.config.size, 3), dtype=np.uint8)
    worlds = {mode: WorldModel(model, settings.guidance, steps=settings.steps, eta=1.0,
                               streaming=modes[mode]) for mode in modes}
    for world in worlds.values():
        world.reset(given)
        world.step(np.zeros(13))  # to warm up
        world.reset(given)
    times = {mode: [] for mode in modes}
    for action in random.standard_normal((frames, 13)):
        for mode, world in worlds.items():
            times[mode].append(seconds(model.device, partial(world.step, action)))
    return times


def time_training(unet: UNet, latents: tuple[int, int], batch: int, rounds: int,
                  device: torch.device) -> tuple[float, float]:
    """Seconds of a training step on clips of 16 frames (the fastest), and its operations."""
    T, config = unet.config.num_frames, unet.config
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    inputs = [torch.randn(batch, T, config.in_channels, *latents, device=device),
              torch.full((batch, T), 500, device=device),
              torch.randn(batch, 77, config.context_dim, device=device),
              torch.randn(batch, T, 16, config.context_dim, device=device)]

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            actions = torch.zeros(batch, T, config.action_dim, device=device)
            loss = unet(*inputs, actions=actions).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(*inputs)
    return min(seconds(device, step) for _ in range(rounds)), 3 * counter.get_total_flops()


def measure(settings: "Settings") -> None:
    device = torch.device(settings.device or best_device())
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    keep_malloc_heap()
    model = build(settings.size, settings.norm_scope, device).eval()
    print(f"{settings.size}, a U-Net of "
          f"{sum(p.numel() for p in model.unet.parameters()) / 1e6:.1f} M parameters, on {name}; "
          f"norms over {settings.norm_scope}, {settings.steps} steps, guidance "
          f"{settings.guidance:g}")

    times = time_frames(model, {"streaming": True, "recomputing": False}, settings.frames - 1,
                        settings)
    print("\n| frame | streaming (s) | recomputing (s) | ratio |\n| --- | --- | --- | --- |")
    for t, (a, b) in enumerate(zip(times["streaming"], times["recomputing"], strict=True), start=2):
        print(f"| {t} | {a:.3f} | {b:.3f} | {b / a:.1f} |")
    total = [sum(times[mode]) for mode in times]
    print(f"\nrollout of {settings.frames} frames: {total[0]:.2f} s streaming, {total[1]:.2f} s "
          "recomputing, "
          f"{total[1] / total[0]:.1f} times; frame {settings.frames}: "
          f"{times['recomputing'][-1] / times['streaming'][-1]:.1f} times")
    (out := Path(settings.out)).mkdir(parents=True, exist_ok=True)
    save_curves(out / f"speed_{settings.size}.png",
                {f"{mode}, seconds": list(enumerate(times[mode], start=2)) for mode in times},
                "frame")
    world = WorldModel(model, steps=1)
    world.reset(np.zeros((model.num_frames - 1, *model.config.size, 3), np.uint8))
    world.step(np.zeros(13))
    print(f"plot: {out / f'speed_{settings.size}.png'}; the cache takes "
          f"{world.cache.nbytes / 1e6:.1f} MB")

    latents = model.latent_shape[1:]
    unet = model.unet.train()
    if settings.batch:
        for checkpointing in ([False, True] if settings.size == "full" else [False]):
            if checkpointing:
                recompute_activations(unet)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took, operations = time_training(unet, latents, settings.batch, settings.rounds, device)
            peak = next((peak for key, peak in PEAKS.items() if key in name), None)
            share = f", {100 * operations / took / peak:.0f} % of the device's peak" if peak else ""
            words = ", recomputing activations" if checkpointing else ""
            print(f"training step, {settings.batch} clips of 16 frames{words}: {took:.2f} s, "
                  f"{settings.batch / took:.2f} clips/s, {operations / took / 1e12:.2f} "
                  f"TFLOP/s{share}, peak memory {memory(device):.2f} GB")


def time_layers(rounds: int = 10) -> None:
    """Layers that are written for speed, against the plain way, at the bundled world's size."""
    x = torch.randn(4, 64, 18, 16, 20)  # a training batch, padded with two frames
    conv = nn.Conv3d(64, 64, (3, 1, 1))
    q, k, v = torch.randn(320, 4, 2, 16), torch.randn(320, 4, 14, 16), torch.randn(320, 4, 14, 16)
    visible = torch.ones(2, 14, dtype=torch.bool)  # a streaming pass

    # queries, keys and values of all pixels of a frame
    pixels = torch.randn(3, 64, 4, 80, 16, dtype=torch.bfloat16, requires_grad=True)

    def learn() -> None:
        F.scaled_dot_product_attention(*pixels).sum().backward()

    def learn_quickly() -> None:
        with math_attention_on_cpu(torch.device("cpu"), bf16=True, small=True):
            learn()

    def flat() -> None:
        F.conv2d(x.flatten(3), conv.weight[..., 0], conv.bias).sum().backward()

    cases = {"temporal convolution in training, in two dimensions against three": (
                 flat, lambda: conv(x).sum().backward()),
             "attention of two queries, written out against fused": (
                 lambda: attend(q, k, v, visible),
                 lambda: F.scaled_dot_product_attention(q, k, v, visible)),
             "spatial attention in training in bfloat16, written out against fused": (
                 learn_quickly, learn)}
    for name, (ours, plain) in cases.items():
        times = [[seconds(torch.device("cpu"), work) for work in (ours, plain)]
                 for _ in range(rounds)]  # in turn
        mine, theirs = 1000 * np.median(times, axis=0)
        print(f"{name}: {mine:.2f} ms against {theirs:.2f} ms, {theirs / mine:.1f} times")


@dataclass
class Settings:
    size: str = option("small", "of the model", choices=SIZES)
    norm_scope: str = option("frame", "as in train.py", choices=CAUSAL_SCOPES)
    frames: int = option(16, "of the rollout that is timed, the given one included", least=2)
    steps: int = option(10, "denoising steps per frame")
    guidance: float = option(2.0, "with 1, a pass needs no second version of the new frame")
    batch: int = option(1, "clips per training step; 0 for no training", least=0)
    rounds: int = option(3, "training steps, of which the fastest counts")
    layers: bool = option(False, "time single layers against the plain way, and nothing else")
    device: str | None = option(None, "cpu, cuda, …; if left out, the best there is")
    out: str = option("rollouts", "folder for the plot")


def run(settings: Settings) -> None:
    return time_layers() if settings.layers else measure(settings)


main = program(__name__, "speed", run, Settings, "Measure speed and memory.")
