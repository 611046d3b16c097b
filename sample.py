"""The world model: reset(frames), then step(action) -> the next frame. And the command that rolls
it out.

    python sample.py --guidance 2.0                             (the bundled world)
    python sample.py --checkpoint runs/rt1 --guidance 2.0

A world model holds a window of frames and predicts one more at a time:

    slot       0        1       2       3                        at most num_frames (16) slots
            ┌───────┬───────┬───────┬───────┐
            │anchor │       │       │  new  │      anchor   its clean latents stand beside every frame's
            └───────┴───────┴───────┴───────┘               noisy ones; slot i reads its image tokens i
    level    k_hist  k_hist  k_hist  999 → 0      history  noised once, a little, and kept
    action    zero     a₀      a₁      a₂         new      starts as noise; the history stays put

 1. The new frame starts from Gaussian noise and is denoised through the DDIM levels. At each level the
    network predicts the velocity with and without the newest action, and guidance exaggerates the
    difference.
 2. The finished frame is noised to k_hist and joins the history.
 3. When all slots are taken, the last `overlap` frames become the new window, the first of them the new
    anchor. As in a training clip, no action leads to it. So a rollout may go on for ever, and the
    network never meets a clip longer than those it was trained on.

Streaming: a causal network never looks ahead, so its layers remember the history
(temporal/cache.py), and step 1 runs the network on the new frame alone. Only the first pass takes
the frame before along: steps + 1 frames to compute, however long the history.

Paper: section 4.2 and Algorithm 2 (action-guided, autoregressive sampling); settings in B.4.
"""
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from action_guidance import guide
from commands import command, option, parse
from data import (
    DATA_SETS,
    SAMPLES,
    Episodes,
    default_root,
    describe_action,
    fit_frames,
    open_episodes,
)
from diffusion_forcing import LEVELS, rollout_levels
from dynamicrafter.checkpoint import read_checkpoint
from episodes.npz import read_npy
from errors import CheckpointError, DataError, RequestError
from model.saving import TINY_WORLD, from_vid2world, load_model, readable_path
from model.vid2world import Model, to_frames, to_pixels
from temporal.cache import Cache
from training.memory import keep_freed_memory
from viewing.pictures import save_gif, save_strip
from viewing.psnr import psnr


@dataclass(frozen=True)
class Sampling:
    """How a frame is sampled. The defaults are the paper's (section B.4); a checkpoint may carry
    others.

    Raises RequestError for values out of range.
    """
    guidance: float = 2.5  # λ: 1 follows the newest action as trained, more exaggerates it
    # noise levels low <= k < high at which guidance applies
    guidance_levels: tuple[int, int] = (0, LEVELS)
    rescale: float = 0.7  # see `action_guidance.guide`
    steps: int = 50  # of denoising
    # 0 is deterministic given the first noise (DDIM), 1 adds fresh noise at every step
    eta: float = 1.0
    history_level: int = 39  # noise level of the history: 20 in the paper's text, 39 in its code

    def __post_init__(self):
        low, high = self.guidance_levels
        if not np.isfinite(self.guidance):
            raise RequestError(f"guidance is {self.guidance}; it must be a finite number")
        if not 0 <= low <= high <= LEVELS:
            raise RequestError(f"guidance_levels is {low}, {high}; expected 0 <= low <= high <= "
                               f"{LEVELS}")
        for name, most in (("eta", 1), ("rescale", 1), ("history_level", LEVELS - 1)):
            if not 0 <= getattr(self, name) <= most:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be between 0 and "
                                   f"{most}")
        if not 1 <= self.steps <= LEVELS:
            raise RequestError(f"steps is {self.steps}; it must be between 1 and {LEVELS}")

    def __str__(self) -> str:
        low, high = self.guidance_levels
        where = "" if (low, high) == (0, LEVELS) else f" at levels {low} to {high}"
        where = "" if self.guidance == 1 else where
        return f"guidance {self.guidance:g}{where}, {self.steps} steps, η {self.eta:g}"


