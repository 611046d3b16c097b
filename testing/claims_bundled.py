"""Claims about the bundled worlds, and how they were recorded and packed."""
import io
import os
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import sample
import train
from bundled import record_arena, record_drawer
from bundled.bundle_checkpoint import bundle_base, bundle_world
from data import SAMPLES, open_episodes
from dynamicrafter.checkpoint import read_checkpoint
from episodes.csgo import csgo_action
from episodes.frames import for_metrics
from episodes.tfrecord import encode_example, write_records
from evaluation import evaluate, metrics
from model.saving import ARENA_WORLD, TINY_BASE, TINY_WORLD, from_dynamicrafter
from model.vid2world import PRESETS
from testing.commands import folder, run_command
from testing.episodes import encode_jpeg, make_episode, make_rt1
from testing.golden import error_of
from testing.worlds import small_preset, train_words

HERE = Path(__file__).parent.parent


def test_the_bundled_world_predicts_what_actions_do():
    episodes = open_episodes("rt1", SAMPLES, "val").select(np.arange(3))
    world = sample.load_world(TINY_WORLD, guidance=1.0, steps=2)
    (frames, actions), = evaluate.read_batches(episodes, 10, 3, world.model.config)
    scores = evaluate.evaluate(world, episodes, frames=10, context_frames=1, batch=3)
    right, repeating = (scores[name].mean() for name in ("psnr", "psnr of repeating"))
    others = evaluate.rollout_batch(world, frames, np.roll(actions, 1, axis=0)[:, :-1])
    misled = metrics.psnr(others, frames)[:, 1:].mean()
    assert scores["psnr"].shape == (3, 9)
    assert right > repeating + 4 and right > misled + 4, (right, repeating, misled)


def test_the_bundled_game_beats_standing_still():
    episodes = open_episodes("csgo", SAMPLES, "val").select(np.array([0, 1, 2]))
    world = sample.load_world(ARENA_WORLD)
    scores = evaluate.evaluate(world, episodes, frames=12, context_frames=4, batch=3)
    imagined, repeating = (scores[name].mean() for name in ("psnr", "psnr of repeating"))
    assert imagined > repeating + 2, (imagined, repeating)


def test_the_bundled_files_are_small_and_halved():
    for path in (TINY_BASE, TINY_WORLD, ARENA_WORLD):
        content = read_checkpoint(path)
        weights = content.get("state_dict") or content["weights"]
        kinds = {tensor.dtype for name, tensor in weights.items() if name != "action_statistics"}
        assert path.stat().st_size < 16e6 and kinds == {torch.float16}, path
    assert sum(path.stat().st_size for path in (HERE / "samples").iterdir()) < 17e6
    assert sum(p.numel() for p in from_dynamicrafter(TINY_BASE,
                                                     PRESETS["tiny"]).unet.parameters()) < 8e6


def test_without_data_or_checkpoint_the_commands_take_the_bundled_ones_and_say_so():
    before = os.getcwd()
    os.chdir(folder())  # where there is no datasets/
    try:
        code, said = run_command(train.main, "--steps", 2, "--batch", 1, "--frames", 4,
                                 "--workers", 0, "--set", "val_clips=1")
        assert code == 0 and "python sample.py --checkpoint runs/default" in said, said
        assert "rt1 from samples (bundled)" in said and "base: tiny_base.pt (bundled)" in said
        code, said = run_command(sample.main, "--guidance", 2.0, "--frames", 3)
        assert code == 0 and said.count("PSNR") == 2, said
        assert "tiny_world.pt (bundled)" in said and "samples (bundled)" in said
        code, said = run_command(sample.main, "--data", "csgo", "--frames", 5)
        assert code == 0 and said.count("PSNR") == 1, said
        assert "arena_world.pt (bundled), data: csgo from samples (bundled)" in said
        frames = open_episodes("csgo", SAMPLES, "val")[0].read(0, 5)[0]
        repeating = metrics.psnr(frames[3], frames[4])  # the last of the four that are given
        assert f"(repeating the last given: {repeating:5.2f})" in said
    finally:
        os.chdir(before)


@small_preset()
def test_runs_are_bundled_as_a_base_and_as_a_world():
    root, runs, out = make_rt1([8] * 6), folder(), folder()
    words = ["--lr", 1e-3, "--set", "warmup=0"]
    assert run_command(train.main, *train_words(root, runs / "base", steps=1), *words,
                       "--passive")[0] == 0
    bundle_base(runs / "base", out / "tiny_base.pt")
    words = [word for word in train_words(root, runs / "world", steps=2)
             if word != "--scratch"] + words
    assert run_command(train.main, *words, "--base", out / "tiny_base.pt")[0] == 0
    bundle_world(runs / "world", out / "tiny_world.pt", "tiny_base.pt")
    frames, actions = make_episode(4, seed=1)
    ours, theirs = (sample.load_world(path, steps=2)
                    for path in (out / "tiny_world.pt", runs / "world"))
    for world in (ours, theirs):
        sample.rollout(world, frames, actions[:-1])
    assert error_of(ours.latents, theirs.latents) < 1e-2
    assert not any(name.startswith("autoencoder.")
                   for name in read_checkpoint(out / "tiny_world.pt")["weights"])
    assert run_command(train.main, *words, "--base", out / "tiny_base.pt", "--overwrite",
                       "--set", "decoder_steps=1")[0] == 0
    bundle_world(runs / "world", out / "tiny_world.pt", "tiny_base.pt")
    kept = read_checkpoint(out / "tiny_world.pt")["weights"]
    assert any(name.startswith("autoencoder.decoder.") for name in kept)
    assert not any(name.startswith(("autoencoder.encoder.", "image_tower.")) for name in kept)


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
