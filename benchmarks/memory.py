"""What 1,000 explanations in a row leave in memory.

``python benchmarks/memory.py`` prints a Markdown table: for each method, by how much the memory that Python
holds (tracemalloc) and the whole process's (RSS) grew between call 100 and call 1,000, and how many more
tensors and hooks there are then. ``python benchmarks/memory.py 200`` makes 200 calls. Each method has a process of
its own; the RSS is measured in a second run, which tracemalloc does not disturb. It needs psutil.
"""

import gc
import subprocess
import sys
import tracemalloc
from typing import Any

import psutil
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import camkit

METHODS = ["GradCAM", "CAM", "HiResCAM", "EigenCAM", "ScoreCAM", "AblationCAM", "LIFTCAM", "RelevanceCAM"]
METHODS += ["GuidedGradCAM", "FullGrad"]
# These take a pass for each channel: they look at the first of a few.
MANY_PASSES = ("ScoreCAM", "AblationCAM")
WARM = 100


def network() -> nn.Module:
    """A small ResNet, with eight channels at its entrance."""
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    return model.eval()
