"""Visibility against small matrices written out by hand: rows look, columns are looked at."""

import jax.numpy as jnp
import numpy as np

from dsjax.nn import masks
from dsjax.nn.masks import Places


def as_text(matrix) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in np.asarray(matrix)]


def test_one_document_is_a_triangle():
    places = Places(jnp.arange(4)[None])
    matrix_1TS = masks.within_rows(places).matrix()
    assert matrix_1TS.shape == (1, 4, 4)
    assert as_text(matrix_1TS[0]) == [
        "x...",
        "xx..",
        "xxx.",
        "xxxx",
    ]


def test_packed_documents_do_not_see_each_other():
    segments_BT = jnp.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 3, 3]])
    positions_BT = jnp.array([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]])
    first, second = masks.within_rows(Places(positions_BT, segments_BT)).matrix()
    assert as_text(first) == [
        "x.....",
        "xx....",
        "xxx...",
        "...x..",
        "...xx.",
        ".....x",
    ]
    assert as_text(second) == [
        "x.....",
        ".x....",
        ".xx...",
        ".xxx..",
        "....x.",
        "....xx",
    ]


def test_order_inside_a_row_is_the_place_not_the_position():
    # A document cut by the row's start begins at a position that is not 0.
    places = Places(jnp.array([[7, 8, 9]]), jnp.ones((1, 3), jnp.int32))
    assert as_text(masks.within_rows(places).matrix()[0]) == ["x..", "xx.", "xxx"]


def test_a_cache_is_seen_up_to_each_query_s_position():
    places = Places(jnp.array([[2, 3], [0, 1]]))
    first, second = masks.over_cache(places, 5).matrix()
    assert as_text(first) == ["xxx..", "xxxx."]
    assert as_text(second) == ["x....", "xx..."]
