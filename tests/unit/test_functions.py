"""Each torch function has one name in every spelling, so that methods treat all spellings alike."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import camkit
from camkit import functions
from camkit.functions import Activation, Call, FunctionMode
from helpers import reference

PACKAGE = Path(camkit.__file__).parent
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
SQUARE = torch.eye(6)


class Names(FunctionMode):
    """Records the name of every function that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []

    def meet(self, call: Call) -> Any:
        self.met.append(call.name)
        return call.run()


def write(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Makes a function work on a copy of its input, so that it may write to it."""
    return lambda x: function(x.clone())


SPELLINGS: dict[str, list[Callable[[Tensor], Any]]] = {
    "add": [
        lambda x: x + 1,
        lambda x: 1 + x,
        write(lambda x: x.__iadd__(1)),
        write(lambda x: x.add_(1)),
        lambda x: torch.add(x, 1),
    ],
    "sub": [lambda x: x - 1, write(lambda x: x.__isub__(1)), lambda x: torch.subtract(x, x)],
    "mul": [
        lambda x: x * 2,
        lambda x: 2 * x,
        write(lambda x: x.__imul__(2)),
        lambda x: torch.multiply(x, x),
    ],
    "div": [lambda x: x / 2, write(lambda x: x.__itruediv__(2)), lambda x: torch.true_divide(x, x)],
    "matmul": [lambda x: x @ SQUARE, torch.Tensor(SQUARE).__rmatmul__, lambda x: torch.matmul(x, SQUARE)],
    "cat": [
        lambda x: torch.cat([x, x]),
        lambda x: torch.concat([x, x]),
        lambda x: torch.concatenate([x, x]),
    ],
    "movedim": [lambda x: x.movedim(1, -1), lambda x: torch.moveaxis(x, 1, -1)],
    "transpose": [
        lambda x: x.transpose(1, 2),
        lambda x: x.swapaxes(1, 2),
        lambda x: torch.swapdims(x, 1, 2),
    ],
    "mT": [lambda x: x.mT],
    "getitem": [lambda x: x[:, 0]],
    "interpolate": [lambda x: F.interpolate(x, scale_factor=2)],
    "clamp": [
        lambda x: x.clamp(0, 1),
        write(lambda x: x.clamp_(0, 1)),
        lambda x: torch.clip(x, 0, 1),
    ],
    "relu": [F.relu, torch.relu, torch.Tensor.relu, write(torch.relu_), write(nn.ReLU(inplace=True))],
    "hardtanh": [F.hardtanh, nn.ReLU6(), write(F.hardtanh_)],
    "leaky_relu": [F.leaky_relu, nn.LeakyReLU(0.2), write(lambda x: F.leaky_relu_(x, 0.2))],
    "logsigmoid": [F.logsigmoid, nn.LogSigmoid()],
    "threshold": [lambda x: F.threshold(x, 0.1, 0.0), nn.Threshold(0.1, 0.0)],
}


@pytest.mark.parametrize(
    ("name", "spelling"),
    [(name, spelling) for name, spellings in SPELLINGS.items() for spelling in spellings],
)
def test_every_spelling_of_a_function_has_one_name(name: str, spelling: Callable[[Tensor], Any]) -> None:
    with Names() as names:
        spelling(X)
    assert [met for met in names.met if met != "clone"] == [name]


@pytest.mark.parametrize(
    ("function", "writes"),
    [
        (torch.Tensor.add_, True),
        (torch.Tensor.__iadd__, True),
        (torch.Tensor.__imul__, True),
        (torch.relu_, True),
        (torch.Tensor.add, False),
        (torch.Tensor.__add__, False),
        (torch.Tensor.__int__, False),
        (torch.Tensor.__invert__, False),
        (torch.Tensor.__index__, False),
    ],
)
def test_functions_that_write_to_their_input_are_known_by_their_spelling(
    function: Callable[..., Any], writes: bool
) -> None:
    assert functions.is_in_place(function) is writes
    if writes:
        assert not functions.is_in_place(functions.out_of_place(function))


def test_every_name_in_the_table_is_a_function_of_torch() -> None:
    kinds = {name: kind for name, kind in vars(functions).items() if isinstance(kind, frozenset)}
    assert len(kinds) > 20
    for kind, names in kinds.items():
        for name in names:
            places = [getattr(place, name, None) for place in (F, torch, torch.Tensor)]
            found = [f for f in (*places, getattr(torch.Tensor, f"__{name}__", None)) if f is not None]
            assert found, f"{name} of {kind}"
            assert functions.name_of(found[0]) == name or not callable(found[0]) or name in PROPERTIES


# These names are properties of a tensor, not functions.
PROPERTIES = {"T", "mT"}


def lists_of_functions(path: Path) -> list[str]:
    """The places where a file has a set, list, tuple or dict with two or more names of torch functions."""
    known = set().union(*(kind for kind in vars(functions).values() if isinstance(kind, frozenset)))
    # These names of functions are also common words.
    known -= {"mean", "T", "t", "add", "select", "float", "to", "flip", "half", "double", "repeat"}
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Set | ast.List | ast.Tuple):
            items = node.elts
        elif isinstance(node, ast.Dict):
            items = [key for key in node.keys if key is not None]
        else:
            continue
        names = {i.value for i in items if isinstance(i, ast.Constant) and isinstance(i.value, str)}
        if len({name.strip("_") for name in names} & known) > 1:
            found.append(f"{path.name}:{node.lineno}: {sorted(names)}")
    return found


def test_no_other_file_lists_names_of_functions() -> None:
    table = PACKAGE / "functions.py"
    assert lists_of_functions(table)
    assert [f for path in PACKAGE.rglob("*.py") if path != table for f in lists_of_functions(path)] == []


# Spellings of each activation function with its arguments, for the end of a trunk.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu_": torch.relu_,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 2.0),
    "hardtanh by name": lambda x: F.hardtanh(x, min_val=-0.5, max_val=2.0, inplace=True),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky_relu_": lambda x: F.leaky_relu_(x, 0.2),
    "leaky_relu by name": lambda x: F.leaky_relu(x, negative_slope=0.3, inplace=True),
    "elu": lambda x: F.elu(x, 0.5),
    "celu": lambda x: F.celu(x, alpha=0.5),
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: F.silu(x, True),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "sigmoid_": torch.sigmoid_,
    "tanh": torch.tanh,
    "tanh_": torch.tanh_,
    "softplus": lambda x: F.softplus(x, beta=2.0),
    "softplus by position": lambda x: F.softplus(x, 2.0, 5.0),
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "hardshrink": lambda x: F.hardshrink(x, 0.1),
    "softshrink": lambda x: F.softshrink(x, 0.1),
    "tanhshrink": F.tanhshrink,
    "threshold": lambda x: F.threshold(x, 0.1, 0.05),
}


class Network(nn.Module):
    """Convolutions, an activation function that is not a module, and a head."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3))
        self.fc = nn.Linear(5, 4)
        self.activation = activation

    def features(self, x: Tensor) -> Tensor:
        return self.activation(self.trunk(x))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.features(x).mean((2, 3)))
        return out


