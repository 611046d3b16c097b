"""Claims about data sets, file formats and the bundled recordings."""
import colorsys
import contextlib
import hashlib
import io
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from PIL import Image

import data
import sample
from bundled import record_arena, record_drawer
from data import DATA_SETS, SAMPLES, Clips, collate, fit_frames, open_episodes
from dynamicrafter.autoencoder import AutoencoderConfig
from dynamicrafter.clip import ImageTowerConfig, TextTowerConfig
from dynamicrafter.resampler import ResamplerConfig
from episodes import from_lerobot, from_video, recon, tfrecord
from episodes.csgo import csgo_action
from episodes.csgo import describe as describe_csgo
from episodes.crc32c import crc32c
from episodes.frames import cut_bars, for_metrics
from episodes.images import decode, decode_all
from episodes.tfrecord import (encode_example, encode_field, feature_numbers, parse_example,
                               write_records)
from evaluation import evaluate
from model import saving
from model.saving import from_vid2world, from_world, load_model
from model.vid2world import ModelConfig
from play.keys import Keyboard
from support import pictures
from support.errors import CheckpointError, DataError, RequestError
from support.pictures import psnr
from testing.commands import folder, needs, raises, refused, run_command
from testing.episodes import encode_jpeg, flip_byte, make_csgo, make_episode, make_rt1, shard_of
from testing.golden import released_names
from testing.worlds import SMALL, save_world, small_checkpoint, small_preset
from unet import UNet

HERE = Path(__file__).parent.parent


def test_the_checksum_is_crc32c():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(bytes(range(32))) == 0x46DD794E
    text = np.random.default_rng(0).bytes(5000)
    # the fast way above 256 bytes against the plain one below
    for cut in (255, 256, 257, 1000, 4999):
        crc = 0xFFFFFFFF
        for byte in text[:cut]:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        assert crc32c(text[:cut]) == crc ^ 0xFFFFFFFF, cut


def test_episodes_come_back_as_they_were_written():
    root = make_rt1([5, 9, 7], shards=2)
    episodes = open_episodes("rt1", root)
    assert sorted(len(e.frames) for e in episodes) == [5, 7, 9]
    assert sorted(e.length for e in episodes) == [5, 7, 9]
    frames, actions = make_episode(9, seed=1)
    episode = next(e for e in episodes if e.length == 9)
    assert np.array_equal(episode.actions, actions) and episode.actions.dtype == np.float32
    # it is JPEG
    assert episode.frames.shape == frames.shape and np.abs(
        episode.frames.astype(int) - frames).mean() < 3
    part, part_actions = episode.read(2, 6)
    assert np.array_equal(part, episode.frames[2:6]) and np.array_equal(part_actions, actions[2:6])
    for root_too in (root.parent, root / "0.1.0"):  # a folder above, the version folder
        assert len(open_episodes("rt1", root_too)) == 3


def test_lists_of_numbers_may_be_packed_or_not():
    floats = np.array([1.5, -2.0, 3.25], "<f4")
    loose = b"".join(b"\x0d" + value.tobytes() for value in floats)  # field 1, 4 bytes, three times
    entry = encode_field(1, b"f") + encode_field(2, encode_field(2, loose))
    assert feature_numbers(parse_example(memoryview(encode_field(1, encode_field(1, entry)))),
                           "f").tolist() == floats.tolist()
    example = parse_example(memoryview(encode_example({"f": floats,
                                                       "i": np.array([5, -3, 2**40])})))
    assert feature_numbers(example, "f").tolist() == floats.tolist()
    assert feature_numbers(example, "i").tolist() == [5, -3, 2**40]
    loose = b"\x08\x05\x08" + b"\xfd" + b"\xff" * 8 + b"\x01"  # 5 and -3, one field each
    entry = encode_field(1, b"i") + encode_field(2, encode_field(3, loose))
    assert feature_numbers(parse_example(memoryview(encode_field(1, encode_field(1, entry)))),
                           "i").tolist() == [5, -3]


def test_npz_episodes_are_read_too():
    root = folder()
    frames, actions = make_episode(6, seed=0)
    np.savez(root / "one.npz", image=frames, action=actions)
    episode = open_episodes("rt1", root)[0]
    assert episode.name == "one"
    assert np.array_equal(episode.frames, frames) and np.array_equal(episode.actions, actions)
    np.savez(root / "two.npz", image=frames)
    with raises(DataError, "two.npz has no action"):
        open_episodes("rt1", root)


