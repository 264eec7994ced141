"""The training runs of peers.py: the scripts of timm, torchvision and Lightning, and ours.

All rows share the network (ResNet-18-D for small images), the images, the size of a batch, the number of steps, the
precision, channels-last memory, and the test on whole images. Peers run through their own code where they have it:
timm's transforms, mixing, losses, optimizers and schedule, torchvision's transforms and mixing. Defaults that are meant
for hundreds of epochs are scaled in favor of the script. Warm-up takes a fifteenth of the run. Learning rates change
with each step, not with each epoch.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from PIL import Image
from scipy.stats import qmc
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchmetrics.functional.classification import multiclass_calibration_error
from torchvision import transforms
from torchvision.transforms import v2

from lit_tricks import callbacks as tricks
from lit_tricks.data import CIFAR10
from lit_tricks.data.datamodule import Split, stratified_split
from lit_tricks.data.memory.loader import MemoryTrainLoader
from lit_tricks.data.memory.stored import MemorySource
from lit_tricks.data.samples import Source
from lit_tricks.models import resnet

SCHEDULES: dict[str, Callable[..., Callback]] = {
    "cosine": tricks.WarmupCosine,
    "linear": tricks.WarmupLinear,
    "poly": tricks.WarmupPoly,
    "stable_decay": tricks.WarmupStableDecay,
}
MOMENTUM, BASE_BATCH, WARMUP = 0.9, 256, 1 / 15
HELD_OUT = 5000  # training images, for the trials


@dataclass(frozen=True)
class Scale:
    epochs: int = 30
    width: float = 0.25
    teacher_width: float = 0.5
    images: int = 45_000
    size: int = 32
    batch_size: int = 512
    precision: str = "bf16-mixed"
    device: str = "cpu"

    @property
    def steps(self) -> int:
        return self.epochs * (self.images // self.batch_size)

    @property
    def flags(self) -> str:
        """Return the flags of these settings."""
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in asdict(self).items())

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """Add a flag for each setting but the device."""
        for name, value in asdict(cls()).items():
            if name != "device":
                parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Scale:
        """Return the settings of the flags."""
        return cls(**{name: getattr(args, name) for name in asdict(cls())})

    def network(self, teacher: bool = False, zero_init_last: bool = False) -> nn.Module:
        width = self.teacher_width if teacher else self.width
        return resnet(18, "D", num_classes=10, small_input=True, width=width, zero_init_last=zero_init_last)


@dataclass(frozen=True)
class Pixels:
    """A part of the arrays that ``evidence_data.load`` stores."""

    file: str
    part: str

    def load(self) -> tuple[Tensor, Tensor]:
        with np.load(self.file) as arrays:
            return torch.from_numpy(arrays[f"{self.part}_x"]), torch.from_numpy(arrays[f"{self.part}_y"]).long()

    def to_image(self, pixels: Tensor) -> Image.Image:
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())


class Clock:
    """Seconds of the process on a CPU, of the wall on a GPU. Work that a GPU has not finished counts."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def now(self) -> float:
        if not self.on_gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


class TimedLoader(MemoryTrainLoader):
    """A loader that adds up the seconds which its batches take. A run is a process, so the sum is a run's."""

    clock = Clock("cpu")
    spent = 0.0

    def __iter__(self) -> Any:
        batches = super().__iter__()
        while True:
            start = self.clock.now()
            batch = next(batches, None)
            TimedLoader.spent += self.clock.now() - start
            if batch is None:
                return
            yield batch


