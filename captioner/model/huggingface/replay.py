"""Attention maps and log-probabilities of finished captions, by one more forward pass.

``generate`` computes attention without its matrix. After it, the caption is given to the model as a
whole, with the attention matrix computed, and each layer's matrix is reduced to the rows of the
caption and the columns of the image, averaged over heads, before the next layer's exists. Models
that always compute the matrix need no such pass: :class:`StepMaps` takes the maps while they
generate.

A token's row is the one of the position before it: where the model looked when it chose the token.
Layers of the upper half are averaged.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor

__all__ = [
    "MapHooks",
    "Recorded",
    "StepMaps",
    "layers_of",
    "reuse_output",
    "token_logprobs",
    "with_attention_matrix",
]


def layers_of(model: Any, path: str) -> list[Any]:
    """The modules at a path, ``*`` standing for a layer's number: those of the upper half."""
    before, _, after = path.partition(".*.")
    layers = [layer.get_submodule(after) for layer in model.get_submodule(before)]
    return layers[len(layers) // 2 :]


class _Watch:
    """Sees what some layers give while the model runs; a context manager."""

    def __init__(self, layers: list[Any]):
        self._layers = layers

    def __enter__(self) -> Self:
        self._hooks = [layer.register_forward_hook(self._see) for layer in self._layers]
        return self

    def __exit__(self, *problem: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, module: Any, inputs: Any, output: Any) -> None:
        raise NotImplementedError


class MapHooks(_Watch):
    """Collects the maps of some layers while the model runs.

    ``columns_BP`` are the image's columns of the attention matrix, for each row of the batch.
    """

    def __init__(self, layers: list[Any], rows: int, columns_BP: Tensor):
        super().__init__(layers)
        self._rows, self._columns_BP = rows, columns_BP
        self._sum_BKP: Tensor | None = None

    def _see(self, module: Any, inputs: Any, output: Any) -> None:
        attention_BhQC = output[1]
        if attention_BhQC is None:
            raise RuntimeError("the model gave no attention matrix")
        mean_BKC = attention_BhQC[:, :, -self._rows :].float().mean(1)
        index_BKP = self._columns_BP[:, None].expand(-1, self._rows, -1).to(mean_BKC.device)
        maps_BKP = mean_BKC.gather(2, index_BKP)
        self._sum_BKP = maps_BKP if self._sum_BKP is None else self._sum_BKP + maps_BKP

    def mean_maps(self) -> Tensor:
        """The mean of the layers' maps ``(B, K, P)``, for the last ``K`` rows."""
        if self._sum_BKP is None:
            raise RuntimeError("no layer ran")
        return self._sum_BKP / len(self._layers)


class StepMaps(_Watch):
    """Collects the maps of some layers while ``generate`` runs without beams.

    Each step's last row is where the model looked when it chose the step's token.

    Args:
        layers: modules that return their attention matrix as the second value.
        columns: the image's columns of the attention matrix.
    """

    def __init__(self, layers: list[Any], columns: slice):
        super().__init__(layers)
        self._columns = columns
        self._rows_BP: list[Tensor] = []  # layer by layer, step after step

    def _see(self, module: Any, inputs: Any, output: Any) -> None:
        attention_BhQC = output[1]
        self._rows_BP.append(attention_BhQC[:, :, -1, self._columns].float().mean(1))

    def mean_maps(self) -> Tensor:
        """The mean of the layers' maps ``(B, T, P)`` for the ``T`` generated tokens."""
        rows_BSP, count = torch.stack(self._rows_BP, 1), len(self._layers)
        if rows_BSP.shape[1] % count:
            raise RuntimeError(f"{rows_BSP.shape[1]} matrices are not {count} for each token")
        batch, steps, patches = rows_BSP.shape
        return rows_BSP.view(batch, steps // count, count, patches).mean(2)


@contextlib.contextmanager
def with_attention_matrix(module: Any) -> Iterator[None]:
    """Lets a module compute attention step by step, with its matrix."""
    if not hasattr(module, "set_attn_implementation"):
        yield
        return
    usual = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(usual)


@contextlib.contextmanager
def reuse_output(module: Any, output: Any | None) -> Iterator[None]:
    """Lets a module return an output that it gave before, if there is one."""
    if output is None:
        yield
        return
    module.forward = lambda *arguments, **keywords: output
    try:
        yield
    finally:
        del module.forward


class Recorded:
    """Keeps what a module returns, in a ``with`` block: its only output, or None after several."""

    def __init__(self, module: Any):
        self._module, self._outputs = module, []  # type: ignore[var-annotated]

    def __enter__(self) -> "Recorded":
        self._hook = self._module.register_forward_hook(self._see)
        return self

    def __exit__(self, *problem: object) -> None:
        self._hook.remove()

    def _see(self, module: Any, inputs: Any, output: Any) -> None:
        self._outputs.append(copy.copy(output))  # generate repeats it for its beams, in place

    @property
    def output(self) -> Any | None:
        """What the module returned, where it ran once."""
        return self._outputs[0] if len(self._outputs) == 1 else None


def token_logprobs(logits_BKV: Tensor, tokens_BK: Tensor) -> Tensor:
    """Log-probabilities ``(B, K)`` of tokens."""
    logits_BKV = logits_BKV.float()
    chosen_BK = logits_BKV.gather(2, tokens_BK[..., None].to(logits_BKV.device))[..., 0]
    return chosen_BK - torch.logsumexp(logits_BKV, 2)
