"""Torch functions: one name for each, the kinds that they belong to, and a base that meets each call.

A function has many spellings: ``x + y``, ``x += y``, ``x.add_(y)`` and ``torch.add(x, y)`` are all ``"add"``
here. This is the only file that lists names of functions; everything else asks for a kind.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Second names of the same function, after the underscores of operators and in-place functions are gone.
_ALIASES = {
    "iadd": "add", "radd": "add", "isub": "sub", "subtract": "sub", "imul": "mul", "rmul": "mul",
    "multiply": "mul", "itruediv": "div", "idiv": "div", "truediv": "div", "true_divide": "div",
    "divide": "div", "rmatmul": "matmul", "imatmul": "matmul", "ipow": "pow", "concat": "cat",
    "concatenate": "cat", "moveaxis": "movedim", "swapaxes": "transpose", "swapdims": "transpose",
    "clip": "clamp", "log_sigmoid": "logsigmoid", "upsample": "interpolate",
}  # fmt: skip
# The operators that write to their left side; other names that begin with "__i" (__int__, __invert__) do not.
_WRITING_OPERATORS = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "pow", "matmul")} | {
    f"__i{name}__" for name in ("and", "or", "xor", "mod", "floordiv", "lshift", "rshift")
}


def name_of(function: Callable[..., Any]) -> str:
    """The one name of a torch function: out of place, without underscores, whatever its spelling.

    Args:
        function: a function, method or operator as ``__torch_function__`` gets it. The getter of a property
            such as ``tensor.mT`` bears the name of the property.

    Returns:
        Its name, such as ``"add"`` for ``Tensor.__iadd__`` and ``Tensor.add_``.
    """
    called: str = getattr(function, "__name__", str(function))
    if called == "__get__":
        called = getattr(getattr(function, "__self__", None), "__name__", called)
    bare = called.strip("_")
    return _ALIASES.get(bare, bare)


def is_in_place(function: Callable[..., Any]) -> bool:
    """Whether a function writes to its first argument, as its spelling says: ``add_`` and ``__iadd__``."""
    called: str = getattr(function, "__name__", "")
    return called in _WRITING_OPERATORS or (called.endswith("_") and not called.endswith("__"))


def out_of_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of the same name that returns a new tensor; ``function`` itself if there is none."""
    name = name_of(function)
    found: Callable[..., Any] = getattr(torch, name, getattr(F, name, function))
    return found


def _in_each_dimension(*stems: str) -> frozenset[str]:
    """Names such as ``conv1d``, ``conv2d`` and ``conv3d``."""
    return frozenset(f"{stem}{d}d" for stem in stems for d in (1, 2, 3))


# Kinds -------------------------------------------------------------------------------------------------------

#: ReLUs, which pass a positive gradient or none.
RELUS = frozenset({"relu", "relu6", "hardtanh"})
# Activation functions that turn zero into zero.
_KEEP_ZERO = RELUS | {
    "celu", "elu", "gelu", "hardshrink", "hardswish", "leaky_relu", "mish", "prelu", "selu", "silu",
    "softshrink", "softsign", "tanh", "tanhshrink",
}  # fmt: skip
#: Element-wise activation functions: each entry of the result depends on the same entry of the input alone.
ACTIVATIONS = _KEEP_ZERO | {"hardsigmoid", "logsigmoid", "sigmoid", "softplus", "threshold"}

CONVOLUTIONS = _in_each_dimension("conv")
#: Functions that are linear in their input and have a weight.
LINEAR = CONVOLUTIONS | {"linear"}
_TRANSPOSED_CONVOLUTIONS = _in_each_dimension("conv_transpose")
#: Functions that may add a bias to each channel.
WITH_BIAS = LINEAR | _TRANSPOSED_CONVOLUTIONS
_NORMALISATIONS = frozenset({"batch_norm", "group_norm", "instance_norm"})

