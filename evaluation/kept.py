"""Results of a comparison are cached, so that it resumes where it was interrupted. A result under
other settings is another one."""
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from support.errors import DataError
from training.run_folder import read_settings
from training.settings import Settings as TrainSettings

# settings on which no single result depends
FREE = {"rows", "variants", "seeds", "workers", "quick", "out", "resume", "overwrite"}


def decisive(settings: object) -> dict:
    """The settings of a comparison or a training on which one of its results depends."""
    return {name: value for name, value in asdict(settings).items() if name not in FREE}


def kept(path: Path, settings: dict, make: Callable[[], dict]) -> dict:
    """The result in a JSON file, if these settings made it; else it is made now, and written.

    Always as JSON gives it back: keys are text.
    """
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("settings") != settings:
        known = {"settings": settings, "result": make()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))["result"]


def require_same(run: Path, chosen: TrainSettings) -> None:
    """Raises DataError for a run that was begun with other settings: hours of training are neither
    mixed nor thrown away."""
    begun = read_settings(run)
    for name, value in decisive(chosen).items():
        if begun.get(name) != value:
            raise DataError(f"the run in {run} has {name} {begun.get(name)}, and here it is "
                            f"{value}: --out names a folder for other settings")
