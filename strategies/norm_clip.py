"""Norm clipping: no client moves the model further than others do.

Sun, Kairouz, Suresh & McMahan 2019, "Can You Really Backdoor Federated Learning?" (arXiv:1911.07963), section 5: norm
thresholding, and weak differential privacy. The noise is no privacy: it is drawn from the run's seed, nothing is
accounted for, and updates reach the server as they are; `--privacy` hides clients.
"""

from collections.abc import Sequence

import numpy as np

from fedlotr.flower import Arrays, FromStart, Update


class NormClip(FromStart):
    """x ← x + 1/n Σ Δ_i / max(1, ||Δ_i|| / bound) + N(0, noise²); bound: of the norm (none: the round's median norm).

    All clients weigh the same: one that says that it weighs more would not be bounded.
    """

    def __init__(self, bound: float | None = None, noise: float = 0.0) -> None:
        super().__init__()
        if bound is not None and not 0 < bound < float("inf"):
            raise ValueError(f"bound is {bound}; expected a norm above 0, or none for the median of the round's")
        if not 0 <= noise < float("inf"):
            raise ValueError(f"noise is {noise}; expected a standard deviation, 0 or more")
        self.bound, self.noise = bound, noise

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """The mean of what is clipped, and noise from numpy's global generator, which is the round's own."""
        x = self.current
        norms = [np.sqrt(sum(np.square(u.arrays[name] - x[name]).sum() for name in u.arrays)) for u in updates]
        bound = float(np.median(norms)) if self.bound is None else self.bound
        scales = [1.0 if norm <= bound else bound / norm for norm in norms]
        new: Arrays = {}
        for name in updates[0].arrays:
            steps = [scale * (u.arrays[name] - x[name]) for scale, u in zip(scales, updates, strict=True)]
            new[name] = x[name] + np.mean(steps, axis=0)
            if self.noise:
                new[name] += self.noise * np.random.standard_normal(x[name].shape)
        return new
