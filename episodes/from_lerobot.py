"""LeRobot data sets, v2.1 and v3, to folders of pictures: python -m episodes.from_lerobot SRC DST

    pip install pyarrow av
    python -m episodes.from_lerobot ~/lerobot/me/pick_cube my_robot --camera front wrist
    python train.py --data folder --root my_robot

v2.1 has a parquet file and a video per episode and camera. v3 has many episodes in one of either:
meta/episodes/ says where each begins. Pictures may also lie in the table itself.
"""
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from episodes.video import frames_at, import_av
from episodes.writing import Source, rows_of, side_by_side, write_episodes
from support.errors import DataError, UserError, optional, reading
from support.options import argument, option, program
from support.schema import conform

import_parquet = partial(optional, "pyarrow.parquet", "reading LeRobot data sets needs pyarrow",
                         "pyarrow av")


@dataclass
class Settings:
    src: str = argument("the data set: a folder with meta/info.json")
    dst: str = argument("folder for the episodes")
    camera: list[str] | None = option(None, "which camera, by its key or the end of it; several "
                                            "stand side by side", nargs="+")
    action: str = option("action", "key of the actions")


@lru_cache(maxsize=2)
def read_table(path: Path):
    """A parquet file. Episodes of one file come one after the other, so the last is kept."""
    with reading(path):
        return import_parquet().read_table(path)


@dataclass(frozen=True)
class Feature:
    dtype: str = ""
    shape: tuple[int, ...] = ()
    names: object = None


@dataclass(frozen=True)
class Info:
    """Of meta/info.json, what is read here."""
    codebase_version: str
    features: dict[str, Feature]
    fps: float
    chunks_size: int = 1000
    data_path: str = ""
    video_path: str | None = None


BOUNDS = {"fps": (1e-3, 1000), "chunks_size": (1, 2**31), "length": (1, 2**31),
          "episode_index": (0, 2**40), "chunk_index": (0, 2**31), "file_index": (0, 2**31),
          "from_timestamp": (0, 1e9), "to_timestamp": (0, 1e9)}


def read_info(src: Path) -> Info:
    path = src / "meta" / "info.json"
    try:
        with reading(path):
            content = json.loads(path.read_text(encoding="utf-8"))
        info = conform(Info, content, "", BOUNDS, spare=True)
    except UserError as error:
        raise DataError(f"{src} is no LeRobot data set: its meta/info.json cannot be used: {error}"
                        ) from None
    if info.codebase_version not in ("v2.0", "v2.1", "v3.0"):
        raise DataError(f"{src} is LeRobot {info.codebase_version!r:.40}; v2.1 and v3.0 are read")
    return info


def place(src: Path, template: str | None, **values: object) -> Path:
    """A path below `src` from a template such as "data/chunk-{chunk_index:03d}/…". It is a
    stranger's: `str.format` would obey it. Raises DataError for one that leads elsewhere."""
    def value(match: re.Match) -> str:
        name, width = match.groups()
        if name not in values:
            raise DataError(f"meta/info.json has a path with {{{name}}}; known are "
                            f"{', '.join(values)}")
        return str(values[name]).zfill(int(width or 0))

    path = Path(re.sub(r"\{(\w+)(?::0?(\d{1,2})d)?\}", value, template or ""))
    if path.is_absolute() or ".." in path.parts or path == Path():
        raise DataError(f"{str(path)!r:.80} is not a path inside the data set")
    return src / path


def choose_camera(info: Info, wanted: str | None) -> str:
    """The key of a camera, from the end of its name. Raises DataError."""
    cameras = [key for key, feature in info.features.items() if feature.dtype in ("video", "image")]
    if wanted is None and len(cameras) > 1:
        print(f"cameras: {', '.join(cameras)}; taking the first (--camera takes another)")
    chosen = [key for key in cameras if wanted is None or key == wanted
              or key.endswith(f".{wanted}")]
    if not chosen:
        raise DataError(f"there is no camera {wanted!r}; there are {', '.join(cameras) or 'none'}")
    return chosen[0]


def list_episodes(src: Path, info: Info, camera: str) -> list[dict]:
    """For each episode: index, length, paths of its table and its video (None: the table holds the
    pictures), and where in that it begins and ends (None: with the file). Raises DataError."""
    list_them = list_v3 if info.codebase_version == "v3.0" else list_v2
    try:
        with reading("the list of episodes"):
            return list_them(src, info, camera)
    except UserError as error:
        raise DataError(f"the list of episodes in {src / 'meta'} cannot be used: {error}") from None


