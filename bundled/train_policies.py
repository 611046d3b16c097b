"""Five policies that close a drawer, from hardly trained to converged, and a success classifier.

    pip install metaworld mujoco packaging     (and Debian's libosmesa6, to render off-screen)
    python -m bundled.train_policies

One run of behaviour cloning: a small network sees a frame and says what the scripted expert would
do there. Noise pushes the expert off its way, so that there are frames to learn from of how to come
back. Most checkpoints are from the beginning of the run: after a twentieth of it the drawer is
closed six times out of seven. A second network, the success classifier of evaluation/policies.py,
reads off the same frames, and those of random motions, how far the drawer is open.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bundled.record_drawer import STEPS_PER_FRAME, Simulator, plan
from evaluation.policies import MARKS, POLICIES, UNIT, policy_network, verifier_network
from evaluation.readers import fit
from model.saving import save
from support.options import option, program

TASK, FRAMES = "drawer-close-v3", 30
OPEN = 0.06  # metres: an episode begins with the drawer open by at least as much


def opening(simulator: Simulator) -> float:
    """Of the drawer, in metres."""
    return -float(simulator.env.data.joint("goal_slidey").qpos[0])


def begin(simulator: Simulator, rng: np.random.Generator) -> None:
    """A new layout with an open drawer."""
    simulator.reset(rng)
    while opening(simulator) < OPEN:
        simulator.reset(rng)


def hold(simulator: Simulator, action: np.ndarray) -> None:
    for _ in range(STEPS_PER_FRAME):
        simulator.advance(np.clip(action, -1, 1))


def record(simulator: Simulator, rng: np.random.Generator, expert: bool) -> dict[str, list]:
    """Frames, what the expert would do at each, and how far the drawer is open."""
    begin(simulator, rng)
    rows: dict[str, list] = {"frames": [], "actions": [], "opening": []}
    noise = plan("random", rng, FRAMES)
    for pushed in noise:
        wanted = np.clip(simulator.policy.get_action(simulator.observation), -1, 1)
        seen = simulator.render(), wanted, opening(simulator)
        for name, value in zip(rows, seen, strict=True):
            rows[name].append(value)
        hold(simulator, np.append(wanted[:3] + pushed[:3], wanted[3]) if expert else pushed)
    return rows


def record_all(path: Path, episodes: int) -> dict[str, np.ndarray]:
    """Episodes of the expert and half as many at random, read from `path` if they are there."""
    if not path.exists():
        simulator, everything = Simulator(TASK), []
        for i in tqdm(range(episodes + episodes // 2), "recording", unit="episode"):
            everything.append(record(simulator, np.random.default_rng([7, i]), i < episodes))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{name: np.array([rows[name] for rows in everything])
                          for name in everything[0]})
    return dict(np.load(path))


@dataclass
class Settings:
    episodes: int = option(200, "of the expert", least=21)
    verifier_steps: int = option(4000, "of the success classifier")
    recorded: str = option("recorded/policies.npz", "file of what is recorded")
    out: str = option(str(POLICIES), "file of the policies")


def run(args: Settings) -> None:
    rows = record_all(Path(args.recorded), args.episodes)
    held_out = 20  # the last episodes at random, and as many of the expert

    frames, actions = (rows[name][: args.episodes - held_out].reshape(-1, *shape) for name, shape
                       in (("frames", (64, 80, 3)), ("actions", (4,))))
    torch.manual_seed(0)
    policy, weights, last = policy_network(), {}, max(MARKS.values())
    names = {step: name for name, step in MARKS.items()}
    for step in tqdm(fit(policy, frames, actions, last), "policies", last):
        if step in names:
            weights[names[step]] = {name: tensor.detach().half().clone()
                                    for name, tensor in policy.state_dict().items()}

    verifier, every = verifier_network(), np.arange(len(rows["frames"]))
    tested = np.isin(every, [*range(args.episodes - held_out, args.episodes), *every[-held_out:]])
    frames, openings = rows["frames"], rows["opening"][..., None] / UNIT
    for _ in tqdm(fit(verifier, frames[~tested].reshape(-1, 64, 80, 3),
                      openings[~tested].reshape(-1, 1), args.verifier_steps), "verifier",
                  args.verifier_steps):
        pass
    off = 1000 * UNIT * np.abs(verifier.read(frames[tested]) - openings[tested])
    print(f"the classifier is off by {off.mean():.1f} mm (95 % below {np.percentile(off, 95):.1f}) "
          f"on {tested.sum()} held-out episodes")
    save(args.out, {"policies": weights, "verifier": {
        name: tensor.half() for name, tensor in verifier.state_dict().items()}})
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB")


main = program(__name__, "train_policies", run, Settings, "Train policies and the classifier.")
