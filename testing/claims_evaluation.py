"""Claims about measurements and the bundled worlds."""
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import sample
from data import DATA_SETS, SAMPLES, open_episodes
from evaluation import (ablations, baselines, comparison, controllability, evaluate, futures, game,
                        intervals, metrics, policies, transfers)
from model.saving import TINY_BASE, TINY_WORLD, load_model
from model.vid2world import PRESETS
from play import __main__ as play
from support.errors import DataError
from testing import speed
from testing.commands import folder, free_port, raises, refused, run_command
from testing.episodes import make_rt1
from testing.networks import small_networks

HERE = Path(__file__).parent.parent


# --------------------------------------------------------------------------------------------------
# evaluation/


def noisy_pictures() -> tuple[np.ndarray, np.ndarray]:
    """A real frame and the same with noise, [2, H, W, 3] both, then two random ones."""
    random = np.random.RandomState(0)
    frame = open_episodes("rt1", SAMPLES, "val")[0].read(0, 1)[0]
    noise = random.randint(-20, 21, frame.shape)
    pairs = [(frame, np.clip(frame.astype(int) + noise, 0, 255).astype(np.uint8)),
             random.randint(0, 256, (2, *frame.shape)).astype(np.uint8)]
    ours, theirs = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return ours, theirs


def test_psnr_and_ssim_are_scikit_images():
    # structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    # data_range=255, channel_axis=-1), 0.26.0
    ours, theirs = noisy_pictures()
    assert np.allclose(metrics.psnr(ours, theirs), [26.670384, 7.745417], atol=2e-6)
    assert np.allclose(metrics.ssim(ours, theirs), [0.692203, -0.002591], atol=2e-6)
    assert metrics.ssim(ours, ours).tolist() == [1, 1]
    with raises(ValueError, "at least 11"):
        metrics.ssim(ours[:, :10], theirs[:, :10])


def test_the_frechet_distance_is_the_formula_with_the_matrix_root():
    generator = torch.Generator().manual_seed(0)
    for count in (100, 5):  # 5 vectors of 8 numbers: singular covariances
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        a, b = (randn(count, 8) @ randn(8, 8) + i for i in range(2))
        # of C1 C2, whose root's trace is wanted
        eigenvalues = np.linalg.eigvals((torch.cov(a.T) @ torch.cov(b.T)).numpy()).astype(complex)
        traces = torch.cov(a.T).trace() + torch.cov(b.T).trace()
        apart = (a.mean(0) - b.mean(0)).square().sum()
        formula = apart + traces - 2 * np.sqrt(eigenvalues).real.sum()
        ours = metrics.frechet_distance(a, b)
        assert abs(ours - float(formula)) < 1e-6 * float(formula), (count, ours, float(formula))
        assert abs(metrics.frechet_distance(a, a)) < 1e-3
    with raises(ValueError, "at least two"):
        metrics.frechet_distance(a[:1], b)


def test_the_evaluation_command_measures_continues_and_shares():
    out, networks = folder(), small_networks()
    words = ["--episodes", 3, "--batch", 1, "--frames", 3, "--steps", 1]
    words += [word for name in ("--inception", "--lpips", "--i3d")
              for word in (name, networks[name])]
    code, printed = run_command(evaluate.main, *words, "--out", out / "whole")
    assert code == 0, printed
    whole = json.loads((out / "whole" / "result.json").read_text(encoding="utf-8"))
    assert set(whole["result"]) == {
        "psnr", "ssim", "lpips", "fid", "fvd", "psnr of repeating", "psnr under other actions",
        "colour shift", "true colour shift", "sharpness", "true sharpness"} and not whole["absent"]
    assert whole["episodes"] == 3 and len(whole["by_frame"]["psnr"]) == 2
    assert (out / "whole" / "lpips.png").exists()

    # Interrupted in its third batch, it goes on there.
    right, calls = evaluate.score, []
    def interrupted(*inputs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*inputs)
    evaluate.score = interrupted
    try:
        assert run_command(evaluate.main, *words, "--out", out / "halves")[0] == 130
    finally:
        evaluate.score = right
    code, printed = run_command(evaluate.main, *words, "--out", out / "halves")
    assert code == 0 and "going on after 2 batches" in printed
    halves = json.loads((out / "halves" / "result.json").read_text(encoding="utf-8"))
    assert halves["result"] == whole["result"]
    assert not list((out / "halves").glob("partial*"))

    # Two processes share the batches, as torchrun would start them.
    command = [sys.executable, "-m", "evaluation.evaluate", *map(str, words), "--out",
               out / "shared"]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    both = [subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, env=os.environ | meeting
                             | {"RANK": rank, "OMP_NUM_THREADS": "1"}) for rank in "01"]
    assert [process.wait(timeout=150) for process in both] == [0, 0]
    shared = json.loads((out / "shared" / "result.json").read_text(encoding="utf-8"))["result"]
    assert all(abs(shared[name] - value) < 1e-3 * abs(value) for name,
               value in whole["result"].items()), (shared, whole["result"])

    code, printed = run_command(evaluate.main, "--episodes", 1, "--frames", 3, "--steps", 1,
                                "--nar", "--out", out / "nar")
    assert code == 0 and printed.count("absent") == 3 and "no --inception network" in printed
    for bad, saying in ((["--inception", "none.pt"], "no network for Inception at none.pt"),
                        (["--i3d", HERE / "README.md"], "no TorchScript"),
                        (["--inception", networks["flat"]], r"expected .*features. of Inception"),
                        (["--lpips", networks["--i3d"]], "cannot be asked as LPIPS")):
        refused(evaluate.main, *words[:8], "--out", out / "bad", *bad, saying=saying)


