"""The store of averaged weights that EMA and SWA share: a running average beside the weights, and the swap of the two.

One caveat: the swap exchanges the tensors' memory. A captured CUDA graph would go on reading the old one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_tricks._compat import foreach_copy_, foreach_lerp_
from lit_tricks.callbacks.averaging.bf16_split import join, rest_of, round_to
from lit_tricks.utils.dtensor import full_tensor, is_sharded, part_for, shard_like, to_local

__all__ = ["AveragedWeights"]


class AveragedWeights:
    """A running average of the parameters and the floating-point buffers of a module, in fp32 (fp64 for fp64).

    Shared parameters count once. Integers and booleans, and buffers that hold an infinity (masks), are not averaged:
    the average goes with the module's own. Sharded parameters (DTensor) are averaged shard by shard.

    Args:
        module: the module, on its final device, in its final precision, sharded if it will be.
        buffers: whether buffers are averaged; otherwise the average goes with the module's own.
        on_cpu: keep the average there, wherever the module is. An update then copies the weights to the CPU without
            waiting for them, and they are averaged when they are there, at the latest before the next one.
    """

    def __init__(self, module: nn.Module, buffers: bool, on_cpu: bool = False) -> None:
        self._module = module
        self._on_cpu = on_cpu
        self._reshard()
        self._params = {name: param for name, param in module.named_parameters() if _is_averaged(param)}
        self._buffers = {  # by owner: modules put new tensors in the place of their buffers
            f"{path}.{name}" if path else name: (owner, name)
            for path, owner in module.named_modules()
            for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False)
            if buffers and _is_averaged(buffer) and bool(buffer.isfinite().all())
        }
        self.names = [*self._params, *self._buffers]
        self.swapped = False  # the module shows the average
        self._sharded = any(map(is_sharded, self._params.values()))
        self._raw: list[Tensor] = []  # the module's own, while it shows the average
        self._left: list[Tensor] = []
        self._average = [_precise(to_local(tensor), on_cpu) for tensor in self._live()]
        self._arriving: list[Tensor] = []  # the weights of the last update, on their way to the CPU
        self._arrival: torch.cuda.Event | None = None
        self._share: float | None = None  # that of these weights, until they are averaged
        if on_cpu:
            self._arriving = [_on_cpu(to_local(tensor.detach())) for tensor in self._live()]
        self._group()

    def belongs_to(self, module: nn.Module) -> bool:
        """Whether this is the average of the module as it is now."""
        params = [param for param in module.parameters() if _is_averaged(param)]
        return (
            module is self._module
            and len(params) == len(self._params)
            and all(map(lambda p, q: p is q, params, self._params.values()))
        )

    @torch.no_grad()
    def update(self, share: float) -> None:
        """Move the average: ``average += share * (weights - average)``. A share of 1 copies."""
        live = self._live() if not self._sharded else [to_local(tensor) for tensor in self._live()]
        if not self._on_cpu:
            self._average_in(live, share)
            return
        self.finish()
        foreach_copy_(self._arriving, live, non_blocking=True)
        if any(tensor.is_cuda for tensor in live):
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()
        self._share = share

    @torch.no_grad()
    def finish(self) -> None:
        """Average in the weights that were on their way to the CPU."""
        if self._share is None:
            return
        if self._arrival is not None:
            self._arrival.synchronize()
        share, self._share, self._arrival = self._share, None, None
        self._average_in(self._arriving, share)

    def _average_in(self, live: list[Tensor], share: float) -> None:
        for indices, averages in self._groups:
            tensors = [live[i] for i in indices]
            if share == 1:
                foreach_copy_(averages, tensors)
            else:
                foreach_lerp_(averages, tensors, share)
        for i in self._imprecise:
            average = self._average[i]
            average.lerp_(live[i].to(average.dtype), share)

    def sync(self, own: bool = False) -> None:
        """Give every process the averaged buffers of the first one, as DDP does with a module's own.

        Args:
            own: do it with the module's own buffers too.
        """
        dist = torch.distributed
        if not self._buffers or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        self.finish()
        first = len(self._params)
        live = self._live()[first:]
        buffers = [*self._average[first:], *(live if own else [])]
        for dtype in {buffer.dtype for buffer in buffers}:
            same = [buffer for buffer in buffers if buffer.dtype == dtype]
            flat = torch.cat([buffer.reshape(-1).to(live[0].device) for buffer in same])
            dist.broadcast(flat, 0)
            parts = torch.split(flat, [buffer.numel() for buffer in same])
            for buffer, part in zip(same, parts, strict=True):
                buffer.copy_(part.view_as(buffer))

    def swap(self, to_average: bool) -> None:
        """Let the module show the average, or its own weights again, by exchanging pointers. Shards are copied."""
        if to_average == self.swapped:
            return
        self.finish()
        with torch.inference_mode(False), torch.no_grad():
            live, raw = self._live(), self._raw
            self._raw = []
            for i, tensor in enumerate(live):
                new = self._average[i] if to_average else raw[i]
                if self._sharded and is_sharded(tensor):
                    local = to_local(tensor)
                    self._raw += [local.clone()] if to_average else []
                    local.copy_(new)
                else:
                    self._raw += [tensor.data] if to_average else []
                    tensor.data = round_to(new, tensor.dtype).to(tensor.device)  # itself, if nothing has to change
        self.swapped = to_average
        self._reshard()

    @contextlib.contextmanager
    def showing(self, average: bool) -> Iterator[None]:
        """Let the module show the average, or its own weights, for a while."""
        before = self.swapped
        self.swap(average)
        try:
            yield
        finally:
            self.swap(before)

    @torch.no_grad()
    def state(self, shown: bool, saved: Collection[str], whole: bool = True) -> dict[str, dict[str, Tensor]]:
        """The module's own weights, and the average, as far as the module's state_dict does not tell them.

        Args:
            shown: whether the state_dict beside it will hold the average.
            saved: names in that state_dict.
            whole: gather shards, into the first process. It is left out by the other ones.
        """
        self.finish()
        raw: dict[str, Tensor] = {}
        average: dict[str, Tensor] = {}
        with self.showing(False):
            live = dict(zip(self.names, self._live(), strict=True))
            for name, tensor, mean in zip(self.names, self._live(), self._average, strict=True):
                if not is_sharded(tensor) and torch.equal(tensor.to(mean), mean):
                    continue
                if shown:  # a shard is swapped by copying, so a view of it would not stay what it is
                    raw[name] = tensor.detach().clone() if is_sharded(tensor) else tensor.detach()
                if not shown or tensor.dtype != mean.dtype or name not in saved:
                    average[name] = shard_like(tensor, mean.to(tensor.device)) if is_sharded(tensor) else mean
            if whole and self._sharded:
                raw, average = ({k: full_tensor(v) for k, v in part.items()} for part in (raw, average))
                if torch.distributed.get_rank():
                    raw, average = {}, {}
            if shown and not self._sharded:  # the state_dict tells the one half of an average of bf16 weights
                average = {k: _half(v, live[k].dtype) if k in saved else v for k, v in average.items()}
        return {"raw": raw, "average": average}

    @torch.no_grad()
    def restore(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take up what ``state`` gave, after the module was given the state_dict that was beside it.

        Raises:
            RuntimeError: if the state is that of another module.
        """
        if self.swapped:  # a tuner ran to the end of a fit within the fit, and then restored the module
            given = [to_local(tensor).clone() for tensor in self._live()]
            self.swap(False)
            for tensor, value in zip(self._live(), given, strict=True):
                to_local(tensor).copy_(value)
        self._share = self._arrival = None
        live: dict[str, Tensor] = dict(zip(self.names, self._live(), strict=True))
        averages = dict(zip(self.names, self._average, strict=True))
        for name in [*state["average"], *state["raw"]]:
            if name not in live:
                raise RuntimeError(f"The checkpoint has an average of {name!r}, and the module has no such weights.")
        for name, tensor in live.items():
            value = part_for(tensor, state["average"].get(name, tensor))
            averages[name].copy_(join(tensor, value.to(tensor.device)) if value.dtype == torch.int16 else value)
        for name, value in state["raw"].items():
            to_local(live[name]).copy_(part_for(live[name], value))
        self._reshard()

    def like_state(self, names: dict[str, list[str]]) -> dict[str, dict[str, Tensor]]:
        """Empty tensors in the form of ``state``, to be read into: of these names, sharded as the weights are."""
        live, averages = (dict(zip(self.names, tensors, strict=True)) for tensors in (self._live(), self._average))
        return {
            "raw": {name: torch.empty_like(live[name]) for name in names["raw"]},
            "average": {
                n: shard_like(live[n], torch.empty_like(averages[n], device=live[n].device)) for n in names["average"]
            },
        }

    def leave(self) -> None:
        """Remember some values of what the module shows now."""
        self._left = [_some_values(to_local(param.detach())) for param in self._params.values()]

    def is_as_left(self) -> bool:
        """Whether the module still shows them, or was given other weights."""
        now = [_some_values(to_local(param.detach())) for param in self._params.values()]
        return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(now, self._left, strict=True))

    def follow(self) -> None:
        """Move to the devices that the module has moved to."""
        self.finish()
        live = self._live()
        self._raw = [raw.to(tensor.device) for raw, tensor in zip(self._raw, live, strict=False)]
        for i, (average, tensor) in enumerate(zip(self._average, live, strict=True)):
            if average.device != tensor.device and not self._on_cpu:
                shown = self.swapped and average.dtype == tensor.dtype and not is_sharded(tensor)
                self._average[i] = tensor.data if shown else average.to(tensor.device)
        self._group()

    def _live(self) -> list[Any]:
        return [*self._params.values(), *(getattr(owner, name) for owner, name in self._buffers.values())]

    def _group(self) -> None:
        """Sort the tensors into lists of one device and type: one kernel updates each of them."""
        groups: dict[Any, list[int]] = {}
        self._imprecise = []
        for i, (tensor, average) in enumerate(zip(self._live(), self._average, strict=True)):
            if tensor.dtype == average.dtype:
                groups.setdefault((average.device, average.dtype), []).append(i)
            else:
                self._imprecise.append(i)
        self._groups = [(indices, [self._average[i] for i in indices]) for indices in groups.values()]

    def _reshard(self) -> None:
        """Drop the gathered weights that FSDP2 keeps for the next forward pass: they are those of before."""
        for module in self._module.modules():
            if hasattr(module, "reshard") and hasattr(module, "unshard"):
                module.reshard()  # type: ignore[operator]


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _precise(tensor: Tensor, on_cpu: bool) -> Tensor:
    """A copy in fp32, or in the tensor's own type if that is better."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return _on_cpu(tensor.detach(), dtype) if on_cpu else tensor.detach().to(dtype, copy=True)


def _half(average: Tensor, dtype: torch.dtype) -> Tensor:
    """The half that bf16 weights lack, if it is the average of such, and all of it otherwise."""
    halves = (average.dtype, dtype) == (torch.float32, torch.bfloat16) and bool(average.isfinite().all())
    return rest_of(average) if halves else average


def _on_cpu(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy there, in memory that a GPU can write to by itself if it comes from one."""
    return torch.empty_like(tensor, dtype=dtype, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def _some_values(tensor: Tensor, number: int = 16) -> Tensor:
    number = min(number, tensor.numel())
    stride = tensor.numel() // number if number else 1
    return tensor.as_strided((number,), (stride,)).cpu().clone()
