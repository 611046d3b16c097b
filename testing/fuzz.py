"""Damage what is read from elsewhere, in a thousand ways, and see that nothing fails in silence:
python -m testing.fuzz

For every kind of file a good one is changed a little: a value of a wrong kind in each of its
fields, flipped bits, a part that is missing. What is tried then either gives what the good file
gives, or is refused (or left out) in a sentence. Anything else is printed: a traceback, a hang of
20 seconds, and a difference that nobody was told of. A difference that nobody can tell stands in a
column of its own: bits were flipped in a format without checksums (.npy, HDF5, what a video's
decoder does not mark), and there are as many frames and actions of the same shape.

HDF5, LeRobot and videos need h5py, pyarrow and av.
"""
import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from data import open_episodes
from episodes import from_lerobot, from_video
from sample import load_world
from support.errors import UserError
from testing.commands import folder, run_command
from testing.episodes import make_csgo, make_pictures
from testing.worlds import save_world

WRONG = [None, "x", -1, 10**12, 2**64, 1e300, float("nan"), float("inf"), True, [], {}, [None],
         [-1], [[]], {"x": 1}, "\0", 0.5]
SECONDS = 20
FAULTS = ("differs", "two lines", "traceback", "hang")
RAW = ("hdf5", "folders", "videos")  # formats, or parts of them, without checksums


class Hang(BaseException):
    pass


def give_up(*_) -> None:
    raise Hang


def attempt(work: Callable[[], object]) -> tuple[str, object]:
    """What came of it: "used" and the result, "refused" and the sentence, or a fault."""
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return "used", work()
    except UserError as error:
        return ("refused", str(error)) if "\n" not in str(error) else ("two lines", str(error))
    except Hang:
        return "hang", f"{SECONDS} s"
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


