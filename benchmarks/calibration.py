"""Calibration of a small ResNet on CIFAR-10 by one temperature, and by one per class.

    OMP_NUM_THREADS=1 python benchmarks/calibration.py --data cifar10.tar.xz --work FOLDER

Each seed trains on 2,000 images of 16 x 16 pixels, which are few, small and not augmented, so that the network becomes
overconfident. The scalings are fitted to 2,000 other images, which choose nothing, and are measured on the 5,000 images
of ``val``. TemperatureScaling fits the temperature in the run. The scaling per class is fitted to the same logits.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from evidence_data import load
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset

from lit_tricks import Classifier, LabelSmoothing, TemperatureScaling, WarmupCosine
from lit_tricks.callbacks.calibration.scaling import Scores, calibration_scores, fit_vector_scaling

TABLE = Path(__file__).parent / "results" / "calibration.md"
ARMS: dict[str, Callable[[], list[Callback]]] = {
    "cross entropy": list,
    "LabelSmoothing(0.1)": lambda: [LabelSmoothing()],
}
TRAIN, FIT = 2000, 2000
Images = tuple[torch.Tensor, torch.Tensor]


def tensors(arrays: dict[str, np.ndarray], part: str) -> Images:
    """Return normalized images of 16 x 16 pixels, and labels."""
    images = torch.from_numpy(arrays[f"{part}_x"]).float().div_(127.5).sub_(1)
    small = interpolate(images, size=(16, 16), mode="bilinear", antialias=True)
    return small, torch.from_numpy(arrays[f"{part}_y"]).long()


def trained(arm: str, seed: int, train: TensorDataset, fit: TensorDataset, epochs: int) -> tuple[Classifier, float]:
    """Return a calibrated network, and its temperature."""
    seed_everything(seed, verbose=False)
    model = Classifier("resnet", 10, {"depth": 18, "width": 0.125, "small_input": True}, input_size=(3, 16, 16))
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, check_val_every_n_epoch=epochs, num_sanity_val_steps=0,
        callbacks=[*ARMS[arm](), WarmupCosine(warmup_epochs=1), TemperatureScaling()],
    )  # fmt: skip
    trainer.fit(model, DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(fit, 500))
    return model.eval(), float(trainer.callback_metrics["temperature_scaling/temperature"])


@torch.no_grad()
def logits_of(model: Classifier, images: torch.Tensor) -> torch.Tensor:
    """Return the logits of images, in float64."""
    return torch.cat([model(part) for part in torch.split(images, 500)]).double()


def measure(model: Classifier, temperature: float, fit: Images, test: Images) -> dict[str, tuple[Scores, int]]:
    """Return the scores on the test images without a scaling, with each, and the changed predictions."""
    scaled = logits_of(model, test[0])
    plain = scaled * temperature
    temperatures, offsets = fit_vector_scaling(logits_of(model, fit[0]) * temperature, fit[1])
    found = {"none": plain, "temperature": scaled, "vector": plain / temperatures + offsets}
    return {
        kind: (calibration_scores(logits, test[1]), int((logits.argmax(1) != plain.argmax(1)).sum()))
        for kind, logits in found.items()
    }


def main(data: Path, work: Path, seeds: int, epochs: int) -> None:
    """Train, measure, and write the table."""
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    arrays = load(data, work / "cifar10.npz")
    (images, labels), test = tensors(arrays, "train"), tensors(arrays, "val")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order[:TRAIN], order[TRAIN : TRAIN + FIT]
    train, fit = ((images[part], labels[part]) for part in parts)
    rows: dict[tuple[str, str], list[tuple[Scores, int, float]]] = {}
    for seed in range(seeds):
        for arm in ARMS:
            model, temperature = trained(arm, seed, TensorDataset(*train), TensorDataset(*fit), epochs)
            for kind, (scores, changed) in measure(model, temperature, fit, test).items():
                rows.setdefault((arm, kind), []).append((scores, changed, temperature))
                print(seed, arm, kind, f"{temperature:.3f}", scores, changed, flush=True)
    TABLE.write_text(table(rows, seeds, epochs))


def table(rows: Mapping[tuple[str, str], Sequence[tuple[Scores, int, float]]], seeds: int, epochs: int) -> str:
    """Return the page of the results."""
    lines = [
        "# Calibration on CIFAR-10",
        "",
        f"ResNet-18-D of an eighth of the width, 16 x 16 pixels, {TRAIN:,} training images, {epochs} epochs, means and",
        f"standard deviations of {seeds} seeds. The scalings are fitted to {FIT:,} other images, and measured on 5,000",
        "test images. Changed: test images with another most probable class. Lower is better, except for top-1.",
        "`benchmarks/calibration.py` made the table.",
        "",
        "| training | scaling | temperature | ECE | NLL | Brier | top-1 in % | changed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (arm, kind), found in rows.items():
        scores, changes, temperatures = zip(*found, strict=True)
        cells = [_mean([s.ece for s in scores], 4), _mean([s.nll for s in scores], 3)]
        cells += [_mean([s.brier for s in scores], 3), _mean([100 * s.accuracy for s in scores], 2)]
        shown = {"none": "1", "temperature": _mean(temperatures, 2), "vector": "one per class"}[kind]
        lines.append(f"| {arm} | {kind} | {shown} | {' | '.join(cells)} | {statistics.mean(changes):.0f} |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float], digits: int) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="cifar10.tar.xz, or its folder")
    parser.add_argument("--work", type=Path, required=True, help="folder of the decoded images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15)
    arguments = parser.parse_args()
    main(arguments.data, arguments.work, arguments.seeds, arguments.epochs)
