"""Claims about the other ways to steer a video model, and about memory and machines."""
import json
import sys
import os
import re
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from action_guidance import action_embedding
from baselines import (action_finetuning, avid, classifier_guidance, clips, controlnet, diamond,
                       language_finetuning, train_diamond)
from data import DATA_SETS, SAMPLES, Clips, collate, fit_frames, open_episodes
from diffusion_forcing import NoiseSchedule
from dynamicrafter import autoencoder
from dynamicrafter.checkpoint import read_checkpoint, read_lightning
from dynamicrafter.layers import sinusoidal_embedding
from episodes import csgo
from episodes.csgo import csgo_action
from episodes.tfrecord import (encode_example, write_records)
from evaluation import (baselines, comparison, evaluate, game, metrics, planning, policies,
                        train_verifier)
from model import device
from model.memory import frozen_to_bf16
from model.saving import (TINY_BASE, TINY_WORLD, frozen_weights, load_model, save, trained_weights)
from model.vid2world import PRESETS, Model, to_frames
from support.errors import CheckpointError, DataError, RequestError
from testing import full_size, plan
from testing.commands import folder, raises, refused, run_command
from testing.episodes import encode_jpeg, make_episode, make_pictures, make_rt1
from testing.golden import (error_of)
from testing.worlds import (small_checkpoint, small_episode, small_world, train_words)
from training.run_folder import read_settings
from training.settings import Settings

HERE = Path(__file__).parent.parent
DIAMOND = diamond.DiamondConfig(action_dim=0, channels=(32, 32), attention=(False, True), blocks=1,
                                cond=32)


# --------------------------------------------------------------------------------------------------
# baselines/


def test_diamonds_network_has_a_task_of_unit_size_at_every_noise_level():
    # which is what EDM's scaling is for: a network that answers 0 is then off by 1, on pixels of
    # the deviation that is assumed
    network = diamond.Diamond(replace(DIAMOND, action_dim=2))
    pixels, actions = diamond.SIGMA_DATA * torch.randn(500, 5, 3, 8, 8), torch.zeros(500, 5, 2)
    before = diamond.draw_sigma
    try:
        for sigma in (0.01, 0.1, 1.0, 10.0):
            diamond.draw_sigma = lambda n, sigma=sigma: torch.full((n,), sigma)
            assert abs(diamond.loss_of(network, pixels, actions).item() - 1) < 0.1, sigma
    finally:
        diamond.draw_sigma = before
    assert np.allclose(diamond.noise_levels(1), [5, 0])
    drawn = diamond.draw_sigma(20_000).log()
    assert abs(drawn.mean() + 1.2) < 0.05 and abs(drawn.std() - 1.2) < 0.05
    levels = diamond.noise_levels(3)
    assert np.allclose(levels[::2], [5, 0.002]) and levels == sorted(levels)[::-1]


def test_diamonds_network_is_the_published_one():
    # six pixels of what the released code answers with the same weights and inputs
    config = diamond.DiamondConfig(3, channels=(32, 64), attention=(False, True), cond=32)
    network, numbers = diamond.Diamond(config), torch.arange(768.0, dtype=torch.float64)
    assert not network.up[0][1].out.weight.any() and not network.last.weight.any()
    kernel = network.down[1][0].weight.flatten(1)
    assert torch.allclose(kernel @ kernel.T, torch.eye(32), atol=1e-5)  # orthogonal
    assert abs(diamond.Diamond(replace(config, action_dim=900)).action.std() - 1) < 0.05
    with torch.no_grad():
        for i, p in enumerate((*network.parameters(), *network.buffers())):
            p.copy_(0.1 * torch.arange(i, i + p.numel()).double().sin().view_as(p))
        frame = network(numbers[:192].cos().float().view(1, 3, 8, 8), torch.tensor([0.7]),
                        numbers.sin().float().view(1, 4, 3, 8, 8), torch.tensor([0.3]),
                        torch.tensor([[[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]]]).float())
    published = torch.tensor([-0.30987, 0.2069, -0.18741, 0.30574, 0.15838, 0.02633])
    assert torch.allclose(frame[0, :, ::5, 3].flatten(), published, atol=2e-5)


def test_diamonds_scalings_are_edms_and_its_clips_go_on_from_predictions():
    network = diamond.Diamond(replace(DIAMOND, action_dim=2))
    nn.init.zeros_(network.last.bias)
    noisy, told = torch.randn(3, 3, 8, 8), []
    network.noise.register_forward_hook(lambda _, asked, __: told.append(asked[0]))
    sigma = torch.tensor([0.01, 0.7, 15.0])
    inputs = sigma, torch.zeros(3, 4, 3, 8, 8), torch.ones(3), torch.zeros(3, 4, 2)
    total = (sigma**2 + 0.1**2).sqrt()  # of the noise, with that which a whole channel shares
    with torch.no_grad():
        silent = network(noisy, *inputs)
        network.last.bias += 1
        ones = network(noisy, *inputs)
    skip = (0.25 / (total**2 + 0.25)).view(3, 1, 1, 1)
    out = (total * 0.5 / (total**2 + 0.25).sqrt()).view(3, 1, 1, 1)
    assert torch.allclose(silent, skip * noisy, atol=1e-6)
    assert torch.allclose(ones - silent, out.expand_as(noisy), atol=1e-6)
    assert torch.allclose(told[0], total.log() / 4)

    pasts = []

    def paints_white(noisy, sigma, past, past_sigma, actions):
        pasts.append(past)
        assert actions.flatten().tolist() == [len(pasts) - 1 + t for t in range(4)]
        return torch.ones_like(noisy)

    actions = torch.arange(6.0).view(1, 6, 1)
    with mock.patch.object(diamond, "add_noise", lambda frames, sigma: frames), mock.patch.object(
            diamond, "draw_sigma", lambda n: torch.full((n,), 2.0)):
        loss = diamond.loss_of(paints_white, torch.zeros(1, 6, 3, 2, 2), actions)
    weight = (4.01 + 0.25) / (4.01 * 0.25)
    assert abs(loss.item() - weight) < 1e-5 and len(pasts) == 2
    assert not pasts[0].any() and pasts[1][0, :, 0, 0, 0].tolist() == [0, 0, 0, 1]


