"""Post-training: from a passive video model to a world model.

    python train.py --data rt1                                  (the bundled episodes and base, on a laptop)
    python train.py --data rt1 --root /data/fractal20220817_data --base dynamicrafter_512.ckpt
    torchrun --nproc_per_node=4 train.py --data rt1 …           (many GPUs, many machines)

One step, which is `PostTraining.forward` below: encode a batch of clips; give every frame a noise level of its
own; hide some of the actions; predict the velocity; compare. The U-Net and the resampler learn, what else
was pretrained stays frozen. From scratch (`--scratch`) nothing is pretrained, so the image tower learns
along and an autoencoder is trained on the frames first.

Nothing random here depends on what happened before. Clip number i, its noise and its levels are functions of
(seed, i), and dropout of (seed, step). So a run that is resumed goes on as if never stopped, and
N processes with batch B take the same steps as one process with batch N·B.

A run folder holds checkpoint.pt (what learns, with the optimizer), frozen.pt (what does not, written once), arguments.json,
log.jsonl, loss.png, and strips of imagined frames. Paper: section 5 and appendix (training details).
"""
import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from action_guidance import align_actions, drop_actions
from causal_conv import TRANSFER_METHODS
from data import DATA_SETS, SAMPLES, Clips, DataError, DataSet, Episodes, collate, default_root, fit_frames, intact, \
    open_episodes, random_frames
from diffusion_forcing import LEVELS, diffusion_forcing_loss
from dynamicrafter.autoencoder import fit_autoencoder
from dynamicrafter.model import PRESETS, TINY_BASE, Model, from_dynamicrafter, frozen_weights, keep_freed_memory, load_model, \
    named, preset_of, save, to_pixels, trained_weights
from dynamicrafter.resampler import Resampler
from evaluation.metrics import psnr
from evaluation.pictures import save_strip
from sample import RequestError, WorldModel, rollout
from tools.processes import across_processes, ignore_interrupt, join_processes, stop_on_signals
from tools.run_folder import Log, check_folder
from unet import CheckpointError, UNet, read_checkpoint


# The defaults of the command are the paper's. A small model on a laptop takes larger and fewer steps.
LAPTOP = {"batch": 4, "lr": 1e-3, "steps": 500, "warmup": 50, "cooldown": 250, "save_every": 100, "val_every": 100, "val_clips": 8,
          "sample_every": 100, "sample_steps": 10}


# ---------------------------------------------------------------------------------------------------------
# One step


