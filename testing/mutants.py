"""How do you know? Plant a fault, and see whether a test notices: python -m testing.mutants

Each fault in testing/faults.py changes one line. They are planted one by one in a copy of the
project; then the tests whose names contain one of the words beside the file are run. A fault that
no test notices survives, and then a claim of this project is one that nothing could refute.

    python -m testing.mutants                       all of them, about an hour on one core
    python -m testing.mutants train.py "guid"       those of files, or with effects, of such names
"""
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.options import argument, program
from testing.faults import FAULTS

HERE = Path(__file__).parent.parent
FILES_ONLY = ("checkpoints", "figures", "golden", "samples")  # linked, and not copied


@dataclass
class Settings:
    words: list[str] = argument("of files or effects; if left out, all", nargs="*")


def chosen(words: list[str]) -> Iterator[tuple[str, str, str, str, str]]:
    """File, tests, what stands there, what is put in its place, the effect."""
    for (file, tests), faults in FAULTS.items():
        for before, after, effect in faults:
            if not words or any(word in f"{file}: {effect}" for word in words):
                yield file, tests, before, after, effect


def copy_project(to: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True,
                            check=True).stdout.split("\n")[:-1]
    for name in listed:
        if not name.startswith(FILES_ONLY):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HERE / name, to / name)
    for name in FILES_ONLY:
        (to / name).symlink_to(HERE / name)


RUN = """import sys, test_all
named = [name for word in sys.argv[1:] for name in vars(test_all)
         if name.startswith("test_") and word in name]
for name in dict.fromkeys(named):  # those of the first word first
    outcome, line = test_all.run_test(name)
    if outcome == "FAILED":
        sys.exit("FAILED: " + line)
"""


def first_failure(project: Path, tests: str) -> str | None:
    """The first test that fails there, of those whose names contain one of the words."""
    try:
        ran = subprocess.run([sys.executable, "-c", RUN, *tests.split()], cwd=project,
                             capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        return "a test that hangs"
    failed = re.search(r"^FAILED: (.+) \.\.\. FAILED", ran.stderr, re.MULTILINE)
    return failed[1] if failed else "the tests do not start" if ran.returncode else None


def run(settings: Settings) -> int:
    planted, survived = 0, []
    with tempfile.TemporaryDirectory() as folder:
        copy_project(project := Path(folder))
        for tests in sorted({tests for _, tests, *_ in chosen(settings.words)}):
            if failed := first_failure(project, tests):
                print(f"nothing is planted yet, and this fails: {failed}")
                return 1
        print("| file | fault | noticed by |\n| --- | --- | --- |")
        for file, tests, before, after, effect in chosen(settings.words):
            text = (project / file).read_text(encoding="utf-8")
            assert text.count(before) == 1, f"{file} has {text.count(before)} times: {before}"
            (project / file).write_text(text.replace(before, after), encoding="utf-8")
            failed = first_failure(project, tests)
            (project / file).write_text(text, encoding="utf-8")
            planted += 1
            survived += [effect] * (not failed)
            print(f"| {file} | {effect} | {failed or '**survives**'} |", flush=True)
    print(f"\n{planted} planted, {planted - len(survived)} noticed, {len(survived)} survive")
    return int(bool(survived))


main = program(__name__, "mutants", run, Settings, "Plant faults, and see whether a test notices.")
