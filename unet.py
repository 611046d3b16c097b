"""The DynamiCrafter U-Net, passive or causal, and how to load its weights.

The network sees a clip of T frames, each at a noise level of its own, and predicts every frame's
velocity. Most of it is Stable Diffusion's image U-Net, which treats each frame as a picture of its
own; in between sit the temporal layers, the only places where frames meet:

    x, 8 channels: 4 noisy latents, 4 latents of the anchor, the clip's first frame
     │
    3×3 conv → temporal layer                                      (`init_attn`)
     │
    levels down → middle → levels up, each level a few times:
     │        ResBlock             3×3 convolutions per frame, then temporal ones (causal_conv.py)
     │        SpatialTransformer   attention within a frame, and to the caption and anchor image
     │        TemporalLayer        attention across frames at every pixel (causal_attention.py)
     │
    GroupNorm → SiLU → 3×3 conv → velocity, 4 channels

In DynamiCrafter-512 the levels are 320, 640, 1280 and 1280 channels wide, on 40×64, 20×32, 10×16
and 5×8 pixels; 22 residual blocks carry 88 temporal convolutions.

Noise level, frame rate and action reach every ResBlock as one vector per frame. That the noise
level is a vector *per frame* is all that diffusion forcing asks of the network
(diffusion_forcing.py); the action is added to it (action_guidance.py).

`UNetConfig()` is DynamiCrafter-512 itself, and `causal=True` makes it a world model. Its parameters
stay the same but for `action_emb_proj`, and have DynamiCrafter's names to the letter (its misspelt
`temopral_conv` included): loading is `load_state_dict`, and nothing is renamed.

Frames ride in the batch dimension, [B·T, C, H, W]; only temporal layers unfold them.

    python unet.py        shows which outputs move when the last frame changes

Paper: preliminaries 3, causalization 4.1, model B.2.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from action_guidance import MultiHotEmbedding, action_embedding
from causal_attention import Attention, PointwiseConv1d, TemporalTransformer
from causal_conv import TemporalConv, TemporalConvBlock, transfer_weights
from dynamicrafter.checkpoint import load_weights, read_lightning, select
from dynamicrafter.layers import (
    CrossAttention,
    Downsample,
    FeedForward,
    HeightCausalConv2d,
    InputConv,
    Upsample,
    sinusoidal_embedding,
    zero_init,
)
from errors import CheckpointError
from temporal.cache import Cache


@dataclass(frozen=True)
class UNetConfig:
    """The shape of the network; the defaults are DynamiCrafter-512's."""
    in_channels: int = 8  # noisy latents and the anchor's latents
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    # downsampling factors that have transformers
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    head_channels: int = 64
    context_dim: int = 1024
    num_frames: int = 16  # longest clip, and number of slots of image tokens
    default_fps: int = 24  # the frame rate that the network is told
    dropout: float = 0.1
    action_dim: int | None = None  # None: no action input
    causal: bool = False
    norm_scope: str = "clip"  # "clip", "past" or "frame": see temporal/norm.py
    height_causal_out: bool = False  # a quirk of the released checkpoints: see HeightCausalConv2d
    # multi-hot actions enter through a table, as in the released CS:GO checkpoint
    action_table: bool = False
    # a new action embedding begins with He's weights in place of PyTorch's: see HeLinear
    loud_actions: bool = False


Context = dict[nn.Module, tuple[Tensor, ...]]  # cross-attention -> its keys and values


@dataclass(frozen=True)
class Conditions:
    """What every layer is told beside its input."""
    emb: Tensor  # [B, T, 4·model_channels]: noise level, frame rate and action of every frame
    context: Context  # of the caption and the anchor image
    cache: Cache | None  # of the frames before


def across_frames(layer, h: Tensor, conditions: Conditions) -> Tensor:
    """Run a temporal layer in the layout of the frames that it sees."""
    frames = conditions.emb.shape[1]
    clip = h.unflatten(0, (-1, frames)).transpose(1, 2)  # [B·T, C, H, W] -> [B, C, T, H, W]
    return layer(clip, conditions.cache).transpose(1, 2).flatten(0, 1)  # and back


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
        return across_frames(self.temopral_conv, h, conditions)


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


class TemporalLayer(TemporalTransformer):
    """`TemporalTransformer` in the layout of this file, [B·T, C, H, W]."""

    def __init__(self, channels: int, config: UNetConfig, heads: int | None = None,
                 **options: type[nn.Module]):
        heads = heads or channels // config.head_channels
        super().__init__(channels, heads, config.head_channels, config.causal, config.norm_scope,
                         **options)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        return across_frames(super().forward, x, conditions)


# --------------------------------------------------------------------------------------------------
# The network


