"""Whitened stem: the first convolution decorrelates the values of image patches, and stays fixed (Jordan, 2024).

One caveat: the filters fit the normalization of the training images. A model with other normalization needs new ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_tricks.callbacks.batchnorm.data_pass import TrainingDataPass, require_forward
from lit_tricks.callbacks.finetuning.callback import Freezing, Stage
from lit_tricks.callbacks.optim.initializer import sign_of_training
from lit_tricks.utils.arguments import integer, number, text
from lit_tricks.utils.dtensor import part_for, reshard, to_local
from lit_tricks.utils.modes import eval_mode
from lit_tricks.utils.modules import check_shapes, own_parameter
from lit_tricks.utils.training_length import steps_done

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["WhitenedStem", "whitening_filters"]

_VALUES = 2**24  # of patches in memory at a time, in float64


def whitening_filters(covariance: Tensor, number: int, eps: float = 5e-4) -> Tensor:
    """Return filters whose outputs are uncorrelated and have variance 1.

    A filter is an eigenvector of the covariance, divided by ``sqrt(eigenvalue + eps * mean(eigenvalues))``. The filters
    follow the eigenvalues from the largest to the smallest. Their negatives come next, and then all of them again.

    Args:
        covariance: covariance of the inputs, shape (D, D).
        number: number of filters. With 2 D filters, each direction is there once with each sign.
        eps: limits the gain of directions with little variance, 0 or more.

    Returns:
        Filters, shape (number, D), in float64. The largest value of an eigenvector is positive.

    Example:
        >>> covariance = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> filters = whitening_filters(covariance, 2, eps=0.0)
        >>> (filters @ covariance @ filters.T).abs().round(decimals=4)
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    eigenvalues, vectors = torch.linalg.eigh(covariance.double())
    eigenvalues, rows = eigenvalues.flip(0).clamp(min=0), vectors.T.flip(0)
    # An eigenvector has no sign. This one does not depend on the library that computed it.
    rows = rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    rows = rows / (eigenvalues + eps * eigenvalues.mean()).sqrt()[:, None]
    pairs = torch.cat((rows, -rows))
    return pairs[torch.arange(number, device=pairs.device) % len(pairs)]


