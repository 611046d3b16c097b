"""What a run starts from: data, a model and what of it is trained, a folder.

A world model starts from DynamiCrafter's checkpoint or from another world model (`--base`), or from
random weights; a resumed run from its own checkpoint. `Recipe` says how one is built.
"""
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from causal_attention import TemporalTransformer
from causal_conv import TemporalConvBlock
from data import (SAMPLES, Clips, DataSet, Episodes, action_statistics, default_root, open_episodes,
                  random_frames)
from dynamicrafter.checkpoint import read_checkpoint
from dynamicrafter.resampler import Resampler
from model.device import bf16_is_emulated
from model.memory import recompute_activations
from model.saving import (TINY_BASE, from_dynamicrafter, from_world, is_world, load_model,
                          display_path)
from model.vid2world import PRESETS, TUNED_SAMPLING, Model, to_pixels
from support.errors import DataError
from training.run_folder import Claim, check_folder, clear_folder, write_settings
from training.settings import Settings
from training.tiny_autoencoder import fit_autoencoder
from unet import UNet


@dataclass(frozen=True)
class Recipe:
    """What a run trains: a world model, or what `baselines/` compares it with."""
    build: Callable[[Settings, DataSet], Model]
    model_class: type[Model] = Model  # what `build` gives
    loss: type[nn.Module] | None = None  # of a batch; None: `train.PostTraining`
    wrap_episodes: Callable[[Episodes], Episodes] = staticmethod(lambda episodes: episodes)


def prepare(settings: Settings, recipe: Recipe, rank: int, device: torch.device
            ) -> tuple[Model, Clips, Episodes, dict | None, Claim | None]:
    """The model, clips to train on, held-out episodes, the checkpoint to resume from, if any, and
    the first process's claim on the run folder. Raises DataError, CheckpointError, RequestError."""
    if rank == 0:
        check_folder(Path(settings.out), settings.resume, settings.overwrite)
    say = print if rank == 0 else lambda *words: None
    root = settings.root or default_root(settings.data)
    episodes, held_out = (
        recipe.wrap_episodes(open_episodes(settings.data, root, split, settings.frames,
                                           settings.fps))
        for split in ("train", "val"))
    say(f"data: {settings.data} from {display_path(root, SAMPLES)}: {len(episodes)} episodes to "
        f"train on, {len(held_out)} held out; left out: {episodes.short + held_out.short} shorter "
        f"than {settings.frames} frames, {episodes.damaged + held_out.damaged} damaged")
    for problem in [*episodes.problems, *held_out.problems]:
        say(f"left out: {problem}")
    base = display_path(settings.base, TINY_BASE) if settings.base else "none, from scratch"
    say(f"base: {base}")
    model, saved = start_or_resume(settings, recipe, episodes, device)
    claim = None
    if rank == 0:
        claim = Claim(Path(settings.out))
        begin_folder(settings, model, episodes, saved)
    trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad is wanted)
                       for wanted in (True, False))
    say(f"{trained / 1e6:.1f} M trainable parameters, {frozen / 1e6:.1f} M frozen"
        + (f"; resuming {settings.out} at step {saved['step']}" if saved else ""))
    if settings.bf16 and bf16_is_emulated(device):
        say("this CPU has no AVX-512, so bfloat16 is far slower than float32: leave --bf16 out")
    augment = episodes.dataset.augment if settings.augment is None else settings.augment
    clips = Clips(episodes, settings.frames, tuple(settings.size), settings.seed, augment)
    return model, clips, held_out, saved, claim


def start_or_resume(settings: Settings, recipe: Recipe, episodes: Episodes,
                    device: torch.device) -> tuple[Model, dict | None]:
    """The model, whose trainable parameters require grad, and the checkpoint of a resumed run."""
    out = Path(settings.out)
    if settings.resume and (out / "checkpoint.pt").exists():
        saved = read_checkpoint(out / "checkpoint.pt")
        model = load_model(out, kind=recipe.model_class).to(device)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in saved["weights"])
    else:
        saved, model = None, recipe.build(settings, episodes.dataset).to(device)
    plain = recipe.model_class is Model and not settings.passive
    if plain and model.action_dim != episodes.dataset.action_dim:
        raise DataError(f"{settings.data} has actions of {episodes.dataset.action_dim} numbers, "
                        f"but the network in {out} takes {model.action_dim}")
    if settings.checkpointing:
        recompute_activations(model.unet)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout) and settings.dropout is not None:
            layer.p = settings.dropout
    return model, saved


def begin_folder(settings: Settings, model: Model, episodes: Episodes, saved: dict | None) -> None:
    """Write the settings, which hold for the next --resume as well. A new run measures the actions
    and trains the autoencoder here, or its decoder, where it needs to."""
    if not settings.resume:
        clear_folder(Path(settings.out))
    write_settings(Path(settings.out), asdict(settings) | {"resume": False, "overwrite": False})
    if not saved:
        fit_to_frames(model, episodes, settings)
    if not saved and episodes.dataset.standardise and not settings.passive:
        fit_action_statistics(model, episodes)


def build_model(settings: Settings, dataset: DataSet) -> Model:
    """From a passive model or another world (`--base`), or random."""
    config = PRESETS[settings.preset]
    unet = replace(config.unet, default_fps=dataset.network_fps, action_init=settings.action_init)
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
    model.sampling = model.sampling or TUNED_SAMPLING.get(settings.preset, {})
    tower = model.image_tower
    never_used = (tower.ln_post, tower.proj)  # by which the tower would reach CLIP's space
    for part in (model.autoencoder, *((tower,) if settings.base else never_used)):
        part.requires_grad_(False)
    if settings.trainable == "temporal":
        freeze_spatial_layers(model)
    return model


def freeze_spatial_layers(model: Model) -> None:
    """Train temporal layers, action embedding and output alone: a third of the memory."""
    unet = model.unet
    for part in (unet, model.resampler, model.image_tower):
        part.requires_grad_(False)
    trainable = [layer for layer in unet.modules()
                 if isinstance(layer, (TemporalConvBlock, TemporalTransformer))]
    trainable += [unet.out] + ([unet.action_emb_preprocess, unet.action_emb_proj]
                               if unet.config.action_dim else [])
    for part in trainable:
        part.requires_grad_(True)


def fit_to_frames(model: Model, episodes: Episodes, settings: Settings) -> None:
    """Give a random model an autoencoder of the frames it will see; show one that was pretrained
    how they look, if asked to. Then the decoder alone changes: the U-Net, which knows nothing but
    latents, can tell no difference."""
    pretrained = bool(settings.base)
    steps = settings.decoder_steps if pretrained else settings.autoencoder_steps
    if steps == 0:
        return
    frames = random_frames(episodes, tuple(settings.size), settings.seed, steps, settings.workers)
    batches = (to_pixels(batch[None].to(model.device))[0] for batch in frames)
    model.autoencoder.requires_grad_(True)
    fit_autoencoder(model.autoencoder, batches, steps, settings.bf16, decoder_only=pretrained)
    model.autoencoder.requires_grad_(False)


def fit_action_statistics(model: Model, episodes: Episodes) -> None:
    """Standardise actions by their mean and standard deviation in the training split."""
    model.set_action_statistics(*action_statistics(episodes))
    names = episodes.dataset.names or range(model.action_dim)
    constant = [str(name) for name, number in zip(names, model.action_statistics[2], strict=True)
                if number.isinf()]
    if constant:
        print(f"action {', '.join(constant)} never varies: its effect cannot be learned")
