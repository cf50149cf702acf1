"""FLTrust: what the server learns on rows of its own says whom to trust, and how far to go.

Cao, Fang, Liu & Gong 2021, "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping" (NDSS,
arXiv:2012.13995), equations 2 to 4. The root data are the run's public rows, on which the server trains as a client
does.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedlotr.flower import Arrays, FromStart, Update


def _flat(arrays: Mapping[str, npt.NDArray[np.float64]], start: Arrays) -> npt.NDArray[np.float64]:
    """The change since the start, end to end in the order of the names."""
    return np.concatenate([(arrays[name] - start[name]).ravel() for name in sorted(arrays)])


class FLTrust(FromStart):
    """x ← x + α Σ T_i (||g_0|| / ||g_i||) g_i / Σ T_i, T_i = ReLU(cos(g_i, g_0)); g_0 is the server's own update.

    Where nobody is to be trusted the model stays as it is. alpha: the server's learning rate.
    """

    rooted = True

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha is {alpha}; expected a learning rate above 0")
        self.alpha = alpha

    def combine(self, updates: Sequence[Update], server_round: int) -> Arrays:
        """Each update turned to the length of the server's own, weighed by how far it has its direction."""
        x, names = self.current, sorted(updates[0].arrays)
        root = _flat({name: self.root[name] for name in names}, x)
        length, step, total = float(np.linalg.norm(root)), np.zeros_like(root), 0.0
        for update in updates:
            change = _flat(update.arrays, x)
            norm = float(np.linalg.norm(change))
            trust = max(0.0, float(change @ root)) / (norm * length) if norm and length else 0.0
            step += trust * length / norm * change if trust else 0.0
            total += trust
        step *= self.alpha / total if total else 0.0
        pieces = np.split(step, np.cumsum([x[name].size for name in names])[:-1])
        return {name: x[name] + piece.reshape(x[name].shape) for name, piece in zip(names, pieces, strict=True)}
