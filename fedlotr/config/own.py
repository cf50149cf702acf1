"""What a caller of `run_simulation` brings (a data set, a model, a task) is called by its content: own:<SHA-256>.

Files name it so, since nothing else on disk is it: whoever reads them again has to bring it again.
"""

PREFIX = "own:"
DIGITS = 12
"""Of a SHA-256 in such a name."""
HIDDEN = f"{PREFIX}hidden"
"""What data of the caller's are called that a run hides: their hash would confirm a guess at them."""
FIELDS = ("data", "model", "task")
"""Arguments of `run_simulation`, and the fields of the configuration they stand for."""


def own_name(sha256: str) -> str:
    """What something is called whose content has this hash."""
    return f"{PREFIX}{sha256[:DIGITS]}"


def is_own(name: object) -> bool:
    """Whether a configuration's value names what a caller brought."""
    return isinstance(name, str) and name.startswith(PREFIX)


def bring_again(field: str) -> str:
    """Why a configuration that names it is not enough, and what to do."""
    return f"this run used the caller's own {field}; pass run_simulation({field}=...)"


def other_than_named(field: str, named: str, given: str) -> str | None:
    """What is wrong where a configuration names something of the caller's own and another was given; else None."""
    if not is_own(named) or named == given:
        return None
    return (
        f"{field}={named}: the {field} given to run_simulation is {given}; give the same, or leave "
        f"'{field}' out of the configuration"
    )
