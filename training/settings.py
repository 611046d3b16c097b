"""Settings of a training run: options, defaults, validation."""
import argparse
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import Field, dataclass, fields
from pathlib import Path

from causal_conv import TRANSFER_METHODS
from data import DATA_SETS, open_episodes
from model.device import bf16_is_quick
from model.saving import TINY_BASE, preset_of
from model.vid2world import PRESETS, ModelConfig
from support.errors import RequestError, reading
from support.options import option, parse
from temporal.norm import NORM_SCOPES
from training.run_folder import read_settings


@dataclass
class Settings:
    """Of a run. The defaults are the paper's; LAPTOP has those of a small model."""
    data: str = option("rt1", "data set", choices=DATA_SETS)
    root: str | None = option(None, "its folder, or one above; else datasets/ or what is bundled")
    fps: float | None = option(None, "its frames per second, where --data folder does not say",
                               type=float)
    base: str | None = option(None, "what to start from: DynamiCrafter's checkpoint, or a world")
    scratch: bool = option(False, "start from random weights, except the frozen parts of a --base")
    passive: bool = option(False, "pretrain a passive model: bidirectional, no actions, one level")
    transfer: str = option("mixed", "how temporal kernels become causal", choices=TRANSFER_METHODS)
    frames: int = option(16, "frames per clip", least=2)
    size: list[int] | None = option(None, "pixels; if left out, the model's", type=int, nargs=2,
                                    metavar=("H", "W"))
    out: str = option("runs/default", "run folder")
    resume: bool = option(False, "resume the run in --out; its settings are the defaults")
    overwrite: bool = option(False, "replace the run in --out")
    steps: int = option(100_000, "training steps")
    batch: int = option(8, "clips per process and forward pass")
    lr: float = option(1e-5, "learning rate", least=1e-12, most=1000)
    cooldown: int = option(0, "steps at the end over which it falls to zero", least=0)
    bf16: bool | None = option(None, "compute in bfloat16; if left out, where it is quick",
                              type=bool)
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory")
    trainable: str = option("all", "parameters of the U-Net: all, and the resampler's, or those of "
                                   "temporal layers, action embedding and output",
                            choices=("all", "temporal"))
    shard: bool = option(False, "with torchrun: spread the optimizer over the processes")
    save_every: int = option(500, "steps between checkpoints")
    workers: int = option(min(8, os.cpu_count() or 1), "processes that decode frames", least=0)
    seed: int = option(0, "random seed", least=0)
    set: list[str] | None = option(None, "other settings, such as action_dropout=0", nargs="+",
                                   action="extend")
    # Settings without an option, for --set.
    preset: str = "512"
    norm_scope: str = "frame"  # frames that temporal norms see; "clip", the paper's, leaks
    accumulate: int = 1  # forward passes per step
    warmup: int = 100  # steps over which the learning rate rises
    clip_grad: float = 0.5
    action_dropout: float = 0.2  # chance that a frame's action is hidden
    image_dropout: float = 0.05  # chance that a clip's anchor image is blank
    dropout: float | None = None  # of every layer that has one; None: the network's own
    # vary colours and place of training clips; None: as the data set has it
    augment: bool | None = None
    # initialisation of a new action embedding, "pytorch" or "he"; if empty, as the preset has
    action_init: str = ""
    shared_level: bool = False  # one noise level per clip: no diffusion forcing
    low_noise_prob: float = 0.0  # that a frame's level is of the lowest tenth: see `draw_levels`
    loss_weighting: str = "velocity"  # or "x0": see `diffusion_forcing_loss`
    autoencoder_steps: int = 1000  # without --base
    decoder_steps: int = 0  # that show the decoder of a --base the data's frames
    val_every: int = 500  # steps between validation losses
    val_clips: int = 16  # held-out clips in one of them
    sample_every: int = 1000  # steps between strips of imagined frames


# A small model on a laptop takes larger and fewer steps, and too few of them to see a picture in
# many lights. For a world the loss weighs levels at which actions decide, more frames of a clip
# are clear, as a rollout's history is, and the decoder is shown the data's frames first.
LAPTOP = {"batch": 2, "lr": 1e-3, "steps": 1000, "warmup": 50, "cooldown": 500, "save_every": 100,
          "val_every": 100, "val_clips": 8, "sample_every": 200, "augment": False, "dropout": 0.0}
LAPTOP_WORLD = LAPTOP | {"low_noise_prob": 0.3, "loss_weighting": "x0", "decoder_steps": 200}


