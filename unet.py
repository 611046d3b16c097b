"""The DynamiCrafter U-Net, passive or causal, and how to load its weights.

The network sees a clip of T frames, each at a noise level of its own, and predicts every frame's
velocity. Most of it is Stable Diffusion's image U-Net, which treats each frame as a picture of its
own; in between sit the temporal layers, the only places where frames meet:

    x, 8 channels: 4 noisy latents, 4 latents of the anchor, the clip's first frame
     │
    3×3 conv → temporal transformer                                (`init_attn`)
     │
    levels down → middle → levels up, each level a few times:
     │        ResBlock             3×3 convolutions per frame, then temporal ones (causal_conv.py)
     │        SpatialTransformer   attention within a frame, and to the caption and anchor image
     │        TemporalTransformer  attention across frames at every pixel (causal_attention.py)
     │
    GroupNorm → SiLU → 3×3 conv → velocity, 4 channels

In DynamiCrafter-512 the levels are 320, 640, 1280 and 1280 channels wide, on 40×64, 20×32, 10×16
and 5×8 pixels; 22 residual blocks carry 88 temporal convolutions.

Noise level, frame rate and action reach every ResBlock as one vector per frame. That the noise
level is a vector *per frame* is all that diffusion forcing asks of the network
(diffusion_forcing.py); the action is added to it (action_guidance.py).

`UNetConfig()` is DynamiCrafter-512 itself, and `causal=True` makes it a world model. Its parameters
stay the same except for `action_emb_proj`, and have DynamiCrafter's names to the letter (its
misspelt `temopral_conv` included): loading is `load_state_dict`, and nothing is renamed.

Frames stand in the batch dimension, [B·T, C, H, W]; only temporal layers unfold them.

    python unet.py        shows which outputs move when the last frame changes

Paper: preliminaries 3, causalization 4.1, model B.2.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from action_guidance import MultiHotEmbedding, action_embedding
from causal_attention import Attention, PointwiseConv1d, TemporalTransformer
from causal_conv import TemporalConv, TemporalConvBlock, transfer_weights
from dynamicrafter.checkpoint import UNET, build_unfilled, load_weights, read_lightning, select
from dynamicrafter.layers import (CrossAttention, Downsample, FeedForward, HeightCausalConv2d,
                                  InputConv, Upsample, sinusoidal_embedding, zero_init)
from support.errors import CheckpointError
from temporal.norm import NORM_SCOPES
from temporal.streaming import Cache


@dataclass(frozen=True)
class UNetConfig:
    """The shape of the network; the defaults are DynamiCrafter-512's."""
    in_channels: int = 8  # noisy latents and the anchor's latents
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)  # downsampling factors with transformers
    head_channels: int = 64
    context_dim: int = 1024
    num_frames: int = 16  # longest clip, and number of slots of image tokens
    default_fps: int = 24  # the frame rate that the network is told
    dropout: float = 0.1
    action_dim: int | None = None  # None: no action input
    causal: bool = False
    norm_scope: str = "clip"  # "clip", "past" or "frame": see temporal/norm.py
    height_causal_out: bool = False  # a quirk of the released checkpoints: see HeightCausalConv2d
    action_table: bool = False  # multi-hot actions enter by a table: the released CS:GO checkpoint
    action_init: str = "pytorch"  # of a new action embedding: "pytorch" or "he", see HeLinear


# What the cross-attentions attend to: for each of them its keys and values of the caption and of
# the anchor's image tokens. They are the same at all denoising steps, so they are projected once.
Context = dict[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Conditions:
    """What every layer gets next to its input."""
    emb: Tensor  # [B, T, 4·model_channels]: noise level, frame rate and action of every frame
    context: Context
    cache: Cache | None  # of the frames before

    @property
    def frames(self) -> int:
        return self.emb.shape[1]


# --------------------------------------------------------------------------------------------------
# The three kinds of layer


class ResBlock(nn.Module):
    """Two 3×3 convolutions around the frame's embedding, then temporal convolutions."""

    def __init__(self, channels_in: int, channels: int, config: UNetConfig):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels_in), nn.SiLU(),
            nn.Conv2d(channels_in, channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * config.model_channels, channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Dropout(config.dropout),
            zero_init(nn.Conv2d(channels, channels, 3, padding=1)))
        self.skip_connection = nn.Identity()
        if channels_in != channels:
            self.skip_connection = nn.Conv2d(channels_in, channels, 1)
        self.temopral_conv = TemporalConvBlock(channels, config.causal, config.norm_scope)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:  # [B·T, C, H, W]
        h = self.in_layers(x) + self.emb_layers(conditions.emb).flatten(0, 1)[:, :, None, None]
        h = self.skip_connection(x) + self.out_layers(h)
        clip = h.unflatten(0, (-1, conditions.frames)).transpose(1, 2)  # [B, C, T, H, W]
        clip = self.temopral_conv(clip, conditions.cache)
        return clip.transpose(1, 2).flatten(0, 1)  # [B·T, C, H, W]


