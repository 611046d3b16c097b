"""The world model: reset(frames), then step(action) -> the next frame. And a command for rollouts.

    python sample.py --guidance 2.0                             (the bundled world)
    python sample.py --checkpoint runs/rt1 --guidance 2.0

A world model holds a window of frames and predicts one more at a time:

    slot       0        1       2       3                     at most num_frames (16) slots
            ┌───────┬───────┬───────┬───────┐
            │anchor │       │       │  new  │   anchor   its clean latents stand beside the noisy
            └───────┴───────┴───────┴───────┘            ones of every frame; slot i reads its
    level    k_hist  k_hist  k_hist  999 → 0             image tokens i
    action    zero     a₀      a₁      a₂      history  noised once, a little, and kept
                                               new      starts as noise

 1. The new frame starts from Gaussian noise and is denoised through the DDIM levels. At each level
    the network predicts the velocity with and without the newest action, and guidance amplifies
    the difference.
 2. The finished frame is noised to k_hist and joins the history.
 3. When all slots are taken, the last `overlap` frames become the new window, the first of them the
    new anchor. As in a training clip, no action leads to it. So a rollout may be of any length, and
    the network never meets a clip longer than those it was trained on.

Streaming: a causal network never looks ahead, so its layers cache the history
(temporal/streaming.py), and step 1 runs the network on the new frame alone. Only the first pass
takes the frame before along: steps + 1 frames to compute, however long the history.

Paper: section 4.2 and Algorithm 2 (action-guided, autoregressive sampling); settings in B.4.
"""
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from action_guidance import guide
from data import (DATA_SETS, SAMPLES, DataSet, Episodes, bundled_world, default_root,
                  describe_action, fit_frames, open_episodes)
from diffusion_forcing import LEVELS, rollout_levels
from episodes.frames import for_metrics
from episodes.npz import read_npy
from model.device import best_device
from model.memory import keep_malloc_heap
from model.saving import ARENA_WORLD, TINY_WORLD, display_path, load_world_model
from model.vid2world import Model, to_frames, to_pixels
from support.errors import CheckpointError, DataError, RequestError
from support.options import option, program
from support.pictures import psnr, save_gif, save_strip
from support.schema import conform
from temporal.captured import captured
from temporal.streaming import Cache
from unet import Context


@dataclass(frozen=True)
class Sampling:
    """How a frame is sampled. The defaults are the paper's (B.4); a checkpoint may carry others.

    guidance         λ: 1 follows the newest action as trained, more amplifies it
    guidance_levels  guidance applies at noise levels low <= k < high; elsewhere λ is 1, and the
                     unconditional branch is saved (Kynkäänniemi et al. 2024, arXiv 2404.07724)
    rescale          see `action_guidance.guide`
    steps            of denoising
    eta              0 is deterministic given the first noise (DDIM), 1 adds fresh noise every step
    history_level    noise level of the history: 20 in the paper's text, 39 in its code

    Raises RequestError for values out of range.
    """
    guidance: float = 2.5
    guidance_levels: tuple[int, int] = (0, LEVELS)
    rescale: float = 0.7
    steps: int = 50
    eta: float = 1.0
    history_level: int = 39

    def __post_init__(self):
        low, high = self.guidance_levels
        if not np.isfinite(self.guidance):
            raise RequestError(f"guidance is {self.guidance}; it must be a finite number")
        if not 0 <= low <= high <= LEVELS:
            raise RequestError(f"guidance_levels is {low}, {high}; expected 0 <= low <= high <= "
                               "1000")
        ranges = {"eta": (0, 1), "rescale": (0, 1), "steps": (1, LEVELS),
                  "history_level": (0, LEVELS - 1)}
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise RequestError(f"{name} is {value}; it must be between {least} and {most}")

    def __str__(self) -> str:
        low, high = self.guidance_levels
        limited = self.guidance != 1 and (low, high) != (0, LEVELS)
        where = f" at levels {low} to {high}" if limited else ""
        return f"guidance {self.guidance:g}{where}, {self.steps} steps, η {self.eta:g}"


