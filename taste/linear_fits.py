"""Linear maps in closed form."""

from typing import NamedTuple

import torch
from torch import Tensor

# N samples

RIDGE = 1e-2  # of a channel's mean square, added to each


class Directions(NamedTuple):
    """Where samples differ most."""

    mean: Tensor  # [channels]
    axes: Tensor  # [channels, kept], orthonormal, the widest first
    variances: Tensor  # [kept], along each axis


def ridge(x: Tensor, y: Tensor, doubt: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Least squares with a little doubt.

    Args:
        x: inputs, [N, channels in], float64.
        y: what they should give, [N, channels out], float64.
        doubt: added to each channel's mean square, as a share of it.

    Returns:
        weight [channels out, channels in] and bias [channels out] of `x @ weight.T + bias`.
    """
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    centred = x - x_mean
    gram = centred.T @ centred
    gram.diagonal().add_(doubt * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, centred.T @ (y - y_mean)).T
    return weight, y_mean - weight @ x_mean


def widest_directions(samples: Tensor, most: int) -> Directions:
    """The principal axes of some samples.

    Args:
        samples: [N, channels], float.
        most: axes to keep; there are no more than channels.

    Returns:
        the axes, in float64.
    """
    samples = samples.double()
    mean = samples.mean(dim=0)
    variances, axes = torch.linalg.eigh((samples - mean).T @ (samples - mean) / len(samples))
    kept = min(most, samples.shape[1])
    axes, variances = axes.flip(1)[:, :kept], variances.flip(0)[:kept].clamp(min=0)
    return Directions(
        mean, axes * axes.sum(dim=0).sign(), variances
    )  # the sign that eigh gives is the library's choice


def whitening(samples: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The map that turns samples into channels of about unit variance that do not depend on each other.

    Args:
        samples: [N, channels], float.
        most: channels to make, at most as many as there are.

    Returns:
        weight [kept, channels] and bias [kept] of `samples @ weight.T + bias`, float64.
    """
    found = widest_directions(samples, most)
    weight = (found.axes / (found.variances + RIDGE * found.variances[0]).sqrt()).T
    return weight, -weight @ found.mean
