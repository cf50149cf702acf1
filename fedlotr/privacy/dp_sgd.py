"""Example-level privacy on a client: DP-SGD, Abadi et al. 2016 (arXiv:1607.00133), algorithm 1, with Poisson sampling.

In each step every example of the client is in the batch with the same probability, independently; each gradient is
clipped, jointly over all that is trained; noise is added once, to their sum, which is divided by the *expected* batch.
What comes after (optimizer, control variates, penalties, the mean on the server) sees nothing else of the examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedlotr.privacy.clipping import clipped
from fedlotr.privacy.noise import NoiseStream
from fedlotr.training.cohort import LocalTraining
from fedlotr.training.model import Tensors
from fedlotr.training.packing import Rows


@dataclass(frozen=True)
class ExampleNoise:
    """What all clients of a run do alike.

    sigma: the noise's standard deviation over the bound. bound: of the norm of one example's gradient.
    reproducible: whether the noise can be made again from the run's seed; then nothing is private.
    engine: whose code computes, clips and adds: ours, for whole cohorts, or Opacus'.
    """

    sigma: float
    bound: float
    reproducible: bool = False
    engine: Literal["cohort", "opacus"] = "cohort"


def sampling_rate(batch_size: int, held: int) -> float:
    """The probability with which each of a client's examples is in a batch."""
    return min(1.0, batch_size / held)


class DPSGD:
    """The mechanism of a cohort: see `fedlotr.training.cohort.Mechanism`. Every client has noise of its own."""

    def __init__(self, noise: ExampleNoise, streams: Sequence[NoiseStream]) -> None:
        """streams: one a client, made for this round alone."""
        self._noise, self._streams = noise, streams

    def batches(self, client: int, rows: Rows, training: LocalTraining) -> list[Rows]:
        """Poisson samples, as many as there are steps; the choice is as secret as the noise."""
        rate = sampling_rate(training.batch_size, len(rows))
        return [rows[self._streams[client].chosen(len(rows), rate)] for _ in range(training.steps_of(len(rows)))]

    def bound(self, each: Tensors) -> Tensors:
        """Clipped jointly; a gradient that is not finite counts as zeros."""
        return clipped(each, self._noise.bound)

    def release(self, client: int, total: Tensors, expected: float) -> Tensors:
        """(sum + N(0, (σ · bound)²)) / expected batch, in float64."""
        scale, stream = self._noise.sigma * self._noise.bound, self._streams[client]
        return {
            name: (value + scale * stream.normal(value).to(value.device)) / expected
            for name, value in sorted(total.items())
        }


def client_stream(reproducible: bool, seed: int, server_round: int, client: int) -> NoiseStream:
    """The secret of one client in one round; `reproducible` makes it no secret."""
    return NoiseStream(f"{seed}/example noise/{server_round}/{client}" if reproducible else None)
