"""Train DIAMOND (baselines/diamond.py) for so many minutes; evaluation/game.py rolls it out.

As its authors trained it on CS:GO, but for a desk: hours and not twelve days of a GPU, so the
learning rate is three times theirs and falls to zero, and batches are an eighth of theirs.
"""
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from baselines.diamond import PAST, Diamond, DiamondConfig, loss_of
from data import DATA_SETS, Clips, collate, default_root, open_episodes, require_clips
from dynamicrafter.checkpoint import load_weights, read_checkpoint
from model.memory import keep_malloc_heap
from model.saving import save
from model.vid2world import to_pixels
from support.errors import CheckpointError, reading, require_finite
from support.options import option, program
from support.schema import conform


@dataclass
class Settings:
    data: str = option("csgo", "data set", choices=DATA_SETS)
    root: str | None = option(None, "its folder")
    out: str = option("runs/diamond", "run folder")
    minutes: float = option(60.0, "of training", least=0.01)
    batch: int = option(16, "clips a step")
    lr: float = option(3e-4, "learning rate, which falls to zero in the last third of the time",
                       least=1e-12, most=1000)
    bf16: bool = option(False, "compute in bfloat16")
    ahead: int = option(5, "frames of a clip that are predicted one from another")
    workers: int = option(1, "processes that decode frames", least=0)
    seed: int = option(0, "of everything random", least=0)
    resume: bool = option(False, "resume the run in --out, whose minutes count")


def train(settings: Settings) -> None:
    """For so many minutes, saved every five. Raises CheckpointError, DataError."""
    keep_malloc_heap()
    root = settings.root or default_root(settings.data)
    episodes = open_episodes(settings.data, root, "train", PAST + settings.ahead)
    height, width = episodes.dataset.aspect
    config = DiamondConfig(episodes.dataset.action_dim, (64, 8 * round(8 * width / height)))
    torch.manual_seed(settings.seed)
    network, path = Diamond(config), Path(settings.out) / "checkpoint.pt"
    known = read_checkpoint(path) if settings.resume else {"step": 0, "minutes": 0.0}
    with reading(path, CheckpointError):
        start, minutes = known["step"], known["minutes"]
    if settings.resume:  # before the optimizer is made, for this replaces the parameters
        load_weights(network, known["weights"], str(path))
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters, "
          f"{len(episodes)} episodes")
    kernels, others = [], []
    for p in network.parameters():
        (others if p.ndim == 1 or p is network.action else kernels).append(p)
    groups = [{"params": kernels, "weight_decay": 1e-2}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, settings.lr, fused=True)
    if settings.resume:
        optimizer.load_state_dict(known["optimizer"])
    clips = Clips(episodes, PAST + settings.ahead, config.size, settings.seed)
    numbers = (list(range(first, first + settings.batch))
               for first in range(start * settings.batch, 10**9, settings.batch))
    batches = DataLoader(clips, batch_sampler=numbers, collate_fn=collate,
                         num_workers=settings.workers)
    began, saved, losses = time.monotonic() - 60 * minutes, minutes, []
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(batches, "training", initial=start, unit="step")
    for step, batch in enumerate(map(require_clips, bar), start):
        for group in optimizer.param_groups:
            left = 3 * (1 - minutes / settings.minutes)
            group["lr"] = settings.lr * max(0, min(1, (step + 1) / 100, left))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            loss = loss_of(network, to_pixels(batch["frames"]), batch["actions"])
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        require_finite(f"step {step + 1}: the loss", loss.item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {np.mean(losses[-100:]):.4f}")
        minutes = (time.monotonic() - began) / 60
        if minutes >= settings.minutes or minutes > saved + 5:
            saved = minutes
            save(path, {"diamond": asdict(config), "step": step + 1, "minutes": minutes,
                        "weights": network.state_dict(), "optimizer": optimizer.state_dict()})
        if minutes >= settings.minutes:
            break
    print(f"{step + 1} steps in {minutes:.0f} minutes, loss {np.mean(losses[-100:]):.4f}: {path}")


def load_diamond(path: str | Path) -> Diamond:
    """A network that `train` saved. Raises CheckpointError."""
    content = read_checkpoint(path)
    if "diamond" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of baselines/train_diamond.py")
    with reading(path, CheckpointError):
        network = Diamond(conform(DiamondConfig, content["diamond"], "diamond"))
        return load_weights(network, content["weights"], str(path))


main = program(__name__, "train_diamond", train, Settings, "Train DIAMOND.")
