"""Does the drawer move when it is pushed, and only then? python -m evaluation.contact

What the policies did in the simulator (bundled/judge_in_simulator.py) is done again in the imagined
world: the same first frames, the same actions. A small network reads off every frame how far the
drawer is open, and that is compared with how far it was.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.evaluate import WorldSettings, rollout_batch
from evaluation.policies import MARKS, STARTS, load_policies, policy_action
from support.options import option, program
from support.pictures import save_curves

MOVED = 0.02  # metres
HEAD = """| actions of | the drawer moves | of these in the model | of the others | mm off | mean |
| --- | --- | --- | --- | --- | --- |"""


@dataclass
class Settings(WorldSettings):
    guidance: float | None = option(None, "as in sample.py", type=float)
    starts: int = option(50, "of every policy")
    out: str = option("evaluations/contact", "folder for the plot")


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


def run(settings: Settings) -> None:
    world = settings.load_world(guidance=settings.guidance)
    (_, verifier), truth = load_policies(), np.load(STARTS)
    starts, found = truth["frames"][: settings.starts], {}
    print(f"{len(starts)} starts a policy; {world.sampling}\n\n{HEAD}")
    for name in MARKS:
        actions = policy_action(truth[f"{name}, actions"][: settings.starts])
        videos = rollout_batch(world, starts[:, None], actions, batch=settings.batch)
        found[name] = truth[name][: settings.starts], verifier.opening(videos)
        print(f"| {name} | {describe(*found[name])} |", flush=True)
    true, imagined = (np.concatenate(side) for side in zip(*found.values(), strict=True))
    print(f"| all | {describe(true, imagined)} |")
    (out := Path(settings.out)).mkdir(parents=True, exist_ok=True)
    curves = {label: list(enumerate(1000 * rows[moves(true)].mean(axis=0)))
              for label, rows in (("in the simulator", true), ("in the model", imagined))}
    save_curves(out / "contact.png", curves, "frame")
    print(f"\nplot: {out / 'contact.png'}, the opening in mm where the drawer moves")


main = program(__name__, "contact", run, Settings, "Measure whether the drawer moves when it is "
               "pushed, and only then.")
