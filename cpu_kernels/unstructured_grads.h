// Gradients with 1 x 1 blocks: the sampled product, alone or with dx in the same pass.
#pragma once

#include "slices.h"

namespace jaxsparse_cpu {
namespace {

// One tile against a chunk of lines. For entry k of line n:
//   dots[k] += <own[n], other[index[k]]>    and, if kBoth,    sum[n] += values[k] * other[...]
// `gathered` and `dots` lie in the order of the lines, so that only the first tile reads values
// through `order`, and only the last one writes dvalues through it: both jump about in memory.
// The values of a line are gathered while the one before is multiplied.
template <class S>
struct Pass {
  const Sum<S>*own, *other;  // tiles
  const S* values;
  Sum<S>*gathered, *dots, *partial;  // partial: [L][L], any finished numbers
  S* dvalues;
  bool first, last;
};

// One entry: its gathered vectors feed both products, so loads are half of the multiply-adds.
template <int L, int NV, bool kBoth, class A>
ALWAYS_INLINE Vector<A, L> meet(const A* row, A value, const Vector<A, L> (&own)[NV],
                                Vector<A, L> (&sum)[NV]) {
  const Vector<A, L> a = splat<L>(value);
  Vector<A, L> dot[2] = {};
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    Vector<A, L> other = load<L>(row + v * L);
    if (kBoth) keep(other);
    dot[v % 2] = v < 2 ? own[v] * other : dot[v % 2] + own[v] * other;
    if (kBoth) sum[v] += a * other;
  }
  return NV > 1 ? dot[0] + dot[1] : dot[0];
}

// meet(i) for i in [first, first + N), each summed across its lanes as far as N: of all L, lane i is the sum of
// meet(i). Adding two of them up at a time keeps few in registers.
template <int N, int L, class Meet>
ALWAYS_INLINE auto sums_of(const Meet& meet, int first) {
  if constexpr (N == 1) {
    return meet(first);
  } else {
    using Lanes = typename Count<L>::type;
    const auto a = sums_of<N / 2, L>(meet, first), b = sums_of<N / 2, L>(meet, first + N / 2);
    return interleave<L, N / 2, false>(a, b, Lanes{}) + interleave<L, N / 2, true>(a, b, Lanes{});
  }
}

// Entries [k, end) of line n, L at a time, whose dots are summed across lanes together; fresh: the line's first ones.
template <int L, int NV, bool kBoth, class S>
void pass_line(const Lines& lines, int64_t n, int64_t k, int64_t end, const Pass<S>& p,
               Sum<S>* out, bool fresh) {
  using A = Sum<S>;
  using V = Vector<A, L>;
  constexpr int T = NV * L;
  const int32_t* order = lines.order;
  V own[NV], sum[NV] = {};
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    own[v] = load<L>(p.own + n * T + v * L);
  }
  for (; k < end; k += L) {
    const int64_t count = least<int64_t>(L, end - k);
    const auto meet_at = [&](int i) __attribute__((always_inline)) {
      const A* row = p.other + int64_t{lines.index[k + i]} * T;
      keep(row);
      return meet<L, NV, kBoth>(row, kBoth ? p.gathered[k + i] : A(0), own, sum);
    };
    V dots;
    if (count == L) {
      dots = sums_of<L, L>(meet_at, 0);
    } else {
      for (int i = 0; i < count; ++i) store<L>(p.partial + i * L, meet_at(i));
      V r[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) r[i] = load<L>(p.partial + i * L);
      dots = sums<L>(r);
    }
    if (!p.first) dots += load_some<L>(p.dots + k, count);
    if (!p.last) {
      store_some<L>(p.dots + k, dots, count);
    } else if (!kBoth) {
      store_some<L>(p.dvalues + k, dots, count);
    } else {
      A lanes[L];
      store<L>(lanes, dots);
      for (int64_t i = 0; i < count; ++i) round_to(p.dvalues + order[k + i], lanes[i]);
    }
  }
  if (kBoth && fresh) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store<L>(out + v * L, sum[v]);
  } else if (kBoth) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store<L>(out + v * L, load<L>(out + v * L) + sum[v]);
  }
}

// The operand whose features are the lines (own), the one that is gathered (other), results.
template <class S>
struct Grads {
  Lines lines;
  int64_t m, own_width, other_width;
  const S *own, *other, *values;
  S *dvalues, *dx;
};

