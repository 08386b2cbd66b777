"""The captioning network: the image encoder and the caption decoder.

Shapes in names: as in :mod:`captioner.model.layers`, and ``V`` words of the vocabulary.
"""

from torch import Tensor, nn

from captioner.config import ModelConfig
from captioner.model.decoder import CaptionDecoder
from captioner.model.encoder import ImageEncoder

__all__ = ["CaptionModel"]


class CaptionModel(nn.Module):
    """An image encoder and a caption decoder."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = ImageEncoder(config)
        self.decoder = CaptionDecoder(config, self.encoder.channels)

    def forward(self, inputs: Tensor, ids_RT: Tensor, counted_RT: Tensor | None = None) -> Tensor:
        """Predicts the next words, for training: ``logits_NV`` of :meth:`CaptionDecoder.forward`.

        Args:
            inputs: uint8 images ``(B, size, size, 3)``, or features ``(B, h, w, C)``.
            ids_RT: captions that begin with ``<start>``.
            counted_RT: False for padding.
        """
        features = inputs if inputs.is_floating_point() else self.encoder(inputs)
        logits_NV, _ = self.decoder(ids_RT, features, counted_RT)
        return logits_NV  # type: ignore[no-any-return]