@dataclass(frozen=True)
class Window:
    """Immutable state of a rollout: keep a reference, and `restore` returns to that frame.

    All except `latents` are of the T frames in the window.
    """
    latents: Tensor  # [B, all frames so far, C, h, w], clean
    pixels: Tensor  # [B, T, 3, H, W] in [-1, 1]
    history: Tensor  # [B, T, C, h, w], latents noised once to the history level
    actions: Tensor  # [B, T, A], the action that led to each frame; zeros lead to the first
    action_mask: Tensor  # [B, T], 1 where that action is known, 0 where it is hidden
    anchor: Tensor  # [B, 1, C, h, w], clean latents of the first frame
    tokens: Tensor  # [B, slots · L, D], image tokens of the first frame
    random_state: Tensor  # of the generator, after the last frame

    @property
    def length(self) -> int:
        return self.history.shape[1]


class WorldModel:
    """A learned environment: reset(frames), step(action).

    guidance, guidance_levels, rescale, steps, eta, history_level
               see `Sampling`; what is left out comes from the checkpoint, else from the paper
    overlap    frames that stay when the window is full
    seed       of all noise; the same seed, frames and actions give the same rollout
    streaming  cache the history (True) or run it again at every step (False). None caches where
               that is exact: everywhere except with norm_scope "clip", whose history changes with
               every new frame

    `.latents`, float32 [B, T, C, h, w], holds every frame so far, given and predicted.
    Raises RequestError for options out of range and for a passive network.
    """

    def __init__(self, model: Model, guidance: float | None = None,
                 guidance_levels: tuple[int, int] | None = None, steps: int | None = None,
                 eta: float | None = None, rescale: float | None = None,
                 history_level: int | None = None, overlap: int = 8, seed: int = 0,
                 streaming: bool | None = None):
        if not model.action_dim or not model.config.unet.causal:
            raise RequestError("this network is passive: a world model is causal and takes actions")
        most = model.num_frames - 1
        if not 1 <= overlap <= most:
            raise RequestError(f"overlap is {overlap}; it must be between 1 and {most}")
        if not 0 <= seed < 2**63:
            raise RequestError(f"seed is {seed}; it must be between 0 and 2^63 - 1")
        named = {"guidance": guidance, "guidance_levels": guidance_levels, "steps": steps,
                 "eta": eta, "rescale": rescale, "history_level": history_level}
        named = {name: value for name, value in named.items() if value is not None}
        conform(Sampling, model.sampling, "sampling of the checkpoint")
        self.sampling = Sampling(**model.sampling | named)
        self.model, self.overlap, self.seed = model.eval(), overlap, seed
        self.generator = torch.Generator().manual_seed(seed)
        exact = model.config.unet.norm_scope != "clip"
        self.streaming = exact if streaming is None else streaming
        if self.streaming and not exact:
            print("streaming approximates here: this network's norms see the whole clip, so its "
                  "history changes with every frame")
        visited = model.schedule.ddim_levels(self.sampling.steps)
        if self.sampling.guidance != 1 and not any(len(self.branches(k)) > 1 for k in visited):
            low, high = self.sampling.guidance_levels
            print(f"guidance {self.sampling.guidance:g} changes nothing: none of the levels "
                  f"visited, {visited[0]} to {visited[-1]}, is in [{low}, {high})")
        self.window: Window | None = None

    @property
    def latents(self) -> Tensor:
        return self.window.latents

    @torch.inference_mode()
    def reset(self, frames: np.ndarray, actions: np.ndarray | None = None) -> None:
        """Begin a world from what was seen.

        frames   uint8 [T0, H, W, 3], or [B, T0, H, W, 3] for B worlds side by side; any H and W
        actions  [T0 - 1, A] or [B, T0 - 1, A]: what was done between them; None hides it

        Raises RequestError for other shapes, types or infinite numbers, and leaves the world as is.
        """
        frames = np.asarray(frames)
        if (frames.dtype != np.uint8 or frames.ndim not in (4, 5) or frames.shape[-1] != 3
                or 0 in frames.shape):
            raise RequestError(f"frames is {frames.dtype} {list(frames.shape)}; expected uint8 "
                               "[T0, H, W, 3] or [B, T0, H, W, 3]")
        batched = frames.ndim == 5
        clips = frames if batched else frames[None]
        B, T0 = clips.shape[:2]
        # Check everything first, then change: a refused reset leaves the world as it was.
        A = self.model.action_dim
        led_to = torch.zeros(B, T0, A, device=self.model.device)
        action_mask = torch.ones(B, T0, device=self.model.device)
        if actions is None:
            action_mask[:, 1:] = 0
        else:
            led_to[:, 1:] = self.check_actions(actions, (B, T0 - 1, A), batched)

        config = self.model.config
        self.generator = torch.Generator().manual_seed(self.seed)
        fitted = np.stack([fit_frames(clip, *config.size, config.fit) for clip in clips])
        pixels = to_pixels(torch.from_numpy(fitted).to(self.model.device))  # [B, T0, 3, H, W]
        latents = self.model.encode(pixels)
        everything = Window(latents, pixels, self.to_history(latents), led_to, action_mask,
                            anchor=None, tokens=None, random_state=self.generator.get_state())
        self.restore(self.slide(everything, min(T0, self.model.num_frames)))
        self.batched = batched

    @torch.inference_mode()
    def step(self, action: np.ndarray) -> np.ndarray:
        """Take an action [A] (or [B, A]); gives the next frame, uint8 [H, W, 3] (or [B, H, W, 3]).

        Raises RequestError for an action of another shape or one that is not finite. A step that
        fails or is interrupted leaves the world as it was.
        """
        if self.window is None:
            raise RequestError("the world has no frame yet: call reset(frames) first")
        window = self.window
        B = len(window.latents)
        action = self.check_actions(action, (B, self.model.action_dim), self.batched)
        if window.length == self.model.num_frames:  # full: the last frames begin a new window
            window = self.slide(window, self.overlap)
            self.cache = Cache(self.model.num_frames)  # which the first pass fills
        # From here on the window has one action more than it has frames: the one that leads to x.
        window = replace(window, actions=torch.cat([window.actions, action[:, None]], dim=1),
                         action_mask=F.pad(window.action_mask, (0, 1), value=1.0))

        # The noise depends on the window alone, so a step that is taken again gives the same frame.
        self.generator.set_state(window.random_state)
        self.contexts = {}  # projected once for all levels of this frame
        velocity = self.velocity_cached if self.streaming else self.velocity_uncached
        # x_999 ~ N(0, 1), then DDIM
        with self.autocast():
            latents = self.model.schedule.sample(  # [B, 1, C, h, w]
                self.noise(B, 1), partial(velocity, window), self.sampling.steps,
                self.sampling.eta, draw_noise=lambda: self.noise(B, 1))
        pixels = self.model.decode(latents)
        history = self.to_history(latents)  # noised once, here, and kept
        self.window = replace(window, latents=torch.cat([window.latents, latents], dim=1),
                              pixels=torch.cat([window.pixels, pixels], dim=1),
                              history=torch.cat([window.history, history], dim=1),
                              random_state=self.generator.get_state())
        frame = to_frames(pixels)[:, 0]
        return frame if self.batched else frame[0]

    def velocity_uncached(self, window: Window, x: Tensor, k: int) -> Tensor:
        """The guided velocity of the newest frame x [B, 1, C, h, w] at level k, by definition: the
        whole window at once, its T frames of history and x, a batch of it for each branch.

        The last of the window's actions is the one that leads to x.
        """
        T = window.length
        keep_action = self.branches(k)
        n = len(keep_action)
        clip = torch.cat([window.history, x], dim=1).repeat(n, 1, 1, 1, 1)  # [n·B, T + 1, C, h, w]
        levels = rollout_levels(T, self.sampling.history_level, k).to(x.device)
        past, newest = window.action_mask.split([T, 1], dim=1)
        mask = torch.cat([torch.cat([past, newest * keep], dim=1) for keep in keep_action])
        v = self.model.denoise(clip, levels.expand(len(clip), -1),
                               window.anchor.repeat(n, 1, 1, 1, 1),
                               self.context(window, n, range(T + 1)),
                               window.actions.repeat(n, 1, 1), mask)
        return self.guided(v[:, -1:].float().chunk(n))

    def velocity_cached(self, window: Window, x: Tensor, k: int) -> Tensor:
        """The same with the cache: one pass over the branches of x, side by side in time, and over
        what the cache lacks of the history (in the first pass of a step the frame before; in a new
        window all)."""
        T = window.length
        start = self.cache.frames
        keep_action = self.branches(k)
        n = len(keep_action)
        clip = torch.cat([window.history[:, start:]] + [x] * n, dim=1)  # [B, T - start + n, …]
        levels = rollout_levels(T - start, self.sampling.history_level, k, n).to(x.device)
        past, newest = window.action_mask[:, start:].split([T - start, 1], dim=1)
        mask = torch.cat([past] + [newest * keep for keep in keep_action], dim=1)
        slots = [*range(start, T)] + [T] * n
        self.cache.branches = n
        denoise = captured(self.model)
        v = denoise(clip, levels.expand(len(clip), -1), window.anchor,
                    self.context(window, 1, slots), window.actions[:, slots], mask, self.cache)
        return self.guided(v[:, T - start :].float().split(1, dim=1))

    def branches(self, k: int) -> list[int]:
        """Of each branch at level k, whether it keeps the newest action: conditional, then
        unconditional where guidance applies."""
        low, high = self.sampling.guidance_levels
        return [1, 0] if self.sampling.guidance != 1 and low <= k < high else [1]

    def guided(self, v: Sequence[Tensor]) -> Tensor:
        """One velocity [B, 1, C, h, w] from those of the branches."""
        return guide(*v, self.sampling.guidance, self.sampling.rescale) if len(v) == 2 else v[0]

    def context(self, window: Window, copies: int, slots: Sequence[int]) -> Context:
        """What the frames in these slots attend to, kept while a frame is being denoised."""
        key = copies, tuple(slots)
        if key not in self.contexts:
            self.contexts[key] = self.model.context(window.tokens.repeat(copies, 1, 1), slots)
        return self.contexts[key]

    def autocast(self) -> AbstractContextManager:
        """The network computes in bfloat16 on CUDA."""
        cuda = self.model.device.type == "cuda"
        return torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()

    def slide(self, window: Window, length: int) -> Window:
        """Keep the last `length` frames; the first becomes the anchor, to which no action leads."""
        actions = window.actions[:, -length:].clone()
        actions[:, 0] = 0
        action_mask = window.action_mask[:, -length:].clone()
        action_mask[:, 0] = 1
        pixels = window.pixels[:, -length:]
        return replace(window, pixels=pixels, history=window.history[:, -length:], actions=actions,
                       action_mask=action_mask, anchor=window.latents[:, -length, None],
                       tokens=self.model.image_tokens(pixels[:, 0]))

    def restore(self, window: Window) -> None:
        """Return to an earlier `.window`."""
        self.window = window
        self.cache = Cache(self.model.num_frames)

    def to_history(self, latents: Tensor) -> Tensor:
        """Clean latents [B, T, C, h, w] to the small noise level at which the history is held."""
        noise = self.noise(*latents.shape[:2])
        # x_hist = √ᾱ·s·z + √(1-ᾱ)·ε at k_hist
        return self.model.schedule.add_noise(latents, self.sampling.history_level, noise)

    def noise(self, B: int, T: int) -> Tensor:
        """All randomness of a rollout, [B, T, C, h, w], drawn on the CPU for any device.

        The order: history noise of the given frames; then for every new frame its start, the noise
        of each DDIM step if eta > 0, its history noise.
        """
        noise = torch.randn(B, T, *self.model.latent_shape, generator=self.generator)
        return noise.to(self.model.device)

    def check_actions(self, actions: np.ndarray, shape: tuple[int, ...], batched: bool) -> Tensor:
        """Actions, in the data's own units, as a tensor of this shape for the network; the batch
        dimension is added where the world has none. Raises RequestError."""
        actions = torch.from_numpy(to_numbers(actions)).to(self.model.device)
        actions = actions if batched else actions[None]
        if actions.shape != shape:
            raise RequestError(f"actions is {list(actions.shape)}; expected {list(shape)} (with "
                               "the batch dimension)")
        return self.model.standardise(actions)


