"""The ways to steer a video model, side by side: python -m evaluation.baselines

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

PSNR and SSIM; how far the gripper is from its true place at the last frame, read off the frames by
a small network (evaluation/controllability.py), beside that network's own error; and a picture of
one episode. What is done is kept (--out). Paper: Table 1.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import train
from baselines import (action_finetuning, avid, classifier_guidance, controlnet,
                       language_finetuning)
from baselines.clips import CLIPS, base_of, sample_clips
from evaluation.comparison import (HeldOut, TrainingSettings, decisive, kept, measure_all,
                                   open_held_out, post_train, table)
from evaluation.controllability import PIXEL
from evaluation.evaluate import rollout_batch
from model.saving import load_model, preset_of
from model.vid2world import PRESETS
from sample import load_world
from support.errors import RequestError
from support.options import option, program
from support.pictures import save_strip
from training.settings import Settings as TrainSettings

RECIPES = {  # row -> what trains it, and with which settings; rows with one name share a run
    "classifier guidance": ("classifier", classifier_guidance.RECIPE, CLIPS),
    "ControlNet": ("controlnet", controlnet.RECIPE, CLIPS),
    "AVID": ("avid", avid.RECIPE, CLIPS),
    "action-conditioned": ("action", action_finetuning.RECIPE, CLIPS),
    "language-conditioned": ("language", language_finetuning.recipe(), CLIPS),
    "Vid2World-NAR": ("world", train.WORLD, {}),
    "Vid2World": ("world", train.WORLD, {}),
}
ROWS = ("repeating", "base", *RECIPES)
PUBLISHED = {  # the paper's Table 1, RT-1: FVD, FID, SSIM, LPIPS, PSNR
    "classifier guidance": "213.1 / 6.0 / .683 / .250 / 19.8",
    "ControlNet": "27.1 / 3.25 / .836 / .148 / 24.5",
    "action-conditioned": "24.2 / 2.97 / .852 / .134 / 25.6",
    "language-conditioned": "33.7 / 3.51 / .812 / .177 / 22.1",
    "Vid2World-NAR": "18.7 / 5.87 / .856 / .140 / 25.8",
    "Vid2World": "18.5 / 5.81 / .842 / .152 / 24.6"}


@dataclass
class Settings(TrainingSettings):
    rows: list[str] | None = option(None, f"which: {', '.join(ROWS)}; if left out, all", nargs="+",
                                    metavar="NAME", type=str)
    frames: int = option(6, "frames per clip, in training and of an episode", least=2)
    val_clips: int = option(8, "held-out clips in a validation loss")
    denoising_steps: int = option(10, "of every sampler")
    weight: float = option(1.0, "of the classifier's gradient", least=0)
    out: str = option("runs/baselines", "folder for runs and the table")


def complete(settings: Settings) -> None:
    settings.rows = settings.rows or list(ROWS)
    if unknown := [name for name in settings.rows if name not in ROWS]:
        raise RequestError(f"there is no row {unknown[0]!r}; known are {', '.join(ROWS)}")


def run_of(row: str, seed: int, settings: Settings) -> Path:
    """The run folder of a row that is trained."""
    return Path(settings.out) / f"{RECIPES[row][0]}_{seed}"


def imagine(row: str, seed: int, settings: Settings, held_out: HeldOut) -> np.ndarray:
    """The held-out episodes as a row imagines them, once it has been trained."""
    truth, actions, steer = held_out.truth, held_out.actions, None
    options = {"steps": settings.denoising_steps, "seed": seed}
    if row == "repeating":
        return np.repeat(truth[:, :1], settings.frames, axis=1)
    if row.startswith("Vid2World"):
        world = load_world(run_of(row, seed, settings), guidance=1.0, eta=0.0, **options)
        return rollout_batch(world, truth, actions, nar=row.endswith("NAR"))
    if row == "base":
        preset = preset_of(settings.base)
        chosen = TrainSettings(base=settings.base, preset=preset, size=list(PRESETS[preset].size))
        model = base_of(chosen, held_out.episodes.dataset)
    else:
        model = load_model(run_of(row, seed, settings), kind=RECIPES[row][1].model_class)
    if row == "classifier guidance":
        steer = classifier_guidance.towards_actions(model, settings.weight)
    if row == "language-conditioned":
        told = language_finetuning.CaptionedEpisodes(held_out.episodes)
        actions = np.stack([episode.open(0, settings.frames)[1][:-1] for episode in told])
    return sample_clips(model, truth, actions, steer=steer, **options)


def measure(row: str, seed: int, settings: Settings, held_out: HeldOut) -> dict[str, float]:
    """PSNR, SSIM and the gripper's error of a row and seed, from its file or made now; the clip
    that is shown lies beside it."""
    file = Path(settings.out) / f"{row.replace(' ', '_')}_{seed}.json"

    def make() -> dict[str, float]:
        if row in RECIPES:
            _, recipe, changes = RECIPES[row]
            post_train(run_of(row, seed, settings), changes, seed, settings, recipe)
        imagined = imagine(row, seed, settings, held_out)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file.with_suffix(".npy"), imagined[farthest(held_out)])
        return held_out.score(imagined)

    chosen = decisive(settings)
    if row != "classifier guidance":
        del chosen["weight"]
    return kept(file, chosen, make)


def farthest(held_out: HeldOut) -> int:
    """The episode in which the gripper ends farthest from its start."""
    starts = np.stack([episode.feature(PIXEL)[0] for episode in held_out.episodes])
    return int(np.linalg.norm(held_out.places - starts, axis=-1).argmax())


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
    print("\n" + "\n".join(lines))
    (Path(settings.out) / "baselines.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = {row: Path(settings.out) / f"{row.replace(' ', '_')}_0.npy" for row in settings.rows}
    clips = {row: np.load(file) for row, file in files.items() if file.exists()}
    save_strip(path := Path(settings.out) / "baselines.png",
               {"truth": held_out.truth[farthest(held_out)]} | clips)
    print(f"one episode, as each imagines it: {path}")


main = program(__name__, "baselines", run, Settings, "Compare ways to steer a video model.",
               complete)
