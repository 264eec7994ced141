"""Parts of a module, found by name, by pattern, or as "backbone"."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from lit_tricks._compat import BatchNorm

__all__ = ["Part", "find_part", "parts_of"]


class Part(NamedTuple):
    """Parts of a module. They are kept by name, because strategies replace layers and parameters.

    Args:
        found: names of the modules and parameters that were found, without those inside of others.
        parameters: names of all their parameters, each parameter once.
        modules: names of all their modules, those inside of others too.
    """

    found: list[str]
    parameters: list[str]
    modules: list[str]

    def without(self, parameters: Collection[str], modules: Collection[str]) -> Part:
        """Return the part without some parameters and modules."""
        return Part(
            self.found,
            [name for name in self.parameters if name not in parameters],
            [name for name in self.modules if name not in modules],
        )

    def without_batchnorms(self, module: nn.Module) -> Part:
        """Return the part without its BatchNorm layers and their parameters."""
        norms = {name for name in self.modules if isinstance(module.get_submodule(name), BatchNorm)}
        return self.without([name for name in self.parameters if name.rpartition(".")[0] in norms], norms)


def find_part(module: nn.Module, pattern: str, classifier: Callable[[], Collection[nn.Module]]) -> Part:
    """Find parts of a module.

    Args:
        module: the module as a whole.
        pattern: full name of a module or parameter, as "model.layer1", or a pattern of such names, as
            "model.layer[12]". If nothing has this name, it means the outermost modules whose names end with it, so that
            "layer1" is "model.layer1". If nothing ends with "backbone", it means everything that is not part of the
            classifier, or of one of several heads.
        classifier: returns the modules that compute the logits. It is called only for "backbone".

    Raises:
        LookupError: if nothing is found.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    modules = {name: part for name, part in module.named_modules(remove_duplicate=False) if name}
    names = [*modules, *parameters]
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        inner = [name for name in names if fnmatchcase(name, f"*.{pattern}")]
        depth = min((name.count(".") for name in inner), default=0)
        found = [name for name in inner if name.count(".") == depth]
    if not found and pattern == "backbone":
        return _backbone(module, modules, parameters, classifier())
    if not found:
        raise LookupError(pattern)
    outermost = _outermost(found)
    inside = tuple(f"{name}." for name in outermost)
    return Part(
        outermost,
        _once([name for name in parameters if name in outermost or name.startswith(inside)], parameters),
        [name for name in modules if name in outermost or name.startswith(inside)],
    )


def parts_of(module: nn.Module) -> str:
    """Return the names of the parts of a module, two levels deep, for a message."""
    names: list[str] = []
    for name, child in module.named_children():
        if any(True for _ in child.parameters()):
            inner = [f"{name}.{part}" for part, each in child.named_children() if any(True for _ in each.parameters())]
            names += inner or [name]
    return ", ".join(names if len(names) <= 12 else [*names[:10], "...", names[-1]])


def _backbone(
    module: nn.Module,
    modules: dict[str, nn.Module],
    parameters: dict[str, nn.Parameter],
    heads: Collection[nn.Module],
) -> Part:
    """Return all but the classifier. Layers without parameters that follow the last frozen one, as dropout, are its."""
    trained = {id(parameter) for head in heads for parameter in head.parameters()}
    frozen = [name for name, parameter in parameters.items() if id(parameter) not in trained]
    if not frozen:
        raise LookupError("backbone")
    whole = [name for name, part in modules.items() if not any(id(p) in trained for p in part.parameters())]
    last = max((i for i, name in enumerate(whole) if any(True for _ in modules[name].parameters())), default=-1)
    before = set(whole[: last + 1])
    held = [name for name in whole if name in before or before & {*_above(name)}]
    return Part(_outermost([*held, *frozen]), _once(frozen, parameters), held)


def _outermost(names: Sequence[str]) -> list[str]:
    """Return the names that are not inside of others."""
    known = set(names)
    return [name for name in dict.fromkeys(names) if not any(above in known for above in _above(name))]


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _once(names: Sequence[str], parameters: dict[str, nn.Parameter]) -> list[str]:
    """Return one name of each parameter."""
    return list({id(parameters[name]): name for name in reversed(names)}.values())[::-1]
