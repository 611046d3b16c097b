"""Videos with tables of actions to folders of pictures: python -m episodes.from_video SRC DST

    pip install av
    python -m episodes.from_video recordings my_robot

    recordings/drive_1.mp4  drive_1.csv       a video and a table of the same name, per episode
               drive_2.mp4  drive_2.csv

A row of a table is an action. The first line may name the columns. A column `timestamp` says when
in the video, in seconds, each row was recorded, and so picks its frame. Without one, the table has
a row for every frame.
"""
import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from episodes.index import list_files
from episodes.video import all_frames, frame_rate, frames_at, import_av
from episodes.writing import write_episodes
from support.errors import DataError, reading
from support.options import argument, program

VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm")
TIME = "timestamp"


@dataclass
class Settings:
    src: str = argument("folder with videos and tables")
    dst: str = argument("folder for the episodes")


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


def read_episode(video: Path, names: list[str]) -> tuple[Iterable, np.ndarray]:
    """The frames and the actions of a video. Raises DataError where they do not match.

    names  the columns of the first table, which all must have
    """
    table = video.with_suffix(".csv")
    if not table.exists():
        raise DataError(f"there is no {table.name} beside it")
    found, rows = read_csv(table)
    if found != names:
        raise DataError(f"its columns are {', '.join(found) or 'without names'}; those of the "
                        f"first are {', '.join(names) or 'without names'}")
    if TIME not in names:
        return all_frames(video, len(rows)), rows
    column = names.index(TIME)
    due = rows[:, column]
    if (np.diff(due) <= 0).any():
        raise DataError(f"the {TIME} column of {table.name} does not rise")
    return (frames_at(video, due, frame_rate(video), whole=False), np.delete(rows, column, axis=1))


def convert(settings: Settings) -> None:
    src = Path(settings.src).expanduser()
    import_av()
    videos = [Path(folder) / name for folder, names in list_files(src) for name in sorted(names)
              if Path(name).suffix.lower() in VIDEOS]
    tables = [path for path in videos if path.with_suffix(".csv").exists()]
    if not tables:
        raise DataError(f"{src} holds no video with a table beside it (episode.mp4, episode.csv)")
    names, fps = read_first(tables)
    numbers = [name for name in names if name != TIME]
    info = {"fps": fps} | ({"names": numbers} if numbers else {})
    sources = (("_".join(video.relative_to(src).with_suffix("").parts),
                partial(read_episode, video, names)) for video in videos)
    write_episodes(sources, len(videos), Path(settings.dst), info, {"src": str(src.resolve())})


def read_first(videos: list[Path]) -> tuple[list[str], float]:
    """The columns' names and the frame rate of the first episode that can be read. Raises
    DataError."""
    problems = []
    for video in videos:
        try:
            return read_csv(video.with_suffix(".csv"))[0], frame_rate(video)
        except DataError as error:
            problems.append(str(error))
    raise DataError("; ".join(problems[:3]))


main = program(__name__, "from_video", convert, Settings, "Convert videos and tables of actions "
               "to folders of pictures.")