def test_diamond_learns_what_actions_do():
    # a picture that the last action paints: white or black
    torch.manual_seed(0)
    network = diamond.Diamond(replace(DIAMOND, action_dim=1))
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    def clips(n: int) -> tuple[Tensor, Tensor]:
        actions = torch.randint(2, (n, 6, 1)).float()
        pixels = torch.full((n, 6, 3, 8, 8), -0.6)
        pixels[:, 1:] += 1.2 * actions[:, :5, :, None, None]
        return pixels, actions
    for _ in range(60):
        loss = diamond.loss_of(network, *clips(16))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    frames, actions = (to_frames(clips(1)[0]), clips(1)[1].numpy())
    world = diamond.DiamondWorld(network, steps=3)
    means = []
    for action in (1, 0, 0, 1):
        world.reset(frames[:, :4], actions[:, :3])
        before = world.past.clone()
        new = world.step(np.array([[action]], np.float32))
        assert torch.equal(world.past[:, :3], before[:, 1:])  # the new frame is the newest past
        assert np.array_equal(to_frames(world.past)[:, 3], new)
        means.append(new.mean())
    assert min(means[0], means[3]) > max(means[1], means[2]) + 60, means
    with raises(RequestError, "DIAMOND needs 4"):
        world.reset(frames[:, :3], actions[:, :2])


def test_diamond_is_trained_and_loaded():
    root, out = make_rt1([10] * 8), folder()
    code, output = run_command(train_diamond.main, "--data", "rt1", "--root", root, "--out", out,
                               "--minutes", 0.02, "--batch", 2, "--workers", 0)
    assert code == 0 and "7.2 M parameters" in output, output
    network = train_diamond.load_diamond(out / "checkpoint.pt")
    world = diamond.DiamondWorld(network, diamond.STEPS["hq"])
    frames, actions = (each[None] for each in make_episode(8, seed=0))
    frames = np.stack([fit_frames(frames[0], *network.config.size)])
    world.reset(frames[:, :4], actions[:, :3])
    assert world.step(actions[:, 3]).shape == frames[:, 0].shape
    with raises(CheckpointError, "is not a checkpoint of baselines/train_diamond.py"):
        train_diamond.load_diamond(TINY_WORLD)


def test_places_in_the_hall_are_compared_across_the_turn_of_a_circle():
    distance, turned = game.apart(np.array([[3.0, 4.0, -170.0]]), np.array([[0.0, 0.0, 170.0]]))
    assert distance.tolist() == [5] and turned.tolist() == [20]
    assert game.apart(np.array([0, 0, 90.0]), np.array([0, 0, 350.0]))[1] == 100


def test_a_pose_reader_learns_and_is_kept():
    episodes = open_episodes("csgo", SAMPLES, "train").select(np.arange(6))
    reader = game.open_reader(path := folder() / "reader.pt", episodes, steps=60)
    frames = np.concatenate([episodes[i].frames for i in range(6)])
    poses = np.concatenate([episodes[i].feature(game.POSE) for i in range(6)])
    distance, turned = game.apart(game.read_poses(reader, frames), poses)
    _, chance = game.apart(poses, np.roll(poses, 16, axis=0))
    assert np.median(abs(turned)) < np.median(abs(chance)) / 2, np.median(abs(turned))
    again = game.open_reader(path, episodes, steps=0)
    assert np.array_equal(again.read(frames), reader.read(frames))
    other = game.open_reader(path, episodes, steps=0, source="another hall")
    assert not np.array_equal(other.read(frames), reader.read(frames))


def test_a_game_is_measured_against_diamond_and_standing_still():
    config = replace(DIAMOND, action_dim=51, size=(64, 80))
    save(path := folder() / "diamond.pt", {"diamond": asdict(config),
                                           "weights": diamond.Diamond(config).state_dict()})
    words = ["--episodes", 2, "--steps", 1, "--reader-steps", 2, "--out", path.parent]
    code, said = run_command(game.main, *words, "--quick", "--diamond", path)
    result = json.loads((path.parent / "result.json").read_text(encoding="utf-8"))["short"]
    assert code == 0 and list(result) == ["repeating", "DIAMOND, fast", "DIAMOND, hq", "Vid2World"]
    assert result["repeating"][0]["frames above repeating"] == 0 and "12 frames of recorded" in said
    starts = game.InitialStates(np.zeros((2, 16, 64, 80, 3), np.uint8), np.zeros((2, 16, 51)), None)
    clips = game.rollout_action(game.RepeatLastFrame(), starts, batch=1,
                                action=csgo_action(["w"]), new=20)
    assert clips.shape == (2, 24, 64, 80, 3)  # longer than the episode
    refused(game.main, *words, "--frames", 500, saying="the longest has 104")


