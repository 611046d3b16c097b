"""How sure is a figure? Deviations over seeds of training, and 95 % intervals over episodes."""
from collections.abc import Sequence

import numpy as np


def deviation(numbers: Sequence[float]) -> float:
    """Standard deviation of a sample, with n - 1; of one number nan."""
    return float(np.std(numbers, ddof=1)) if len(numbers) > 1 else float("nan")


def mean_and_deviation(numbers: Sequence[float], digits: int, sign: str = "") -> str:
    mean = f"{np.mean(numbers):{sign}.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {deviation(numbers):.{digits}f}"


def bootstrap(values: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of the mean of values [N], by drawing episodes again."""
    drawn = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), (2.5, 97.5))
    return low, high


def mean_and_interval(values: np.ndarray, sign: str = "") -> str:
    low, high = bootstrap(values)
    return f"{values.mean():{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson 1927)."""
    rate = successes / n
    middle = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def rate_and_interval(outcomes: np.ndarray) -> tuple[str, str]:
    """In per cent, of outcomes bool [N]."""
    low, high = wilson(int(outcomes.sum()), len(outcomes))
    return f"{100 * outcomes.mean():.0f} %", f"{100 * low:.0f}–{100 * high:.0f}"
