"""Groups of texts that have words in common, where no column says what a row is about.

Words weighted by how rare they are (TF-IDF), as so many directions of their leading singular space (latent semantic
analysis, Deerwester et al. 1990), and k-means of these, by scikit-learn. Nothing is loaded or learnt before; the same
rows and seed give the same clusters, whatever the threads of the machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from fedlotr.data.columns import Rows
from fedlotr.errors import InputError
from fedlotr.streams import stream_key

WORDS = 20_000
"""The most frequent ones of the texts that are looked at."""
DIRECTIONS = 64
"""Of the singular space: more tell single texts apart and not subjects."""
STARTS = 4
"""Of k-means, of which the tightest counts."""
TOLD = 3
"""Words that name a cluster."""


def by_cluster(texts: Sequence[str], count: int, seed: int, given: str) -> tuple[Rows, tuple[str, ...]]:
    """(texts,) the cluster of each, of at most `count`, and their names: a number and the words that set one apart.

    The largest cluster comes first.

    given: the option and its value, for messages. Raises InputError where scikit-learn is not there, for fewer than two
    rows a cluster, and for texts that have no word in common.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.preprocessing import normalize
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise InputError(f"{given}: needs scikit-learn; install it by pip install -e '.[clusters]'") from None
    if len(texts) < 2 * count:
        raise InputError(f"{given}: {len(texts)} rows are too few; expected at least two a cluster: lower K")
    # What stands in half of the texts, or in one alone, groups none.
    words = TfidfVectorizer(max_features=WORDS, max_df=0.5, min_df=2, sublinear_tf=True)
    try:
        weights = words.fit_transform(texts)
    except ValueError:  # its own, for an empty vocabulary
        raise InputError(
            f"{given}: no word stands in several texts, so none are alike; choose iid or lengths:ALPHA"
        ) from None
    random = stream_key(seed, "clusters") % 2**32
    with threadpool_limits(1), warnings.catch_warnings(action="ignore"):  # of fewer distinct texts than clusters
        directions = min(DIRECTIONS, *(size - 1 for size in weights.shape))
        points = (
            weights.toarray()
            if directions < 2
            else TruncatedSVD(directions, random_state=random).fit_transform(weights)
        )
        found = KMeans(count, n_init=STARTS, random_state=random).fit_predict(normalize(points))
    present, of, sizes = np.unique(found, return_inverse=True, return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    of = np.argsort(order)[of]
    terms, mean = words.get_feature_names_out(), np.asarray(weights.mean(axis=0)).ravel()
    names = []
    for number in range(len(present)):
        apart = np.asarray(weights[of == number].mean(axis=0)).ravel() - mean
        names.append(" ".join([f"{number + 1}:", *(str(terms[at]) for at in np.argsort(-apart, kind="stable")[:TOLD])]))
    return of.astype(np.int64), tuple(names)
