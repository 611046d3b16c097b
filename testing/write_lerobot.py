"""Write testing/lerobot/: small data sets by the lerobot package itself, in an environment of its
own.

    pip install lerobot==0.3.3 && python testing/write_lerobot.py testing/lerobot/v2.1
    pip install lerobot==0.4.4 && python testing/write_lerobot.py testing/lerobot/v3.0

Each picture shows the number of its frame as a row of eight bits, white for 1.
"""
import inspect
import sys

import numpy as np

CAMERAS = {"observation.images.front": (64, 80, 3), "observation.images.wrist": (64, 64, 3)}
LENGTHS = (20, 17, 23)


def draw(number: int, height: int, width: int, _: int) -> np.ndarray:
    picture, side = np.full((height, width, 3), 40, np.uint8), width // 8
    for bit in range(8):
        if number >> bit & 1:
            picture[8 : 8 + side, bit * side : (bit + 1) * side] = 230
    return picture


def write(root: str) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    sides = ["height", "width", "channels"]
    features = {name: {"dtype": "video", "shape": shape, "names": sides}
                for name, shape in CAMERAS.items()}
    features["action"] = {"dtype": "float32", "shape": (3,), "names": ["x", "y", "g"]}
    dataset = LeRobotDataset.create("testing/small", fps=10, root=root, features=features)
    random = np.random.default_rng(0)
    for episode, length in enumerate(LENGTHS):
        actions = random.standard_normal((length, 3)).astype(np.float32)
        for t in range(length):
            frame = {name: draw(32 * episode + t, *shape) for name, shape in CAMERAS.items()}
            frame["action"] = actions[t]
            if "task" in inspect.signature(dataset.add_frame).parameters:  # before 0.4
                dataset.add_frame(frame, task="count")
            else:
                dataset.add_frame(frame | {"task": "count"})
        dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()


if __name__ == "__main__":
    write(sys.argv[1])
