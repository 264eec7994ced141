"""Fit a temperature, or a temperature and an offset per class, to logits; and measure calibration, all in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BOUNDS", "Scores", "calibration_scores", "fit_temperature", "fit_vector_scaling", "mean_of_views"]

BOUNDS = (0.05, 20.0)  # of a temperature
MOST_OFFSET = 20.0  # absolute value
CHUNK = 2**22  # logits that are in float64 at a time
BINS = 15
GRID = 16  # inverse temperatures that are tried for a mean over views, whose likelihood may have several maxima


class Scores(NamedTuple):
    """Scores of the probabilities of labeled samples. Lower is better, except for the accuracy.

    Args:
        ece: expected calibration error with 15 bins of equal width, in [0, 1].
        nll: mean negative log-likelihood of the labels, in nats.
        brier: mean squared distance of the probabilities from the one-hot labels, summed over classes, in [0, 2].
        accuracy: share of samples whose most probable class is the label, in [0, 1].
    """

    ece: float
    nll: float
    brier: float
    accuracy: float


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature ``T`` that maximizes the likelihood of labels under ``softmax(logits / T)``.

    The negative log-likelihood is convex in ``1 / T``. Newton's method finds the minimum within [0.05, 20]. If the
    likelihood still increases at an end of this range, the end is returned: 0.05 if all labels have the highest logit,
    20 if the logits are worse than a guess.

    With several views per image, ``mean(softmax(logits / T))`` is the probability. Its likelihood may
    have several maxima, so a grid of temperatures comes first.

    Args:
        logits: logits or log-probabilities (N, K), or (V, N, K) for V views of each image.
        labels: class indices (N,).

    Raises:
        ValueError: if there is no sample, a label is not in [0, K), or a logit is not finite.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 1, 1])), 4)
        3.641
    """
    _check(logits, labels)
    low, high = 1 / BOUNDS[1], 1 / BOUNDS[0]
    beta = 1.0
    if logits.dim() == 3:
        grid = [low * (high / low) ** (i / (GRID - 1)) for i in range(GRID)]
        losses = [_slope(logits, labels, each)[2] for each in grid]
        best = losses.index(min(losses))
        low, beta, high = grid[max(best - 1, 0)], grid[best], grid[min(best + 1, GRID - 1)]
    if high >= 1 / BOUNDS[0] and _slope(logits, labels, high)[0] <= 0:
        return BOUNDS[0]
    if low <= 1 / BOUNDS[1] and _slope(logits, labels, low)[0] >= 0:
        return BOUNDS[1]
    for _ in range(100):
        slope, curvature, _ = _slope(logits, labels, beta)
        low, high = (low, beta) if slope > 0 else (beta, high)
        step = beta - slope / curvature if curvature > 0 else math.inf
        if not low < step < high:  # Newton's step leaves the interval that has the minimum
            step = (low + high) / 2
        step, beta = beta, step
        if abs(step - beta) <= 1e-12 * beta:
            break
    return 1 / beta


def mean_of_views(logits: Tensor) -> Tensor:
    """Return the logarithm of the mean probability (N, K) over views with these logits (V, N, K)."""
    return logits.log_softmax(2).logsumexp(0) - math.log(len(logits))


