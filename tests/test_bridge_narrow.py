"""The index in 16 bits that products of one row read: it is never that of another pattern."""

import pickle

import pytest
import torch

from torch_bridge import SparseLinear, _matrix, dynamic
from torch_bridge._narrow import Narrow

if _matrix.WHY_NOT:
    pytest.skip(f"the kernels can't be called on tensors here: {_matrix.WHY_NOT}", allow_module_level=True)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(_matrix, "_WORTH_NARROWING", 1)


def make(seed: int) -> SparseLinear:
    torch.manual_seed(seed)
    return SparseLinear(40, 30, 0.25)


def loaded(layer, other):
    layer.load_state_dict(other.state_dict())


def assigned(layer, other):
    layer.load_state_dict(other.state_dict(), assign=True)


def copied(layer, other):
    for mine, its in zip(layer.buffers(), other.buffers(), strict=True):
        mine.copy_(its)


def copied_by_data(layer, other):  # as collectives of torch.distributed write, too: no version changes
    for mine, its in zip(layer.buffers(), other.buffers(), strict=True):
        mine.data.copy_(its)


def copied_by_numpy(layer, other):
    for mine, its in zip(layer.buffers(), other.buffers(), strict=True):
        mine.numpy()[...] = its


def replaced(layer, other):
    for name, its in other.named_buffers():
        layer._buffers[name] = its


def memory_replaced(layer, other):
    for mine, its in zip(layer.buffers(), other.buffers(), strict=True):
        mine.data = its.clone()


def moved(layer, _):
    dynamic.set_(layer, None, drop_fraction=0.3)


CHANGES = (loaded, assigned, copied, copied_by_data, copied_by_numpy, replaced, memory_replaced, moved)


def assert_computes_what_it_stores(layer):
    x = torch.randn(1, layer.in_features)
    for _ in range(3):
        torch.testing.assert_close(layer(x), layer.to_linear()(x))


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_after_any_change_of_the_pattern_one_row_meets_the_new_one(change):
    layer, other = make(0), make(1)
    assert_computes_what_it_stores(layer)
    assert layer._matrix._narrow is not None
    before = layer.row_index.clone()
    change(layer, other)
    assert (layer.row_index != before).any()
    assert_computes_what_it_stores(layer)
    for same in (pickle.loads(pickle.dumps(layer)), layer.share_memory(), layer.double()):
        x = torch.randn(1, 40, dtype=same.weight.dtype)
        torch.testing.assert_close(same(x), same.to_linear()(x))


def test_a_write_behind_torchs_back_that_is_out_of_range_is_refused_and_not_cut_to_16_bits():
    layer, x = make(0), torch.randn(1, 40)
    good = layer.row_index.clone()
    assert_computes_what_it_stores(layer)
    for wrong in (2**16, -1, 40):
        layer.row_index.numpy()[...] = wrong
        with pytest.raises(ValueError, match=rf"index {wrong} of entry 0 is not in \[0, 40\)"):
            layer(x)
        layer.row_index.numpy()[...] = good
        assert_computes_what_it_stores(layer)


def test_a_single_number_that_changed_is_found_in_the_end():
    index = torch.arange(1000, dtype=torch.int32)
    narrow = Narrow(index, 2**16)
    copy = narrow()
    assert copy.dtype == torch.uint16 and narrow() is copy
    index.numpy()[777] = 5
    calls = [narrow()[777].item() for _ in range(1000 // 16 + 1)]
    assert calls[-1] == 5


def test_an_index_without_entries_is_read_as_it_is():
    index = torch.empty(0, dtype=torch.int32)
    narrow = Narrow(index, 9)
    assert all(narrow() is index for _ in range(3))
