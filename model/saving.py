"""Models from and to disk: original checkpoints, released ones, runs of train.py, bundled files.

A run folder holds `checkpoint.pt`, trained weights and optimizer, and `frozen.pt`, the rest.
"""
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from diffusion_forcing import NoiseSchedule
from dynamicrafter.autoencoder import Autoencoder
from dynamicrafter.checkpoint import (build_unfilled, load_part, load_weights, read_checkpoint,
                                      read_lightning, select)
from dynamicrafter.clip import ImageTower, TextTower
from dynamicrafter.resampler import Resampler
from model.vid2world import PRESETS, Model, ModelConfig, plain_statistics
from support.errors import CheckpointError, UserError, reading
from support.schema import SchemaError, conform
from temporal.norm import NORM_SCOPES
from unet import UNet, UNetConfig, init_action_embedding, load_dynamicrafter, load_vid2world

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"  # the bundled ones
TINY_BASE, TINY_WORLD = CHECKPOINTS / "tiny_base.pt", CHECKPOINTS / "tiny_world.pt"
ARENA_WORLD = CHECKPOINTS / "arena_world.pt"

PREFIXES = {"unet.": "model.diffusion_model.", "autoencoder.": "first_stage_model.",
            "image_tower.": "embedder.model.visual.", "resampler.": "image_proj_model."}


def display_path(path: str | Path, *bundled: Path) -> str:
    """A path for people to read."""
    return f"{Path(path).name} (bundled)" if Path(path) in bundled else str(path)


# --------------------------------------------------------------------------------------------------
# Original and released checkpoints


def from_dynamicrafter(path: str | Path, config: ModelConfig, transfer: str = "mixed") -> Model:
    """A model from DynamiCrafter's checkpoint. Raises CheckpointError."""
    checkpoint = read_lightning(path := checkpoint_file(path))
    unet = load_dynamicrafter(checkpoint, config.unet, transfer, path)
    return build_model_around(checkpoint, config, unet, path)


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
    return build_model_around(checkpoint, config, load_vid2world(checkpoint, unet, path), path)


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
    """A model that continues a world model on other data: its actions, frame rate, size and
    fit are those of `config`, all else stays. Raises CheckpointError."""
    model = load_world_model(path)
    if not model.config.unet.causal:
        raise CheckpointError(f"{path} is a passive run: bundle it first (python -m "
                              "bundled.bundle_checkpoint base)")
    unet = replace_action_embedding(model.unet, config.unet)
    print(f"world from {path}: action embedding {'kept' if unet is model.unet else 'new'}")
    unet.config = replace(unet.config, default_fps=config.unet.default_fps)
    model.unet = unet
    model.config = replace(model.config, unet=unet.config, size=config.size, fit=config.fit)
    model.action_statistics = plain_statistics(config.unet.action_dim)
    return model


def replace_action_embedding(network: UNet, wanted: UNetConfig) -> UNet:
    """The network of a world model for actions of the wanted width: its embedding is new, unless
    the width is what it was."""
    if network.config.action_dim == wanted.action_dim:
        return network
    weights = {name: tensor for name, tensor in network.state_dict().items()
               if not name.startswith("action_emb")}
    other = build_unfilled(UNet, replace(network.config, action_dim=wanted.action_dim,
                                         action_table=False, action_init=wanted.action_init),
                           weights)
    return load_weights(other, weights | init_action_embedding(other), "the world")


def build_model_around(checkpoint: dict[str, Tensor], config: ModelConfig, unet: UNet,
             source: str | Path) -> Model:
    """The parts around a U-Net, from the same checkpoint."""
    model = build_unfilled(Model, config, checkpoint)
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
    schedules differ, and the least of a checkpoint's `scale_arr` is its signal scale.
    """
    content = read_checkpoint(checkpoint_file(path))
    if "preset" in content:
        if content["preset"] not in list(PRESETS):
            raise CheckpointError(f"{path} is of preset {content['preset']!r:.40}; there are "
                                  f"{', '.join(PRESETS)}")
        return content["preset"]
    if "config" in content:  # of a run: the one that is as wide
        width = read_saved(content, checkpoint_file(path)).config.unet.model_channels
        return next((name for name, preset in PRESETS.items()
                     if preset.unet.model_channels == width), "512")
    scale = read_lightning(checkpoint_file(path)).get("scale_arr")
    if scale is None or not len(scale):
        return "512"
    return min(("512", "1024"),
               key=lambda preset: abs(PRESETS[preset].base_scale - float(scale.min())))


def rename_keys(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
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
    """The file itself, a run folder's checkpoint, or the largest that huggingface_hub has left."""
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


