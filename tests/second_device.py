"""
A second device for tests on machines that have none: tensors that live on it are computed on the CPU, but mixing them with
tensors of the CPU is an error, as on a GPU.

Importing this module registers the device, `second:0`, with torch for the whole process.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


_setup_privateuseone_for_python_backend("second")
# Moved modules keep their parameters' identity, and with it tied weights.
torch.__future__.set_swap_module_params_on_conversion(True)
SECOND = torch.device("second:0")
aten = torch.ops.aten
# The operators that take tensors of two devices, on a GPU as well: copies, and indices on the CPU.
MIXING = {aten._to_copy, aten.copy_, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class OnSecond(torch.Tensor):
    """A tensor on the second device, whose numbers are in `held`, a tensor on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=SECOND,
        )

    def __init__(self, held: torch.Tensor):
        self.held = held

    def __repr__(self):
        return f"OnSecond({self.held!r})"

    def tolist(self):
        """torch refuses it for subclasses."""
        return self.held.tolist()

    def numpy(self, **options):
        """Refused, as on a GPU."""
        raise TypeError(f"cannot convert a tensor on {SECOND} to numpy; copy it to the CPU first")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def is_second(device) -> bool:
    return device is not None and torch.device(device).type == SECOND.type


def compute(function, args, kwargs):
    """Run an operator on what its tensors hold; the result is on the second device if they are or if it says so."""
    flat, structure = tree_flatten((args, kwargs))
    ours = [item for item in flat if isinstance(item, OnSecond)]
    others = [item for item in flat if isinstance(item, torch.Tensor) and not isinstance(item, OnSecond) and item.dim()]
    if ours and others and function.overloadpacket not in MIXING:
        shapes = [tuple(item.shape) for item in others]
        raise RuntimeError(f"{function} got tensors on {SECOND} and tensors on the CPU, of shape {shapes}")
    device = kwargs.get("device")
    on_second = is_second(device) if device is not None else bool(ours)
    known = {id(item.held): item for item in ours}
    held = [item.held if isinstance(item, OnSecond) else item for item in flat]
    args, kwargs = tree_unflatten(held, structure)
    if is_second(device):
        kwargs = {**kwargs, "device": "cpu"}
    result = function(*args, **kwargs)

    def placed(item):
        if not isinstance(item, torch.Tensor) or isinstance(item, OnSecond):
            return item
        if id(item) in known:  # changed in place
            return known[id(item)]
        return OnSecond(item) if on_second else item.clone() if any(item is one for one in held) else item

    return tree_map(placed, result)


class _Factories(TorchDispatchMode):
    """Lets factories make tensors on the second device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_second(kwargs.get("device")) or any(issubclass(kind, OnSecond) for kind in types):
            return compute(function, args, kwargs)
        return function(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """The few functions of torch that never reach the dispatcher, or ask for a kernel of the device's own."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and is_second(kwargs.get("device")):
            return function(*args, **{**kwargs, "device": "cpu"}).to(SECOND)
        if function is torch.Tensor.new_tensor and isinstance(args[0], OnSecond):
            return args[0].held.new_tensor(*args[1:], **kwargs).to(SECOND)
        if function is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], OnSecond):
            return attention(*args, **kwargs)
        return function(*args, **kwargs)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """`scaled_dot_product_attention` by its definition."""
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    # A row that sees nothing attends to nothing, as in torch's own.
    return scores.softmax(-1).nan_to_num() @ value


@contextmanager
def second_device():
    """Makes the second device usable."""
    with _Factories(), _Functions():
        yield SECOND