def test_evaluation_gives_an_interval_and_what_other_actions_cost():
    class Painter(evaluate.RepeatLastFrame):  # every frame is as bright as its action says
        model = SimpleNamespace(config=PRESETS["tiny"])

        def step(self, action):
            return np.broadcast_to(action[:, :1, None, None], self.frame.shape).astype(np.uint8)

    root = folder()
    for i in range(50):
        image = np.full((5, 64, 80, 3), 3 * i + 1 + i % 7, np.uint8)
        np.savez(root / f"{i:02d}.npz", image=image, action=np.full((5, 2), 3 * i, np.float32))
    episodes = open_episodes("folder", root, "val", fps=5).select(np.arange(3))
    painted = np.array([float(episodes[i].actions[0, 0]) for i in range(3)])
    true = painted + 1 + painted // 3 % 7
    own, other = (20 * np.log10(255 / abs(ours - true)) for ours in (painted, np.roll(painted, -1)))
    scores = evaluate.evaluate(Painter(), episodes, 5, 1, batch=2, shuffled=True)
    assert np.allclose(scores["psnr"], own[:, None]), (scores, own)
    assert np.allclose(scores["psnr under other actions"], other[:, None]) and len(set(own)) > 1
    said, settings = io.StringIO(), evaluate.Settings(context_frames=1, out=str(folder()))
    world = SimpleNamespace(sampling=sample.Sampling())
    with contextlib.redirect_stdout(said):
        evaluate.report(scores, settings, world, names := [each.name for each in episodes])
    line = f"{own.mean():.3f} ± {1.96 * own.std(ddof=1) / 3**0.5:.3f}"
    assert f"| PSNR | {line} |" in said.getvalue(), said.getvalue()
    assert f"worst predicted: episode {names[own.argmin()]} ({own.min():.1f} dB), " in (
        said.getvalue())


def test_a_mean_stands_with_its_bootstrap_interval_and_a_rate_with_wilsons():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    low, high = intervals.bootstrap(values)
    half = 1.96 * values.std() / 20
    assert abs(low - values.mean() + half) < 0.02 and abs(high - values.mean() - half) < 0.02
    assert intervals.mean_and_interval(np.full(3, 0.5), "+") == "+0.50 (+0.50 to +0.50)"
    low, high = intervals.wilson(45, 50)
    assert abs(low - 0.786) < 2e-3 and abs(high - 0.957) < 2e-3  # as in tables
    assert intervals.wilson(0, 10)[0] == 0 and intervals.wilson(10, 10)[1] == 1


# --------------------------------------------------------------------------------------------------
# Controllability, futures, and the paper's tables


def test_the_gripper_is_read_off_frames_and_its_directions_off_episodes():
    episodes = open_episodes("rt1", SAMPLES, "train").select(np.arange(16))
    reader = controllability.train_reader(episodes, steps=160, size=8)
    held_out = open_episodes("rt1", SAMPLES, "val").select(np.arange(4))
    frames, places = controllability.recorded(held_out)
    errors = np.linalg.norm(reader.read(frames) - places, axis=1)
    assert errors.mean() < 4  # and about 20 for the mean place
    across, up = controllability.directions(episodes)
    # x and y go to the right of the picture, z goes up
    assert across[0] > 0 and across[1] > 0 and up[2] < 0