def test_a_players_place_is_compared_with_where_they_are_and_right_is_right():
    class Turning(game.RepeatLastFrame):  # a world in which a picture's number is a direction
        def step(self, action):
            x = csgo.MOUSE_X[action[0, csgo.FIRST_X : csgo.FIRST_Y].argmax()]
            self.frame = (self.frame.astype(int) - x // 20).astype(np.uint8)
            self.frame[..., 1] += np.uint8(2 * action[0, 0])  # "w" goes on by two units
            return self.frame

    class Reader:  # of such pictures: at the origin, looking where the number says
        def read(self, frames):
            angle = np.radians(frames[..., 0, 0, 0].astype(float))
            ahead = frames[..., 0, 0, 1] / game.UNITS
            return np.stack([ahead, 0 * ahead, np.cos(angle), np.sin(angle)], axis=-1)

    frames = np.zeros((2, 16, 64, 80, 3), np.uint8) + np.arange(
        90, 106, dtype=np.uint8)[:, None, None, None]
    frames[..., 1] = 0
    poses = np.zeros((2, 16, 3))
    poses[:, -1] = 3, 4, 100
    starts = game.InitialStates(frames, np.zeros((2, 16, 51)), poses)
    still = game.follow(game.RepeatLastFrame(), starts, Reader(), 2, game.SHORT)
    assert still["units off"] == 5 and abs(still["degrees off"] - 7) < 1e-3  # 93 and not 100
    assert still["frames above repeating"] == 0
    # twelve frames of 60 counts: 36 degrees, to the right clockwise
    turned = game.follow_repeated(Turning(), starts, Reader(), 2)
    assert turned["right turns right, %"] == turned["left turns left, %"] == 100
    assert abs(turned["degrees of 36"] - 36) < 1e-3
    assert abs(turned["units in 6 frames ahead"] - 12) < 1e-3
    assert abs(turned["after 18"] - 12) < 1e-3


def test_a_drift_of_colour_and_sharpness_is_measured():
    grey = np.full((3, 8, 8, 3), 100, np.uint8)
    grey[1] += 10
    grey[2, ::2] += 20
    assert np.allclose(metrics.colour_shift(grey, grey[:1]), [0, 300**0.5, 300**0.5])
    assert np.allclose(metrics.sharpness(grey), [0, 0, 10])
    code, said = run_command(evaluate.main, "--data", "csgo", "--episodes", 2, "--frames", 9,
                             "--steps", 1, "--out", out := folder())
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    rows = result["by_frame"]
    assert abs(result["result"]["psnr"] - np.mean(rows["psnr"])) < 1e-9
    assert code == 0 and len(rows["psnr"]) == 5 and "| 8 |" in said and "of what happened" in said
    frames = np.stack([episode.read(0, 9)[0] for episode in open_episodes(
        "csgo", SAMPLES, "val", 9).select(np.arange(2))])
    new, given = frames[:, 4:], frames[:, 3:4]
    for name, values in (("psnr of repeating", metrics.psnr(given, new)),
                         ("true colour shift", metrics.colour_shift(new, given)),
                         ("true sharpness", metrics.sharpness(new))):
        assert np.allclose(rows[name], values.mean(axis=0)), name
    assert (out / "sharpness.png").exists() and (out / "colour_shift.png").exists()


def test_rank_violations_are_those_of_the_published_example():
    true = np.array([0, 0.889, 0.926, 0.741, 0.630, 0.519])  # SIMPLER's drawer, six policies
    imagined = np.array([0.278, 0.667, 0.861, 0.891, 0.343, 0.444])
    assert round(policies.pearson(true, imagined), 3) == 0.771
    assert round(policies.mmrv(true, imagined), 3) == 0.123
    assert policies.mmrv(true, true) == 0 and np.isnan(policies.pearson(true, 0 * true))
    tied = policies.mmrv(np.array([0, 0, 1]), np.ones(3))  # as SIMPLER's code counts
    assert abs(tied - 1 / 3) < 1e-9
    outcomes = {"a": np.arange(50) < 5, "b": np.arange(50) < 40, "c": np.arange(50) < 50}
    cells = policies.compare("a world", outcomes, outcomes, folder()).split(" | ")
    assert cells[1:] == ["1.00 (1.00 to 1.00)", "0.00 (0.00 to 0.00)", "0 (0 to 0) |"], cells
    fewer = outcomes | {"b": np.arange(50) < 30}  # and so 20 points off, give or take ten
    off = policies.compare("a world", fewer, outcomes, folder()).split(" | ")[3]
    assert re.fullmatch(r"20 \((8|10|12) to (28|30|32)\) \|", off), off


def test_a_policy_acts_on_what_it_is_shown_and_shuffled_worlds_get_anothers_action():
    class Counter:  # a world whose frames count up by the action
        def reset(self, frames):
            self.frames = frames[:, -1]

        def step(self, actions):
            self.frames = self.frames + actions.astype(np.uint8)[:, :, None, None]
            return self.frames

    starts = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1)
    for shuffled in (False, True):
        videos = policies.rollout_policy(Counter(), lambda frames: 2 ** frames[:, :, 0, 0] % 3 + 1,
                                   starts, shuffled, horizon=1)
        assert videos.shape == (3, 2, 1, 1, 1)
        moved = (videos[:, 1] - starts).ravel()
        assert np.array_equal(moved, np.roll([2, 3, 2], 1) if shuffled else [2, 3, 2])
    videos = policies.rollout_policy(Counter(), lambda frames: frames[:, :, 0, 0] + 1, starts,
                                     horizon=3)
    assert videos.reshape(3, 4).tolist() == [[0, 1, 3, 7], [1, 3, 7, 15], [2, 5, 11, 23]]
    assert policies.policy_action(np.array([[2.0, -0.5, 0, 1]])).tolist() == [
        [0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, -0.5, 0]]


def test_policies_are_judged_by_the_verifier():
    out = folder()
    shutil.copy(TINY_BASE, out)
    world = shutil.copy(TINY_WORLD, out)
    options = ["--starts", 3, "--horizon", 2, "--steps", 1, "--out", out, "--checkpoint", world]
    code, said = run_command(policies.main, *options, "--controls")
    assert code == 0 and said.count("| untrained | 0 % |") == 3, said
    again = AssertionError("rolled out")
    with mock.patch.object(policies, "rollout_policy", side_effect=again):  # all is known
        assert run_command(policies.main, *options, "--controls")[0] == 0
        os.utime(world, (0, 0))  # it has learned on: nothing is known of it
        with raises(AssertionError, "rolled out"):
            run_command(policies.main, *options)
    assert (out / "agreement.md").read_text(encoding="utf-8").count("Vid2World") == 1


