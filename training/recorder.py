"""What the first process does beside the steps: log, validation, checkpoints, strips."""
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from data import Episodes, fit_frames
from dynamicrafter.checkpoint import is_finite
from model.saving import frozen_weights, save, trained_weights
from model.vid2world import Model
from sample import WorldModel, rollout
from support.errors import DataError, DivergedError
from support.pictures import psnr, save_strip
from training.run_folder import Claim, Log
from training.settings import Settings


class Recorder:
    """Log, validation, checkpoints and strips of a run; `validate` is `train.validate`."""

    def __init__(self, settings: Settings, model: Model, optimizer: torch.optim.Optimizer,
                 held_out: Episodes, validate: Callable[[], dict], saved: dict | None,
                 claim: Claim):
        self.settings, self.model, self.optimizer = settings, model, optimizer
        self.held_out, self.validate, self.claim = held_out, validate, claim
        self.out, self.start = Path(settings.out), saved["step"] if saved else 0
        self.began, self.lowest = time.monotonic(), (saved or {}).get("lowest", float("inf"))
        self.damaged: set[str] = set()
        if self.start == 0:
            save(self.out / "frozen.pt", {"weights": frozen_weights(model)})
            self.save_checkpoint(0)
            self.save_strip(0)
        self.log = Log(self.out, self.start)

    def record(self, step: int, loss: float, damaged: list[str], last: bool) -> None:
        settings = self.settings

        def due(every: int) -> bool:
            return last or step % every == 0

        held_out = self.validate() if due(settings.val_every) else {}
        self.claim.check()
        for message in sorted(set(damaged) - self.damaged):
            tqdm.write(f"skipped: {message}")
        self.damaged |= set(damaged)
        self.log.write(step, loss, held_out)
        if held_out and held_out["val"] < self.lowest:
            self.lowest = float(held_out["val"])
            self.save_checkpoint(step, "best.pt")
        if due(settings.save_every):
            self.save_checkpoint(step)
        if due(settings.sample_every):
            self.save_strip(step)
        if step == self.start + 1:
            self.began = time.monotonic()  # the first step is slower than the others
        if step == self.start + 11:
            self.announce_end(step, (time.monotonic() - self.began) / 10)

    def announce_end(self, step: int, seconds: float) -> None:
        left = (self.settings.steps - step) * seconds / 60
        if left > 1:
            tqdm.write(f"{seconds:.2f} s a step: about {left:.0f} minutes to go, strips not "
                       f"counted; --steps {self.settings.steps // 4} takes a quarter of the time "
                       "(Ctrl-C saves, --resume continues)")

    def save_checkpoint(self, step: int, name: str = "checkpoint.pt") -> None:
        """`best.pt` is without the optimizer: training goes on from the last step alone."""
        settings, model, best = self.settings, self.model, name == "best.pt"
        weights = trained_weights(model)
        state = {} if best else {"optimizer": self.optimizer.state_dict()}
        for key, weight in weights.items():
            if not is_finite(weight):
                raise DivergedError(f"step {step}: {key} holds numbers that are not finite; "
                                    f"{self.out} keeps its last checkpoint. A smaller learning "
                                    "rate may help")
        root = settings.root and str(Path(settings.root).resolve())
        save(self.out / name, {
            "config": asdict(model.config), "sampling": model.sampling,
            "weights": weights, "frozen": "frozen.pt",
            "data": {"name": settings.data, "root": root, "fps": settings.fps,
                     "names": self.held_out.dataset.names},
            "step": step, "lowest": self.lowest} | state)
        if step > 0 and not best:
            self.log.plot()

    def save_strip(self, step: int) -> None:
        """Roll out the start of a held-out episode, and put the frames under the true ones."""
        if not self.model.config.unet.causal:
            return
        episode = self.held_out[0]
        try:
            frames, actions = episode.read(0, self.settings.frames)
        except DataError as error:  # one damaged episode does not end a run
            return tqdm.write(f"no strip: {error}")
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.settings.bf16):
            imagined = rollout(WorldModel(self.model), frames, actions[:-1])
        self.model.train()
        truth = fit_frames(frames, *self.settings.size, self.model.config.fit)
        path = self.out / f"step_{step:07d}.png"
        rows = {f"truth: {episode.name}": truth, f"imagined after {step} steps": imagined}
        save_strip(path, rows)
        tqdm.write(f"step {step}: rollout at {psnr(imagined, truth)[1:].mean():.2f} dB, {path}")

    def summary(self) -> dict[str, str]:
        """The latest losses."""
        return self.log.summary() if self.log.rows else {}

    def finish(self, stopped: bool) -> None:
        words = [f"{name} {value}" for name, value in self.summary().items()]
        words.append(f"{len(self.damaged)} damaged episodes skipped")
        how = "stopped" if stopped else "done"
        print(f"{how} at step {len(self.log.rows)}: {', '.join(words)}")
        self.say_how_it_went()
        if stopped:
            print(f"resume: python train.py --resume --out {self.out}")
        elif self.model.config.unet.causal:
            print(f"see it: python sample.py --checkpoint {self.out} --guidance 2.0")

    def say_how_it_went(self) -> None:
        """Whether the world follows its actions: those of other clips raise its loss by more than
        two standard errors. And whether an earlier step was better."""
        rows = [row for row in self.log.rows if "val" in row]
        if rows and "gap" in rows[-1] and self.model.config.unet.causal:
            gap, error = rows[-1]["gap"], rows[-1]["gap_error"]
            follows = "follows" if gap > 2 * error else "does not follow"
            print(f"the world {follows} its actions: under those of other clips the held-out loss "
                  f"changes by {gap:+.4f} ± {error:.4f}")
        best = min(rows, key=lambda row: row["val"], default=None)
        if best and best is not rows[-1]:
            print(f"held-out loss was lowest at step {best['step']}: {best['val']:.4f}; now it is "
                  f"{rows[-1]['val']:.4f}: --checkpoint {self.out / 'best.pt'} is the world then")
