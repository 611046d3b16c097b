"""The ways to steer a video model, side by side: python -m evaluation.baselines [--quick]

Each starts from the same passive base, is trained by the same loop for the same steps on the same
clips, and imagines the same held-out episodes from their first frame:

    repeating              for comparison: the first frame, again and again
    base                   the passive model: it cannot know what is done
    classifier guidance    the base, pulled by a classifier of actions (baselines/)
    ControlNet             the base, and a copy of its encoder that knows the actions
    AVID                   the base, and a small network that corrects what it says (not in Table 1)
    action-conditioned     fine-tuned, actions in the embedding
    language-conditioned   fine-tuned, what happens in words
    Vid2World-NAR          the world model, all frames together
    Vid2World              the world model, frame by frame

PSNR and SSIM; and how far the gripper is from its true place at the last frame, read off the frames
by a small network (evaluation/controllability.py), beside that network's own error. Then how often
the classifier is right, by noise level, and whether words tell left from right; and a picture of
one episode. What is done is kept (--out). Paper: Table 1.
"""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train
from baselines import (action_finetuning, avid, classifier_guidance, controlnet,
                       language_finetuning)
from baselines.clips import base_of, sample_clips
from data import open_episodes
from evaluation.comparison import (HeldOut, TrainingSettings, decisive, kept, measure_all,
                                   open_held_out, post_train, table)
from evaluation.controllability import PIXEL, directions
from evaluation.evaluate import read_batches, rollout_batch
from model.saving import TINY_BASE, load_model, preset_of
from model.vid2world import PRESETS, to_pixels
from sample import load_world
from support.errors import RequestError
from support.options import option, program
from support.pictures import save_strip
from training.settings import Settings as TrainSettings

# one level a clip and no action hidden, weighted as the world is
CLIPS = {"shared_level": True, "action_dropout": 0.0, "loss_weighting": "x0"}
WORLD = {"low_noise_prob": 0.6, "loss_weighting": "x0"}  # as the bundled world was trained
RECIPES = {  # row -> what trains it, and with which settings; rows with one name share a run
    "classifier guidance": ("classifier", classifier_guidance.RECIPE, CLIPS),
    "ControlNet": ("controlnet", controlnet.RECIPE, CLIPS),
    "AVID": ("avid", avid.RECIPE, CLIPS),
    "action-conditioned": ("action", action_finetuning.RECIPE, CLIPS),
    "language-conditioned": ("language", language_finetuning.recipe(), CLIPS),
    "Vid2World-NAR": ("world", train.WORLD, WORLD),
    "Vid2World": ("world", train.WORLD, WORLD),
}
ROWS = ("repeating", "base", *RECIPES)
PUBLISHED = {  # the paper's Table 1, RT-1: FVD, FID, SSIM, LPIPS, PSNR
    "classifier guidance": "213.1 / 6.0 / .683 / .250 / 19.8",
    "ControlNet": "27.1 / 3.25 / .836 / .148 / 24.5",
    "action-conditioned": "24.2 / 2.97 / .852 / .134 / 25.6",
    "language-conditioned": "33.7 / 3.51 / .812 / .177 / 22.1",
    "Vid2World-NAR": "18.7 / 5.87 / .856 / .140 / 25.8",
    "Vid2World": "18.5 / 5.81 / .842 / .152 / 24.6"}
LEVELS = (0, 100, 250, 500, 750, 999)  # at which the classifier is asked


@dataclass
class Settings(TrainingSettings):
    rows: list[str] | None = option(None, f"which: {', '.join(ROWS)}; if left out, all", nargs="+",
                                    metavar="NAME", type=str)
    steps: int = option(1000, "of training")
    cooldown: int = option(500, "as in train.py", least=0)
    frames: int = option(6, "frames per clip, in training and of an episode", least=2)
    val_clips: int = option(8, "held-out clips in a validation loss")
    denoising_steps: int = option(10, "of every sampler")
    weight: float = option(1.0, "of the classifier's gradient", least=0)
    out: str | None = option(None, "folder for runs and the table; if left out, runs/baselines, "
                                   "and for --quick runs/baselines_quick")


