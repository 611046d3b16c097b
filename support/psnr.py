"""How close is a predicted frame to the one that really came, in decibels."""
import numpy as np


def psnr(frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio, 10 log10(255² / MSE) dB; equal frames count as 1e-10 apart."""
    error = ((frames.astype(np.float64) - truth) ** 2).mean(axis=(-3, -2, -1))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-10))
