"""The image pipeline: PCA noise against its formula, the paper's steps, and conversion to RGB."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lit_tricks.data.transforms import PCANoise, eval_transform, pca_noise, to_pixels, to_rgb, train_transform

MEAN, STD = (123.68, 116.779, 103.939), (58.393, 57.12, 57.375)
EIGENVALUES = np.array([55.46, 4.794, 1.148])
EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


def photo(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    rng = np.random.RandomState(seed)
    coarse = Image.fromarray(rng.randint(0, 256, (5, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def test_pca_noise_is_the_formula_in_float64() -> None:
    image = 255 * torch.rand(3, 5, 7, dtype=torch.float64)
    alpha = torch.tensor([0.11, -0.07, 0.2], dtype=torch.float64)
    expected = image.numpy().copy()
    for channel in range(3):
        for k in range(3):
            expected[channel] += EIGENVECTORS[channel, k] * alpha[k].item() * EIGENVALUES[k]
    np.testing.assert_allclose(pca_noise(image, alpha).numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(pca_noise(image.float(), alpha.float()).numpy(), expected, rtol=0, atol=1e-4)


def test_pca_noise_is_along_orthonormal_components() -> None:
    np.testing.assert_allclose(EIGENVECTORS.T @ EIGENVECTORS, np.eye(3), atol=1e-3)
    # The largest component is brightness: it moves the three channels by almost the same.
    shift = pca_noise(torch.zeros(3, 1, 1), torch.tensor([-0.1, 0, 0])).flatten()
    np.testing.assert_allclose(shift.numpy(), [3.147, 3.221, 3.237], atol=1e-3)


def test_pca_noise_takes_batches_and_leaves_its_input() -> None:
    images, alpha = torch.rand(4, 3, 6, 6), torch.randn(4, 3)
    before = images.clone()
    noisy = pca_noise(images, alpha)
    assert torch.equal(images, before)
    for image, one, coefficients in zip(images, noisy, alpha, strict=True):
        torch.testing.assert_close(one, pca_noise(image, coefficients))
    assert pca_noise(images.half(), alpha).dtype == torch.float16


def test_pca_draws_one_normal_triple_for_each_image() -> None:
    torch.manual_seed(0)
    noise = PCANoise(0.1)
    flat = torch.full((3, 4, 4), 100.0)
    shifts = torch.stack([noise(flat) - flat for _ in range(4000)]).double()
    assert torch.equal(shifts.amax((2, 3)), shifts.amin((2, 3)))  # the same for all pixels of an image
    alpha = shifts[:, :, 0, 0].numpy() @ np.linalg.inv(EIGENVECTORS).T / EIGENVALUES
    # Five standard errors of the mean, of the standard deviation, and of the correlations of 4000 draws.
    assert np.abs(alpha.mean(0)).max() < 5 * 0.1 / math.sqrt(4000)
    assert np.abs(alpha.std(0) / 0.1 - 1).max() < 5 / math.sqrt(8000)
    assert np.abs(np.corrcoef(alpha.T) - np.eye(3)).max() < 5 / math.sqrt(4000)
    assert torch.equal(PCANoise(0)(flat), flat)


def test_paper_transform_is_the_steps_of_the_paper_in_order() -> None:
    image = photo()
    reference = [
        v2.RandomResizedCrop(16, scale=(0.08, 1), ratio=(3 / 4, 4 / 3)),
        v2.RandomHorizontalFlip(0.5),
        v2.ColorJitter(brightness=0.4, saturation=0.4, hue=0.2),
    ]
    transform = train_transform(16, "paper", MEAN, STD)
    for seed in range(5):
        torch.manual_seed(seed)
        result = transform(image)
        torch.manual_seed(seed)
        expected = image
        for step in reference:
            expected = step(expected)
        pixels = torch.from_numpy(np.array(expected)).permute(2, 0, 1).double()
        pixels = pca_noise(pixels, 0.1 * torch.randn(3).double())
        expected_result = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        torch.testing.assert_close(result.double(), expected_result, rtol=0, atol=1e-5)
        assert result.dtype == torch.float32
        assert result.shape == (3, 16, 16)


def test_coefficients_of_the_jitter_span_the_range_of_the_paper() -> None:
    torch.manual_seed(0)
    transform = train_transform(1, "paper", (0, 0, 0), (1, 1, 1))
    gray = Image.new("RGB", (8, 8), (100, 100, 100))  # saturation and hue do nothing to it
    values = torch.stack([transform(gray)[:, 0, 0].mean() for _ in range(500)])
    noise = 3 * 0.1 * 55.46 * 0.58
    assert 60 - noise < values.min() < 70
    assert 130 < values.max() < 140 + noise


def test_basic_transform_only_crops_and_flips() -> None:
    plain = Image.new("RGB", (20, 10), (10, 20, 30))
    result = train_transform(8, "basic", MEAN, STD)(plain)
    expected = (torch.tensor([10.0, 20.0, 30.0]) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(result, expected.view(3, 1, 1).expand(3, 8, 8))


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (300, 45)])
def test_eval_transform_is_short_side_then_centre_crop(size: tuple[int, int]) -> None:
    image = photo(*size)
    width, height = size
    short = min(size)
    resized = image.resize((width * 32 // short, height * 32 // short), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 28) / 2), round((resized.height - 28) / 2)
    pixels = np.array(resized.crop((left, top, left + 28, top + 28)), dtype=np.float64)
    expected = ((pixels - MEAN) / STD).transpose(2, 0, 1)
    result = eval_transform(28, 32, MEAN, STD)(image)
    assert result.shape == (3, 28, 28)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


def test_pickled_transforms_draw_the_same() -> None:
    for transform in (train_transform(8, "paper", MEAN, STD), eval_transform(8, 9, MEAN, STD)):
        copy = pickle.loads(pickle.dumps(transform))
        torch.manual_seed(1)
        first = transform(photo())
        torch.manual_seed(1)
        assert torch.equal(copy(photo()), first)
    assert repr(PCANoise(0.1)) == "PCANoise(std=0.1)"


def test_every_kind_of_image_becomes_rgb() -> None:
    rgb = photo()
    assert to_rgb(rgb) is rgb
    gray = rgb.convert("L")
    for image in (gray, gray.convert("LA"), gray.convert("1").convert("L")):
        assert np.array_equal(np.array(to_rgb(image)), np.array(image.convert("L"))[..., None].repeat(3, -1))
    transparent = rgb.copy()
    transparent.putalpha(0)
    assert np.array_equal(np.array(to_rgb(transparent)), np.array(rgb))
    for mode in ("CMYK", "YCbCr", "HSV", "P", "1"):
        assert to_rgb(rgb.convert(mode)).mode == "RGB"
    assert np.array_equal(np.array(to_rgb(rgb.convert("CMYK"))), np.array(rgb))
    palette = rgb.convert("P")
    palette.info["transparency"] = bytes(range(256))  # PIL warns about this one, which is an error here
    assert np.array_equal(np.array(to_rgb(palette)), np.array(rgb.convert("P").convert("RGB")))


def test_deep_grey_keeps_its_upper_bits_or_is_rejected() -> None:
    deep = Image.fromarray(np.array([[0, 255, 256, 65535]], dtype=np.uint16))
    assert to_pixels(to_rgb(deep))[:, 0].tolist() == [[0, 0, 1, 255]] * 3
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=rf"mode {mode}.*8 or 16 bits"):
            to_rgb(Image.new(mode, (2, 2)))
