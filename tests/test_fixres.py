"""FixRes: what is trained, at which size, and that all else stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _fits import make_trainer
from modules import lightning
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

from lit_tricks import FixRes

pytestmark = pytest.mark.filterwarnings("ignore:FixRes fine-tunes a trained network")


class Photos(Dataset[Any]):
    """Random pictures of 40 x 40 pixels, through a transform."""

    def __init__(self, transform: Any, size: int = 12) -> None:
        self.transform, self.size = transform, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        pixels = torch.randint(256, (40, 40, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        return self.transform(Image.fromarray(pixels.numpy())), index % 3


def to_tensor(*steps: Any) -> Any:
    return v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


TRAIN = to_tensor(v2.RandomResizedCrop(16))
TEST = to_tensor(v2.Resize(20), v2.CenterCrop(16))


class Net(lightning().LightningModule):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)
        )
        self.head = nn.Linear(6, 3)
        self.seen: list[tuple[str, Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(("train", batch[0]))
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(("sanity" if self.trainer.sanity_checking else "val", batch[0]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(("test", batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)


def loaders(**kwargs: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    train = DataLoader(Subset(Photos(TRAIN), range(8)), batch_size=4, **kwargs)
    return train, DataLoader(Photos(TEST), batch_size=4, **kwargs)


@pytest.mark.parametrize("workers", [0, 1])
def test_all_batches_come_through_the_test_transform_at_the_size(workers):
    train, val = loaders(num_workers=workers, persistent_workers=bool(workers))
    before = train.dataset, val.dataset
    module, trainer = Net(), make_trainer(FixRes(24), max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(module, train, val)
    expected = to_tensor(v2.Resize(30), v2.CenterCrop(24))
    batch = torch.stack([Photos(expected)[i][0] for i in range(4)])
    assert [stage for stage, _ in module.seen] == ["sanity", *2 * ["train", "train", "val", "val", "val"]]
    for i in (0, 1, 3, 6, 8):
        assert torch.equal(module.seen[i][1], batch), i
    assert (train.dataset, val.dataset) == before
    assert next(iter(train))[0].shape == (4, 3, 16, 16)  # also of workers that live on


def test_only_the_classifier_and_the_last_norm_move():
    module = Net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    make_trainer(FixRes(24)).fit(module, *loaders())
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert moved == {"head.weight", "head.bias"} | {f"body.4.{name}" for name in norm}
    assert all(param.requires_grad for param in module.parameters())
    assert all(part.training for part in module.modules())