def parse_arguments(argv: Sequence[str] | None = None) -> Settings:
    """Settings from the command line, on top of those of the run or the kind of model."""
    peek = argparse.ArgumentParser(add_help=False)
    for flag in ("--resume", "--scratch", "--passive"):
        peek.add_argument(flag, action="store_true")
    peek.add_argument("--base")
    peek.add_argument("--out", default="runs/default")
    known, _ = peek.parse_known_args(argv)
    if known.resume:
        not_kept = {"resume", "overwrite", "set", "shard"}
        names = {each.name for each in fields(Settings)} - not_kept
        defaults = {name: value for name, value in read_settings(Path(known.out)).items()
                    if name in names}
    else:
        bundled = None if known.scratch or known.passive else str(TINY_BASE)
        base = known.base or bundled
        preset = preset_of(base) if base else "tiny"
        laptop = LAPTOP if known.passive else LAPTOP_WORLD
        defaults = {"base": base, "preset": preset} | (laptop if PRESETS[preset].small else {})
    # a resumed run's settings come from a file
    with reading(f"the settings in {known.out}") if known.resume else nullcontext():
        others = ", ".join(each.name for each in fields(Settings) if not each.metadata)
        return parse(Settings, "Post-train a world model on robot episodes. --set knows "
                     f"{others}.", argv, complete, **defaults)


def complete(settings: Settings) -> None:
    """Apply --set, fill in what is left out, and raise RequestError for what cannot be."""
    others = {each.name: each for each in fields(Settings) if not each.metadata}
    for assignment in settings.set or []:
        name, _, value = assignment.partition("=")
        if name not in others:
            raise RequestError(f"--set knows no {name!r}; it knows {', '.join(others)}")
        setattr(settings, name, convert(others[name], value))
    if settings.preset not in PRESETS:
        raise RequestError(f"preset is {settings.preset!r}; it must be one of {', '.join(PRESETS)}")
    if not settings.base and not PRESETS[settings.preset].small:
        raise RequestError(f"preset {settings.preset} starts from DynamiCrafter's checkpoint: name "
                           "it with --base")
    preset = PRESETS[settings.preset]
    if not settings.size:
        settings.size = small_size(settings) if preset.small else list(preset.size)
    settings.bf16 = bf16_is_quick() if settings.bf16 is None else settings.bf16
    settings.shared_level = settings.shared_level or settings.passive
    settings.action_init = settings.action_init or preset.unet.action_init
    for name in ("steps", "batch", "accumulate", "autoencoder_steps", "save_every", "val_every",
                 "val_clips", "sample_every", "decoder_steps"):
        least = 0 if name == "decoder_steps" else 1
        if getattr(settings, name) < least:
            raise RequestError(f"{name} is {getattr(settings, name)}; it must be at least {least}")
    own = DATA_SETS[settings.data].needs_root
    if settings.fps is not None and not (own and settings.fps > 0):
        raise RequestError(f"fps is {settings.fps:g}; it must be above 0, and is for --data folder")
    for name, known in (("loss_weighting", ("velocity", "x0")), ("norm_scope", NORM_SCOPES),
                        ("action_init", ("pytorch", "he"))):
        if getattr(settings, name) not in known:
            raise RequestError(f"{name} is {getattr(settings, name)!r}; it must be one of "
                               f"{', '.join(known)}")
    multiple = smallest_side(preset)
    if any(side < 1 or side % multiple for side in settings.size):
        raise RequestError(f"size is {settings.size}; height and width must be multiples of "
                           f"{multiple}")
    if not 2 <= settings.frames <= preset.unet.num_frames:
        raise RequestError(f"frames is {settings.frames}; it must be between 2 and "
                           f"{preset.unet.num_frames}")


def smallest_side(preset: ModelConfig) -> int:
    """Of a picture that the autoencoder and the U-Net can halve as often as they do."""
    return preset.autoencoder.factor * 2 ** (len(preset.unet.channel_mult) - 1)


def small_size(settings: Settings) -> list[int]:
    """64 pixels high, and about as wide as the data set's aspect asks for."""
    dataset = DATA_SETS[settings.data]
    if dataset.details:  # its frames may be of any size
        dataset = open_episodes(settings.data, settings.root, fps=settings.fps).dataset
    (height, width), multiple = dataset.aspect, smallest_side(PRESETS[settings.preset])
    return [64, multiple * max(1, round(64 * width / height / multiple))]


def convert(setting: Field, value: str) -> object:
    """The value of a setting from its text, of the kind that it has."""
    if setting.type in (str, str | None):
        return value
    try:
        number = json.loads(value.lower())
    except ValueError:
        number = None
    kinds = (int,) if setting.type in (int, int | None) else (int, float, bool)
    if type(number) not in kinds:
        raise RequestError(f"{setting.name} is {value!r}; expected a "
                           f"{'whole number' if kinds == (int,) else 'number'}")
    return number
