"""What Flower's arrays hold, as numpy arrays: all that the engines need, which load no torch."""

import io
import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array

_NPY_1_0 = b"\x93NUMPY\x01\x00"


def value(array: Array) -> npt.NDArray[Any]:
    """What an array holds, as `array.numpy()` gives it, but read-only, and much sooner where many are alike.

    Flower's format is NumPy's file format, whose header numpy parses as Python source, for every array anew.
    """
    data = array.data
    if array.stype != "numpy.ndarray" or data[:8] != _NPY_1_0:
        return array.numpy()
    start = 10 + int.from_bytes(data[8:10], "little")
    dtype, shape, fortran = _header(data[8:start])
    if dtype.hasobject:
        return array.numpy()  # which refuses it
    found = np.frombuffer(data, dtype, math.prod(shape), start)
    return found.reshape(shape, order="F" if fortran else "C")


@lru_cache(maxsize=4096)
def _header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    return dtype, shape, fortran
