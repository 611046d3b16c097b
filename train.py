"""Post-training: from a passive video model to a world model.

    python train.py --data rt1                            (what is bundled, on a laptop)
    python train.py --data rt1 --root /data/fractal20220817_data --base dynamicrafter_512.ckpt
    torchrun --nproc_per_node=4 train.py --data rt1 …     (many GPUs, many machines; --shard
                                                          where one cannot hold everything)

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
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from action_guidance import align_actions, drop_actions
from causal_attention import TemporalTransformer
from causal_conv import TemporalConvBlock
from commands import command
from data import (
    SAMPLES,
    Clips,
    DataSet,
    Episodes,
    action_statistics,
    collate,
    default_root,
    open_episodes,
    random_frames,
    require_clips,
)
from diffusion_forcing import diffusion_forcing_loss, draw_levels
from dynamicrafter.checkpoint import read_checkpoint
from dynamicrafter.resampler import Resampler
from errors import CheckpointError, DataError, reading, require_finite
from model.device import quick_attention, slow_in_half
from model.memory import halve_frozen, keep_freed_memory
from model.sampling import MEASURED
from model.saving import (
    TINY_BASE,
    from_dynamicrafter,
    from_world,
    is_world,
    load_model,
    readable_path,
)
from model.vid2world import PRESETS, Model, to_pixels
from training.processes import (
    across_processes,
    ignore_signals,
    join_processes,
    leave_processes,
    stop_on_signals,
)
from training.recorder import Recorder
from training.run_folder import Claim, check_folder, clear_folder, write_settings
from training.settings import Settings, parse_arguments
from training.sharding import AdamWInPieces, clip_gradients, shard
from training.tiny_autoencoder import fit_autoencoder
from unet import UNet

# --------------------------------------------------------------------------------------------------
# One step


class PostTraining(nn.Module):
    """The loss of a batch, as one module, so that DistributedDataParallel can wrap it."""

    def __init__(self, model: Model, bf16: bool, weighting: str = "velocity"):
        super().__init__()
        self.model, self.bf16, self.weighting = model, bf16, weighting

    def forward(self, frames: Tensor, actions: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """frames uint8 [B, T, H, W, 3], actions [B, T, A] as stored, draws from `draw`."""
        model = self.model
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            pixels = to_pixels(frames)  # [B, T, 3, H, W]
            with torch.no_grad():
                latents = model.encode(pixels, noise=draws["posterior"]).float()  # [B, T, C, h, w]
            anchor_image = pixels[:, 0] * draws["keep_image"].view(-1, 1, 1, 1)
            context = model.context(model.image_tokens(anchor_image), frames.shape[1])
            led_to = align_actions(model.standardise(actions)) if model.action_dim else None

            def denoise(x: Tensor, k: Tensor) -> Tensor:
                return model.denoise(x, k, latents[:, :1], context, led_to, draws["action_mask"])

            return diffusion_forcing_loss(denoise, model.schedule, latents, draws["k"],
                                          draws["noise"], self.weighting)


def draw(model: Model, actions: Tensor, clips: Sequence[int], settings: Settings
         ) -> dict[str, Tensor]:
    """All that is random about a batch but dropout, each clip's a function of (seed, its number).

    actions [B, T, A]; returns k [B, T], noise and posterior [B, T, C, h, w], action_mask [B, T],
    keep_image [B]
    """
    def draw_clip(clip: int, actions: Tensor) -> dict[str, Tensor]:
        T = actions.shape[1]
        generator = torch.Generator().manual_seed(entropy(settings.seed, clip))
        k = draw_levels((T,), generator, settings.shared_level, settings.clear_frames)
        noise, posterior = torch.randn(2, T, *model.latent_shape, generator=generator)
        action_mask = drop_actions(actions, settings.action_dropout, generator)[0]
        keep_image = (torch.rand((), generator=generator) >= settings.image_dropout).float()
        return {"k": k, "noise": noise, "posterior": posterior, "action_mask": action_mask,
                "keep_image": keep_image}

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


def prepare(settings: Settings, method: "Method", rank: int, device: torch.device
            ) -> tuple[Model, Clips, Episodes, dict | None, Claim | None]:
    """The model, clips to train on, held-out episodes, the checkpoint to go on from, if any, and
    the first process's claim on the run folder."""
    if rank == 0:
        check_folder(Path(settings.out), settings.resume, settings.overwrite)
    say = print if rank == 0 else lambda *words: None
    root = settings.root or default_root(settings.data)
    episodes, held_out = (
        method.episodes(open_episodes(settings.data, root, split, settings.frames, settings.fps))
        for split in ("train", "val"))
    say(f"data: {settings.data} from {readable_path(root, SAMPLES)}: {len(episodes)} episodes to "
        f"train on, {len(held_out)} held out; left out: {episodes.short + held_out.short} shorter "
        f"than {settings.frames} frames, {episodes.damaged + held_out.damaged} damaged")
    for complaint in [*episodes.complaints, *held_out.complaints]:
        say(f"left out: {complaint}")
    base = readable_path(settings.base, TINY_BASE) if settings.base else "none, from scratch"
    say(f"base: {base}")
    model, saved = start_or_resume(settings, method, episodes, device)
    claim = None
    if rank == 0:
        claim = Claim(Path(settings.out))
        begin_folder(settings, model, episodes, saved)
    learning, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad is learns)
                        for learns in (True, False))
    say(f"{learning / 1e6:.1f} M parameters learn, {frozen / 1e6:.1f} M are frozen"
        + (f"; resuming {settings.out} at step {saved['step']}" if saved else ""))
    if settings.bf16 and slow_in_half(device):
        say("this CPU has no AVX-512, so bfloat16 is far slower than float32: leave --bf16 out")
    augment = episodes.dataset.augment if settings.augment is None else settings.augment
    clips = Clips(episodes, settings.frames, tuple(settings.size), settings.seed, augment)
    return model, clips, held_out, saved, claim


