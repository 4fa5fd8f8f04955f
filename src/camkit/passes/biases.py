"""A forward pass that keeps the bias of each layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from camkit.functions import WITH_BIAS


class BiasRecorder(TorchFunctionMode):
    """Meets every layer with a bias, and adds zeros to what it gives, by which there is a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.are_maps: list[bool] = []  # and not what a linear layer gives

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        bias = _bias_of(getattr(func, "__name__", ""), args, kwargs or {})
        if bias is None or not result.requires_grad:
            return result
        zeros = torch.zeros_like(result, requires_grad=True)
        is_linear = func is F.linear
        channels = [1] * result.ndim
        channels[-1 if is_linear else 1] = -1
        self.found.append((zeros, bias.detach().reshape(channels)))
        self.are_maps.append(not is_linear and result.ndim > 2)
        return result + zeros


def _bias_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What a layer adds, if it is one that does."""
    names = ["input", "weight", "bias"]
    if name == "batch_norm":
        names = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    elif name not in WITH_BIAS:
        return None
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
    bias: torch.Tensor | None = given.get("bias")
    mean, variance, weight = (given.get(n) for n in ("running_mean", "running_var", "weight"))
    if mean is None or variance is None:  # no normalisation, or one by the batch, which adds nothing fixed
        return bias
    shift: torch.Tensor = -mean / (variance + given.get("eps", 1e-5)).sqrt()
    return (shift if weight is None else shift * weight) + (0 if bias is None else bias)
