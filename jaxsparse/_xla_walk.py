"""How XLA walks over the stored entries of all outputs at once, by slots; `_xla` says when it does."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from jaxsparse._indices import Index


def walk(step, acc, index: Index, transposed: bool, stacked: int, missing: int):
    """Runs `step(source, entry, acc)` over the entries of all outputs, `stacked` slots at a time.

    `source` and `entry` are [outputs, stacked]: which input an entry reads and where its value is stored.
    Past the end of an output both are out of range (`missing` and nnzb), so that gathers fill in zeros.
    """
    ptr, inputs = (index.row_ptr, index.col_index) if transposed else (index.col_ptr, index.row_index)
    nnzb = inputs.shape[0]

    def at_slots(first, end, j, acc):
        """The step over slots j and on of outputs whose entries are those from `first` to `end`."""
        at = first[:, None] + j * stacked + jnp.arange(stacked, dtype=jnp.int32)
        at = jnp.where(at < end[:, None], at, nnzb)
        entry = index.order.at[at].get(mode="fill", fill_value=nnzb) if transposed else at
        return step(inputs.at[at].get(mode="fill", fill_value=missing), entry, acc)

    return jax.lax.platform_dependent(
        acc,
        cpu=lambda acc: _by_length(at_slots, acc, ptr, stacked),
        default=lambda acc: _in_pieces(at_slots, acc, ptr, stacked, nnzb),
    )


def _by_length(at_slots, acc, ptr, stacked: int):
    """Each loop ends with the longest output in it."""
    outputs = acc.shape[0]
    by_length = jnp.argsort(-jnp.diff(ptr))
    first, last = ptr[by_length], ptr[by_length + 1]
    steps = -(-(last - first) // stacked)
    widths = [w for w in (outputs, outputs // 8, outputs // 64) if w]
    done, j = [], jnp.int32(0)
    for width, rest in itertools.pairwise([*widths, 0]):
        begin, end, acc = first[:width], last[:width], acc[:width]

        def body(state, begin=begin, end=end):
            j, acc = state
            return j + 1, at_slots(begin, end, j, acc)

        limit = steps[rest]  # the most that any output needs which the next, narrower loop leaves out
        j, acc = jax.lax.while_loop(lambda state, limit=limit: state[0] < limit, body, (j, acc))
        done.append(acc[rest:])
    return jnp.concatenate(done[::-1])[jnp.argsort(by_length)]


def _in_pieces(at_slots, acc, ptr, stacked: int, nnzb: int):
    """A loop of a length that no pattern changes: a GPU need not ask the host after each step whether another follows.
    Outputs longer than the mean are cut into pieces of that length, whose sums are added in their order afterwards."""
    outputs = acc.shape[0]
    steps = max(1, -(-nnzb // (outputs * stacked)))
    pieces = outputs + nnzb // (steps * stacked)  # no pattern has more
    ends = jnp.cumsum(-(-jnp.diff(ptr) // (steps * stacked)), dtype=jnp.int32)
    output = jnp.searchsorted(ends, jnp.arange(pieces, dtype=jnp.int32), side="right")
    begins = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])[output]
    first = ptr[output] + (jnp.arange(pieces, dtype=jnp.int32) - begins) * (steps * stacked)
    end = ptr.at[output + 1].get(mode="fill", fill_value=0)  # pieces that no output has are empty
    acc = jnp.zeros((pieces, *acc.shape[1:]), acc.dtype)
    acc = jax.lax.fori_loop(0, steps, lambda j, acc: at_slots(first, end, j, acc), acc)

    def add(left, right):
        """The sum up to the right piece of those that are of its output."""
        (sums, of), (more, of_right) = left, right
        same = (of == of_right).reshape(-1, *(1,) * (acc.ndim - 1))
        return jnp.where(same, sums + more, more), of_right

    sums, _ = jax.lax.associative_scan(add, (acc, output))
    stored = (jnp.diff(ptr) > 0).reshape(-1, *(1,) * (acc.ndim - 1))
    return jnp.where(stored, sums[jnp.maximum(ends - 1, 0)], 0)
