"""Models from and to disk: original checkpoints, released ones, runs of train.py, and the bundled
files.

A run folder holds `checkpoint.pt`, what learns and the optimizer, and `frozen.pt`, what does not,
written once.
"""
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffusion_forcing import NoiseSchedule
from dynamicrafter.autoencoder import Autoencoder, AutoencoderConfig
from dynamicrafter.checkpoint import (
    load_part,
    load_weights,
    read_checkpoint,
    read_lightning,
    select,
)
from dynamicrafter.clip import ImageTower, ImageTowerConfig, TextTower, TextTowerConfig
from dynamicrafter.resampler import Resampler, ResamplerConfig
from errors import CheckpointError
from model.vid2world import PRESETS, Model, ModelConfig, plain_statistics
from unet import UNet, UNetConfig, carry_over, released_unet, with_actions

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"  # the bundled ones
TINY_BASE, TINY_WORLD = CHECKPOINTS / "tiny_base.pt", CHECKPOINTS / "tiny_world.pt"
ARENA_WORLD = CHECKPOINTS / "arena_world.pt"

PREFIXES = {"unet.": "model.diffusion_model.", "autoencoder.": "first_stage_model.",
            "image_tower.": "embedder.model.visual.", "resampler.": "image_proj_model."}


def bundled_world(data: str | None) -> Path:
    """The bundled world for a data set: the game for a game, or else the robot."""
    return ARENA_WORLD if data == "csgo" else TINY_WORLD


def readable_path(path: str | Path, *bundled: Path) -> str:
    """A path for people to read."""
    return f"{Path(path).name} (bundled)" if Path(path) in bundled else str(path)


# --------------------------------------------------------------------------------------------------
# Original and released checkpoints


def from_dynamicrafter(path: str | Path, config: ModelConfig, transfer: str = "mixed") -> Model:
    """A model from DynamiCrafter's checkpoint. Raises CheckpointError."""
    checkpoint = read_lightning(path := checkpoint_file(path))
    return assemble(checkpoint, config, carry_over(checkpoint, config.unet, transfer, str(path)),
                    path)


def from_vid2world(path: str | Path, config: ModelConfig | None = None) -> Model:
    """A model from a checkpoint that the authors of Vid2World released. Raises CheckpointError."""
    checkpoint = read_lightning(path := checkpoint_file(path))
    # [A, C], or absent
    first = checkpoint.get("model.diffusion_model.action_emb_preprocess.weight")
    if first is None:
        # [A, C]
        first = checkpoint.get("model.diffusion_model.action_emb_proj.0.weight",
                               torch.zeros(0, 0)).T
    if not len(first):
        raise CheckpointError(f"{path} takes no actions: it is a passive video model; post-train "
                              "it first (train.py --base)")
    config = config or replace(PRESETS["512"], unet=UNetConfig(default_fps=3))
    unet = replace(config.unet, action_dim=len(first))
    config = replace(config, all_tokens_unless_full=True, unet=unet)
    return assemble(checkpoint, config, released_unet(checkpoint, unet, str(path)), path)


def is_world(path: str | Path) -> bool:
    """Whether a checkpoint is of a world model: a run of train.py, or one that was released."""
    if "config" in read_checkpoint(checkpoint_file(path)):
        return True
    return any(".conv3d." in name for name in read_lightning(checkpoint_file(path)))


def load_world_model(path: str | Path) -> Model:
    """The network of a world model, from a run of train.py or a released checkpoint."""
    content = read_checkpoint(checkpoint_file(path))
    return load_model(path, content) if "config" in content else from_vid2world(path)


def from_world(path: str | Path, config: ModelConfig) -> Model:
    """A model that goes on from a world model with other data: its actions, frame rate, size and
    fit are those of `config`, all else stays. Raises CheckpointError."""
    model = load_world_model(path)
    if not model.config.unet.causal:
        raise CheckpointError(f"{path} is a passive run: bundle it first (python -m "
                              "bundled.bundle_checkpoint base)")
    unet = with_actions(model.unet, config.unet.action_dim, config.unet.loud_actions)
    print(f"world from {path}: action embedding {'kept' if unet is model.unet else 'new'}")
    unet.config = replace(unet.config, default_fps=config.unet.default_fps)
    model.unet = unet
    model.config = replace(model.config, unet=unet.config, size=config.size, fit=config.fit)
    model.action_statistics = plain_statistics(config.unet.action_dim)
    return model


