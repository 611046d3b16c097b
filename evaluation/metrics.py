"""How good are imagined frames? Four answers, from pixels to motion.

    PSNR, SSIM    pixel by pixel, against the frame that really came: arithmetic, no network
    LPIPS         the same through the eyes of VGG: distance of features, frame by frame
    FID           do predicted frames look like real ones, as sets? Inception's features of each
                  set as a Gaussian
    FVD           do imagined videos move like real ones? The same with I3D, a network for videos

The last three need a network that others trained, as TorchScript, as the community measures:

    --inception  inception-2015-12-05.pt   (1)
    --lpips      vgg16.pt                  (1)
    --i3d        i3d_torchscript.pt        www.dropbox.com/s/ge9e5ujwgetktms (StyleGAN-V's)

    (1) nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/

They run in evaluation mode: batch norms that train make a sample's features depend on others.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.errors import UserError
from support.pictures import psnr  # noqa: F401, the fourth of this file's metrics


class MetricError(UserError):
    """A network that a metric needs is missing or is not what it should be."""


# --------------------------------------------------------------------------------------------------
# Frame against frame. Frames are uint8 [..., H, W, 3]; the result has one number per frame, [...].


def ssim(frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity, at most 1 (Wang et al. 2004): Gaussian windows of 11×11, σ = 1.5, mean
    over colours and over the windows that lie inside. The baselines' published figures pad at the
    edge instead: 0.731 where this says 0.751, on the same small pictures.

    Raises ValueError for frames smaller than a window.
    """
    if min(frames.shape[-3:-1]) < 11:
        raise ValueError(f"frames are {frames.shape[-3]}×{frames.shape[-2]}; SSIM needs at least "
                         "11×11")
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.softmax(-(offsets**2) / (2 * 1.5**2), dim=0)

    def local_mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    def planes(pictures: np.ndarray) -> Tensor:  # one colour of one picture each, [N·3, 1, H, W]
        colours_first = torch.from_numpy(pictures).double().movedim(-1, -3)
        return colours_first.reshape(-1, 1, *pictures.shape[-3:-1])

    x, y = planes(frames), planes(truth)
    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x**2) - mean_x**2, local_mean(y**2) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.mean(dim=(1, 2, 3)).view(-1, 3).mean(dim=1).numpy().reshape(frames.shape[:-3])


def colour_shift(frames: np.ndarray, given: np.ndarray) -> np.ndarray:
    """How far the mean colour has gone from that of a given frame [..., 1, H, W, 3], of 255."""
    return np.linalg.norm(frames.mean(axis=(-3, -2)) - given.mean(axis=(-3, -2)), axis=-1)


def sharpness(frames: np.ndarray) -> np.ndarray:
    """Mean difference of neighbouring pixels: a world that blurs loses it."""
    pixels = frames.astype(np.float32)
    return (np.abs(np.diff(pixels, axis=-2)).mean(axis=(-3, -2, -1))
            + np.abs(np.diff(pixels, axis=-3)).mean(axis=(-3, -2, -1))) / 2


# --------------------------------------------------------------------------------------------------
# Set against set


ENOUGH = 256  # videos or frames below which a distance of sets is mostly noise


def frechet_distance(ours: Tensor, theirs: Tensor) -> float:
    """Of two sets of feature vectors [N, size], as Gaussians: |μ₁ - μ₂|² + tr(C₁ + C₂ - 2 (C₁
    C₂)^½), their squared distance (Dowson and Landau 1982).

    C₁ C₂ has the eigenvalues of the symmetric C₁^½ C₂ C₁^½, whose root is safe to take even where
    covariances are singular. Raises ValueError for fewer than two vectors on either side.
    """
    if min(len(ours), len(theirs)) < 2:
        raise ValueError("a covariance needs at least two feature vectors on each side")
    ours, theirs = ours.double(), theirs.double()
    c1, c2 = torch.cov(ours.T), torch.cov(theirs.T)
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    apart = (ours.mean(0) - theirs.mean(0)).square().sum()
    return float(apart + c1.trace() + c2.trace() - 2 * cross)


# --------------------------------------------------------------------------------------------------
# Networks of others


NETWORKS = {  # metric -> whose features it is of, and how that network wants to be asked
    "lpips": ("LPIPS", {"resize_images": False, "return_lpips": True}),
    "fid": ("Inception", {"return_features": True}),
    "fvd": ("I3D", {"rescale": True, "resize": True, "return_features": True})}


class FeatureNetwork:
    """The TorchScript network of a metric. The squared distance of LPIPS' features is LPIPS."""

    def __init__(self, path: str | Path, metric: str, device: torch.device):
        name, options = NETWORKS[metric]
        if not Path(path).is_file():
            raise MetricError(f"there is no network for {name} at {path}")
        try:
            self.network: nn.Module = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError:
            raise MetricError(f"{path} is no TorchScript network, or it is damaged") from None
        self.path, self.name, self.device, self.options = path, name, device, options

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray) -> Tensor:
        """Frames uint8 [N, H, W, 3], or videos [N, T, H, W, 3], to features [N, size]. Raises
        MetricError for any other output."""
        # colours first: [N, 3, ...], 0..255
        x = torch.from_numpy(pictures).movedim(-1, 1).to(self.device)
        try:
            features = self.network(x if self.name == "Inception" else x.float(), **self.options)
        except RuntimeError as error:
            raise MetricError(f"{self.path} cannot be asked as {self.name}: "
                              f"{str(error).strip().splitlines()[-1]}") from None
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(pictures):
            shape = type(features).__name__
            if isinstance(features, Tensor):
                shape = list(features.shape)
            raise MetricError(f"{self.path} gives {shape} for {len(pictures)} inputs; expected "
                              f"[{len(pictures)}, features] of {self.name}")
        return features.float()