class Images(CIFAR10):
    """The product's data module with images from a file of arrays, and a fixed part of ``train`` for the trials."""

    train_loader_type = TimedLoader

    def __init__(self, file: Path, scale: Scale, workers: int = 0, **kwargs: Any) -> None:
        super().__init__(
            str(file.parent), scale.batch_size, download=False, val_size=HELD_OUT, num_workers=workers,
            image_size=scale.size, **kwargs,
        )  # fmt: skip
        self.file, self.images = file, scale.images

    def prepare_data(self) -> None:
        """Do nothing: the arrays are there."""

    def _load(self, split: Split) -> dict[Split, Source]:
        if split == "test":
            return {"test": MemorySource(Pixels(str(self.file), "val"))}
        pixels = Pixels(str(self.file), "train")
        labels = MemorySource(pixels).labels.tolist()
        rest, held_out = stratified_split(labels, HELD_OUT, self.split_seed)
        if self.images < len(rest):
            few = stratified_split([labels[row] for row in rest], self.images, self.split_seed)[1]
            rest = [rest[index] for index in few]
        return {"train": MemorySource(pixels, rest), "val": MemorySource(pixels, held_out)}


@dataclass
class Run:
    """The settings of a run, and the files of its images and its teacher."""

    scale: Scale
    file: Path
    teacher: Path
    seed: int
    steps: int
    lr: float
    decay: float
    options: dict[str, Any]
    workers: int = 0

    def data(self, transform: Any = None, **kwargs: Any) -> Images:
        """Return the data module, with another transform of single images if there is one."""
        data = Images(self.file, self.scale, self.workers if transform else 0, **kwargs)
        if transform:
            data.train_transform = transform
        return data

    def scaled(self, power: float = 1.0) -> float:
        """Return the learning rate, which is for a batch of 256 images, for the batch of the run."""
        return self.lr * float((self.scale.batch_size / BASE_BATCH) ** power)

    @property
    def dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.scale.precision == "bf16-mixed" else None


def normalize(data: CIFAR10) -> transforms.Normalize:
    return transforms.Normalize([value / 255 for value in data.mean], [value / 255 for value in data.std])


def loop(
    run: Run,
    net: nn.Module,
    data: Images,
    optimizer: torch.optim.Optimizer,
    mix: Callable[..., Any] | None,
    criterion: nn.Module,
    after: Callable[[int], None],
) -> None:
    """Train in a plain loop of PyTorch, as both scripts have it.

    Args:
        run: the run.
        net: its network.
        data: gives the batches.
        optimizer: of the network.
        mix: makes images and targets of a batch; None leaves it as it is.
        criterion: of logits and targets.
        after: called after each update, with the number of updates so far.
    """
    loader, done, epoch = data.train_dataloader(), 0, 0
    net.train()
    while done < run.steps:
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            images = images.to(run.scale.device, memory_format=torch.channels_last)
            targets = labels.to(run.scale.device)
            if mix:
                images, targets = mix(images, targets)
            with torch.autocast(run.scale.device, run.dtype, enabled=run.dtype is not None):
                loss = criterion(net(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            after(done)
            if done == run.steps:
                break
        epoch += 1


def timm_run(run: Run) -> dict[str, nn.Module]:
    """timm's train.py, ``--sched cosine --sched-on-updates --channels-last --amp --amp-dtype bfloat16``.

    Its defaults: smoothing 0.1, random resized crops at random interpolation, flips, color jitter 0.4, no erasing, no
    average of the weights. ``--lr-base`` is scaled linearly with the batch, by the square root for "ada" optimizers.
    """
    options, opt, size = run.options, run.options["opt"], run.scale.size
    net = run.scale.network(zero_init_last=True).to(run.scale.device, memory_format=torch.channels_last)
    data = run.data()
    data = run.data(
        timm.data.create_transform(
            size, is_training=True, scale=(options["scale"], 1.0), color_jitter=options["jitter"],
            interpolation="random", mean=tuple(value / 255 for value in data.mean),
            std=tuple(value / 255 for value in data.std),
        )
    )  # fmt: skip
    lr = run.scaled(0.5 if "ada" in opt else 1.0)
    optimizer = timm.optim.create_optimizer_v2(net, opt=opt, lr=lr, weight_decay=run.decay, momentum=MOMENTUM)
    schedule = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=run.steps, warmup_t=round(WARMUP * run.steps), warmup_lr_init=1e-5, t_in_epochs=False
    )
    mix, criterion = None, timm.loss.LabelSmoothingCrossEntropy(0.1)
    if options["mixup"]:
        mix = timm.data.Mixup(mixup_alpha=options["mixup"], label_smoothing=0.1, num_classes=10)
        criterion = timm.loss.SoftTargetCrossEntropy()
    loop(run, net, data, optimizer, mix, criterion, lambda done: schedule.step_update(num_updates=done))
    return {"weights": net}


class ExponentialMovingAverage(AveragedModel):
    """The moving average of torchvision's references/classification/utils.py."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        def ema_avg(average: Tensor, value: Tensor, _: Any) -> Tensor:
            return decay * average + (1 - decay) * value

        super().__init__(model, avg_fn=ema_avg, use_buffers=True)


def torchvision_run(run: Run) -> dict[str, nn.Module]:
    """torchvision's references/classification/train.py with the options of its new recipe.

    These are ``--lr-scheduler cosineannealinglr --lr-warmup-method linear --lr-warmup-decay 0.01 --auto-augment ta_wide
    --random-erase 0.1 --label-smoothing 0.1 --mixup-alpha 0.2 --cutmix-alpha 1.0 --norm-weight-decay 0.0 --model-ema``.
    Its average has a decay for 600 epochs; here weights count half after an epoch. The average restarts until the
    warm-up is over, as in the script.
    """
    options, scale = run.options, run.scale
    net = scale.network().to(run.scale.device, memory_format=torch.channels_last)
    steps = [transforms.RandomResizedCrop(scale.size, (options["scale"], 1.0)), transforms.RandomHorizontalFlip()]
    if options["trivial"]:
        steps.append(transforms.TrivialAugmentWide(interpolation=transforms.InterpolationMode.BILINEAR))
    steps += [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float), normalize(run.data())]
    if options["erase"]:
        steps.append(transforms.RandomErasing(p=options["erase"]))
    data = run.data(transforms.Compose(steps))
    norms, others = torchvision.ops._utils.split_normalization_params(net)
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": run.decay}]
    optimizer = torch.optim.SGD(groups, run.scaled(), MOMENTUM)
    warmup = max(1, round(WARMUP * run.steps))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=run.steps - warmup),
        ],
        milestones=[warmup],
    )
    mixes = [v2.MixUp(alpha=0.2, num_classes=10), v2.CutMix(alpha=1.0, num_classes=10)]
    mix = v2.RandomChoice(mixes) if options["mix"] else None
    epoch = scale.images // scale.batch_size
    every = min(32, max(1, epoch // 8))
    average = ExponentialMovingAverage(net, decay=0.5 ** (every / epoch))

    def after(done: int) -> None:
        if (done - 1) % every == 0:
            average.update_parameters(net)
            if done < warmup:
                average.n_averaged.fill_(0)
        schedule.step()

    loop(run, net, data, optimizer, mix, nn.CrossEntropyLoss(label_smoothing=0.1), after)
    return {"weights": net, "average": average}


class Plain(LightningModule):
    """A module without tricks."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, MOMENTUM, weight_decay=5e-4, nesterov=True)


class Tutorial(Plain):
    """The module of Lightning's tutorial "CIFAR10 ~94% Baseline", with the network of all rows."""

    def __init__(self, net: nn.Module, run: Run) -> None:
        super().__init__(net, run.scaled())
        self.decay, self.steps, self.smoothing = run.decay, run.steps, run.options["smoothing"]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels, label_smoothing=self.smoothing)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr / 2, MOMENTUM, weight_decay=self.decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(run: Run, module: LightningModule, data: Images, callbacks: list[Callback]) -> None:
    trainer = Trainer(
        max_steps=run.steps, max_epochs=-1, accelerator="gpu" if run.scale.device == "cuda" else "cpu", devices=1,
        callbacks=callbacks, precision=run.scale.precision, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        log_every_n_steps=10**6,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)


def tutorial_run(run: Run) -> dict[str, nn.Module]:
    """Lightning's tutorial: crops of an image with a border of an eighth, flips, SGD, one cycle of the learning rate.

    Its learning rate is the peak of the cycle, for a batch of 256. Images are resized first if they are smaller here.
    """
    return tutorial_fit(run, [tricks.ChannelsLast()])


def tutorial_tricks_run(run: Run) -> dict[str, nn.Module]:
    """Lightning's tutorial, with its module, its images and its cycle of the learning rate, and our callbacks.

    The rate and the weight decay of the trial are Muon's. What Muon leaves to the optimizer of the module has the
    rate and the weight decay of the tutorial.
    """
    options = run.options
    callbacks: list[Callback] = [
        tricks.ZeroGamma(), tricks.NoBiasDecay(), tricks.ChannelsLast(), tricks.LabelSmoothing(options["strength"]),
        tricks.Muon(lr=run.scaled(0.5), weight_decay=run.decay),
    ]  # fmt: skip
    return tutorial_fit(replace(run, lr=0.1, decay=5e-4), callbacks)


def tutorial_fit(run: Run, callbacks: list[Callback]) -> dict[str, nn.Module]:
    """Train the module of the tutorial on its images with these callbacks."""
    size = run.scale.size
    net = run.scale.network().to(memory_format=torch.channels_last)
    steps = [transforms.Resize(size)] if size != 32 else []
    steps += [transforms.RandomCrop(size, padding=size // 8), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    data = run.data(transforms.Compose([*steps, normalize(run.data())]))
    fit(run, Tutorial(net, run), data, callbacks)
    return {"weights": net.to(run.scale.device)}


def our_callbacks(run: Run) -> dict[str, Callback]:
    """Return the tricks of our rows by name.

    The learning rate is Muon's; the optimizer of the module has four times this rate, at a weight decay of 5e-4.
    """
    options = run.options
    warmup = WARMUP * run.steps / (run.scale.images // run.scale.batch_size)
    found: dict[str, Callback] = {
        "zero_gamma": tricks.ZeroGamma(),
        "no_bias_decay": tricks.NoBiasDecay(),
        "channels_last": tricks.ChannelsLast(),
        "schedule": SCHEDULES[options["schedule"]](warmup_epochs=warmup),
        "muon": tricks.Muon(lr=run.scaled(0.5), weight_decay=run.decay),
    }
    if options["smoothing"]:
        found["smoothing"] = tricks.LabelSmoothing(smoothing=options["smoothing"])
    if "loss" in options:
        teacher = run.scale.network(teacher=True)
        teacher.load_state_dict(torch.load(run.teacher, weights_only=True))
        loss, temperature = options["loss"], options["temperature"]
        found["teacher"] = tricks.KnowledgeDistillation(teacher, loss=loss, temperature=temperature, channels_last=True)
    return found


def ours_run(
    run: Run, changes: Mapping[str, Callable[[], Callback] | None] | None = None, **data: Any
) -> dict[str, nn.Module]:
    """A plain module in a plain Trainer, with our callbacks and our data module.

    Args:
        run: the run.
        changes: tricks that are added or replaced by name; None leaves one out.
        data: arguments of the data module.
    """
    options = run.options
    net = run.scale.network(teacher="teaches" in options).to(memory_format=torch.channels_last)
    callbacks: dict[str, Callback | None] = {**our_callbacks(run)}
    callbacks |= {name: make() if make else None for name, make in (changes or {}).items()}
    crop = (options["scale"], 1.0) if options["scale"] else None
    fit(run, Plain(net, 4 * run.scaled(0.5)), run.data(crop_scale=crop, **data), [c for c in callbacks.values() if c])
    if "teaches" in options:
        part = run.teacher.with_suffix(".part")
        torch.save({k: v.cpu().contiguous() for k, v in net.state_dict().items()}, part)
        part.replace(run.teacher)
    return {"weights": net.to(run.scale.device)}


@dataclass(frozen=True)
class Row:
    """A row of the table, and the space of its trials.

    Attributes:
        title: shown name.
        train: makes a run, and returns its networks.
        lr: first choice of the learning rate for a batch of 256, and both ends of the space, which is logarithmic.
        decay: the same for the weight decay.
        options: strengths of regularization. The first is the first choice.
        further: learning rates and weight decays of further trials, where runs of this size had been best.
        further_options: index of the options of these trials.
        peer: whether it is a peer's row.
        base: the row that it is compared with, if it is not compared with all peers.
    """

    title: str
    train: Callable[[Run], dict[str, nn.Module]]
    lr: tuple[float, float, float]
    decay: tuple[float, float, float]
    options: list[dict[str, Any]]
    further: tuple[tuple[float, float], ...]
    further_options: int = 0
    peer: bool = True
    base: str = ""


def timm_options(opt: str, mixup: float = 0.0) -> list[dict[str, Any]]:
    strengths = [(0.08, 0.4), (0.35, 0.4), (0.7, 0.0)]
    return [{"opt": opt, "mixup": mixup, "scale": scale, "jitter": jitter} for scale, jitter in strengths]


def torchvision_options(mix: bool) -> list[dict[str, Any]]:
    strengths = [(0.08, True, 0.1), (0.35, True, 0.1), (0.7, False, 0.0)]
    return [{"mix": mix, "scale": scale, "trivial": trivial, "erase": erase} for scale, trivial, erase in strengths]


SGD_LR, SGD_DECAY = (0.03, 0.8), (2e-5, 2e-3)
MUON_LR, MUON_DECAY = (0.002, 0.05), (0.01, 1.0)
OURS_LR, OURS_DECAY = (0.02, 0.4), (0.005, 0.2)
SGD_FURTHER = ((0.1, 2e-5), (0.2, 1e-4), (0.2, 5e-4), (0.4, 1e-4), (0.4, 5e-4))
MUON_FURTHER = ((0.0276, 0.276), (0.1, 0.1), (0.0276, 0.1), (0.0138, 0.1), (0.05, 0.1))
OURS_FURTHER = ((0.1, 0.1), (0.07, 0.1), (0.07, 0.05), (0.15, 0.05), (0.1, 0.025))
ROWS = {
    "timm": Row(
        "timm, defaults", timm_run, (0.1, *SGD_LR), (2e-5, *SGD_DECAY), timm_options("sgd"),
        further=SGD_FURTHER, further_options=-1,
    ),
    "timm_mixup": Row(
        "timm, mixup 0.2", timm_run, (0.1, *SGD_LR), (2e-5, *SGD_DECAY), timm_options("sgd", 0.2),
        further=SGD_FURTHER, further_options=-1,
    ),
    "timm_muon": Row(
        "timm, muon", timm_run, (0.01, *MUON_LR), (0.1, *MUON_DECAY), timm_options("muon"),
        further=MUON_FURTHER, further_options=-1,
    ),
    "timm_nadamuon": Row(
        "timm, nadamuon", timm_run, (0.01, *MUON_LR), (0.1, *MUON_DECAY), timm_options("nadamuon"),
        further=MUON_FURTHER, further_options=-1,
    ),
    "torchvision": Row(
        "torchvision, new recipe", torchvision_run, (0.125, *SGD_LR), (2e-5, *SGD_DECAY), torchvision_options(True),
        further=SGD_FURTHER, further_options=-1,
    ),
    "torchvision_plain": Row(
        "torchvision, no mixing", torchvision_run, (0.125, *SGD_LR), (2e-5, *SGD_DECAY), torchvision_options(False),
        further=SGD_FURTHER, further_options=-1,
    ),
    "tutorial": Row(
        "Lightning's tutorial", tutorial_run, (0.1, *SGD_LR), (5e-4, *SGD_DECAY),
        [{"smoothing": 0.0}, {"smoothing": 0.05}, {"smoothing": 0.1}],
        further=SGD_FURTHER, further_options=1,
    ),
    "ours": Row(
        "ours, no teacher", ours_run, (0.1, *OURS_LR), (0.05, *OURS_DECAY),
        [{"scale": scale, "smoothing": 0.1, "schedule": "linear"} for scale in (0.7, 0.35, 0.0)],
        peer=False, further=OURS_FURTHER,
    ),
    "ours_teacher": Row(
        "ours, teacher", ours_run, (0.1, *OURS_LR), (0.05, *OURS_DECAY),
        [
            {"scale": scale, "smoothing": 0.0, "schedule": "linear", "loss": loss, "temperature": temperature}
            for scale, loss, temperature in ((0.7, "kl", 4.0), (0.35, "kl", 4.0), (0.7, "dist", 1.0))
        ],
        peer=False, further=OURS_FURTHER,
    ),
    "tutorial_tricks": Row(
        "Lightning's tutorial, our callbacks", tutorial_tricks_run, (0.1, *OURS_LR), (0.05, *OURS_DECAY),
        [{"smoothing": 0.0, "strength": strength} for strength in (0.1, 0.05, 0.2)],
        peer=False, further=OURS_FURTHER, further_options=-1, base="tutorial",
    ),
}  # fmt: skip
TEACHER = {"scale": 0.7, "smoothing": 0.0, "schedule": "linear", "teaches": True}


def choices(row: str, trial: int) -> dict[str, Any]:
    """Return learning rate, weight decay and options of a trial.

    Trial 0 is the first choice. The others are points of a Halton sequence, the same in the space of each row. Further
    trials have the numbers -1, -2, ...
    """
    space = ROWS[row]
    if trial < 0:
        lr, decay = space.further[-1 - trial]
        return {"lr": lr, "decay": decay, "options": space.options[space.further_options]}
    if trial == 0:
        return {"lr": space.lr[0], "decay": space.decay[0], "options": space.options[0]}
    point = qmc.Halton(3, seed=0).random(trial)[-1]
    rates = [low * (high / low) ** share for (_, low, high), share in zip((space.lr, space.decay), point, strict=False)]
    lr, decay = (float(f"{rate:.3g}") for rate in rates)
    return {"lr": lr, "decay": decay, "options": space.options[int(point[2] * len(space.options))]}


@torch.no_grad()
def scores(net: nn.Module, loader: Any, device: str) -> dict[str, float | None]:
    """Return top-1 and expected calibration error (15 bins) in per cent, and the negative log-likelihood, in fp32.

    "flip" is the top-1 of the mean logits of an image and its mirror image.
    """
    net.eval()
    found = []
    for batch, labels in loader:
        images = batch.to(device)
        found.append((net(images).float().cpu(), net(images.flip(3)).float().cpu(), labels))
    logits, mirrored, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    top1, flip = (100 * float((x.argmax(1) == labels).double().mean()) for x in (logits, logits + mirrored))
    nll = float(F.cross_entropy(logits.double(), labels))
    if not np.isfinite(nll):  # the run diverged
        return {"top1": top1, "flip": flip, "nll": None, "ece": None}
    ece = float(multiclass_calibration_error(logits.softmax(1), labels, num_classes=10, n_bins=15))
    return {"top1": top1, "flip": flip, "nll": nll, "ece": 100 * ece}


def train(run: Run, split: Split, make: Callable[[], dict[str, nn.Module]]) -> dict[str, Any]:
    """Make a run. Return the scores of its networks on a split, and its seconds."""
    warnings.simplefilter("ignore")  # advice about workers and schedulers
    torch.set_num_threads(1)
    seed_everything(run.seed, verbose=False)
    clock = TimedLoader.clock = Clock(run.scale.device)
    data = run.data()
    data.source("train")  # read before the time counts
    start = clock.now()
    networks = make()
    seconds = clock.now() - start
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    found = {name: scores(net, loader, run.scale.device) for name, net in networks.items()}
    return {"scores": found, "seconds": seconds, "data_seconds": TimedLoader.spent}
