"""How a run writes an adapter: `write_adapter`, with all that it is told of a prepared run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedlotr.run.export import OwnBase, write_adapter
from fedlotr.run.preparation import Prepared


def adapter_writer(prepared: Prepared) -> Callable[..., None]:
    """Writes the adapter of what the run's model holds when it is called: with a folder, and whose client's it is."""
    checked = prepared.checked
    return partial(
        write_adapter,
        model=prepared.model,
        base=checked.base_name,
        source=Path(checked.spec.path).resolve(),
        method=checked.config.method,
        max_length=checked.config.longest,
        labels=checked.task.label_names,
        pair=len(checked.task.columns) == 2,
        tokenizer=checked.tokenizer,
        own=_own_base(prepared),
        quantize=checked.config.quantize,
    )


def _own_base(prepared: Prepared) -> OwnBase | None:
    own = prepared.checked.own_model
    segments = () if prepared.workplace.test.segments is None else ("token_type_ids",)
    return None if own is None else OwnBase(own.kind, ("input_ids", "attention_mask", *segments))
