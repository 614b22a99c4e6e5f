"""Frechet distance of generated digits to held-out scans.

Both sides are cut out by the same reader, from pages with the same captions, so that numerals occur
equally often. Two feature spaces: ``pixels``, the ink on the scans' 8x8 points, and ``reader``, the
classifier's decision values.

Source: Heusel et al. 2017, arXiv 1706.08500 (there with Inception features).

Legend: N digits, F features.
"""

from __future__ import annotations

import numpy as np

from soar_mega.evaluation.digits import load_reader


def frechet_distance(first_NF: np.ndarray, second_NF: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians with the means and covariances of two sets.

    Raises:
        ValueError: A set has fewer than two rows.
    """
    if min(len(first_NF), len(second_NF)) < 2:
        raise ValueError("a Frechet distance needs at least two digits on each side")
    one_FF, two_FF = (np.cov(side_NF, rowvar=False) for side_NF in (first_NF, second_NF))
    return gaussian_distance(first_NF.mean(0), one_FF, second_NF.mean(0), two_FF)


def gaussian_distance(
    first_F: np.ndarray, one_FF: np.ndarray, second_F: np.ndarray, two_FF: np.ndarray
) -> float:
    """Squared Frechet distance of two Gaussians, each a mean and a covariance."""
    mean = ((first_F - second_F) ** 2).sum()
    # trace sqrt(A B) = trace sqrt(A^1/2 B A^1/2), which is symmetric: no complex roots.
    values, vectors_FF = np.linalg.eigh(one_FF)
    root_FF = (vectors_FF * np.sqrt(values.clip(0))) @ vectors_FF.T
    cross = np.sqrt(np.linalg.eigvalsh(root_FF @ two_FF @ root_FF).clip(0)).sum()
    return float(mean + np.trace(one_FF) + np.trace(two_FF) - 2 * cross)


def feature_spaces(features_NF: np.ndarray) -> dict[str, np.ndarray]:
    """``pixels`` (N, 64) and ``reader`` (N, 10) of digits as ``crop_features`` gives them."""
    return {
        "pixels": features_NF,
        "reader": load_reader().classifier.decision_function(features_NF),
    }