class UNet(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        # recompute activations in the backward pass: less memory, more time
        self.checkpointing = False
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
            self.action_emb_proj = action_embedding(config.action_dim, width,
                                                    config.loud_actions)

        def block(channels_in: int, channels: int, factor: int) -> nn.ModuleList:
            layers = nn.ModuleList([ResBlock(channels_in, channels, config)])
            if factor in config.attention_resolutions:
                layers += [SpatialTransformer(channels, config), TemporalLayer(channels, config)]
            return layers

        # Down. Every block's output is a skip connection, so remember how wide each is.
        first = InputConv(config.in_channels, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([nn.ModuleList([first])])
        temporal = TemporalLayer(width, config, heads=8, projection=PointwiseConv1d)
        self.init_attn = nn.ModuleList([temporal])
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
            TemporalLayer(channels, config), ResBlock(channels, channels, config)])

        # Up. Every block takes one skip connection back.
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                layers = block(channels + skips.pop(), multiplier * width, factor=2**level)
                channels = multiplier * width
                if level > 0 and i == config.num_res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(layers)

        if config.height_causal_out:
            out = HeightCausalConv2d(channels, config.out_channels, 3)
        else:
            out = nn.Conv2d(channels, config.out_channels, 3, padding=1)
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
        cache                          memory of the frames before; x then holds only new ones

        returns      [B, T, out, H, W]. Raises ValueError for shapes that do not fit.
        """
        if image.shape[:2] != x.shape[:2]:
            raise ValueError(f"image is {list(image.shape)}; expected tokens for each frame, "
                             f"[{x.shape[0]}, {x.shape[1]}, L, D]")
        return self.predict(x, k, self.context(text, image), fps, actions, action_mask, cache)

    def predict(self, x: Tensor, k: Tensor, context: Context, fps: Tensor | None = None,
                actions: Tensor | None = None, action_mask: Tensor | None = None,
                cache: Cache | None = None,
                alternatives: int = 0) -> Tensor:
        """`forward` for a context that is projected already, as one is for all denoising steps of a
        frame.

        alternatives  with a cache: so many of the last frames are versions of one next frame
                      (temporal/cache.py)
        """
        self.check_shapes(x, k, actions)
        B, T = x.shape[:2]
        if cache is not None:
            if not self.config.causal:
                raise ValueError("a network that looks ahead cannot remember: a cache needs "
                                 "causal=True")
            cache.begin(T, alternatives)
        emb = self.embed(k.view(B, -1).expand(B, T), fps, actions, action_mask)  # [B, T, E]
        conditions = Conditions(emb, context, cache)

        h, skips = self.encode(self, x.flatten(0, 1), conditions)
        for block in self.output_blocks:
            # [B·T, C + skip, H, W]
            h = self.run(block, torch.cat([h, skips.pop()], dim=1), conditions)
        v = self.out(h).unflatten(0, (B, T))
        if cache is not None:
            cache.commit()
        return v

    def encode(self, part: nn.Module, h: Tensor, conditions: Conditions
               ) -> tuple[Tensor, list[Tensor]]:
        """Down and middle, of this network or of a copy of these parts: h [B·T, C, H, W] -> what
        the middle makes, and the skip connections."""
        skips = []
        for i, block in enumerate(part.input_blocks):
            h = self.run(block, h, conditions)
            if i == 0:
                h = self.run(part.init_attn, h, conditions)
            skips.append(h)
        return self.run(part.middle_block, h, conditions), skips

    def run(self, block: nn.ModuleList, h: Tensor, conditions: Conditions) -> Tensor:
        for layer in block:
            if self.checkpointing:
                h = checkpoint(layer, h, conditions, use_reentrant=False)
            else:
                h = layer(h, conditions)
        return h

    def context(self, text: Tensor, image: Tensor) -> Context:
        """Keys and values of text [B, 77, D] and image [B, T, L, D] in every cross-attention."""
        layers = [layer for layer in self.modules() if isinstance(layer, CrossAttention)]
        return {layer: layer.project(text, image) for layer in layers}

    def embed(self, k: Tensor, fps: Tensor | None, actions: Tensor | None,
              action_mask: Tensor | None) -> Tensor:
        """Noise level, frame rate and action of every frame, as [B, T, 4·model_channels]."""
        width = self.config.model_channels
        emb = self.time_embed(sinusoidal_embedding(k, width))
        if fps is None:
            fps = torch.full(k.shape[:1], self.config.default_fps, device=k.device)
        emb = emb + self.fps_embedding(sinusoidal_embedding(fps, width))[:, None]
        if actions is not None:
            action = self.action_emb_proj(self.action_emb_preprocess(actions))
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


# --------------------------------------------------------------------------------------------------
# Loading


def load_dynamicrafter(path: str | Path, config: UNetConfig, transfer: str = "mixed") -> UNet:
    """DynamiCrafter's U-Net (512 or 1024) from its original checkpoint; made causal if
    `config.causal`.

    transfer  how temporal kernels are carried over: a method of `causal_conv.transfer_weights`

    Everything is loaded but the action embedding, which DynamiCrafter lacks and which starts anew.
    Says in one line what it did. Raises CheckpointError for a file that does not fit.
    """
    return carry_over(read_lightning(path), config, transfer, source=str(path))


def load_vid2world(path: str | Path, config: UNetConfig) -> UNet:
    """The U-Net of a checkpoint that the authors of Vid2World released, which differs from ours in
    three things.

    Its norms see the whole clip (the default norm_scope, "clip"), so it is not strictly causal; its
    output convolution is `HeightCausalConv2d`; and it wants all image tokens at every frame unless
    the clip is of full length, which is for the caller to provide. Raises CheckpointError for a
    file that does not fit.
    """
    return released_unet(read_lightning(path), config, source=str(path))


def carry_over(checkpoint: dict[str, Tensor], config: UNetConfig, transfer: str,
               source: str) -> UNet:
    """`load_dynamicrafter` for a checkpoint that is read already."""
    weights = select(checkpoint, "model.diffusion_model.")
    if any(".conv3d." in name for name in weights):
        raise CheckpointError(f"{source} is a Vid2World checkpoint, already causal: read it with "
                              "load_vid2world")
    with torch.device("meta"):
        network = UNet(config)
    done = [f"{sum(p.numel() for p in network.parameters()) / 1e9:.2f} B parameters"]

    if config.causal:
        kernels = [f"{name}.weight" for name, layer in network.named_modules()
                   if isinstance(layer, TemporalConv)]
        weights |= {name: transfer_weights(weights[name], transfer) for name in kernels
                    if name in weights}
        done.append(f"{len(kernels)} temporal kernels carried over by {transfer!r}")
    if config.action_dim:
        weights |= new_action_embedding(network)
        done.append("action embedding new")

    load_weights(network, weights, source)
    print(f"U-Net from {source}: {', '.join(done)}")
    return network


def new_action_embedding(network: UNet) -> dict[str, Tensor]:
    """Initial weights of a network's action embedding, by name; the rest may be on meta."""
    for part in (network.action_emb_preprocess, network.action_emb_proj):
        for layer in part.modules():
            if hasattr(layer, "reset_parameters"):
                layer.to_empty(device="cpu").reset_parameters()
    return {name: tensor for name, tensor in network.state_dict().items()
            if name.startswith("action_emb")}


