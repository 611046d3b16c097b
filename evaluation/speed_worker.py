"""One pass and one training step of the network that PYTHONPATH leads to, timed; for `python -m evaluation.speed --against`.

It has to run with older versions of this repository, so it asks no more of them than `unet.py`.
"""
import json
import resource
import sys
import time
from pathlib import Path

import torch

import dynamicrafter.model
from unet import UNet, UNetConfig


def fastest(work, rounds: int = 4) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


if __name__ == "__main__":
    getattr(dynamicrafter.model, "keep_freed_memory", lambda: None)()
    torch.manual_seed(0)
    unet = UNet(UNetConfig(model_channels=64, channel_mult=(1, 2, 4), context_dim=64, action_dim=13, causal=True,
                           norm_scope=sys.argv[1], dropout=0.0)).eval()
    for weight in unet.parameters():  # random everywhere: zeros would compare equal
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    x, image = torch.randn(2, 16, 8, 16, 20), torch.randn(2, 16, 16, 64)
    k, text, actions = torch.full((2, 16), 500), torch.randn(2, 77, 64), torch.randn(2, 16, 13)

    def run(clips: int) -> torch.Tensor:
        return unet(x[:clips], k[:clips], text[:clips], image[:clips], actions=actions[:clips])

    with torch.inference_mode():
        output = run(2)
        seconds = fastest(lambda: run(2))
    fused = "fused=True" in (Path(sys.modules["unet"].__file__).parent / "train.py").read_text()
    optimizer = torch.optim.AdamW(unet.parameters(), fused=fused, lr=1e-9)

    def train() -> None:
        run(1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    training = fastest(train)
    print(json.dumps({"pass": seconds, "training": training, "output": output[0, ::5, :, 3, 7].flatten().tolist(),
                      "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