def test_npz_episodes_of_another_kind_are_refused_or_damaged():
    root = folder()
    frames, actions = make_episode(6, seed=0)
    np.savez(root / "narrow.npz", image=frames, action=actions[:, :7])
    with raises(DataError, "narrow.npz does not hold this data set: its actions have 7 numbers, "
                           "not 13"):
        open_episodes("rt1", root)
    (root / "narrow.npz").unlink()
    np.savez(root / "good.npz", image=frames, action=actions)
    np.savez(root / "short.npz", image=frames, action=actions[:4])
    np.savez(root / "complex.npz", image=frames, action=actions.astype(np.complex64))
    (root / "text.npz").write_text("not an archive", encoding="utf-8")
    episodes = {episode.name: episode for episode in open_episodes("rt1", root)}
    assert set(episodes) == {"good", "complex"}
    assert any("short is damaged: it has 6 frames and 4 actions" in problem
               for problem in open_episodes("rt1", root).problems)
    with raises(DataError, "complex is damaged: action is complex64"):
        _ = episodes["complex"].frames


def test_pictures_of_every_kind_are_read_or_called_damaged():
    def png(picture: Image.Image) -> bytes:
        file = io.BytesIO()
        picture.save(file, "PNG")
        return file.getvalue()

    # 16 bits, as bright as 100 of 255
    grey = png(Image.fromarray(np.full((4, 4), 100 * 257, np.uint16)))
    assert decode(grey).shape == (4, 4, 3) and (decode(grey) == 100).all()
    assert (decode(png(Image.new("L", (4, 4), 100))) == 100).all()
    assert (decode(png(Image.new("RGBA", (4, 4), (1, 2, 3, 4)))) == [1, 2, 3]).all()
    bomb = bytearray(png(Image.new("L", (4, 4))))
    bomb[16:24] = (30000).to_bytes(4, "big") * 2  # a header that claims 900 million pixels
    for broken in (bytes(bomb), grey[:40], b"", b"\x89PNG"):
        with raises(DataError, "not a readable picture|pixels"):
            decode(broken)
    with raises(DataError, "a frame has 5000×5000 pixels"):
        decode(png(Image.new("1", (5000, 5000))))
    with raises(DataError, "different sizes .4×4, 8×4"):
        decode_all([grey, png(Image.new("L", (4, 8)))])


def test_the_index_is_built_once_and_again_for_a_shard_that_changed():
    root, walked = make_rt1([4, 5, 6, 7], shards=2), []
    walk = tfrecord.walk_records
    tfrecord.walk_records = lambda path: walked.append(path.name) or walk(path)
    try:
        first = open_episodes("rt1", root)
        assert len(walked) == 2
        again = open_episodes("rt1", root)
        assert len(walked) == 2 and np.array_equal(first.records, again.records)
        os.utime(shard_of(root, 1), ns=(1, 1))
        open_episodes("rt1", root)
        assert walked[2:] == [shard_of(root, 1).name]
    finally:
        tfrecord.walk_records = walk


def test_an_interrupted_index_keeps_what_it_knew():
    root, walked = make_rt1([4] * 6, shards=6), []
    open_episodes("rt1", root)
    for i in (1, 4):
        os.utime(shard_of(root, i), ns=(1, 1))
    walk = tfrecord.walk_records
    def interrupted(path: Path):
        walked.append(path.name)
        if len(walked) == 2:
            raise KeyboardInterrupt
        return walk(path)
    tfrecord.walk_records = interrupted
    try:
        with contextlib.suppress(KeyboardInterrupt):
            open_episodes("rt1", root)
        assert len(open_episodes("rt1", root)) == 6
    finally:
        tfrecord.walk_records = walk
    assert walked == [shard_of(root, i).name for i in (1, 4, 4)]  # and not those that come later


def test_links_are_followed_and_the_newest_version_is_read():
    root, elsewhere = folder(), make_rt1([5] * 3)
    (root / "link").symlink_to(elsewhere)
    (root / "circle").symlink_to(root)
    assert [e.length for e in open_episodes("rt1", root)] == [5, 5, 5]
    newer = elsewhere / "0.10.0"
    newer.mkdir()
    shard_of(make_rt1([7] * 2)).rename(newer / "fractal20220817_data-train.tfrecord-00000-of-00001")
    (newer / "fractal20220817_data-train.tfrecord-00000-of-00001.gstmp").write_bytes(b"half")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert [e.length for e in open_episodes("rt1", elsewhere)] == [7, 7]
    assert "0.1.0, 0.10.0 the newest is read, 0.10.0" in printed.getvalue()


