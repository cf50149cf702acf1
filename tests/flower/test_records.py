"""Decoding a record gives what Flower's own decoding gives."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array

from fedlotr.flower.reading import value

ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    np.array(3, np.int64),
    np.zeros((0, 4), np.float16),
    np.arange(4, dtype=">f4"),
    np.array([True, False]),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_a_value_is_what_flower_decodes(array: Any) -> None:
    found, wanted = value(Array(array)), Array(array).numpy()
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    np.testing.assert_array_equal(found, wanted)


def test_a_pickle_and_a_torn_array_are_refused() -> None:
    whole = Array(np.arange(6, dtype=np.float32))
    torn = replace(whole, data=whole.data[:-5])
    header = np.lib.format.magic(1, 0)
    text = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    pickle = replace(whole, data=header + len(text).to_bytes(2, "little") + text + b"cos\nsystem\n(S'true'\ntR.")
    for array in (torn, pickle, replace(whole, data=b"nothing")):
        with pytest.raises(ValueError):
            value(array)
