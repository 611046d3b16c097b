"""Training the small autoencoder of a world that is too small for Stable Diffusion's.

At full size the autoencoder is inherited and stays frozen. A model from scratch has none, so
`train.py` trains one on single frames first. The small one of a bundled base has not seen
everything, as Stable Diffusion's has: its decoder is shown the frames of the data first.
"""
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from support.errors import require_finite


def vary_colours(pixels: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1], half of them with their colours exchanged and every one in
    a light of its own, so that the decoder gives any object its own colour."""
    N, device = len(pixels), pixels.device
    exchanged = torch.stack([torch.randperm(3) for _ in range(N)]).to(device)
    exchanged = torch.where(torch.rand(N, 1, device=device) < 0.5, exchanged,
                            torch.arange(3, device=device))
    pixels = pixels.gather(1, exchanged[:, :, None, None].expand_as(pixels))
    contrast, light = torch.rand(2, N, 3, 1, 1, device=device)
    return (pixels * (0.5 + contrast) + 0.6 * (light - 0.5)).clamp(-1, 1)


def fit_autoencoder(autoencoder: nn.Module, batches: Iterable[Tensor], steps: int,
                    bf16: bool = False, decoder_only: bool = False) -> nn.Module:
    """Train an autoencoder to repeat frames, for worlds too small for Stable Diffusion's.

    batches       of pixels [N, 3, H, W] in [-1, 1]; `steps` of them
    bf16          compute in bfloat16
    decoder_only  leave the latents as they are: for frames of another kind than it has learned from

    Returns it with latents of unit standard deviation.
    """
    channels = autoencoder.config.latent_channels
    if not decoder_only:
        # little noise at first, or the decoder learns to ignore the latents
        nn.init.constant_(autoencoder.quant_conv.bias.data[channels:], -6)
    learn = list(autoencoder.parameters())
    if decoder_only:
        learn = [*autoencoder.decoder.parameters(), *autoencoder.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(learn, lr=2e-3, fused=True)
    def rate(i: int) -> float:
        return min(1, (i + 1) / 50) * (1 + math.cos(math.pi * i / steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    bar = tqdm(batches, desc="decoder" if decoder_only else "autoencoder", unit="step", total=steps)
    for pixels in bar:
        if not decoder_only:
            pixels = vary_colours(pixels)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
            with torch.set_grad_enabled(not decoder_only):
                mean, log_variance = autoencoder.moments(pixels).float().chunk(2, dim=1)
            z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            error = F.mse_loss(autoencoder.decoder(autoencoder.post_quant_conv(z)), pixels)
        # from a standard Gaussian
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        optimizer.zero_grad()
        (error + 1e-5 * divergence).backward()
        nn.utils.clip_grad_norm_(learn, 1.0)
        require_finite("the loss of the autoencoder", error.item())
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"{10 * math.log10(4 / error.item()):.1f} dB")
    if decoder_only:
        return autoencoder
    # bring the latents to unit standard deviation, in the two layers around them
    with torch.no_grad():
        scale = 1 / mean.std()
        autoencoder.quant_conv.weight[:channels] *= scale
        autoencoder.quant_conv.bias[:channels] *= scale
        autoencoder.quant_conv.bias[channels:] += 2 * scale.log()
        autoencoder.post_quant_conv.weight /= scale
    return autoencoder