def test_train_and_validation_are_disjoint_stable_and_follow_shard_names():
    root = make_rt1([4] * 40, shards=4)
    names = {split: {e.name for e in open_episodes("rt1", root, split)}
             for split in ("train", "val", "all")}
    assert not names["train"] & names["val"] and len(names["val"]) == 5
    assert names["train"] | names["val"] == names["all"]
    held_out = ("import data, sys; "
                "print(sorted(e.name for e in data.open_episodes('rt1', sys.argv[1], 'val')))")
    other = subprocess.run([sys.executable, "-c", held_out, root], cwd=HERE, capture_output=True,
                           text=True, env=os.environ | {"PYTHONHASHSEED": "1"})
    assert other.stdout.strip() == str(sorted(names["val"]))  # not by Python's hash
    named, val = make_rt1([4] * 3, name="x-train"), make_rt1([5] * 2, name="y-val")
    shard_of(val).rename(named / "y-val.tfrecord-00000-of-00001")
    assert [e.length for e in open_episodes("rt1", named, "val")] == [5, 5]
    assert [e.length for e in open_episodes("rt1", named, "train")] == [4, 4, 4]


def test_clips_are_the_same_in_any_number_of_workers():
    episodes = open_episodes("rt1", make_rt1([6, 9, 12, 7]), min_length=5)
    streams = []
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(Clips(episodes, 5, (32, 32), seed=3),
                                             collate_fn=collate, num_workers=workers,
                                             batch_sampler=[[0, 1], [2, 3], [4, 5]])
        streams.append([(batch["frames"], batch["actions"]) for batch in loader])
    for stream in streams[1:]:
        assert all(torch.equal(a, b) for batch, other in zip(streams[0], stream, strict=True) for a,
                   b in zip(batch, other, strict=True))
    actions = torch.cat([batch[1] for batch in streams[0]])
    assert len({clip.numpy().tobytes() for clip in actions}) > 3  # not each clip twice
    other_seed = Clips(episodes, 5, (32, 32), seed=4)
    assert any(not np.array_equal(other_seed[i]["actions"], streams[0][0][1][i]) for i in (0, 1))


def test_what_is_held_out_has_the_smallest_hashes():
    root = folder()
    for i in range(40):
        np.savez(root / f"{i:02d}.npz", image=np.zeros((3, 4, 4, 3), np.uint8),
                 action=np.zeros((3, 2)))
    names = [f"{i:02d}" for i in range(40)]
    wanted = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:5]
    held_out = [episode.name for episode in open_episodes("folder", root, "val", fps=5)]
    assert held_out == sorted(wanted) and held_out != names[:5]


def test_every_place_of_every_episode_is_drawn_equally_often():
    episodes = open_episodes("rt1", make_rt1([5, 8]), min_length=5)
    clips, seen = Clips(episodes, 5, (32, 32), seed=0), []
    read = data.Episode.read
    def spy(self, start, stop):
        seen.append((self.length, start))
        return read(self, start, stop)
    data.Episode.read = spy
    try:
        for i in range(300):
            clips[i]
    finally:
        data.Episode.read = read
    counts = {place: seen.count(place) for place in set(seen)}
    assert set(counts) == {(5, 0), (8, 0), (8, 1), (8, 2), (8, 3)} and min(counts.values()) > 35


def test_frames_are_fitted_as_the_published_models_saw_them():
    rt1 = fit_frames(np.full((1, 256, 320, 3), 200, np.uint8), 320, 512)  # 320×400, and bars
    assert rt1.shape == (1, 320, 512, 3) and rt1[:, :, 56:-56].min() == 200
    assert rt1[:, :, :56].max() == 0 and rt1[:, :, -56:].max() == 0
    csgo = fit_frames(np.full((1, 150, 280, 3), 200, np.uint8), 320, 512)  # 275×512
    assert (csgo[0, :, 0, 0] > 0).sum() == 275 and csgo[0, :22].max() == 0 < csgo[0, 22].min()
    half = np.zeros((1, 64, 64, 3), np.uint8)
    half[:, :, 32:] = 200
    cropped = fit_frames(half, 64, 80, "crop")
    assert cropped.shape == (1, 64, 80, 3)
    assert cropped[0, :, :38].max() == 0 and cropped[0, :, 42:].min() == 200
    assert np.array_equal(fit_frames(half, 64, 64), half)
    ramp = np.zeros((1, 4, 4, 3), np.uint8) + np.arange(0, 200, 50, dtype=np.uint8)[:, None, None]
    # bilinear
    assert fit_frames(ramp, 8, 8)[0, :, 0, 0].tolist() == [0, 13, 38, 63, 88, 113, 138, 150]


