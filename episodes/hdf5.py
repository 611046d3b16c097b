"""Episodes as HDF5 files: CS:GO's recordings (Pearce & Zhu 2021), a thousand frames each.

    frame_<i>_x   uint8 [150, 280, 3], blue first
    frame_<i>_y   [51]: see episodes/actions.py
"""
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from episodes.npz import Actions
from support.errors import DataError, optional, reading

LARGEST = 2**26  # numbers in a frame


def open_file(path: Path):
    return optional("h5py", "reading HDF5 files needs h5py").File(path, "r")


def index(path: Path, image: str, actions: Actions) -> list[tuple[int, int, int]]:
    """One row, (0, frames, frames); (0, 0, -1) if the file is damaged.

    Raises DataError if the file is whole but holds something else.
    """
    try:
        with open_file(path) as file:
            names = set(file)
            frames = sum(name.startswith("frame_") and name.endswith("_x") for name in names)
            shapes = {file[f"frame_{i}_y"].shape for i in range(frames)}
    except (OSError, RuntimeError, KeyError, AttributeError):
        return [(0, 0, -1)]
    if not frames or not any(len(shape) == 1 for shape in shapes):
        raise DataError(f"{path} does not hold this data set: expected frame_0_x, frame_0_y, … "
                        "with actions of 51 numbers")
    return [(0, frames, frames if shapes == {(sum(width for _, width in actions),)} else -1)]


def read(path: Path, offset: int, size: int, image: str, actions: Actions, start: int, stop: int
         ) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """Frames uint8 [H, W, 3] offset + start .. offset + stop - 1, read when they are asked for, and
    their actions float32 [T, 51]. Raises DataError."""
    numbers = range(offset + start, offset + stop)
    taken = np.stack(list(read_each(path, [f"frame_{i}_y" for i in numbers])))
    if taken.dtype.kind not in "buif" or taken.ndim != 2:
        raise DataError(f"its actions are {taken.dtype} {list(taken.shape[1:])}")
    frames = (frame[..., ::-1] for frame in read_each(path, [f"frame_{i}_x" for i in numbers]))
    return frames, taken.astype(np.float32)


def read_each(path: Path, names: list[str]) -> Iterator[np.ndarray]:
    """Data sets one by one. Raises DataError, also for one that would read another file."""
    with reading(path), open_file(path) as file:
        for name in names:
            link, found = file.get(name, getlink=True), file[name]
            elsewhere = hasattr(link, "path") or found.external or found.is_virtual
            if elsewhere or found.size > LARGEST:
                raise DataError(f"{name} lies in another file, or is neither a frame nor an action")
            yield found[()]
