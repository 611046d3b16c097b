"""Videos with tables of actions to folders of pictures: python -m episodes.from_video SRC DST

    pip install av
    python -m episodes.from_video recordings my_robot

    recordings/drive_1.mp4  drive_1.csv       a video and a table of the same name, per episode
               drive_2.mp4  drive_2.csv

A row of a table is an action. The first line may name the columns. A column `timestamp` says when
in the video, in seconds, each row was recorded, and so picks its frame. Without one, the table has
a row for every frame. `--camera front wrist` lays drive_1_front.mp4 and drive_1_wrist.mp4 side by
side, beside drive_1.csv.
"""
import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from episodes.index import list_files
from episodes.video import all_frames, frame_rate, frames_at, import_av
from episodes.writing import side_by_side, write_episodes
from support.errors import DataError, reading
from support.options import argument, option, program

VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm")
TIME = "timestamp"


@dataclass
class Settings:
    src: str = argument("folder with videos and tables")
    dst: str = argument("folder for the episodes")
    camera: list[str] | None = option(None, "ends of the videos' names, where an episode has "
                                            "several: they stand side by side", nargs="+")


def read_csv(path: Path) -> tuple[list[str], np.ndarray]:
    """Names of the columns (none, if the first line has numbers) and float64 [T, columns]."""
    # "-sig": Excel begins a file with a byte order mark, which belongs to no column
    with reading(path), open(path, newline="", encoding="utf-8-sig") as file:
        lines = [line for line in csv.reader(file) if line]
    names = []
    if lines and not all(map(is_number, lines[0])):
        names = [name.strip() for name in lines.pop(0)]
    if not lines:
        raise DataError(f"{path.name} has no rows")
    widths = {len(line) for line in lines} | ({len(names)} if names else set())
    if len(widths) > 1:
        raise DataError(f"{path.name} has rows of different lengths ({sorted(widths)})")
    for i, line in enumerate(lines):
        if not all(map(is_number, line)):
            raise DataError(f"{path.name}: row {i} holds {', '.join(line)[:60]!r}; expected "
                            "numbers")
    return names, np.array(lines, dtype=np.float64)


def is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text))
    except ValueError:
        return False


def list_episodes(src: Path, cameras: list[str]) -> list[tuple[Path, list[Path]]]:
    """The table of every episode and its videos, one of each camera; the first's name it."""
    endings, episodes = [f"_{camera}" for camera in cameras] or [""], []
    found = [Path(folder) / name for folder, names in list_files(src) for name in sorted(names)]
    for path in found:
        if path.suffix.lower() in VIDEOS and path.stem.endswith(endings[0]):
            stem = path.stem.removesuffix(endings[0])
            episodes.append((path.with_name(f"{stem}.csv"),
                             [path.with_name(stem + each + path.suffix) for each in endings]))
    return episodes


def read_episode(table: Path, videos: list[Path], names: list[str]) -> tuple[Iterable, np.ndarray]:
    """The frames and the actions of an episode. Raises DataError where they do not match.

    names  the columns of the first table, which all must have
    """
    if not table.exists():
        raise DataError(f"there is no {table.name} beside it")
    found, rows = read_csv(table)
    if found != names:
        raise DataError(f"its columns are {', '.join(found) or 'without names'}; those of the "
                        f"first are {', '.join(names) or 'without names'}")
    if TIME not in names:
        return side_by_side([all_frames(video, len(rows)) for video in videos]), rows
    column = names.index(TIME)
    due = rows[:, column]
    if (np.diff(due) <= 0).any():
        raise DataError(f"the {TIME} column of {table.name} does not rise")
    cameras = [frames_at(video, due, frame_rate(video), whole=False) for video in videos]
    return side_by_side(cameras), np.delete(rows, column, axis=1)


def convert(settings: Settings) -> None:
    src, cameras = Path(settings.src).expanduser(), settings.camera or []
    import_av()
    episodes = list_episodes(src, cameras)
    names, fps = read_first([each for each in episodes if each[0].exists()], src)
    numbers = [name for name in names if name != TIME]
    info = {"fps": fps} | ({"names": numbers} if numbers else {})
    sources = (("_".join(table.relative_to(src).with_suffix("").parts),
                partial(read_episode, table, videos, names)) for table, videos in episodes)
    origin = {"src": str(src.resolve())} | ({"camera": cameras} if cameras else {})
    write_episodes(sources, len(episodes), Path(settings.dst), info, origin)


def read_first(episodes: list[tuple[Path, list[Path]]], src: Path) -> tuple[list[str], float]:
    """Columns' names and frame rate of the first episode that can be read. Raises DataError."""
    problems = [f"{src} holds no video with a table beside it"] * (not episodes)
    for table, videos in episodes:
        try:
            return read_csv(table)[0], frame_rate(videos[0])
        except DataError as error:
            problems.append(str(error))
    raise DataError("; ".join(problems[:3]))


main = program(__name__, "from_video", convert, Settings, "Convert videos and tables of actions "
               "to folders of pictures.")
