"""Train DIAMOND (baselines/diamond.py) for so many minutes, or roll it out."""
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from baselines.diamond import PAST, STEPS, Diamond, DiamondConfig, DiamondWorld, loss_of
from data import (DATA_SETS, Clips, Episodes, collate, default_root, fit_frames, open_episodes,
                  require_clips)
from dynamicrafter.checkpoint import load_weights, read_checkpoint
from model.saving import save
from model.vid2world import to_pixels
from support.errors import CheckpointError, RequestError, reading, require_finite
from support.options import argument, option, program
from support.pictures import psnr, save_strip
from support.schema import conform


@dataclass
class Settings:
    what: str = argument("train, or sample", choices=["train", "sample"])
    data: str = option("csgo", "data set", choices=DATA_SETS)
    root: str | None = option(None, "its folder")
    out: str = option("runs/diamond", "run folder")
    minutes: float = option(60.0, "of training", least=0.01)
    batch: int = option(16, "clips a step")
    lr: float = option(3e-4, "learning rate, which falls to zero in the last third of the time",
                       least=1e-12, most=1000)
    bf16: bool = option(False, "compute in bfloat16")
    ahead: int = option(2, "frames of a clip that are predicted one from another")
    workers: int = option(1, "processes that decode frames", least=0)
    seed: int = option(0, "of everything random", least=0)
    checkpoint: str = option("runs/diamond/checkpoint.pt", "to sample from")
    sampling: str = option("hq", "steps a frame: fast 1, hq 3", choices=STEPS)
    episode: int = option(0, "which held-out episode", least=0)
    frames: int = option(16, "of it", least=PAST + 1)


def train(settings: Settings) -> None:
    """For so many minutes, saved every five."""
    root = settings.root or default_root(settings.data)
    episodes = open_episodes(settings.data, root, "train", PAST + settings.ahead)
    height, width = episodes.dataset.aspect
    config = DiamondConfig(episodes.dataset.action_dim, (64, 8 * round(8 * width / height)))
    torch.manual_seed(settings.seed)
    network = Diamond(config)
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters, "
          f"{len(episodes)} episodes")
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=1e-2, fused=True)
    clips = Clips(episodes, PAST + settings.ahead, config.size, settings.seed)
    numbers = (list(range(first, first + settings.batch))
               for first in range(0, 10**9, settings.batch))
    batches = DataLoader(clips, batch_sampler=numbers, collate_fn=collate,
                         num_workers=settings.workers)
    out, began, minutes, saved, losses = Path(settings.out), time.monotonic(), 0.0, 0.0, []
    out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(batches, "training", unit="step")
    for step, batch in enumerate(map(require_clips, bar)):
        for group in optimizer.param_groups:
            left = 3 * (1 - minutes / settings.minutes)
            group["lr"] = settings.lr * max(0, min(1, (step + 1) / 100, left))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            loss = loss_of(network, to_pixels(batch["frames"]), batch["actions"])
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        require_finite(f"step {step + 1}: the loss", loss.item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {np.mean(losses[-100:]):.4f}")
        minutes = (time.monotonic() - began) / 60
        if minutes >= settings.minutes or minutes > saved + 5:
            saved = minutes
            save(out / "checkpoint.pt", {"diamond": asdict(config), "step": step + 1,
                                         "weights": network.state_dict()})
        if minutes >= settings.minutes:
            break
    print(f"{len(losses)} steps in {minutes:.0f} minutes, loss {np.mean(losses[-100:]):.4f}: "
          f"{out / 'checkpoint.pt'}")


def load_diamond(path: str | Path) -> Diamond:
    """A network that `train` saved. Raises CheckpointError."""
    content = read_checkpoint(path)
    if "diamond" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of baselines/train_diamond.py")
    with reading(path, CheckpointError):
        network = Diamond(conform(DiamondConfig, content["diamond"], "diamond"))
        return load_weights(network, content["weights"], str(path))


def rollout_diamond(network: Diamond, episodes: Episodes, chosen: Sequence[int], length: int,
            steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Episodes side by side: imagined and true frames, uint8 [B, length, H, W, 3] each; the first
    four are given."""
    clips, actions = zip(*(episodes[i].read(0, length) for i in chosen), strict=True)
    truth = np.stack([fit_frames(clip, *network.config.size, episodes.dataset.fit)
                      for clip in clips])
    taken, world = np.stack(actions), DiamondWorld(network, steps, seed)
    world.reset(truth[:, :PAST], taken[:, : PAST - 1])
    new = [world.step(taken[:, t]) for t in range(PAST - 1, length - 1)]
    return np.concatenate([truth[:, :PAST], np.stack(new, axis=1)], axis=1), truth


def sample(settings: Settings) -> None:
    network = load_diamond(settings.checkpoint)
    episodes = open_episodes(settings.data, settings.root, "val", settings.frames)
    if episodes.dataset.action_dim != network.config.action_dim:
        raise RequestError(f"{settings.data} has actions of {episodes.dataset.action_dim} numbers, "
                           f"but this network takes {network.config.action_dim}")
    imagined, truth = rollout_diamond(network, episodes, [settings.episode], settings.frames,
                              STEPS[settings.sampling], settings.seed)
    ours = psnr(imagined[0, PAST:], truth[0, PAST:]).mean()
    repeating = psnr(truth[0, PAST - 1 : PAST], truth[0, PAST:]).mean()
    path = Path(settings.out) / f"{settings.data}_val{settings.episode}_{settings.sampling}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_strip(path, {"truth": truth[0], f"DIAMOND, {settings.sampling}": imagined[0]})
    print(f"{settings.frames - PAST} frames at {ours:.2f} dB (repeating: {repeating:.2f}), {path}")


def run(settings: Settings) -> None:
    {"train": train, "sample": sample}[settings.what](settings)


main = program(__name__, "train_diamond", run, Settings, "Train DIAMOND, or roll it out.")
