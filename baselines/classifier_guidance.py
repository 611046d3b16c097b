"""Steering without training the model: a classifier of actions pulls the clip to where they show.

    python -m baselines.classifier_guidance --data rt1 --out runs/classifier

Dhariwal and Nichol 2021 (arXiv 2105.05233). A classifier sees a noisy clip and says which action
led to each frame. Its gradient points to clips in which the wanted actions are easier to see, and
corrects the noise that the frozen base predicts:

    ε' = ε - √(1 - ᾱ) w ∇ log p(actions | x)
    v' = v - w √((1 - ᾱ) / ᾱ) ∇ log p(actions | x)        the same, as a velocity

The classifier begins as a copy of the base's layers at the highest resolution. What an action does
is a motion, so its head follows points (Finn et al. 2016, arXiv 1509.06113): where in the picture
each is, what is seen there, and how both have changed since the frame before. Each number of an
action is in one of three bins, below zero, about it, and above. Pure noise is not corrected: ᾱ = 0.
"""
import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from baselines.clips import Velocity, baseline, build_beside
from data import DataSet
from model.vid2world import Model, ModelConfig, to_pixels
from training.settings import Settings
from training.start import Recipe
from unet import Conditions, UNet, down_and_middle

EDGES = (-0.2, 0.2)  # between the bins, of commands between -1 and 1
BINS = len(EDGES) + 1
POINTS = 16  # that the head follows


class Classifier(nn.Module):
    """Noisy latents of a clip -> which bin each number of the action that led to a frame is in."""

    def __init__(self, base: UNet, action_dim: int):
        super().__init__()
        width, first = base.config.model_channels, 1 + base.config.num_res_blocks
        self.input_blocks = copy.deepcopy(base.input_blocks[:first])
        self.init_attn = copy.deepcopy(base.init_attn)
        self.middle_block = nn.ModuleList()  # `down_and_middle` runs it; here it is empty
        self.points = nn.Conv2d(width, 2 * POINTS, 1)  # where to look, and what is there
        self.head = nn.Sequential(nn.Linear(6 * POINTS, 64), nn.SiLU(),
                                  nn.Linear(64, BINS * action_dim))

    def forward(self, base: UNet, x: Tensor, k: Tensor, context: dict) -> Tensor:
        """x [B, T, in, H, W], k [B, T] -> log-probabilities [B, T - 1, A, BINS] of the actions that
        led to all frames but the first. The frozen base embeds noise level and frame rate."""
        conditions = Conditions(base.embed(k, None, None, None), context, None)
        h, _ = down_and_middle(self, x.flatten(0, 1), conditions)
        look, seen = self.points(h).float().chunk(2, dim=1)  # [B·T, POINTS, H, W]
        look = look.flatten(2).softmax(dim=-1).view_as(seen)
        down, across = (torch.linspace(-1, 1, size, device=x.device) for size in seen.shape[-2:])
        points = [(look * each).sum(dim=(-2, -1)) for each in (down[:, None], across, seen)]
        points = torch.cat(points, dim=-1).unflatten(0, x.shape[:2])  # [B, T, 3·POINTS]
        motion = 10 * (points[:, 1:] - points[:, :-1])  # small from frame to frame
        logits = self.head(torch.cat([points[:, 1:], motion], dim=-1))  # [B, T - 1, A·BINS]
        return logits.unflatten(-1, (-1, BINS)).log_softmax(dim=-1)


def bins_of(actions: Tensor) -> Tensor:
    """The bin [B, T - 1, A] of each number of actions [B, T, A]; the last leads beyond the clip."""
    return torch.bucketize(actions[:, :-1].contiguous(), torch.tensor(EDGES, device=actions.device))


class ClassifiedModel(Model):
    """A passive model, and a classifier of actions beside it."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.unet = UNet(replace(config.unet, action_dim=None))
        self.unet.classifier = Classifier(self.unet, config.unet.action_dim)

    def log_likelihood(self, x: Tensor, k: Tensor, anchor: Tensor, context: dict, actions: Tensor
                       ) -> Tensor:
        """[B, T - 1, A] of the actions [B, T, A] taken at the frames."""
        beside_anchor = torch.cat([x, anchor.expand_as(x)], dim=2)
        log_p = self.unet.classifier(self.unet, beside_anchor, k, context)  # [B, T - 1, A, BINS]
        return log_p.gather(-1, bins_of(actions)[..., None])[..., 0]

    def denoise(self, x: Tensor, k: Tensor, anchor: Tensor, context: dict, *others) -> Tensor:
        return super().denoise(x, k, anchor, context)  # the base knows no actions


class ClassifierTraining(nn.Module):
    """The loss of a batch: actions read off clips at any noise level."""

    def __init__(self, model: ClassifiedModel, bf16: bool, weighting: str = "velocity"):
        super().__init__()
        self.model, self.bf16 = model, bf16

    def forward(self, frames: Tensor, actions: Tensor, draws: dict[str, Tensor]) -> Tensor:
        model, k = self.model, draws["k"]
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            pixels = to_pixels(frames)
            with torch.no_grad():
                latents = model.encode(pixels, noise=draws["posterior"]).float()
                context = model.context(model.image_tokens(pixels[:, 0]), range(frames.shape[1]))
            x = model.schedule.add_noise(latents, k, draws["noise"])
            return -model.log_likelihood(x, k, latents[:, :1], context, actions).mean()


def towards_actions(model: ClassifiedModel, weight: float) -> Callable[..., Velocity]:
    """What `sample_clips` takes to `steer`: the velocity, corrected by the classifier."""
    def steer(velocity: Velocity, anchor: Tensor, context: dict, actions: Tensor) -> Velocity:
        def corrected(x: Tensor, k: Tensor) -> Tensor:
            v, (alpha, _) = velocity(x, k), model.schedule.coefficients(k, x)
            with torch.enable_grad():
                wanted = x.clone().requires_grad_(True)
                told = model.log_likelihood(wanted, k, anchor, context, actions).sum()
                gradient = torch.autograd.grad(told, wanted)[0]
            ratio = ((1 - alpha) / alpha.clamp(min=1e-2)).sqrt() * (alpha > 1e-2)
            return v - weight * ratio * gradient
        return corrected

    return steer


def build(settings: Settings, dataset: DataSet) -> ClassifiedModel:
    model, base = build_beside(ClassifiedModel, "classifier", settings, dataset)
    for name in ("input_blocks", "init_attn"):
        part = getattr(model.unet.classifier, name)
        part.load_state_dict(getattr(base.unet, name)[: len(part)].state_dict())
    return model


RECIPE = Recipe(build, ClassifiedModel, ClassifierTraining)
main = baseline(__name__, lambda settings: RECIPE)
