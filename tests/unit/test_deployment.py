"""Exporting a network with class maps to a torch.export program and to ONNX."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchvision.models import DenseNet, SwinTransformer, VisionTransformer

import camkit
from helpers.families import FAMILIES, ChannelsLast, Family, Plain, Skip, Tokens, build, images
from helpers.fingerprint import fingerprint

QUICK = ("alexnet", "resnet18")
SHAPE = (3, 12, 10)


def settle(model: nn.Module, x: Tensor) -> nn.Module:
    """Gives BatchNorm layers the statistics of ``x``, so that activations do not grow from layer to layer.

    Rounding differences between two runtimes would grow with them, until they are as large as the result.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        model(x)
    return model.eval()


def net_of(model: nn.Module, shape: tuple[int, ...] = SHAPE, **arguments: Any) -> camkit.CAMNet:
    return camkit.attach_gap_head(model, 3, input_shape=shape, **arguments)


def run(path: Path, x: Tensor) -> camkit.ClassMaps:
    session = onnxruntime.InferenceSession(path)
    logits, maps = session.run(["logits", "maps"], {"images": x.numpy()})
    return camkit.ClassMaps(torch.from_numpy(logits), torch.from_numpy(maps))


def difference(got: camkit.ClassMaps, expected: camkit.ClassMaps) -> float:
    """The largest difference of the logits or of the maps, relative to the largest expected magnitude."""
    assert got.logits.shape == expected.logits.shape
    assert got.maps.shape == expected.maps.shape
    assert expected.maps.shape[2:].numel() == 1 or (expected.maps.amin() < 0 < expected.maps.amax())
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True))


def check_program(program: ExportedProgram, net: camkit.CAMNet, x: Tensor) -> None:
    module = program.module()
    for count in (1, 2, 5):
        output = module(x[:count])
        assert list(output) == ["logits", "maps"]
        assert difference(camkit.ClassMaps(**output), net.class_maps(x[:count])) < 1e-5


def check_onnx(path: Path, net: camkit.CAMNet, x: Tensor) -> None:
    onnx.checker.check_model(path, full_check=True)
    for count in (1, 3):
        assert difference(run(path, x[:count]), net.class_maps(x[:count])) < 1e-4


def check_both(net: camkit.CAMNet, x: Tensor, folder: Path) -> None:
    shape = tuple(x.shape[1:])
    check_program(camkit.export(net, shape), net, x)
    camkit.export_onnx(net, folder / "net.onnx", shape)
    check_onnx(folder / "net.onnx", net, x)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f.name in QUICK else pytest.mark.slow, id=f.name) for f in FAMILIES],
)
def test_both_graphs_of_every_family_give_the_networks_numbers(family: Family, tmp_path: Path) -> None:
    x = images(family, 5)
    many = x if family.fixed_size else torch.randn(8, 3, 160, 160)
    net = camkit.attach_gap_head(settle(build(family.name), many), 5)
    program = camkit.export(net, tuple(x.shape[1:]))
    check_program(program, net, x)
    torch.export.save(program, tmp_path / "net.pt2")
    check_program(torch.export.load(tmp_path / "net.pt2"), net, x)
    camkit.export_onnx(net, tmp_path / "net.onnx", tuple(x.shape[1:]))
    check_onnx(tmp_path / "net.onnx", net, x)


def small_vit() -> nn.Module:
    vit: nn.Module = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4
    )
    nn.init.normal_(vit.get_parameter("encoder.pos_embedding"))
    return vit.eval()


def small_swin() -> nn.Module:
    swin: nn.Module = SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=[2, 2], num_classes=4
    )
    return swin.eval()


def small_densenet() -> nn.Module:
    densenet = DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=4)
    return settle(densenet, torch.randn(5, 3, 32, 32))


