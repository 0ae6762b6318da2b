"""The arguments that the ops on pairs share: the fields of csrc/torch/arguments.h, in the same order."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C
from .._inputs.options import Options
from .constant_result import constant_result


class OpBatch(NamedTuple):
    """The tensors of a batch."""

    embeddings: Tensor  # [N, D]
    labels: Tensor  # [N] int64
    ref_emb: Tensor | None  # [M, D]
    ref_labels: Tensor | None  # [M] int64
    self_index: Tensor | None  # [N] int64, the row of ref_emb that is the same point, or -1
    num_valid_refs: Tensor | None  # one int64: only so many of the first rows of ref_emb take part
    row_weights: Tensor | None = None  # [N], or [N + M] with both_directions: factors of the rows' losses


class OpOptions(NamedTuple):
    """A formula and its options."""

    formula: str
    params: list[float | Tensor]
    epsilon: float | None = None
    similarity: str = "cosine"
    reduction: str = "mean"
    mine_self_pair: bool = True
    return_sums: bool = False  # the loss is [part 0, part 1, count 0, count 1], for the caller to divide
    both_directions: bool = False  # the rows of ref_emb have losses too: rows N to N + M
    precision: str = "ieee"  # how CUDA multiplies float32: ieee or tf32
    save_for_backward: bool = False
    cache_bytes: int = -1  # similarities that are then kept; below 0: as many as the engine sees fit
    dynamic_params: Tensor | None = None

    @property
    def learns(self) -> bool:
        """Whether a parameter is a tensor."""
        return any(isinstance(value, Tensor) for value in self.params)

    def with_dynamic_params(self, device: torch.device | str = "cpu") -> "OpOptions":
        """The same with the numbers in a tensor: the op gives its gradient, and a compiled graph reads it
        when it runs.

        A graph fixes the float arguments of an op: a margin that follows a schedule would compile a graph for
        each value. Parameters that learn are on the device of the points, where kernels read them; there
        epsilon stays a number.
        """
        # Summed and stacked: torch.tensor(values) needs numbers that the compiler knows, and has no gradient.
        zero = torch.zeros((), dtype=torch.float64, device=device)
        values = *self.params, 0.0 if self.epsilon is None else self.epsilon
        on_cpu = zero.device.type == "cpu"
        return self._replace(
            params=[],
            epsilon=None if self.epsilon is None else 0.0 if on_cpu else self.epsilon,
            dynamic_params=torch.stack([zero + value for value in values]),
        )


def op_options(formula: str, params: list[float | Tensor], similarity: str, options: Options) -> OpOptions:
    """The public options as the ops take them; ``similarity`` is ``options.measure``."""
    cache = -1 if options.cache_bytes is None else int(options.cache_bytes)
    return OpOptions(formula, params, options.epsilon, similarity, options.reduction, cache_bytes=cache)


@constant_result  # a graph multiplies as was set when it was made, forward and backward alike
def cuda_precision() -> str:
    """How torch is set to multiply float32 on CUDA."""
    return _C.cuda_precision()


def precision_for(embeddings: Tensor) -> str:
    """The option ``precision`` for a batch: asked once, for forward and backward."""
    is_float32 = embeddings.dtype == torch.float32
    return cuda_precision() if embeddings.device.type == "cuda" and is_float32 else "ieee"
