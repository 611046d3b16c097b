"""The world model: reset(frames), then step(action) -> the next frame. And the command that rolls it out.

    python sample.py --guidance 2.0                             (the bundled world)
    python sample.py --checkpoint runs/rt1 --guidance 2.0

A world model holds a window of frames and imagines one more at a time:

    slot       0        1       2       3                        at most num_frames (16) slots
            ┌───────┬───────┬───────┬───────┐
            │anchor │       │       │  new  │      anchor   its clean latents stand beside every frame's noisy
            └───────┴───────┴───────┴───────┘               ones; its image tokens are dealt out by slot
    level     k_hist  k_hist  k_hist  999 → 0      history  noised once, a little, and kept
    action     zero    a₀      a₁      a₂          new      starts as noise; denoised while the history stays put

 1. The new frame starts from Gaussian noise and is denoised through the DDIM levels. At each level the network
    sees the whole window twice, with and without the newest action, and guidance exaggerates the difference.
 2. The finished frame is noised to k_hist (39, the second lowest of 50 DDIM levels), and joins the history.
 3. When all slots are taken, the last `overlap` frames become the new window, the first of them the new anchor.
    As in a training clip, no action leads to it. So a rollout may go on for ever, and the network
    never meets a clip longer than those it was trained on.

Streaming: the history's inputs never change and a causal network never looks ahead, so what its layers made of the history
is remembered (`Cache`, causal_conv.py). Step 1 then runs the network on the new frame alone, and only its first pass takes
the frame before along, to remember it: steps + 1 frames to compute, however long the history, in place of
steps times all of it. The frames are the same.

Paper: section 4.3 and algorithm 1 (autoregressive, action-guided sampling).
"""
import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from action_guidance import guide
from causal_conv import Cache
from data import DATA_SETS, SAMPLES, DataError, Episodes, default_root, fit_frames, open_episodes
from diffusion_forcing import LEVELS
from dynamicrafter.model import TINY_WORLD, Model, from_vid2world, keep_freed_memory, load_model, named, to_frames, \
    to_pixels
from evaluation.metrics import psnr
from evaluation.pictures import save_gif, save_strip
from unet import CheckpointError, read_checkpoint


class RequestError(ValueError):
    """Something that a world model cannot do: an option out of range, an action or a frame that does not fit."""