def test_a_policy_and_a_verdict_of_your_own_are_compared_with_what_happened():
    out = folder()
    (out / "mine.py").write_text("""
import numpy as np
def forward(frames):  # brighter pictures, faster
    return np.full((len(frames), 13), 0.1, np.float32)
def back(frames):
    return -forward(frames)
def bright(videos):
    return videos[:, -1].mean(axis=(1, 2, 3)) > videos[:, 0].mean(axis=(1, 2, 3))
""", encoding="utf-8")
    truth = out / "outcomes.csv"
    truth.write_text("policy,start,success\n" + "".join(
        f"{name},{i},{int(name == 'forward')}\n" for name in ("forward", "back", "other")
        for i in range(4)), encoding="utf-8")

    class Brighter:  # a world in which the action is light
        sampling, model = "as it is", load_model(TINY_WORLD)

        def reset(self, frames):
            self.frames = frames[:, -1]

        def step(self, actions):
            change = np.sign(actions[:, :1, None, None])
            self.frames = (self.frames.astype(int) + change).clip(0, 255).astype(np.uint8)
            return self.frames

    words = ["--policy", "mine:forward", "mine:back", "--starts", 4, "--horizon", 2, "--out", out]
    here = os.getcwd()
    os.chdir(out)
    try:
        with (mock.patch.object(policies, "load_world", lambda path: Brighter),
              mock.patch.object(policies, "WorldModel", lambda *_, **__: Brighter())):
            code, said = run_command(policies.main, *words, "--verifier", "mine:bright", "--truth",
                                     truth)
            assert code == 0 and "| as it is | 1.00 (" in said.replace("Vid2World, ", ""), said
            assert "| forward | 100 % | 51–100 | 100 % |" in said and "| back | 0 % |" in said
            for last, saying in (([], "--verifier: see"), (["--verifier", "mine:none"], "imported"),
                                 (["--verifier", truth], "no TorchScript file .* no module:func")):
                refused(policies.main, *words, *last, saying=saying)
            words += ["--verifier", "mine:bright", "--truth", truth]
            refused(policies.main, *words, "--starts", 5, saying="how forward fared from start 4")
            truth.write_text("policy,start,success\nback,0,1\n", encoding="utf-8")
            refused(policies.main, *words, "--starts", 1, saying="says nothing of forward")
    finally:
        os.chdir(here)


class Sliding:
    """A world whose frames are numbers, from which an action along x takes away a tenth of it."""

    def reset(self, frames, actions):
        assert frames.shape[1] == actions.shape[1] + 1
        self.frame = frames[:, -1]

    def step(self, action):
        self.frame = self.frame - action[:, 10, None, None, None] / 10
        return self.frame


def sliding_planner() -> tuple[planning.Planner, planning.Start]:
    """Of a policy that does nothing, and a start that the same world stands in for."""
    planner, start = planning.Planner.__new__(planning.Planner), planning.Start.__new__(
        planning.Start)
    planner.settings = planning.Settings(proposals=64, horizon=5, execute=3, out=str(folder()))
    planner.world, planner.doubtful = Sliding(), Sliding()
    planner.policy = SimpleNamespace(read=lambda frames: np.zeros((len(frames), 4)))
    planner.verifier = SimpleNamespace(opening=lambda frames: frames[..., 0, 0, 0])
    start.planner, start.frames, start.actions = planner, [np.full((2, 2, 3), 0.9)], []
    start.step = lambda action: start.frames[-1] - action[0] / 10
    start.opening = lambda: start.frames[-1][0, 0, 0]
    start.simulator = SimpleNamespace(state=lambda: None, restore=lambda state: None)
    return planner, start


def test_a_plan_is_the_best_of_its_proposals_where_its_world_says_so():
    planner, start = sliding_planner()
    chosen = {method: planner.decide(method, start, np.random.default_rng(0))
              for method in planning.METHODS}
    random = np.random.default_rng(0)
    noise = np.stack([0.5 * planning.smooth_noise(random, (5, 4), 0.8) for _ in range(64)])
    moved = noise.clip(-1, 1)[..., 0].sum(axis=1)
    assert not chosen["policy alone"].any() and np.array_equal(chosen["random"], noise[0])
    for method in ("world", "simulator"):
        assert np.array_equal(chosen[method], noise[moved.argmax()]), method
    assert np.array_equal(chosen["shuffled"], noise[np.roll(moved, 1).argmax()])
    assert chosen["CEM"].clip(-1, 1)[:, 0].sum() > moved.max() + 0.2
    assert start.actions == [] and len(start.frames) == 1  # what was tried is undone


def test_a_plan_is_followed_and_its_world_is_told_what_was_seen():
    planner, start = sliding_planner()
    with mock.patch.object(planning, "save_gif") as saved:
        result = planning.attempt(planner, "world", start, seed=0)
    assert len(start.actions) == planning.HORIZON and result["begun"] == 0.9
    assert abs(result["real"] - result["imagined"]) < 1e-6  # of a world that is the real one
    assert result["real"] < 0.9 and result["doubt"] == 0
    path, columns = saved.call_args.args
    assert path.name == "closed_0.gif"
    assert np.allclose(columns["what was imagined"], columns["what happened"])
    world = planning.SharedNoise(load_model(TINY_WORLD), guidance=1.0)
    noise = world.noise(3, 2)
    assert noise.shape[:2] == (3, 2) and torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0, 0], noise[0, 1])


def test_planning_without_a_simulator_runs_its_imagined_half():
    out = folder()
    words = ["--starts", 1, "--proposals", 4, "--steps", 1, "--horizon", 2, "--execute", 2, "--out",
             out, "--methods"]
    missing = RequestError("recording needs the simulator")
    with (mock.patch.object(planning, "Simulator", side_effect=missing),
          mock.patch.object(planning, "HORIZON", 4)):
        code, said = run_command(planning.main, *words, "world", "simulator")
        assert code == 0 and "another seed of the world stands in" in said, said
        assert "| world | " in said and "| simulator | " not in said and (
            out / "planning.md").exists(), said
        refused(planning.main, *words, "simulator", saying="needs the simulator")


def test_a_success_classifier_learns_from_labelled_episodes():
    out, root = folder(), make_pictures([4] * 40)
    rows, names = ["episode,success"], sorted(path.name for path in root.iterdir() if path.is_dir())
    for i, name in enumerate(names):  # a bright end is a success
        last = sorted((root / name).glob("*.png"))[-1]
        light = 40 if i % 2 else 200
        Image.fromarray(np.full((48, 64, 3), light, np.uint8)).save(last)
        rows.append(f"{name},{1 - i % 2}")
    labels = out / "labels.csv"
    labels.write_text("\n".join(rows), encoding="utf-8")
    words = [labels, "--root", root, "--steps", 40, "--out", out / "verdict.pt"]
    code, said = run_command(train_verifier.main, *words)
    assert code == 0 and "right about 8 of 8" in said, said
    verifier = policies.load_verifier(str(out / "verdict.pt"))
    videos = np.zeros((2, 3, 24, 32, 3), np.uint8)
    videos[1, -1] = 200
    assert verifier(videos).tolist() == [False, True]
    labels.write_text("episode,success\nnobody,1\n", encoding="utf-8")
    refused(train_verifier.main, *words, saying="has 'nobody', and there is no such episode")
    labels.write_text("\n".join(rows[:9]), encoding="utf-8")
    refused(train_verifier.main, *words, saying="4 successes among 8 episodes")


