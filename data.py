"""Episodes in, clips out: RT-1 and its relatives.

An episode is what a robot saw and did: frames [T, H, W, 3] and, beside frame t, the action taken there. Training
wants short clips from random places of random episodes, from data sets of a hundred gigabytes, without
ever holding more than a few episodes in memory. Three steps lead there:

    shards on disk ──index──▶ where each episode lies and how long it is          (read once, then cached)
                   ──Clips──▶ clip number i: an episode, a place in it, a few frames decoded     (in workers)
                   ──order──▶ clips 0, 1, 2, … are the same in every run with the same seed,
                              whatever the number of workers or processes

RT-1 and Bridge come as TFRecord files of `tf.train.Example` messages. Reading those takes TensorFlow, or the
hundred lines in the middle of this file.
"""
import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm


class DataError(ValueError):
    """Data that cannot be used; the message says what was found and what to do."""


@dataclass(frozen=True)
class DataSet:
    """Where a data set keeps its frames and actions, and what a model has to know about it."""
    shards: str  # how the names of its shards begin
    image: str  # feature with one encoded picture per step
    actions: tuple[tuple[str, int], ...]  # features that make up the action, in order, and how many numbers each has
    fps: int
    aspect: tuple[int, int]  # height and width of its frames, up to a factor
    context: int = 1  # frames given at the start of a rollout
    held_out: int = 1024  # validation episodes (at most an eighth of all)

    @property
    def action_dim(self) -> int:
        return sum(width for _, width in self.actions)


DATA_SETS = {
    "rt1": DataSet(
        shards="fractal20220817_data", image="steps/observation/image", fps=3, aspect=(256, 320),
        actions=(("steps/action/base_displacement_vector", 2), ("steps/action/base_displacement_vertical_rotation", 1),
                 ("steps/action/gripper_closedness_action", 1), ("steps/action/rotation_delta", 3),
                 ("steps/action/terminate_episode", 3), ("steps/action/world_vector", 3))),
    "bridge": DataSet(shards="bridge", image="steps/observation/image_0", fps=5, aspect=(256, 256),
                      actions=(("steps/action", 7),)),
}


# ---------------------------------------------------------------------------------------------------------
# Episodes