class WorldModel:
    """An environment that is imagined: reset(frames), step(action).

    guidance  λ: how much the newest action is exaggerated; 1 follows it as trained and needs half the time
    steps     denoising steps per frame
    seed      of all noise; the same seed, frames and actions give the same rollout
    eta       0 is deterministic given the first noise (DDIM), 1 adds fresh noise at every step (as the paper samples)
    overlap   frames that stay when the window is full
    rescale   see `action_guidance.guide`
    history_level  noise level at which the history is held; None: the second lowest of the steps, which is 39 for 50
    streaming remember the history (True) or run it again at every step (False); None: remember where that is exact,
              which is everywhere but with norm_scope "clip", whose history changes with every new frame

    `.latents`, float32 [B, T, C, h, w], holds every frame so far, given and imagined.
    """

    def __init__(self, model: Model, guidance: float = 2.0, steps: int = 50, seed: int = 0, eta: float = 1.0,
                 overlap: int = 8, rescale: float = 0.7, streaming: bool | None = None, history_level: int | None = None):
        config = model.config.unet
        if not config.action_dim or not config.causal:
            raise RequestError("this network is passive: a world model is causal and takes actions")
        if not np.isfinite(guidance):
            raise RequestError(f"guidance is {guidance}; it must be a finite number")
        if not 0 <= eta <= 1 or not 0 <= rescale <= 1:
            raise RequestError(f"eta is {eta} and rescale {rescale}; both must be between 0 and 1")
        if not 1 <= steps <= LEVELS:
            raise RequestError(f"steps is {steps}; it must be between 1 and {LEVELS}")
        if history_level is not None and not 0 <= history_level < LEVELS:
            raise RequestError(f"history_level is {history_level}; it must be between 0 and {LEVELS - 1}")
        if not 1 <= overlap < config.num_frames:
            raise RequestError(f"overlap is {overlap}; it must be between 1 and {config.num_frames - 1}")
        self.model = model.eval()
        self.guidance, self.seed, self.eta, self.overlap, self.rescale = guidance, seed, eta, overlap, rescale
        self.streaming = config.norm_scope != "clip" if streaming is None else streaming
        if self.streaming and config.norm_scope == "clip":
            print("streaming approximates here: this network's norms see the whole clip, so its history changes with every frame")
        self.num_frames, self.action_dim = config.num_frames, config.action_dim
        self.levels = model.schedule.ddim_levels(steps)
        self.history_level = self.levels[max(steps - 2, 0)] if history_level is None else history_level

    @torch.inference_mode()
    def reset(self, frames: np.ndarray, actions: np.ndarray | None = None) -> None:
        """Begin a world from what was seen.

        frames   uint8 [T0, H, W, 3], or [B, T0, H, W, 3] for B worlds side by side; fitted to the model's size
        actions  [T0 - 1, A] or [B, T0 - 1, A]: what was done between them; None: not known (and so hidden)

        Raises RequestError for other shapes or numbers that are not finite.
        """
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim not in (4, 5) or frames.shape[-1] != 3 or 0 in frames.shape:
            raise RequestError(f"frames is {frames.dtype} {list(frames.shape)}; expected uint8 [T0, H, W, 3] or "
                             "[B, T0, H, W, 3]")
        self.batched = frames.ndim == 5
        frames = frames if self.batched else frames[None]
        B, T0 = frames.shape[:2]
        self.generator = torch.Generator().manual_seed(self.seed)

        frames = torch.from_numpy(np.stack([fit_frames(clip, *self.model.config.size) for clip in frames]))
        self.pixels = to_pixels(frames.to(self.model.device))  # of the window, [B, T, 3, H, W]
        self.latents = self.model.encode(self.pixels)
        self.history = self.to_history(self.latents)
        # The action that led to each frame, and whether it is known; nothing but zeros leads to the first.
        self.actions = torch.zeros(B, T0, self.action_dim, device=self.model.device)
        self.action_mask = torch.ones(B, T0, device=self.model.device)
        if actions is None:
            self.action_mask[:, 1:] = 0
        else:
            self.actions[:, 1:] = self.check_actions(actions, (B, T0 - 1, self.action_dim))
        self.open_window(min(T0, self.num_frames))

    @torch.inference_mode()
    def step(self, action: np.ndarray) -> np.ndarray:
        """Take an action [A] (or [B, A]) and imagine the next frame, uint8 [H, W, 3] (or [B, H, W, 3]).

        Raises RequestError for an action of another shape or one that is not finite.
        """
        if not hasattr(self, "latents"):
            raise RequestError("the world has no frame yet: call reset(frames) first")
        B = len(self.latents)
        action = self.check_actions(action, (B, self.action_dim))
        if self.history.shape[1] == self.num_frames:
            self.open_window(self.overlap)

        actions = torch.cat([self.actions, action[:, None]], dim=1)
        action_mask = torch.cat([self.action_mask, torch.ones_like(action[:, :1])], dim=1)
        velocity = (self.velocity_with_memory if self.streaming else self.velocity_with_history)(actions, action_mask)
        x = self.noise(B, 1)
        for k, k_next in zip(self.levels, self.levels[1:] + [0]):
            x = self.model.schedule.ddim_step(x, velocity(x, k), k, k_next, self.eta,
                                              self.noise(B, 1) if self.eta > 0 else None)

        pixels = self.model.decode(x)
        self.actions, self.action_mask = actions, action_mask
        self.pixels = torch.cat([self.pixels, pixels], dim=1)
        self.latents = torch.cat([self.latents, x], dim=1)
        self.history = torch.cat([self.history, self.to_history(x)], dim=1)
        frame = to_frames(pixels)[:, 0]
        return frame if self.batched else frame[0]

    def open_window(self, length: int) -> None:
        """Keep the last `length` frames; the first of them becomes the anchor."""
        self.pixels, self.history = self.pixels[:, -length:], self.history[:, -length:]
        self.actions, self.action_mask = self.actions[:, -length:].clone(), self.action_mask[:, -length:].clone()
        self.actions[:, 0], self.action_mask[:, 0] = 0, 1
        self.anchor = self.latents[:, -length, None]  # [B, 1, C, h, w], clean
        self.tokens = self.model.image_tokens(self.pixels[:, 0])
        self.forget()

    def forget(self) -> None:
        """Drop the memory of the history: the next step makes it anew. For those who set a world back to what it was."""
        self.cache = Cache(self.num_frames)

    def velocity_with_history(self, actions: Tensor, action_mask: Tensor) -> Callable[[Tensor, int], Tensor]:
        """The guided velocity of the newest frame as a function of it, x [B, 1, C, h, w], and its level k.

        The network sees the whole window, and sees it twice, with and without the newest action.
        """
        B, T = actions.shape[:2]
        levels = torch.full((B, T), self.history_level, device=self.model.device)
        without_newest = action_mask.clone()
        without_newest[:, -1] = 0
        guided = self.guided(T, actions, action_mask, without_newest)

        def velocity(x: Tensor, k: int) -> Tensor:
            levels[:, -1] = k
            return guided(torch.cat([self.history, x], dim=1), levels)[:, -1:]

        return velocity

    def velocity_with_memory(self, actions: Tensor, action_mask: Tensor) -> Callable[[Tensor, int], Tensor]:
        """The same from the newest frame alone, over the memory of the history. Its two versions, with and without the
        action, are alternatives for one next frame.

        The first pass takes along what the memory lacks of the history: the frame before, or all of a new window.
        """
        T, versions = self.history.shape[1], 1 if self.guidance == 1 else 2
        actions = torch.cat([actions] + [actions[:, -1:]] * (versions - 1), dim=1)
        action_mask = torch.cat([action_mask] + [torch.zeros_like(action_mask[:, -1:])] * (versions - 1), dim=1)
        levels = torch.full(action_mask.shape, self.history_level, device=self.model.device)
        contexts = {first: self.model.context(self.tokens, T + 1, first, versions) for first in {self.cache.frames, T}}

        def velocity(x: Tensor, k: int) -> Tensor:
            # Should a pass be interrupted, some layers remember and others do not: then the next one starts from nothing.
            cache, self.cache = self.cache, Cache(self.num_frames)
            first, cache.alternatives = cache.frames, versions
            x = torch.cat([self.history[:, first:]] + [x] * versions, dim=1)
            levels[:, T:] = k
            v = self.denoise(x, levels[:, first:], self.anchor, contexts[first], actions[:, first:], action_mask[:, first:], cache)
            self.cache = cache
            v = v[:, T - first :]
            return v if versions == 1 else guide(v[:, :1], v[:, 1:], self.guidance, self.rescale)

        return velocity

    def guided(self, frames: int, actions: Tensor, with_action: Tensor, without_action: Tensor
               ) -> Callable[[Tensor, Tensor], Tensor]:
        """Guidance between two masks of the actions, as a function of a window and its levels, both passes in one batch."""
        passes = 1 if self.guidance == 1 else 2
        anchor, actions = (torch.cat([tensor] * passes) for tensor in (self.anchor, actions))
        context = self.model.context(torch.cat([self.tokens] * passes), frames)
        action_mask = torch.cat([with_action, without_action][:passes])

        def velocity(x: Tensor, levels: Tensor) -> Tensor:
            x, levels = torch.cat([x] * passes), torch.cat([levels] * passes)
            v = self.denoise(x, levels, anchor, context, actions, action_mask)
            return v if passes == 1 else guide(*v.chunk(2), self.guidance, self.rescale)

        return velocity

    def denoise(self, *inputs) -> Tensor:
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.model.device.type == "cuda"):
            return self.model.denoise(*inputs).float()

    @torch.inference_mode()
    def imagine_together(self, frames: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """All frames at once, at one shared noise level (the paper's Vid2World-NAR): for comparison, not interaction.

        frames [T0, H, W, 3], of which the first becomes the anchor; actions [T - 1, A]; returns uint8 [T, H, W, 3].
        Raises RequestError for more frames than the window holds. Without action means: without any.
        """
        self.reset(frames[:1])
        T = len(actions) + 1
        if T > self.num_frames:
            raise RequestError(f"{T} frames do not fit into one window of {self.num_frames}")
        actions = self.check_actions(actions, (1, T - 1, self.action_dim))
        led_to = torch.cat([self.actions, actions], dim=1)
        with_action = torch.ones(1, T, device=led_to.device)
        velocity = self.guided(T, led_to, with_action, 0 * with_action)
        x = self.noise(1, T)
        for k, k_next in zip(self.levels, self.levels[1:] + [0]):
            v = velocity(x, torch.full((1, T), k, device=x.device))
            x = self.model.schedule.ddim_step(x, v, k, k_next, self.eta, self.noise(1, T) if self.eta > 0 else None)
        self.latents = x
        return to_frames(self.model.decode(x))[0]

    def to_history(self, latents: Tensor) -> Tensor:
        """Clean latents [B, T, C, h, w] to the small noise level at which the history is held."""
        return self.model.schedule.add_noise(latents, self.history_level, self.noise(*latents.shape[:2]))

    def noise(self, B: int, T: int) -> Tensor:
        """Drawn on the CPU, so that a seed means the same on every device."""
        return torch.randn(B, T, *self.model.latent_shape, generator=self.generator).to(self.model.device)

    def check_actions(self, actions: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        """Actions as a tensor of the given shape, the batch dimension added where the world has none."""
        actions = torch.as_tensor(np.asarray(actions, dtype=np.float32), device=self.model.device)
        actions = actions if self.batched else actions[None]
        if actions.shape != shape:
            raise RequestError(f"actions is {list(actions.shape)}; expected {list(shape)} (with the batch dimension)")
        if not actions.isfinite().all():
            raise RequestError("an action holds a number that is not finite (NaN or infinity)")
        return actions


def load_world(checkpoint: str | Path, device: str | torch.device | None = None, compile: bool = False, **options
               ) -> WorldModel:
    """A world model from a run folder of train.py, a checkpoint in it, or a released Vid2World checkpoint.

    device   None means CUDA where there is one
    compile  the U-Net with torch.compile: minutes at the first frames, faster ones later
    options  those of WorldModel

    Raises CheckpointError for a file that cannot be used, RequestError for options out of range.
    """
    path = Path(checkpoint)
    released = path.is_file() and "state_dict" in read_checkpoint(path)
    keep_freed_memory()
    model = from_vid2world(path) if released else load_model(path)
    if compile:
        model.unet.compile()
    return WorldModel(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), **options)


# ---------------------------------------------------------------------------------------------------------
# The command


def rollout(world: WorldModel, frames: np.ndarray, actions: np.ndarray, context: int = 1) -> np.ndarray:
    """Imagine an episode: the first `context` frames are given, then one frame per action.

    frames [≥ context, H, W, 3], actions [T - 1, A]; returns uint8 [T, H, W, 3] at the model's size.
    """
    world.reset(frames[:context], actions[: context - 1])
    given = list(fit_frames(frames[:context], *world.model.config.size))
    bar = tqdm(actions[context - 1 :], unit="frame", leave=False, disable=None)
    return np.stack(given + [world.step(action) for action in bar])


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Roll a world model out on an episode's actions, or on others.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default=str(TINY_WORLD),
        help="run folder of train.py, or a released Vid2World checkpoint; if left out, the bundled world")
    add("--data", choices=DATA_SETS, help="data set; if left out, the one the checkpoint was trained on")
    add("--root", help="its folder; if left out, the one the checkpoint was trained on")
    add("--split", default="val", choices=["train", "val", "all"])
    add("--episode", type=int, default=0, help="which episode of the split")
    add("--context", type=int, help="frames given at the start; if left out, as the data set has it")
    add("--frames", type=int, default=16, help="frames in all, given ones included; at most the episode's, if its "
                                               "actions are used")
    add("--actions", help="take the actions of this .npy file, [T - 1, A], and not the episode's")
    add("--repeat-action", nargs="*", type=float, metavar="NUMBER",
        help="repeat one action: the numbers given, or without numbers the episode's first")
    add("--guidance", type=float, help="1 follows the action as trained, more exaggerates it; if left out, 2, or 1 with --play")
    add("--rescale", type=float, default=0.7, help="pull back the contrast that guidance adds, 0 to 1")
    add("--steps", type=int, help="denoising steps per frame; if left out, 50, or 4 with --play")
    add("--eta", type=float, help="fresh noise per step: 0 none, 1 as the paper; if left out, 1, or 0 with --play")
    add("--history-level", type=int, default=39, help="noise level at which the history is held; the paper's is 39, of 0 to 999")
    add("--overlap", type=int, default=8, help="frames that stay when the window of 16 is full")
    add("--seed", type=int, default=0)
    add("--streaming", action=argparse.BooleanOptionalAction, default=None,
        help="remember the history, or run it again at every step; if left out, remember where that is exact")
    add("--compile", action="store_true", help="torch.compile the network: minutes at the first frames, faster ones later")
    add("--nar", action="store_true", help="sample all frames together (the paper's Vid2World-NAR)")
    add("--device", help="cpu, cuda, …; if left out, CUDA where there is one")
    add("--out", default="rollouts", help="folder for the pictures")
    add("--play", action="store_true", help="drive the world from the keyboard, in a browser")
    add("--host", default="127.0.0.1", help="with --play: the address to listen at")
    add("--port", type=int, default=8000, help="with --play")
    args = parser.parse_args(argv)
    args.guidance = args.guidance if args.guidance is not None else 1.0 if args.play else 2.0
    args.steps = args.steps if args.steps is not None else 4 if args.play else 50
    args.eta = args.eta if args.eta is not None else 0.0 if args.play else 1.0
    return args


