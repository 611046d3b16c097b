"""LeRobot data sets, v2.1 and v3, to folders of pictures: python -m episodes.from_lerobot SRC DST

    pip install pyarrow av
    python -m episodes.from_lerobot ~/lerobot/me/pick_cube my_robot --camera front
    python train.py --data folder --root my_robot

v2.1 has a parquet file and a video per episode and camera. v3 has many episodes in one of either:
meta/episodes/ says where each begins. Pictures may also lie in the table itself.
"""
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from commands import argument, command, option, parse
from episodes.video import frames_at, import_av
from episodes.writing import Source, rows_of, write_episodes
from errors import DataError


@dataclass
class Settings:
    src: str = argument("the data set: a folder with meta/info.json")
    dst: str = argument("folder for the episodes")
    camera: str | None = option(None, "which camera, by its key or the end of it")
    action: str = option("action", "key of the actions")


def import_pyarrow():
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError("reading LeRobot data sets needs pyarrow: pip install pyarrow av") from None
    return pyarrow.parquet


@lru_cache(maxsize=2)
def read_table(path: Path):
    """A parquet file. Episodes of one file come one after the other, so the last is kept."""
    try:
        return import_pyarrow().read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise DataError(f"{path.name} is no readable parquet file ({error})") from None


def read_info(src: Path) -> dict:
    try:
        info = json.loads((src / "meta" / "info.json").read_text())
        version, features, _ = info["codebase_version"], info["features"], info["fps"] + 0
        if not all(isinstance(feature, dict) for feature in features.values()):
            raise ValueError("features is no table of features")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{src} is no LeRobot data set: its meta/info.json cannot be read "
                        f"({error})") from None
    if version not in ("v2.0", "v2.1", "v3.0"):
        raise DataError(f"{src} is LeRobot {version}; v2.1 and v3.0 are read")
    return info


def choose_camera(info: dict, wanted: str | None) -> str:
    """The key of a camera, from the end of its name. Raises DataError."""
    cameras = [key for key, feature in info["features"].items()
               if feature.get("dtype") in ("video", "image")]
    if wanted is None and len(cameras) > 1:
        print(f"cameras: {', '.join(cameras)}; taking the first (--camera takes another)")
    chosen = [key for key in cameras if wanted is None or key == wanted
              or key.endswith(f".{wanted}")]
    if not chosen:
        raise DataError(f"there is no camera {wanted!r}; there are {', '.join(cameras) or 'none'}")
    return chosen[0]


def list_episodes(src: Path, info: dict, camera: str) -> list[dict]:
    """For each episode: index, length, the path of its table, of its video (None: the pictures lie
    in the table), and where in that video it begins and ends (None: with the file). Raises
    DataError."""
    try:
        if info["codebase_version"] == "v3.0":
            return list_v3(src, info, camera)
        return list_v2(src, info, camera)
    except DataError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"the list of episodes in {src / 'meta'} cannot be read ({error})"
                        ) from None


def list_v2(src: Path, info: dict, camera: str) -> list[dict]:
    episodes, filmed = [], info["features"][camera]["dtype"] == "video"
    for row in map(json.loads, (src / "meta" / "episodes.jsonl").read_text().splitlines()):
        place = {"episode_index": row["episode_index"], "video_key": camera,
                 "episode_chunk": row["episode_index"] // info["chunks_size"]}
        episodes.append({
            "index": row["episode_index"], "length": row["length"],
            "table": src / info["data_path"].format(**place),
            "video": src / info["video_path"].format(**place) if filmed else None,
            "begin": None, "end": None})
    return episodes


def list_v3(src: Path, info: dict, camera: str) -> list[dict]:
    episodes, filmed = [], info["features"][camera]["dtype"] == "video"
    files = sorted((src / "meta" / "episodes").rglob("*.parquet"))
    for row in (row for file in files for row in read_table(file).to_pylist()):
        def path(template: str, column: str, row: dict = row) -> Path:
            return src / info[template].format(
                video_key=camera, chunk_index=row[f"{column}/chunk_index"],
                file_index=row[f"{column}/file_index"])

        video = f"videos/{camera}"
        episodes.append({
            "index": row["episode_index"], "length": row["length"],
            "table": path("data_path", "data"),
            "video": path("video_path", video) if filmed else None,
            "begin": row[f"{video}/from_timestamp"] if filmed else None,
            "end": row[f"{video}/to_timestamp"] if filmed else None})
    return episodes


def read_episode(src: Path, episode: dict, camera: str, action: str, fps: float
                 ) -> tuple[Iterable, np.ndarray]:
    """The pictures and the actions of an episode. Raises DataError where the two do not match."""
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
    try:
        actions = rows_of([np.stack(table[action].to_numpy())])
    except ValueError:  # rows of different lengths
        raise DataError(f"{action} has rows of different lengths") from None
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
    try:
        return (src / picture["path"]).read_bytes()
    except (OSError, TypeError, KeyError) as error:
        raise DataError(f"a picture cannot be read ({error})") from None


def number_names(feature: dict) -> list[str]:
    """Names of the numbers in a feature, where it has one for each."""
    names = feature.get("names") or []
    if isinstance(names, dict):  # {"motors": [...]}
        names = [name for part in names.values() for name in part]
    width = int(np.prod(feature.get("shape", [0])))
    return list(names) if len(set(map(str, names))) == width else []


def convert(settings: Settings) -> None:
    src = Path(settings.src).expanduser()
    info = read_info(src)
    camera = choose_camera(info, settings.camera)
    if settings.action not in info["features"]:
        raise DataError(f"there is no {settings.action!r}; there are "
                        f"{', '.join(info['features'])}")
    import_pyarrow()
    if info["features"][camera]["dtype"] == "video":
        import_av()
    episodes = list_episodes(src, info, camera)
    sources: Iterable[Source] = (
        (f"episode_{episode['index']:06d}",
         partial(read_episode, src, episode, camera, settings.action, info["fps"]))
        for episode in episodes)
    names = number_names(info["features"][settings.action])
    said = {"fps": info["fps"]} | ({"names": names} if names else {})
    write_episodes(sources, len(episodes), Path(settings.dst), said)


def main(argv: Sequence[str] | None = None) -> int:
    words = "Convert a LeRobot data set to folders of pictures."
    return command("from_lerobot", lambda: convert(parse(Settings, words, argv)))


if __name__ == "__main__":
    sys.exit(main())
