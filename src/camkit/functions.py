"""The functions of torch: one name for each, sets of functions that act alike, and a way to intercept calls.

A function can be written in many ways: ``x + y``, ``x += y``, ``x.add_(y)`` and ``torch.add(x, y)`` are all
``"add"`` here. This is the only file with lists of such names. All other files use its sets, so that a new
spelling or function is added in one place.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Other names of the same function, without the underscores of operators and in-place functions.
_ALIASES = {
    "iadd": "add", "radd": "add", "isub": "sub", "subtract": "sub", "imul": "mul", "rmul": "mul",
    "multiply": "mul", "itruediv": "div", "idiv": "div", "truediv": "div", "true_divide": "div",
    "divide": "div", "rmatmul": "matmul", "imatmul": "matmul", "ipow": "pow", "concat": "cat",
    "concatenate": "cat", "moveaxis": "movedim", "swapaxes": "transpose", "swapdims": "transpose",
    "clip": "clamp", "log_sigmoid": "logsigmoid", "upsample": "interpolate",
}  # fmt: skip
# The operators that write to their left side, such as +=. They are listed because the prefix "__i" is not
# enough to recognise them: __int__ and __invert__ have it too and write to nothing.
_WRITING_OPERATORS = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "pow", "matmul")} | {
    f"__i{name}__" for name in ("and", "or", "xor", "mod", "floordiv", "lshift", "rshift")
}


def name_of(function: Callable[..., Any]) -> str:
    """Returns the name under which this file lists a torch function, the same for every spelling.

    Args:
        function: a function, method or operator as ``__torch_function__`` receives it.

    Returns:
        The name of the function that works out of place, without underscores: ``"add"`` for
        ``Tensor.__iadd__`` and ``Tensor.add_``, ``"mT"`` for the getter of the property ``Tensor.mT``.

    Example:
        >>> import torch
        >>> from camkit.functions import name_of
        >>> name_of(torch.Tensor.add_)
        'add'
    """
    spelling: str = getattr(function, "__name__", str(function))
    # Reading a property such as x.mT calls its __get__, which knows the property as __self__.
    if spelling == "__get__":
        spelling = getattr(getattr(function, "__self__", None), "__name__", spelling)
    bare = spelling.strip("_")
    return _ALIASES.get(bare, bare)


def is_in_place(function: Callable[..., Any]) -> bool:
    """Whether a function writes to its first argument, judged by its name: ``add_`` and ``__iadd__`` do.

    An activation function that is called with ``inplace=True`` also writes, but its name does not show it;
    see :func:`without_in_place_flag`.
    """
    spelling: str = getattr(function, "__name__", "")
    return spelling in _WRITING_OPERATORS or (spelling.endswith("_") and not spelling.endswith("__"))


def out_of_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function of the same name that makes a new tensor; ``function`` itself if there is none."""
    return _named(name_of(function)) or function


def _named(name: str) -> Callable[..., Any] | None:
    """Returns the function that works out of place; ``None`` if there is none of this name."""
    # Some activation functions, such as gelu, are in torch.nn.functional only.
    found: Callable[..., Any] | None = getattr(torch, name, None) or getattr(F, name, None)
    return found


def _in_each_dimension(*stems: str) -> frozenset[str]:
    """Returns the names of functions in one, two and three dimensions: ``conv1d``, ``conv2d``, ``conv3d``."""
    return frozenset(f"{stem}{d}d" for stem in stems for d in (1, 2, 3))


# Sets of functions ------------------------------------------------------------------------------------------

#: ReLUs: their derivative is 1 or 0. torch computes ``nn.ReLU6`` as a hardtanh.
RELUS = frozenset({"relu", "relu6", "hardtanh"})
# Activation functions that map zero to zero.
_KEEP_ZERO = RELUS | {
    "celu", "elu", "gelu", "hardshrink", "hardswish", "leaky_relu", "mish", "prelu", "selu", "silu",
    "softshrink", "softsign", "tanh", "tanhshrink",
}  # fmt: skip
#: Element-wise activation functions: each entry of the result depends only on the same entry of the input.
ACTIVATIONS = _KEEP_ZERO | {"hardsigmoid", "logsigmoid", "sigmoid", "softplus", "threshold"}

CONVOLUTIONS = _in_each_dimension("conv")
#: Convolutions and linear layers, without transposed convolutions.
LINEAR = CONVOLUTIONS | {"linear"}
_TRANSPOSED_CONVOLUTIONS = _in_each_dimension("conv_transpose")
#: Functions that have a bias for each channel, as an argument that may be None.
WITH_BIAS = LINEAR | _TRANSPOSED_CONVOLUTIONS
_NORMALISATIONS = frozenset({"batch_norm", "group_norm", "instance_norm"})

