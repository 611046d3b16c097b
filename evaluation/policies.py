"""Is a policy that succeeds in the imagined world one that succeeds in the real one?

    python -m evaluation.policies --quick         (10 starts; without, 50)
    python -m evaluation.policies --guidance 1 2 3
    python -m evaluation.policies --policy rt1.ts --data rt1 --root … --checkpoint … --judge

A robot is slow and breaks; a world model does not. So policies are tried out in the model: from a
real first frame, the policy sees a frame and acts, the model predicts the next, and so on for 40
frames; then a success classifier says whether the drawer is closed. What counts is whether the
model orders the policies as reality does, here a simulator whose outcomes are recorded
(bundled/judge_in_simulator.py):

    Pearson r   of success in the model and in the simulator, over the policies
    MMRV        mean maximum rank violation: for each policy the largest true difference from one
                that the model puts on the wrong side of it, averaged (Li et al. 2024, SIMPLER)

Two controls must fail: a world whose actions are another start's, and one in which nothing moves.
A policy is any function of frames; the bundled ones are five checkpoints of one run of behaviour
cloning, which bundled/train_policies.py makes. Paper: Algorithm 3, Figure 4.
"""
import base64
import html
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import SAMPLES, fit_frames, open_episodes
from dynamicrafter.checkpoint import load_weights, read_checkpoint
from evaluation.evaluate import RepeatLastFrame, WorldSettings
from evaluation.intervals import wilson
from evaluation.readers import FrameReader
from model.saving import CHECKPOINTS, TINY_WORLD, checkpoint_file
from model.vid2world import Model, ModelConfig
from sample import WorldModel, load_world
from support.errors import CheckpointError, RequestError, reading
from support.options import option, program
from support.pictures import save_scatter, save_strip

POLICIES, STARTS = CHECKPOINTS / "policies.pt", SAMPLES / "drawer_starts.npz"
# The policies, each after so many steps of training: from one that never closes the drawer to one
# that always does.
MARKS = {f"{steps} steps": steps for steps in (40, 90, 120, 200, 4000)}
HORIZON = 40  # frames that a policy has
CLOSED = 0.02  # metres: a drawer that is open by less is closed
UNIT = 0.1  # metres, in which the success classifier counts

Policy = Callable[[np.ndarray], np.ndarray]  # frames uint8 [B, H, W, 3] -> actions [B, A]


def policy_network() -> FrameReader:
    """A frame -> the hand's motion along x, y and z and the gripper's closing, each -1 to 1."""
    return FrameReader(4)


def verifier_network() -> FrameReader:
    """A frame -> how far the drawer is open, in UNITs."""
    return FrameReader(1)