def test_success_is_that_of_the_last_frame():
    settings = policies.Settings(checkpoint=str(TINY_WORLD), out=str(folder()), horizon=8, batch=2)
    starts = np.zeros((2, 2, 2, 3), np.uint8)
    closing = np.zeros((2, 9, 2, 2, 3), np.uint8)
    closing[0, :-1] += 100  # closes at the end
    closing[1, 1:] += 100  # was closed at the beginning
    network = SimpleNamespace(read=lambda frames: frames[..., 0, 0, :1] / 100 / policies.UNIT)
    verifier = policies.SuccessClassifier(network)
    with mock.patch.object(policies, "rollout_policy", return_value=closing):
        trial = policies.Trial("a world", lambda: None)
        assert policies.successes(trial, "a policy", None, verifier, starts, settings
                                  ).tolist() == [True, False]
    frames, true = policies.read_starts(policies.Settings(), None)
    content = np.load(policies.STARTS)
    for name in policies.MARKS:  # the simulator's verdict as well
        assert np.array_equal(true[name], content[name][:, -1] < 0.02)
        assert not np.array_equal(true["4000 steps"], content["4000 steps"][:, 0] < 0.02)


def test_contact_is_read_off_openings():
    starts = np.load(policies.STARTS)["frames"][:2]
    with mock.patch.object(policies, "rollout_batch", lambda world, *_, batch: np.repeat(
            starts[:, None], 41, axis=1)):
        code, said = run_command(policies.main, "--replay", "--starts", 2, "--out", out := folder())
    assert code == 0 and "| all | " in said and (out / "contact.png").exists(), said
    true = np.array([[0.1, 0.1], [0.1, 0.02], [0.1, 0.1]])
    imagined = np.array([[0.1, 0.05], [0.1, 0.04], [0.1, 0.1]])
    # one of three drawers moves, and does so in the model; so does one of the two others
    assert policies.describe(true, imagined) == "1 of 3 | 100 % | 50 % | 20 | -10"
    assert policies.describe(true[1:2], true[1:2]) == "1 of 1 | 100 % | – | 0 | +0"


def clip_baselines() -> tuple[np.ndarray, np.ndarray, Model, dict[str, tuple]]:
    """A clip's first frame and actions, the passive base, and each baseline's recipe and model."""
    settings = train.parse_arguments(["--data", "rt1"])
    episodes = open_episodes("rt1", SAMPLES, "val")
    frames, actions = episodes[0].read(0, 4)
    recipes = {"action": action_finetuning.RECIPE, "controlnet": controlnet.RECIPE,
               "avid": avid.RECIPE,
               "classifier": classifier_guidance.RECIPE, "language": language_finetuning.recipe()}
    built = {name: (recipe, recipe.build(settings, episodes.dataset))
             for name, recipe in recipes.items()}
    return frames[None], actions[None, :3], clips.base_of(settings, episodes.dataset), built


def test_baselines_start_exactly_as_the_base_and_follow_actions_once_they_have_learned():
    frames, actions, base, built = clip_baselines()
    as_base = clips.sample_clips(base, frames, actions, steps=2)
    nothing = np.zeros((1, 3, 4), np.float32)  # the empty caption
    for name, told in (("controlnet", actions), ("classifier", actions), ("language", nothing)):
        imagined = clips.sample_clips(built[name][1], frames, told, steps=2)
        assert np.array_equal(imagined, as_base), name
    steer = classifier_guidance.towards_actions(built["classifier"][1], weight=1.0)
    steered = clips.sample_clips(built["classifier"][1], frames, actions, steps=4, steer=steer)
    unsteered = clips.sample_clips(base, frames, actions, steps=4)
    assert not np.array_equal(steered, unsteered)
    for layer in built["controlnet"][1].unet.copy.zero_convs:
        nn.init.normal_(layer.weight, std=0.1)
    for parameter in built["avid"][1].unet.adapter.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for name in ("action", "avid", "controlnet"):
        one, other = (clips.sample_clips(built[name][1], frames, sign * actions, steps=2)
                      for sign in (1, -1))
        assert not np.array_equal(one, other), name
    refused_frames = np.zeros((1, 20, 13), np.float32)
    with raises(RequestError, "21 frames do not fit into one clip of 16"):
        clips.sample_clips(base, frames, refused_frames)


def test_clips_are_sampled_under_the_actions_that_led_to_their_frames():
    frames, actions, _, built = clip_baselines()
    model, told = built["action"][1], []
    denoise = model.denoise
    model.denoise = lambda *asked: (told.append(asked[4]), denoise(*asked))[1]
    imagined = clips.sample_clips(model, frames, actions, steps=2)
    wanted = np.concatenate([np.zeros_like(actions[:, :1]), actions], axis=1)
    assert len(told) == 2 and all(np.allclose(led_to, wanted, atol=1e-6) for led_to in told)
    assert np.array_equal(imagined[:, 0], frames[:, 0])
    assert not np.array_equal(imagined[:, 1], frames[:, 1])


def test_a_perfect_classifier_pulls_the_clip_to_the_action():
    schedule, target = NoiseSchedule(), torch.randn(1, 3, 1, 2, 2)
    # log p = -|x - target|² / 2, whose gradient is target - x
    model = SimpleNamespace(schedule=schedule, log_likelihood=lambda x, *_: -(
        x - target).square() / 2)
    steer = classifier_guidance.towards_actions(model, weight=0.3)
    follow = steer(lambda x, k: torch.zeros_like(x), None, None, None)
    x = torch.randn(1, 3, 1, 2, 2)
    for level in (100, 400, 700):
        k = torch.full((1, 3), level)
        alpha = schedule.alphas_cumprod[level]
        wanted = -0.3 * ((1 - alpha) / alpha).sqrt() * (target - x)
        assert torch.allclose(follow(x, k), wanted, atol=1e-5)
        # and what the velocity stands for is nearer to it
        ends = [schedule.ddim_step(x, v, k, level - 100, eta=0.0)
                for v in (torch.zeros_like(x), follow(x, k))]
        assert (ends[1] - target).norm() < (ends[0] - target).norm()
    assert not follow(x, torch.full((1, 3), 999)).any()  # noise alone is not corrected
    actions = torch.tensor([[[-0.5], [0.1], [0.5]]])  # the last leads out of the clip
    assert classifier_guidance.bins_of(actions).tolist() == [[[0], [1]]]


