"""Claims about recordings of one's own: folders, converters, what is shown of them."""
import ast
import contextlib
import io
import re
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import sample
import train
from action_guidance import align_actions
from data import SAMPLES, open_episodes
from episodes import from_lerobot, from_rlds, from_video, show, writing
from play.keys import Keyboard, with_keys
from sample import WorldModel
from support.errors import DataError
from testing.commands import folder, needs, raises, refused, run_command
from testing.episodes import make_episode, make_pictures, make_rt1
from testing.worlds import save_world, small_preset, small_world
from training.settings import Settings

HERE = Path(__file__).parent.parent


def test_a_folder_of_pictures_is_a_data_set():
    keys = {"ArrowUp": {"up": 9.5}, " ": {"across": 1, "toggles": True, "label": "hand"}}
    root = make_pictures([12, 5, 7, 6], fps=5, names=["up", "across"], keys=keys)
    np.savez(root / "more.npz", image=np.zeros((8, 32, 40, 3), np.uint8), action=np.ones((8, 2)))
    episodes = open_episodes("folder", root)
    dataset = episodes.dataset
    assert {e.name: e.length for e in episodes} == {
        "episode_000": 12, "episode_001": 5, "episode_002": 7, "episode_003": 6, "more": 8}
    assert dataset.action_dim == 2 and dataset.aspect == (32, 40) and dataset.fps == 5
    assert dataset.names == ("up", "across") and dataset.keys["ArrowUp"].value == 9.5
    assert dataset.keys[" "].label == "hand" and dataset.keys[" "].toggles
    frames, actions = make_episode(12, seed=0)
    first = next(e for e in episodes if e.name == "episode_000")
    assert np.array_equal(first.frames, frames)  # 10.png after 9.png
    assert np.array_equal(first.actions, (3 + 50 * actions[:, 10:12]).astype(np.float32))
    part, taken = first.read(9, 12)
    assert np.array_equal(part, frames[9:]) and np.array_equal(taken, first.actions[9:])
    val, rest = (open_episodes("folder", root, split) for split in ("val", "train"))
    assert len(val) == 1 and {e.name for e in val} | {e.name for e in rest} == {
        e.name for e in episodes}
    (root / "episode_002").rename(root / "episode_002-val")
    assert [e.name for e in open_episodes("folder", root, "val")] == ["episode_002-val"]
    assert open_episodes("folder", root, fps=7).dataset.fps == 7  # the user goes before info.json
    # actions of one number may be a row
    (root / "info.json").unlink()
    for path in root.glob("*/actions.npy"):
        np.save(path, np.load(path)[:, 0])
    (root / "more.npz").unlink()
    assert open_episodes("folder", root)[0].actions.shape == (12, 1)


def test_a_folder_is_indexed_again_where_a_picture_came_or_went():
    root = make_pictures([6, 6, 6])
    assert len(open_episodes("folder", root)) == 3
    gone = root / "episode_001" / "5.png"
    content = gone.read_bytes()
    gone.unlink()
    short = open_episodes("folder", root)
    assert len(short) == 2 and short.damaged == 1
    gone.write_bytes(content)
    assert len(open_episodes("folder", root)) == 3


