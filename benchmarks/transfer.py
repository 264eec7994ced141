"""Compare backbones trained with and without tricks in segmentation and detection, as tables 8 and 9 of the paper.

    python benchmarks/transfer.py --work FOLDER --out benchmarks/results/transfer.md

For each task, with its own network: train a classifier of single digits, plain and with tricks. Then run `lit-tricks
ablate` over the weights that the task starts from. Each run is a separate `lit-tricks` process. Finished runs are kept
in --work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision
import yaml

TRICKS = ("warmup_cosine", "no_bias_decay", "label_smoothing", "mixup", "ema")
# Per task: configuration, network, epochs, and the image size at which single digits are as large as in the scenes.
TASKS = {
    "segmentation": (
        "segment_digits",
        {"model_args": {"depth": 18, "variant": "D", "width": 0.125, "small_input": True, "output_stride": 8}},
        4,
        24,
    ),
    "detection": ("detect_digits", {"backbone_args": {"depth": 18, "variant": "D", "width": 0.25}}, 3, 24),
}


def lit_tricks(folder: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "lit_tricks", *words], cwd=folder, check=True)


def backbone(folder: Path, name: str, network: dict[str, object], size: int, tricks: tuple[str, ...]) -> Path:
    """Train a classifier unless it exists. Return the checkpoint that is best on the validation digits."""
    path = folder / "runs" / name / "v0" / "checkpoints" / "best.ckpt"
    if not path.is_file():
        lit_tricks(
            folder, "fit", "--config=digits_backbone", f"--name={name}", f"--data.image_size={size}",
            *(f"--config=tricks/{trick}" for trick in tricks), f"--model.model_args={json.dumps(network)}",
        )  # fmt: skip
    return path


def study(folder: Path, task: str, seeds: list[int]) -> list[str]:
    config, network, epochs, size = TASKS[task]
    folder /= task
    folder.mkdir(parents=True, exist_ok=True)
    [args] = network.values()
    reached = []
    for name, tricks in {"plain": (), "tricks": TRICKS}.items():
        path = backbone(folder, name, args, size, tricks)
        results = json.loads((path.parents[1] / "results.json").read_text())
        reached.append(f"{name} {(results.get('averaged') or results['raw'])['test']['top1']:.2%}")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"weights": str(path.resolve())}}}))
    lit_tricks(
        folder, "ablate", f"--config={config}", "--mode=single", "--stack", "plain.yaml", "tricks.yaml", "--seeds",
        *map(str, seeds), "--out=ablation", "--", f"--trainer.max_epochs={epochs}",
    )  # fmt: skip
    table = (folder / "ablation" / "ablation.md").read_text().strip()
    text = f"`{config}` for {epochs} epochs, from nothing, from the plain classifier, and from that with tricks."
    return [
        f"## {task.capitalize()}",
        "",
        text + f" Test top-1 of the classifiers: {', '.join(reached)}.",
        "",
        table,
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("transfer-benchmark"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    start = time.perf_counter()
    lines = ["# Does a backbone that was trained with tricks transfer better?", ""]
    for task in arguments.tasks:
        lines += study(arguments.work.resolve(), task, arguments.seeds)
    lines.append(
        f"Classifiers: `digits_backbone`, plain, and with {', '.join(TRICKS)}. CPU, {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}; "
        f"{time.strftime('%Y-%m-%d')}; {time.perf_counter() - start:.0f} s. `python benchmarks/transfer.py`."
    )
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
