"""Errors that a user can fix: a command prints one as a sentence, and exits with code 2."""
import importlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType


class UserError(ValueError):
    """The message says what was found, what was expected and what to do."""


class DataError(UserError):
    """Episodes, pictures or actions that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used."""


class RequestError(UserError):
    """An option out of range, or an action or a frame that does not fit the world model."""


class DivergedError(UserError):
    """A training whose loss or weights are no longer finite numbers."""


def require_finite(what: str, number: float, advice: str = "a smaller learning rate may help"
                   ) -> None:
    """Raises DivergedError for NaN and infinities: nothing can be learned from them."""
    if not math.isfinite(number):
        raise DivergedError(f"{what} is {number:g}, not a finite number; {advice}")


def optional(module: str, purpose: str, packages: str | None = None) -> ModuleType:
    """A module that few need, imported where it is used. Raises RequestError where it is missing.

    packages  what to install, if that is called otherwise
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RequestError(f"{purpose} ({error}): pip install {packages or module}") from None


@contextmanager
def reading(what: str | Path, kind: type[UserError] = DataError) -> Iterator[None]:
    """Around all that reads a file from elsewhere. A damaged or hostile one makes its reader raise
    almost anything; whatever it is becomes one sentence that begins with `what`, best the path."""
    try:
        require_regular(what, kind)
        yield
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        reason = reason.strip().splitlines()[0][:200]
        raise kind(f"{what} {stand_in(what) or f'cannot be read ({reason})'}") from None


def require_regular(path: str | Path, kind: type[UserError] = DataError) -> None:
    """Raises for a pipe or a device, whose reader would wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise kind(f"{path} is not a regular file")


def stand_in(path: str | Path) -> str | None:
    """What a file is that lies in the place of another, and how to get that; None if it is none."""
    with suppress(OSError, ValueError), open(path, "rb") as file:
        start = file.read(24)
        if start.startswith(b"version https://git-lfs"):
            return "is a Git LFS pointer and not the file it stands for: run `git lfs pull`"
        if start.startswith(b"\x1f\x8b"):
            return "is compressed (gzip): decompress it first"
    return None
