"""Draws the pictures of docs/concepts.md and docs/tasks/choosing_a_format.md: python tools/drawings.py

They are 480 units wide and their letters 14 high, so that they can be read on a telephone.
"""

import random
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent.parent / "docs" / "drawings"
WIDTH = 480
INK, PALE, LINE = "#1a1a2e", "#f1f1f6", "#9a9ab0"
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")


class Drawing:
    """A list of SVG elements with one background, as the page around it may be dark."""

    def __init__(self, height: int, says: str):
        self.height, self.says, self.parts = height, says, []

    def box(self, x, y, width, height, fill=PALE, stroke=LINE, round=0) -> None:
        where = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="{round}"'
        self.parts.append(f'<rect {where} fill="{fill}" stroke="{stroke}"/>')

    def text(self, x, y, words, *, size=14, anchor="start", fill=INK, mono=False, bold=False) -> None:
        font = "monospace" if mono else "sans-serif"
        how = (
            f'font-family="{font}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"'
            + ' font-weight="bold"' * bold
        )
        self.parts.append(f'<text x="{x}" y="{y}" {how}>{escape(words)}</text>')

    def arrow(self, x1, y1, x2, y2) -> None:
        ends = f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'
        self.parts.append(f'<line {ends} stroke="{INK}" stroke-width="1.5" marker-end="url(#tip)"/>')

    def grid(self, x, y, side, rows, cols, filled: dict) -> None:
        """Cells of a matrix; `filled` has (row, column) -> (colour, label)."""
        self.box(x, y, cols * side, rows * side, "white")
        across = "".join(f"M{x} {y + r * side}h{cols * side}" for r in range(1, rows))
        down = "".join(f"M{x + c * side} {y}v{rows * side}" for c in range(1, cols))
        for (r, c), (colour, label) in filled.items():
            self.parts.append(f'<path d="M{x + c * side} {y + r * side}h{side}v{side}h-{side}z" fill="{colour}"/>')
            if label:
                middle = x + (c + 0.5) * side, y + (r + 0.5) * side + 5
                self.text(*middle, label, anchor="middle", fill="white", bold=True)
        self.parts.append(f'<path d="{across}{down}" stroke="{LINE}" stroke-width="0.5"/>')

    def save(self, name: str) -> None:
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>'
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img">'
        back = f'<title>{escape(self.says)}</title>{tip}<rect width="{WIDTH}" height="{self.height}" fill="white"/>'
        (FOLDER / name).write_text("\n".join([head, back, *self.parts, "</svg>\n"]))


def values_and_pattern() -> None:
    d = Drawing(
        300, "Five stored blocks of a matrix of 4 by 4 blocks, numbered by column, and the arrays that hold them"
    )
    stored = [(0, 0), (2, 0), (1, 1), (3, 3), (0, 3)]
    stored.sort(key=lambda place: (place[1], place[0]))
    colour = {place: (COLOURS[k], str(k)) for k, place in enumerate(stored)}
    d.text(24, 28, "W (in, out)", bold=True)
    d.grid(24, 40, 42, 4, 4, colour)
    d.text(24, 228, "5 of 16 blocks: density 0.31")
    d.text(236, 28, "blocks: the parameter, float", bold=True)
    for k in range(5):
        d.box(236 + 44 * k, 40, 38, 38, COLOURS[k])
        d.text(255 + 44 * k, 64, str(k), anchor="middle", fill="white", bold=True)
    d.text(236, 98, "[nnzb, i, o], in column order")
    d.text(236, 134, "pattern: the places, int32", bold=True)
    starts = [sum(place[1] < c for place in stored) for c in range(5)]
    d.text(236, 158, f"row_index  {[place[0] for place in stored]}", mono=True)
    d.text(236, 180, f"col_ptr    {starts}", mono=True)
    d.text(236, 202, "and the same by rows, for W^T:", size=14)
    d.text(236, 224, "col_index, row_ptr, order", mono=True)
    d.text(24, 264, "Gradients and Adam's moments have the shape of blocks.")
    d.text(24, 284, "pattern.T is a view: it copies and sorts nothing.")
    d.save("values_and_pattern.svg")


