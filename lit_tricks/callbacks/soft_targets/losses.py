"""Losses of soft targets: torch's losses, for the label distribution that the tricks define.

Weights, ``ignore_index`` and the mean are the same as in torch. The weight of a label is its share of the mixture. An
ignored label adds neither to the sum nor to the divisor of the mean. The mean of cross entropy divides by the class
weights of the labels, before smoothing. Factors of tricks on a loss only scale the sum. The divergence from a teacher
ignores class weights: its mean is over the labels that are not ignored. It also ignores the shift of the logits, since
a teacher's logits are compared with those that the student has in evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_tricks.callbacks.soft_targets.spec import LossSpec

__all__ = ["LOSSES", "Target", "mixed_labels"]


class Target(Protocol):
    """The data of a soft target that a loss reads.

    Attributes:
        spec: the loss, as the tricks of the batch specify it.
        kind: "labels", integers; "one-hot", integers made of labels; "soft", a distribution in floats; "binary",
            several labels of each item.
        lost: name of the function that made the parts differ from the value. Empty while they match.
        parts: tensors of one shape. "value" is the visible value of the target. Mixed labels also have "other", the
            labels they are mixed with, and "weight", the share of "value". One-hot integers also have "soft", the
            distribution, and so has a function of several labels: the function of the mixed ones. With a teacher there
            is "row", the row of the teacher's logits for each label.
    """

    spec: LossSpec
    kind: str
    lost: str
    parts: dict[str, Tensor]


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
    """Compute ``F.cross_entropy`` for the distribution of the target."""
    spec, value = _begin(target, size_average, reduce)
    _reject_several_labels(target)
    dim = _class_dim(input)
    if spec.smoothing and label_smoothing:
        raise RuntimeError(
            f"{spec.names()}: the module's own cross entropy has label_smoothing={label_smoothing}, which would "
            "smooth the target twice. Set it to 0 there, or leave the callback out."
        )
    if spec.smoothing and (target.kind == "labels" or spec.multi_hot):  # else the soft distribution is smoothed
        label_smoothing = spec.smoothing(input.size(dim))
    if spec.multi_hot is not None:
        return _binary_of_classes(_at_least_float32(input), target, weight, ignore_index, reduction, label_smoothing)
    logits, input = input, _shifted(input, spec)  # noqa: A001
    if not spec.modulates and "other" not in target.parts:
        loss = F.cross_entropy(
            input, value, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    else:
        log_p = F.log_softmax(_at_least_float32(input), dim)
        loss = _of_log_p(log_p, target, weight, ignore_index, reduction, label_smoothing)
    return _with_teacher(loss, logits, target, ignore_index, reduction)


def nll_loss(
    input: Tensor,  # noqa: A002
    target: Target,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute ``F.nll_loss`` for the distribution of the target. The input is the logarithm of a softmax."""
    spec, value = _begin(target, size_average, reduce)
    _reject_several_labels(target)
    if spec.multi_hot is not None:
        raise RuntimeError(
            f"{spec.names()}: BinaryCrossEntropy needs logits, and F.nll_loss gets log-probabilities. Let the module "
            "pass its logits to F.cross_entropy or nn.CrossEntropyLoss, without a softmax."
        )
    logits = input
    if spec.logit_shift is not None:
        input = _shifted(input, spec).log_softmax(_class_dim(input))  # noqa: A001
    if not spec.smoothing and not spec.modulates and "other" not in target.parts:
        loss = F.nll_loss(input, value, weight, ignore_index=ignore_index, reduction=reduction)
    else:
        smoothing = spec.smoothing(input.size(_class_dim(input))) if spec.smoothing else 0.0
        loss = _of_log_p(_at_least_float32(input), target, weight, ignore_index, reduction, smoothing)
    return _with_teacher(loss, logits, target, ignore_index, reduction)  # logits, up to a constant in each row


