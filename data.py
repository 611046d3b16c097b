"""Episodes in, clips out: RT-1 and its relatives, CS:GO, and your own.

An episode is what a robot saw and did: frames [T, H, W, 3] and, beside frame t, the action taken
there. Training wants short clips from random places of random episodes, from data sets of a hundred
gigabytes, without ever holding more than a few episodes in memory. Three steps lead there:

    files on disk ──index──▶ where each episode lies and how long it is    (read once, then kept)
                  ──Clips──▶ clip i: an episode, a place in it, a few frames, decoded in workers
                  ──order──▶ clips 0, 1, 2, … are the same in every run with the same seed,
                             whatever the number of workers or processes

What a data set is stands in `DATA_SETS`: a new one of a known format is one entry; a new file
format is two functions (episodes/formats.py). `folder` is your own: its files say what they are.

Paper: appendix C.1.
"""
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from episodes import csgo, recon, tfrecord
from episodes.actions import Key, describe_by_keys, describe_by_names
from episodes.formats import episode_name, format_of
from episodes.frames import augment, fit_frames
from episodes.images import decode_all
from episodes.index import choose_split, find_files, list_files, load_index
from episodes.own import describe_folder, warn_without_actions
from model.saving import ARENA_WORLD, TINY_WORLD
from support.errors import DataError, reading


@dataclass(frozen=True)
class DataSet:
    """All that is particular about a data set. A new one needs the first group, fps and aspect."""
    # Its files
    shards: str = ""  # how the names of its shards begin, a regular expression; "": anything
    image: str = "image"  # feature with one encoded picture per step
    actions: tuple[tuple[str, int], ...] = ()  # features of an action, in order, and their widths
    files: str = r"\.tfrecord(-\d+-of-\d+)?$|\.npz$"  # names of its files, a regular expression
    expected: str = "TFRecord shards (*.tfrecord-*) or .npz files"  # the same, in words
    held_out: int = 1024  # validation episodes (at most an eighth of all)
    protocol: Path | None = None  # held-out files by name, and the frame at which to begin
    # fields that only the files can say, from (root, paths, fps)
    details: Callable[[Path, list[Path], float | None], dict] | None = None

    # What the model is told
    fps: float = 10
    conditioning_fps: int | None = None  # the frame rate that the network is told, if it is another
    aspect: tuple[int, int] = (1, 1)  # height and width of its frames, up to a factor
    fit: str = "pad"  # how frames of another aspect than the model's are fitted: see `fit_frames`
    augment: bool = False  # whether training varies the colours and the place of the picture
    standardise: bool = False  # whether actions are learned in standard deviations from their mean

    # How predictions are compared
    context_frames: int = 1  # given at the start of a rollout
    compare_at: tuple[int, int] | None = None  # size at which frames are compared, without bars

    # How it is played
    world: Path = TINY_WORLD  # the bundled world that takes these actions
    names: tuple[str, ...] = ()  # of the dimensions of an action
    keys: dict[str, Key] = field(default_factory=dict)  # a browser's name of a key -> its effect
    rest: tuple[float, ...] = ()  # the action without a key; () is zeros
    # the mouse's motion, sideways and down: first number of a one-hot, and the counts of its bins
    mouse: tuple[tuple[int, tuple[int, ...]], ...] = ()
    absolute: bool = False  # actions are positions: a key adds to the present one
    describe: Callable[[np.ndarray], str] | None = None  # an action in words

    @property
    def action_dim(self) -> int:
        return sum(width for _, width in self.actions)

    @property
    def network_fps(self) -> int:
        return self.conditioning_fps or max(1, round(self.fps))

    @property
    def needs_root(self) -> bool:
        """Whether its files have no names to be found by, as those of a folder of one's own."""
        return not self.shards


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
    # 500 of its files are held out, a clip each. The network is told RT-1's frame rate, and frames
    # are compared at the size at which they were recorded. TFRecord shards are of the arena, a hall
    # of Doom's in the same layout.
    "csgo": DataSet(
        shards="hdf5_dm_july2021|csgo_arena", files=r"\.hdf5$|\.tfrecord-\d+-of-\d+$",
        expected="hdf5_dm_july2021_*.hdf5 files", image="steps/observation/image",
        actions=(("steps/action", csgo.WIDTH),), protocol=csgo.PROTOCOL, details=csgo.details,
        fps=16, conditioning_fps=3, aspect=(150, 280), context_frames=4, compare_at=(150, 280),
        world=ARENA_WORLD, keys=csgo.KEYS, rest=csgo.REST, mouse=csgo.MOUSE,
        describe=csgo.describe),
    # A robot that drives outdoors: motion ahead and to the left in metres, turn in radians.
    "recon": DataSet(
        shards="jackal", files=r"\.hdf5$", expected="jackal_*.hdf5 files", image=recon.IMAGE,
        actions=(("motion", 3),), held_out=2367, details=recon.details, fps=4, aspect=(1, 1),
        context_frames=4, compare_at=(224, 224), names=("ahead", "left", "turn"),
        keys=recon.KEYS),
    # Your own: what is not said here is read from the files (episodes/own.py).
    "folder": DataSet(
        files=r"^actions\.npy$|\.npz$", standardise=True, details=describe_folder,
        expected="folders of pictures with an actions.npy, or .npz files (image, action)"),
}


