"""Recording the bias of each layer during a forward pass."""

from typing import Any

import torch

from camkit.functions import WITH_BIAS, Call, FunctionMode


class BiasRecorder(FunctionMode):
    """Records the bias of every layer, with a tensor of zeros that is added to the layer's output.

    The gradient with respect to these zeros equals the gradient with respect to the layer's output. An
    in-place operation after the layer cannot change the zeros, because it writes to the sum.

    Attributes:
        found: for each layer in order of its call, the zeros, in the shape of the output, and the bias, in
            a shape that broadcasts to the output.
        are_maps: for each entry of ``found``, whether the output is a feature map ``(N, C, *spatial)``. The
            output of a linear layer is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.are_maps: list[bool] = []

    def meet(self, call: Call) -> Any:
        """Runs a call; if it adds a bias, records the bias and adds the zeros."""
        result = call.run()
        bias = _bias_of(call)
        if bias is None or not result.requires_grad:
            return result
        zeros = torch.zeros_like(result, requires_grad=True)
        is_linear = call.name == "linear"
        # The channels are the last dimension of a linear layer's output, and the second of all others.
        shape = [1] * result.ndim
        shape[-1 if is_linear else 1] = -1
        self.found.append((zeros, bias.detach().reshape(shape)))
        self.are_maps.append(not is_linear and result.ndim > 2)
        return result + zeros


def _bias_of(call: Call) -> torch.Tensor | None:
    """Returns the constant that a call adds to each channel, ``(C,)``; ``None`` if it adds none.

    A batch normalisation with running statistics adds ``bias - weight * mean / sqrt(variance + eps)``.
    """
    # The first parameters of torch's functions, in order, to read arguments that were passed by position.
    names = ["input", "weight", "bias"]
    if call.name == "batch_norm":
        names = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    elif call.name not in WITH_BIAS:
        return None
    given: dict[str, Any] = dict(zip(names, call.args, strict=False)) | call.kwargs
    bias: torch.Tensor | None = given.get("bias")
    mean, variance, weight = (given.get(n) for n in ("running_mean", "running_var", "weight"))
    # Without running statistics the shift depends on the batch, so that only the bias is a constant.
    if mean is None or variance is None:
        return bias
    shift: torch.Tensor = -mean / (variance + given.get("eps", 1e-5)).sqrt()
    return (shift if weight is None else shift * weight) + (0 if bias is None else bias)