def list_v2(src: Path, info: Info, camera: str) -> list[dict]:
    episodes, filmed = [], info.features[camera].dtype == "video"
    path = src / "meta" / "episodes.jsonl"
    with reading(path):  # a line ends with "\n" alone: other ends of lines may be in a task
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    for row in rows:
        index, length = (conform(int, row.get(name), name, BOUNDS)
                         for name in ("episode_index", "length"))
        words = {"episode_index": index, "video_key": camera,
                 "episode_chunk": index // info.chunks_size}
        episodes.append({
            "index": index, "length": length, "table": place(src, info.data_path, **words),
            "video": place(src, info.video_path, **words) if filmed else None,
            "begin": None, "end": None})
    return episodes


def list_v3(src: Path, info: Info, camera: str) -> list[dict]:
    episodes, filmed = [], info.features[camera].dtype == "video"
    files = sorted(path for path in (src / "meta" / "episodes").rglob("*.parquet")
                   if not path.name.startswith("."))
    for row in (row for file in files for row in read_table(file).to_pylist()):
        def number(name: str, kind: type = int, row: dict = row) -> float:
            return conform(kind, row.get(name), name.rpartition("/")[2], BOUNDS)

        def path(template: str | None, column: str, number: Callable = number) -> Path:
            return place(src, template, video_key=camera,
                         chunk_index=number(f"{column}/chunk_index"),
                         file_index=number(f"{column}/file_index"))

        video = f"videos/{camera}"
        episodes.append({
            "index": number("episode_index"), "length": number("length"),
            "table": path(info.data_path, "data"),
            "video": path(info.video_path, video) if filmed else None,
            "begin": number(f"{video}/from_timestamp", float) if filmed else None,
            "end": number(f"{video}/to_timestamp", float) if filmed else None})
    mark_overlaps(episodes, 0.5 / info.fps)
    return episodes


def mark_overlaps(episodes: list[dict], most: float) -> None:
    """Two episodes cannot have the same stretch of a video: neither is taken, for one of them has
    the other's pictures."""
    filmed = sorted((episode for episode in episodes if episode["video"]),
                    key=lambda episode: (episode["video"], episode["begin"]))
    for first, second in pairwise(filmed):
        if first["video"] == second["video"] and second["begin"] < first["end"] - most:
            for one, other in ((first, second), (second, first)):
                one["fault"] = (f"it claims the same stretch of {one['video'].name} as episode "
                                f"{other['index']}")


def read_episode(src: Path, episode: dict, camera: str, action: str, fps: float
                 ) -> tuple[Iterable, np.ndarray]:
    """The pictures and the actions of an episode. Raises DataError where the two do not match."""
    if "fault" in episode:
        raise DataError(episode["fault"])
    table = read_table(episode["table"])
    for name in ("episode_index", "frame_index", "timestamp", action):
        if name not in table.column_names:
            raise DataError(f"there is no {name!r}; there are {', '.join(table.column_names)}")
    here = np.flatnonzero(table["episode_index"].to_numpy() == episode["index"])
    table = table.take(here)
    T = len(here)
    if T != episode["length"] or table["frame_index"].to_pylist() != list(range(T)):
        raise DataError(f"its table has {T} rows and should have {episode['length']}, numbered "
                        "from 0")
    with reading(action):  # rows of different lengths, for instance
        actions = rows_of([np.stack(table[action].to_numpy())])
    if camera in table.column_names:
        return (read_picture(src, picture) for picture in table[camera].to_pylist()), actions
    if episode["video"] is None:
        raise DataError(f"there are no pictures of {camera} in its table")
    begin, end = episode["begin"], episode["end"]
    if begin is not None and abs((end - begin) * fps - T) >= 0.5:
        raise DataError(f"it has {T} rows, and {(end - begin) * fps:.1f} frames in its video")
    due = table["timestamp"].to_numpy() + (begin or 0)
    return frames_at(episode["video"], due, fps, whole=begin is None), actions


def read_picture(src: Path, picture: dict) -> bytes:
    if picture.get("bytes"):
        return picture["bytes"]
    path = place(src, picture["path"])
    with reading(path):
        return path.read_bytes()


def number_names(feature: Feature) -> list[str]:
    """Names of the numbers in a feature, where it has one for each."""
    names = feature.names
    if isinstance(names, dict) and all(type(place) is int for place in names.values()):
        names = sorted(names, key=names.get)  # {"dx": 0, "dy": 1}
    elif isinstance(names, dict):  # {"motors": [...]}
        names = [name for part in names.values() if isinstance(part, list) for name in part]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []
    return names if len(set(names)) == len(names) == math.prod(feature.shape) else []


def convert(settings: Settings) -> None:
    src = Path(settings.src).expanduser()
    info = read_info(src)
    cameras = [choose_camera(info, wanted) for wanted in settings.camera or [None]]
    if settings.action not in info.features:
        raise DataError(f"there is no {settings.action!r}; there are {', '.join(info.features)}")
    import_parquet()
    if any(info.features[camera].dtype == "video" for camera in cameras):
        import_av()
    episodes = list(zip(*(list_episodes(src, info, camera) for camera in cameras), strict=True))

    def read(seen: tuple[dict, ...]) -> tuple[Iterable, np.ndarray]:
        pictures, actions = zip(*(
            read_episode(src, episode, camera, settings.action, info.fps)
            for episode, camera in zip(seen, cameras, strict=True)), strict=True)
        return side_by_side(pictures), actions[0]

    sources: Iterable[Source] = (
        (f"episode_{seen[0]['index']:06d}", partial(read, seen)) for seen in episodes)
    names = number_names(info.features[settings.action])
    said = {"fps": info.fps} | ({"names": names} if names else {})
    origin = {"src": str(src.resolve()), "action": settings.action,
              "camera": cameras if len(cameras) > 1 else cameras[0]}
    write_episodes(sources, len(episodes), Path(settings.dst), said, origin)


main = program(__name__, "from_lerobot", convert, Settings, "Convert a LeRobot data set to "
               "folders of pictures.")
