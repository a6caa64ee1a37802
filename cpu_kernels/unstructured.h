// Products with 1 x 1 blocks: each stored entry meets a whole batch tile.
#pragma once

#include "tiles.h"

namespace jaxsparse_cpu {
namespace {

// Feature slices of a tile that stay in the first-level cache while many lines read them.
constexpr int64_t kSliceBytes = 64 << 10;

// sum[t] += values[k] * tile[index[k]][t] for the line's entries with index below `limit`.
// Short tiles keep several sums, so that one multiply-add need not wait for the last.
template <int L, int NV, class S>
ALWAYS_INLINE int64_t add_entries(Sum<S>* sum, const Sum<S>* tile, const S* values,
                                  const int32_t* index, const int32_t* order, int64_t k,
                                  int64_t end, int64_t limit) {
  using V = Vector<Sum<S>, L>;
  constexpr int kChains = NV >= 4 ? 1 : 8 / NV;
  V acc[kChains][NV] = {};
  const auto add = [&](int64_t e, int chain) {
    const Sum<S>* row = tile + int64_t{index[e]} * (NV * L);
    if (NV > 1) keep_address(row);
    const V a = splat<L>(widen(values[order ? order[e] : e]));
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[chain][v] += a * load<L>(row + v * L);
  };
  if constexpr (kChains > 1) {
    // Indices ascend: if the last of a group is below the limit, all are.
    for (; k + kChains <= end && index[k + kChains - 1] < limit; k += kChains)
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) add(k + c, c);
  }
  for (; k < end && index[k] < limit; ++k) add(k, 0);
#pragma GCC unroll 8
  for (int c = 1; c < kChains; ++c)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[0][v] += acc[c][v];
  // The entries of a slice are summed apart from the rest, so that no sum is one long run.
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) store<L>(sum + v * L, load<L>(sum + v * L) + acc[0][v]);
  return k;
}

// Memory that is read next: it is fetched into the second-level cache meanwhile, a piece at each line.
struct Ahead {
  const char* from;
  int64_t bytes;
};

// Lines [first, last), of each of which the entries [begins, ..) are next.
struct Turn {
  const Lines& lines;
  int64_t first, last;
  const int32_t* begins;
  int32_t* ends;
};

// The entries with an index below `limit` against one tile; sums is [last - first][NV * L].
template <int L, int NV, class S, bool kOrdered>
void add_slice(const Turn& turn, int64_t limit, const S* values, const Sum<S>* tile, Ahead ahead, Sum<S>* sums) {
  constexpr int64_t kLine = 64, kSoon = 2, kEntriesFetched = 48;
  const Lines& lines = turn.lines;
  const int64_t count = turn.last - turn.first, share = ceil_div(ahead.bytes, count * kLine) * kLine;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t b = i * share; b < least((i + 1) * share, ahead.bytes); b += kLine)
      __builtin_prefetch(ahead.from + b, 0, 2);
    if (NV > 1 && i + kSoon < count)  // one vector's visits are long enough for the machine to see the stream
      for (int64_t e = 0; e < kEntriesFetched; e += kLine / 4) {
        __builtin_prefetch(lines.index + turn.begins[i + kSoon] + e);
        __builtin_prefetch(kOrdered ? static_cast<const void*>(lines.order + turn.begins[i + kSoon] + e)
                                    : values + turn.begins[i + kSoon] + e);
      }
    turn.ends[i] = static_cast<int32_t>(add_entries<L, NV, S>(
        sums + i * (NV * L), tile, values, lines.index, kOrdered ? lines.order : nullptr, turn.begins[i],
        lines.ptr[turn.first + i + 1], limit));
  }
}

// A part of the lines, where its sums lie ([tile][line][lane] over a group of tiles), and room for two cursors a line.
template <class A>
struct Part {
  int64_t first, last;
  A* sums;
  int32_t *begins, *ends;
};

