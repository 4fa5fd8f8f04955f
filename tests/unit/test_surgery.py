"""Networks with a global-average-pooling head: their logits, class maps, trunk and training."""

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchvision
from torch import Tensor, nn

import camkit
from camkit import surgery
from helpers.families import FAMILIES, TINY, Digits, Family, Plain, Tiny, Tokens, build, images, tiny
from helpers.fingerprint import fingerprint


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def check_identity(net: camkit.CAMNet, x: Tensor) -> None:
    """Asserts that the mean of map k plus bias k is logit k, to 1e-9 relative, and that no map is flat."""
    with torch.no_grad():
        # The bias is as large as the logits, so an error shows if it is lost or counted twice.
        net.head.linear.bias.zero_()
        net.head.linear.bias.normal_(std=net(x).std().item() + 1e-30)
        output = net(x)
    logits, maps = net.class_maps(x)
    assert torch.equal(logits, output)
    error = (maps.mean((2, 3)) + net.head.linear.bias - logits).abs().max() / logits.abs().max()
    assert error < 1e-9
    if maps.shape[2] * maps.shape[3] > 1:
        assert (maps.amax((2, 3)) > maps.amin((2, 3))).all()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_identity_and_trunk_on_every_family(family: Family) -> None:
    model = build(family.name)
    x = images(family).double()
    net = camkit.attach_gap_head(model, 5).double()
    assert net.layer == family.layer
    assert not net.training
    check_identity(net, x)

    # The pooled activation is the one that the whole model computes there, after DenseNet's ReLU.
    kept: list[Tensor] = []
    handle = model.get_submodule(family.layer).register_forward_hook(lambda m, a, o: kept.append(o.clone()))
    with torch.no_grad():
        model.double()(x)
    handle.remove()
    activation = kept[0].relu() if family.name == "densenet121" else kept[0]
    if activation.ndim == 3:  # ViT: leave out the class token, and put the channels second
        activation = activation[:, 1:].transpose(1, 2)
    pooled = activation.flatten(2).mean(2)
    expected = pooled @ net.head.linear.weight.T + net.head.linear.bias
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(torchvision.models))
def test_identity_on_every_classifier(name: str) -> None:
    model = build(name)
    net = camkit.attach_gap_head(model, 5)
    assert parameters(net.trunk) < parameters(model)
    del model
    size = 224 if name.startswith(("vit", "maxvit")) else 96
    check_identity(net.double(), torch.randn(1, 3, size, size).double())


def test_all_80_classifiers_are_there() -> None:
    assert len(torchvision.models.list_models(torchvision.models)) == 80


@pytest.mark.parametrize("kind", TINY, ids=lambda t: t.model.__name__)
def test_identity_on_hand_made_models(kind: Tiny) -> None:
    net = camkit.attach_gap_head(tiny(kind.model), 3, input_shape=kind.shape)
    check_identity(net, torch.randn(4, *kind.shape).double())


@pytest.mark.parametrize(
    ("name", "layer", "channels", "size"),
    [
        ("vgg16", "features.29", 512, (14, 14)),
        ("alexnet", "features.11", 256, (13, 13)),
        ("googlenet", "inception4e", 832, (14, 14)),
    ],
)
def test_the_cuts_of_the_paper_give_finer_maps(
    name: str, layer: str, channels: int, size: tuple[int, int]
) -> None:
    model = build(name)
    net = camkit.attach_gap_head(model, 10, layer=layer, conv_channels=64)
    conv = net.head.features.conv
    assert isinstance(conv, nn.Conv2d)
    assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.padding) == (
        channels,
        64,
        (3, 3),
        (1, 1),
    )
    assert net.class_maps(torch.rand(1, 3, 224, 224)).maps.shape == (1, 10, *size)
    check_identity(net.double(), torch.rand(2, 3, 224, 224).double())


