"""Every frame its own noise level: diffusion forcing.

A video diffusion model noises all frames of a clip equally and denoises them together, so it can only ever
make whole clips. Give every frame a noise level of its own in training, drawn independently,

    training      k = 512  37 901 240 688        any mixture of clear and noisy frames
    rollout       k =  39  39  39  39 999→0      a clear past, and one frame being imagined

and the same network learns every mixture, among them the one that a world model needs. History stays at a
small noise level, never at zero: a little noise hides the small errors of imagined frames, which would
otherwise add up from step to step.

The noise itself (variances ᾱ, signal scaling, velocity target) is DynamiCrafter's:

    x = √ᾱ·s·z + √(1-ᾱ)·ε        z clean latents, ε Gaussian noise, s = scale[k]
    v = √ᾱ·ε - √(1-ᾱ)·s·z        what the network predicts

Two details of it matter. ᾱ at the last level is exactly zero ("zero terminal SNR"), so sampling really starts from
noise. And the signal is scaled down by s at high levels, to 0.7 (DynamiCrafter-512) or 0.3 (1024), since
larger pictures survive more noise.

Paper: section 3 and 4.1; diffusion forcing: Chen et al. 2024, arXiv 2407.01392.
"""
from typing import Callable

import torch
from torch import Tensor, nn

LEVELS = 1000


class NoiseSchedule(nn.Module):
    """DynamiCrafter's noise levels 0 (nearly clean) .. 999 (pure noise).

    .alphas_cumprod [1000] and .scale [1000] are buffers, so `.to(device)` moves them; neither is saved.
    Everywhere, z and x are [B, T, ...] and k is an int, [B] or [B, T].
    """

    def __init__(self, base_scale: float = 0.7):
        super().__init__()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, LEVELS, dtype=torch.float64) ** 2
        signal = (1 - betas).cumprod(0).sqrt()
        # Rescale so that the first level keeps its signal and the last has none (Lin et al. 2023, algorithm 1).
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        scale = torch.full((LEVELS,), base_scale, dtype=torch.float64)
        scale[:400] = torch.linspace(1, base_scale, 400, dtype=torch.float64)
        self.register_buffer("alphas_cumprod", (signal**2).float(), persistent=False)
        self.register_buffer("scale", scale.float(), persistent=False)

    def add_noise(self, z: Tensor, k: Tensor | int, noise: Tensor) -> Tensor:
        """Clean latents z and Gaussian noise, both [B, T, C, h, w], to noisy ones at level k."""
        alpha, scale = self._at(k, z)
        return alpha.sqrt() * scale * z + (1 - alpha).sqrt() * noise

    def velocity(self, z: Tensor, k: Tensor | int, noise: Tensor) -> Tensor:
        """What the network is trained to predict from `add_noise(z, k, noise)`."""
        alpha, scale = self._at(k, z)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * scale * z

    def ddim_levels(self, steps: int) -> list[int]:
        """The levels that sampling visits, descending, evenly spaced from 999 on ("trailing"): 999, 979, …, 19 for 50."""
        if not 1 <= steps <= LEVELS:
            raise ValueError(f"steps is {steps}; it must be between 1 and {LEVELS}")
        return [round(LEVELS - i * LEVELS / steps) - 1 for i in range(steps)]

    def ddim_sigma(self, k: Tensor | int, k_next: Tensor | int, eta: float, like: Tensor) -> Tensor:
        """Standard deviation of the fresh noise of a step from k to k_next (Song et al. 2021, equation 16)."""
        alpha, alpha_next = self._at(k, like)[0], self._at(k_next, like)[0]
        return eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).sqrt()

    def ddim_step(self, x: Tensor, v: Tensor, k: Tensor | int, k_next: Tensor | int, eta: float = 1.0,
                  noise: Tensor | None = None) -> Tensor:
        """One step of sampling, from level k to k_next (Song et al. 2021, equation 12).

        x [B, T, C, h, w] at level k, v the predicted velocity, noise the fresh Gaussian noise (drawn here if
        None; unused at eta = 0). The last step goes to k_next = 0 and returns latents without the signal scale.
        """
        alpha, scale = self._at(k, x)
        alpha_next, scale_next = self._at(k_next, x)
        sigma = self.ddim_sigma(k, k_next, eta, like=x)
        clean = (alpha.sqrt() * x - (1 - alpha).sqrt() * v) * (scale_next / scale)
        predicted_noise = alpha.sqrt() * v + (1 - alpha).sqrt() * x
        direction = (1 - alpha_next - sigma**2).clamp(min=0).sqrt() * predicted_noise
        if eta > 0:
            direction = direction + sigma * (torch.randn_like(x) if noise is None else noise)
        return alpha_next.sqrt() * clean + direction

    def _at(self, k: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """ᾱ and the signal scale at level k, in shapes that multiply a [B, T, C, h, w]."""
        k = torch.as_tensor(k, device=self.scale.device)
        k = k.view(k.shape + (1,) * (like.ndim - k.ndim))  # [B, T] -> [B, T, 1, 1, 1]
        return self.alphas_cumprod[k], self.scale[k]


def diffusion_forcing_loss(denoise: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule, latents: Tensor,
                           k: Tensor, noise: Tensor, measure: str = "velocity") -> Tensor:
    """Mean squared error of the prediction, every frame at a level of its own.

    denoise(x, k) -> v is the network with its conditions filled in
    latents, noise [B, T, C, h, w]; k [B, T], drawn uniformly from 0..999, independently per frame
    measure  "velocity", the paper's: of v itself. At low levels v is almost all noise, which a nearly clean frame hides best,
             so there the loss is largest, and there is least to learn about the world.
             "clean": of the clean latents that v stands for, s·z = √ᾱ·x - √(1-ᾱ)·v; so of √(1-ᾱ)·v.

    Paper: section 4.1, the training objective.
    """
    x = schedule.add_noise(latents, k, noise)
    error = denoise(x, k).float() - schedule.velocity(latents, k, noise)
    if measure == "clean":
        alpha, _ = schedule._at(k, x)
        error = (1 - alpha).sqrt() * error
    return error.square().mean()
