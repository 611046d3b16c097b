"""What the dimensions of an action mean: keys that set them, and an action in words."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Key:
    """What a key on the keyboard does to an action, when a person plays."""
    label: str
    index: int  # of the number in the action
    value: float
    toggles: bool = False  # every new press changes the sign


def describe_by_keys(action: np.ndarray, keys: Sequence[Key]) -> str:
    """The labels of the keys that would do the larger part of an action [A]: "+x  -z"."""
    labels = []
    for key in keys:
        number = action[key.index]
        if key.toggles and number:
            labels.append(f"{key.label} {'closes' if number > 0 else 'opens'}")
        elif not key.toggles and number / key.value > 0.3:
            labels.append(key.label)
    return "  ".join(labels)


def describe_by_names(action: np.ndarray, names: Sequence[str]) -> str:
    """All dimensions of an action [A] that are not zero, each behind its name: "dx 0.3  dy -1"."""
    named = zip(names, action, strict=True)
    return "  ".join(f"{name} {number:.3g}" for name, number in named if number)
