"""Each formula as its paper writes it: per image, per channel and per position, in plain loops.

Slow on purpose, and on another road than the library's: activations come from a hook on an undisturbed
pass with a graph everywhere, gradients from ``backward``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def activation_and_gradient(
    model: nn.Module, layer: str, image: Tensor, score: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """One image's activation and its gradient of the score, in the layer's own layout, without the batch."""
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output.retain_grad()
        kept.append(output)
        return output.clone()  # what follows in place must not reach what was kept

    handle = model.get_submodule(layer).register_forward_hook(hook)
    score(model(image[None])[0]).backward()
    handle.remove()
    (output,) = kept
    assert output.grad is not None
    activation, gradient = output.detach()[0], output.grad[0]
    model.zero_grad()
    return activation, gradient


def nchw(tensor: Tensor, kind: str, grid: tuple[int, int] | None = None) -> Tensor:
    """``(C, h, w)`` of one image's tensor in NCHW, NHWC or tokens with one class token, by indexing."""
    if kind == "NCHW":
        return tensor
    if kind == "NHWC":
        return torch.stack([tensor[:, :, k] for k in range(tensor.shape[2])])
    assert grid is not None
    rows, columns = grid
    return torch.stack(
        [
            torch.stack(
                [torch.stack([tensor[1 + i * columns + j, k] for j in range(columns)]) for i in range(rows)]
            )
            for k in range(tensor.shape[1])
        ]
    )


def grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Selvaraju et al. 2017, equations 1 and 2, of one image."""
    channels, rows, columns = activation.shape
    z = rows * columns
    result = torch.zeros(rows, columns, dtype=activation.dtype)
    for k in range(channels):
        alpha = sum(gradient[k, i, j] for i in range(rows) for j in range(columns)) / z
        for i in range(rows):
            for j in range(columns):
                result[i, j] += alpha * activation[k, i, j]
    for i in range(rows):
        for j in range(columns):
            result[i, j] = max(result[i, j].item(), 0)
    return result


def cam(activation: Tensor, weights: Tensor) -> Tensor:
    """Zhou et al. 2016, equation 2, of one image and one class: ``weights`` is ``(C,)``."""
    channels, rows, columns = activation.shape
    result = torch.zeros(rows, columns, dtype=activation.dtype)
    for i in range(rows):
        for j in range(columns):
            result[i, j] = sum(weights[k] * activation[k, i, j] for k in range(channels))
    return result