def bce_with_logits(
    input: Tensor,  # noqa: A002
    target: Target,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Compute ``F.binary_cross_entropy_with_logits`` with the soft targets."""
    spec, _ = _begin(target, size_average, reduce)
    soft = _binary(target, input)
    plain = not spec.modulates
    loss = F.binary_cross_entropy_with_logits(
        input, soft, weight, reduction=reduction if plain else "none", pos_weight=pos_weight
    )
    return loss if plain else _modulated_binary(loss, torch.sigmoid(input), soft, spec, reduction)


def bce(
    input: Tensor,  # noqa: A002
    target: Target,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute ``F.binary_cross_entropy`` with the soft targets."""
    spec, _ = _begin(target, size_average, reduce)
    soft = _binary(target, input)
    plain = not spec.modulates
    loss = F.binary_cross_entropy(input, soft, weight, reduction=reduction if plain else "none")
    return loss if plain else _modulated_binary(loss, input, soft, spec, reduction)


def multilabel_soft_margin(
    input: Tensor,  # noqa: A002
    target: Target,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute ``F.multilabel_soft_margin_loss``, the mean over classes of binary losses, with the soft targets."""
    spec, _ = _begin(target, size_average, reduce)
    soft = _binary(target, input)
    loss = F.binary_cross_entropy_with_logits(input, soft, weight, reduction="none")
    if spec.modulates:
        loss = _modulated_binary(loss, torch.sigmoid(input), soft, spec, "none")
    loss = loss.mean(-1)
    return {"none": loss, "sum": loss.sum()}.get(reduction, loss.mean())


LOSSES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.cross_entropy: cross_entropy,
    F.nll_loss: nll_loss,
    F.binary_cross_entropy_with_logits: bce_with_logits,
    F.binary_cross_entropy: bce,
    F.multilabel_soft_margin_loss: multilabel_soft_margin,
}


def _begin(target: Target, size_average: bool | None, reduce: bool | None) -> tuple[LossSpec, Tensor]:
    spec = target.spec
    spec.require(not target.lost, target.lost)
    if size_average is not None or reduce is not None:
        raise RuntimeError(f"{spec.names()}: size_average and reduce are deprecated; use reduction='mean' or 'sum'.")
    spec.used = True
    return spec, target.parts["value"]


def _class_dim(input: Tensor) -> int:  # noqa: A002
    return 1 if input.dim() > 1 else 0


def _at_least_float32(input: Tensor) -> Tensor:  # noqa: A002
    return input.float() if input.dtype in (torch.float16, torch.bfloat16) else input


def _mixture(target: Target, ignore_index: int, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the labels that are mixed, as class indices, each with its share per item. Ignored labels have share 0."""
    parts = target.parts
    mixture: list[tuple[Tensor, Tensor | float]] = [(parts["value"], 1.0)]
    if "other" in parts:
        weight = parts["weight"].to(like)
        mixture = [(parts["value"], weight), (parts["other"], 1 - weight)]
    return [
        (torch.where(labels == ignore_index, 0, labels).long(), (labels != ignore_index).to(like) * share)
        for labels, share in mixture
    ]


def _shifted(logits: Tensor, spec: LossSpec) -> Tensor:
    """Add the shift of each class to logits. Floats of 16 bits become float32."""
    if spec.logit_shift is None:
        return logits
    dim = _class_dim(logits)
    shift = spec.logit_shift(logits.size(dim))
    return logits + shift.view(-1, *[1] * (logits.dim() - dim - 1))


def _of_log_p(
    log_p: Tensor, target: Target, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
) -> Tensor:
    """Return the negative log-likelihood per element, the probability of its target, and its weight in the mean."""
    spec, parts, dim = target.spec, target.parts, _class_dim(log_p)
    classes = log_p.size(dim)
    in_mean = None if weight is None else weight.to(log_p)
    in_sum = in_mean
    if spec.class_weight is not None:
        in_sum = spec.class_weight(classes).to(log_p)
        in_sum = in_sum if in_mean is None else in_sum * in_mean
    linked = log_p if spec.link is None else spec.link(log_p)
    weighted = linked if in_sum is None else linked * in_sum.view(classes, *[1] * (log_p.dim() - dim - 1))
    if target.kind == "soft":
        share = parts["value"].to(log_p) * (1 - smoothing) + smoothing / classes
        loss, p = -(share * weighted).sum(dim), (share * log_p.exp()).sum(dim)
        known = divisor = torch.ones_like(loss)
        of_labels = (parts["value"].to(log_p) * linked).sum(dim)
    else:
        loss = p = of_labels = known = divisor = torch.zeros_like(log_p.select(dim, 0))
        for index, share in _mixture(target, ignore_index, log_p):
            known = known + share
            divisor = divisor + (share if in_mean is None else share * in_mean[index])
            loss = loss - share * (1 - smoothing) * _pick(weighted, index, dim)
            if spec.link is not None:
                of_labels = of_labels + share * _pick(linked, index, dim)
            if spec.factor is not None:
                p = p + share * (1 - smoothing) * _pick(log_p, index, dim).exp()
        loss = loss - known * smoothing / classes * weighted.sum(dim) if smoothing else loss
        p = p / known.clamp(min=1e-6) + smoothing / classes
    if spec.link is not None:
        spec.mean_link = of_labels.sum().detach() / known.sum()
    if spec.factor is not None:
        factor = spec.factor(p)
        loss = loss * factor
        spec.mean_factor = (factor * known).sum().detach() / known.sum()
    if reduction == "mean":
        return loss.sum() / divisor.sum()
    return loss.sum() if reduction == "sum" else loss


def _binary_of_classes(
    logits: Tensor, target: Target, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
) -> Tensor:
    """Return the binary cross entropy of each class, reduced over classes and items.

    Class weights keep their meaning: the weight of an item is the weight of its labels, by their shares.
    """
    spec, parts, dim = target.spec, target.parts, _class_dim(logits)
    _reject_teacher(spec)
    if spec.logit_shift is not None:
        raise RuntimeError(
            f"{spec.names()}: {spec.softmax_only} shifts the logits of a softmax, which BinaryCrossEntropy replaces by "
            "sigmoids. Keep one of them. ClassBalanced also works with BinaryCrossEntropy."
        )
    if spec.link is not None or spec.multi_hot is None:
        raise RuntimeError(
            f"{spec.names()}: GeneralizedCrossEntropy needs the softmax that BinaryCrossEntropy replaces by sigmoids. "
            "Keep one of them."
        )
    classes = logits.size(dim)
    if target.kind == "soft":
        shares = parts["value"].to(logits)
        known = torch.ones_like(shares.sum(dim))
    else:
        shares = torch.zeros_like(logits)
        for index, share in _mixture(target, ignore_index, logits):
            shares = shares.scatter_add(dim, index.unsqueeze(dim), share.expand(index.shape).unsqueeze(dim))
        known = shares.sum(dim)
    in_mean = None if weight is None else weight.to(logits)
    in_sum = in_mean
    if spec.class_weight is not None and spec.positive_weight is None:
        in_sum = spec.class_weight(classes).to(logits)
        in_sum = in_sum if in_mean is None else in_sum * in_mean
    hot = spec.multi_hot(shares / known.clamp(min=1e-6).unsqueeze(dim), classes)
    soft = hot * (1 - smoothing) + smoothing / classes
    loss = F.binary_cross_entropy_with_logits(logits, soft, reduction="none")
    if spec.factor is not None or spec.positive_weight is not None:
        loss = _modulated_binary(loss, torch.sigmoid(logits), soft, spec, "none")
    loss = loss.sum(dim) if spec.sum_classes else loss.mean(dim)
    loss = loss * (known if in_sum is None else _of_classes(shares, in_sum, dim))
    spec.mean_positives = (hot.sum(dim) * known).sum() / known.sum()
    if reduction == "mean":
        return (
            loss.sum()
            / (known if in_mean is None or target.kind == "soft" else _of_classes(shares, in_mean, dim)).sum()
        )
    return loss.sum() if reduction == "sum" else loss


def _of_classes(shares: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Return the weight per item: the weights of its labels, by their shares."""
    return (shares.movedim(dim, -1) * weight).sum(-1)


def _with_teacher(loss: Tensor, logits: Tensor, target: Target, ignore_index: int, reduction: str) -> Tensor:
    """Add the divergence from the teacher to the loss of the labels."""
    spec, parts, dim = target.spec, target.parts, _class_dim(logits)
    if spec.teacher is None or spec.divergence is None:
        return loss
    row = parts["row"] if target.kind == "labels" else parts["row"].select(dim, 0)
    taught, logits = spec.teacher[row], logits.movedim(dim, -1)
    if taught.shape != logits.shape:
        raise RuntimeError(
            f"KnowledgeDistillation: the teacher has {taught.size(-1)} classes, and the loss of the student "
            f"{logits.size(-1)}: take a teacher that was trained on the same classes, in the same order."
        )
    known = torch.ones_like(logits.select(-1, 0), dtype=torch.promote_types(logits.dtype, torch.float32))
    if target.kind == "labels":
        known = (parts["value"] != ignore_index).to(known)
        if "other" in parts:
            known = torch.lerp((parts["other"] != ignore_index).to(known), known, parts["weight"].to(known))
    divergence = spec.divergence(logits, taught, known) * known
    mean = divergence.sum() / known.sum()
    spec.mean_divergence = mean.detach()
    of_labels, of_teacher = spec.weights
    return of_labels * loss + of_teacher * {"none": divergence, "sum": divergence.sum()}.get(reduction, mean)


def _pick(table: Tensor, index: Tensor, dim: int) -> Tensor:
    return table.gather(dim, index.unsqueeze(dim)).squeeze(dim)


def _reject_several_labels(target: Target) -> None:
    if target.kind == "binary":
        raise RuntimeError(
            f"{target.spec.names()}: the target has several labels per item, of shape "
            f"{tuple(target.parts['value'].shape)}, and cross entropy compares classes of which one is right. Train "
            "with F.binary_cross_entropy_with_logits, or give integer class indices of shape (N,)."
        )


def _reject_teacher(spec: LossSpec) -> None:
    if spec.teacher is not None:
        raise RuntimeError(
            f"{spec.names()}: the loss is binary, and KnowledgeDistillation compares a softmax over classes. "
            "Train with F.cross_entropy or nn.CrossEntropyLoss, or without the teacher."
        )


def _reject_softmax_tricks(spec: LossSpec) -> None:
    """Raise if a trick on softmax cross entropy meets a binary loss of the module."""
    if spec.softmax_only:
        raise RuntimeError(
            f"{spec.names()}: the loss is binary, and {spec.softmax_only} needs a softmax over classes. Train with "
            f"F.cross_entropy or nn.CrossEntropyLoss, or leave {spec.softmax_only} out."
        )
    if spec.link is not None:
        raise RuntimeError(
            f"{spec.names()}: the module's loss is binary, and GeneralizedCrossEntropy is defined for the softmax over "
            "classes. Train with F.cross_entropy or nn.CrossEntropyLoss, or leave the callback out."
        )
    if spec.multi_hot is not None:
        raise RuntimeError(
            f"{spec.names()}: the module's loss is binary already, and BinaryCrossEntropy replaces a softmax cross "
            "entropy. Leave the callback out."
        )


def mixed_labels(target: Target) -> Tensor:
    """Return several labels per item in floats, mixed like the items."""
    parts = target.parts
    if "soft" in parts:
        return parts["soft"]
    value = parts["value"] if parts["value"].is_floating_point() else parts["value"].to(torch.get_default_dtype())
    return parts["other"].to(value).lerp(value, parts["weight"].to(value)) if "other" in parts else value


def _binary(target: Target, input: Tensor) -> Tensor:  # noqa: A002
    """Return the probability of the positive class, from a distribution over classes or from labels 0 and 1."""
    parts, smoothing = target.parts, target.spec.smoothing
    _reject_teacher(target.spec)
    _reject_softmax_tricks(target.spec)
    soft = parts["value"]
    if target.kind == "binary":
        soft = mixed_labels(target)
        soft = soft if parts["value"].is_floating_point() else soft.to(input.dtype)
    elif target.kind == "soft" or not soft.is_floating_point():
        return soft
    elif "other" in parts:
        soft = parts["other"].lerp(soft, parts["weight"].to(soft))
    if smoothing:
        soft = soft * (1 - smoothing(2)) + smoothing(2) / 2
    return soft


def _modulated_binary(loss: Tensor, p: Tensor, soft: Tensor, spec: LossSpec, reduction: str) -> Tensor:
    if spec.factor is not None:
        factor = spec.factor(p * soft + (1 - p) * (1 - soft))
        loss = loss * factor
        spec.mean_factor = factor.detach().mean()
    if spec.positive_weight is not None:
        alpha = spec.positive_weight()
        loss = loss * (alpha * soft + (1 - alpha) * (1 - soft))
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss
