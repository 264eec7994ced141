"""A small LightningModule, its data and a datamodule, in either Lightning namespace.

One network (with BatchNorm) on 1x8x8 images of 3 classes, in every form that users' modules come in: a functional loss
or a criterion, batches of four layouts, automatic optimization or two optimizers by hand.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset, default_collate

NAMESPACES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
CLASSES = 3
BATCH_SIZE = 4
BATCHES = 4  # of an epoch


def lightning(namespace: str = "lightning") -> ModuleType:
    return importlib.import_module(NAMESPACES[namespace])


class Batch(NamedTuple):
    image: Tensor
    label: Tensor


LAYOUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "list": lambda image, label: [image, label],
    "tuple": lambda image, label: (image, label),
    "dict": lambda image, label: {"image": image, "label": label},
    "NamedTuple": Batch,
}


def image_and_label(batch: Any) -> tuple[Tensor, Tensor]:
    return (batch["image"], batch["label"]) if isinstance(batch, dict) else (batch[0], batch[1])


class Shuffle(Sampler[list[int]]):
    """Batches of indices, in another order each epoch. It knows where it is, so a run can continue within an epoch."""

    def __init__(self, size: int, rank: int, world_size: int) -> None:
        self.size, self.rank, self.world_size = size, rank, world_size
        self.epoch, self.yielded, self.restored = 0, 0, False

    def __len__(self) -> int:
        return self.size // self.world_size // BATCH_SIZE

    def set_epoch(self, epoch: int) -> None:  # Lightning calls it before each epoch, as of a DistributedSampler
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        if not self.restored or self.yielded == len(self):
            self.yielded = 0
        self.restored = False
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch))
        batches = order[self.rank :: self.world_size].split(BATCH_SIZE)
        while self.yielded < len(self):
            self.yielded += 1
            yield batches[self.yielded - 1].tolist()


class StatefulLoader(DataLoader):  # type: ignore[type-arg]
    """Makes a mid-epoch checkpoint resumable: Lightning saves and restores a loader that has these two methods."""

    batch_sampler: Shuffle

    def state_dict(self) -> dict[str, int]:
        return {"yielded": self.batch_sampler.yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.yielded, self.batch_sampler.restored = state["yielded"], True


@functools.cache
def images(size: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(CLASSES, (size,), generator=generator)
    image = torch.randn(size, 1, 8, 8, generator=generator) + label.view(-1, 1, 1, 1)
    return TensorDataset(image, label)


def collate(layout: str) -> Callable[[list[Any]], Any]:
    return lambda samples: LAYOUTS[layout](*default_collate(samples))


def train_loader(layout: str = "list", batches: int = BATCHES, rank: int = 0, world_size: int = 1) -> StatefulLoader:
    dataset = images(batches * BATCH_SIZE * world_size)
    return StatefulLoader(dataset, batch_sampler=Shuffle(len(dataset), rank, world_size), collate_fn=collate(layout))


def eval_loader(layout: str = "list") -> DataLoader[Any]:
    return DataLoader(images(8), batch_size=BATCH_SIZE, collate_fn=collate(layout))


def network() -> nn.Sequential:
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(body, nn.Linear(16, CLASSES))


def sgd(module: Any) -> Any:
    """One optimizer; under manual optimization two, as for a GAN."""
    parts = [module.net] if module.automatic_optimization else module.net
    lrs = (0.1, 0.05)
    return [
        torch.optim.SGD(part.parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
        for part, lr in zip(parts, lrs, strict=False)
    ]


@functools.cache
def module_class(namespace: str) -> type[Any]:
    """The LightningModule of a namespace."""

    class Classifier(lightning(namespace).LightningModule):  # type: ignore[misc]
        def __init__(
            self,
            criterion: bool = False,
            manual: bool = False,
            quiet: bool = False,
            optimizers: Callable[[Any], Any] = sgd,
            raises: dict[str, BaseException] | None = None,
        ) -> None:
            """Build the network.

            Args:
                criterion: the loss is an ``nn.CrossEntropyLoss`` of the module, otherwise ``F.cross_entropy``.
                manual: manual optimization, one optimizer for the body and one for the head.
                quiet: log nothing and keep no batch, for torch.compile, which would compile each of these anew.
                optimizers: what configure_optimizers returns, from the module.
                raises: an error for the third batch of ``training_step`` or the first of ``validation_step``.
            """
            super().__init__()
            torch.manual_seed(0)
            self.net = network()
            self.automatic_optimization = not manual
            self.criterion = nn.CrossEntropyLoss() if criterion else None
            self.quiet = quiet
            self.optimizers_of = optimizers
            self.raises = raises or {}
            self.seen: list[tuple[str, Any]] = []  # batches of the evaluation loops
            self.example_input_array = torch.zeros(2, 1, 8, 8)  # the summary runs it through the batch hooks
            self.ballast = bytes(100_000)  # shows whether somebody pickles the module

        def forward(self, image: Tensor) -> Tensor:
            return self.net(image)

        def loss(self, batch: Any) -> Tensor:
            image, label = image_and_label(batch)
            logits = self(image)
            return self.criterion(logits, label) if self.criterion else F.cross_entropy(logits, label)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            if batch_idx == 2 and "training_step" in self.raises:
                raise self.raises["training_step"]
            if not self.automatic_optimization:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch))
                    optimizer.step()
                return None
            loss = self.loss(batch)
            if not self.quiet:
                self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if "validation_step" in self.raises:
                raise self.raises["validation_step"]
            loss = self.loss(batch)
            if not self.quiet:
                self.seen.append(("sanity" if self.trainer.sanity_checking else "validate", batch))
                self.log("val_loss", loss, sync_dist=True)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.append(("test", batch))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(("predict", batch))
            return self(image_and_label(batch)[0])

        def configure_optimizers(self) -> Any:
            return self.optimizers_of(self)

    return Classifier


@functools.cache
def sharded_class(namespace: str) -> type[Any]:
    """The same module, sharded with FSDP2 where the strategy has a device mesh."""

    class Sharded(module_class(namespace)):  # type: ignore[misc]
        def configure_model(self) -> None:
            from torch.distributed.fsdp import fully_shard

            if self.device_mesh is not None and not getattr(self, "sharded", False):
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
                self.sharded = True

    return Sharded


@functools.cache
def datamodule_class(namespace: str) -> type[Any]:
    """A LightningDataModule that owns the hook on which batch tricks live."""

    class Data(lightning(namespace).LightningDataModule):  # type: ignore[misc]
        def __init__(self, layout: str = "list") -> None:
            super().__init__()
            self.loader, self.layout = train_loader(layout), layout

        def train_dataloader(self) -> StatefulLoader:
            return self.loader

        def val_dataloader(self) -> DataLoader[Any]:
            return eval_loader(self.layout)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    return Data


def wrapped_by_fsdp1(module: nn.Module) -> nn.Module:
    """Wrap a module in the class of FSDPStrategy, without the processes that its shards need."""
    from torch.distributed.fsdp import FullyShardedDataParallel  # slow, and for few tests

    plain = {name: getattr(nn.Module, name) for name in ("__init__", "__getattr__", "_apply")}
    wrapper: nn.Module = type("Wrapper", (FullyShardedDataParallel,), plain)()
    wrapper.wrapped = module
    return wrapper
