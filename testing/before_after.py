"""Two checkouts in turn, on this machine: python -m testing.before_after ../before

What a user waits for: loading a world, the first command, a frame of both pages with one thread and
with two, a training step. Each is measured in a process of its own, first in the one checkout and
then in the other, as often as --rounds says; shown are medians. With one thread they are seconds of
the processor, which other processes disturb less, and with two of the clock.
"""
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.options import argument, option, program

FRAMES = """
import json, sys, time, numpy as np, torch
from data import SAMPLES, bundled_world, open_episodes
from sample import load_world
name, threads, count = sys.argv[1], int(sys.argv[2]), 56
torch.set_num_threads(threads)
clock = time.process_time if threads == 1 else time.perf_counter
begun = clock()
world = load_world(bundled_world(name))
loaded, times = clock() - begun, []
episode = open_episodes(name, SAMPLES, "val")[0]
frames, actions = episode.read(0, episode.length)
world.reset(frames[:1])
for t in range(count):
    begun = clock()
    world.step(actions[t % len(actions)])
    times.append(clock() - begun)
print(json.dumps([loaded, np.median(times[32:])]))
"""
LEARN = """
import json, sys, time, torch
from data import SAMPLES, Clips, collate, open_episodes
from model.memory import keep_malloc_heap
from train import PostTraining, batch_loss
from training.settings import parse_arguments
from training.start import build_model
torch.set_num_threads(1)
keep_malloc_heap()
settings = parse_arguments(["--batch", "2"])
episodes = open_episodes("rt1", SAMPLES, "train")
model = build_model(settings, episodes.dataset)
loss = PostTraining(model, sys.argv[1] == "bf16").train()
clips, times = Clips(episodes, 16, (64, 80), 0), []
for step in range(3):
    batch = collate([clips[2 * step], clips[2 * step + 1]])
    begun = time.process_time()
    batch_loss(loss, model, batch, settings).backward()
    times.append(time.process_time() - begun)
print(json.dumps([sorted(times)[1]]))
"""


def run_in(folder: Path, words: list[str], threads: int = 1) -> tuple[str, float]:
    """What a command printed last, and the seconds of the processor that it took."""
    before = os.times()
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True)
    after = os.times()
    took = after.children_user + after.children_system
    took -= before.children_user + before.children_system
    return done.stdout.strip().splitlines()[-1], took


def measure(folder: Path, what: str) -> dict[str, float]:
    """Seconds, by what they are of."""
    if what == "first command":
        with tempfile.TemporaryDirectory() as out:
            return {"`python sample.py`": run_in(folder, ["sample.py", "--out", out])[1]}
    if what.startswith("step"):
        kind = what.split()[1]
        seconds, = json.loads(run_in(folder, ["-c", LEARN, kind])[0])
        return {f"a training step of 2 clips, {kind}": seconds}
    name, threads = what.split()
    loaded, frame = json.loads(run_in(folder, ["-c", FRAMES, name, threads], int(threads))[0])
    words = f"a frame of {name}, {threads} thread{'s' * (threads != '1')}"
    return ({f"load_world, {name}": loaded} if threads == "1" else {}) | {words: frame}


@dataclass
class Settings:
    before: str = argument("another checkout of this project")
    rounds: int = option(3, "in which both are measured")
    bf16: bool = option(False, "a training step in bfloat16 as well, where a CPU has units for it")


def run(settings: Settings) -> None:
    kinds = ["rt1 1", "rt1 2", "csgo 1", "csgo 2", "first command", "step float32"]
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(settings.rounds):
        for what in kinds + ["step bf16"] * settings.bf16:
            before, after = (measure(Path(folder), what) for folder in (settings.before, "."))
            for name, seconds in after.items():
                found.setdefault(name, []).append((before[name], seconds))
    print("| seconds | before | after | ratio, its range over rounds |\n| --- | --- | --- | --- |")
    for name, pairs in found.items():
        before, after = np.median(pairs, axis=0)
        ratios = [one / other for one, other in pairs]
        print(f"| {name} | {before:.3f} | {after:.3f} | {np.median(ratios):.2f} ({min(ratios):.2f} "
              f"to {max(ratios):.2f}) |")


main = program(__name__, "before_after", run, Settings, "Measure two checkouts in turn.")
