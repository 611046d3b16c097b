"""Steering by words: a caption of what the robot does, through the cross-attention that is there.

    python -m baselines.language_finetuning --data rt1 --out runs/language
    python -m baselines.language_finetuning --data rt1 --root … --base model.ckpt
        (at full size captions need CLIP's tokenizer: pip install open_clip_torch)

DynamiCrafter reads a caption at every frame. So nothing is added: "Robot arm performs the task:
open the drawer." takes the place of the empty caption, and all of the U-Net is trained. The bundled
drawer's episodes have no instructions, so their captions say what the recorded motion was: "right,
up, closes". At full size CLIP's text tower reads them; the small model learns a table of words. To
`train.py`'s loop a caption is an action like any other: token numbers, the same at every frame.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from baselines.clips import copy_base_weights, base_of, baseline
from data import DataSet, Episode, Episodes
from dynamicrafter.checkpoint import load_part, read_lightning
from dynamicrafter.clip import TextTower
from model.vid2world import PRESETS, Model, ModelConfig
from support.errors import optional
from training.settings import Settings
from training.start import Recipe

INSTRUCTION = "steps/observation/natural_language_instruction"
PREFIX = "Robot arm performs the task: "
WORDS = ("", "left", "right", "near", "far", "down", "up", "opens", "closes")
AXES = ((10, "left", "right"), (11, "near", "far"), (12, "down", "up"), (3, "opens", "closes"))
MOST = 4  # words of a motion
LENGTH = 77  # tokens of CLIP


def describe_motion(actions: np.ndarray) -> list[str]:
    """What actions [T, 13] did: a word for each direction whose mean is more than a tenth."""
    means = actions.mean(axis=0)
    return [above if means[i] > 0 else below for i, below, above in AXES if abs(means[i]) > 0.1]


def word_numbers(words: Sequence[str]) -> np.ndarray:
    """[MOST] numbers of words, the empty word behind them."""
    numbers = [WORDS.index(word) for word in words]
    return np.array(numbers + [0] * (MOST - len(numbers)), np.float32)


def clip_tokens(caption: str) -> np.ndarray:
    """[LENGTH] token numbers of CLIP, zeros behind them. Raises RequestError without open_clip."""
    open_clip = optional("open_clip", "captions at full size need CLIP's tokenizer",
                         "open_clip_torch")
    return open_clip.tokenize([caption], context_length=LENGTH)[0].numpy()


@dataclass(frozen=True)
class Captioned(Episode):
    """An episode whose actions are its caption."""
    tokenizer: Callable[[str], np.ndarray] | None = None

    def open(self, start: int, stop: int) -> tuple:
        images, actions = super().open(start, stop)
        if self.tokenizer:
            row = self.tokenizer(PREFIX + self.text(INSTRUCTION)).astype(np.float32)
        else:
            row = word_numbers(describe_motion(actions))
        return images, np.tile(row, (len(actions), 1))


class CaptionedEpisodes(Episodes):
    """Episodes with a caption, of the drawer's motion or, with a tokenizer, of RT-1's words."""

    def __init__(self, episodes: Episodes, tokenizer: Callable[[str], np.ndarray] | None = None):
        super().__init__(episodes.dataset, episodes.paths, episodes.records, episodes.short,
                         episodes.damaged, episodes.problems)
        self.tokenizer = tokenizer

    def __getitem__(self, i: int) -> Captioned:
        return Captioned(**vars(super().__getitem__(i)), tokenizer=self.tokenizer)


class LanguageModel(Model):
    """A passive model that reads a caption: MOST words of a table, or CLIP's LENGTH tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.unet = type(self.unet)(replace(config.unet, action_dim=None))
        if config.text_tower:
            self.tower = TextTower(config.text_tower)
        else:
            # the empty word stays zero, as the empty caption is
            self.words = nn.Embedding(len(WORDS), config.unet.context_dim, padding_idx=0)

    def read(self, numbers: Tensor) -> Tensor:
        """Numbers of a caption [B, N] -> the tokens that the U-Net reads, [B, N, D]."""
        return self.tower(numbers) if self.config.text_tower else self.words(numbers)

    def context(self, tokens: Tensor, slots: Sequence[int]) -> Tensor:
        return self.image_context(tokens, len(slots))  # the rest once the caption is known

    def denoise(self, x: Tensor, k: Tensor, anchor: Tensor, context: Tensor,
                actions: Tensor | None = None, *others) -> Tensor:
        """As `Model.denoise`; the actions [B, T, N] of the last frame are the caption."""
        numbers = actions[:, -1].round().long()
        projected = self.unet.project_context(self.read(numbers), context)
        return super().denoise(x, k, anchor, projected)


def build(settings: Settings, dataset: DataSet) -> LanguageModel:
    base = base_of(settings, dataset)
    width = LENGTH if base.config.text_tower else MOST
    unet = replace(base.config.unet, action_dim=width)
    model = LanguageModel(replace(base.config, unet=unet))
    copy_base_weights(model, base)
    if base.config.text_tower:
        model.tower = load_part(TextTower, base.config.text_tower, read_lightning(settings.base),
                                "cond_stage_model.model.", settings.base)
        model.tower.requires_grad_(False)
    return model


def recipe(small: bool = True) -> Recipe:
    """Captions of the motion for a small model, RT-1's instructions for a full-size one."""
    tokenizer = None if small else clip_tokens
    return Recipe(build, LanguageModel,
                  wrap_episodes=lambda episodes: CaptionedEpisodes(episodes, tokenizer))


main = baseline(__name__, lambda settings: recipe(PRESETS[settings.preset].small))
