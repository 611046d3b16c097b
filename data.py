"""Episodes in, clips out: RT-1 and its relatives.

An episode is what a robot saw and did: frames [T, H, W, 3] and, beside frame t, the action taken
there. Training wants short clips from random places of random episodes, from data sets of a hundred
gigabytes, without ever holding more than a few episodes in memory. Three steps lead there:

    files on disk ──index──▶ where each episode lies and how long it is    (read once, then kept)
                  ──Clips──▶ clip i: an episode, a place in it, a few frames, decoded in workers
                  ──order──▶ clips 0, 1, 2, … are the same in every run with the same seed,
                             whatever the number of workers or processes

What a data set is stands in `DATA_SETS`: a new one of a known format is one entry. A file format is
a module in `episodes/` with two functions, `index` and `read`: a new one is such a module and a row
of `FORMATS`.

Paper: appendix C.1.
"""
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

from episodes import npz, tfrecord
from episodes.images import decode_all
from episodes.index import find_files, load_index
from errors import DataError

FORMATS = {".npz": npz}  # by the ending of a file's name; all others are TFRecord


@dataclass(frozen=True)
class Key:
    """What a key on the keyboard does to an action, when a person plays."""
    label: str
    index: int  # of the number in the action
    value: float
    toggles: bool = False  # every new press changes the sign


@dataclass(frozen=True)
class DataSet:
    """Where a data set keeps its frames and actions, and what a model has to know about it."""
    shards: str  # how the names of its shards begin
    image: str  # feature with one encoded picture per step
    # features that make up the action, in order, and their widths
    actions: tuple[tuple[str, int], ...]
    fps: int
    aspect: tuple[int, int]  # height and width of its frames, up to a factor
    fit: str = "pad"  # how frames of another aspect than the model's are fitted: see `fit_frames`
    augment: bool = False  # whether training varies the colours and the place of the picture
    context: int = 1  # frames given at the start of a rollout
    held_out: int = 1024  # validation episodes (at most an eighth of all)
    keys: dict[str, Key] = field(default_factory=dict)  # a browser's name of a key -> what it does

    @property
    def action_dim(self) -> int:
        return sum(width for _, width in self.actions)


SAMPLES = Path(__file__).parent / "samples"  # the bundled episodes

DATA_SETS = {
    # The 13 numbers of RT-1: motion of the base in its plane (2) and turn around its vertical axis
    # (1), closing of the gripper (1), turn of the hand around its axes in radians (3), whether the
    # episode ends (3, one of which is 1), motion of the hand along x, y, z (3). All are commands,
    # relative to the base of the robot.
    "rt1": DataSet(
        shards="fractal20220817_data", image="steps/observation/image", fps=3, aspect=(256, 320),
        augment=True,
        actions=(("steps/action/base_displacement_vector", 2),
                 ("steps/action/base_displacement_vertical_rotation", 1),
                 ("steps/action/gripper_closedness_action", 1), ("steps/action/rotation_delta", 3),
                 ("steps/action/terminate_episode", 3), ("steps/action/world_vector", 3)),
        keys={"ArrowRight": Key("+x", 10, 1), "ArrowLeft": Key("-x", 10, -1),
              "ArrowUp": Key("+y", 11, 1), "ArrowDown": Key("-y", 11, -1),
              "w": Key("+z", 12, 1), "s": Key("-z", 12, -1),
              " ": Key("gripper", 3, 1, toggles=True)}),
    "bridge": DataSet(
        shards="bridge", image="steps/observation/image_0", fps=5, aspect=(256, 256), fit="crop",
        actions=(("steps/action", 7),),
        keys={"ArrowUp": Key("+x", 0, 0.03), "ArrowDown": Key("-x", 0, -0.03),
              "ArrowLeft": Key("+y", 1, 0.03), "ArrowRight": Key("-y", 1, -0.03),
              "w": Key("+z", 2, 0.03), "s": Key("-z", 2, -0.03),
              " ": Key("gripper", 6, 1, toggles=True)}),
}


def describe_action(dataset: DataSet, action: np.ndarray) -> str:
    """An action [A] as the labels of the keys that would do the larger part of it: "+x -z"."""
    labels = []
    for key in dataset.keys.values():
        number = action[key.index]
        if key.toggles and number:
            labels.append(f"{key.label} {'closes' if number > 0 else 'opens'}")
        elif not key.toggles and number / key.value > 0.3:
            labels.append(key.label)
    return "  ".join(labels)


