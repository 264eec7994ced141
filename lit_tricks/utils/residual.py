"""Find the ends of the residual branches of a network, by tracing its modules or by its drop-path layers."""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from lit_tricks._compat import Dropout
from lit_tricks.utils.modules import is_norm
from lit_tricks.utils.rng import isolated_random_state

__all__ = ["is_drop_path", "last_norms", "residual_branches"]

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")


def last_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Return the norm layers that end a residual branch, by name.

    Of two values that are added, the branch is the value that passed more layers with weights, if the other value
    passed one such layer at most (a projection). Between norm and addition, only layers that map 0 to 0 are allowed:
    dropout, drop path, a gate. A norm before a convolution or an activation does not end its branch: at scale 0, a ReLU
    passes no gradient.

    A copy of the network that shares its tensors is traced with ``torch.fx``, as a whole or in the largest parts that
    can be traced. Neither the module nor the random state changes.
    """
    found: dict[str, nn.Module] = {}
    for name in dict.fromkeys(norm for norm, _ in _search(module, "")):
        norm = module.get_submodule(name)
        if all(norm is not other for other in found.values()):
            found[name] = norm
    return found


def residual_branches(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose output is a residual branch, by name, in their order.

    These are the drop-path layers. In blocks without drop path, these are the last norm of the branch (see
    `last_norms`), or the outermost module around it. A branch that continues in the code of the block after its last
    module has no such module.
    """
    names = {name: part for name, part in module.named_modules() if name}
    chosen = {name for name, part in names.items() if is_drop_path(name, part)}
    blocks = {name.rpartition(".")[0] for name in chosen}
    for child, part in module.named_children():  # the module's own forward need not be the network's
        ends = (f"{child}.{end}" for _, end in _search(part, "") if end)
        chosen |= {end for end in ends if end.rpartition(".")[0] not in blocks}
    return {name: part for name, part in names.items() if name in chosen}


def is_drop_path(name: str, module: nn.Module) -> bool:
    """Return whether a layer is a drop-path layer, or the identity that timm uses instead for a probability of 0.

    Networks often have a copy of the class, so that it is recognized by name.
    """
    if isinstance(module, nn.Identity):
        return bool(re.search(r"drop_?path\d?$", name))
    is_leaf = not any(True for _ in module.children()) and not any(True for _ in module.parameters())
    return is_leaf and bool(re.search(r"DropPath$|^StochasticDepth$", type(module).__name__))


class _Tracer(fx.Tracer):
    """Traces into every module except torch's own and norm layers, without their hooks."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or is_norm(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return super().call_module(m, m.forward, args, kwargs)  # `forward` would call hooks


def _search(module: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    """Yield the names of the last norm of each branch, and of the module that the branch ends with, if any."""
    if is_norm(module) or not any(map(is_norm, module.modules())):
        return
    prefix = f"{path}." if path else ""
    graph, twin = _trace(module)
    if graph is None:
        for name, child in module.named_children():
            yield from _search(child, prefix + name)
        return
    for norm, end in _ends(graph, dict(twin.named_modules())):
        yield prefix + norm, end and prefix + end


def _ends(graph: fx.Graph, modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Yield the names of the norm layers that end residual branches of a graph, and of the outermost modules around."""
    bits: dict[fx.Node, int] = {}  # one for each node
    above: dict[fx.Node, int] = {}  # layers of the node itself and of all its inputs
    layers = 0  # only layers with weights, without norm layers
    for i, node in enumerate(graph.nodes):
        bits[node] = above[node] = 1 << i
        for source in node.all_input_nodes:
            above[node] |= above[source]
        if node.op == "call_module" and not is_norm(module := modules[node.target]):
            layers |= bits[node] if any(True for _ in module.parameters()) else 0
        terms = [term for term in node.args[:2] if isinstance(term, fx.Node)]
        if node.target in _ADDITIONS and len(terms) == 2:
            for branch, shortcut in itertools.permutations(terms):
                depth = (above[branch] & ~above[shortcut] & layers).bit_count()
                others = (above[shortcut] & ~above[branch] & layers).bit_count()
                norm = _last_norm(branch, modules, bits, above)
                if norm and depth > others <= 1:
                    yield norm, next((name for name in _stack(branch) if name not in _stack(node)), "")


def _stack(node: fx.Node) -> list[str]:
    """Return the names of the modules in whose call a value is computed, from the outside in."""
    return [name for name, _ in node.meta.get("nn_module_stack", {}).values()]


def _trace(module: nn.Module) -> tuple[fx.Graph | None, nn.Module]:
    tensors = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    try:
        with isolated_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = copy.deepcopy(module, tensors).eval()
            parameters = inspect.signature(twin.forward).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
            return _Tracer().trace(twin, defaults), twin
    except Exception:  # code of other libraries raises any exception when it gets symbols instead of tensors
        return None, module


def _last_norm(
    node: fx.Node, modules: dict[str, nn.Module], bits: dict[fx.Node, int], above: dict[fx.Node, int]
) -> str | None:
    """Return the name of the norm layer that a value comes from, through layers that map 0 to 0."""
    while True:
        inputs = node.all_input_nodes
        if node.op == "call_module":
            name = str(node.target)
            if is_norm(modules[name]):
                activation = getattr(modules[name], "act", None)  # timm has layers that do both
                return name if activation is None or isinstance(activation, nn.Identity) else None
            if not isinstance(modules[name], nn.Identity | Dropout):
                return None
        elif node.target in _PRODUCTS:  # with a number, a parameter, or a gate that is computed from the value
            factors = [factor for factor in inputs if factor.op != "get_attr"]
            inputs = [factor for factor in factors if all(bits[factor] & above[other] for other in factors)]
        elif getattr(node.target, "__name__", "") not in ("dropout", "stochastic_depth"):
            return None
        if len(inputs) != 1:
            return None
        [node] = inputs
