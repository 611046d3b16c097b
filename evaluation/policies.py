"""Is a policy that succeeds in the imagined world one that succeeds in the real one?

    python -m evaluation.policies --quick         (10 starts; without, 50)
    python -m evaluation.policies --guidance 1 2 3
    python -m evaluation.policies --replay        does the drawer move when pushed, and only then?

From a real first frame, a policy sees a frame and acts, the model predicts the next, and so on for
40 frames; then a success classifier says whether the drawer is closed. What counts is whether the
model orders the policies as reality does, here a simulator (bundled/judge_in_simulator.py):

    Pearson r   of success in the model and in the simulator, over the policies
    MMRV        mean maximum rank violation: for each policy the largest true difference from one
                that the model puts on the wrong side of it, averaged (Li et al. 2024, SIMPLER)

Two controls must fail: a world whose actions are another start's, and one in which nothing moves.
The bundled policies are checkpoints of one run of behaviour cloning (bundled/train_policies.py).
Your own, for a world of your own recordings:

    python -m evaluation.train_verifier labels.csv --root my_robot --out verdict.pt
    python -m evaluation.policies --data folder --root my_robot --checkpoint runs/mine \\
        --policy old.ts my_policies:act --verifier verdict.pt --truth outcomes.csv

    --policy    TorchScript files, or module:function: frames uint8 [B, H, W, 3] -> actions [B, A]
    --verifier  what train_verifier made of labelled episodes; or a TorchScript file, or
                module:function: whole videos uint8 [B, T, H, W, 3] -> success [B]
    --truth     rows `policy,start,success`: how the robot fared from the start of held-out episode
                `start`; without it there is no r and no MMRV

Paper: Algorithm 3, Figure 4.
"""
import csv
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import SAMPLES, bundled_world, fit_frames, open_episodes
from dynamicrafter.checkpoint import load_weights, read_checkpoint
from evaluation.comparison import kept
from evaluation.evaluate import RepeatLastFrame, WorldSettings, rollout_batch
from evaluation.intervals import rate_and_interval, wilson
from evaluation.readers import FrameReader
from model.saving import CHECKPOINTS, checkpoint_file
from model.vid2world import Model, ModelConfig
from sample import WorldModel
from support.errors import CheckpointError, DataError, RequestError, reading
from support.options import option, program
from support.pictures import save_curves, save_strip

POLICIES, STARTS = CHECKPOINTS / "policies.pt", SAMPLES / "drawer_starts.npz"
# The policies, each after so many steps of training: from one that never closes the drawer to one
# that always does.
MARKS = {f"{steps} steps": steps for steps in (40, 90, 120, 200, 4000)}
HORIZON = 40  # frames that a policy has
# settings, beside the sampling of the world, that rollouts depend on
DECISIVE = ("checkpoint", "policy", "verifier", "data", "root", "horizon", "seed")
CLOSED = 0.02  # metres: a drawer that is open by less is closed
UNIT = 0.1  # metres, in which the success classifier counts
MOVED = 0.02  # metres: a drawer that is elsewhere at the end

Policy = Callable[[np.ndarray], np.ndarray]  # frames uint8 [B, H, W, 3] -> actions [B, A]
Verifier = Callable[[np.ndarray], np.ndarray]  # videos uint8 [B, T, H, W, 3] -> success bool [B]


def policy_network() -> FrameReader:
    """A frame -> the hand's motion along x, y and z and the gripper's closing, each -1 to 1."""
    return FrameReader(4)


def verifier_network() -> FrameReader:
    """A frame -> how far the drawer is open, in UNITs."""
    return FrameReader(1)


