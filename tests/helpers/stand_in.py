"""A GPU that is not there: tensors that say `cuda`, and whose values lie in memory all the same.

An operator on tensors of two devices is refused as on a GPU, random numbers come from a stream of
the device's own, what the host waits for is counted, and a CUDA graph does its operations again on
the memory of its recording. Programs run with their values, forwards and backwards. What is not
shown: kernels and their speed, Inductor's code (records are interpreted), pinned memory, and order
between streams. Private names are those of torch 2.11 to 2.14.
"""

from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch._dynamo  # it takes stock of torch's functions, which have to be torch's own
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

import pyrovae.compiling.graph

# What a program reads of torch is taken for fixed where it is compiled, and this stands for torch.
__name__ = "torch.stand_in"

ATEN = torch.ops.aten
DEVICE = torch.device("cuda", 0)
COPIES = {ATEN._to_copy, ATEN.copy_}
INDEXED = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}
STREAM = torch.Generator()
INNER = WeakIdKeyDictionary()
# How often the host waited for a value or a copy.
READS: Counter = Counter()
_recordings: list = []
_faking: list = []


class Away(torch.Tensor):
    """A tensor of the device; `inner` holds its values."""

    # C++ sees the meta device, whose backward passes need no driver.
    @staticmethod
    def __new__(cls, inner):
        with torch._C._DisableTorchDispatch():
            how = {"dtype": inner.dtype, "device": "meta"}
            meta = torch.empty_strided(inner.shape, inner.stride(), **how)
        return torch.Tensor._make_subclass(cls, meta, False)

    def __init__(self, inner):
        INNER[self] = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    inner = property(lambda self: INNER[self])
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, data, *, dtype=None, device=DEVICE):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device)

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __repr__(self):
        return f"Away({self.inner!r})"

    def __reduce_ex__(self, protocol):
        return self.detach().cpu().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = made = Away(self.inner.clone()).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                made._is_param = True
        return memo[id(self)]


def _is_away(device):
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _run(func, args, kwargs):
    """An operator on what its tensors hold; its results lie where they would."""
    packet, tensors = func.overloadpacket, [
        leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
    ]  # fmt: skip
    away = [each for each in tensors if isinstance(each, Away)]
    here = [each for each in tensors if not isinstance(each, Away)]
    if packet in INDEXED and isinstance(args[0], Away):
        here = [each for each in here if not any(each is index for index in args[1])]
    if away and packet not in COPIES and any(each.dim() for each in here):
        raise RuntimeError(f"Expected all tensors to be on the same device, got {func} of two")
    device = kwargs.get("device")
    there = bool(away) if device is None else _is_away(device)
    there = isinstance(args[0], Away) if packet is ATEN.copy_ else there
    waits = packet is ATEN._local_scalar_dense or (packet is ATEN._to_copy and away and not there)
    if waits:
        READS[str(packet)] += 1
        there = False
        if _recordings:
            raise RuntimeError("operation not permitted when stream is capturing")
    inner, how = tree_map(
        lambda leaf: leaf.inner if isinstance(leaf, Away) else leaf, (args, kwargs)
    )
    if _is_away(device):
        how = how | {"device": torch.device("cpu")}
    drawn = torch.Tag.nondeterministic_seeded in func.tags and there and not how.get("generator")
    with _streamed() if drawn else nullcontext():
        result = func(*inner, **how)
    if packet is ATEN._to_copy and result.data_ptr() == inner[0].data_ptr():
        result = result.clone()
    known = {id(each.inner): each for each in away}

    def placed(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else Away(leaf)

    found = tree_map(placed, result) if there else result
    for recording in _recordings:
        recording.done.append((func, args, kwargs, found))
    return found


@contextmanager
def _streamed():
    """Let the device's stream stand in for the CPU's."""
    before = torch.get_rng_state()
    torch.set_rng_state(STREAM.get_state())
    try:
        yield
    finally:
        STREAM.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


class _Mode(TorchDispatchMode):
    """Makes tensors of the device, below make_fx's mode, where torch's fake tensors have theirs."""

    shape_env, static_shapes = None, True

    def __init__(self):
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE

    @classmethod
    def is_infra_mode(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Where torch works out shapes, its meta tensors are none of ours.
        return func(*args, **(kwargs or {})) if _faking else _run(func, args, kwargs or {})


class _Recording:
    """A CUDA graph."""

    def __init__(self):
        self.done = []

    def replay(self):
        for func, args, kwargs, found in self.done:
            again = _run(func, args, kwargs)
            for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(old, Away) and not _in_one_place(old, new):
                    old.inner.copy_(new.inner)


def _in_one_place(old, new):
    return old.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()


@contextmanager
def _recorded(recording, **options):
    _recordings.append(recording)
    try:
        yield
    finally:
        _recordings.pop()


def _faked(self, *args, _dispatch=FakeTensorMode.dispatch, **kwargs):
    _faking.append(self)
    try:
        return _dispatch(self, *args, **kwargs)
    finally:
        _faking.pop()


def _tensor(data, *, device=None, requires_grad=False, _made=torch.tensor, **how):
    if not _is_away(device):
        return _made(data, device=device, requires_grad=requires_grad, **how)
    with torch._C._DisableTorchDispatch():
        inner = _made(data, **how)
    return ATEN.lift_fresh(Away(inner)).requires_grad_(requires_grad)


def _empty(*args, pin_memory=False, _made=torch.empty, **how):
    return _made(*args, **how)


def _nothing(*args, **kwargs):
    return None


CUDA = {
    **dict.fromkeys(("_lazy_init", "set_device", "synchronize", "set_stream"), _nothing),
    **dict.fromkeys(("device", "stream"), nullcontext),
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "is_current_stream_capturing": lambda: bool(_recordings),
    "current_device": lambda: 0,
    "get_device_properties": lambda device=None: SimpleNamespace(total_memory=2**33),
    "manual_seed": lambda seed: _nothing(STREAM.manual_seed(seed)),
    "get_rng_state": lambda device=None: STREAM.get_state(),
    "set_rng_state": lambda state, device=None: _nothing(STREAM.set_state(state)),
    "current_stream": lambda device=None: SimpleNamespace(wait_stream=_nothing),
    "Stream": lambda: SimpleNamespace(wait_stream=_nothing),
    "CUDAGraph": _Recording,
    "graph": _recorded,
}


@contextmanager
def stand_in():
    """Run a block with a GPU, and give the counts of what the host waited for."""
    READS.clear()
    # Else torch asks for a driver where it looks at the device of an index.
    torch._C._ensureCUDADeviceGuardSet()
    convert = torch.__future__.get_overwrite_module_params_on_conversion()
    graph = pyrovae.compiling.graph
    patches = [
        *(patch.object(torch.cuda, name, value) for name, value in CUDA.items()),
        patch.object(torch, "tensor", _tensor),
        patch.object(torch, "empty", _empty),
        patch.object(graph, "compiled", lambda record, inputs: lambda *args: [*record(*args)]),
        patch.object(FakeTensorMode, "dispatch", _faked),
        patch.object(fake_tensor, "init_gpu_context", _nothing, create=True),
        patch.object(proxy_tensor, "HANDLED_TYPES", (*proxy_tensor.HANDLED_TYPES, Away)),
    ]
    for each in patches:
        each.start()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with torch.autograd.set_multithreading_enabled(False), _Mode():
            yield READS
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(convert)
        for each in patches:
            each.stop()
