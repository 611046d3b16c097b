"""Claims about data sets, file formats and the bundled recordings."""
import colorsys
import hashlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
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
from episodes import from_lerobot, from_video
from episodes.csgo import csgo_action
from episodes.csgo import describe as describe_csgo
from episodes.frames import cut_bars, for_metrics
from evaluation import evaluate
from model import saving
from model.saving import from_vid2world, from_world, load_model
from model.vid2world import ModelConfig
from play.keys import Keyboard
from support import pictures
from support.errors import CheckpointError, DataError, RequestError
from support.pictures import psnr, save_gif
from testing.commands import folder, needs, raises, refused, run_command
from testing.episodes import flip_byte, make_csgo, make_rt1, shard_of
from testing.golden import released_names
from testing.worlds import SMALL, save_world, small_checkpoint, small_preset
from unet import UNet

HERE = Path(__file__).parent.parent


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


def test_an_animation_is_as_fast_as_a_browser_shows_it():
    frames = np.random.default_rng(0).integers(0, 255, (12, 64, 80, 3), dtype=np.uint8)
    for fps, shown, number in ((60, 30, 6), (50, 20, 12), (30, 30, 12), (5, 200, 12)):
        save_gif(path := folder() / "a.gif", {"imagined": frames}, fps)
        with Image.open(path) as animation:
            assert animation.info["duration"] == shown and animation.n_frames == number