@dataclass(frozen=True)
class Window:
    """What a world model knows at one moment. Nothing in it is ever changed, so keeping it is a
    snapshot."""
    latents: Tensor  # [B, all frames so far, C, h, w], clean
    # [B, T, 3, H, W] in [-1, 1], of the window's T frames; all that follows is theirs
    pixels: Tensor
    history: Tensor  # [B, T, C, h, w] latents, noised once to the history level
    actions: Tensor  # [B, T, A] the action that led to each frame; zeros lead to the first
    action_mask: Tensor  # [B, T] 1 where that action is known
    anchor: Tensor  # [B, 1, C, h, w] clean latents of the first frame
    tokens: Tensor  # [B, slots · L, D] image tokens of the first frame
    random_state: Tensor  # of the generator, after the last frame

    @property
    def length(self) -> int:
        return self.history.shape[1]


class WorldModel:
    """An environment that is imagined: reset(frames), step(action).

    guidance, guidance_levels, rescale, steps, eta, history_level
               see `Sampling`; what is left out comes from the checkpoint, else from the paper
    overlap    frames that stay when the window is full
    seed       of all noise; the same seed, frames and actions give the same rollout
    streaming  remember the history (True) or run it again at every step (False). None remembers
               where that is exact: everywhere but with norm_scope "clip", whose history changes
               with every new frame

    `.latents`, float32 [B, T, C, h, w], holds every frame so far, given and imagined.
    Raises RequestError for options out of range and for a passive network.
    """

    def __init__(self, model: Model, guidance: float | None = None,
                 guidance_levels: tuple[int, int] | None = None, steps: int | None = None,
                 eta: float | None = None, rescale: float | None = None,
                 history_level: int | None = None,
                 overlap: int = 8, seed: int = 0, streaming: bool | None = None):
        if not model.action_dim or not model.config.unet.causal:
            raise RequestError("this network is passive: a world model is causal and takes actions")
        if not 1 <= overlap < model.num_frames:
            raise RequestError(f"overlap is {overlap}; it must be between 1 and "
                               f"{model.num_frames - 1}")
        if not 0 <= seed < 2**63:
            raise RequestError(f"seed is {seed}; it must be between 0 and 2^63 - 1")
        named = {"guidance": guidance, "guidance_levels": guidance_levels, "steps": steps,
                 "eta": eta,
                 "rescale": rescale, "history_level": history_level}
        named = {name: value for name, value in named.items() if value is not None}
        self.sampling = Sampling(**model.sampling | named)
        self.model = model.eval()
        self.overlap, self.seed = overlap, seed
        self.generator = torch.Generator().manual_seed(seed)
        exact = model.config.unet.norm_scope != "clip"
        self.streaming = exact if streaming is None else streaming
        if self.streaming and not exact:
            print("streaming approximates here: this network's norms see the whole clip, so its "
                  "history changes "
                  "with every frame")
        self.window: Window | None = None

    @property
    def latents(self) -> Tensor:
        return self.window.latents

    @torch.inference_mode()
    def reset(self, frames: np.ndarray, actions: np.ndarray | None = None) -> None:
        """Begin a world from what was seen.

        frames   uint8 [T0, H, W, 3], or [B, T0, H, W, 3] for B worlds side by side; fitted to the
                 model's size
        actions  [T0 - 1, A] or [B, T0 - 1, A]: what was done between them; None: not known (and so
                 hidden)

        Raises RequestError for other shapes or numbers that are not finite, and leaves the world as
        it was.
        """
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim not in (4,
                                                           5) or frames.shape[
                                                               -1] != 3 or 0 in frames.shape:
            raise RequestError(f"frames is {frames.dtype} {list(frames.shape)}; expected uint8 "
                               "[T0, H, W, 3] or "
                               "[B, T0, H, W, 3]")
        batched, clips = frames.ndim == 5, frames if frames.ndim == 5 else frames[None]
        B, T0 = clips.shape[:2]
        led_to = torch.zeros(B, T0, self.model.action_dim, device=self.model.device)
        known = torch.ones(B, T0, device=self.model.device)
        if actions is None:
            known[:, 1:] = 0
        else:
            led_to[:, 1:] = self.check_actions(actions, (B, T0 - 1, self.model.action_dim), batched)

        self.batched = batched
        self.generator = torch.Generator().manual_seed(self.seed)
        config = self.model.config
        fitted = torch.from_numpy(np.stack([fit_frames(clip, *config.size, config.fit)
                                            for clip in clips]))
        pixels = to_pixels(fitted.to(self.model.device))  # [B, T0, 3, H, W]
        latents = self.model.encode(pixels)
        history = self.to_history(latents)
        everything = Window(latents, pixels, history, led_to, known, latents[:, :1], None,
                            self.generator.get_state())
        self.window = self.slide(everything, min(T0, self.model.num_frames))
        self.cache = Cache(self.model.num_frames)

    @torch.inference_mode()
    def step(self, action: np.ndarray) -> np.ndarray:
        """Take an action [A] (or [B, A]) and imagine the next frame, uint8 [H, W, 3] (or [B, H, W,
        3]).

        Raises RequestError for an action of another shape or one that is not finite. A step that
        fails or is interrupted leaves the world as it was.
        """
        if self.window is None:
            raise RequestError("the world has no frame yet: call reset(frames) first")
        window, B = self.window, len(self.window.latents)
        action = self.check_actions(action, (B, self.model.action_dim), self.batched)
        if window.length == self.model.num_frames:
            window, self.cache = self.slide(window, self.overlap), Cache(self.model.num_frames)
        self.generator.set_state(window.random_state)

        window = replace(window, actions=torch.cat([window.actions, action[:, None]], dim=1),
                         action_mask=torch.cat([window.action_mask, torch.ones_like(action[:, :1])],
                                               dim=1))
        # keys and values of caption and anchor, projected once for all steps of this frame
        self.contexts = {}
        # [B, 1, C, h, w]
        x = self.denoise(self.noise(B, 1), lambda x, k: self.velocity(window, x, k))

        pixels = self.model.decode(x)
        history = torch.cat([window.history, self.to_history(x)], dim=1)
        self.window = replace(
            window, latents=torch.cat([window.latents, x], dim=1),
            pixels=torch.cat([window.pixels, pixels], dim=1), history=history,
            random_state=self.generator.get_state())
        frame = to_frames(pixels)[:, 0]
        return frame if self.batched else frame[0]

    def denoise(self, x: Tensor, velocity: Callable[[Tensor, int], Tensor]) -> Tensor:
        """From noise x [B, T, C, h, w] to clean latents, through the DDIM levels. Paper: Algorithm
        2."""
        levels = self.model.schedule.ddim_levels(self.sampling.steps)
        for k, k_next in zip(levels, levels[1:] + [0], strict=True):
            v = velocity(x, k)
            fresh = self.noise(*x.shape[:2]) if self.sampling.eta > 0 else None
            x = self.model.schedule.ddim_step(x, v, k, k_next, self.sampling.eta, fresh)
        return x

    def velocity(self, window: Window, x: Tensor, k: int) -> Tensor:
        """The guided velocity of the newest frame x [B, 1, C, h, w] at level k.

        `window` holds the frames before and, as the last of its actions, the one that leads to x.
        """
        low, high = self.sampling.guidance_levels
        guided = self.sampling.guidance != 1 and low <= k < high
        versions = [1, 0] if guided else [1]  # of x: with its action, and with the action hidden
        predict = self.predict_streaming if self.streaming else self.predict_recomputing
        v = predict(window, x, k, versions)
        return guide(*v, self.sampling.guidance, self.sampling.rescale) if guided else v[0]

    def predict_streaming(self, window: Window, x: Tensor, k: int,
                          versions: list[int]) -> list[Tensor]:
        """The velocity of every version of x, from one pass over those alone and what the cache
        lacks.

        The cache lacks the frame before in the first pass of a step, or all frames of a new window.
        """
        first, T, n = self.cache.frames, window.length, len(versions)
        clip = torch.cat([window.history[:, first:]] + [x] * n, dim=1)
        actions = torch.cat([window.actions[:, first:]] + [window.actions[:, T:]] * (n - 1), dim=1)
        masks = [window.action_mask[:, first:T]] + [window.action_mask[:, T:] * keep
                                                    for keep in versions]
        levels = rollout_levels(T - first, self.sampling.history_level, k,
                                n).to(x.device).expand(len(x), -1)
        if (first, n) not in self.contexts:
            self.contexts[first, n] = self.model.context(window.tokens, T + 1, first, n)
        v = self.run_network(clip, levels, window.anchor, self.contexts[first, n], actions,
                             torch.cat(masks, dim=1), self.cache, n)
        return list(v[:, T - first :].split(1, dim=1))

    def predict_recomputing(self, window: Window, x: Tensor, k: int,
                            versions: list[int]) -> list[Tensor]:
        """The same without a cache: the whole window once per version, side by side in the batch.
        """
        T, n = window.length, len(versions)
        clip = torch.cat([window.history, x], dim=1).repeat(n, 1, 1, 1, 1)
        masks = [torch.cat([window.action_mask[:, :T], window.action_mask[:, T:] * keep], dim=1)
                 for keep in versions]
        levels = rollout_levels(T, self.sampling.history_level, k).to(x.device).expand(len(clip),
                                                                                       -1)
        if n not in self.contexts:
            self.contexts[n] = self.model.context(window.tokens.repeat(n, 1, 1), T + 1)
        v = self.run_network(clip, levels, window.anchor.repeat(n, 1, 1, 1, 1), self.contexts[n],
                             window.actions.repeat(n, 1, 1), torch.cat(masks))
        return list(v[:, -1:].chunk(n))

    def run_network(self, *inputs) -> Tensor:
        cuda = self.model.device.type == "cuda"
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=cuda):
            return self.model.denoise(*inputs).float()

    def slide(self, window: Window, length: int) -> Window:
        """Keep the last `length` frames; the first of them becomes the anchor, to which no action
        leads."""
        actions, action_mask = window.actions[:, -length:].clone(), window.action_mask[:,
                                                                                       -length:].clone()
        actions[:, 0], action_mask[:, 0] = 0, 1
        pixels = window.pixels[:, -length:]
        return replace(window, pixels=pixels, history=window.history[:, -length:], actions=actions,
                       action_mask=action_mask, anchor=window.latents[:, -length, None],
                       tokens=self.model.image_tokens(pixels[:, 0]))

    def go_back(self, window: Window) -> None:
        """Make an earlier `.window` the present one."""
        self.window, self.cache = window, Cache(self.model.num_frames)

    def to_history(self, latents: Tensor) -> Tensor:
        """Clean latents [B, T, C, h, w] to the small noise level at which the history is held."""
        noise = self.noise(*latents.shape[:2])
        return self.model.schedule.add_noise(latents, self.sampling.history_level, noise)

    def noise(self, B: int, T: int) -> Tensor:
        """All that is random about a world, [B, T, C, h, w]. It is asked for in this order: history
        noise of the given frames; then for every new frame its start, the noise of each DDIM step
        if eta > 0, its history noise.

        Drawn on the CPU, so that a seed means the same on every device.
        """
        noise = torch.randn(B, T, *self.model.latent_shape, generator=self.generator)
        return noise.to(self.model.device)

    def check_actions(self, actions: np.ndarray, shape: tuple[int, ...], batched: bool) -> Tensor:
        """Actions as a tensor of the given shape, the batch dimension added where the world has
        none."""
        actions = torch.from_numpy(to_numbers(actions)).to(self.model.device)
        actions = actions if batched else actions[None]
        if actions.shape != shape:
            raise RequestError(f"actions is {list(actions.shape)}; expected {list(shape)} (with "
                               "the batch "
                               "dimension)")
        return actions