class SuccessClassifier:
    """Says of frames whether the drawer is closed."""

    def __init__(self, network: FrameReader):
        self.network = network

    def opening(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [..., 64, 80, 3] -> metres [...]."""
        return UNIT * self.network.read(frames)[..., 0]


def policy_action(numbers: np.ndarray) -> np.ndarray:
    """What the policy network says [..., 4] -> RT-1's 13 numbers, the episode going on."""
    actions = np.zeros((*numbers.shape[:-1], 13), np.float32)
    actions[..., [10, 11, 12, 3]] = np.clip(numbers, -1, 1)
    actions[..., 8] = 1
    return actions


def load_policies(path: Path = POLICIES) -> tuple[dict[str, FrameReader], SuccessClassifier]:
    """The policies by name, and the success classifier. Raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path} is not there: python -m bundled.train_policies makes it, "
                              "and python -m bundled.judge_in_simulator the truth beside it")
    content = read_checkpoint(path)
    with reading(path, CheckpointError):
        policies = {name: load_weights(policy_network(), weights, str(path)).eval()
                    for name, weights in content["policies"].items()}
        verifier = load_weights(verifier_network(), content["verifier"], str(path)).eval()
    return policies, SuccessClassifier(verifier)


def untrained() -> FrameReader:
    torch.manual_seed(1)
    return policy_network().eval()


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


PAGE = Path(__file__).with_name("verdicts.html")


def write_page(path: Path, strips: dict[str, np.ndarray]) -> None:
    """One page of strips uint8 [T, H, W, 3] by key, in random order, to be ticked."""
    rows = []
    for key in np.random.default_rng(0).permutation(list(strips)):
        file = BytesIO()
        Image.fromarray(np.concatenate(list(strips[key]), axis=1)).save(file, "PNG")
        source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        rows.append(f'<label><input type="checkbox" name="{html.escape(key)}"> '
                    f'<img src="{source}"></label>')
    page = PAGE.read_text(encoding="utf-8").replace("{rows}", "\n".join(rows))
    path.write_text(page, encoding="utf-8")


@dataclass
class Settings(WorldSettings):
    guidance: list[float] | None = option(None, "one table each; if left out, the checkpoint's",
                                          type=float, nargs="+")
    policy: list[str] | None = option(None, "TorchScript files, frames uint8 [B, H, W, 3] -> "
                                            "actions [B, A]; if left out, the bundled policies",
                                      nargs="+")
    starts: int = option(50, "of every policy")
    horizon: int = option(HORIZON, "frames that a policy has")
    controls: bool = option(False, "also in a world of shuffled actions and in one where nothing "
                                   "moves, and an untrained policy")
    quick: bool = option(False, "10 starts: minutes")
    judge: bool = option(False, "lay the rollouts out on a page for a person to tick")
    verdicts: str | None = option(None, "what the person saved there, instead of the classifier's")
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
    """First frames uint8 [N, H, W, 3], and true success by policy, where it is known."""
    if settings.policy:
        episodes = open_episodes(settings.data, settings.root, "val")
        numbers = range(min(settings.starts, len(episodes)))
        frames = np.stack([fit_frames(episodes[i].read(0, 1)[0], *config.size, config.fit)[0]
                           for i in numbers])
        return frames, {}
    content = np.load(STARTS)
    true = {name: content[name][: settings.starts, -1] < CLOSED for name in MARKS}
    return content["frames"][: settings.starts], true


def scripted(path: str) -> Policy:
    """A policy from a TorchScript file."""
    try:
        module = torch.jit.load(path).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise RequestError(f"{path} is no TorchScript file "
                           f"({str(error).splitlines()[0]})") from None
    return lambda frames: np.asarray(module(torch.from_numpy(frames)).detach().float())


def open_policies(settings: Settings) -> tuple[dict[str, Policy], SuccessClassifier | None]:
    """By name; and the success classifier, where there is one."""
    if settings.policy:
        return {Path(path).stem: scripted(path) for path in settings.policy}, None
    networks, verifier = load_policies()
    if settings.controls:
        networks["untrained"] = untrained()
    return {name: lambda frames, network=network: policy_action(network.read(frames))
            for name, network in networks.items()}, verifier


# Settings, beside the sampling of the world, that rollouts depend on.
DECISIVE = ("checkpoint", "policy", "data", "root", "horizon", "seed")


class Judgement:
    """Which rollouts succeed, as a person or the classifier says. Verdicts are kept in a file,
    batch by batch, so that an interrupted run resumes."""

    def __init__(self, settings: Settings, verifier: SuccessClassifier | None, starts: np.ndarray):
        self.settings, self.verifier, self.starts = settings, verifier, starts
        self.out = Path(settings.out)
        # a checkpoint that was trained further is another one
        files = [checkpoint_file(settings.checkpoint or TINY_WORLD),
                 *(settings.policy or [POLICIES])]
        self.written = [Path(path).stat().st_mtime_ns for path in files]
        self.file = self.out / "successes.json"
        self.known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        self.verdicts = settings.verdicts and json.loads(
            Path(settings.verdicts).read_text(encoding="utf-8"))
        self.strips: dict[str, np.ndarray] = {}  # for a person

    def successes(self, trial: Trial, name: str, policy: Policy) -> np.ndarray:
        """bool [starts], of one policy in one world."""
        keys = [f"{trial.title}/{name}/{i}" for i in range(len(self.starts))]
        if self.verdicts:
            return np.array([self.verdicts.get(key, False) for key in keys], bool)
        succeeded, size = [], self.settings.batch
        for first in tqdm(range(0, len(keys), size), unit="batch", leave=False, disable=None):
            succeeded += self.judge(trial, name, policy, first, keys[first : first + size])
        return np.array(succeeded)

    def judge(self, trial: Trial, name: str, policy: Policy, first: int, keys: list[str]
              ) -> list[bool]:
        """The same, of one batch."""
        place = json.dumps([trial.title, name, first, len(keys), self.written, {
            key: value for key, value in asdict(self.settings).items() if key in DECISIVE}])
        if place not in self.known or self.settings.judge:
            starts = self.starts[first : first + len(keys)]
            videos = rollout_policy(trial.make(), policy, starts, trial.shuffled,
                                    self.settings.horizon)
            columns = np.linspace(0, self.settings.horizon, 9).round().astype(int)
            self.strips |= dict(zip(keys, videos[:, columns], strict=True))
            closed = (self.verifier.opening(videos[:, -1]) < CLOSED if self.verifier
                      else np.zeros(len(videos), bool))  # until a person has judged
            if self.verifier:
                self.show_examples(trial, name, videos, closed)
            self.known[place] = closed.tolist()
            self.file.write_text(json.dumps(self.known), encoding="utf-8")
        return self.known[place]

    def show_examples(self, trial: Trial, name: str, videos: np.ndarray, closed: np.ndarray
                      ) -> None:
        """A strip of a success and one of a failure, where there are any."""
        for label, those in (("success", closed), ("failure", ~closed)):
            if those.any():
                path = self.out / f"{file_name(f'{trial.title} {name} {label}')}.png"
                save_strip(path, {label: videos[those.argmax()][::4]}, columns=11)


HEAD = """| policy | success in the model | 95 % | in the simulator | 95 % | starts that agree |
| --- | --- | --- | --- | --- | --- |"""


def run(settings: Settings) -> None:
    """A table of all policies for every world; then how well the worlds order the policies."""
    if settings.quick:
        settings.starts = min(settings.starts, 10)
    (out := Path(settings.out)).mkdir(parents=True, exist_ok=True)
    model = load_world(settings.checkpoint or TINY_WORLD).model
    policies, verifier = open_policies(settings)
    starts, true = read_starts(settings, model.config)
    judgement = Judgement(settings, verifier, starts)
    agreement = ["| world | Pearson r | MMRV | largest difference (points), 95 % over starts |",
                 "| --- | --- | --- | --- |"]
    for trial in trials(model, settings):
        print(f"\n{trial.title}: {len(starts)} starts, {settings.horizon} frames\n\n" + HEAD)
        rates = {}
        for name, policy in policies.items():
            rates[name] = judgement.successes(trial, name, policy)
            print(say_successes(name, rates[name], true.get(name)), flush=True)
        if true:
            agreement.append(compare(trial.title, rates, true, out))
    if true:
        print("\n" + "\n".join(agreement))
        (out / "agreement.md").write_text("\n".join(agreement) + "\n", encoding="utf-8")
    if settings.judge:
        write_page(out / "judge.html", judgement.strips)
        print(f"\nopen {out / 'judge.html'} in a browser, tick, save; then run this again with "
              "--verdicts verdicts.json instead of --judge")
    print(f"\nwritten: {out}")


def say_successes(name: str, successes: np.ndarray, true: np.ndarray | None) -> str:
    """A row of the table."""
    def rate(outcomes: np.ndarray) -> list[str]:
        low, high = wilson(int(outcomes.sum()), len(outcomes))
        return [f"{100 * outcomes.mean():.0f} %", f"{100 * low:.0f}–{100 * high:.0f}"]

    cells = [name, *rate(successes)]
    if true is not None:
        cells += [*rate(true), f"{100 * (successes == true).mean():.0f} %"]
    return f"| {' | '.join(cells)} |"


def file_name(title: str) -> str:
    """Without spaces and signs."""
    return "_".join("".join(c if c.isalnum() or c == "." else " " for c in title).split())


def compare(title: str, rates: dict[str, np.ndarray], true: dict[str, np.ndarray], out: Path
            ) -> str:
    """A row of Pearson r and MMRV over the policies whose true rates are known, and the plot."""
    ours, theirs = (np.array([side[name] for name in true]) for side in (rates, true))
    points = {name: (theirs[i].mean(), ours[i].mean(),
                     *wilson(int(rates[name].sum()), len(rates[name])))
              for i, name in enumerate(true)}
    save_scatter(out / f"figure4_{file_name(title)}.png", points, "success in the simulator",
                 "success in the model")
    n = ours.shape[1]
    drawn = [agree(ours[:, picked], theirs[:, picked])
             for picked in np.random.default_rng(0).integers(n, size=(2000, n))]
    low, high = np.nanpercentile(drawn, (2.5, 97.5), axis=0)
    cells = [f"{value:.{digits}f} ({low[i]:.{digits}f} to {high[i]:.{digits}f})"
             for i, (value, digits) in enumerate(zip(agree(ours, theirs), (2, 2, 0), strict=True))]
    return f"| {title} | {' | '.join(cells)} |"


def agree(imagined: np.ndarray, true: np.ndarray) -> tuple[float, float, float]:
    """Pearson r, MMRV and the largest difference (points) of the success rates of outcomes
    [policies, starts]."""
    ours, theirs = imagined.mean(axis=1), true.mean(axis=1)
    return pearson(ours, theirs), mmrv(theirs, ours), 100 * np.abs(ours - theirs).max()


main = program(__name__, "policies", run, Settings, "Judge policies in the imagined world.")