@pytest.mark.parametrize("build", [small_vit, small_swin, small_densenet])
def test_small_ones_of_every_layout(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    check_both(net_of(build(), (3, 32, 32)), torch.randn(5, 3, 32, 32), tmp_path)


class AnyDims(nn.Module):
    """A network for signals, images or volumes, with 1, 2 or 3 spatial dimensions."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            getattr(nn, f"Conv{dims}d")(2, 4, 3), getattr(nn, f"BatchNorm{dims}d")(4), nn.ReLU()
        )
        self.fc = nn.Linear(4, 5)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean(tuple(range(2, 2 + self.dims))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_signals_and_volumes(dims: int, pooling: str, tmp_path: Path) -> None:
    shape = (2, 9, 8, 7)[: dims + 1]
    net = net_of(AnyDims(dims).eval(), shape, pooling=pooling, conv_channels=4)
    check_both(net, torch.randn(5, *shape), tmp_path)


def test_names_and_the_open_dimension(tmp_path: Path) -> None:
    net = net_of(Plain().eval())
    program = camkit.export(net, SHAPE)
    assert program.graph_signature.user_inputs == ("images",)
    (limits,) = program.range_constraints.values()
    assert limits.lower == 1
    assert set(program.state_dict) == set(net.state_dict())
    camkit.export_onnx(net, tmp_path / "net.onnx", SHAPE)
    graph = onnx.load(tmp_path / "net.onnx").graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {"images": ["batch", *SHAPE], "logits": ["batch", 3], "maps": ["batch", 3, 4, 3]}


def test_the_mean_of_a_map_and_the_bias_are_the_logit(tmp_path: Path) -> None:
    net = net_of(Plain().eval())
    nn.init.normal_(net.head.linear.bias, std=10)
    x = torch.randn(4, *SHAPE)
    camkit.export_onnx(net, tmp_path / "net.onnx", SHAPE)
    logits, maps = run(tmp_path / "net.onnx", x)
    torch.testing.assert_close(maps.mean((2, 3)) + net.head.linear.bias, logits)
    assert maps.min() < 0 < maps.max()


def test_a_saved_program_runs_where_there_is_no_camkit(tmp_path: Path) -> None:
    net = net_of(Plain().eval())
    x = torch.randn(2, *SHAPE)
    torch.export.save(camkit.export(net, SHAPE), tmp_path / "net.pt2")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; sys.modules['camkit'] = None\n"
        "torch.save(torch.export.load('net.pt2').module()(torch.load('x.pt')), 'y.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    output = torch.load(tmp_path / "y.pt")
    assert difference(camkit.ClassMaps(**output), net.class_maps(x)) < 1e-5


def shaken(net: camkit.CAMNet) -> camkit.CAMNet:
    """Puts a network in training mode, unfrozen, with gradients, one module in evaluation mode and a hook."""
    net.unfreeze().train()
    net(torch.randn(2, *SHAPE)).sum().backward()
    net.trunk.get_submodule("features.1").eval()
    net.trunk.get_submodule("features.2").register_forward_hook(lambda module, args, output: 3 * output)
    return net


def evaluated(net: camkit.CAMNet, x: Tensor) -> camkit.ClassMaps:
    modes = [module.training for module in net.modules()]
    net.eval()
    expected = net.class_maps(x)
    for module, mode in zip(net.modules(), modes, strict=True):
        module.training = mode
    return expected


class Drops(Plain):
    """Ends in a dropout, so that its output shows whether it is in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.features.append(nn.Dropout())


def test_the_network_is_left_as_found_and_exported_in_evaluation_mode(tmp_path: Path) -> None:
    net = shaken(net_of(Drops()))
    x = torch.randn(3, *SHAPE)
    expected = evaluated(net, x)
    before = fingerprint(net)
    program = camkit.export(net, SHAPE)
    camkit.export_onnx(net, tmp_path / "net.onnx", SHAPE)
    assert fingerprint(net) == before
    output = program.module()(x)
    assert difference(camkit.ClassMaps(**output), expected) < 1e-5
    assert not output["maps"].requires_grad
    assert difference(run(tmp_path / "net.onnx", x), expected) < 1e-4


class Fails(Plain):
    """Draws random numbers and counts its passes.

    If ``fails`` is set, it raises an error while it is traced, but not in a dry run on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Buffer(torch.zeros(()))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        x = self.features(x + 0 * torch.rand_like(x))
        if self.fails and x.device.type != "meta":
            raise RuntimeError("the reason")
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_the_network_is_left_as_found_when_it_fails(tmp_path: Path) -> None:
    net = shaken(net_of(Fails()))
    before = fingerprint(net)
    camkit.export(net, SHAPE)
    assert fingerprint(net) == before
    net.trunk.fails = True  # type: ignore[assignment]
    before = fingerprint(net)
    for call in (lambda: camkit.export(net, SHAPE), lambda: camkit.export_onnx(net, tmp_path / "n", SHAPE)):
        with pytest.raises(ValueError, match="the reason"):
            call()
    assert fingerprint(net) == before
    assert list(tmp_path.iterdir()) == []


def test_it_works_in_inference_mode_and_leaves_the_mode() -> None:
    net = net_of(Plain().eval())
    x = torch.randn(2, *SHAPE)
    with torch.inference_mode():
        program = camkit.export(net, SHAPE)
        assert torch.is_inference_mode_enabled()
    x.requires_grad_()
    output = program.module()(x)
    output["logits"].sum().backward()
    assert x.grad is not None
    assert difference(camkit.ClassMaps(**output), net.class_maps(x)) < 1e-5


def test_a_program_does_not_follow_the_network() -> None:
    net = net_of(Plain().eval(), freeze=False)
    x = torch.randn(2, *SHAPE)
    expected = net.class_maps(x)
    program = camkit.export(net, SHAPE)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)
    assert difference(camkit.ClassMaps(**program.module()(x)), expected) < 1e-5
    assert not any(p.requires_grad for p in program.parameters())


def test_shared_parameters_stay_shared() -> None:
    model = Skip().eval()
    twin = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), model)
    twin[1].weight = twin[0].weight
    net = net_of(twin)
    program = camkit.export(net, SHAPE)
    x = torch.randn(5, *SHAPE)
    check_program(program, net, x)
    names = [name for name in program.state_dict if name.endswith(("trunk.0.weight", "trunk.1.weight"))]
    assert len({program.state_dict[name].data_ptr() for name in names}) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_is_the_networks(dtype: torch.dtype) -> None:
    net = net_of(ChannelsLast().eval(), (3, 16, 12)).to(dtype)
    x = torch.randn(5, 3, 16, 12).to(dtype)
    output = camkit.export(net, (3, 16, 12)).module()(x)
    torch.testing.assert_close(tuple(output.values()), tuple(net.class_maps(x)))


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    camkit.export_onnx(net_of(Plain().eval()), tmp_path / "net.onnx", SHAPE)
    assert capfd.readouterr() == ("", "")


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    path.write_text("something longer than the network is " * 10_000)
    net = net_of(Plain().eval())
    camkit.export_onnx(net, str(path), SHAPE)
    check_onnx(path, net, torch.randn(3, *SHAPE))
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.chdir(tmp_path)
    content = path.read_bytes()

    def half(self: object, destination: Path, **arguments: object) -> None:
        destination.write_bytes(content[:100])
        raise OSError("no space left")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", half)
    with pytest.raises(OSError, match="no space left"):
        camkit.export_onnx(net, "net.onnx", SHAPE)
    assert path.read_bytes() == content
    assert os.listdir() == ["net.onnx"]


def test_weights_in_a_second_file_come_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch writes a second file above 1.5 GB. Here ``external_data=True`` makes it write one."""
    save = torch.onnx.ONNXProgram.save

    def large(self: Any, destination: Path, **arguments: object) -> None:
        save(self, destination, external_data=True)

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", large)
    net = net_of(Plain().eval())
    x = torch.randn(3, *SHAPE)
    for _ in range(2):
        camkit.export_onnx(net, tmp_path / "net.onnx", SHAPE)
        assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data"]
        check_onnx(tmp_path / "net.onnx", net, x)
        nn.init.normal_(net.head.linear.weight)


@pytest.mark.parametrize("missing", [["onnx"], ["onnxscript"], ["onnx", "onnxscript"]])
def test_without_the_packages_of_the_extra(
    missing: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    net = net_of(Plain().eval())
    with pytest.raises(ImportError) as error:
        camkit.export_onnx(net, tmp_path / "net.onnx", SHAPE)
    got = " and ".join(f"no {name}" for name in missing)
    assert str(error.value) == (
        f"packages: expected onnx and onnxscript to be installed, got {got}; pip install camkit[onnx]"
    )
    camkit.export(net, SHAPE)  # needs neither package


@pytest.mark.parametrize("call", [camkit.export, lambda net: camkit.export_onnx(net, "net.onnx")])
def test_only_a_network_with_class_maps(call: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError) as error:
        call(Plain())
    assert str(error.value) == (
        "net: expected a CAMNet, got Plain; camkit.attach_gap_head makes one of any model"
    )


@pytest.mark.parametrize("shape", [(3, 2, 2), (1, 12, 10), (3, 12)])
def test_an_input_that_the_network_cannot_take(shape: tuple[int, ...], tmp_path: Path) -> None:
    net = net_of(Plain().eval())
    with pytest.raises(
        ValueError,
        match=r"^input_shape: expected (larger images for|an input that|. channels for) CAMNet",
    ):
        camkit.export_onnx(net, tmp_path / "net.onnx", shape)


@pytest.mark.parametrize("where", ["nowhere/net.onnx", "."])
def test_a_path_that_cannot_be_written(where: str, tmp_path: Path) -> None:
    path = tmp_path / where
    message = f"^path: expected a file in a folder that exists, got '{re.escape(str(path))}'$"
    with pytest.raises(ValueError, match=message):
        camkit.export_onnx(net_of(Plain().eval()), path, SHAPE)


def test_a_network_that_counts_its_images() -> None:
    """Tokens calls ``len(x)``, which fixes the number of images in the exported program."""
    net = net_of(Tokens().eval(), (3, 16, 12))
    with pytest.raises(
        ValueError,
        match=r"(?s)^net: expected a network that torch.export can trace with any number of images, got "
        r"UserError: .*; x.shape\[0\] leaves that number open, len\(x\) does not$",
    ) as error:
        camkit.export(net, (3, 16, 12))
    assert error.value.__cause__ is not None


def test_importing_camkit_imports_neither_onnx_nor_torchs_exporter() -> None:
    code = "import sys, camkit; sys.exit(any(n in sys.modules for n in ('onnx', 'onnxscript', 'torch.onnx')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
