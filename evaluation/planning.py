"""Choose actions in the imagined world, and see whether they were the right ones.

    pip install metaworld mujoco packaging     (without them: the imagined half)
    python -m evaluation.planning

An imperfect policy closes a drawer (evaluation/policies.py). A proposal is that policy with a noise
of its own on top. At a decision K of them are imagined for H frames, all in the same noise of the
world; a small network reads off their ends how far the drawer is open. The best is followed,
until it is decided anew.

    policy alone   no noise, no world          world      the best in the world
    random         any of the proposals        CEM        the same, then as many more about
    shuffled       the best in a world that               the best four (cross-entropy method)
                   mixes up their actions      simulator  the best in the simulator itself

Success is counted in the simulator, and as imagined at the last decision. A world that is too kind
is fooled: it sees a drawer closed that stays open. Could it have known? Four other seeds are asked
for the same end, and their standard deviation is its doubt. (The paper leaves planning out, A.7.)
"""
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bundled.record_drawer import Simulator, smooth_noise
from bundled.train_policies import TASK, begin, hold, opening
from evaluation.comparison import decisive, kept, measure_all
from evaluation.evaluate import WorldSettings
from evaluation.intervals import rate_and_interval
from evaluation.policies import CLOSED, HORIZON, MARKS, STARTS, load_policies, policy_action
from sample import WorldModel
from support.errors import RequestError
from support.options import option, program
from support.pictures import save_gif

METHODS = ("policy alone", "random", "shuffled", "world", "CEM", "simulator")
ELITE, ROUNDS, LEAST = 4, 2, 0.1  # of CEM: the best, how often, the least deviation
SEEN, SEEDS = 8, 4  # real frames that the world is given; seeds that doubt


@dataclass
class Settings(WorldSettings):
    starts: int = option(30, "of every method")
    methods: list[str] | None = option(None, "which; if left out, all", nargs="+", choices=METHODS)
    policy: str = option("120 steps", "that proposes", choices=list(MARKS))
    proposals: int = option(16, "imagined at a decision", least=ELITE)
    horizon: int = option(20, "frames of a proposal")
    execute: int = option(20, "of them that are followed")
    noise: float = option(0.5, "standard deviation of a proposal's noise", least=0)
    out: str = option("evaluations/planning", "folder for the results")


class SharedNoise(WorldModel):
    """Worlds side by side that differ by their actions alone."""

    def noise(self, B: int, T: int) -> torch.Tensor:
        return super().noise(1, T).expand(B, -1, -1, -1, -1)