// Everything a chunk of lines needs, tile after tile: the sum over the batch has one order.
template <class S, bool kBoth>
void pass_chunk(const Grads<S>& g, const Batch<Sum<S>, kGradVectors>& batch, const Round& round,
                const Slices& slices, const int32_t* starts, int64_t first, int64_t last, Pass<S> pass,
                const Sum<S>* own, const Sum<S>* other, Sum<S>* sum) {
  using A = Sum<S>;
  const int64_t each = slices.entries(g.lines);
  alignas(64) A partial[kLanes<A> * kLanes<A>] = {};
  pass.partial = partial;
  for (int64_t t = round.first; t < round.last; ++t) {
    pass.first = t == 0;
    pass.last = t == batch.count - 1;
    batch.visit(t, [&](auto tile, int64_t row) {
      constexpr int L = tile.L, NV = tile.NV, T = tile.T;
      pass.own = own + (row - round.begin) * g.own_width;
      pass.other = other + (row - round.begin) * g.other_width;
      const int32_t* begins = starts;
      for (int64_t s = 0; s < slices.count; ++s, begins += g.lines.lines) {
        const int32_t* ends = begins + g.lines.lines;
        const auto gather_values = [&](int64_t n) {
          if (!kBoth || !pass.first || n >= last) return;
          if (n + 1 < last) fetch(g.lines.order, begins[n + 1], each);
          for (int64_t k = begins[n]; k < ends[n]; ++k) pass.gathered[k] = widen(pass.values[g.lines.order[k]]);
        };
        gather_values(first);
        for (int64_t n = first; n < last; ++n) {
          gather_values(n + 1);
          if (slices.count > 1 && n + 1 < last) {
            fetch(g.lines.index, begins[n + 1], each);
            if (!pass.first) fetch(pass.dots, begins[n + 1], each);
            if (kBoth && !pass.first) fetch(pass.gathered, begins[n + 1], each);
            if (kBoth && pass.last) fetch(g.lines.order, begins[n + 1], each);
          }
          pass_line<L, NV, kBoth>(g.lines, n, begins[n], ends[n], pass, sum + (n - first) * T, s == 0);
        }
      }
      if (kBoth)
        unpack_tile<L, NV, S>(sum, row, g.m, g.own_width, first, last, nullptr, Activation::none, g.dx);
    });
  }
  if (batch.count == 0)
    for (int64_t k = g.lines.ptr[first]; k < g.lines.ptr[last]; ++k) round_to(g.dvalues + k, A(0));
}

template <class S, bool kBoth>
bool unstructured_outer(const Grads<S>& g, const Pool& pool) {
  using A = Sum<S>;
  const Lines& lines = g.lines;
  const Batch<A, kGradVectors> batch(g.m);
  const int workers = workers_for(pool, (kBoth ? 2. : 1.) * double(g.m) * double(lines.entries));
  const int64_t slabs = workers == 1 ? 1 : kGradSlabs;
  const int64_t least_parts = workers == 1 ? 1 : kGradPartsPerWorker * workers;
  const int64_t parts = most(least_parts, ceil_div(lines.lines, kLinesPerPart));
  const int64_t entries = ceil_div(lines.entries, 16) * 16, pair = g.own_width + g.other_width;
  const int64_t own_scratch = kBoth ? lines.lines * kGradVectors * kVectorBytes : 0;
  const int64_t step = batch.per_round(sizeof(A) * pair), rows = batch.row(least(step, batch.count));
  const Slices slices = slices_of(lines, g.other_width, sizeof(A) * most<int64_t>(1, batch.lanes(0)),
                                  kGradSliceBytes, kEntriesPerGradSlice);
  Scratch packed(sizeof(A) * rows * pair), sums(own_scratch * workers + 1);
  Scratch ordered(sizeof(A) * entries * (kBoth ? 2 : 1)), cuts(sizeof(int32_t) * slices.starts(lines));
  if (!packed.data() || !sums.data() || !ordered.data() || !cuts.data()) return false;
  int32_t* starts = reinterpret_cast<int32_t*>(cuts.data());
  A* own_tiles = reinterpret_cast<A*>(packed.data());
  A* other_tiles = own_tiles + rows * g.own_width;
  A* dots = reinterpret_cast<A*>(ordered.data());
  Flag wrong;
  Round round{0, 0, 0};
  const auto pack = [&](int64_t task, int) {
    const int64_t s = task % slabs;
    if (task / slabs == round.last - round.first) {
      const int64_t first = line_of_part(lines, s, slabs), last = line_of_part(lines, s + 1, slabs);
      if (!in_range(lines, first, last)) return wrong.raise();
      find_starts(lines, slices, first, last, kLanes<A>, starts);
      return;
    }
    batch.visit(round.first + task / slabs, [&](auto tile, int64_t row) {
      const auto pack_slab = [&](const S* x, int64_t width, A* tiles) {
        pack_tile<tile.L, tile.NV>(x, g.m, width, row, slab_begin(width, s, slabs),
                                   slab_begin(width, s + 1, slabs), tiles + (row - round.begin) * width);
      };
      pack_slab(g.own, g.own_width, own_tiles);
      pack_slab(g.other, g.other_width, other_tiles);
    });
  };
  const auto multiply = [&](int64_t part, int worker) {
    if (wrong.up()) return;
    Pass<S> pass{};
    pass.values = g.values;
    pass.gathered = dots + entries;
    pass.dots = dots;
    pass.dvalues = g.dvalues;
    pass_chunk<S, kBoth>(g, batch, round, slices, starts, line_of_part(lines, part, parts),
                         line_of_part(lines, part + 1, parts), pass, own_tiles, other_tiles,
                         reinterpret_cast<A*>(sums.data() + own_scratch * worker));
  };
  batch.in_rounds(step, [&](const Round& next) {
    round = next;
    const int64_t checks = round.first == 0 ? slabs : 0;
    const Phase phases[] = {phase((round.last - round.first) * slabs + checks, pack),
                            phase(parts, multiply)};
    run_phases(pool, workers, phases, 2);
    return !wrong.up();
  });
  return !wrong.up();
}

}  // namespace
}  // namespace jaxsparse_cpu
