"""A command's options from one dataclass, and its exit code from what happened.

    @dataclass
    class Settings:
        steps: int | None = option(None, "denoising steps per frame; if left out, the checkpoint's")
        out: str = option("rollouts", "folder for the pictures")

    def run(settings: Settings) -> int | None: ...

    main = program(__name__, "sample.py", run, Settings, "Roll out a world model.")
"""
import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields
from pathlib import Path

from support.errors import UserError


def option(default: object, help: str, type: type | None = None, least: float | None = None,
           most: float = sys.float_info.max, **words: object):
    """A field of a settings class that becomes `--its-name`; `words` go to `add_argument`.

    least, most  of a number; if nothing is said, a whole one counts something, so it is at least
                 1, and any other is finite
    """
    return field(default=default, metadata={"help": help, "type": type, "least": least,
                                            "most": most, "words": words})


def argument(help: str, **words: object):
    """A field of a settings class that is given by its place, without a name."""
    return field(default="", metadata={"help": help, "type": None, "words": words, "place": True})


def parse(settings_class: type, description: str, argv: Sequence[str] | None = None,
          complete: Callable | None = None, **defaults: object):
    """Settings from a command line. `defaults` replace those of the fields, in `--help` too.

    complete  fills in settings, and raises UserError for what cannot be, shown with the usage
    """
    parser = argparse.ArgumentParser(description=description)
    settings = settings_class(**defaults)
    for each in fields(settings_class):
        if each.metadata:
            add_option(parser, each, default=getattr(settings, each.name))
    for name, value in vars(parser.parse_args(argv)).items():
        if isinstance(value, str) and "\0" in value:
            parser.error(f"--{name.replace('_', '-')} holds a null byte")
        setattr(settings, name, value)
    if not 0 <= getattr(settings, "seed", 0) < 2**63:
        parser.error(f"--seed is {settings.seed}; it must be between 0 and 2^63 - 1")
    for each in fields(settings_class):
        value = getattr(settings, each.name)
        if not each.metadata or "place" in each.metadata:
            continue
        least, most = each.metadata["least"], each.metadata["most"]
        if least is None:
            least = 1 if type(value) is int else -sys.float_info.max
        numbers = value if isinstance(value, list) else [value]
        if not all(least <= number <= most for number in numbers if type(number) in (int, float)):
            bounds = f"at least {least}" if least > -sys.float_info.max else "a finite number"
            bounds += f" and at most {most}" if most < sys.float_info.max else ""
            parser.error(f"--{each.name.replace('_', '-')} is {value}; it must be {bounds}")
    if complete:
        try:
            complete(settings)
        except UserError as error:
            parser.error(str(error))
    return settings


def add_option(parser: argparse.ArgumentParser, setting: Field, default: object) -> None:
    words = dict(setting.metadata["words"])
    if "place" in setting.metadata:
        parser.add_argument(setting.name, help=setting.metadata["help"], **words)
        return
    kind = setting.metadata["type"] or (str if setting.default is None else type(setting.default))
    if kind is bool:
        either = setting.default is None  # --name, --no-name, or left out
        words["action"] = argparse.BooleanOptionalAction if either else "store_true"
    elif "choices" not in words:
        words = {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]} | words
    below = isinstance(default, str) and default.startswith(os.getcwd())
    default_words = os.path.relpath(default) if below else default
    shown = "" if default is None or kind is bool else f" (default: {default_words})"
    parser.add_argument(f"--{setting.name.replace('_', '-')}", default=default,
                        help=(setting.metadata["help"] + shown).replace("%", "%%"), **words)


def cache_folder() -> Path:
    """Where what is found out about a user's files is kept between commands."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vid2world"


def write_utf8() -> None:
    """Whatever this machine's code page is, and whatever bytes a file's name has."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def command(name: str, work: Callable[[], int | None]) -> int:
    """Do the work; returns the exit code: 2 for what a user can fix, 130 for Ctrl-C."""
    write_utf8()
    try:
        return work() or 0
    except (UserError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130


def program(module: str, name: str, run: Callable[[object], int | None], settings_class: type,
            description: str, complete: Callable | None = None
            ) -> Callable[[Sequence[str] | None], int]:
    """The `main` of a command: from its words (None: those of the command line) to its exit code.

    module    `__name__`: where it is "__main__", the command runs
    complete  as in `parse`
    """
    def main(argv: Sequence[str] | None = None) -> int:
        return command(name, lambda: run(parse(settings_class, description, argv, complete)))

    return sys.exit(main()) if module == "__main__" else main
