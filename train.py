"""Post-training: from a passive video model to a world model.

    python train.py --data rt1                            (what is bundled, on a laptop)
    python train.py --data rt1 --root /data/fractal20220817_data --base dynamicrafter_512.ckpt
    torchrun --nproc_per_node=4 train.py --data rt1 …     (many GPUs, many machines; --shard
                                                          spreads the optimizer over them)

One step, which is `PostTraining.forward` below: encode a batch of clips; give every frame a noise
level of its own; hide some of the actions; predict the velocity; compare. The U-Net and the
resampler are trained, everything else that was pretrained stays frozen. From scratch (`--scratch`)
nothing is pretrained, so the image tower is trained as well, and an autoencoder before it.

Nothing random here depends on what happened before. Clip number i, its noise and its levels are
functions of (seed, i), and dropout of (seed, step, rank). So a resumed run has the losses of one
that was never stopped, and N processes with batch B take the same steps as one process with batch
N·B, except for dropout masks, which differ from process to process.

A run folder holds checkpoint.pt (the trained weights and the optimizer), frozen.pt (the others,
written once), arguments.json, log.jsonl, loss.png, and strips of predicted frames.

Paper: Algorithm 1; settings in B.3 and Table 3.
"""
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from action_guidance import align_actions, drop_actions
from data import Clips, Episodes, collate, require_clips
from diffusion_forcing import diffusion_forcing_loss, draw_levels
from model.device import math_attention_on_cpu
from model.memory import encode_once, frozen_to_bf16, keep_malloc_heap
from model.vid2world import Model, to_pixels
from support.errors import CheckpointError, reading, require_finite
from support.options import command
from training.processes import (across_processes, gather_moments, ignore_signals, join_processes,
                                leave_processes, make_optimizer, stop_on_signals)
from training.recorder import Recorder
from training.settings import Settings, parse_arguments
from training.start import Recipe, build_model, prepare

# --------------------------------------------------------------------------------------------------
# One step


class PostTraining(nn.Module):
    """The loss of a batch, as one module, so that DistributedDataParallel can wrap it."""

    def __init__(self, model: Model, bf16: bool, weighting: str = "velocity"):
        super().__init__()
        self.model, self.bf16, self.weighting = model, bf16, weighting

    def forward(self, frames: Tensor, actions: Tensor, random: dict[str, Tensor]) -> Tensor:
        """The loss, a scalar, of frames uint8 [B, T, H, W, 3] and actions [B, T, A] as stored;
        random is from `random_inputs`. Paper: Algorithm 1."""
        model = self.model
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            pixels = to_pixels(frames)  # [B, T, 3, H, W]
            with torch.no_grad():
                # z ~ q(z | frame), the autoencoder's posterior
                latents = model.encode(pixels, noise=random["posterior"]).float()  # [B, T, C, h, w]
            anchor_image = pixels[:, 0] * random["keep_image"].view(-1, 1, 1, 1)
            context = model.context(model.image_tokens(anchor_image), range(frames.shape[1]))
            # a_{t-1} stands beside frame t
            led_to = align_actions(model.standardise(actions)) if model.action_dim else None

            def denoise(x: Tensor, k: Tensor) -> Tensor:
                return model.denoise(x, k, latents[:, :1], context, led_to, random["action_mask"])

            return diffusion_forcing_loss(denoise, model.schedule, latents, random["k"],
                                          random["noise"], self.weighting)


def random_inputs(model: Model, actions: Tensor, clips: Sequence[int], settings: Settings
                  ) -> dict[str, Tensor]:
    """All randomness of a batch except dropout, each clip's a function of (seed, its number).

    actions [B, T, A]; returns k [B, T], noise and posterior [B, T, C, h, w], action_mask [B, T],
    keep_image [B]. Paper: Algorithm 1, B.3.
    """
    def of_clip(clip: int, actions: Tensor) -> dict[str, Tensor]:
        T = actions.shape[1]
        generator = torch.Generator().manual_seed(mix_seeds(settings.seed, clip))
        k = draw_levels((T,), generator, settings.shared_level, settings.low_noise_prob)
        noise, posterior = torch.randn(2, T, *model.latent_shape, generator=generator)
        action_mask = drop_actions(actions, settings.action_dropout, generator)[0]
        keep_image = (torch.rand((), generator=generator) >= settings.image_dropout).float()
        return {"k": k, "noise": noise, "posterior": posterior, "action_mask": action_mask,
                "keep_image": keep_image}

    each = [of_clip(clip, actions[i : i + 1]) for i, clip in enumerate(clips)]
    return {name: torch.stack([inputs[name] for inputs in each]) for name in each[0]}


def batch_loss(loss_module: nn.Module, model: Model, batch: dict, settings: Settings) -> Tensor:
    """The loss of a batch from `data.collate`, with its random inputs."""
    random = random_inputs(model, batch["actions"], batch["index"], settings)
    random = {name: tensor.to(model.device) for name, tensor in random.items()}
    return loss_module(batch["frames"].to(model.device), batch["actions"].to(model.device), random)


