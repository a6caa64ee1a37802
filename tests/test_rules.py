"""Rules on paths: which one decides, what a bad one is told, and the report."""

import dataclasses

import numpy as np
import pytest

from jaxsparse.models.report import Report, Row
from jaxsparse.models.rules import Rule, decide, parse, passed_over

LAYERS = ["encoder.0.up", "encoder.0.down", "encoder.1.up", "encoder.10.up", "head"]
OTHERS = {"encoder.0.norm": "LayerNorm", "encoder": "ModuleList"}
SPARSE = {"kind": "sparse", "density": 0.1}


def kinds(*rules):
    return {path: rule.kind for path, rule in decide(parse(rules), LAYERS, OTHERS).items()}


def test_the_first_rule_that_matches_the_whole_path_decides():
    diagonal = {"kind": "block_diag", "num_blocks": 2}
    assert kinds((r"encoder\.1\.up", diagonal), (r"encoder\..*", SPARSE)) == {
        "encoder.0.up": "sparse",
        "encoder.0.down": "sparse",
        "encoder.1.up": "block_diag",
        "encoder.10.up": "sparse",
    }


def test_a_rule_without_options_leaves_layers_dense():
    assert kinds((".*(up|down)", None), (".*", SPARSE)) == {"head": "sparse"}


@pytest.mark.parametrize(
    "pattern, reasons",
    [
        ("encoder.0.upp", ["rule 1 of 1", "matches no layer", "'encoder.0.up'"]),
        (r"encoder\.0\.dowm", ["matches no layer", "'encoder.0.down'"]),
        (r"\.up", ["must match the whole path", "'encoder.0.up', 'encoder.1.up', 'encoder.10.up'"]),
        (r"encoder\.\d+\.norm", ["'encoder.0.norm', a LayerNorm", "'.*' stands for any part"]),
    ],
)
def test_a_rule_that_matches_nothing_is_told_the_nearest_names(pattern, reasons):
    with pytest.raises(ValueError) as error:
        kinds((pattern, SPARSE))
    assert all(reason in str(error.value) for reason in reasons), error.value


def test_a_rule_whose_layers_are_all_taken_is_an_error():
    with pytest.raises(ValueError, match=r"rule 2 of 2, 'head', decides nothing: .* '\.\*' matches 'head'"):
        kinds((".*", SPARSE), ("head", None))


def test_a_model_without_dense_layers_says_so():
    with pytest.raises(ValueError, match="no dense layer at all"):
        decide(parse([(".*", SPARSE)]), [], OTHERS)


@pytest.mark.parametrize(
    "rules, reason",
    [
        ([], "no rules"),
        (["head"], "no pair"),
        ([("(", SPARSE)], "unterminated subpattern"),
        ([("head", 0.5)], "options of type float"),
        ([("head", {"density": 0.5})], "kind=None, but there is 'block_diag', 'block_sparse', 'sparse'"),
        ([("head", {"kind": "block-sparse"})], "Did you mean 'block_sparse'"),
        ([("head", {"kind": "2:4"})], "No rule makes n of every m: give a Flax layer an NMPattern"),
        ([("head", {"kind": "N:M", "n": 2, "m": 4})], r"n_of_m=\(2, 4\)"),
        ([("head", {"kind": "sparse", "density": 0.5, "block": 8})], "sparse takes density and keep, and no 'block'"),
        ([("head", {"kind": "block_sparse", "densty": 0.5})], "no 'densty'. Did you mean 'density'"),
        ([("head", {"kind": "block_sparse", "block": 8})], "block_sparse needs 'density' or 'keep'"),
        ([("head", {"kind": "sparse", "density": 0.5, "keep": "nonzero"})], "sparse needs 'density' or 'keep', got"),
        ([("head", {"kind": "sparse", "keep": "largest"})], "keep='largest': there is 'nonzero'"),
        ([("head", {"kind": "block_diag", "num_blocks": 2, "keep": "nonzero"})], "takes num_blocks, and no 'keep'"),
        ([("head", {"kind": "sparse", "density": 50})], r"density=50: it is the fraction .* kept, in \(0, 1\]"),
        ([("head", {"kind": "sparse", "density": float("nan")})], "density=nan"),
        ([("head", {"kind": "sparse", "density": "0.5"})], "density='0.5'"),
        ([("head", {"kind": "block_sparse", "density": 0.5, "block": 0})], "rule 'head': block="),
        ([("head", {"kind": "block_diag", "num_blocks": 2.5})], "num_blocks=2.5"),
    ],
)
def test_a_bad_rule_is_refused_with_the_reason(rules, reason):
    with pytest.raises(ValueError, match=reason):
        parse(rules)


