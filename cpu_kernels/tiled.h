// The products over batch-minor tiles: of single entries, and of blocks shorter than a vector.
#pragma once

#include "short_blocks.h"
#include "unstructured.h"

namespace jaxsparse_cpu {
namespace {

// A product over batch-minor tiles of at most kMost vectors; kBlocks: of blocks, not of single entries.
template <class S, int kMost, bool kBlocks>
bool tiled_spmm(const Product& p, const Pool& pool) {
  using A = Sum<S>;
  const S* x = static_cast<const S*>(p.x);
  const Lines& lines = p.lines;
  const Batch<A, kMost> batch(p.m);
  // An entry costs a few cycles of its own, and loads twice as much as a block's.
  const double each = kBlocks ? double(batch.padded * p.depth * p.width)
                              : kFmasPerEntry + kFmasPerEntryAndRow * double(batch.padded);
  const int workers = workers_for(pool, each * double(lines.entries));
  const int64_t slabs = workers == 1 ? 1 : ceil_div(p.in, kFeaturesPerSlab);
  const int64_t parts = most<int64_t>(1, ceil_div(lines.lines * p.width, kColumnsPerTask));
  const int64_t own = kMost * kVectorBytes * p.width * lines.lines;
  const int64_t step = batch.per_round(sizeof(A) * p.in), rows = batch.row(least(step, batch.count));
  const int64_t feature_bytes = sizeof(A) * most<int64_t>(1, batch.lanes(0));
  const int64_t slice_bytes = batch.count == 1 ? kOnlySliceBytes : kSliceBytes;
  const Slices slices = slices_of(lines, p.in, feature_bytes, slice_bytes, kEntriesPerSlice);
  Scratch packed(sizeof(A) * rows * p.in), sums(own * workers);
  // With one tile, lines are prepared where they are used, so that memory sends them once, and values of another
  // order are read where they lie. Several tiles get them put in order.
  const bool late = batch.count == 1, copied = !kBlocks && lines.order && !late;
  Scratch cuts(kBlocks ? 1 : sizeof(int32_t) * slices.starts(lines)), in_order(copied ? sizeof(S) * lines.entries : 1);
  if (!packed.data() || !sums.data() || !cuts.data() || !in_order.data()) return false;
  A* tiles = reinterpret_cast<A*>(packed.data());
  int32_t* starts = reinterpret_cast<int32_t*>(cuts.data());
  S* ordered = reinterpret_cast<S*>(in_order.data());
  const S *stored = static_cast<const S*>(p.values), *values = copied ? ordered : stored;
  Flag wrong;
  // Whether the indices of these lines are in range; single entries are then cut into slices.
  const auto prepare = [&](int64_t first, int64_t last) {
    if (!in_range(lines, first, last)) return false;
    if (!kBlocks) find_starts(lines, slices, first, last, 1, starts);
    if (copied)
      for (int64_t k = lines.ptr[first]; k < lines.ptr[last]; ++k) ordered[k] = stored[lines.order[k]];
    return true;
  };
  Round round{0, 0, 0};
  const auto packed_at = [&](int64_t row) { return tiles + (row - round.begin) * p.in; };
  const auto pack = [&](int64_t task, int) {
    const int64_t s = task % slabs;
    batch.visit(round.first + task / slabs, [&](auto tile, int64_t row) {
      pack_tile<tile.L, tile.NV>(x, p.m, p.in, row, slab_begin(p.in, s, slabs),
                                 slab_begin(p.in, s + 1, slabs), packed_at(row));
    });
    if (!late && round.first == 0 && task < slabs &&
        !prepare(line_of_part(lines, s, slabs), line_of_part(lines, s + 1, slabs)))
      wrong.raise();
  };
  const auto multiply = [&](int64_t task, int worker) {
    if (wrong.up()) return;
    const int64_t first = line_of_part(lines, task % parts, parts);
    const int64_t last = line_of_part(lines, task % parts + 1, parts);
    if (late && !prepare(first, last)) return wrong.raise();
    A* sum = reinterpret_cast<A*>(sums.data() + own * worker);
    batch.visit(round.first + task / parts, [&](auto tile, int64_t row) {
      constexpr int L = tile.L, NV = tile.NV;
      const Part<S> part{p, first, last, packed_at(row), sum};
      if constexpr (kBlocks)
        (p.transposed ? add_blocks<L, NV, S, true> : add_blocks<L, NV, S, false>)(part);
      else
        (lines.order && !copied ? add_part<L, NV, S, true> : add_part<L, NV, S, false>)(part, values, slices, starts);
      const int64_t end = least(last * p.width, p.out);
      unpack_tile<L, NV>(sum, row, p.m, p.out, first * p.width, end, static_cast<const S*>(p.bias), p.activation,
                         static_cast<S*>(p.y));
    });
  };
  batch.in_rounds(step, [&](const Round& next) {
    round = next;
    const int64_t count = round.last - round.first;
    const Phase phases[] = {phase(count * slabs, pack), phase(count * parts, multiply)};
    run_phases(pool, workers, phases, 2);
    return !wrong.up();
  });
  return !wrong.up();
}

}  // namespace
}  // namespace jaxsparse_cpu
