"""The folder of a training run: whether it may be written to, settings, log, loss curve."""
import json
import os
from pathlib import Path

import numpy as np

from support.errors import DataError
from support.pictures import save_curves

SETTINGS, LOCK = "arguments.json", ".claimed"


class Log:
    """log.jsonl, one line per step, and loss.png. A resumed run keeps the lines before it."""

    def __init__(self, folder: Path, start: int):
        self.path, self.picture = folder / "log.jsonl", folder / "loss.png"
        lines = []
        if start:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)[:start]
        self.rows = [json.loads(line) for line in lines]
        self.path.write_text("".join(lines), encoding="utf-8")

    def write(self, step: int, loss: float, held_out: dict[str, float]) -> None:
        self.rows.append({"step": step, "loss": loss} | held_out)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def measured(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of what validation gives."""
        return [(row["step"], row[name]) for row in self.rows if name in row]

    def summary(self) -> dict[str, str]:
        """The latest losses."""
        words = {"loss": f"{np.mean([row['loss'] for row in self.rows[-50:]]):.4f}"}
        for name, sign in (("val", ""), ("gap", "+")):
            if measured := self.measured(name):
                words[name] = f"{measured[-1][1]:{sign}.4f}"
        return words

    def plot(self) -> None:
        size = max(1, len(self.rows) // 200)  # steps per point: single steps are too noisy to read
        blocks = [self.rows[i : i + size] for i in range(0, len(self.rows), size)]
        means = [(block[-1]["step"], np.mean([row["loss"] for row in block])) for block in blocks]
        gap = [(step, max(value, 0)) for step, value in self.measured("gap")]
        save_curves(self.picture, {f"training, mean of {size}": means,
                                   "held out": self.measured("val"),
                                   "rise under other actions": gap}, "step")


class Claim:
    """A run folder is one process's as long as that runs: by a lock on a file in it, which ends
    with the process, however it ends. Raises DataError if another has it."""

    def __init__(self, out: Path):
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / LOCK
        self.file = open(self.path, "ab")
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise DataError(f"another process trains in {out}: --out names another folder"
                            ) from None
        except OSError:
            pass  # a file system without locks

    def check(self) -> None:
        """Raises DataError if the folder was put aside or replaced while its run lives."""
        there = self.path.exists() and os.path.samestat(os.stat(self.path),
                                                        os.fstat(self.file.fileno()))
        if not there:
            raise DataError(f"{self.path.parent} was removed or replaced while this run wrote to "
                            "it: it stops here")

    def release(self) -> None:
        self.file.close()


def check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to resume what is not a run, and to write over files. Raises DataError."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; --out names a folder")
    content = sorted({path.name for path in out.iterdir()} - {LOCK}) if out.exists() else []
    if resume and SETTINGS not in content:
        raise DataError(f"there is no run in {out} to resume; --out names the folder of the run")
    if resume or not content:
        return
    if SETTINGS not in content:
        raise DataError(f"{out} holds other files ({', '.join(content[:3])}, …); --out names a "
                        "folder of its own")
    if not overwrite:
        raise DataError(f"{out} holds a run: --resume continues it, --overwrite replaces it, "
                        "--out names another folder")


def clear_folder(out: Path) -> None:
    """Remove an earlier run."""
    for pattern in ("*.pt", "*.partial", "*.png", "log.jsonl", SETTINGS):
        for path in out.glob(pattern):
            path.unlink()


def read_settings(out: Path) -> dict:
    """The settings of a run. Raises DataError."""
    try:
        settings = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"there is no run in {out} to resume ({error})") from None
    if not isinstance(settings, dict):
        raise DataError(f"{out / SETTINGS} holds no settings")
    return settings


def write_settings(out: Path, settings: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")
