"""The DynamiCrafter U-Net, passive or causal, and how to load its weights.

The network sees a clip of T frames, each at a noise level of its own, and predicts every frame's velocity.
Most of it is Stable Diffusion's image U-Net, which treats each frame as a picture of its own; in between
sit the temporal layers, the only places where frames meet:

    x, 8 channels: 4 noisy latents, 4 latents of the anchor (the clip's first frame, the same for all frames)
     │
    3×3 conv → temporal transformer                                          (`init_attn`)
     │
    levels down → middle → levels up, each level a few times:
     │        ResBlock             3×3 convolutions per frame, then temporal convolutions   (causal_conv.py)
     │        SpatialTransformer   self-attention within a frame, cross-attention to text and anchor image
     │        TemporalTransformer  attention across frames at every pixel                   (causal_attention.py)
     │
    GroupNorm → SiLU → 3×3 conv → velocity, 4 channels

Noise level, frame rate and action reach every ResBlock as one vector per frame. That the noise level is a vector
*per frame* and not per clip is all that diffusion forcing asks of the network (diffusion_forcing.py);
the action is added to it (action_guidance.py).

`UNetConfig()` is DynamiCrafter-512 itself. `causal=True` makes it a world model; the parameters stay the same
but for `action_emb_proj`. Names are DynamiCrafter's to the letter (its misspelt `temopral_conv` included), so
loading is `load_state_dict` and nothing is renamed.

Inside, frames ride in the batch dimension, [B·T, C, H, W]; only temporal layers unfold them.
"""
import math
import pickle
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from action_guidance import MultiHotEmbedding, action_embedding
from causal_attention import Attention, FeedForward, PointwiseConv1d, TemporalTransformer, merge_heads, split_heads
from causal_conv import Cache, TemporalConv, TemporalConvBlock, transfer_weights


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int = 8  # noisy latents and the anchor's latents
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)  # downsampling factors that have transformers
    head_channels: int = 64
    context_dim: int = 1024
    num_frames: int = 16  # longest clip, and number of slots of image tokens
    default_fps: int = 24
    dropout: float = 0.1
    action_dim: int | None = None  # None: no action input
    causal: bool = False
    norm_scope: str = "clip"  # "clip", "past" or "frame": see causal_conv.py
    height_causal_out: bool = False  # a quirk of the released checkpoints: see HeightCausalConv2d
    action_table: bool = False  # multi-hot actions enter through a table, as in the released CS:GO checkpoint


# ---------------------------------------------------------------------------------------------------------
# Layers that treat every frame as a picture


def zero_init(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def sinusoidal_embedding(value: Tensor, dim: int) -> Tensor:
    """[...] -> [..., dim]: cosines, then sines, at frequencies 1 .. 1/10000 (Vaswani et al. 2017, section 3.5)."""
    half = dim // 2
    frequencies = (-math.log(10000) * torch.arange(half, device=value.device) / half).exp()
    angles = value[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """Two 3×3 convolutions per frame around the frame's embedding, then temporal convolutions across frames."""

    def __init__(self, channels_in: int, channels: int, config: UNetConfig):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels_in), nn.SiLU(),
                                       nn.Conv2d(channels_in, channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * config.model_channels, channels))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Dropout(config.dropout),
                                        zero_init(nn.Conv2d(channels, channels, 3, padding=1)))
        self.skip_connection = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)
        self.temopral_conv = TemporalConvBlock(channels, config.causal, config.norm_scope)

    def forward(self, x: Tensor, emb: Tensor, cache: Cache | None = None) -> Tensor:  # [B·T, C, H, W], [B, T, E]
        h = self.in_layers(x) + self.emb_layers(emb).flatten(0, 1)[:, :, None, None]
        h = self.skip_connection(x) + self.out_layers(h)
        return across_frames(self.temopral_conv, h, emb.shape[1], cache)


def across_frames(layer: nn.Module, h: Tensor, frames: int, cache: Cache | None) -> Tensor:
    """Run a temporal layer: [B·T, C, H, W] -> [B, C, T, H, W] -> layer -> [B·T, C, H, W]."""
    return layer(h.unflatten(0, (-1, frames)).transpose(1, 2), cache).transpose(1, 2).flatten(0, 1)


Context = dict[nn.Module, tuple[Tensor, ...]]  # cross-attention -> its keys and values