def test_a_classifier_learns_on_noisy_latents():
    asked, schedule = [], NoiseSchedule()
    frames, actions = torch.zeros(2, 3, 4, 4, 3, dtype=torch.uint8), torch.randn(2, 3, 2)
    latents, noise = torch.randn(2, 2, 3, 1, 2, 2)

    def log_likelihood(*inputs):
        asked.append(inputs)
        return torch.tensor([-1.0, -3.0])

    model = SimpleNamespace(schedule=schedule, encode=lambda pixels, noise: latents,
                            image_tokens=lambda anchor: None, context=lambda tokens, slots: None,
                            log_likelihood=log_likelihood)
    k = torch.tensor([[0, 300, 999], [50, 500, 700]])
    loss = classifier_guidance.ClassifierTraining(model, False)(
        frames, actions, {"k": k, "noise": noise, "posterior": noise})
    x, levels, anchor, _, told = asked[0]
    assert loss == 2 and torch.equal(x, schedule.add_noise(latents, k, noise))
    assert torch.equal(levels, k) and torch.equal(anchor, latents[:, :1]) and told is actions


def test_what_the_copy_makes_is_added_to_the_skips_and_to_the_middle():
    _, _, base, built = clip_baselines()
    model = built["controlnet"][1].eval()
    x, k = torch.randn(1, 2, 8, 16, 20), torch.full((1, 2), 500)
    text, image = torch.zeros(1, 1, 64), torch.randn(1, 2, 4, 64)
    block = base.unet.eval().output_blocks[0][0]  # reads the middle and the last skip connection
    middle, skip = (conv.out_channels for conv in (model.unet.copy.zero_convs[-1],
                                                   model.unet.copy.zero_convs[-2]))
    for conv, change in ((model.unet.copy.zero_convs[-1], slice(0, middle)),
                         (model.unet.copy.zero_convs[-2], slice(middle, middle + skip))):
        nn.init.constant_(conv.bias, 0.3)
        def add(_, inputs, change=change):
            h = inputs[0].clone()
            h[:, change] += 0.3
            return h, *inputs[1:]
        hook = block.register_forward_pre_hook(add)
        with torch.no_grad():
            ours, theirs = model.unet(x, k, text, image), base.unet(x, k, text, image)
        assert error_of(ours, theirs) < 1e-5
        hook.remove()
        nn.init.zeros_(conv.bias)


