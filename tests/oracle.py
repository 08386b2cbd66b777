"""The reference system's own structure: nn.MultiheadAttention, torchvision's ResNet-50, no cache.

It exists to be compared with. The weights of one of our models are copied into it.
"""

import torch
import torchvision
from torch import Tensor, nn

from captioner.config import ModelConfig
from captioner.model.network import CaptionModel


class OracleEncoder(nn.Module):
    def __init__(self, grid: int):
        super().__init__()
        network = torchvision.models.resnet50(weights=None)
        self.layers = nn.Sequential(*list(network.children())[:-2])
        self.pool = nn.AdaptiveAvgPool2d((grid, grid))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.pool(self.layers(images_B3HW)).flatten(2).transpose(1, 2)


class OracleBlock(nn.Module):
    def __init__(self, config: ModelConfig, channels: int):
        super().__init__()
        width, heads = config.width, config.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.words = nn.MultiheadAttention(width, heads, batch_first=True)
        self.image = nn.MultiheadAttention(
            width, heads, kdim=channels, vdim=channels, batch_first=True
        )
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, memory: Tensor, causal: Tensor, padding: Tensor | None):
        seen, _ = self.words(x, x, x, attn_mask=causal, key_padding_mask=padding, is_causal=True)
        x = self.norm1(x + seen)
        seen, weights = self.image(x, memory, memory)
        x = self.norm1(x + seen)
        return self.norm2(x + self.feed_forward(x)), weights


class OracleDecoder(nn.Module):
    def __init__(self, config: ModelConfig, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.positions = nn.Embedding(config.max_length, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(OracleBlock(config, channels) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.vocabulary_size, bias=False)

    def forward(self, ids: Tensor, memory: Tensor, padding: Tensor | None):
        length = ids.size(1)
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.norm(self.embedding(ids) + self.positions(torch.arange(length))[None])
        for block in self.blocks:
            x, weights = block(x, memory, causal, padding)
        return self.head(x), weights


def oracle_of(model: CaptionModel) -> tuple[OracleEncoder | None, OracleDecoder]:
    """The reference structure with a model's weights; no encoder for other backbones."""
    config = model.config
    ours = model.decoder
    decoder = OracleDecoder(config, model.encoder.channels)
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (decoder.embedding, ours.embedding),
        (decoder.positions, ours.position_embedding),
        (decoder.norm, ours.embedding_norm),
        (decoder.head, ours.head),
    ]
    for theirs, block in zip(decoder.blocks, ours.blocks, strict=True):
        pairs += [
            (theirs.norm1, block.norm1),
            (theirs.norm2, block.norm2),
            (theirs.feed_forward[0], block.linear1),
            (theirs.feed_forward[2], block.linear2),
            (theirs.words.out_proj, block.self_attention.output),
            (theirs.image.out_proj, block.cross_attention.output),
        ]
        with torch.no_grad():
            theirs.words.in_proj_weight.copy_(block.self_attention.query_key_value.weight)
            theirs.words.in_proj_bias.copy_(block.self_attention.query_key_value.bias)
            cross = block.cross_attention
            theirs.image.q_proj_weight.copy_(cross.query.weight)
            theirs.image.k_proj_weight.copy_(cross.key.weight)
            theirs.image.v_proj_weight.copy_(cross.value.weight)
            biases = [cross.query.bias, cross.key.bias, cross.value.bias]
            theirs.image.in_proj_bias.copy_(torch.cat(biases))
    for theirs, mine in pairs:
        theirs.load_state_dict(mine.state_dict())
    encoder = None
    if config.backbone.startswith("resnet50"):
        encoder = OracleEncoder(config.grid)
        mine = model.encoder.backbone.state_dict()
        theirs_names = list(encoder.layers.state_dict())
        encoder.layers.load_state_dict(dict(zip(theirs_names, mine.values(), strict=True)))
        encoder.eval()
    return encoder, decoder.eval()


@torch.no_grad()
def greedy(
    decoder: OracleDecoder,
    memory_1PC: Tensor,
    forbidden: list[int] = (),
    max_words: int | None = None,
) -> tuple:
    """One image, no cache: everything is computed again for every word.

    Returns the words' ids with ``<eos>`` where it was chosen, their log-probabilities, and the
    last block's attention at the last step, a row for each choice.
    """
    ids = torch.tensor([[1]])
    logprobs = []
    for _ in range(max_words or decoder.positions.num_embeddings):
        logits, weights = decoder(ids, memory_1PC, None)
        last = logits[0, -1].clone()
        last[list(forbidden)] = -torch.inf
        chosen = last.topk(1)[1]
        logprobs.append(last.log_softmax(-1)[chosen].item())
        ids = torch.cat([ids, chosen[None]], dim=1)
        if chosen.item() == 2:
            break
    return ids[0, 1:].tolist(), logprobs, weights[0]