def test_training_clips_vary_in_light_and_place_alike_in_all_frames():
    clip = np.tile(open_episodes("rt1", SAMPLES, "val")[0].read(0, 1)[0], (3, 1, 1, 1))
    varied = [data.augment(clip, np.random.default_rng(seed)) for seed in range(20)]
    assert all(np.array_equal(v[0], v[1]) and v.shape == clip.shape and v.dtype == np.uint8
               for v in varied)
    brightness = np.array([v.mean() for v in varied]) / clip.mean()
    assert brightness.std() > 0.02 and (np.abs(brightness - 1) < 0.15).all()
    dot = np.full((1, 16, 16, 3), 100, np.uint8)
    dot[0, 8, 8] = 255
    moves = set()
    for seed in range(40):
        moved = data.augment(dot, np.random.default_rng(seed))[0].sum(-1)
        moves.add(tuple(np.abs(np.subtract(np.unravel_index(moved.argmax(), (16, 16)), 8))))
    assert moves == {(y, x) for y in range(3) for x in range(3)}
    # each in its range: hue and saturation of a spot on black, the contrast of two greys
    spot, greys = np.zeros((1, 32, 32, 3), np.uint8), np.full((1, 64, 8, 3), 80, np.uint8)
    spot[:, 13:19, 13:19], greys[:, 32:] = (40, 80, 160), 120
    hues, saturations, contrasts = [], [], []
    for seed in range(200):
        one, two = (data.augment(clip, np.random.default_rng(seed))[0] for clip in (spot, greys))
        hue, saturation, _ = colorsys.rgb_to_hsv(*(one[16, 16] / 255))
        hues.append(hue - 11 / 18)
        saturations.append(saturation / 0.75)
        contrasts.append((two[63, 4, 0] - float(two[0, 4, 0])) / two.mean() / 0.4)
    for values, least, most in ((hues, -0.05, 0.05), (saturations, 0.95, 1.05),
                                (contrasts, 0.86, 1.14)):
        inner, span = (least + most) / 2, (most - least) / 2
        reached = (np.array([min(values), max(values)]) - inner) / span
        assert -1.15 < reached[0] < -0.7 and 0.7 < reached[1] < 1.15, (least, reached)
    episodes = open_episodes("rt1", make_rt1([6] * 4), min_length=5)
    plain, augmented = (Clips(episodes, 5, (32, 40), seed=0, augment=a)[0] for a in (False, True))
    assert np.array_equal(plain["actions"], augmented["actions"])
    assert not np.array_equal(plain["frames"], augmented["frames"])
    again = Clips(episodes, 5, (32, 40), seed=0, augment=True)[0]
    assert np.array_equal(again["frames"], augmented["frames"])


