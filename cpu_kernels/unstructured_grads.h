// Gradients with 1 x 1 blocks: the sampled product, alone or with dx in the same pass.
#pragma once

#include "tiles.h"

namespace jaxsparse_cpu {
namespace {

// Vectors of a tile: with 32 registers a whole tile of 8 is held twice, as operand and as sum,
// and one sum across lanes serves twice the batch.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kGradVectors = 8;
#else
constexpr int kGradVectors = 4;
#endif

// Features of a group of tiles that stay in the second-level cache while all lines read them; up to four times
// as many where a line would meet too few entries in a slice to pay for coming back to it.
constexpr int64_t kGradSliceBytes = 128 << 10;
constexpr int64_t kEntriesPerVisit = 24;

int64_t grad_slice(const Lines& lines, int64_t features, int64_t feature_bytes) {
  const int64_t least_slice = most<int64_t>(1, kGradSliceBytes / feature_bytes);
  int64_t slice = least_slice;
  while (slice < 4 * least_slice && lines.entries * slice < kEntriesPerVisit * lines.lines * features) slice *= 2;
  return slice;
}

// The operand whose features are the lines (own), the one that is gathered (other), results.
template <class S>
struct Grads {
  const Lines& lines;
  int64_t m, own_width, other_width;
  const S *own, *other, *values;
  S *dvalues, *dx;
};

// Entries of a line that meet one tile after the other, while their partial sums wait in the first-level cache.
constexpr int64_t kEntriesPerRun = 64;

// Some entries of one line: for each of them a vector of sums that are not yet added up across lanes.
template <class A, int kWide>
struct Run {
  static constexpr int L = kWide;
  const int32_t* index;
  int64_t count;
  alignas(64) A values[kEntriesPerRun], partial[kEntriesPerRun * L];
};

// One tile:  partial[i] += own * other[index[i]], lane by lane, and, if kBoth,  out += values[i] * other[index[i]].
// An entry's gathered vectors feed both products, so loads are half of the multiply-adds.
template <int L, int NV, bool kBoth, class A, int kWide>
void meet_tile(Run<A, kWide>& run, const A* own_row, const A* other, A* out) {
  using V = Vector<A, L>;
  V own[NV], sum[NV] = {};
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) own[v] = load<L>(own_row + v * L);
  for (int64_t i = 0; i < run.count; ++i) {
    const A* row = other + int64_t{run.index[i]} * (NV * L);
    keep_address(row);
    const V a = splat<L>(kBoth ? run.values[i] : A(0));
    A* to = run.partial + i * kWide;
    V dot[2] = {load<L>(to), V{}};
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      V there = load<L>(row + v * L);
      if (kBoth) keep(there);
      dot[v % 2] += own[v] * there;
      if (kBoth) sum[v] += a * there;
    }
    store<L>(to, NV > 1 ? dot[0] + dot[1] : dot[0]);
  }
  if (kBoth)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store<L>(out + v * L, load<L>(out + v * L) + sum[v]);
}

// A group of tiles, which an entry meets together, so that one sum across lanes serves them all.
template <class A>
struct Group {
  int64_t first, last, row;  // tiles [first, last), of which the first begins at batch row `row`
  bool starts, ends;         // the batch
  const A *own, *other;      // its tiles
  A *sums, *dots;            // dots: in the order of the lines, for a batch of several groups
  int32_t* cursors;
};

// The sums of entries [k, k + run.count) across lanes, to where they belong.
template <class S, int L>
void finish_run(const Grads<S>& g, const Group<Sum<S>>& group, Run<Sum<S>, L>& run, int64_t k) {
  using A = Sum<S>;
  const int32_t* order = g.lines.order;
  for (int64_t i = 0; i < run.count; i += L) {
    const int64_t count = least<int64_t>(L, run.count - i), at = k + i;
    Vector<A, L> r[L];
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) r[j] = load<L>(run.partial + (i + j) * L);
    Vector<A, L> dots = sums<L>(r);
    if (!group.starts) dots += load_some<L>(group.dots + at, count);
    if (!group.ends) {
      store_some<L>(group.dots + at, dots, count);
    } else if (!order) {
      store_some<L>(g.dvalues + at, dots, count);
    } else {
      A lanes[L];
      store<L>(lanes, dots);
      for (int64_t j = 0; j < count; ++j) narrow(g.dvalues + order[at + j], lanes[j]);
    }
  }
}

