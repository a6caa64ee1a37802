"""The pattern buffers of the torch layers: whatever writes into them, a layer computes what it should, or refuses."""

import copy
import dataclasses
import io
import os
import pickle
import re
import threading

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import jax
import numpy as np
import torch
from torch import func
from torch.optim import swa_utils

from jaxsparse._indices import Index
from jaxsparse.formats import BlockPattern
from pallas_kernels import _lines
from torch_bridge import BlockSparseLinear, SparseLinear, _index
from torch_bridge._whole import NAMES, Record, fault

EXAMPLES = int(os.environ.get("JAXSPARSE_FUZZ_EXAMPLES", "2000"))
BACKENDS = [None, "cpu", "xla"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def make(seed=0, **options):
    torch.manual_seed(seed)
    return SparseLinear(300, 400, 0.1, **options)


def blocks(seed=0, **options):
    torch.manual_seed(seed)
    return BlockSparseLinear(23, 37, 0.5, (4, 8), **options)


each_layer = pytest.mark.parametrize("make", [make, blocks], ids=["entries", "blocks"])


def dense_product(layer, x):
    """From the buffers as they are, by torch alone."""
    return x @ layer.to_linear().weight.T + layer.bias


def index_of(layer):
    return [layer.get_buffer(name).clone() for name in (*NAMES, "sizes")]


def blur(layer):
    """One step of a moving average of the buffers with themselves."""
    with torch.no_grad():
        for t in layer.buffers():
            t.copy_(0.9999 * t + (1 - 0.9999) * t)


# ---- moving averages --------------------------------------------------------------------------------------


def averaged_by(**options):
    def average(model, steps):
        averaged = swa_utils.AveragedModel(model, use_buffers=True, **options)
        for _ in range(steps):
            averaged.update_parameters(model)
        return averaged.module

    return average


def averaged_by_state_dict(decay):
    """As timm's ModelEmaV2 does it."""

    def average(model, steps):
        averaged = copy.deepcopy(model)
        for _ in range(steps):
            with torch.no_grad():
                pairs = zip(averaged.state_dict().values(), model.state_dict().values(), strict=True)
                for ours, theirs in pairs:
                    ours.copy_(decay * ours + (1.0 - decay) * theirs)
        return averaged

    return average


def averaged_by_hand(decay):
    """Into a model that was made by itself and then loaded, by its buffers."""

    def average(model, steps):
        torch.manual_seed(99)
        averaged = torch.nn.Sequential(SparseLinear(300, 400, 0.1), BlockSparseLinear(400, 37, 0.5, (4, 8)))
        averaged.load_state_dict(model.state_dict())
        for _ in range(steps):
            with torch.no_grad():
                for ours, theirs in zip(averaged.buffers(), model.buffers(), strict=True):
                    ours.copy_(decay * ours + (1.0 - decay) * theirs)
        return averaged

    return average


AVERAGES = {
    "EMA of 0.9999": averaged_by(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9999)),
    "EMA of 0.999": averaged_by(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.999)),
    "EMA of 0.9, one by one": averaged_by(avg_fn=swa_utils.get_ema_avg_fn(0.9)),
    "SWA, one by one": averaged_by(avg_fn=swa_utils.get_swa_avg_fn()),
    "torchvision's function": averaged_by(avg_fn=lambda avg, p, n: 0.9999 * avg + (1 - 0.9999) * p),
    "by state_dict": averaged_by_state_dict(0.9999),
    "by hand": averaged_by_hand(0.9999),
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_an_average_over_parameters_and_buffers_computes_as_the_model(average):
    torch.manual_seed(0)
    model = torch.nn.Sequential(SparseLinear(300, 400, 0.1), BlockSparseLinear(400, 37, 0.5, (4, 8)))
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.5)  # which averages keep, so that only a pattern can make a difference
    averaged, x = average(model, 120), torch.randn(8, 300)
    for ours, theirs in zip(averaged.parameters(), model.parameters(), strict=True):
        with torch.no_grad():
            ours.copy_(theirs)
    assert torch.equal(averaged(x), model(x))
    for ours, theirs in zip(averaged, model, strict=True):
        assert all(map(torch.equal, index_of(ours), index_of(theirs)))


