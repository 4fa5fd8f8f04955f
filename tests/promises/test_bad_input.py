"""Wrong arguments are refused in the same words everywhere, and the model is left as it was found."""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.ao import quantization

import camkit
from camkit import targets
from helpers.families import Branching, Digits, Plain, Skip, Transformer
from helpers.fingerprint import fingerprint

X = torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(0))


def of_method(name: str) -> Callable[..., object]:
    method: Any = getattr(camkit, name)

    def use(model: Any, x: Any = X, target: Any = None, layer: Any = None, **settings: Any) -> object:
        return method(model, *([] if layer is None else [layer]), **settings)(x, target)

    return use


def smoothed(model: Any, x: Any = X, target: Any = None, layer: Any = None) -> object:
    return camkit.Smoothed(camkit.GradCAM(model, layer), camkit.flip_views())(x, target)


def guided(model: Any, x: Any = X, target: Any = None) -> object:
    return camkit.guided_backprop(model, x, target)


def surgery(model: Any, x: Any = (3, 12, 10), num_classes: Any = 2, **settings: Any) -> object:
    return camkit.attach_gap_head(model, num_classes, input_shape=x, **settings)


def listed(model: Any, x: Any = (3, 12, 10)) -> object:
    return camkit.list_layers(model, x)


USES: dict[str, Callable[..., object]] = {
    **{name: of_method(name) for name in camkit.METHODS},
    "Smoothed": smoothed,
    "guided_backprop": guided,
    "attach_gap_head": surgery,
    "list_layers": listed,
}
ACTIVATION = ["EigenCAM", "ScoreCAM", "AblationCAM"]
CHOOSE = ["GradCAM", *ACTIVATION, "RelevanceCAM", "Smoothed"]  # a layer, and any target
THROUGH = ["FullGrad", "guided_backprop"]  # no layer, and no dry run
CALLS = ["CAM", *CHOOSE, *THROUGH]
SHAPES = ["attach_gap_head", "list_layers"]


class Row(NamedTuple):
    """A wrong argument, the functions that get it, the model, the error, its message and the arguments."""

    about: str
    uses: list[str]
    model: Callable[[], Any]
    error: type[Exception]
    message: str
    given: dict[str, Any] = {}  # noqa: RUF012


def images(about: str, x: Any, error: type[Exception], message: str, uses: list[str] = CALLS) -> Row:
    return Row(about, uses, Plain, error, f"x: expected {message}", {"x": x})


def with_bad(value: float) -> Tensor:
    x = X.clone()
    x[1, 2, 3, 4] = value
    return x


def signal() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def video() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)
    )


FLOATS = "floats, got torch.{}; transforms such as weights.transforms() make floats of a picture"
INPUTS = "a tensor, or a tuple or dict of the model's inputs, got "
AMONG = "images among the inputs, floats (N, C, H, W), got "
SPATIAL = "inputs with a spatial size, (N, C, H, W), got "
SIZED = ["CAM", *CHOOSE, "FullGrad"]
OF_TYPE = "{}, the type of the model's parameters, got {}"
ON_META = "model: expected weights, got {!r} on the meta device; load_state_dict(..., assign=True) gives them"

