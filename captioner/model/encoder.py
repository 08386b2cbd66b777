"""The image encoder: a timm backbone without its classifier.

Shapes in names: ``B`` images of ``H×W`` pixels, ``h, w`` the backbone's grid, ``C`` its channels,
``L`` the tokens of a Vision Transformer.
"""

import math
from collections.abc import Mapping

import timm
import torch
from timm.layers import ClNormMlpClassifierHead, DropPath, NormMlpClassifierHead
from timm.models import group_parameters
from torch import Tensor, nn

from captioner.config import ModelConfig
from captioner.errors import InputError
from captioner.model.backbone import create_backbone
from captioner.model.depthwise import replace_depthwise_convolutions
from captioner.model.published import fit_weights

__all__ = ["ImageEncoder"]


class ImageEncoder(nn.Module):
    """A timm backbone without its classifier.

    BatchNorm layers always use the statistics of the pretrained weights, in fine-tuning too. The
    features of an image therefore do not depend on the other images of the batch.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.backbone = create_backbone(config.backbone, config.image_size)
        replace_depthwise_convolutions(self.backbone)
        self.config = config
        self.channels: int = self.backbone.num_features
        self.register_buffer("mean", torch.tensor(config.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.std), persistent=False)
        self.fine_tune(None)

    def fine_tune(self, from_stage: int | None) -> None:
        """Makes the stages from ``from_stage`` on trainable; freezes the others.

        Args:
            from_stage: 0 is the stem; None freezes all stages. In a ResNet stages 1 to 4 are
                ``layer1`` to ``layer4``, and the notebook trains from 2 on.

        Raises:
            InputError: ``from_stage`` is above the backbone's last stage.
        """
        trained = set() if from_stage is None else self._names_from(from_stage)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name in trained)
        if trained:
            self._freeze_unused()

    def _names_from(self, from_stage: int) -> set[str]:
        """The names of the backbone's parameters in the stages from ``from_stage`` on."""
        if from_stage == 0:
            return {name for name, _ in self.backbone.named_parameters()}
        stages = self._stages()
        if not stages:
            raise InputError(
                f"--fine-tune-from {from_stage}: {self.config.backbone} has no stages; use 0, "
                "which trains all of it, or none"
            )
        if from_stage > max(stages):
            raise InputError(
                f"--fine-tune-from {from_stage}: the last stage of {self.config.backbone} is "
                f"{max(stages)}"
            )
        return {name for stage, names in stages.items() if stage >= from_stage for name in names}

    @property
    def last_stage(self) -> int:
        """The number of the backbone's last stage; 0 where timm knows no stages of it."""
        return max(self._stages(), default=0)

    def _stages(self) -> dict[int, list[str]]:
        """The names of the parameters of each stage."""
        try:
            matcher = self.backbone.group_matcher(coarse=True)
        except (AttributeError, AssertionError):  # a backbone has none
            return {}
        return group_parameters(self.backbone, matcher)  # type: ignore[no-any-return]

    def _freeze_unused(self) -> None:
        """Freezes parameters that the features do not depend on: they would never get gradients."""
        mode = self.training
        self.eval()
        parameters = [each for each in self.parameters() if each.requires_grad]
        gradients = torch.autograd.grad(
            self.encode_blank_image().sum(), parameters, allow_unused=True
        )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
        self.train(mode)

    def encode_blank_image(self) -> Tensor:
        """Encodes one image of zeros: features ``(1, h, w, C)``."""
        size = self.config.image_size
        return self(torch.zeros(1, size, size, 3, dtype=torch.uint8, device=self.mean.device))  # type: ignore[no-any-return]

    def use_stochastic_depth(self, rate: float) -> None:
        """Drops residual branches at random in training: stochastic depth (Huang et al. 2016).

        The last branch is dropped at this rate, earlier branches at lower rates that rise to it,
        as in timm.

        Raises:
            InputError: the backbone has no residual branches to drop.
        """
        cfg = self.backbone.pretrained_cfg
        try:
            with torch.device("meta"):
                other = timm.create_model(cfg["architecture"], drop_path_rate=rate)
        except TypeError as error:
            raise InputError(
                f"--drop-path: {cfg['architecture']} has no residual branches to drop"
            ) from error
        for name, module in other.named_modules():
            if isinstance(module, DropPath):
                parent, _, attribute = name.rpartition(".")
                setattr(self.backbone.get_submodule(parent), attribute, module)

    @property
    def frozen(self) -> bool:
        """Whether no parameter is trained, so the features can be computed once."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Sets the training mode; a frozen encoder and all BatchNorm layers stay in eval mode."""
        super().train(mode and not self.frozen)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, images_BHW3: Tensor) -> Tensor:
        """Encodes uint8 RGB images ``(B, size, size, 3)`` to ``features_BhwC``."""
        images = images_BHW3.to(self.mean.dtype) / 255
        normalised = (images - self.mean) / self.std
        return self.features(normalised.permute(0, 3, 1, 2))

    def features(self, images_B3HW: Tensor) -> Tensor:
        """Encodes normalised images to ``features_BhwC``, the backbone's last feature map.

        The tokens of a Vision Transformer that stand for no place, such as the class token and
        registers, are left out.

        Raises:
            InputError: the backbone's output is not a feature map.
        """
        features: Tensor = self.backbone.forward_features(images_B3HW)
        if not isinstance(features, Tensor):
            raise InputError(self._unfit(f"a {type(features).__name__}"))
        head = getattr(self.backbone, "head", None)
        if isinstance(head, (NormMlpClassifierHead, ClNormMlpClassifierHead)):
            features = head.norm(features)  # the last norm of a ConvNeXt
        if features.ndim == 3:
            tokens_BLC = features[:, self._prefix_tokens :]
            if grid := self._token_grid(tokens_BLC.size(1)):
                return tokens_BLC.view(-1, *grid, tokens_BLC.size(2))
        elif features.ndim == 4 and getattr(self.backbone, "output_fmt", "NCHW") == "NHWC":
            return features
        elif features.ndim == 4:
            return features.permute(0, 2, 3, 1)
        raise InputError(self._unfit(f"features of shape {tuple(features.shape)}"))

    @property
    def _prefix_tokens(self) -> int:
        """How many tokens stand before those of the image."""
        has_class_token = int(hasattr(self.backbone, "cls_token"))
        return int(getattr(self.backbone, "num_prefix_tokens", has_class_token))

    def _token_grid(self, tokens: int) -> tuple[int, int] | None:
        """The height and width of a grid of tokens; None if they have none."""
        grid = getattr(getattr(self.backbone, "patch_embed", None), "grid_size", None)
        if isinstance(grid, tuple) and grid[0] * grid[1] == tokens:
            return grid[0], grid[1]
        side = math.isqrt(tokens)  # of stages that merge tokens
        return (side, side) if tokens > 1 and side * side == tokens else None

    def _unfit(self, output: str) -> str:
        return (
            f"the backbone {self.config.backbone} gives {output}, which is not a feature map; "
            "choose another backbone"
        )

    def load_published_weights(self, state: Mapping[str, Tensor]) -> None:
        """Loads the published weights of a classification network, without its classifier.

        See :func:`captioner.model.published.fit_weights` for the names that it may have.

        Raises:
            InputError: the weights do not fit this backbone.
        """
        self.backbone.load_state_dict(fit_weights(self.backbone, state, self.config.backbone))
