"""The whole model: the U-Net and all that turns frames into what it reads, and back.

    frames ──autoencoder──▶ latents ─────────────▶ x, and the anchor's latents beside it ┐
    anchor frame ──image tower──▶ 257 tokens                                             ├▶ U-Net
                 ──resampler──▶ 16 tokens for every frame                                │    │
    the empty caption ──text tower, once──▶ 77 tokens                                    ┘    ▼
                                                                                           velocity

Training and sampling go through the same five methods: `encode`, `image_tokens`, `context`,
`denoise`, `decode`. Another base than DynamiCrafter is another class with these five.
"""
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_forcing import NoiseSchedule
from dynamicrafter.autoencoder import Autoencoder, AutoencoderConfig
from dynamicrafter.clip import ImageTower, ImageTowerConfig, TextTowerConfig, preprocess
from dynamicrafter.resampler import Resampler, ResamplerConfig
from temporal.streaming import Cache
from unet import Context, UNet, UNetConfig


@dataclass(frozen=True)
class ModelConfig:
    """The shape of every part; the defaults are DynamiCrafter-512's."""
    unet: UNetConfig = UNetConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    image_tower: ImageTowerConfig = ImageTowerConfig()
    # None: the caption is one token of zeros
    text_tower: TextTowerConfig | None = TextTowerConfig()
    resampler: ResamplerConfig = ResamplerConfig()
    size: tuple[int, int] = (320, 512)  # height and width in pixels
    fit: str = "pad"  # how frames of another aspect are fitted to it: see `data.fit_frames`
    base_scale: float = 0.7  # of the noise schedule
    # a quirk of the released Vid2World: see `Model.image_context`
    all_tokens_unless_full: bool = False

    @property
    def small(self) -> bool:
        """Whether it is trained here from scratch, rather than inherited from DynamiCrafter."""
        return self.text_tower is None


TINY = ModelConfig(  # frames are 16×20 latents of 4 numbers: fine detail, as of a robot's gripper
    unet=UNetConfig(model_channels=64, channel_mult=(1, 1, 2), num_res_blocks=1,
                    attention_resolutions=(2,), head_channels=16, context_dim=64, dropout=0.0,
                    action_init="he"),
    autoencoder=AutoencoderConfig(channels=32, channel_mult=(1, 2, 2), num_res_blocks=1,
                                  latent_scale=1.0),
    image_tower=ImageTowerConfig(image_size=64, patch_size=16, width=64, layers=2, heads=2,
                                 output_dim=64),
    text_tower=None,
    resampler=ResamplerConfig(dim=64, depth=1, heads=2, head_channels=32, num_queries=4,
                              embedding_dim=64, output_dim=64),
    size=(64, 80))

PRESETS = {
    "512": ModelConfig(),
    "1024": ModelConfig(unet=UNetConfig(default_fps=10), size=(576, 1024), base_scale=0.3),
    "tiny": TINY,
    # 8×10 latents of 8 numbers, all of which attend to each other: large surfaces that move at
    # once, as in a game
    "arena": replace(
        TINY,
        unet=replace(TINY.unet, in_channels=16, out_channels=8, model_channels=96,
                     channel_mult=(1, 1), attention_resolutions=(1,)),
        autoencoder=replace(TINY.autoencoder, channel_mult=(1, 2, 2, 2), latent_channels=8)),
}

# Sampling settings that measurement found best for the small models (evaluation/RESULTS.md).
TWO_STEPS = {"guidance": 1.0, "steps": 2, "eta": 0.0}
TUNED_SAMPLING = {"tiny": TWO_STEPS | {"guidance_levels": (500, 1000)}, "arena": TWO_STEPS}
CLIP_STD = 5.0  # standardised actions are clipped to ± this, in training and in sampling