def test_an_adapter_is_believed_where_its_mask_says_so():
    _, _, base, built = clip_baselines()
    unet, passive = built["avid"][1].eval().unet, base.unet.eval()
    x, k, actions = torch.randn(1, 2, 8, 16, 20), torch.full((1, 2), 500), torch.randn(1, 2, 13)
    text, image, seen = torch.zeros(1, 1, 64), torch.randn(1, 2, 4, 64), []
    unet.adapter.input_blocks[0][0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    last = unet.adapter.out[-1]
    with torch.no_grad():
        theirs = passive(x, k, text, image)
        ours = unet(x, k, text, image, actions=actions)
        answer = 2 * ours - theirs  # the mask begins at a half
        assert answer.std() > 0.05 and error_of(seen[0][0][:, 8:], theirs[0]) < 1e-5
        for logit, wanted in ((20.0, theirs), (-20.0, answer)):
            last.bias[4] = logit
            assert error_of(unet(x, k, text, image, actions=actions), wanted) < 1e-5


def test_gradients_reach_what_a_baseline_trains_and_nothing_else():
    _, _, base, built = clip_baselines()
    episodes = open_episodes("rt1", SAMPLES, "train")
    batch, said = (collate([Clips(each, 4, (64, 80), seed=0)[0]]) for each in (
        episodes, language_finetuning.CaptionedEpisodes(episodes)))
    settings = replace(train.parse_arguments(["--data", "rt1"]), shared_level=True,
                       action_dropout=0.0)
    learns = {"action": ("unet.", "resampler."), "controlnet": ("unet.copy.",),
              "avid": ("unet.adapter.",), "classifier": ("unet.classifier.",),
              "language": ("unet.", "resampler.", "words.")}
    for name, (recipe, model) in built.items():
        loss = (recipe.loss or train.PostTraining)(model, False)
        train.batch_loss(loss, model, said if name == "language" else batch, settings).backward()
        reached = {key for key, p in model.named_parameters() if p.grad is not None}
        wanted = {key for key, p in model.named_parameters() if p.requires_grad}
        assert reached <= wanted and all(key.startswith(learns[name]) for key in wanted), name
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
        if name in ("avid", "controlnet", "classifier"):  # every weight of the base is untouched
            theirs = dict(base.unet.named_parameters())
            assert all(torch.equal(p, theirs[key]) for key, p in model.unet.named_parameters()
                       if key in theirs), name


def test_a_saved_baseline_gives_the_same_samples():
    frames, actions, _, built = clip_baselines()
    for name, (recipe, model) in built.items():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.01
        out = folder()
        save(out / "frozen.pt", {"weights": frozen_weights(model)})
        save(out / "checkpoint.pt", {"config": asdict(model.config), "frozen": "frozen.pt",
                                     "weights": trained_weights(model), "step": 0})
        again = load_model(out, kind=recipe.model_class)
        told = np.ones((1, 3, 4), np.float32) if name == "language" else actions
        # PyTorch multiplies matrices in another way, and rounds differently, if they may learn.
        ours, theirs = (clips.sample_clips(each.requires_grad_(False), frames, told, steps=2)
                        for each in (model, again))
        assert np.array_equal(ours, theirs), name


def test_a_baseline_is_trained_by_the_loop_of_train_py():
    out = folder() / "run"
    words = ["--data", "rt1", "--root", SAMPLES, "--out", out, "--steps", 1, "--batch", 1,
             "--frames", 4, "--workers", 0, "--set", "val_clips=1"]
    code, said = run_command(controlnet.main, *words)
    assert code == 0 and "done at step 1" in said, said
    begun = read_settings(out)  # one level a clip, and no action hidden
    assert begun["shared_level"] is True and begun["action_dropout"] == 0
    code, said = run_command(controlnet.main, *words[:6], "--resume", "--steps", 2)
    assert code == 0 and "resuming" in said and "done at step 2" in said, said
    refused(controlnet.main, *words, "--overwrite", "--scratch", "--passive",
            saying="starts from a passive model")


def test_captions_say_what_the_arm_did_and_reach_the_network():
    motion = np.zeros((8, 13), np.float32)
    motion[:, 10], motion[:, 12], motion[:, 3] = 0.5, -0.3, 1
    assert language_finetuning.describe_motion(motion) == ["right", "down", "closes"]
    assert language_finetuning.word_numbers(["right"]).tolist() == [2, 0, 0, 0]
    frames, _, base, built = clip_baselines()
    model = built["language"][1]
    nn.init.normal_(model.words.weight)
    told = (np.tile(language_finetuning.word_numbers([word]), (1, 3, 1))
            for word in ("left", "right"))
    left, right = (clips.sample_clips(model, frames, caption, steps=2) for caption in told)
    assert not np.array_equal(left, right)
    both = np.stack([language_finetuning.word_numbers([word]) for word in ("left", "right")])
    x, k = torch.randn(2, 3, *model.latent_shape), torch.full((2, 3), 500)
    captions, tokens = torch.from_numpy(both)[:, None].expand(2, 3, 4), torch.randn(2, 64, 64)
    with torch.no_grad():
        together, *apart = (model.denoise(x[i], k[i], x[i][:, :1],
                                          model.context(tokens[i], range(3)), captions[i])
                            for i in (slice(0, 2), slice(0, 1), slice(1, 2)))
    assert torch.allclose(together, torch.cat(apart), atol=4e-6)  # each clip hears its own
    root = folder()
    write_records(root / "fractal20220817_data-val.tfrecord-00000-of-00001", [encode_example({
        "steps/observation/image": [encode_jpeg(np.zeros((8, 8, 3), np.uint8))] * 2,
        language_finetuning.INSTRUCTION: [b"open middle drawer"] * 2,
        **{name: np.zeros((2, width), np.float32) for name, width in DATA_SETS["rt1"].actions}})])
    episodes = open_episodes("rt1", root)
    assert episodes[0].text(language_finetuning.INSTRUCTION) == "open middle drawer"
    spoken = language_finetuning.CaptionedEpisodes(
        episodes, tokenizer=lambda caption: np.array([len(caption)]))
    expected = len("Robot arm performs the task: open middle drawer")
    assert spoken[0].read(0, 2)[1].tolist() == [[expected]] * 2
    with raises(DataError, "no feature 'nothing'"):
        episodes[0].text("nothing")


def test_captions_at_full_size_are_clips_tokens():
    clip = mock.Mock(tokenize=lambda texts, context_length: torch.arange(context_length)[None])
    with mock.patch.dict(sys.modules, {"open_clip": clip}):
        assert language_finetuning.clip_tokens("open").tolist() == list(range(77))
    with mock.patch.dict(sys.modules, {"open_clip": None}):
        with raises(RequestError, "pip install open_clip_torch"):
            language_finetuning.clip_tokens("open")


def test_memory_is_counted_as_it_is():
    """Against arithmetic, and against what a real step leaves alive."""
    tiny = PRESETS["tiny"]
    config = replace(tiny, size=(32, 32), resampler=replace(tiny.resampler, num_frames=4),
                     unet=replace(tiny.unet, channel_mult=(1, 2), num_frames=4))
    half, peak = plan.count(lambda: torch.nn.Linear(1000, 1000, bias=False), lambda layer: layer(
        torch.zeros(500, 1000)).sum().backward())
    assert abs(half - 4e-3) < 1e-5  # 1000² weights
    assert 9.9e-3 < peak < 14.1e-3  # weights 4, their gradient 4, in 2, out 2 and its gradient 2
    weights, keeping = plan.count(lambda: plan.build_model(config),
                                  lambda model: plan.train_step(model, 8, checkpointing=False))
    _, recomputing = plan.count(lambda: plan.build_model(config),
                                lambda model: plan.train_step(model, 8, checkpointing=True))
    _, sampling = plan.count(lambda: plan.build_model(config), partial(plan.sample_frame, given=3))
    assert weights < sampling < recomputing < keeping
    model = plan.build_model(config)
    total = sum(tensor.numel() * tensor.element_size()
                for tensor in [*model.parameters(), *model.buffers()])
    assert abs(weights - total / 1e9) < 1e-5
    assert recomputing > 4 * weights * 0.8  # weights, gradients, two moments of what learns
    _, temporal = plan.count(lambda: plan.build_model(config),
                             lambda model: plan.train_step(model, 8, trainable="temporal"))
    assert temporal < recomputing


def test_frozen_parts_may_be_halved_and_frames_coded_one_by_one():
    root, out = make_rt1([8] * 6), folder() / "run"
    words = ["--bf16", "--base", TINY_BASE]
    with mock.patch.object(train, "math_attention_on_cpu") as quick:
        assert run_command(train.main, *train_words(root, out, 2, 1), *words)[0] == 0
    # and the loop learns with quick attention
    quick.assert_called_once_with(torch.device("cpu"), True, True)
    quick.return_value.__enter__.assert_called_once()
    weights = read_checkpoint(out / "frozen.pt")["weights"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert (out / "step_0000002.png").exists() or (out / "step_0000000.png").exists()
    model = load_model(out)
    frames = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    together = model.encode(frames), model.decode(model.encode(frames))
    with mock.patch.object(autoencoder, "AT_ONCE", 1):
        latents = model.encode(frames)
        assert error_of(latents, together[0]) < 2e-6
        assert error_of(model.decode(latents), together[1]) < 6e-6
    model.autoencoder.requires_grad_(False)
    frozen_to_bf16(model)
    assert {part: next(getattr(model, part).parameters()).dtype for part in (
        "autoencoder", "image_tower", "unet")} == {
        "autoencoder": torch.bfloat16, "image_tower": torch.float32, "unet": torch.float32}


def test_the_best_device_is_found_and_a_mac_is_told_once():
    choose = device.best_device.__wrapped__
    with (mock.patch("torch.cuda.is_available", return_value=False),
          mock.patch("torch.backends.mps.is_available", return_value=True)):
        with mock.patch.dict(os.environ, {device.FALLBACK: "1"}):
            assert choose() == "mps"
        with mock.patch.dict(os.environ), mock.patch("builtins.print") as said:
            os.environ.pop(device.FALLBACK, None)
            assert choose() == "cpu" and device.FALLBACK in said.call_args[0][0]
    with mock.patch("torch.cuda.is_available", return_value=True):
        assert choose() == "cuda" and train.parse_arguments([]).bf16 is True


def test_training_computes_in_bfloat16_where_the_cpu_has_units_for_it():
    for avx512, amx in ((False, False), (True, False), (False, True)):
        with (mock.patch("torch.cuda.is_available", return_value=False),
              mock.patch("torch.cpu._is_avx512_bf16_supported", return_value=avx512, create=True),
              mock.patch("torch.cpu._is_amx_tile_supported", return_value=amx, create=True)):
            assert train.parse_arguments([]).bf16 is (avx512 or amx)
            assert train.parse_arguments(["--no-bf16"]).bf16 is False


def test_a_small_network_learns_in_bfloat16_with_attention_written_out():
    def learn(*choice: bool) -> tuple[Tensor, bool]:
        """Gradients, and whether the fused kernel made them."""
        generator = torch.Generator().manual_seed(0)
        heads = torch.randn(3, 2, 4, 20, 16, generator=generator).bfloat16().requires_grad_()
        quick = device.math_attention_on_cpu(torch.device("cpu"), *choice)
        with quick, torch.profiler.profile() as seen:
            nn.functional.scaled_dot_product_attention(*heads).square().sum().backward()
        return heads.grad, any("flash" in event.name for event in seen.events())

    (written_out, fused), (plain, plain_fused) = learn(True, True), learn(True, False)
    assert plain_fused and not fused and learn(False, True)[1]
    assert error_of(written_out.float(), plain.float()) < 2e-2


def test_he_initialisation_maps_actions_to_the_size_of_the_noise_level():
    torch.manual_seed(0)
    dataset = DATA_SETS["rt1"]
    sizes = {}
    for words in ([], ["--set", "action_init=pytorch"], ["--base", str(TINY_WORLD)]):
        settings = train.parse_arguments(["--data", "rt1", *words])
        other = replace(dataset, actions=dataset.actions[:1])  # of another width
        unet = train.build_model(settings, other).unet
        actions = torch.randn(500, other.action_dim)
        noise = unet.time_embed(sinusoidal_embedding(torch.arange(0, 1000, 20), 64)).std(dim=0)
        sizes[words[-1] if words else ""] = (unet.action_emb_proj(actions).std(dim=0).mean()
                                             / noise.mean()).item()
    weight = action_embedding(500, 64, "he")[0].weight
    assert abs(weight.std() * (500 / 2)**0.5 - 1) < 0.02  # He: the deviation is √(2 / inputs)
    small = sizes.pop("action_init=pytorch")
    assert small < 0.2 and all(0.5 < size < 4 for size in sizes.values()), (small, sizes)


class NoDoubles(TorchDispatchMode):
    """Refuses what Apple's GPUs refuse: numbers of 64 bits that are no integers."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            assert not isinstance(tensor, Tensor) or tensor.dtype != torch.float64, func
        return result


def test_nothing_needs_doubles_that_a_mac_lacks():
    world = small_world(guidance=2.0, eta=1.0)
    frames, actions = small_episode(4)
    model, settings = world.model, Settings(batch=1)
    batch = {"frames": torch.from_numpy(frames[None]), "actions": torch.from_numpy(actions[None]),
             "index": [0]}
    with NoDoubles():
        world.reset(frames[:2], actions[:1])
        world.step(actions[1])
        train.batch_loss(train.PostTraining(model, False, "clean"), model, batch,
                         settings).backward()


def test_a_large_checkpoint_is_written_in_pieces_and_read():
    shapes = {name: tuple(w.shape) for name, w in read_lightning(small_checkpoint()).items()}
    keys, path = folder() / "keys.tsv", folder() / "model.safetensors"
    keys.write_text("\n".join(f"{name}\t{','.join(map(str, shape))}"
                              for name, shape in shapes.items()), encoding="utf-8")
    with mock.patch.object(full_size, "KEYS", keys):
        assert run_command(lambda words: full_size.write(path))[0] is None
    weights = read_lightning(path)
    assert {name: tuple(w.shape) for name, w in weights.items()} == shapes
    wide = weights["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"].float()
    assert 0.8 < wide.std() * wide[0].numel() ** 0.5 < 1.2


def test_the_ways_to_steer_are_compared():
    words = ["--seeds", 1, "--steps", 10, "--cooldown", 5, "--episodes", 2, "--batch", 1,
             "--val-clips", 1, "--denoising-steps", 2, "--out", out := folder() / "table",
             "--frames", 4, "--rows", "base",
             "classifier guidance", "language-conditioned", "Vid2World-NAR"]
    before, train_reader = dict(baselines.RECIPES), comparison.train_reader
    comparison.train_reader = partial(train_reader, steps=2, size=2)
    try:
        code, printed = run_command(baselines.main, *words)
        again = run_command(baselines.main, *words)[1]  # what is done is not done again
        refused(baselines.main, *words, "--rows", "classifier guidance", "--steps", 11,
                saying="has steps 10, and here it is 11")
    finally:
        comparison.train_reader = train_reader
    assert code == 0 and before == baselines.RECIPES, printed
    rows = re.findall(r"^\| [\w-]+(?: \w+)? \| [\d.]+ \| 0.\d+ \| [\d.]+ \|", printed, re.M)
    assert len(rows) == 4 and again.endswith(printed[printed.rindex("| base"):]), printed
    assert Image.open(out / "baselines.png").height == 5 * (128 + 28)  # the truth and four rows
    refused(baselines.main, "--rows", "magic", saying="there is no row 'magic'")