@dataclass(frozen=True)
class Episode:
    """One episode, read from disk when asked. Raises DataError if what lies there is damaged."""
    dataset: DataSet
    path: Path
    number: int  # in its file
    offset: int
    size: int
    length: int

    @property
    def name(self) -> str:
        return self.path.stem if self.path.suffix == ".npz" else f"{self.path.name}:{self.number}"

    @property
    def frames(self) -> np.ndarray:
        """uint8 [T, H, W, 3], RGB."""
        return self.read(0, self.length)[0]

    @property
    def actions(self) -> np.ndarray:
        """float32 [T, A]: row t was taken at frame t."""
        return self.load()[1]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames start .. stop-1, and their actions."""
        images, actions = self.load()
        try:
            return np.stack([decode(image) for image in images[start:stop]]), actions[start:stop]
        except DataError as error:
            raise DataError(f"episode {self.name} is damaged: {error}") from None

    def load(self) -> tuple[Sequence, np.ndarray]:
        """All frames as they are stored, and all actions."""
        try:
            images, actions = self.load_npz() if self.path.suffix == ".npz" else self.load_example()
            if len(images) != len(actions) or actions.ndim != 2:
                raise DataError(f"it has {len(images)} frames and actions {list(actions.shape)}")
            if not np.isfinite(actions).all():
                raise DataError("an action is not a finite number")
            return images, actions
        except DataError as error:
            raise DataError(f"episode {self.name} is damaged: {error}") from None

    def load_example(self) -> tuple[list[memoryview], np.ndarray]:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            payload, crc = file.read(self.size), file.read(4)
        if len(crc) < 4 or masked_crc32c(payload) != int.from_bytes(crc, "little"):
            raise DataError("its checksum does not match (CRC-32C)")
        example = parse_example(memoryview(payload))
        images = feature_bytes(example, self.dataset.image)
        columns = [feature_numbers(example, name) for name, _ in self.dataset.actions]
        if any(len(column) != width * len(images) for column, (_, width) in zip(columns, self.dataset.actions)):
            raise DataError(f"{len(images)} frames do not go with {[len(column) for column in columns]} action numbers")
        return images, np.concatenate([c.reshape(len(images), -1) for c in columns], axis=1).astype(np.float32)

    def load_npz(self) -> tuple[np.ndarray, np.ndarray]:
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                images, actions = arrays["image"], arrays["action"].astype(np.float32)
        except (BadZipFile, OSError, EOFError, KeyError, ValueError, zlib.error) as error:
            raise DataError(f"it is no readable .npz ({error})") from None
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise DataError(f"image is {images.dtype} {list(images.shape)}; expected uint8 [T, H, W, 3]")
        return images, actions


class Episodes(Sequence):
    """Episodes of one data set, found by an index; an item is read only when its frames or actions are."""

    def __init__(self, dataset: DataSet, paths: list[Path], records: np.ndarray, short: int = 0, damaged: int = 0):
        self.dataset, self.paths, self.records = dataset, paths, records
        self.short, self.damaged = short, damaged  # how many were left out, and why

    @property
    def lengths(self) -> np.ndarray:
        return self.records[:, 4]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Episode:
        file, *record = map(int, self.records[i])
        return Episode(self.dataset, self.paths[file], *record)

    def where(self, keep: np.ndarray) -> "Episodes":
        return Episodes(self.dataset, self.paths, self.records[keep], self.short, self.damaged)


def open_episodes(name: str, root: str | Path | None = None, split: str = "all", min_length: int = 1) -> Episodes:
    """Open a data set; what is read is its index, not its frames.

    name        an entry of DATA_SETS
    root        the data set's folder, its version folder, or a folder above; None means `datasets/`
    split       "train", "val" or "all": shards named -val or -test are held out, or, where there are
                none, the episodes whose names have the smallest hashes
    min_length  leave out episodes with fewer frames, and count them in `.short`

    Raises DataError: no such folder, no shards in it, damaged shards, nothing left.
    """
    if name not in DATA_SETS:
        raise DataError(f"there is no data set {name!r}; known are {', '.join(DATA_SETS)}")
    dataset, root = DATA_SETS[name], Path(root or "datasets")
    paths = find_shards(dataset, root)
    records = load_index(dataset, root, paths)

    records = records[split_mask(paths, records, dataset.held_out, split)]
    lengths = records[:, 4]
    episodes = Episodes(dataset, paths, records[lengths >= max(min_length, 1)],
                        short=int(((lengths >= 0) & (lengths < min_length)).sum()), damaged=int((lengths < 0).sum()))
    if not len(episodes):
        longest = lengths.max(initial=0)
        raise DataError(f"no episode of {name} in {root} (split {split!r}) can be used: {episodes.damaged} damaged, "
                        f"{episodes.short} shorter than {min_length} frames" + (
                            f"; the longest has {longest}, so ask for clips of at most that" if longest > 0 else ""))
    return episodes


def find_shards(dataset: DataSet, root: Path) -> list[Path]:
    """The files of a data set below a folder. TFRecord is preferred to .npz, the data set's own names to others."""
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give the one that holds the episodes (--root)")
    found = sorted(path for path in root.rglob("*") if path.is_file())
    shards = [path for path in found if re.search(r"\.tfrecord(-\d+-of-\d+)?$", path.name)]
    shards = [path for path in shards if path.name.startswith(dataset.shards)] or shards
    shards = shards or [path for path in found if path.suffix == ".npz"]
    if not shards:
        raise DataError(f"{root} holds no episodes: expected {dataset.shards}*.tfrecord-* or *.npz files in or below it")
    return shards


