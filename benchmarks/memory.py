"""Measures the memory that 1,000 explanations in a row leave behind.

``python benchmarks/memory.py`` prints a Markdown table. For each method it shows the growth between call 100
and call 1,000 of Python's memory (tracemalloc), of the memory of the process (RSS), and of the numbers of
tensors and hooks. ``python benchmarks/memory.py 300`` makes 300 calls instead. Each method runs in two new
processes, one for tracemalloc and one for the RSS, because tracemalloc uses memory itself and would change
the RSS. The script needs psutil.
"""

import gc
import subprocess
import sys
import tracemalloc

import psutil
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import camkit

METHODS = ["GradCAM", "CAM", "HiResCAM", "EigenCAM", "ScoreCAM", "AblationCAM", "LIFTCAM", "RelevanceCAM"]
METHODS += ["GuidedGradCAM", "FullGrad"]
#: Number of warm-up calls. They fill caches, which should not count as growth.
WARM = 100


def build_network() -> nn.Module:
    """Returns a small ResNet that ends in 16 channels."""
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
    stem = [nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    blocks = [BasicBlock(8, 8), BasicBlock(8, 16, stride=2, downsample=shortcut)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return nn.Sequential(*stem, *blocks, *head).eval()


def count_tensors_and_hooks(model: nn.Module) -> tuple[int, int]:
    """Returns the number of tensors in the process, and the number of hooks on the model."""
    gc.collect()
    hooks = [value for module in model.modules() for name, value in vars(module).items() if "_hooks" in name]
    return sum(issubclass(type(one), Tensor) for one in gc.get_objects()), sum(map(len, hooks))


def print_growth(name: str, calls: int, traced: bool) -> None:
    """Prints how many KiB, tensors and hooks were added between call ``WARM`` and the last call."""
    torch.set_num_threads(1)
    model = build_network()
    method, x = camkit.METHODS[name](model), torch.rand(2, 3, 48, 48)

    def memory() -> float:
        gc.collect()
        used = tracemalloc.get_traced_memory()[0] if traced else psutil.Process().memory_info().rss
        return used / 1024

    if traced:
        tracemalloc.start()
    for call in range(1, calls + 1):
        method(x, 1)
        if call == WARM:
            tensors, hooks = count_tensors_and_hooks(model)
            start = memory()
    grown = memory() - start
    after = count_tensors_and_hooks(model)
    print(f"{grown:.1f}", after[0] - tensors, after[1] - hooks)


def main(calls: int) -> None:
    """Prints the table."""
    print(f"| method, calls {WARM} to {calls} | Python, KiB | process, KiB | tensors | hooks |")
    print("|---|---|---|---|---|")
    for name in METHODS:
        command = [sys.executable, __file__, str(calls), name]
        traced, whole = (
            subprocess.run([*command, kind], check=True, capture_output=True, text=True).stdout.split()
            for kind in ("tracemalloc", "rss")
        )
        print(f"| {name} | {traced[0]} | {whole[0]} | {traced[1]} | {traced[2]} |", flush=True)


if __name__ == "__main__":
    asked = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    if asked <= WARM:
        sys.exit(f"calls: expected more than {WARM}, got {asked}")
    if len(sys.argv) > 2:
        print_growth(sys.argv[2], asked, sys.argv[3] == "tracemalloc")
    else:
        main(asked)