def assemble(checkpoint: dict[str, Tensor], config: ModelConfig, unet: UNet,
             source: str | Path) -> Model:
    """The parts around a U-Net, from the same checkpoint."""
    with torch.device("meta"):
        model = Model(config)
    model.unet = unet
    model.config = replace(config, unet=unet.config)
    model.autoencoder = load_part(Autoencoder, config.autoencoder, checkpoint, "first_stage_model.",
                                  source)
    model.image_tower = load_part(ImageTower, config.image_tower, checkpoint,
                                  "embedder.model.visual.", source)
    model.resampler = load_part(Resampler, config.resampler, checkpoint, "image_proj_model.",
                                source)
    model.schedule = NoiseSchedule(config.base_scale)
    model.text = torch.zeros(1, config.unet.context_dim)
    model.action_statistics = plain_statistics(model.action_dim)
    if config.text_tower:
        tower = load_part(TextTower, config.text_tower, checkpoint, "cond_stage_model.model.",
                          source)
        with torch.no_grad():
            model.text = tower.empty_caption()
    return model


def preset_of(path: str | Path) -> str:
    """Which of PRESETS a DynamiCrafter checkpoint is of. Raises CheckpointError.

    The small ones say so. The 512 and the 1024 model have the same parameters; their noise
    schedules differ, and the checkpoint's own `scale_arr` falls to the signal scale of its
    schedule.
    """
    content = read_checkpoint(checkpoint_file(path))
    if "preset" in content:
        return content["preset"]
    if "config" in content:  # of a run: the one that is as wide
        width = content["config"]["unet"]["model_channels"]
        return next((name for name, preset in PRESETS.items()
                     if preset.unet.model_channels == width), "512")
    scale = read_lightning(checkpoint_file(path)).get("scale_arr")
    if scale is None or not len(scale):
        return "512"
    return min(("512", "1024"),
               key=lambda preset: abs(PRESETS[preset].base_scale - float(scale.min())))


def by_our_names(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a DynamiCrafter checkpoint as the parameters of a Model."""
    return {ours + name: tensor for ours, theirs in PREFIXES.items()
            for name, tensor in select(checkpoint, theirs).items()}


# --------------------------------------------------------------------------------------------------
# Runs


def save(path: str | Path, content: dict) -> None:
    """Write a checkpoint so that the file is whole at every moment: beside it, then renamed."""
    partial = Path(f"{path}.partial")
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint of a run folder, the largest in one that huggingface_hub has left, or the file
    itself."""
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / "checkpoint.pt").exists():
        return path / "checkpoint.pt"
    found = [file for ending in ("*.ckpt", "*.safetensors") for file in path.rglob(ending)]
    return max(found, key=lambda file: file.stat().st_size, default=path)


def trained_weights(model: Model) -> dict[str, Tensor]:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name in trained}


def frozen_weights(model: Model) -> dict[str, Tensor]:
    trained = trained_weights(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in trained}


def load_model(path: str | Path, content: dict | None = None, kind: type[Model] = Model) -> Model:
    """A model that train.py saved: `path` is its run folder or a checkpoint in it, `content` what
    `read_checkpoint` gives of it, if that is known, `kind` the class that was trained. Raises
    CheckpointError.

    The checkpoint holds what was trained and the name of the file beside it that holds what stayed
    frozen, or else everything.
    """
    path = checkpoint_file(path)
    content = content or read_checkpoint(path)
    try:
        config = read_config(content["config"])
        beside = content["frozen"]
        frozen = read_checkpoint(path.parent / beside) if beside else {"weights": {}}
        if "state_dict" in frozen:  # the parts that stayed as they were in the base
            frozen["weights"] = by_our_names(frozen["state_dict"])
        weights = frozen["weights"] | content["weights"]
        with torch.device("meta"):
            model = kind(config)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a checkpoint of this project ({error})") from None
    model.schedule = NoiseSchedule(config.base_scale)
    model.text = weights.setdefault("text", torch.zeros(1, config.unet.context_dim))
    weights.setdefault("action_statistics", plain_statistics(model.action_dim))
    model.sampling, model.trained_on = content.get("sampling", {}), content.get("data", {})
    return load_weights(model, weights, source=str(path))


def read_config(fields: dict) -> ModelConfig:
    """A ModelConfig from what `dataclasses.asdict` made of one."""
    fields = dict(fields)
    unet = dict(fields["unet"])
    if "fps" in fields:  # checkpoints of the first format say the frame rate here
        unet["default_fps"] = fields.pop("fps")
    return ModelConfig(**fields | {
        "unet": UNetConfig(**unet),
        "autoencoder": AutoencoderConfig(**fields["autoencoder"]),
        "image_tower": ImageTowerConfig(**fields["image_tower"]),
        "text_tower": fields["text_tower"] and TextTowerConfig(**fields["text_tower"]),
        "resampler": ResamplerConfig(**fields["resampler"])})
