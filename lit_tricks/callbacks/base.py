"""The base of every trick: a Lightning callback, whichever package Lightning was installed as."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from lit_tricks._compat import lightning_classes

__all__ = ["Trick"]

log = logging.getLogger("lit_tricks")

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Callback
    from lightning.pytorch import LightningModule, Trainer
else:
    # `lightning` and `pytorch_lightning` are two packages with two `Callback` classes; each one's Trainer and CLI take
    # only their own, so a trick is both.
    _Callback = type("_Callback", lightning_classes("Callback"), {})


class Wrapped:
    """A method of an object with something around it: ``around(method, *args, **kwargs)``.

    It is an object and not a closure, so that it pickles, and so that a copy of its owner calls the copy.
    """

    def __init__(self, method: Callable[..., Any], around: Callable[..., Any], was_attribute: bool) -> None:
        self.method: Any = method
        self.around = around
        self.was_attribute = was_attribute  # the method stood in the owner's own attributes, not in its class

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method at the bottom: what Lightning looks at to see if a hook is overridden."""
        inner: Callable[..., Any] = self.method.__wrapped__ if isinstance(self.method, Wrapped) else self.method
        return inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.method, *args, **kwargs)


class Trick(_Callback):
    """Base of the tricks: a ``Callback`` of every installed Lightning package that says what it does.

    A trick that wraps methods, with ``_wrap``, need not undo it: that is done in ``teardown`` and ``on_exception``
    (Lightning calls only one of them), in whatever order several tricks come off the same method.
    """

    effect = ""  # what it does in this run, in one line, once it has said so

    _takes_batches = False  # the loop over training batches, in this fit, of a trick that changes them
    _wrappers: tuple[tuple[Any, str, Wrapped], ...] = ()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take everything off that was put around methods."""
        self._unwrap()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take everything off that was put around methods."""
        self._unwrap()

    def _say(self, effect: str) -> None:
        """Say once, on rank zero, what the trick does in this run, as a line of the start-up summary."""
        self.effect = effect
        rank_zero_only(log.info)(f"{type(self).__name__}: {effect}")

    @staticmethod
    def _is_logged(trainer: Trainer) -> bool:
        """Whether what is logged with this training batch goes to the loggers; of others it need not be computed."""
        return trainer._logger_connector.should_update_logs

    @staticmethod
    def _log_step(pl_module: LightningModule, quantities: Mapping[str, Any]) -> None:
        """Log numbers with the step. Lightning would put a float on the GPU, and wait there for all work before it."""
        on_cpu = {
            name: value if isinstance(value, Tensor) else torch.tensor(value) for name, value in quantities.items()
        }
        pl_module.log_dict(on_cpu, on_step=True, on_epoch=False)

    def _wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Put ``around(method, *args, **kwargs)`` in the place of a method, until the trick is torn down."""
        wrapper = Wrapped(getattr(owner, name), around, was_attribute=name in vars(owner))
        setattr(owner, name, wrapper)
        self._wrappers += ((owner, name, wrapper),)

    def _unwrap(self) -> None:
        for owner, name, wrapper in reversed(self._wrappers):
            outer = vars(owner).get(name)
            if outer is wrapper:
                if wrapper.was_attribute:
                    setattr(owner, name, wrapper.method)
                else:
                    delattr(owner, name)
                continue
            while isinstance(outer, Wrapped):  # another trick came on top of this one, and stays
                if outer.method is wrapper:
                    outer.method, outer.was_attribute = wrapper.method, wrapper.was_attribute
                    break
                outer = outer.method
        self._wrappers = ()

    def __getstate__(self) -> dict[str, Any]:
        # The Trainer hangs the module's `log` and `log_dict` on each callback. They are not part of the trick, and
        # would drag the whole module into every copy and pickle of it; so would the wrapped methods.
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict", "_wrappers")}
