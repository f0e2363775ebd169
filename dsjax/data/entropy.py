"""How well a model that sees one byte can guess the next: the score a trained model must beat."""

from collections.abc import Iterable

import numpy as np


def bigram_bits_per_byte(documents: Iterable[bytes], *, limit: int | None = None) -> float:
    """Conditional entropy H(next byte | byte) of the counted pairs, in bits, float64.

        H = - sum_ab p(a, b) log2 p(b | a)

    Pairs lie within one document. `limit`: stop after that many bytes. ValueError without a pair.
    """
    counts = np.zeros(256 * 256, np.int64)
    left = limit
    for document in documents:
        raw = np.frombuffer(document if left is None else document[:left], np.uint8).astype(np.intp)
        counts += np.bincount(raw[:-1] * 256 + raw[1:], minlength=counts.size)
        if left is not None:
            left -= len(raw)
            if left <= 0:
                break
    pairs = counts.reshape(256, 256).astype(np.float64)
    if not pairs.any():
        raise ValueError("the training documents hold no two neighbouring bytes; add text")
    first, second = np.nonzero(pairs)
    seen = pairs[first, second]
    return float(seen @ np.log2(pairs.sum(axis=1)[first] / seen) / seen.sum())
