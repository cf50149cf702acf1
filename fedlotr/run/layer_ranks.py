"""What --rank-pattern, --alpha-pattern and --cap-rank mean for the layers of one model."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from fedlotr.adapters.kinds import CORES
from fedlotr.adapters.tuner import CoreConfig, check_one_rank
from fedlotr.config.configuration import SimulationConfig
from fedlotr.errors import InputError
from fedlotr.models.targets import by_pattern, check_patterns, too_narrow


class Patterns(NamedTuple):
    """As `CoreConfig` takes them; ranks begin with the single layers that are too narrow for what the others say."""

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]


def layer_patterns(config: SimulationConfig, sizes: Mapping[str, tuple[int, int]]) -> Patterns:
    """Of the adapted layers by name, each (d_in, d_out).

    Raises InputError for a pattern, or an alternative of one, that means none of them, and for a layer that is
    narrower than its rank where ranks are not capped.
    """
    check_patterns("--rank-pattern", config.rank_pattern, list(sizes))
    check_patterns("--alpha-pattern", config.alpha_pattern, list(sizes))
    asked = {name: by_pattern(config.rank_pattern, name, config.rank) for name in sizes}
    narrow = {name: min(size) for name, size in sizes.items() if min(size) < asked[name]}
    if narrow and not config.cap_rank:
        narrowest = min(narrow, key=lambda name: narrow[name])
        width = narrow[narrowest]
        raise InputError(too_narrow("--rank", asked[narrowest], narrowest, width))
    blocks = CORES[config.chosen_core].blocks
    capped = {name: width - width % blocks for name, width in narrow.items()}
    if none := [name for name, r in capped.items() if not r]:
        raise InputError(
            f"--cap-rank: {none[0]} has no room for the {blocks} blocks of core {config.chosen_core!r}; leave it out "
            "by --targets"
        )
    single = {f"^{re.escape(name)}": r for name, r in capped.items()}
    return Patterns({**single, **config.rank_pattern}, config.alpha_pattern)


def check_ties(core: CoreConfig, model: nn.Module, targets: Sequence[str]) -> None:
    """Raises InputError where layers that share a pair have different ranks."""
    ties = defaultdict(list)
    for name in targets:
        ties[core.tag(name, model.get_submodule(name))].append(name)
    try:
        for names in ties.values():
            check_one_rank(core, names)
    except ValueError as error:
        raise InputError(f"--tie {core.tie}: {error}") from error