def start_or_resume(settings: Settings, method: "Method", episodes: Episodes,
                    device: torch.device) -> tuple[Model, dict | None]:
    """The model, in which what learns requires grad, and the checkpoint that holds it, if any."""
    out = Path(settings.out)
    if settings.resume and (out / "checkpoint.pt").exists():
        saved = read_checkpoint(out / "checkpoint.pt")
        model = load_model(out, kind=method.kind).to(device)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in saved["weights"])
    else:
        saved, model = None, method.build(settings, episodes.dataset).to(device)
    plain = method.kind is Model and not settings.passive
    if plain and model.action_dim != episodes.dataset.action_dim:
        raise DataError(f"{settings.data} has actions of {episodes.dataset.action_dim} numbers, "
                        f"but the network in {out} takes {model.action_dim}")
    model.unet.checkpointing = settings.checkpointing
    for layer in model.modules():
        if isinstance(layer, nn.Dropout) and settings.dropout is not None:
            layer.p = settings.dropout
    return model, saved


def begin_folder(settings: Settings, model: Model, episodes: Episodes, saved: dict | None) -> None:
    """Write what the run is to be, which holds for the next command as well; what is new in a model
    that starts is measured and trained here."""
    if not settings.resume:
        clear_folder(Path(settings.out))
    write_settings(Path(settings.out), asdict(settings) | {"resume": False, "overwrite": False})
    if not saved and not settings.base:
        pretrain_autoencoder(model, episodes, settings)
    if not saved and episodes.dataset.standardise and not settings.passive:
        measure_actions(model, episodes)