def test_the_gripper_is_measured_at_the_last_frame_and_sweeps_by_their_side():
    class Walker(evaluate.RepeatLastFrame):  # a world in which a picture's number is a place
        def step(self, action):
            self.frame = self.frame + action[:, :1, None, None].astype(np.uint8)
            return self.frame

    class Reader:
        def read(self, frames):
            return np.stack([frames[..., 0, 0, 0].astype(float)] * 2, axis=-1)

    clips = np.zeros((2, 4, 8, 8, 3), np.uint8) + np.arange(10, 14, dtype=np.uint8)[
        :, None, None, None]  # goes on by one a frame
    actions, truth = np.ones((2, 4, 13), np.float32), np.full((2, 4, 2), 13.0)
    actions[1] = 4  # and the second world by four
    off, db = controllability.follow([Walker(), Walker()], Reader(), clips, actions, truth, batch=1)
    assert np.allclose(off, [0, 9 * 2**0.5])
    errors = np.array([3, 6, 9])  # of the three frames that are imagined
    assert abs(db[1] - (20 * np.log10(255 / errors)).mean()) < 1e-6
    swept = {name: np.zeros((1, 2, 8, 8, 3), np.uint8) for name in controllability.SWEEPS}
    for name in ("+x", "-x"):  # both go to the right
        swept[name][:, 1] = 5
    axes = np.array([[1.0, 0, 0], [0, 1, -1]])
    assert controllability.right_side(swept, Reader(), axes)[:3] == [100, 0, 0]


def test_the_distance_of_a_transfer_is_relative():
    passive = torch.ones(2, 2, 2, 1, 1, 1) * torch.tensor([2.0, 4.0]).view(1, 1, 2, 1, 1, 1)
    x, features = torch.arange(6.0).view(1, 1, 1, 6, 1, 1), torch.tensor([1.0, 0.0])
    ours, theirs = (transfers.Seen(v, x, f.view(1, 1, 2, 1, 1, 1)) for v, f in (
        (passive, features), (passive + 1, torch.ones(2))))
    row, cosine = transfers.compare(ours, theirs)
    assert np.allclose(row, [0.5, 0.25]) and abs(cosine - 0.5**0.5) < 1e-6
    line, zero = transfers.from_line_and_from_zero(x)  # 2, 3, 4 and 5 go on from 0 and 1
    assert line == 0 and abs(zero - (4 + 9 + 16 + 25) ** 0.5) < 1e-5
    # 1 and -1 in turn are two steps from the line through the two before, times two
    line, zero = transfers.from_line_and_from_zero((-1.0) ** x)
    assert line == 4 * zero


def test_futures_that_part_foretell_an_error_like_one_draw_more():
    random = np.random.default_rng(0)
    doubt = random.uniform(1, 20, size=(2, 3, 8, 8, 1))  # by pixel
    drawn = 100 + doubt * random.normal(size=(201, 2, 3, 8, 8, 3))
    spread, error = futures.spread_and_error(drawn[1:5], drawn[0])
    assert spread.shape == error.shape == (2, 3, 8, 8)
    assert abs(futures.size(spread).mean() / futures.size(error).mean() - 1) < 0.05
    spread, _ = futures.spread_and_error(drawn[1:], drawn[0])
    assert futures.pearson(spread.ravel(), doubt.ravel()) > 0.9
    code, said = run_command(futures.main, "--episodes", 2, "--frames", 3, "--seeds", 2, "--steps",
                             1, "--out", out := folder())
    assert code == 0 and re.search(r"^\| 2 \| [\d.]+ \| [\d.]+ \| 0.\d+ \|", said, re.M), said
    assert (out / "futures.png").exists()


