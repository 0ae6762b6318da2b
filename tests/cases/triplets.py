"""Batches for the ops on triplets, each with its truth."""

import torch
from oracle.triplet_ops import similarities, triplet_truth

OPS = torch.ops.dml_cuda


class Case:
    """A batch with its truth."""

    def __init__(self, n=24, classes=6, dim=8, m=None, dtype=torch.float64, similarity="euclidean", seed=0):
        random = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, dim, generator=random, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(0, classes, (n,), generator=random)
        self.y = self.ref_labels = self.self_index = self.num_valid_refs = None
        if m is not None:
            self.y = torch.randn(m, dim, generator=random, dtype=torch.float64).to(dtype)
            self.ref_labels = torch.randint(0, classes, (m,), generator=random)
        self.similarity, self.dim = similarity, dim
        self.row_params = torch.rand(n, generator=random, dtype=torch.float64).to(dtype) + 0.7
        self.row_margins = False  # whether terms that have no beta get them too, as margins
        self.seed = torch.tensor([12345 - (1 << 62)])

    def points(self):
        return self.x, self.labels, self.y, self.ref_labels, self.self_index, self.num_valid_refs

    def of_rows(self, term):
        return self.row_params if term == "margin" or self.row_margins else None

    def run(self, term, positives, negatives, numbers, save=True, save_ref=True):
        return OPS.triplet_loss(
            *self.points(),
            self.of_rows(term),
            self.seed,
            term,
            positives,
            negatives,
            numbers,
            self.similarity,
            save,
            save_ref,
        )

    def truth(self, term, positives, negatives, numbers):
        x = self.x.double().requires_grad_()
        y = x if self.y is None else self.y.double().requires_grad_()
        count = len(y) if self.num_valid_refs is None else int(self.num_valid_refs)
        s = similarities(x, y[:count], self.similarity)
        own = range(len(x)) if self.y is None else [-1] * len(x)
        if self.self_index is not None:
            own = self.self_index.tolist()
        ref_labels = self.labels if self.y is None else self.ref_labels
        of_rows = self.of_rows(term)
        sums, counts, weights, by_param = triplet_truth(
            -s.detach().numpy(),
            self.labels.tolist(),
            ref_labels.tolist()[:count],
            own,
            None if of_rows is None else of_rows.double().tolist(),
            int(self.seed) % (1 << 64),
            term,
            positives,
            negatives,
            numbers,
        )
        grads = torch.autograd.grad((s * torch.from_numpy(weights)).sum(), [x] if y is x else [x, y])
        return sums, counts, by_param, *grads

    def check(self, term, positives, negatives, numbers, tolerance=1e-10, exact_counts=True):
        sums, counts, *grads = self.run(term, positives, negatives, numbers)
        true_sums, true_counts, by_param, *true_grads = self.truth(term, positives, negatives, numbers)
        assert sums.dtype == (torch.float64 if self.x.dtype == torch.float64 else torch.float32)
        assert counts.dtype == torch.int64
        if exact_counts:
            assert counts.tolist() == true_counts.tolist()
        close(sums, torch.from_numpy(true_sums), tolerance)
        close(grads[0], true_grads[0], tolerance)
        if self.y is not None:
            close(grads[1], true_grads[1], tolerance)
        if self.of_rows(term) is not None:
            close(grads[2], torch.from_numpy(by_param), tolerance)


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * scale)
