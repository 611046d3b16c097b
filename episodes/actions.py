"""What the numbers of an action mean: the keys that set them, and how an action reads in words."""
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
    """All numbers of an action [A] that are not zero, each behind its name: "dx 0.3  dy -1"."""
    named = zip(names, action, strict=True)
    return "  ".join(f"{name} {number:.3g}" for name, number in named if number)


# --------------------------------------------------------------------------------------------------
# CS:GO: 11 keys and 2 buttons, each 0 or 1, then the mouse's motion in counts, as two one-hots.

CSGO_PRESSED = (*"w a s d space ctrl shift 1 2 3 r".split(), "left click", "right click")
MOUSE_X = (-1000, -500, -300, -200, -100, -60, -30, -20, -10, -4, -2, 0,
           2, 4, 10, 20, 30, 60, 100, 200, 300, 500, 1000)
MOUSE_Y = (-200, -100, -50, -20, -10, -4, -2, 0, 2, 4, 10, 20, 50, 100, 200)
FIRST_X = len(CSGO_PRESSED)
FIRST_Y = FIRST_X + len(MOUSE_X)
CSGO_WIDTH = FIRST_Y + len(MOUSE_Y)  # 51


def csgo_action(pressed: Sequence[str] = (), x: int = 0, y: int = 0) -> np.ndarray:
    """The 51 numbers, float32, of keys and buttons by name and of a motion of the mouse.

    x, y  one of MOUSE_X, to the right; one of MOUSE_Y, down

    Raises ValueError for others.
    """
    action = np.zeros(CSGO_WIDTH, np.float32)
    for name in pressed:
        action[CSGO_PRESSED.index(name)] = 1
    action[FIRST_X + MOUSE_X.index(x)] = action[FIRST_Y + MOUSE_Y.index(y)] = 1
    return action


def describe_csgo(action: np.ndarray) -> str:
    """The 51 numbers in words: "w, left click, mouse +30, 0"."""
    words = [name for name, down in zip(CSGO_PRESSED, action, strict=False) if down > 0.5]
    x = MOUSE_X[action[FIRST_X:FIRST_Y].argmax()]
    y = MOUSE_Y[action[FIRST_Y:].argmax()]
    return ", ".join([*words, f"mouse {x:+d}" if x else "mouse 0", f"{y:+d}" if y else "0"])


def csgo_keys() -> dict[str, Key]:
    """What the keys of a browser do: the game's own, and the arrows turn the view."""
    browser = {"space": " ", "ctrl": "c", "shift": "Shift", "left click": "Enter",
               "right click": "q"}  # a browser keeps Ctrl+W for itself
    keys = {browser.get(name, name): Key(name, index, 1)
            for index, name in enumerate(CSGO_PRESSED)}
    turns = {"ArrowLeft": ("turn left", FIRST_X + MOUSE_X.index(-60)),
             "ArrowRight": ("turn right", FIRST_X + MOUSE_X.index(60)),
             "ArrowUp": ("look up", FIRST_Y + MOUSE_Y.index(-20)),
             "ArrowDown": ("look down", FIRST_Y + MOUSE_Y.index(20))}
    return keys | {name: Key(label, index, 1) for name, (label, index) in turns.items()}


# --------------------------------------------------------------------------------------------------
# The arena's player walks, shoots and turns, by at most 100 counts a frame, and never looks up.

ARENA_MOUSE = ((FIRST_X + MOUSE_X.index(-100), tuple(count for count in MOUSE_X
                                                     if abs(count) <= 100)),
               (FIRST_Y + MOUSE_Y.index(0), (0,)))


def arena_keys() -> dict[str, Key]:
    """Those of the game's keys that do something there; the arrows turn as fast as it can."""
    does = {"w": "ahead", "s": "back", "a": "left", "d": "right", "left click": "shoot"}
    keys = {name: Key(does[key.label], key.index, 1) for name, key in csgo_keys().items()
            if key.label in does}
    return keys | {"ArrowLeft": Key("turn left", FIRST_X + MOUSE_X.index(-100), 1),
                   "ArrowRight": Key("turn right", FIRST_X + MOUSE_X.index(100), 1)}
