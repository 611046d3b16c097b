"""RLDS data sets of any schema to folders of pictures: python -m episodes.from_rlds SRC DST

    python -m episodes.from_rlds ~/tensorflow_datasets/my_dataset/1.0.0 my_robot --fps 5 \\
        --image steps/observation/image --action steps/action/world_vector steps/action/gripper

A feature that is not there is answered with the names of those that are. The data sets of
`data.DATA_SETS` need no conversion.
"""
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from commands import argument, command, option, parse
from episodes.index import find_files, list_files
from episodes.tfrecord import (
    feature_bytes,
    feature_numbers,
    parse_example,
    read_record,
    walk_records,
)
from episodes.writing import Source, rows_of, write_episodes
from errors import DataError, RequestError


@dataclass
class Settings:
    src: str = argument("folder with TFRecord files, as TFDS wrote them")
    dst: str = argument("folder for the episodes")
    image: str = option("steps/observation/image", "feature with the pictures")
    action: list[str] = option(("steps/action",), "features that make up an action, in order",
                               type=str, nargs="+")
    fps: float | None = option(None, "frames per second, which RLDS does not say", type=float)


def list_episodes(shards: list[Path], image: str, actions: list[str]) -> Iterator[Source]:
    for path in shards:
        for number, (offset, size, _) in enumerate(walk_records(path)):
            yield (f"{path.name.replace('.tfrecord', '')}_{number:05d}",
                   partial(read_episode, path, offset, size, image, actions))


def read_episode(path: Path, offset: int, size: int, image: str, actions: list[str]
                 ) -> tuple[Iterable, np.ndarray]:
    """The encoded pictures and the actions of a record. Raises DataError if they do not match."""
    example = parse_example(read_record(path, offset, size))
    pictures, columns = feature_bytes(example, image), []
    for name in actions:
        column = feature_numbers(example, name)
        if not len(pictures) or not len(column) or len(column) % len(pictures):
            raise DataError(f"it has {len(pictures)} pictures and {len(column)} numbers in {name}")
        columns.append(column.reshape(len(pictures), -1))
    return pictures, rows_of(columns)


def convert(settings: Settings) -> None:
    if settings.fps is not None and not settings.fps > 0:
        raise RequestError(f"fps is {settings.fps}; it must be above 0")
    src = Path(settings.src).expanduser()
    shards = find_files(src, list_files(src), "", r"\.tfrecord(-\d+-of-\d+)?$",
                        "TFRecord files (*.tfrecord-*)")
    first = parse_example(next(walk_records(shards[0]))[2])
    for name in [name for name in (settings.image, *settings.action) if name not in first]:
        steps = sorted(feature for feature in first if feature.startswith("steps/"))
        raise DataError(f"there is no feature {name!r}; a step has {', '.join(steps)}")
    total = sum(1 for path in shards for _ in walk_records(path))
    write_episodes(list_episodes(shards, settings.image, list(settings.action)), total,
                   Path(settings.dst), {"fps": settings.fps} if settings.fps else {})


def main(argv: Sequence[str] | None = None) -> int:
    words = "Convert an RLDS data set to folders of pictures."
    return command("from_rlds", lambda: convert(parse(Settings, words, argv)))


if __name__ == "__main__":
    sys.exit(main())
