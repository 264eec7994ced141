"""Knowledge distillation: a network learns from the labels, and from the predictions of a trained teacher.

One caveat: the teacher has to be of the student's family. With ResNet-152-D as the teacher, "Bag of Tricks" (table 6)
gains 0.3 points of top-1 for ResNet-50-D, but loses accuracy for Inception-V3 and MobileNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lit_tricks.callbacks.soft_targets.callback import LossTrick
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget
from lit_tricks.callbacks.soft_targets.teacher import Renormalized, load_teacher, logits_of, require_apart
from lit_tricks.utils.arguments import choice, flag, invalid, number, numbers, text
from lit_tricks.utils.batch import Path
from lit_tricks.utils.class_names import names_of, require_same_classes

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["KnowledgeDistillation", "dist_divergence", "distillation_divergence"]

EPS = 1e-8  # of https://github.com/hunto/DIST_KD. Columns of absent classes are tiny, so the value counts
TEMPERATURES = {"kl": 20.0, "ce": 20.0, "dist": 1.0}
WEIGHT = 2.0  # of each relation, in the paper and in its code


def distillation_divergence(
    logits: Tensor, teacher: Tensor, temperature: float, loss: Literal["kl", "ce"] = "kl"
) -> Tensor:
    """Return ``T^2 L(softmax(teacher / T), softmax(logits / T))``, per row, in float32 at least.

    Args:
        logits: logits of the student (..., K), or their log-softmax.
        teacher: logits of the teacher (..., K).
        temperature: ``T``, above 0. Its square keeps the size of the gradients as the temperature grows.
        loss: ``L``: Kullback-Leibler divergence, or cross entropy, which is larger by the teacher's entropy.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> distillation_divergence(torch.zeros(2, 2), teacher, temperature=1.0)
        tensor([0.3278, 0.0000])
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    p = (teacher.to(dtype) / temperature).softmax(-1)
    log_q = (logits.to(dtype) / temperature).log_softmax(-1)
    terms = torch.xlogy(p, p) - p * log_q if loss == "kl" else -p * log_q
    return temperature**2 * terms.sum(-1)


def dist_divergence(
    logits: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    beta: float = WEIGHT,
    gamma: float = WEIGHT,
    weight: Tensor | None = None,
) -> Tensor:
    """Return the loss of DIST per row, whose mean is the paper's loss ([Huang et al., 2022](https://arxiv.org/abs/2205.10536)).

    With the probabilities ``q = softmax(logits / T)`` and ``p = softmax(teacher / T)``, the loss of row i is
    ``T^2 (beta (1 - r_i) + gamma (1 - c))``. Here ``r_i`` is Pearson's correlation of row i of q and p (inter-class),
    and ``c`` is the mean of the correlations of their columns (intra-class). A constant row or column has correlation 0
    and no gradient. The computation is in float32 at least.

    Args:
        logits: logits of the student (..., K), or their log-softmax. Columns extend over all other dimensions.
        teacher: logits of the teacher (..., K).
        temperature: ``T``, above 0.
        beta: weight of the relations between classes, 0 or more.
        gamma: weight of the relations between rows, 0 or more.
        weight: weight of each row in the columns (...), 0 or more. None is 1.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
        >>> dist_divergence(5 * teacher, teacher, beta=1.0, gamma=0.0)
        tensor([0.0329, 0.0033])
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    q, p = ((each.to(dtype) / temperature).softmax(-1) for each in (logits, teacher))
    of_rows = _correlation(q, p, -1)
    weight = torch.ones_like(of_rows) if weight is None else weight.to(dtype)
    classes = q.size(-1)
    of_columns = _correlation(q.reshape(-1, classes), p.reshape(-1, classes), 0, weight.reshape(-1, 1))
    return temperature**2 * (beta * (1 - of_rows) + gamma * (1 - of_columns.mean()))


def _correlation(a: Tensor, b: Tensor, dim: int, weight: Tensor | None = None) -> Tensor:
    """Return Pearson's correlation along a dimension, 0 where a or b are constant up to rounding."""
    is_constant = torch.zeros((), dtype=torch.bool, device=a.device)
    centered, norms = [], []
    for x in (a, b):
        if weight is None:
            deviation, size = x - x.mean(dim, keepdim=True), x.norm(dim=dim)
        else:
            mean = (x * weight).sum(dim, keepdim=True) / weight.sum().clamp(min=torch.finfo(x.dtype).tiny)
            deviation, size = (x - mean) * weight.sqrt(), (x * weight.sqrt()).norm(dim=dim)
        centered.append(deviation)
        norms.append(deviation.norm(dim=dim))
        # the gradient of a constant would be up to 1 / EPS: an untrained classifier may start with equal logits
        is_constant = is_constant | (norms[-1] <= 64 * torch.finfo(x.dtype).eps * size)
    correlation = (centered[0] * centered[1]).sum(dim) / (norms[0] * norms[1] + EPS)
    return torch.where(is_constant, 0.0, correlation)