def test_a_slow_average_of_large_numbers_falls_far_and_is_put_back():
    layer = SparseLinear(700, 700, 0.4)  # 196,000 entries
    averaged = averaged_by(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9999))(layer, 60)
    lost = torch.as_tensor(layer.order - averaged.order).max()
    assert lost > 5 and torch.equal(averaged(torch.ones(2, 700)), layer(torch.ones(2, 700)))


@each_layer
def test_the_state_dict_of_an_average_that_was_never_called_is_whole(make):
    layer = make()
    averaged = averaged_by(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9999))(layer, 20)
    assert not all(map(torch.equal, averaged.buffers(), layer.buffers()))
    other = make(1)
    other.load_state_dict(averaged.state_dict())
    assert all(map(torch.equal, index_of(other), index_of(layer)))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_copy_of_a_loaded_model_may_be_averaged_before_its_first_call(how):
    layer, source, x = make(0), make(1), torch.randn(2, 300)
    layer.load_state_dict(source.state_dict())
    twin = copies(layer)[how]
    blur(twin)
    assert torch.equal(twin(x), source(x))


def copies(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "save": torch.load(file, weights_only=False),
    }


def test_copies_share_the_record_of_the_pattern():
    layer = make()
    assert copy.deepcopy(layer)._guard.record is layer._guard.record
    assert layer._guard.record.row_index.dtype == np.uint16


def test_an_average_over_a_pattern_that_has_moved_is_refused():
    model, moved, x = make(0), make(1), torch.randn(2, 300)
    averaged = copy.deepcopy(model)
    for _ in range(5):
        with torch.no_grad():
            for ours, theirs in zip(averaged.buffers(), moved.buffers(), strict=True):
                ours.copy_(0.999 * ours + (1 - 0.999) * theirs)
    with pytest.raises(ValueError, match="no whole pattern.*average.*begin anew"):
        averaged(x)


# ---- what writes into the buffers -----------------------------------------------------------------------------


def replaced(name, change):
    def write(layer):
        layer._buffers[name] = change(layer._buffers[name].clone())

    return write


def in_place(name, write):
    return lambda layer: write(layer._buffers[name])


def swap(t):
    t[[0, 1]] = t[[1, 0]]


