"""Compare starts of EMA on the handwritten digits, at several lengths: timm's decays, exactly debiased, no warm-up.

    python benchmarks/ema_warmup.py

Every network is trained once; the averages are updated along with it. Prints errors and losses on held-out digits.
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from lit_tricks.callbacks.averaging.store import AveragedWeights
from lit_tricks.callbacks.ema import ema_decay

SEEDS = range(5)
STARTS = {
    "timm": lambda decay, t: ema_decay(decay, t),
    "debiased": lambda decay, t: decay * (1 - decay**t) / (1 - decay ** (t + 1)),
    "none": lambda decay, t: decay if t else 0.0,
}


def network() -> nn.Module:
    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    return nn.Sequential(
        block(1, 16, 1), block(16, 32, 2), block(32, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )


def evaluate(model: nn.Module, image: torch.Tensor, label: torch.Tensor) -> tuple[float, float]:
    model.eval()
    with torch.no_grad():
        logits = model(image)
    model.train()
    return 100 * float((logits.argmax(1) != label).float().mean()), float(F.cross_entropy(logits, label))


def run(seed: int, steps: int, decays: tuple[float, ...]) -> dict[tuple[str, float], tuple[float, float]]:
    digits = load_digits()
    image, label = torch.tensor(digits.images[:, None], dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(0))
    train, test = order[:600], order[600:]
    torch.manual_seed(seed)
    model = network()
    averages = {(start, decay): AveragedWeights(model) for start in STARTS for decay in decays}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(steps):
        batch = train[torch.randint(len(train), (32,))]
        noisy = image[batch] + 0.3 * torch.randn(len(batch), 1, 8, 8)
        optimizer.zero_grad()
        F.cross_entropy(model(noisy), label[batch]).backward()
        optimizer.step()
        for (start, decay), average in averages.items():
            average.update(1 - STARTS[start](decay, step))
    found = {("weights", 0.0): evaluate(model, image[test], label[test])}
    for key, average in averages.items():
        with average.showing(True):
            found[key] = evaluate(model, image[test], label[test])
    return found


def main() -> None:
    torch.set_num_threads(1)
    print("| steps | decay | weights | timm | debiased | none |\n|---|---|---|---|---|---|")
    decays = (0.99, 0.999, 0.9999)
    for steps in (100, 300, 1000, 3000):
        runs = [run(seed, steps, decays) for seed in SEEDS]

        def cell(start: str, decay: float, runs: list = runs) -> str:
            errors, losses = zip(*(found[start, decay] for found in runs), strict=True)
            return f"{statistics.mean(errors):.2f} % ({statistics.mean(losses):.3f})"

        for decay in decays:
            cells = [cell("weights", 0.0), *(cell(start, decay) for start in STARTS)]
            print(f"| {steps} | {decay} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