def complete(settings: Settings) -> None:
    settings.base, settings.rows = settings.base or str(TINY_BASE), settings.rows or list(ROWS)
    settings.out = settings.out or "runs/baselines" + "_quick" * settings.quick
    unknown = [name for name in settings.rows if name not in ROWS]
    if unknown:
        raise RequestError(f"there is no row {unknown[0]!r}; known are {', '.join(ROWS)}")
    if settings.quick:
        settings.seeds, settings.steps, settings.cooldown, settings.episodes = 1, 10, 5, 2
        settings.batch, settings.val_clips, settings.denoising_steps = 1, 1, 2


def run_of(row: str, seed: int, settings: Settings) -> Path:
    """The run folder of a row that is trained."""
    return Path(settings.out) / f"{RECIPES[row][0]}_{seed}"


def imaginer(row: str, seed: int, settings: Settings, held_out: HeldOut
             ) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """(frames, actions, captions) -> imagined clips, of a row that has been trained."""
    if row == "repeating":
        return lambda frames, actions, captions: np.repeat(frames[:, :1], settings.frames, axis=1)
    options = {"steps": settings.denoising_steps, "seed": seed}
    if row == "base":
        chosen = TrainSettings(base=settings.base, preset=preset_of(settings.base),
                               size=list(PRESETS[preset_of(settings.base)].size))
        model = base_of(chosen, held_out.episodes.dataset)
        return lambda frames, actions, captions: sample_clips(model, frames, actions, **options)
    if row.startswith("Vid2World"):
        world = load_world(run_of(row, seed, settings), guidance=1.0,
                           steps=settings.denoising_steps, eta=0.0, seed=seed)
        return lambda frames, actions, captions: rollout_batch(world, frames, actions,
                                                         nar=row.endswith("NAR"))
    model, steer = load_model(run_of(row, seed, settings), kind=RECIPES[row][1].model_class), None
    if row == "classifier guidance":
        steer = classifier_guidance.towards_actions(model, settings.weight)
    return lambda frames, actions, captions: sample_clips(
        model, frames, captions if row.startswith("language") else actions, steer=steer, **options)


def measure(row: str, seed: int, settings: Settings, held_out: HeldOut) -> dict[str, float]:
    """PSNR, SSIM and the gripper's error of a row and seed, from its file or made now."""
    def make() -> dict[str, float]:
        if row in RECIPES:
            _, recipe, changes = RECIPES[row]
            post_train(run_of(row, seed, settings), changes, seed, settings, recipe)
        imagine = imaginer(row, seed, settings, held_out)
        return held_out.score(imagine(held_out.truth, held_out.actions, captions(held_out)))

    chosen = decisive(settings)
    if row != "classifier guidance":
        del chosen["weight"]
    return kept(Path(settings.out) / f"{row.replace(' ', '_')}_{seed}.json", chosen, make)


def captions(held_out: HeldOut) -> np.ndarray:
    """The motions in words, [N, T - 1, M] numbers."""
    T = held_out.truth.shape[1]
    told = language_finetuning.CaptionedEpisodes(held_out.episodes)
    return np.stack([told[i].open(0, T)[1][:-1] for i in range(len(told))])


def save_example(settings: Settings, held_out: HeldOut) -> Path:
    """Every row's clip of one episode: that in which the gripper ends farthest from its start."""
    starts = np.stack([episode.feature(PIXEL)[0] for episode in held_out.episodes])
    farthest = np.linalg.norm(held_out.places - starts, axis=-1).argmax()
    one = slice(farthest, farthest + 1)
    clip = held_out.truth[one], held_out.actions[one], captions(held_out)[one]
    rows = {"truth": clip[0][0]} | {
        row: imaginer(row, 0, settings, held_out)(*clip)[0] for row in settings.rows}
    save_strip(path := Path(settings.out) / "baselines.png", rows)
    return path


