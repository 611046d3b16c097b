"""Does full size work? A checkpoint of DynamiCrafter-512's layout with random weights, and what can
be shown with it on a CPU of 24 GB.

    python -m testing.full_size write full.safetensors     (5 GB, in half precision)
    python -m testing.full_size prove full.safetensors     (20 minutes)

Random weights take the memory and the time of trained ones. Proved are: the file is opened once and
read as it is needed; all names and shapes fit; 88 kernels are carried over in each of four ways; a
frame imagined with memory is the one imagined without; training steps run, one of them in half
precision. The memory that all this takes is compared with what `testing.plan` counts.
"""
import argparse
import json
import multiprocessing
import re
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from causal_conv import TRANSFER_METHODS
from model.device import bf16_is_emulated
from model.saving import from_dynamicrafter
from model.vid2world import PRESETS, ModelConfig
from sample import WorldModel
from testing.plan import build_model, count, sample_frame, train_step
from unet import load_dynamicrafter

KEYS = Path(__file__).parent.parent / "golden" / "dynamicrafter_512_keys.tsv"
FULL = PRESETS["512"]
CAUSAL = replace(FULL.unet, causal=True, norm_scope="frame", action_dim=13)
# Half as wide, and smaller pictures: what trains in the memory of a laptop.
HALF = replace(FULL, unet=replace(FULL.unet, model_channels=160), size=(128, 256))


def read_keys() -> dict[str, tuple[int, ...]]:
    """Name -> shape, of the original checkpoint."""
    lines = (line.partition("\t") for line in KEYS.read_text(encoding="utf-8").splitlines())
    return {name: tuple(int(n) for n in shape.split(",") if n) for name, _, shape in lines}


def random_weights(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Such that signals neither vanish nor explode: norms scale by one, the rest by fan-in."""
    if len(shape) < 2:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    fan_in = int(np.prod(shape[1:]))
    return torch.randn(shape, generator=generator) * fan_in**-0.5


def write(path: Path) -> None:
    """A .safetensors file, tensor after tensor: it is never in memory as a whole."""
    header, end = {}, 0
    for name, shape in (keys := read_keys()).items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tqdm(keys.items(), "writing", unit="tensor"):
            file.write(random_weights(name, shape, generator).half().numpy().tobytes())
    print(f"{path}: {path.stat().st_size / 1e9:.1f} GB, {len(keys)} tensors")


# --------------------------------------------------------------------------------------------------
# What is proved


class Watch:
    """The memory of this process at the most while the block runs, `.peak` in GB, beyond what it
    had before. Pages of the mapped file are not counted: the system takes them back as it likes."""

    def __enter__(self) -> "Watch":
        self.peak, self.done = 0.0, threading.Event()
        self.before = self.anonymous()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()

    def anonymous(self) -> float:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        return int(found[1]) * 1024 / 1e9

    def look(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, self.anonymous() - self.before)


def in_own_process(work: Callable, *inputs: object) -> object:
    """So that the most memory is that of this work."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, inputs)


def load_and_imagine(path: Path) -> None:
    """Load everything; one frame, with memory of the frames before and without."""
    opened: list[str] = []
    sys.addaudithook(lambda event, inputs: opened.append(event) if event == "open"
                     and str(inputs[0]) == str(path) else None)
    begun = time.perf_counter()
    with Watch() as watch:
        model = from_dynamicrafter(path, replace(FULL, unet=CAUSAL)).eval()
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 1e9
    took = time.perf_counter() - begun
    print(f"loading: {took:.0f} s, {weights:.1f} GB of weights, "
          f"{watch.peak:.1f} GB at the most; openings of the file: {len(opened)}", flush=True)
    frame = np.random.default_rng(0).integers(0, 256, (1, *FULL.size, 3), dtype=np.uint8)
    imagined = {}
    for streaming in (True, False):
        world = WorldModel(model, guidance=2.0, steps=2, streaming=streaming)
        world.reset(frame)
        begun = time.perf_counter()
        world.step(np.linspace(-1, 1, 13))
        imagined[streaming] = world.latents[:, -1]
        print(f"a frame of 2 steps, {'streaming' if streaming else 'recomputing'}: "
              f"{time.perf_counter() - begun:.0f} s", flush=True)
    difference = (imagined[True] - imagined[False]).norm() / imagined[False].norm()
    print(f"the two frames differ by {difference:.1e} of their norm")


def measure(config: ModelConfig, work: Callable) -> tuple[float, float]:
    """GB at the most, and seconds."""
    begun = time.perf_counter()
    with Watch() as watch:
        work(build_model(config))
    return watch.peak, time.perf_counter() - begun


def compare_with_plan(name: str, config: ModelConfig, work: Callable) -> None:
    _, counted = count(lambda: build_model(config), work)
    measured, seconds = in_own_process(measure, config, work)
    print(f"{name}: {counted:.2f} GB by count, {measured:.2f} GB measured ({seconds:.0f} s): "
          f"{100 * (counted / measured - 1):+.0f} %", flush=True)


def prove(path: Path) -> None:
    for method in TRANSFER_METHODS:
        load_dynamicrafter(path, CAUSAL, method)  # says how many kernels it carried over
    in_own_process(load_and_imagine, path)
    compare_with_plan("sampling, whole, float32", FULL, partial(sample_frame, given=1, half=False))
    for checkpointing in (True, False):
        words = "recomputing" if checkpointing else "keeping"
        compare_with_plan(f"a training step, half as wide, 128×256, float32, {words} activations",
                          HALF, partial(train_step, checkpointing=checkpointing, half=False))
    if bf16_is_emulated(torch.device("cpu")):
        print("a step in bfloat16 is left out: this CPU has no AVX-512")
    else:
        compare_with_plan("the same, 64×64, bfloat16, recomputing activations",
                          replace(HALF, size=(64, 64)), train_step)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prove that full size works.")
    parser.add_argument("what", choices=["write", "prove"])
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    if args.what == "prove" and not args.file.is_file():
        parser.error(f"{args.file} is not there: write it first")
    {"write": write, "prove": prove}[args.what](args.file)


if __name__ == "__main__":
    main()