@dataclass(frozen=True)
class TrainedOn:
    """The data set that a world model was trained on."""
    name: str | None = None
    root: str | None = None
    fps: float | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of a model. That of a run holds the optimizer as well."""
    config: ModelConfig
    weights: dict[str, Tensor]
    frozen: str | None  # the file next to it with the frozen weights; None: all are here
    sampling: dict[str, object] = field(default_factory=dict)
    data: TrainedOn = TrainedOn()
    step: int = 0


# Beyond these bounds a network takes too long to build, or divides by zero.
BOUNDS = {"num_res_blocks": (1, 16), "layers": (1, 128), "depth": (1, 128), "base_scale": (1e-3, 1),
          "num_frames": (2, 1024), "default_fps": (1, 1000), "dropout": (0, 1),
          "latent_scale": (1e-6, 1e6), "step": (0, 2**53)}
# Of each of these parts a checkpoint holds all or nothing.
PARTS = ("unet.", "resampler.", "image_tower.", "autoencoder.decoder.",
         "autoencoder.post_quant_conv.", "autoencoder.encoder.", "autoencoder.quant_conv.")


def load_model(path: str | Path, content: dict | None = None, kind: type[Model] = Model) -> Model:
    """A model that train.py saved: `path` is its run folder or a checkpoint in it, `content` what
    `read_checkpoint` gives of it, if that is known, `kind` the class that was trained. Raises
    CheckpointError.

    The checkpoint holds what was trained and the name of the file beside it that holds what stayed
    frozen, or else everything.
    """
    path = checkpoint_file(path)
    content = content or read_checkpoint(path)
    saved = read_saved(content, path)
    weights = dict(saved.weights)
    if saved.frozen:
        beside = read_checkpoint(path.parent / saved.frozen)
        base = rename_keys(beside.get("state_dict", {}))  # where a bundled base lies beside it
        learned = [part for part in PARTS if any(name.startswith(part) for name in weights)]
        for name in base.keys() - weights.keys():
            if name.startswith(tuple(learned)):
                raise CheckpointError(f"{path} lacks {name}, which learned, and {saved.frozen} "
                                      "beside it has it as it was before: fetch it again")
        weights = base | beside.get("weights", {}) | weights
    with reading(f"{path} is not a checkpoint of this project: it", CheckpointError):
        model = build_unfilled(kind, saved.config, weights)
        model.schedule = NoiseSchedule(saved.config.base_scale)
    model.sampling, model.trained_on = saved.sampling, asdict(saved.data)
    load_weights(model, weights, source=str(path))
    mean, std, most = model.action_statistics
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()
            and (most > 0).all()):
        raise CheckpointError(f"{path}: action_statistics must be finite means, and standard "
                              "deviations and clipping distances above 0")
    return model


def read_saved(content: dict, path: Path) -> Saved:
    """What a checkpoint says, checked. Raises CheckpointError."""
    config = content.get("config")
    try:
        saved = conform(Saved, content, "", BOUNDS, spare=True)
        for name in missing_sizes(asdict(saved.config), config):
            raise SchemaError(f"config has no {name}")
        check_config(saved.config)
        if saved.frozen is not None and saved.frozen != Path(saved.frozen).name:
            raise SchemaError(f"frozen is {saved.frozen!r:.60}; expected the name of a file beside "
                              "it")
    except UserError as error:
        raise CheckpointError(f"{path} is not a checkpoint of this project: {error}") from None
    return saved


def missing_sizes(config: dict, said: dict) -> Iterator[str]:
    """The numbers of a config that a checkpoint does not say: they are DynamiCrafter's now, and
    were not when it was written. Switches that came later are off where they are not named."""
    for name, value in config.items():
        if isinstance(value, dict) and name in said:
            yield from missing_sizes(value, said[name])
        elif name not in said and type(value) in (int, float, tuple):
            yield name


def check_config(config: ModelConfig) -> None:
    """Refuse what no weight would show. Raises SchemaError."""
    unet, autoencoder = config.unet, config.autoencoder
    multiples = len(unet.channel_mult), len(autoencoder.channel_mult)
    if not all(1 <= length <= 8 for length in multiples):
        raise SchemaError(f"channel_mult has {' and '.join(map(str, multiples))} entries")
    smallest = autoencoder.factor * 2 ** (len(unet.channel_mult) - 1)
    if any(side < 1 or side % smallest for side in config.size):
        raise SchemaError(f"size is {config.size}; expected multiples of {smallest}")
    for value, known in ((config.fit, ("pad", "crop")), (unet.norm_scope, NORM_SCOPES),
                         (unet.action_init, ("pytorch", "he"))):
        if value not in known:
            raise SchemaError(f"config has {value!r:.40}; expected one of {', '.join(known)}")
    if config.resampler.num_frames != unet.num_frames:
        raise SchemaError(f"num_frames is {unet.num_frames} and {config.resampler.num_frames}")
