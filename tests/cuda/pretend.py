"""A pretended GPU for torch's CPU build, to walk the CUDA path where there is none.

CUDA tensors have a shape, a dtype, strides and a device but no data (FakeTensor); CPU tensors are real. To mix the two raises,
as on a GPU. What comes back from the GPU is zeros, `.item()` is 1, and a boolean mask keeps everything. The collectives of
several ranks are torch's "fake" backend: this process is rank 0, and the others hold what it holds.

Import this before torch: the stub (stub.cpp, built by g++ into the folder of temporary files) must be there first.
"""
import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")


def load_stub() -> None:
    """Build the stub for the torch that is installed, and load it."""
    folder = Path(importlib.util.find_spec("torch").origin).parent  # found, not imported
    source = Path(__file__).with_name("stub.cpp")
    version = (folder / "version.py").read_text() + source.read_text() + sysconfig.get_platform()
    library = Path(tempfile.gettempdir()) / f"pretended_cuda_{os.getuid()}_{hashlib.sha256(version.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        includes = [f"-I{folder}/include", f"-I{folder}/include/torch/csrc/api/include"]
        subprocess.run([COMPILER, "-shared", "-fPIC", "-O0", "-std=c++20", *includes, f"-L{folder}/lib", str(source),
                        "-o", str(part), "-lc10", "-ltorch_cpu"], check=True)
        os.replace(part, library)  # two processes may build at once
    for name in (folder / "lib" / "libc10.so", folder / "lib" / "libtorch_cpu.so", library):
        ctypes.CDLL(str(name), mode=ctypes.RTLD_GLOBAL)


assert "torch" not in sys.modules, "import pretend before torch"
load_stub()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.fsdp._fully_shard._fsdp_init as sharding  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch._subclasses.meta_utils import MetaConverter  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402
from transformers.utils import import_utils  # noqa: E402

aten = torch.ops.aten
GPU = torch.device("cuda", 0)


class Pretend(TorchDispatchMode):
    """While it is entered, CUDA tensors are pretended. `waits` counts the lines that wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own dispatch comes back here with the local tensors
        device = kwargs.get("device")
        uploads = device is not None and torch.device(device).type == "cuda"
        if not uploads and not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is aten._to_copy.default and not isinstance(args[0], FakeTensor):
            x, dtype = args[0], kwargs.get("dtype") or args[0].dtype  # an upload; FakeTensorMode would keep weak references
            with self.fake:
                return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=GPU)
        if func is aten._local_scalar_dense.default:
            self.wait()
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self.wait()
            return args[0].zero_()
        if func is aten.copy_.default and not isinstance(args[1], FakeTensor):
            assert torch.broadcast_shapes(args[0].shape, args[1].shape) == args[0].shape
            return args[0]  # an upload
        if func is aten.nonzero.default:
            self.wait()
            return self.indices(args[0].numel(), args[0].ndim)
        if func is aten.bincount.default:
            self.wait()
            return self.indices(args[0].numel())
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], [self.unmasked(x) for x in args[1]], *args[2:])
        with self.fake:
            out = func(*args, **kwargs)
        return tree_map_only(FakeTensor, self.downloaded, out)

    def unmasked(self, index: Tensor | None) -> Tensor | None:
        """How many entries a mask keeps is known on the GPU alone, so it keeps all."""
        if index is None or index.dtype != torch.bool:
            return index
        self.wait()
        return self.indices(index.numel())

    def indices(self, *shape: int) -> Tensor:
        with self.fake:
            return torch.empty(shape, dtype=torch.long, device=GPU)

    def downloaded(self, x: FakeTensor) -> Tensor:
        if x.device.type == "cuda":
            return x
        self.wait()
        return torch.zeros(x.shape, dtype=x.dtype)

    def wait(self) -> None:
        frame = sys._getframe(1)
        while frame and (str(ROOT) not in frame.f_code.co_filename or ".venv" in frame.f_code.co_filename
                         or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        place = f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}" if frame else "a library"
        self.waits[place] += 1


class Idle:
    """A stream or an event."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name: str):
        return lambda *_, **__: self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Idle)

    __hash__ = object.__hash__


def become(tensor: Tensor, other: Tensor) -> None:
    """In place of `tensor.data = other`: a real tensor with pretended data would not be a FakeTensor."""
    if isinstance(tensor, nn.Parameter):
        other = nn.Parameter(other, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, other)


def swapping(swap):
    """torch.utils.swap_tensors, which refuses tensors that FakeTensorMode has weak references to: let go of those first."""
    def swapped(a: Tensor, b: Tensor) -> None:
        for x in (a, b):
            if isinstance(x, FakeTensor):
                x.fake_mode.fake_tensor_converter.meta_converter = MetaConverter(copy_data=False)
        swap(a, b)

    return swapped


@torch.no_grad()
def move(params: list[nn.Parameter], buffers: list[Tensor], device: torch.device) -> None:
    """In place of FSDP's _move_states_to_device."""
    for tensor in (*params, *buffers):
        if tensor.device not in (device, torch.device("meta")):
            become(tensor, tensor.to(device))


@torch.no_grad()
def apply(module: nn.Module, fn, recurse: bool = True) -> nn.Module:
    """In place of nn.Module._apply, which is behind module.to(device) and others."""
    for child in module.children() if recurse else ():
        apply(child, fn)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        new = fn(parameter)
        if parameter.is_meta:  # cannot become another device's: torch makes a new one too, and unties it
            module._parameters[name] = nn.Parameter(new, parameter.requires_grad)
        elif new is not parameter:
            become(parameter, new)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else fn(buffer)
    return module


def install(gib: float = 80.0) -> None:
    """Make torch.cuda one card of `gib` GiB."""
    free = int(gib * 2**30)
    properties = type("Properties", (), {"name": "pretended", "total_memory": free, "major": 9, "minor": 0,
                                         "multi_processor_count": 132})()
    pretended = {
        "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": lambda: None, "device_count": lambda: 8,
        "current_device": lambda: 0, "set_device": lambda device: None, "synchronize": lambda *_: None,
        "empty_cache": lambda: None, "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda *_: None,
        "Stream": Idle, "Event": Idle, "current_stream": Idle, "default_stream": Idle, "stream": Idle,
        "device_of": lambda tensor: contextlib.nullcontext(), "device": lambda device: contextlib.nullcontext(),
        "is_bf16_supported": lambda *_: True, "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "pretended", "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (free, free), "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0, "max_memory_reserved": lambda *_: 0, "reset_peak_memory_stats": lambda *_: None,
    }
    for name, value in pretended.items():
        setattr(torch.cuda, name, value)
    FakeTensorMode.avoid_device_init = property(lambda mode: True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is made on the CPU first
    nn.Module._apply = apply
    import_utils.is_fake_tensor = lambda x: False  # else transformers takes the ways it has for tracing a graph
    torch.utils.swap_tensors = swapping(torch.utils.swap_tensors)
    sharding._move_states_to_device = move


def group_of(world: int):
    """An init_process_group of `world` ranks of which this is the first. One rank keeps a real gloo for the CPU."""
    real = dist.init_process_group

    def init(*_, **__) -> None:
        if world == 1:
            real("cpu:gloo,cuda:fake", store=dist.HashStore(), rank=0, world_size=1)
        else:
            real("fake", store=FakeStore(), rank=0, world_size=world)

    return init