class CrossAttention(nn.Module):
    """Every pixel asks two sources, the caption and the anchor image; the answers are added.

    Text is the same for all frames of a clip, so they ask it together; image tokens are per frame.
    """

    def __init__(self, channels: int, heads: int, head_channels: int, context_dim: int):
        super().__init__()
        inner = heads * head_channels
        self.heads = heads
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_k_ip = nn.Linear(context_dim, inner, bias=False)
        self.to_v_ip = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, channels))

    def project(self, text: Tensor, image: Tensor) -> tuple[Tensor, ...]:  # [B, 77, D], [B, T, L, D]
        """Keys and values of both sources. They do not depend on x: one projection serves all denoising steps."""
        image = image.flatten(0, 1)  # [B·T, L, D]
        return self.to_k(text), self.to_v(text), self.to_k_ip(image), self.to_v_ip(image)

    def forward(self, x: Tensor, context: tuple[Tensor, ...]) -> Tensor:  # [B·T, HW, C]
        k_text, v_text, k_image, v_image = context
        q = self.to_q(x)
        q_of_clip = q.view(len(k_text), -1, q.shape[-1])  # [B, T·HW, heads·d]
        from_text = self.attend(q_of_clip, k_text, v_text).view_as(q)
        return self.to_out(from_text + self.attend(q, k_image, v_image))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return merge_heads(F.scaled_dot_product_attention(*(split_heads(x, self.heads) for x in (q, k, v))))


