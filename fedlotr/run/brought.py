"""What a caller of `run_simulation` brings of their own, and the fields of the configuration that it stands for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlotr.config.own import FIELDS
from fedlotr.data import OwnData


@dataclass(frozen=True)
class Brought:
    """What a caller has brought instead of what a configuration names.

    model: a pair of a model and its tokenizer. folder: an empty one, where that is kept meanwhile.
    """

    data: OwnData | None = None
    model: Any = None
    task: Any = None
    folder: Path = Path()

    @property
    def fields(self) -> set[str]:
        """The fields of the configuration that these stand for."""
        return {field for field in FIELDS if getattr(self, field) is not None}


NOTHING_BROUGHT = Brought()