def test_bad_folders_are_named_and_refused():
    refused(train.main, "--data", "folder", saying="name it with --root")
    with raises(DataError, "expected folders of pictures with an actions.npy"):
        open_episodes("folder", folder())
    with raises(DataError, "one episode, and to learn and to measure takes at least two"):
        open_episodes("folder", make_pictures([6]), "val")
    (make_pictures([6], bare := folder()) / "episode_000" / "actions.npy").unlink()
    code, words = run_command(train.main, "--data", "folder", "--root", bare)
    assert code == 2 and "pictures and no actions.npy (episode_000)" in words, words
    root = make_pictures([6, 6, 6, 6, 6])
    (root / "episode_001" / "actions.npy").unlink()
    (root / "episode_002" / "3.png").unlink()
    (root / "episode_003" / "2.png").write_text("no picture", encoding="utf-8")
    words = io.StringIO()
    with contextlib.redirect_stdout(words):
        episodes = open_episodes("folder", root)
    assert "1 folders hold pictures and no actions.npy (episode_001)" in words.getvalue()
    assert list(episodes.problems) == [
        "episode episode_002 is damaged: it has 5 pictures and 6 rows in actions.npy"]
    with raises(DataError, "episode_003 is damaged: 2.png is not a readable picture"):
        _ = next(e for e in episodes if e.name == "episode_003").frames
    np.save(root / "episode_004" / "actions.npy", np.zeros((6, 3)))
    with raises(DataError, "episode_004.*its actions have 3 numbers, not 2"):
        open_episodes("folder", root)
    for content, saying in (
            ("{", "JSONDecodeError"), ("[]", "expected a table"), ('{"fsp": 3}', "has 'fsp'"),
            ('{"fps": "3"}', "fps is '3'"), ('{"names": ["a"]}', "expected 2 different names"),
            ('{"names": ["a", "a"]}', "expected 2 different names"),
            ('{"absolute": 1}', "absolute is 1"), ('{"keys": []}', r"keys is \[\]; .*a table"),
            ('{"names": ["a", "b"], "keys": {"w": {"c": 1}}}', "the name one of a, b"),
            ('{"keys": {"w": {"a": 1}}}', "there are none"),
            ('{"names": ["a", "b"], "keys": {"w": ["a", 1]}}', "keys.w is .*a table"),
            ('{"names": ["a", "b"], "keys": {"w": {"a": 1, "b": 1}}}', "one number"),
            ('{"names": ["a", "b"], "keys": {"w": {"a": NaN}}}', "one number")):
        bad = make_pictures([6])
        (bad / "info.json").write_text(content, encoding="utf-8")
        with raises(DataError, saying):
            open_episodes("folder", bad)


def test_actions_of_your_own_are_learned_in_units_of_their_deviation():
    root = make_pictures([6, 9, 7, 5, 6, 8], width=13)
    episodes = open_episodes("folder", root, "train")
    mean, deviation = data.action_statistics(episodes)
    taken = np.concatenate([e.actions for e in episodes]).astype(np.float64)
    assert np.allclose(mean, taken.mean(0)) and np.allclose(deviation, taken.std(0))
    model = small_world().model
    plain = torch.full((2, 13), 1e6)
    assert torch.equal(model.standardise(plain), plain)
    model.set_action_statistics(mean, deviation)
    learned = model.standardise(torch.from_numpy(taken).float())
    assert (learned[:, :2].mean(0).abs() < 1e-5).all() and torch.allclose(
        learned[:, :2].std(0, correction=0), torch.ones(2))
    assert not learned[:, 2:].any()  # what never varies is left alone
    assert model.standardise(plain)[0, :3].tolist() == [5, 5, 1e6]
    # training and a rollout hand the network the same numbers
    read = []
    def spy(x, k, anchor, context, actions, mask, *others):
        read.append(actions)
        return torch.zeros_like(x)
    model.denoise = spy
    frames, actions = torch.zeros(1, 4, 16, 16, 3, dtype=torch.uint8), torch.from_numpy(taken[:4])
    actions = actions.float()[None]
    draws = train.random_inputs(model, actions, [0], Settings(action_dropout=0))
    train.PostTraining(model, bf16=False)(frames, actions, draws)
    assert torch.equal(read[0], align_actions(model.standardise(actions)))
    world = WorldModel(model, overlap=2, steps=1, guidance=1.0, streaming=False)
    world.reset(frames[0, :3].numpy(), actions[0, :2].numpy())
    world.step(actions[0, 2].numpy())
    assert torch.equal(read[-1], read[0])


