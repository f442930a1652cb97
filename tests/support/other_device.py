"""Tensors that report another device than the CPU, for tests without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class OtherDeviceTensor(Tensor):
    """Computes on the CPU and reports the device "meta"; only a copy to the CPU leaves it.

    Pickling it raises an error, as unpickling a CUDA tensor does on a machine without a GPU.
    """

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OtherDeviceTensor:
        options: dict[str, Any] = {"dtype": values.dtype, "strides": values.stride()}
        self = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, values.shape, device=torch.device("meta"), requires_grad=False, **options
        )
        self.on_cpu = values
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = str(kwargs.pop("device", "meta")) == "cpu"
        args, kwargs = tree_map_only(OtherDeviceTensor, lambda x: x.on_cpu, (args, kwargs))
        out = func(*args, **kwargs)
        return out if leaves else tree_map_only(Tensor, OtherDeviceTensor, out)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a tensor of another device was pickled")


def to_other_device(module: nn.Module) -> None:
    """Move the parameters and buffers of a module to the other device, in place."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            moved = nn.Parameter(OtherDeviceTensor(parameter.detach()))
            part.register_parameter(name, moved)
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, OtherDeviceTensor(buffer))
    assert {p.device.type for p in module.parameters()} == {"meta"}
