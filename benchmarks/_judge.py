"""What was promised against what was measured: one line for each target, ratios taken round by round."""

from __future__ import annotations

import numpy as np

DENSE = ("JAX dense", "torch dense")
PRODUCT = ("JAX dense product", "torch dense product")
SPARSE_RIVALS = ("SparseLab", "torch CSR")
# (at least, aim) of a training step against dense, by density
UNSTRUCTURED = {0.05: (7, 10), 0.1: (4, 6), 0.25: (1.8, 2.5)}
NO_TARGET = (None, None)


def judge(cells: list[dict], ours: str) -> list[dict]:
    """Every ratio in favour of `ours`, a contender's name, with its target where there is one."""
    rules = {
        "unstructured": _unstructured,
        "blocks": _blocks,
        "small batch": lambda cell, ours: [_against(cell, ours, DENSE, (4, 6))],
        "large batch": lambda cell, ours: [_against(cell, ours, DENSE, (3.5, 6))],
        "block-diagonal": lambda cell, ours: [_against(cell, ours, _alternatives(cell), (0.95, 2))],
        "first call": lambda cell, ours: [_against(cell, ours, DENSE[:1], (1, None))],
    }
    lines = [line for cell in cells if "skipped" not in cell for line in rules[cell["family"]](cell, ours)]
    return lines + _geometric_means(lines)


def fastest(cell: dict, names) -> str | None:
    """The name of the fastest of those that took turns."""
    timed = [n for n in names if len(cell["results"].get(n, {"rounds": ()})["rounds"]) > 1]
    return min(timed, key=lambda n: cell["results"][n]["ms"], default=None)


def _unstructured(cell, ours):
    training = cell["mode"] == "training"
    lines = [_against(cell, ours, DENSE, UNSTRUCTURED[cell["density"]] if training else NO_TARGET)]
    return lines + [_against(cell, ours, [rival], (2.5, 4) if training else NO_TARGET) for rival in SPARSE_RIVALS]


def _blocks(cell, ours):
    """Useful FLOP/s as a fraction of the dense product's: a dense step does three products of 1/density the work."""
    goal = NO_TARGET if cell["mode"] == "forward" else (0.5, 0.7) if cell["block"][0] < 32 else (0.75, 0.9)
    work = cell["useful_flops"] / (2 * cell["batch"] * cell["shape"][0] * cell["shape"][1])
    product = DENSE if cell["mode"] == "forward" else PRODUCT
    lines = [_against(cell, ours, product, goal, work, "FLOP rate, of")]
    if cell["mode"] == "training":
        lines.append(_against(cell, ours, DENSE, NO_TARGET, work / 3, "FLOP rate, of the step of"))
    return lines


def _alternatives(cell):
    return [name for name in cell["results"] if not name.startswith("ours")]


def _against(cell, ours, names, goal, work: float = 1.0, how: str = "time, against") -> dict:
    other, mine = fastest(cell, names), cell["results"][ours]
    line = {
        "family": cell["family"],
        "workload": cell["label"],
        "mode": cell["mode"],
        "against": f"{how} {other or ' or '.join(names)}",
        "ours_ms": mine["ms"],
        "other_ms": cell["results"][other]["ms"] if other else None,
        "ratio": None,
        "at_least": goal[0],
        "aim": goal[1],
    }
    if other and len(mine["rounds"]) > 1:
        line["ratio"] = work * float(np.median(np.divide(cell["results"][other]["rounds"], mine["rounds"])))
    return line | {"verdict": _verdict(line)}


def _verdict(line: dict) -> str:
    ratio, at_least, aim = line["ratio"], line["at_least"], line["aim"]
    if ratio is None:
        return "not measured"
    if at_least is None:
        return "no target"
    if ratio < at_least:
        return "below target"
    return "met" if aim is None or ratio < aim else "aim met"


def _geometric_means(lines: list[dict]) -> list[dict]:
    means = []
    for modes in (("training",), ("forward",), ("training", "forward")):
        ratios = [
            line["ratio"] for line in lines
            if line["family"] == "block-diagonal" and line["mode"] in modes and line["ratio"] is not None
        ]  # fmt: skip
        if not ratios:
            continue
        mean = {
            "family": "block-diagonal",
            "workload": f"geometric mean of {len(ratios)} cells, slowest {min(ratios):.2f}x",
            "mode": " and ".join(modes),
            "against": f"the best alternative of each, {' and '.join(modes)}",
            "ours_ms": None,
            "other_ms": None,
            "ratio": float(np.exp(np.mean(np.log(ratios)))),
            "at_least": 1.5,
            "aim": 2,
        }
        means.append(mean | {"verdict": _verdict(mean)})
    return means
