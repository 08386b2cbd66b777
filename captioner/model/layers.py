"""The decoder's layers: self-attention, cross-attention, feed-forward, and their caches.

Shapes in names: ``B`` images, ``R = B·n`` rows (the ``n`` captions or beams of an image are
adjacent and share its keys and values), ``T`` words, ``N`` of the ``R·T`` words that are not
padding, row after row, ``h, w`` the backbone's own grid, ``L = h·w``, ``P = grid²`` attended
positions (``L`` if the config's grid is null), ``C`` channels of the backbone, ``E`` width, ``H``
heads, ``D = E / H``.

The features are average-pooled from ``h×w`` to ``grid×grid`` by a fixed matrix ``pooling_PL``. A
linear map commutes with it (its rows sum to 1, so a bias does too). Keys and values are therefore
projected, and read at every step, on the smaller ``h×w`` grid: ``logits = q Kᵀ poolingᵀ`` and
``output = (softmax(logits) pooling) V`` equal attention over the pooled grid.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.config import ModelConfig

__all__ = [
    "Block",
    "CrossAttentionCache",
    "Dropout",
    "PackedWords",
    "SelfAttentionCache",
    "pooling_matrix",
]


@lru_cache(maxsize=64)
def pooling_matrix(
    height: int, width: int, grid: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Adaptive average pooling of a ``height×width`` map to ``grid×grid``, as ``pooling_PL``."""
    with torch.inference_mode(False):  # the cached matrix may be used in training later
        cells = height * width
        basis = torch.eye(cells).view(cells, height, width)
        pooled = F.adaptive_avg_pool2d(basis, (grid, grid))
        return pooled.view(cells, grid * grid).T.contiguous().to(device, dtype)


@dataclass(frozen=True)
class CrossAttentionCache:
    """The images' keys and values ``(B, H, L, D)`` for the cross-attention of each block.

    ``norms`` are the values' norms ``(B, H, P)``, None if maps show attention alone.
    """

    keys: list[Tensor]
    values: list[Tensor]
    pooling_PL: Tensor | None
    norms: list[Tensor] | None = None

    def select(self, images: Tensor) -> "CrossAttentionCache":
        """The cache of some of the images."""
        return CrossAttentionCache(
            [keys.index_select(0, images) for keys in self.keys],
            [values.index_select(0, images) for values in self.values],
            self.pooling_PL,
            None if self.norms is None else [norms.index_select(0, images) for norms in self.norms],
        )