def test_a_row_of_the_ways_to_steer_is_measured_at_the_last_frame():
    settings = baselines.Settings(base=str(TINY_BASE), frames=5, episodes=3, out=str(folder()))
    reader = SimpleNamespace(read=lambda frames: np.zeros((len(frames), 2)))
    with mock.patch.object(comparison, "train_reader", return_value=reader):
        held_out = comparison.open_held_out(settings, settings.frames)
    measured = baselines.measure("repeating", 0, settings, held_out)
    episodes = open_episodes("rt1", SAMPLES, "val").select(np.arange(3))
    frames = np.stack([episode.read(0, 5)[0] for episode in episodes])
    places = np.stack([episode.feature(controllability.PIXEL)[4] for episode in episodes])
    assert abs(measured["off"] - np.linalg.norm(places, axis=1).mean()) < 1e-3
    assert abs(measured["psnr"] - metrics.psnr(frames[:, :1], frames)[:, 1:].mean()) < 1e-6
    root = make_rt1([5] * 8)  # whose episodes do not say where the gripper is
    measured = comparison.open_held_out(replace(settings, root=str(root)), 5).score(frames[:1])
    assert list(measured) == ["psnr", "ssim"]


def test_controllability_compares_seeds_with_the_actions_and_with_anothers():
    asked = []

    def follow(worlds, reader, clips, actions, truth, batch):
        asked.append(([world.seed for world in worlds], actions))
        return np.array([1.0, 2]) + len(asked), np.array([20.0, 22]) + len(asked)

    reader = SimpleNamespace(read=lambda frames: np.zeros((len(frames), 2)))
    with (mock.patch.object(controllability, "train_reader", return_value=reader),
          mock.patch.object(controllability, "follow", follow),
          mock.patch.object(controllability, "sweep", return_value={}),
          mock.patch.object(controllability, "right_side", return_value=[100.0] * 6),
          mock.patch.object(controllability, "save_strip")):
        code, said = run_command(controllability.main, "--episodes", 2, "--frames", 3, "--seeds", 3,
                                 "--guidance", 1, 2, "--out", folder())
    assert code == 0 and [seeds for seeds, _ in asked] == [[0, 1, 2]] * 4, said
    own, other = asked[0][1], asked[1][1]
    assert np.array_equal(other, own[::-1]) and not np.array_equal(other, own)  # of two episodes
    assert "| 2 | 500–1000 | 4.50 (4.00 to 5.00) | +2.00 (+2.00 to +2.00) | 24.00 (23.00 to" in said


def test_a_variant_is_compared_with_the_baseline_seed_by_seed():
    runs = {"repeating": [{"psnr": 9.0}] * 2, "baseline": [{"loss": 1.0, "psnr": 10.0},
                                                            {"loss": 2.0, "psnr": 14.0}],
            "other": [{"loss": 2.0, "psnr": 9.0}, {"loss": 4.0, "psnr": 12.0}]}
    lines = comparison.table(runs, {"other": "7"})
    assert lines[0].startswith("|  | held-out loss | difference | PSNR (dB) | difference | publ")
    assert lines[2:] == ["| repeating |  |  | 9.00 ± 0.00 | -3.00 ± 2.83 |  |",
                         "| baseline | 1.5000 ± 0.7071 |  | 12.00 ± 2.83 |  |  |",
                         "| other | 3.0000 ± 1.4142 | +1.5000 ± 0.7071 | 10.50 ± 2.12 | "
                         "-1.50 ± 0.71 | 7 |"]
    assert comparison.table(runs, baseline="other")[3].endswith("12.00 ± 2.83 | +1.50 ± 0.71 |")
    assert comparison.table({"other": [{"ssim": 0.5}]}) == ["|  | SSIM |", "| --- | --- |",
                                                            "| other | 0.500 |"]


def test_a_variant_without_dropout_is_rolled_out_without_guidance():
    settings, asked = ablations.Settings(out=str(folder()), guidance=3.0), []
    held_out = comparison.HeldOut(None, np.zeros((1, 16, 16, 16, 3), np.uint8), None)
    with (mock.patch.object(ablations, "post_train", return_value={1: 0.5, 2: 0.25}),
          mock.patch.object(ablations, "load_world", lambda run, **options: asked.append(options)),
          mock.patch.object(ablations, "rollout_batch", return_value=held_out.truth)):
        for variant in ("baseline", "no action dropout", "mixed, no guidance", "mixed, guided"):
            measured = ablations.measure(variant, 0, settings, held_out)
    assert [options["guidance"] for options in asked] == [3.0, 1.0, 1.0, 3.0]
    assert measured["loss"] == 0.25 and measured["curve"] == {"1": 0.5, "2": 0.25}


