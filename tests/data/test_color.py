"""Colors as matrices: against the formulas in float64, and against torchvision where it does the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as v2

from lit_tricks.data import color as _colour
from lit_tricks.data.color import Jitter, apply_matrices, normalization
from lit_tricks.data.transforms import pca_noise

MEAN, STD = (123.68, 116.779, 103.939), (58.393, 57.12, 57.375)
GRAY = np.array([0.299, 0.587, 0.114])
TO_YIQ = np.array([GRAY, [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


def images(count: int = 6, height: int = 7, width: int = 5, low: int = 0, high: int = 256) -> torch.Tensor:
    rng = np.random.RandomState(0)
    return torch.from_numpy(rng.randint(low, high, (count, height, width, 3), dtype=np.uint8)).permute(0, 3, 1, 2)


def some_draws(jitter: Jitter, count: int = 6) -> np.ndarray[Any, Any]:
    return np.stack([jitter.draw(np.random.default_rng(seed)) for seed in range(count)])


def reference(image: torch.Tensor, draws: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Each step after the other, as written in the paper's framework, in float64."""
    brightness, saturation, hue, *alpha = draws
    pixels = image.numpy().astype(np.float64).reshape(3, -1) * brightness
    pixels = saturation * pixels + (1 - saturation) * (GRAY @ pixels)
    y, i, q = TO_YIQ @ pixels
    u, w = math.cos((hue - 1) * math.pi), math.sin((hue - 1) * math.pi)
    pixels = np.linalg.solve(TO_YIQ, np.stack([y, u * i - w * q, w * i + u * q]))
    pixels = pca_noise(torch.from_numpy(pixels)[..., None], torch.tensor(alpha, dtype=torch.float64))[..., 0].numpy()
    pixels = (pixels - np.reshape(MEAN, (3, 1))) / np.reshape(STD, (3, 1))
    return pixels.reshape(image.shape)


def test_one_matrix_is_the_steps_in_float64() -> None:
    batch, jitter = images(), Jitter(MEAN, STD)
    draws = some_draws(jitter)
    found = apply_matrices(batch, jitter.matrices(draws), torch.float32, False).double().numpy()
    expected = np.stack([reference(image, row) for image, row in zip(batch, draws, strict=True)])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_hue_turns_as_in_mxnet() -> None:
    """MXNet's own matrix back from YIQ is rounded to three digits."""
    back = np.array([[1.0, 0.956, 0.621], [1.0, -0.272, -0.647], [1.0, -1.107, 1.705]])
    jitter = Jitter((0, 0, 0), (1, 1, 1))
    for hue in (0.6, 1.0, 1.25):
        matrix = jitter.matrices(np.array([[1, 1, hue, 0, 0, 0]]))[0].double().numpy()
        u, w = math.cos((hue - 1) * math.pi), math.sin((hue - 1) * math.pi)
        np.testing.assert_allclose(
            matrix[:, :3], back @ np.array([[1, 0, 0], [0, u, -w], [0, w, u]]) @ TO_YIQ, atol=6e-3
        )
        np.testing.assert_allclose(GRAY @ matrix[:, :3], GRAY, atol=1e-6)  # brightness stays
    np.testing.assert_allclose(jitter.matrices(np.array([[1, 1, 1, 0, 0, 0]]))[0], np.eye(3, 4), atol=1e-6)


@pytest.mark.parametrize(
    ("draws", "plain", "exact"),
    [
        ([0.7, 1, 1, 0, 0, 0], lambda image: v2.adjust_brightness(image, 0.7), 1e-5),
        ([1, 1, 1, 0.1, -0.2, 0.05], lambda image: pca_noise(255 * image, torch.tensor([0.1, -0.2, 0.05])) / 255, 1e-5),
        # torchvision's gray has 0.2989 for red: 0.0001 of 160, over 58
        ([1, 0.6, 1, 0, 0, 0], lambda image: v2.adjust_saturation(image, 0.6), 3e-4),
        ([0.8, 1.2, 1, 0, 0, 0], lambda i: v2.adjust_saturation(v2.adjust_brightness(i, 0.8), 1.2), 3e-4),
    ],
    ids=["brightness", "noise", "saturation", "both"],
)
def test_jitter_agrees_with_torchvision_where_nothing_is_clipped(draws: list[float], plain: Any, exact: float) -> None:
    batch = images(low=90, high=160)
    found = apply_matrices(batch, Jitter(MEAN, STD).matrices(np.array([draws] * 6)), torch.float32, False)
    expected = v2.normalize(255 * plain(batch.double() / 255), list(MEAN), list(STD))
    np.testing.assert_allclose(found.double(), expected, rtol=1e-5, atol=exact)


