"""Episodes as folders: pictures in the order of their names, and actions.npy [T, A] beside them.

    episode_000/000000.jpg 000001.jpg …  actions.npy

Row t of actions.npy was taken at the t-th picture. Names sort by number: 2.jpg before 10.jpg.
"""
import re
from pathlib import Path

import numpy as np

from episodes.npz import Actions, read_npy
from support.errors import DataError

NAME = "actions.npy"
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def index(path: Path, image: str, actions: Actions) -> list[tuple[int, int, int]]:
    """One row, (0, 0, frames), for the folder of an actions.npy; frames is -1 if it is damaged.

    actions  (feature, how many numbers it has), …: together the width of an action

    Raises DataError if actions of another width lie there.
    """
    try:
        taken = read_actions(path)
    except DataError:
        return [(0, 0, -1)]
    width = sum(numbers for _, numbers in actions)
    if taken.shape[1] != width:
        raise DataError(f"{path} does not belong to this data set: its actions have "
                        f"{taken.shape[1]} numbers, not {width}")
    return [(0, 0, len(taken) if len(taken) == len(list_pictures(path.parent)) else -1)]


def read(path: Path, offset: int, size: int, image: str, actions: Actions, start: int, stop: int
         ) -> tuple[list[Path], np.ndarray]:
    """The pictures start .. stop-1 as paths, and their actions float32 [T, A]. Raises DataError."""
    pictures, taken = list_pictures(path.parent), read_actions(path)
    if len(pictures) != len(taken):
        raise DataError(f"it has {len(pictures)} pictures and {len(taken)} rows in {NAME}")
    return pictures[start:stop], taken[start:stop].astype(np.float32)


def read_actions(path: Path) -> np.ndarray:
    """Actions [T, A] of real numbers, mapped; [T] counts as [T, 1]. Raises DataError."""
    taken = read_npy(path)
    taken = taken[:, None] if taken.ndim == 1 else taken
    if taken.ndim != 2 or taken.dtype.kind not in "buif" or 0 in taken.shape:
        raise DataError(f"{path} is {taken.dtype} {list(taken.shape)}; expected numbers [T, A]")
    return taken


def list_pictures(folder: Path) -> list[Path]:
    names = [name for name in folder.iterdir()
             if name.suffix.lower() in PICTURES and not name.name.startswith(".")]
    return sorted(names, key=natural)


def natural(path: Path) -> list[str | int]:
    """A key to sort by, in which numbers count as numbers."""
    parts = re.split(r"(\d+)", path.name)  # text, number, text, …
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def holds_pictures(names: list[str]) -> bool:
    return any(name.lower().endswith(PICTURES) for name in names)
