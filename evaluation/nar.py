"""All frames at once, at one shared noise level: the paper's Vid2World-NAR, for comparison.

It is not a world model: all actions have to be known before the first frame. Paper: section 5.4.
"""
import numpy as np
import torch
from torch import Tensor

from action_guidance import guide
from data import fit_frames
from model.vid2world import to_frames, to_pixels
from sample import WorldModel
from support.errors import RequestError


@torch.inference_mode()
def sample_jointly(world: WorldModel, frames: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """One clip, its first frame given: uint8 [T, H, W, 3] from frames [≥ 1, H, W, 3] and actions [T
    - 1, A].

    Guidance is between all actions and none. The world's own state is neither read nor changed, but
    for its noise. Raises RequestError for more frames than the window holds.
    """
    model, T = world.model, len(actions) + 1
    if T > model.num_frames:
        raise RequestError(f"{T} frames do not fit into one window of {model.num_frames}")
    actions = world.check_actions(actions, (1, T - 1, model.action_dim), batched=False)
    led_to = torch.cat([torch.zeros_like(actions[:, :1]), actions], dim=1)  # [1, T, A]
    pixels = to_pixels(torch.from_numpy(fit_frames(frames[:1], *model.config.size,
                                                   model.config.fit))[None])
    anchor = model.encode(pixels.to(model.device))  # [1, 1, C, h, w]
    context = model.context(model.image_tokens(pixels[:, 0].to(model.device)), range(T))
    low, high = world.sampling.guidance_levels

    def predict(x: Tensor, k: int, keep: float) -> Tensor:
        levels = torch.full((1, T), k, device=x.device)
        return model.denoise(x, levels, anchor, context, led_to,
                             torch.full((1, T), keep, device=x.device)).float()

    def velocity(x: Tensor, k: int) -> Tensor:
        with_actions = predict(x, k, 1.0)
        if world.sampling.guidance == 1 or not low <= k < high:
            return with_actions
        return guide(with_actions, predict(x, k, 0.0), world.sampling.guidance,
                     world.sampling.rescale)

    world_state, world.generator = world.generator, torch.Generator().manual_seed(world.seed)
    try:
        with world.autocast():
            x = model.schedule.sample(world.noise(1, T), velocity, world.sampling.steps,
                                      world.sampling.eta, draw_noise=lambda: world.noise(1, T))
    finally:
        world.generator = world_state
    return to_frames(model.decode(x))[0]
