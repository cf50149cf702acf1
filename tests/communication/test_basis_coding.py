"""Bases in few bits: unit vectors near those that were meant, to the byte, and equal for all who decode them."""

from pathlib import Path

import pytest
import torch

from fedlotr.adapters.bases import Factors, Request, random_basis, sha256
from fedlotr.adapters.methods import METHODS
from fedlotr.communication.basis_coding import coded, decoded, shapes_of
from fedlotr.communication.codecs import CodecError
from fedlotr.communication.wire_form import check_basis_codec, coding_in, read_form
from fedlotr.config.configuration import SimulationConfig, dump_yaml
from fedlotr.cost.formulas import Layer, one_off
from fedlotr.run.resumption import saved_configuration

WORDS = {"bfloat16": 0.9999, "int8": 0.999, "int4": 0.95, "int2": 0.9, "sign": 0.75}
"""How near to a vector its decoded one is at least, by the cosine between them."""


def pairs() -> dict[str, Factors]:
    made = {"q": (48, 40, 6), "v": (32, 64, 4)}
    return {
        name: random_basis(Request(name, d_in, d_out, r, 0, lambda: iter(())))
        for name, (d_in, d_out, r) in made.items()
    }


@pytest.mark.parametrize("words", WORDS)
def test_vectors_keep_their_direction_and_length(words: str) -> None:
    form, bases = read_form(words), pairs()
    found = decoded(form, coded(form, bases, 0), shapes_of(bases))
    for name, (a, b) in bases.items():
        for meant, here in ((a, found[name].A), (b.T, found[name].B.T)):
            torch.testing.assert_close(here.norm(dim=1), torch.ones(len(here)))
            assert float((meant * here).sum(dim=1).min()) > WORDS[words]
    again = decoded(form, coded(form, bases, 0), shapes_of(bases))
    assert sha256(list(found.items())) == sha256(list(again.items()))


@pytest.mark.parametrize("words", [*WORDS, "int2+zstd"])
def test_a_message_has_the_bytes_of_the_formula(words: str) -> None:
    form, bases = read_form(words), pairs()
    layers = [Layer(name, name, a.shape[1], len(b), len(a)) for name, (a, b) in bases.items()]
    owed, message = one_off(METHODS["fed-sb"], layers, 16, form), coded(form, bases, 0)
    assert len(message) <= owed if form.zstd else len(message) == owed


def test_what_is_no_message_of_bases_is_refused() -> None:
    form, bases = read_form("int2"), pairs()
    message = coded(form, bases, 0)
    for damaged in (message[:-1], bytes([message[0] ^ 1]) + message[1:]):
        with pytest.raises(CodecError, match="damaged"):
            decoded(form, damaged, shapes_of(bases))
    nothing = {"q": Factors(torch.zeros(2, 8), torch.eye(8)[:, :2])}
    with pytest.raises(CodecError, match=r"a vector of q\.A is zero"):
        decoded(read_form("int8"), coded(read_form("int8"), nothing, 0), shapes_of(nothing))
    for words in ("top-k:0.1", "delta+int8"):
        with pytest.raises(ValueError, match="sent once and whole"):
            check_basis_codec(words)


def test_a_run_of_before_there_was_a_codec_of_bases_sent_them_as_they_are(tmp_path: Path) -> None:
    """So it is gone on with, exported and drawn as what it was."""
    path = tmp_path / "config.yaml"
    dump_yaml(SimulationConfig(), path)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith("basis_codec")), encoding="utf-8")
    found = saved_configuration(tmp_path)
    assert found is not None and found.basis_codec == "float32" != SimulationConfig().basis_codec
    assert coding_in({"codec": "int8", "broadcast_codec": "float32"}).basis_codec == "float32"