def build_model(settings: Settings, dataset: DataSet) -> Model:
    """From a passive model or another world (`--base`), or random."""
    config = PRESETS[settings.preset]
    unet = replace(config.unet, default_fps=dataset.network_fps,
                   loud_actions=settings.loud_actions)
    if not settings.passive:
        unet = replace(unet, causal=True, norm_scope=settings.norm_scope,
                       action_dim=dataset.action_dim)
    config = replace(config, unet=unet, size=tuple(settings.size), fit=dataset.fit)
    torch.manual_seed(settings.seed)
    if settings.base and not settings.passive and is_world(settings.base):
        model = from_world(settings.base, config)
    elif settings.base:
        model = from_dynamicrafter(settings.base, config, settings.transfer)
    else:
        model = Model(config)
    if settings.base and settings.scratch:  # keep what stays frozen
        model.unet, model.resampler = UNet(config.unet), Resampler(config.resampler)
    model.sampling = model.sampling or MEASURED.get(settings.preset, {})
    tower = model.image_tower
    never_used = (tower.ln_post, tower.proj)  # by which the tower would reach CLIP's space
    for part in (model.autoencoder, *((tower,) if settings.base else never_used)):
        part.requires_grad_(False)
    if settings.trainable == "temporal":
        freeze_pictures(model)
    return model


def freeze_pictures(model: Model) -> None:
    """Leave what DynamiCrafter knows of single frames as it is: a third of the memory."""
    unet = model.unet
    for part in (unet, model.resampler, model.image_tower):
        part.requires_grad_(False)
    learn = [layer for layer in unet.modules()
             if isinstance(layer, (TemporalConvBlock, TemporalTransformer))]
    learn += [unet.out] + ([unet.action_emb_preprocess, unet.action_emb_proj]
                           if unet.config.action_dim else [])
    for part in learn:
        part.requires_grad_(True)


def pretrain_autoencoder(model: Model, episodes: Episodes, settings: Settings) -> None:
    """Give a random model an autoencoder of the frames it will see."""
    size, steps = tuple(settings.size), settings.autoencoder_steps
    frames = random_frames(episodes, size, settings.seed, steps, settings.workers)
    batches = (to_pixels(batch[None].to(model.device))[0] for batch in frames)
    model.autoencoder.requires_grad_(True)
    fit_autoencoder(model.autoencoder, batches, steps, settings.bf16).requires_grad_(False)


def measure_actions(model: Model, episodes: Episodes) -> None:
    """Give the model the statistics of the actions that it will see."""
    mean, deviation = action_statistics(episodes)
    model.set_action_statistics(mean, deviation)
    names = episodes.dataset.names or range(len(mean))
    constant = [str(name) for name, number in zip(names, model.action_statistics[2], strict=True)
                if number.isinf()]
    if constant:
        print(f"action {', '.join(constant)} never varies: nothing can be learned of what it does")


# --------------------------------------------------------------------------------------------------
# The loop


@dataclass(frozen=True)
class Method:
    """What a run makes: world models, or what `baselines/` compares them with."""
    build: Callable[[Settings, DataSet], Model] = build_model
    kind: type[Model] = Model  # what `build` gives
    loss: type[nn.Module] = PostTraining
    episodes: Callable[[Episodes], Episodes] = staticmethod(lambda episodes: episodes)


WORLD = Method()


