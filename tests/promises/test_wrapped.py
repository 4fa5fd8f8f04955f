"""Models inside others: in parallel, distributed, compiled."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import camkit
from helpers.families import Plain, Skip, tiny

METHODS: list[Any] = [
    camkit.CAM,
    camkit.GradCAM,
    camkit.AblationCAM,
    camkit.LIFTCAM,
    camkit.ScoreCAM,
    camkit.FullGrad,
]
X = torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def distributed() -> Iterator[None]:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(distributed: None) -> None:
    model = tiny(Plain)
    wrapped = nn.parallel.DistributedDataParallel(model)
    agree(wrapped, model)
    assert camkit.GradCAM(wrapped, "module.features.4")(X).layer == "features.4"


def agree(wrapped: nn.Module, model: nn.Module) -> None:
    for method in METHODS:
        expected = method(model)(X, 1)
        found = method(wrapped)(X, 1)
        assert torch.equal(found.maps, expected.maps)
        assert found.layer == expected.layer
    assert camkit.list_layers(wrapped, (3, 12, 10)) == camkit.list_layers(model, (3, 12, 10))
    assert torch.equal(camkit.guided_backprop(wrapped, X, 1), camkit.guided_backprop(model, X, 1))
    net = camkit.attach_gap_head(wrapped, 3, input_shape=(3, 12, 10))
    assert not any("module" in name or "_orig_mod" in name for name in net.state_dict())


def test_data_parallel() -> None:
    model = tiny(Plain)
    agree(nn.DataParallel(model), model)
    layer = model.features[4]
    assert camkit.GradCAM(nn.DataParallel(model), layer)(X).layer == "features.4"
    assert camkit.GradCAM(nn.DataParallel(model), "module.features.4")(X).layer == "features.4"


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def test_compiled_from_outside() -> None:
    model = tiny(Plain)
    wrapped = compiled(model)
    wrapped(X)
    agree(wrapped, model)


def in_place(model: Any) -> None:
    model.compile(backend="eager")


def a_part(model: Any) -> None:
    model.block = compiled(model.block)


def a_part_in_place(model: Any) -> None:
    model.block.compile(backend="eager")


@pytest.mark.parametrize("change", [in_place, a_part, a_part_in_place])
def test_compiled_inside(change: Callable[[Any], None]) -> None:
    """Layers and ReLUs inside the compiled part are reached."""
    plain, changed = tiny(Skip), tiny(Skip)
    changed.load_state_dict(plain.state_dict())
    change(changed)
    with torch.no_grad():
        expected = changed(X)
    inside = next(module for module in changed.block.modules() if isinstance(module, nn.Conv2d))
    for method in (
        camkit.GradCAM,
        camkit.AblationCAM,
        camkit.LIFTCAM,
        camkit.RelevanceCAM,
        camkit.GuidedGradCAM,
    ):
        found = method(changed, inside)(X, 1)
        assert torch.equal(found.maps, method(plain, "block.0")(X, 1).maps)
    with torch.no_grad():
        torch.testing.assert_close(changed(X), expected)


def test_it_is_compiled_again_afterwards() -> None:
    ran: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Tensor) -> Any:
            ran.append(1)
            return graph(*args)

        return run

    model = tiny(Plain)
    wrapped = torch.compile(model, backend=backend)
    wrapped(X)
    before = len(ran)
    camkit.GradCAM(wrapped)(X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target"):
        camkit.GradCAM(wrapped)(X, 99)  # type: ignore[arg-type]
    assert len(ran) == before
    wrapped(X)
    assert len(ran) > before
