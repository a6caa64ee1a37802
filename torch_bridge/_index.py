"""The index buffers of a layer: checked once per change, and mended where a moving average has blurred them.

Frameworks write into buffers: loaders, broadcasts, averages. A product over half a pattern would be wrong without a
word, so a layer reaches its buffers through its `Guard`. What a guard cannot see is a write behind torch's back:
through `.data`, through NumPy, by a collective of torch.distributed such as `broadcast`, or by another process in
shared memory. Products read what is there then; indices out of range are refused all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torch_bridge._watch import unseen
from torch_bridge._whole import NAMES, Record, fault

SMALL = 2**15  # entries that are all looked at while they are loaded; of more, some, and all at the next call
Buffers = Mapping[str, Any]  # tensors, by name
_NOTHING = ((None,) * len(NAMES), (), ())
_WAYS_OUT = (
    "Load a state_dict that has the whole pattern, or copy all five of a layer that has it; reset_parameters() puts "
    "the last one back, with new numbers. A moving average of a model whose pattern moved must begin anew."
)
_LACKS_PATTERN = (
    "the weight was loaded without its pattern, and nothing says that this layer's own is the same: the numbers may be "
    "at other places. Save and load the whole state_dict(). If it is the same, load it along with them: "
    "model.load_state_dict({**copy.deepcopy(dict(model.named_buffers())), **saved}, strict=False)."
)
_one_at_a_time = threading.RLock()  # no thread reads what another is putting back
_is_wrapped = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", lambda t: True)


class Guard:
    """Hands out the five index buffers of one layer, in the order of `NAMES`, as a whole pattern or not at all.

    To look whether they changed takes less than a microsecond: the same tensors, of the same versions, at the same
    addresses. After a change everything is looked at, once. A whole pattern is accepted and remembered. Buffers that
    hold a moving average of equal patterns, which differs from them by rounding alone, are put back. Anything else is
    refused.

    Not checked, as there are no numbers to read: under torch.compile and torch.export, under torch.func.vmap over the
    buffers themselves, on the meta device, and in tensor subclasses such as DTensor. Buffers that were made under
    torch.inference_mode have no versions: they are checked when they are new.

    Args:
      sizes: what the layer's buffer `sizes` holds.
      grid: (rows, columns) of the stored matrix, in blocks.
      record: the pattern, where it is known whatever the buffers hold.
    """

    def __init__(self, sizes: tuple[int, ...], grid: tuple[int, int], record: Record | None = None):
        self.sizes, self.grid, self.record = sizes, grid, record
        self.lacks_pattern = False  # whether values were loaded last without the pattern that they belong to
        self._loaded_ahead = False  # whether a pattern was loaded last without values
        self._source: _Source | None = None  # what was loaded last, until it has been looked at
        self._seen: tuple = _NOTHING

    def __getstate__(self) -> dict[str, Any]:  # copies share the record, and look for themselves
        return {**self.__dict__, "_seen": _NOTHING, "_source": None}

    def __deepcopy__(self, memo) -> Guard:
        twin = object.__new__(Guard)
        twin.__dict__.update(self.__getstate__())
        return twin

    def __call__(self, buffers: Buffers) -> tuple[Tensor, ...]:
        """The index buffers.

        Raises:
          ValueError: if they hold no whole pattern, or not the one that the values were saved with.
        """
        if is_dynamo_compiling():
            return tuple([buffers[name] for name in NAMES])
        index, versions, places = self._seen
        a, b, c, d, e = index
        if (
            buffers["col_ptr"] is a
            and buffers["row_index"] is b
            and buffers["row_ptr"] is c
            and buffers["col_index"] is d
            and buffers["order"] is e
        ):
            try:
                if (a._version, b._version, c._version, d._version, e._version) == versions:
                    if (a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), e.data_ptr()) == places:
                        return index
            except RuntimeError:
                pass  # tensors of inference mode have no versions
        return self._look(buffers)

    def settle(self, buffers: Buffers, saving: bool = False) -> None:
        """Looks at the buffers, and mends them, before they are copied or saved; does not say what is wrong with them.

        Raises:
          ValueError: when values would be saved with a pattern that is not known to be theirs.
        """
        if saving and self.lacks_pattern:
            raise ValueError(_LACKS_PATTERN)
        try:
            self(buffers)
        except ValueError:
            pass  # loading it, or the next call, will say

    def fill(self, buffers: Buffers, arrays: Sequence[Any]) -> None:
        """Writes a whole pattern, which is then known, into the buffers."""
        arrays = [np.asarray(a) for a in arrays]
        with torch.no_grad(), torch.inference_mode(buffers["order"].is_inference()):
            for name, a in zip((*NAMES, "sizes"), (*arrays, np.array(self.sizes)), strict=True):
                buffers[name].copy_(torch.from_numpy(a.astype(np.int32)))
        self.record, self.lacks_pattern, self._source = Record.of(arrays, self.grid), False, None
        self._seen = _state(tuple(buffers[name] for name in NAMES))

    def put_back(self, buffers: Buffers) -> bool:
        """Writes the pattern that is known into buffers that hold no whole one; whether one is known."""
        self.lacks_pattern = False
        if self.record is None and self._source is None:
            return False
        try:
            self(buffers)
        except ValueError:
            whole = self.record and self.record.whole(self.grid)
            if whole is None:
                return False
            self.fill(buffers, whole)
        return True

    # ---- loading ----------------------------------------------------------------------------------------------

    def misfit(self, saved: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> str | None:
        """Why saved tensors don't belong in a layer of these shapes, if they don't; of a large pattern some entries are
        looked at.

        Of arrays that come in parts, as loaders of sharded checkpoints bring them, the next call will judge.
        """
        sizes = saved.get("sizes")
        if sizes is not None and not sizes.is_meta and sizes.tolist() != list(self.sizes):
            return (
                f"the saved pattern has (in, out, block in, block out, transposed) = {sizes.tolist()}, this "
                f"layer {list(self.sizes)}. Make the layer with the sizes and block of the saved one."
            )
        for name, shape in shapes.items():
            t = saved.get(name)
            if t is not None and t.shape != shape:
                return (
                    f"size mismatch for {name}: {list(t.shape)} was saved, and this layer has {list(shape)}. "
                    "Make the layer with the density of the saved one: its pattern may differ, but not how much it "
                    "stores."
                )
        return self._saved_fault([saved[name] for name in NAMES if name in saved])

    def _saved_fault(self, tensors: list[Tensor]) -> str | None:
        if len(tensors) < len(NAMES) or not _readable(tensors) or not all(t.is_cpu for t in tensors):
            return None
        arrays = [t.numpy() for t in tensors]
        wrong = fault(arrays, self.grid, sample=arrays[-1].size > SMALL and all(a.dtype.kind != "f" for a in arrays))
        if wrong is None:
            return None
        return (
            f"the saved pattern is not whole: {wrong}. Take {', '.join(NAMES)} and sizes from a state_dict that was "
            "not averaged or edited."
        )

    def loaded(self, buffers: Buffers, saved: Mapping[str, Tensor]) -> None:
        """Notes what `load_state_dict` has just brought."""
        values = any(name.startswith(("weight", "parametrizations.weight")) for name in saved)
        self._seen = _NOTHING
        if any(name in saved for name in NAMES):
            self.lacks_pattern, self._loaded_ahead = False, not values
            self._source = _Source.of([saved.get(name) for name in NAMES[:2]])
            if "sizes" not in saved:  # it need not have been filled
                buffers["sizes"].copy_(torch.tensor(self.sizes))
        elif values:
            self.lacks_pattern, self._loaded_ahead = not (self._loaded_ahead or self._is_only_one(buffers)), False

    def _is_only_one(self, buffers: Buffers) -> bool:
        """Whether there is no other pattern of this size: all blocks, or none."""
        return buffers["order"].numel() in (0, self.grid[0] * self.grid[1])

    # ---- after a change ----------------------------------------------------------------------------------------

    def _look(self, buffers: Buffers) -> tuple[Tensor, ...]:
        index = tuple([buffers[name] for name in NAMES])
        with _one_at_a_time:
            if self.lacks_pattern:
                raise ValueError(_LACKS_PATTERN)
            if _readable((*index, buffers["sizes"])):
                state = _state(index)  # before the numbers: what is written meanwhile is seen at the next call
                if state[1:] != self._seen[1:] or any(a is not b for a, b in zip(index, self._seen[0], strict=True)):
                    with unseen():  # by modes and transforms, whose tensors need have no numbers
                        self._seen = self._examined(buffers, index, state)
                    self._loaded_ahead = False
        return index

    def _examined(self, buffers: Buffers, index: tuple[Tensor, ...], state: tuple) -> tuple:
        """The state of buffers that hold a whole pattern, in the end."""
        arrays, sizes = [t.cpu().numpy() for t in index], buffers["sizes"].cpu().numpy()
        floats = [f"{name} is {t.dtype}" for name, t in zip(NAMES, index, strict=True) if t.is_floating_point()]
        wrong = floats[0] if floats else fault(arrays, self.grid)
        if wrong is None and sizes.tolist() != list(self.sizes):
            wrong = f"sizes is {sizes.tolist()}, and this layer's sizes are {list(self.sizes)}"
        if wrong is None:
            if self.record is None or not all(map(np.array_equal, self.record, arrays)):
                self.record = Record.of(arrays, self.grid)
            self._source = None
            return state
        record = (self._source and self._source.record(self.grid)) or self.record
        whole = record and record.whole(self.grid)
        if whole is None or not self._is_average([*arrays, sizes], [*whole, np.array(self.sizes)]):
            raise ValueError(self._refusal(wrong))
        self.fill(buffers, whole)
        return self._seen

    def _is_average(self, arrays: list[np.ndarray], whole: list[np.ndarray]) -> bool:
        """Whether all numbers are what rounding makes of the numbers of `whole`: equal ones of equal ones.

        Averages of float32 that are cut to integers lose 1 at first; where rounding outweighs what an average gains,
        as it does for large numbers and slow averages, they go on falling, to some hundredths of the number.
        """
        if any(a.dtype.kind not in "iu" for a in arrays):
            return False
        number = np.arange(1 + max(int(a.max(initial=0)) for a in whole))
        image = number.copy()
        for before, now in zip(whole, arrays, strict=True):
            image[before] = now
        near = (image >= number - 1 - number // 16) & (image <= number + (number >> 20))
        return bool(near.all()) and all((image[before] == now).all() for before, now in zip(whole, arrays, strict=True))

    def _refusal(self, wrong: str) -> str:
        if self.record is None:
            return (
                f"the pattern of this layer was never filled: {wrong}. A layer made on the meta device, or by "
                "skip_init, has one after reset_parameters(), which draws it anew, or load_state_dict()."
            )
        return (
            f"the index buffers of this layer hold no whole pattern: {wrong}. Something wrote into them, or to_empty() "
            f"took their memory. {_WAYS_OUT}"
        )


class _Source(NamedTuple):
    """Tensors that were loaded: a record as long as nobody writes into them, for which nothing had to be copied."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, tensors: list[Tensor | None]) -> _Source | None:
        given = tuple(t for t in tensors if t is not None)
        if len(given) < len(tensors) or not _readable(given) or any(t.is_inference() for t in given):
            return None
        return cls(given, tuple(t._version for t in given))

    def record(self, grid: tuple[int, int]) -> Record | None:
        if tuple(t._version for t in self.tensors) != self.versions:
            return None
        return Record.of([t.detach().cpu().numpy() for t in self.tensors], grid)


# ---- tensors -----------------------------------------------------------------------------------------------------


def _readable(tensors: Sequence[Tensor]) -> bool:
    """Whether these are plain tensors that hold numbers now."""
    return not torch.compiler.is_compiling() and all(
        type(t) in (Tensor, nn.Parameter) and not t.is_meta and not _is_wrapped(t) for t in tensors
    )


def _state(index: tuple[Tensor, ...]) -> tuple:
    versions = tuple(-1 if t.is_inference() else t._version for t in index)
    return index, versions, tuple(t.data_ptr() for t in index)
