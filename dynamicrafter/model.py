"""The whole model: the U-Net and everything around it that turns frames into what it reads, and back.

    frames ──autoencoder──▶ latents ──────────────────────▶ x, and the anchor's latents beside it ┐
    anchor frame ──image tower──▶ 257 tokens ──resampler──▶ 16 tokens for every frame             ├▶ U-Net ──▶ velocity
    the empty caption ──text tower, once──▶ 77 tokens                                             ┘

Training and sampling go through the same five methods: `encode`, `image_tokens`, `context`, `denoise`, `decode`.
"""
import ctypes
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from causal_conv import Cache
from diffusion_forcing import NoiseSchedule
from dynamicrafter.autoencoder import Autoencoder, AutoencoderConfig, load_autoencoder
from dynamicrafter.clip import ImageTower, ImageTowerConfig, TextTowerConfig, load_image_tower, load_text_tower, \
    preprocess
from dynamicrafter.resampler import Resampler, ResamplerConfig, load_resampler
from unet import CheckpointError, Context, UNet, UNetConfig, load_dynamicrafter, load_vid2world, load_weights, read_checkpoint, \
    read_lightning, select


@dataclass(frozen=True)
class ModelConfig:
    unet: UNetConfig = UNetConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    image_tower: ImageTowerConfig = ImageTowerConfig()
    text_tower: TextTowerConfig | None = TextTowerConfig()  # None: the caption is a single token that says nothing
    resampler: ResamplerConfig = ResamplerConfig()
    size: tuple[int, int] = (320, 512)  # height and width in pixels
    base_scale: float = 0.7  # of the noise schedule
    fps: int = 24  # the frame rate that the network is told
    all_tokens_unless_full: bool = False  # a quirk of the released Vid2World: see `Model.image_context`


PRESETS = {
    "512": ModelConfig(),
    "1024": ModelConfig(unet=UNetConfig(default_fps=10), size=(576, 1024), base_scale=0.3),
    "tiny": ModelConfig(
        unet=UNetConfig(model_channels=64, channel_mult=(1, 1, 2), num_res_blocks=1, attention_resolutions=(2,), head_channels=16,
                        context_dim=64, dropout=0.0),
        autoencoder=AutoencoderConfig(channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, latent_scale=1.0),
        image_tower=ImageTowerConfig(image_size=64, patch_size=16, width=64, layers=2, heads=2, output_dim=64),
        text_tower=None,
        resampler=ResamplerConfig(dim=64, depth=1, heads=2, head_channels=32, num_queries=4, embedding_dim=64,
                                  output_dim=64),
        size=(64, 80)),
}


