"""A forward pass that keeps the bias of each layer."""

from typing import Any

import torch

from camkit.functions import WITH_BIAS, Call, FunctionMode


class BiasRecorder(FunctionMode):
    """Meets every layer with a bias, and adds zeros to what it gives, by which there is a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.are_maps: list[bool] = []  # and not what a linear layer gives

    def meet(self, call: Call) -> Any:
        result = call.run()
        bias = _bias_of(call)
        if bias is None or not result.requires_grad:
            return result
        zeros = torch.zeros_like(result, requires_grad=True)
        is_linear = call.name == "linear"
        channels = [1] * result.ndim
        channels[-1 if is_linear else 1] = -1
        self.found.append((zeros, bias.detach().reshape(channels)))
        self.are_maps.append(not is_linear and result.ndim > 2)
        return result + zeros


def _bias_of(call: Call) -> torch.Tensor | None:
    """What a layer adds, if it is one that does."""
    names = ["input", "weight", "bias"]
    if call.name == "batch_norm":
        names = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    elif call.name not in WITH_BIAS:
        return None
    given: dict[str, Any] = dict(zip(names, call.args, strict=False)) | call.kwargs
    bias: torch.Tensor | None = given.get("bias")
    mean, variance, weight = (given.get(n) for n in ("running_mean", "running_var", "weight"))
    if mean is None or variance is None:  # no normalisation, or one by the batch, which adds nothing fixed
        return bias
    shift: torch.Tensor = -mean / (variance + given.get("eps", 1e-5)).sqrt()
    return (shift if weight is None else shift * weight) + (0 if bias is None else bias)
