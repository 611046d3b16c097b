"""Record 40 episodes of another task as a robot of one's own would: pictures and actions.npy.

    pip install metaworld mujoco packaging     (and Debian's libosmesa6, to render off-screen)
    python -m testing.record_folder my_robot plate-slide-side-v3
    python train.py --data folder --root my_robot
"""
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from bundled.record_drawer import BEHAVIOURS, Simulator, record


def main(root: Path, task: str) -> None:
    simulator = Simulator(task)
    for number in range(40):
        folder = root / f"episode_{number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        episode = record(simulator, BEHAVIOURS[number % 4], np.random.default_rng(number))
        for t, frame in enumerate(episode["frames"]):
            Image.fromarray(frame).save(folder / f"{t:06d}.png")
        np.save(folder / "actions.npy", episode["actions"])  # [T, 4], row t was taken at picture t
        print(f"{folder}: {len(episode['actions'])} frames", flush=True)
    keys = {"ArrowRight": {"dx": 1}, "ArrowLeft": {"dx": -1}, "ArrowUp": {"dy": 1},
            "ArrowDown": {"dy": -1}, "w": {"dz": 1}, "s": {"dz": -1},
            " ": {"gripper": 1, "toggles": True}}
    info = {"fps": 3, "names": ["dx", "dy", "dz", "gripper"], "keys": keys}
    (root / "info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2])
