"""The caption decoder: a Transformer that predicts the next word from the words and the image.

Shapes in names: as in :mod:`captioner.model.layers`, and ``V`` words of the vocabulary.
"""

import torch
from torch import Tensor, nn

from captioner.config import ModelConfig
from captioner.model.layers import (
    Block,
    CrossAttentionCache,
    Dropout,
    PackedWords,
    SelfAttentionCache,
    pooling_matrix,
)

__all__ = ["CaptionDecoder"]


class CaptionDecoder(nn.Module):
    """Predicts the next word from the words so far and the image."""

    def __init__(self, config: ModelConfig, channels: int):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.max_length, config.width)
        self.embedding_norm = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(Block(config, channels) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width) if config.pre_norm else nn.Identity()
        self.head = nn.Linear(config.width, config.vocabulary_size, bias=False)
        shared = config.shared_dropout
        self.embedding_dropout = Dropout(config.embedding_dropout, shared=shared)
        self.head_dropout = Dropout(config.head_dropout, shared=shared)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.head.weight, -0.1, 0.1)
        if config.pre_norm:
            # torch's default, variance 1, would drown the word embeddings.
            nn.init.uniform_(self.position_embedding.weight, -0.1, 0.1)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]  # ModuleList is not generic

    def forward(
        self, ids_RT: Tensor, features_BhwC: Tensor, counted_RT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predicts the next word at every position at once, for training.

        Args:
            ids_RT: captions that begin with ``<start>``.
            features_BhwC: the images' features; ``R`` is a multiple of ``B``.
            counted_RT: False for padding, which is only at the end of a row; None if there is
                no padding.

        Returns:
            ``logits_NV`` of the word after each counted word, row after row; and
            ``attention_NP``, the cross-attention of the last block or the mean over all blocks,
            as ``config.attention_map`` says; in both cases the mean over heads, weighted by the
            norms of the values if ``config.attention_norms``.
        """
        rows, length = ids_RT.shape
        ids_N = ids_RT.flatten()
        positions_N = torch.arange(length, device=ids_RT.device).repeat(rows)
        words = PackedWords(rows, length)
        if counted_RT is not None:
            places_N = counted_RT.flatten().nonzero()[:, 0]
            ids_N, positions_N = ids_N[places_N], positions_N[places_N]
            words = PackedWords(rows, length, places_N)
        return self._run(ids_N, positions_N, words, self.project_image(features_BhwC))

    def project_image(self, features_BhwC: Tensor) -> CrossAttentionCache:
        """Projects the features to the keys and values of every block, once for all words."""
        _, height, width, _ = features_BhwC.shape
        features_BLC = features_BhwC.flatten(1, 2)
        projected = [block.cross_attention.project(features_BLC) for block in self._blocks()]
        pooling, grid = None, self.config.grid
        if grid is not None and (height, width) != (grid, grid):
            pooling = pooling_matrix(
                height, width, grid, features_BhwC.device, projected[0][0].dtype
            )
        keys, values = [keys for keys, _ in projected], [values for _, values in projected]
        norms = None
        if self.config.attention_norms:
            norms = [
                block.cross_attention.value_norms(of_block, pooling)
                for block, of_block in zip(self._blocks(), values, strict=True)
            ]
        return CrossAttentionCache(keys, values, pooling, norms)

    def step(
        self, ids_R: Tensor, image_cache: CrossAttentionCache, word_cache: SelfAttentionCache
    ) -> tuple[Tensor, Tensor]:
        """Predicts one more word of each row: ``logits_RV`` and ``attention_RP``."""
        positions_R = torch.full_like(ids_R, word_cache.length)
        return self._run(ids_R, positions_R, PackedWords(len(ids_R), 1), image_cache, word_cache)

    def _run(
        self,
        ids_N: Tensor,
        positions_N: Tensor,
        words: PackedWords,
        image_cache: CrossAttentionCache,
        word_cache: SelfAttentionCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        x = self.embedding_norm(self.embedding(ids_N) + self.position_embedding(positions_N))
        x = self.embedding_dropout(x, words)
        blocks = self._blocks()
        shown = range(len(blocks)) if self.config.attention_map == "mean" else [len(blocks) - 1]
        maps = []
        for layer, block in enumerate(blocks):
            x, weights = block(x, words, image_cache, word_cache, layer)
            if layer in shown:
                if image_cache.norms is not None:
                    weights = weights * image_cache.norms[layer][:, :, None]
                maps.append(weights.mean(1))  # (B, n·T, P)
        logits_NV = self.head(self.head_dropout(self.final_norm(x), words))
        attention = maps[0] if len(maps) == 1 else torch.stack(maps).mean(0)
        if image_cache.norms is not None:
            attention = attention / attention.sum(-1, keepdim=True)
        return logits_NV, words.unpad(attention.view(words.rows, words.length, -1))
