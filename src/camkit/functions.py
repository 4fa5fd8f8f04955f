"""Torch functions by name: their kinds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

#: Element-wise functions that may stand between a module's output and the pooling, as DenseNet's ReLU does.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
#: Poolings, by what they take of each channel.
POOLINGS = {"mean": "avg", "amax": "max"} | {
    f"{adaptive}{kind}_pool{d}d": kind
    for adaptive in ("", "adaptive_")
    for kind in ("avg", "max")
    for d in (1, 2, 3)
}
#: What changes the shape only.
RESHAPES = {"flatten", "view", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "contiguous"}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
RESIZES = {"interpolate", "upsample"}
# What takes some of the tokens.
PICKS = {"__getitem__", "select", "index_select", "narrow", "split", "unbind", "tensor_split", "chunk"}
SUMS = {"add", "__add__", "__iadd__", "add_"}
ATTENTION = {"multi_head_attention_forward", "scaled_dot_product_attention"}
PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum"}
#: Functions of one number, which act on each entry of a tensor.
ELEMENTWISE = frozenset(
    ("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish")
) | frozenset(("prelu", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh"))
#: Functions that give the largest of each window.
MAX_POOLINGS = frozenset(f"{kind}max_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3))
# What an operator calls itself, and the function of the same meaning.
OPERATORS = {"iadd": "add", "radd": "add", "imul": "mul", "rmul": "mul", "truediv": "div", "itruediv": "div"}
# Not all that begins so: there are __int__ and __invert__.
IN_PLACE = {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "pow", "and", "or", "xor", "mod")
}


def out_of_place(called: str) -> str:
    """The name of the function that an operator or an in-place function stands for: add for __iadd__."""
    return OPERATORS.get(called.strip("_"), called.strip("_"))


# Functions that read their input as (N, C, *spatial) and give the same, whatever the sizes are.
CHANNELS_FIRST = {"batch_norm", "group_norm", "instance_norm", "interpolate", "pixel_shuffle"} | {
    f"{kind}{d}d"
    for d in (1, 2, 3)
    for kind in ("conv", "conv_transpose", "avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool")
}
# Functions that leave dimensions where they are.
KEEP_DIMENSIONS = ELEMENTWISE | {"add", "sub", "mul", "div", "cat", "concat", "pad"}
KEEP_DIMENSIONS |= {"clone", "contiguous", "dropout"}
# Functions that move, drop and repeat entries, and change none.
MOVES = {"cat", "chunk", "clone", "concat", "contiguous", "expand", "flatten", "flip", "getitem", "mT"} | {
    "movedim", "moveaxis", "narrow", "permute", "repeat", "reshape", "roll", "select", "split", "squeeze",
    "swapaxes", "swapdims", "t", "T", "tensor_split", "transpose", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip
PASS = {"batch_norm", "relu", "relu6", "hardtanh", "leaky_relu"}
AVERAGES = {"mean"} | {f"{kind}avg_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3)}
LINEAR = {"linear", "conv1d", "conv2d", "conv3d"}
# Their gradient hands relevance on as it is.
SHAPES = {"flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze", "permute", "transpose"}
SHAPES |= {"movedim", "contiguous", "clone", "cat", "concat", "stack", "chunk", "split", "getitem", "narrow"}
SHAPES |= {"select", "dropout", "dropout2d", "feature_dropout", "amax", "to", "float", "double", "mT", "T"}
SHAPES |= MAX_POOLINGS
WITH_BIAS = {"linear"} | {f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)}
RELUS = ("relu", "relu6", "hardtanh")


@dataclass(frozen=True)
class Call:
    """One call of a function, as a rule gets it.

    Attributes:
        name: name of the function, out of place and as a function: ``"add"`` for ``x += y``.
        function: the function, out of place.
        args: its arguments.
        kwargs: its keyword arguments.
        reached: whether a value comes from the tensor where the rules begin.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reached: Callable[[object], bool]

    def run(self, *args: Any) -> Any:
        """The function of other arguments in the place of the first ones."""
        return self.function(*args, *self.args[len(args) :], **self.kwargs)
