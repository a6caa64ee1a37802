"""Which layers of a model become sparse, and how: ordered rules on dotted paths.

Shared by `jaxsparse.surgery` and `torch_bridge.patch`: they know how to replace a layer, this file decides whether.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxsparse._sizes import as_pair

# kind: (the option that it can't do without, its defaults); "keep" may stand in the place of "density"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "block_diag": ("num_blocks", {}),
    "block_sparse": ("density", {"block": 32}),
    "sparse": ("density", {}),
}
Rules = Iterable[tuple[str, Mapping[str, Any] | None]]
_IF_N_M = (
    " No rule makes n of every m: give a Flax layer an NMPattern as its pattern; or prune weights so first, as "
    "pruning.top_mask(scores, n_of_m=(2, 4)) marks them, and keep what is not zero as single entries."
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule: layers whose whole path `pattern` matches become `kind`, or stay as they are where it is None."""

    pattern: str
    kind: str | None = None
    density: float | None = None
    block: tuple[int, int] = (1, 1)
    num_blocks: int | None = None
    keep: str | None = None

    def matches(self, path: str) -> bool:
        return re.fullmatch(self.pattern, path) is not None

    def describe(self) -> str:
        """What a layer becomes, for the report."""
        if self.kind == "block_diag":
            return f"block_diag, {self.num_blocks} blocks"
        blocks = "" if self.kind == "sparse" else " of {}x{}".format(*self.block)
        how_many = "what is not zero" if self.density is None else f"{self.density:.4g}"
        return f"{self.kind}, {how_many}{blocks}"

    def found(self, density: float) -> Rule:
        """The same rule, where `keep` found this fraction of the blocks or entries."""
        return dataclasses.replace(self, density=density) if self.keep else self

    @property
    def why_whole(self) -> str | None:
        """Why a layer in which `keep` found no zeros stays dense."""
        if not self.keep or self.density != 1:
            return None
        what = "its weight" if self.kind == "sparse" else "every block of {}x{} of its weight".format(*self.block)
        return f"has no zeros that a {self.kind} layer could leave out of {what}: prune it, or name a density."


@dataclasses.dataclass(frozen=True)
class Left:
    """A layer that a rule matches, and that stays as it is.

    Attributes:
      path: the layer's dotted path.
      reason: what it is, and what to do about it.
    """

    path: str
    reason: str


def parse(rules: Rules) -> tuple[Rule, ...]:
    """The rules, checked.

    Args:
      rules: (regular expression, options) pairs. Options are a dict with "kind", one of "block_diag", "block_sparse"
        and "sparse", and what that kind takes: "num_blocks"; "density" and "block" (default 32); "density". Instead of
        a density, "keep": "nonzero" keeps what is not zero. None instead of options leaves the layers as they are, for
        exceptions that stand before a wider rule.
    Raises:
      ValueError: for no rules, something else than pairs, a bad expression, or options that are unknown, missing or
        out of range.
    """
    given = list(rules)
    if not given:
        raise ValueError("there are no rules: give at least one pair of a regular expression and its options.")
    return tuple([_parse_one(rule) for rule in given])


def first_match(rules: Sequence[Rule], path: str) -> Rule | None:
    """The first rule that matches the whole path."""
    return next((rule for rule in rules if rule.matches(path)), None)


def decide(
    rules: Sequence[Rule], layers: Iterable[str], others: Mapping[str, str], left: Mapping[str, str] | None = None
) -> dict[str, Rule]:
    """The rule of every layer that changes: the first that matches its whole path.

    Args:
      layers: paths of the layers that could be replaced.
      others: what else there is, path: type name; only for saying why a rule found nothing.
      left: layers that look dense and can't be replaced, path: the reason; likewise.
    Raises:
      ValueError: if a rule decides nothing, with the nearest names.
    """
    layers = list(layers)
    first = {path: first_match(rules, path) for path in layers}
    for n, rule in enumerate(rules):
        if not any(rule is used for used in first.values()):
            raise ValueError(_why_unused(rules, n, layers, others, left or {}))
    return {path: rule for path, rule in first.items() if rule and rule.kind}


def passed_over(rules: Sequence[Rule], left: Mapping[str, str]) -> list[Left]:
    """Those layers that look dense and that the rules would replace, but that can't be."""
    first = {path: first_match(rules, path) for path in left}
    return [Left(path, left[path]) for path, rule in first.items() if rule and rule.kind]