WRITES = {
    "a number": in_place("row_index", lambda t: t[3].add_(1)),
    "two numbers swapped": in_place("order", swap),
    "zeros": in_place("col_index", lambda t: t.zero_()),
    "a pointer": in_place("col_ptr", lambda t: t[5].sub_(1)),
    "the other pointers": in_place("row_ptr", lambda t: t[5].add_(1)),
    "a negative number": in_place("order", lambda t: t[0].fill_(-1)),
    "a number beyond the matrix": in_place("row_index", lambda t: t[-1].fill_(10**6)),
    "another tensor": replaced("row_index", lambda t: t.flip(0)),
    "floats": replaced("col_index", lambda t: t.float()),
    "through .data of the tensor": in_place("row_index", lambda t: setattr(t, "data", t.flip(0))),
    "sizes": lambda layer: (layer.sizes[0].add_(1), layer.order.add_(0)),
    "1 more everywhere": lambda layer: [t.add_(1) for t in layer.buffers()],
    "half of another pattern": lambda layer: [
        layer.get_buffer(name).copy_(make(1).get_buffer(name)) for name in ("col_ptr", "row_index")
    ],
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_pattern_that_something_wrote_into_is_refused_by_whatever_reads_it(write):
    layer, x = make(), torch.randn(2, 300)
    layer(x)
    write(layer)
    uses = [lambda: layer(x), lambda: layer.pattern, layer.to_linear, layer.to_sparse, lambda: layer(x)]
    for use in uses:
        with pytest.raises(ValueError, match="hold no whole pattern: .*Load a state_dict"):
            use()


@each_layer
def test_the_first_call_of_a_copy_may_be_under_transforms(make):
    layer, x = make(0), torch.randn(2, make(0).in_features)
    want = torch.func.jacrev(layer)(x)
    torch.testing.assert_close(torch.func.jacrev(copy.deepcopy(layer))(x), want)
    torch.testing.assert_close(torch.func.vmap(copy.deepcopy(layer))(x), layer(x))
    blurred = copy.deepcopy(layer)  # and it is put back there
    for t in blurred.buffers():
        t.copy_((t.float() * 0.999999).to(t.dtype))
    torch.testing.assert_close(torch.func.jacrev(blurred)(x), want)


@each_layer
def test_a_whole_pattern_is_taken_however_it_comes(make):
    source, x = make(1), torch.randn(2, make().in_features)

    def by_buffers(layer):
        for name, t in source.named_buffers():
            layer.get_buffer(name).copy_(t)

    def by_new_tensors(layer):
        for name, t in source.named_buffers():
            setattr(layer, name, t.clone())

    def by_data(layer):
        for name, t in source.named_buffers():
            layer.get_buffer(name).data = t.clone()

    for write in (by_buffers, by_new_tensors, by_data):
        layer = make(0)
        layer(x)
        write(layer)
        layer.weight.data.copy_(source.weight)
        layer.bias.data.copy_(source.bias)
        assert torch.equal(layer(x), source(x))


def test_a_pattern_is_looked_at_once_per_change(monkeypatch):
    looks = []
    look = _index.Guard._examined

    def examined(self, *args):
        looks.append(1)
        return look(self, *args)

    monkeypatch.setattr(_index.Guard, "_examined", examined)
    layer, x = make(), torch.randn(2, 300)
    for expected, change in ((1, lambda: layer.order.add_(0)), (1, lambda: layer.share_memory()), (0, lambda: None)):
        layer(x)
        looks.clear()
        change()
        for _ in range(3):
            layer(x).sum().backward()
        assert len(looks) == expected


def test_a_pattern_of_inference_mode_is_computed_with_and_mended():
    with torch.inference_mode():
        layer, x = make(), torch.randn(2, 300)
        want = dense_product(layer, x)
        torch.testing.assert_close(layer(x), want)
        for name, t in layer.named_buffers():
            setattr(layer, name, torch.clamp(t - 1, min=0).where(t % 7 == 3, t))
        torch.testing.assert_close(layer(x), want)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)
        layer.row_index = layer.row_index.flip(0)
        with pytest.raises(ValueError, match="no whole pattern"):
            layer(x)


