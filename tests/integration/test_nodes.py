"""Two machines, as torchrun starts them: each sees its share of the data, and resumes in the middle of an epoch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.bucket import bucket
from helpers.cli import write_images
from helpers.launch import two_processes
from helpers.nodes import BATCH_SIZE, EPOCHS, STOP

from lit_tricks.commands.data import shard

pytestmark = pytest.mark.slow  # torchrun twice, six fits

TRAIN, VAL = 24, 7
STEPS = TRAIN // 2 // BATCH_SIZE


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("nodes")
    folder = root / "nodes"  # where the script looks
    for label, (train, val) in enumerate([(12, 4), (12, 3)]):
        write_images(folder / "images" / "train" / f"{label}", train, seed=label)
        write_images(folder / "images" / "val" / f"{label}", val, seed=10 + label)
    shard(str(folder / "images"), str(folder / "shards"), shard_mb=0.005)
    assert len(list((folder / "shards" / "train").glob("chunk*"))) > 4
    with bucket(folder / "shards", "shards") as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return two_processes(["nodes"], root, nodes=True)["nodes"]


@pytest.mark.parametrize("kind", ["folder", "shards", "bucket"])
class TestTwoNodes:
    def test_share_the_data(self, kind, nodes):
        orders = []
        for epoch in range(EPOCHS):
            seen = [[name for of, name in node[kind]["full"]["trained"] if of == epoch] for node in nodes]
            assert [len(names) for names in seen] == [TRAIN // 2] * 2
            assert len({*seen[0], *seen[1]}) == TRAIN  # all of it, each once
            orders.append(seen)
        assert orders[0] != orders[1]
        validated = [node[kind]["full"]["validated"] for node in nodes]
        assert sorted(map(len, validated)) == [VAL // 2, VAL - VAL // 2]
        assert len({*validated[0], *validated[1]}) == VAL

    def test_train_one_model(self, kind, nodes):
        first, second = (node[kind]["full"]["weights"] for node in nodes)
        learnt = [name for name in first if "running" not in name and "tracked" not in name]
        assert len(learnt) == 6
        assert all(torch.equal(first[name], second[name]) for name in learnt)

    def test_go_on_in_the_middle_of_an_epoch(self, kind, nodes):
        assert EPOCHS * STEPS > STOP > STEPS
        for node in nodes:
            full, resumed = node[kind]["full"], node[kind]["resumed"]
            assert resumed["trained"] == full["trained"][STOP * BATCH_SIZE :]
            assert resumed["validated"] == full["validated"]
            assert all(torch.equal(full["weights"][name], value) for name, value in resumed["weights"].items())
