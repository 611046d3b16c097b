"""Steering by fine-tuning: every frame's action is added to its time embedding; all weights train.

    python -m baselines.action_finetuning --data rt1 --out runs/action

The nearest neighbour of Vid2World: the same base, sum of embeddings and data. It lacks causality, a
noise level for every frame, and the dropping of actions, so neither a rollout nor guidance:

    embedding of frame t = time(k) + fps + Linear(SiLU(Linear(action that led to t)))
"""
from dataclasses import replace

from torch import nn

from action_guidance import HeLinear
from baselines.clips import copy_base_weights, base_of, baseline
from data import DataSet
from model.vid2world import Model, ModelConfig
from training.settings import Settings
from training.start import Recipe


class ActionModel(Model):
    """A passive model whose frames know the action that led to them."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        width, action_dim = config.unet.model_channels, config.unet.action_dim
        linear = HeLinear if config.unet.action_init == "he" else nn.Linear
        self.unet.action_emb_proj = nn.Sequential(
            linear(action_dim, width), nn.SiLU(), linear(width, 4 * width))


def build(settings: Settings, dataset: DataSet) -> ActionModel:
    base = base_of(settings, dataset)
    unet = replace(base.config.unet, action_dim=dataset.action_dim)
    model = ActionModel(replace(base.config, unet=unet))
    copy_base_weights(model, base, new="action_emb_proj.")
    return model


RECIPE = Recipe(build, ActionModel)
main = baseline(__name__, lambda settings: RECIPE)