class SelfAttentionCache:
    """The self-attention keys and values of the words so far: ``(layers, R, H, T, D)``."""

    def __init__(self, config: ModelConfig, rows: int, length: int, like: Tensor):
        shape = (config.layers, rows, config.heads, length, config.width // config.heads)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def append(self, layer: int, keys_RH1D: Tensor, values_RH1D: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one word's keys and values and returns all so far.

        The last layer's call advances ``length``.
        """
        end = self.length + 1
        self.keys[layer, :, :, self.length] = keys_RH1D[:, :, 0]
        self.values[layer, :, :, self.length] = values_RH1D[:, :, 0]
        if layer == len(self.keys) - 1:
            self.length = end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keeps these rows in this order; a row may appear more than once."""
        if len(rows) == self.keys.size(1):
            end = self.length
            self.keys[..., :end, :] = self.keys[..., :end, :].index_select(1, rows)
            self.values[..., :end, :] = self.values[..., :end, :].index_select(1, rows)
        else:
            self.keys = self.keys.index_select(1, rows)
            self.values = self.values.index_select(1, rows)


@dataclass(frozen=True)
class PackedWords:
    """The ``N`` words of ``R`` rows of length ``T`` that are not padding.

    ``places_N`` are their places among the ``R·T``; None: there is no padding. Layers that see one
    word at a time compute ``x_NE``, so padding costs nothing there. Attention compares words: it
    computes ``x_RTE`` with zeros as padding.
    """

    rows: int
    length: int
    places_N: Tensor | None = None

    def pad(self, x_NE: Tensor) -> Tensor:
        """``x_NE`` to ``x_RTE``, with zeros as padding."""
        x = x_NE
        if self.places_N is not None:
            x = x.new_zeros(self.rows * self.length, x.size(1)).index_copy_(0, self.places_N, x)
        return x.view(self.rows, self.length, -1)

    def unpad(self, x_RTE: Tensor) -> Tensor:
        """``x_RTE`` to ``x_NE``, without the padding."""
        x = x_RTE.flatten(0, 1)
        return x if self.places_N is None else x.index_select(0, self.places_N)

    def repeat_rows(self, x_RE: Tensor) -> Tensor:
        """``x_RE`` to ``x_NE``: each word gets its row's values."""
        if self.places_N is None:
            return x_RE.repeat_interleave(self.length, 0)
        return x_RE.index_select(0, self.places_N // self.length)


class Dropout(nn.Module):
    """Dropout of ``x_NE``. If ``shared``, all words of a row share one mask, which is faster."""

    def __init__(self, probability: float, *, shared: bool):
        super().__init__()
        self.probability, self.shared = probability, shared

    def forward(self, x_NE: Tensor, words: PackedWords) -> Tensor:
        """Drops values of ``x_NE`` in training; returns it unchanged in eval mode."""
        if not self.training or self.probability == 0:
            return x_NE
        if not self.shared:
            return F.dropout(x_NE, self.probability)
        mask_RE = F.dropout(x_NE.new_ones(words.rows, x_NE.size(1)), self.probability)
        return x_NE * words.repeat_rows(mask_RE)


def _attend(
    query_BHSD: Tensor,
    keys_BHLD: Tensor,
    values_BHLD: Tensor,
    *,
    hidden: Tensor | None = None,
    pooling_PL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention: ``output_BHSD`` and float32 ``weights_BHSP``.

    Written as matrix products: for sequences of a few dozen words they are faster than the fused
    kernels, whose backward pass is slow on CPUs.
    """
    scale = query_BHSD.size(-1) ** -0.5
    logits = (query_BHSD * scale) @ keys_BHLD.transpose(-2, -1)
    if pooling_PL is not None:
        logits = logits @ pooling_PL.T
    if hidden is not None:
        logits = logits.masked_fill(hidden, float("-inf"))
    weights = logits.softmax(-1, dtype=torch.float32)
    read = weights.to(values_BHLD.dtype)
    if pooling_PL is not None:
        read = read @ pooling_PL
    return read @ values_BHLD, weights


class SelfAttention(nn.Module):
    """Causal multi-head attention among the words of a caption."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)
        nn.init.xavier_uniform_(self.query_key_value.weight)
        nn.init.zeros_(self.query_key_value.bias)
        nn.init.zeros_(self.output.bias)

    def forward(
        self, x_NE: Tensor, words: PackedWords, word_cache: SelfAttentionCache | None, layer: int
    ) -> Tensor:
        """Each word attends to itself and the words before it; with a cache, ``T`` is 1."""
        joined = words.pad(self.query_key_value(x_NE)).view(
            words.rows, words.length, 3, self.heads, -1
        )
        query, keys, values = joined.permute(2, 0, 3, 1, 4).unbind()
        hidden_TT = None
        if word_cache is not None:
            keys, values = word_cache.append(layer, keys, values)
        else:
            shape = (words.length, words.length)
            hidden_TT = torch.ones(shape, dtype=torch.bool, device=query.device).triu(1)
        output, _ = _attend(query, keys, values, hidden=hidden_TT)
        return self.output(words.unpad(output.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Multi-head attention from the words to the image."""

    def __init__(self, config: ModelConfig, channels: int):
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(channels, config.width)
        self.value = nn.Linear(channels, config.width)
        self.output = nn.Linear(config.width, config.width)
        for projection in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        nn.init.zeros_(self.output.bias)

    def project(self, features_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``(B, H, L, D)`` of the images, on the backbone's own grid."""
        keys, values = (
            projection(features_BLC).unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous()
            for projection in (self.key, self.value)
        )
        return keys, values

    @torch.no_grad()
    def value_norms(self, values_BHLD: Tensor, pooling_PL: Tensor | None) -> Tensor:
        """Norms ``(B, H, P)`` of the vectors that a head adds to a word for each position.

        These are the positions' values times the head's part ``O`` of the output projection
        (Kobayashi et al. 2020). ``|vO|² = v(OOᵀ)vᵀ``, and ``OOᵀ`` is small.
        """
        values = values_BHLD if pooling_PL is None else pooling_PL @ values_BHLD
        values = values.float()
        output_HDE = self.output.weight.float().T.reshape(self.heads, -1, len(self.output.weight))
        squares: Tensor = (values @ (output_HDE @ output_HDE.mT) * values).sum(-1)
        # Above 0, so values that are all 0 leave the attention as it is.
        return squares.clamp(min=1e-20).sqrt()

    def forward(
        self, x_NE: Tensor, words: PackedWords, image_cache: CrossAttentionCache, layer: int
    ) -> tuple[Tensor, Tensor]:
        """The output ``x_NE`` and the weights ``(B, H, n·T, P)``."""
        keys, values = image_cache.keys[layer], image_cache.values[layer]
        query = words.pad(self.query(x_NE)).view(len(keys), -1, self.heads, keys.size(-1))
        output, weights = _attend(
            query.transpose(1, 2), keys, values, pooling_PL=image_cache.pooling_PL
        )
        joined = output.transpose(1, 2).reshape(words.rows, words.length, -1)
        return self.output(words.unpad(joined)), weights


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward sublayers, each with a residual connection.

    Post-norm, where both attentions share ``norm1`` as in the notebook; or pre-norm, where each
    sublayer has its own norm.
    """

    def __init__(self, config: ModelConfig, channels: int):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.norm1 = nn.LayerNorm(config.width)
        self.norm2 = nn.LayerNorm(config.width)
        if config.pre_norm:
            self.norm_cross = nn.LayerNorm(config.width)
        self.self_attention = SelfAttention(config)
        self.cross_attention = CrossAttention(config, channels)
        self.linear1 = nn.Linear(config.width, 4 * config.width)
        self.linear2 = nn.Linear(4 * config.width, config.width)
        shared = config.shared_dropout
        self.self_dropout = Dropout(config.attention_dropout, shared=shared)
        self.cross_dropout = Dropout(config.attention_dropout, shared=shared)
        self.inner_dropout = Dropout(config.residual_dropout, shared=shared)
        self.outer_dropout = Dropout(config.residual_dropout, shared=shared)

    def forward(
        self,
        x: Tensor,
        words: PackedWords,
        image_cache: CrossAttentionCache,
        word_cache: SelfAttentionCache | None,
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        """Returns ``x_NE`` and the cross-attention weights ``(B, H, n·T, P)``."""
        read = self.self_attention(self.norm1(x) if self.pre_norm else x, words, word_cache, layer)
        x = x + self.self_dropout(read, words)
        if self.pre_norm:
            seen, weights = self.cross_attention(self.norm_cross(x), words, image_cache, layer)
            x = x + self.cross_dropout(seen, words)
            return x + self._feed_forward(self.norm2(x), words), weights
        x = self.norm1(x)
        seen, weights = self.cross_attention(x, words, image_cache, layer)
        x = self.norm1(x + self.cross_dropout(seen, words))
        return self.norm2(x + self._feed_forward(x, words)), weights

    def _feed_forward(self, x: Tensor, words: PackedWords) -> Tensor:
        inner = self.inner_dropout(F.gelu(self.linear1(x)), words)
        return self.outer_dropout(self.linear2(inner), words)  # type: ignore[no-any-return]
