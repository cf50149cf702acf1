"""Gaussian noise from a cryptographic stream: ChaCha20's bytes, 53 of every 64 bits as a uniform, its normal quantile.

Never from a generator that user code can seed. One stream is one key, drawn from the operating system unless a
reproducible utility study gives one, and then no privacy may be claimed.
"""

import hashlib
import secrets

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20


class NoiseStream:
    """Random numbers of one client in one round (or of the server), in float64; no two draws share a byte."""

    def __init__(self, reproducible: str | None = None) -> None:
        """reproducible: a name that fixes the stream, for utility studies; None: a fresh key nobody knows."""
        key = secrets.token_bytes(32) if reproducible is None else hashlib.sha256(reproducible.encode()).digest()
        # The nonce is zero: a key is used for one stream alone, whose counter cannot run out (2^32 blocks, 256 GiB).
        self._stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def uniform(self, size: int) -> npt.NDArray[np.float64]:
        """In (0, 1), never either end: the middles of 2^53 equal steps."""
        words = np.frombuffer(self._stream.update(bytes(8 * size)), dtype="<u8")
        steps = (words >> np.uint64(12)).astype(np.float64)  # 52 bits, so that adding a half is exact
        return (steps + 0.5) * 2.0**-52

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        """Standard normals of a tensor's shape, float64, on the CPU."""
        from scipy.special import ndtri  # here: a run without privacy needs no scipy, which takes half a second to load

        return torch.from_numpy(ndtri(self.uniform(like.numel()))).reshape(like.shape)

    def chosen(self, among: int, rate: float) -> npt.NDArray[np.int64]:
        """A Poisson sample: each of 0 .. among - 1 with probability `rate`, independently; it may be empty."""
        return np.flatnonzero(self.uniform(among) < rate)