// Entries [k, end) of line n, the `place`-th of `places`, against all tiles of a group.
template <class S, bool kBoth, int L>
void visit_line(const Grads<S>& g, const Batch<Sum<S>, kGradVectors>& batch, const Group<Sum<S>>& group, int64_t n,
                int64_t place, int64_t places, int64_t k, int64_t end, Run<Sum<S>, L>& run) {
  using A = Sum<S>;
  for (; k < end; k += kEntriesPerRun) {
    run.index = g.lines.index + k;
    run.count = least(kEntriesPerRun, end - k);
    if (kBoth)
      for (int64_t i = 0; i < run.count; ++i) run.values[i] = widen(g.values[g.lines.order[k + i]]);
    for (int64_t i = 0; i < run.count; i += L)
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) store<L>(run.partial + (i + j) * L, Vector<A, L>{});
    for (int64_t t = group.first; t < group.last; ++t)
      batch.visit(t, [&](auto tile, int64_t row) {
        const int64_t at = row - group.row;
        if constexpr (tile.L <= L)
          meet_tile<tile.L, tile.NV, kBoth>(run, group.own + at * g.own_width + n * tile.T,
                                            group.other + at * g.other_width,
                                            group.sums + at * places + place * tile.T);
      });
    finish_run<S>(g, group, run, k);
  }
}

// The first of [k, end) whose index is at least `limit`: near k, and the entries before it are about to be read.
int64_t seek(const int32_t* index, int64_t k, int64_t end, int64_t limit) {
  while (k + 16 <= end && index[k + 15] < limit) k += 16;
  while (k < end && index[k] < limit) ++k;
  return k;
}

// Asks for what `count` entries from k on will gather and scatter, and for the index of those from `later` on.
template <class S>
void fetch_early(const Grads<S>& g, int64_t k, int64_t end, int64_t later) {
  const int32_t* order = g.lines.order;
  for (; k < end; ++k) {
    __builtin_prefetch(g.values + order[k]);
    __builtin_prefetch(g.dvalues + order[k], 1);
  }
  for (int64_t i = 0; i < 64; i += 16) {
    __builtin_prefetch(g.lines.index + later + i);
    __builtin_prefetch(order + later + i);
  }
}

// Lines [first, last) against a group of tiles of at most L lanes a vector, slice after slice of the gathered operand.
template <class S, bool kBoth, int L>
void visit_lines_by(const Grads<S>& g, const Batch<Sum<S>, kGradVectors>& batch, const Group<Sum<S>>& group,
                    int64_t first, int64_t last) {
  using A = Sum<S>;
  const Lines& lines = g.lines;
  const int64_t places = last - first, rows = batch.row(group.last) - group.row;
  Run<A, L> run;
  for (int64_t n = first; n < last; ++n) group.cursors[n - first] = lines.ptr[n];
  if (kBoth) __builtin_memset(group.sums, 0, places * rows * sizeof(A));
  const int64_t slice = grad_slice(lines, g.other_width, rows * sizeof(A));
  for (int64_t f = slice;; f += slice) {
    for (int64_t n = first; n < last; ++n) {
      int32_t& k = group.cursors[n - first];
      const int64_t end = lines.ptr[n + 1];
      const int64_t stop = f < g.other_width ? seek(lines.index, k, end, f) : end;
      if (kBoth && rows > L && n + 2 < last) {
        const int64_t next = group.cursors[n + 1 - first];
        fetch_early<S>(g, next, least<int64_t>(next + stop - k, lines.ptr[n + 2]), group.cursors[n + 2 - first]);
      }
      visit_line<S, kBoth>(g, batch, group, n, n - first, places, k, stop, run);
      k = static_cast<int32_t>(stop);
    }
    if (f >= g.other_width) break;
  }
}

