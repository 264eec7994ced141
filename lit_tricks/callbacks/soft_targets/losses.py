"""Losses of a target that carries a recipe: those of torch, under the distribution that the tricks made of the labels.

Weights, ``ignore_index`` and the mean are torch's. A label weighs by its share of the mixture: an ignored one adds
neither to the sum nor to what a mean divides by, and the mean of cross entropy divides by the class weights of the
labels, before smoothing. Factors that tricks put on a loss act on the sum only. The divergence from a teacher counts
each label as much, whatever the class weights: its mean is over the labels that are not ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_tricks.callbacks.soft_targets.spec import Recipe

if TYPE_CHECKING:
    from lit_tricks.callbacks.soft_targets.target import Target

__all__ = ["LOSSES"]


def cross_entropy(
    input: Tensor,  # noqa: A002  # as torch calls it
    target: Target,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy`` under the distribution of the target."""
    recipe, value = _begin(target, size_average, reduce)
    dim = _class_dim(input)
    if recipe.smoothing and label_smoothing:
        raise RuntimeError(
            f"{recipe.names()}: the module's own cross entropy has label_smoothing={label_smoothing}, which would "
            "smooth the target twice. Set it to 0 there, or leave the callback out."
        )
    if recipe.smoothing and target.kind == "labels":  # the soft distribution is smoothed already
        label_smoothing = recipe.smoothing(input.size(dim))
    if not recipe.modulates and "other" not in target.parts:
        loss = F.cross_entropy(
            input, value, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    else:
        low = input.dtype in (torch.float16, torch.bfloat16)
        log_p = F.log_softmax(input, dim, dtype=torch.float32 if low else None)
        loss = _of_log_p(log_p, target, weight, ignore_index, reduction, label_smoothing)
    return _with_teacher(loss, input, target, ignore_index, reduction)


def nll_loss(
    input: Tensor,  # noqa: A002
    target: Target,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``F.nll_loss`` under the distribution of the target, the input being the logarithm of a softmax."""
    recipe, value = _begin(target, size_average, reduce)
    if not recipe.smoothing and not recipe.modulates and "other" not in target.parts:
        loss = F.nll_loss(input, value, weight, ignore_index=ignore_index, reduction=reduction)
    else:
        smoothing = recipe.smoothing(input.size(_class_dim(input))) if recipe.smoothing else 0.0
        loss = _of_log_p(input, target, weight, ignore_index, reduction, smoothing)
    return _with_teacher(loss, input, target, ignore_index, reduction)  # logits, up to a constant in each row


def bce_with_logits(
    input: Tensor,  # noqa: A002
    target: Target,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """``F.binary_cross_entropy_with_logits`` with the soft targets."""
    recipe, _ = _begin(target, size_average, reduce)
    soft = _binary(target)
    plain = not recipe.modulates
    loss = F.binary_cross_entropy_with_logits(
        input, soft, weight, reduction=reduction if plain else "none", pos_weight=pos_weight
    )
    return loss if plain else _modulated_binary(loss, torch.sigmoid(input), soft, recipe, reduction)


def bce(
    input: Tensor,  # noqa: A002
    target: Target,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``F.binary_cross_entropy`` with the soft targets."""
    recipe, _ = _begin(target, size_average, reduce)
    soft = _binary(target)
    plain = not recipe.modulates
    loss = F.binary_cross_entropy(input, soft, weight, reduction=reduction if plain else "none")
    return loss if plain else _modulated_binary(loss, input, soft, recipe, reduction)


LOSSES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.cross_entropy: cross_entropy,
    F.nll_loss: nll_loss,
    F.binary_cross_entropy_with_logits: bce_with_logits,
    F.binary_cross_entropy: bce,
}


def _begin(target: Target, size_average: bool | None, reduce: bool | None) -> tuple[Recipe, Tensor]:
    recipe = target.recipe
    recipe.require(not target.lost, target.lost)
    if size_average is not None or reduce is not None:
        raise RuntimeError(f"{recipe.names()}: size_average and reduce are deprecated; use reduction='mean' or 'sum'.")
    recipe.used = True
    return recipe, target.parts["value"]


def _class_dim(input: Tensor) -> int:  # noqa: A002
    return 1 if input.dim() > 1 else 0


def _of_log_p(
    log_p: Tensor, target: Target, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
) -> Tensor:
    """Negative log-likelihood: the loss of each element, the probability of its target, and its part in the mean."""
    recipe, parts, dim = target.recipe, target.parts, _class_dim(log_p)
    classes = log_p.size(dim)
    in_mean = None if weight is None else weight.to(log_p)
    in_sum = in_mean
    if recipe.class_weight is not None:
        in_sum = recipe.class_weight(classes).to(log_p)
        in_sum = in_sum if in_mean is None else in_sum * in_mean
    weighted = log_p if in_sum is None else log_p * in_sum.view(classes, *[1] * (log_p.dim() - dim - 1))
    if target.kind == "soft":
        share = parts["value"].to(log_p) * (1 - smoothing) + smoothing / classes
        loss, p = -(share * weighted).sum(dim), (share * log_p.exp()).sum(dim)
        known = divisor = torch.ones_like(loss)
    else:
        mixture: list[tuple[Tensor, Tensor | float]] = [(parts["value"], 1.0)]
        if "other" in parts:
            weight_of = parts["weight"].to(log_p)
            mixture = [(parts["value"], weight_of), (parts["other"], 1 - weight_of)]
        loss = p = known = divisor = torch.zeros_like(log_p.select(dim, 0))
        for labels, share_of in mixture:
            share = (labels != ignore_index).to(log_p) * share_of
            index = torch.where(labels == ignore_index, 0, labels).long()
            known = known + share
            divisor = divisor + (share if in_mean is None else share * in_mean[index])
            loss = loss - share * (1 - smoothing) * _pick(weighted, index, dim)
            if recipe.factor is not None:
                p = p + share * (1 - smoothing) * _pick(log_p, index, dim).exp()
        loss = loss - known * smoothing / classes * weighted.sum(dim) if smoothing else loss
        p = p / known.clamp(min=1e-6) + smoothing / classes
    if recipe.factor is not None:
        factor = recipe.factor(p)
        loss = loss * factor
        recipe.mean_factor = (factor * known).sum().detach() / known.sum()
    if reduction == "mean":
        return loss.sum() / divisor.sum()
    return loss.sum() if reduction == "sum" else loss


def _with_teacher(loss: Tensor, logits: Tensor, target: Target, ignore_index: int, reduction: str) -> Tensor:
    """Add the divergence from the teacher to the loss of the labels."""
    recipe, parts, dim = target.recipe, target.parts, _class_dim(logits)
    if recipe.teacher is None or recipe.divergence is None:
        return loss
    row = parts["row"] if target.kind == "labels" else parts["row"].select(dim, 0)
    taught, logits = recipe.teacher[row], logits.movedim(dim, -1)
    if taught.shape != logits.shape:
        raise RuntimeError(
            f"KnowledgeDistillation: the teacher tells {taught.size(-1)} classes apart, and the loss of the student "
            f"{logits.size(-1)}: take a teacher that was trained on the same classes, in the same order."
        )
    divergence = recipe.divergence(logits, taught)
    known = torch.ones_like(divergence)
    if target.kind == "labels":
        known = (parts["value"] != ignore_index).to(divergence)
        if "other" in parts:
            known = torch.lerp((parts["other"] != ignore_index).to(known), known, parts["weight"].to(known))
    divergence = divergence * known
    mean = divergence.sum() / known.sum()
    recipe.mean_divergence = mean.detach()
    of_labels, of_teacher = recipe.weights
    return of_labels * loss + of_teacher * {"none": divergence, "sum": divergence.sum()}.get(reduction, mean)


def _pick(table: Tensor, index: Tensor, dim: int) -> Tensor:
    return table.gather(dim, index.unsqueeze(dim)).squeeze(dim)


def _binary(target: Target) -> Tensor:
    """Probability of the positive class: from a distribution over classes, or from labels 0 and 1 in floats."""
    parts, smoothing = target.parts, target.recipe.smoothing
    if target.recipe.teacher is not None:
        raise RuntimeError(
            f"{target.recipe.names()}: the loss is binary, and KnowledgeDistillation compares a softmax over classes. "
            "Train with F.cross_entropy or nn.CrossEntropyLoss, or without the teacher."
        )
    soft = parts["value"]
    if target.kind == "soft" or not soft.is_floating_point():
        return soft
    if "other" in parts:
        soft = parts["other"].lerp(soft, parts["weight"].to(soft))
    if smoothing:
        soft = soft * (1 - smoothing(2)) + smoothing(2) / 2
    return soft


def _modulated_binary(loss: Tensor, p: Tensor, soft: Tensor, recipe: Recipe, reduction: str) -> Tensor:
    if recipe.factor is not None:
        factor = recipe.factor(p * soft + (1 - p) * (1 - soft))
        loss = loss * factor
        recipe.mean_factor = factor.detach().mean()
    if recipe.positive_weight is not None:
        alpha = recipe.positive_weight()
        loss = loss * (alpha * soft + (1 - alpha) * (1 - soft))
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss
