"""From photos in class folders to the class of a new photo: the three commands of the guide."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers.cli import QUIET, done, workplace
from lightning.pytorch import Trainer
from PIL import Image

from lit_tricks import Classifier

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "own_photos.md"
COLORS = {"ant": (200, 40, 40), "bee": (40, 200, 40), "cow": (40, 40, 200)}
SMALL = '{"depth": 18, "width": 0.0625, "small_input": true}'


def photo(color: tuple[int, int, int], seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-40, 41, (24, 20, 3))
    return Image.fromarray((noise + color).clip(0, 255).astype(np.uint8))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*LeafSpec.* is deprecated")
def test_three_commands_of_the_guide(tmp_path: Path) -> None:
    [block] = re.findall(r"three commands .*?```bash\n(.*?)```", GUIDE.read_text(), re.IGNORECASE | re.DOTALL)[:1]
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    assert [words[0] for words in commands] == ["data", "fit", "predict"]
    with workplace(tmp_path):
        for name, color in COLORS.items():
            (tmp_path / "photos" / name).mkdir(parents=True)
            for number in range(15):
                photo(color, number).save(tmp_path / "photos" / name / f"{number}.jpg")
        photo(COLORS["bee"], 99).save("new.jpg")
        model = Classifier(model_args={"depth": 18, "width": 0.0625, "small_input": True}, num_classes=7)
        model.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        model.trainer.strategy.connect(model)
        model.trainer.save_checkpoint("pretrained.ckpt", weights_only=True)
        check, fit, predict = commands
        done(*check, "--num_workers=0")
        fit[fit.index("resnet50d.ra2_in1k")] = "pretrained.ckpt"  # small, and not from the internet
        small = (f"--model.model_args={SMALL}", "--data.image_size=16", "--data.num_workers=0")
        done(*fit, *small, "--trainer.max_epochs=8", "--trainer.callbacks.LayerDecay.decay=1", *QUIET)
        done(*predict)
        with Path("predictions.csv").open(newline="") as stream:
            [row] = csv.DictReader(stream)
        assert (row["file"], row["label1"]) == ("new.jpg", "bee")
        assert float(row["probability1"]) > 1 / 3
