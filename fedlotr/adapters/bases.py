"""Where the frozen factors come from: plain functions of a `Request`, in float64 on one thread of the CPU.

A (r, d_in) has orthonormal rows and B (d_out, r) orthonormal columns, except for `lora`, `normal`, `nystrom`, `ldu` and
the SVDs that keep the singular values. Several
matrices mean a tie: one pair for all of them. On one thread, because float32 decompositions differ between one and
two threads.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from fedlotr.streams import stream_key

EXACT_SVD_WIDTH = 1024
"""Matrices whose smaller side is wider than this are decomposed by randomised range finding: exact float64 SVD of a
4096² matrix takes over a minute on one thread, and a model has hundreds."""
GRAM_RATIO = 1e-3
"""The r-th singular value over the first from which on vectors come from a Gram matrix, in half the time of an SVD.
Squaring costs a factor of at most 1 / GRAM_RATIO in exactness: three of float64's 16 digits; float32 keeps 7."""
OVERSAMPLING = 16
POWER_ITERATIONS = 10
"""Of the range finding. On a 1536² matrix of signs, whose singular values hardly fall, four hold 0.951 of what the best
32 directions do, ten 0.995."""
SKETCHED_ITERATIONS = 2
"""Where singular values fall, as a gradient's do: of those like 1/√k two hold 0.998 of what the best 16 directions of a
576 × 1536 matrix do, in three quarters of the time of an exact SVD, and of those like 1/k 0.999996."""
TUCKER_SWEEPS = 3


class Factors(NamedTuple):
    """A (r, d_in) and B (d_out, r), float32, contiguous."""

    A: torch.Tensor
    B: torch.Tensor


class Request(NamedTuple):
    """What a basis is made from: the tie's name and shape, and its members' matrices (d_out, d_in), float32 or wider.

    matrices yields nothing for bases that need none; for `svd` the frozen weights, for `update` the first steps.
    skip: how many singular vectors come before those that are wanted.
    """

    tag: str
    d_in: int
    d_out: int
    r: int
    seed: int
    matrices: Callable[[], Iterator[torch.Tensor]]
    skip: int = 0


def stacked(one: Factors, other: Factors) -> Factors:
    """The pair that is the sum of two: B A of the one and B A of the other."""
    return Factors(torch.cat([one.A, other.A]), torch.cat([one.B, other.B], dim=1))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch on so many threads, so that what is computed has the same bits whatever the process is set to."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


one_thread = partial(threads, 1)


def _normal(rows: int, columns: int, seed: int, tag: str) -> torch.Tensor:
    stream = torch.Generator().manual_seed(stream_key(seed, "basis", tag))
    return torch.randn(rows, columns, generator=stream, dtype=torch.float64)


def _orthonormal(rows: int, columns: int, seed: int, tag: str) -> torch.Tensor:
    """(rows, columns) with orthonormal columns, Haar-distributed: the sign of R's diagonal is made positive."""
    q, upper = torch.linalg.qr(_normal(rows, columns, seed, tag))
    orthonormal: torch.Tensor = q * torch.sign(torch.diagonal(upper))
    return orthonormal


def random_basis(request: Request) -> Factors:
    """Orthonormal factors from the seed and the tie's name; costs eight bytes to communicate."""
    a = _orthonormal(request.d_in, request.r, request.seed, f"{request.tag}.A").T
    b = _orthonormal(request.d_out, request.r, request.seed, f"{request.tag}.B")
    return _factors(a, b)


def normal_basis(request: Request) -> Factors:
    """Every number of both drawn from N(0, 1), as LoTR's published code has them (Bershatsky et al. 2024)."""
    a = _normal(request.d_in, request.r, request.seed, f"{request.tag}.A").T
    return _factors(a, _normal(request.d_out, request.r, request.seed, f"{request.tag}.B"))