def fit_vector_scaling(logits: Tensor, labels: Tensor, offset: bool = True) -> tuple[Tensor, Tensor]:
    """Return the temperatures and offsets that maximize the likelihood under ``softmax(logits / T + b)``.

    This is the vector scaling of Guo et al., with one temperature and one offset per class. L-BFGS starts at the best
    common temperature. Temperatures stay within [0.05, 20], and offsets within [-20, 20] around their mean 0.

    Args:
        logits: logits (N, K), or (V, N, K) for V views of each image, whose mean probability is fitted.
        labels: class indices (N,). Each class needs a sample.
        offset: whether there are offsets. Without them they are 0.

    Returns:
        The temperatures (K,) and the offsets (K,), in float64.

    Raises:
        ValueError: if a class has no sample, a label is not in [0, K), or a logit is not finite.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [0.0, 4.0]])
        >>> temperatures, offsets = fit_vector_scaling(logits, torch.tensor([0, 0, 1, 0, 1]))
        >>> (logits / temperatures + offsets).softmax(1)[[0, 3]].round(decimals=3)
        tensor([[0.6670, 0.3330],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    _check(logits, labels)
    classes = logits.size(-1)
    missing = (torch.bincount(labels, minlength=classes) == 0).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"vector scaling needs samples of every class, and {len(missing)} of {classes} have none, such as class "
            f"{missing[0]}. Fit a temperature."
        )
    start = -math.log(fit_temperature(logits, labels))
    flat = torch.zeros(2 * classes, dtype=torch.float64)
    flat[:classes] = start
    flat.requires_grad_()
    most = -math.log(BOUNDS[0])
    solver = torch.optim.LBFGS(
        [flat], max_iter=500, max_eval=1000, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        logs, offsets = torch.split(flat.detach(), classes)
        factors = logs.clamp(-most, most).exp()
        loss, by_factor, by_offset = _gradient(logits, labels, factors, offsets)
        inside = (logs.abs() < most) | (logs.sign() == by_factor.sign())  # a step back into the range is free
        flat.grad = torch.cat([by_factor * factors * inside, by_offset * offset])
        return loss

    with torch.enable_grad():
        solver.step(closure)  # type: ignore[no-untyped-call]
    logs, offsets = torch.split(flat.detach(), classes)
    offsets = (offsets - offsets.mean()).clamp(-MOST_OFFSET, MOST_OFFSET)
    return logs.clamp(-most, most).neg().exp(), offsets


def calibration_scores(logits: Tensor, labels: Tensor) -> Scores:
    """Return calibration error, likelihood, Brier score and accuracy of ``softmax(logits)``.

    Args:
        logits: logits or log-probabilities (N, K).
        labels: class indices (N,).

    Raises:
        ValueError: if there is no sample, a label is not in [0, K), or a logit is not finite.

    Example:
        >>> scores = calibration_scores(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))
        >>> round(scores.ece, 3), round(scores.nll, 3), scores.brier
        (0.0, 0.693, 0.5)
    """
    _check(logits, labels)
    sums = torch.zeros(3, dtype=torch.float64)
    bins = torch.zeros(2, BINS, dtype=torch.float64)  # sums of confidence and of right samples
    for chunk, label in _chunks(logits, labels):
        logs = chunk.log_softmax(1)
        own = logs.gather(1, label[:, None])[:, 0]
        probabilities = logs.exp()
        right = (probabilities.argmax(1) == label).double()
        confidence = probabilities.amax(1)
        brier = probabilities.square().sum(1) - 2 * own.exp() + 1
        sums += torch.stack([-own.sum(), brier.sum(), right.sum()]).cpu()
        places = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1).cpu()  # ]a, b], as torchmetrics has it
        bins.index_add_(1, places, torch.stack([confidence, right]).cpu())
    nll, brier_score, accuracy = (sums / len(labels)).tolist()
    return Scores(float((bins[0] - bins[1]).abs().sum() / len(labels)), nll, brier_score, accuracy)


def _check(logits: Tensor, labels: Tensor) -> None:
    if not len(labels) or logits.dim() not in (2, 3) or logits.shape[-2:-1] != labels.shape:
        raise ValueError(f"logits (N, K) and labels (N,) are needed, got {(*logits.shape,)} and {(*labels.shape,)}.")
    if int(labels.min()) < 0 or int(labels.max()) >= logits.size(-1):
        raise ValueError(f"labels must be in [0, {logits.size(-1)}), got {int(labels.min())} to {int(labels.max())}.")
    if not bool(logits.isfinite().all()):
        raise ValueError("the logits are not all finite, so no temperature fits them.")


def _chunks(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, CHUNK * labels.numel() // max(1, logits.numel()))
    for chunk, label in zip(torch.split(logits, rows, dim=-2), torch.split(labels, rows), strict=True):
        yield chunk.double(), label


def _views(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits (V, n, K), and labels as indices (V, n, 1)."""
    for chunk, label in _chunks(logits, labels):
        views = chunk if chunk.dim() == 3 else chunk[None]
        yield views, label[None, :, None].expand(len(views), -1, 1)


def _slope(logits: Tensor, labels: Tensor, beta: float) -> tuple[float, float, float]:
    """Return first and second derivative of the mean negative log-likelihood in ``1 / T``, and its value."""
    slope = curvature = value = 0.0
    for views, label in _views(logits, labels):
        logs = (beta * views).log_softmax(2)
        own, probabilities = logs.gather(2, label)[..., 0], logs.exp()
        mean = (probabilities * views).sum(2)
        variance = (probabilities * (views - mean[..., None]).square()).sum(2)
        of_views = views.gather(2, label)[..., 0] - mean  # derivatives of the logarithms
        share = own.softmax(0)
        gain = (share * of_views).sum(0)
        slope -= float(gain.sum())
        curvature += float(((share * (variance - of_views.square())).sum(0) + gain.square()).sum())
        value -= float((own.logsumexp(0) - math.log(len(views))).sum())
    return slope / len(labels), curvature / len(labels), value / len(labels)


def _gradient(logits: Tensor, labels: Tensor, factors: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean negative log-likelihood, and its gradients by the factors and the offsets."""
    loss = torch.zeros((), dtype=torch.float64)
    by_factor, by_offset = torch.zeros_like(factors), torch.zeros_like(offsets)
    for views, label in _views(logits, labels):
        logs = (views * factors + offsets).log_softmax(2)
        own = logs.gather(2, label)
        loss -= (own.logsumexp(0) - math.log(len(views))).sum()
        error = logs.exp().scatter_add(2, label, -torch.ones_like(own)) * own.softmax(0)
        by_factor += (error * views).sum((0, 1))
        by_offset += error.sum((0, 1))
    return loss / len(labels), by_factor / len(labels), by_offset / len(labels)
