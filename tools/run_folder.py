"""The folder of a training run: whether it may be written to, its log, its loss curve."""
import argparse
import json
from pathlib import Path

import numpy as np

from evaluation.pictures import save_curves
from tools.tfrecord import DataError


class Log:
    """log.jsonl, one line per step, and loss.png. A resumed run keeps the lines up to the step it starts from."""

    def __init__(self, folder: Path, start: int):
        self.path, self.picture = folder / "log.jsonl", folder / "loss.png"
        lines = self.path.read_text().splitlines(keepends=True)[:start] if start else []
        self.rows = [json.loads(line) for line in lines]
        self.path.write_text("".join(lines))

    def write(self, step: int, loss: float, val: float | None) -> None:
        self.rows.append({"step": step, "loss": loss} | ({} if val is None else {"val": val}))
        with open(self.path, "a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def summary(self) -> dict[str, str]:
        recent = [row["loss"] for row in self.rows[-50:]]
        vals = [row["val"] for row in self.rows if "val" in row]
        return {"loss": f"{np.mean(recent):.4f}"} | ({"val": f"{vals[-1]:.4f}"} if vals else {})

    def draw(self) -> None:
        size = max(1, len(self.rows) // 200)  # steps per point: single steps are too noisy to read
        blocks = [self.rows[i : i + size] for i in range(0, len(self.rows), size)]
        save_curves(self.picture, {
            f"training, mean of {size}": [(block[-1]["step"], np.mean([row["loss"] for row in block])) for block in blocks],
            "held out": [(row["step"], row["val"]) for row in self.rows if "val" in row]}, "step")


def check_folder(args: argparse.Namespace) -> None:
    """Refuse to write over another run; clear it if told to."""
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; --out names a folder")
    content = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if not content or args.resume:
        return
    if "arguments.json" not in content:
        raise DataError(f"{out} holds other files ({', '.join(content[:3])}, …); --out names a folder of its own")
    if not args.overwrite:
        raise DataError(f"{out} holds a run: --resume goes on with it, --overwrite starts anew, --out names another folder")
    for pattern in ("*.pt", "*.partial", "*.png", "log.jsonl", "arguments.json"):
        for path in out.glob(pattern):
            path.unlink()