def test_threads_that_meet_a_blurred_pattern_all_compute_the_same():
    layer, x = make(), torch.randn(2, 300)
    want, got = layer(x).detach(), []
    blur(layer)
    threads = [threading.Thread(target=lambda: got.append(layer(x).detach())) for _ in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(got) == 6 and all(torch.equal(y, want) for y in got)


def test_patterns_stacked_under_vmap_and_patterns_given_to_functional_call_are_used():
    layers, x = [make(seed) for seed in range(3)], torch.randn(2, 300)
    want = torch.stack([layer(x) for layer in layers]).detach()
    parameters, buffers = func.stack_module_state(layers)
    got = func.vmap(lambda p, b: func.functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(got, want)
    for layer, y in zip(layers, want, strict=True):
        given = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        torch.testing.assert_close(func.functional_call(layers[0], given, (x,)), y)
    torch.testing.assert_close(layers[0](x), want[0])
    half = {**dict(layers[1].named_parameters()), "row_index": layers[1].row_index}
    with pytest.raises(ValueError, match="no whole pattern"):
        func.functional_call(layers[0], half, (x,))


# ---- damage never passes -----------------------------------------------------------------------------------


def random_pattern(rng):
    grid = tuple(int(n) for n in rng.integers(1, 9, 2))
    mask = rng.random(grid) < rng.choice([0.1, 0.5, 0.9])
    cols, rows = np.nonzero(mask.T)
    record = Record.of([np.append(0, np.cumsum(mask.sum(0))), rows], grid)
    whole = record.whole(grid)
    assert whole is not None
    return whole, grid


def test_the_record_gives_back_the_arrays_of_a_pattern():
    for seed, shape in enumerate([(1, 1), (50, 33), (300, 20), (7, 70_000)]):
        pattern = BlockPattern.random(jax.random.key(seed), shape, density=0.3 if seed else 0.0)
        arrays = [np.asarray(a) for a in pattern.index]
        assert fault(arrays, pattern.grid) is None
        for ours, theirs in zip(Record.of(arrays, pattern.grid).whole(pattern.grid) or [], arrays, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_damaged_pattern_never_passes_as_whole():
    """Numbers one less, here and there, as averages leave them; numbers swapped, copied and drawn at random."""
    for seed in range(EXAMPLES):
        rng = np.random.default_rng(seed)
        whole, grid = random_pattern(rng)
        damaged = [a.copy() for a in whole]
        kind, some = seed % 4, [rng.random(a.shape) < rng.choice([0.1, 0.5, 1.0]) for a in whole]
        for a, chosen in zip(damaged, some, strict=True):
            if kind == 0:
                a[chosen] -= 1
            elif kind == 1:
                a[chosen] -= rng.integers(0, 3, chosen.sum(), dtype=np.int32)
            elif kind == 2 and a.size:
                a[rng.integers(a.size)] = a[rng.integers(a.size)]
            elif a.size:
                a[rng.integers(a.size)] = rng.integers(-3, 12)
        same = all(map(np.array_equal, whole, damaged))
        assert (fault(damaged, grid) is None) == same, (seed, whole, damaged)


@pytest.mark.parametrize(
    "arrays, grid, reason",
    [
        ([[0, 2], [1, 0], [0, 1, 2], [0, 0], [1, 0]], (2, 1), "row_index has 1 and then 0 in one line, at 0 and 1"),
        ([[0, 2], [0, 0], [0, 2], [0, 0], [0, 1]], (1, 1), "row_index has 0 and then 0 in one line"),
        ([[0, 1, 2], [0, 0], [0, 2], [1, 0], [1, 0]], (1, 2), "col_index has 1 and then 0 in one line"),
        ([[0, 1, 1], [0], [0, 1], [1], [0]], (1, 2), r"entry 0 is \(0, 1\), but order has it at 0, where \(0, 0\)"),
        ([[0, 2, 1], [0], [0, 1], [0], [0]], (1, 2), "col_ptr falls from 2 to 1 at 2"),
        ([[0, 1], [0], [0, 1], [3], [0]], (1, 1), "col_index has 3 at 0, outside 0 to 0"),
        ([[0, 1], [0], [0, 1], [0.5], [0]], (1, 1), "col_index has 0.5 among its integers"),
    ],
)
def test_views_that_agree_but_are_no_pattern_are_told_apart(arrays, grid, reason):
    assert re.search(reason, fault([np.array(a) for a in arrays], grid) or "whole")


def test_half_of_another_pattern_never_passes_as_whole():
    grid = (6, 7)
    for seed in range(EXAMPLES // 4):
        rng = np.random.default_rng(seed)
        pair = []
        for _ in range(2):
            mask = np.zeros(42, bool)
            mask[rng.choice(42, 12, replace=False)] = True
            mask = mask.reshape(grid)
            pair.append(Record.of([np.append(0, np.cumsum(mask.sum(0))), np.nonzero(mask.T)[1]], grid).whole(grid))
        chosen = rng.integers(0, 2, 5)
        mixed = [pair[k][i] for i, k in enumerate(chosen)]
        is_one = any(all(map(np.array_equal, mixed, p)) for p in pair)
        assert (fault(mixed, grid) is None) == is_one, seed


def test_all_who_name_the_arrays_of_a_pattern_name_them_alike():
    fields = [field.name for field in dataclasses.fields(BlockPattern)]
    assert tuple(fields[:5]) == Index._fields == _lines.Index._fields == NAMES