IMAGES = [
    images("NaN", with_bad(math.nan), ValueError, "finite values, got NaN or infinity"),
    images("infinity", with_bad(math.inf), ValueError, "finite values, got NaN or infinity"),
    images("-infinity", with_bad(-math.inf), ValueError, "finite values, got NaN or infinity"),
    images("no image", X[:0], ValueError, "a batch that is not empty, got shape 0 x 3 x 12 x 10"),
    images("no row", X[:, :, :0], ValueError, "a batch that is not empty, got shape 2 x 3 x 0 x 10"),
    images("bytes", (X * 255).byte(), TypeError, FLOATS.format("uint8")),
    images("ints", X.long(), TypeError, FLOATS.format("int64")),
    images("bools", X > 0.5, TypeError, FLOATS.format("bool")),
    images("complex", X.to(torch.complex64), TypeError, FLOATS.format("complex64")),
    images("numpy", X.numpy(), TypeError, INPUTS + "ndarray"),
    images("a list", [*X], TypeError, INPUTS + "list; torch.stack makes one of several images"),
    images("PIL", Image.new("RGB", (10, 12)), TypeError, INPUTS + "Image"),
    images("None", None, TypeError, INPUTS + "NoneType"),
    images("a tuple", (torch.ones(2), "a"), TypeError, AMONG + "0: torch.float32 2, 1: str"),
    images("a tuple of numpy", (X.numpy(),), TypeError, AMONG + "0: ndarray"),
    images("a dict", {"ids": torch.ones(2, 3, 4).long()}, TypeError, AMONG + "'ids': torch.int64 2 x 3 x 4"),
    images("nothing", (), TypeError, AMONG + "nothing"),
    images("a number", torch.tensor(1.0), ValueError, SPATIAL + "a single number", SIZED),
    images("a vector", torch.ones(3), ValueError, SPATIAL + "3", SIZED),
    images("H, W", X[0, 0], ValueError, SPATIAL + "12 x 10", SIZED),
    images("H, W", X[0, 0], ValueError, "an input that Plain can take, got 10", ["guided_backprop"]),
    images("five dimensions", X[None], ValueError, "an input that Plain can take, got 2 x 3 x 12 x 10"),
    images("one input more", (X, X), ValueError, "an input that Plain can take, got 3 x 12 x 10"),
    images("another name", {"y": X}, ValueError, "an input that Plain can take, got 3 x 12 x 10"),
    images("many channels", X[:, [0, 1, 2, 0]], ValueError, "3 channels for Plain, got 4, in 4 x 12 x 10"),
    images("one channel", X[:, :1], ValueError, "3 channels for Plain, got 1, in 1 x 12 x 10"),
    images(
        "channels last",
        X.permute(0, 2, 3, 1),
        ValueError,
        "3 channels for Plain, got 12, in 12 x 10 x 3; the channels come first",
    ),
    images(
        "no batch",
        X[0],
        ValueError,
        "a batch (N, C, H, W), got shape 3 x 12 x 10; add the batch with x[None]",
    ),
    images("too small", X[:, :, :2, :2], ValueError, "larger images for Plain, got 3 x 2 x 2"),
    images("double", X.double(), ValueError, OF_TYPE.format("torch.float32", "torch.float64")),
    images("half", X.half(), ValueError, OF_TYPE.format("torch.float32", "torch.float16")),
    images("bfloat16", X.bfloat16(), ValueError, OF_TYPE.format("torch.float32", "torch.bfloat16")),
    images("meta", X.to("meta"), ValueError, "numbers, got a tensor on the meta device"),
    Row(
        "single to double",
        CALLS,
        lambda: Plain().double(),
        ValueError,
        "x: expected torch.float64, the type of the model's parameters, got torch.float32",
    ),
    Row(
        "no batch, 1 d",
        CALLS,
        signal,
        ValueError,
        "x: expected a batch (N, C, L), got shape 2 x 50; add the batch with x[None]",
        {"x": torch.rand(2, 50)},
    ),
    Row(
        "no batch, 3 d",
        CALLS,
        video,
        ValueError,
        "x: expected a batch (N, C, T, H, W), got shape 3 x 6 x 9 x 8; add the batch with x[None]",
        {"x": torch.rand(3, 6, 9, 8)},
    ),
    Row(
        "channels, 1 d",
        CALLS,
        signal,
        ValueError,
        "x: expected 2 channels for Sequential, got 3, in 3 x 50",
        {"x": torch.rand(2, 3, 50)},
    ),
    Row(
        "one size only",
        ["GradCAM", "ScoreCAM", *THROUGH],
        Digits,
        ValueError,
        "x: expected an input that Digits can take, got 1 x 30 x 30",
        {"x": torch.rand(1, 1, 30, 30)},
    ),
]