// The same, and dx of the group.
template <class S, bool kBoth>
void visit_lines(const Grads<S>& g, const Batch<Sum<S>, kGradVectors>& batch, const Group<Sum<S>>& group,
                 int64_t first, int64_t last) {
  const int64_t places = last - first;
  if (group.last - group.first > 1)
    visit_lines_by<S, kBoth, kLanes<Sum<S>>>(g, batch, group, first, last);
  else
    batch.visit(group.first, [&](auto tile, int64_t) { visit_lines_by<S, kBoth, tile.L>(g, batch, group, first, last); });
  if (!kBoth) return;
  for (int64_t t = group.first; t < group.last; ++t)
    batch.visit(t, [&](auto tile, int64_t row) {
      for (int64_t n = first; n < last; n += tile.L)
        unpack_tile<tile.L, tile.NV, S>(group.sums + (row - group.row) * places + (n - first) * tile.T, row, g.m,
                                        g.own_width, n, least<int64_t>(tile.L, last - n), nullptr, Activation::none,
                                        g.dx);
    });
}

// Lines of a part at most: their sums and operands pass through the second-level cache beside a slice.
constexpr int64_t kGradLinesPerPart = 1024;

template <class S, bool kBoth>
bool unstructured_outer(const Grads<S>& g, const Pool& pool) {
  using A = Sum<S>;
  const Lines& lines = g.lines;
  const Batch<A, kGradVectors> batch(g.m);
  const int workers = workers_for(pool, (kBoth ? 2. : 1.) * double(g.m) * double(lines.entries));
  const int64_t slabs = workers == 1 ? 1 : 16, tiles_of_group = kGroupTiles<A, kGradVectors>;
  const int64_t parts = most<int64_t>(workers == 1 ? 1 : workers * 2, ceil_div(lines.lines, kGradLinesPerPart));
  const int64_t pair = g.own_width + g.other_width, longest = longest_part(lines, parts);
  const int64_t step = ceil_div(batch.per_round(sizeof(A) * pair), tiles_of_group) * tiles_of_group;
  const int64_t rows = batch.row(least(step, batch.count)), group_rows = batch.row(least(tiles_of_group, batch.count));
  const int64_t own_scratch = ceil_div(longest * (4 + (kBoth ? group_rows * sizeof(A) : 0)), 64) * 64;
  Scratch packed(sizeof(A) * rows * pair), sums(own_scratch * workers);
  Scratch dots(batch.count > tiles_of_group ? sizeof(A) * lines.entries : 0);
  if (!packed.data() || !sums.data() || !dots.data()) return false;
  A* own_tiles = reinterpret_cast<A*>(packed.data());
  A* other_tiles = own_tiles + rows * g.own_width;
  Flag wrong;
  Round round{0, 0, 0};
  const auto pack = [&](int64_t task, int) {
    if (task / slabs < round.last - round.first) {
      pack_slab<S>(batch, round, g.own, g.own_width, task, slabs, own_tiles);
      pack_slab<S>(batch, round, g.other, g.other_width, task, slabs, other_tiles);
    } else if (const int64_t s = task % slabs;
               !in_range(lines, line_of_part(lines, s, slabs), line_of_part(lines, s + 1, slabs))) {
      wrong.raise();
    }
  };
  const auto multiply = [&](int64_t part, int worker) {
    if (wrong.up()) return;
    const int64_t first = line_of_part(lines, part, parts), last = line_of_part(lines, part + 1, parts);
    A* sum = reinterpret_cast<A*>(sums.data() + own_scratch * worker);
    int32_t* cursors = reinterpret_cast<int32_t*>(sum + (kBoth ? longest * group_rows : 0));
    for (int64_t t = round.first; t < round.last; t += tiles_of_group) {
      const int64_t end = least(t + tiles_of_group, round.last), row = batch.row(t), at = row - round.begin;
      const Group<A> group{t, end, row, t == 0, end == batch.count, own_tiles + at * g.own_width,
                           other_tiles + at * g.other_width, sum, reinterpret_cast<A*>(dots.data()), cursors};
      visit_lines<S, kBoth>(g, batch, group, first, last);
    }
    if (batch.count == 0)
      for (int64_t k = lines.ptr[first]; k < lines.ptr[last]; ++k) narrow(g.dvalues + k, A(0));
  };
  batch.in_rounds(step, [&](const Round& next) {
    round = next;
    const int64_t checks = round.first == 0 ? slabs : 0;
    const Phase phases[] = {phase((round.last - round.first) * slabs + checks, pack), phase(parts, multiply)};
    run_phases(pool, workers, phases, 2);
    return !wrong.up();
  });
  return !wrong.up();
}

}  // namespace
}  // namespace jaxsparse_cpu