_AVERAGE_WINDOWS = _in_each_dimension("avg_pool", "adaptive_avg_pool")
#: Functions that return the largest entry of each window.
MAX_WINDOWS = _in_each_dimension("max_pool", "adaptive_max_pool")
AVERAGE_POOLINGS = _AVERAGE_WINDOWS | {"mean"}
MAX_POOLINGS = MAX_WINDOWS | {"amax"}
POOLINGS = AVERAGE_POOLINGS | MAX_POOLINGS
RESIZES = frozenset({"interpolate"})

#: Functions that change the shape only.
RESHAPES = frozenset({
    "contiguous", "flatten", "movedim", "mT", "permute", "reshape", "squeeze", "t", "T", "transpose",
    "unflatten", "unsqueeze", "view",
})  # fmt: skip
#: Functions that return a part of their input, or several parts.
PICKS = frozenset({"chunk", "getitem", "index_select", "narrow", "select", "split", "tensor_split", "unbind"})
JOINS = frozenset({"cat", "stack"})
#: Functions that move, drop or repeat entries and change none of them.
MOVES = RESHAPES | PICKS | JOINS | {"clone", "expand", "flip", "repeat", "roll"}

SUMS = frozenset({"add"})
SCALINGS = frozenset({"div", "mul"})
#: Products of two activations.
PRODUCTS = frozenset({"bmm", "einsum", "matmul"})
ATTENTION = frozenset({"multi_head_attention_forward", "scaled_dot_product_attention"})
# Each is the identity in evaluation mode.
_DROPOUTS = _in_each_dimension("dropout") | {"alpha_dropout", "dropout", "feature_dropout"}
_CASTS = frozenset({"bfloat16", "double", "float", "half", "to"})

#: Functions that take (N, C, *spatial) and return it, whatever the sizes are.
CHANNELS_FIRST = (
    CONVOLUTIONS | _TRANSPOSED_CONVOLUTIONS | _NORMALISATIONS | _AVERAGE_WINDOWS | MAX_WINDOWS | RESIZES
) | {"pixel_shuffle"}
#: Functions that leave every dimension where it is.
KEEP_DIMENSIONS = ACTIVATIONS | SUMS | SCALINGS | {"cat", "clone", "contiguous", "dropout", "pad", "sub"}

# Relevance propagation: functions whose relevance is their gradient's, and functions that it passes unchanged.
KEEP_RELEVANCE = MOVES | _DROPOUTS | _CASTS | MAX_POOLINGS
PASS_RELEVANCE = _KEEP_ZERO | {"batch_norm"}


# Calls -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of a torch function.

    Attributes:
        name: the one name of the function, as :func:`name_of` returns it.
        function: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, *args: Any) -> Any:
        """Calls the function with ``args`` in the place of its first positional arguments."""
        return self.function(*args, *self.args[len(args) :], **self.kwargs)


class FunctionMode(TorchFunctionMode):
    """A context in which :meth:`meet` is called in the place of each torch function.

    It needs no change of the model: a module's functions and those in the model's own code are met alike.
    """

    def meet(self, call: Call) -> Any:
        """The result of a call; ``call.run()`` computes it as it is."""
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.meet(Call(name_of(func), func, args, dict(kwargs or {})))


def without_in_place_flag(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """The arguments of an activation function without ``inplace``, and whether that was set."""
    # No activation function has another flag, so that a bool by position is this one.
    flagged = bool(kwargs.get("inplace")) or any(a is True for a in args)
    others = {name: value for name, value in kwargs.items() if name != "inplace"}
    return tuple(a for a in args if not isinstance(a, bool)), others, flagged


class Activation(nn.Module):
    """An activation function as a module, with the arguments that a model calls it with.

    Args:
        name: one of :data:`ACTIVATIONS`.
        args: positional arguments after the input.
        kwargs: keyword arguments, without the input.
    """

    def __init__(self, name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.name = name
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The function of ``x``, in a new tensor."""
        function = getattr(torch, self.name, None) or getattr(F, self.name)
        result: torch.Tensor = function(x, *self.args, **self.kwargs)
        return result

    def extra_repr(self) -> str:
        """The function and its arguments, as ``print`` shows them."""
        return ", ".join([self.name, *map(repr, self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())])
