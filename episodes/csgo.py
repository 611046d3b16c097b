"""CS:GO's recordings (Pearce and Zhu 2021), and the arena, a hall of Doom's in the same layout.

An action has 51 numbers: 11 keys and 2 buttons, 0 or 1, then the mouse's motion as two one-hots.
"""
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from episodes.actions import Key

PROTOCOL = Path(__file__).with_name("csgo_held_out.txt")  # held-out files, and where a clip begins
PRESSED = (*"w a s d space ctrl shift 1 2 3 r".split(), "left click", "right click")
MOUSE_X = (-1000, -500, -300, -200, -100, -60, -30, -20, -10, -4, -2, 0,
           2, 4, 10, 20, 30, 60, 100, 200, 300, 500, 1000)
MOUSE_Y = (-200, -100, -50, -20, -10, -4, -2, 0, 2, 4, 10, 20, 50, 100, 200)
FIRST_X = len(PRESSED)
FIRST_Y = FIRST_X + len(MOUSE_X)
WIDTH = FIRST_Y + len(MOUSE_Y)  # 51


def csgo_action(pressed: Sequence[str] = (), x: int = 0, y: int = 0) -> np.ndarray:
    """The 51 numbers, float32, of keys and buttons by name and of a motion of the mouse.

    x, y  one of MOUSE_X, to the right; one of MOUSE_Y, down

    Raises ValueError for others.
    """
    action = np.zeros(WIDTH, np.float32)
    for name in pressed:
        action[PRESSED.index(name)] = 1
    action[FIRST_X + MOUSE_X.index(x)] = action[FIRST_Y + MOUSE_Y.index(y)] = 1
    return action


def describe(action: np.ndarray) -> str:
    """The 51 numbers in words: "w, left click, mouse +30, 0"."""
    words = [name for name, down in zip(PRESSED, action, strict=False) if down > 0.5]
    x = MOUSE_X[action[FIRST_X:FIRST_Y].argmax()]
    y = MOUSE_Y[action[FIRST_Y:].argmax()]
    return ", ".join([*words, f"mouse {x:+d}" if x else "mouse 0", f"{y:+d}" if y else "0"])


def csgo_keys() -> dict[str, Key]:
    """What the keys of a browser do: the game's own, and the arrows turn the view."""
    browser = {"space": " ", "ctrl": "c", "shift": "Shift", "left click": "Enter",
               "right click": "q"}  # a browser keeps Ctrl+W for itself
    keys = {browser.get(name, name): Key(name, index, 1)
            for index, name in enumerate(PRESSED)}
    turns = {"ArrowLeft": ("turn left", FIRST_X + MOUSE_X.index(-60)),
             "ArrowRight": ("turn right", FIRST_X + MOUSE_X.index(60)),
             "ArrowUp": ("look up", FIRST_Y + MOUSE_Y.index(-20)),
             "ArrowDown": ("look down", FIRST_Y + MOUSE_Y.index(20))}
    return keys | {name: Key(label, index, 1) for name, (label, index) in turns.items()}


KEYS = csgo_keys()
MOUSE = ((FIRST_X, MOUSE_X), (FIRST_Y, MOUSE_Y))
REST = tuple(csgo_action().tolist())


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


# What `bundled/record_arena.py` records differs from CS:GO in this.
ARENA = {"fps": 9, "conditioning_fps": None, "aspect": (64, 80), "compare_at": None,
         "keys": arena_keys(), "mouse": ARENA_MOUSE}


def details(root: Path, paths: Sequence[Path], fps: float | None = None) -> dict:
    """What the files say of the data set: shards are of the arena."""
    return {} if paths[0].suffix == ".hdf5" else ARENA