@pytest.fixture(params=ACTIVATIONS, ids=str)
def network(request: pytest.FixtureRequest) -> Network:
    return Network(ACTIVATIONS[request.param]).double().eval()


IMAGES = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(2)).double()


def test_cam_applies_the_activation_function_with_its_arguments(network: Network) -> None:
    explanation = camkit.CAM(network)(IMAGES, target=[1, 3])
    with torch.no_grad():
        features = network.features(IMAGES)
    for image, label in enumerate((1, 3)):
        expected = reference.cam(features[image], network.fc.weight[label])
        torch.testing.assert_close(explanation.maps[image], expected)


def test_surgery_keeps_the_activation_function_with_its_arguments(network: Network, tmp_path: Path) -> None:
    net = camkit.attach_gap_head(network, 7, input_shape=(3, 12, 10))
    with torch.no_grad():
        features = network.features(IMAGES)
        expected = net.head.linear(features.mean((2, 3)))
    logits, maps = net.class_maps(IMAGES)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(maps.mean((2, 3)) + net.head.linear.bias, logits)
    torch.save(net.head, tmp_path / "head.pt")
    again = torch.load(tmp_path / "head.pt", weights_only=False)
    torch.testing.assert_close(again(network.trunk(IMAGES)), logits)


def test_relevance_passes_activation_functions_that_keep_zero(network: Network) -> None:
    keeps_zero = bool((network.activation(torch.zeros(1, dtype=torch.float64)) == 0).all())
    method = camkit.RelevanceCAM(network, layer="trunk")
    if not keeps_zero:
        with pytest.raises(ValueError, match=r"^model: expected an architecture of convolutions"):
            method(IMAGES, target=1)
        return
    # The function passes the relevance of each channel on unchanged. So the channel weights equal those of
    # the same network without the function, explained at the features that the function returns.
    with torch.no_grad():
        features = network.features(IMAGES)
    head = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), network.fc)
    relevance = camkit.RelevanceCAM(head, layer="0")(features, target=1).maps
    explained = method(IMAGES, target=1).maps
    # The two maps apply the same channel weights to different activations.
    weights = reference_weights(head, features)
    torch.testing.assert_close(relevance, torch.einsum("nc,nchw->nhw", weights, features))
    with torch.no_grad():
        torch.testing.assert_close(explained, torch.einsum("nc,nchw->nhw", weights, network.trunk(IMAGES)))