// All entries of a part against a group of tiles, slice after slice: a slice's entries stay in the caches for all
// tiles, and a slice of a tile for all lines.
template <class S, int kMost>
void add_part(const Product& p, const Batch<Sum<S>, kMost>& batch, const Round& group, const Sum<S>* tiles,
              Part<Sum<S>> part) {
  using A = Sum<S>;
  const Lines& lines = p.lines;
  const S* values = static_cast<const S*>(p.values);
  const int64_t count = part.last - part.first;
  for (int64_t n = part.first; n < part.last; ++n) part.begins[n - part.first] = lines.ptr[n];
  __builtin_memset(part.sums, 0, (batch.row(group.last) - group.begin) * count * sizeof(A));
  const int64_t first_lanes = batch.lanes(group.begin);
  const int64_t slice = most<int64_t>(1, kSliceBytes / int64_t(first_lanes * sizeof(A)));
  for (int64_t f = 0; f == 0 || f < p.in; f += slice) {
    for (int64_t t = group.first; t < group.last; ++t)
      batch.visit(t, [&](auto tile, int64_t row) {
        constexpr int L = tile.L, NV = tile.NV, T = tile.T;
        const A* here = tiles + (row - group.begin) * p.in;
        const bool last = t + 1 == group.last;
        const int64_t left = least(slice, most<int64_t>(0, last ? p.in - f - slice : p.in - f));
        const A* next = last ? tiles + (f + slice) * first_lanes : here + p.in * T + f * T;
        const Ahead ahead{reinterpret_cast<const char*>(next), left * T * int64_t(sizeof(A))};
        (lines.order ? add_slice<L, NV, S, true> : add_slice<L, NV, S, false>)(
            {lines, part.first, part.last, part.begins, part.ends}, f + slice, values, here, ahead,
            part.sums + (row - group.begin) * count);
      });
    int32_t* ends = part.ends;
    part.ends = part.begins;
    part.begins = ends;
  }
}

constexpr int64_t kLinesPerPart = 512, kLeastLinesPerPart = 64;

// A product with 1 x 1 blocks over batch-minor tiles of at most kMost vectors.
template <class S, int kMost>
bool entries_spmm(const Product& p, const Pool& pool) {
  using A = Sum<S>;
  const Lines& lines = p.lines;
  const Batch<A, kMost> batch(p.m);
  // An entry costs a few cycles of its own, and loads twice as much as a block's.
  const int workers = workers_for(pool, (24. + 2. * batch.padded) * double(lines.entries));
  const int64_t slabs = workers == 1 ? 1 : ceil_div(p.in, 64), tiles_of_group = kGroupTiles<A, kMost>;
  const int64_t step = ceil_div(batch.per_round(sizeof(A) * p.in), tiles_of_group) * tiles_of_group;
  const int64_t groups = most<int64_t>(1, ceil_div(least(step, batch.count), tiles_of_group));
  const int64_t wanted = least(ceil_div(lines.lines, kLeastLinesPerPart), ceil_div(2 * workers, groups));
  const int64_t parts = most(ceil_div(lines.lines, kLinesPerPart), wanted), longest = longest_part(lines, parts);
  const int64_t rows = batch.row(least(step, batch.count)), group_rows = batch.row(least(tiles_of_group, batch.count));
  const int64_t own = ceil_div(longest * (group_rows * sizeof(A) + 8), 64) * 64;
  Scratch packed(sizeof(A) * rows * p.in), sums(own * workers);
  if (!packed.data() || !sums.data()) return false;
  A* tiles = reinterpret_cast<A*>(packed.data());
  Flag wrong;
  Round round{0, 0, 0};
  const auto pack = [&](int64_t task, int) {
    pack_slab<S>(batch, round, static_cast<const S*>(p.x), p.in, task, slabs, tiles);
    if (round.first == 0 && task < slabs &&
        !in_range(lines, line_of_part(lines, task, slabs), line_of_part(lines, task + 1, slabs)))
      wrong.raise();
  };
  const auto multiply = [&](int64_t task, int worker) {
    if (wrong.up()) return;
    const int64_t begin = round.first + task / parts * tiles_of_group, at = batch.row(begin);
    const Round group{begin, least(begin + tiles_of_group, round.last), at};
    A* sum = reinterpret_cast<A*>(sums.data() + own * worker);
    int32_t* cursors = reinterpret_cast<int32_t*>(sum + longest * group_rows);
    const Part<A> part{line_of_part(lines, task % parts, parts), line_of_part(lines, task % parts + 1, parts), sum,
                       cursors, cursors + longest};
    if (part.first == part.last) return;
    add_part<S>(p, batch, group, tiles + (at - round.begin) * p.in, part);
    for (int64_t t = group.first; t < group.last; ++t)
      batch.visit(t, [&](auto tile, int64_t row) {
        const A* from = sum + (row - at) * (part.last - part.first);
        for (int64_t c = part.first; c < part.last; c += tile.L)
          unpack_tile<tile.L, tile.NV>(from + (c - part.first) * tile.T, row, p.m, p.out, c,
                                       least<int64_t>(tile.L, part.last - c), static_cast<const S*>(p.bias),
                                       p.activation, static_cast<S*>(p.y));
      });
  };
  batch.in_rounds(step, [&](const Round& next) {
    round = next;
    const int64_t count = round.last - round.first;
    const Phase phases[] = {phase(count * slabs, pack), phase(ceil_div(count, tiles_of_group) * parts, multiply)};
    run_phases(pool, workers, phases, 2);
    return !wrong.up();
  });
  return !wrong.up();
}

}  // namespace
}  // namespace jaxsparse_cpu