def test_table_2_has_the_papers_rows_and_says_how_long_it_takes():
    with (mock.patch.object(ablations, "open_held_out"),
          mock.patch.object(ablations, "measure_all", side_effect=DataError("seen")) as seen):
        refused(ablations.main, "--table2", "--out", folder(), saying="seen")
    rows = seen.call_args.args[0]
    assert rows[0] == "repeating" and len(rows) == 10 and set(ablations.PUBLISHED) < set(rows)
    assert ablations.changes("shift, guided") == {"transfer": "shift"}
    assert ablations.changes("shift, no guidance") == {"transfer": "shift", "action_dropout": 0}
    clock, said = iter([0, 1200, 1200, 1201, 1201, 1801, 1801, 1802]), io.StringIO()
    with (mock.patch.object(comparison.time, "monotonic", lambda: next(clock)),
          contextlib.redirect_stdout(said)):  # of "b" both seeds are kept
        runs = comparison.measure_all(["a", "b"], 2, lambda row, seed: {"psnr": seed})
    assert runs == {row: [{"psnr": 0}, {"psnr": 1}] for row in "ab"}
    assert said.getvalue() == ("a, seed 0: 20 minutes; 3 more to go, about 1.0 hours\n"
                               "a, seed 1: 10 minutes; 1 more to go, about 0.2 hours\n")


def test_lpips_is_the_squared_distance_of_features_and_the_baseline_repeats_the_last_frame():
    features = {0: [0.0, 0.0], 1: [1.0, 2.0], 2: [4.0, 0.0]}  # of pictures by their number
    network = lambda frames: torch.tensor([features[frame[0, 0, 0].item()] for frame in frames])
    truth = np.zeros((1, 4, 16, 16, 3), np.uint8) + np.array([0, 1, 2, 2], np.uint8)[
        :, None, None, None]
    world = SimpleNamespace(model=SimpleNamespace(config=replace(PRESETS["tiny"], size=(16, 16))),
                            reset=lambda frames, actions: None,
                            step=lambda action: np.ones((1, 16, 16, 3), np.uint8))
    episode = SimpleNamespace(read=lambda start, stop: (truth[0], np.zeros((4, 13), np.float32)))

    class One(list):
        dataset = DATA_SETS["bridge"]

    episodes = One([episode])
    number = lambda pictures: torch.tensor(pictures.reshape(len(pictures), -1)[:, :1]).double()
    scores = evaluate.evaluate(world, episodes, 4, context_frames=2, networks={
        "lpips": network, "fid": number, "fvd": number})
    seen = {name: (len(rows), rows.mean()) for name, rows in scores.items() if "," in name}
    assert seen == {"fid, imagined": (2, 1), "fid, true": (2, 2), "fvd, imagined": (1, 1),
                    "fvd, true": (1, 2)}
    # imagined: 1, 1; true: 2, 2; the last given: 1
    assert scores["lpips"].tolist() == [[3**2 + 2**2] * 2]
    assert np.allclose(scores["psnr of repeating"], 20 * np.log10(255))


@mock.patch.object(comparison, "has_gripper", lambda episodes: False)
def test_transfers_and_ablations_are_compared():
    with (mock.patch.object(transfers, "LEVELS", (500,)),
          mock.patch.object(transfers, "TRANSFER_METHODS", ("masked", "extrapolative"))):
        code, printed = run_command(transfers.main, "--clips", 1, "--frames", 4, "--out", folder(),
                                    "--trained", TINY_WORLD)
    rows = [row.split("|") for row in printed.splitlines()
            if re.match(r"\| ((masked|extrapolative), (past|frame)|tiny_world.pt) ", row)]
    assert code == 0 and len(rows) == 5, printed
    assert all(0 < float(row[2]) < 1 and 0 < float(row[3]) < 10 for row in rows), printed
    out = folder()
    words = ["--variants", "baseline", "lr=1e-4 batch=1", "from scratch", "--seeds", 1,
             "--steps", 1, "--cooldown", 1, "--batch", 1, "--frames", 4,
             "--val-clips", 1, "--episodes", 1, "--denoising-steps", 1, "--out", out,
             "--decoder-steps", 0]
    code, printed = run_command(ablations.main, *words)
    assert code == 0 and "| baseline |" in printed and "| from scratch |" in printed, printed
    again = run_command(ablations.main, *words)[1]  # what is done is not done again
    assert "at step" not in again and again.strip() == printed[
        printed.index("|  | held-out loss |") :].strip()
    # and never taken for what other settings would have given
    assert re.search(r"\| lr=1e-4 batch=1 \|.*\|.*[1-9]", printed)  # and so not the baseline
    alone = words[:2] + words[4:]  # the baseline
    for unknown in ("lr", "lr=", "rate=1"):
        refused(ablations.main, "--variants", unknown, saying=f"there is no variant '{unknown}'")
    other = run_command(ablations.main, *alone, "--denoising-steps", 2)[1]
    (psnr,), (other_psnr,) = (re.findall(r"\| baseline \|.*\| (\d\d\.\S+) \|  \| 0", table)
                              for table in (printed, other))
    assert psnr != other_psnr, other
    refused(ablations.main, *alone, "--steps", 2, saying="has steps 1, and here it is 2")