def choose_actions(args: argparse.Namespace, recorded: np.ndarray, action_dim: int) -> tuple[np.ndarray, str]:
    """The actions [T - 1, A] to take, and where they come from."""
    if args.actions is not None:
        try:
            actions = np.load(args.actions, allow_pickle=False).astype(np.float32)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{args.actions} is no readable .npy file ({error})") from None
        origin = str(args.actions)
    elif args.repeat_action is not None:
        action = np.array(args.repeat_action or recorded[0], dtype=np.float32)
        actions, origin = np.repeat(action[None], args.frames - 1, axis=0), "one action, repeated"
    else:
        actions, origin = recorded[: args.frames - 1], "the episode's"
    if actions.ndim != 2 or actions.shape[1] != action_dim:
        raise DataError(f"the actions are {list(actions.shape)}, but this model takes {action_dim} numbers per action")
    if not np.isfinite(actions).all():
        raise DataError("the actions hold numbers that are not finite (NaN or infinity)")
    return actions[: args.frames - 1], origin


def open_data(args: argparse.Namespace) -> tuple[str, Episodes]:
    """The name and the episodes of the data set that was asked for, or else of the one that the checkpoint was trained on."""
    path = Path(args.checkpoint)
    trained_on = read_checkpoint(path / "checkpoint.pt" if path.is_dir() else path).get("data", {})
    name = args.data or trained_on.get("name")
    if not name:
        raise DataError("this checkpoint does not say what it was trained on: name the data set (--data, --root)")
    root = args.root or trained_on.get("root") or default_root(name)
    print(f"world: {named(args.checkpoint, TINY_WORLD)}, data: {name} from {named(root, SAMPLES)}")
    return name, open_episodes(name, root, args.split)


