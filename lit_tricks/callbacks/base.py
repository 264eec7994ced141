"""The base class of tricks: a Lightning callback, for ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Generator, Tensor

from lit_tricks._compat import callbacks_of, lightning_classes, should_update_logs
from lit_tricks.utils.log import log, show_lines

__all__ = ["Trick", "paused", "unwrapped"]

if TYPE_CHECKING:
    import lightning.pytorch
    import pytorch_lightning

    class _Callback(lightning.pytorch.Callback, pytorch_lightning.Callback):  # type: ignore[misc]
        """Both packages' callback."""

    from lit_tricks._compat import LightningModule, Trainer
else:
    # `lightning` and `pytorch_lightning` are two packages with two `Callback` classes; each one's Trainer and CLI take
    # only their own, so a trick is both.
    _Callback = type("_Callback", lightning_classes("Callback"), {})


class Wrapped:
    """A method of an object that is replaced by a call of ``around(method, *args, **kwargs)``.

    It is an object and not a closure, so that it pickles, and so that a copy of its owner calls the copy.
    """

    def __init__(self, method: Callable[..., Any], around: Callable[..., Any], was_attribute: bool) -> None:
        self.method: Any = method
        self.around = around
        self.was_attribute = was_attribute  # the method was in the owner's own attributes, not in its class

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Return the innermost method. Lightning compares it with its own method to detect overridden hooks."""
        inner: Callable[..., Any] = self.method.__wrapped__ if isinstance(self.method, Wrapped) else self.method
        return inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.method, *args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        """Return a function of the owner, as bound methods have one. Schedulers of torch wrap it."""
        return lambda owner, *args, **kwargs: self(*args, **kwargs)


class _Packed(NamedTuple):
    """The state of a generator, as bytes.

    torch pickles a generator with a tensor in shared memory, and processes that are spawned fail to open it
    (https://github.com/pytorch/pytorch/issues/146828).
    """

    state: bytes

    @classmethod
    def of(cls, generator: Generator) -> _Packed:
        return cls(generator.get_state().numpy().tobytes())

    def generator(self) -> Generator:
        return Generator().set_state(torch.frombuffer(bytearray(self.state), dtype=torch.uint8))


class Trick(_Callback):
    """Base class of tricks: a ``Callback`` of every installed Lightning package.

    Subclass it as you would subclass ``Callback``, and override Lightning's hooks. In addition,

    - ``announce`` logs one line that states what the trick does in this run.
    - ``wrap`` replaces a method of the module, the Trainer or a strategy for as long as the trick is in force. Use it
      only where no hook does. Methods are restored in ``teardown`` and ``on_exception`` (Lightning calls one of them),
      in any order of tricks that wrap the same method.
    - ``unwrap`` restores them. Override it to also undo other changes of the trick.
    - ``change_training_batches`` passes each training batch through a function of yours.
    - ``should_log`` and ``log_step`` log quantities without work in batches that no logger uses.

    ``CONTRIBUTING.md`` has the contract of a trick. The guide "Write your own trick" has an example.

    Attributes:
        effect: the line that was announced. Empty before.
        is_paused: whether training batches are left unchanged, while PreciseBN passes over the training data.
        transient: attributes that copies and pickles of the trick lack, such as the Trainer of a fit. Each needs a
            default in the class.
        conflict_with_frozen: why the trick does not fit a frozen network with one input size. Empty if it does.
        fine_tunes: whether the trick starts from trained weights, which tricks for runs from scratch then do not
            change.
        averages_views: whether evaluation gives means over several views of an image.
    """

    effect: str = ""
    is_paused = False
    transient: ClassVar[tuple[str, ...]] = ()
    conflict_with_frozen = ""
    fine_tunes = False
    averages_views = False

    _wrappers: tuple[tuple[Any, str, Wrapped], ...] = ()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the methods that the trick has wrapped."""
        self.unwrap()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the methods that the trick has wrapped."""
        self.unwrap()

    def announce(self, effect: str) -> None:
        """Log on rank zero, in one line, what the trick does in this run.

        Args:
            effect: what it does, with the numbers that follow from arguments and run: "0.1 x 1024/256 = 0.4".
        """
        show_lines()
        self.effect = effect
        rank_zero_only(log.info)(f"{type(self).__name__}: {effect}")

    @staticmethod
    def should_log(trainer: Trainer) -> bool:
        """Return whether the loggers get what is logged in this training batch."""
        return should_update_logs(trainer)

    @staticmethod
    def log_step(pl_module: LightningModule, quantities: Mapping[str, Any]) -> None:
        """Log numbers of a training step.

        Lightning copies floats to the GPU and waits there for all earlier work. Tensors on the CPU are not copied.

        Args:
            pl_module: the module.
            quantities: numbers or tensors, by name: "ema/decay".
        """
        on_cpu = {
            name: value if isinstance(value, Tensor) else torch.tensor(value) for name, value in quantities.items()
        }
        pl_module.log_dict(on_cpu, on_step=True, on_epoch=False)

    def change_training_batches(
        self, trainer: Trainer, change: Callable[[Any], Any], *, when_paused: bool = False
    ) -> None:
        """Replace each training batch by ``change(batch)``, once it is on the device, until the trick is torn down.

        Batches of validation, test and prediction are not changed. Call this method in ``on_fit_start``.

        Args:
            trainer: the Trainer.
            change: takes a batch and returns one. Return a new batch: data sets in memory share their tensors with it.
            when_paused: also change the batches from which PreciseBN estimates statistics.
        """
        # Lightning has no hook that lets a callback change a batch.
        self.wrap(trainer.strategy, "batch_to_device", partial(self._changed, trainer, change, when_paused))

    def _changed(
        self,
        trainer: Trainer,
        change: Callable[[Any], Any],
        when_paused: bool,
        batch_to_device: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        batch = batch_to_device(*args, **kwargs)
        return change(batch) if trainer.training and (when_paused or not self.is_paused) else batch

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Replace a method until the trick is torn down.

        Args:
            owner: the object whose method it is. Its class is not changed.
            name: name of the method.
            around: is called as ``around(method, *args, **kwargs)``, and returns what the method should return. Give a
                bound method, or a ``functools.partial`` of one, not a lambda: the owner may be pickled.
        """
        wrapper = Wrapped(getattr(owner, name), around, was_attribute=name in vars(owner))
        setattr(owner, name, wrapper)
        self._wrappers += ((owner, name, wrapper),)

    def unwrap(self) -> None:
        """Restore the methods that the trick has wrapped. Is called however the fit ends, and may be called again."""
        for owner, name, wrapper in reversed(self._wrappers):
            outer = vars(owner).get(name)
            if outer is wrapper:
                if wrapper.was_attribute:
                    setattr(owner, name, wrapper.method)
                else:
                    delattr(owner, name)
                continue
            while isinstance(outer, Wrapped):  # another trick has wrapped the method later, and stays
                if outer.method is wrapper:
                    outer.method, outer.was_attribute = wrapper.method, wrapper.was_attribute
                    break
                outer = outer.method
        self._wrappers = ()

    def __getstate__(self) -> dict[str, Any]:
        # The Trainer sets the module's `log` and `log_dict` on each callback. They, and the wrapped methods, would drag
        # the whole module into every copy and pickle of the trick.
        left_out = {"log", "log_dict", "_wrappers", "is_paused", *self.transient}
        state = {name: value for name, value in vars(self).items() if name not in left_out}
        return {name: _Packed.of(value) if isinstance(value, Generator) else value for name, value in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({k: value.generator() if isinstance(value, _Packed) else value for k, value in state.items()})


@contextlib.contextmanager
def unwrapped(owner: Any, *names: str) -> Iterator[None]:
    """Remove the wrappers of all tricks from methods of an object for a while."""
    wrappers = {name: wrapper for name in names if isinstance(wrapper := vars(owner).get(name), Wrapped)}
    for name, wrapper in wrappers.items():
        setattr(owner, name, wrapper.__wrapped__)
    try:
        yield
    finally:
        for name, wrapper in wrappers.items():
            setattr(owner, name, wrapper)


@contextlib.contextmanager
def paused(trainer: Trainer) -> Iterator[None]:
    """Leave training batches unchanged for a while, except for changes with ``when_paused``."""
    tricks = [callback for callback in callbacks_of(trainer) if isinstance(callback, Trick) and not callback.is_paused]
    for trick in tricks:
        trick.is_paused = True
    try:
        yield
    finally:
        for trick in tricks:
            trick.is_paused = False
