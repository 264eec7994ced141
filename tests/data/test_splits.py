"""Folders by other names, and validation images that are held out of the training images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.cli import write_image_folder, write_images

from lit_tricks.data import ImageFolder


def flat(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        write_images(root / name, count)
    return root


def files(data: ImageFolder, split: str) -> list[str]:
    source = getattr(data, f"{split}_dataloader")().dataset.source
    return sorted(str(Path(path).relative_to(data.root)) for path in source.paths)


@pytest.mark.parametrize("name", ["valid", "validation", "eval", "dev"])
def test_other_names_of_validation(tmp_path: Path, name: str) -> None:
    root = write_image_folder(tmp_path)
    (root / "val").rename(root / name)
    data = ImageFolder(str(root), batch_size=4, num_workers=0)
    assert len(files(data, "val")) == 6
    shutil.copytree(root / name, root / "val")
    with pytest.raises(ValueError, match="val and"):
        ImageFolder(str(root))


def test_a_flat_folder_is_split_in_proportion_and_for_good(tmp_path: Path) -> None:
    root = flat(tmp_path / "photos", ant=10, bee=5, cow=2)
    data = ImageFolder(str(root), batch_size=4, num_workers=0, val_fraction=0.2)
    train, val = files(data, "train"), files(data, "val")
    assert data.classes == ["ant", "bee", "cow"]
    assert [sum(file.startswith(name) for file in val) for name in data.classes] == [2, 1, 1]
    assert sorted(train + val) == sorted(str(path.relative_to(root)) for path in root.rglob("*.jpg"))
    assert (root / "split_0.2_0.csv").is_file()
    write_images(root / "bee", 25, seed=1)
    again = ImageFolder(str(root), batch_size=4, num_workers=0, val_fraction=0.2)
    assert {*val} <= {*files(again, "val")}
    assert {*train} <= {*files(again, "train")}
    assert len(files(again, "val")) == 2 + 5 + 1
    assert files(ImageFolder(str(root), 224, 4, 0, val_fraction=0.2, split_seed=1), "val") != files(again, "val")


def test_a_folder_for_validation_comes_first(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path)
    data = ImageFolder(str(root), batch_size=4, num_workers=0, val_fraction=0.5)
    assert (len(files(data, "train")), len(files(data, "val"))) == (12, 6)
    shutil.rmtree(root / "val")
    data = ImageFolder(str(root), batch_size=4, num_workers=0, val_fraction=0.5)
    assert (len(files(data, "train")), len(files(data, "val"))) == (6, 6)


def test_messages_name_the_remedy(tmp_path: Path) -> None:
    root = flat(tmp_path / "photos", ant=2, bee=2)
    with pytest.raises(FileNotFoundError, match=r"val_fraction 0\.2"):
        ImageFolder(str(root))
    write_image_folder(tmp_path / "outer" / "animals")
    with pytest.raises(FileNotFoundError, match=r"--data\.root .*animals"):
        ImageFolder(str(tmp_path / "outer"))
    for split in ("train", "val"):
        flat(tmp_path / "nested" / split / "animals", ant=2, bee=2)
    with pytest.raises(ValueError, match=r"one folder, 'animals'.*--data\.root .*animals"):
        ImageFolder(str(tmp_path / "nested"))
    with pytest.raises(ValueError, match="val_fraction=1"):
        ImageFolder(str(root), val_fraction=1)
    flat(root, cow=1)
    with pytest.raises(ValueError, match="only image of its class"):
        files(ImageFolder(str(root), val_fraction=0.2), "val")


@pytest.mark.parametrize(("images", "batch"), [(1, 1), (3, 3), (5, 4), (36, 8), (160, 32), (1023, 128), (1024, 256)])
def test_few_images_get_small_batches(tmp_path: Path, images: int, batch: int) -> None:
    write_images(tmp_path / "train" / "ant", 1)
    write_images(tmp_path / "val" / "ant", 1)
    for number in range(1, images):
        (tmp_path / "train" / "ant" / f"{number}.jpg").symlink_to(tmp_path / "train" / "ant" / "0.jpg")
    data = ImageFolder(str(tmp_path), num_workers=0)
    for _ in range(2):
        data.setup("fit")
        assert (data.batch_size, data.hparams["batch_size"]) == (batch, batch)
    assert data.fits_small_batch() == (batch < 256)
    chosen = ImageFolder(str(tmp_path), batch_size=images, num_workers=0)
    chosen.setup("fit")
    assert (chosen.batch_size, chosen.fits_small_batch()) == (images, False)
