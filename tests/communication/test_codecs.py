"""Codecs by themselves: unbiased where they say so, within their bounds, to the byte, never taken in by damage."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedlotr.communication.codecs import CodecError, codec_of, decode, encode, shapes_of, witness
from fedlotr.communication.wire_form import Coding, check_broadcast_codec, check_codec, read_form
from fedlotr.cost.formulas import CODED, coded_bytes
from fedlotr.flower.links.codec import LOST, coded_message, coded_update
from fedlotr.flower.records import to_arrays, to_record

WORDS = ("float32", "bfloat16", "int8", "int4", "int2", "sign", "top-k:0.1", "top-k:0.75", "top-k:1")
Numbers = npt.NDArray[np.float32]
NUMBERS = arrays.arrays(
    np.float32, arrays.array_shapes(max_dims=2, max_side=40), elements=st.floats(-(2.0**100), 2.0**100, width=32)
)


def through(words: str, x: Numbers, seed: int = 0) -> Numbers:
    form = read_form(words)
    return decode(form, encode(form, {"x": x}, np.random.default_rng(seed)), {"x": x.shape})["x"]


@pytest.mark.parametrize("words", ["int8", "int4"])
def test_stochastic_rounding_is_unbiased(words: str) -> None:
    """The mean of many decodings is off by no more than chance lets it: 4.5 deviations of it, the worst of 200."""
    seed, draws = 20261125, 4000
    print(f"seed {seed}")
    half = np.random.default_rng(seed).standard_normal(100).astype(np.float32)
    x = np.concatenate([half, -half])  # so that the largest has either sign
    form, stream = read_form(words), np.random.default_rng(seed + 1)
    codec = codec_of(form)
    found = np.stack([codec.decode(memoryview(codec.encode(x, stream)), 200) for _ in range(draws)]).astype(np.float64)
    deviation = found.std(axis=0)
    assert deviation.min() > 0, "it is the rounding that is random"
    score = (found.mean(axis=0) - x) / (deviation / np.sqrt(draws))
    assert np.abs(score).max() < 4.5, f"seed {seed}"
    assert abs(score.mean()) * np.sqrt(len(score)) < 4.5, f"all together, seed {seed}"


@settings(max_examples=40, deadline=None)
@given(NUMBERS, st.sampled_from(WORDS), st.integers(0, 2**32))
def test_what_is_decoded_is_within_the_bounds(x: Numbers, words: str, seed: int) -> None:
    form = read_form(words)
    found, exact = through(words, x, seed).astype(np.float64), x.astype(np.float64)
    size, lost = np.abs(exact), np.abs(found - exact)
    match form.kind:
        case "float32":
            assert (found == exact).all()
        case "bfloat16":
            assert (lost <= np.maximum(size * 2.0**-8, 2.0**-134)).all()
        case "int8" | "int4":
            levels = 127 if form.kind == "int8" else 7
            assert (lost <= (size.max() / levels) * (1 + 2.0**-7) + 2.0**-133).all()
        case "int2":
            step = np.sqrt(np.square(exact).mean())
            bound = np.maximum((0.5 + 2.0**-6) * step, size - 1.49 * step) + 2.0**-134
            assert (lost <= bound).all() and (found * exact >= 0).all()
        case "sign":
            mean = size.mean()
            assert np.abs(np.abs(found) - mean).max() <= mean * (2.0**-8 + 2.0**-23) + 2.0**-134
            assert (found * exact >= 0).all() and lost.max() <= size.max() * (1 + 2.0**-8) + 2.0**-134
            owed = np.square(exact).sum() - x.size * mean**2 * (1 - 2.0**-15)
            assert np.square(lost).sum() <= owed * (1 + 1e-9) + 2.0**-250
        case "top-k":
            kept = form.kept(x.size)
            assert np.count_nonzero(found) <= kept and set(found.ravel()) <= {*exact.ravel(), 0.0}
            assert lost.max() <= np.sort(size.ravel())[-kept]
            assert np.square(lost).sum() <= (1 - kept / x.size) * np.square(exact).sum() * (1 + 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=4), st.sampled_from(WORDS), st.booleans())
def test_a_message_has_the_bytes_of_the_formula(tensors: list[Numbers], words: str, zstd: bool) -> None:
    """With zstd never more, and the same numbers come out of it."""
    named = {f"t{at}": tensor for at, tensor in enumerate(tensors)}
    plain, squeezed = read_form(words), read_form(f"{words}+zstd")
    message = encode(squeezed if zstd else plain, named, np.random.default_rng(0))
    owed = coded_bytes(squeezed, [tensor.size for tensor in tensors])
    assert len(message) <= owed if zstd else len(message) == owed
    if zstd:
        without = decode(plain, encode(plain, named, np.random.default_rng(0)), shapes_of(named))
        found = decode(squeezed, message, shapes_of(named))
        assert all((found[name] == without[name]).all() for name in named)
    assert codec_of(plain).size(tensors[0].size) == CODED[plain.kind].of(tensors[0].size, plain.kept(tensors[0].size))


@pytest.mark.parametrize("words", WORDS)
def test_what_is_not_finite_is_refused(words: str) -> None:
    for odd in (np.nan, np.inf, -np.inf):
        with pytest.raises(CodecError, match="x has values that are not finite"):
            through(words, np.array([1.0, odd], np.float32))
    with pytest.raises(CodecError, match="not finite"):  # nor what is none in float32
        encode(read_form(words), {"x": np.array([1e39])}, np.random.default_rng(0))


def test_what_bfloat16_would_make_infinite_is_refused() -> None:
    with pytest.raises(CodecError, match="too large for bfloat16"):
        through("bfloat16", np.array([3.4e38], np.float32))


@pytest.mark.parametrize("words", [*WORDS, "int8+zstd", "float32+zstd"])
def test_damage_is_noticed_wherever_it_is(words: str) -> None:
    form, stream = read_form(words), np.random.default_rng(0)
    named = {"a": stream.standard_normal((8, 8)).astype(np.float32), "b": np.zeros(200, np.float32)}
    message, shapes = encode(form, named, stream, tied=7), shapes_of(named)
    decode(form, message, shapes, tied=7)
    flipped = [message[:at] + bytes([message[at] ^ 4]) + message[at + 1 :] for at in range(len(message))]
    cut = [message[:at] for at in range(len(message))]
    for damaged in [*flipped, *cut, message + b"\0", message * 2]:
        with pytest.raises(CodecError, match="damaged|zstd"):
            decode(form, damaged, shapes, tied=7)
    with pytest.raises(CodecError, match="about another state"):
        decode(form, message, shapes, tied=witness(named))


def test_a_small_message_that_would_unpack_into_a_large_one_is_refused() -> None:
    form = read_form("int8+zstd")
    large = encode(form, {"x": np.zeros(10**6, np.float32)}, np.random.default_rng(0))
    assert len(large) < 1000
    with pytest.raises(CodecError, match="expected 1002"):
        decode(form, large, {"x": (1000,)})


def test_error_feedback_loses_nothing_for_good() -> None:
    """All that was decoded, and what is still with the client, add up to all that it meant to send."""
    stream, coding = np.random.default_rng(0), Coding("top-k:0.05", feedback=True)
    sent, state = to_record({"x": np.zeros(100, np.float32), "y": np.zeros(3, np.float32)}), RecordDict()
    meant, arrived = np.zeros(100), np.zeros(100)
    for number in range(30):
        update = {"x": torch.from_numpy(stream.standard_normal(100).astype(np.float32))}
        if number == 3:
            update["y"] = torch.ones(3)
        record = coded_update(update, sent, state, coding, stream)
        shapes = {name: tuple(tensor.shape) for name, tensor in update.items()}
        held = {name: sent[name].numpy() for name in update}
        found = decode(coding.update, coded_message(record) or b"", shapes, witness(held))
        meant += update["x"].numpy()
        arrived += found["x"]
        np.testing.assert_allclose(arrived + to_arrays(state[LOST])["x"], meant, atol=1e-4)  # type: ignore[arg-type]
    assert np.abs(meant - arrived).max() > 1, "there was something to make up for"
    assert np.count_nonzero(to_arrays(state[LOST])["y"]) == 2, "what did not move again still lacks what it lacked"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("int9", "not a codec, did you mean 'int8'"),
        ("top-k", "expected top-k:DENSITY"),
        ("top-k:0", "expected top-k:DENSITY"),
        ("top-k:1.5", "expected top-k:DENSITY"),
        ("int8:3", "takes no argument"),
        ("delta+int8", "leave 'delta+' out"),
    ],
)
def test_codecs_that_there_are_not(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", "\\+")):
        check_codec(words)


def test_broadcasts_that_leave_no_model_are_refused() -> None:
    with pytest.raises(ValueError, match="send the change alone: 'delta\\+sign'"):
        check_broadcast_codec("sign")
    with pytest.raises(ValueError, match="as large as the whole"):
        check_broadcast_codec("delta+float32")
    assert read_form(check_broadcast_codec("delta+top-k:0.01+zstd")).kept(1000) == 10
    assert read_form("top-k:0.07").kept(100) == 7, "0.07 is meant as it is written, not as binary has it"
