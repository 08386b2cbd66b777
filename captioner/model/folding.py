"""BatchNorm folded into the convolutions before it: the same features, a pass over them less."""

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from captioner.model.network import ImageEncoder

__all__ = ["fold_batch_norm"]

_TOLERANCE = 1e-3  # of the largest feature


@torch.no_grad()
def fold_batch_norm(encoder: ImageEncoder, image_size: int) -> None:
    """Folds every BatchNorm of a backbone that normalises what a convolution gave.

    Which ones do is seen by encoding an image. Whether the features stay what they were is seen by
    encoding it again: a backbone that does more with a convolution's output than to normalise it
    is left as it was.

    Args:
        encoder: in eval mode and in float32.
        image_size: height and width of its images.
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
    """The names of each convolution and of the BatchNorm that gets its output; the features."""
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
    # A module that is called twice may be followed by something else the second time.
    return [pair for pair in pairs if all(calls[name] == 1 for name in pair)], features
