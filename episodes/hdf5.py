"""Episodes as HDF5 files: CS:GO's recordings (Pearce & Zhu 2021), a thousand frames each.

    frame_<i>_x   uint8 [150, 280, 3], blue first
    frame_<i>_y   [51]: see episodes/actions.py
"""
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from episodes.npz import Actions
from errors import DataError


def open_file(path: Path):
    try:
        import h5py
    except ImportError:
        raise DataError("reading HDF5 files needs h5py: pip install h5py") from None
    return h5py.File(path, "r")


def index(path: Path, image: str, actions: Actions) -> list[tuple[int, int, int]]:
    """One row, (0, frames, frames); (0, 0, -1) if the file is damaged.

    Raises DataError if the file is whole but holds something else.
    """
    try:
        with open_file(path) as file:
            names = set(file)
            frames = sum(name.startswith("frame_") and name.endswith("_x") for name in names)
            width = file["frame_0_y"].shape[0] if "frame_0_y" in names else 0
    except (OSError, RuntimeError):
        return [(0, 0, -1)]
    if not frames or width != sum(numbers for _, numbers in actions):
        raise DataError(f"{path} does not hold this data set: expected frame_0_x, frame_0_y, … "
                        "with actions of 51 numbers")
    whole = all(f"frame_{i}_{what}" in names for i in range(frames) for what in "xy")
    return [(0, frames, frames if whole else -1)]


def read(path: Path, offset: int, size: int, image: str, actions: Actions, start: int, stop: int
         ) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """Frames uint8 [H, W, 3] offset + start .. offset + stop - 1, read when they are asked for, and
    their actions float32 [T, 51]. Raises DataError."""
    numbers = range(offset + start, offset + stop)
    taken = np.stack(list(read_each(path, [f"frame_{i}_y" for i in numbers])))
    frames = (frame[..., ::-1] for frame in read_each(path, [f"frame_{i}_x" for i in numbers]))
    return frames, taken.astype(np.float32)


def read_each(path: Path, names: list[str]) -> Iterator[np.ndarray]:
    try:
        with open_file(path) as file:
            for name in names:
                yield file[name][()]
    except (OSError, RuntimeError, KeyError) as error:
        raise DataError(f"it is no readable HDF5 file ({error})") from None