def spectral_basis(request: Request) -> Factors:
    """Leading left and right singular vectors of the matrices (LoRA-XS; LoRA-SB when they are first updates).

    For several matrices M_l, the leading eigenvectors of Σ M_l M_lᵀ and Σ M_lᵀ M_l: the higher-order SVD of the
    matrices stacked (Tucker-2, as LoTR initialises from W), which for one matrix is its own SVD.
    """
    matrices = request.matrices()
    first = next(matrices).double()
    second = next(matrices, None)
    last = request.skip + request.r
    if second is None:
        left, right = leading_singular_vectors(first, last, request.seed)
    else:
        rows, columns = first @ first.T, first.T @ first
        while second is not None:
            member = second.double()
            rows, columns = rows + member @ member.T, columns + member.T @ member
            second = next(matrices, None)
        left, right = _leading(rows, last), _leading(columns, last)
    return _factors(right[:, request.skip :].T, left[:, request.skip :])


def sketched_basis(request: Request) -> Factors:
    """As `spectral_basis`, of one matrix by randomised range finding whatever its width: a model has hundreds of them.

    Bases that move are made anew every few rounds, of matrices whose singular values fall.
    """
    matrices = list(request.matrices())
    if len(matrices) > 1:
        return spectral_basis(request)
    left, right = leading_singular_vectors(matrices[0].double(), request.r, request.seed, 0, SKETCHED_ITERATIONS)
    return _factors(right.T, left)


def scaled_svd_basis(request: Request) -> Factors:
    """U and Σ Vᵀ of one matrix, as the code published with LoRA-XS has them (Bałazy et al. 2024, arXiv:2405.17604)."""
    u, sigma, v = _svd_of(request)
    return _factors(sigma[:, None] * v.T, u)


def root_svd_basis(request: Request) -> Factors:
    """U √Σ and √Σ Vᵀ of one matrix, as PEFT's TinyLoRA has them (Morris et al. 2026)."""
    u, sigma, v = _svd_of(request)
    return _factors(sigma.sqrt()[:, None] * v.T, u * sigma.sqrt())


def _svd_of(request: Request) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (d_out, r), Σ (r,) and V (d_in, r) of the request's only matrix."""
    w = next(request.matrices()).double()
    u, v = leading_singular_vectors(w, request.r, request.seed)
    return u, (u * (w @ v)).sum(0).clamp(min=0), v


def lora_basis(request: Request) -> Factors:
    """LoRA's start: A Kaiming-uniform with a = √5, that is U(-1/√d_in, 1/√d_in); B zero (PEFT's `LoraLayer`)."""
    stream = torch.Generator().manual_seed(stream_key(request.seed, "basis", f"{request.tag}.A"))
    uniform = torch.rand(request.r, request.d_in, generator=stream, dtype=torch.float64)
    return _factors((2 * uniform - 1) / request.d_in**0.5, torch.zeros(request.d_out, request.r))


def tucker_basis(request: Request) -> Factors:
    """Tucker-2 of a tie's stacked matrices (LoTR from W): the B and A that hold most of Σ ||Bᵀ M_l Aᵀ||².

    Higher-order orthogonal iteration (De Lathauwer, De Moor & Vandewalle 2000, algorithm 4.2) from the higher-order
    SVD of `spectral_basis`: B spans the leading eigenvectors of Σ (M_l Aᵀ)(M_l Aᵀ)ᵀ, then A likewise.
    """
    pair = spectral_basis(request)
    a, b = pair.A.double(), pair.B.double()
    for _ in range(TUCKER_SWEEPS):
        rows = sum(((m @ a.T) @ (m @ a.T).T for m in map(torch.Tensor.double, request.matrices())), torch.zeros(()))
        b = _leading(rows, request.r)
        columns = sum(((b.T @ m).T @ (b.T @ m) for m in map(torch.Tensor.double, request.matrices())), torch.zeros(()))
        a = _leading(columns, request.r).T
    return _factors(a, b)


def nystrom_basis(request: Request) -> Factors:
    """B = W[:, :r], A = W[:r, :]: W ≈ B (W[:r, :r])⁺ A (Guo et al. 2025, NLoRA, arXiv:2502.14482).

    Not orthonormal. The core stands for the matrix in the middle, which IntTune trains; here it is what is added to it.
    """
    w = next(request.matrices()).double()
    return _factors(w[: request.r, :].clone(), w[:, : request.r].clone())


