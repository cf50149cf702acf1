"""What the files of a fleet may say, and what is said where they say something else."""

import math
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import ErrorDetails

from fedlotr.errors import nearest, shorten


def _text(given: object) -> object:
    """Numbers as text, as the units of rates are read; several entries as one text."""
    if isinstance(given, list) and given and all(isinstance(entry, str | int | float) for entry in given):
        return ";".join(str(_text(entry)) for entry in given)
    if isinstance(given, float):
        return f"{given:f}".rstrip("0").rstrip(".")
    return str(given) if isinstance(given, int) and not isinstance(given, bool) else given


def _number(given: object) -> object:
    if isinstance(given, bool) or (isinstance(given, float) and not math.isfinite(given)):
        raise ValueError("expected a number")
    return given


Text = Annotated[str, BeforeValidator(_text)]
Chance = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1, allow_inf_nan=False)]
Number = Annotated[int, BeforeValidator(_number), Field(ge=0)]
Second = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]


class Description(BaseModel, extra="forbid", frozen=True):
    """A fleet by words, as its file has them.

    devices, links, zones: one for all, several in turn, or by shares. zones: hours that clients are ahead of UTC.
    trace: a file of intervals, in the place of availability; repeat: seconds after which it begins again. dropout: the
    chance that a client vanishes in a job. clients: a file of what single ones have instead.
    """

    devices: Text = "laptop"
    links: Text | None = None
    availability: str | None = None
    trace: str | None = None
    repeat: Annotated[Number, Field(gt=0)] | None = None
    zones: Text | None = None
    dropout: Chance = 0.0
    clients: str | None = None

    def in_words(self) -> str:
        """What it says, as a file has it."""
        return "; ".join(f"{key}: {value}" for key, value in self.model_dump().items() if value)


class Interval(BaseModel, extra="forbid"):
    """A client is there from one second up to another."""

    client: Number
    begin: Second = Field(alias="from")
    until: Second


class Client(BaseModel, extra="forbid"):
    """What one client has, where that is not what the fleet's file says of all.

    device, or flops as in 50G; link, or up and down as in 5M, and latency as in 40ms.
    """

    client: Number
    device: str | None = None
    flops: Text | None = None
    link: str | None = None
    up: Text | None = None
    down: Text | None = None
    latency: Text | None = None
    dropout: Chance | None = None


def beyond(client: int, clients: int) -> str:
    """What is said of a row whose client the run does not have."""
    return f"client {shorten(client)}, but the run has {clients:,}, numbered from 0; give more --clients, or remove it"


def keys_of(form: type[BaseModel]) -> list[str]:
    """As files spell them."""
    return [field.alias or name for name, field in form.model_fields.items()]


def problem(error: ErrorDetails, form: type[BaseModel]) -> str:
    """A complaint of pydantic's in a user's words."""
    key = shorten(error["loc"][0]) if error["loc"] else ""
    given, limits = shorten(error["input"]), error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return f"{key}: no such key{nearest(key, keys_of(form))}"
        case "missing":
            return f"{key} is missing"
        case "model_type":
            return f"{given}: expected keys with their values"
        case "int_parsing" | "int_type" | "int_from_float" | "int_parsing_size":
            return f"{key} {given}: expected a whole number"
        case "float_parsing" | "float_type" | "finite_number":
            return f"{key} {given}: expected a number"
        case "string_type":
            return f"{key} {given}: expected text"
        case "greater_than":
            return f"{key} {given}: expected more than {limits['gt']:g}"
        case "greater_than_equal":
            return f"{key} {given}: expected at least {limits['ge']:g}"
        case "less_than_equal":
            return f"{key} {given}: expected at most {limits['le']:g}"
        case "value_error":
            return f"{key} {given}: {limits['error']}"
    return f"{key} {given}: {error['msg']}"