def test_a_damaged_episode_is_skipped_and_reported():
    root = make_rt1([6] * 8)
    shard = shard_of(root)
    flip_byte(shard, shard.stat().st_size // 2)
    episodes = open_episodes("rt1", root, min_length=5)
    clips = [Clips(episodes, 5, (32, 32), seed=0)[i] for i in range(60)]
    messages = {message for clip in clips for message in clip["damaged"]}
    assert all(clip["frames"] is not None
               for clip in clips) and len(messages) == 1 and "checksum" in messages.pop()


def test_bad_data_is_named_and_refused():
    with raises(DataError, "no folder /nowhere"):
        open_episodes("rt1", "/nowhere")
    with raises(DataError, "holds no episodes"):
        open_episodes("rt1", folder())
    with raises(DataError, "no data set 'rt2'"):
        open_episodes("rt2", folder())
    root = make_rt1([5, 6])
    with raises(DataError, "2 shorter than 16 frames; the longest has 6"):
        open_episodes("rt1", root, min_length=16)
    with raises(DataError, "does not hold this data set: there is no feature "
                           "'steps/observation/image_0'"):
        open_episodes("bridge", root)
    cut = make_rt1([5, 6])
    shard_of(cut).write_bytes(shard_of(cut).read_bytes()[:-50])
    with raises(DataError, "is truncated"):
        open_episodes("rt1", cut)
    header = make_rt1([5, 6])
    flip_byte(shard_of(header), 0)
    with raises(DataError, "fails its checksum"):
        open_episodes("rt1", header)
    payload = make_rt1([5])
    flip_byte(shard_of(payload), 600)
    with raises(DataError, "checksum does not match|1 damaged"):
        _ = open_episodes("rt1", payload)[0].frames


@small_preset()
def test_a_world_goes_on_with_other_actions():
    one = load_model(path := save_world(folder() / "one"))
    theirs = dict(one.named_parameters())
    for width, kept in ((3, False), (13, True)):
        unet = replace(one.config.unet, action_dim=width, default_fps=5)
        two = from_world(path, replace(one.config, unet=unet, size=(32, 48)))
        assert two.action_dim == width and two.config.size == (32, 48)
        assert two.unet.config.default_fps == 5 and two.action_statistics.shape == (3, width)
        for name, weight in two.named_parameters():
            same = weight.shape == theirs[name].shape and torch.equal(weight, theirs[name])
            assert same or ("action_emb" in name and not kept), name
    passive = save_world(folder() / "passive", causal=False, action_dim=None)
    with raises(CheckpointError, "is a passive run: bundle it first"):
        from_world(passive, one.config)


def test_a_strip_says_what_led_to_each_frame():
    video, out = np.zeros((10, 64, 80, 3), np.uint8), folder()
    pictures.save_strip(out / "plain.png", {"imagined": video})
    captions = ["", *["w, left click, mouse +1000, -200"] * 9]
    pictures.save_strip(out / "told.png", {"imagined": video}, captions=captions)
    plain, told = (np.asarray(Image.open(out / f"{name}.png").convert("L")).astype(int)
                   for name in ("plain", "told"))
    assert told.shape[1] == plain.shape[1] and told.shape[0] > plain.shape[0] + 2 * 30
    below = told[26 + 128 :][:30]  # the frames are shown 128 pixels high
    assert all((below[:, 162 * x - 4 : 162 * x] == 255).all() for x in range(2, 8))  # apart
    assert (below[:, :160] == 255).all() and all((below[:, 162 * x :][:, :160] < 128).any()
                                                 for x in range(1, 8))


def test_the_51_numbers_of_csgo_are_read_in_words():
    assert describe_csgo(csgo_action(["w", "left click"], x=30)) == "w, left click, mouse +30, 0"
    assert describe_csgo(csgo_action()) == "mouse 0, 0"
    assert describe_csgo(csgo_action(["ctrl"], x=-1000, y=200)) == "ctrl, mouse -1000, +200"
    assert csgo_action().sum() == 2 and len(csgo_action()) == 51
    keyboard = Keyboard(DATA_SETS["csgo"])
    assert np.array_equal(keyboard.take_action(), csgo_action())
    keyboard.press(["w", "ArrowRight", "Enter"])
    assert data.describe_action(DATA_SETS["csgo"], keyboard.take_action()) == (
        "w, left click, mouse +60, 0")
    keyboard.press(["w"])
    keyboard.move([20, 0])
    keyboard.move([70, -3])  # the nearest bins of 90 and -3
    assert describe_csgo(keyboard.take_action()) == "w, mouse +100, -4"
    assert describe_csgo(keyboard.take_action()) == "w, mouse 0, 0"


def test_what_needs_another_package_says_which():
    (root := folder()).joinpath("jackal_a.hdf5").write_bytes(b"frames and actions")
    missing = ("mujoco", "vizdoom", "h5py", "av", "pyarrow.parquet")
    with mock.patch.dict(sys.modules, dict.fromkeys(missing)):
        refused(record_drawer.main, "--out", folder(), saying="pip install metaworld mujoco")
        refused(record_arena.main, "--out", folder(), saying="pip install vizdoom")
        refused(from_video.main, root, folder() / "new", saying="pip install av")
        with raises(RequestError, "pip install pyarrow av"):
            from_lerobot.import_parquet()
        with raises(RequestError, "pip install h5py"):
            open_episodes("recon", root, "all")


def test_each_simulator_draws_its_own_world_and_varies_it_anew():
    calls, flags = [], [1, 1, 1]
    viewer = SimpleNamespace(scn=SimpleNamespace(flags=flags),
                             make_context_current=lambda: calls.append("current"))
    model = SimpleNamespace(cam_pos=np.zeros((1, 3)), light_diffuse=np.ones((2, 3)),
                            mat_rgba=np.full((4, 4), 0.5), nmat=4,
                            mat=lambda i: SimpleNamespace(name="table_wood" if i == 0 else "own"))
    simulator = object.__new__(record_drawer.Simulator)
    simulator.camera, simulator.flags_off = 0, (0, 2)
    simulator.env = SimpleNamespace(
        model=model, mujoco_renderer=SimpleNamespace(_get_viewer=lambda mode: viewer),
        render=lambda: (calls.append("render"), np.zeros((128, 160, 3), np.uint8))[1])
    assert simulator.render().shape == (64, 80, 3) and calls == ["current", "render"]
    assert flags == [0, 1, 0]
    simulator.painted = {name: getattr(model, name).copy()
                         for name in ("mat_rgba", "light_diffuse", "cam_pos")}
    changed = Counter()
    for seed in range(300):
        simulator.vary(np.random.default_rng(seed))
        reach = np.abs(model.cam_pos[0])
        assert (reach <= record_drawer.CAMERA_REACH).all() and (model.mat_rgba[:, 3] == 0.5).all()
        assert 0.5 <= model.light_diffuse.min() and model.light_diffuse.max() <= 1.5
        changed.update(name for name, moved in (
            ("view", reach), ("light", model.light_diffuse != 1),
            ("own", model.mat_rgba[1:, :3] != 0.5), ("everywhere", model.mat_rgba[0, :3] != 0.5))
            if moved.any())
    for name, share in (("view", 1 / 2), ("light", 1 / 2), ("own", 1 / 2), ("everywhere", 1 / 8)):
        assert abs(changed[name] / 300 - share) < 0.09, changed


def test_the_arena_is_recorded_in_csgos_layout():
    for hall in (record_arena.ARENA, record_arena.TEXTURED, record_arena.draw_hall(7)):
        text = record_arena.map_text(hall)
        rectangles = 1 + len(hall["pillars"])  # and as many rails, which can be seen from no side
        rails = rectangles if hall["rail"] else 0
        assert text.count("linedef") == text.count("vertex") == 4 * (rectangles + rails)
        assert text.count("twosided = true") == text.count('texturemiddle = "-"') == 4 * rails
        reach = hall["half"][0] - hall["rail"]
        assert text.count(f"x = {reach}.0;") == text.count(f"x = -{reach}.0;") == 2
        assert set(hall["walls"]) <= set(re.findall(r'texturemiddle = "(\w+)"', text))
    written = record_arena.lumps_of(record_arena.ARENA)
    record_arena.write_wad(path := folder() / "hall.wad", written)
    content = path.read_bytes()
    count, directory = np.frombuffer(content[4:12], "<i4")
    lumps = {}
    for entry in (content[directory + 16 * i :][:16] for i in range(count)):
        begin, size = np.frombuffer(entry[:8], "<i4")
        lumps[entry[8:].rstrip(b"\0").decode()] = content[begin : begin + size]
    assert lumps == dict(written) and list(lumps)[:3] == ["MAP01", "TEXTMAP", "ENDMAP"]
    walls = [np.array(Image.open(io.BytesIO(lumps[wall]))) for wall in record_arena.ARENA["walls"]]
    assert all(wall.shape == (512, 512, 3) for wall in walls)
    for wall in walls:  # told apart by their corners, each shaded along it and with a picture
        assert sum((wall[0, 0] == other[0, 0]).all() for other in walls) == 1
        assert (wall[0, 0] != wall[0, -1]).any() and (wall[80, 256] != wall[0, 256]).any()
    random, payloads = np.random.default_rng(0), []
    for behaviour in record_arena.BEHAVIOURS:
        planned = record_arena.plan(behaviour, random, 24)
        counts = np.array([count for _, count in planned])
        assert len(planned) == 24 and abs(counts).max() <= record_arena.FASTEST
        actions = np.array([csgo_action(sorted(down), x=count) for down, count in planned])
        frames = random.integers(0, 256, (24, 64, 80, 3), dtype=np.uint8)
        payloads.append(encode_example({
            "steps/observation/image": [encode_jpeg(frame) for frame in frames],
            "steps/action": actions.ravel(), "steps/observation/pose": np.zeros(72, np.float32)}))
    write_records(path.parent / "csgo_arena-val.tfrecord-00000-of-00001", payloads)
    episodes = open_episodes("csgo", path.parent, "val")
    assert len(episodes) == 6 and episodes.dataset.aspect == (64, 80)
    assert episodes.dataset.network_fps == 9 and episodes[0].actions.shape == (24, 51)
    assert np.array_equal(episodes[5].actions, actions)
    assert episodes[0].feature("steps/observation/pose").shape == (24, 3)
    compared = for_metrics(episodes[0].frames, (64, 80), episodes.dataset.compare_at)
    assert compared.shape == (24, 64, 80, 3)


def test_the_held_out_clips_of_csgo_are_the_published_ones():
    # The published evaluation draws 500 first frames and hands them to its files in the order of
    # their paths, two hundred files to a folder.
    lines = DATA_SETS["csgo"].protocol.read_text(encoding="utf-8").split("\n")[:-1]
    begins = {name: int(first) for name, first in map(str.split, lines)}
    def path(name: str) -> str:
        first = (int(re.search(r"_(\d+)\.", name)[1]) - 1) // 200 * 200 + 1
        return f"{first}-{first + 199}/{name}"
    drawn = np.random.RandomState(42).randint(0, 984, 500)
    assert [begins[name] for name in sorted(begins, key=path)] == drawn.tolist()


def test_networks_are_told_the_frame_rate_that_the_published_ones_were():
    told = {name: DATA_SETS[name].network_fps for name in ("rt1", "bridge", "csgo")}
    assert told == {"rt1": 3, "bridge": 5, "csgo": 3} and DATA_SETS["csgo"].fps == 16
    csgo, rt1 = DATA_SETS["csgo"], DATA_SETS["rt1"]
    assert csgo.context_frames == 4 and csgo.compare_at == (150, 280) and rt1.augment
    assert [(name.split("/")[-1], width) for name, width in rt1.actions] == [
        ("base_displacement_vector", 2), ("base_displacement_vertical_rotation", 1),
        ("gripper_closedness_action", 1), ("rotation_delta", 3), ("terminate_episode", 3),
        ("world_vector", 3)]
    arena = open_episodes("csgo", SAMPLES).dataset
    assert arena.network_fps == arena.fps == 9


def test_csgo_is_read_as_h5py_reads_it():
    needs("h5py")
    import h5py
    root = make_csgo(["hdf5_dm_july2021_1.hdf5", "hdf5_dm_july2021_3.hdf5",
                      "hdf5_dm_july2021_2.hdf5"], frames=390)
    train_set, held_out = (open_episodes("csgo", root, split) for split in ("train", "val"))
    assert [e.name for e in train_set] == ["hdf5_dm_july2021_1", "hdf5_dm_july2021_2"]
    assert [(e.name, e.length) for e in held_out] == [("hdf5_dm_july2021_3", 390 - 372)]
    with h5py.File(train_set[1].path) as file:
        frames, actions = train_set[1].read(30, 33)
        for i, frame in enumerate(frames):
            assert np.array_equal(frame, file[f"frame_{30 + i}_x"][()][:, :, ::-1])
            assert np.array_equal(actions[i], file[f"frame_{30 + i}_y"][()])
    with h5py.File(held_out[0].path) as file:  # begins at the protocol's frame 372
        assert np.array_equal(held_out[0].frames[1], file["frame_373_x"][()][:, :, ::-1])
        assert np.array_equal(held_out[0].actions[17], file["frame_389_y"][()])
    shard = root / "1-200" / "hdf5_dm_july2021_2.hdf5"
    shard.write_bytes(shard.read_bytes()[:5000])
    assert open_episodes("csgo", root, "train").damaged == 1
    with h5py.File(root / "1-200" / "hdf5_dm_july2021_4.hdf5", "w") as file:
        file["something"] = 1
    with raises(DataError, "4.hdf5 does not hold this data set"):
        open_episodes("csgo", root)


def test_recon_is_a_drive_in_the_robots_own_frame():
    needs("h5py")
    import h5py
    root = folder()
    # from the origin, looking north: two metres ahead, a quarter to the left, one metre ahead, and
    # a turn to the right across the end of the circle
    place = np.array([[0, 0, 9], [0, 2, 9], [0, 2, 9], [-1, 2, 9], [-1, 2, 9]], float)
    yaw = np.array([np.pi / 2, np.pi / 2, np.pi, np.pi, -np.pi + 0.1])
    frames = [np.full((48, 64, 3), 40 * t, np.uint8) for t in range(5)]
    for name in ("jackal_2019-08-02-16-23-29_0_r00", "jackal_b", "jackal_c"):
        with h5py.File(root / f"{name}.hdf5", "w") as file:
            pictures = file.create_dataset("images/rgb_left", 5, h5py.vlen_dtype(np.uint8))
            for t, frame in enumerate(frames):
                pictures[t] = np.frombuffer(encode_jpeg(frame), np.uint8)
            file["jackal/position"], file["jackal/yaw"] = place, yaw[:, None]
    (root / "test").mkdir()
    (root / "test" / "traj_names.txt").write_text("jackal_b\n", encoding="utf-8")
    train_set, held_out = (open_episodes("recon", root, split) for split in ("train", "val"))
    assert [e.name for e in held_out] == ["jackal_b"] and len(train_set) == 2
    assert train_set[0].length == 5 and train_set.dataset.action_dim == 3
    expected = [[2, 0, 0], [0, 0, np.pi / 2], [1, 0, 0], [0, 0, 0.1], [0, 0, 0]]
    assert np.allclose(train_set[0].actions, expected, atol=1e-6)
    seen, taken = train_set[0].read(2, 4)
    assert seen.shape == (2, 320, 320, 3) and abs(seen[0].mean() - 80) < 2
    assert np.allclose(taken, expected[2:4], atol=1e-6)
    driven = recon.motions(np.array([[0, 0], [0, 1], [1, 1]]), np.array([0, 0.5, 0.7]))
    assert np.allclose(driven, [[0, 1, 0.5], [np.cos(0.5), -np.sin(0.5), 0.2]])
    assert data.describe_action(train_set.dataset, train_set[0].actions[0]) == "ahead"
    path = root / "jackal_c.hdf5"
    path.write_bytes(path.read_bytes()[:1500])
    assert open_episodes("recon", root, "train").damaged == 1
    with h5py.File(path, "w") as file:
        file["something"] = 1
    with raises(DataError, "jackal_c.hdf5 does not hold this data set"):
        open_episodes("recon", root)


def test_a_released_csgo_checkpoint_rolls_out():
    needs("h5py")
    root, out = make_csgo(["hdf5_dm_july2021_3.hdf5"], frames=390), folder()
    config = ModelConfig(unet=replace(SMALL, default_fps=3), size=(32, 48),
                         autoencoder=AutoencoderConfig(32, (1, 2), 1),
                         image_tower=ImageTowerConfig(28, 14, 64, 2, 4, 48),
                         text_tower=TextTowerConfig(77, 49408, 48, 3, 3, 48),
                         resampler=ResamplerConfig(48, 1, 3, 16, 16, 64, 48, 4))
    names = released_names(replace(SMALL, action_dim=51, action_table=True))
    assert any("action_emb_preprocess" in name for name in names)
    released = {name: torch.randn(shape) * 0.05 for name, shape in names.items()}
    passive = [f"model.diffusion_model.{name}" for name in UNet(SMALL).state_dict()]
    path, before = small_checkpoint(**dict.fromkeys(passive) | released), sample.load_world
    saving.from_vid2world = partial(from_vid2world, config=config)
    sample.load_world = partial(sample.load_world, overlap=2)
    try:
        code, output = run_command(
            sample.main, "--checkpoint", path, "--data", "csgo", "--root", root, "--steps", 1,
            "--frames", 6, "--guidance", 1, "--out", out)
        assert code == 0 and output.count("PSNR") == 2, output  # four of the six are given
        assert (out / "csgo_val0_guidance1.png").exists()
        world = sample.load_world(path, steps=1, guidance=1.0)
        episodes = open_episodes("csgo", root, "val")
        scores = evaluate.evaluate(world, episodes, frames=6, context_frames=4)
        assert scores["psnr"].shape == (len(episodes), 2) and "psnr without bars" not in scores
    finally:
        sample.load_world, saving.from_vid2world = before, from_vid2world


def test_frames_are_compared_as_the_published_figures_were():
    frames = np.random.default_rng(0).integers(0, 256, (2, 150, 280, 3), dtype=np.uint8)
    smooth = np.stack([np.asarray(Image.fromarray(frame).resize((7, 5)).resize((280, 150)))
                       for frame in frames])
    fitted = fit_frames(smooth, 320, 512)
    compared = for_metrics(fitted, (150, 280), (150, 280))
    assert compared.shape == smooth.shape and psnr(compared, smooth).min() > 35
    assert for_metrics(fitted[None], (150, 280), (150, 280)).shape == (1, 2, 150, 280, 3)
    rt1 = fit_frames(smooth[:, :, :187], 320, 512)  # the aspect of 256×320
    assert np.array_equal(for_metrics(rt1, (256, 320), None), rt1)
    assert cut_bars(rt1, (256, 320)).shape == (2, 320, 400, 3)
