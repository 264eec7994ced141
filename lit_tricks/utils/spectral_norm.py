"""Spectral norm: the power iteration of a weight that was not trained to its values, such as an average of others.

In evaluation mode torch divides a weight by ``u^T W v``, with vectors ``u`` and ``v`` from the iterations of training.
For other weights the two belong to no singular value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook

from lit_tricks._compat import (
    SPECTRAL_HOOK,
    SPECTRAL_VECTORS,
    forward_pre_hooks_of,
    spectral_matrix,
    spectral_norm_class,
)
from lit_tricks.utils.dtensor import full_tensor

__all__ = ["SpectralNorm", "iterate_in", "singular_vectors", "spectral_norms"]


def singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the vectors that a power iteration converges to, None for a matrix that is not finite.

    The vectors are exact and depend only on the matrix, not on the start of an iteration.

    Args:
        matrix: (rows, columns).
    """
    if not matrix.isfinite().all():
        return None
    precise = matrix if matrix.device.type == "mps" else matrix.to(torch.promote_types(matrix.dtype, torch.float64))
    wide = precise if precise.size(0) <= precise.size(1) else precise.mH
    short = torch.linalg.eigh(wide @ wide.mH).eigenvectors[:, -1]
    short = short * torch.sgn(short[short.abs().argmax()]).conj()
    long = nn.functional.normalize(wide.mH @ short, dim=0)
    return (short, long) if wide is precise else (long, short)


@dataclass(frozen=True)
class SpectralNorm:
    """A spectral norm in a module.

    Args:
        u: owner and name of the left vector, a buffer.
        v: owner and name of the right vector.
        matrix: returns the weight as the matrix whose norm is taken.
    """

    u: tuple[nn.Module, str]
    v: tuple[nn.Module, str]
    matrix: Callable[[], Tensor]

    def vectors(self) -> tuple[Tensor, Tensor] | None:
        """Return the singular vectors of the weight as it is now."""
        with torch.no_grad():
            return singular_vectors(self.matrix())


def spectral_norms(module: nn.Module) -> list[SpectralNorm]:
    """Find the spectral norms of a module, of both of torch's functions."""
    found, (u, v) = [], SPECTRAL_VECTORS
    for part in module.modules():
        for hook in forward_pre_hooks_of(part):
            if isinstance(hook, SpectralNormHook):
                weight, *vectors = (hook.name + end for end in SPECTRAL_HOOK)
                found.append(SpectralNorm((part, vectors[0]), (part, vectors[1]), _of_hook(part, hook, weight)))
        if isinstance(part, ParametrizationList):
            for i, step in enumerate(part):
                if isinstance(step, spectral_norm_class()) and hasattr(step, u):  # a vector is normalized exactly
                    found.append(SpectralNorm((step, u), (step, v), _of_steps(part, i)))
    return found


def iterate_in(state: dict[str, Tensor], trained: dict[str, Tensor]) -> list[str]:
    """Replace the vectors of the spectral norms in a state dict by the vectors of its weights.

    Args:
        state: weights, and vectors by torch's names.
        trained: vectors that belong to weights, which give the dimension of the norm.

    Returns:
        The names of vectors that belong to a weight which is not in the state dict as such.
    """
    unknown = []
    for name_u in [name for name in state if re.search(r"[._]_?u$", name)]:
        name_v = f"{name_u[:-1]}v"
        match = re.fullmatch(r"(.*parametrizations\.\w+)\.(\d+)\._u", name_u)
        weight = f"{match[1]}.original" if match else name_u.removesuffix(SPECTRAL_HOOK[1]) + SPECTRAL_HOOK[0]
        if name_v not in state or (weight not in state and not match):
            continue  # a parameter that is called so
        if weight not in state or (match and match[2] != "0"):
            unknown += [name_u, name_v]
            continue
        dim = _dim(trained[weight], trained[name_u], trained[name_v])
        if dim is not None and (vectors := singular_vectors(_matrix(state[weight], dim))):
            state[name_u], state[name_v] = (v.to(state[weight].dtype) for v in vectors)
    return unknown


def _matrix(weight: Tensor, dim: int) -> Tensor:
    return weight.movedim(dim, 0).flatten(1)


def _dim(weight: Tensor, u: Tensor, v: Tensor) -> int | None:
    """Return the dimension that comes first in the matrix: of those that fit, the one whose norm the vectors give."""
    fits = [d for d in range(weight.dim()) if weight.size(d) == len(u) and weight.numel() == len(u) * len(v)]
    return max(fits, key=lambda d: float((u.conj() @ _matrix(weight, d) @ v).abs()), default=None)


def _of_hook(part: nn.Module, hook: SpectralNormHook, weight: str) -> Callable[[], Tensor]:
    return lambda: hook.reshape_weight_to_matrix(_whole(getattr(part, weight)))


def _of_steps(steps: ParametrizationList, index: int) -> Callable[[], Tensor]:
    def matrix() -> Tensor:
        names = ["original"] if steps.is_tensor else [f"original{i}" for i in range(steps.ntensors)]
        tensors = [_whole(getattr(steps, name)) for name in names]
        for step in list(steps)[:index]:
            training, step.training = step.training, False  # or another spectral norm would iterate
            tensors = [step(*tensors)]
            step.training = training
        return spectral_matrix(steps[index], tensors[0])

    return matrix


def _whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded, on its device."""
    return full_tensor(tensor.detach()).to(tensor.device)