def test_draws_are_those_of_the_paper() -> None:
    draws = some_draws(Jitter(MEAN, STD), 4000)
    coefficients, noise = draws[:, :3], draws[:, 3:]
    assert coefficients.min() > 0.6
    assert coefficients.max() < 1.4
    assert np.abs(coefficients.mean(0) - 1).max() < 5 * 0.8 / math.sqrt(12 * 4000)
    assert np.abs(coefficients.std(0) * math.sqrt(12) / 0.8 - 1).max() < 0.05
    assert np.abs(noise.mean(0)).max() < 5 * 0.1 / math.sqrt(4000)
    assert np.abs(noise.std(0) / 0.1 - 1).max() < 5 / math.sqrt(8000)
    assert np.abs(np.corrcoef(draws.T) - np.eye(6)).max() < 5 / math.sqrt(4000)


def test_normalization_is_exact() -> None:
    batch = images(3)
    expected = (batch.double() - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    found = apply_matrices(batch, normalization(MEAN, STD), torch.float64, False)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_precision_and_memory_format(count: int, dtype: torch.dtype, channels_last: bool) -> None:
    batch = images(count)
    expected = apply_matrices(batch, normalization(MEAN, STD), torch.float32, False)
    for given in (batch, batch.contiguous()):
        found = apply_matrices(given, normalization(MEAN, STD), dtype, channels_last)
        assert torch.equal(found, expected.to(dtype))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert found.is_contiguous(memory_format=layout)


def test_memory_is_used_again_when_nobody_has_it() -> None:
    def made(high: int) -> torch.Tensor:
        return apply_matrices(images(high=high), normalization(MEAN, STD), torch.float32, False)

    batches = [made(high) for high in (50, 100, 150, 200)]
    copies = [batch.clone() for batch in batches]
    view = batches[-1][0, 0]
    assert len({batch.data_ptr() for batch in batches}) == 4
    assert all(torch.equal(batch, copy) for batch, copy in zip(batches, copies, strict=True))
    taken = view.data_ptr()
    del batches
    fresh = [made(20).data_ptr() for _ in range(6)]
    assert torch.equal(view, copies[-1][0, 0])
    assert taken not in fresh
    assert len(set(fresh)) == 1


def test_compiled_kernel_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that an accelerator takes, with and without a compiler."""
    batch, jitter = images(), Jitter(MEAN, STD)
    matrices = jitter.matrices(some_draws(jitter))
    expected = apply_matrices(batch, matrices, torch.float32, False)
    torch.testing.assert_close(_colour._pointwise(batch, matrices, torch.float32, True), expected)

    def broken(*args: Any) -> None:
        calls.append(1)
        raise RuntimeError("no compiler")

    calls: list[int] = []
    monkeypatch.setattr("torch.compile", lambda function, dynamic: broken)
    kernel = _colour._kernel.__wrapped__("a device")
    for _ in range(2):
        torch.testing.assert_close(kernel(batch, matrices, torch.float32, False), expected)
    assert calls == [1]


@pytest.mark.full
def test_the_compiled_kernel_is_the_same_for_all_sizes() -> None:
    kernel, jitter = torch.compile(_colour._pointwise, dynamic=True), Jitter(MEAN, STD)
    for count, side in ((6, 7), (3, 9)):
        batch, matrices = images(count, side, side), jitter.matrices(some_draws(jitter, count))
        for channels_last in (False, True):
            found = kernel(batch, matrices, torch.float32, channels_last)
            torch.testing.assert_close(found, apply_matrices(batch, matrices, torch.float32, channels_last))
            assert found.is_contiguous(memory_format=torch.channels_last) == channels_last