class Model(nn.Module):
    """Frames in, velocities and frames out: the U-Net with all that it needs. Shapes and units are
    at its five methods."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.sampling: dict = {}  # settings that are best for this model: see `sample.Sampling`
        self.trained_on: dict = {}  # its data set, where that is known: name, root, fps, names
        self.unet = UNet(config.unet)
        self.autoencoder = Autoencoder(config.autoencoder)
        self.image_tower = ImageTower(config.image_tower)
        self.resampler = Resampler(config.resampler)
        self.schedule = NoiseSchedule(config.base_scale)
        self.register_buffer("text", torch.zeros(1, config.unet.context_dim))
        self.register_buffer("action_statistics", plain_statistics(self.action_dim))

    @property
    def device(self) -> torch.device:
        return self.text.device

    @property
    def num_frames(self) -> int:
        """Frames in the longest clip: slots of the window."""
        return self.config.unet.num_frames

    @property
    def action_dim(self) -> int:
        """Numbers in an action; 0 for a passive model."""
        return self.config.unet.action_dim or 0

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a frame's latents."""
        autoencoder, (height, width) = self.config.autoencoder, self.config.size
        factor = autoencoder.factor
        return autoencoder.latent_channels, height // factor, width // factor

    def set_action_statistics(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Standardise actions by this mean and standard deviation [A] from now on; a dimension that
        never varies is left as it is."""
        varies = torch.from_numpy(std > 1e-6 * np.maximum(abs(mean), 1))
        measured = torch.stack([torch.from_numpy(mean), torch.from_numpy(std),
                                torch.full(mean.shape, CLIP_STD)]).float()
        plain = plain_statistics(self.action_dim)
        self.action_statistics = torch.where(varies, measured, plain).to(self.device)

    def standardise(self, actions: Tensor) -> Tensor:
        """Actions [..., A] in the data's own units -> in standard deviations from the mean, clipped
        to ±5. Plain statistics (`plain_statistics`) change nothing."""
        mean, std, most = self.action_statistics
        # a ← (a - μ) / σ
        return ((actions - mean) / std).clamp(-most, most)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels [B, T, 3, H, W] in [-1, 1] -> latents [B, T, C, h, w]; with noise, a sample."""
        return self.autoencoder.encode(pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> pixels [B, T, 3, H, W] in [-1, 1]."""
        return self.autoencoder.decode(latents).clamp(-1, 1)

    def image_tokens(self, anchor: Tensor) -> Tensor:
        """Anchor frames [B, 3, H, W] in [-1, 1] -> tokens [B, slots · L, D]."""
        image = preprocess(anchor, self.config.image_tower.image_size)
        return self.resampler(self.image_tower(image))

    def image_context(self, tokens: Tensor, frames: int) -> Tensor:
        """Share the tokens out: frame i gets the L of slot i, [B, frames, L, D].

        In the released Vid2World every frame gets all tokens, unless the clip fills all slots.
        """
        slots = self.config.resampler.num_frames
        if self.config.all_tokens_unless_full and frames != slots:
            return tokens[:, None].expand(-1, frames, -1, -1)
        return tokens.unflatten(1, (slots, -1))[:, :frames]

    def context(self, tokens: Tensor, slots: Sequence[int]) -> Context:
        """What the cross-attentions attend to, for the frames in these slots of a clip: the caption
        and the anchor's image tokens. The clip ends with the last slot."""
        image = self.image_context(tokens, slots[-1] + 1)[:, list(slots)]  # [B, T, L, D]
        return self.unet.project_context(self.text.expand(len(tokens), -1, -1), image)

    def denoise(self, x: Tensor, k: Tensor, anchor: Tensor, context: Context,
                actions: Tensor | None = None, action_mask: Tensor | None = None,
                cache: Cache | None = None) -> Tensor:
        """The velocity [B, T, C, h, w] of noisy latents x, given the anchor's latents
        [B, 1, C, h, w] and the context; the rest as in `UNet.forward`."""
        x = torch.cat([x, anchor.expand_as(x)], dim=2)  # [B, T, 2 C, h, w]
        return self.unet.forward_projected(x, k, context, None, actions, action_mask, cache)


def plain_statistics(action_dim: int) -> Tensor:
    """Mean, deviation and clipping distance [3, A] with which `standardise` changes nothing."""
    return torch.tensor([0.0, 1.0, float("inf")])[:, None].repeat(1, action_dim)


def to_pixels(frames: Tensor) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float [B, T, 3, H, W] in [-1, 1]."""
    return frames.permute(0, 1, 4, 2, 3).contiguous().float() / 127.5 - 1


def to_frames(pixels: Tensor) -> np.ndarray:
    """float [B, T, 3, H, W] in [-1, 1] -> uint8 [B, T, H, W, 3]."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu().numpy()