def describe_action(dataset: DataSet, action: np.ndarray) -> str:
    """An action [A] in words, as far as the data set says what its numbers mean."""
    if dataset.describe:
        return dataset.describe(action)
    by_keys = describe_by_keys(action, list(dataset.keys.values()))
    if by_keys or not dataset.names:
        return by_keys
    return describe_by_names(action, dataset.names)


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
    def name(self) -> str:
        return episode_name(self.path, self.number)

    @property
    def frames(self) -> np.ndarray:
        """uint8 [T, H, W, 3], RGB."""
        return self.read(0, self.length)[0]

    @property
    def actions(self) -> np.ndarray:
        """float32 [T, A]: row t was taken at frame t."""
        return self.open(0, self.length)[1]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames start .. stop-1, uint8 [T, H, W, 3], and their actions float32 [T, A]."""
        images, actions = self.open(start, stop)
        with self.named():
            return decode_all(images), actions

    def feature(self, name: str) -> np.ndarray:
        """Another feature of the episode, [T, ...]. Raises DataError if it is not there."""
        flat = tfrecord.read_feature(self.path, self.offset, self.size, name)
        return flat.reshape(self.length, -1)

    def text(self, name: str) -> str:
        """A feature of text, as its first step has it. Raises DataError if it is not there."""
        return tfrecord.read_text(self.path, self.offset, self.size, name)

    def open(self, start: int, stop: int) -> tuple[Iterable, np.ndarray]:
        """The pictures as they are stored, to be read one by one, and the actions [T, A]."""
        dataset = self.dataset
        with self.named():
            images, actions = format_of(self.path).read(
                self.path, self.offset, self.size, dataset.image, dataset.actions, start, stop)
            if actions.shape[1] != dataset.action_dim:
                raise DataError(f"its actions have {actions.shape[1]} numbers, not "
                                f"{dataset.action_dim}")
            if not np.isfinite(actions).all():
                raise DataError("an action is not a finite number")
            return images, actions

    @contextmanager
    def named(self) -> Iterator[None]:
        """What goes wrong in the block is a DataError with the episode's name."""
        try:
            with reading(self.path):
                yield
        except DataError as error:
            raise DataError(f"episode {self.name} is damaged: {error}") from None


class Episodes(Sequence):
    """Episodes of one data set, found by an index; an item is read only when it is looked into."""

    def __init__(self, dataset: DataSet, paths: list[Path], records: np.ndarray, short: int = 0,
                 damaged: int = 0, problems: Sequence[str] = ()):
        self.dataset, self.paths, self.records = dataset, paths, records
        self.short, self.damaged = short, damaged  # how many were left out, and why
        self.problems = problems  # what is wrong with the first of the damaged ones

    @property
    def lengths(self) -> np.ndarray:
        return self.records[:, 4]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Episode:
        file, *record = map(int, self.records[i])
        return Episode(self.dataset, self.paths[file], *record)

    def select(self, keep: np.ndarray) -> "Episodes":
        return Episodes(self.dataset, self.paths, self.records[keep], self.short, self.damaged,
                        self.problems)


