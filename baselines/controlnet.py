"""Steering from outside: a trainable copy of the encoder adds to the frozen decoder's skips.

    python -m baselines.controlnet --data rt1 --out runs/controlnet

Zhang et al. 2023 (arXiv 2302.05543). The copy is of the encoder and the middle; its embedding also
carries the action. What it makes passes convolutions that start at zero, and is added to the skip
connections and to the middle of the frozen base:

    x ─▶ encoder ──skips──┬──▶ decoder ─▶ v        frozen
     └─▶ copy ──zero conv─┘                        trained
          ▲ action

Before the first step the sum is the base's own output, exactly.
"""
import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from action_guidance import action_embedding
from baselines.clips import baseline, build_beside
from data import DataSet
from dynamicrafter.layers import zero_init
from model.vid2world import Model, ModelConfig
from training.settings import Settings
from training.start import Recipe
from unet import Conditions, Context, UNet, down_and_middle


class Copy(nn.Module):
    """Encoder and middle of a U-Net, and a zero convolution for everything that they make."""

    def __init__(self, base: UNet, action_dim: int):
        super().__init__()
        for name in ("time_embed", "fps_embedding", "input_blocks", "init_attn", "middle_block"):
            setattr(self, name, copy.deepcopy(getattr(base, name)))
        config = base.config
        self.action_emb = action_embedding(action_dim, config.model_channels, config.action_init)
        widths = [config.model_channels]  # of the skip connections
        for level, multiplier in enumerate(config.channel_mult):
            widths += [multiplier * config.model_channels] * config.num_res_blocks
            widths += widths[-1:] * (level < len(config.channel_mult) - 1)
        self.zero_convs = nn.ModuleList(zero_init(nn.Conv2d(width, width, 1))
                                        for width in [*widths, widths[-1]])


class ControlledUNet(UNet):
    """A frozen U-Net with a copy that knows the actions."""

    def __init__(self, config, action_dim: int):
        super().__init__(config)
        self.copy, self.action_dim = Copy(self, action_dim), action_dim

    def begin(self) -> None:
        """The copy starts as the base is now."""
        for name, part in self.copy.named_children():
            if hasattr(self, name):
                part.load_state_dict(getattr(self, name).state_dict())

    def forward_projected(self, x: Tensor, k: Tensor, context: Context, fps: Tensor | None = None,
                          actions: Tensor | None = None, *others) -> Tensor:
        """As `UNet.forward_projected`, without a cache."""
        B, T = x.shape[:2]
        k = k.view(B, -1).expand(B, T)
        plain = Conditions(self.embed(k, fps, None, None), context, None)
        theirs = plain.emb if actions is None else plain.emb + self.copy.action_emb(actions)
        h, skips = down_and_middle(self, x.flatten(0, 1), plain)
        copied, copied_skips = down_and_middle(self.copy, x.flatten(0, 1),
                                               Conditions(theirs, context, None))
        added = [conv(part) for conv, part in
                 zip(self.copy.zero_convs, [*copied_skips, copied], strict=True)]
        h = h + added.pop()
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop() + added.pop()], dim=1)
            for layer in block:
                h = layer(h, plain)
        return self.out(h).unflatten(0, (B, T))


class ControlledModel(Model):
    """A passive model under control; its config says how many numbers an action has."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        passive = replace(config.unet, action_dim=None)
        self.unet = ControlledUNet(passive, config.unet.action_dim)


def build(settings: Settings, dataset: DataSet) -> ControlledModel:
    model, _ = build_beside(ControlledModel, "copy", settings, dataset)
    model.unet.begin()
    return model


RECIPE = Recipe(build, ControlledModel)
main = baseline(__name__, lambda settings: RECIPE)