def to_numbers(actions: object) -> np.ndarray:
    """Actions as finite float32. Raises RequestError for anything that is not a regular array of
    real numbers."""
    try:
        actions = np.asarray(actions)
    except ValueError:
        raise RequestError("the actions are no regular array of numbers") from None
    if actions.dtype.kind not in "buif":
        raise RequestError(f"the actions are of type {actions.dtype}; expected real numbers")
    with np.errstate(over="ignore"):
        actions = actions.astype(np.float32)
    if not np.isfinite(actions).all():
        raise RequestError("the actions hold a number that is not finite (NaN or infinity)")
    return actions


def load_world(checkpoint: str | Path, device: str | torch.device | None = None,
               **options) -> WorldModel:
    """A world model from a run folder of train.py, a checkpoint in it, or a released Vid2World
    checkpoint.

    device   None means CUDA where there is one
    options  those of WorldModel

    Raises CheckpointError for a file that cannot be used, RequestError for options out of range.
    """
    path = Path(checkpoint)
    keep_freed_memory()
    released = path.is_file() and "config" not in read_checkpoint(path)
    model = from_vid2world(path) if released else load_model(path)
    return WorldModel(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")),
                      **options)


def rollout(world: WorldModel, frames: np.ndarray, actions: np.ndarray,
            context: int = 1) -> np.ndarray:
    """Imagine an episode: the first `context` frames are given, then one frame per action.

    frames [≥ context, H, W, 3], actions [T - 1, A]; returns uint8 [T, H, W, 3] at the model's size.
    """
    world.reset(frames[:context], actions[: context - 1])
    given = list(to_frames(world.window.pixels)[0])
    bar = tqdm(actions[context - 1 :], unit="frame", leave=False, disable=None)
    return np.stack(given + [world.step(action) for action in bar])


