"""Small data sets: a square that obeys, in RT-1's format."""
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from data import DATA_SETS
from episodes.csgo import csgo_action
from episodes.tfrecord import encode_example, write_records
from testing.commands import folder


def make_episode(length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A square that obeys: frames [T, 32, 40, 3], RT-1 actions [T, 13] of which two move it."""
    random = np.random.default_rng(seed)
    frames, actions = np.full((length, 32, 40, 3), 60, np.uint8), np.zeros((length, 13), np.float32)
    actions[:, 10:12] = random.integers(-1, 2, (length, 2))
    y, x = random.integers(8, 20, 2)
    for t in range(length):
        frames[t, y : y + 8, x : x + 8] = 220
        y, x = np.clip([y + 4 * actions[t, 10], x + 4 * actions[t, 11]], 0, [24, 32]).astype(int)
    return frames, actions


def make_rt1(lengths: list[int], shards: int = 1, name: str = "fractal20220817_data-train") -> Path:
    """A small RT-1: episode i has lengths[i] frames."""
    root = folder() / "fractal20220817_data" / "0.1.0"
    root.mkdir(parents=True)
    payloads = []
    for i, length in enumerate(lengths):
        frames, actions = make_episode(length, seed=i)
        features = {"steps/observation/image": [encode_jpeg(frame) for frame in frames]}
        first = 0
        for key, width in DATA_SETS["rt1"].actions:
            column = actions[:, first : first + width].ravel()
            features[key] = column.astype(np.int64) if "terminate" in key else column
            first += width
        payloads.append(encode_example(features))
    for s in range(shards):
        write_records(root / f"{name}.tfrecord-{s:05d}-of-{shards:05d}", payloads[s::shards])
    return root.parent


def make_pictures(lengths: list[int], root: Path | None = None, width: int = 2, **info: object
                  ) -> Path:
    """A folder of one's own: episode i has lengths[i] pictures, and actions of `width` numbers of
    which the first two move the square."""
    root = root or folder() / "my_robot"
    for i, length in enumerate(lengths):
        frames, actions = make_episode(length, seed=i)
        (episode := root / f"episode_{i:03d}").mkdir(parents=True)
        for t, frame in enumerate(frames):
            Image.fromarray(frame).save(episode / f"{t}.png")  # 2 comes before 10
        numbers = np.zeros((length, width))
        numbers[:, :2] = 3 + 50 * actions[:, 10:12]
        np.save(episode / "actions.npy", numbers)
    if info:
        (root / "info.json").write_text(json.dumps(info), encoding="utf-8")
    return root


def make_csgo(names: list[str], frames: int = 20) -> Path:
    """Files of CS:GO's layout with random frames and actions."""
    import h5py
    root = folder()
    for number, name in enumerate(names):
        random = np.random.default_rng(number)
        (root / "1-200").mkdir(exist_ok=True)
        with h5py.File(root / "1-200" / name, "w") as file:
            for i in range(frames):
                file[f"frame_{i}_x"] = random.integers(0, 256, (150, 280, 3), dtype=np.uint8)
                file[f"frame_{i}_y"] = csgo_action(["w"] * (i % 2), x=(0, 30)[i % 2])
    return root


def encode_jpeg(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=95)
    return file.getvalue()


def shard_of(root: Path, i: int = 0) -> Path:
    return sorted(root.rglob("*.tfrecord-*"))[i]


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
