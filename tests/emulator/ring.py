"""Rows against one block of columns after the other, on the emulated CUDA engine (csrc/cuda/ring/ring.h)."""

import ctypes
from dataclasses import dataclass, field

import torch

from .library import Arguments, Batch, Options, Tuning, call, load_for, look_after_guards, poisoned

STAGES = ["start", "hardest", "negatives", "positives", "both"]  # as BlockStage
CONTEXT = ("nt_xent", "tuplet_margin")  # formulas whose positives see the negatives' accumulator


def stages(loss, mining):
    return ["hardest"] * mining + (["negatives", "positives"] if loss in CONTEXT else ["both"])


@dataclass
class Blocks:
    """Rows, and blocks of columns as (points, labels, self_index or None)."""

    q: torch.Tensor
    labels: torch.Tensor
    blocks: list
    loss: str = "multi_similarity"
    params: tuple = (2.0, 50.0, 0.5)
    epsilon: float | None = None
    similarity: str = "cosine"
    reduction: str = "mean"
    precision: str = "full"
    tile_group: int = 2
    wide_blocks: int = 0
    extremes: bool = True  # whether later stages get the extremes of the first
    schedule: tuple = ("round_robin", 0)
    found: list = field(default_factory=list)  # the kept flags of each block

    def __post_init__(self):
        self.acc = torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def arguments(self, block=None):
        points, labels, self_index = (self.q, self.labels, None) if block is None else block
        return Arguments(
            batch=Batch.of(self.q, self.labels, points, labels, self_index),
            options=Options.of(
                self.loss, self.params, self.epsilon, self.similarity, self.reduction, self.precision
            ),
            tuning=Tuning.of(
                tile_group=self.tile_group, wide_blocks=self.wide_blocks, line_blocks=self.wide_blocks
            ),
        )

    def sizes(self, block=None):
        """Numbers of a state; bytes of the workspaces of forward and backward, extremes and kept flags."""
        out = (ctypes.c_int64 * 5)()
        load_for(self.q.dtype).dml_block_sizes(ctypes.byref(self.arguments(block)), out)
        return list(out)

    def call(self, name, block, *given, raw):
        addresses = [
            ctypes.c_void_p(x.data_ptr() if x is not None and x.numel() > 0 else None)
            if x is None or torch.is_tensor(x)
            else ctypes.c_int64(x)
            for x in given
        ]
        reference = ctypes.byref(self.arguments(block))
        call(load_for(self.q.dtype), name, reference, *addresses, schedule=self.schedule, buffers=raw)

    def turn(self, stage, state, raw):
        self.call("dml_turn_rows", None, STAGES.index(stage), state, raw=[raw])

    def add(self, stage, block, state, extremes, kept):
        workspace, raw = poisoned(self.sizes(block)[1], torch.uint8)
        given = STAGES.index(stage), state, extremes, kept, workspace
        self.call("dml_add_block", block, *given, raw=[raw])

    def pairs(self):
        """``[2, N]`` how many positives and negatives each row has."""
        positives = torch.zeros(len(self.q), dtype=torch.long)
        columns = 0
        for _, labels, self_index in self.blocks:
            same = self.labels[:, None] == labels[None, :]
            positives += same.sum(1)
            columns = columns + len(labels)
            if self_index is not None and len(labels):
                inside = (self_index >= 0) & (self_index < len(labels))
                is_positive = same.gather(1, self_index.clamp(0, len(labels) - 1)[:, None])[:, 0]
                positives -= (inside & is_positive).long()
                columns = columns - (inside & is_positive).long()
        return torch.stack([positives, columns - positives]).contiguous()

    def forward(self):
        """[4, N] parts and counts of the rows; keeps what backward needs."""
        n, numbers = len(self.q), self.sizes()[0]
        state, raw = poisoned(numbers, self.acc)
        self.turn("start", state, raw)
        sizes = [self.sizes(block) for block in self.blocks]
        extremes = [poisoned(size[3], torch.uint8) for size in sizes]
        self.found = [None] * len(self.blocks)
        flags = [poisoned(size[4], torch.uint8) for size in sizes]
        for stage in stages(self.loss, self.epsilon is not None):
            for k, block in enumerate(self.blocks):
                is_first = stage == "hardest"
                known = extremes[k][0] if is_first or (self.epsilon is not None and self.extremes) else None
                self.found[k] = None if is_first else flags[k][0]
                self.add(stage, block, state, known, self.found[k])
            self.turn(stage, state, raw)
        look_after_guards(raw for _, raw in (*extremes, *flags))
        losses, raw_losses = poisoned(4 * n, self.acc)
        self.weights, raw_weights = poisoned(numbers, self.acc)
        work, raw_work = poisoned(n, torch.uint8)
        raw = [raw, raw_losses, raw_weights, raw_work]
        self.call("dml_finish_rows", None, state, self.pairs(), losses, self.weights, work, raw=raw)
        return losses.view(4, n)

    def backward(self, grad_parts, need_rows=True, need_block=True):
        """Gradients by the rows, of all blocks together, and by each block."""
        by_rows = torch.zeros(self.q.shape, dtype=self.acc) if need_rows else None
        by_blocks = []
        above = grad_parts.to(self.acc).contiguous()
        for block, kept in zip(self.blocks, self.found, strict=True):
            if min(len(self.q), len(block[0])) == 0:
                by_blocks.append(torch.zeros(block[0].shape, dtype=self.acc))
                continue
            rows, raw_rows = poisoned(self.q.numel(), self.acc)
            columns, raw_columns = poisoned(block[0].numel(), self.acc)
            workspace, raw_work = poisoned(self.sizes(block)[2], torch.uint8)
            wanted = rows if need_rows else None, columns if need_block else None
            given = self.weights, above, kept, *wanted, workspace
            self.call("dml_block_backward", block, *given, raw=[raw_rows, raw_columns, raw_work])
            if need_rows:
                by_rows += rows.view(self.q.shape)
            by_blocks.append(columns.view(block[0].shape) if need_block else None)
        return by_rows, by_blocks
