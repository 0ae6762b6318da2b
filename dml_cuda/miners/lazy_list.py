"""A list of tensors that is computed when its items are first read."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NoReturn, SupportsIndex, overload

from torch import Tensor


class NotComputed:
    """What a :class:`LazyList` holds in the place of each tensor until it is read.

    Code in C that reads a list's memory without calling its methods finds these instead of tensors, so it
    raises TypeError where an empty list would give it a silent wrong answer.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "<not computed yet: read the list in Python first>"


_NOT_COMPUTED = NotComputed()

# The methods of list that read items; each computes the items, then does what list does.
_READING = (
    *("__contains__", "__ge__", "__gt__", "__le__", "__lt__", "__mul__", "__reversed__", "__rmul__"),
    *("count", "index"),
)
# The methods that change which items there are, or their order.
_RESIZING = (
    *("__delitem__", "__iadd__", "__imul__", "append", "clear", "extend", "insert", "pop", "remove"),
    *("reverse", "sort"),
)


class LazyList(list[Tensor]):
    """A list with one tensor for each of ``names``, computed by ``_compute`` when an item is first read.

    It is a subclass of list because pytorch-metric-learning asks ``isinstance(x, (list, tuple))``. Its length
    is known without the items. Every method of list, iteration, unpacking and slicing first compute the
    items. Replacing an item is allowed; methods that change the number or the order of the items raise
    TypeError. Equality is identity, since comparing tensors for equality gives tensors; ``+`` gives a tuple,
    as pytorch-metric-learning's tuples do.

    Code in C that uses the sequence or iterator protocol calls these methods too: ``list(x)``, ``tuple(x)``,
    ``f(*x)``, ``a, b = x``, ``zip``, ``sorted``, NumPy, pickle, ``copy``, ``default_collate``, TorchScript.
    ``torch.utils._pytree`` sees one leaf. Code in C that reads the list's memory cannot be intercepted:
    ``torch.cat``, ``torch.stack`` and other operators that take a list of tensors, ``heapq``, extensions
    that use ``PyList_GET_ITEM``. Before the first read it finds :class:`NotComputed` objects, and raises
    TypeError; afterwards it finds the tensors. The same holds for methods called on the base class, as in
    ``list.count(x, ...)``.
    """

    names: ClassVar[tuple[str, ...]]  # of the items

    def __init__(self) -> None:
        super().__init__()
        self._computed = False
        super().extend([_NOT_COMPUTED] * len(self.names))

    def _compute(self) -> Iterable[Tensor]:
        """The items, in the order of ``names``."""
        raise NotImplementedError

    def _on_replaced(self) -> None:
        """Called before an item is replaced."""

    def _read(self) -> None:
        """Computes the items unless that has been done."""
        if not self._computed:
            items = tuple(self._compute())
            super().clear()
            super().extend(items)
            self._computed = True

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Tensor]:
        self._read()
        return super().__iter__()

    @overload
    def __getitem__(self, index: SupportsIndex) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index):
        self._read()
        return super().__getitem__(index)

    def __setitem__(self, index, value) -> None:
        if isinstance(index, slice):
            self._refuse("slice assignment")
        self._read()
        self._on_replaced()
        super().__setitem__(index, value)

    def copy(self) -> list[Tensor]:
        return list(self)

    def __add__(self, items: Iterable) -> tuple:
        return (*self, *items)

    def __radd__(self, items: Iterable) -> tuple:
        return (*items, *self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    __hash__ = object.__hash__

    def _refuse(self, what: str) -> NoReturn:
        kind, count = type(self).__name__, len(self.names)
        raise TypeError(f"{kind}: expected no {what}, it always has {count} tensors; change list(x) instead")

    def __reduce__(self) -> tuple:
        self._read()
        return _restore, (type(self), self.__dict__.copy(), tuple(self))


def _restore(kind: type[LazyList], state: dict[str, Any], items: tuple[Tensor, ...]) -> LazyList:
    restored = kind.__new__(kind)
    restored.__dict__.update(state)
    list.extend(restored, items)
    return restored


def _reading(name: str) -> Any:
    method = getattr(list, name)

    @functools.wraps(method)
    def read_first(self: LazyList, *arguments: Any) -> Any:
        self._read()
        return method(self, *arguments)

    return read_first


def _resizing(name: str) -> Any:
    @functools.wraps(getattr(list, name))
    def refuse(self: LazyList, *arguments: Any, **options: Any) -> NoReturn:
        self._refuse(name)

    return refuse


for _name in _READING:
    setattr(LazyList, _name, _reading(_name))
for _name in _RESIZING:
    setattr(LazyList, _name, _resizing(_name))
