"""Episodes as numpy files: one .npz each, with `image` uint8 [T, H, W, 3] and `action` [T, A].

A damaged file makes numpy and zipfile raise almost anything, from zlib.error to
tokenize.TokenError. So whatever they raise is one DataError here. Nothing pickled is ever loaded.
"""
import os
from pathlib import Path
from zipfile import ZipFile

import numpy as np

from errors import DataError

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def index(path: Path, image: str, actions: tuple[tuple[str, int], ...]
          ) -> list[tuple[int, int, int]]:
    """One row, (0, size, frames), from the arrays' headers alone; frames is -1 if the file is
    damaged.

    actions  (feature, how many numbers it has), …: together the width of an action

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
    if not images or not taken:
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


def read(path: Path, offset: int, size: int, image: str, actions: tuple[tuple[str, int], ...]
         ) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [T, H, W, 3] and actions float32 [T, A]. Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            frames, taken = arrays["image"], arrays["action"]
    except Exception as error:
        raise DataError(f"it is no readable .npz ({type(error).__name__}: {error})") from None
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise DataError(f"image is {frames.dtype} {list(frames.shape)}; expected uint8 [T, H, W, "
                        "3]")
    if taken.dtype.kind not in "buif":
        raise DataError(f"action is of type {taken.dtype}; expected real numbers")
    return frames, taken.astype(np.float32)


def read_npy(path: str | Path) -> np.ndarray:
    """The array of a .npy file, mapped: its header may claim too much. Raises DataError."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:
        raise DataError(f"{path} is no readable .npy file ({error})") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is an .npz archive; expected the .npy file of one array")
    return array
