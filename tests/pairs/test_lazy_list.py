"""What miners return is a list: every access by way of a method of list computes the items first."""

import copy
import operator
import pickle

import pytest
import torch
from cases.data import make_batch
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from dml_cuda import (
    BatchHardMiner,
    MinedPairs,
    MinedTriplets,
    MultiSimilarityMiner,
    PairMarginMiner,
    SelectedPairs,
)
from dml_cuda.miners.lazy_list import NotComputed

KINDS = [
    pytest.param(MultiSimilarityMiner, MinedPairs, 4, id="MinedPairs"),
    pytest.param(BatchHardMiner, MinedTriplets, 3, id="MinedTriplets"),
    pytest.param(PairMarginMiner, SelectedPairs, 4, id="SelectedPairs"),
]

# By the method of list that is called: an expression, evaluated with a miner's result and with a plain list
# of the same tensors. `x` are those tensors.
READING = {
    "__add__": lambda m, x: list(m + x[:1]),
    "__contains__": lambda m, x: (x[0] in m, m.__contains__(x[0])),
    "__ge__": lambda m, x: (m >= x, m >= x[:1], m >= [*x, x[0]]),
    "__getitem__": lambda m, x: [m[0], m[-1], *m[1:], *m[::-1], *m[:]],
    "__gt__": lambda m, x: (m > x, m > x[:1], m > [*x, x[0]]),
    "__iter__": lambda m, x: [*m, *tuple(m), *list(m), *(y for y in m), *(lambda *y: y)(*m), *map(id, m)],
    "__le__": lambda m, x: (m <= x, m <= x[:1], m <= [*x, x[0]]),
    "__len__": lambda m, x: (len(m), bool(m), operator.length_hint(m)),
    "__lt__": lambda m, x: (m < x, m < x[:1], m < [*x, x[0]]),
    "__mul__": lambda m, x: m * 2,
    "__reversed__": lambda m, x: list(reversed(m)),
    "__rmul__": lambda m, x: 2 * m,
    "copy": lambda m, x: m.copy(),
    "count": lambda m, x: m.count(x[0]),
    "index": lambda m, x: (m.index(x[0]), m.index(x[0], 0, 2)),
}
# Functions that read a list in other ways.
READERS = {
    "comprehension": lambda m, x: [y for y in m],  # noqa: C416
    "concatenation to a list": lambda m, x: list(x[:1] + m),
    "enumerate": lambda m, x: list(enumerate(m)),
    "extend": lambda m, x: (lambda items: (items.extend(m), items))([])[1],
    "in-place concatenation": lambda m, x: operator.iadd([], m),
    "itemgetter": lambda m, x: operator.itemgetter(0, 2)(m),
    "max": lambda m, x: max(m, key=id),
    "set": lambda m, x: sorted(map(id, set(m))),
    "slice assignment": lambda m, x: (lambda items: (operator.setitem(items, slice(0, 0), m), items))([])[1],
    "sorted": lambda m, x: sorted(m, key=id),
    "unpacking": lambda m, x: (lambda first, *rest: [first, *rest])(*m),
    "zip": lambda m, x: list(zip(m, x, strict=True)),
}
RESIZING = {
    "__delitem__": lambda m, x: operator.delitem(m, 0),
    "__iadd__": lambda m, x: operator.iadd(m, x),
    "__imul__": lambda m, x: operator.imul(m, 2),
    "append": lambda m, x: m.append(x[0]),
    "clear": lambda m, x: m.clear(),
    "extend": lambda m, x: m.extend(x),
    "insert": lambda m, x: m.insert(0, x[0]),
    "pop": lambda m, x: m.pop(),
    "remove": lambda m, x: m.remove(x[0]),
    "reverse": lambda m, x: m.reverse(),
    "sort": lambda m, x: m.sort(key=id),
}
# Tested by name below; or without a view of the items.
ELSEWHERE = {"__eq__", "__ne__", "__hash__", "__repr__", "__setitem__", "__init__", "__new__", "__doc__"}
WITHOUT_ITEMS = {"__class_getitem__", "__getattribute__", "__sizeof__"}


