"""Commands run in this process, and what they must say."""
import atexit
import contextlib
import importlib.util
import io
import os
import re
import shutil
import signal
import socket
import tempfile
from pathlib import Path
from unittest import SkipTest, mock

from training.settings import LAPTOP_WORLD

# whatever this run and the commands that it starts leave behind goes with it
tempfile.tempdir = os.environ["TMPDIR"] = EVERYTHING = tempfile.mkdtemp()
atexit.register(shutil.rmtree, EVERYTHING, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = CACHE = tempfile.mkdtemp()  # indexes of this run's data


@contextlib.contextmanager
def raises(kind: type[Exception], words: str):
    """The block must raise `kind` with a message that matches `words`."""
    try:
        yield
    except kind as error:
        assert re.search(words, str(error)), f"the message {error!s:.300} lacks {words!r}"
        assert "\n" not in str(error), f"more than one line: {error}"
    else:
        raise AssertionError(f"no {kind.__name__} was raised")


def needs(*packages: str) -> None:
    """Skip a test where an optional package is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise SkipTest(f"needs {' '.join(missing)}")


def folder() -> Path:
    return Path(tempfile.mkdtemp())


def run_command(main, *words: object) -> tuple[int, str]:
    """A command in this process: its exit code and what it printed."""
    printed = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed),
              mock.patch.dict(LAPTOP_WORLD, decoder_steps=0)):  # 200 take minutes
            code = main([str(word) for word in words])
    except SystemExit as leaving:  # argparse
        code = leaving.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, printed.getvalue()


def refused(main, *words: object, saying: str) -> None:
    """The command must exit with code 2 after one sentence, and no traceback."""
    code, printed = run_command(main, *words)
    assert code == 2, f"exit code {code}\n{printed}"
    assert "Traceback" not in printed and re.search(saying, printed), printed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