def open_episodes(name: str, root: str | Path | None = None, split: str = "all",
                  min_length: int = 1, fps: float | None = None) -> Episodes:
    """Open a data set; what is read is its index, not its frames.

    name        an entry of DATA_SETS
    root        the data set's folder, its version folder, or a folder above; None: see
                `default_root`
    split       "train", "val" or "all": shards named -val or -test are held out (or folders of
                pictures), or those that the data set's protocol names, or else the episodes whose
                names have the smallest hashes
    min_length  leave out episodes with fewer frames, and count them in `.short`
    fps         frames per second, for a `folder` that does not say

    Raises DataError: no such folder, no shards in it, damaged shards, nothing left.
    """
    if name not in DATA_SETS:
        raise DataError(f"there is no data set {name!r}; known are {', '.join(DATA_SETS)}")
    dataset = DATA_SETS[name]
    root = Path(root or default_root(name))
    listing = list_files(root)
    if dataset.needs_root:
        warn_without_actions(listing)
    paths = find_files(root, listing, dataset.shards, dataset.files, dataset.expected)
    if dataset.details:
        dataset = replace(dataset, **dataset.details(root, paths, fps))
    records = load_index(dataset.shards or f"folder-{dataset.action_dim}", root, paths,
                         lambda path: format_of(path).index(
                             path, dataset.image, dataset.actions))

    records = choose_split(paths, records, split, dataset.held_out, dataset.protocol, min_length)
    lengths = records[:, 4]
    whole = Episodes(dataset, paths, records)
    damaged = [describe_damage(whole[i]) for i in np.flatnonzero(lengths < 0)[:3]]
    episodes = Episodes(dataset, paths, records[lengths >= max(min_length, 1)],
                        short=int(((lengths >= 0) & (lengths < min_length)).sum()),
                        damaged=int((lengths < 0).sum()), problems=damaged)
    if not len(episodes):
        longest = lengths.max(initial=0)
        advice = f"; the longest has {longest}, so ask for clips of at most that"
        advice = advice if longest > 0 else "".join(f"; {problem}" for problem in damaged)
        if len(paths) == 1 and not len(records):
            advice = "; it holds one episode, and to learn and to measure takes at least two"
        raise DataError(f"no episode of {name} in {root} (split {split!r}) can be used: "
                        f"{episodes.damaged} damaged, {episodes.short} shorter than {min_length} "
                        f"frames{advice}")
    return episodes


def describe_damage(episode: Episode) -> str:
    """What is wrong with an episode that the index calls damaged."""
    try:
        episode.open(0, 1)
    except DataError as error:
        return str(error)
    return f"episode {episode.name} is damaged"


def bundled_world(name: str | None) -> Path:
    """The bundled world that takes a data set's actions; the robot's, if none is named."""
    return DATA_SETS[name].world if name else TINY_WORLD


def default_root(name: str) -> Path:
    """`datasets/` if it holds shards of this data set, or else the bundled samples if they do."""
    if DATA_SETS[name].needs_root:
        raise DataError(f"--data {name} needs the folder of your episodes: name it with --root")
    for root in (Path("datasets"), SAMPLES):
        if any(re.match(DATA_SETS[name].shards, path.name) for path in root.rglob("*")):
            return root
    raise DataError(f"there is no {name} in datasets/, and no sample of it is bundled: name its "
                    "folder with --root")


def action_statistics(episodes: Episodes) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every action dimension, float64 [A] each, over whole episodes.

    A damaged episode counts for nothing. Raises DataError if all are.
    """
    taken = []
    for episode in tqdm(episodes, "reading actions", disable=len(episodes) < 1000, leave=False):
        with suppress(DataError):
            taken.append(episode.actions)
    if not taken:
        raise DataError("the actions of no episode can be read")
    actions = np.concatenate(taken, dtype=np.float64)
    return actions.mean(axis=0), actions.std(axis=0)


# --------------------------------------------------------------------------------------------------
# Clips


class Clips(torch.utils.data.Dataset):
    """Random clips without end: clip number i depends on the seed and on i, and on nothing else.

    An item is {"frames": uint8 [T, H, W, 3], "actions": float32 [T, A], "index": i, "damaged":
    [message, …]}. A damaged episode is replaced by another draw; "frames" is None if none worked.
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

    If no clip could be drawn, "error" says why: nothing can be raised across worker processes.
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
                  workers: int = 0) -> Iterator[torch.Tensor]:
    """Batches of single frames, uint8 [16, H, W, 3]. Raises DataError if nothing can be read."""
    order = [list(range(16 * i, 16 * i + 16)) for i in range(batches)]
    loader = torch.utils.data.DataLoader(Clips(episodes, 1, size, seed), batch_sampler=order,
                                         collate_fn=collate, num_workers=workers)
    for batch in loader:
        yield require_clips(batch)["frames"][:, 0]