# --------------------------------------------------------------------------------------------------
# The command


@dataclass
class Settings:
    checkpoint: str | None = option(
        None, "run folder of train.py, or a released Vid2World checkpoint; if left out, the "
              "bundled world")
    data: str | None = option(None, "data set; if left out, the one the checkpoint was trained on",
                              choices=DATA_SETS)
    root: str | None = option(None, "its folder; if left out, the one the checkpoint was trained "
                                    "on")
    episode: int = option(0, "which held-out episode")
    context: int | None = option(None, "frames given at the start; if left out, as the data set "
                                       "has it", type=int)
    frames: int = option(16, "frames in all, given ones included")
    actions: str | None = option(None, "take the actions of this .npy file, [N, A], from the last "
                                       "given frame on")
    repeat_action: list[float] | None = option(
        None, "repeat one action: the numbers given, or without numbers the episode's first",
        type=float, nargs="*")
    guidance: float | None = option(
        None, "1 follows the action as trained, more exaggerates it; if left out, the checkpoint's",
        type=float)
    guidance_levels: list[int] | None = option(
        None, "noise levels at which guidance applies; if left out, the checkpoint's", type=int,
        nargs=2)
    steps: int | None = option(None, "denoising steps per frame; if left out, the checkpoint's",
                               type=int)
    eta: float | None = option(None, "fresh noise per step, 0 to 1; if left out, the checkpoint's",
                               type=float)
    seed: int = option(0, "of all noise")
    out: str = option("rollouts", "folder for the pictures")


