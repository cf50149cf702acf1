"""The collector rests while libraries load, and works again afterwards."""

import gc
from pathlib import Path

import pytest

from fedlotr.libraries import loading_for_good, not_collecting
from tests import forks


def test_the_collector_is_left_as_it_was() -> None:
    with not_collecting(), not_collecting():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="within"), not_collecting():
        raise ValueError("within")
    assert gc.isenabled()


def test_only_what_is_loaded_first_stays_for_good() -> None:
    def loaded() -> int:
        with loading_for_good():
            pass
        return gc.get_freeze_count()

    try:
        first, rubbish = loaded(), [[] for _ in range(1000)]
        assert loaded() == first > len(rubbish)
    finally:
        gc.unfreeze()


def test_the_command_loads_its_libraries_so(tmp_path: Path) -> None:
    words = ["--engine=local", "--rank=100000"]
    look = f"from fedlotr.commands import simulate; import gc; simulate.main({words}); print(gc.get_freeze_count())"
    found = forks.server(*forks.RUN).run(look, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 100_000