class SpatialBlock(nn.Module):
    """Self-attention within a frame, cross-attention to the context, feed-forward."""

    def __init__(self, channels: int, heads: int, head_channels: int, context_dim: int):
        super().__init__()
        self.attn1 = Attention(channels, heads, head_channels)
        self.attn2 = CrossAttention(channels, heads, head_channels, context_dim)
        self.ff = FeedForward(channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Context) -> Tensor:  # [B·T, HW, C]
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context[self.attn2])
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Attention among the pixels of a frame and to the context, a residual that starts at zero."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        heads = channels // config.head_channels
        inner = heads * config.head_channels
        block = SpatialBlock(inner, heads, config.head_channels, config.context_dim)
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = zero_init(nn.Linear(inner, channels))

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:  # [B·T, C, H, W]
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [B·T, HW, C]
        for block in self.transformer_blocks:
            h = block(h, conditions.context)
        return x + self.proj_out(h).transpose(1, 2).view_as(x)


# --------------------------------------------------------------------------------------------------
# The network


class UNet(nn.Module):
    """Noisy latents, a noise level and an action per frame -> the velocity of every frame. The
    picture is at the top of this file; shapes are at `forward`."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        width = config.model_channels
        embedding = 4 * width

        self.time_embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(),
                                        nn.Linear(embedding, embedding))
        self.fps_embedding = nn.Sequential(
            nn.Linear(width, embedding), nn.SiLU(), zero_init(nn.Linear(embedding, embedding)))
        if config.action_dim and config.action_table:
            self.action_emb_preprocess = MultiHotEmbedding(config.action_dim, width)
            self.action_emb_proj = nn.Sequential(
                nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        elif config.action_dim:
            self.action_emb_preprocess = nn.Identity()
            self.action_emb_proj = action_embedding(config.action_dim, width, config.action_init)

        def temporal(channels: int, heads: int | None = None, **options) -> TemporalTransformer:
            return TemporalTransformer(channels, heads or channels // config.head_channels,
                                       config.head_channels, config.causal, config.norm_scope,
                                       **options)

        def block(channels_in: int, channels: int, factor: int) -> nn.ModuleList:
            layers = nn.ModuleList([ResBlock(channels_in, channels, config)])
            if factor in config.attention_resolutions:
                layers += [SpatialTransformer(channels, config), temporal(channels)]
            return layers

        # Down. Every block's output is a skip connection, so note how wide each is.
        first = InputConv(config.in_channels, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([nn.ModuleList([first])])
        self.init_attn = nn.ModuleList([temporal(width, heads=8, projection=PointwiseConv1d)])
        channels, skips = width, [width]
        for level, multiplier in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(block(channels, multiplier * width, factor=2**level))
                channels = multiplier * width
                skips.append(channels)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)

        self.middle_block = nn.ModuleList([
            ResBlock(channels, channels, config), SpatialTransformer(channels, config),
            temporal(channels), ResBlock(channels, channels, config)])

        # Up. Every block takes one skip connection back.
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                layers = block(channels + skips.pop(), multiplier * width, factor=2**level)
                channels = multiplier * width
                if level > 0 and i == config.num_res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(layers)

        out = nn.Conv2d(channels, config.out_channels, 3, padding=1)
        if config.height_causal_out:
            out = HeightCausalConv2d(channels, config.out_channels, 3)
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), zero_init(out))

    def forward(self, x: Tensor, k: Tensor, text: Tensor, image: Tensor, fps: Tensor | None = None,
                actions: Tensor | None = None, action_mask: Tensor | None = None,
                cache: Cache | None = None) -> Tensor:
        """Predict the velocity of every frame.

        x            [B, T, in, H, W]  noisy latents and the anchor's; H and W multiples of
                                       2^(levels - 1)
        k            [B] or [B, T]     noise level, 0..999
        text         [B, 77, D]        the caption's tokens
        image        [B, T, L, D]      L tokens of the anchor image for each frame
        fps          [B]               frames per second; None means the config's default_fps
        actions      [B, T, A]         the action that led to each frame; None adds nothing
        action_mask  [B, T]            1 keeps and 0 hides a frame's action; None keeps all
        cache                          of the frames before; x then holds only new ones
                                       (temporal/streaming.py)

        returns      [B, T, out, H, W]. Raises ValueError for shapes that do not fit.
        """
        if image.shape[:2] != x.shape[:2]:
            raise ValueError(f"image is {list(image.shape)}; expected tokens for each frame, "
                             f"[{x.shape[0]}, {x.shape[1]}, L, D]")
        context = self.project_context(text, image)
        return self.forward_projected(x, k, context, fps, actions, action_mask, cache)

    def forward_projected(self, x: Tensor, k: Tensor, context: Context, fps: Tensor | None = None,
                          actions: Tensor | None = None, action_mask: Tensor | None = None,
                          cache: Cache | None = None) -> Tensor:
        """`forward` with a context that is projected already. Raises ValueError."""
        self.check_shapes(x, k, actions)
        B, T = x.shape[:2]
        if cache is not None:
            if not self.config.causal:
                raise ValueError("a cache needs causal=True: this network looks ahead")
            cache.begin(T)
        emb = self.embed(k.view(B, -1).expand(B, T), fps, actions, action_mask)  # [B, T, E]
        conditions = Conditions(emb, context, cache)

        h = x.flatten(0, 1)  # [B·T, in, H, W]
        h, skips = down_and_middle(self, h, conditions)  # [B·T, C, H/2ⁿ, W/2ⁿ]
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)  # [B·T, C + skip, h, w]
            for layer in block:
                h = layer(h, conditions)
        v = self.out(h).unflatten(0, (B, T))  # [B, T, out, H, W]
        if cache is not None:
            cache.commit()
        return v

    def project_context(self, text: Tensor, image: Tensor) -> Context:
        """Keys and values of text [B, 77, D] and image [B, T, L, D] in every cross-attention."""
        layers = [layer for layer in self.modules() if isinstance(layer, CrossAttention)]
        return {layer: layer.project(text, image) for layer in layers}

    def embed(self, k: Tensor, fps: Tensor | None, actions: Tensor | None,
              action_mask: Tensor | None) -> Tensor:
        """Noise level, frame rate and action of every frame, as [B, T, 4·model_channels]."""
        width = self.config.model_channels
        emb = self.time_embed(sinusoidal_embedding(k, width))  # [B, T, E]
        if fps is None:
            fps = torch.full(k.shape[:1], self.config.default_fps, device=k.device)
        emb = emb + self.fps_embedding(sinusoidal_embedding(fps, width))[:, None]
        if actions is not None:
            action = self.action_emb_proj(self.action_emb_preprocess(actions))  # [B, T, E]
            # e = e_k + e_fps + mask · e_action: a hidden action adds nothing
            emb = emb + (action if action_mask is None else action * action_mask[..., None])
        return emb

    def check_shapes(self, x: Tensor, k: Tensor, actions: Tensor | None) -> None:
        B, T, C, H, W = x.shape
        factor = 2 ** (len(self.config.channel_mult) - 1)
        action_dim = self.config.action_dim or 0
        if C != self.config.in_channels or H % factor or W % factor:
            raise ValueError(f"x is {list(x.shape)}; expected [B, T, {self.config.in_channels}, H, "
                             f"W] with H and W multiples of {factor}")
        if k.shape not in [(B,), (B, T)]:
            raise ValueError(f"noise level k is {list(k.shape)}; expected [{B}] or [{B}, {T}]")
        if actions is not None and actions.shape != (B, T, action_dim):
            raise ValueError(f"actions is {list(actions.shape)}; expected [{B}, {T}, {action_dim}] "
                             "(a network without action_dim takes none)")


def down_and_middle(part: nn.Module, h: Tensor, conditions: Conditions
                    ) -> tuple[Tensor, list[Tensor]]:
    """The half of a U-Net (or of a copy of these parts) that shrinks: h [B·T, C, H, W] -> what the
    middle makes, and a skip connection of every block."""
    skips = []
    for i, block in enumerate(part.input_blocks):
        for layer in [*block, *part.init_attn] if i == 0 else block:
            h = layer(h, conditions)
        skips.append(h)  # [B·T, C, h, w]
    for layer in part.middle_block:
        h = layer(h, conditions)
    return h, skips


# --------------------------------------------------------------------------------------------------
# Loading. A checkpoint is a path, or what `read_lightning` gave of it; `source` names it then.

Checkpoint = str | Path | dict[str, Tensor]


def load_dynamicrafter(checkpoint: Checkpoint, config: UNetConfig, transfer: str = "mixed",
                       source: str | Path | None = None) -> UNet:
    """DynamiCrafter's U-Net (512 or 1024) from its own checkpoint, causal if `config.causal`.

    transfer  of the temporal kernels: a method of `causal_conv.transfer_weights`

    Everything is loaded except the action embedding, which DynamiCrafter lacks and which is new.
    Says in one line what it did. Raises CheckpointError for a file that does not fit.
    """
    source = source or checkpoint
    weights = select(read_lightning(checkpoint), UNET)
    if any(".conv3d." in name for name in weights):
        raise CheckpointError(f"{source} is a Vid2World checkpoint, already causal: read it with "
                              "load_vid2world")
    network = build_unfilled(UNet, config, weights)
    done = [f"{sum(p.numel() for p in network.parameters()) / 1e9:.2f} B parameters"]

    if config.causal:
        kernels = [f"{name}.weight" for name, layer in network.named_modules()
                   if isinstance(layer, TemporalConv) and f"{name}.weight" in weights]
        for name in kernels:
            weights[name] = transfer_weights(weights[name], transfer)
        done.append(f"{len(kernels)} temporal kernels transferred by {transfer!r}")
    if config.action_dim:
        weights |= init_action_embedding(network)
        done.append("action embedding new")

    load_weights(network, weights, str(source))
    print(f"U-Net from {source}: {', '.join(done)}")
    return network


def load_vid2world(checkpoint: Checkpoint, config: UNetConfig, source: str | Path | None = None
                   ) -> UNet:
    """The U-Net of a checkpoint by Vid2World's authors, which differs from ours in three things.

    Its norms see the whole clip (the default norm_scope, "clip"), so it is not strictly causal; its
    output convolution is `HeightCausalConv2d`; and it wants all image tokens at every frame unless
    the clip is of full length, which is for the caller to provide. Raises CheckpointError for a
    file that does not fit.
    """
    # Their causal convolutions wrap PyTorch's, which puts an infix into the names.
    weights = {name.replace(".conv3d.", ".").replace(".conv2d.", "."): weight
               for name, weight in select(read_lightning(checkpoint), UNET).items()}
    table = "action_emb_preprocess.weight" in weights
    config = replace(config, causal=True, height_causal_out=True, action_table=table)
    network = build_unfilled(UNet, config, weights)
    return load_weights(network, weights, str(source or checkpoint))


def init_action_embedding(network: UNet) -> dict[str, Tensor]:
    """Initial weights of a network's action embedding, by name; the rest may be on meta."""
    for part in (network.action_emb_preprocess, network.action_emb_proj):
        for layer in part.modules():
            if hasattr(layer, "reset_parameters"):
                layer.to_empty(device="cpu").reset_parameters()
    return {name: tensor for name, tensor in network.state_dict().items()
            if name.startswith("action_emb")}