def reference_weights(head: nn.Module, features: Tensor) -> Tensor:
    """The mean relevance of each channel, recovered from the map by least squares."""
    maps = camkit.RelevanceCAM(head, layer="0")(features, target=1).maps.flatten(1)
    flat = features.flatten(2)
    # Each map is a weighted sum of channels. It has more positions than channels, so the weights are unique.
    weights: Tensor = torch.linalg.lstsq(flat.mT, maps[..., None]).solution[..., 0]
    return weights


# Pairs of functions that move the dimensions of a feature map, and move them back.
MOVES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "permute": (lambda x: x.permute(0, 2, 3, 1), lambda x: x.permute(0, 3, 1, 2)),
    "movedim": (lambda x: x.movedim(1, -1), lambda x: x.movedim(-1, 1)),
    "moveaxis": (lambda x: torch.moveaxis(x, 1, -1), lambda x: torch.moveaxis(x, -1, 1)),
    "swapaxes": (
        lambda x: x.swapaxes(1, 2).swapaxes(2, 3),
        lambda x: x.swapaxes(2, 3).swapaxes(1, 2),
    ),
    "swapdims": (
        lambda x: x.swapdims(1, 2).swapdims(2, 3),
        lambda x: x.swapdims(2, 3).swapdims(1, 2),
    ),
    "mT": (lambda x: x.mT.contiguous(), lambda x: x.mT),
    "unflatten": (lambda x: x.flatten(2), lambda x: x.unflatten(2, (8, 6))),
}


class Moved(nn.Module):
    """A trunk; before the pooling one function moves its dimensions and another moves them back."""

    def __init__(self, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU())
        self.fc = nn.Linear(5, 4)
        self.there, self.back = there, back

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.back(self.there(self.trunk(x))).mean((2, 3)))
        return out


@pytest.mark.parametrize("move", MOVES, ids=str)
@pytest.mark.parametrize("name", ["CAM", "GradCAM", "RelevanceCAM", "LIFTCAM", "AblationCAM"])
def test_functions_that_move_positions_change_no_map(move: str, name: str) -> None:
    torch.manual_seed(0)
    moved = Moved(*MOVES[move]).double().eval()
    plain = Moved(lambda x: x, lambda x: x).double().eval()
    plain.load_state_dict(moved.state_dict())
    x = torch.randn(2, 3, 12, 10, dtype=torch.float64)
    method = camkit.METHODS[name]
    torch.testing.assert_close(method(moved)(x, target=1).maps, method(plain)(x, target=1).maps)
    if name == "CAM":
        torch.manual_seed(0)
        one = camkit.attach_gap_head(moved, 3, input_shape=(3, 12, 10))
        torch.manual_seed(0)
        other = camkit.attach_gap_head(plain, 3, input_shape=(3, 12, 10))
        torch.testing.assert_close(
            one.class_maps(x).maps.sort().values, other.class_maps(x).maps.sort().values
        )


@pytest.mark.parametrize("transposed", [lambda w: w.t(), lambda w: w.T, lambda w: w.mT], ids=["t", "T", "mT"])
def test_a_transposed_weight_is_a_weight(transposed: Callable[[Tensor], Tensor]) -> None:
    """The head multiplies the pooled activation by a weight that its forward pass transposes."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
            self.weight = nn.Parameter(torch.randn(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.trunk(x).mean((2, 3)), transposed(self.weight.detach().T.contiguous()))

    model = Head().double().eval()
    maps = camkit.GradCAM(model)(IMAGES, target=2).maps
    with torch.no_grad():
        features = model.trunk(IMAGES)
        weights = model.weight[2] / features[0, 0].numel()
        expected = torch.einsum("c,nchw->nhw", weights, features).relu()
    torch.testing.assert_close(maps, expected)


def test_an_activation_prints_its_arguments() -> None:
    assert (
        repr(Activation("leaky_relu", [0.2], {"inplace": False}))
        == "Activation(leaky_relu, 0.2, inplace=False)"
    )


def test_a_rule_that_forgets_to_meet_is_told() -> None:
    with pytest.raises(NotImplementedError), FunctionMode():
        torch.relu(X)
