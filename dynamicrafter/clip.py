"""OpenCLIP's image and text towers (ViT-H/14), as far as DynamiCrafter uses them. Frozen.

The image tower turns the anchor frame into 257 tokens, which the resampler condenses. The text
tower is asked one question only, the empty caption, so its answer is a constant and no tokenizer is
needed. Parameters carry the checkpoint's names, below `embedder.model.visual.` and
`cond_stage_model.model.`; `ln_post`, `proj` and `text_projection` are loaded but never used.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ImageTowerConfig:
    image_size: int = 224
    patch_size: int = 14
    width: int = 1280
    layers: int = 32
    heads: int = 16
    output_dim: int = 1024


@dataclass(frozen=True)
class TextTowerConfig:
    context_length: int = 77
    vocab_size: int = 49408
    width: int = 1024
    layers: int = 24
    heads: int = 16
    output_dim: int = 1024


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # [N, L, width]
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))


class ImageTower(nn.Module):
    def __init__(self, config: ImageTowerConfig = ImageTowerConfig()):
        super().__init__()
        self.config = config
        width, patches = config.width, (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, width) * width**-0.5)
        self.proj = nn.Parameter(torch.randn(width, config.output_dim) * width**-0.5)
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, config.heads, config.layers)

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image [N, 3, S, S] (`preprocess`) -> last tokens [N, 1 + patches, width]."""
        x = self.conv1(image).flatten(2).transpose(1, 2)  # [N, patches, width]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer.resblocks:
            x = block(x)
        return x


class TextTower(nn.Module):
    def __init__(self, config: TextTowerConfig = TextTowerConfig()):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        length, width = config.context_length, config.width
        self.positional_embedding = nn.Parameter(torch.randn(length, width) * 0.01)
        self.text_projection = nn.Parameter(torch.randn(width, config.output_dim) * width**-0.5)
        self.transformer = Transformer(config.width, config.heads, config.layers)
        self.ln_final = nn.LayerNorm(config.width)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids [N, 77] -> the penultimate layer's tokens, normalised, [N, 77, width]."""
        x = self.token_embedding(token_ids) + self.positional_embedding
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for block in self.transformer.resblocks[:-1]:
            x = block(x, mask=future)
        return self.ln_final(x)

    def empty_caption(self) -> Tensor:
        """The tokens of the empty caption, [77, width]: start, end, padding."""
        ids = torch.zeros(1, self.config.context_length, dtype=torch.long,
                          device=self.positional_embedding.device)
        ids[0, :2] = torch.tensor([49406, 49407])
        return self(ids)[0]


def preprocess(image: Tensor, size: int = 224) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1] to what the image tower reads, [N, 3, size, size]: a blur if
    an axis shrinks (against aliasing), bicubic resizing, CLIP's mean and standard deviation."""
    H, W = image.shape[-2:]
    if H > size or W > size:
        image = blur(blur(image, axis=2, factor=H / size), axis=3, factor=W / size)
    image = F.interpolate(image, (size, size), mode="bicubic", align_corners=True)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=image.device).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=image.device).view(3, 1, 1)
    return ((image + 1) / 2 - mean) / std


def blur(image: Tensor, axis: int, factor: float) -> Tensor:
    """Gaussian blur of [N, C, H, W] along one axis, for shrinking by `factor`; borders reflect."""
    sigma = max((factor - 1) / 2, 0.001)
    taps = int(max(4 * sigma, 3)) // 2 * 2 + 1
    offsets = torch.arange(taps, device=image.device) - taps // 2
    kernel = (-(offsets**2) / (2 * sigma**2)).exp()
    kernel = kernel / kernel.sum()
    side = taps // 2
    pad, shape = ((0, 0, side, side), (taps, 1)) if axis == 2 else ((side, side, 0, 0), (1, taps))
    weight = kernel.view(1, 1, *shape).expand(image.shape[1], 1, *shape)
    return F.conv2d(F.pad(image, pad, mode="reflect"), weight, groups=image.shape[1])

