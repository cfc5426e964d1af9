"""A simulated second device: torch treats it as one, but its tensors lie in the CPU's memory and are computed there.

It refuses what a GPU refuses (operands on two devices, numpy() without cpu()) and counts what makes the host wait for a
GPU: results whose size depends on values, numbers read, and copies that block. So a program that gives the same numbers
on it as on the CPU keeps its tensors in their places, whatever the machine. What it cannot show: speed, a GPU's own
rounding, its random numbers and its lower precisions."""
from collections import Counter

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "simulated"
waits = Counter()  # by operation
# What autocast does on CUDA: products in the lower precision, what sums or may overflow in float32.
LOWER = "linear matmul mm bmm addmm baddbmm addmv mv scaled_dot_product_attention".split()
FULL = ("pow exp expm1 log log10 log1p log2 norm layer_norm softmax log_softmax sum prod cumsum cumprod "
        "cosine_similarity mse_loss l1_loss nll_loss binary_cross_entropy_with_logits reciprocal rsqrt logsumexp "
        "linalg_vector_norm").split()
VALUES_DECIDE = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
                 "unique_consecutive", "unique_dim_consecutive", "bincount", "repeat_interleave", "is_nonzero"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"copy_", "_to_copy"}


class OnDevice(torch.Tensor):
    "A tensor on the device; `raw` is the same in the CPU's memory."
    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=f"{NAME}:0")

    def __init__(self, raw): self.raw = raw

    def tolist(self): return self.cpu().tolist()
    def untyped_storage(self): return self.raw.untyped_storage()  # who asks wants to know which tensors share one

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None): return _run(op, args, kwargs or {})


def _waits(name, args, kwargs, tensors):
    "Whether the host must wait for all that the device has been given."
    if name in COPIES:
        to_device, going_on = (isinstance(args[0], OnDevice) and kwargs.get("device", NAME) == NAME,
                               kwargs.get("non_blocking") or args[2:3] == (True,))
        crosses = (len({isinstance(o, OnDevice) for o in tensors}) == 2
                   or name == "_to_copy" and torch.device(kwargs.get("device") or NAME).type != NAME)
        return crosses and not (to_device and going_on)
    return (name in VALUES_DECIDE
            or name in INDEXING
               and any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]))


def _run(op, args, kwargs):
    "Compute on the CPU, as the device would be asked to."
    name = op._schema.name.removeprefix("aten::")
    if name == "_fused_sdp_choice": return 0  # attention in its plain form
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [o for o in leaves if isinstance(o, torch.Tensor)]
    if name not in COPIES and any(not isinstance(o, OnDevice) and o.dim() for o in tensors):
        raise RuntimeError(f"{op}: operands on {NAME} and on the CPU")
    if _waits(name, args, kwargs, tensors): waits[name] += 1
    raw = [o.raw if isinstance(o, OnDevice) else torch.device("cpu") if isinstance(o, torch.device) else o
           for o in leaves]
    args, kwargs = tree_unflatten(raw, spec)
    out = op(*args, **kwargs)
    leaves = dict(zip(map(id, raw), leaves))
    if any(isinstance(o, OnDevice) and o.shape != o.raw.shape for o in leaves.values()):
        raise NotImplementedError(f"{op} changes the shape of what it writes to")
    if name == "_to_copy" and any(isinstance(o, torch.device) and o.type != NAME for o in leaves.values()): return out
    return tree_map(
        lambda o: leaves[id(o)] if id(o) in leaves else OnDevice(o) if isinstance(o, torch.Tensor) else o, out)


class _Module(_DummyBackendModule):
    "What torch asks of a device's module; its random numbers are the CPU's."
    def get_amp_supported_dtype(self): return [torch.bfloat16]
    def get_rng_state(self, device=None): return torch.get_rng_state()
    def set_rng_state(self, state, device=None): torch.set_rng_state(state)


def _autocast(library):
    "Register what CUDA's autocast does for the device's."
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    def register(op, dtype):
        def cast(o):
            return (o.to(dtype or torch.get_autocast_dtype(NAME))
                    if isinstance(o, OnDevice) and o.is_floating_point() else o)
        def run(*args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(key): return op(*tree_map(cast, args), **tree_map(cast, kwargs))
        library.impl(op._name, run, "AutocastPrivateUse1")
    for names, dtype in ((LOWER, None), (FULL, torch.float32)):
        for packet in (getattr(torch.ops.aten, name) for name in names):
            for overload in packet.overloads():
                if "out" not in overload and "Dimname" not in str(getattr(packet, overload)._schema):
                    register(getattr(packet, overload), dtype)
    others = _autocast.library = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


def install():
    "Make torch know the device, for the rest of this process."
    _setup_privateuseone_for_python_backend(NAME, _Module())
    library = install.library = torch.library.Library("aten", "IMPL")
    def register(op):
        def create(*args, **kwargs):
            return OnDevice(op(*args, **{k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}))
        library.impl(op._name, create, "PrivateUse1")
    def copy(source, target, non_blocking=False):  # what torch.tensor(..., device=) does
        waits["copy_"] += not non_blocking
        target.raw.copy_(source)
        return target
    library.impl("_copy_from", copy, "PrivateUse1")
    for op in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.arange.default,
               torch.ops.aten.arange.start, torch.ops.aten.arange.start_step, torch.ops.aten.eye.default,
               torch.ops.aten.eye.m):
        register(op)
    _autocast(library)
