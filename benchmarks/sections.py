"""What is measured. Each section yields rows, ``(name, row)``, as JSON takes them."""

import dataclasses
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestants import (
    CAMKIT,
    PYTORCH_GRAD_CAM,
    TORCHCAM,
    explained,
    forward,
    network,
    of_all,
    of_global_pooling,
    of_pytorch_grad_cam,
    of_torchcam,
    with_global_pooling,
)
from PIL import Image
from pytorch_grad_cam.ablation_layer import AblationLayer
from pytorch_grad_cam.utils.image import show_cam_on_image
from timing import Contestant, Race, Spread, interleaved, on_cuda, on_host, peak_memory, plain
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import camkit

Rows = Iterator[tuple[str, dict[str, Any]]]

#: ``explain_dataset`` explains so many images, so many at a time.
IMAGES, BATCH = 256, 16
#: Overlays in one turn.
OVERLAYS = 32
_STEPS_ALONE = f"bins, three look-ups and the sum alone, of {OVERLAYS} tensors, unchecked and in place"
#: What SS-CAM and IS-CAM average over, a few of them for the time it takes.
SAMPLES = 2


def environment() -> dict[str, str]:
    """The machine and the versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    waiting = os.environ.get("OMP_WAIT_POLICY", "not set")
    packages = ("torch", "torchvision", CAMKIT, "grad-cam", TORCHCAM, "captum", "numpy", "opencv-python")
    found = {name: _version(name) for name in packages}
    gpu = {"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return (
        gpu
        | {
            "processor": (names or [platform.processor() or platform.machine()])[0],
            "cores": str(os.cpu_count()),
            "threads": f"{torch.get_num_threads()} of torch, OMP_WAIT_POLICY {waiting}",
            "system": platform.system(),
            "Python": platform.python_version(),
        }
        | {name: number for name, number in found.items() if number}
    )


def one_pass(given: Namespace) -> Rows:
    """Methods of one pass, in all libraries."""
    for name in given.models:
        for batch in given.batches:
            yield f"{name}, batch {batch}", _one_pass(name, batch, "cpu", torch.float32, given.rounds)


def accelerator(given: Namespace) -> Rows:
    """The same on a GPU, if there is one, in two types."""
    if not torch.cuda.is_available():
        return
    for batch in given.batches:
        for name in given.models:
            for dtype in (torch.float32, torch.bfloat16):
                row = _one_pass(name, batch, "cuda", dtype, given.rounds)
                row["dtype"] = str(dtype).removeprefix("torch.")
                yield f"{name}, batch {batch}, {row['dtype']}", row


def many_passes(given: Namespace) -> Rows:
    """Methods that run the network, or its head, once for each channel."""
    rounds, x = given.rounds, torch.randn(1, 3, 224, 224)
    if "resnet18" in given.models:
        model = network("resnet18")
        ours = {
            "camkit AblationCAM, ResNet-18 layer4: 512 channels": explained(
                camkit.AblationCAM(model, "layer4"), x
            ),
            "camkit LIFTCAM, ResNet-18": explained(camkit.LIFTCAM(model), x),
        }
        what = "pytorch-grad-cam AblationCAM, the same 512 channels, measured once"
        settings = {"batch_size": 32, "ablation_layer": AblationLayer()}
        theirs = {what: of_pytorch_grad_cam("AblationCAM", model, "layer4", x, **settings)}
        lines = _lines(interleaved(forward(model, x), ours, rounds), [3.0, None])
        lines += _lines(interleaved(forward(model, x), theirs, 1), [None])
        yield "ablation, resnet18", {"by": "one forward pass of one image", "lines": lines}
    if "resnet50" in given.models:
        model = network("resnet50")
        what = "camkit AblationCAM, ResNet-50 layer4: 2,048 channels"
        ours = {what: explained(camkit.AblationCAM(model, "layer4"), x)}
        lines = _lines(interleaved(forward(model, x), ours, rounds), [6.0])
        yield "ablation, resnet50", {"by": "one forward pass of one image", "lines": lines}
    if "vgg16" in given.models:
        model = network("vgg16")
        method = camkit.AblationCAM(model, "features")
        with torch.inference_mode():
            zero = int((model.features(x).amax((0, 2, 3)) == 0).sum())
        ours = {
            f"camkit AblationCAM, VGG16 features: 512 channels, {zero} of them zero": explained(method, x)
        }
        by = f"its head on 512 images, {method.chunk_size} at a time, and one forward pass"
        lines = _lines(interleaved(_head_of_vgg(model, x, method.chunk_size), ours, rounds), [1.0])
        yield "ablation, vgg16", {"by": by, "lines": lines}
    for name in ("alexnet", "resnet18"):
        if name in given.models:
            yield f"masks, {name}", _masks(name, x, rounds)


def overlays(given: Namespace) -> Rows:
    """Heatmaps over pictures."""
    images, heatmaps = torch.rand(OVERLAYS, 3, 224, 224), torch.rand(OVERLAYS, 224, 224)
    arrays, masks = images.permute(0, 2, 3, 1).contiguous().numpy(), heatmaps.numpy()
    pictures = [Image.fromarray(np.uint8(array * 255)) for array in arrays]

    def theirs_of_pictures() -> object:
        return [
            Image.fromarray(show_cam_on_image(np.float32(picture) / 255, mask, use_rgb=True))
            for picture, mask in zip(pictures, masks, strict=True)
        ]

    def theirs_of_arrays() -> object:
        return [show_cam_on_image(a, m, use_rgb=True) for a, m in zip(arrays, masks, strict=True)]

    def overlays_of(shown: Sequence[Any]) -> Contestant:
        return plain(lambda: [camkit.overlay(s, h) for s, h in zip(shown, heatmaps, strict=True)])

    planes = torch.rand(3, 256)

    def steps_alone() -> object:
        bins = (heatmaps * 255).int().flatten()
        colours = torch.empty(3, bins.numel())
        for values, found in zip(planes, colours, strict=True):
            torch.index_select(values, 0, bins, out=found)
        return colours.view(3, *heatmaps.shape).movedim(0, 1).lerp_(images, 0.5)

    def one_by_one() -> object:
        return [camkit.blend(i, h) for i, h in zip(images, heatmaps, strict=True)]

    races = {
        "pictures to pictures": (theirs_of_pictures, {"camkit.overlay": overlays_of(pictures)}),
        "arrays of floats": (
            theirs_of_arrays,
            {
                f"camkit.blend, {OVERLAYS} tensors at once": plain(lambda: camkit.blend(images, heatmaps)),
                "camkit.blend, one by one": plain(one_by_one),
                "camkit.overlay, to pictures": overlays_of(arrays),
                _STEPS_ALONE: plain(steps_alone),
            },
        ),
    }
    for what, (theirs, ours) in races.items():
        race = interleaved(plain(theirs), ours, max(given.rounds, 10))
        cpu, wall = (seconds / OVERLAYS * 1000 for seconds in (race.baseline.cpu, race.baseline.wall))
        lines = [
            _line(
                f"{name}, {what}",
                _inverse(r.cpu),
                _inverse(r.wall),
                at_least=None if name == _STEPS_ALONE else 5.0,
            )
            for name, r in race.ratios.items()
        ]
        by = f"{what}: how many times as fast as show_cam_on_image, {cpu:.2f} ms of CPU, {wall:.2f} of wall"
        yield what, {"by": by, "lines": lines}


def imports(given: Namespace) -> Rows:
    """What ``import camkit`` adds to ``import torch``, in milliseconds, in processes of its own."""
    before, after = [], []
    _imported("torch", "camkit")  # which writes the bytecode
    for _ in range(2 * given.rounds + 1):
        before.append(_imported("torch")[0])
        after.append(_imported("torch", "camkit"))
    alone = [each[1] for each in after]
    cpu, wall = (
        statistics.median(each[0][i] for each in after) - statistics.median(each[i] for each in before)
        for i in (0, 1)
    )
    spreads = [Spread.of([each[i] for each in alone]) for i in (0, 1)]
    lines = [
        _line(
            "medians of both imports, less those of torch alone",
            *map(Spread, *[[cpu, wall]] * 3),
            at_most=50.0,
        ),
        _line("import camkit where torch has been imported", *spreads, at_most=50.0),
    ]
    torch_took = statistics.median(each[1] for each in before)
    yield "import", {"by": f"milliseconds; import torch alone takes {torch_took:.0f}", "lines": lines}


def dataset(given: Namespace) -> Rows:
    """A method over a data set, by plain inference over the same loader: throughput."""
    explain = getattr(camkit, "explain_dataset", None)
    loader = DataLoader(TensorDataset(torch.randn(IMAGES, 3, 224, 224)), batch_size=BATCH)
    for name in ("resnet18", "resnet50"):
        if explain is None or name not in given.models:
            continue
        model = network(name)
        gradcam = camkit.GradCAM(model)

        def inference(model: nn.Module = model) -> None:
            with torch.inference_mode():
                for (x,) in loader:
                    model(x)

        def ours(gradcam: camkit.GradCAM = gradcam) -> None:
            with tempfile.TemporaryDirectory() as folder:
                explain(gradcam, loader, folder)

        race = interleaved(plain(inference), {f"explain_dataset, GradCAM, {name}": plain(ours)}, given.rounds)
        lines = [_line(w, _inverse(r.cpu), _inverse(r.wall), at_least=0.9) for w, r in race.ratios.items()]
        lines += [{"what": what, "raised": reason} for what, reason in race.raised.items()]
        by = f"throughput by that of plain inference over the same {IMAGES} images, {BATCH} at a time"
        yield f"dataset, {name}", {"by": by, "lines": lines}


#: The sections by name.
SECTIONS: dict[str, Callable[[Namespace], Rows]] = {
    "one-pass": one_pass,
    "accelerator": accelerator,
    "many-passes": many_passes,
    "overlays": overlays,
    "import": imports,
    "dataset": dataset,
}


def _one_pass(name: str, batch: int, device: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """All libraries on a network."""
    model = network(name, device, dtype)
    x = torch.randn(batch, 3, 224, 224).to(device, dtype)
    row = {"model": name, "batch": batch, "layer": camkit.GradCAM(model)(x).layer, "rounds": rounds}
    row["pooled"] = with_global_pooling(model, x)
    row |= _against_forward(model, x, of_all(model, x), rounds)
    if not row["pooled"]:  # another network, and a race of its own
        net = camkit.attach_gap_head(model, 1000).eval().to(device, dtype)
        row["results"] |= _against_forward(net, x, of_global_pooling(net, x), rounds)["results"]
    return row


def _against_forward(
    model: nn.Module, x: Tensor, contestants: dict[str, Contestant], rounds: int
) -> dict[str, Any]:
    """Ratios of times and of peak memory to a forward pass in inference mode."""
    clock, baseline = on_cuda if x.is_cuda else on_host, forward(model, x)
    race, memory = interleaved(baseline, contestants, rounds, clock), peak_memory(baseline, clock)
    results: dict[str, dict[str, Any]] = {name: {"raised": reason} for name, reason in race.raised.items()}
    for name, ratios in race.ratios.items():
        used = peak_memory(contestants[name], clock)
        results[name] = dataclasses.asdict(ratios) | {"memory": used / memory}
    return {"forward": dataclasses.asdict(race.baseline) | {"memory": memory}, "results": results}


def _masks(name: str, x: Tensor, rounds: int) -> dict[str, Any]:
    """Score-CAM and its like on a network, by inference of as many images in batches of the same size."""
    model = network(name)
    layer = camkit.ScoreCAM(model)(x[:, :, :64, :64]).layer
    channels = next(one.channels for one in camkit.list_layers(model) if one.name == layer)
    chunk = camkit.ScoreCAM(model).chunk_size
    images = torch.randn(chunk, 3, 224, 224)

    def inference() -> None:
        with torch.inference_mode():
            model(x)
            for start in range(0, channels, chunk):
                model(images[: min(chunk, channels - start)])

    ours = {
        "ScoreCAM": (camkit.ScoreCAM(model, layer), 1),
        f"SSCAM, {SAMPLES} samples": (camkit.SSCAM(model, layer, samples=SAMPLES), SAMPLES),
        f"ISCAM, {SAMPLES} samples": (camkit.ISCAM(model, layer, samples=SAMPLES), SAMPLES),
    }
    race = interleaved(
        plain(inference), {what: explained(method, x) for what, (method, _) in ours.items()}, rounds
    )
    lines = []
    for what, ratios in race.ratios.items():
        times = ours[what][1]
        cpu, wall = _inverse(ratios.cpu, times), _inverse(ratios.wall, times)
        lines.append(_line(f"camkit {what}, {name}", cpu, wall, at_least=0.9))
    theirs = {
        PYTORCH_GRAD_CAM: of_pytorch_grad_cam("ScoreCAM", model, layer, x, batch_size=chunk),
        TORCHCAM: of_torchcam("ScoreCAM", model, layer, x, batch_size=chunk),
    }
    race = interleaved(plain(inference), theirs, 1)
    lines += [
        _line(f"{library} ScoreCAM, {name}, measured once", _inverse(ratios.cpu), _inverse(ratios.wall))
        for library, ratios in race.ratios.items()
    ]
    lines += [{"what": f"{library} ScoreCAM, {name}", "raised": why} for library, why in race.raised.items()]
    by = f"throughput by that of plain inference of as many images ({channels}), {chunk} at a time"
    return {"by": by, "lines": lines}


def _head_of_vgg(model: nn.Module, x: Tensor, chunk: int) -> Contestant:
    """What follows VGG16's features on 512 images, and one forward pass."""
    features = torch.rand(chunk, 512, 7, 7)

    def call() -> None:
        with torch.inference_mode():
            model(x)
            for _ in range(512 // chunk):
                model.classifier(torch.flatten(model.avgpool(features), 1))

    return plain(call)


def _lines(race: Race, limits: list[float | None]) -> list[dict[str, Any]]:
    """Ratios, each beside the most that it is to be."""
    limit_of = dict(zip([*race.ratios, *race.raised], limits, strict=True))
    lines = [_line(what, r.cpu, r.wall, at_most=limit_of[what]) for what, r in race.ratios.items()]
    return lines + [{"what": what, "raised": reason} for what, reason in race.raised.items()]


def _line(
    what: str, cpu: Spread, wall: Spread, *, at_most: float | None = None, at_least: float | None = None
) -> dict[str, Any]:
    """One number with its target, which the CPU time is to meet."""
    found: dict[str, Any] = {"what": what, "cpu": dataclasses.asdict(cpu), "wall": dataclasses.asdict(wall)}
    if at_most is not None:
        found |= {"target": f"≤ {at_most:.4g}", "met": round(cpu.median, 2) <= at_most}
    if at_least is not None:
        found |= {"target": f"≥ {at_least:.4g}", "met": round(cpu.median, 2) >= at_least}
    return found


def _inverse(ratio: Spread, times: int = 1) -> Spread:
    """How many times as fast, if it did so many times as much."""
    return Spread(times / ratio.median, times / ratio.high, times / ratio.low)


def _imported(*modules: str) -> list[tuple[float, float]]:
    """Milliseconds since the first of the imports began, and, of two, those of the second: CPU and wall."""
    statements = "; ".join(f"import {module}; now()" for module in modules)
    program = (
        "import time; times = []\n"
        "def now(): times.append((time.process_time(), time.perf_counter()))\n"
        f"now(); {statements}\n"
        "print(*(x for t in times for x in t))"
    )
    # With bytecode, as where a package has been used before, also if the environment forbids to write it.
    bytecode = Path(tempfile.gettempdir(), "bytecode")
    places = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(bytecode)}
    with chdir(tempfile.gettempdir()):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | places,
            check=True,
            capture_output=True,
            text=True,
        )
    numbers = [1000 * float(x) for x in run.stdout.split()]
    moments = list(zip(numbers[::2], numbers[1::2], strict=True))

    def between(first: tuple[float, float], last: tuple[float, float]) -> tuple[float, float]:
        return last[0] - first[0], last[1] - first[1]

    return [between(moments[0], moments[-1]), between(moments[-2], moments[-1])]


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:  # opencv-python has other names
        return ""
