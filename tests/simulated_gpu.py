"""Runs a script on a device that is none: its tensors claim to be on `gpu` and are computed on the CPU.

    python tests/simulated_gpu.py model_code.py --device gpu --variant taste ...

What a GPU refuses, this refuses too: an operation on tensors of both devices, `.numpy()` of a tensor that was not moved
back, indices on the device for a tensor that is not. What a GPU allows is allowed: single numbers of the CPU, indices
of the CPU, copies. Not simulated: other arithmetic, CUDA's streams and memory, autocast (of known devices only).

It stands on PyTorch's wrapper subclasses and its Python backend (torch/utils/backend_registration.py, experimental),
which cannot be taken back: a process that has imported this module is spoiled for other tests.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[1]
aten = torch.ops.aten
_INDEXING = (aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_)
_MIXES = (aten._to_copy, aten.copy_, *_INDEXING)


class _Backend(backend_registration._DummyBackendModule):
    """What PyTorch asks a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: object = None) -> None:
        pass


backend_registration._setup_privateuseone_for_python_backend("gpu", _Backend())
DEVICE = torch.device("gpu:0")


class GpuTensor(torch.Tensor):
    """A tensor of the CPU that claims to be on the device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "GpuTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"GpuTensor({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert gpu:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        made: torch.Tensor = GpuTensor(self.inner.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        return _compute(func, args, kwargs or {})


class SimulatedGpu(TorchDispatchMode):
    """Within it, in this thread, `device="gpu"` works."""

    def __enter__(self) -> "SimulatedGpu":
        torch._C._set_only_lift_cpu_tensors(True)  # or torch.tensor(..., device="gpu") would pass by this mode
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Sequence, kwargs: Mapping) -> Any:
    """Run one operation on the CPU, after checking where its tensors claim to be."""
    kwargs = dict(kwargs)
    packet = func._overloadpacket
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
    _check_devices(func, args, tensors, there)
    if packet is aten._fused_sdp_choice:
        return 0  # the plain one, which is made of operations that all devices have
    goes_there = bool(there) and not (packet is aten.copy_ and not isinstance(args[0], GpuTensor))
    if kwargs.get("device") is not None:
        goes_there = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs["device"] = torch.device("cpu")
    if "pin_memory" in kwargs:
        kwargs["pin_memory"] = False
    inner_args, inner_kwargs = tree_map(
        lambda leaf: leaf.inner if isinstance(leaf, GpuTensor) else leaf, (tuple(args), kwargs)
    )
    result = func(*inner_args, **inner_kwargs)
    written = _written(func, args, kwargs)
    if written is not None:
        if torch.Tag.inplace_view in func.tags and isinstance(written, GpuTensor):
            with no_dispatch():
                func(*args, **kwargs)  # shape and strides of what claims to be there
        return written
    if not goes_there:
        return result
    return tree_map(lambda leaf: GpuTensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)


def _check_devices(func: Any, args: Sequence, tensors: Sequence[torch.Tensor], there: Sequence[GpuTensor]) -> None:
    """Raise what a GPU would raise.

    Raises:
        RuntimeError: tensors of both devices meet.
    """
    here = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor) and tensor.dim() > 0]
    packet = func._overloadpacket
    if there and here and packet not in _MIXES:
        shapes = [[list(tensor.shape) for tensor in group] for group in (there, here)]
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {func} got {shapes[0]} on gpu, {shapes[1]} on cpu"
        )
    if packet in _INDEXING:
        is_there = isinstance(args[0], GpuTensor)
        if not is_there and any(isinstance(index, GpuTensor) for index in args[1]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if len(args) > 2 and args[2].dim() > 0 and isinstance(args[2], GpuTensor) != is_there:
            raise RuntimeError(f"{func}: expected the values on the device of the tensor they are put into")


def _written(func: Any, args: Sequence, kwargs: Mapping) -> Any:
    """The argument that an in-place operation returns; None where it returns something new."""
    returned = func._schema.returns
    if len(returned) != 1 or returned[0].alias_info is None or not returned[0].alias_info.is_write:
        return None
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return kwargs[argument.name] if argument.name in kwargs else args[place]
    raise AssertionError(f"{func} writes to nothing")


def _in_every_thread(submit: Callable) -> Callable:
    """`ThreadPoolExecutor.submit` whose work sees the device too: a mode is its thread's own."""

    def inside(self: ThreadPoolExecutor, work: Callable, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            with SimulatedGpu():
                return work(*args, **kwargs)

        return submit(self, run)

    return inside


def main(argv: Sequence[str]) -> int:
    """Run a script's `main` on the device; returns its exit code."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "gpu"
    # wrapper subclasses do not work in inference mode
    torch.inference_mode = lambda mode=True: torch.no_grad()  # type: ignore[assignment,misc]
    ThreadPoolExecutor.submit = _in_every_thread(ThreadPoolExecutor.submit)  # type: ignore[method-assign]
    script, *flags = argv
    sys.argv = [script, *flags]
    sys.path[:0] = [str(ROOT), str(ROOT / "CosyVoice"), str(Path(script).resolve().parent)]
    spec = importlib.util.spec_from_file_location("script_on_gpu", script)
    assert spec is not None and spec.loader is not None, f"{script} is no Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    with SimulatedGpu():
        return module.main(flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
