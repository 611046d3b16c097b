"""How often do the policies close the drawer in the simulator? python -m bundled.judge_in_simulator

50 seeded starts a policy. What is written beside the samples is each start's first frame, and for
every policy what it did and how far the drawer was open at every frame: the truth that
evaluation/policies.py is compared with.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bundled.record_drawer import Simulator
from bundled.train_policies import TASK, begin, hold, opening
from evaluation.policies import CLOSED, HORIZON, POLICIES, STARTS, load_policies
from evaluation.readers import FrameReader
from support.options import option, program


def judge(simulator: Simulator, policy: FrameReader, seed: int
          ) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Frames, what was done between them [HORIZON, 4], and how far the drawer is open at each."""
    begin(simulator, np.random.default_rng([11, seed]))
    frames, actions, openings = [simulator.render()], [], [opening(simulator)]
    for _ in range(HORIZON):
        actions.append(np.clip(policy.read(frames[-1][None])[0], -1, 1))
        hold(simulator, actions[-1])
        frames.append(simulator.render())
        openings.append(opening(simulator))
    return np.stack(frames), np.stack(actions), openings


@dataclass
class Settings:
    starts: int = option(50, "of every policy")
    policies: str = option(str(POLICIES), "file of the policies")
    out: str = option(str(STARTS), "file for their true outcomes")


def run(settings: Settings) -> None:
    simulator = Simulator(TASK)
    policies, verifier = load_policies(Path(settings.policies))
    truth: dict[str, np.ndarray] = {}
    agree = []
    for name, policy in policies.items():
        runs = [judge(simulator, policy, seed) for seed in tqdm(range(settings.starts), name)]
        frames, actions, openings = (np.stack(each) for each in zip(*runs, strict=True))
        truth |= {"frames": frames[:, 0], name: openings.astype(np.float32),
                  f"{name}, actions": actions.astype(np.float32)}
        closed = openings[:, -1] < CLOSED
        agree.append((verifier.opening(frames[:, -1]) < CLOSED) == closed)
        print(f"{name}: {100 * closed.mean():.0f} % of {settings.starts} closed", flush=True)
    print(f"the classifier agrees with the simulator on {100 * np.mean(agree):.1f} % of the ends")
    np.savez_compressed(settings.out, **truth)
    print(f"{settings.out}: {Path(settings.out).stat().st_size / 1e6:.1f} MB")


main = program(__name__, "judge_in_simulator", run, Settings, "Run the policies in the simulator.")
