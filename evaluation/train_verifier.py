"""A success classifier from labelled episodes: python -m evaluation.train_verifier labels.csv

    python -m evaluation.train_verifier labels.csv --root my_robot --out verdict.pt

labels.csv has rows `episode,success`: the name of an episode's folder, and 1 or 0. The classifier
sees an episode's last frame; how often it is right is told by a fifth of the episodes, which it
does not learn from. For `python -m evaluation.policies --verifier verdict.pt`.
"""
import csv
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from data import DATA_SETS, open_episodes
from evaluation.intervals import wilson
from evaluation.policies import verifier_network
from evaluation.readers import fit
from model.saving import save
from support.errors import DataError, reading
from support.options import argument, option, program


@dataclass
class Settings:
    labels: str = argument("CSV of episode, success")
    data: str = option("folder", "data set", choices=DATA_SETS)
    root: str | None = option(None, "its folder")
    steps: int = option(800, "of training")
    out: str = option("verdict.pt", "file of the classifier")


def read_labelled(settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Last frames uint8 [N, H, W, 3] and success [N] of labelled episodes. Raises DataError."""
    with reading(settings.labels), open(settings.labels, encoding="utf-8", newline="") as file:
        labels = {row["episode"]: int(row["success"]) for row in csv.DictReader(file)}
    episodes = open_episodes(settings.data, settings.root, "all")
    known = {episode.name.rpartition("/")[2]: episode for episode in episodes}
    if unknown := sorted(labels.keys() - known.keys()):
        raise DataError(f"{settings.labels} has {unknown[0]!r:.60}, and there is no such episode; "
                        f"there are {', '.join(sorted(known)[:3])}, …")
    success = np.array(list(labels.values()))
    if min((success == 1).sum(), (success == 0).sum()) < 5:
        raise DataError(f"{settings.labels} has {(success == 1).sum()} successes among "
                        f"{len(success)} episodes; a classifier needs 5 or more of each kind")
    last = [known[name].read(known[name].length - 1, known[name].length)[0][0] for name in labels]
    return np.stack(last), success


def run(settings: Settings) -> None:
    frames, success = read_labelled(settings)
    order = np.random.default_rng(0).permutation(len(frames))
    tested, learned = np.split(order, [max(1, len(frames) // 5)])
    torch.manual_seed(0)
    network = verifier_network()
    for _ in tqdm(fit(network, frames[learned], success[learned, None], settings.steps, size=32),
                  "verifier", settings.steps, disable=None):
        pass
    right = (network.read(frames[tested])[:, 0] > 0.5) == success[tested]
    low, high = wilson(int(right.sum()), len(right))
    print(f"right about {right.sum()} of {len(right)} episodes that it has not seen "
          f"({100 * low:.0f} to {100 * high:.0f} %)")
    save(settings.out, {"verifier": network.state_dict()})


main = program(__name__, "train_verifier", run, Settings, "Train a success classifier.")