@small_preset()
def test_a_folder_of_your_own_trains_rolls_out_and_plays():
    root, out = make_pictures([6] * 9, width=3, fps=5, names=["up", "across", "idle"]), folder()
    words = ["--data", "folder", "--root", root, "--base", save_world(out / "other"), "--out",
             out / "run", "--frames", 4, "--size", 32, 32, "--batch", 2, "--workers", 0, "--steps",
             1, "--set", "val_clips=2"]
    code, output = run_command(train.main, *words)
    assert code == 0 and "action idle never varies" in output, output
    assert "action embedding new" in output, output
    code, output = run_command(train.main, "--resume", "--out", out / "run", "--steps", 2)
    assert code == 0, output
    world = sample.load_world(out / "run", steps=1, guidance=1.0)
    mean, deviation = data.action_statistics(open_episodes("folder", root, "train"))
    assert np.allclose(world.model.action_statistics[0, :2], mean[:2])
    assert world.model.config.unet.default_fps == 5
    passes, denoise = [], world.model.denoise  # what the network reads is standardised
    def spy(x, k, anchor, context, actions, *others):
        passes.append(actions)
        return denoise(x, k, anchor, context, actions, *others)
    world.model.denoise = spy
    world.reset(np.zeros((1, 32, 40, 3), np.uint8))
    world.step(mean + deviation)
    assert torch.allclose(passes[-1][0, -1, :2], torch.ones(2), atol=1e-4)
    # sample.py and play know the data set from the checkpoint
    code, output = run_command(sample.main, "--checkpoint", out / "run", "--steps", 1, "--frames",
                               3, "--out", out)
    assert code == 0 and "data: folder" in output and "warning" not in output, output
    dataset = with_keys(open_episodes("folder", root).dataset, world.model)
    assert [key.label for key in dataset.keys.values()] == ["-up", "+up", "-across", "+across"]
    for key, sign in (("ArrowRight", 1), ("ArrowLeft", -1)):
        keyboard = Keyboard(dataset)
        keyboard.press([key])
        assert np.allclose(keyboard.take_action()[:2], mean[:2] + [2 * sign * deviation[0], 0])
    # another frame rate is told, other actions are refused
    other = make_pictures([6] * 3, width=3, fps=9, names=["up", "across", "idle"])
    code, output = run_command(sample.main, "--checkpoint", out / "run", "--root", other, "--steps",
                               1, "--frames", 3, "--out", out)
    assert code == 0 and "9 frames a second, but this model has learned from 5" in output, output
    other = make_pictures([6] * 3, width=3, fps=5, names=["across", "up", "idle"])
    refused(sample.main, "--checkpoint", out / "run", "--root", other,
            saying="across, up, idle, but this model has learned from up, across, idle")
    refused(sample.main, "--checkpoint", out / "run", "--root", make_pictures([6] * 3),
            saying="actions of 2 numbers, but this model takes 3")


def test_a_recording_whose_rows_are_shifted_is_named():
    pushed = open_episodes("rt1", SAMPLES, "train")
    read = [pushed[i].read(0, 24) for i in range(40)]
    for shift, words in ((0, "as it should be"), (1, "1 too late: row t led to picture t; move"),
                         (-1, "rows come 1 too early")):
        moved = [(frames, np.roll(actions, shift, axis=0)) for frames, actions in read]
        assert words in (said := show.say_alignment(show.alignment(moved))), said
    still = [(frames[:1].repeat(24, axis=0) + np.random.default_rng(0).integers(
        0, 2, frames.shape, np.uint8), actions) for frames, actions in read]
    assert "too little to say" in show.say_alignment(show.alignment(still))


def test_what_is_read_is_shown():
    root = make_pictures([12] * 16, width=3, fps=5, names=["up", "across", "idle"])
    code, said = run_command(show.main, "--root", root, "--out", out := folder() / "new")
    assert code == 0 and "14 episodes to train on, 2 held out; 12 to 12 frames" in said, said
    assert re.search("pictures of .*, 5 a second", said), said
    assert "| idle | 0 | 0 | 0 | 0 | never varies |" in said and "alignment: " in said
    assert Image.open(out / "episode.png").width > 500
    refused(show.main, saying="needs the folder of your episodes")