def ldu_basis(request: Request) -> Factors:
    """B = (P L)[:, :r], A = U[:r, :] of W = P L D U, L and U unit triangular (Shi et al. 2024, LoLDU, 2410.13618).

    Not orthonormal. A pivot of zero (a singular W) leaves its row of U the unit vector.
    """
    w = next(request.matrices()).double()
    p, lower, upper = torch.linalg.lu(w)
    pivots = torch.diagonal(upper).clone()
    zero = pivots == 0
    unit = upper / torch.where(zero, torch.ones_like(pivots), pivots)[:, None]
    places = torch.arange(len(pivots))[zero]
    unit[places] = 0
    unit[places, places] = 1
    return _factors(unit[: request.r], (p @ lower)[:, : request.r])


def product_basis(a: torch.Tensor, b: torch.Tensor) -> Factors:
    """Vᵀ and U Σ of B A = U Σ Vᵀ, float32: the same product of turned factors (FedSVD: Lee et al. 2025, 2505.12805).

    a: (r, d_in), b: (d_out, r). By the SVD of the product of their triangular QR factors, r × r.
    """
    left, right = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, sigma, vh = torch.linalg.svd(left.R @ right.R.T)
    v, signs = _fix_signs(right.Q @ vh.T)
    return _factors(v.T, left.Q @ u * signs * sigma)


def leading_singular_vectors(
    matrix: torch.Tensor, r: int, seed: int, exact: int = EXACT_SVD_WIDTH, iterations: int = POWER_ITERATIONS
) -> tuple[torch.Tensor, torch.Tensor]:
    """U (d_out, r) and V (d_in, r) of a float64 matrix (d_out, d_in), signs fixed.

    By the eigenvectors of the smaller Gram matrix, or by SVD where the r-th singular value is small against the first;
    matrices that are wider than `exact` by Halko, Martinsson & Tropp 2011 (arXiv:0909.4061), algorithm 4.4 with a
    seeded sketch and so many power iterations.
    """
    if min(matrix.shape) <= exact or r + OVERSAMPLING >= min(matrix.shape):
        u, v = _by_gram(matrix, r) or _by_svd(matrix, r)
    else:
        sketch = _normal(matrix.shape[1], r + OVERSAMPLING, seed, f"sketch{tuple(matrix.shape)}")
        q = torch.linalg.qr(matrix @ sketch).Q
        for _ in range(iterations):
            q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q).Q).Q
        small, v = _by_svd(q.T @ matrix, r)
        u = q @ small
    v, signs = _fix_signs(v)
    return u * signs, v


def _by_svd(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :r], vh[:r].T


def _by_gram(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """V from the eigenvectors of MᵀM, U = M V / σ made orthonormal; for a broad matrix the other way round."""
    if matrix.shape[0] < matrix.shape[1]:
        found = _by_gram(matrix.T, r)
        return None if found is None else (found[1], found[0])
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix)
    if squares[-r] <= GRAM_RATIO**2 * squares[-1]:
        return None
    v = vectors.flip(1)[:, :r]
    u, upper = torch.linalg.qr(matrix @ v)
    return u * torch.sign(torch.diagonal(upper)), v


def sha256(bases: Sequence[tuple[str, Factors]]) -> str:
    """Fingerprint of named bases, hexadecimal; the names' order does not matter."""
    digest = hashlib.sha256()
    for name, pair in sorted(bases, key=lambda item: item[0]):
        for side, factor in zip("AB", pair, strict=True):
            digest.update(f"{name}.{side}{tuple(factor.shape)}".encode())
            digest.update(factor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _leading(symmetric: torch.Tensor, r: int) -> torch.Tensor:
    return _fix_signs(torch.linalg.eigh(symmetric).eigenvectors.flip(1)[:, :r])[0]


def _fix_signs(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns flipped so that each one's largest entry is positive, and the signs applied: an SVD leaves them free."""
    largest = vectors.abs().argmax(dim=0)
    signs = torch.sign(vectors[largest, torch.arange(vectors.shape[1])])
    return vectors * signs, signs


def _factors(a: torch.Tensor, b: torch.Tensor) -> Factors:
    return Factors(a.float().contiguous(), b.float().contiguous())
