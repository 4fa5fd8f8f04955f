"""The sections of the benchmark. Each yields pairs ``(name, race)``, which ``results.py`` stores."""

import os
import platform
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestants import (
    CAMKIT,
    PYTORCH_GRAD_CAM,
    TORCHCAM,
    build_network,
    cam_applies,
    prepare_all,
    prepare_camkit,
    prepare_forward,
    prepare_pooling,
    prepare_pytorch_grad_cam,
    prepare_torchcam,
)
from PIL import Image
from pytorch_grad_cam.ablation_layer import AblationLayer
from pytorch_grad_cam.utils.image import show_cam_on_image
from results import Race
from timing import (
    Cell,
    Contestant,
    Seconds,
    as_contestant,
    measure_in_turn,
    median_seconds,
    peak_memory,
    summarise,
    time_on_cuda,
    time_on_host,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import camkit

Races = Iterator[tuple[str, Race]]

#: Number of images that ``explain_dataset`` explains, and number of images in a batch.
IMAGES, BATCH = 256, 16
#: Number of overlays that are drawn in one turn.
OVERLAYS = 32
#: Number of samples that SS-CAM and IS-CAM average over. Their time is proportional to this number.
SAMPLES = 2


def describe_environment() -> dict[str, str]:
    """Returns the machine and the versions of the packages."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    waiting = os.environ.get("OMP_WAIT_POLICY", "not set")
    found = {"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    found |= {
        "processor": (names or [platform.processor() or platform.machine()])[0],
        "cores": str(os.cpu_count()),
        "threads": f"{torch.get_num_threads()} of torch, OMP_WAIT_POLICY {waiting}",
        "system": platform.system(),
        "Python": platform.python_version(),
    }
    # A package that is not installed under this name is left out, such as OpenCV from another package.
    for package in ("torch", "torchvision", CAMKIT, "grad-cam", TORCHCAM, "captum", "numpy", "opencv-python"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def measure_one_pass(given: Namespace) -> Races:
    """Measures the methods of one pass in all libraries."""
    for name in given.models:
        for batch in given.batches:
            yield f"{name}, batch {batch}", _measure_network(name, batch, "cpu", torch.float32, given.rounds)


def measure_accelerator(given: Namespace) -> Races:
    """Measures the methods of one pass on a GPU, if there is one, in float32 and bfloat16."""
    if not torch.cuda.is_available():
        return
    for batch in given.batches:
        for name in given.models:
            for dtype in (torch.float32, torch.bfloat16):
                race = _measure_network(name, batch, "cuda", dtype, given.rounds)
                race["dtype"] = str(dtype).removeprefix("torch.")
                yield f"{name}, batch {batch}, {race['dtype']}", race


def measure_many_passes(given: Namespace) -> Races:
    """Measures methods that run the network, or its head, once for each channel."""
    rounds, x, one_pass = given.rounds, torch.randn(1, 3, 224, 224), "one forward pass of one image"
    if "resnet18" in given.models:
        model = build_network("resnet18")
        baseline, name = prepare_forward(model, x), "camkit AblationCAM, ResNet-18 layer4: 512 channels"
        ours = {
            name: prepare_camkit(camkit.AblationCAM(model, "layer4"), x),
            "camkit LIFTCAM, ResNet-18": prepare_camkit(camkit.LIFTCAM(model), x),
        }
        settings = {"batch_size": 32, "ablation_layer": AblationLayer()}
        theirs = prepare_pytorch_grad_cam("AblationCAM", model, "layer4", x, **settings)
        once = {"pytorch-grad-cam AblationCAM, the same 512 channels, measured once": theirs}
        seconds, cells = measure_in_turn(baseline, ours, rounds)
        cells[name]["target"] = "≤ 3"
        yield (
            "ablation, resnet18",
            _build_race(one_pass, seconds, cells | measure_in_turn(baseline, once, 1)[1]),
        )
    if "resnet50" in given.models:
        model = build_network("resnet50")
        name = "camkit AblationCAM, ResNet-50 layer4: 2,048 channels"
        ours = {name: prepare_camkit(camkit.AblationCAM(model, "layer4"), x)}
        seconds, cells = measure_in_turn(prepare_forward(model, x), ours, rounds)
        yield "ablation, resnet50", _build_race(one_pass, seconds, _add_target(cells, "≤ 6"))
    if "vgg16" in given.models:
        model = build_network("vgg16")
        method = camkit.AblationCAM(model, "features")
        # Ablation-CAM skips channels that are zero, so the result must name their number.
        with torch.inference_mode():
            zero = int((model.features(x).amax((0, 2, 3)) == 0).sum())
        name = f"camkit AblationCAM, VGG16 features: 512 channels, {zero} of them zero"
        # Ablation-CAM repeats only the large head of VGG16, so the baseline repeats the head as well.
        baseline = _prepare_vgg_head(model, x, method.chunk_size)
        seconds, cells = measure_in_turn(baseline, {name: prepare_camkit(method, x)}, rounds)
        head = f"its head on 512 images, {method.chunk_size} at a time, and one forward pass"
        yield "ablation, vgg16", _build_race(head, seconds, _add_target(cells, "≤ 1"))
    for name in ("alexnet", "resnet18"):
        if name in given.models:
            yield f"masks, {name}", _measure_masks(name, x, rounds)


def measure_overlays(given: Namespace) -> Races:
    """Measures drawing heatmaps over pictures."""
    images, heatmaps = torch.rand(OVERLAYS, 3, 224, 224), torch.rand(OVERLAYS, 224, 224)
    arrays, masks = images.permute(0, 2, 3, 1).contiguous().numpy(), heatmaps.numpy()
    pictures = [Image.fromarray(np.uint8(array * 255)) for array in arrays]
    colours = torch.rand(3, 256)

    def show_pictures() -> object:
        return [
            Image.fromarray(show_cam_on_image(np.float32(picture) / 255, mask, use_rgb=True))
            for picture, mask in zip(pictures, masks, strict=True)
        ]

    def show_arrays() -> object:
        return [show_cam_on_image(a, m, use_rgb=True) for a, m in zip(arrays, masks, strict=True)]

    def overlay_all(shown: Sequence[Any]) -> object:
        return [camkit.overlay(s, h) for s, h in zip(shown, heatmaps, strict=True)]

    def blend_one_by_one() -> object:
        return [camkit.blend(i, h) for i, h in zip(images, heatmaps, strict=True)]

    # The cheapest blend that torch's operations allow. Its time is a lower bound for `camkit.blend`.
    def run_steps_only() -> object:
        bins = (heatmaps * 255).int().flatten()
        coloured = torch.empty(3, bins.numel())
        for values, channel in zip(colours, coloured, strict=True):
            torch.index_select(values, 0, bins, out=channel)
        return coloured.view(3, *heatmaps.shape).movedim(0, 1).lerp_(images, 0.5)

    contests: dict[str, tuple[Callable[[], object], dict[str, Callable[[], object]]]] = {
        "pictures to pictures": (show_pictures, {"camkit.overlay": lambda: overlay_all(pictures)}),
        "arrays of floats": (
            show_arrays,
            {
                f"camkit.blend, {OVERLAYS} tensors at once": lambda: camkit.blend(images, heatmaps),
                "camkit.blend, one by one": blend_one_by_one,
                "camkit.overlay, to pictures": lambda: overlay_all(arrays),
                f"bins, three look-ups and weighted sum only, {OVERLAYS} tensors, unchecked and in place": (
                    run_steps_only
                ),
            },
        ),
    }
    for kind, (theirs, calls) in contests.items():
        ours = {f"{name}, {kind}": as_contestant(call) for name, call in calls.items()}
        seconds, cells = measure_in_turn(as_contestant(theirs), ours, max(given.rounds, 10))
        cells = {
            name: _throughput(cell) | ({"target": "≥ 5"} if name.startswith(CAMKIT) else {})
            for name, cell in cells.items()
        }
        # A turn makes many overlays; the report shows the time of one.
        each = Seconds(seconds.cpu / OVERLAYS, seconds.wall / OVERLAYS)
        yield kind, _build_race("speed of show_cam_on_image", each, cells)


def measure_imports(given: Namespace) -> Races:
    """Measures in new processes how many milliseconds ``import camkit`` adds to ``import torch``."""
    # Write the bytecode; otherwise the first measured import would compile the modules.
    _time_imports("torch", "camkit")
    alone, both, after = [], [], []
    for _ in range(2 * given.rounds + 1):
        alone.append(_time_imports("torch")[0])
        for times, taken in zip((both, after), _time_imports("torch", "camkit"), strict=True):
            times.append(taken)
    first, all_of_it = median_seconds(alone), median_seconds(both)
    cells: dict[str, Cell] = {
        "import torch and camkit, minus import torch (medians)": {
            "cpu": [1000 * (all_of_it.cpu - first.cpu)],
            "wall": [1000 * (all_of_it.wall - first.wall)],
        },
        "import camkit after torch": {
            "cpu": summarise([1000 * taken.cpu for taken in after]),
            "wall": summarise([1000 * taken.wall for taken in after]),
        },
    }
    yield (
        "import",
        _build_race("import torch (difference in milliseconds)", first, _add_target(cells, "≤ 50")),
    )


def measure_dataset(given: Namespace) -> Races:
    """Measures the throughput of ``explain_dataset`` relative to plain inference over the same loader."""
    loader = DataLoader(TensorDataset(torch.randn(IMAGES, 3, 224, 224)), batch_size=BATCH)
    for name in ("resnet18", "resnet50"):
        if name not in given.models:
            continue
        model = build_network(name)
        gradcam = camkit.GradCAM(model)

        def infer(model: nn.Module = model) -> None:
            with torch.inference_mode():
                for (x,) in loader:
                    model(x)

        def explain(gradcam: camkit.GradCAM = gradcam) -> None:
            with tempfile.TemporaryDirectory() as folder:
                camkit.explain_dataset(gradcam, loader, folder)

        ours = {f"explain_dataset, GradCAM, {name}": as_contestant(explain)}
        seconds, cells = measure_in_turn(as_contestant(infer), ours, given.rounds)
        cells = _add_target({call: _throughput(cell) for call, cell in cells.items()}, "≥ 0.9")
        baseline = f"throughput of plain inference over the same {IMAGES} images, {BATCH} at a time"
        yield f"dataset, {name}", _build_race(baseline, seconds, cells)


#: The sections by name.
SECTIONS: dict[str, Callable[[Namespace], Races]] = {
    "one-pass": measure_one_pass,
    "accelerator": measure_accelerator,
    "many-passes": measure_many_passes,
    "overlays": measure_overlays,
    "import": measure_imports,
    "dataset": measure_dataset,
}


def _build_race(name: str, baseline: Seconds, cells: Mapping[str, Cell], **fields: Any) -> Race:
    times = {"cpu_ms": 1000 * baseline.cpu, "wall_ms": 1000 * baseline.wall}
    return {"name": name} | times | fields | {"cells": dict(cells)}


def _add_target(cells: Mapping[str, Cell], target: str) -> dict[str, Cell]:
    return {name: cell | {"target": target} for name, cell in cells.items()}


def _throughput(cell: Cell, times: int = 1) -> Cell:
    """Turns ratios of time into ratios of throughput.

    Args:
        cell: the ratios of time.
        times: how many times the call does the work of the baseline.
    """
    if "raised" in cell:
        return cell
    # The quartiles swap their places, because the longest time gives the lowest throughput.
    return {
        kind: [times / median, *(times / value for value in reversed(quartiles))]
        for kind, (median, *quartiles) in cell.items()
    }


def _measure_network(name: str, batch: int, device: str, dtype: torch.dtype, rounds: int) -> Race:
    """Measures the calls of all libraries on one network."""
    model = build_network(name, device, dtype)
    x = torch.randn(batch, 3, 224, 224).to(device, dtype)
    fields = {"model": name, "batch": batch, "layer": camkit.GradCAM(model)(x).layer}
    fields |= {"pooled": cam_applies(model, x), "rounds": rounds}
    race = _compare_with_forward(model, x, prepare_all(model, x), rounds) | fields
    # CAM then needs a network with another head, which is compared with a forward pass of its own.
    if not race["pooled"]:
        net = camkit.attach_gap_head(model, 1000).eval().to(device, dtype)
        race["cells"] |= _compare_with_forward(net, x, prepare_pooling(net, x), rounds)["cells"]
    return race


def _compare_with_forward(
    model: nn.Module, x: Tensor, contestants: Mapping[str, Contestant], rounds: int
) -> Race:
    """Measures times and peak memory, relative to a forward pass in inference mode."""
    clock, baseline = time_on_cuda if x.is_cuda else time_on_host, prepare_forward(model, x)
    seconds, cells = measure_in_turn(baseline, contestants, rounds, clock)
    memory = peak_memory(baseline, clock)
    for name, cell in cells.items():
        if "raised" not in cell:
            cell["memory"] = peak_memory(contestants[name], clock) / memory
    return _build_race("forward pass", seconds, cells, memory_mib=memory / 2**20)


def _measure_masks(name: str, x: Tensor, rounds: int) -> Race:
    """Measures Score-CAM and its variants, relative to plain inference on the same number of images."""
    model = build_network(name)
    # A small crop is enough to find the layer, and saves time: Score-CAM runs the network for each channel.
    layer = camkit.ScoreCAM(model)(x[:, :, :64, :64]).layer
    channels = next(one.channels for one in camkit.list_layers(model) if one.name == layer)
    chunk = camkit.ScoreCAM(model).chunk_size
    images = torch.randn(chunk, 3, 224, 224)

    def infer() -> None:
        with torch.inference_mode():
            model(x)
            for start in range(0, channels, chunk):
                model(images[: min(chunk, channels - start)])

    samples = {
        f"camkit ScoreCAM, {name}": (camkit.ScoreCAM(model, layer), 1),
        f"camkit SSCAM, {SAMPLES} samples, {name}": (camkit.SSCAM(model, layer, samples=SAMPLES), SAMPLES),
        f"camkit ISCAM, {SAMPLES} samples, {name}": (camkit.ISCAM(model, layer, samples=SAMPLES), SAMPLES),
    }
    ours = {call: prepare_camkit(method, x) for call, (method, _) in samples.items()}
    seconds, found = measure_in_turn(as_contestant(infer), ours, rounds)
    cells = _add_target({call: _throughput(cell, samples[call][1]) for call, cell in found.items()}, "≥ 0.9")
    # One round is enough for the other libraries, which have no target.
    theirs = {
        PYTORCH_GRAD_CAM: prepare_pytorch_grad_cam("ScoreCAM", model, layer, x, batch_size=chunk),
        TORCHCAM: prepare_torchcam("ScoreCAM", model, layer, x, batch_size=chunk),
    }
    for library, cell in measure_in_turn(as_contestant(infer), theirs, 1)[1].items():
        cells[f"{library} ScoreCAM, {name}, measured once"] = _throughput(cell)
    baseline = f"throughput of plain inference on {channels} images, {chunk} at a time"
    return _build_race(baseline, seconds, cells)


def _prepare_vgg_head(model: nn.Module, x: Tensor, chunk: int) -> Contestant:
    """Prepares one forward pass, followed by a run of the layers after VGG16's features on 512 images."""
    features = torch.rand(chunk, 512, 7, 7)

    def call() -> None:
        with torch.inference_mode():
            model(x)
            for _ in range(512 // chunk):
                model.classifier(torch.flatten(model.avgpool(features), 1))

    return as_contestant(call)


def _time_imports(*modules: str) -> tuple[Seconds, Seconds]:
    """Imports modules in a new process; returns the time of all imports and the time of the last one."""
    statements = "; ".join(f"import {module}; now()" for module in modules)
    program = (
        "import time; times = []\n"
        "def now(): times.append((time.process_time(), time.perf_counter()))\n"
        f"now(); {statements}\n"
        "print(*(x for t in times for x in t))"
    )
    # An installed package has bytecode. Let Python write it here even if the environment forbids that.
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
    numbers = [float(x) for x in run.stdout.split()]
    cpu, wall = numbers[::2], numbers[1::2]
    return Seconds(cpu[-1] - cpu[0], wall[-1] - wall[0]), Seconds(cpu[-1] - cpu[-2], wall[-1] - wall[-2])
