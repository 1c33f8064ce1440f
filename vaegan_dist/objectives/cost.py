"""What a step costs, network by network: floating point operations, and memory that waits for the backward pass."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vaegan_dist.objectives.flops import flops_of

OUTSIDE = "losses"  # what no network computes: losses, boundaries, alterations of pictures


class CostMeter(TorchDispatchMode):
    """Counts while it is entered; an operation belongs to the network whose layer computes it, forward or backward.

    A backward operation is told by the node of the graph that runs it, and that by the number which the forward
    operation gave it. Works on the `meta` device, where nothing is computed.

    Attributes:
        flops: operations of each network; a multiply-add counts as two, as in torch's counter.
        saved: bytes of each network that were kept for the backward pass when the sum over all was largest; views of
            one storage count once, parameters not at all.
    """

    def __init__(self, networks: nn.ModuleDict) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.networks = networks
        self.flops: Counter[str] = Counter()
        self.saved: Counter[str] = Counter()
        self._inside: list[str] = []
        self._owners: dict[int, str] = {}
        self._live: Counter[str] = Counter()
        self._kept: Counter[int] = Counter()
        self._parameters = {_storage(parameter) for parameter in networks.parameters()}

    @contextmanager
    def watch(self) -> Iterator["CostMeter"]:
        """Measure a step: forward and backward."""
        hooks = [hook for name, network in self.networks.items() for hook in self._hook(name, network)]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor), self:
                yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str, network: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for module in network.modules():
            if module is network:
                continue  # networks are entered by their methods; their layers are called as modules
            yield module.register_forward_pre_hook(lambda *_: self._inside.append(name))
            yield module.register_forward_hook(self._leave, always_call=True)

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def _owner(self) -> str:
        node: Any = torch._C._current_autograd_node()  # None in a forward pass
        if node is not None:
            return self._owners.get(node._sequence_nr(), OUTSIDE)
        return self._inside[-1] if self._inside else OUTSIDE

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        owner = self._owner()
        # The node of this operation, if it has one, was made just before; nodes made while one runs count as its own.
        self._owners.setdefault(torch._C._autograd._get_sequence_nr() - 1, owner)
        result = func(*args, **(kwargs or {}))
        self.flops[owner] += flops_of(func, args, kwargs or {}, result)
        return result

    def _pack(self, tensor: Tensor) -> "_Held":
        return _Held(tensor, self._owner(), self._keep, self._release)

    def _keep(self, tensor: Tensor, owner: str) -> int:
        """Bytes that this tensor adds to what is kept."""
        key = _storage(tensor)
        if key in self._parameters:
            return 0
        self._kept[key] += 1
        size = tensor.untyped_storage().nbytes() if self._kept[key] == 1 else 0
        self._live[owner] += size
        if self._live.total() > self.saved.total():
            self.saved = self._live.copy()
        return size

    def _release(self, tensor: Tensor, owner: str, size: int) -> None:
        key = _storage(tensor)
        if key not in self._parameters:
            self._kept[key] -= 1
        # Its first keeper answers for a storage; one that outlives it is not worth the bookkeeping.
        self._live[owner] -= size


class _Held:
    """A tensor that waits for the backward pass, and tells when the graph lets go of it."""

    def __init__(
        self,
        tensor: Tensor,
        owner: str,
        keep: Callable[[Tensor, str], int],
        release: Callable[[Tensor, str, int], None],
    ) -> None:
        self.tensor, self.owner, self.release = tensor, owner, release
        self.size = keep(tensor, owner)

    def __del__(self) -> None:
        self.release(self.tensor, self.owner, self.size)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