LENGTHS = "input_shape: expected positive lengths (C, H, W), got "
INPUT_SHAPES = [
    Row(f"{shape}", SHAPES, Plain, error, message, {"x": shape})
    for shape, error, message in (
        (224, TypeError, LENGTHS + "224"),
        ("abc", TypeError, LENGTHS + "'abc'"),
        ((3.0, 12, 10), TypeError, LENGTHS + "(3.0, 12, 10)"),
        ((3, 0, 10), ValueError, LENGTHS + "(3, 0, 10)"),
        ((), ValueError, LENGTHS + "()"),
        ((1, 12, 10), ValueError, "input_shape: expected 3 channels for Plain, got 1, in 1 x 12 x 10"),
        ((12, 10), ValueError, "input_shape: expected an input that Plain can take, got 12 x 10"),
        (
            (1, 3, 12, 10),
            ValueError,
            "input_shape: expected an input that Plain can take, got 1 x 3 x 12 x 10",
        ),
        ((3, 1, 1), ValueError, "input_shape: expected larger images for Plain, got 3 x 1 x 1"),
    )
]


def partly(name: str, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A network one tensor of which is made anew."""
    model = Plain()
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    new = make(getattr(module, last).detach())
    setattr(module, last, nn.Parameter(new) if last in module._parameters else new)
    return model


def scripted() -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script")
        return torch.jit.script(Plain())


def quantized() -> nn.Module:
    model = nn.Sequential(
        quantization.QuantStub(),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
        quantization.DeQuantStub(),
    ).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        warnings.filterwarnings("ignore", "Default qconfig of oneDNN", UserWarning)  # on some processors
        model.qconfig = quantization.get_default_qconfig("onednn")
        quantization.prepare(model, inplace=True)
        model(X)
        return quantization.convert(model, inplace=True)  # type: ignore[no-any-return]


PYTHON = (
    "model: expected a module that runs in Python, got a RecursiveScriptModule of torch.jit{}; explain the "
    "module that it was made of"
)
LAZY = "model: expected weights, got {!r} of a lazy module that never ran; a pass, model(x), makes them"
MODULE = "model: expected a torch.nn.Module, got "
MODELS = [
    Row(
        "a function", [*CALLS, *SHAPES], lambda: torch.relu, TypeError, MODULE + "builtin_function_or_method"
    ),
    Row("a class", [*CALLS, *SHAPES], lambda: Plain, TypeError, MODULE + "type"),
    Row("a name", [*CALLS, *SHAPES], lambda: "resnet18", TypeError, MODULE + "str"),
    Row(
        "weights on meta", CALLS, lambda: Plain().to("meta"), ValueError, ON_META.format("features.0.weight")
    ),
    Row(
        "one weight on meta",
        CALLS,
        lambda: partly("features.4.bias", lambda t: t.to("meta")),
        ValueError,
        ON_META.format("features.4.bias"),
    ),
    Row(
        "one buffer on meta",
        CALLS,
        lambda: partly("features.1.running_var", lambda t: t.to("meta")),
        ValueError,
        ON_META.format("features.1.running_var"),
    ),
    Row(
        "lazy",
        [*CALLS, *SHAPES],
        lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)),
        ValueError,
        LAZY.format("0.weight"),
    ),
    Row(
        "a lazy end",
        [*CALLS, *SHAPES],
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)),
        ValueError,
        LAZY.format("3.weight"),
    ),
    Row("scripted", [*CALLS, *SHAPES], scripted, TypeError, PYTHON.format("")),
    Row(
        "a scripted part",
        [*CALLS, *SHAPES],
        lambda: nn.Sequential(nn.Identity(), scripted()),
        TypeError,
        PYTHON.format(" in '1'"),
    ),
    Row(
        "quantized",
        ["CAM", "GradCAM", "RelevanceCAM", "Smoothed", *THROUGH, "attach_gap_head"],
        quantized,
        TypeError,
        "model: expected layers of floats, got Quantize '0' of a quantized model; camkit.EigenCAM, ScoreCAM "
        "and other methods that only read activations and outputs explain it",
    ),
    Row(
        "nothing spatial",
        ["CAM", *CHOOSE, *SHAPES[:1]],
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(360, 5), nn.ReLU(), nn.Linear(5, 2)),
        ValueError,
        "model: expected a model with a spatial layer, got Sequential, where nothing is spatial at input 3 "
        "x 12 x 10",
    ),
    Row(
        "no rule",
        ["RelevanceCAM"],
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.SiLU(), nn.Linear(320, 2)),
        ValueError,
        "model: expected an architecture of convolutions, linear layers, ReLUs, poolings and sums, got "
        "Sequential, "
        "which uses 'silu' after the layer; there relevance has no rule; a method of gradients serves",
    ),
    Row(
        "no ReLU",
        ["GuidedGradCAM", "guided_backprop"],
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(320, 2)),
        ValueError,
        "model: expected a network with ReLUs to guide, got Sequential, which uses none",
    ),
    Row(
        "no transformer",
        ["LeGrad"],
        Plain,
        ValueError,
        "model: expected a transformer of blocks with one attention over all tokens in each, got Plain; "
        "layer= "
        "names a block",
    ),
]


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x


class Twice(nn.Module):
    """A layer that runs twice, one that never does, one of two outputs, and one that nothing needs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.unused = nn.Conv2d(3, 3, 1)
        self.pair = Pair()
        self.aside = nn.Conv2d(3, 2, 3)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.pair(self.conv(self.conv(x)))
        self.aside(y)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def layer(about: str, given: Any, message: str, error: type[Exception] = ValueError) -> Row:
    uses = [*CHOOSE, "attach_gap_head"]
    if isinstance(given, list | tuple | set):
        uses = ["GradCAM", "EigenCAM", "ScoreCAM"]
    return Row(about, uses, Twice, error, f"layer: expected {message}", {"layer": given})


NAME = "the name of a layer of Twice, got "
SEVERAL = "one layer, or several different ones, got "
SPATIAL_LAYER = (
    "a layer whose output has a spatial size, got {!r}, whose output is {}; camkit.list_layers lists "
)
TOKENS = "layout: expected an output (N, {}, C), and a grid of 2 dimensions for tokens {}, got "
DIFFERENTIABLE = (
    "differentiable: expected False for {}, got True; methods with keeps_graph, such as camkit.GradCAM, "
    "have maps you can backpropagate through"
)


def layout(about: str, model: type[nn.Module], given: dict[str, Any], message: str, error: Any) -> Row:
    return Row(about, ["GradCAM", *ACTIVATION], model, error, f"layout: {message}", given)


LAYERS = [
    layer("hint", "conf", NAME + "'conf'; did you mean 'conv'?"),
    layer("no hint", "zzz", NAME + "'zzz'; camkit.list_layers lists them"),
    layer("empty", "", NAME + "''; camkit.list_layers lists them"),
    layer("another's", nn.Linear(1, 1), "a module of Twice, got a Linear that is not in it"),
    layer("a number", 3, "a name or a module, got int", TypeError),
    layer("a set", {"conv"}, "a name or a module, got set", TypeError),
    layer("a list of a number", ["conv", 4], "a name or a module, got int", TypeError),
    layer("none", [], SEVERAL + "[]"),
    layer("the same", ["fc", "conv", "fc"], SEVERAL + "['fc', 'conv', 'fc']"),
    layer("one misspelt", ["conv", "pear"], NAME + "'pear'; did you mean 'pair'?"),
    layer(
        "never ran",
        "unused",
        "a layer that runs in the forward pass, got 'unused', which never ran; camkit.list_layers lists "
        "those that do",
    ),
    layer("ran twice", "conv", "a layer that runs once a pass, got 'conv', which ran 2 times"),
    layer("two outputs", "pair", "a layer whose output is one tensor, got 'pair', whose output is not"),
    layer("not spatial", "fc", SPATIAL_LAYER.format("fc", 2) + "those that have one"),
    Row(
        "the last part",
        ["GradCAM"],
        Skip,
        ValueError,
        "layer: expected the name of a layer of Skip, got 'layer.1'; did you mean 'block.1'?",
        {"layer": "layer.1"},
    ),
    Row(
        "the side",
        ["GradCAM"],
        Branching,
        ValueError,
        "layer: expected the name of a layer of Branching, got 'left2'; did you mean 'left'?",
        {"layer": "left2", "x": X[:, :1]},
    ),
    Row(
        "aside",
        ["GradCAM", "RelevanceCAM", "Smoothed"],
        Twice,
        ValueError,
        "target: expected a score that depends on layer 'aside' through a gradient, got one that does not",
        {"layer": "aside"},
    ),
    Row(
        "a class token",
        ["GradCAM", "AblationCAM", "LIFTCAM", "ShapleyCAM"],
        Transformer,
        ValueError,
        "layer: expected a layer whose positions reach the score, got 'blocks.1', where only tokens outside "
        "the grid reach it; name an earlier layer",
        {"layer": "blocks.1", "x": torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(1))},
    ),
    layout(
        "name",
        Plain,
        {"layer": "features", "layout": "nchw"},
        "expected one of 'channels_first', 'channels_last', got 'nchw'",
        ValueError,
    ),
    layout(
        "kind",
        Plain,
        {"layer": "features", "layout": 1},
        "expected 'channels_first', 'channels_last' or a camkit.Layout, got int",
        TypeError,
    ),
    layout(
        "no layer",
        Plain,
        {"layout": "channels_first"},
        "expected layer= too, which names the layer with this layout, got no layer",
        ValueError,
    ),
    layout(
        "tokens of NCHW",
        Plain,
        {"layer": "features", "layout": camkit.Layout(-1, grid=(4, 3))},
        "expected an output (N, 12, C), and a grid of 2 dimensions for tokens 4 x 3, got 'features', whose "
        "output is "
        "2 x 6 x 4 x 3",
        ValueError,
    ),
    layout(
        "another grid",
        Transformer,
        {
            "layer": "blocks.0",
            "layout": camkit.Layout(-1, grid=(4, 4), prefix=1),
            "x": torch.rand(2, 3, 16, 12),
        },
        "expected an output (N, 17, C), and a grid of 2 dimensions for tokens 4 x 4, 1 before, got "
        "'blocks.0', whose "
        "output is 2 x 14 x 6",
        ValueError,
    ),
    layout(
        "a grid of one dimension",
        Transformer,
        {"layer": "blocks.0", "layout": camkit.Layout(-1, (12,), 1, 1), "x": torch.rand(2, 3, 16, 12)},
        "expected an output (N, 14, C), and a grid of 2 dimensions for tokens 12, 1 before, 1 after, got "
        "'blocks.0', "
        "whose output is 2 x 14 x 6",
        ValueError,
    ),
    layout(
        "no grid",
        Transformer,
        {"layer": "blocks.0", "layout": "channels_last", "x": torch.rand(2, 3, 16, 12)},
        "expected an output with 4 dimensions for channels last, got 'blocks.0', whose output is 2 x 14 x 6",
        ValueError,
    ),
    *(
        Row("training", [name], Plain, ValueError, DIFFERENTIABLE.format(name), {"differentiable": True})
        for name, method in camkit.METHODS.items()
        if not getattr(method, "keeps_graph", True)
    ),
]


