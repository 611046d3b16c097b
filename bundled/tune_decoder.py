"""Teach the decoder of a run the look of its own data: python -m bundled.tune_decoder runs/world

In the paper the autoencoder is Stable Diffusion's, which has seen everything, and stays frozen. The
small one of the bundled base has seen no drawer. Only the decoder changes here, so the U-Net, which
knows nothing but latents, needs no retraining.
"""
import argparse
from pathlib import Path

from data import open_episodes, random_frames
from dynamicrafter.checkpoint import read_checkpoint
from model.memory import keep_malloc_heap
from model.saving import load_model, save
from model.vid2world import to_pixels
from training.run_folder import read_settings
from training.tiny_autoencoder import fit_autoencoder


def tune_decoder(run: Path, steps: int, bf16: bool = False) -> None:
    settings = argparse.Namespace(**read_settings(run))
    model, frozen = load_model(run), read_checkpoint(run / "frozen.pt")["weights"]
    episodes = open_episodes(settings.data, settings.root, "train")
    frames = random_frames(episodes, tuple(settings.size), settings.seed, steps, settings.workers)
    pixels = (to_pixels(batch[None])[0] for batch in frames)
    fit_autoencoder(model.autoencoder, pixels, steps, bf16, decoder_only=True)
    tuned = model.state_dict()
    save(run / "frozen.pt", {"weights": {name: tuned[name] for name in frozen}})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune the decoder of a run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    keep_malloc_heap()
    tune_decoder(args.run, args.steps, args.bf16)
