"""Claims about policies: how they are judged in a world, and chosen in it."""
import os
import re
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from PIL import Image

from evaluation import planning, policies, train_verifier
from model.saving import TINY_BASE, TINY_WORLD, load_model
from support.errors import RequestError
from testing.commands import folder, raises, refused, run_command
from testing.episodes import make_pictures


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
    nothing = {name: outcomes["a"][::-1] & outcomes["a"] for name in outcomes}
    assert policies.compare("nothing moves", nothing, outcomes, folder()).split(" | ")[1] == "none"


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
        with (mock.patch.object(policies.Settings, "load_world", lambda settings: Brighter),
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