def to_numbers(actions: object) -> np.ndarray:
    """Actions as finite float32. Raises RequestError for anything but real numbers."""
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


def load_world(checkpoint: str | Path, device: str | torch.device | None = None, **options
               ) -> WorldModel:
    """A world model from a run folder of train.py, a checkpoint in it, or a released checkpoint.

    device   None means the best there is: see `model.device.best_device`
    options  those of WorldModel

    Raises CheckpointError for a file that cannot be used, RequestError for options out of range.
    """
    keep_malloc_heap()
    model = load_world_model(checkpoint).to(device or best_device()).requires_grad_(False)
    return WorldModel(model, **options)


def rollout(world: WorldModel, frames: np.ndarray, actions: np.ndarray, context_frames: int = 1
            ) -> np.ndarray:
    """Imagine an episode: the first `context_frames` frames are given, then one frame per action.

    frames [at least these, H, W, 3], actions [T - 1, A]; returns uint8 [T, H, W, 3] at the model's
    size.
    """
    world.reset(frames[:context_frames], actions[: context_frames - 1])
    given = list(to_frames(world.window.pixels)[0])
    bar = tqdm(actions[context_frames - 1 :], unit="frame", leave=False, disable=None)
    return np.stack(given + [world.step(action) for action in bar])


# --------------------------------------------------------------------------------------------------
# The command