def back_ends() -> None:
    d = Drawing(320, "A call is checked, becomes one primitive, and gets its kernel when the program is lowered")
    steps = (
        ("spmm(x, blocks, pattern)", "checks shapes and dtypes, flattens the batch"),
        ("one JAX primitive", "jit, grad, vmap and sharding rules"),
        ("lowering", "the platform is known now: one back end is chosen"),
    )
    for k, (name, what) in enumerate(steps):
        d.box(40, 14 + 72 * k, 400, 50, round=6)
        d.text(240, 35 + 72 * k, name, anchor="middle", bold=True)
        d.text(240, 54 + 72 * k, what, anchor="middle")
        d.arrow(240, 64 + 72 * k, 240, 84 + 72 * k)
    names = (('"cpu"', "C++"), ('"xla"', "everywhere"), ('"mosaic"', "Hopper"), ('"triton"', "NVIDIA"))
    d.parts.append(f'<line x1="68" y1="230" x2="412" y2="230" stroke="{INK}" stroke-width="1.5"/>')
    for k, (name, where) in enumerate(names):
        x = 16 + 114 * k
        d.arrow(x + 53, 230, x + 53, 246)
        d.box(x, 248, 106, 54, COLOURS[k], round=6)
        d.text(x + 53, 271, name, anchor="middle", fill="white", bold=True)
        d.text(x + 53, 291, where, anchor="middle", fill="white")
    d.save("back_ends.svg")


def derivatives() -> None:
    d = Drawing(
        250, "The gradients of spmm are spmm with the transposed pattern and sddmm; theirs are the same two again"
    )
    rows = (
        ("y = x W", "spmm(x, blocks, pattern)", COLOURS[0]),
        ("dx = dy W^T", "spmm(dy, blocks, pattern.T)", COLOURS[0]),
        ("dW = x^T dy, where W is stored", "sddmm(x, dy, pattern)", COLOURS[1]),
    )
    for k, (formula, call, colour) in enumerate(rows):
        d.box(60, 16 + 74 * k, 360, 52, colour, round=6)
        d.text(240, 37 + 74 * k, formula, anchor="middle", fill="white", bold=True)
        d.text(240, 58 + 74 * k, call, anchor="middle", fill="white", mono=True)
    d.arrow(240, 68, 240, 88)
    d.text(252, 83, "by x")
    d.parts.append(
        f'<path d="M60 42 H30 V190 H58" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#tip)"/>'
    )
    d.text(36, 158, "by blocks")
    d.text(240, 238, "No product here is larger than O(batch x features + nnz).", anchor="middle")
    d.save("derivatives.svg")


def formats() -> None:
    d = Drawing(200, "Block-diagonal, block-sparse and unstructured weights of the same density")
    rng, n, side = random.Random(4), 16, 8
    diagonal = {(r, c): (COLOURS[r // 4], "") for r in range(n) for c in range(n) if r // 4 == c // 4}
    tiles = {(0, 1), (2, 0), (3, 2), (1, 3)}
    blocks = {(r, c): (COLOURS[0], "") for r in range(n) for c in range(n) if (r // 4, c // 4) in tiles}
    single = {(r, c): (COLOURS[0], "") for c in range(n) for r in rng.sample(range(n), 4)}
    for k, (name, cells) in enumerate(
        (("block-diagonal", diagonal), ("block-sparse", blocks), ("unstructured", single))
    ):
        d.grid(20 + 156 * k, 16, side, n, n, cells)
        d.text(84 + 156 * k, 168, name, anchor="middle", bold=True)
    d.text(240, 190, "Each stores a quarter of the weights.", anchor="middle")
    d.save("formats.svg")


if __name__ == "__main__":
    for draw in (values_and_pattern, back_ends, derivatives, formats):
        draw()