def split_mask(paths: list[Path], records: np.ndarray, held_out: int, split: str) -> np.ndarray:
    """Which records belong to a split, by their shard's name or else by a hash of their own."""
    if split not in ("train", "val", "all"):
        raise DataError(f"split is {split!r}; it must be train, val or all")
    if split == "all":
        return np.ones(len(records), bool)
    named = np.array([bool(re.search(r"-(val|valid|validation|test)\b", path.name)) for path in paths])
    if named.any():
        validation = named[records[:, 0]]
    else:
        keys = [hashlib.sha256(f"{paths[file].name}:{number}".encode()).digest() for file, number in records[:, :2]]
        order = sorted(range(len(records)), key=keys.__getitem__)
        held_out = min(held_out, max(len(records) // 8, int(len(records) > 1)))
        validation = np.zeros(len(records), bool)
        validation[order[:held_out]] = True
    return validation if split == "val" else ~validation


# ---------------------------------------------------------------------------------------------------------
# The index: one row per episode, [file, number in file, offset, size, frames]; frames is -1 if it is damaged


def load_index(dataset: DataSet, root: Path, paths: list[Path]) -> np.ndarray:
    """Index all shards, taking over from the cache those that have not changed since.

    The cache lies in $XDG_CACHE_HOME/vid2world (default ~/.cache): data folders are often read-only.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vid2world"
    cache = folder / f"{dataset.shards}-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.npz"
    names = [str(path.relative_to(root)) for path in paths]
    stamps = np.array([(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, paths)])
    known = {}
    try:
        with np.load(cache, allow_pickle=False) as old:
            old_names, old_stamps, old_rows = old["names"].tolist(), old["stamps"], old["rows"]
            starts = np.searchsorted(old_rows[:, 0], np.arange(len(old_names) + 1))
            known = {name: (tuple(old_stamps[i]), old_rows[starts[i]:starts[i + 1]]) for i, name in enumerate(old_names)}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        pass  # no cache, or not a good one: index everything

    tables, done = [], 0
    fresh = [name for name, stamp in zip(names, stamps) if known.get(name, (None,))[0] != tuple(stamp)]
    try:
        with tqdm(total=len(fresh), desc="indexing", unit="shard", disable=len(fresh) < 20) as bar:
            for path, name, stamp in zip(paths, names, stamps):
                stamp_known, rows = known.get(name, (None, None))
                if stamp_known != tuple(stamp):
                    rows = np.array(list(index_shard(dataset, path)), dtype=np.int64).reshape(-1, 5)
                    bar.update()
                tables.append(np.concatenate([np.full((len(rows), 1), done), rows[:, 1:]], axis=1))
                done += 1
    finally:  # keep what is done even if a later shard is damaged or the user has lost patience
        if fresh and done:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                partial = cache.with_name(f"{cache.stem}.{os.getpid()}.npz")
                np.savez(partial, names=np.array(names[:done]), stamps=stamps[:done], rows=np.concatenate(tables))
                partial.replace(cache)
            except OSError:
                pass  # nowhere to keep it: it will be built again
    return np.concatenate(tables)


def index_shard(dataset: DataSet, path: Path) -> Iterator[tuple[int, int, int, int, int]]:
    """Walk over the records of a shard without reading their frames."""
    if path.suffix == ".npz":
        yield 0, 0, 0, os.path.getsize(path), npz_length(path)
        return
    size = os.path.getsize(path)
    if size == 0:
        raise DataError(f"{path} is empty: fetch it again")
    shard = memoryview(np.memmap(path, np.uint8, mode="r"))
    position = number = 0
    while position < size:
        header = bytes(shard[position : position + 12])
        if len(header) == 12 and masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little"):
            raise DataError(f"{path} is damaged: the record header at byte {position} fails its checksum; fetch it again")
        length = int.from_bytes(header[:8], "little")
        start, position = position + 12, position + 12 + length + 4
        if len(header) < 12 or position > size:
            raise DataError(f"{path} is truncated: record {number} ends after the file does; fetch it again")
        try:
            frames = count_frames(dataset, shard[start : start + length])
        except DataError as error:
            checksum = int.from_bytes(shard[start + length : position], "little")
            if masked_crc32c(bytes(shard[start : start + length])) == checksum:  # intact, so it is of another kind
                raise DataError(f"{path} does not hold this data set: {error}") from None
            frames = -1
        yield 0, number, start, length, frames
        number += 1


def count_frames(dataset: DataSet, message: memoryview) -> int:
    example = parse_example(message)
    feature_list(example, dataset.image)
    name, width = dataset.actions[0]
    return len(feature_numbers(example, name)) // width


def npz_length(path: Path) -> int:
    """Frames in an .npz, from the array's header alone; -1 if it cannot be read."""
    try:
        with ZipFile(path) as archive:
            missing = {"image.npy", "action.npy"} - set(archive.namelist())
            if missing:
                raise DataError(f"{path} has no {' and no '.join(sorted(m[:-4] for m in missing))}: expected "
                                "image [T, H, W, 3] and action [T, A]")
            with archive.open("image.npy") as file:
                version = np.lib.format.read_magic(file)
                read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                return read_header[version](file)[0][0]
    except (BadZipFile, OSError, EOFError, KeyError, IndexError):
        return -1


# ---------------------------------------------------------------------------------------------------------
# TFRecord: records framed by length and checksums, each a protocol buffer `Example{Features{map<name, Feature>}}`


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protocol buffer message: number, and value (an int, or the bytes of anything longer)."""
    position = 0
    while position < len(message):
        tag, position = varint(message, position)
        wire = tag & 7
        if wire == 0:
            value, position = varint(message, position)
        elif wire in (1, 2, 5):
            size, position = varint(message, position) if wire == 2 else ({1: 8, 5: 4}[wire], position)
            value, position = message[position : position + size], position + size
            if position > len(message):
                raise DataError("its message is cut short")
        else:
            raise DataError("its message is no protocol buffer")
        yield tag >> 3, value


def varint(message: memoryview, position: int) -> tuple[int, int]:
    """A little-endian base-128 number, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise DataError("its message is cut short")
        byte = message[position]
        value |= (byte & 127) << shift
        position += 1
        if byte < 128:
            return value, position
    raise DataError("its message is no protocol buffer")


def parse_example(message: memoryview) -> dict[str, memoryview]:
    """Feature name -> encoded Feature. Nothing inside the features is touched."""
    example = {}
    for _, features in fields(message):
        for _, entry in fields(features):
            entry = dict(fields(entry))  # 1: the name, 2: the feature
            example[bytes(entry.get(1, b"")).decode("utf-8", "replace")] = entry.get(2, memoryview(b""))
    return example


def feature_list(example: dict[str, memoryview], name: str) -> tuple[int, memoryview]:
    """A feature's kind (1 bytes, 2 float, 3 int64) and its encoded list."""
    if name not in example:
        raise DataError(f"there is no feature {name!r}; there are {', '.join(sorted(example)[:8])}, …")
    return next(fields(example[name]), (1, memoryview(b"")))


def feature_bytes(example: dict[str, memoryview], name: str) -> list[memoryview]:
    _, values = feature_list(example, name)
    return [value for _, value in fields(values)]


def feature_numbers(example: dict[str, memoryview], name: str) -> np.ndarray:
    """A list of floats or integers, packed or not."""
    kind, values = feature_list(example, name)
    numbers = []
    for _, value in fields(values):
        if kind == 2:  # 4 bytes each, one or many
            numbers.append(np.frombuffer(value, "<f4"))
        elif isinstance(value, int):
            numbers.append([value])
        else:
            position = 0
            while position < len(value):
                number, position = varint(value, position)
                numbers.append([number])
    numbers = np.concatenate(numbers) if numbers else np.zeros(0)
    return numbers if kind == 2 else numbers.astype(np.uint64).astype(np.int64)  # negative ones come as 2⁶⁴ - n


def decode(image: memoryview | np.ndarray) -> np.ndarray:
    """An encoded picture, or one that is an array already, to uint8 [H, W, 3]."""
    if isinstance(image, np.ndarray):
        return image
    try:
        return np.asarray(Image.open(BytesIO(image)).convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        raise DataError("a frame is no readable picture") from None


def masked_crc32c(data: bytes) -> int:
    """The checksum of TFRecord: CRC-32C, rotated and shifted so that data may contain its own checksum."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


CRC_TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    CRC_TABLE = np.where(CRC_TABLE & 1, CRC_TABLE >> 1 ^ np.uint32(0x82F63B78), CRC_TABLE >> 1)
CRC_LIST = CRC_TABLE.tolist()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli, RFC 3720 appendix B.4), fast enough for megabytes without compiled code.

    The register is linear over bits. So the data is cut into equal lanes, which numpy advances side by side,
    one byte of each at a time; then neighbours are joined, crc(AB) = shift(crc(A), len(B)) ^ crc(B), where the
    shift is a 32×32 bit matrix that is found by sending its 32 unit vectors along as further lanes.
    """
    if len(data) < 256:
        crc = 0xFFFFFFFF
        for byte in data:
            crc = CRC_LIST[(crc ^ byte) & 255] ^ crc >> 8
        return crc ^ 0xFFFFFFFF

    lanes = 1 << (len(data).bit_length() // 2 + 2)
    length = -(-len(data) // lanes)
    padded = np.zeros((lanes + 32, length), np.uint8)  # zeros in front change nothing in a register that starts at zero
    padded.reshape(-1)[lanes * length - len(data) : lanes * length] = np.frombuffer(data, np.uint8)
    padded.reshape(-1)[lanes * length - len(data) :][:4] ^= 255  # the same as starting the register at 0xFFFFFFFF
    crc = np.zeros(lanes + 32, np.uint32)
    crc[lanes:] = 1 << np.arange(32, dtype=np.uint32)
    for column in np.ascontiguousarray(padded.T):
        crc = CRC_TABLE[(crc ^ column) & 255] ^ crc >> 8

    crc, shift = crc[:lanes], crc[lanes:]

    def shifted(x: np.ndarray) -> np.ndarray:
        bits = x[:, None] >> np.arange(32, dtype=np.uint32) & 1
        return np.bitwise_xor.reduce(bits * shift, axis=1)

    while len(crc) > 1:
        crc = shifted(crc[0::2]) ^ crc[1::2]
        shift = shifted(shift)
    return int(crc[0]) ^ 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------------------
# Clips


def fit_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize frames uint8 [T, H, W, 3] to fill height × width, and crop what stands over evenly."""
    H, W = frames.shape[1:3]
    scale = max(height / H, width / W)
    size = max(round(W * scale), width), max(round(H * scale), height)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    box = (left, top, left + width, top + height)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC).crop(box))
                     for frame in frames])


class Clips(torch.utils.data.Dataset):
    """Random clips without end: clip number i depends on the seed and on i, and on nothing else.

    An item is {"frames": uint8 [T, H, W, 3], "actions": float32 [T, A], "index": i, "damaged": [message, …]}.
    A damaged episode is replaced by another draw and reported; "frames" is None if no draw worked.
    """

    def __init__(self, episodes: Episodes, frames: int, size: tuple[int, int], seed: int):
        self.episodes, self.frames, self.size, self.seed = episodes, frames, size, seed
        self.ends = np.cumsum(episodes.lengths - frames + 1)  # every possible clip is equally likely

    def __getitem__(self, i: int) -> dict:
        damaged = []
        for attempt in range(20):
            clip = np.random.default_rng([self.seed, i, attempt]).integers(self.ends[-1])
            number = int(np.searchsorted(self.ends, clip, side="right"))
            start = int(self.ends[number] - clip) - 1
            try:
                frames, actions = self.episodes[number].read(start, start + self.frames)
                return {"frames": fit_frames(frames, *self.size), "actions": actions, "index": i, "damaged": damaged}
            except DataError as error:
                damaged.append(str(error))
        return {"frames": None, "actions": None, "index": i, "damaged": damaged}


def collate(clips: list[dict]) -> dict:
    """Stack clips into frames uint8 [B, T, H, W, 3] and actions [B, T, A].

    If no clip could be drawn, the reason is returned as "error" and not raised: it has to cross from a worker process.
    """
    damaged = [message for clip in clips for message in clip["damaged"]]
    if any(clip["frames"] is None for clip in clips):
        return {"error": damaged[-1]}
    return {"frames": torch.from_numpy(np.stack([clip["frames"] for clip in clips])),
            "actions": torch.from_numpy(np.stack([clip["actions"] for clip in clips])),
            "index": [clip["index"] for clip in clips], "damaged": damaged}
