"""Multinomial logistic regression on features that may lie in a file: the classifier of a network, to convergence.

The objective is mean cross entropy + ``weight_decay / 2 * |W|^2``, as SGD with weight decay has it; the bias is not
decayed. It is convex, so there is one solution; the loss is right to about 1e-5, where float32 ends. L-BFGS starts from
the weights that there are, in coordinates in which Böhning's bound on the curvature
([1992](https://doi.org/10.1007/BF00048682)) is the identity: a few dozen passes do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Classified", "Linear", "choose_weight_decay", "evaluate", "fit"]

CHUNK = 2**16


@dataclass
class Linear:
    """A classifier.

    Args:
        weight: (classes, features).
        bias: (classes), or None, and it stays so.
    """

    weight: Tensor
    bias: Tensor | None


@dataclass
class Classified:
    """Features, perhaps in a file, and labels.

    Args:
        features: (N, features), of any floating type.
        labels: int64 (N).
        device: where to compute.
    """

    features: Tensor
    labels: Tensor
    device: torch.device

    def chunks(self) -> Any:
        """Pairs of float32 features and labels, on the device."""
        for features, labels in zip(*(torch.split(part, CHUNK) for part in (self.features, self.labels)), strict=True):
            yield features.to(self.device, torch.float32), labels.to(self.device)

    def __getitem__(self, index: Tensor) -> Classified:
        return Classified(self.features[index], self.labels[index], self.device)

    def __len__(self) -> int:
        return len(self.labels)


def evaluate(linear: Linear, data: Classified) -> tuple[float, float]:
    """Mean cross entropy, and the share of samples that are classified right."""
    loss = right = 0.0
    for features, labels in data.chunks():
        logits = F.linear(features, linear.weight, linear.bias)
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(1) == labels).sum())
    return loss / len(data), right / len(data)


def moments(data: Classified) -> tuple[Tensor, Tensor]:
    """Mean (features) and covariance (features, features), in float64 sums."""
    total: Any = 0.0
    square: Any = 0.0
    for features, _ in data.chunks():
        total = total + features.sum(0).double()
        square = square + (features.T @ features).double()
    mean = total / len(data)
    return mean, square / len(data) - torch.outer(mean, mean)


def fit(
    start: Linear, data: Classified, weight_decay: float, spread: tuple[Tensor, Tensor], max_iter: int = 200
) -> Linear:
    """Find the classifier of the smallest loss.

    Args:
        start: the first guess.
        data: of the training.
        weight_decay: above 0.
        spread: ``moments`` of the data, or of data like it: they decide how fast it goes, not where to.
        max_iter: iterations at most.
    """
    mean, covariance = spread
    if start.bias is None:  # then the mean cannot be removed from the features
        covariance, mean = covariance + torch.outer(mean, mean), torch.zeros_like(mean)
    spare = 1e-5 * (covariance.diagonal() + mean.square()).mean()  # of float32, where there are few samples
    floor = weight_decay + spare
    bound = 0.5 * covariance + floor * torch.eye(len(mean)).to(mean)
    root = torch.linalg.cholesky(bound)  # weight = u @ root^-1; the bias takes the mean
    inverse = torch.linalg.solve_triangular(
        root, torch.eye(len(mean), dtype=root.dtype, device=root.device), upper=False
    )
    bias = start.weight.new_zeros(len(start.weight)) if start.bias is None else start.bias
    weight = start.weight.double()
    weight = weight - weight.mean(0)  # this changes no probability and only affects the decay, and converges slowly
    flat = torch.cat([weight @ root, (bias + weight @ mean)[:, None]], 1).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [flat], max_iter=max_iter, max_eval=2 * max_iter, history_size=20, tolerance_grad=1e-6, tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def linear() -> Linear:
        weight = flat.detach()[:, :-1] @ inverse
        return Linear(weight.float(), None if start.bias is None else (flat.detach()[:, -1] - weight @ mean).float())

    @torch.no_grad()
    def closure() -> Tensor:
        now = linear()
        loss = 0.5 * weight_decay * now.weight.double().square().sum()  # float32 cannot resolve small steps
        slope_w, slope_b = torch.zeros_like(weight), torch.zeros_like(bias, dtype=torch.float64)
        for features, labels in data.chunks():
            log_p = F.linear(features, now.weight, now.bias).log_softmax(1)
            of_label = labels[:, None]
            loss = loss - log_p.gather(1, of_label).sum(dtype=torch.float64) / len(data)
            slope = log_p.exp_().scatter_add_(1, of_label, log_p.new_full((len(labels), 1), -1.0)).div_(len(data))
            slope_w += slope.T @ features
            slope_b += slope.sum(0) * (start.bias is not None)
        slope_w += weight_decay * now.weight - torch.outer(slope_b, mean)
        flat.grad = torch.cat([slope_w @ inverse.T, slope_b[:, None]], 1)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return linear()


def choose_weight_decay(
    start: Linear, train: Classified, held_out: Classified, candidates: Sequence[float], spread: tuple[Tensor, Tensor]
) -> tuple[float, Linear]:
    """Find the weight decay whose classifier has the smallest cross entropy on samples that it was not fitted to.

    Candidates are tried in their order, each from the solution before, until two in a row are worse than the best.

    Returns:
        The best one, and its classifier.
    """
    best, found, chosen, worse = float("inf"), start, candidates[0], 0
    for weight_decay in candidates:
        start = fit(start, train, weight_decay, spread)
        loss, _ = evaluate(start, held_out)
        if loss < best:
            best, found, chosen, worse = loss, start, weight_decay, 0
        else:
            worse += 1
        if worse == 2:
            break
    return chosen, found
