"""Small data sets: a square that obeys, in RT-1's format."""
import io
from pathlib import Path

import numpy as np
from PIL import Image

from data import DATA_SETS
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