def test_a_lerobot_data_set_is_converted_frame_by_frame():
    # testing/lerobot was written by the lerobot package: 0.3.3 (v2.1) and 0.4.4 (v3.0), by
    # testing/write_lerobot.py. Each picture shows the number of its frame in a row of bits.
    needs("pyarrow", "av")
    def number(frame: np.ndarray) -> int:
        return sum(1 << bit for bit in range(8)
                   if frame[10:15, bit * 8 + 2 : bit * 8 + 6].mean() > 135)
    random = np.random.default_rng(0)
    actions = [random.standard_normal((length, 3)).astype(np.float32) for length in (20, 17, 23)]
    for version in ("v2.1", "v3.0"):
        source, out = HERE / "testing" / "lerobot" / version, folder() / "converted"
        words = [source, out, "--camera", "wrist"]
        code, output = run_command(from_lerobot.main, *words)
        assert code == 0 and "3 episodes in" in output, output
        episodes = open_episodes("folder", out)
        assert [e.length for e in episodes] == [20, 17, 23] and episodes.dataset.fps == 10
        assert episodes.dataset.names == ("x", "y", "g")
        for i, episode in enumerate(episodes):
            assert np.load(episode.path).dtype == np.float32
            assert np.array_equal(np.load(episode.path), actions[i])
            assert [number(frame) for frame in episode.frames] == list(range(32 * i, 32 * i +
                                                                             episode.length))
        # interrupted and started again: what is there stays, the rest comes
        kept = out / "episode_000000" / "actions.npy"
        stamp = kept.stat().st_mtime_ns
        shutil.rmtree(out / "episode_000001")
        assert run_command(from_lerobot.main, *words)[0] == 0
        assert len(open_episodes("folder", out)) == 3 and kept.stat().st_mtime_ns == stamp
        code, output = run_command(from_lerobot.main, source, both := folder() / "both",
                                   "--camera", "front", "wrist")
        pairs = open_episodes("folder", both)
        assert code == 0 and len(pairs) == 3, output
        for pair, wrist in zip(pairs, open_episodes("folder", out), strict=True):
            T, height, width, _ = wrist.frames.shape
            right = pair.frames[:, :, -round(width * pair.frames.shape[1] / height) :]
            right = np.stack([Image.fromarray(frame).resize((width, height)) for frame in right])
            assert [number(frame) for frame in right] == [number(frame) for frame in wrist.frames]
            assert np.array_equal(pair.actions, wrist.actions) and len(right) == T
    refused(from_lerobot.main, source, out, "--camera", "top", saying="there is no camera 'top'")
    refused(from_lerobot.main, source, out, "--action", "act", saying="there is no 'act'")
    refused(from_lerobot.main, folder(), out, saying="is no LeRobot data set")
    shutil.copytree(source, broken := folder() / "broken")
    for name, content, saying in (("info.json", '{"codebase_version": "v1.6"}', "has no features"),
                                  ("info.json", "{", "cannot be read .JSONDecodeError")):
        (broken / "meta" / name).write_text(content, encoding="utf-8")
        refused(from_lerobot.main, broken, out, saying=saying)


def test_a_lerobot_episode_that_does_not_match_itself_is_left_out():
    needs("pyarrow", "av")
    source, out = folder() / "damaged", folder() / "converted"
    shutil.copytree(HERE / "testing" / "lerobot" / "v2.1", source)
    videos = source / "videos" / "chunk-000" / "observation.images.front"
    # as when a recording is split at the wrong place: the pictures of another episode
    shutil.copy(videos / "episode_000002.mp4", videos / "episode_000001.mp4")
    (videos / "episode_000002.mp4").write_bytes(b"no video")
    code, output = run_command(from_lerobot.main, source, out, "--camera", "front")
    assert code == 0 and "1 episodes in" in output and "2 left out" in output, output
    assert "episode_000001: episode_000001.mp4 goes on after its 17 rows" in output
    assert re.search("episode_000002: .*episode_000002.mp4 cannot be read", output)
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["episode_000000"]
    (source / "meta" / "episodes.jsonl").write_text('{"episode_index": 0', encoding="utf-8")
    refused(from_lerobot.main, source, out, saying="the list of episodes in .* cannot be read")


