"""Measured layers for the cost model: those of `costs.py`, and those of other benchmarks in the same form."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

from jaxsparse._sizes import is_unstructured
from jaxsparse.costs import layers, model
from jaxsparse.costs.layers import Layer
from jaxsparse.costs.machine import Profile

FITTED_ON, OTHER_ISA = "fitted on: AVX-512, one core", "AVX2, one core"  # names of sets
CLOSE = 1.1  # two layers are as fast as each other within this factor
WORDS = {"sgd": 3, "SGD": 3, "adam": 7, "Adam": 7}  # that an update reads or writes for each weight


@dataclasses.dataclass(frozen=True)
class Cell:
    """One layer, measured.

    Attributes:
      mode: "forward" or "gradients", which is forward and backward pass.
      ms: what a call took; 0 where only the ratio is known.
      ratio: how many times as fast as the dense layer of its size.
      other_ratio: the same by another measure of the same calls, where there is one.
      words: that an optimizer moves for each weight after the gradients; 0: there is none.
    """

    layer: Layer
    mode: str
    profile: Profile
    ms: float
    ratio: float
    words: int = 0
    other_ratio: float = 0

    @property
    def is_clear(self) -> bool:
        """Whether it is known which layer is faster: not if they are near to each other, or by one measure only."""
        ratios = [self.ratio, self.other_ratio or self.ratio]
        return min(ratios) > CLOSE or max(ratios) < 1 / CLOSE

    @functools.cached_property
    def predicted_ms(self) -> float:
        return self._predicted(self.layer)

    @functools.cached_property
    def predicted_ratio(self) -> float:
        return self._predicted(layers.dense(self.layer.shape, self.layer.batch, self.layer.dtype)) / self.predicted_ms

    def _predicted(self, layer: Layer) -> float:
        size = layer.weight_bytes
        update = self.words * size / self.profile.memory_rate(4 * size) if self.words else 0
        return 1e3 * (model.seconds(layer, self.profile, self.mode) + update)


def read(folder: Path) -> dict[str, list[Cell]]:
    """All sets, by what they are; the first is what the model is fitted on."""
    own = json.loads((folder / "costs.json").read_text())
    profiles = {name: profile(fields) for name, fields in own["profiles"].items()}
    sets = {FITTED_ON: list(_own(own))}
    if (folder / "costs_avx2.json").exists():
        sets[OTHER_ISA] = list(_own(json.loads((folder / "costs_avx2.json").read_text())))
    both = {name: p.with_threads(2) for name, p in profiles.items()}
    sets["AVX-512, two cores, PyTorch (decisions.json)"] = list(_decisions(folder, both["torch"]))
    sets["AVX-512, two cores, PyTorch (torch_layers.json)"] = list(_torch_layers(folder, both["torch"]))
    sets["another machine, two cores, JAX (cpu.json)"] = list(_cpu(folder, profiles["jax"]))
    return sets


def profile(fields: dict) -> Profile:
    """As JSON holds it."""
    memory = {int(size): rate for size, rate in fields["memory"].items()}
    return Profile(**{**fields, "memory": memory})


def _own(run: dict) -> Iterator[Cell]:
    profiles = {name: profile(fields) for name, fields in run["profiles"].items()}
    made = [(cell, _layer(cell["layer"])) for cell in run["cells"] if cell["framework"] in profiles]
    key = lambda cell, layer: (cell["framework"], cell["mode"], layer.shape, layer.batch, layer.dtype)  # noqa: E731
    dense = {key(cell, layer): cell for cell, layer in made if layer.kind == "dense"}
    for cell, layer in made:
        quick, usual = (dense[key(cell, layer)][name] / cell[name] for name in ("ms", "median_ms"))
        yield Cell(layer, cell["mode"], profiles[cell["framework"]], cell["ms"], quick, other_ratio=usual)


def _layer(fields: dict) -> Layer:
    return Layer(**{**fields, "shape": tuple(fields["shape"]), "block": tuple(fields["block"])})


def _decisions(folder: Path, torch: Profile) -> Iterator[Cell]:
    for cell in json.loads((folder / "decisions.json").read_text())["cells"]:
        rule, place = cell["rule"], ((cell["features"],) * 2, cell["rows"])
        layer = {
            "block_diag": lambda place=place, rule=rule: layers.block_diag(*place, 1 / rule["num_blocks"]),
            "block_sparse": lambda place=place, rule=rule: layers.block_sparse(*place, rule["density"], rule["block"]),
            "sparse": lambda place=place, rule=rule: layers.sparse(*place, rule["density"]),
        }[rule["kind"]]()
        yield Cell(layer, "gradients", torch, 0, 1.0 if cell["open"] else math.sqrt(math.prod(cell["times_as_fast"])))


def _torch_layers(folder: Path, torch: Profile) -> Iterator[Cell]:
    families = json.loads((folder / "torch_layers.json").read_text())["families"]
    for cell in families["sparse"]["cells"]:
        kind, _, density = cell["label"].rpartition(", ")
        place = (2048, 2048), 256, float(density.strip("%")) / 100
        layer = layers.block_sparse(*place, int(kind.split()[-1])) if "of" in kind else layers.sparse(*place)
        yield _beside(cell, layer, torch, "nn.Linear", 7 if cell["mode"] == "step" else 0)
    for cell in families["small batch"]["cells"]:
        layer = layers.sparse((4096, 4096), int(cell["label"].split()[-1]), 0.1)
        yield _beside(cell, layer, torch, "nn.Linear", 0)


def _cpu(folder: Path, here: Profile) -> Iterator[Cell]:
    """That run measured no profile: its rate is its limit, its memory and calls those of its smallest dense cells, and
    all else in the same proportions as here."""
    runs = [json.loads((folder / f"{name}.json").read_text()) for name in ("cpu", "cpu_large_batch")]
    small, thin = (_find(runs[0], **what) for what in ({"label": "F=64 M=1 "}, {"label": "10% batch 1 "}))
    rate = 1e9 * runs[0]["limits"]["jax_dense_gflops"]
    work = 1e3 * 2 * 128 * 64 * 64 / rate
    calls = {"forward": (small["forward"] - work) / 1e3, "gradients": (small["training"] - 3 * work) / 1e3}
    memory = 4 * 4096**2 / thin["forward"] * 1e3
    more = memory / here.memory[2**26]
    there = Profile(
        "jax",
        runs[0]["machine"]["cpu"],
        2,
        {dtype: rate * here.rates[dtype] / here.rates["float32"] for dtype in here.rates},
        {name: rate * here.kernels[name] / here.rates["float32"] for name in here.kernels},
        {2**20: here.memory[2**20] * more, 2**26: memory},
        {**calls, "step": calls["gradients"]},
    )
    for cell in (cell for run in runs for cell in run["cells"]):
        if cell["family"] == "first call" or not cell["results"].get("JAX dense", {}).get("ms"):
            continue
        block = tuple(cell["block"])
        place = tuple(cell["shape"]), cell["batch"], cell["density"]
        if cell["num_blocks"] == 1:  # a dense layer by another name
            continue
        if cell["num_blocks"]:
            layer = layers.block_diag(*place)
        else:
            layer = layers.sparse(*place) if is_unstructured(block) else layers.block_sparse(*place, block)
        yield _beside(cell, layer, there, "JAX dense", WORDS[cell["optimizer"]] if cell["mode"] == "training" else 0)


def _find(run: dict, label: str) -> dict[str, float]:
    """Milliseconds of the dense product in the cells whose label begins so, by mode."""
    return {c["mode"]: c["results"]["JAX dense"]["ms"] for c in run["cells"] if c["label"].startswith(label)}


def _beside(cell: dict, layer: Layer, where: Profile, dense: str, words: int) -> Cell:
    ours, theirs = (cell["results"][name]["ms"] for name in ("ours", dense))
    return Cell(layer, "forward" if cell["mode"] == "forward" else "gradients", where, ours, theirs / ours, words)
