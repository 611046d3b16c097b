"""Episodes in, clips out: RT-1 and its relatives.

An episode is what a robot saw and did: frames [T, H, W, 3] and, beside frame t, the action taken there. Training
wants short clips from random places of random episodes, from data sets of a hundred gigabytes, without
ever holding more than a few episodes in memory. Three steps lead there:

    shards on disk ──index──▶ where each episode lies and how long it is          (read once, then cached)
                   ──Clips──▶ clip number i: an episode, a place in it, a few frames decoded     (in workers)
                   ──order──▶ clips 0, 1, 2, … are the same in every run with the same seed,
                              whatever the number of workers or processes

RT-1 and Bridge come as TFRecord files of `tf.train.Example` messages, which tools/tfrecord.py reads without TensorFlow;
RT-1 also in the converted form that others use, one .npz per episode.
"""
import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tools.tfrecord import DataError, feature_bytes, feature_list, feature_numbers, parse_example, read_record, \
    walk_records


@dataclass(frozen=True)
class Key:
    """What a key on the keyboard does to an action, when a person plays (play/server.py)."""
    label: str
    index: int  # of the number in the action
    value: float
    toggles: bool = False  # every new press changes the sign


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
    keys: dict[str, Key] = field(default_factory=dict)  # a browser's name of a key -> what it does

    @property
    def action_dim(self) -> int:
        return sum(width for _, width in self.actions)


SAMPLES = Path(__file__).parent / "samples"  # the bundled episodes

DATA_SETS = {
    "rt1": DataSet(
        shards="fractal20220817_data", image="steps/observation/image", fps=3, aspect=(256, 320),
        actions=(("steps/action/base_displacement_vector", 2), ("steps/action/base_displacement_vertical_rotation", 1),
                 ("steps/action/gripper_closedness_action", 1), ("steps/action/rotation_delta", 3),
                 ("steps/action/terminate_episode", 3), ("steps/action/world_vector", 3)),
        keys={"ArrowRight": Key("+x", 10, 1), "ArrowLeft": Key("-x", 10, -1), "ArrowUp": Key("+y", 11, 1),
              "ArrowDown": Key("-y", 11, -1), "w": Key("+z", 12, 1), "s": Key("-z", 12, -1), " ": Key("gripper", 3, 1, toggles=True)}),
    "bridge": DataSet(shards="bridge", image="steps/observation/image_0", fps=5, aspect=(256, 256),
                      actions=(("steps/action", 7),),
                      keys={"ArrowUp": Key("+x", 0, 0.03), "ArrowDown": Key("-x", 0, -0.03), "ArrowLeft": Key("+y", 1, 0.03),
                            "ArrowRight": Key("-y", 1, -0.03), "w": Key("+z", 2, 0.03), "s": Key("-z", 2, -0.03),
                            " ": Key("gripper", 6, 1, toggles=True)}),
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

    def feature(self, name: str) -> np.ndarray:
        """Another feature of numbers that the episode's Example carries, [T, ...]. Raises DataError if it is not there."""
        return feature_numbers(parse_example(read_record(self.path, self.offset, self.size)), name).reshape(self.length, -1)

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
        example = parse_example(read_record(self.path, self.offset, self.size))
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
    root        the data set's folder, its version folder, or a folder above; None: see `default_root`
    split       "train", "val" or "all": shards named -val or -test are held out, or, where there are
                none, the episodes whose names have the smallest hashes
    min_length  leave out episodes with fewer frames, and count them in `.short`

    Raises DataError: no such folder, no shards in it, damaged shards, nothing left.
    """
    if name not in DATA_SETS:
        raise DataError(f"there is no data set {name!r}; known are {', '.join(DATA_SETS)}")
    dataset = DATA_SETS[name]
    root = Path(root or default_root(name))
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


def default_root(name: str) -> Path:
    """`datasets/` if it holds shards of this data set, or else the bundled samples if they do."""
    for root in (Path("datasets"), SAMPLES):
        if any(root.rglob(f"{DATA_SETS[name].shards}*")):
            return root
    raise DataError(f"there is no {name} in datasets/, and no sample of it is bundled: name its folder with --root")


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
    for number, (offset, size, message) in enumerate(walk_records(path)):
        try:
            frames = count_frames(dataset, message)
        except DataError as error:
            if is_intact(path, offset, size):
                raise DataError(f"{path} does not hold this data set: {error}") from None
            frames = -1
        yield 0, number, offset, size, frames


def is_intact(path: Path, offset: int, size: int) -> bool:
    try:
        return bool(read_record(path, offset, size))
    except DataError:
        return False


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
# Clips


def decode(image: memoryview | np.ndarray) -> np.ndarray:
    """An encoded picture, or one that is an array already, to uint8 [H, W, 3]."""
    if isinstance(image, np.ndarray):
        return image
    try:
        return np.asarray(Image.open(BytesIO(image)).convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        raise DataError("a frame is no readable picture") from None


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


def random_frames(episodes: Episodes, size: tuple[int, int], seed: int, batches: int, workers: int = 0) -> Iterator[torch.Tensor]:
    """Batches of single frames from everywhere, uint8 [16, H, W, 3]. Raises DataError if nothing can be read."""
    order = [list(range(16 * i, 16 * i + 16)) for i in range(batches)]
    for batch in torch.utils.data.DataLoader(Clips(episodes, 1, size, seed), batch_sampler=order, collate_fn=collate,
                                             num_workers=workers):
        yield intact(batch)["frames"][:, 0]


def intact(batch: dict) -> dict:
    if "error" in batch:
        raise DataError(f"no clip can be read: {batch['error']}")
    return batch