@dataclass
class Settings:
    """What is left out comes from the checkpoint, or from the data set."""
    checkpoint: str | None = option(None, "run folder of train.py, or a released checkpoint")
    data: str | None = option(None, "data set", choices=DATA_SETS)
    root: str | None = option(None, "its folder")
    episode: int = option(0, "which held-out episode", least=0)
    context_frames: int | None = option(None, "frames given at the start", type=int)
    frames: int = option(16, "frames in all, given ones included")
    actions: str | None = option(None, ".npy file [N, A] of actions from the last given frame on")
    repeat_action: list[float] | None = option(
        None, "repeat one action: these numbers, or the episode's first", type=float, nargs="*")
    guidance: float | None = option(
        None, "1 follows the action as trained, more amplifies it", type=float)
    guidance_levels: list[int] | None = option(
        None, "noise levels at which guidance applies", type=int, nargs=2, least=0,
        metavar=("LOW", "HIGH"))
    steps: int | None = option(None, "denoising steps per frame", type=int)
    eta: float | None = option(None, "fresh noise per step, 0 to 1", type=float)
    seed: int = option(0, "random seed", least=0)
    out: str = option("rollouts", "folder for the pictures")


def choose_actions(settings: Settings, recorded: np.ndarray, context_frames: int
                   ) -> tuple[np.ndarray, str]:
    """The actions [T - 1, A] to take, and where they come from. Given frames keep their own."""
    new = settings.frames - context_frames
    if settings.actions is not None:
        future, origin = to_numbers(read_npy(settings.actions)), settings.actions
    elif settings.repeat_action is not None:
        action = to_numbers(settings.repeat_action or recorded[context_frames - 1])
        future, origin = np.repeat(action[None], new, axis=0), "one action, repeated"
    else:
        future, origin = recorded[context_frames - 1 : -1], "the episode's"
    if future.ndim != 2 or future.shape[1] != recorded.shape[1] or not len(future):
        raise DataError(f"the actions are {list(future.shape)}; expected [N, {recorded.shape[1]}], "
                        "a row for every new frame")
    return np.concatenate([recorded[: context_frames - 1], future[:new]]), origin


