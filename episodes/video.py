"""Frames of a video file, each for the row that it belongs to.

A recording's rows and its video are made by different clocks and written by different programs. So
a frame is taken for a row only if it was shown within half a frame of the row's time, and every
frame between the first and the last row must have one.
"""
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from support.errors import DataError, optional, reading

import_av = partial(optional, "av", "reading videos needs PyAV")


def frames_at(path: Path, due: np.ndarray, fps: float, whole: bool = True) -> Iterator[np.ndarray]:
    """The frame uint8 [H, W, 3] of every row, read one by one.

    due    [T], seconds in the video at which the rows were recorded
    whole  the video must end with the last row, and begin with the first

    Raises DataError where a row has no frame, or a frame no row.
    """
    half, row = 0.5 / fps, 0
    for time, frame in decode(path, begin=0.0 if whole else float(due[0]) - 1):
        if row == len(due):
            raise DataError(f"{path.name} goes on after its {len(due)} rows")
        if time < due[row] - half:
            if row or whole:
                raise DataError(f"{path.name} has a frame at {time:.3f} s that no row is for (row "
                                f"{row} is due at {due[row]:.3f} s)")
            continue
        if time >= due[row] + half:
            raise DataError(f"{path.name} has no frame for row {row}, due at {due[row]:.3f} s: the "
                            f"next one is at {time:.3f} s")
        yield upright(frame)
        row += 1
        if row == len(due) and not whole:
            return
    if row < len(due):
        raise DataError(f"{path.name} has frames for {row} of {len(due)} rows")


def all_frames(path: Path, rows: int) -> Iterator[np.ndarray]:
    """The frames of a video that has one for each row. Raises DataError for more or fewer."""
    count = 0
    for count, (_, frame) in enumerate(decode(path), start=1):
        if count <= rows:
            yield upright(frame)
    if count != rows:
        raise DataError(f"{path.name} has {count} frames for {rows} rows")


def upright(frame) -> np.ndarray:
    """The pixels uint8 [H, W, 3] of a frame, turned as the camera says that it was held."""
    quarters = round(getattr(frame, "rotation", 0) / 90)
    return np.rot90(frame.to_ndarray(format="rgb24"), quarters)


def decode(path: Path, begin: float = 0.0) -> Iterator[tuple]:
    """Time in seconds and frame, from the last key frame before `begin` on. Raises DataError, also
    where the decoder had to guess a part of a picture."""
    av = import_av()
    with reading(path), av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if begin > 0:
            container.seek(int(begin / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            time = float(frame.pts * stream.time_base)
            if frame.is_corrupt:
                raise DataError(f"{path.name} is damaged at {time:.3f} s")
            yield time, frame


def frame_rate(path: Path) -> float:
    """Mean frames per second; from their times where the file does not say. Raises DataError."""
    with reading(path), import_av().open(str(path)) as container:
        rate = container.streams.video[0].average_rate
    if rate:
        return float(rate)
    times = [time for time, _ in decode(path)]
    if len(times) < 2 or not times[-1] > times[0]:
        raise DataError(f"{path.name} does not say how many frames a second it has")
    return (len(times) - 1) / (times[-1] - times[0])
