"""What can be said of a GPU only on one:

    python -m testing.on_a_gpu              (a card of 80 GB; three minutes)
    python -m testing.on_a_gpu --rehearse   (the same path on the CPU, with a small network)

 1. Equal: the golden networks and a rollout, in float32 and in bfloat16.
 2. A frame of DynamiCrafter-512's layout, streaming and recomputing. Weights are random: they take
    the same time and memory.
 3. A pass over a new frame and its two branches, launched from Python, and as a CUDA graph.
 4. Training steps: time, share of the card's arithmetic, memory (`testing.plan` counts it).
"""
import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.device import best_device
from model.vid2world import PRESETS, Model, ModelConfig
from sample import WorldModel
from temporal.streaming import Cache
from testing.golden import error_of, golden, network_inputs, with_recipe
from testing.plan import add_gradients, begin_training, build_model
from testing.speed import PEAKS, seconds
from testing.worlds import SMALL, small_episode, small_world
from unet import UNet

TRAININGS = ((1, True), (1, False), (2, True), (4, True))  # clips, recomputing activations?


def compare(device: torch.device) -> None:
    """Relative distances from the original network's output, and from the CPU's rollout."""
    torch.backends.cudnn.allow_tf32 = False
    g = golden("unet_tiny")
    x, text, image = (tensor.to(device) for tensor in network_inputs(g))
    network = with_recipe(UNet(SMALL), "model.diffusion_model.").to(device)
    frames, actions = small_episode(6)

    def roll(where: torch.device, half: bool) -> torch.Tensor:
        world = small_world(guidance=2.0, eta=1.0, steps=4)
        world.model.to(where)
        world.autocast = partial(torch.autocast, where.type, torch.bfloat16, enabled=half)
        world.reset(frames[:2], actions[:1])
        for action in actions[1:]:
            world.step(action)
        return world.latents.float().cpu()

    truth = roll(torch.device("cpu"), False)
    for half, words in ((False, "float32"), (True, "bfloat16")):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            y = network(x, g["timesteps"].to(device), text, image, fps=g["fps"].to(device))
        print(f"{words}: the original U-Net's output to "
              f"{error_of(y.float().cpu(), g['y'].transpose(1, 2)):.1e}, the CPU's rollout to "
              f"{error_of(roll(device, half), truth):.1e}", flush=True)
    torch.backends.cudnn.allow_tf32 = True


@torch.no_grad()
def fill(model: Model) -> None:
    """Random weights such that signals neither vanish nor explode; a fresh network's output is
    zero."""
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=weight[0].numel() ** -0.5)


def time_frames(model: Model, steps: int, streaming: bool, given: list[int]) -> None:
    """Seconds of a frame after so many."""
    world = WorldModel(model, guidance=2.0, steps=steps, eta=1.0, streaming=streaming)
    frames = np.random.default_rng(0).integers(0, 256, (max(given), *model.config.size, 3),
                                               dtype=np.uint8)
    times = []
    for first in given:
        world.reset(frames[:first])
        if streaming:  # fills the cache, which the frame before would have done
            world.step(np.zeros(13))
            world.reset(frames[:first])
            world.step(np.zeros(13))
        times.append(seconds(model.device, partial(world.step, np.zeros(13))))
    mode = "streaming" if streaming else "recomputing"
    print(f"{steps} steps with guidance, {mode}: "
          + ", ".join(f"frame {first + 1 + streaming}: {time:.2f} s" for first, time in
                      zip(given, times, strict=True)), flush=True)


@torch.no_grad()
def time_pass(model: Model, given: int, repeats: int = 10) -> None:
    """Milliseconds of a pass over the branches of one frame after `given`."""
    device, n = model.device, 2
    model.unet.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    latents = torch.randn(1, given, *model.latent_shape, device=device)
    tokens = torch.randn(1, model.num_frames * model.config.resampler.num_queries,
                         model.config.unet.context_dim, device=device)
    actions, cache = torch.zeros(1, given, 13, device=device), Cache(model.num_frames)
    levels = torch.full((1, given), 39, device=device)
    # a graph keeps no copy of the weights that autocast makes
    with torch.autocast(device.type, torch.bfloat16, device.type == "cuda", cache_enabled=False):
        model.denoise(latents, levels, latents[:, :1], model.context(tokens, range(given)), actions,
                      torch.ones(1, given, device=device), cache)
        cache.branches = n
        context = model.context(tokens, [given] * n)
        x, mask = latents[:, :n].clone(), torch.tensor([[1.0, 0.0]], device=device)

        def run() -> torch.Tensor:
            return model.denoise(x, levels[:, :n], latents[:, :1], context, actions[:, :n], mask,
                                 cache)

        expected = run()
        eager = min(seconds(device, run) for _ in range(repeats))
        print(f"a pass over two branches of frame {given + 1}: {1e3 * eager:.1f} ms", end="")
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = run()
            replayed = min(seconds(device, graph.replay) for _ in range(repeats))
            print(f", as a CUDA graph {1e3 * replayed:.1f} ms, its output within "
                  f"{error_of(y.float().cpu(), expected.float().cpu()):.1e}", end="")
        print(flush=True)


def time_training(config: ModelConfig, batch: int, checkpointing: bool, device: torch.device
                  ) -> None:
    """Of whole steps as train.py takes them."""
    half = device.type == "cuda"
    with device:
        model = build_model(config)
        learn = begin_training(model, checkpointing, half=half)
        optimizer = torch.optim.AdamW(learn, lr=1e-5, fused=True)

        def step() -> None:
            add_gradients(model, batch, half)
            optimizer.step()
            optimizer.zero_grad()

        with FlopCounterMode(display=False) as counter:  # takes memory of its own
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took = min(seconds(device, step) for _ in range(3))
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((peak for key, peak in PEAKS.items() if key in name), None)
    share = f" ({100 * counter.get_total_flops() / took / peak:.0f} % of the peak)" if peak else ""
    used = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    print(f"a training step, {batch} clips, {'recomputing' if checkpointing else 'keeping'} "
          f"activations: {took:.2f} s, {counter.get_total_flops() / took / 1e12:.0f} TFLOP/s{share}"
          f", {used:.1f} GB at the most", flush=True)


def guarded(device: torch.device, work: Callable, *inputs: object) -> bool:
    """Whether a part succeeded; if it fails, the others go on."""
    try:
        work(*inputs)
        return True
    except Exception as error:  # noqa: BLE001
        print(f"\n{work.__name__} failed: {type(error).__name__}: {str(error)[:500]}", flush=True)
        return False
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 1 if a part failed."""
    parser = argparse.ArgumentParser(description="Measure what only a GPU can show.")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, a small network")
    rehearse = parser.parse_args(argv).rehearse
    device = torch.device("cpu" if rehearse else best_device())
    config = replace(PRESETS["tiny"], size=(16, 16)) if rehearse else PRESETS["512"]
    print(torch.cuda.get_device_name() if device.type == "cuda" else "a rehearsal on the CPU",
          torch.__version__)
    done = [guarded(device, compare, device)]
    with device:
        model = build_model(config).eval()
    fill(model)
    for steps, streaming, given in ((10, True, [1, 7, 14]), (50, True, [1, 7, 14]),
                                    (10, False, [1, 8, 15]), (50, False, [15])):
        done.append(guarded(device, time_frames, model, 2 if rehearse else steps, streaming, given))
    done.append(guarded(device, time_pass, model, 15))
    del model
    for batch, checkpointing in TRAININGS:
        done.append(guarded(device, time_training, config, batch, checkpointing, device))
    return int(not all(done))


if __name__ == "__main__":
    sys.exit(main())
