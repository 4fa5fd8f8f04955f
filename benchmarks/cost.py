"""What an explanation costs beyond the prediction, as a ratio of CPU times measured in turn in one process.

``python benchmarks/cost.py`` prints a Markdown table: each method's CPU time by that of one forward pass of
the same batch in inference mode, the median of several rounds. captum stands beside it where it is installed.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models import get_model

import camkit

ROUNDS = 7
MODELS = [("resnet18", 1), ("resnet50", 4), ("vgg16", 1), ("alexnet", 8), ("densenet121", 1)]


def contestants(model: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """What is measured: the forward pass first."""

    def forward() -> Tensor:
        with torch.inference_mode():
            return model(x)  # type: ignore[no-any-return]

    gradcam = camkit.GradCAM(model)
    methods: dict[str, Callable[[], object]] = {"forward": forward, "camkit Grad-CAM": lambda: gradcam(x)}
    net = camkit.attach_gap_head(model, 1000)
    cam = camkit.CAM(net)
    methods |= {"camkit CAM, after surgery": lambda: cam(x)}
    try:
        from captum.attr import LayerGradCam
    except ImportError:
        return methods
    captum = LayerGradCam(model, model.get_submodule(gradcam(x).layer))
    methods["captum Grad-CAM and its forward"] = lambda: captum.attribute(x, target=model(x).argmax(1))
    return methods


def ratios(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Median CPU time of each by that of the forward pass."""
    methods = contestants(model, x)
    for method in methods.values():
        method()
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(ROUNDS):
        for name, method in methods.items():
            start = time.process_time()
            method()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    forward = medians.pop("forward")
    return {name: median / forward for name, median in medians.items()}


def main() -> None:
    """Prints the table."""
    torch.manual_seed(0)
    rows = {}
    for name, count in MODELS:
        model = get_model(name, weights=None).eval()
        rows[f"{name}, N={count}"] = ratios(model, torch.randn(count, 3, 224, 224))
    columns = list(next(iter(rows.values())))
    print("| model |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for name, row in rows.items():
        print(f"| {name} |", " | ".join(f"{row[column]:.2f}" for column in columns), "|")


if __name__ == "__main__":
    main()