@dataclass
class SuccessClassifier:
    """Says of frames whether the drawer is closed."""
    network: FrameReader

    def opening(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [..., 64, 80, 3] -> metres [...]."""
        return UNIT * self.network.read(frames)[..., 0]

    def __call__(self, videos: np.ndarray) -> np.ndarray:
        """uint8 [B, T, 64, 80, 3] -> whether the drawer is closed at the end, bool [B]."""
        return self.opening(videos[:, -1]) < CLOSED


def policy_action(numbers: np.ndarray) -> np.ndarray:
    """What the policy network says [..., 4] -> RT-1's 13 numbers, the episode going on."""
    actions = np.zeros((*numbers.shape[:-1], 13), np.float32)
    actions[..., [10, 11, 12, 3]] = np.clip(numbers, -1, 1)
    actions[..., 8] = 1
    return actions


def load_policies(path: Path = POLICIES) -> tuple[dict[str, FrameReader], SuccessClassifier]:
    """The policies by name, and the success classifier. Raises CheckpointError."""
    content = read_checkpoint(path)
    with reading(path, CheckpointError):
        policies = {name: load_weights(policy_network(), weights, str(path)).eval()
                    for name, weights in content["policies"].items()}
        verifier = load_weights(verifier_network(), content["verifier"], str(path)).eval()
    return policies, SuccessClassifier(verifier)


# --------------------------------------------------------------------------------------------------
# Algorithm 3


def rollout_policy(world: WorldModel, policy: Policy, starts: np.ndarray, shuffled: bool = False,
                   horizon: int = HORIZON) -> np.ndarray:
    """Initial states side by side, uint8 [B, H, W, 3] -> all frames [B, 1 + horizon, H, W, 3].

    shuffled  every world is given the action of another
    """
    world.reset(starts[:, None])
    frames = [starts]
    for _ in tqdm(range(horizon), unit="frame", leave=False, disable=None):
        actions = policy(frames[-1])
        frames.append(world.step(np.roll(actions, 1, axis=0) if shuffled else actions))
    return np.stack(frames, axis=1)


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation; nan where one side never varies."""
    if np.std(x) == 0 or np.std(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def mmrv(true: np.ndarray, imagined: np.ndarray) -> float:
    """Mean maximum rank violation of success rates [N], 0 where the order is the same. Ties count
    as in SIMPLER's code: against the better one alone."""
    violated = (true[:, None] > true) != (imagined[:, None] > imagined)
    return float((np.abs(true[:, None] - true) * violated).max(axis=1).mean())


@dataclass
class Settings(WorldSettings):
    guidance: list[float] | None = option(None, "one table each; if left out, the checkpoint's",
                                          type=float, nargs="+")
    policy: list[str] | None = option(None, "TorchScript files, or module:function; if left out, "
                                            "the bundled policies", nargs="+")
    verifier: str | None = option(None, "what says whether a rollout of theirs succeeds")
    truth: str | None = option(None, "CSV of policy, start, success: how they really fared")
    starts: int = option(50, "of every policy")
    horizon: int = option(HORIZON, "frames that a policy has")
    controls: bool = option(False, "also in a world of shuffled actions and in one where nothing "
                                   "moves, and an untrained policy")
    replay: bool = option(False, "do again what was done in the simulator, and see whether the "
                                 "drawer moves where it did")
    quick: bool = option(False, "10 starts: minutes")
    out: str = option("evaluations/policies", "folder for the results")


@dataclass
class Trial:
    """A world that policies are tried out in."""
    title: str
    make: Callable[[], WorldModel | RepeatLastFrame]
    shuffled: bool = False


def trials(model: Model, settings: Settings) -> list[Trial]:
    """The model at each guidance, and the worlds that must fail."""
    rows = []
    for guidance in settings.guidance or [None]:
        make = partial(WorldModel, model, guidance, steps=settings.steps, eta=settings.eta,
                       seed=settings.seed)
        sampling = make().sampling
        rows.append(Trial(f"Vid2World, {sampling}", make))
        if settings.controls:
            rows.append(Trial(f"shuffled actions, {sampling}", make, shuffled=True))
    return rows + [Trial("nothing moves", RepeatLastFrame)] * settings.controls


def read_starts(settings: Settings, config: ModelConfig
                ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """First frames uint8 [N, H, W, 3], and true success [N] by policy, where it is known."""
    if settings.policy:
        episodes = open_episodes(settings.data, settings.root, "val")
        frames = np.stack([fit_frames(episodes[i].read(0, 1)[0], *config.size, config.fit)[0]
                           for i in range(min(settings.starts, len(episodes)))])
        return frames, read_outcomes(settings.truth, len(frames)) if settings.truth else {}
    content = np.load(STARTS)
    true = {name: content[name][: settings.starts, -1] < CLOSED for name in MARKS}
    return content["frames"][: settings.starts], true


def read_outcomes(path: str, starts: int) -> dict[str, np.ndarray]:
    """By policy, success of its starts. Raises DataError where one is missing."""
    found: dict[str, dict[int, bool]] = {}
    with reading(path), open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["policy"], {})[int(row["start"])] = bool(int(row["success"]))
    for name, outcomes in found.items():
        if missing := [i for i in range(starts) if i not in outcomes]:
            raise DataError(f"{path} does not say how {name} fared from start {missing[0]}")
    return {name: np.array([outcomes[i] for i in range(starts)])
            for name, outcomes in found.items()}


def load_function(words: str) -> Callable[[np.ndarray], np.ndarray]:
    """Of arrays, from a TorchScript file or "module:function". Raises RequestError."""
    module, _, name = words.partition(":")
    if name.isidentifier():
        sys.path.insert(0, os.getcwd())
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise RequestError(f"{words} cannot be imported: {error}") from None
    try:
        script = torch.jit.load(words).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise RequestError(f"{words} is no TorchScript file ({str(error).splitlines()[0]}), and no "
                           "module:function") from None
    return lambda frames: np.asarray(script(torch.from_numpy(frames)).detach().float())


def load_verifier(path: str) -> Verifier:
    """What evaluation/train_verifier.py made, or a function: see `load_function`."""
    if not Path(path).suffix == ".pt":
        return load_function(path)
    content = read_checkpoint(path)
    with reading(path, CheckpointError):
        network = load_weights(verifier_network(), content["verifier"], path).eval()
    return lambda videos: network.read(videos[:, -1])[..., 0] > 0.5


def open_policies(settings: Settings) -> tuple[dict[str, Policy], Verifier]:
    """By name; and what says whether they succeed. Raises RequestError without."""
    if settings.policy:
        if not settings.verifier:
            raise RequestError("whether your policies succeed says a --verifier: see "
                               "evaluation/train_verifier.py")
        return ({Path(words).stem.rpartition(":")[2]: load_function(words)
                 for words in settings.policy}, load_verifier(settings.verifier))
    networks, verifier = load_policies()
    if settings.controls:
        torch.manual_seed(1)
        networks["untrained"] = policy_network().eval()
    return {name: lambda frames, network=network: policy_action(network.read(frames))
            for name, network in networks.items()}, verifier


def successes(trial: Trial, name: str, policy: Policy, verifier: Verifier, starts: np.ndarray,
              settings: Settings) -> np.ndarray:
    """bool [starts], of one policy in one world, kept batch by batch; and a strip of a success and
    one of a failure, where there are any."""
    out, succeeded, size = Path(settings.out), [], settings.batch
    # a checkpoint, policy or verifier that was trained further is another one
    code = [words.partition(":")[0].replace(".", "/") + ".py" if ":" in words else words
            for words in filter(None, [*(settings.policy or []), settings.verifier])]
    world = checkpoint_file(settings.checkpoint or bundled_world(settings.data))
    paths = map(Path, [world, *(code or [POLICIES])])
    chosen = {key: getattr(settings, key) for key in DECISIVE} | {
        "written": [path.stat().st_mtime_ns for path in paths if path.exists()]}

    def judge(batch: np.ndarray) -> list[bool]:
        videos = rollout_policy(trial.make(), policy, batch, trial.shuffled, settings.horizon)
        success = np.asarray(verifier(videos)).astype(bool)
        for label, those in (("success", success), ("failure", ~success)):
            if those.any():
                path = out / f"{file_name(f'{trial.title} {name} {label}')}.png"
                save_strip(path, {label: videos[those.argmax()][::4]}, columns=11)
        return success.tolist()

    for first in tqdm(range(0, len(starts), size), unit="batch", leave=False, disable=None):
        batch = starts[first : first + size]
        path = out / "kept" / f"{file_name(f'{trial.title} {name} {first}')}.json"
        succeeded += kept(path, chosen | {"starts": len(batch)}, partial(judge, batch))
    return np.array(succeeded)


# --------------------------------------------------------------------------------------------------
# Contact: does the drawer move when it is pushed, and only then?


def moves(openings: np.ndarray) -> np.ndarray:
    """Whether the drawer moves, of openings [N, T] in metres."""
    return np.abs(openings[:, -1] - openings[:, 0]) > MOVED


def describe(true: np.ndarray, imagined: np.ndarray) -> str:
    """Cells of the table, from openings [N, T]."""
    moved, moves_too = moves(true), moves(imagined)
    off = 1000 * np.abs(imagined - true)[:, -1]
    share = [f"{100 * moves_too[those].mean():.0f} %" if those.any() else "–"
             for those in (moved, ~moved)]
    return (f"{moved.sum()} of {len(moved)} | {share[0]} | {share[1]} | {np.median(off):.0f} | "
            f"{1000 * (imagined - true)[:, -1].mean():+.0f}")


def replay(settings: Settings) -> None:
    """What the bundled policies did in the simulator is done again in the model: how far is the
    drawer open, and how far was it?"""
    (_, verifier), truth, found = load_policies(), np.load(STARTS), {}
    world = settings.load_world(guidance=(settings.guidance or [None])[0])
    starts = truth["frames"][: settings.starts]
    print(f"{len(starts)} starts a policy; {world.sampling}\n\n| actions of | the drawer moves | "
          f"of these in the model | of the others | mm off | mean |\n|{' --- |' * 6}")
    for name in MARKS:
        actions = policy_action(truth[f"{name}, actions"][: settings.starts])
        videos = rollout_batch(world, starts[:, None], actions, batch=settings.batch)
        found[name] = truth[name][: settings.starts], verifier.opening(videos)
        print(f"| {name} | {describe(*found[name])} |", flush=True)
    true, imagined = (np.concatenate(side) for side in zip(*found.values(), strict=True))
    print(f"| all | {describe(true, imagined)} |")
    curves = {label: list(enumerate(1000 * rows[moves(true)].mean(axis=0)))
              for label, rows in (("in the simulator", true), ("in the model", imagined))}
    save_curves(path := Path(settings.out) / "contact.png", curves, "frame")
    print(f"\nplot: {path}, the opening in mm where the drawer moves")


# --------------------------------------------------------------------------------------------------


def run(settings: Settings) -> None:
    """A table of all policies for every world; then how well the worlds order the policies."""
    if settings.quick:
        settings.starts = min(settings.starts, 10)
    (out := Path(settings.out)).mkdir(parents=True, exist_ok=True)
    if settings.replay:
        return replay(settings)
    model = settings.load_world().model
    policies, verifier = open_policies(settings)
    starts, true = read_starts(settings, model.config)
    for name in policies.keys() - true.keys() if settings.truth else ():
        raise DataError(f"{settings.truth} says nothing of {name}; it knows {', '.join(true)}")
    true = {name: true[name] for name in policies if name in true}
    agreement = ["| world | Pearson r | MMRV | largest difference (points), 95 % over starts |",
                 "| --- | --- | --- | --- |"]
    for trial in trials(model, settings):
        rates = {}
        print(f"\n{trial.title}: {len(starts)} starts, {settings.horizon} frames\n\n| policy | in "
              f"the model | 95 % | in truth | 95 % | starts that agree |\n|{' --- |' * 6}")
        for name, policy in policies.items():
            rates[name] = successes(trial, name, policy, verifier, starts, settings)
            print(say_successes(name, rates[name], true.get(name)), flush=True)
        if true:
            agreement.append(compare(trial.title, rates, true, out))
    if true:
        print("\n" + "\n".join(agreement))
        (out / "agreement.md").write_text("\n".join(agreement) + "\n", encoding="utf-8")
    print(f"\nwritten: {out}")


def say_successes(name: str, successes: np.ndarray, true: np.ndarray | None) -> str:
    """A row of the table."""
    cells = [name, *rate_and_interval(successes)]
    if true is not None:
        cells += [*rate_and_interval(true), f"{100 * (successes == true).mean():.0f} %"]
    return f"| {' | '.join(cells)} |"


def file_name(title: str) -> str:
    """Without spaces and signs."""
    return "_".join("".join(c if c.isalnum() or c == "." else " " for c in title).split())


def compare(title: str, rates: dict[str, np.ndarray], true: dict[str, np.ndarray], out: Path
            ) -> str:
    """A row of Pearson r and MMRV over the policies whose true rates are known, and the plot."""
    ours, theirs = (np.array([side[name] for name in true]) for side in (rates, true))
    n = ours.shape[1]
    points = {f"{name}, in the model": [(theirs[i].mean(), ours[i].mean(),
                                         *wilson(int(ours[i].sum()), n))]
              for i, name in enumerate(true)}
    save_curves(out / f"figure4_{file_name(title)}.png", {"equal": [(0, 0), (1, 1)]} | points,
                "success in truth")
    drawn = np.array([agree(ours[:, picked], theirs[:, picked])
                      for picked in np.random.default_rng(0).integers(n, size=(2000, n))])
    cells = ["none"] * 3  # where one side never varies
    for i, (value, digits) in enumerate(zip(agree(ours, theirs), (2, 2, 0), strict=True)):
        if np.isfinite(value):
            low, high = np.nanpercentile(drawn[:, i], (2.5, 97.5))
            cells[i] = f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
    return f"| {title} | {' | '.join(cells)} |"


def agree(imagined: np.ndarray, true: np.ndarray) -> tuple[float, float, float]:
    """Pearson r, MMRV and the largest difference (points) of the success rates of outcomes
    [policies, starts]."""
    ours, theirs = imagined.mean(axis=1), true.mean(axis=1)
    return pearson(ours, theirs), mmrv(theirs, ours), 100 * np.abs(ours - theirs).max()


main = program(__name__, "policies", run, Settings, "Judge policies in the imagined world.")