def places(content: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in dictionaries and lists."""
    if path:
        yield path
    items = content.items() if isinstance(content, dict) else ()
    items = enumerate(content) if isinstance(content, list | tuple) else items
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(content: object, path: tuple, value: object) -> object:
    """A copy with another value at a path; a value of `places` itself takes it away."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    if value is places and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


def flipped(content: bytes, rng: random.Random, bits: int = 1) -> bytes:
    damaged = bytearray(content)
    for _ in range(bits):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


# --------------------------------------------------------------------------------------------------
# The kinds. Each gives a name for every try and a function to call; the first is of the good file.

Tries = Iterator[tuple[str, Callable[[], object]]]


def imagined(path: Path) -> np.ndarray:
    world = load_world(path)
    world.reset(np.full((1, 32, 32, 3), 90, np.uint8))
    return world.step(np.ones(world.model.action_dim))


def checkpoint_fields(rng: random.Random) -> Tries:
    run = save_world(folder() / "run")
    good = torch.load(run / "checkpoint.pt", weights_only=True)
    good["data"] = {"name": "rt1", "root": None, "fps": None, "names": ["a"]}
    weights = good.pop("weights")

    def load(content: dict) -> np.ndarray:
        torch.save(content, run / "checkpoint.pt")
        return imagined(run)

    yield "good", lambda: load(good | {"weights": weights})
    for path in places(good):
        for value in rng.sample([*WRONG, places], 6):
            other = changed(good, path, value)
            yield f"{'.'.join(map(str, path))} = {value!r:.30}", (
                lambda other=other: load({"weights": weights} | other))
    for value in WRONG:
        yield f"weights = {value!r:.30}", lambda value=value: load(good | {"weights": value})


def checkpoint_weights(rng: random.Random) -> Tries:
    run = save_world(folder() / "run")
    good = torch.load(run / "checkpoint.pt", weights_only=True)
    names = [name for name, w in good["weights"].items() if w.numel() > 1]

    def load(name: str, value: object) -> np.ndarray:
        weights = {other: w for other, w in good["weights"].items() if other != name}
        weights |= {} if value is places else {name: value}
        torch.save(good | {"weights": weights}, run / "checkpoint.pt")
        return imagined(run)

    yield "good", lambda: load(names[0], good["weights"][names[0]])
    for name in [*rng.sample(names, 10), "text", "action_statistics"]:
        w = good["weights"][name]
        spoiled = [w.clone().index_fill_(0, torch.tensor(0), number)
                   for number in (float("nan"), -float("inf"))]
        others = [w.bool(), w.long(), w.cfloat(), w.to_sparse(), w[:1] if len(w) > 1 else w[None],
                  w.tolist(), places, torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
                  w.to("meta"), "x"]
        for value in spoiled + others:
            kind = str(getattr(value, "dtype", type(value)))
            yield f"{name} as {kind}", lambda name=name, value=value: load(name, value)


def checkpoint_archive(rng: random.Random) -> Tries:
    run = save_world(folder() / "run")
    path = run / "checkpoint.pt"
    good = path.read_bytes()

    def load(content: bytes) -> np.ndarray:
        path.write_bytes(content)
        return imagined(run)

    def packed(compression: int, shorten: int | None = None) -> bytes:
        file = io.BytesIO()
        old = zipfile.ZipFile(io.BytesIO(good))
        with zipfile.ZipFile(file, "w", compression) as new:
            for i, member in enumerate(old.infolist()):
                content = old.read(member)
                new.writestr(member.filename, content[:-4] if i == shorten else content)
        return file.getvalue()

    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        large = [i for i, member in enumerate(archive.infolist()) if member.file_size > 4]
    yield "good", lambda: load(good)
    yield "packed again", lambda: load(packed(zipfile.ZIP_DEFLATED))
    for i in rng.sample(large, 20):
        yield f"member {i} is shorter", lambda i=i: load(packed(zipfile.ZIP_STORED, i))
    for i in range(60):
        damaged = flipped(good, rng)
        yield f"flip {i}", lambda damaged=damaged: load(damaged)
        cut = good[: rng.randrange(len(good))]
        yield f"cut {i}", lambda cut=cut: load(cut)


def contents(name: str, root: Path) -> dict[str, tuple]:
    """Episode -> its frames and actions. One that is damaged deep inside is left out in use."""
    found = {}
    for episode in open_episodes(name, root, fps=5):
        with contextlib.suppress(UserError):
            found[episode.name] = (episode.frames.copy(), episode.actions)
    return found


def hdf5(rng: random.Random) -> Tries:
    import h5py
    root = make_csgo([f"hdf5_dm_july2021_{i}.hdf5" for i in range(3)], frames=3)
    path = sorted(root.rglob("*.hdf5"))[0]
    good = path.read_bytes()

    def read(content: bytes) -> dict:
        path.write_bytes(content)
        return contents("csgo", root)

    def rewritten(name: str, value: object) -> Callable[[], dict]:
        def work() -> dict:
            path.write_bytes(good)
            with h5py.File(path, "r+") as file:
                del file[name]
                if value is not places:
                    file[name] = value
            return contents("csgo", root)
        return work

    yield "good", lambda: read(good)
    for i in range(200):
        damaged = flipped(good, rng, 8)
        yield f"flips {i}", lambda damaged=damaged: read(damaged)
    external = h5py.ExternalLink("/etc/passwd", "/")
    for name in ("frame_0_x", "frame_1_x", "frame_0_y", "frame_2_y"):
        for value in (places, "text", 3, np.zeros((0, 3)), np.zeros((4, 4, 3)), np.zeros((51, 1)),
                      np.full(51, np.nan), np.zeros(7), np.zeros((9, 9, 3), np.int64), external):
            yield f"{name} = {value!r:.30}", rewritten(name, value)


def lerobot(rng: random.Random) -> Tries:
    source = Path(__file__).parent / "lerobot"

    def convert(root: Path) -> dict:
        out = folder() / "out"
        code, said = run_command(from_lerobot.main, root, out, "--camera", "front")
        if code:
            raise UserError(said.strip().splitlines()[-1])
        return contents("folder", out)

    def with_json(version: str, change: Callable[[dict, list], tuple[dict, list]]) -> dict:
        root = folder() / "set"
        shutil.copytree(source / version, root)
        info, listed = root / "meta/info.json", root / "meta/episodes.jsonl"
        rows = []
        if listed.exists():
            rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
        said, rows = change(json.loads(info.read_text(encoding="utf-8")), rows)
        info.write_text(json.dumps(said), encoding="utf-8")
        if listed.exists():
            listed.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return convert(root)

    keep = ("codebase_version", "fps", "chunks_size", "data_path", "video_path", "features")
    for version in ("v2.1", "v3.0"):
        if version == "v3.0":  # while the good one is still of v2.1
            for key in ("episode_index", "length", "tasks"):
                for value in [*WRONG, places]:
                    yield f"{key} of a row = {value!r:.30}", lambda key=key, value=value: with_json(
                        "v2.1", lambda said, rows: (
                            said, [changed(rows[0], (key,), value), *rows[1:]]))
        yield "good", lambda version=version: with_json(version, lambda *both: both)
        info = json.loads((source / version / "meta/info.json").read_text(encoding="utf-8"))
        used = [path for path in places(info) if path[0] in keep and len(path) < 4]
        for path in used:
            for value in rng.sample([*WRONG, places, "/etc/passwd", "{video_key:9999999999d}"], 3):
                yield f"{version} {'.'.join(map(str, path))} = {value!r:.30}", (
                    lambda version=version, path=path, value=value: with_json(
                        version, lambda said, rows: (changed(said, path, value), rows)))


def folders(rng: random.Random) -> Tries:
    def read(damage: Callable[[Path], object]) -> dict:
        root = make_pictures([6, 6, 6, 6], fps=5, names=["dx", "dy"], keys={"w": {"dy": 1}})
        damage(root)
        return contents("folder", root)

    info = {"fps": 5, "names": ["dx", "dy"], "keys": {"w": {"dy": 1, "label": "up"}}}
    yield "good", lambda: read(lambda root: None)
    for path in places(info):
        for value in [*WRONG, places]:
            text = json.dumps(changed(info, path, value))
            yield f"info {'.'.join(map(str, path))} = {value!r:.30}", (
                lambda text=text: read(lambda root: (root / "info.json").write_text(
                    text, encoding="utf-8")))
    arrays = [np.zeros((6, 0)), np.zeros(0), np.zeros((0, 2)), np.full((6, 2), np.nan),
              np.array(["x"] * 6), np.zeros((6, 2), complex), np.zeros((5, 2)),
              np.zeros((6, 2, 2)), np.array(3.0), np.full((6, 2), 1e300)]
    for which in (0, 1, 2, 3):
        for array in arrays:
            yield f"actions {array.dtype} {array.shape} in {which}", (
                lambda array=array, which=which: read(lambda root: np.save(
                    root / f"episode_{which:03d}" / "actions.npy", array)))
        for claim in (b"(6, 9)", b"(9,99)", b"(9**9)", b"(-6,2)"):
            def claims(root: Path, which: int = which, claim: bytes = claim) -> None:
                path = root / f"episode_{which:03d}" / "actions.npy"
                path.write_bytes(path.read_bytes().replace(b"(6, 2)", claim))

            yield f"actions claim to be {claim} in {which}", lambda claims=claims: read(claims)
        for name in ("actions.npy", "2.png"):
            def damage(root: Path, which: int = which, name: str = name) -> None:
                path = root / f"episode_{which:03d}" / name
                path.write_bytes(flipped(path.read_bytes(), rng, 4))

            def pipe(root: Path, which: int = which, name: str = name) -> None:
                (path := root / f"episode_{which:03d}" / name).unlink()
                os.mkfifo(path)

            yield f"a pipe for {name} in {which}", lambda pipe=pipe: read(pipe)
            for i in range(6):
                yield f"flips {i} of {name} in {which}", lambda damage=damage: read(damage)


def videos(rng: random.Random) -> Tries:
    import av
    path = folder() / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for t in range(20):
            picture = np.random.default_rng(t).integers(0, 256, (8, 12, 3), dtype=np.uint8)
            picture = picture.repeat(8, axis=0).repeat(8, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    clip = path.read_bytes()

    def convert(content: bytes) -> dict:
        source, out = folder(), folder() / "out"
        for name, film in (("a", content), ("b", clip)):
            (source / f"{name}.mp4").write_bytes(film)
            (source / f"{name}.csv").write_text("dx\n" + "1\n" * 20, encoding="utf-8")
        code, said = run_command(from_video.main, source, out)
        if code:
            raise UserError(said.strip().splitlines()[-1])
        return contents("folder", out)

    yield "good", lambda: convert(clip)
    for i in range(100):
        damaged = flipped(clip, rng, 3)
        yield f"flips {i}", lambda damaged=damaged: convert(damaged)


KINDS = {kind.__name__: kind for kind in (checkpoint_fields, checkpoint_weights, checkpoint_archive,
                                          hdf5, lerobot, folders, videos)}


# --------------------------------------------------------------------------------------------------


def same(result: object, good: object, shape_only: bool) -> bool:
    """Whether a result is the good one's; of episodes, whether those that are there are."""
    if not isinstance(good, dict):
        return np.array_equal(result, good)
    alike = (lambda a, b: a.shape == b.shape) if shape_only else np.array_equal
    return all(name in good and all(map(alike, episode, good[name]))
               for name, episode in result.items())


def fuzz(kind: str, seed: int) -> Counter:
    count, good = Counter(), None
    for name, work in KINDS[kind](random.Random(seed)):
        start = time.time()
        outcome, what = attempt(work)
        if name == "good":
            assert outcome == "used", what
            good = what
            continue
        if outcome == "used":
            raw = kind in RAW and name.startswith("flips") and "png" not in name
            if same(what, good, shape_only=False):
                outcome = "used"
            else:
                outcome = "no checksum" if raw and same(what, good, shape_only=True) else "differs"
        count[outcome] += 1
        if outcome in FAULTS:
            told = "" if outcome == "differs" else f": {what!s:.200}"
            print(f"{kind}: {name}: {outcome}{told} ({time.time() - start:.1f} s)", flush=True)
    return count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="all, if none is named")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rows = {kind: fuzz(kind, args.seed) for kind in args.kinds or KINDS}
    columns = ("refused", "used", "no checksum", *FAULTS)
    print("\n| kind | tries | refused | as the good one, or left out | no checksum | "
          + " | ".join(FAULTS) + " |")
    print("| --- |" + " --- |" * (1 + len(columns)))
    for kind, count in rows.items():
        print(f"| {kind} | {count.total()} | {' | '.join(str(count[c]) for c in columns)} |")
    bad = sum(count[fault] for count in rows.values() for fault in FAULTS)
    print(f"\n{sum(count.total() for count in rows.values())} tries, {bad} faults")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