@torch.no_grad()
def named_right(model: classifier_guidance.ClassifiedModel, frames: np.ndarray,
                actions: np.ndarray, k: int) -> np.ndarray:
    """Where the classifier names the right bin at noise level k: bool [B, T - 1, A] for clips
    [B, T, H, W, 3] and the actions [B, T, A] taken at their frames."""
    pixels = to_pixels(torch.from_numpy(frames)).to(model.device)
    latents = model.encode(pixels)
    context = model.context(model.image_tokens(pixels[:, 0]), range(frames.shape[1]))
    levels = torch.full(latents.shape[:2], k, device=model.device)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(k))
    x = model.schedule.add_noise(latents, levels, noise.to(latents))
    log_p = model.log_probabilities(x, levels, latents[:, :1], context)
    true = classifier_guidance.bins_of(
        model.standardise(torch.from_numpy(actions).float().to(model.device)))
    return (log_p.argmax(-1) == true).cpu().numpy()


def classifier_lines(settings: Settings, held_out: HeldOut) -> list[str]:
    """How often the classifiers name the right bin of a number that varies, by noise level."""
    row = "classifier guidance"
    models = [load_model(run_of(row, seed, settings), kind=RECIPES[row][1].model_class).eval()
              for seed in range(settings.seeds)]
    (frames, actions), = read_batches(held_out.episodes, settings.frames, len(held_out.truth),
                                      PRESETS[preset_of(settings.base)])
    bins = classifier_guidance.bins_of(torch.from_numpy(actions)).flatten(0, 1)  # [N, A]
    varies = (bins != bins[0]).any(dim=0).numpy()
    commonest = np.mean([np.bincount(column).max() / len(column)
                         for column in bins.numpy().T[varies]])
    cells = []
    for k in LEVELS:
        right = [named_right(model, frames, actions, k)[..., varies] for model in models]
        cells.append(f"{100 * np.concatenate(right).mean():.0f}")
    return [f"The classifier's accuracy (%), of the {varies.sum()} numbers that vary; always the "
            f"commonest bin: {100 * commonest:.0f}", "",
            f"| noise level | {' | '.join(map(str, LEVELS))} |", f"|{' --- |' * (1 + len(LEVELS))}",
            f"| accuracy | {' | '.join(cells)} |"]


def language_line(settings: Settings, held_out: HeldOut, axes: np.ndarray) -> str:
    """How often the arm ends further right when told "right" than when told "left"; axes from
    `directions`."""
    frames, apart = held_out.truth[:, :1], []
    for seed in range(settings.seeds):
        make = imaginer("language-conditioned", seed, settings, held_out)
        ends = []
        for word in ("left", "right"):
            caption = np.tile(language_finetuning.word_numbers([word]),
                              (len(frames), settings.frames - 1, 1))
            ends.append(held_out.reader.read(make(frames, caption, caption)[:, -1]) @ axes[:, 0])
        apart.append(ends[1] - ends[0])
    return ('Told "right" and told "left", from the same frame, the language-conditioned arm ends '
            f"further right when told so in {100 * np.mean(np.array(apart) > 0):.0f} % of "
            f"{np.size(apart)} pairs")


def run(settings: Settings) -> None:
    held_out = open_held_out(settings, settings.frames)
    results = measure_all(settings.rows, settings.seeds,
                          lambda row, seed: measure(row, seed, settings, held_out))
    lines = [f"{len(held_out.truth)} episodes, {settings.frames} frames, {settings.steps} steps of "
             f"{settings.batch} clips, {settings.denoising_steps} denoising steps; mean ± standard "
             f"deviation of {settings.seeds} seeds; the reader is off by {held_out.reader_off:.2f} "
             "pixels on recorded frames", "", *table(results, PUBLISHED), "",
             "The published figures are of RT-1 at full size, 1024 episodes, 50 steps, Vid2World's "
             "rows with guidance; the other rows' FID was measured with an Inception that still "
             "learned."]
    if "classifier guidance" in settings.rows:
        lines += ["", *classifier_lines(settings, held_out)]
    if "language-conditioned" in settings.rows:
        axes = directions(open_episodes(settings.data, settings.root, "train"))
        lines += ["", language_line(settings, held_out, axes)]
    print("\n" + "\n".join(lines))
    (Path(settings.out) / "baselines.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"one episode, as each imagines it: {save_example(settings, held_out)}")


main = program(__name__, "baselines", run, Settings, "Compare ways to steer a video model.",
               complete)
