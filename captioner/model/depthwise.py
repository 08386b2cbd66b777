"""Depthwise convolutions with a fast gradient on CPUs.

oneDNN's gradient of a depthwise convolution with a kernel of 5×5 or more takes about thirty times
as long as the convolution. The gradient is itself two convolutions, which oneDNN computes fast: the
input's gradient is a convolution with the flipped kernel; the kernel's gradient correlates each
channel of each image with its output's gradient, a depthwise convolution of ``B·C`` channels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DepthwiseConv2d", "replace_depthwise_convolutions"]


class _Depthwise(torch.autograd.Function):
    """The convolution, with the gradient as two convolutions."""

    @staticmethod
    def forward(ctx: Any, x_BChw: Tensor, kernel_C1kk: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(x_BChw, kernel_C1kk)
        ctx.padding = padding
        return F.conv2d(x_BChw, kernel_C1kk, padding=padding, groups=len(kernel_C1kk))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        [gradient_BChw] = gradients
        x_BChw, kernel_C1kk = ctx.saved_tensors
        images, channels = x_BChw.shape[:2]
        of_x = of_kernel = None
        if ctx.needs_input_grad[0]:
            margin = kernel_C1kk.size(-1) - 1 - ctx.padding
            of_x = F.conv2d(gradient_BChw, kernel_C1kk.flip(2, 3), padding=margin, groups=channels)
        if ctx.needs_input_grad[1]:
            maps_1Nhw = x_BChw.transpose(0, 1).flatten(0, 1)[None]
            kernels_N1hw = gradient_BChw.transpose(0, 1).flatten(0, 1)[:, None]
            each_1Nkk = F.conv2d(
                maps_1Nhw, kernels_N1hw, padding=ctx.padding, groups=images * channels
            )
            of_kernel = each_1Nkk.view(channels, images, *kernel_C1kk.shape[2:]).sum(1)[:, None]
        return of_x, of_kernel, None


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise ``nn.Conv2d`` of stride 1 that differs only in how its gradient is computed."""

    @classmethod
    def like(cls, other: nn.Conv2d) -> "DepthwiseConv2d":
        """Makes a convolution that shares the weights of ``other``."""
        own = cls(
            other.in_channels,
            other.out_channels,
            other.kernel_size,  # type: ignore[arg-type]
            padding=other.padding,  # type: ignore[arg-type]
            groups=other.groups,
            bias=other.bias is not None,
            device="meta",
        )
        own.weight, own.bias = other.weight, other.bias
        return own

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (torch.is_grad_enabled() and x.device.type == "cpu"):
            return super()._conv_forward(x, weight, bias)  # type: ignore[no-any-return]
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        output: Tensor = _Depthwise.apply(x, weight, self.padding[0])
        return output if bias is None else output + bias[:, None, None]


def replace_depthwise_convolutions(network: nn.Module) -> None:
    """Replaces the convolutions that :class:`DepthwiseConv2d` has a faster gradient for."""
    for name, module in list(network.named_modules()):
        if _is_replaceable(module):
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, DepthwiseConv2d.like(module))


def _is_replaceable(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d:
        return False
    height, width = module.kernel_size
    return (
        1 < module.in_channels == module.out_channels == module.groups
        and module.stride == module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and height == width >= 5
        and module.padding in [(margin, margin) for margin in range(height)]
    )