class KnowledgeDistillation(LossTrick):
    """Learn from a trained teacher in addition to the labels ([Hinton et al., 2015](https://arxiv.org/abs/1503.02531)).

    Each cross entropy in training gets the additional term ``T^2 L(softmax(r / T), softmax(z / T))``, with the
    student's logits ``z``, the teacher's logits ``r`` and the temperature ``T``, as in
    [Bag of Tricks](https://arxiv.org/abs/1812.01187). ``L`` is the argument ``loss``, by default the Kullback-Leibler
    divergence. The teacher gets the same images, after any mixing, in evaluation mode and in the run's precision. The
    teacher is not part of the module's checkpoint, optimizer or summary. Class weights, smoothing and focal factors
    apply to the label loss only. Pixels or images with ``ignore_index`` have no teacher loss.

    With ``loss="dist"`` the term is the loss of DIST ([Huang et al., 2022](https://arxiv.org/abs/2205.10536)). It
    compares the student's and the teacher's probabilities by Pearson's correlation, per image over the classes, and per
    class over the images of a batch. So the probabilities may differ, if one is an increasing linear function of the
    other. The batch is one batch on one device, as in the authors' code: neither DDP nor accumulation makes it larger.
    The gradient is large while the student predicts nearly the same for all images, such as after the first step of a
    classifier whose weights start at 0. Clip gradients there, or start from other weights.

    Cost: a forward pass of the teacher per batch, and its weights on every device. Use it for long runs with a teacher
    of the student's family. Leave it out if the teacher has other classes or was trained with strong label smoothing,
    and for pre-training of backbones for segmentation.

    Args:
        teacher: a module that returns logits. In YAML: ``class_path`` and ``init_args``, the path of a checkpoint of a
            Classifier or Segmenter, or the name of a pretrained timm model, which is downloaded.
        temperature: ``T``, above 0. At 1 the most likely classes of the teacher dominate the loss. Far above the size
            of the logits, the loss compares the logits of all classes. None is 20 for "kl" and "ce", as in Bag of
            Tricks for ImageNet, and 1 for "dist", as in its paper for ImageNet. The paper uses 4 for CIFAR-100.
        alpha: None adds both losses with weight 1, as in Bag of Tricks. A number in (0, 1] is the weight of the
            teacher's loss, and ``1 - alpha`` of the label loss. 0.5 is GluonCV's choice.
        loss: ``L``. "kl" is the Kullback-Leibler divergence, which is 0 if student and teacher agree. "ce" is the cross
            entropy of Bag of Tricks. Both have the same gradients. "ce" is larger by the teacher's entropy. "dist" is
            the loss of DIST, for teachers that are much stronger than the student.
        beta: weight of the relations between classes in "dist", 0 or more. 2 is the paper's. At 0, only relations
            between images count.
        gamma: weight of the relations between images in "dist", 0 or more. 2 is the paper's. At 0, only relations
            between classes count.
        mean: channel means that the teacher expects to be subtracted from images in [0, 1]. None passes images as they
            are.
        std: channel standard deviations that the teacher expects.
        input_mean: channel means that were subtracted from the batch. None: the images are in [0, 1], or uint8.
        input_std: channel standard deviations that the batch was divided by.
        channels_last: whether the teacher runs in this memory format.
        compiled: whether the teacher is compiled with ``torch.compile``.

    Raises:
        ValueError: for an argument out of its range, or an unknown timm name; when the fit starts, if teacher and
            student have other names of classes.
        FileNotFoundError: when the fit starts, if the checkpoint does not exist.
        ConnectionError: when the fit starts, if the download fails.
        RuntimeError: when the fit starts, if the checkpoint holds no such module, or teacher and student share
            weights; in the first training step, if their logits do not match, or no loss used the target.

    Example:
        ``- {class_path: KnowledgeDistillation, init_args: {teacher: resnet152d.gluon_in1k, temperature: 20}}``
    """

    stage = 2
    transient: ClassVar[tuple[str, ...]] = (*LossTrick.transient, "_teacher")

    _teacher: nn.Module | None = None  # the teacher during a fit
    _name = ""

    def __init__(
        self,
        teacher: str | nn.Module,
        temperature: float | None = None,
        alpha: float | None = None,
        loss: Literal["kl", "ce", "dist"] = "kl",
        beta: float = WEIGHT,
        gamma: float = WEIGHT,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_mean: Sequence[float] | None = None,
        input_std: Sequence[float] | None = None,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        fix = "Give a module, the path of a checkpoint, or the name of a pretrained model of timm."
        self.teacher: nn.Module | str = (
            teacher if isinstance(teacher, nn.Module) else text(self, "teacher", teacher, fix)
        )
        if isinstance(teacher, nn.Module) and getattr(teacher.forward, "__func__", None) is nn.Module.forward:
            raise invalid(self, "the teacher has no `forward`. Give a network that returns logits.", teacher=teacher)
        self.loss: Literal["kl", "ce", "dist"] = choice(self, "loss", loss, ("kl", "ce", "dist"))
        none, fix = "the value of the loss's paper", "4 and 20 are usual."
        self.temperature: float | None = number(self, "temperature", temperature, "[0.01, 1000]", fix, or_none=none)
        fix = "Give the weight of the teacher."
        self.alpha: float | None = number(self, "alpha", alpha, "(0, 1]", fix, or_none="the sum of both losses")
        self.beta: float = number(self, "beta", beta, "[0, 1e6]", "The paper uses 2.")
        self.gamma: float = number(self, "gamma", gamma, "[0, 1e6]", "The paper uses 2.")
        if self.loss != "dist" and (self.beta, self.gamma) != (WEIGHT, WEIGHT):
            rule = "beta and gamma are weights of DIST. Give loss='dist', or leave them out."
            raise invalid(self, rule, loss=loss, beta=beta, gamma=gamma)
        if not self.beta and not self.gamma:
            raise invalid(self, "the teacher has no weight. Give at least one above 0.", beta=beta, gamma=gamma)
        self.channels_last: bool = flag(self, "channels_last", channels_last)
        self.compiled: bool = flag(self, "compiled", compiled)
        fix = "Give one number per channel."
        self.mean: list[float] | None = numbers(self, "mean", mean, "[-1e6, 1e6]", fix, or_none="no normalization")
        self.std: list[float] | None = numbers(self, "std", std, "[1e-6, 1e6]", fix, or_none="no normalization")
        self.input_mean: list[float] | None = numbers(
            self, "input_mean", input_mean, "[-1e6, 1e6]", fix, or_none="images in [0, 1]"
        )
        self.input_std: list[float] | None = numbers(
            self, "input_std", input_std, "[1e-6, 1e6]", fix, or_none="images in [0, 1]"
        )
        self._to = self._normalization("mean", "std")
        self._was = self._normalization("input_mean", "input_std")
        if self._was and len(self._was[0]) != len(self._to[0] if self._to else ()):
            raise invalid(
                self,
                "the teacher's normalization must have as many channels. Give mean and std, too.",
                input_mean=input_mean,
                mean=mean,
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the teacher."""
        if stage == "fit":
            if isinstance(self.teacher, nn.Module):
                require_apart(self.teacher, pl_module)
            self._teacher = load_teacher(self.teacher)
            self._name = type(self._teacher).__name__
            student = pl_module if names_of(pl_module) else getattr(trainer, "datamodule", None)
            remedy = "Give a teacher of the student's classes."
            require_same_classes(self._teacher, student, "the teacher", "the student", remedy)
            if self._to:
                self._teacher = Renormalized(self._teacher, *self._to, *self._was)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the teacher and announce it."""
        super().on_fit_start(trainer, pl_module)
        assert self._teacher is not None
        dtypes = (p.dtype for p in pl_module.parameters() if p.is_floating_point())
        teacher = self._teacher.to(pl_module.device, next(dtypes, None))
        if self.channels_last:
            teacher = teacher.to(memory_format=torch.channels_last)
        size = sum(parameter.numel() for parameter in teacher.parameters())
        labels, factor = self._weights()
        factor *= self._temperature**2
        shown = f"{factor:g} x {self.loss.upper()}"
        if self.loss == "dist":
            shown = f"{factor * self.beta:g} x inter-class + {factor * self.gamma:g} x intra-class relations of DIST"
        self.announce(
            f"{labels:g} x loss + {shown} from {self._name}, {size:,} parameters, at temperature {self._temperature:g}"
        )
        self._teacher = torch.compile(teacher) if self.compiled else teacher  # type: ignore[assignment]

    def act(self, inputs: dict[Path, Tensor], target: SoftTarget) -> tuple[dict[Path, Tensor], SoftTarget]:
        """Compute the teacher's logits."""
        assert self._trainer is not None
        assert self._teacher is not None
        if len(inputs) != 1:
            found = " and ".join(".".join(map(str, path)) for path in inputs) or "none"
            raise RuntimeError(
                "KnowledgeDistillation needs one input of the training batch for the teacher, and found "
                f"{found}: let the collate_fn of the loader leave one tensor of images."
            )
        if target.kind == "binary":
            raise RuntimeError(
                "KnowledgeDistillation compares the teacher's softmax over classes, and the target has several labels "
                f"an item, of shape {tuple(target.shape)}: leave it out."
            )
        [images] = inputs.values()
        labels, spec = target.parts["value"], target.spec
        with torch.no_grad(), self._trainer.precision_plugin.forward_context():
            spec.teacher = logits_of(self._teacher, images, labels, self._name)
        if self.loss == "dist" and self.gamma and labels.numel() == 1 and not self._seen:
            rank_zero_warn(
                "KnowledgeDistillation(loss='dist') compares the images of a batch, and the first batch has one image, "
                "which has no such relation: take larger batches, since accumulation does not make them larger."
            )
        spec.divergence = self._divergence
        spec.weights = self._weights()
        target.parts["row"] = torch.arange(labels.numel(), device=labels.device).view(labels.shape)
        return inputs, target

    def quantities(self, spec: LossSpec) -> dict[str, Any]:
        """Return the mean divergence, times the square of the temperature."""
        return {} if spec.mean_divergence is None else {"knowledge_distillation/loss": spec.mean_divergence}

    def unwrap(self) -> None:
        """Also release the teacher."""
        super().unwrap()
        self._teacher = None

    @property
    def _temperature(self) -> float:
        return TEMPERATURES[self.loss] if self.temperature is None else self.temperature

    def _divergence(self, logits: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        if self.loss == "dist":
            return dist_divergence(logits, teacher, self._temperature, self.beta, self.gamma, weight)
        return distillation_divergence(logits, teacher, self._temperature, self.loss)

    def _weights(self) -> tuple[float, float]:
        return (1.0, 1.0) if self.alpha is None else (1 - self.alpha, self.alpha)

    def _normalization(self, mean: str, std: str) -> tuple[Sequence[float], ...]:
        subtracted, divided = getattr(self, mean), getattr(self, std)
        if subtracted is None and divided is None:
            return ()
        if subtracted is None or divided is None or len(subtracted) != len(divided):
            both: dict[str, object] = {mean: subtracted, std: divided}
            raise invalid(self, f"{mean} and {std} go together. Give both, with one number per channel.", **both)
        return subtracted, divided