def run(args: argparse.Namespace) -> None:
    options = {name: getattr(args, name) for name in ("guidance", "steps", "seed", "eta", "overlap", "rescale", "streaming",
                                                      "history_level")}
    world = load_world(args.checkpoint, args.device, args.compile, **options)
    name, episodes = open_data(args)
    if args.play:
        from play.server import play
        return play(lambda: WorldModel(world.model, **options), DATA_SETS[name], episodes, args.host, args.port)
    if not 0 <= args.episode < len(episodes):
        raise DataError(f"there is no episode {args.episode}; the split {args.split!r} has 0 to {len(episodes) - 1}")
    episode = episodes[args.episode]
    actions, origin = choose_actions(args, episode.actions, world.action_dim)
    context = args.context or DATA_SETS[name].context
    if not 1 <= context <= min(episode.length, len(actions)):
        raise DataError(f"context is {context}; it must be between 1 and {min(episode.length, len(actions))}, the frames "
                        "there are less one to imagine")
    print(f"episode {episode.name}, {len(actions) + 1} frames, actions: {origin}, guidance {args.guidance:g}, "
          f"{args.steps} steps")

    frames = episode.frames
    if args.nar:
        imagined = world.imagine_together(frames, actions)
    else:
        imagined = rollout(world, frames, actions, context)

    rows = {"imagined": imagined}
    if origin == "the episode's":
        truth = fit_frames(frames[: len(imagined)], *world.model.config.size)
        rows = {"truth": truth} | rows
        first = 0 if args.nar else context
        scores = psnr(imagined, truth)
        for t in range(first, len(imagined)):
            print(f"frame {t:3d}  PSNR {scores[t]:6.2f} dB")
        print(f"mean of {len(imagined) - first} imagined frames: {scores[first:].mean():.2f} dB")

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{name}_{args.split}{args.episode}_guidance{args.guidance:g}{'_nar' if args.nar else ''}"
    save_strip(f"{stem}.png", rows)
    save_gif(f"{stem}.gif", rows, DATA_SETS[name].fps)
    print(f"pictures: {stem}.png, {stem}.gif")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 2 if it cannot be done, after one sentence that says why."""
    try:
        run(parse_arguments(argv))
        return 0
    except (DataError, CheckpointError, RequestError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
