"""Each formula as its paper writes it: per image, per channel and per position, in plain loops.

Slow on purpose, and computed in another way than in the library: activations come from a hook on an ordinary
forward pass with a graph everywhere, gradients from ``backward``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def activation_and_gradient(
    model: nn.Module, layer: str, image: Tensor, score: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """One image's activation and its gradient of the score, in the layer's own layout, without the batch."""
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output.retain_grad()
        kept.append(output)
        return (
            output.clone()
        )  # otherwise an in-place operation after the layer would change the tensor we keep

    handle = model.get_submodule(layer).register_forward_hook(hook)
    score(model(image[None])[0]).backward()
    handle.remove()
    (output,) = kept
    assert output.grad is not None
    activation, gradient = output.detach()[0], output.grad[0]
    model.zero_grad()
    return activation, gradient


def activation_at(model: nn.Module, layer: str, image: Tensor) -> Tensor:
    """One image's activation in the layer's own layout, without the batch."""
    return activation_and_gradient(model, layer, image, lambda y: y.sum())[0]


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


def without_channel(tensor: Tensor, kind: str, k: int) -> Tensor:
    """A batch of one in its own layout, with channel k zero at every position of the grid."""
    edited = tensor.clone()
    if kind == "NCHW":
        edited[:, k] = 0
    elif kind == "NHWC":
        edited[:, :, :, k] = 0
    else:
        edited[:, 1:, k] = 0
    return edited


def output_with(model: nn.Module, layer: str, image: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """The output for one image, with the output of the layer edited."""
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: edit(output))
    with torch.no_grad():
        output: Tensor = model(image[None])[0]
    handle.remove()
    return output


def weighted(activation: Tensor, weights: Sequence[float], *, relu: bool = True) -> Tensor:
    """The sum of the channels with their weights."""
    channels, rows, columns = activation.shape
    result = torch.zeros(rows, columns, dtype=activation.dtype)
    numbers = activation.tolist()
    for i in range(rows):
        for j in range(columns):
            total = sum(weights[k] * numbers[k][i][j] for k in range(channels))
            result[i, j] = max(total, 0) if relu else total
    return result


def positions(activation: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i in range(activation.shape[1]) for j in range(activation.shape[2])]


def grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Selvaraju et al. 2017, equations 1 and 2, of one image."""
    grid, g = positions(activation), gradient.tolist()
    alphas = [sum(g[k][i][j] for i, j in grid) / len(grid) for k in range(len(activation))]
    return weighted(activation, alphas)