class Model(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet)
        self.autoencoder = Autoencoder(config.autoencoder)
        self.image_tower = ImageTower(config.image_tower)
        self.resampler = Resampler(config.resampler)
        self.schedule = NoiseSchedule(config.base_scale)
        self.register_buffer("text", torch.zeros(1, config.unet.context_dim))

    @property
    def device(self) -> torch.device:
        return self.text.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a frame's latents."""
        factor = self.config.autoencoder.factor
        return self.config.autoencoder.latent_channels, self.config.size[0] // factor, self.config.size[1] // factor

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels [B, T, 3, H, W] in [-1, 1] -> latents [B, T, C, h, w]; with noise, a sample of the posterior."""
        return self.autoencoder.encode(pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> pixels [B, T, 3, H, W] in [-1, 1]."""
        return self.autoencoder.decode(latents).clamp(-1, 1)

    def image_tokens(self, anchor: Tensor) -> Tensor:
        """Anchor frames [B, 3, H, W] in [-1, 1] -> tokens [B, slots · L, D]."""
        return self.resampler(self.image_tower(preprocess(anchor, self.config.image_tower.image_size)))

    def image_context(self, tokens: Tensor, frames: int) -> Tensor:
        """Share the tokens out: frame i gets the L of slot i, [B, frames, L, D].

        In the released Vid2World every frame gets all tokens, unless the clip fills all slots.
        """
        slots = self.config.resampler.num_frames
        if self.config.all_tokens_unless_full and frames != slots:
            return tokens[:, None].expand(-1, frames, -1, -1)
        return tokens.unflatten(1, (slots, -1))[:, :frames]

    def context(self, tokens: Tensor, frames: int, first: int = 0, alternatives: int = 1) -> Context:
        """What frames `first` .. `frames` - 1 of a clip ask of the caption and the anchor image, whose tokens these are.

        alternatives  how many versions of the last frame there will be side by side
        """
        image = self.image_context(tokens, frames)[:, first:]
        image = torch.cat([image] + [image[:, -1:]] * (alternatives - 1), dim=1)
        return self.unet.context(self.text.expand(len(tokens), -1, -1), image)

    def denoise(self, x: Tensor, k: Tensor, anchor: Tensor, context: Context, actions: Tensor | None = None,
                action_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The velocity [B, T, C, h, w] of a clip x, given its anchor's latents [B, 1, C, h, w] and the context."""
        fps = torch.full(x.shape[:1], self.config.fps, device=x.device)
        x = torch.cat([x, anchor.expand_as(x)], dim=2)
        return self.unet(x, k, context, None, fps, actions, action_mask, cache)


def keep_freed_memory() -> None:
    """On Linux: do not hand memory back to the system after every operation, which would have to zero it anew for the next.

    About a fifth of a pass on the CPU would be spent on that. Other systems are left as they are.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap as well
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the heap
        libc.mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads, or each that comes and goes keeps its own


def return_freed_memory() -> None:
    """On Linux: hand back what was kept. In play, worlds of all lengths come and go, and leave ever more gaps between them."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def to_pixels(frames: Tensor) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float [B, T, 3, H, W] in [-1, 1]."""
    return frames.permute(0, 1, 4, 2, 3).contiguous().float() / 127.5 - 1


def to_frames(pixels: Tensor) -> np.ndarray:
    """float [B, T, 3, H, W] in [-1, 1] -> uint8 [B, T, H, W, 3]."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------
# From and to disk


def from_dynamicrafter(path: str | Path, config: ModelConfig, transfer: str = "mixed") -> Model:
    """A model from DynamiCrafter's checkpoint, its U-Net as `load_dynamicrafter` says. Raises CheckpointError."""
    return assemble(path, config, load_dynamicrafter(path, config.unet, transfer))


def from_vid2world(path: str | Path, config: ModelConfig | None = None) -> Model:
    """A model from a checkpoint that the authors of Vid2World released. Raises CheckpointError."""
    weights = read_lightning(path)
    first = weights.get("model.diffusion_model.action_emb_preprocess.weight")  # [A, C], or absent
    if first is None:
        first = weights.get("model.diffusion_model.action_emb_proj.0.weight", torch.zeros(0, 0)).T  # [C, A] -> [A, C]
    if not len(first):
        raise CheckpointError(f"{path} takes no actions: it is a passive video model; post-train it first (train.py --base)")
    config = config or replace(PRESETS["512"], fps=3)
    config = replace(config, all_tokens_unless_full=True, unet=replace(config.unet, action_dim=len(first), default_fps=3))
    return assemble(path, config, load_vid2world(path, config.unet))


def assemble(path: str | Path, config: ModelConfig, unet: UNet) -> Model:
    """The parts around a U-Net, from the same checkpoint."""
    with torch.device("meta"):
        model = Model(config)
    model.unet = unet
    model.config = replace(config, unet=unet.config)
    model.autoencoder = load_autoencoder(path, config.autoencoder)
    model.image_tower = load_image_tower(path, config.image_tower)
    model.resampler = load_resampler(path, config.resampler)
    model.schedule = NoiseSchedule(config.base_scale)
    if config.text_tower:
        with torch.no_grad():
            model.text = load_text_tower(path, config.text_tower).empty_caption()
    else:
        model.text = torch.zeros(1, config.unet.context_dim)
    return model


PREFIXES = {"unet.": "model.diffusion_model.", "autoencoder.": "first_stage_model.",  # our names -> a checkpoint's
            "image_tower.": "embedder.model.visual.", "resampler.": "image_proj_model."}


def by_our_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a DynamiCrafter checkpoint as the parameters of a Model."""
    return {ours + name: tensor for ours, theirs in PREFIXES.items() for name, tensor in select(state_dict, theirs).items()}


CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"  # the bundled ones
TINY_BASE, TINY_WORLD = CHECKPOINTS / "tiny_base.pt", CHECKPOINTS / "tiny_world.pt"


def named(path: str | Path, bundled: Path) -> str:
    """A path for people to read."""
    return f"{bundled.name} (bundled)" if Path(path) == bundled else str(path)


def preset_of(path: str | Path) -> str:
    """Which of PRESETS a DynamiCrafter checkpoint is of: the small ones say so, the original is "512"."""
    return read_checkpoint(path).get("preset", "512")


def save(path: str | Path, content: dict) -> None:
    """Write a checkpoint so that the file at `path` is whole at every moment: beside it first, then renamed."""
    partial = Path(f"{path}.partial")
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def trained_weights(model: Model) -> dict[str, Tensor]:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name in trained}


def frozen_weights(model: Model) -> dict[str, Tensor]:
    trained = trained_weights(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in trained}


def load_model(path: str | Path) -> Model:
    """A model that train.py saved: `path` is its run folder or a checkpoint in it. Raises CheckpointError.

    The checkpoint holds what was trained and the name of the file beside it that holds what stayed frozen.
    """
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    content = read_checkpoint(path)
    try:
        fields = content["config"]
        config = ModelConfig(**fields | {
            "unet": UNetConfig(**fields["unet"]), "autoencoder": AutoencoderConfig(**fields["autoencoder"]),
            "image_tower": ImageTowerConfig(**fields["image_tower"]),
            "text_tower": fields["text_tower"] and TextTowerConfig(**fields["text_tower"]),
            "resampler": ResamplerConfig(**fields["resampler"])})
        frozen = read_checkpoint(path.parent / content["frozen"])
        if "state_dict" in frozen:  # the parts that stayed as they were in the base
            frozen["weights"] = by_our_names(frozen["state_dict"])
        weights = frozen["weights"] | content["weights"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of this project ({error})") from None
    with torch.device("meta"):
        model = Model(config)
    model.schedule = NoiseSchedule(config.base_scale)
    model.text = weights.setdefault("text", torch.zeros(1, config.unet.context_dim))
    return load_weights(model, weights, source=str(path))