def is_same(a, b):
    """Equality, by identity for tensors."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(is_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) else a == b


@pytest.fixture(params=[False, True], ids=["not read before", "read before"])
def was_read(request):
    return request.param


@pytest.fixture
def mined(request, monkeypatch, was_read):
    """A miner's result, the tensors that it holds once it is read, and how often they were computed."""
    miner, kind, size = request.param
    result = miner()(*make_batch(40, 6))
    assert type(result) is kind
    assert isinstance(result, (list, tuple))  # as pytorch-metric-learning's is_list_or_tuple asks
    items = [torch.tensor([k]) for k in range(size)]  # of one element each, as list.count compares them
    calls = []
    monkeypatch.setattr(kind, "_compute", lambda self: calls.append(1) or items)
    if was_read:
        assert result[0] is items[0]
    return result, items, calls


every_kind = pytest.mark.parametrize(
    "mined", [p.values for p in KINDS], indirect=True, ids=[p.id for p in KINDS]
)


@every_kind
@pytest.mark.parametrize("read", [*READING.values(), *READERS.values()], ids=[*READING, *READERS])
def test_reading_computes_the_items_once(mined, read):
    result, items, calls = mined
    assert is_same(read(result, items), read(list(items), items))
    assert is_same(read(result, items), read(list(items), items))
    assert is_same(list(result), items)
    assert len(calls) == 1


@every_kind
@pytest.mark.parametrize("change", RESIZING.values(), ids=RESIZING)
def test_items_cannot_be_added_removed_or_reordered(mined, change):
    result, items, _ = mined
    with pytest.raises(TypeError, match=f"^{type(result).__name__}: expected no .*has {len(items)} tensors"):
        change(result, items)
    assert is_same(list(result), items)


def test_every_method_of_list_is_tested():
    tested = {*READING, *RESIZING, *ELSEWHERE, *WITHOUT_ITEMS}
    assert set(vars(list)) <= tested
    for name in set(vars(list)) - WITHOUT_ITEMS - {"__new__"}:
        assert getattr(MinedPairs, name) is not getattr(list, name), name


@every_kind
def test_equality_is_identity(mined):
    result, items, _ = mined
    twin = result.for_batch(*make_batch(40, 6))
    equal, differs = operator.eq, operator.ne
    assert equal(result, result)
    assert not differs(result, result)
    for stranger in (twin, items, [], None):
        assert differs(result, stranger)
        assert differs(stranger, result)
        assert not equal(result, stranger)
        assert not equal(stranger, result)
    assert len({result, twin}) == 2


@every_kind
def test_an_item_can_be_replaced(mined):
    result, items, _ = mined
    replacement = items[1].clone()
    result[1] = replacement
    assert is_same(list(result), [items[0], replacement, *items[2:]])
    assert not result.rule_applies(result.embeddings, None)  # so losses use the indices
    with pytest.raises(TypeError, match="slice assignment"):
        result[:1] = []
    with pytest.raises(IndexError):
        result[len(items)] = replacement


@every_kind
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_hold_the_indices(mined, duplicate):
    result, items, calls = mined
    twin = duplicate(result)
    assert type(twin) is type(result)
    assert all(torch.equal(x, y) for x, y in zip(twin, items, strict=True))
    assert len(calls) == 1
    assert twin.only_lists
    twin[0] = items[1]
    assert is_same(list(result), items)


@every_kind
def test_repr_does_not_compute(mined, was_read):
    result, _, calls = mined
    assert repr(result).startswith(type(result).__name__)
    assert "rows=40, columns=40" in f"{result}"
    assert len(calls) == was_read


@every_kind
def test_code_that_reads_the_memory_of_a_list_never_finds_it_empty(mined, was_read):
    result, items, _ = mined
    assert list.__len__(result) == len(items)
    if not was_read:
        assert {type(item) for item in list.__iter__(result)} == {NotComputed}
        for function in (torch.cat, torch.stack, torch.block_diag, torch.hstack, torch._foreach_neg):
            with pytest.raises(TypeError):
                function(result if function is not torch.block_diag else list.copy(result))
        assert result[0] is items[0]
    assert torch.equal(torch.cat(result), torch.cat(items))


@every_kind
def test_containers_of_torch(mined, was_read):
    result, items, calls = mined
    leaves, _ = pytree.tree_flatten([result, 1])
    assert leaves[0] is result
    assert len(calls) == was_read
    script = torch.jit.script(_lengths)
    assert script(result) == [len(item) for item in items]
    collated = default_collate([result, result])
    assert all(torch.equal(x, torch.stack([y, y])) for x, y in zip(collated, items, strict=True))


def _lengths(items: list[torch.Tensor]) -> list[int]:
    return [len(item) for item in items]
