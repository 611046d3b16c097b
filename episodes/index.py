"""Where each episode lies and how long it is: read once from the files, then kept.

The index has one row per episode, [file, number in its file, offset, size, frames]; frames is -1 if
the episode is damaged. It lies in $XDG_CACHE_HOME/vid2world (default ~/.cache), since data folders
are often read-only, and is renewed file by file: a file is indexed again when its size or time
changes, whatever happened to the others.
"""
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from errors import DataError

VERSION = re.compile(r"\d+\.\d+\.\d+")  # a folder's name in TFDS


def find_files(root: Path, prefix: str) -> list[Path]:
    """The files of a data set in a folder and below, links to folders followed.

    TFRecord is preferred to .npz, names with the data set's prefix to others, and of several
    versions of a data set the newest is taken. What a download has left half done (.gstmp, .part,
    …) has another ending. Raises DataError if there is no such folder or nothing in it.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give the one that holds the episodes (--root)")
    found = sorted(walk(root))
    shards = [path for path in found if re.search(r"\.tfrecord(-\d+-of-\d+)?$", path.name)]
    shards = [path for path in shards if path.name.startswith(prefix)] or shards
    shards = newest_version(shards)
    shards = shards or [path for path in found if path.suffix == ".npz"]
    if not shards:
        raise DataError(f"{root} holds no episodes: expected {prefix}*.tfrecord-* or *.npz files "
                        "in or below it")
    return shards


def walk(root: Path) -> Iterator[Path]:
    """All files below a folder; where links go round in circles, each folder once."""
    visited = set()
    for folder, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            below.clear()
            continue
        visited.add(real)
        yield from (Path(folder) / name for name in files if (Path(folder) / name).is_file())


def newest_version(shards: list[Path]) -> list[Path]:
    """Without the shards of older versions of the same data set."""
    versions: dict[str, set[str]] = {}  # data set -> names of its version folders
    for path in shards:
        if VERSION.fullmatch(path.parent.name):
            versions.setdefault(path.parent.parent.name, set()).add(path.parent.name)
    newest = {name: max(found, key=lambda version: [int(n) for n in version.split(".")])
              for name, found in versions.items()}
    for name, found in versions.items():
        if len(found) > 1:
            say(f"{name}: of the versions {', '.join(sorted(found))} the newest is read, "
                f"{newest[name]}")
    return [path for path in shards
            if not VERSION.fullmatch(path.parent.name)
            or path.parent.name == newest[path.parent.parent.name]]


@cache
def say(message: str) -> None:
    """Print a message once, however often the data set is opened."""
    print(message)


Rows = list[tuple[int, int, int]]  # offset, size and frames of every episode in a file


def load_index(name: str, root: Path, paths: list[Path],
               index_file: Callable[[Path], Rows]) -> np.ndarray:
    """The index of all files, int64 [episodes, 5]; only changed files are indexed again."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vid2world"
    kept = folder / f"{name}-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.npz"
    known = read_kept(kept)
    names = [str(path.relative_to(root)) for path in paths]
    stamps = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, paths)]
    changed = [i for i, name in enumerate(names) if known.get(name, (None,))[0] != stamps[i]]
    try:
        for i in tqdm(changed, desc="indexing", unit="file", disable=len(changed) < 20):
            rows = np.array(index_file(paths[i]), dtype=np.int64).reshape(-1, 3)
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
    except Exception:  # a damaged one is made anew
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
