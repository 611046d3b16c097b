"""Claims about DIAMOND and the game that it is compared in."""
import json
from dataclasses import asdict, replace
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from baselines import diamond, train_diamond
from data import SAMPLES, fit_frames, open_episodes
from dynamicrafter.checkpoint import read_checkpoint
from episodes import csgo
from episodes.csgo import csgo_action
from evaluation import evaluate, game, metrics
from model.saving import TINY_WORLD, save
from model.vid2world import to_frames
from support.errors import CheckpointError, RequestError
from testing import hall
from testing.commands import folder, raises, refused, run_command
from testing.episodes import make_episode, make_rt1

DIAMOND = diamond.DiamondConfig(action_dim=0, channels=(32, 32), attention=(False, True), blocks=1,
                                cond=32)


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


def test_diamond_is_trained_resumed_and_loaded():
    root, out = make_rt1([10] * 8), folder()
    words = "--data", "rt1", "--root", root, "--out", out, "--batch", 2, "--workers", 0
    code, output = run_command(train_diamond.main, *words, "--minutes", 0.02)
    assert code == 0 and "7.2 M parameters" in output, output
    begun = read_checkpoint(out / "checkpoint.pt")
    assert run_command(train_diamond.main, *words, "--resume", "--minutes", 0.01)[0] == 0
    resumed = read_checkpoint(out / "checkpoint.pt")  # one step more, and its time is up
    assert resumed["step"] == begun["step"] + 1 and resumed["minutes"] > begun["minutes"] > 0.02
    steps = [each["optimizer"]["state"][0]["step"] for each in (begun, resumed)]
    assert steps[1] == steps[0] + 1 == resumed["step"], (steps, resumed["step"])
    refused(train_diamond.main, *words[:4], "--resume", "--out", folder(), saying="no checkpoint")
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


def test_what_can_be_known_of_the_hall_is_measured():
    words = ["--episodes", 2, "--frames", 6, "--bound-steps", 1, "--parts"]
    code, said = run_command(hall.main, *words, "turns", "autoencoder", "bound")
    episodes = open_episodes("csgo", SAMPLES, "train")
    told = [csgo.describe(action) for i in range(len(episodes)) for action in episodes[i].actions]
    for side, sign in (("left", "-"), ("right", "+")):
        share = 100 * np.mean([f"mouse {sign}" in action for action in told])
        assert f"turns to the {side}: {share:.1f} % of the frames" in said, said
    decoded, drawn = (float(said.split(f"{part}: ")[1].split(" dB")[0])
                      for part in ("autoencoder", "bound"))
    assert code == 0 and decoded > 20 > drawn, said
    refused(hall.main, *words, "walls", saying="invalid choice")


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
    assert code == 0 and "12 frames of recorded" in said, said
    heads, _, *rows = (line[2:-2].split(" | ") for line in said.splitlines() if line[:2] == "| ")
    assert [row[0] for row in rows] == ["repeating", "DIAMOND, fast", "DIAMOND, hq",
                                        "Vid2World"], rows
    assert float(rows[0][1 + heads.index("frames above repeating")]) == 0
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
