"""RECON (Shah et al. 2021): a robot drives outdoors. HDF5 files, a trajectory each: images/rgb_left
[T] JPEG, jackal/position [T, 2 or 3] metres, jackal/yaw [T] radians.

An action is a motion in the robot's own frame: row t is how far it goes ahead and to the left, in
metres, and turns to the left, in radians, from picture t to t + 1. As in Navigation World Models
pictures are squeezed into a square; the published models saw 320×320, padded to 320×512.

    python -m evaluation.evaluate --data recon --root … --checkpoint … --frames 20

gives 4 frames and predicts 16 more, longer than was trained on, and compares them at 224×224
(paper: 5.3; its LPIPS is AlexNet's). Held out are the trajectories of traj_names.txt, where that
lies in the folder (facebookresearch/nwm, data_splits/recon/test), or else 2,367 by their hashes.
"""
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from episodes.actions import Key
from episodes.hdf5 import open_file, read_each
from episodes.images import decode
from episodes.npz import Actions
from support.errors import DataError

IMAGE, POSITION, YAW = "images/rgb_left", "jackal/position", "jackal/yaw"
SIDE = 320
KEYS = {"ArrowUp": Key("ahead", 0, 0.25), "ArrowDown": Key("back", 0, -0.25),
        "ArrowLeft": Key("turn left", 2, 0.2), "ArrowRight": Key("turn right", 2, -0.2)}


def index(path: Path, image: str, actions: Actions) -> list[tuple[int, int, int]]:
    """As episodes/hdf5.py's."""
    try:
        with open_file(path) as file:
            counts = {len(file[name]) for name in (IMAGE, POSITION, YAW) if name in file}
            complete = all(name in file for name in (IMAGE, POSITION, YAW))
    except (OSError, RuntimeError, TypeError):
        return [(0, 0, -1)]
    if not complete:
        raise DataError(f"{path} does not hold this data set: expected {IMAGE}, {POSITION} and "
                        f"{YAW}")
    return [(0, 0, counts.pop() if len(counts) == 1 else -1)]


def motions(position: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """Places [T + 1, 2] and headings [T + 1] to actions [T, 3]."""
    (east, north), heading = np.diff(position, axis=0).T, yaw[:-1]
    return np.stack([np.cos(heading) * east + np.sin(heading) * north,
                     np.cos(heading) * north - np.sin(heading) * east,
                     (np.diff(yaw) + np.pi) % (2 * np.pi) - np.pi], axis=1).astype(np.float32)


def read(path: Path, offset: int, size: int, image: str, actions: Actions, start: int, stop: int
         ) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """Frames start .. stop - 1, uint8 [320, 320, 3], and their actions. From the last picture of a
    trajectory the robot does not move. Raises DataError."""
    position, yaw = read_each(path, [POSITION, YAW])
    if position.ndim != 2 or position.shape[1] < 2 or yaw.size != len(position):
        raise DataError(f"its positions are {list(position.shape)}, its headings {list(yaw.shape)}")
    places, turns = (np.concatenate([rows, rows[-1:]])[start : stop + 1]
                     for rows in (position[:, :2], yaw.ravel()))
    pictures, = read_each(path, [IMAGE])
    square = (np.asarray(Image.fromarray(decode(bytes(each))).resize((SIDE, SIDE)))
              for each in pictures[start:stop])
    return square, motions(places, turns)


def details(root: Path, paths: Sequence[Path], fps: float | None = None) -> dict:
    """What is held out, where a list of it lies beside the files."""
    return {"protocol": next(iter(sorted(root.rglob("traj_names.txt"))), None)}
