"""How frames are sampled: the paper's settings, and the ones that a checkpoint carries instead."""
from dataclasses import dataclass

import numpy as np

from diffusion_forcing import LEVELS
from errors import RequestError

# What measurement found best for the small models (evaluation/RESULTS.md), by preset.
MEASURED = {"tiny": {"guidance": 2.0, "guidance_levels": (0, 300), "steps": 4, "eta": 0.0},
            "arena": {"guidance": 1.0, "steps": 2, "eta": 0.0}}


@dataclass(frozen=True)
class Sampling:
    """How a frame is sampled. The defaults are the paper's (B.4); a checkpoint may carry others.

    guidance         λ: 1 follows the newest action as trained, more exaggerates it
    guidance_levels  guidance applies at noise levels low <= k < high; elsewhere λ is 1, and the
                     second pass is saved (Kynkäänniemi et al. 2024, arXiv 2404.07724)
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