def open_data(settings: Settings, model: Model) -> tuple[str, Episodes]:
    """Name and held-out episodes of the data set asked for, or of the one that was trained on.

    Raises DataError for one whose actions the model does not take.
    """
    path = Path(settings.checkpoint or bundled_world(settings.data))
    trained_on = model.trained_on
    name = settings.data or trained_on.get("name")
    if name not in DATA_SETS:
        what = f"was trained on {name!r}, no data set here" if name else "names no data set"
        raise CheckpointError(f"{path} {what}: name one (--data, --root)")
    root = settings.root or trained_on.get("root") or default_root(name)
    print(f"world: {display_path(path, TINY_WORLD, ARENA_WORLD)}, data: {name} from "
          f"{display_path(root, SAMPLES)}")
    same = str(Path(root).resolve()) == trained_on.get("root")
    episodes = open_episodes(name, root, "val", fps=trained_on.get("fps") if same else None)
    compare_actions(name, episodes.dataset, model, trained_on.get("names"))
    return name, episodes


def compare_actions(name: str, dataset: DataSet, model: Model, learned: Sequence[str] | None = None
                    ) -> None:
    """Refuse a data set whose actions the model does not take; warn of what else differs.

    learned  the names of the numbers that the model has learned from
    """
    if model.action_dim != dataset.action_dim:
        raise DataError(f"{name} has actions of {dataset.action_dim} numbers, but this model takes "
                        f"{model.action_dim}")
    if learned and dataset.names and tuple(learned) != dataset.names:
        raise DataError(f"the actions of {name} are {', '.join(dataset.names)}, but this model "
                        f"has learned from {', '.join(learned)}")
    told = model.config.unet.default_fps
    if told != dataset.network_fps:
        print(f"warning: {name} has {dataset.network_fps} frames a second, but this model has "
              f"learned from {told}: its motions will come out faster or slower")


