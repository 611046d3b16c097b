"""Post-training: from a passive video model to a world model.

    python train.py --data rt1                                  (the bundled episodes and base, on a
                                                                laptop)
    python train.py --data rt1 --root /data/fractal20220817_data --base dynamicrafter_512.ckpt
    torchrun --nproc_per_node=4 train.py --data rt1 …           (many GPUs, many machines)

One step, which is `PostTraining.forward` below: encode a batch of clips; give every frame a noise
level of its own; hide some of the actions; predict the velocity; compare. The U-Net and the
resampler learn, what else was pretrained stays frozen. From scratch (`--scratch`) nothing is
pretrained, so the image tower learns along, and an autoencoder is trained on the frames first.

Nothing random here depends on what happened before. Clip number i, its noise and its levels are
functions of (seed, i), and dropout of (seed, step, rank). So a run that is resumed goes on as if
never stopped, and N processes with batch B take the same steps as one process with batch N·B, but
for the masks of dropout, which differ from process to process.

A run folder holds checkpoint.pt (what learns, with the optimizer), frozen.pt (what does not,
written once), arguments.json, log.jsonl, loss.png, and strips of imagined frames.

Paper: Algorithm 1; settings in B.3 and Table 3.
"""
import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from action_guidance import align_actions, drop_actions
from causal_conv import TRANSFER_METHODS
from commands import command, option, parse
from data import (
    DATA_SETS,
    SAMPLES,
    Clips,
    Episodes,
    collate,
    default_root,
    fit_frames,
    open_episodes,
    random_frames,
    require_clips,
)
from diffusion_forcing import diffusion_forcing_loss, draw_levels
from dynamicrafter.checkpoint import read_checkpoint
from dynamicrafter.resampler import Resampler
from errors import DataError, RequestError
from model.saving import (
    TINY_BASE,
    TINY_SAMPLING,
    from_dynamicrafter,
    frozen_weights,
    load_model,
    preset_of,
    readable_path,
    save,
    trained_weights,
)
from model.vid2world import PRESETS, Model, to_pixels
from sample import WorldModel, rollout
from temporal.norm import NORM_SCOPES
from training.memory import keep_freed_memory
from training.processes import (
    across_processes,
    ignore_signals,
    join_processes,
    leave_processes,
    stop_on_signals,
)
from training.run_folder import Log, check_folder, read_settings, write_settings
from training.tiny_autoencoder import fit_autoencoder
from unet import UNet
from viewing.pictures import save_strip
from viewing.psnr import psnr


@dataclass
class Settings:
    """Of a run. The defaults are the paper's; LAPTOP has those of a small model."""
    data: str = option("rt1", "data set", choices=DATA_SETS)
    root: str | None = option(None, "its folder, or one above it; if left out, datasets/ or else "
                                    "what is bundled")
    base: str | None = option(None, "passive model to start from: DynamiCrafter's checkpoint (512 "
                                    "or 1024)")
    scratch: bool = option(False, "start from random weights; with --base, keep the parts of it "
                                  "that stay frozen")
    passive: bool = option(False, "pretrain a passive model: bidirectional, no actions, one noise "
                                  "level per clip")
    transfer: str = option("mixed", "how temporal kernels become causal", choices=TRANSFER_METHODS)
    norm_scope: str = option("frame", "frames that temporal norms see; clip is the paper's, and "
                                      "leaks the future",
                             choices=NORM_SCOPES)
    frames: int = option(16, "frames per clip")
    size: list[int] | None = option(None, "pixels; if left out, the model's", type=int, nargs=2,
                                    metavar=("H", "W"))
    out: str = option("runs/default", "run folder")
    resume: bool = option(False, "go on with the run in --out, with its settings where none are "
                                 "given")
    overwrite: bool = option(False, "start anew in a folder that holds a run")
    steps: int = option(100_000, "training steps")
    batch: int = option(8, "clips per process and forward pass")
    accumulate: int = option(1, "forward passes per step")
    lr: float = option(1e-5, "learning rate")
    warmup: int = option(100, "steps over which the learning rate rises")
    cooldown: int = option(0, "steps at the end over which it falls to zero")
    bf16: bool | None = option(None, "compute in bfloat16; if left out, where there is CUDA",
                               type=bool)
    checkpointing: bool = option(False, "recompute activations in the backward pass, to save "
                                        "memory")
    save_every: int = option(500, "steps between checkpoints")
    workers: int = option(min(8, os.cpu_count() or 1), "processes that decode frames")
    seed: int = option(0, "of everything random")
    set: list[str] | None = option(None, "other settings of the class Settings, such as "
                                         "action_dropout=0", nargs="+")
    # Settings without an option, for --set.
    preset: str = "512"
    clip_grad: float = 0.5
    action_dropout: float = 0.2  # chance that a frame's action is hidden
    image_dropout: float = 0.05  # chance that a clip's anchor image is blank
    dropout: float | None = None  # of every layer that has one; None: the network's own
    # vary colours and place of training clips; None: as the data set has it
    augment: bool | None = None
    shared_level: bool = False  # one noise level per clip: no diffusion forcing
    # chance that a frame's level is of the lowest tenth: see `draw_levels`
    clear_frames: float = 0.0
    weighting: str = "velocity"  # of the loss: see `diffusion_forcing_loss`
    autoencoder_steps: int = 1000  # without --base
    val_every: int = 500  # steps between validation losses
    val_clips: int = 16  # held-out clips in one of them
    sample_every: int = 1000  # steps between strips of imagined frames


