"""The covariance and filters of WhitenedStem against NumPy, and the run around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.fits import Saver, differences, make_trainer, weights_of
from helpers.modules import lightning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_tricks.callbacks import EMA, Freeze, Lookahead, MixUp, Muon, WhitenedStem, XavierInit
from lit_tricks.callbacks.whitened_stem import whitening_filters

IMAGES, SIDE, BATCH = 48, 9, 16


def photos(seed: int = 0) -> Tensor:
    """Images (48, 3, 9, 9) whose neighbors and channels are correlated, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(IMAGES, 3, SIDE + 2, SIDE + 2, generator=generator)
    smooth = F.avg_pool2d(noise, 3, 1)
    return smooth + smooth.mean(1, keepdim=True) + 0.5


def loader(images: Tensor | None = None) -> DataLoader[Any]:
    images = photos() if images is None else images
    return DataLoader(TensorDataset(images, torch.arange(len(images)) % 4), BATCH)


class Net(lightning().LightningModule):
    def __init__(self, stem: nn.Module | None = None, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = stem or nn.Conv2d(3, 24, 2, bias=False)
        self.rest = nn.Sequential(nn.GELU(), nn.LazyBatchNorm2d(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.fc = nn.LazyLinear(4)
        self.scale = scale
        self.eval()(torch.zeros(2, 3, SIDE, SIDE))
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.rest(self.stem(images * self.scale)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def fit(*callbacks: Any, net: Net | None = None, images: Tensor | None = None, **kwargs: Any) -> Net:
    net = net or Net()
    kwargs = {"max_epochs": 2, "limit_val_batches": 0} | kwargs
    ckpt_path = kwargs.pop("ckpt_path", None)
    make_trainer(*callbacks, **kwargs).fit(net, loader(images), ckpt_path=ckpt_path)
    return net


def patches(images: Tensor) -> np.ndarray:
    """Patches (N, 12) of 2 by 2 pixels, cut out one by one."""
    places = [(y, x) for y in range(SIDE - 1) for x in range(SIDE - 1)]
    array = images.double().numpy()
    return np.stack([image[:, y : y + 2, x : x + 2].ravel() for image in array for y, x in places])


# ---------------------------------------------------------------------------------------------------------------------
# The filters


def test_filters_are_scaled_eigenvectors_of_numpys_covariance():
    covariance = np.cov(patches(photos()), rowvar=False, bias=True)
    values, vectors = np.linalg.eigh(covariance)
    expected = (vectors / np.sqrt(values + 0.01 * values.mean())).T[::-1]
    filters = whitening_filters(torch.from_numpy(covariance), 24, eps=0.01).numpy()
    signs = np.sign((filters[:12] * expected).sum(1, keepdims=True))
    np.testing.assert_allclose(filters[:12], signs * expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(filters[12:], -filters[:12])


@pytest.mark.parametrize("number", [5, 24, 30])
def test_a_number_of_filters_takes_the_largest_eigenvalues_first_and_repeats(number):
    covariance = torch.diag(torch.arange(1.0, 13.0))
    filters = whitening_filters(covariance, number, eps=1e-12)
    axes = [11 - i % 12 for i in range(number)]
    signs = [1.0 if i % 24 < 12 else -1.0 for i in range(number)]
    expected = torch.zeros(number, 12, dtype=torch.float64)
    for row, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        expected[row, axis] = sign / (axis + 1) ** 0.5
    torch.testing.assert_close(filters, expected)


@pytest.mark.parametrize("eps", [1e-12, 0.1])
def test_outputs_are_uncorrelated_and_eps_limits_the_gain(eps):
    covariance = torch.from_numpy(np.cov(patches(photos()), rowvar=False))
    filters = whitening_filters(covariance, 12, eps)
    values = torch.linalg.eigvalsh(covariance).flip(0)
    expected = torch.diag(values / (values + eps * values.mean()))
    torch.testing.assert_close(filters @ covariance @ filters.T, expected, rtol=1e-6, atol=1e-9)
    assert filters.norm(dim=1).max() <= (eps * values.mean()) ** -0.5


def test_images_of_another_scale_give_the_same_outputs():
    covariance = torch.from_numpy(np.cov(patches(photos()), rowvar=False))
    torch.testing.assert_close(whitening_filters(covariance * 100, 24) * 10, whitening_filters(covariance, 24))


# ---------------------------------------------------------------------------------------------------------------------
# A run


def test_outputs_of_the_first_layer_have_covariance_one():
    """On the images of the run, for a module that scales them itself."""
    for scale in (1.0, 1 / 255):
        net = fit(WhitenedStem(images=IMAGES, eps=1e-9), net=Net(scale=scale), max_steps=1)
        outputs = net.stem(photos() * scale).detach().double().permute(1, 0, 2, 3).reshape(24, -1)
        found = torch.cov(outputs, correction=0)
        torch.testing.assert_close(found[:12, :12], torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-3)
        torch.testing.assert_close(found[:12, 12:], -torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-3)


def test_the_first_batches_are_used_and_a_bias_removes_the_mean():
    net = fit(WhitenedStem(images=17, eps=1e-9), net=Net(nn.Conv2d(3, 12, 2)), max_steps=1, max_epochs=1)
    used = patches(photos()[: 2 * BATCH])  # whole batches
    covariance = np.cov(used, rowvar=False, bias=True)
    expected = whitening_filters(torch.from_numpy(covariance), 12, 1e-9)
    torch.testing.assert_close(net.stem.weight.double().flatten(1), expected, rtol=1e-4, atol=1e-5)
    started = Net(nn.Conv2d(3, 12, 2))
    make_trainer(trick := WhitenedStem(images=17, eps=1e-9), max_steps=0).fit(started, loader())
    assert trick.effect == ""  # no step, so nothing is set


def test_padding_stride_and_dilation_do_not_change_which_patches_count():
    stem = nn.Conv2d(3, 12, 2, padding=1, stride=2, dilation=2, bias=False)
    net = fit(WhitenedStem(images=IMAGES, eps=1e-9), net=Net(stem), max_steps=1)
    array, places = photos().double().numpy(), range(0, 7, 2)
    cut = [image[:, y : y + 3 : 2, x : x + 3 : 2].ravel() for image in array for y in places for x in places]
    expected = whitening_filters(torch.from_numpy(np.cov(np.stack(cut), rowvar=False, bias=True)), 12, 1e-9)
    torch.testing.assert_close(net.stem.weight.double().flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_filters_are_fixed_and_trained_again_after_the_fit():
    seen: list[Tensor] = []

    class Spy(lightning().Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            assert not pl_module.stem.weight.requires_grad
            assert pl_module.stem.weight.grad is None
            seen.append(pl_module.stem.weight.detach().clone())

    net = fit(WhitenedStem(), Spy(), Muon())
    assert len(seen) == 6
    assert all(torch.equal(each, seen[0]) for each in seen)
    assert net.stem.weight.requires_grad


@pytest.mark.parametrize(
    "other", [lambda: EMA(decay=0.5), lambda: Lookahead(k=2), XavierInit, lambda: MixUp(alpha=1.0)]
)
def test_other_tricks_in_any_order(other):
    """Averages start from the filters, initialization and mixing do not change them."""
    ends = [weights_of(fit(*[WhitenedStem(), other()][::order])) for order in (1, -1)]
    assert not differences(*ends)
    assert torch.equal(ends[0]["stem.weight"], fit(WhitenedStem(), max_steps=1).stem.weight)


def test_a_resumed_run_keeps_the_filters_also_with_other_images(tmp_path):
    whole = fit(WhitenedStem(), saver := Saver(tmp_path, steps={3}))
    resumed = fit(WhitenedStem(), images=photos(1), ckpt_path=saver.paths[-1])
    assert torch.equal(resumed.stem.weight, whole.stem.weight)


def test_a_checkpoint_without_such_filters_is_rejected(tmp_path):
    fit(saver := Saver(tmp_path), max_epochs=1)
    with pytest.raises(RuntimeError, match="checkpoint was made without it"):
        fit(WhitenedStem(), ckpt_path=saver.paths[0])


def test_a_trained_network_is_rejected_and_another_one_is_whitened_anew():
    trick = WhitenedStem()
    net = fit(trick)
    with pytest.raises(RuntimeError, match="was trained before"):
        fit(trick, net=net)
    again = fit(trick, images=photos(1))
    assert not torch.equal(again.stem.weight, net.stem.weight)


@pytest.mark.parametrize(
    ("trick", "stem", "images", "message"),
    [
        ({"layer": "fc"}, None, None, "no two-dimensional convolution 'fc'"),
        ({}, nn.Sequential(nn.Conv2d(3, 6, 2, groups=3)), None, "has 3 groups"),
        ({}, nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 24, 2)), None, "parametrized"),
        ({}, None, torch.ones(16, 3, SIDE, SIDE), "do not vary"),
    ],
)
def test_what_cannot_be_whitened_is_rejected(trick, stem, images, message):
    with pytest.raises(RuntimeError, match=message):
        fit(WhitenedStem(**trick), net=Net(stem), images=images)


def test_another_frozen_part_is_allowed_and_the_same_layer_is_not():
    fit(WhitenedStem(), Freeze(["rest"]), max_epochs=1)
    with pytest.raises(RuntimeError, match=r"both freeze stem\.weight"):
        fit(WhitenedStem(), Freeze(["stem"]))


def test_a_convolution_that_gets_no_training_images_is_rejected():
    net = Net()
    net.unused = nn.Conv2d(3, 24, 2)
    with pytest.raises(RuntimeError, match="did not call unused"):
        fit(WhitenedStem(layer="unused"), net=net)