def grad_cam_plus_plus(activation: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Chattopadhay et al. 2018, equations 7 and 19, of the first three derivatives."""
    grid, a, d1, d2, d3 = positions(activation), *(t.tolist() for t in (activation, first, second, third))
    weights = []
    for k in range(len(activation)):
        total = sum(a[k][i][j] for i, j in grid)
        weight = 0.0
        for i, j in grid:
            denominator = 2 * d2[k][i][j] + total * d3[k][i][j]
            alpha = d2[k][i][j] / denominator if denominator != 0 else 0
            weight += alpha * max(d1[k][i][j], 0)
        weights.append(weight)
    return weighted(activation, weights)


def xgrad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Fu et al. 2020, equation 8."""
    grid, a, g = positions(activation), activation.tolist(), gradient.tolist()
    weights = []
    for k in range(len(activation)):
        total = sum(a[k][i][j] for i, j in grid)
        weights.append(sum(a[k][i][j] / total * g[k][i][j] for i, j in grid) if total != 0 else 0.0)
    return weighted(activation, weights)


def hires_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Draelos and Carin 2020, equation 3."""
    result = torch.zeros_like(activation[0])
    for i, j in positions(activation):
        result[i, j] = sum(activation[k, i, j] * gradient[k, i, j] for k in range(len(activation)))
    return result


def layer_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Jiang et al. 2021, equations 5 to 7."""
    result = torch.zeros_like(activation[0])
    for i, j in positions(activation):
        total = sum(activation[k, i, j] * max(gradient[k, i, j].item(), 0) for k in range(len(activation)))
        result[i, j] = max(float(total), 0)
    return result


def shapley_cam(activation: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """Cai 2025: mean of g - H A / 2, with the whole Hessian ``(C, h, w, C, h, w)``."""
    channels, rows, columns = activation.shape
    flat = hessian.reshape(channels, rows * columns, -1)
    curvature = torch.zeros(channels, rows * columns, dtype=activation.dtype)
    for k in range(channels):
        for i in range(rows * columns):
            curvature[k, i] = sum(
                h * a for h, a in zip(flat[k, i].tolist(), activation.flatten().tolist(), strict=True)
            )
    corrected = gradient.flatten(1) - curvature / 2
    return weighted(activation, [float(row.sum() / len(row)) for row in corrected])


def with_sign_of(component: Tensor, reference: Tensor) -> Tensor:
    agreement = sum(
        a * b for a, b in zip(component.flatten().tolist(), reference.flatten().tolist(), strict=True)
    )
    return -component if agreement < 0 else component


def eigen_cam(activation: Tensor) -> Tensor:
    """Muhammad and Yeasin 2020: by a full SVD of positions by channels."""
    matrix = np.array(
        [[activation[k, i, j].item() for k in range(len(activation))] for i, j in positions(activation)]
    )
    _, _, directions = np.linalg.svd(matrix, full_matrices=True)
    projection = torch.tensor(matrix @ directions[0]).reshape(activation.shape[1:])
    return with_sign_of(projection, torch.tensor(matrix.sum(1)))


def kpca_cam(activation: Tensor) -> Tensor:
    """Karmani et al. 2024: kernel PCA of the positions by Schoelkopf's centring."""
    channels, rows, columns = activation.shape
    points = [[activation[k, i, j].item() for k in range(channels)] for i, j in positions(activation)]
    means = [math.fsum(point[k] for point in points) / len(points) for k in range(channels)]
    centred = np.array([[point[k] - means[k] for k in range(channels)] for point in points])
    kernel = np.array([[math.tanh(float(a @ b) / channels + 1) for b in centred] for a in centred])
    ones = np.full(kernel.shape, 1 / len(kernel))
    values, vectors = np.linalg.eigh(kernel - ones @ kernel - kernel @ ones + ones @ kernel @ ones)
    component = torch.tensor(vectors[:, -1] * math.sqrt(max(values[-1], 0)))
    return with_sign_of(component, torch.tensor(centred.sum(1))).reshape(rows, columns)


def fem(activation: Tensor) -> Tensor:
    """Fuad et al. 2020: two standard deviations above the mean."""
    result = torch.zeros_like(activation[0])
    for channel in activation:
        values = channel.flatten().tolist()
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
        for i, j in positions(activation):
            if deviation > 0 and channel[i, j] >= mean + 2 * deviation:
                result[i, j] += mean
    return result


def mask(channel: Tensor, size: Sequence[int]) -> Tensor:
    """Score-CAM's mask of one channel ``(h, w)``."""
    up = F.interpolate(channel[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
    return (up - up.min()) / (up.max() - up.min()) if up.max() > up.min() else torch.zeros_like(up)


def probability(model: nn.Module, image: Tensor, c: int) -> float:
    with torch.no_grad():
        logits = model(image[None])[0].tolist()
    return math.exp(logits[c]) / sum(map(math.exp, logits))


def score_cam(model: nn.Module, image: Tensor, c: int, activation: Tensor) -> Tensor:
    """Wang et al. 2020, definition 3, with the weights after softmax."""
    weights = [probability(model, image * mask(channel, image.shape[1:]), c) for channel in activation]
    return weighted(activation, weights)


def ss_cam(model: nn.Module, image: Tensor, c: int, activation: Tensor, noise: Sequence[Tensor]) -> Tensor:
    """Wang et al. 2020 (SS-CAM): ``noise[m]`` is added to all channels for sample m."""
    weights = []
    for k, channel in enumerate(activation):
        scores = [probability(model, image * mask(channel + n[k], image.shape[1:]), c) for n in noise]
        weights.append(sum(scores) / len(scores))
    return weighted(activation, weights)


def is_cam(model: nn.Module, image: Tensor, c: int, activation: Tensor, steps: int) -> Tensor:
    """Naidu et al. 2020: a mean over the way from nothing to the whole mask."""
    weights = []
    for channel in activation:
        whole = mask(channel, image.shape[1:])
        weights.append(
            sum(probability(model, image * whole * m / steps, c) for m in range(1, steps + 1)) / steps
        )
    return weighted(activation, weights)


def ablation_cam(activation: Tensor, score: float, without: Sequence[float]) -> Tensor:
    """Desai and Ramaswamy 2020, equations 3 and 4: ``without[k]`` is the score without channel k."""
    return weighted(activation, [(score - y) / score for y in without])


def poly_cam(model: nn.Module, image: Tensor, c: int, activations: Sequence[Tensor], kind: str) -> Tensor:
    """Englebert et al. 2022, of activations from the shallowest to the deepest layer."""
    found: Tensor | None = None
    for activation in reversed(activations):
        weights = []
        for channel in activation:
            whole = mask(channel, image.shape[1:])
            increase = probability(model, image * whole, c)
            decrease = probability(model, image, c) - probability(model, image * (1 - whole), c)
            weights.append(max({"+": increase, "-": decrease, "+-": increase + decrease}[kind], 0.0))
        part = weighted(activation, weights)
        if found is None:
            found = part
            continue

        def resize(image: Tensor, size: Sequence[int]) -> Tensor:
            return F.interpolate(image[None, None], size=tuple(size), mode="bilinear", align_corners=False)[
                0, 0
            ]

        local = resize(resize(part, found.shape), part.shape)
        up = resize(found, part.shape)
        found = torch.zeros_like(part)
        for i in range(part.shape[0]):
            for j in range(part.shape[1]):
                if local[i, j] > 0:
                    found[i, j] = part[i, j] / local[i, j] * up[i, j]
    assert found is not None
    return found


def relevance_of_linear(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """Alpha 1, beta 0: ``x`` (I,), ``weight`` (O, I), ``relevance`` (O,)."""
    result = torch.zeros_like(x)
    for o in range(len(weight)):
        parts = [max(float(x[i] * weight[o, i]), 0.0) for i in range(len(x))]
        total = sum(parts)
        for i in range(len(x)):
            if total != 0:
                result[i] += parts[i] / total * relevance[o]
    return result


def relevance_of_conv(x: Tensor, weight: Tensor, relevance: Tensor, stride: int, padding: int) -> Tensor:
    """Alpha 1, beta 0: ``x`` (I, h, w), ``weight`` (O, I, a, b), ``relevance`` (O, h', w')."""
    padded = F.pad(x, (padding,) * 4)
    result = torch.zeros_like(padded)
    _, _, rows, columns = weight.shape
    for o in range(len(weight)):
        for i in range(relevance.shape[1]):
            for j in range(relevance.shape[2]):
                place = slice(i * stride, i * stride + rows), slice(j * stride, j * stride + columns)
                parts = (padded[:, place[0], place[1]] * weight[o]).clamp(min=0)
                if parts.sum() != 0:
                    result[:, place[0], place[1]] += parts / parts.sum() * relevance[o, i, j]
    return result[:, padding : padding + x.shape[1], padding : padding + x.shape[2]]


def relevance_of_mean(x: Tensor, relevance: Tensor) -> Tensor:
    """In proportion: the mean of each channel ``(C, h, w)`` had ``relevance`` (C,)."""
    result = torch.zeros_like(x)
    for k in range(len(x)):
        if x[k].sum() != 0:
            for i, j in positions(x):
                result[k, i, j] = x[k, i, j] / x[k].sum() * relevance[k]
    return result


def relevance_of_pooled(a: Tensor, fc: nn.Linear, relevance: Tensor) -> Tensor:
    """Through a linear layer and global average pooling: ``a`` is the ``(C, h, w)`` that was pooled."""
    return relevance_of_mean(a, relevance_of_linear(a.mean((1, 2)), fc.weight.detach(), relevance))


def relevance_of_pool(x: Tensor, relevance: Tensor, *, winner: bool) -> Tensor:
    """2 x 2 poolings: the winner takes all, or each its share."""
    result = torch.zeros_like(x)
    for k in range(len(x)):
        for i in range(relevance.shape[1]):
            for j in range(relevance.shape[2]):
                window = x[k, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                share = torch.zeros_like(window)
                if winner:
                    share.view(-1)[window.flatten().argmax()] = 1
                elif window.sum() != 0:
                    share = window / window.sum()
                result[k, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = share * relevance[k, i, j]
    return result


def cam(activation: Tensor, weights: Tensor) -> Tensor:
    """Zhou et al. 2016, equation 2, of one image and one class: ``weights`` is ``(C,)``."""
    channels, rows, columns = activation.shape
    result = torch.zeros(rows, columns, dtype=activation.dtype)
    for i in range(rows):
        for j in range(columns):
            result[i, j] = sum(weights[k] * activation[k, i, j] for k in range(channels))
    return result
