"""RLDS data sets of any schema to folders of pictures: python -m episodes.from_rlds SRC DST

    python -m episodes.from_rlds ~/tensorflow_datasets/my_dataset/1.0.0 my_robot --fps 5 \\
        --image steps/observation/image --action steps/action/world_vector steps/action/gripper

A feature that is not there is answered with the names of those that are. The data sets of
`data.DATA_SETS` need no conversion.
"""
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from episodes.index import find_files, list_files
from episodes.tfrecord import (feature_bytes, feature_numbers, parse_example, read_record,
                               walk_records)
from episodes.writing import rows_of, side_by_side, write_episodes
from support.errors import DataError, RequestError, reading
from support.options import argument, option, program


@dataclass
class Settings:
    src: str = argument("folder with TFRecord files, as TFDS wrote them")
    dst: str = argument("folder for the episodes")
    image: list[str] = option(("steps/observation/image",), "features with pictures; several "
                              "stand side by side", type=str, nargs="+")
    action: list[str] = option(("steps/action",), "features that make up an action, in order",
                               type=str, nargs="+")
    fps: float | None = option(None, "frames per second, which RLDS does not say", type=float)


# Features of RLDS with one number for every step.
PER_STEP = ("steps/is_first", "steps/is_last", "steps/is_terminal", "steps/reward",
            "steps/discount")


def list_records(shards: list[Path]) -> list[tuple[Path, int, int, int]]:
    """Path, number, offset and size of every record. A shard that is damaged is named and left out.
    Raises DataError if all are."""
    records, problems = [], []
    for path in shards:
        try:
            with reading(path):
                records += [(path, number, offset, size)
                            for number, (offset, size, _) in enumerate(walk_records(path))]
        except DataError as error:
            problems.append(str(error))
            print(f"left out: {error}")
    if not records:
        raise DataError("; ".join(problems[:3]) or "the shards hold no records")
    return records


def read_episode(path: Path, offset: int, size: int, images: list[str], actions: list[str]
                 ) -> tuple[Iterable, np.ndarray]:
    """The encoded pictures and the actions of a record. Raises DataError if they do not match."""
    example = parse_example(read_record(path, offset, size))
    cameras, columns = [feature_bytes(example, image) for image in images], []
    pictures = cameras[0]
    for name in PER_STEP:
        if name in example and len(feature_numbers(example, name)) != len(pictures):
            raise DataError(f"it has {len(pictures)} pictures in {images[0]}, and "
                            f"{len(feature_numbers(example, name))} steps ({name})")
    for name in actions:
        column = feature_numbers(example, name)
        if not len(pictures) or not len(column) or len(column) % len(pictures):
            raise DataError(f"it has {len(pictures)} pictures and {len(column)} numbers in {name}")
        columns.append(column.reshape(len(pictures), -1))
    return side_by_side(cameras), rows_of(columns)


def convert(settings: Settings) -> None:
    if settings.fps is not None and not settings.fps > 0:
        raise RequestError(f"fps is {settings.fps}; it must be above 0")
    src = Path(settings.src).expanduser()
    shards = find_files(src, list_files(src), "", r"\.tfrecord(-\d+-of-\d+)?$",
                        "TFRecord files (*.tfrecord-*)")
    records = list_records(shards)
    path, _, offset, size = records[0]
    with reading(path):
        first = parse_example(read_record(path, offset, size))
    for name in [name for name in (*settings.image, *settings.action) if name not in first]:
        steps = sorted(feature for feature in first if feature.startswith("steps/"))
        raise DataError(f"there is no feature {name!r}; a step has {', '.join(steps)}")
    sources = (("_".join(path.relative_to(src).parts).replace(".tfrecord", "") + f"_{number:05d}",
                partial(read_episode, path, offset, size, list(settings.image),
                        list(settings.action)))
               for path, number, offset, size in records)
    origin = {"src": str(src.resolve()), "action": list(settings.action),
              "image": settings.image[0] if len(settings.image) == 1 else list(settings.image)}
    write_episodes(sources, len(records), Path(settings.dst),
                   {"fps": settings.fps} if settings.fps else {}, origin)


main = program(__name__, "from_rlds", convert, Settings, "Convert an RLDS data set to folders of "
               "pictures.")
