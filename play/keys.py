"""From keys to actions: what is pressed, and what that makes the robot do."""
from dataclasses import replace

import numpy as np

from data import DataSet
from episodes.actions import Key
from model.vid2world import Model

# For a data set that binds no keys: a pair for each of its first numbers.
PAIRS = (("ArrowLeft", "ArrowRight"), ("ArrowDown", "ArrowUp"), ("s", "w"), ("a", "d"))


def with_keys(dataset: DataSet, model: Model) -> DataSet:
    """A data set with keys. Where it has none, a key moves an action dimension two standard
    deviations from its mean, and without a key all are at their means."""
    if dataset.keys:
        return dataset
    mean, std, within = model.action_statistics.cpu().numpy().astype(float)
    varying = np.flatnonzero(np.isfinite(within))
    names = dataset.names or [f"[{i}]" for i in range(len(mean))]
    keys = {}
    for (less, more), i in zip(PAIRS, varying.tolist(), strict=False):
        keys[less] = Key(f"-{names[i]}", i, -2 * std[i])
        keys[more] = Key(f"+{names[i]}", i, 2 * std[i])
    return replace(dataset, keys=keys, rest=tuple(mean), absolute=False)


class Keyboard:
    """The keys of one player. Not safe among threads by itself: its session guards it."""

    def __init__(self, dataset: DataSet):
        self.dataset = dataset
        self.down: set[str] = set()  # keys that are pressed
        # keys that were pressed since the last action, if only for a moment
        self.tapped: set[str] = set()
        self.signs = {name: 1.0 for name, key in dataset.keys.items() if key.toggles}
        self.rest = np.array(dataset.rest or np.zeros(dataset.action_dim), np.float32)
        self.moved = np.zeros(2)  # counts of the mouse since the last action, sideways and down

    def __bool__(self) -> bool:
        return bool(self.down or self.tapped or self.moved.any())

    def press(self, keys: list[str]) -> None:
        self.tapped |= set(keys) - self.down
        self.down = set(keys)

    def move(self, motion: list[float]) -> None:
        self.moved += motion

    def begin(self, action: np.ndarray) -> None:
        """A world begins, in which this action [A] is taken first."""
        if self.dataset.absolute:
            self.rest = action.copy()

    def take_action(self) -> np.ndarray:
        """The action [A] of the keys down now or tapped since the last one."""
        action = self.rest.copy()
        for (first, bins), count in zip(self.dataset.mouse, self.moved, strict=False):
            if count:
                self.choose(action, first + int(np.abs(np.subtract(bins, count)).argmin()))
        for name in sorted(self.down | self.tapped):
            key = self.dataset.keys[name]
            if key.toggles and name in self.tapped:
                self.signs[name] = -self.signs[name]
            if not self.choose(action, key.index):
                action[key.index] += key.value * self.signs.get(name, 1)
        self.tapped, self.moved = set(), np.zeros(2)
        if self.dataset.absolute:
            self.rest = action.copy()  # what was moved stays there
        return action

    def choose(self, action: np.ndarray, index: int) -> bool:
        """Make this number the one that is 1, if it is one of a motion of the mouse."""
        for first, bins in self.dataset.mouse:
            if first <= index < first + len(bins):
                action[first : first + len(bins)] = 0
                action[index] = 1
                return True
        return False