def test_an_rlds_data_set_of_any_schema_is_converted():
    root, out = make_rt1([5, 7], shards=2), folder() / "converted"
    words = [root, out, "--fps", 3, "--action", "steps/action/world_vector",
             "steps/action/terminate_episode"]
    assert run_command(from_rlds.main, *words)[0] == 0
    theirs, ours = open_episodes("rt1", root), open_episodes("folder", out)
    assert ours.dataset.fps == 3 and [e.length for e in ours] == [e.length for e in theirs]
    for one, other in zip(theirs, ours, strict=True):
        assert np.array_equal(one.frames, other.frames)  # the same JPEG, byte for byte
        assert np.array_equal(one.actions[:, [10, 11, 12, 7, 8, 9]], other.actions)
    views = ["--image", *["steps/observation/image"] * 2]
    assert run_command(from_rlds.main, root, out.parent / "both", *words[4:], *views)[0] == 0
    (pair, _), one = open_episodes("folder", out.parent / "both"), ours[0]
    width = one.frames.shape[2]
    for half in (pair.frames[:, :, :width], pair.frames[:, :, width:]):
        assert abs(half.astype(int) - one.frames).mean() < 4
    small, large = np.zeros((10, 8, 3), np.uint8), np.full((20, 30, 3), 9, np.uint8)
    joined, = writing.side_by_side([[small], [large]])
    assert joined.shape == (10, 8 + 15, 3) and (joined[:, 8:] == 9).all()
    with raises(ValueError, "shorter"):
        list(writing.side_by_side([[small, small], [large]]))
    # folders beside each other are one data set
    for part in ("morning", "evening"):
        make_pictures([5] * 4, root=out.parent / "days" / part)
    assert len(open_episodes("folder", out.parent / "days")) == 8
    refused(from_rlds.main, root, out, "--image", "steps/picture",
            saying="no feature 'steps/picture'; a step has steps/action/base_displacement_vector")


def test_a_videos_frames_are_matched_to_rows_by_time():
    needs("av")
    import av
    source, out = folder(), folder() / "converted"
    def video(name: str, frames: int, lost: int = -1) -> None:
        with av.open(str(source / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for t in set(range(frames)) - {lost}:
                frame = np.full((32, 32, 3), 10 * t, np.uint8)
                frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
                frame.pts, frame.time_base = t, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    def table(name: str, times: np.ndarray) -> None:
        rows = [f"{float(time)!r},{1 / 3 + i!r}" for i, time in enumerate(times)]
        (source / f"{name}.csv").write_text("\n".join(["timestamp,speed", *rows]), encoding="utf-8")
    ticks = np.arange(20) / 10
    for name, times in (("whole", ticks + 0.03), ("late", ticks[:12] + 0.48),
                        ("gap", np.delete(ticks, 7)), ("beyond", ticks + 0.2),
                        ("backwards", ticks[::-1]), ("lost", ticks)):
        video(name, 20, lost=7 if name == "lost" else -1)
        table(name, times)
    video("alone", 5)
    code, output = run_command(from_video.main, source, out)
    assert code == 0 and "2 episodes in" in output and "5 left out" in output, output
    for saying in ("lost: lost.mp4 has no frame for row 7, due at 0.700 s: the next one is at 0.8",
                   "gap: gap.mp4 has a frame at 0.700 s that no row is for",
                   "beyond: beyond.mp4 has frames for 18 of 20 rows", "does not rise",
                   "alone: there is no alone.csv beside it"):
        assert saying in output, output
    episodes = {e.name: e for e in open_episodes("folder", out)}
    assert episodes["whole"].dataset.names == ("speed",) and episodes["whole"].dataset.fps == 10
    assert np.array_equal(np.load(episodes["whole"].path)[:, 0], 1 / 3 + np.arange(20))
    for name, first in (("whole", 0), ("late", 5)):
        shades = episodes[name].frames.mean((1, 2, 3))
        assert np.abs(shades - 10 * (first + np.arange(len(shades)))).max() < 3, name
    # without a time, a row for every frame
    (source / "whole.csv").write_text("1\n2\n", encoding="utf-8")
    for path in source.glob("*.csv"):
        if path.stem != "whole":
            path.unlink()
    refused(from_video.main, source, folder() / "none", saying="whole.mp4 has 20 frames for 2 rows")


def test_optional_packages_are_imported_where_they_are_used():
    optional = {"h5py", "pyarrow", "av", "vizdoom", "metaworld", "mujoco"}
    for path in [*HERE.glob("*.py"), *HERE.glob("*/*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # at the top
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not optional & {name.split(".")[0] for name in names}, path