class SpatialBlock(nn.Module):
    def __init__(self, channels: int, heads: int, head_channels: int, context_dim: int):
        super().__init__()
        self.attn1 = Attention(channels, heads, head_channels)
        self.attn2 = CrossAttention(channels, heads, head_channels, context_dim)
        self.ff = FeedForward(channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context[self.attn2])
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Attention among the pixels of a frame and to the context, as a residual that starts at zero."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        heads = channels // config.head_channels
        inner = heads * config.head_channels
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList([SpatialBlock(inner, heads, config.head_channels, config.context_dim)])
        self.proj_out = zero_init(nn.Linear(inner, channels))

    def forward(self, x: Tensor, context: Context) -> Tensor:  # [B·T, C, H, W]
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [B·T, HW, C]
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h).transpose(1, 2).view_as(x)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class HeightCausalConv2d(nn.Conv2d):
    """The released Vid2World's output convolution, which takes image *height* for time.

    It pads two rows on top and none below. The released weights were trained around that, so they need it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 2, 0)))


# ---------------------------------------------------------------------------------------------------------
# The network


class UNet(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute activations in the backward pass: less memory, more time
        width = config.model_channels
        embedding = 4 * width

        self.time_embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.fps_embedding = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(),
                                           zero_init(nn.Linear(embedding, embedding)))
        if config.action_dim and config.action_table:
            self.action_emb_preprocess = MultiHotEmbedding(config.action_dim, width)
            self.action_emb_proj = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        elif config.action_dim:
            self.action_emb_preprocess = nn.Identity()
            self.action_emb_proj = action_embedding(config.action_dim, width)

        def temporal_transformer(channels: int) -> TemporalTransformer:
            heads = channels // config.head_channels
            return TemporalTransformer(channels, heads, config.head_channels, config.causal, config.norm_scope)

        def block(channels_in: int, channels: int, factor: int) -> nn.ModuleList:
            layers = nn.ModuleList([ResBlock(channels_in, channels, config)])
            if factor in config.attention_resolutions:
                layers += [SpatialTransformer(channels, config), temporal_transformer(channels)]
            return layers

        # Down. Every block's output is a skip connection, so remember how wide each is.
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(config.in_channels, width, 3, padding=1)])])
        self.init_attn = nn.ModuleList([TemporalTransformer(
            width, 8, config.head_channels, config.causal, config.norm_scope, projection=PointwiseConv1d)])
        channels, skips = width, [width]
        for level, multiplier in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(block(channels, multiplier * width, factor=2**level))
                channels = multiplier * width
                skips.append(channels)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)

        self.middle_block = nn.ModuleList([ResBlock(channels, channels, config), SpatialTransformer(channels, config),
                                           temporal_transformer(channels), ResBlock(channels, channels, config)])

        # Up. Every block takes one skip connection back.
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                layers = block(channels + skips.pop(), multiplier * width, factor=2**level)
                channels = multiplier * width
                if level > 0 and i == config.num_res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(layers)

        out = HeightCausalConv2d(channels, config.out_channels, 3) if config.height_causal_out else \
            nn.Conv2d(channels, config.out_channels, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), zero_init(out))

    def forward(self, x: Tensor, k: Tensor, text: Tensor | Context, image: Tensor | None, fps: Tensor | None = None,
                actions: Tensor | None = None, action_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Predict the velocity of every frame.

        x            [B, T, in, H, W]  noisy latents and the anchor's; H and W multiples of 2^(levels - 1)
        k            [B] or [B, T]     noise level, 0..999
        text         [B, 77, D]        the caption's tokens, or what `context` made of text and image
        image        [B, T, L, D]      L tokens of the anchor image for each frame; None if text is a context
        fps          [B]               frames per second; None means the config's default_fps
        actions      [B, T, A]         the action that led to each frame (`align_actions`); None adds nothing
        action_mask  [B, T]            1 keeps and 0 hides a frame's action; None keeps all
        cache                          memory of the frames before; x then holds only new ones: see `Cache`

        returns      [B, T, out, H, W]. Raises ValueError for shapes that do not fit.
        """
        self.check_shapes(x, k, image, actions, cache)
        B, T = x.shape[:2]
        emb = self.embed(k.view(B, -1).expand(B, T), fps, actions, action_mask)  # [B, T, E]
        context = text if image is None else self.context(text, image)

        h, skips = x.flatten(0, 1), []
        for i, block in enumerate(self.input_blocks):
            h = self.run(block, h, emb, context, cache)
            if i == 0:
                h = self.run(self.init_attn, h, emb, context, cache)
            skips.append(h)
        h = self.run(self.middle_block, h, emb, context, cache)
        for block in self.output_blocks:
            h = self.run(block, torch.cat([h, skips.pop()], dim=1), emb, context, cache)
        if cache is not None:
            cache.frames += T - cache.alternatives
        return self.out(h).unflatten(0, (B, T))

    def context(self, text: Tensor, image: Tensor) -> Context:
        """Keys and values of text [B, 77, D] and image tokens [B, T, L, D] in every cross-attention."""
        return {layer: layer.project(text, image) for layer in self.modules() if isinstance(layer, CrossAttention)}

    def embed(self, k: Tensor, fps: Tensor | None, actions: Tensor | None, action_mask: Tensor | None) -> Tensor:
        """Noise level, frame rate and action of every frame, in one vector each: [B, T, 4·model_channels]."""
        width = self.config.model_channels
        emb = self.time_embed(sinusoidal_embedding(k, width))
        if fps is None:
            fps = torch.full(k.shape[:1], self.config.default_fps, device=k.device)
        emb = emb + self.fps_embedding(sinusoidal_embedding(fps, width))[:, None]
        if actions is not None:
            action = self.action_emb_proj(self.action_emb_preprocess(actions))
            emb = emb + (action if action_mask is None else action * action_mask[..., None])
        return emb

    def run(self, layers: nn.ModuleList, h: Tensor, emb: Tensor, context: Context, cache: Cache | None) -> Tensor:
        """One block's layers in turn, each with what it needs."""
        for layer in layers:
            if isinstance(layer, ResBlock):
                inputs = (h, emb, cache)
            elif isinstance(layer, SpatialTransformer):
                inputs = (h, context)
            elif isinstance(layer, TemporalTransformer):
                inputs = (layer, h, emb.shape[1], cache)
                layer = across_frames
            else:
                inputs = (h,)
            h = checkpoint(layer, *inputs, use_reentrant=False) if self.checkpointing else layer(*inputs)
        return h

    def check_shapes(self, x: Tensor, k: Tensor, image: Tensor | None, actions: Tensor | None,
                     cache: Cache | None) -> None:
        B, T, C, H, W = x.shape
        factor = 2 ** (len(self.config.channel_mult) - 1)
        if C != self.config.in_channels or H % factor or W % factor:
            raise ValueError(f"x is {list(x.shape)}; expected [B, T, {self.config.in_channels}, H, W] "
                             f"with H and W multiples of {factor}")
        if k.shape not in [(B,), (B, T)]:
            raise ValueError(f"noise level k is {list(k.shape)}; expected [{B}] or [{B}, {T}]")
        if image is not None and image.shape[:2] != (B, T):
            raise ValueError(f"image is {list(image.shape)}; expected tokens for each frame, [{B}, {T}, L, D]")
        if actions is not None and actions.shape != (B, T, self.config.action_dim or 0):
            raise ValueError(f"actions is {list(actions.shape)}; expected [{B}, {T}, {self.config.action_dim or 0}] "
                             "(a network without action_dim takes none)")
        if cache is not None:
            if not self.config.causal:
                raise ValueError("a network that looks ahead cannot remember: a cache needs causal=True")
            if not cache.frames and T == cache.alternatives:
                raise ValueError("the cache is empty: append a frame before reading it")
            room = cache.capacity - cache.frames + (cache.alternatives > 0)
            if T > room:
                raise ValueError(f"{T} frames do not fit into the cache, which has room for {room}")


