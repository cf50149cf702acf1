"""Records that are read or made when they are asked for, so that a round's replies need not fit the memory."""

import os
import tempfile
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Message

from fedlotr.flower.reading import value

REPLY_BYTES = 16 * 2**20
"""Of a push's replies, arrays of about so many bytes stay in memory; those of the replies after them go to disk."""


class LazyArray(Array):
    """One of Flower's arrays whose bytes come from a function, anew each time; copied or sent, it is a plain array."""

    _read: Callable[[], bytes]

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, read: Callable[[], bytes]) -> None:
        self.__dict__.update(dtype=dtype, shape=shape, stype=stype, _read=read)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The serialised array."""
        return self._read()

    def __eq__(self, other: object) -> bool:
        mine = self.dtype, self.shape, self.stype, self.data
        return isinstance(other, Array) and mine == (other.dtype, other.shape, other.stype, other.data)

    def __reduce__(self) -> tuple[type[Array], tuple[Any, ...]]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


class LazyRecord(ArrayRecord):
    """One of Flower's records whose arrays come from a function, each when it is asked for, but for those set later."""

    def __init__(self, names: Mapping[str, Any], get: Callable[[str], Array]) -> None:
        """names: in their order; shared, never changed."""
        super().__init__()
        self.__dict__.update(_names=names, _get=get, _own={})

    def __getitem__(self, name: str) -> Array:
        own: dict[str, Array] = self.__dict__["_own"]
        if name in own:
            return own[name]
        if name not in self:
            raise KeyError(name)
        found: Array = self.__dict__["_get"](name)
        return found

    def __setitem__(self, name: str, array: Array) -> None:
        self.__dict__["_names"] = {**self.__dict__["_names"], name: None}
        self.__dict__["_own"][name] = array

    def __delitem__(self, name: str) -> None:
        names = dict(self.__dict__["_names"])
        del names[name]
        self.__dict__["_names"] = names
        self.__dict__["_own"].pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__["_names"])

    def __len__(self) -> int:
        return len(self.__dict__["_names"])

    def __contains__(self, name: object) -> bool:
        return name in self.__dict__["_names"]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and dict(self.items()) == dict(other.items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self)})"

    def keys(self) -> KeysView[str]:
        """The names."""
        return KeysView(self)

    def values(self) -> ValuesView[Array]:
        """The arrays, one after the other."""
        return ValuesView(self)

    def items(self) -> ItemsView[str, Array]:
        """Both."""
        return ItemsView(self)

    def copy(self) -> Self:
        """Another such record, which may be changed apart from this one."""
        new = type(self)(self.__dict__["_names"], self.__dict__["_get"])
        new.__dict__["_own"] = dict(self.__dict__["_own"])
        return new

    def plain(self) -> ArrayRecord:
        """An ordinary record, with all bytes in memory."""
        return ArrayRecord(dict(self.items()))  # which copies what it is given

    def __reduce__(self) -> tuple[type[ArrayRecord], tuple[dict[str, Array]]]:
        return ArrayRecord, (dict(self.items()),)


class Decoded(Mapping[str, npt.NDArray[np.float64]]):
    """The arrays of a record in float64 by name, read-only, each decoded whenever it is asked for.

    Of names that the record lacks, those of `beneath`.
    """

    def __init__(self, record: ArrayRecord, beneath: Mapping[str, npt.NDArray[np.float64]] | None = None) -> None:
        self._record, self._beneath = record, beneath or {}

    def __getitem__(self, name: str) -> npt.NDArray[np.float64]:
        if name not in self._record:
            return self._beneath[name]
        found = value(self._record[name]).astype(np.float64)
        found.setflags(write=False)  # a change would be lost without a word
        return found

    def __iter__(self) -> Iterator[str]:
        yield from self._record
        yield from (name for name in self._beneath if name not in self._record)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Slot(NamedTuple):
    """An array of a record in the file: what it is, and where it lies behind the record's start."""

    dtype: str
    shape: tuple[int, ...]
    stype: str
    start: int
    length: int


class Spill:
    """Where the arrays of one push's replies go: memory, and beyond `most` bytes a file without a name.

    The file ends with the last record that lies in it, and with this process, however that ends.
    """

    def __init__(self, folder: Path | None, most: int) -> None:
        """folder: whose disk to use; None: that of the system's temporary files."""
        self._folder, self._room = folder, most
        self._file: IO[bytes] | None = None
        self._end = 0
        self._layouts: dict[tuple[tuple[str, Slot], ...], dict[str, Slot]] = {}  # replies have few; each is kept once

    def keep(self, message: Message) -> None:
        """Let a reply's arrays lie where there is room for them."""
        if message.has_content():
            content: Any = message.content
            for name, record in list(content.items()):
                if isinstance(record, ArrayRecord):
                    content[name] = self._kept(record)

    def _kept(self, record: ArrayRecord) -> ArrayRecord:
        size = sum(len(array.data) for array in record.values())
        if size <= self._room:
            self._room -= size
            return record
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (it ends with what lies in it)
        file, start = self._file, self._end
        slots: dict[str, Slot] = {}
        at = 0
        for name, array in record.items():
            slots[name] = Slot(array.dtype, array.shape, array.stype, at, len(array.data))
            at += len(array.data)
        file.seek(start)
        file.write(b"".join(array.data for array in record.values()))
        file.flush()
        self._end += at
        layout = self._layouts.setdefault(tuple(slots.items()), slots)

        def get(name: str) -> Array:
            dtype, shape, stype, offset, length = layout[name]
            return LazyArray(dtype, shape, stype, lambda: _read(file, start + offset, length))

        return LazyRecord(layout, get)


def _read(file: IO[bytes], start: int, length: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), length, start)
    file.seek(start)
    return file.read(length)