class PostTraining(nn.Module):
    """The loss of a batch, as one module, so that DistributedDataParallel can wrap it."""

    def __init__(self, model: Model, bf16: bool, measure: str = "velocity"):
        super().__init__()
        self.model, self.bf16, self.measure = model, bf16, measure

    def forward(self, frames: Tensor, actions: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """frames uint8 [B, T, H, W, 3], actions [B, T, A] as stored, and what `draw` drew for these clips."""
        model = self.model
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                latents = model.encode(to_pixels(frames), noise=draws["posterior"]).float()  # [B, T, C, h, w]
            anchor_image = to_pixels(frames[:, :1])[:, 0] * draws["keep_image"].view(-1, 1, 1, 1)
            context = model.context(model.image_tokens(anchor_image), frames.shape[1])

            led_to = align_actions(actions) if model.config.unet.action_dim else None

            def denoise(x: Tensor, k: Tensor) -> Tensor:
                return model.denoise(x, k, latents[:, :1], context, led_to, draws["action_mask"])

            return diffusion_forcing_loss(denoise, model.schedule, latents, draws["k"], draws["noise"], self.measure)


def draw(model: Model, actions: Tensor, clips: list[int], seed: int, action_dropout: float, image_dropout: float,
         shared_level: bool = False, clear_frames: float = 0.0) -> dict[str, Tensor]:
    """All that is random about a batch but dropout, each clip's a function of (seed, its number).

    A rollout's history is clear, and levels drawn uniformly rarely are: both frames before are below level 100 once in a
    hundred times. `clear_frames` is the chance of a frame to be drawn from the lowest tenth of the levels in place of all.
    """
    def draw_clip(clip: int, actions: Tensor) -> dict[str, Tensor]:
        T = actions.shape[1]
        generator = torch.Generator().manual_seed(entropy(seed, clip))
        k = torch.randint(LEVELS, (T,), generator=generator)  # a noise level for every frame
        return {"noise": torch.randn(T, *model.latent_shape, generator=generator),
                "posterior": torch.randn(T, *model.latent_shape, generator=generator),
                "action_mask": drop_actions(actions, action_dropout, generator)[0],
                "keep_image": (torch.rand((), generator=generator) >= image_dropout).float(),
                "k": k[:1].expand(T) if shared_level else
                torch.where(torch.rand(T, generator=generator) < clear_frames, k // 10, k)}

    drawn = [draw_clip(clip, actions[i : i + 1]) for i, clip in enumerate(clips)]
    return {name: torch.stack([clip[name] for clip in drawn]) for name in drawn[0]}


def entropy(*numbers: int) -> int:
    """A 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# ---------------------------------------------------------------------------------------------------------
# The model to start from


def build_model(args: argparse.Namespace, dataset: DataSet) -> Model:
    """From a passive model (`--base`), or random. What learns requires grad."""
    config = PRESETS[args.preset]
    unet = replace(config.unet, causal=True, norm_scope=args.norm_scope, action_dim=dataset.action_dim)
    if args.passive:
        unet = replace(config.unet, causal=False, norm_scope="clip", action_dim=None)
    config = replace(config, unet=unet, size=tuple(args.size), fps=dataset.fps)
    torch.manual_seed(args.seed)
    model = from_dynamicrafter(args.base, config, args.transfer) if args.base else Model(config)
    if args.base and args.scratch:  # keep what stays frozen
        model.unet, model.resampler = UNet(config.unet), Resampler(config.resampler)
    model.autoencoder.requires_grad_(False)
    tower = model.image_tower
    never_used = (tower.ln_post, tower.proj)  # by which the tower would reach CLIP's space
    for part in (tower,) if args.base else never_used:
        part.requires_grad_(False)
    return model


def pretrain_autoencoder(model: Model, episodes: Episodes, args: argparse.Namespace) -> None:
    """Give a random model an autoencoder of the frames it will see."""
    frames = random_frames(episodes, tuple(args.size), args.seed, args.autoencoder_steps, args.workers)
    batches = (to_pixels(batch[None].to(model.device))[0] for batch in frames)
    model.autoencoder.requires_grad_(True)
    fit_autoencoder(model.autoencoder, batches, args.autoencoder_steps, args.bf16).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------
# The loop


def train(args: argparse.Namespace) -> int:
    """Train until args.steps or until a signal; returns the exit code."""
    keep_freed_memory()
    rank, world, device = join_processes()
    say = print if rank == 0 else lambda *words: None
    dataset, out = DATA_SETS[args.data], Path(args.out)
    if rank == 0:
        check_folder(args)
    root = args.root or default_root(args.data)
    episodes = open_episodes(args.data, root, "train", min_length=args.frames)
    held_out = open_episodes(args.data, root, "val", min_length=args.frames)
    clips = Clips(episodes, args.frames, tuple(args.size), args.seed)
    say(f"data: {args.data} from {named(root, SAMPLES)}: {len(episodes)} episodes to train on, {len(held_out)} held out; left "
        f"out: {episodes.short + held_out.short} shorter than {args.frames} frames, {episodes.damaged + held_out.damaged} damaged")
    say(f"base: {named(args.base, TINY_BASE) if args.base else 'none, from scratch'}")

    # Start, or take up the run where it was left.
    if args.resume and (out / "checkpoint.pt").exists():
        saved = read_checkpoint(out / "checkpoint.pt")
        start = saved["step"]
        model = load_model(out).to(device)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in saved["weights"])
        say(f"resuming {out} at step {start}")
    else:
        saved, start = None, 0
        model = build_model(args, dataset).to(device)
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            (out / "arguments.json").write_text(json.dumps(vars(args), indent=1))
        if not args.base:
            if rank == 0:
                pretrain_autoencoder(model, episodes, args)
    if not args.passive and model.config.unet.action_dim != dataset.action_dim:
        raise DataError(f"{args.data} has actions of {dataset.action_dim} numbers, but the network in {out} takes "
                        f"{model.config.unet.action_dim}")

    model.unet.checkpointing = args.checkpointing
    for layer in model.modules():
        if isinstance(layer, nn.Dropout) and args.dropout is not None:
            layer.p = args.dropout
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    say(f"{sum(p.numel() for p in parameters) / 1e6:.1f} M parameters learn, {sum(p.numel() for p in frozen) / 1e6:.1f} M "
        f"are frozen; {world} process{'es' if world > 1 else ''} on {device.type}")
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, fused=True)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    trainee = PostTraining(model, args.bf16, args.measure)
    if world > 1:  # which also hands the weights of the first process, its autoencoder included, to the others
        trainee = DistributedDataParallel(trainee, device_ids=[device.index] if device.type == "cuda" else None)

    def checkpoint(step: int) -> None:
        save(out / "checkpoint.pt", {
            "config": asdict(model.config), "weights": trained_weights(model), "frozen": "frozen.pt",
            "data": {"name": args.data, "root": args.root and str(Path(args.root).resolve())}, "optimizer": optimizer.state_dict(), "step": step})

    if rank == 0 and not saved:
        save(out / "frozen.pt", {"weights": frozen_weights(model)})
        checkpoint(0)
        if not args.passive:
            draw_strip(model, held_out, args, step=0)
    log = Log(out, start) if rank == 0 else None
    damaged: set[str] = set()
    stop = stop_on_signals()
    batches = iter(DataLoader(clips, batch_sampler=clip_order(args, start, rank, world), collate_fn=collate,
                              num_workers=args.workers, worker_init_fn=ignore_interrupt, pin_memory=device.type == "cuda"))
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step", disable=rank > 0)
    model.train()
    for step in bar:
        torch.manual_seed(entropy(args.seed, step, rank))  # for dropout
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / max(args.warmup, 1), (args.steps - step) / max(args.cooldown, 1))

        step_loss = 0.0
        for micro in range(args.accumulate):
            batch = intact(next(batches))
            for message in sorted(set(batch["damaged"]) - damaged):
                tqdm.write(f"skipped: {message}")
                damaged.add(message)
            accumulating = world > 1 and micro < args.accumulate - 1
            with trainee.no_sync() if accumulating else nullcontext():
                loss = batch_loss(trainee, model, batch, args.seed, args.action_dropout, args.image_dropout, args.shared_level,
                                  args.clear_frames)
                (loss / args.accumulate).backward()
            step_loss += loss.item() / args.accumulate
        nn.utils.clip_grad_norm_(parameters, args.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

        step_loss, stopping = across_processes(step_loss, bool(stop), device)
        step, ending = step + 1, stopping or step + 1 == args.steps
        if rank == 0:
            due = [ending or step % every == 0 for every in (args.val_every, args.save_every, args.sample_every)]
            log.write(step, step_loss, validate(model, held_out, args) if due[0] else None)
            bar.set_postfix(log.summary() | ({"skipped": len(damaged)} if damaged else {}))
            if due[1]:
                checkpoint(step)
                log.draw()
            if due[2] and not args.passive:
                draw_strip(model, held_out, args, step)
        if stopping:
            break
    bar.close()
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        summary = ", ".join(f"{name} {value}" for name, value in log.summary().items())
        print(f"{'stopped' if stop else 'done'} at step {len(log.rows)}: {summary}, {len(damaged)} damaged episodes skipped")
        if stop:
            print(f"go on:  python train.py --resume --out {out}")
        elif not args.passive:
            print(f"see it: python sample.py --checkpoint {out} --guidance 2.0")
    return 128 + stop[0] if stop else 0


def clip_order(args: argparse.Namespace, start: int, rank: int, world: int) -> Iterator[list[int]]:
    """The numbers of the clips of each batch of this process. A step takes the next world · accumulate · batch."""
    for step in range(start, args.steps):
        for micro in range(args.accumulate):
            first = ((step * args.accumulate + micro) * world + rank) * args.batch
            yield list(range(first, first + args.batch))


def batch_loss(trainee: nn.Module, model: Model, batch: dict, seed: int, action_dropout: float,
               image_dropout: float, shared_level: bool, clear_frames: float = 0.0) -> Tensor:
    draws = draw(model, batch["actions"], batch["index"], seed, action_dropout, image_dropout, shared_level, clear_frames)
    draws = {name: tensor.to(model.device) for name, tensor in draws.items()}
    return trainee(batch["frames"].to(model.device), batch["actions"].to(model.device), draws)


@torch.no_grad()
def validate(model: Model, held_out: Episodes, args: argparse.Namespace) -> float:
    """Mean loss of the velocity on held-out clips: always the same clips, noise and levels (of a world model, a level per frame), nothing dropped."""
    model.eval()
    clips = Clips(held_out, args.frames, tuple(args.size), args.seed)
    losses = []
    for first in range(0, args.val_clips, args.batch):
        batch = intact(collate([clips[i] for i in range(first, min(first + args.batch, args.val_clips))]))
        losses += [batch_loss(PostTraining(model, args.bf16), model, batch, args.seed, 0, 0, args.passive).item()] * len(batch["index"])
    model.train()
    return sum(losses) / len(losses)


def draw_strip(model: Model, held_out: Episodes, args: argparse.Namespace, step: int) -> None:
    """Roll out the start of a held-out episode, and put the frames under the true ones."""
    episode = held_out[0]
    try:
        frames, actions = episode.read(0, args.frames)
    except DataError as error:  # one damaged episode does not end a run
        return tqdm.write(f"no strip: {error}")
    imagined = rollout(WorldModel(model, steps=args.sample_steps, history_level=39), frames, actions[:-1])
    model.train()
    truth = fit_frames(frames, *args.size)
    path = Path(args.out) / f"step_{step:07d}.png"
    save_strip(path, {f"truth: {episode.name}": truth, f"imagined after {step} steps": imagined})
    tqdm.write(f"step {step}: rollout at {psnr(imagined, truth)[1:].mean():.2f} dB, {path}")


# ---------------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Post-train a world model on robot episodes.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", choices=DATA_SETS, default="rt1")
    add("--root", help="the data set's folder, or one above it; if left out, datasets/ or else the bundled episodes")
    add("--base", help="passive model to start from: DynamiCrafter's checkpoint (512 or 1024); if left out, the bundled small one")
    add("--scratch", action="store_true", help="start from random weights instead; with --base, keep the parts of it that stay frozen")
    add("--preset", choices=PRESETS, help="size of the model; if left out, the base's")
    add("--transfer", choices=TRANSFER_METHODS, default="mixed", help="how temporal kernels become causal")
    add("--norm-scope", choices=["frame", "past", "clip"], default="frame",
        help="frames that temporal norms see; clip is the paper's, and leaks the future")
    add("--frames", type=int, default=16, help="frames per clip")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels; if left out, the preset's")
    add("--out", default="runs/default", help="run folder")
    add("--resume", action="store_true", help="go on with the run in --out, with its arguments where none are given")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    add("--steps", type=int, default=100_000)
    add("--batch", type=int, default=8, help="clips per process and forward pass")
    add("--accumulate", type=int, default=1, help="forward passes per step")
    add("--lr", type=float, default=1e-5)
    add("--warmup", type=int, default=100, help="steps over which the learning rate rises")
    add("--cooldown", type=int, default=0, help="steps at the end over which it falls to zero")
    add("--clip-grad", type=float, default=0.5)
    add("--passive", action="store_true", help="pretrain a passive model: bidirectional, without actions, one noise level per clip")
    add("--shared-level", action="store_true", help="one noise level per clip (without diffusion forcing, for comparison)")
    add("--clear-frames", type=float, default=0.0, help="chance that a frame's noise level is of the lowest tenth, as a "
                                                        "rollout's history is; the paper's is 0: uniform levels")
    add("--measure", choices=["velocity", "clean"], default="velocity", help="what the loss is an error of: the velocity (the paper's), "
                                                                             "or the clean latents, so that nearly clean frames count little")
    add("--action-dropout", type=float, default=0.2, help="chance that a frame's action is hidden")
    add("--image-dropout", type=float, default=0.05, help="chance that a clip's anchor image is blank")
    add("--dropout", type=float, help="of every layer that has one; if left out, the network's own")
    add("--bf16", action=argparse.BooleanOptionalAction, help="compute in bfloat16; if left out, where there is CUDA")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass, to save memory")
    add("--autoencoder-steps", type=int, default=1000, help="without --base: steps to train the autoencoder")
    add("--save-every", type=int, default=500)
    add("--val-every", type=int, default=500)
    add("--val-clips", type=int, default=16, help="held-out clips in a validation loss")
    add("--sample-every", type=int, default=1000, help="steps between strips of imagined frames")
    add("--sample-steps", type=int, default=20, help="denoising steps per frame of such a strip")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode frames")
    add("--seed", type=int, default=0)

    args = parser.parse_args(argv)
    saved = Path(args.out) / "arguments.json"
    if args.resume and saved.exists():
        parser.set_defaults(**json.loads(saved.read_text()))
    else:
        if not args.base and not args.scratch and not args.passive and args.preset in (None, "tiny"):
            parser.set_defaults(base=str(TINY_BASE))
            args.base = TINY_BASE
        preset = args.preset or (preset_of(args.base) if args.base else "tiny")
        parser.set_defaults(preset=preset, **LAPTOP if preset == "tiny" else {})
    args = parser.parse_args(argv)
    args.shared_level = args.shared_level or args.passive
    if not args.base and args.preset != "tiny":
        parser.error(f"--preset {args.preset} starts from DynamiCrafter's checkpoint: name it with --base")
    if not args.size:
        height, width = DATA_SETS[args.data].aspect
        args.size = [64, 64 * width // height] if args.preset == "tiny" else list(PRESETS[args.preset].size)
    args.bf16 = torch.cuda.is_available() if args.bf16 is None else args.bf16
    for name in ("steps", "batch", "accumulate", "autoencoder_steps", "save_every", "val_every", "val_clips",
                 "sample_every", "sample_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    config = PRESETS[args.preset]
    multiple = config.autoencoder.factor * 2 ** (len(config.unet.channel_mult) - 1)
    if any(side < 1 or side % multiple for side in args.size):
        parser.error(f"--size {args.size[0]} {args.size[1]}: height and width must be multiples of {multiple}")
    if not 2 <= args.frames <= config.unet.num_frames:
        parser.error(f"--frames must be between 2 and {config.unet.num_frames}")
    return args


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 2 if it cannot be done, after one sentence that says why."""
    try:
        return train(parse_arguments(argv))
    except (DataError, CheckpointError, RequestError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
