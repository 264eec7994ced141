"""A trick that a user writes: the guide's code, against public names only, in both namespaces."""

from __future__ import annotations

import ast
import copy
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers.fits import log_lines, make_trainer
from helpers.modules import LAYOUTS, NAMESPACES, eval_loader, module_class, train_loader

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "your_own_trick.md"
CODE = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def own() -> types.ModuleType:
    """The module that the guide's code makes."""
    module = types.ModuleType("own_trick")
    sys.modules["own_trick"] = module  # where pickles find the class
    exec(compile(CODE[0], str(GUIDE), "exec"), vars(module))
    yield module
    del sys.modules["own_trick"]


def test_guide_uses_public_names_only():
    for code in CODE:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                assert not [name for name in names if name.startswith("_")]
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                assert node.attr in ("_draws", "_share")  # its own


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_own_trick_trains_with_any_batch(own, namespace, layout):
    trick = own.RandomErasing(probability=1.0, max_area=0.5)
    trainer = make_trainer(trick, namespace=namespace, max_epochs=1)
    module = module_class(namespace)()
    with log_lines() as records:
        trainer.fit(module, train_loader(layout=layout), eval_loader(layout=layout))
    lines = [record.getMessage() for record in records]
    assert lines == ["RandomErasing: covers up to 50% of the area of 100% of the images"]
    assert any("random_erasing/share" in metrics for metrics in trainer.logger.metrics.values())
    assert "batch_to_device" not in vars(trainer.strategy)


def test_own_trick_covers_what_was_chosen(own):
    images = torch.ones(2, 3, 4, 4)
    erased = own.random_erasing(images, torch.tensor([True, False]), (0, 2, 1, 4))
    assert erased[0].sum() == 3 * (16 - 6)
    assert torch.equal(erased[1], images[1])


def test_own_trick_draws_again_after_a_copy(own):
    trick = own.RandomErasing(probability=0.5)
    trick.load_state_dict(pickle.loads(pickle.dumps(own.RandomErasing().state_dict())))
    batch = [torch.rand(4, 3, 8, 8), torch.arange(4)]
    twins = [copy.deepcopy(trick), pickle.loads(pickle.dumps(trick))]
    expected = trick.erase(batch)[0]
    assert all(torch.equal(twin.erase(batch)[0], expected) for twin in twins)


@pytest.mark.parametrize("arguments", [{"probability": 25}, {"max_area": 0}])
def test_own_trick_rejects_arguments(own, arguments):
    [name] = arguments
    with pytest.raises(ValueError, match=rf"{name}={arguments[name]}"):
        own.RandomErasing(**arguments)


def test_contributing_links_the_guide():
    assert "docs/guides/your_own_trick.md" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