def with_actions(network: UNet, action_dim: int, loud: bool) -> UNet:
    """A network of a world model for actions of another width: its action embedding is new."""
    if network.config.action_dim == action_dim:
        return network
    weights = {name: tensor for name, tensor in network.state_dict().items()
               if not name.startswith("action_emb")}
    with torch.device("meta"):
        other = UNet(replace(network.config, action_dim=action_dim, action_table=False,
                             loud_actions=loud))
    return load_weights(other, weights | new_action_embedding(other), "the world")


def released_unet(checkpoint: dict[str, Tensor], config: UNetConfig, source: str) -> UNet:
    """`load_vid2world` for a checkpoint that is read already."""
    weights = select(checkpoint, "model.diffusion_model.")
    # Their causal convolutions wrap PyTorch's, which puts an infix into the names.
    weights = {name.replace(".conv3d.", ".").replace(".conv2d.", "."): tensor for name,
               tensor in weights.items()}
    table = "action_emb_preprocess.weight" in weights
    with torch.device("meta"):
        network = UNet(replace(config, causal=True, height_causal_out=True, action_table=table))
    return load_weights(network, weights, source)


# --------------------------------------------------------------------------------------------------


LEAK_TEST = UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, head_channels=16,
                       context_dim=16)


def leaks(scope: str, frames: int = 4, config: UNetConfig = LEAK_TEST,
          pixels: int = 8) -> list[float]:
    """By what share of its norm each frame's output moves when only the last input frame changes.

    The network is causal but for its norms of this scope. Its weights are random everywhere: the
    zeros of a new network would hide a leak.
    """
    torch.manual_seed(0)
    network = UNet(replace(config, causal=True, norm_scope=scope)).eval()
    for weight in network.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    x, other = torch.randn(2, 1, frames, config.in_channels, pixels, pixels)
    other[:, :-1] = x[:, :-1]
    k, text = torch.full((1,), 300), torch.randn(1, 77, config.context_dim)
    image = torch.randn(1, frames, 16, config.context_dim)
    before, after = (network(clip, k, text, image)[0].flatten(1) for clip in (x, other))
    return ((after - before).norm(dim=1) / before.norm(dim=1)).tolist()


def demo() -> None:
    """Which outputs move when the last of four frames changes, for norms of every scope
    (temporal/norm.py)."""
    print("norms over    output of frame 0      1         2         3")
    for scope in ("clip", "past", "frame"):
        print(f"{scope:13} " + "  ".join(f"{100 * moved:6.2f} %" for moved in leaks(scope)))


if __name__ == "__main__":
    with torch.no_grad():
        demo()
