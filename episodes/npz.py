"""Episodes as numpy files: one .npz each, with `image` uint8 [T, H, W, 3] and `action` [T, A].

A damaged file makes numpy and zipfile raise almost anything, from zlib.error to
tokenize.TokenError: see `support.errors.reading`. Nothing pickled is ever loaded.
"""
import os
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import numpy as np

from support.errors import DataError, reading

Actions = tuple[tuple[str, int], ...]  # (feature, how many numbers it has), …: an action, in order
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def index(path: Path, image: str, actions: Actions) -> list[tuple[int, int, int]]:
    """One row, (0, size, frames), from the arrays' headers; frames is -1 if the file is damaged.

    Raises DataError if the file is whole but holds something else.
    """
    size, width = os.path.getsize(path), sum(numbers for _, numbers in actions)
    try:
        with ZipFile(path) as archive:
            missing = {"image.npy", "action.npy"} - set(archive.namelist())
            if not missing:
                images, taken = shape_of(archive, "image"), shape_of(archive, "action")
    except Exception:
        return [(0, size, -1)]
    if missing:
        raise DataError(f"{path} has no {' and no '.join(sorted(m[:-4] for m in missing))}: "
                        "expected image [T, H, W, 3] and action [T, A]")
    if not images or not taken or images[0] != taken[0]:
        return [(0, size, -1)]
    if len(taken) == 2 and taken[1] != width:
        raise DataError(f"{path} does not hold this data set: its actions have {taken[1]} numbers, "
                        f"not {width}")
    return [(0, size, images[0])]


def shape_of(archive: ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(f"{name}.npy") as file:
        shape, _, dtype = HEADERS[np.lib.format.read_magic(file)](file)
    if dtype.hasobject:
        raise ValueError("the array is pickled")
    return shape


def read(path: Path, offset: int, size: int, image: str, actions: Actions, start: int, stop: int
         ) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """Frames uint8 [H, W, 3] start .. stop-1, read when they are asked for, and their actions
    float32 [T, A]. Raises DataError."""
    with reading(path), ZipFile(path) as archive:
        frames = shape_of(archive, "image")[0]
    taken = read_array(path, "action")
    if taken.dtype.kind not in "buif" or taken.ndim != 2 or not taken.shape[1]:
        raise DataError(f"action is {taken.dtype} {list(taken.shape)}; expected real numbers "
                        "[T, A]")
    if frames != len(taken):
        raise DataError(f"it has {frames} frames and {len(taken)} actions")
    return read_frames(path, start, stop), taken[start:stop].astype(np.float32)


def read_frames(path: Path, start: int, stop: int) -> Iterator[np.ndarray]:
    frames = read_array(path, "image")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise DataError(f"image is {frames.dtype} {list(frames.shape)}; expected uint8 [T, H, W, "
                        "3]")
    yield from frames[start:stop]


def read_array(path: Path, name: str) -> np.ndarray:
    with reading(path), np.load(path, allow_pickle=False) as arrays:
        return arrays[name]


def read_npy(path: str | Path) -> np.ndarray:
    """The array of a .npy file, mapped: its header may claim too much. Raises DataError."""
    with reading(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is an .npz archive; expected the .npy file of one array")
    return array
