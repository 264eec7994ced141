"""Code of a user with strict type checkers. Nothing runs it; lines that end with `# error` must be found."""

from __future__ import annotations

import lightning.pytorch as L
import pytorch_lightning as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from pytorch_lightning.callbacks import ModelCheckpoint as OtherModelCheckpoint
from torch import Tensor

import lit_tricks
from lit_tricks import EMA, Classifier, LabelSmoothing, MixUp, Trick
from lit_tricks.data import Digits

L.Trainer(callbacks=EMA())
pl.Trainer(callbacks=EMA())
L.Trainer(callbacks=[EMA(), ModelCheckpoint()])
pl.Trainer(callbacks=[EMA(), OtherModelCheckpoint()])

stack = [MixUp(), LabelSmoothing()]
L.Trainer(callbacks=[*stack, EMA()])
pl.Trainer(callbacks=[*stack, EMA()])

first: list[L.Callback] = [EMA()]
second: list[pl.Callback] = [EMA()]

L.Trainer().fit(Classifier("resnet18", num_classes=10), datamodule=Digits())
decay: float | None = EMA(decay=0.9).decay
names: list[list[str]] = [prediction.names for prediction in lit_tricks.predict("best.ckpt", ["cat.jpg"])]


class Own(Trick):
    """A trick of the user's."""

    def on_fit_start(self, trainer: L.Trainer | pl.Trainer, pl_module: L.LightningModule | pl.LightningModule) -> None:
        """Announce."""
        self.announce(f"trains for {trainer.max_epochs} epochs")


L.Trainer(callbacks=[Own()])
pl.Trainer(callbacks=[Own()])


def mistakes(images: Tensor) -> None:
    """Use the library wrongly."""
    EMA(decay="0.9")  # error
    _ = EMA().dekay  # error
    L.Trainer(callbacks=[3])  # error
    LabelSmoothing(convention="keras")  # error
    lit_tricks.EMMA()  # error
    Digits(batch_size="many")  # error