# --------------------------------------------------------------------------------------------------
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
    def format(self):
        return FORMATS.get(self.path.suffix, tfrecord)

    @property
    def name(self) -> str:
        return self.path.stem if self.path.suffix in FORMATS else f"{self.path.name}:{self.number}"

    @property
    def frames(self) -> np.ndarray:
        """uint8 [T, H, W, 3], RGB."""
        return self.read(0, self.length)[0]

    @property
    def actions(self) -> np.ndarray:
        """float32 [T, A]: row t was taken at frame t."""
        return self.load()[1]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames start .. stop-1, uint8 [T, H, W, 3], and their actions float32 [T, A]."""
        images, actions = self.load()
        try:
            return decode_all(images[start:stop]), actions[start:stop]
        except DataError as error:
            raise DataError(f"episode {self.name} is damaged: {error}") from None

    def feature(self, name: str) -> np.ndarray:
        """Another feature of the episode, [T, ...]. Raises DataError if it is not there."""
        return self.format.read_feature(self.path, self.offset, self.size,
                                        name).reshape(self.length, -1)

    def load(self) -> tuple[Sequence, np.ndarray]:
        """All pictures as they are stored, and all actions."""
        dataset = self.dataset
        try:
            images, actions = self.format.read(self.path, self.offset, self.size, dataset.image,
                                               dataset.actions)
            if len(images) != len(actions) or actions.ndim != 2:
                raise DataError(f"it has {len(images)} frames and actions {list(actions.shape)}")
            if actions.shape[1] != dataset.action_dim:
                raise DataError(f"its actions have {actions.shape[1]} numbers, not "
                                f"{dataset.action_dim}")
            if not np.isfinite(actions).all():
                raise DataError("an action is not a finite number")
            return images, actions
        except (DataError, OSError) as error:
            raise DataError(f"episode {self.name} is damaged: {error}") from None


class Episodes(Sequence):
    """Episodes of one data set, found by an index; an item is read only when it is looked into."""

    def __init__(self, dataset: DataSet, paths: list[Path], records: np.ndarray, short: int = 0,
                 damaged: int = 0):
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


def open_episodes(name: str, root: str | Path | None = None, split: str = "all",
                  min_length: int = 1) -> Episodes:
    """Open a data set; what is read is its index, not its frames.

    name        an entry of DATA_SETS
    root        the data set's folder, its version folder, or a folder above; None: see
                `default_root`
    split       "train", "val" or "all": shards named -val or -test are held out, or, where there
                are none, the episodes whose names have the smallest hashes
    min_length  leave out episodes with fewer frames, and count them in `.short`

    Raises DataError: no such folder, no shards in it, damaged shards, nothing left.
    """
    if name not in DATA_SETS:
        raise DataError(f"there is no data set {name!r}; known are {', '.join(DATA_SETS)}")
    dataset = DATA_SETS[name]
    root = Path(root or default_root(name))
    paths = find_files(root, dataset.shards)
    records = load_index(dataset.shards, root, paths,
                         lambda path: FORMATS.get(path.suffix, tfrecord).index(
        path, dataset.image, dataset.actions))

    records = records[split_mask(paths, records, dataset.held_out, split)]
    lengths = records[:, 4]
    episodes = Episodes(dataset, paths, records[lengths >= max(min_length, 1)],
                        short=int(((lengths >= 0) & (lengths < min_length)).sum()),
                        damaged=int((lengths < 0).sum()))
    if not len(episodes):
        longest = lengths.max(initial=0)
        advice = f"; the longest has {longest}, so ask for clips of at most that"
        advice = advice if longest > 0 else ""
        raise DataError(f"no episode of {name} in {root} (split {split!r}) can be used: "
                        f"{episodes.damaged} damaged, {episodes.short} shorter than {min_length} "
                        f"frames{advice}")
    return episodes


def default_root(name: str) -> Path:
    """`datasets/` if it holds shards of this data set, or else the bundled samples if they do."""
    for root in (Path("datasets"), SAMPLES):
        if any(root.rglob(f"{DATA_SETS[name].shards}*")):
            return root
    raise DataError(f"there is no {name} in datasets/, and no sample of it is bundled: name its "
                    "folder with --root")


def split_mask(paths: list[Path], records: np.ndarray, held_out: int, split: str) -> np.ndarray:
    """Which records belong to a split, by their shard's name or else by a hash of their own."""
    if split not in ("train", "val", "all"):
        raise DataError(f"split is {split!r}; it must be train, val or all")
    if split == "all":
        return np.ones(len(records), bool)
    named = np.array([bool(re.search(r"-(val|valid|validation|test)\b", path.name))
                      for path in paths])
    if named.any():
        validation = named[records[:, 0]]
    else:
        names = [f"{paths[file].name}:{number}" for file, number in records[:, :2]]
        keys = [hashlib.sha256(name.encode()).digest() for name in names]
        order = sorted(range(len(records)), key=keys.__getitem__)
        held_out = min(held_out, max(len(records) // 8, int(len(records) > 1)))
        validation = np.zeros(len(records), bool)
        validation[order[:held_out]] = True
    return validation if split == "val" else ~validation


# --------------------------------------------------------------------------------------------------
# Frames


def fit_frames(frames: np.ndarray, height: int, width: int, how: str = "pad") -> np.ndarray:
    """Resize frames uint8 [T, H, W, 3] bilinearly to height × width, their aspect kept.

    how  "pad"   the whole frame, and black beside it: the published models saw RT-1, 256×320, as
                 320×400 with 56 black columns on either side
         "crop"  as large as fills the picture; what stands over is cut off evenly
    """
    H, W = frames.shape[1:3]
    if (H, W) == (height, width):
        return frames
    wider = height * W > width * H  # whether the frame is wider, for its height, than the picture
    if wider == (how == "pad"):
        size = width, -(-H * width // W)
    else:
        size = -(-W * height // H), height
    left, top = (size[0] - width) // 2, (size[1] - height) // 2  # negative where there is room left
    box = (left, top, left + width, top + height)
    resized = (Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR) for frame in frames)
    # black outside of the frame
    return np.stack([np.asarray(frame.crop(box)) for frame in resized])


def augment(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One clip uint8 [T, H, W, 3] in other light and a little moved. Paper: appendix C.1.

    Factors of brightness, contrast and saturation in 0.9 .. 1.1, a hue shift within ±0.05 of the
    circle, and a shift of up to 2 pixels at the borders of which the last pixels are repeated: the
    same for all its frames.
    """
    brightness, contrast, saturation = rng.uniform(0.9, 1.1, 3)
    hue = int(rng.integers(-12, 13))  # of 256
    down, right = rng.integers(-2, 3, 2)
    T, H, W, _ = frames.shape
    rows, columns = (np.arange(H) - down).clip(0, H - 1), (np.arange(W) - right).clip(0, W - 1)
    varied = []
    for frame in frames[:, rows][:, :, columns]:
        picture = ImageEnhance.Brightness(Image.fromarray(frame)).enhance(brightness)
        picture = ImageEnhance.Contrast(picture).enhance(contrast)
        hsv = np.array(ImageEnhance.Color(picture).enhance(saturation).convert("HSV"))
        hsv[..., 0] += np.uint8(hue % 256)
        varied.append(np.asarray(Image.fromarray(hsv, "HSV").convert("RGB")))
    return np.stack(varied)


# --------------------------------------------------------------------------------------------------
# Clips


class Clips(torch.utils.data.Dataset):
    """Random clips without end: clip number i depends on the seed and on i, and on nothing else.

    An item is {"frames": uint8 [T, H, W, 3], "actions": float32 [T, A], "index": i, "damaged":
    [message, …]}. A damaged episode is replaced by another draw and reported; "frames" is None if
    no draw worked.
    """

    def __init__(self, episodes: Episodes, frames: int, size: tuple[int, int], seed: int,
                 augment: bool = False):
        self.episodes, self.frames, self.size = episodes, frames, size
        self.seed, self.augment = seed, augment
        # every possible clip is equally likely
        self.ends = np.cumsum(episodes.lengths - frames + 1)

    def __getitem__(self, i: int) -> dict:
        damaged = []
        for attempt in range(20):
            rng = np.random.default_rng([self.seed, i, attempt])
            clip = rng.integers(self.ends[-1])
            number = int(np.searchsorted(self.ends, clip, side="right"))
            start = int(self.ends[number] - clip) - 1
            try:
                frames, actions = self.episodes[number].read(start, start + self.frames)
            except DataError as error:
                damaged.append(str(error))
                continue
            frames = augment(frames, rng) if self.augment else frames
            frames = fit_frames(frames, *self.size, self.episodes.dataset.fit)
            return {"frames": frames, "actions": actions, "index": i, "damaged": damaged}
        return {"frames": None, "actions": None, "index": i, "damaged": damaged}


def collate(clips: list[dict]) -> dict:
    """Stack clips into frames uint8 [B, T, H, W, 3] and actions [B, T, A].

    If no clip could be drawn, the reason is returned as "error" and not raised: it has to cross
    from a worker process.
    """
    damaged = [message for clip in clips for message in clip["damaged"]]
    if any(clip["frames"] is None for clip in clips):
        return {"error": damaged[-1]}
    return {"frames": torch.from_numpy(np.stack([clip["frames"] for clip in clips])),
            "actions": torch.from_numpy(np.stack([clip["actions"] for clip in clips])),
            "index": [clip["index"] for clip in clips], "damaged": damaged}


def require_clips(batch: dict) -> dict:
    """The batch, or the DataError that `collate` could not raise."""
    if "error" in batch:
        raise DataError(f"no clip can be read: {batch['error']}")
    return batch


def random_frames(episodes: Episodes, size: tuple[int, int], seed: int, batches: int,
                  workers: int = 0
                  ) -> Iterator[torch.Tensor]:
    """Batches of single frames, uint8 [16, H, W, 3]. Raises DataError if nothing can be read."""
    order = [list(range(16 * i, 16 * i + 16)) for i in range(batches)]
    loader = torch.utils.data.DataLoader(Clips(episodes, 1, size, seed), batch_sampler=order,
                                         collate_fn=collate,
                                         num_workers=workers)
    for batch in loader:
        yield require_clips(batch)["frames"][:, 0]
