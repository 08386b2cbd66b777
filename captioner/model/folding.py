"""Fold BatchNorm layers into the convolutions before them, which saves a pass over the features."""

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from captioner.model.encoder import ImageEncoder

__all__ = ["fold_batch_norm"]

_TOLERANCE = 1e-3  # relative to the largest feature


@torch.no_grad()
def fold_batch_norm(encoder: ImageEncoder, image_size: int) -> None:
    """Folds every BatchNorm layer whose input is a convolution's output into that convolution.

    Encoding a random image finds these layers. Encoding it again compares the features: a backbone
    whose features change, because it uses a convolution's output elsewhere too, is left unfolded.

    Args:
        encoder: in eval mode and in float32.
        image_size: height and width of its images, in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, image_size, image_size, 3)
    image = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    image = image.to(encoder.mean.device)
    backbone = encoder.backbone
    pairs, before = _convolutions_with_norms(encoder, image)
    replaced = {}
    for convolution_name, norm_name in pairs:
        convolution, norm = (backbone.get_submodule(name) for name in (convolution_name, norm_name))
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        rest: nn.Module = nn.Identity()
        if isinstance(norm, BatchNormAct2d):
            rest = nn.Sequential(norm.drop, norm.act)
        replaced[convolution_name], replaced[norm_name] = convolution, norm
        backbone.set_submodule(convolution_name, fuse_conv_bn_eval(convolution, norm))
        backbone.set_submodule(norm_name, rest)
    largest = before.abs().max()
    if (encoder(image) - before).abs().max() > _TOLERANCE * largest:
        for name, module in replaced.items():
            backbone.set_submodule(name, module)


def _convolutions_with_norms(
    encoder: ImageEncoder, image: Tensor
) -> tuple[list[tuple[str, str]], Tensor]:
    """The names of each convolution and the BatchNorm that takes its output; the features."""
    outputs: list[tuple[str, Tensor]] = []
    pairs: list[tuple[str, str]] = []
    calls: dict[str, int] = {}

    def after_convolution(name: str, output: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        outputs.append((name, output))

    def before_norm(name: str, given: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        pairs.extend((other, name) for other, output in outputs if output is given)

    handles = []
    for name, module in encoder.backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(
                module.register_forward_hook(
                    lambda _, __, output, name=name: after_convolution(name, output)
                )
            )
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, given, name=name: before_norm(name, given[0])
                )
            )
    try:
        features = encoder(image)
    finally:
        for handle in handles:
            handle.remove()
    # A module that is called twice may have another successor the second time.
    return [pair for pair in pairs if all(calls[name] == 1 for name in pair)], features
