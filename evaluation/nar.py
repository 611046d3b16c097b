"""All frames at once, at one shared noise level: the paper's Vid2World-NAR, for comparison.

It is not a world model: all actions have to be known before the first frame. Paper: section 5.4.
"""
import numpy as np
import torch
from torch import Tensor

from action_guidance import align_actions, guide
from baselines.clips import Velocity, sample_clips
from sample import WorldModel
from unet import Context


def sample_jointly(world: WorldModel, frames: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Clips side by side, their first frames given: uint8 [B, T, H, W, 3] from frames
    [B, ≥ 1, H, W, 3] and actions [B, T - 1, A], sampled as the world is.

    Guidance is between all actions and none. The world's state is neither read nor changed. Raises
    RequestError for more frames than the window holds.
    """
    sampling, (low, high) = world.sampling, world.sampling.guidance_levels

    def steer(_: Velocity, anchor: Tensor, context: Context, actions: Tensor) -> Velocity:
        def predict(x: Tensor, k: Tensor, keep: float) -> Tensor:
            mask = torch.full(k.shape, keep, device=x.device)
            return world.model.denoise(x, k, anchor, context, align_actions(actions), mask).float()

        def velocity(x: Tensor, k: Tensor) -> Tensor:
            with_actions = predict(x, k, 1.0)
            if sampling.guidance == 1 or not low <= k[0, 0] < high:
                return with_actions
            return guide(with_actions, predict(x, k, 0.0), sampling.guidance, sampling.rescale)
        return velocity

    with world.autocast():
        return sample_clips(world.model, frames, actions, sampling.steps, sampling.eta, world.seed,
                            steer)