def check_drawn(rules: Sequence[Rule]) -> None:
    """Raises ValueError where fresh layers are to keep what the old ones have."""
    for rule in rules:
        if rule.keep:
            raise ValueError(f"rule {rule.pattern!r} keeps what is not zero, and fresh layers draw it: give a density.")


# ---- checks and what they say ---------------------------------------------------------------------------


def _parse_one(rule: Any) -> Rule:
    try:
        pattern, options = rule
        re.compile(pattern)
    except (TypeError, ValueError, re.error) as error:
        raise ValueError(f"rule {rule!r} is no pair of a regular expression and its options: {error}.") from None
    if options is None:
        return Rule(pattern)
    where = f"rule {pattern!r}"
    if not isinstance(options, Mapping):
        raise ValueError(f"{where} has options of type {type(options).__name__}: give a dict, or None to leave layers.")
    options = dict(options)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        hint = _IF_N_M if re.fullmatch(r"\d+:\d+|n.?m(_sparse)?", str(kind), re.IGNORECASE) else _near(kind, KINDS)
        raise ValueError(f"{where} has kind={kind!r}, but there is {', '.join(map(repr, KINDS))}.{hint}")
    needed, defaults = KINDS[kind]
    known = [needed, *(["keep"] if needed == "density" else []), *defaults]
    for name in options:
        if name not in known:
            raise ValueError(f"{where}: {kind} takes {' and '.join(known)}, and no {name!r}.{_near(name, known)}")
    if (needed in options) + ("keep" in options) != 1:
        raise ValueError(
            f"{where}: {kind} needs {' or '.join(map(repr, known[: -len(defaults) or None]))}, got {options}."
        )
    return Rule(pattern, kind, **_checked(where, {**defaults, **options}))


def _checked(where: str, options: dict[str, Any]) -> dict[str, Any]:
    density, num_blocks = options.get("density", 1), options.get("num_blocks", 1)
    if not isinstance(density, numbers.Real) or isinstance(density, bool) or not 0 < float(density) <= 1:
        raise ValueError(f"{where} has density={density!r}: it is the fraction of the weights that is kept, in (0, 1].")
    if not isinstance(num_blocks, numbers.Integral) or isinstance(num_blocks, bool) or num_blocks < 1:
        raise ValueError(f"{where} has num_blocks={num_blocks!r}: it is a whole number of at least 1.")
    if options.get("keep", "nonzero") != "nonzero":
        raise ValueError(f"{where} has keep={options['keep']!r}: there is 'nonzero', or give a density.")
    if "block" in options:
        try:
            options["block"] = as_pair(options["block"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return options


def _near(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _why_unused(
    rules: Sequence[Rule], n: int, layers: Sequence[str], others: Mapping[str, str], left: Mapping[str, str]
) -> str:
    pattern, where = rules[n].pattern, f"rule {n + 1} of {len(rules)}, {rules[n].pattern!r},"
    taken = [path for path in layers if rules[n].matches(path)]
    if taken:
        return (
            f"{where} decides nothing: earlier rules match all of its {len(taken)} layers, as "
            f"{next(rule.pattern for rule in rules if rule.matches(taken[0]))!r} matches {taken[0]!r}. Put it before "
            "them, or leave it out."
        )
    passed = [path for path in left if rules[n].matches(path)]
    if passed:
        more = f" So it is with {len(passed) - 1} more." if len(passed) > 1 else ""
        return f"{where} matches no layer that can be replaced: {passed[0]!r} {left[passed[0]]}{more}"
    nearest = f"{_nearest(pattern, layers, left)} Rules must match the whole path; '.*' stands for any part of it."
    odd = [path for path in others if rules[n].matches(path)]
    if odd:
        return f"{where} matches {odd[0]!r}, a {others[odd[0]]}, and no dense layer that can be replaced. {nearest}"
    return f"{where} matches no layer. {nearest}"


def _nearest(pattern: str, layers: Sequence[str], left: Mapping[str, str], count: int = 3) -> str:
    """The layers in which the expression is found, or else those whose names are most like it."""
    if not layers and left:
        path, reason = next(iter(left.items()))
        return f"The model has no dense layer that can be replaced: {path!r} {reason}"
    found = [path for path in layers if re.search(pattern, path)][:count]
    plain = re.sub(r"\\(.)", r"\1", pattern)
    names = found or difflib.get_close_matches(plain, layers, n=count, cutoff=0)
    return f"The nearest names are {', '.join(map(repr, names))}." if names else "The model has no dense layer at all."