def test_the_dead_head_is_not_copied() -> None:
    model = torchvision.models.vgg16()
    assert parameters(model) == 138_357_544
    net = camkit.attach_gap_head(model, 7)
    assert parameters(net.trunk) == 14_714_688
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 3_591
    assert parameters(model) == 138_357_544
    net = camkit.attach_gap_head(torchvision.models.alexnet(), 7)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 1_799


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "vit_b_32", "densenet121"])
def test_published_weights_load_into_the_trunk_by_their_own_names(name: str) -> None:
    net = camkit.attach_gap_head(build(name), 3)
    published = build(name).state_dict()
    result = net.trunk.load_state_dict(published, strict=False)
    assert not result.missing_keys
    heads = ("fc.", "heads.", "classifier.", "aux")
    assert result.unexpected_keys
    assert all(key.startswith(heads) for key in result.unexpected_keys)
    for key, value in net.trunk.state_dict().items():
        assert torch.equal(value, published[key])


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vit_b_32"])
def test_saved_copied_pickled(name: str) -> None:
    family = next(f for f in FAMILIES if f.name == name)
    model = build(name)
    net = camkit.attach_gap_head(model, 3)
    x = images(family)
    expected = net.class_maps(x)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    again = camkit.attach_gap_head(build(name), 3)
    again.load_state_dict(torch.load(file))
    # A network from a state_dict, a deep copy and a pickled copy all return the same.
    for other in (again, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        result = other.class_maps(x)
        assert torch.equal(result.logits, expected.logits)
        assert torch.equal(result.maps, expected.maps)
    clone = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert clone(x).abs().max() == 0  # the copy's hook is on its own trunk
    assert torch.equal(net(x), expected.logits)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_exports(family: Family) -> None:
    net = camkit.attach_gap_head(build(family.name), 3)
    x = images(family)
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vit_b_32", "swin_t"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch while it compiles
def test_compiles_without_a_graph_break(name: str) -> None:
    family = next(f for f in FAMILIES if f.name == name)
    net = camkit.attach_gap_head(build(name), 3)
    x = images(family)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


def test_the_users_model_is_untouched() -> None:
    model = build("googlenet").train()
    before = fingerprint(model)
    net = camkit.attach_gap_head(model, 3)
    assert net.training
    net(torch.rand(2, 3, 64, 64)).sum().backward()
    net.unfreeze()(torch.rand(2, 3, 64, 64)).sum().backward()
    after = fingerprint(model)
    del before["torch random"], after["torch random"]  # the new layers draw random weights
    assert after == before


def test_a_frozen_trunk_stays_as_it_is_in_training() -> None:
    net = camkit.attach_gap_head(build("resnet18").train(), 3)
    assert net.training
    assert net.head.training
    assert not any(m.training for m in net.trunk.modules())
    state = copy.deepcopy(net.trunk.state_dict())
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        net.train()(torch.rand(2, 3, 64, 64)).square().sum().backward()
        optimizer.step()
    for key, value in net.trunk.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(p.grad is None for p in net.trunk.parameters())
    assert all(p.grad is not None for p in net.head.parameters())


def test_unfreeze_lets_all_train() -> None:
    net = camkit.attach_gap_head(build("resnet18"), 3).train().unfreeze()
    assert all(m.training for m in net.modules())
    running = net.trunk.get_buffer("bn1.running_mean").clone()
    net(torch.rand(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert not torch.equal(net.trunk.get_buffer("bn1.running_mean"), running)
    # The trunk of a model in evaluation mode stays in evaluation mode.
    assert not camkit.attach_gap_head(build("resnet18"), 3).unfreeze().trunk.training


def test_freeze_false_trains_what_the_user_left_trainable() -> None:
    model = Plain().train()
    model.features[0].weight.requires_grad_(False)
    net = camkit.attach_gap_head(model, 3, input_shape=(3, 12, 10), freeze=False)
    assert net.trunk.training
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["trunk.features.0.weight"]


def test_training_the_new_head_works() -> None:
    net = camkit.attach_gap_head(Plain(), 2, input_shape=(3, 12, 10)).train()
    x = torch.randn(16, 3, 12, 10)
    y = torch.arange(16) % 2
    x[y == 1, 0] += 2  # the first channel tells the two classes apart
    optimizer = torch.optim.Adam(net.head.parameters(), lr=0.1)
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (net(x).argmax(1) == y).float().mean() > 0.9


def test_gradients_reach_the_trunk_when_it_is_not_frozen() -> None:
    """The gradient of the trunk equals that of the same layers in the original model."""
    model = tiny(Plain)
    net = camkit.attach_gap_head(model, 4, input_shape=(3, 12, 10), freeze=False)
    net.head.linear.load_state_dict(model.fc.state_dict())
    x = torch.randn(3, 3, 12, 10).double()
    net(x).square().sum().backward()
    model(x).square().sum().backward()
    for name in ("features.0.weight", "features.1.bias", "features.4.weight"):
        torch.testing.assert_close(net.trunk.get_parameter(name).grad, model.get_parameter(name).grad)


def test_max_pooling() -> None:
    net = camkit.attach_gap_head(tiny(Plain), 3, pooling="max", input_shape=(3, 12, 10))
    x = torch.randn(2, 3, 12, 10).double()
    features = net.trunk.get_submodule("features")(x)
    expected = features.amax((2, 3)) @ net.head.linear.weight.T + net.head.linear.bias
    torch.testing.assert_close(net(x), expected)
    explained = camkit.CAM(net)(x, target=1)
    torch.testing.assert_close(explained.maps, net.class_maps(x).maps[:, 1])


@pytest.mark.parametrize(
    "layer",
    ["layer4.1.conv1", "layer4.1.bn2", "layer4.0.downsample", "layer3", "layer1.0.relu", "maxpool"],
)
def test_a_cut_anywhere_gives_that_layer(layer: str) -> None:
    model = build("resnet18")
    x = torch.randn(2, 3, 64, 64)
    if layer.endswith("relu"):  # this ReLU runs twice in its block
        with pytest.raises(ValueError, match="ran 2 times"):
            camkit.attach_gap_head(model, 3, layer=layer)
        return
    net = camkit.attach_gap_head(model, 3, layer=layer)
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, a, o: kept.append(o.clone()))
    model(x)
    handle.remove()
    pooled = kept[0].mean((2, 3))
    expected = pooled @ net.head.linear.weight.T + net.head.linear.bias
    torch.testing.assert_close(net(x), expected)


def test_a_cut_inside_a_bottleneck_and_inside_attention() -> None:
    """Inside these blocks an identity in place of the later layers would not fit."""
    net = camkit.attach_gap_head(build("resnet50"), 3, layer="layer4.2.conv1")
    assert net.class_maps(torch.rand(1, 3, 64, 64)).maps.shape == (1, 3, 2, 2)
    net = camkit.attach_gap_head(Tokens(), 3, layer="norm1", input_shape=(3, 16, 12))
    assert net.class_maps(torch.rand(1, 3, 16, 12)).maps.shape == (1, 3, 4, 3)


def test_a_headless_trunk_and_a_grey_one() -> None:
    trunk = nn.Sequential(*list(build("resnet18").children())[:-2])
    check_identity(camkit.attach_gap_head(trunk, 4).double(), torch.rand(2, 3, 64, 96).double())
    net = camkit.attach_gap_head(Digits(), 4, input_shape=(1, 28, 28))
    assert net.class_maps(torch.rand(1, 1, 40, 50)).maps.shape == (1, 4, 36, 46)  # any input size


class Lists(nn.Module):
    """Has blocks in lists, a stem whose children run one by one, and a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
        self.scale = nn.Linear(1, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.heads = nn.ModuleList([nn.Linear(4, 500), nn.Linear(500, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.stem.children():
            x = module(x)
        x = x * self.scale.weight
        for block in self.blocks:
            x = block(x)
        x = x.mean((2, 3))
        for head in self.heads:
            x = head(x)
        return x


def test_what_is_used_without_being_called_stays_and_dead_lists_go() -> None:
    model = Lists().double().eval()
    nn.init.normal_(model.stem.get_parameter("0.bias"))
    x = torch.randn(2, 3, 9, 9).double()
    net = camkit.attach_gap_head(model, 2, input_shape=(3, 9, 9))
    assert net.layer == "blocks.1"
    assert parameters(net.trunk) == parameters(model) - parameters(model.heads)
    kept: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda m, a, out: kept.append(out))
    model(x)
    expected = kept[0].mean((2, 3)) @ net.head.linear.weight.T + net.head.linear.bias
    torch.testing.assert_close(net(x), expected)
    # Here the scale is dead too, but something reads its weight, so that the dead modules stay.
    whole = camkit.attach_gap_head(model, 2, layer="stem.1", input_shape=(3, 9, 9))
    pooled = model.stem(x).mean((2, 3))
    torch.testing.assert_close(whole(x), pooled @ whole.head.linear.weight.T + whole.head.linear.bias)


def test_a_network_within_a_network() -> None:
    inner = camkit.attach_gap_head(tiny(Plain), 3, input_shape=(3, 12, 10))
    x = torch.randn(2, 3, 12, 10).double()
    outer = camkit.attach_gap_head(nn.Sequential(inner, nn.Linear(3, 2).double()), 4, input_shape=(3, 12, 10))
    check_identity(outer, x)
    check_identity(inner, x)
    again = camkit.attach_gap_head(inner, 4, input_shape=(3, 12, 10)).unfreeze()
    check_identity(again, x)
    again(x).sum().backward()
    assert again.trunk.get_parameter("trunk.features.0.weight").grad is not None


def test_running_the_trunk_alone_keeps_at_most_one_activation() -> None:
    net = camkit.attach_gap_head(Plain(), 3, input_shape=(3, 12, 10))
    x = torch.rand(1, 3, 12, 10)
    before = len(surgery._captured.activations)
    for _ in range(3):
        net.trunk(x)
    assert len(surgery._captured.activations) <= before + 1
    net(x)
    assert len(surgery._captured.activations) == before


def test_a_model_that_cannot_be_copied() -> None:
    model = Plain()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(
        TypeError, match="^model: expected a model that copy.deepcopy can copy, got Plain .TypeE"
    ):
        camkit.attach_gap_head(model, 3, input_shape=(3, 12, 10))


def test_threads_share_a_network() -> None:
    net = camkit.attach_gap_head(build("resnet18"), 3)
    batches = [torch.randn(1, 3, 64, 64) for _ in range(32)]
    expected = [net.class_maps(x).maps for x in batches]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: net.class_maps(x).maps, batches))
    for result, one in zip(results, expected, strict=True):
        torch.testing.assert_close(result, one, rtol=1e-4, atol=1e-5)


def test_the_head_is_of_the_models_type() -> None:
    net = camkit.attach_gap_head(tiny(Plain), 3, input_shape=(3, 12, 10), conv_channels=2)
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    assert {p.device.type for p in camkit.attach_gap_head(model, 3).parameters()} == {"meta"}