def test_commands_refuse_bad_words_in_a_sentence():
    out = folder()
    np.savez(out / "archive.npz", a=np.zeros(3))
    np.save(out / "records.npy", np.zeros(3, [("x", float), ("y", float)]))
    np.save(out / "complex.npy", np.zeros((3, 13), complex))
    np.save(out / "narrow.npy", np.zeros((3, 7)))
    np.save(out / "nan.npy", np.full((3, 13), np.nan))
    np.save(out / "huge.npy", np.zeros((3, 13), np.float32))
    header = (out / "huge.npy").read_bytes()
    (out / "huge.npy").write_bytes(header.replace(b"(3, 13), }           ",
                                                  b"(999999999999, 13), }"))
    model, load = load_model(TINY_WORLD), sample.load_world_model
    sample.load_world_model = lambda path: model  # once is enough
    for words, saying in (
            (["--seed", 2**64], "between 0 and 2.63"), (["--out", "a\0b"], "null byte"),
            (["--frames", 1], "leave a frame to predict"),
            (["--context", 0], "context-frames is 0"), (["--episode", -1], "episode is -1"),
            (["--steps", 0], "steps is 0"),
            (["--eta", 2], "eta is 2"), (["--guidance", "nan"], "guidance is nan"),
            (["--steps", "x"], "invalid int"), (["--episode", 99], "no episode 99"),
            (["--actions", out / "narrow.npy"], r"expected .N, 13."),
            (["--actions", out / "nan.npy"], "not finite"),
            (["--guidance-levels", 5, 4], "low <= high"),
            (["--repeat-action", 1, 2], r"expected .N, 13."),
            (["--actions", out / "archive.npz"], "is an .npz archive"),
            (["--actions", out / "records.npy"], "real numbers"),
            (["--actions", out / "complex.npy"], "complex128"),
            (["--actions", out / "huge.npy"], "huge.npy cannot be read"),
            (["--actions", out / "none.npy"], "No such file"),
            (["--actions", out], "Is a directory")):
        refused(sample.main, *words, saying=saying)
    sample.load_world_model = load
    for words, saying in ((["--port", 99999], "port is 99999"), (["--host", ""], "host is empty"),
                          (["--steps", 0], "steps is 0"),
                          (["--host", "nowhere.invalid"], "play: ")):
        refused(play.main, *words, saying=saying)


def test_measurements_refuse_what_they_cannot_measure():
    refused(evaluate.main, "--episodes", 99, saying="32 of at least 16 frames are held out")
    refused(evaluate.main, "--checkpoint", "none.pt", saying="no checkpoint at")
    refused(game.main, "--root", "recorded/none", saying="RESULTS.md says how it is recorded")
    refused(controllability.main, "--data", "bridge", saying="no bridge in datasets")
    refused(transfers.main, "--base", "none.pt", saying="no checkpoint at")
    for main, name in ((ablations.main, "seeds"), (baselines.main, "episodes"),
                       (game.main, "reader-steps"), (policies.main, "horizon"),
                       (speed.main, "rounds"), (transfers.main, "clips")):
        for number in (0, -1):
            refused(main, f"--{name}", number,
                    saying=f"--{name} is {number}; it must be at least")


def test_a_distance_of_few_videos_says_so():
    words = ["--frames", 4, "--steps", 1, "--i3d", small_networks()["--i3d"], "--out"]
    code, said = run_command(evaluate.main, "--episodes", 1, *words, out := folder() / "one")
    assert code == 0 and "| FVD | absent | one of the videos has no covariance |" in said, said
    assert json.loads((out / "result.json").read_text(encoding="utf-8"))["absent"]
    code, said = run_command(evaluate.main, "--episodes", 2, *words, folder() / "two")
    assert code == 0 and "of 2 videos: too few to be compared with published" in said, said
