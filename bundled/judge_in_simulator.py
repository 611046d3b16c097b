"""How often do the policies close the drawer in the simulator? python -m bundled.judge_in_simulator

50 seeded starts a policy; what is written beside the samples is each start's first frame, and for
every policy how far the drawer was open in the end: the truth that evaluation/policies.py is
compared with.
"""
import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bundled.record_drawer import Simulator
from bundled.train_policies import TASK, begin, hold, opening
from evaluation.policies import CLOSED, HORIZON, POLICIES, STARTS, load_policies, to_action


def judge(simulator: Simulator, policy, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """First and last frame, and how far the drawer is open after HORIZON frames."""
    begin(simulator, np.random.default_rng([11, seed]))
    first = frame = simulator.render()
    for _ in range(HORIZON):
        action = to_action(policy.read(frame[None]))[0]
        hold(simulator, np.append(action[10:13], action[3]))
        frame = simulator.render()
    return first, frame, opening(simulator)


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the policies in the simulator.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--starts", type=int, default=50)
    parser.add_argument("--policies", type=Path, default=POLICIES)
    parser.add_argument("--out", type=Path, default=STARTS)
    args = parser.parse_args()
    simulator, (policies, verifier) = Simulator(TASK), load_policies(args.policies)
    openings, firsts, agree = {}, [], []
    for name, policy in policies.items():
        ends = [judge(simulator, policy, seed) for seed in tqdm(range(args.starts), name)]
        firsts = np.stack([first for first, _, _ in ends])
        openings[name] = np.array([end for _, _, end in ends])
        read = verifier.opening(np.stack([last for _, last, _ in ends]))
        agree.append((read < CLOSED) == (openings[name] < CLOSED))
        print(f"{name}: {100 * (openings[name] < CLOSED).mean():.0f} % of {args.starts} closed")
    print(f"the verifier agrees with the simulator on {100 * np.mean(agree):.1f} % of the ends")
    np.savez_compressed(args.out, frames=firsts, **openings)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
