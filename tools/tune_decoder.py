"""Teach the decoder of a run the look of its own data, the latents staying as they are: python -m tools.tune_decoder runs/world

In the paper the autoencoder is Stable Diffusion's, which has seen everything, and stays frozen. The small one of the bundled
base has seen no drawer. Only the decoder changes here, so the U-Net, which knows nothing but latents, needs no retraining.
"""
import argparse
import json
from pathlib import Path

from data import default_root, open_episodes, random_frames
from dynamicrafter.autoencoder import fit_autoencoder
from dynamicrafter.model import keep_freed_memory, load_model, save, to_pixels
from unet import read_checkpoint


def tune_decoder(run: Path, steps: int, bf16: bool = False) -> None:
    arguments = argparse.Namespace(**json.loads((run / "arguments.json").read_text()))
    model, frozen = load_model(run), read_checkpoint(run / "frozen.pt")["weights"]
    episodes = open_episodes(arguments.data, arguments.root or default_root(arguments.data), "train")
    frames = random_frames(episodes, tuple(arguments.size), arguments.seed, steps, arguments.workers)
    fit_autoencoder(model.autoencoder, (to_pixels(batch[None])[0] for batch in frames), steps, bf16, decoder_only=True)
    tuned = model.state_dict()
    save(run / "frozen.pt", {"weights": {name: tuned[name] for name in frozen}})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune the decoder of a run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    tune_decoder(args.run, args.steps, args.bf16)