class Planner:
    """The policy, the worlds, and what reads a drawer."""

    def __init__(self, settings: Settings):
        self.settings, model = settings, settings.load_world().model
        policies, self.verifier = load_policies()
        self.policy = policies[settings.policy]
        self.world, self.doubtful = (
            kind(model, guidance=1.0, steps=settings.steps, eta=settings.eta, seed=settings.seed)
            for kind in (SharedNoise, WorldModel))

    def act(self, frames: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """What the policy does at frames [K, H, W, 3], with noise [K, 4]: [K, 4]."""
        return np.clip(self.policy.read(frames) + noise, -1, 1)

    def imagine(self, world: WorldModel, real: "Start", noise: np.ndarray, shuffled: bool = False
                ) -> tuple[np.ndarray, np.ndarray]:
        """Futures [K, h, H, W, 3] of proposals with noise [K, h, 4], and how far the drawer is open
        at their ends [K], from where a start has been driven."""
        K, seen = len(noise), np.stack(real.frames[-SEEN:])
        done = np.reshape(real.actions[len(real.actions) - len(seen) + 1 :], (-1, 4))
        frames, actions = (np.repeat(rows[None], K, axis=0) for rows in (seen, done))
        world.reset(frames, policy_action(actions))
        future = [np.repeat(seen[-1:], K, axis=0)]
        for t in range(noise.shape[1]):
            action = policy_action(self.act(future[-1], noise[:, t]))
            future.append(world.step(np.roll(action, 1, axis=0) if shuffled else action))
        return np.stack(future[1:], axis=1), self.verifier.opening(future[-1])

    def decide(self, method: str, real: "Start", random: np.random.Generator) -> np.ndarray:
        """The noise [h, 4] to go on with."""
        h = min(self.settings.horizon, HORIZON - len(real.actions))
        noise = np.stack([self.settings.noise * smooth_noise(random, (h, 4), memory=0.8)
                          for _ in range(self.settings.proposals)])
        if method in ("policy alone", "random"):
            return noise[0] * (method == "random")
        rounds = ROUNDS if method == "CEM" else 1
        while True:
            ends = (real.ends(noise) if method == "simulator"
                    else self.imagine(self.world, real, noise, method == "shuffled")[1])
            rounds -= 1
            if rounds == 0:
                return noise[ends.argmin()]
            best = noise[ends.argsort()[:ELITE]]
            spread = np.maximum(best.std(axis=0), LEAST)
            drawn = spread * random.standard_normal((len(noise) - 1, h, 4))
            noise = np.concatenate([best[:1], best.mean(axis=0) + drawn])


class Start:
    """One start, and what has been seen and done from there, in the simulator."""

    def __init__(self, planner: Planner, seed: int, simulator: Simulator):
        self.planner, self.simulator = planner, simulator
        begin(simulator, np.random.default_rng([11, seed]))
        self.frames, self.actions = [simulator.render()], []

    def step(self, action: np.ndarray) -> np.ndarray:
        hold(self.simulator, action)
        return self.simulator.render()

    def opening(self) -> float:
        return opening(self.simulator)

    def follow(self, noise: np.ndarray) -> None:
        for one in noise:
            self.actions.append(self.planner.act(self.frames[-1][None], one)[0])
            self.frames.append(self.step(self.actions[-1]))

    def ends(self, noise: np.ndarray) -> np.ndarray:
        """How far the drawer is open [K] after proposals [K, h, 4], which are undone."""
        state, seen, done, found = self.simulator.state(), self.frames, self.actions, []
        for proposal in noise:
            self.frames, self.actions = list(seen), list(done)
            self.follow(proposal)
            found.append(self.opening())
            self.simulator.restore(state)
        self.frames, self.actions = seen, done
        return np.array(found)


class ImaginedStart(Start):
    """Where there is no simulator, another seed of the world stands in for it."""

    def __init__(self, planner: Planner, seed: int):
        self.planner, self.frames, self.actions = planner, [np.load(STARTS)["frames"][seed]], []
        self.world = WorldModel(planner.world.model, 1.0, seed=1000 + seed)
        self.world.reset(self.frames[0][None])

    def step(self, action: np.ndarray) -> np.ndarray:
        return self.world.step(policy_action(action))

    def opening(self) -> float:
        return float(self.planner.verifier.opening(self.frames[-1]))


def attempt(planner: Planner, method: str, start: Start, seed: int) -> dict[str, float]:
    """Drive the start to its end: metres and seconds, and an animation."""
    random, begun, seconds, imagined = np.random.default_rng([13, seed]), start.opening(), [], []
    while len(start.actions) < HORIZON:
        began = time.monotonic()
        noise = planner.decide(method, start, random)
        seconds.append(time.monotonic() - began)
        followed = noise[: planner.settings.execute]
        future, end = planner.imagine(planner.world, start, noise[None])
        imagined += list(future[0, : len(followed)])
        if len(start.actions) + len(followed) == HORIZON:
            _, others = planner.imagine(planner.doubtful, start, np.repeat(noise[None], SEEDS, 0))
        start.follow(followed)
    result = {"begun": begun, "real": start.opening(), "imagined": float(end[0]),
              "doubt": float(others.std(ddof=1)), "seconds": float(np.mean(seconds))}
    if method == "world":
        how = "closed" if result["real"] < CLOSED else "fooled" if end[0] < CLOSED else "open"
        save_gif(Path(planner.settings.out) / f"{how}_{seed}.gif",
                 {"what happened": np.stack(start.frames[1:]),
                  "what was imagined": np.stack(imagined)}, fps=6)
    return result


def run(settings: Settings) -> None:
    (out := Path(settings.out)).mkdir(parents=True, exist_ok=True)
    planner, methods, simulator = Planner(settings), settings.methods or list(METHODS), None
    try:
        simulator = Simulator(TASK)
    except RequestError as error:
        methods = [method for method in methods if method != "simulator"]
        if not methods:
            raise
        print(f"{error}. Without it, another seed of the world stands in for it", flush=True)

    def measure(method: str, seed: int) -> dict:
        def make() -> dict:
            start = (Start(planner, seed, simulator) if simulator else ImaginedStart(planner, seed))
            return attempt(planner, method, start, seed)
        return kept(out / f"{method.replace(' ', '_')}_{seed}.json",
                    decisive(settings) | {"simulator": bool(simulator)}, make)

    results = measure_all(methods, settings.starts, measure)
    begun = 100 * np.array([run["begun"] for run in results[methods[0]]])
    lines = [f"{settings.starts} starts, {(begun < 100 * CLOSED).sum()} of them solved already and "
             f"left out; drawers open by {begun.mean():.0f} cm in the mean, closed below "
             f"{100 * CLOSED:.0f}; {HORIZON} frames, {settings.proposals} proposals of "
             f"{settings.horizon}, {settings.execute} followed; {planner.world.sampling}", "",
             "| method | success | as imagined | fooled | seconds a decision |", f"|{' --- |' * 5}"]
    fooled, honest = [], []
    for method, runs in results.items():
        runs = [run for run in runs if run["begun"] >= CLOSED]
        real, imagined, doubts = (np.array([run[name] for run in runs])
                                  for name in ("real", "imagined", "doubt"))
        real, imagined = real < CLOSED, imagined < CLOSED
        kind = imagined & ~real
        rates = " | ".join("{} ({})".format(*rate_and_interval(side)) for side in (real, imagined))
        lines.append(f"| {method} | {rates} | {kind.sum()} of {imagined.sum()} | "
                     f"{np.mean([run['seconds'] for run in runs]):.1f} |")
        fooled, honest = [*fooled, *doubts[kind]], [*honest, *doubts[imagined & real]]
    if fooled and honest:
        more = np.mean(np.array(fooled)[:, None] > np.array(honest))
        lines += ["", f"doubt where fooled {1000 * np.mean(fooled):.1f} mm, where right "
                  f"{1000 * np.mean(honest):.1f}; the first is larger in {100 * more:.0f} % of "
                  "pairs, and in 50 where doubt says nothing"]
    print("\n" + "\n".join(lines))
    (out / "planning.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


main = program(__name__, "planning", run, Settings, "Choose actions in the imagined world.")
