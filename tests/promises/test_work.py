"""How much work each method makes, counted and not timed: passes of the trunk and of the head, and backward.

A change that runs the model once more, or lets a gradient reach the parameters, is seen here on any machine.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import camkit
from helpers.families import Plain, Residual, Transformer, tiny
from helpers.registry import make

N, C = 2, 6  # images, and channels of Plain's last layer


class Work(NamedTuple):
    """The work of one call.

    Attributes:
        trunk: images that go through the first layer.
        head: images that go through the last.
        backward: backward passes.
    """

    trunk: int
    head: int
    backward: int


def counted(monkeypatch: pytest.MonkeyPatch, model: nn.Module, call: Callable[[], object]) -> Work:
    """The work of a call. Fails if it would compute the gradient of a parameter."""
    rows = {"first": 0, "last": 0}
    backward, depth = 0, 0
    grad = torch.autograd.grad
    parameters = {id(parameter) for parameter in model.parameters()}

    def counting(place: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows[place] += len(args[0])

        return hook

    def counting_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal backward, depth
        assert parameters.isdisjoint(map(id, [inputs] if isinstance(inputs, Tensor) else inputs))
        backward += depth == 0  # and not a rule's own, within a pass
        depth += 1
        try:
            return grad(outputs, inputs, *args, **kwargs)
        finally:
            depth -= 1

    def forbidden(*args: object) -> None:
        raise AssertionError("a gradient reached a parameter")

    first, *_, last = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    handles = [parameter.register_hook(forbidden) for parameter in model.parameters()]
    # A dry run, which costs next to nothing, takes no hooks along.
    handles += [
        module.register_forward_pre_hook(counting(place))
        for place, module in (("first", first), ("last", last))
    ]
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counting_grad)
        patch.setattr(torch.autograd, "backward", forbidden)
        call()
    for handle in handles:
        handle.remove()
    return Work(rows["first"], rows["last"], backward)


SHAPES = {Plain: (3, 12, 10), Transformer: (3, 16, 12), Residual: (3, 11, 13)}


def images(network: type[nn.Module]) -> Tensor:
    return torch.randn(N, *SHAPES[network]).double()


# Before the part after the layer runs alone, two copies of the batch prove it, once a call.
PROOF = 2 * N
# For K scores; of the methods that take a number of samples, two.
EXPECTED: dict[str, Callable[[int], Work]] = {
    **dict.fromkeys(["CAM", "EigenCAM", "KPCACAM", "FEM", "RandomCAM"], lambda k: Work(N, N, 0)),
    # Through pooling and a linear layer, the gradients of all scores go in one pass.
    **dict.fromkeys(
        ["GradCAM", "GradCAMPlusPlus", "XGradCAM", "HiResCAM", "LayerCAM", "EigenGradCAM"],
        lambda k: Work(N, N, 1),
    ),
    "FullGrad": lambda k: Work(N, N, k),
    "SmoothGradCAMPlusPlus": lambda k: Work(3 * N, 3 * N, 2),
    "GuidedGradCAM": lambda k: Work(2 * N, 2 * N, 1 + k),
    "ShapleyCAM": lambda k: Work(N, N + PROOF + N, 2 * k),
    "LIFTCAM": lambda k: Work(N, N + PROOF + 2 * N, k),
    # One backward pass for the start, one for how much is conserved, and one a score.
    "RelevanceCAM": lambda k: Work(N, N + PROOF + N, 2 + k),
    "AblationCAM": lambda k: Work(N, N + PROOF + C * N, 0),
    "ScoreCAM": lambda k: Work(N + C * N, N + C * N, 0),
    **dict.fromkeys(["SSCAM", "ISCAM"], lambda k: Work(N + 2 * C * N, N + 2 * C * N, 0)),
    # Its two layers have 5 and 6 channels, each shown and hidden.
    "PolyCAM": lambda k: Work(N + 2 * (5 + C) * N, N + 2 * (5 + C) * N, 0),
    # Two blocks, of which the second needs the attention of the first; the part after each runs once more.
    "LeGrad": lambda k: Work(2 * N, 2 * N + 2 * PROOF, 2 * k),
}


@pytest.mark.parametrize("scores", [1, 3])
@pytest.mark.parametrize("name", camkit.METHODS)
def test_a_call_makes_no_more_work_than_it_needs(
    name: str, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model runs no more often for more scores."""
    network = Transformer if name == "LeGrad" else Plain
    model, x = tiny(network), images(network)
    if isinstance(model, Plain):
        nn.init.ones_(model.get_parameter("features.4.bias"))  # no channel is zero
    method, target = make(name, model), [list(range(scores))] * N
    for _ in range(2):  # with its dry run, and without
        assert counted(monkeypatch, model, lambda: method(x, target)) == EXPECTED[name](scores)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 4)], 1),
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(C), nn.Linear(C, 4)], 1),
        ([nn.ReLU(), nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(2 * C, 5), nn.ReLU()], 1),
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 5), nn.Sigmoid()], 3),
        ([nn.Conv2d(C, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()], 3),
    ],
    ids=["linear", "norm", "two layers", "sigmoid", "convolution"],
)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_several_scores_share_a_backward_pass(
    head: list[nn.Module], expected: int, memory: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients are those that each score has alone."""
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.ReLU(), *head).double().to(memory_format=memory)
    x, classes = images(Plain).to(memory_format=memory), [[0, 1, 2], [3, 0, 1]]
    method = camkit.HiResCAM(model, "0")
    found = []
    assert counted(monkeypatch, model, lambda: found.append(method(x, classes))) == Work(N, N, expected)
    alone = [method(x, [row[k] for row in classes]).maps for k in range(3)]
    torch.testing.assert_close(found[0].maps, torch.stack(alone, 1), rtol=1e-12, atol=1e-15)


def test_many_scores_share_a_few_backward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most sixteen a pass, which bounds the memory of the gradients between the scores and the layer."""
    model = nn.Sequential(
        nn.Conv2d(3, C, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 40)
    ).double()
    method, x = camkit.HiResCAM(model, "0"), images(Plain)
    found = []
    work = counted(monkeypatch, model, lambda: found.append(method(x, [list(range(33))] * N)))
    assert work == Work(N, N, 3)
    for k in (0, 15, 16, 32):
        torch.testing.assert_close(found[0].maps[:, k], method(x, k).maps)


class Relu(torch.autograd.Function):
    """A user's own, with the name of one of torch's: its gradient is twice the one that arrives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.relu()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.from_numpy(2 * gradient.numpy())


def test_functions_and_hooks_of_the_users_are_called_for_each_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Own(Plain):
        def forward(self, x: Tensor) -> Tensor:
            scores = Relu.apply(super().forward(x))
            if scores.requires_grad:
                scores.register_hook(lambda gradient: gradient.mul_(3))
            return scores  # type: ignore[no-any-return]

    model, x = tiny(Own), images(Plain)[:1]
    nn.init.constant_(model.fc.bias, 5.0)  # every score is positive
    method = camkit.HiResCAM(model)
    found = []
    assert counted(monkeypatch, model, lambda: found.append(method(x, lambda y: y))) == Work(1, 1, 4)
    activation = model.features(x).detach()
    weights = model.fc.weight.detach()[None, :, :, None, None] / activation[0, 0].numel()
    expected = 6 * weights * activation[:, None]
    torch.testing.assert_close(found[0].maps, expected.sum(2))


def test_the_table_has_every_method() -> None:
    assert EXPECTED.keys() == camkit.METHODS.keys()


def test_several_layers_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny(Residual), images(Residual)
    method = camkit.GradCAM(model, ["stem", "body", "out"])
    assert counted(monkeypatch, model, lambda: method(x, 1)) == Work(N, N, 3)


def test_inside_a_block_the_trunk_runs_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the other summand of the block, and never runs again, however many channels there are."""
    model, x = tiny(Residual), images(Residual)
    method, channels = camkit.AblationCAM(model, "body"), model.body.out_channels
    found = counted(monkeypatch, model, lambda: method(x, 1))
    assert found == Work(2 * N, 2 * N + PROOF + channels * N, 0)


def test_a_smoothed_method_makes_a_call_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny(Plain), images(Plain)
    method = camkit.Smoothed(camkit.GradCAM(model), camkit.noise_views(samples=3))
    assert counted(monkeypatch, model, lambda: method(x, 1)) == Work(4 * N, 4 * N, 4)


@pytest.mark.parametrize("zero", [2, C])
def test_channels_that_are_zero_are_not_left_out_one_by_one(
    zero: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = tiny(Plain), images(Plain)
    nn.init.ones_(model.get_parameter("features.4.bias"))
    nn.init.constant_(model.get_parameter("features.4.bias")[:zero], -100)
    rest = N + PROOF + (C - zero) * N if zero < C else N
    assert counted(monkeypatch, model, lambda: camkit.AblationCAM(model)(x, 1)) == Work(N, rest, 0)


@pytest.mark.parametrize("name", ["ScoreCAM", "SSCAM", "ISCAM", "PolyCAM"])
def test_channels_that_are_not_scored_cost_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny(Plain), images(Plain)
    method = make(name, model, "features", channels=2)
    passes = 1 + 2 * (1 if name == "ScoreCAM" else 2)
    assert counted(monkeypatch, model, lambda: method(x, 1)) == Work(passes * N, passes * N, 0)


def count_calls(model: nn.Module, name: str) -> list[int]:
    seen: list[int] = []
    forward = model.get_submodule(name).forward

    def counted(x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            seen.append(len(x))
        return forward(x)  # type: ignore[no-any-return]

    model.get_submodule(name).forward = counted
    return seen


@pytest.mark.parametrize(
    "method", [camkit.AblationCAM, camkit.LIFTCAM, camkit.RelevanceCAM, camkit.ShapleyCAM]
)
@pytest.mark.filterwarnings("ignore:RelevanceCAM")
def test_the_trunk_runs_once(method: type[camkit.Explainer]) -> None:
    model = tiny(Plain)
    seen = count_calls(model, "features.0")
    method(model)(torch.randn(2, 3, 12, 10).double(), 1)
    assert seen == [2]


def test_legrad_runs_the_trunk_twice_and_no_more() -> None:
    model = tiny(Transformer)
    seen = count_calls(model, "patches")
    for layer, passes in ((None, 2), ("blocks.0", 2), ("blocks.1", 2)):
        seen.clear()
        camkit.LeGrad(model, layer)(torch.randn(2, 3, 16, 12).double(), [[0, 1], [2, 3]])
        assert seen == [2] * passes