def choose_actions(settings: Settings, recorded: np.ndarray, context: int) -> tuple[np.ndarray,
                                                                                    str]:
    """The actions [T - 1, A] of the rollout, and where they come from. Given frames came by the
    recorded ones."""
    new = settings.frames - context
    if settings.actions is not None:
        future, origin = to_numbers(read_npy(settings.actions)), settings.actions
    elif settings.repeat_action is not None:
        action = to_numbers(settings.repeat_action or recorded[context - 1])
        future, origin = np.repeat(action[None], new, axis=0), "one action, repeated"
    else:
        future, origin = recorded[context - 1 : -1], "the episode's"
    if future.ndim != 2 or future.shape[1] != recorded.shape[1] or not len(future):
        raise DataError(f"the actions are {list(future.shape)}; expected [N, "
                        f"{recorded.shape[1]}], a row for every "
                        "new frame")
    return np.concatenate([recorded[: context - 1], future[:new]]), origin


def open_data(settings: Settings) -> tuple[str, Episodes]:
    """Name and held-out episodes of the data set asked for, or else of the one the checkpoint was
    trained on."""
    path = Path(settings.checkpoint or TINY_WORLD)
    trained_on = read_checkpoint(path / "checkpoint.pt" if path.is_dir() else path).get("data", {})
    name = settings.data or trained_on.get("name")
    if not name:
        raise DataError("this checkpoint does not say what it was trained on: name the data set "
                        "(--data, --root)")
    if name not in DATA_SETS:
        raise CheckpointError(f"{path} was trained on {name!r}, which is no data set here: name "
                              "one with --data")
    root = settings.root or trained_on.get("root") or default_root(name)
    print(f"world: {readable_path(path, TINY_WORLD)}, data: {name} from "
          f"{readable_path(root, SAMPLES)}")
    return name, open_episodes(name, root, "val")