# --------------------------------------------------------------------------------------------------


LEAK_TEST = UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, head_channels=16,
                       context_dim=16)


def leaks(scope: str) -> list[float]:
    """By what share of its norm each frame's output moves when only the last input frame changes.

    The network is causal except for norms of this scope. Its weights are random everywhere: the
    zeros of a new network would hide a leak.
    """
    torch.manual_seed(0)
    config, T = replace(LEAK_TEST, causal=True, norm_scope=scope), 4
    network = UNet(config).eval()
    for weight in network.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    x, other = torch.randn(2, 1, T, config.in_channels, 8, 8)
    other[:, :-1] = x[:, :-1]
    k, text = torch.full((1,), 300), torch.randn(1, 77, config.context_dim)
    image = torch.randn(1, T, 16, config.context_dim)
    before, after = (network(clip, k, text, image)[0].flatten(1) for clip in (x, other))
    return ((after - before).norm(dim=1) / before.norm(dim=1)).tolist()


def demo() -> None:
    """Which outputs move when the last of four frames changes, for norms of every scope
    (temporal/norm.py). How far depends on the network: this one is tiny and its weights random."""
    print("norms over    output of frame 0      1         2         3")
    for scope in NORM_SCOPES:
        print(f"{scope:13} " + "  ".join(f"{100 * moved:6.2f} %" for moved in leaks(scope)))


if __name__ == "__main__":
    with torch.no_grad():
        demo()