@dataclasses.dataclass
class Output:
    logits: Tensor


def giving(wrap: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    """A network whose output is made into something else."""

    class Wrapped(Plain):
        def forward(self, x: Tensor) -> Any:
            return wrap(super().forward(x))

    return Wrapped


def output(about: str, wrap: Callable[[Tensor], Any], got: str) -> Row:
    message = (
        f"target: expected a model with logits (N, classes), got an output of {got}; give target= a function "
    )
    message += "from the output to one score per image, or the key of the logits"
    return Row(about, [*CHOOSE, *THROUGH], giving(wrap), TypeError, message, {"target": 1})


def target(about: str, given: Any, error: type[Exception], message: str, uses: list[str] = CALLS) -> Row:
    return Row(about, uses, Plain, error, f"target: expected {message}", {"target": given})


NUMBER = "one target, 2 targets or 2 x K targets for 2 images, got "
INTS = "an int, N ints, N x K ints, a key or a function of the output, got "
OF_FUNCTION = "a function that returns 2 or 2 x K scores for 2 images, got "
BOTH = [*CHOOSE, *THROUGH]
TARGETS = [
    output("a list of dicts", lambda y: [{"logits": row} for row in y], "type list"),
    output("a dict", lambda y: {"logits": y}, "type dict"),
    output("a tuple", lambda y: (y, y), "type tuple"),
    output("a dataclass", Output, "type Output"),
    output("positions", lambda y: y[:, :, None, None].expand(-1, -1, 3, 2), "2 x 4 x 3 x 2"),
    output("one score an image", lambda y: y[:, 0], "2"),
    output("a number", lambda y: y.sum(), "a single number"),
    output("no classes", lambda y: y[:, :0], "2 x 0"),
    output("ints", lambda y: y.round().long(), "2 x 4, torch.int64"),
    Row(
        "no tensor",
        ["CAM", *CHOOSE],
        giving(lambda y: None),
        ValueError,
        "model: expected an output of tensors, or of tuples, lists, dicts or dataclasses of them, got "
        "NoneType",
    ),
    *(
        Row(
            f"{rows} rows",
            BOTH,
            giving(lambda y, rows=rows: y[[0] * rows]),  # type: ignore[misc]
            ValueError,
            f"target: expected a model with logits (2, classes) for 2 images, got {rows} x 4",
            {"target": asked},
        )
        for rows, asked in ((1, 0), (4, 0), (4, None), (4, targets.probability()), (4, targets.finer(1)))
    ),
    Row(
        "no such key",
        CALLS,
        giving(lambda y: {"logits": y}),
        TypeError,
        "target: expected an output that has 'logit', got an output of type dict with 'logits'",
        {"target": "logit"},
    ),
    target("no key", "cat", TypeError, "an output that has 'cat', got an output of type Tensor"),
    target("out of range", 99, ValueError, "a class index in [0, 4), got 99"),
    target("negative", -1, ValueError, "a class index in [0, 4), got -1"),
    target("one out of range", [0, 9], ValueError, "a class index in [0, 4), got 9"),
    target("too few", [0], ValueError, NUMBER + "1"),
    target("too many", [0, 1, 2], ValueError, NUMBER + "3"),
    target("a row too few", [[0, 1]], ValueError, NUMBER + "1 x 2"),
    target("no class", [[], []], ValueError, NUMBER + "2 x 0"),
    target("three dimensions", [[[0]], [[1]]], ValueError, NUMBER + "2 x 1 x 1"),
    target("ragged", [[0, 1], [2]], TypeError, INTS + "[[0, 1], [2]]"),
    target("an object", {"class": 1}, TypeError, INTS + "dict"),
    target("a huge int", 2**70, TypeError, INTS + f"{2**70}"),
    target("a float", 1.0, TypeError, "integers, got torch.float64"),
    target("floats", torch.tensor([1.0, 2.0]), TypeError, "integers, got torch.float32"),
    target("a bool", True, TypeError, "integers, got torch.bool"),
    target("bools", np.array([True, False]), TypeError, "integers, got torch.bool"),
    target("complex", 1j, TypeError, "integers, got torch.complex128"),
    target(
        "no CAM of it",
        lambda y: y[:, 0],
        TypeError,
        "classes, the only targets of CAM, got a function",
        ["CAM"],
    ),
    target("no tensor", lambda y: 3, TypeError, "a function that returns a tensor, got int"),
    target("a sum", lambda y: y.sum(), ValueError, OF_FUNCTION + "a single number"),
    target("one row", lambda y: y[:1, 0], ValueError, OF_FUNCTION + "1"),
    target("a third dimension", lambda y: y[..., None], ValueError, OF_FUNCTION + "2 x 4 x 1"),
    target("no score", lambda y: y[:, :0], ValueError, OF_FUNCTION + "2 x 0"),
    target("ints", lambda y: y.argmax(1), TypeError, "a function that returns floats, got torch.int64"),
    target(
        "a constant",
        lambda y: torch.ones(2),
        ValueError,
        "a score that depends on layer 'features' through a gradient, got one that does not",
        ["GradCAM", "RelevanceCAM", "Smoothed"],
    ),
    target(
        "a constant",
        lambda y: torch.ones(2),
        ValueError,
        "a score that depends on the input through a gradient, got one that does not",
        THROUGH,
    ),
]

POSITIVE, FROM_ZERO = "expected a positive number, got ", "expected a finite number, zero or more, got "
FUSE = "fuse: expected one of 'mean', 'product', 'hierarchical', got "
WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("ScoreCAM", {"chunk_size": 0}, ValueError, f"chunk_size: {POSITIVE}0"),
    ("PolyCAM", {"chunk_size": -3}, ValueError, f"chunk_size: {POSITIVE}-3"),
    ("AblationCAM", {"chunk_size": 2.0}, TypeError, "chunk_size: expected an int, got float"),
    (
        "ScoreCAM",
        {"progress": True},
        TypeError,
        "progress: expected a function that wraps an iterable, such as tqdm.tqdm, got bool",
    ),
    ("SSCAM", {"samples": 0}, ValueError, f"samples: {POSITIVE}0"),
    ("ISCAM", {"samples": True}, TypeError, "samples: expected an int, got bool"),
    ("SmoothGradCAMPlusPlus", {"samples": 0}, ValueError, f"samples: {POSITIVE}0"),
    ("SSCAM", {"std": -1.0}, ValueError, f"std: {FROM_ZERO}-1.0"),
    ("SSCAM", {"std": math.inf}, ValueError, f"std: {FROM_ZERO}inf"),
    ("SmoothGradCAMPlusPlus", {"std": "1"}, TypeError, "std: expected a number, got str"),
    ("RandomCAM", {"seed": -1}, ValueError, "seed: expected zero or more, got -1"),
    ("SSCAM", {"seed": 1.5}, TypeError, "seed: expected an int, got float"),
    ("SmoothGradCAMPlusPlus", {"seed": None}, TypeError, "seed: expected an int, got NoneType"),
    ("KPCACAM", {"gamma": -1}, ValueError, f"gamma: {FROM_ZERO}-1"),
    ("KPCACAM", {"gamma": "a"}, TypeError, "gamma: expected a number, got str"),
    ("FEM", {"sigmas": math.nan}, ValueError, f"sigmas: {FROM_ZERO}nan"),
    ("PolyCAM", {"weights": "x"}, ValueError, "weights: expected one of '+', '-', '+-', got 'x'"),
    ("PolyCAM", {"fuse": "product"}, ValueError, "fuse: expected one of 'mean', got 'product'"),
    ("LeGrad", {"fuse": "product"}, ValueError, "fuse: expected one of 'mean', got 'product'"),
    ("GradCAM", {"fuse": "sum"}, ValueError, FUSE + "'sum'"),
    ("ScoreCAM", {"fuse": None}, ValueError, FUSE + "None"),
    ("attach_gap_head", {"num_classes": 0}, ValueError, f"num_classes: {POSITIVE}0"),
    ("attach_gap_head", {"num_classes": 2.0}, TypeError, "num_classes: expected an int, got float"),
    ("attach_gap_head", {"num_classes": True}, TypeError, "num_classes: expected an int, got bool"),
    ("attach_gap_head", {"conv_channels": -1}, ValueError, f"conv_channels: {POSITIVE}-1"),
    (
        "attach_gap_head",
        {"pooling": "mean"},
        ValueError,
        "pooling: expected one of 'avg', 'max', got 'mean'",
    ),
]
SETTINGS = [Row(f"{given}", [name], Plain, error, said, given) for name, given, error, said in WRONG]
ROWS = [*IMAGES, *INPUT_SHAPES, *MODELS, *LAYERS, *TARGETS, *SETTINGS]


