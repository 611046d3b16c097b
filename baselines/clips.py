"""What the ways to steer a passive video model have in common: a whole clip at one noise level.

The model stays as it was pretrained: every frame sees every other, all at the same noise level. So
all actions have to be known before the first frame is there, and nobody can act on what they see.
That is what Vid2World changes. `train.py`'s own loop trains them.
"""
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from action_guidance import align_actions, guide
from data import DataSet, fit_frames
from model.saving import from_dynamicrafter
from model.vid2world import PRESETS, Model, ModelConfig, to_frames, to_pixels
from sample import WorldModel
from support.errors import RequestError
from support.options import command
from train import train
from training.settings import Settings, parse_arguments
from training.start import Recipe
from unet import Context

Velocity = Callable[[Tensor, Tensor], Tensor]  # x [B, T, C, h, w] and k [B, T] -> v
# Settings of their training: one level a clip, from all levels alike, and no action hidden.
CLIPS = {"shared_level": True, "low_noise_prob": 0.0, "action_dropout": 0.0}


def base_of(settings: Settings, dataset: DataSet) -> Model:
    """The passive model of `--base`, as it is."""
    if not settings.base:
        raise RequestError("a baseline starts from a passive model: name it with --base")
    config: ModelConfig = PRESETS[settings.preset]
    unet = replace(config.unet, default_fps=dataset.network_fps, action_init=settings.action_init)
    config = replace(config, unet=unet, size=tuple(settings.size), fit=dataset.fit)
    torch.manual_seed(settings.seed)
    return from_dynamicrafter(settings.base, config)


def copy_base_weights(model: Model, base: Model, new: str | tuple[str, ...] = ()) -> None:
    """Give a model the weights of its base; only those of its U-Net that begin with `new` are
    its own. What is frozen in the base is frozen in the model."""
    for name in ("autoencoder", "image_tower", "resampler"):
        getattr(model, name).load_state_dict(getattr(base, name).state_dict())
    model.text = base.text
    missing, unexpected = model.unet.load_state_dict(base.unet.state_dict(), strict=False)
    assert not unexpected and all(name.startswith(new) for name in missing), (missing, unexpected)
    for part in (model.autoencoder, model.image_tower):
        part.requires_grad_(False)


def build_beside(kind: type[Model], part: str, settings: Settings, dataset: DataSet
                 ) -> tuple[Model, Model]:
    """A frozen base with a part in its U-Net that learns, and the base itself."""
    base = base_of(settings, dataset)
    unet = replace(base.config.unet, action_dim=dataset.action_dim)
    model = kind(replace(base.config, unet=unet))
    copy_base_weights(model, base, new=f"{part}.")
    model.requires_grad_(False)
    getattr(model.unet, part).requires_grad_(True)
    return model, base


def baseline(module: str, recipe: Callable[[Settings], Recipe]) -> Callable:
    """The `main` of a baseline, as `support.options.program` makes one: options of train.py, and
    CLIPS. `recipe` says what is trained, from the settings."""
    def main(argv: Sequence[str] | None = None) -> int:
        def run() -> int:
            settings = parse_arguments(argv)
            return train(replace(settings, **CLIPS), recipe(settings))

        return command(Path(sys.argv[0]).stem, run)

    return sys.exit(main()) if module == "__main__" else main


@torch.no_grad()  # and not inference_mode: a classifier asks for gradients on the way
def sample_clips(model: Model, frames: np.ndarray, actions: np.ndarray, steps: int = 10,
                  eta: float = 0.0, seed: int = 0,
                  steer: Callable[..., Velocity] | None = None) -> np.ndarray:
    """Clips side by side, all frames together: uint8 [B, T, H, W, 3] from first frames
    [B, ≥ 1, H, W, 3] and actions [B, T - 1, A]. The first frame is the given one.

    steer  makes of (velocity, anchor, context, actions [B, T, A]) the velocity to follow

    Raises RequestError for more frames than a clip has.
    """
    B, T = len(frames), actions.shape[1] + 1
    if T > model.num_frames:
        raise RequestError(f"{T} frames do not fit into one clip of {model.num_frames}")
    model.eval()
    given = np.stack([fit_frames(clip[:1], *model.config.size, model.config.fit)
                      for clip in frames])
    pixels = to_pixels(torch.from_numpy(given)).to(model.device)
    anchor = model.encode(pixels)
    taken = torch.from_numpy(np.concatenate([actions, actions[:, -1:]], axis=1)).float()
    taken = model.standardise(taken.to(model.device)) if model.action_dim else taken
    led_to = align_actions(taken) if model.action_dim else None
    context = model.context(model.image_tokens(pixels[:, 0]), range(T))

    def velocity(x: Tensor, k: Tensor) -> Tensor:
        return model.denoise(x, k, anchor, context, led_to).float()

    follow = steer(velocity, anchor, context, taken) if steer else velocity
    generator = torch.Generator().manual_seed(seed)
    def noise() -> Tensor:
        return torch.randn(B, T, *model.latent_shape, generator=generator).to(model.device)

    x = model.schedule.sample(
        noise(), lambda x, k: follow(x, torch.full((B, T), k, device=x.device)), steps, eta, noise)
    imagined = to_frames(model.decode(x))
    imagined[:, 0] = given[:, 0]
    return imagined


def sample_jointly(world: WorldModel, frames: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """The paper's Vid2World-NAR (section 5.4), no world model any more: all frames at once, at one
    level. As `sample_clips`, with the world's sampling; guidance is between all actions and none.
    The world's state is neither read nor changed."""
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
