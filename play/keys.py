"""From keys to actions: what is pressed, and what that makes the robot do."""
import numpy as np

from data import DataSet


class Keyboard:
    """The keys of one player. Not safe among threads by itself: its session guards it."""

    def __init__(self, dataset: DataSet):
        self.dataset = dataset
        self.down: set[str] = set()  # keys that are pressed
        # keys that were pressed since the last action, if only for a moment
        self.tapped: set[str] = set()
        self.signs = {name: 1.0 for name, key in dataset.keys.items() if key.toggles}

    def __bool__(self) -> bool:
        return bool(self.down or self.tapped)

    def press(self, keys: list[str]) -> None:
        self.tapped |= set(keys) - self.down
        self.down = set(keys)

    def take_action(self) -> np.ndarray:
        """The action [A] of the keys down now or tapped since the last one."""
        action = np.zeros(self.dataset.action_dim, np.float32)
        for name in sorted(self.down | self.tapped):
            key = self.dataset.keys[name]
            if key.toggles and name in self.tapped:
                self.signs[name] = -self.signs[name]
            action[key.index] += key.value * self.signs.get(name, 1)
        self.tapped = set()
        return action