CASES = [pytest.param(row, use, id=f"{use}: {row.about}") for row in ROWS for use in row.uses]


def said(error: BaseException) -> str:
    """The message without the error of torch or Python that camkit may add in brackets."""
    return re.sub(r" \((RuntimeError|TypeError): .*\)$", "", str(error), flags=re.DOTALL)


@pytest.mark.parametrize(("row", "use"), CASES)
def test_what_is_wrong_is_named_and_the_model_left_as_found(row: Row, use: str) -> None:
    model = row.model()
    before = fingerprint(model) if isinstance(model, nn.Module) else None
    with pytest.raises(row.error) as raised:
        USES[use](model, **row.given)
    assert said(raised.value) == row.message
    assert before is None or fingerprint(model) == before


VIEWS = "views: expected several camkit.View, such as camkit.flip_views(), got "
METHOD = "method: expected a method such as camkit.GradCAM(model), got "
BY_NAME: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: camkit.Smoothed(camkit.GradCAM, camkit.flip_views()),  # type: ignore[arg-type]
        TypeError,
        METHOD + "<class 'camkit.GradCAM'>",
    ),
    (lambda: camkit.Smoothed(Plain(), camkit.flip_views()), TypeError, METHOD + "Plain"),  # type: ignore[arg-type]
    (
        lambda: camkit.Smoothed(lambda x, t: camkit.CAM(Plain())(x, t), camkit.flip_views()),  # type: ignore[arg-type]
        TypeError,
        METHOD + "function",
    ),
    (
        lambda: camkit.Smoothed(camkit.GradCAM(Plain()), []),
        ValueError,
        "views: expected one view or more, got none",
    ),
    (lambda: camkit.Smoothed(camkit.GradCAM(Plain()), camkit.flip_views), TypeError, VIEWS + "function"),  # type: ignore[arg-type]
    (
        lambda: camkit.Smoothed(camkit.GradCAM(Plain()), camkit.flip_views()[0]),  # type: ignore[arg-type]
        TypeError,
        VIEWS + "View",
    ),
    (lambda: camkit.noise_views(0), ValueError, f"samples: {POSITIVE}0"),
    (lambda: camkit.noise_views(2.0), TypeError, "samples: expected an int, got float"),  # type: ignore[arg-type]
    (lambda: camkit.noise_views(std=-0.1), ValueError, f"std: {FROM_ZERO}-0.1"),
    (lambda: camkit.noise_views(std=math.nan), ValueError, f"std: {FROM_ZERO}nan"),
    (lambda: camkit.noise_views(std="0.1"), TypeError, "std: expected a number, got str"),  # type: ignore[arg-type]
    (lambda: camkit.noise_views(seed=-1), ValueError, "seed: expected zero or more, got -1"),
    (lambda: camkit.Layout(0), ValueError, "channel_dim: expected 1 or -1, got 0"),
    (lambda: camkit.Layout(1, grid=(2, 2)), ValueError, "channel_dim: expected -1 with a grid, got 1"),
    (lambda: camkit.Layout(-1, grid=()), ValueError, "grid: expected positive lengths, got ()"),
    (lambda: camkit.Layout(-1, grid=(0, 2)), ValueError, "grid: expected positive lengths, got (0, 2)"),
    (lambda: camkit.Layout(-1, grid=4), TypeError, "grid: expected positive lengths, got 4"),  # type: ignore[arg-type]
    (
        lambda: camkit.Layout(prefix=1),
        ValueError,
        "prefix, suffix: expected numbers of tokens beside a grid, got (1, 0)",
    ),
    (lambda: explained().heatmaps((7,)), ValueError, "size: expected 2 positive lengths, got (7,)"),
    (lambda: explained().heatmaps((7, 0)), ValueError, "size: expected 2 positive lengths, got (7, 0)"),
    (lambda: explained().heatmaps(7), TypeError, "size: expected 2 positive lengths, got 7"),  # type: ignore[arg-type]
    (lambda: explained().heatmaps((7.0, 5)), TypeError, "size: expected 2 positive lengths, got (7.0, 5)"),  # type: ignore[arg-type]
    (lambda: camkit.normalize(X.numpy()), TypeError, "maps: expected a tensor, got ndarray"),  # type: ignore[arg-type]
    (
        lambda: camkit.normalize(torch.tensor(1.0)),
        ValueError,
        "maps: expected floats with 2 spatial dimensions, got torch.float32, a single number",
    ),
]


def explained() -> camkit.Explanation:
    return camkit.GradCAM(Plain())(X)


@pytest.mark.parametrize(("call", "error", "message"), BY_NAME, ids=[message for *_, message in BY_NAME])
def test_what_is_wrong_without_a_model(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("use", CALLS)
def test_images_on_another_device_than_the_gpu(use: str) -> None:
    with pytest.raises(ValueError, match=r"^x: expected images on cuda:0, where the model is, got cpu$"):
        USES[use](Plain().cuda())