# A small model on a laptop takes larger and fewer steps, and too few of them to see a picture in
# many lights.
LAPTOP = {"batch": 4, "lr": 1e-3, "steps": 500, "warmup": 50, "cooldown": 250, "save_every": 100,
          "val_every": 100, "val_clips": 8, "sample_every": 100, "augment": False}


# --------------------------------------------------------------------------------------------------
# One step


class PostTraining(nn.Module):
    """The loss of a batch, as one module, so that DistributedDataParallel can wrap it."""

    def __init__(self, model: Model, bf16: bool, weighting: str = "velocity"):
        super().__init__()
        self.model, self.bf16, self.weighting = model, bf16, weighting

    def forward(self, frames: Tensor, actions: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """frames uint8 [B, T, H, W, 3], actions [B, T, A] as stored, and what `draw` drew for these
        clips."""
        model = self.model
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            pixels = to_pixels(frames)  # [B, T, 3, H, W]
            with torch.no_grad():
                latents = model.encode(pixels, noise=draws["posterior"]).float()  # [B, T, C, h, w]
            anchor_image = pixels[:, 0] * draws["keep_image"].view(-1, 1, 1, 1)
            context = model.context(model.image_tokens(anchor_image), frames.shape[1])
            led_to = align_actions(actions) if model.action_dim else None

            def denoise(x: Tensor, k: Tensor) -> Tensor:
                return model.denoise(x, k, latents[:, :1], context, led_to, draws["action_mask"])

            return diffusion_forcing_loss(denoise, model.schedule, latents, draws["k"],
                                          draws["noise"],
                                          self.weighting)


def draw(model: Model, actions: Tensor, clips: Sequence[int], settings: Settings) -> dict[str,
                                                                                          Tensor]:
    """All that is random about a batch but dropout, each clip's a function of (seed, its number).

    actions [B, T, A]; returns k [B, T], noise and posterior [B, T, C, h, w], action_mask [B, T],
    keep_image [B]
    """
    def draw_clip(clip: int, actions: Tensor) -> dict[str, Tensor]:
        T = actions.shape[1]
        generator = torch.Generator().manual_seed(entropy(settings.seed, clip))
        k = draw_levels((T,), generator, settings.shared_level, settings.clear_frames)
        return {"k": k, "noise": torch.randn(T, *model.latent_shape, generator=generator),
                "posterior": torch.randn(T, *model.latent_shape, generator=generator),
                "action_mask": drop_actions(actions, settings.action_dropout, generator)[0],
                "keep_image": (torch.rand((),
                                          generator=generator) >= settings.image_dropout).float()}

    drawn = [draw_clip(clip, actions[i : i + 1]) for i, clip in enumerate(clips)]
    return {name: torch.stack([clip[name] for clip in drawn]) for name in drawn[0]}


def batch_loss(trainee: nn.Module, model: Model, batch: dict, settings: Settings) -> Tensor:
    draws = draw(model, batch["actions"], batch["index"], settings)
    draws = {name: tensor.to(model.device) for name, tensor in draws.items()}
    return trainee(batch["frames"].to(model.device), batch["actions"].to(model.device), draws)


def entropy(*numbers: int) -> int:
    """A 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# --------------------------------------------------------------------------------------------------
# What a run starts from


def open_data(settings: Settings, say) -> tuple[Clips, Episodes]:
    """Clips to train on, and held-out episodes."""
    root = settings.root or default_root(settings.data)
    episodes, held_out = (open_episodes(settings.data, root, split, settings.frames)
                          for split in ("train", "val"))
    say(f"data: {settings.data} from {readable_path(root, SAMPLES)}: {len(episodes)} episodes to "
        "train on, "
        f"{len(held_out)} held out; left out: {episodes.short + held_out.short} shorter than "
        f"{settings.frames} "
        f"frames, {episodes.damaged + held_out.damaged} damaged")
    augment = episodes.dataset.augment if settings.augment is None else settings.augment
    return Clips(episodes, settings.frames, tuple(settings.size), settings.seed, augment), held_out


def start_or_resume(settings: Settings, episodes: Episodes, rank: int, say) -> tuple[Model,
                                                                                     dict | None]:
    """The model, in which what learns requires grad, and the checkpoint that it was taken from, if
    it was."""
    out = Path(settings.out)
    say(f"base: {readable_path(settings.base, TINY_BASE) if settings.base else 'none, from scratch'}")
    if settings.resume and (out / "checkpoint.pt").exists():
        saved = read_checkpoint(out / "checkpoint.pt")
        model = load_model(out)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in saved["weights"])
        say(f"resuming {out} at step {saved['step']}")
    else:
        saved, model = None, build_model(settings)
        if rank == 0:
            write_settings(out, asdict(settings) | {"resume": False, "overwrite": False})
        if rank == 0 and not settings.base:
            pretrain_autoencoder(model, episodes, settings)
    if not settings.passive and model.action_dim != episodes.dataset.action_dim:
        raise DataError(f"{settings.data} has actions of {episodes.dataset.action_dim} numbers, "
                        "but the network in "
                        f"{out} takes {model.action_dim}")
    model.unet.checkpointing = settings.checkpointing
    for layer in model.modules():
        if isinstance(layer, nn.Dropout) and settings.dropout is not None:
            layer.p = settings.dropout
    return model, saved


def build_model(settings: Settings) -> Model:
    """From a passive model (`--base`), or random."""
    config, dataset = PRESETS[settings.preset], DATA_SETS[settings.data]
    unet = replace(config.unet, default_fps=dataset.fps)
    if not settings.passive:
        unet = replace(unet, causal=True, norm_scope=settings.norm_scope,
                       action_dim=dataset.action_dim)
    config = replace(config, unet=unet, size=tuple(settings.size), fit=dataset.fit)
    torch.manual_seed(settings.seed)
    model = from_dynamicrafter(settings.base, config,
                               settings.transfer) if settings.base else Model(config)
    if settings.base and settings.scratch:  # keep what stays frozen
        model.unet, model.resampler = UNet(config.unet), Resampler(config.resampler)
    model.sampling = TINY_SAMPLING if settings.preset == "tiny" else {}
    tower = model.image_tower
    never_used = (tower.ln_post, tower.proj)  # by which the tower would reach CLIP's space
    for part in (model.autoencoder, *((tower,) if settings.base else never_used)):
        part.requires_grad_(False)
    return model


def pretrain_autoencoder(model: Model, episodes: Episodes, settings: Settings) -> None:
    """Give a random model an autoencoder of the frames it will see."""
    frames = random_frames(episodes, tuple(settings.size), settings.seed,
                           settings.autoencoder_steps,
                           settings.workers)
    batches = (to_pixels(batch[None].to(model.device))[0] for batch in frames)
    model.autoencoder.requires_grad_(True)
    fit_autoencoder(model.autoencoder, batches, settings.autoencoder_steps,
                    settings.bf16).requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# The loop


def train(settings: Settings) -> int:
    """Train until settings.steps or until a signal; returns the exit code."""
    keep_freed_memory()
    rank, processes, device = join_processes()
    say = print if rank == 0 else lambda *words: None
    if rank == 0:
        check_folder(Path(settings.out), settings.resume, settings.overwrite)
    clips, held_out = open_data(settings, say)
    model, saved = start_or_resume(settings, clips.episodes, rank, say)
    model.to(device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, fused=True)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    trainee = PostTraining(model, settings.bf16, settings.weighting)
    # which also hands the weights of the first process, its autoencoder included, to the others
    if processes > 1:
        trainee = DistributedDataParallel(trainee, device_ids=[device.index]
                                          if device.type == "cuda" else None)
    start = saved["step"] if saved else 0
    recorder = Recorder(settings, model, optimizer, held_out, start) if rank == 0 else None
    say(f"{describe_size(model)}; {processes} process{'es' if processes > 1 else ''} on "
        f"{device.type}")

    stop = stop_on_signals()
    batches = load_batches(clips, settings, start, rank, processes)
    for step in tqdm(range(start, settings.steps), initial=start, total=settings.steps, unit="step",
                     disable=rank > 0):
        torch.manual_seed(entropy(settings.seed, step, rank))  # for dropout
        optimizer.param_groups[0]["lr"] = learning_rate(step, settings)
        step_loss, damaged = 0.0, []
        for micro in range(settings.accumulate):
            batch = require_clips(next(batches))
            # Processes add up their gradients in the last backward pass of a step, not before.
            waiting = processes > 1 and micro < settings.accumulate - 1
            with trainee.no_sync() if waiting else nullcontext():
                loss = batch_loss(trainee, model, batch, settings) / settings.accumulate
                loss.backward()
            step_loss, damaged = step_loss + loss.item(), damaged + batch["damaged"]
        nn.utils.clip_grad_norm_(parameters, settings.clip_grad)
        optimizer.step()
        optimizer.zero_grad()  # frees the gradients before the next forward pass needs memory
        step_loss, stopping = across_processes(step_loss, bool(stop), device)
        if recorder:
            recorder.record(step + 1, step_loss, damaged, last=stopping
                            or step + 1 == settings.steps)
        if stopping:
            break
    leave_processes()
    if recorder:
        recorder.finish(stopped=bool(stop))
    return 128 + stop[0] if stop else 0


def learning_rate(step: int, settings: Settings) -> float:
    """Rises linearly over the warmup, falls linearly to zero over the cooldown."""
    rise = (step + 1) / max(settings.warmup, 1)
    fall = (settings.steps - step) / max(settings.cooldown, 1)
    return settings.lr * min(1, rise, fall)


def load_batches(clips: Clips, settings: Settings, start: int, rank: int,
                 processes: int) -> Iterator[dict]:
    """The batches of this process. A step takes the next processes · accumulate · batch clips."""
    def clip_numbers() -> Iterator[list[int]]:
        for forward_pass in range(start * settings.accumulate,
                                  settings.steps * settings.accumulate):
            first = (forward_pass * processes + rank) * settings.batch
            yield list(range(first, first + settings.batch))

    return iter(DataLoader(clips, batch_sampler=clip_numbers(), collate_fn=collate,
                           num_workers=settings.workers,
                           worker_init_fn=ignore_signals, pin_memory=torch.cuda.is_available()))


def describe_size(model: Model) -> str:
    learning, frozen = (sum(p.numel() for p in model.parameters()
                            if p.requires_grad is learns) / 1e6
                        for learns in (True, False))
    return f"{learning:.1f} M parameters learn, {frozen:.1f} M are frozen"


class Recorder:
    """What the first process does beside the steps: log, validation, checkpoints, strips of
    imagined frames."""

    def __init__(self, settings: Settings, model: Model, optimizer: torch.optim.Optimizer,
                 held_out: Episodes,
                 start: int):
        self.settings, self.model, self.optimizer, self.held_out = settings, model, optimizer, held_out
        self.out, self.start, self.began = Path(settings.out), start, time.monotonic()
        self.damaged: set[str] = set()
        if not (self.out / "checkpoint.pt").exists():
            save(self.out / "frozen.pt", {"weights": frozen_weights(model)})
            self.save_checkpoint(0)
            self.save_strip(0)
        self.log = Log(self.out, start)

    def record(self, step: int, loss: float, damaged: list[str], last: bool) -> None:
        settings = self.settings
        for message in sorted(set(damaged) - self.damaged):
            tqdm.write(f"skipped: {message}")
        self.damaged |= set(damaged)
        validating, saving, sampling = (last or step % every == 0 for every in (
            settings.val_every, settings.save_every, settings.sample_every))
        self.log.write(step, loss, validate(self.model, self.held_out, settings) if validating
                       else None)
        if saving:
            self.save_checkpoint(step)
            self.log.plot()
        if sampling:
            self.save_strip(step)
        if step == self.start + 1:
            self.began = time.monotonic()  # the first step is slower than the others
        if step == self.start + 11:
            self.announce_end(step, (time.monotonic() - self.began) / 10)

    def announce_end(self, step: int, seconds: float) -> None:
        left = (self.settings.steps - step) * seconds / 60
        if left > 1:
            tqdm.write(f"{seconds:.2f} s a step: about {left:.0f} minutes to go, strips not "
                       "counted; --steps "
                       f"{self.settings.steps // 4} takes a quarter of the time (Ctrl-C saves, "
                       "--resume goes on)")

    def save_checkpoint(self, step: int) -> None:
        settings, model = self.settings, self.model
        root = settings.root and str(Path(settings.root).resolve())
        save(self.out / "checkpoint.pt", {
            "config": asdict(model.config), "sampling": model.sampling,
            "weights": trained_weights(model),
            "frozen": "frozen.pt", "data": {"name": settings.data, "root": root},
            "optimizer": self.optimizer.state_dict(), "step": step})

    def save_strip(self, step: int) -> None:
        """Roll out the start of a held-out episode, and put the frames under the true ones."""
        if self.settings.passive:
            return
        episode = self.held_out[0]
        try:
            frames, actions = episode.read(0, self.settings.frames)
        except DataError as error:  # one damaged episode does not end a run
            return tqdm.write(f"no strip: {error}")
        imagined = rollout(WorldModel(self.model), frames, actions[:-1])
        self.model.train()
        truth = fit_frames(frames, *self.settings.size, self.model.config.fit)
        path = self.out / f"step_{step:07d}.png"
        save_strip(path,
                   {f"truth: {episode.name}": truth, f"imagined after {step} steps": imagined})
        tqdm.write(f"step {step}: rollout at {psnr(imagined, truth)[1:].mean():.2f} dB, {path}")

    def finish(self, stopped: bool) -> None:
        summary = ", ".join(f"{name} {value}" for name,
                            value in self.log.summary().items()) if self.log.rows else ""
        print(f"{'stopped' if stopped else 'done'} at step {len(self.log.rows)}: {summary}, "
              f"{len(self.damaged)} "
              "damaged episodes skipped")
        if stopped:
            print(f"go on:  python train.py --resume --out {self.out}")
        elif not self.settings.passive:
            print(f"see it: python sample.py --checkpoint {self.out} --guidance 2.0")


@torch.no_grad()
def validate(model: Model, held_out: Episodes, settings: Settings) -> float:
    """Mean loss of the velocity on held-out clips: always the same clips, noise and levels, nothing
    dropped.

    A world model is measured with a level per frame, whatever it trains with.
    """
    fixed = replace(settings, action_dropout=0, image_dropout=0, clear_frames=0,
                    shared_level=settings.passive)
    model.eval()
    clips = Clips(held_out, settings.frames, tuple(settings.size), settings.seed)
    losses = []
    for first in range(0, settings.val_clips, settings.batch):
        numbers = range(first, min(first + settings.batch, settings.val_clips))
        batch = require_clips(collate([clips[i] for i in numbers]))
        loss = batch_loss(PostTraining(model, settings.bf16), model, batch, fixed).item()
        losses += [loss] * len(numbers)
    model.train()
    return sum(losses) / len(losses)


# --------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv: Sequence[str] | None = None) -> Settings:
    """Settings from the command line, on top of those of the run to resume, or of the kind of
    model."""
    peek = argparse.ArgumentParser(add_help=False)
    for flag in ("--resume", "--scratch", "--passive"):
        peek.add_argument(flag, action="store_true")
    peek.add_argument("--base")
    peek.add_argument("--out", default="runs/default")
    known, _ = peek.parse_known_args(argv)
    if known.resume:
        names = {each.name for each in fields(Settings)} - {"resume", "overwrite", "set"}
        defaults = {name: value for name, value in read_settings(Path(known.out)).items()
                    if name in names}
    else:
        bundled = None if known.scratch or known.passive else str(TINY_BASE)
        base = known.base or bundled
        preset = preset_of(base) if base else "tiny"
        defaults = {"base": base, "preset": preset} | (LAPTOP if preset == "tiny" else {})
    return parse(Settings, "Post-train a world model on robot episodes.", argv, complete,
                 **defaults)


def complete(settings: Settings) -> None:
    """Apply --set, fill in what is left out, and raise RequestError for what cannot be."""
    for assignment in settings.set or []:
        name, _, value = assignment.partition("=")
        default = next((each.default for each in fields(Settings) if each.name == name
                        and not each.metadata), ...)
        if default is ...:
            known = ", ".join(each.name for each in fields(Settings) if not each.metadata)
            raise RequestError(f"--set knows no {name!r}; it knows {known}")
        setattr(settings, name, convert(name, value, default))
    if settings.preset not in PRESETS:
        raise RequestError(f"preset is {settings.preset!r}; it must be one of {', '.join(PRESETS)}")
    if not settings.base and settings.preset != "tiny":
        raise RequestError(f"preset {settings.preset} starts from DynamiCrafter's checkpoint: "
                           "name it with --base")
    preset = PRESETS[settings.preset]
    if not settings.size:
        height, width = DATA_SETS[settings.data].aspect
        settings.size = [64,
                         64 * width // height] if settings.preset == "tiny" else list(preset.size)
    settings.bf16 = torch.cuda.is_available() if settings.bf16 is None else settings.bf16
    settings.shared_level = settings.shared_level or settings.passive
    for name in ("steps", "batch", "accumulate", "autoencoder_steps", "save_every", "val_every",
                 "val_clips",
                 "sample_every"):
        if getattr(settings, name) < 1:
            raise RequestError(f"{name} is {getattr(settings, name)}; it must be at least 1")
    if settings.workers < 0:
        raise RequestError(f"workers is {settings.workers}; it must be at least 0")
    multiple = preset.autoencoder.factor * 2 ** (len(preset.unet.channel_mult) - 1)
    if any(side < 1 or side % multiple for side in settings.size):
        raise RequestError(f"size is {settings.size}; height and width must be multiples of "
                           f"{multiple}")
    if not 2 <= settings.frames <= preset.unet.num_frames:
        raise RequestError(f"frames is {settings.frames}; it must be between 2 and "
                           f"{preset.unet.num_frames}")


def convert(name: str, value: str, default: object) -> object:
    """The value of a setting from its text, of the kind that its default has."""
    if isinstance(default, str):
        return value
    try:
        number = json.loads(value.lower())
    except ValueError:
        number = None
    kinds = (int,) if type(default) is int else (int, float, bool)
    if type(number) not in kinds:
        raise RequestError(f"{name} is {value!r}; expected a "
                           f"{'whole number' if kinds == (int,) else 'number'}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    return command("train.py", lambda: train(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