def train(settings: Settings, method: Method = WORLD) -> int:
    """Train until settings.steps or until a signal; returns the exit code."""
    keep_freed_memory()
    rank, processes, device = join_processes()
    model, clips, held_out, saved, claim = prepare(settings, method, rank, device)
    start = saved["step"] if saved else 0
    if settings.shard:
        shard(model, settings.bf16)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = AdamWInPieces if settings.shard else torch.optim.AdamW
    optimizer = adamw(parameters, lr=settings.lr, fused=device.type != "mps")
    if saved:
        with reading(f"the optimizer in {settings.out}", CheckpointError):
            optimizer.load_state_dict(saved["optimizer"])
    trainee = method.loss(model, settings.bf16, settings.weighting).train()
    if processes > 1 and not settings.shard:  # which also hands the first's weights to the others
        trainee = DistributedDataParallel(trainee)
    recorder, validation = None, partial(validate, model, held_out, settings, method.loss)
    if rank == 0 or settings.shard:  # a network in pieces validates and saves with all of them
        recorder = Recorder(settings, model, optimizer, held_out, validation, start, claim)
    if settings.bf16:
        halve_frozen(model)

    quick = quick_attention(device, settings.bf16, model.config.small)
    with stop_on_signals() as stop, quick:
        batches = load_batches(clips, settings, start, rank, processes)
        bar = tqdm(range(start, settings.steps), "training", settings.steps, initial=start,
                   disable=rank > 0)
        for step in bar:
            torch.manual_seed(entropy(settings.seed, step, rank))  # for dropout
            optimizer.param_groups[0]["lr"] = learning_rate(step, settings)
            loss, damaged = add_gradients(trainee, model, batches, settings)
            # A rare clip asks for a huge step: its direction is kept, its length is not.
            length = clip_gradients(parameters, settings.clip_grad)
            # All processes have to leave the loop at the same step, whichever one got the signal.
            loss, stopping = across_processes(loss, bool(stop), device)
            require_finite(f"step {step + 1}: the loss and the gradient's length", loss + length,
                           f"{settings.out} keeps its last checkpoint: python train.py --resume "
                           f"--out {settings.out} --lr {settings.lr / 4:g} goes on from there")
            optimizer.step()
            optimizer.zero_grad()  # frees the gradients before the next forward pass needs memory
            if recorder:
                recorder.record(step + 1, loss, damaged, stopping or step + 1 == settings.steps)
                bar.set_postfix(recorder.summary())
            if stopping:
                break
    # DistributedDataParallel must not outlive the group of processes: gloo's threads could wait for
    # Python, and Python for them.
    del trainee
    leave_processes()
    if rank == 0:
        recorder.finish(stopped=bool(stop))
        claim.release()
    return 128 + stop[0] if stop else 0


def add_gradients(trainee: nn.Module, model: Model, batches: Iterator[dict], settings: Settings
                  ) -> tuple[float, list[str]]:
    """The backward passes of one step; returns its loss, and what was damaged in its batches."""
    step_loss, damaged = 0.0, []
    for micro in range(settings.accumulate):
        batch = require_clips(next(batches))
        # Processes add up their gradients in the last backward pass of a step, and not before.
        last, together = micro == settings.accumulate - 1, hasattr(trainee, "no_sync")
        with trainee.no_sync() if together and not last else nullcontext():
            loss = batch_loss(trainee, model, batch, settings) / settings.accumulate
            loss.backward()
        step_loss += loss.item()
        damaged += batch["damaged"]
    return step_loss, damaged


def learning_rate(step: int, settings: Settings) -> float:
    """Rises linearly over the warmup, falls linearly to zero over the cooldown."""
    rise = (step + 1) / max(settings.warmup, 1)
    fall = (settings.steps - step) / max(settings.cooldown, 1)
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
             loss: type[nn.Module] = PostTraining) -> float:
    """Mean loss on held-out clips, always with the same noise and levels.

    A causal model is measured with a level per frame, whatever it trains with; nothing is dropped.
    """
    fixed = replace(settings, action_dropout=0, image_dropout=0, clear_frames=0,
                    shared_level=not model.config.unet.causal)
    model.eval()
    clips = Clips(held_out, settings.frames, tuple(settings.size), settings.seed)
    losses = []
    for first in range(0, settings.val_clips, settings.batch):
        numbers = range(first, min(first + settings.batch, settings.val_clips))
        batch = require_clips(collate([clips[i] for i in numbers]))
        measured = batch_loss(loss(model, settings.bf16), model, batch, fixed).item()
        losses += [measured] * len(numbers)
    model.train()
    return sum(losses) / len(losses)


def main(argv: Sequence[str] | None = None) -> int:
    return command("train.py", lambda: train(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
