"""Every frame its own noise level: diffusion forcing.

A video diffusion model noises all frames of a clip equally and denoises them together, so it can
only make whole clips. Give every frame a noise level of its own in training, drawn independently,

    training      k = 512  37 901 240 688        any mixture of clear and noisy frames
    rollout       k =  39  39  39  39 999→0      a clear past, and one frame being predicted

and the same network learns every mixture, among them the one that a world model needs. At inference
the history stays at a small noise level, never at zero: a little noise hides the small errors of
predicted frames, which would otherwise accumulate from step to step.

The noise itself (variances ᾱ, signal scale s, velocity target v) is DynamiCrafter's:

    x = √ᾱ·s·z + √(1-ᾱ)·ε        z clean latents, ε Gaussian noise
    v = √ᾱ·ε - √(1-ᾱ)·s·z        what the network predicts

ᾱ at the last level is exactly zero ("zero terminal SNR"), so sampling starts from pure noise. The
signal scale falls to 0.7 (DynamiCrafter-512) or 0.3 (1024) at high levels, since larger pictures
survive more noise.

    python diffusion_forcing.py        shows levels as digits, and a rollout with a perfect network

Paper: sections 3 and 4.1, Algorithms 1 and 2.
Diffusion forcing: Chen et al. 2024, arXiv 2407.01392.
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

LEVELS = 1000


# --------------------------------------------------------------------------------------------------
# A level per frame


def draw_levels(shape: tuple[int, ...], generator: torch.Generator | None = None,
                shared_level: bool = False, low_noise_prob: float = 0.0) -> Tensor:
    """Noise levels for training, int64 [..., T]: uniform, each frame's drawn independently.

    shared_level    one level for all frames of a clip: what a passive video model trains with
    low_noise_prob  probability that a frame draws from the lowest tenth of the levels instead. The
                    history of a rollout has low noise, and uniform levels rarely have: two frames
                    in a row are below level 100 once in a hundred times. 0 is the paper's.

    Paper: section 4.1, Algorithm 1.
    """
    # k_t ~ U{0, …, 999}
    k = torch.randint(LEVELS, shape, generator=generator)
    if shared_level:
        return k[..., :1].expand(shape)
    if low_noise_prob:
        low_noise = torch.rand(shape, generator=generator) < low_noise_prob
        return torch.where(low_noise, k // 10, k)
    return k


def rollout_levels(history: int, history_level: int, k: int, branches: int = 1) -> Tensor:
    """Levels of a window, int64 [history + branches]: a history with little noise, the newest frame
    at k. Paper: B.4."""
    return torch.tensor([history_level] * history + [k] * branches)


def diffusion_forcing_loss(denoise: Callable[[Tensor, Tensor], Tensor], schedule: "NoiseSchedule",
                           latents: Tensor, k: Tensor, noise: Tensor,
                           weighting: str = "velocity") -> Tensor:
    """Mean squared error of the predicted velocity, every frame at a level of its own; a scalar.

    denoise(x, k) -> v      the network with its conditions filled in
    latents, noise          [B, T, C, h, w]
    k                       [B, T], from `draw_levels`
    weighting               "velocity" weights all levels alike (the paper's). "x0" is the loss on
                            the clean latents: nearly clean frames, whose velocity is unpredictable
                            noise, then count little.

    Paper: section 4.1, Algorithm 1.
    """
    x = schedule.add_noise(latents, k, noise)
    error = denoise(x, k).float() - schedule.velocity(latents, k, noise)
    if weighting == "x0":
        # ẑ - z = -√(1-ᾱ) (v̂ - v)
        alpha, _ = schedule.coefficients(k, x)
        error = (1 - alpha).sqrt() * error
    # L = ‖v̂ - v‖²
    return error.square().mean()


# --------------------------------------------------------------------------------------------------
# The noise itself, inherited from DynamiCrafter


class NoiseSchedule(nn.Module):
    """DynamiCrafter's noise levels 0 (nearly clean) .. 999 (pure noise).

    .alphas_cumprod [1000] and .scale [1000] are buffers, so `.to(device)` moves them; neither is
    saved. Everywhere, z and x are [B, T, ...] and k is an int, [B] or [B, T].
    """

    def __init__(self, base_scale: float = 0.7):
        super().__init__()
        # √β linear in k; √ᾱ_k = √Π (1 - β)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, LEVELS, dtype=torch.float64) ** 2
        signal = (1 - betas).cumprod(0).sqrt()
        # zero terminal SNR: √ᾱ ← (√ᾱ - √ᾱ_999) · √ᾱ_0 / (√ᾱ_0 - √ᾱ_999)   (Lin et al. 2023)
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        # s falls linearly over the first 400 levels and stays
        scale = torch.full((LEVELS,), base_scale, dtype=torch.float64)
        scale[:400] = torch.linspace(1, base_scale, 400, dtype=torch.float64)
        self.register_buffer("alphas_cumprod", (signal**2).float(), persistent=False)
        self.register_buffer("scale", scale.float(), persistent=False)

    def add_noise(self, z: Tensor, k: Tensor | int, noise: Tensor) -> Tensor:
        """Clean latents z and Gaussian noise, both [B, T, C, h, w], to noisy ones at level k."""
        alpha, scale = self.coefficients(k, z)
        # x = √ᾱ·s·z + √(1-ᾱ)·ε
        return alpha.sqrt() * scale * z + (1 - alpha).sqrt() * noise

    def velocity(self, z: Tensor, k: Tensor | int, noise: Tensor) -> Tensor:
        """What the network is trained to predict from `add_noise(z, k, noise)`, in its shape."""
        alpha, scale = self.coefficients(k, z)
        # v = √ᾱ·ε - √(1-ᾱ)·s·z
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * scale * z

    def ddim_levels(self, steps: int) -> list[int]:
        """The levels that sampling visits, evenly spaced from 999 down ("trailing", Lin et al.
        2023): 999, 979, …, 19 for 50. Raises ValueError for steps out of range."""
        if not 1 <= steps <= LEVELS:
            raise ValueError(f"steps is {steps}; it must be between 1 and {LEVELS}")
        return [round(LEVELS - i * LEVELS / steps) - 1 for i in range(steps)]

    def ddim_sigma(self, k: Tensor | int, k_next: Tensor | int, eta: float, like: Tensor) -> Tensor:
        """Standard deviation of the fresh noise from k to k_next (Song et al. 2021, equation 16),
        in a shape that multiplies `like`."""
        alpha = self.coefficients(k, like)[0]
        alpha_next = self.coefficients(k_next, like)[0]
        # σ = η √((1-ᾱ')/(1-ᾱ)) √(1 - ᾱ/ᾱ')
        return eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).sqrt()

    def ddim_step(self, x: Tensor, v: Tensor, k: Tensor | int, k_next: Tensor | int,
                  eta: float = 1.0, noise: Tensor | None = None) -> Tensor:
        """One step of sampling, from level k to k_next (Song et al. 2021, equation 12).

        x [B, T, C, h, w] at level k, v the predicted velocity, noise the fresh Gaussian noise
        (drawn here if None; unused at eta = 0). The last step goes to k_next = 0 and returns
        latents without signal scale.
        """
        alpha, scale = self.coefficients(k, x)
        alpha_next, scale_next = self.coefficients(k_next, x)
        # ẑ = √ᾱ·x - √(1-ᾱ)·v is s times the clean latents; the step changes s as well
        clean = (alpha.sqrt() * x - (1 - alpha).sqrt() * v) * (scale_next / scale)
        # ε̂ = √ᾱ·v + √(1-ᾱ)·x
        predicted_noise = alpha.sqrt() * v + (1 - alpha).sqrt() * x
        sigma = self.ddim_sigma(k, k_next, eta, like=x)
        # x' = √ᾱ'·ẑ + √(1-ᾱ'-σ²)·ε̂ + σ·ε
        x = alpha_next.sqrt() * clean
        x = x + (1 - alpha_next - sigma**2).clamp(min=0).sqrt() * predicted_noise
        if eta > 0:
            x = x + sigma * (torch.randn_like(x) if noise is None else noise)
        return x

    def sample(self, x: Tensor, velocity: Callable[[Tensor, int], Tensor], steps: int, eta: float,
               draw_noise: Callable[[], Tensor]) -> Tensor:
        """From Gaussian noise x [B, T, C, h, w] to clean latents, through `ddim_levels(steps)`.

        velocity(x, k)  what the network predicts, in the shape of x
        draw_noise()    fresh Gaussian noise in the shape of x, asked for only if eta > 0

        Paper: Algorithm 2.
        """
        levels = self.ddim_levels(steps)
        for k, k_next in zip(levels, levels[1:] + [0], strict=True):
            v = velocity(x, k)
            x = self.ddim_step(x, v, k, k_next, eta, draw_noise() if eta > 0 else None)
        return x

    def coefficients(self, k: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """ᾱ and the signal scale s at level k, in shapes that multiply a [B, T, C, h, w]."""
        k = torch.as_tensor(k, device=self.scale.device)
        k = k.view(k.shape + (1,) * (like.ndim - k.ndim))  # [B, T] -> [B, T, 1, 1, 1]
        return self.alphas_cumprod[k], self.scale[k]


def demo() -> None:
    """Levels as digits, what they mean, and sampling with a network that knows the answer."""
    schedule = NoiseSchedule()
    print("one digit a frame, 0 (clear) to 9 (noise)")
    for clip in draw_levels((3, 16), torch.Generator().manual_seed(0)).tolist():
        print("  a training clip      ", "".join(str(k // 100) for k in clip))
    for k in (999, 499, 19):
        digits = "".join(str(n // 100) for n in rollout_levels(15, 39, k).tolist())
        print(f"  a rollout, k = {k:3}    {digits}")
    print("level  alphas_cumprod   scale   signal-to-noise")
    for k in (19, 39, 499, 979, 999):
        alpha, scale = schedule.alphas_cumprod[k].item(), schedule.scale[k].item()
        print(f"  {k:3}  {alpha:14.5f}   {scale:.3f}   {alpha * scale**2 / (1 - alpha):15.4f}")
    z, noise = torch.randn(2, 1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = schedule.ddim_levels(5)
    x = noise
    print("five steps with the true velocity: RMS error of the signal part")
    for k, k_next in zip(levels, levels[1:] + [0], strict=True):
        x = schedule.ddim_step(x, schedule.velocity(z, k, noise), k, k_next, eta=0.0)
        clean = x - (1 - schedule.alphas_cumprod[k_next]).sqrt() * noise
        print(f"  {k:3} -> {k_next:3}   {(clean - z).square().mean().sqrt():.3f}")


if __name__ == "__main__":
    demo()
