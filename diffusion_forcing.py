"""Every frame its own noise level: diffusion forcing.

A video diffusion model noises all frames of a clip equally and denoises them together, so it can
only ever make whole clips. Give every frame a noise level of its own in training, drawn
independently,

    training      k = 512  37 901 240 688        any mixture of clear and noisy frames
    rollout       k =  39  39  39  39 999→0      a clear past, and one frame being predicted

and the same network learns every mixture, among them the one that a world model needs. At inference
the history stays at a small noise level, never at zero: a little noise hides the small errors of
predicted frames, which would otherwise add up from step to step.

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
                shared: bool = False, clear: float = 0.0) -> Tensor:
    """Noise levels for training, int64 [..., T]: uniform, each frame's drawn independently.

    shared  one level for all frames of a clip: what a passive video model trains with
    clear   chance that a frame draws from the lowest tenth of the levels instead. The history of a
            rollout is clear, and uniform levels rarely are: two frames in a row are below level 100
            once in a hundred times. 0 is the paper's.

    Paper: section 4.1, Algorithm 1.
    """
    k = torch.randint(LEVELS, shape, generator=generator)
    if shared:
        return k[..., :1].expand(shape)
    if clear:
        return torch.where(torch.rand(shape, generator=generator) < clear, k // 10, k)
    return k


def rollout_levels(history: int, history_level: int, k: int, alternatives: int = 1) -> Tensor:
    """Levels of a window, [history + alternatives]: a clear past, the newest frame at k."""
    return torch.tensor([history_level] * history + [k] * alternatives)


def diffusion_forcing_loss(denoise: Callable[[Tensor, Tensor], Tensor], schedule: "NoiseSchedule",
                           latents: Tensor, k: Tensor, noise: Tensor,
                           weighting: str = "velocity") -> Tensor:
    """Mean squared error of the predicted velocity, every frame at a level of its own.

    denoise(x, k) -> v      the network with its conditions filled in
    latents, noise          [B, T, C, h, w]
    k                       [B, T], from `draw_levels`
    weighting               "velocity" weights all levels alike (the paper's). "clean" weights the
                            error by 1 - ᾱ, which makes it the error of the clean latents: nearly
                            clean frames, whose velocity is noise that nobody can predict, then
                            count little.

    Paper: section 4.1, Algorithm 1.
    """
    x = schedule.add_noise(latents, k, noise)
    error = denoise(x, k).float() - schedule.velocity(latents, k, noise)
    if weighting == "clean":
        alpha, _ = schedule.at(k, x)
        error = (1 - alpha).sqrt() * error
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
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, LEVELS, dtype=torch.float64) ** 2
        signal = (1 - betas).cumprod(0).sqrt()
        # The first level keeps its signal and the last loses all of it (Lin et al. 2023, Algorithm
        # 1).
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        scale = torch.full((LEVELS,), base_scale, dtype=torch.float64)
        scale[:400] = torch.linspace(1, base_scale, 400, dtype=torch.float64)
        self.register_buffer("alphas_cumprod", (signal**2).float(), persistent=False)
        self.register_buffer("scale", scale.float(), persistent=False)

    def add_noise(self, z: Tensor, k: Tensor | int, noise: Tensor) -> Tensor:
        """Clean latents z and Gaussian noise, both [B, T, C, h, w], to noisy ones at level k."""
        alpha, scale = self.at(k, z)
        return alpha.sqrt() * scale * z + (1 - alpha).sqrt() * noise

    def velocity(self, z: Tensor, k: Tensor | int, noise: Tensor) -> Tensor:
        """What the network is trained to predict from `add_noise(z, k, noise)`."""
        alpha, scale = self.at(k, z)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * scale * z

    def ddim_levels(self, steps: int) -> list[int]:
        """The levels that sampling visits, evenly spaced from 999 down ("trailing"): 999, 979, …,
        19 for 50.

        Raises ValueError for steps out of range.
        """
        if not 1 <= steps <= LEVELS:
            raise ValueError(f"steps is {steps}; it must be between 1 and {LEVELS}")
        return [round(LEVELS - i * LEVELS / steps) - 1 for i in range(steps)]

    def ddim_sigma(self, k: Tensor | int, k_next: Tensor | int, eta: float, like: Tensor) -> Tensor:
        """Deviation of the fresh noise from k to k_next (Song et al. 2021, equation 16)."""
        alpha, alpha_next = self.at(k, like)[0], self.at(k_next, like)[0]
        return eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).sqrt()

    def ddim_step(self, x: Tensor, v: Tensor, k: Tensor | int, k_next: Tensor | int,
                  eta: float = 1.0, noise: Tensor | None = None) -> Tensor:
        """One step of sampling, from level k to k_next (Song et al. 2021, equation 12).

        x [B, T, C, h, w] at level k, v the predicted velocity, noise the fresh Gaussian noise
        (drawn here if None; unused at eta = 0). The last step goes to k_next = 0 and returns
        latents without signal scale.
        """
        alpha, scale = self.at(k, x)
        alpha_next, scale_next = self.at(k_next, x)
        sigma = self.ddim_sigma(k, k_next, eta, like=x)
        clean = (alpha.sqrt() * x - (1 - alpha).sqrt() * v) * (scale_next / scale)
        predicted_noise = alpha.sqrt() * v + (1 - alpha).sqrt() * x
        direction = (1 - alpha_next - sigma**2).clamp(min=0).sqrt() * predicted_noise
        if eta > 0:
            direction = direction + sigma * (torch.randn_like(x) if noise is None else noise)
        return alpha_next.sqrt() * clean + direction

    def at(self, k: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """ᾱ and the signal scale at level k, in shapes that multiply a [B, T, C, h, w]."""
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
    levels, x = schedule.ddim_levels(5), noise
    print("five steps with the true velocity: distance from the clean latents, but for the noise "
          "of level k")
    for k, k_next in zip(levels, levels[1:] + [0], strict=True):
        x = schedule.ddim_step(x, schedule.velocity(z, k, noise), k, k_next, eta=0.0)
        clean = x - (1 - schedule.alphas_cumprod[k_next]).sqrt() * noise
        print(f"  {k:3} -> {k_next:3}   {(clean - z).square().mean().sqrt():.3f}")


if __name__ == "__main__":
    demo()
