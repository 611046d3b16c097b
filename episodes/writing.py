"""Episodes written as folders of pictures, for what converts other formats into them.

Each converter gives its episodes as (name, read), where read() returns the pictures, one by one,
and the actions. An episode is written beside its place and then renamed, so an interrupted
conversion resumes where it stopped. An inconsistent one is left out and named. Actions are kept
exact: they keep the type that they had.
"""
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from episodes.images import decode
from episodes.pictures import NAME
from support.errors import DataError, reading

Source = tuple[str, Callable[[], tuple[Iterable, np.ndarray]]]

SOURCE = ".converted_from.json"
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "BMP": ".bmp", "WEBP": ".webp", "PPM": ".ppm",
           "TIFF": ".tif"}  # that `episodes.pictures` reads again


def write_episodes(sources: Iterable[Source], total: int, out: Path, info: dict, origin: dict
                   ) -> None:
    """Write episodes as folders below `out`, with an info.json that may be changed by hand.

    origin  what is converted, and how: other episodes are not mixed in

    Raises DataError if none could be written, or if another origin's are there.
    """
    out.mkdir(parents=True, exist_ok=True)
    known, this = out / SOURCE, json.dumps(origin)
    before = "elsewhere" if any(out.glob(f"*/{NAME}")) else this
    before = known.read_text(encoding="utf-8") if known.exists() else before
    if before != this:
        raise DataError(f"{out} holds episodes from {before}, and these are from {this}: name "
                        "another folder")
    known.write_text(this, encoding="utf-8")
    if not (out / "info.json").exists():
        (out / "info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    written, problems = set(), []
    for name, read in tqdm(sources, "converting", total, unit="episode", disable=None):
        try:
            if name in written:
                raise DataError("there is another episode of this name")
            if not (out / name / NAME).exists():
                with reading(name):
                    pictures, actions = read()
                write_episode(out / name, pictures, actions)
        except DataError as error:
            problems.append(f"{name}: {error}")
            tqdm.write(f"left out: {name}: {error}")
        else:
            written.add(name)
    if not written:
        raise DataError("; ".join(["no episode could be converted", *problems[:1]]))
    print(f"{len(written)} episodes in {out}"
          + (f", {len(problems)} left out" if problems else ""))
    print(f"train on them: python train.py --data folder --root {out}")


def write_episode(folder: Path, pictures: Iterable, actions: np.ndarray) -> None:
    """One episode, whole or not at all. Raises DataError for different counts."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        count = 0
        for count, picture in enumerate(guarded(pictures), start=1):
            content, ending = encode(picture)
            (partial / f"{count - 1:06d}{ending}").write_bytes(content)
        if count != len(actions):
            raise DataError(f"it has {count} pictures and {len(actions)} rows of actions")
        np.save(partial / NAME, actions)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def side_by_side(cameras: Sequence[Iterable]) -> Iterable:
    """The pictures of one or more cameras as one each, all as high as the first's. What has fewer
    pictures than another is refused where it ends."""
    def join(pictures: Sequence) -> np.ndarray:
        frames = [decode(picture) for picture in pictures]
        height = frames[0].shape[0]
        return np.concatenate([np.asarray(Image.fromarray(frame).resize(
            (round(frame.shape[1] * height / frame.shape[0]), height))) for frame in frames],
            axis=1)

    return cameras[0] if len(cameras) == 1 else map(join, zip(*cameras, strict=True))


def guarded(pictures: Iterable) -> Iterator:
    """Pictures that are read one by one; what goes wrong there is a DataError."""
    with reading("a picture"):
        yield from pictures


def encode(picture: bytes | memoryview | np.ndarray) -> tuple[bytes, str]:
    """A picture as the content of a file, and its ending. What is encoded stays as it is, unless
    folders of pictures are not read in its format."""
    pixels, file = decode(picture), BytesIO()  # raises DataError for one that is none
    if isinstance(picture, np.ndarray):
        Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
        return file.getvalue(), ".jpg"
    kind = Image.open(BytesIO(picture)).format
    if kind in FORMATS:
        return bytes(picture), FORMATS[kind]
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue(), ".png"


def rows_of(columns: list[np.ndarray]) -> np.ndarray:
    """Columns of numbers, [T] or [T, n] each, side by side in a type that holds them all exactly.

    Raises DataError for anything but numbers.
    """
    for column in columns:
        if column.dtype.kind not in "buif" or column.ndim > 2:
            raise DataError(f"an action is {column.dtype} {list(column.shape)}; expected numbers")
    return np.concatenate([column.reshape(len(column), -1) for column in columns], axis=1)
