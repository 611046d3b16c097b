"""Episodes of one's own: what a folder says about them.

Their size and that of their actions are read from the first of them. The rest may stand beside them
in info.json, all of it optional:

    {"fps": 5,
     "names": ["dx", "dy", "gripper"],
     "keys": {"ArrowRight": {"dx": 1}, "ArrowLeft": {"dx": -1}, "w": {"dy": 1, "label": "up"},
              " ": {"gripper": 1, "toggles": true}},
     "absolute": false}

fps       frames per second
names     of the numbers in an action, in order
keys      for play: a browser's name of a key -> what it does to one number, in the data's own units
absolute  whether actions say where to be and not how to move: a key then adds its value to where
          the number is, and without a key all stay there

Episodes whose names end in -val or -test (`kitchen_07-val`) are held out; else an eighth of all.
"""
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from episodes import pictures
from episodes.actions import Key
from episodes.formats import format_of
from episodes.images import decode_all
from episodes.index import Listing, say
from support.errors import DataError, UserError, reading
from support.schema import conform

USUAL_FPS = 10


@dataclass(frozen=True)
class Info:
    """What the file may say."""
    fps: float | None = None
    names: tuple[str, ...] = ()
    keys: dict[str, dict[str, object]] = field(default_factory=dict)
    absolute: bool = False


def warn_without_actions(listing: Listing) -> None:
    """Say which folders hold pictures and no actions."""
    bare = sorted(os.path.basename(folder) for folder, names in listing
                  if pictures.NAME not in names and pictures.holds_pictures(names))
    if bare:
        say(f"left out: {len(bare)} folders hold pictures and no actions.npy "
            f"({', '.join(bare[:3])}{', …' if len(bare) > 3 else ''})")


def describe_folder(root: Path, paths: list[Path], fps: float | None = None) -> dict:
    """What `data.DataSet` wants to know of a folder: fps, aspect, actions, names, keys, absolute.

    fps  what the user says; it goes before info.json

    Raises DataError if no episode can be read.
    """
    first, actions = read_first(root, paths)
    width = actions.shape[1]
    info, keys = read_info(root, width)
    if not (fps or info.fps):
        say(f"nothing says how many frames a second {root} has: taken to be {USUAL_FPS}; --fps or "
            "an info.json say it")
    return {"fps": fps or info.fps or USUAL_FPS, "aspect": first.shape[1:3],
            "actions": (("action", width),), "names": info.names, "keys": keys,
            "absolute": info.absolute}


def read_first(root: Path, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """The first frame that can be read, [1, H, W, 3], and its action [1, A]. Raises DataError."""
    problems = []
    for path in paths:
        try:
            with reading(path):
                frames, actions = format_of(path).read(path, 0, 0, "image", (), 0, 1)
                return decode_all(frames), actions
        except DataError as error:
            problems.append(f"{path.relative_to(root)}: {error}")
    raise DataError(f"no episode in {root} can be read: {'; '.join(problems[:3])}")


def read_info(root: Path, width: int) -> tuple[Info, dict[str, Key]]:
    """The info.json of a folder whose actions have `width` numbers, if there is one, and its keys.

    Raises DataError for one that cannot be meant.
    """
    path = root / "info.json"
    if not path.exists():
        return Info(), {}
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    try:
        info = conform(Info, content, "", {"fps": (1e-3, 1000)})
    except UserError as error:
        raise DataError(f"{path}: {error}") from None
    names = info.names
    if len(names) != len(set(names)) or len(names) not in (0, width):
        raise DataError(f"{path}: names is {names!r:.80}; expected {width} different names, one "
                        "for each number of an action")
    return info, {name: read_key(path, name, what, names) for name, what in info.keys.items()}


def read_key(path: Path, name: str, what: dict, names: Sequence[str]) -> Key:
    """One of `keys`: {"dx": 1}, or with a label, or one that toggles."""
    example = f'{path}: the key {name!r} is {what!r:.80}; expected one number\'s name and a value, '
    numbers = {name: value for name, value in what.items() if name not in ("label", "toggles")}
    if len(numbers) != 1 or not all(name in names and is_number(value) and value
                                    for name, value in numbers.items()):
        raise DataError(example + f"the name one of {', '.join(names) or 'names (there are none)'}")
    (number, value), = numbers.items()
    toggles, label = what.get("toggles", False), what.get("label")
    if type(toggles) is not bool or not isinstance(label, str | None):
        raise DataError(example + 'beside it "label" (text) and "toggles" (true or false)')
    sign = "" if toggles else "+" if value > 0 else "-"
    return Key(label or sign + number, names.index(number), float(value), toggles)


def is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # NaN and infinities are not
