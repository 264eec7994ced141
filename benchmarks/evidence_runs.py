"""The training runs of evidence.py, on one network, one budget and one set of data.

Fixed before any was run: ResNet-18-D for small images, SGD with momentum 0.9, a learning rate of 0.1 for a batch of 128
(scaled to the batch), a weight decay of 5e-4 (a common choice for CIFAR-10 in 20 to 40 epochs), 16 bits, 2 of 30 epochs
of warm-up, the augmentation, and the half-life of the moving average, one epoch.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from evidence_data import Arrays, Images
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lit_tricks import callbacks as tricks
from lit_tricks.models import resnet

CROP_SCALE = (0.25, 1.0)  # of the area
PIPELINE = f"lit_tricks.data.CIFAR10(crop_scale={CROP_SCALE})"
HALF_LIFE = 1.0  # epochs, of the moving average
LR, BASE_BATCH, MOMENTUM, DECAY, SMOOTHING = 0.1, 128, 0.9, 5e-4, 0.1


@dataclass(frozen=True)
class Settings:
    epochs: int = 30
    batch_size: int = 512
    width: float = 0.25
    teacher_width: float = 0.5
    train_size: int = 24
    test_size: int = 32
    fixres_epochs: int = 3
    precision: str = "16-mixed"  # of the GPU; bf16-mixed on a CPU

    @property
    def warmup(self) -> float:
        return self.epochs / 15

    @property
    def lr(self) -> float:
        return LR * self.batch_size / BASE_BATCH

    def network(self, **kwargs: Any) -> nn.Module:
        return resnet(18, "D", num_classes=10, small_input=True, **{"width": self.width, **kwargs})


class BothSizes(Images):
    """Training images in random crops at one size, and whole validation images at this size and at the test size."""

    def val_dataloader(self) -> Any:
        """Return a loader per size."""
        small, large = super().val_dataloader(), super().val_dataloader()
        small.dataset.transform = self.eval_transform_at(self.input_size[-1])  # type: ignore[attr-defined]
        return [small, large]


def images_of(data: Arrays, s: Settings) -> Images:
    return BothSizes.of(
        data, batch_size=s.batch_size, image_size=s.train_size, crop_scale=CROP_SCALE, eval_size=s.test_size
    )


class Net(LightningModule):
    """A plain module without tricks."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        images, labels = batch
        right = (self(images).argmax(1) == labels).float().mean()
        self.log(f"val/{images.shape[-1]}", right, batch_size=len(images), add_dataloader_idx=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), LR, MOMENTUM, weight_decay=DECAY, nesterov=True)


def efficient() -> list[Callback]:
    """Return the tricks of section 3 of the paper. The Trainer sets the 16-bit precision."""
    base = [tricks.LinearScaling(base_batch_size=BASE_BATCH), tricks.ZeroGamma(), tricks.NoBiasDecay()]
    return [*base, tricks.ChannelsLast()]


def stack(run: str, s: Settings, teacher: nn.Module | None) -> list[Callback]:
    """Return the callbacks of a run. Each run has one callback more than the run above it."""
    if run == "baseline":  # falls at a quarter, half and three quarters, as 30, 60 and 90 of the paper's 120 epochs
        falls = [round(s.epochs * part) for part in (1 / 4, 1 / 2, 3 / 4)]
        return [*efficient(), tricks.WarmupStep(milestones=falls, warmup_epochs=s.warmup)]
    chosen = [*efficient(), tricks.WarmupCosine(warmup_epochs=s.warmup)]
    if run == "teacher":  # not smoothed: that would take from its logits what distillation needs (Müller et al., 2019)
        return [*chosen, tricks.EMA(half_life=HALF_LIFE)]
    if run != "cosine":
        chosen.append(tricks.LabelSmoothing(smoothing=SMOOTHING))
    if run in ("distillation", "mixup", "swa"):
        assert teacher is not None
        chosen.append(tricks.KnowledgeDistillation(teacher, temperature=20.0, channels_last=True))
    if run in ("mixup", "swa", "no_teacher"):
        chosen.append(tricks.MixUp(alpha=0.2))
    if run in ("mixup", "no_teacher"):  # an average changes nothing in training: the run gives the rows without it too
        chosen += [tricks.EMA(half_life=HALF_LIFE, validate="both"), tricks.PreciseBN(when="end")]
    if run == "swa":  # from three quarters on, at the rate that the cosine has come down to there
        lr = s.lr * 0.125
        chosen += [tricks.SWA(lr=lr, start=0.75), tricks.PreciseBN(when="end")]
    return chosen


def trainer_of(s: Settings, device: str, epochs: int, callbacks: list[Callback], **options: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs, accelerator="gpu" if device == "cuda" else "cpu", devices=1, callbacks=callbacks,
        precision=s.precision, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, check_val_every_n_epoch=epochs, log_every_n_steps=10**6,
        **options,
    )  # fmt: skip


def ours(run: str, seed: int, data: Arrays, device: str, s: Settings, teacher_file: Path) -> dict[str, Any]:
    """Train with a plain Trainer and our callbacks. Return accuracies by weights and test size."""
    teacher = None
    if run in ("distillation", "mixup", "swa"):
        teacher = s.network(width=s.teacher_width)
        teacher.load_state_dict(torch.load(teacher_file, weights_only=True))
    seed_everything(seed, verbose=False)
    module = Net(s.network(width=s.teacher_width if run == "teacher" else s.width))
    images = images_of(data, s)
    start = time.perf_counter()
    trainer = trainer_of(s, device, s.epochs, stack(run, s, teacher))
    trainer.fit(module, datamodule=images)
    seconds = time.perf_counter() - start
    found = {k: float(v) for k, v in trainer.callback_metrics.items() if "val/" in k}
    result = {"end": _at(found, "val/")} | ({"weights": raw} if (raw := _at(found, "raw/val/")) else {})
    if run in ("mixup", "no_teacher", "swa"):
        result["precise_bn"] = _at(validate(module, images, device, s), "val/")
    if run in ("mixup", "no_teacher"):
        fixres(module, images, device, s)
        result["fixres"] = _at(validate(module, images, device, s), "val/")
    if run == "teacher":
        half = teacher_file.with_suffix(".part")
        torch.save({k: v.cpu().contiguous() for k, v in module.net.state_dict().items()}, half)
        half.replace(teacher_file)
    return {"top1": result, "seconds": seconds}


def _at(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}


def validate(module: LightningModule, images: Images, device: str, s: Settings) -> dict[str, float]:
    metrics = trainer_of(s, device, 1, []).validate(module, datamodule=images, verbose=False)
    return {k: v for of_loader in metrics for k, v in of_loader.items()}


def fixres(module: Net, images: Images, device: str, s: Settings) -> None:
    """Fine-tune classifier and last BatchNorm at the test size, with the transform of the test."""
    callbacks = [
        tricks.FixRes(test_size=s.test_size, lr=0.008 * s.batch_size / 512),
        tricks.WarmupCosine(warmup_epochs=0),
    ]
    trainer_of(s, device, s.fixres_epochs, callbacks, limit_val_batches=0).fit(module, datamodule=images)


def train(run: str, seed: int, data: Arrays, device: str, s: Settings, teacher_file: Path) -> dict[str, Any]:
    """Make one run by its name. Return its accuracies, seconds and memory."""
    warnings.simplefilter("ignore")  # advice about workers and schedulers
    torch.set_num_threads(1)
    result = ours(run, seed, data, device, s, teacher_file)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"run": run, "seed": seed, **result, "peak_memory": peak, "pipeline": PIPELINE}