def test_rules_take_defaults_and_numpy_numbers():
    rules = parse([("head", {"kind": "block_sparse", "density": np.float32(0.5)}), (".*", None)])
    assert rules == (Rule("head", "block_sparse", 0.5, (32, 32)), Rule(".*", None)) and hash(rules)


def test_a_report_is_its_rows_and_prints_as_a_table():
    rule = parse([(".*", SPARSE)])[0]
    rows = [
        Row.of("a.b", rule, (100, 20), parameters=(2000, 200), bytes=(8000, 3200), relative_error=0.25),
        Row.of("head", None, (10, 10), parameters=(100, 100), bytes=(400, 400), milliseconds=(1.0, 2.5)),
    ]
    report = Report(rows, 5000)
    assert list(report) == rows and len(report) == 2 and report[0].path == "a.b"
    assert report.parameters == (5000, 3200)
    assert [line.split() for line in str(report).splitlines()] == [
        "path before after parameters MB error ms".split(),
        "a.b 100x20 sparse, 0.1 2,000 -> 200 0.01 -> 0.00 0.250".split(),
        "head 10x10 dense, which is faster 100 -> 100 0.00 -> 0.00 1.00 -> 2.50".split(),
        "2 layers 2,100 -> 300 0.01 -> 0.00".split(),
        "whole model 5,000 -> 3,200".split(),
    ]
    assert "ms" not in str(Report(rows[:1], 5000)).splitlines()[0]


@pytest.mark.parametrize(
    "options, density, told",
    [
        ({"kind": "sparse"}, 0.1, None),
        ({"kind": "sparse"}, 0.45, "slow?: head keeps 0.45 of its weight"),
        ({"kind": "block_sparse"}, 0.45, None),
        ({"kind": "block_sparse"}, 0.8, "slow?: head keeps 0.8 of its weight"),
    ],
)
def test_a_density_that_seldom_pays_is_told(options, density, told):
    rule = parse([("head", {**options, "keep": "nonzero"})])[0].found(density)
    row = Row.of("head", rule, (10, 10), parameters=(100, 80), bytes=(400, 640))
    last = str(Report([row], 100)).splitlines()[-1]
    assert last.startswith(told) if told else "slow?" not in last
    assert "slow?" not in str(Report([dataclasses.replace(row, milliseconds=(2.0, 1.0))], 100))


LEFT = {"attn.out": "is an Odd layer.", "attn.in": "is an Odd layer.", "other": "is a Strange one."}


def test_what_looks_dense_and_is_left_is_told_with_the_reason():
    rules = parse([("attn.*", SPARSE), ("head|other", SPARSE)])
    with pytest.raises(
        ValueError, match=r"'attn.\*', matches no layer that can be replaced: 'attn.out' is an Odd .* 1 more"
    ):
        decide(rules, LAYERS, OTHERS, LEFT)
    with pytest.raises(ValueError, match="no dense layer that can be replaced: 'attn.out' is an Odd layer"):
        decide(parse([("nothing", SPARSE)]), [], OTHERS, LEFT)
    passed = passed_over(parse([("attn.in", None), *zip(["attn.*", "other"], [SPARSE] * 2, strict=True)]), LEFT)
    assert [one.path for one in passed] == ["attn.out", "other"]
    lines = str(Report([], 0, passed_over(rules, LEFT))).splitlines()
    assert lines[-2:] == ["left: attn.out and 1 more is an Odd layer.", "left: other is a Strange one."]