def mix_seeds(*numbers: int) -> int:
    """A 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# --------------------------------------------------------------------------------------------------
# The loop


WORLD = Recipe(build_model)


def train(settings: Settings, recipe: Recipe = WORLD) -> int:
    """Train until settings.steps or until a signal; returns the exit code.

    Raises DataError, CheckpointError or RequestError for what a run cannot start from,
    DivergedError where the loss is not a finite number.
    """
    keep_malloc_heap()
    rank, processes, device = join_processes()
    model, clips, held_out, saved, claim = prepare(settings, recipe, rank, device)
    loss_class = recipe.loss or PostTraining
    start = saved["step"] if saved else 0
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameters, settings, device)
    if saved:
        with reading(f"the optimizer in {settings.out}", CheckpointError):
            optimizer.load_state_dict(saved["optimizer"])
    loss_module = loss_class(model, settings.bf16, settings.loss_weighting).train()
    if processes > 1:  # broadcasts the first process's weights as well
        loss_module = DistributedDataParallel(loss_module)
    gather_moments(optimizer)
    recorder = None
    if rank == 0:
        validation = partial(validate, model, held_out, settings, loss_class)
        recorder = Recorder(settings, model, optimizer, held_out, validation, saved, claim)
    if settings.bf16:
        frozen_to_bf16(model)
    if model.config.small and device.type == "cpu" and not clips.augment:
        encode_once(model.autoencoder)

    quick = math_attention_on_cpu(device, settings.bf16, model.config.small)
    with stop_on_signals() as stop, quick:
        batches = load_batches(clips, settings, start, rank, processes)
        bar = tqdm(range(start, settings.steps), "training", settings.steps, initial=start,
                   disable=rank > 0)
        for step in bar:
            torch.manual_seed(mix_seeds(settings.seed, step, rank))  # for dropout
            optimizer.param_groups[0]["lr"] = learning_rate(step, settings)
            loss, damaged = add_gradients(loss_module, model, batches, settings)
            # g ← g · min(1, c / ‖g‖): a rare clip would else make a huge step
            length = nn.utils.clip_grad_norm_(parameters, settings.clip_grad).item()
            # All processes have to leave the loop at the same step, whichever one got the signal.
            loss, stopping = across_processes(loss, bool(stop), device)
            require_finite(f"step {step + 1}: the loss and the gradient's length", loss + length,
                           f"{settings.out} keeps its last checkpoint: python train.py --resume "
                           f"--out {settings.out} --lr {settings.lr / 4:g} resumes from there")
            optimizer.step()
            optimizer.zero_grad()  # frees the gradients before the next forward pass needs memory
            last = stopping or step + 1 == settings.steps
            if last or (step + 1) % settings.save_every == 0:
                gather_moments(optimizer)
            if recorder:
                recorder.record(step + 1, loss, damaged, last)
                bar.set_postfix(recorder.summary())
            if stopping:
                break
    # DistributedDataParallel must not outlive the group of processes: gloo's threads could wait for
    # Python, and Python for them.
    del loss_module
    leave_processes()
    if rank == 0:
        recorder.finish(stopped=bool(stop))
        claim.release()
    return 128 + stop[0] if stop else 0


def add_gradients(loss_module: nn.Module, model: Model, batches: Iterator[dict],
                  settings: Settings) -> tuple[float, list[str]]:
    """The backward passes of one step; returns its loss, and what was damaged in its batches."""
    step_loss, damaged = 0.0, []
    for micro in range(settings.accumulate):
        batch = require_clips(next(batches))
        # Processes add up their gradients in the last backward pass of a step, and not before.
        last = micro == settings.accumulate - 1
        waits = hasattr(loss_module, "no_sync") and not last
        with loss_module.no_sync() if waits else nullcontext():
            loss = batch_loss(loss_module, model, batch, settings) / settings.accumulate
            loss.backward()
        step_loss += loss.item()
        damaged += batch["damaged"]
    return step_loss, damaged


def learning_rate(step: int, settings: Settings) -> float:
    """Rises linearly over the warmup, falls linearly to zero over the cooldown."""
    rise = (step + 1) / max(settings.warmup, 1)
    fall = (settings.steps - step) / max(settings.cooldown, 1)
    # lr · min(1, (step + 1) / warmup, (steps - step) / cooldown)
    return settings.lr * min(1, rise, fall)


def load_batches(clips: Clips, settings: Settings, start: int, rank: int, processes: int
                 ) -> Iterator[dict]:
    """The batches of this process. A step takes the next processes · accumulate · batch clips."""
    passes = range(start * settings.accumulate, settings.steps * settings.accumulate)
    firsts = ((number * processes + rank) * settings.batch for number in passes)
    numbers = (list(range(first, first + settings.batch)) for first in firsts)
    return iter(DataLoader(clips, batch_sampler=numbers, collate_fn=collate,
                           num_workers=settings.workers, worker_init_fn=ignore_signals,
                           pin_memory=torch.cuda.is_available()))


@torch.no_grad()
def validate(model: Model, held_out: Episodes, settings: Settings,
             loss_class: type[nn.Module] = PostTraining) -> dict[str, float]:
    """"val", the mean loss of held-out clips, always with the same noise and levels; "gap", by how
    much it rises under the actions of other clips, and "gap_error", its standard error.

    A causal model is measured with a level per frame, whatever it trains with; nothing is dropped.
    """
    fixed = replace(settings, action_dropout=0, image_dropout=0, low_noise_prob=0,
                    shared_level=not model.config.unet.causal)
    model.eval()
    clips = Clips(held_out, settings.frames, tuple(settings.size), settings.seed)
    batches = [require_clips(collate([clips[i]])) for i in range(settings.val_clips)]
    compute_loss = loss_class(model, settings.bf16)
    losses, gaps = [], []
    for batch, other in zip(batches, batches[1:] + batches[:1], strict=True):
        losses.append(batch_loss(compute_loss, model, batch, fixed).item())
        if model.action_dim and len(batches) > 1:
            shuffled = batch_loss(compute_loss, model, batch | {"actions": other["actions"]}, fixed)
            gaps.append(shuffled.item() - losses[-1])
    model.train()
    if not gaps:
        return {"val": np.mean(losses)}
    return {"val": np.mean(losses), "gap": np.mean(gaps),
            "gap_error": np.std(gaps, ddof=1) / len(gaps)**0.5}


def main(argv: Sequence[str] | None = None) -> int:
    return command("train.py", lambda: train(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
