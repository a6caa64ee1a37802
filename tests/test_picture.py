"""Pictures of patterns: each cell is as dark as it is full, of every size, and a notebook's image stays small."""

import base64
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import BlockPattern, _picture, plot_pattern

MASK = np.random.default_rng(0).random((13, 7)) < 0.3


def shades(pattern) -> np.ndarray:
    """The pixels of the notebook's image."""
    data = base64.b64decode(re.search(r"base64,([^\"]*)", pattern._repr_html_()).group(1))
    width, height = np.frombuffer(data[16:24], ">u4")
    body = zlib.decompress(data[data.index(b"IDAT") + 4 : -16])
    return np.frombuffer(body, np.uint8).reshape(height, width + 1)[:, 1:]


@pytest.mark.parametrize("view", ["stored", "transposed"])
def test_a_small_pattern_is_drawn_place_by_place(view):
    pattern = BlockPattern.from_mask(MASK)
    pattern, mask = (pattern.T, MASK.T) if view == "transposed" else (pattern, MASK)
    drawn = _picture.raster(pattern, (64, 64))
    assert drawn.exact
    np.testing.assert_array_equal(drawn.shares, mask)
    np.testing.assert_array_equal(shades(pattern) < 255, mask)
    assert ["".join(" █"[stored] for stored in row) for row in mask.astype(int)] == _picture.as_lines(pattern, (64, 64))


def test_a_large_pattern_is_drawn_by_how_full_each_cell_is():
    mask = np.zeros((100, 90), bool)
    mask[:50, :30], mask[75:, 60:] = True, np.eye(25, 30) > 0
    drawn = _picture.raster(BlockPattern.from_mask(mask), (4, 3))
    np.testing.assert_allclose(drawn.shares, [[1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 25 / 750]])
    assert not drawn.exact and shades(BlockPattern.from_mask(mask)).shape == (96, 90)


def test_what_is_even_has_one_shade_in_text():
    pattern = BlockPattern.random(jax.random.key(0), (768, 3072), density=0.05)  # 38 or 39 entries an output
    (shade,) = {c for line in _picture.as_lines(pattern, (4, 36)) for c in line}
    assert shade == "▒"


def test_of_a_huge_pattern_some_entries_are_looked_at(monkeypatch):
    pattern = BlockPattern.from_mask(np.tri(200, 160, dtype=bool))
    whole = _picture.raster(pattern, (5, 4)).shares
    monkeypatch.setattr(_picture, "_MOST", 3000)
    rows, cols = _picture.entries(pattern, 3000)
    assert len(rows) <= 3000 and (np.diff(cols) >= 0).all() and (rows >= cols).all()
    np.testing.assert_allclose(_picture.raster(pattern, (5, 4)).shares, whole, atol=0.1)


def test_what_has_no_numbers_or_no_entries_is_shown_as_text_or_white():
    spec = jax.eval_shape(lambda: BlockPattern.random(jax.random.key(0), (8, 8), density=0.5))
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), BlockPattern.from_mask(MASK))
    for pattern in (spec, stack, jax.tree.map(lambda _: None, spec)):
        assert pattern._repr_html_() == f"<code>{pattern!r}</code>"
    texts = []
    jax.jit(lambda p: texts.append(p._repr_html_()))(BlockPattern.from_mask(MASK))
    assert "img" not in texts[0]
    assert (shades(BlockPattern.from_mask(np.zeros((4, 4)))) == 255).all()
    with pytest.raises(ValueError, match="only one concrete pattern"):
        plot_pattern(stack)


def test_a_plot_has_labelled_axes_in_features():
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    matplotlib.use("Agg")
    axes = plot_pattern(BlockPattern.from_mask(MASK, (4, 2)))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("output feature", "input feature")
    assert axes.get_xlim() == (0, 7) and axes.get_ylim() == (13, 0)
    assert axes.images[0].get_extent() == [0, 8, 16, 0]  # blocks reach beyond the edge
    assert axes.get_title().startswith("13x7, blocks of 4x2, ")
    assert plot_pattern(BlockPattern.from_mask(MASK), axes, title="mine") is axes and axes.get_title() == "mine"
    large = plot_pattern(BlockPattern.random(jax.random.key(0), (600, 40), density=0.1))
    assert [a.get_ylabel() for a in large.figure.axes] == ["input feature", "stored, % of a cell"]