class WhitenedStem(Freezing):
    """Whiten the patches of images by a fixed first convolution ([Jordan, 2024](https://arxiv.org/abs/2404.00498)).

    Before the first step, the covariance of the image patches that the first convolution gets is computed from training
    images. The filters become the eigenvectors of the covariance, from the largest eigenvalue to the smallest. They are
    scaled such that their outputs are uncorrelated and have variance 1, or less where ``eps`` limits the gain. If there
    are more filters than values in a patch (12 for 2 x 2 pixels of 3 channels), the negatives of the filters follow. If
    the convolution has a bias, it starts such that the mean of each output is 0, and is trained. The filters are frozen
    for the whole run, and saved with the model. A resumed run keeps them.

    Cost: the time to load the images, once. Steps get faster, as the first filters need no gradient. Use it in runs
    from scratch of about ten epochs, for small filters on small images: 2 x 2 pixels and 24 filters on CIFAR-10. Leave
    it out for long runs, and for networks with trained weights. If there are fewer filters than values in a patch,
    directions with little variance are lost.

    Args:
        layer: name of the convolution. None takes the first two-dimensional convolution of the module.
        images: number of training images for the covariance, over all processes, 1 or more. Whole batches are used, as
            the loader yields them. A few hundred images suffice for filters of 2 x 2 pixels.
        eps: limit on the gain, as a share of the mean variance, in (0, 1]. Near 0 it whitens exactly, and amplifies the
            noise of directions with little variance. At 1, these directions stay small.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if there is no such convolution, it is grouped or parametrized, the network
            was trained before, the images do not vary, another callback freezes the layer, or a resumed checkpoint was
            made without the trick.

    Example:
        ``- {class_path: WhitenedStem}``
    """

    fine_tunes = False  # the network starts from random weights
    train_bn: bool = False
    unit: Literal["epochs", "run"] = "epochs"
    _name = ""  # of the convolution

    def __init__(self, layer: str | None = None, images: int = 5000, eps: float = 5e-4) -> None:
        self.layer: str | None = text(
            self, "layer", layer, "Name a convolution, such as 'model.stem'.", or_none="the first convolution"
        )
        self.images: int = integer(self, "images", images, 1, "5000 suffice for small filters.")
        self.eps: float = number(self, "eps", eps, "(0, 1]", "0.0005 is usual.")
        self._condition: float | None = None  # None before the filters are set

    def stages(self) -> list[Stage]:
        """Return the filters, which are frozen to the end."""
        return [Stage([f"{self._name}.weight"], None)]

    def shown(self) -> str:
        """Return the call, for messages."""
        return f"WhitenedStem(layer={self.layer or self._name!r})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare to set and freeze the filters."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._condition = None
            # It follows the preparation of the loaders, and precedes on_train_start of all callbacks, in which tricks
            # compile layers and copy weights.
            self.wrap(trainer.fit_loop, "on_run_start", partial(self._around_run_start, trainer, pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the filters frozen, and log the condition number of the covariance."""
        self._follow(trainer, pl_module)
        if self._condition is not None and self.should_log(trainer):
            self.log_step(pl_module, {"whitened_stem/condition": self._condition})

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint has such filters.

        Raises:
            RuntimeError: if it was made without the trick.
        """
        if checkpoint["global_step"] and self.state_key not in checkpoint["callbacks"]:
            raise RuntimeError(
                "WhitenedStem: the checkpoint was made without it. Remove it, or start a new run from scratch."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the condition number; None before the filters are set."""
        return super().state_dict() | {"condition": self._condition}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the condition number."""
        super().load_state_dict(state_dict)
        self._condition = state_dict["condition"]

    # Called instead of methods

    def _freeze(
        self, trainer: Trainer, pl_module: LightningModule, setup: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        self._name = self._find_layer(pl_module)
        return super()._freeze(trainer, pl_module, setup, *args, **kwargs)

    def _around_run_start(
        self, trainer: Trainer, pl_module: LightningModule, on_run_start: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self._condition is None and not steps_done(trainer, pl_module):
            self._whiten(trainer, pl_module)
        return on_run_start(*args, **kwargs)

    # Helpers

    def _find_layer(self, pl_module: LightningModule) -> str:
        check_shapes(pl_module, "WhitenedStem")
        module = type(pl_module).__name__
        found: dict[str, Any] = {name: part for name, part in pl_module.named_modules() if isinstance(part, nn.Conv2d)}
        if self.layer is not None:
            found = {name: part for name, part in found.items() if name == self.layer}
        if not found:
            what = f"no two-dimensional convolution {self.layer!r}" if self.layer else "no two-dimensional convolution"
            raise RuntimeError(f"WhitenedStem found {what} in {module}. Name one by layer, or remove WhitenedStem.")
        name, layer = next(iter(found.items()))
        if layer.groups > 1:
            raise RuntimeError(
                f"WhitenedStem: {name} has {layer.groups} groups, which split the channels. Name another layer."
            )
        if own_parameter(layer, "weight") is None:
            raise RuntimeError(
                f"WhitenedStem cannot set the filters of {name}, which are parametrized. Remove the parametrization."
            )
        return name

    def _whiten(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        if sign := sign_of_training(pl_module, trained):
            raise RuntimeError(
                f"WhitenedStem is for a run from scratch, and {type(pl_module).__name__} was trained before: {sign}. "
                "Remove WhitenedStem, or do not load weights."
            )
        mean, covariance = self._moments(trainer, pl_module)
        eigenvalues = torch.linalg.eigvalsh(covariance)
        if not eigenvalues[-1] > 0:
            raise RuntimeError(f"WhitenedStem: the inputs of {self._name} do not vary. Remove WhitenedStem.")
        floor = self.eps * eigenvalues.mean()
        self._condition = float((eigenvalues[-1] + floor) / (eigenvalues[0].clamp(min=0) + floor))
        weight = pl_module.get_parameter(f"{self._name}.weight")
        filters = whitening_filters(covariance, len(weight), self.eps)
        filters, mean = trainer.strategy.broadcast((filters, mean))  # other machines may round in another way
        with torch.no_grad():
            for key, value in (("weight", filters.view(weight.shape)), ("bias", -filters @ mean)):
                parameter = own_parameter(pl_module.get_submodule(self._name), key)
                if parameter is not None:
                    to_local(parameter.detach()).copy_(part_for(parameter, value.to(parameter.dtype)))

    def _moments(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of the patches that the convolution gets, on the CPU, in float64."""
        require_forward("WhitenedStem", pl_module)
        layer: Any = pl_module.get_submodule(self._name)
        data_pass = TrainingDataPass("WhitenedStem", trainer, pl_module, self.images)
        device = trainer.strategy.root_device
        sums = _PatchSums(layer, device, stop=not data_pass.is_sharded)
        handle = layer.register_forward_pre_hook(sums.add, with_kwargs=True)
        try:
            # compiled code would not call the hook
            eager = torch.compiler.set_stance("force_eager")
            with torch.no_grad(), eager, eval_mode(pl_module), data_pass.batches() as batches:
                for inputs in batches:
                    with contextlib.suppress(_Seen):
                        data_pass.forward(inputs)
        finally:
            handle.remove()
            reshard(pl_module)
        total = data_pass.sum(sums.total.to(device, torch.float64 if device.type != "mps" else torch.float32))
        total = total.cpu().double()
        if not (count := total[-1, -1]):
            raise RuntimeError(
                f"WhitenedStem: {type(pl_module).__name__} did not call {self._name} for training images. Name a "
                "convolution by layer that gets them, or remove WhitenedStem."
            )
        mean = total[:-1, -1] / count
        return mean, total[:-1, :-1] / count - torch.outer(mean, mean)

    def _effect(self, pl_module: LightningModule) -> str:
        number = len(pl_module.get_parameter(f"{self._name}.weight"))
        if self._condition is None:
            return f"{number} filters of {self._name} stay as they are, since the run continues another one"
        return f"{number} filters of {self._name}, for patches with a condition number of {self._condition:.3g}"


class _Seen(BaseException):
    """Ends a forward pass. Not an Exception: models catch those."""


class _PatchSums:
    """Sums over the patches that a convolution gets.

    Args:
        layer: the convolution.
        device: device of its inputs.
        stop: whether to end a forward pass, by an exception, after the first call.

    Attributes:
        total: sum of the outer products of patches, each with a 1 at its end, shape (D + 1, D + 1).
    """

    def __init__(self, layer: nn.Conv2d, device: torch.device, stop: bool) -> None:
        self.stop = stop
        size = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
        on = "cpu" if device.type == "mps" else device  # which has no float64
        self.total: Tensor = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=on)

    def add(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the input of a call, without patches that the padding is a part of."""
        images = (*args, *kwargs.values())[0].detach()
        size = len(self.total) * images.size(-1) * images.size(-2)
        for part in images.split(max(1, _VALUES // size)):
            patches = F.unfold(part.to(self.total), layer.kernel_size, layer.dilation, 0, layer.stride)
            patches = F.pad(patches, (0, 0, 0, 1), value=1.0)
            self.total += torch.einsum("ndl,nel->de", patches, patches)
        if self.stop:
            raise _Seen