_AVERAGE_WINDOWS = _in_each_dimension("avg_pool", "adaptive_avg_pool")
#: Functions that return the largest entry of each window.
MAX_WINDOWS = _in_each_dimension("max_pool", "adaptive_max_pool")
# Global pooling is often written as a mean or a maximum over the spatial dimensions.
AVERAGE_POOLINGS = _AVERAGE_WINDOWS | {"mean"}
MAX_POOLINGS = MAX_WINDOWS | {"amax"}
POOLINGS = AVERAGE_POOLINGS | MAX_POOLINGS
RESIZES = frozenset({"interpolate"})

#: Functions that only change the shape.
RESHAPES = frozenset({
    "contiguous", "flatten", "movedim", "mT", "permute", "reshape", "reshape_as", "squeeze", "t", "T",
    "transpose", "unflatten", "unsqueeze", "view", "view_as",
})  # fmt: skip
#: Functions that return one or more parts of their input.
PICKS = frozenset({"chunk", "getitem", "index_select", "narrow", "select", "split", "tensor_split", "unbind"})
JOINS = frozenset({"cat", "stack"})
#: Functions that move, drop or repeat entries of a tensor without computing anything from them.
MOVES = RESHAPES | PICKS | JOINS | {"clone", "expand", "expand_as", "flip", "repeat", "roll"}

SUMS = frozenset({"add"})
SCALINGS = frozenset({"div", "mul"})
#: Products of two activations.
PRODUCTS = frozenset({"bmm", "einsum", "matmul"})
ATTENTION = frozenset({"multi_head_attention_forward", "scaled_dot_product_attention"})
# All of these return their input in evaluation mode.
_DROPOUTS = _in_each_dimension("dropout") | {"alpha_dropout", "dropout", "feature_dropout"}
_CASTS = frozenset({"bfloat16", "double", "float", "half", "to"})

#: Functions whose input and output are always ``(N, C, *spatial)``.
CHANNELS_FIRST = (
    CONVOLUTIONS | _TRANSPOSED_CONVOLUTIONS | _NORMALISATIONS | _AVERAGE_WINDOWS | MAX_WINDOWS | RESIZES
) | {"pixel_shuffle"}
#: Functions whose output has its channels and spatial dimensions in the same places as the input.
KEEP_DIMENSIONS = ACTIVATIONS | SUMS | SCALINGS | {"cat", "clone", "contiguous", "dropout", "pad", "sub"}

#: Relevance propagation (LRP): functions that distribute relevance in the same way as a gradient.
KEEP_RELEVANCE = MOVES | _DROPOUTS | _CASTS | MAX_POOLINGS
#: Relevance propagation (LRP): functions whose input gets the relevance of the output unchanged.
PASS_RELEVANCE = _KEEP_ZERO | {"batch_norm"}


# Intercepted calls ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of a torch function.

    Attributes:
        name: the name of the function, as :func:`name_of` returns it.
        function: the function as it was called, which may work in place.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, *args: Any) -> Any:
        """Calls the function and returns its result.

        Args:
            args: new values of the first positional arguments; the others stay as they are.
        """
        return self.function(*args, *self.args[len(args) :], **self.kwargs)


class FunctionMode(TorchFunctionMode):
    """A context that intercepts torch functions: inside it, :meth:`meet` is called instead of each of them.

    It intercepts functions that modules call as well as functions in the model's own code. It changes nothing
    in the model.
    """

    def meet(self, call: Call) -> Any:
        """Returns the result of a call. ``call.run()`` returns the result that torch would compute."""
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
    """Removes ``inplace`` from the arguments of an activation function.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        The other positional arguments, the other keyword arguments, and whether ``inplace`` was true.
    """
    # A positional bool must be ``inplace``: activation functions have no other argument of that type.
    in_place = bool(kwargs.get("inplace")) or any(a is True for a in args)
    others = {name: value for name, value in kwargs.items() if name != "inplace"}
    return tuple(a for a in args if not isinstance(a, bool)), others, in_place


class Activation(nn.Module):
    """A module that computes an activation function with given arguments, in a new tensor.

    It stands for a function that a model calls outside any module.

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
        """Applies the function to ``x``, a tensor of any shape, and returns a tensor of that shape."""
        function = _named(self.name)
        assert function is not None  # every name in ACTIVATIONS has one
        result: torch.Tensor = function(x, *self.args, **self.kwargs)
        return result

    def extra_repr(self) -> str:
        """Returns the name and the arguments of the function, which ``print`` shows."""
        return ", ".join([self.name, *map(repr, self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())])