def run(settings: Settings) -> None:
    world = load_world(settings.checkpoint or TINY_WORLD, guidance=settings.guidance,
                       steps=settings.steps, eta=settings.eta,
                       guidance_levels=settings.guidance_levels and tuple(settings.guidance_levels),
                       seed=settings.seed)
    name, episodes = open_data(settings)
    dataset = DATA_SETS[name]
    if world.model.action_dim != dataset.action_dim:
        raise DataError(f"{name} has actions of {dataset.action_dim} numbers, but this model takes "
                        f"{world.model.action_dim}")
    if not 0 <= settings.episode < len(episodes):
        raise DataError(f"there is no episode {settings.episode}; 0 to {len(episodes) - 1} are "
                        "held out")
    episode = episodes[settings.episode]
    context = dataset.context if settings.context is None else settings.context
    if not 1 <= context < min(settings.frames, episode.length):
        raise DataError(f"context is {context}; it must be at least 1 and leave a frame to "
                        "imagine of the "
                        f"{min(settings.frames, episode.length)} (--frames {settings.frames}, and "
                        "the episode has "
                        f"{episode.length})")
    frames, recorded = episode.read(0, episode.length)
    actions, origin = choose_actions(settings, recorded, context)
    print(f"episode {episode.name}, {len(actions) + 1} frames, actions: {origin}; {world.sampling}")

    imagined = rollout(world, frames, actions, context)
    rows = {"imagined": imagined}
    if origin == "the episode's":
        truth = fit_frames(frames[: len(imagined)], *world.model.config.size,
                           world.model.config.fit)
        rows = {"truth": truth} | rows
        scores = psnr(imagined, truth)[context:]
        baseline = psnr(truth[context - 1 : context], truth)[context:]
        for t, (ours, theirs) in enumerate(zip(scores, baseline, strict=True), start=context):
            print(f"frame {t:3d}  PSNR {ours:6.2f} dB   (repeating the last given frame: "
                  f"{theirs:5.2f})")
        print(f"mean of {len(scores)} imagined frames: {scores.mean():.2f} dB (repeating: "
              f"{baseline.mean():.2f})")

    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{name}_val{settings.episode}_guidance{world.sampling.guidance:g}"
    save_strip(f"{stem}.png", rows)
    captions = [""] * context + [describe_action(dataset, action)
                                 for action in actions[context - 1 :]]
    save_gif(f"{stem}.gif", rows, dataset.fps, captions)
    print(f"pictures: {stem}.png, {stem}.gif")


def main(argv: list[str] | None = None) -> int:
    description = "Roll a world model out on an episode's actions, or on others. To drive one: python -m play"
    return command("sample.py", lambda: run(parse(Settings, description, argv)))


if __name__ == "__main__":
    sys.exit(main())