# ---------------------------------------------------------------------------------------------------------
# Loading


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says what was found and what to do."""


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint file without ever executing what is in it, its tensors left on disk until they are used.

    Raises CheckpointError if the file is missing, damaged, or holds anything but tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint at {path}") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} holds more than tensors and plain values; unpickling it would execute code "
                              "from the file, so it is refused") from None
    except (RuntimeError, OSError, EOFError, ValueError, zipfile.BadZipFile):
        raise CheckpointError(f"{path} is no PyTorch checkpoint, or it is truncated: fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dictionary")
    return content


def read_lightning(path: str | Path) -> dict[str, Tensor]:
    """The weights of a DynamiCrafter or released Vid2World checkpoint: full name -> tensor.

    Raises CheckpointError as `read_checkpoint` does, and for the 256 model.
    """
    weights = read_checkpoint(path).get("state_dict")
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path} has no 'state_dict': it is not a DynamiCrafter or Vid2World checkpoint")
    if any(name.endswith("attn2.alpha") or "framestride_embed" in name for name in weights):
        raise CheckpointError(f"{path} is DynamiCrafter-256, which predicts noise in place of velocity and weighs its "
                              "image attention; use the 512 or the 1024 model")
    return weights


def select(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a checkpoint whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def load_weights(network: nn.Module, weights: dict[str, Tensor], source: str) -> nn.Module:
    """`load_state_dict` whose complaints a person can read; nothing missing, left over or misshapen is accepted.

    The network takes the tensors over as they are (in float32) and copies none, so it may be built on the meta
    device, and loading needs no memory beyond what is kept.
    """
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in weights]
    unexpected = [name for name in weights if name not in wanted]
    misshapen = [f"{name} {list(weights[name].shape)} for {list(wanted[name].shape)}" for name in wanted
                 if name in weights and weights[name].shape != wanted[name].shape]
    problems = [f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" for what, names
                in [("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)] if names]
    if problems:
        raise CheckpointError(f"{source} does not fit this {type(network).__name__}: " + "; ".join(problems))
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return network


def carry_over(weights: dict[str, Tensor], config: UNetConfig, transfer: str, source: str) -> UNet:
    """Build a U-Net from the weights of a passive one; made causal if `config.causal`, steered if `config.action_dim`."""
    with torch.device("meta"):
        network = UNet(config)
    done = [f"{sum(p.numel() for p in network.parameters()) / 1e9:.2f} B parameters"]

    if config.causal:
        kernels = [f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, TemporalConv)]
        weights = {name: transfer_weights(tensor, transfer) if name in kernels else tensor
                   for name, tensor in weights.items()}
        done.append(f"{len(kernels)} temporal kernels carried over by {transfer!r}")
    if config.action_dim:
        for part in (network.action_emb_preprocess, network.action_emb_proj):
            for layer in part.modules():
                if hasattr(layer, "reset_parameters"):
                    layer.to_empty(device="cpu").reset_parameters()
        new = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("action_emb")}
        weights = weights | new
        done.append("action embedding new")

    load_weights(network, weights, source)
    print(f"U-Net from {source}: {', '.join(done)}")
    return network


def load_dynamicrafter(path: str | Path, config: UNetConfig, transfer: str = "mixed") -> UNet:
    """DynamiCrafter's U-Net (512 or 1024) from its original checkpoint; made causal if `config.causal`.

    transfer  how temporal kernels are carried over: a method of `causal_conv.transfer_weights`

    Everything is loaded but the action embedding, which DynamiCrafter lacks and which starts anew. Says in one
    line what it did. Raises CheckpointError for a file that does not fit.
    """
    weights = select(read_lightning(path), "model.diffusion_model.")
    if any(".conv3d." in name for name in weights):
        raise CheckpointError(f"{path} is a Vid2World checkpoint, already causal: read it with load_vid2world")
    return carry_over(weights, config, transfer, source=str(path))


def load_vid2world(path: str | Path, config: UNetConfig) -> UNet:
    """The U-Net of a checkpoint that the authors of Vid2World released, which differs from ours in three things.

    Its norms see the whole clip (the default norm_scope, "clip"), so it is not strictly causal; its output
    convolution is `HeightCausalConv2d`; and it wants all image tokens at every frame unless the clip is of full
    length, which is for the caller to provide. Raises CheckpointError for a file that does not fit.
    """
    weights = select(read_lightning(path), "model.diffusion_model.")
    # Their causal convolutions wrap PyTorch's, which puts an infix into the names.
    weights = {name.replace(".conv3d.", ".").replace(".conv2d.", "."): tensor for name, tensor in weights.items()}
    with torch.device("meta"):
        network = UNet(replace(config, causal=True, height_causal_out=True,
                               action_table="action_emb_preprocess.weight" in weights))
    return load_weights(network, weights, source=str(path))
