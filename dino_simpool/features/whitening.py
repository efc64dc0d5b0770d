"""Whitening of features, learned on other images than those that are searched.

Source: PCA in utils.py of facebookresearch/dino, as its eval_copy_detection.py uses it: unit
features, 256 dimensions, eigenvalues to the power -0.5. The SimPool paper does not whiten.

M images, D width of a feature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dino_simpool.data import ImageSet, find_images
from dino_simpool.features import chunks
from dino_simpool.layouts.landmarks import lenient


def unit(features: Tensor) -> Tensor:
    """The rows (M, D) in float64, scaled to length 1. A row of zeros stays zero."""
    return F.normalize(features.double(), dim=1)


@dataclass(frozen=True)
class Whitening:
    """Decorrelation to equal variances, learned on unit features: x -> (x - mean) @ matrix."""

    mean: Tensor
    """(D,) float64."""
    matrix: Tensor
    """(D, kept) float64: eigenvectors of the covariance, each divided by the root of its
    eigenvalue, the largest first."""

    @classmethod
    def learn(cls, features: Tensor, dim: int) -> Whitening:
        """Learn from features (M, D) and keep `dim` dimensions. Eigenvalues below 1e-5 of the
        largest are raised to that. ValueError if all features are alike."""
        mean = unit(features).mean(0)
        centered = unit(features) - mean
        values, vectors = torch.linalg.eigh(centered.T @ centered / len(centered))
        if not values[-1] > 1e-12:
            raise ValueError(f"the {len(features)} features to learn the whitening from are all alike: give other images")
        kept = slice(len(values) - dim, None)
        matrix = vectors[:, kept] / values.clamp_min(1e-5 * values[-1].item())[kept].sqrt()
        return cls(mean, matrix.flip(1))

    def __call__(self, features: Tensor) -> Tensor:
        """(M, kept) float64 from features (M, D) of any length."""
        parts = [(unit(features[rows]) - self.mean) @ self.matrix for rows in chunks(len(features), 16 * features.shape[1])]
        return torch.cat(parts)


def whitening_set(source: str, width: int, *, dim: int | None) -> tuple[ImageSet | None, int]:
    """The images to learn from (None without a source), and the number of dimensions to keep.

    width: D. dim: None for 256, or D if that is less. ValueError if these images cannot span so
    many dimensions: the rest would be noise, amplified to the variance of the others.
    """
    dim = min(256, width) if dim is None else dim
    if not source:
        return None, dim
    images = find_images(source)
    if dim > width or dim >= len(images):
        raise ValueError(
            f"whitening_dim is {dim}: features of width {width} from {len(images)} images have no more than "
            f"{min(width, len(images) - 1)} dimensions that vary"
        )
    return lenient(images), dim
