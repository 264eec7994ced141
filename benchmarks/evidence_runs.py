"""The training runs of evidence.py: ours, timm's and torchvision's, on one network, one budget and one set of data.

Fixed for all of them before any was run: ResNet-18-D for small images, SGD with momentum 0.9, 0.1 a batch of 128
scaled to the batch, weight decay 5e-4 (a common choice for CIFAR-10 in 20 to 40 epochs), 16 bits, 2 epochs of
warm-up of 30, augmentation, and the half-life of the moving averages, one epoch. What differs is what differs between
the three recipes.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch
import torch.nn.functional as F
from evidence_data import Arrays, Images
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import v2

from lit_tricks import callbacks as tricks
from lit_tricks.models import resnet

CROP_SCALE = (0.25, 1.0)  # of the area
PIPELINE = f"lit_tricks.data.CIFAR10(crop_scale={CROP_SCALE})"
HALF_LIFE = 1.0  # epochs, of all three moving averages
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


@torch.no_grad()
def accuracy(net: nn.Module, val: Any, device: str, s: Settings) -> dict[str, float]:
    net.eval()
    result = {}
    for loader in val:
        right, size = 0.0, 0
        for images, labels in loader:
            with autocast(device, s):
                right += (net(images).argmax(1) == labels).float().sum().item()
            size = images.shape[-1]
        result[str(size)] = right / len(loader.dataset)
    return result


def autocast(device: str, s: Settings) -> torch.autocast:
    dtype = torch.bfloat16 if s.precision == "bf16-mixed" else torch.float16
    return torch.autocast(device, dtype, enabled=s.precision.endswith("-mixed"))


def loaders(data: Arrays, device: str, s: Settings) -> tuple[Any, list[Any]]:
    """Return the loaders for a plain loop. Batches are made on the device, as in a Trainer."""
    images = images_of(data, s)
    train, val = images.train_dataloader(), images.val_dataloader()
    for loader in (train, *val):
        loader.dataset.device = torch.empty(0, device=device).device  # with its index
    return train, val


def batches(train: Any, epochs: int) -> Iterator[tuple[int, int, list[Tensor]]]:
    for epoch in range(epochs):
        train.sampler.set_epoch(epoch)
        for index, (images, labels) in enumerate(train):
            yield epoch, index, [images.contiguous(memory_format=torch.channels_last), labels]


def timm_run(seed: int, data: Arrays, device: str, s: Settings) -> dict[str, Any]:
    """timm's train.py: `--opt sgd --sched cosine --sched-on-updates --smoothing 0.1 --mixup 0.2 --model-ema
    --model-ema-warmup --amp --channels-last`; without `--sched-on-updates`, its default, the first epoch would be lost
    at a rate of 1e-5."""
    seed_everything(seed, verbose=False)
    net = s.network(zero_init_last=True).to(device, memory_format=torch.channels_last)
    train, val = loaders(data, device, s)
    start, updates = time.perf_counter(), len(train)
    optimizer = timm.optim.create_optimizer_v2(net, opt="sgd", lr=s.lr, weight_decay=DECAY, momentum=MOMENTUM)
    scheduler = timm.scheduler.CosineLRScheduler(
        optimizer,
        t_initial=s.epochs * updates,
        warmup_t=round(s.warmup * updates),
        warmup_lr_init=1e-5,
        t_in_epochs=False,
    )
    mixup = timm.data.Mixup(mixup_alpha=0.2, cutmix_alpha=0.0, label_smoothing=SMOOTHING, num_classes=10)
    criterion = timm.loss.SoftTargetCrossEntropy()
    ema = timm.utils.ModelEmaV3(net, decay=0.5 ** (1 / (HALF_LIFE * updates)), use_warmup=True)
    scaler = torch.amp.GradScaler(device, enabled=s.precision == "16-mixed")
    net.train()
    for update, (_, _, (images, labels)) in enumerate(batches(train, s.epochs)):
        images, soft = mixup(images, labels)
        with autocast(device, s):
            loss = criterion(net(images), soft)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ema.update(net, step=update + 1)
        scheduler.step_update(num_updates=update + 1)
    seconds = time.perf_counter() - start
    top1 = {"weights": accuracy(net, val, device, s), "end": accuracy(ema.module, val, device, s)}
    return {"top1": top1, "seconds": seconds}


class ExponentialMovingAverage(AveragedModel):
    """The moving average of torchvision's references/classification/utils.py."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        def ema_avg(average: Tensor, value: Tensor, _: Any) -> Tensor:
            return decay * average + (1 - decay) * value

        super().__init__(model, avg_fn=ema_avg, use_buffers=True)


def torchvision_run(cutmix: bool, seed: int, data: Arrays, device: str, s: Settings) -> dict[str, Any]:
    """torchvision's references/classification/train.py: `--lr-scheduler cosineannealinglr --lr-warmup-method linear
    --lr-warmup-decay 0.01 --label-smoothing 0.1 --mixup-alpha 0.2 --cutmix-alpha 1.0 --norm-weight-decay 0.0
    --model-ema --model-ema-steps 32 --amp`, the rates by the epoch. Its decay of 0.99998, meant for 600 epochs of
    ImageNet, would look back over 21 of these 30 epochs; here it has the half-life of the others."""
    seed_everything(seed, verbose=False)
    net = s.network().to(device, memory_format=torch.channels_last)
    train, val = loaders(data, device, s)
    start, every = time.perf_counter(), min(32, len(train))
    norms = {p for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)}
    groups = [
        {"params": [p for p in net.parameters() if p not in norms], "weight_decay": DECAY},
        {"params": [p for p in net.parameters() if p in norms], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, s.lr, MOMENTUM)
    warmup = max(1, round(s.warmup))
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=s.epochs - warmup, eta_min=0.0),
        ],
        milestones=[warmup],
    )
    mixes: list[Callable[..., Any]] = [v2.MixUp(alpha=0.2, num_classes=10)]
    mix = v2.RandomChoice([*mixes, v2.CutMix(alpha=1.0, num_classes=10)] if cutmix else mixes)
    criterion = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    ema = ExponentialMovingAverage(net, decay=0.5 ** (every / (HALF_LIFE * len(train))))
    scaler = torch.amp.GradScaler(device, enabled=s.precision == "16-mixed")
    for epoch, steps in itertools.groupby(batches(train, s.epochs), key=lambda item: item[0]):
        net.train()
        for _, i, batch in steps:
            images, labels = mix(*batch)
            with autocast(device, s):
                loss = criterion(net(images), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if i % every == 0:
                ema.update_parameters(net)
                if epoch < warmup:
                    ema.n_averaged.fill_(0)  # copies the weights, until the warm-up is over
        scheduler.step()
    seconds = time.perf_counter() - start
    top1 = {"weights": accuracy(net, val, device, s), "end": accuracy(ema, val, device, s)}
    return {"top1": top1, "seconds": seconds}


def train(run: str, seed: int, data: Arrays, device: str, s: Settings, teacher_file: Path) -> dict[str, Any]:
    """Make one run by its name. Return its accuracies, seconds and memory."""
    warnings.simplefilter("ignore")  # advice about workers and schedulers
    torch.set_num_threads(1)
    if run == "timm":
        result = timm_run(seed, data, device, s)
    elif run.startswith("torchvision"):
        result = torchvision_run(run == "torchvision", seed, data, device, s)
    else:
        result = ours(run, seed, data, device, s, teacher_file)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"run": run, "seed": seed, **result, "peak_memory": peak, "pipeline": PIPELINE}
