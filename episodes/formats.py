"""File formats. Each is a module with two functions, and a row here by the ending of a file's name:

    index(path, image, actions) -> [(offset, size, frames), …], a row for every episode in the file;
        frames is -1 if it is damaged
    read(path, offset, size, image, actions, start, stop) -> frames start .. stop-1 of an episode,
        to be read one by one (encoded pictures, their files, or arrays), and their actions [T, A]

image and actions say what a data set calls them. Both functions raise DataError.
"""
from pathlib import Path
from types import ModuleType

from episodes import hdf5, npz, pictures, recon, tfrecord

FORMATS = {".npz": npz, ".npy": pictures, ".hdf5": hdf5}  # all others are TFRecord


def format_of(path: Path) -> ModuleType:
    if path.suffix == ".hdf5" and path.name.startswith("jackal"):
        return recon
    return FORMATS.get(path.suffix, tfrecord)


def episode_name(path: Path, number: int) -> str:
    """A name of an episode that stays the same wherever its data set lies."""
    if path.suffix == ".npy":
        return path.parent.name  # a folder of pictures
    return path.stem if path.suffix in FORMATS else f"{path.name}:{number}"
