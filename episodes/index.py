"""Where each episode lies and how long it is: read once from the files, then kept.

The index has one row per episode, [file, number in its file, offset, size, frames]; frames is -1 if
the episode is damaged. It lies in $XDG_CACHE_HOME/vid2world (default ~/.cache), since data folders
are often read-only, and is renewed file by file: a file is indexed again when its size or time
changes, whatever happened to the others.
"""
import hashlib
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from episodes.formats import episode_name
from support.errors import DataError, UserError
from support.options import cache_folder

VERSION = re.compile(r"\d+\.\d+\.\d+")  # a folder's name in TFDS

Listing = list[tuple[str, list[str]]]  # folders, and the names of the files in each


def list_files(root: Path) -> Listing:
    """A folder and all below it, links to folders followed; where links go round in circles, each
    folder once. Raises DataError if there is no such folder."""
    if not root.is_dir():
        hint = "; evaluation/RESULTS.md says how it is recorded" * (root.parts[:1] == ("recorded",))
        raise DataError(f"there is no folder {root}; give the one that holds the episodes (--root)"
                        + hint)
    visited, listing = set(), []
    for folder, below, names in os.walk(root, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in visited:
            below.clear()
            continue
        visited.add((stat.st_dev, stat.st_ino))
        # hidden: what a Mac leaves beside files (._x), what a conversion has left half done
        below[:] = [name for name in below if not name.startswith(".")]
        listing.append((folder, [name for name in names if not name.startswith(".")]))
    return listing


def find_files(root: Path, listing: Listing, prefix: str, wanted: str, expected: str) -> list[Path]:
    """The files of a data set among those listed.

    prefix    regular expression for how the names of its shards begin
    wanted    regular expression for their names
    expected  what they are, in words

    TFRecord is preferred to other files, names with the data set's prefix to others, and of several
    versions of a data set the newest is taken. What a download has left half done (.gstmp, .part,
    …) has another ending. Raises DataError if there is none.
    """
    search = re.compile(wanted).search
    found = (os.path.join(folder, name) for folder, names in listing for name in names
             if search(name))
    found = [Path(path) for path in sorted(filter(os.path.isfile, found))]
    shards = [path for path in found if re.search(r"\.tfrecord(-\d+-of-\d+)?$", path.name)]
    shards = [path for path in shards if re.match(prefix, path.name)] or shards
    shards = newest_version(shards)
    shards = shards or found
    if not shards:
        raise DataError(f"{root} holds no episodes: expected {expected} in or below it")
    return shards


def stamp(path: Path) -> tuple[int, int]:
    """Changes when the file does, or, beside an actions.npy, when a picture comes or goes."""
    stat = os.stat(path)
    folder = os.stat(os.path.dirname(path)).st_mtime_ns if path.suffix == ".npy" else 0
    return stat.st_size, stat.st_mtime_ns + folder


def newest_version(shards: list[Path]) -> list[Path]:
    """Without the shards of older versions of the same data set."""
    folders = [path.parent for path in shards if VERSION.fullmatch(path.parent.name)]
    folders.sort(key=lambda folder: [int(n) for n in folder.name.split(".")])
    newest = {folder.parent.name: folder.name for folder in folders}  # of a data set, the last
    for name, version in newest.items():
        found = sorted({folder.name for folder in folders if folder.parent.name == name})
        if len(found) > 1:
            say(f"{name}: of the versions {', '.join(found)} the newest is read, {version}")
    return [path for path in shards if not VERSION.fullmatch(path.parent.name)
            or path.parent.name == newest[path.parent.parent.name]]


@cache
def say(message: str) -> None:
    """Print a message once, however often the data set is opened."""
    print(message)


Rows = list[tuple[int, int, int]]  # offset, size and frames of every episode in a file


def load_index(name: str, root: Path, paths: list[Path],
               index_file: Callable[[Path], Rows]) -> np.ndarray:
    """The index of all files, int64 [episodes, 5]; only changed files are indexed again."""
    identity = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    kept = cache_folder() / f"{name}-{identity}.npz"
    known = read_kept(kept)
    names = [str(path).removeprefix(f"{root}{os.sep}") for path in paths]
    stamps = list(map(stamp, paths))
    changed = [i for i, name in enumerate(names) if known.get(name, (None,))[0] != stamps[i]]
    try:
        for i in tqdm(changed, desc="indexing", unit="file", disable=len(changed) < 20):
            try:
                rows = np.array(index_file(paths[i]), dtype=np.int64).reshape(-1, 3)
            except UserError:
                raise
            except Exception:  # damaged in a way of its own: the others are used
                rows = np.array([[0, 0, -1]])
            known[names[i]] = stamps[i], rows
    finally:  # keep what is known even if a later file is damaged or the user has lost patience
        if changed:
            write_kept(kept, {name: known[name] for name in names if name in known})
    return np.concatenate([
        np.column_stack([np.full(len(rows), i), np.arange(len(rows)), rows])
        for i, (_, rows) in enumerate(known[name] for name in names)])


def read_kept(path: Path) -> dict[str, tuple[tuple[int, int], np.ndarray]]:
    """File name -> its size and time, and its rows; empty if there is no good index."""
    try:
        with np.load(path, allow_pickle=False) as old:
            names, stamps, counts = (old[key].tolist() for key in ("names", "stamps", "counts"))
            parts = np.split(old["rows"], np.cumsum(counts)[:-1])
        rows = zip(names, stamps, parts, strict=True)
        return {name: (tuple(stamp), part) for name, stamp, part in rows}
    except Exception:  # a damaged one is made again
        return {}


def write_kept(path: Path, known: dict[str, tuple[tuple[int, int], np.ndarray]]) -> None:
    if not known:
        return
    stamps, rows = zip(*known.values(), strict=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}.{os.getpid()}.npz")
        np.savez(partial, names=np.array(list(known)), stamps=np.array(stamps),
                 counts=np.array([len(part) for part in rows]), rows=np.concatenate(rows))
        partial.replace(path)
    except OSError:
        pass  # nowhere to keep it: it will be made again


def choose_split(paths: list[Path], records: np.ndarray, split: str, held_out: int,
                 protocol: Path | None = None, min_length: int = 1) -> np.ndarray:
    """The rows of the index that belong to a split, "train", "val" or "all".

    held_out    episodes, at most an eighth of all, unless files, or folders of pictures, named -val
                or -test are held out, or the protocol names some
    protocol    file with lines of a held-out file's name, and the frame at which its episode
                begins, if it is not the first
    min_length  only episodes of so many frames are held out. What is held out among all is so
                among the long ones too

    Raises DataError for another split.
    """
    if split not in ("train", "val", "all"):
        raise DataError(f"split is {split!r}; it must be train, val or all")
    if split == "all":
        return records
    named = np.array([bool(re.search(r"-(val|valid|validation|test)\b", episode_name(path, 0)))
                      for path in paths])
    lines = protocol.read_text(encoding="utf-8").splitlines() if protocol else []
    begins = {name: int(first[0]) if first else 0 for name, *first in map(str.split, lines)}
    begin = np.array([begins.get(path.name, begins.get(path.stem, -1)) for path in paths])
    if named.any():
        validation = named[records[:, 0]]
    elif (begin >= 0).any():
        validation = begin[records[:, 0]] >= 0
    else:
        names = [episode_name(paths[file], number) for file, number in records[:, :2].tolist()]
        keys = [hashlib.sha256(os.fsencode(name)).digest() for name in names]
        whole, usable = records[:, 4] > 0, records[:, 4] >= max(min_length, 1)
        order = sorted(np.flatnonzero(usable).tolist(), key=keys.__getitem__)
        held_out = min(held_out, max(whole.sum() // 8, 1), max(len(order) - 1, 0))
        validation = np.zeros(len(records), bool)
        validation[order[:held_out]] = True
    chosen = records[validation if split == "val" else ~validation]
    if split == "val" and (begin >= 0).any():  # an episode begins where the protocol says
        first = begin[chosen[:, 0]].clip(0)
        chosen = chosen + first[:, None] * np.array([0, 0, 1, 0, 0])
        chosen[:, 4] = np.where(chosen[:, 4] < 0, -1, (chosen[:, 4] - first).clip(0))
    return chosen