def run(settings: Settings) -> None:
    levels = settings.guidance_levels and tuple(settings.guidance_levels)
    world = load_world(settings.checkpoint or bundled_world(settings.data),
                       guidance=settings.guidance, guidance_levels=levels, steps=settings.steps,
                       eta=settings.eta, seed=settings.seed)
    name, episodes = open_data(settings, world.model)
    dataset, config = episodes.dataset, world.model.config
    if not 0 <= settings.episode < len(episodes):
        raise DataError(f"there is no episode {settings.episode}; 0 to {len(episodes) - 1} are "
                        "held out")
    episode = episodes[settings.episode]
    context_frames = settings.context_frames or dataset.context_frames
    most = min(settings.frames, episode.length) - 1
    if not 1 <= context_frames <= most:
        raise DataError(f"--context-frames is {context_frames}; it must be between 1 and {most}, "
                        f"to leave a frame to predict (--frames {settings.frames}, the episode "
                        f"{episode.length})")
    frames, recorded = episode.read(0, episode.length)
    actions, origin = choose_actions(settings, recorded, context_frames)
    print(f"episode {episode.name}, {len(actions) + 1} frames, actions: {origin}; {world.sampling}")

    imagined = rollout(world, frames, actions, context_frames)
    rows = {"imagined": imagined}
    if origin == "the episode's":
        truth = fit_frames(frames[: len(imagined)], *config.size, config.fit)
        rows = {"truth": truth} | rows
        ours, theirs = (for_metrics(clip, dataset.aspect, dataset.compare_at)
                        for clip in (imagined, truth))
        repeating = psnr(theirs[context_frames - 1 : context_frames], theirs)[context_frames:]
        ours = psnr(ours, theirs)[context_frames:]
        for t, (db, baseline) in enumerate(zip(ours, repeating, strict=True), start=context_frames):
            print(f"frame {t:3d}   PSNR {db:5.2f} dB   (repeating the last given: {baseline:5.2f})")
        print(f"mean of {len(ours)} imagined frames: {ours.mean():.2f} dB (repeating: "
              f"{repeating.mean():.2f})")

    (out := Path(settings.out)).mkdir(parents=True, exist_ok=True)
    stem = out / f"{name}_val{settings.episode}_guidance{world.sampling.guidance:g}"
    taken = [describe_action(dataset, action) for action in actions[context_frames - 1 :]]
    captions = [""] * context_frames + taken  # what led to each frame
    save_strip(f"{stem}.png", rows, captions=captions)
    save_gif(f"{stem}.gif", rows, dataset.fps, captions)
    print(f"pictures: {stem}.png, {stem}.gif")


main = program(__name__, "sample.py", run, Settings, "Roll a world model out on an episode's "
               "actions or others. What is left out comes from the checkpoint or the data set. To "
               "drive a world: python -m play")
