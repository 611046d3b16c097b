"""Steering by an adapter: a small network that knows the actions corrects what the base says.

    python -m baselines.avid --data rt1 --out runs/avid

AVID (Rigter et al. 2024, arXiv 2410.12822). The adapter sees what the frozen base sees, and its
answer; it gives a velocity of its own, and for every pixel a mask, which of the two to believe:

    x ─▶ base ────┬───────────────▶ v_base        frozen
     └────────────┴─▶ adapter ─▶ v, mask          trained
                        ▲ action

    velocity = mask · v_base + (1 - mask) · v

Nothing of the base's inside is needed. The mask begins at a half everywhere. The adapter is half as
wide as the base here, and 0.3 times in the released code.
"""
from dataclasses import replace

import torch
from torch import Tensor, nn

from baselines.clips import baseline, build_beside
from data import DataSet
from model.vid2world import Model, ModelConfig
from training.settings import Settings
from training.start import Recipe
from unet import Context, UNet, UNetConfig


class AdaptedUNet(UNet):
    """A frozen U-Net beside a narrow one that knows the actions."""

    def __init__(self, config: UNetConfig, action_dim: int):
        super().__init__(config)
        channels = config.out_channels
        self.adapter = UNet(replace(
            config, in_channels=config.in_channels + channels, out_channels=channels + 1,
            model_channels=config.model_channels // 2, action_dim=action_dim))
        last = self.adapter.out[-1]
        last.reset_parameters()  # a new U-Net says zero; as published, only the mask does
        nn.init.zeros_(last.weight[channels:])
        nn.init.zeros_(last.bias[channels:])

    def forward_projected(self, x: Tensor, k: Tensor, context: Context, fps: Tensor | None = None,
                          actions: Tensor | None = None, *others) -> Tensor:
        """As `UNet.forward_projected`, without a cache."""
        with torch.no_grad():
            base = super().forward_projected(x, k, context, fps)
        both = torch.cat([x, base], dim=2)
        answer = self.adapter.forward_projected(both, k, context, fps, actions)
        v, mask = answer[:, :, :-1], answer[:, :, -1:].sigmoid()
        return mask * base + (1 - mask) * v


class AdaptedModel(Model):
    """A passive model with an adapter; its config says how many numbers an action has."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.unet = AdaptedUNet(replace(config.unet, action_dim=None), config.unet.action_dim)


def build(settings: Settings, dataset: DataSet) -> AdaptedModel:
    return build_beside(AdaptedModel, "adapter", settings, dataset)[0]


RECIPE = Recipe(build, AdaptedModel)
main = baseline(__name__, lambda settings: RECIPE)
