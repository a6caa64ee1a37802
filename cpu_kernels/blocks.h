// Products with blocks: y's panels of one block column, over the blocks stored there.
#pragma once

#include "micro.h"

namespace jaxsparse_cpu {
namespace {

// Columns of the widest panel, which a unit of work takes.
template <class A>
constexpr int64_t kPanelColumns = kPanelVectors * kLanes<A>;

// A line's blocks, columns [j, j + count) of each, as [entries][depth][W] with zeros at the end.
template <int W, class S>
void pack_panel(const Product& p, int64_t line, int64_t j, int64_t count, Sum<S>* to) {
  constexpr int L = W < kLanes<Sum<S>> ? W : kLanes<Sum<S>>;
  const S* values = static_cast<const S*>(p.values);
  for (int64_t k = p.lines.ptr[line]; k < p.lines.ptr[line + 1]; ++k) {
    const S* block = values + (p.lines.order ? p.lines.order[k] : k) * p.depth * p.width;
    if (!p.transposed) {
      for (int64_t d = 0; d < p.depth; ++d, to += W)
        for (int v = 0; v < W; v += L) {
          store<L>(to + v, load_some<L>(block + d * p.width + j + v, most<int64_t>(0, count - v)));
        }
    } else {
      for (int v = 0; v < W; v += L)
        for (int64_t d = 0; d < p.depth; d += L) {
          Vector<Sum<S>, L> r[L];
          const int64_t some = least<int64_t>(L, p.depth - d);
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i)
            r[i] = v + i < count ? load_some<L>(block + (j + v + i) * p.depth + d, some)
                                 : Vector<Sum<S>, L>{};
          transpose<L>(r);
          for (int i = 0; i < some; ++i) store<L>(to + (d + i) * W + v, r[i]);
        }
      to += p.depth * W;
    }
  }
}

// Columns [j, j + panel) of line `line`, for batch rows [row, last).
template <class S, class P>
void multiply_panel(const Product& p, const Rows<Sum<S>>& x, int64_t line, int64_t j, int64_t row,
                    int64_t last, Sum<S>* scratch, P) {
  using A = Sum<S>;
  constexpr int L = P::L, NV = P::NV, W = P::width;
  const int64_t begin = p.lines.ptr[line], entries = p.lines.ptr[line + 1] - begin;
  const int64_t column = line * p.width + j, in_block = least<int64_t>(W, p.width - j);
  const int64_t columns = least(in_block, p.out - column);
  if (columns <= 0) return;
  alignas(64) A bias[W];
  for (int i = 0; i < W && p.bias; ++i)
    bias[i] = i < columns ? widen(static_cast<const S*>(p.bias)[column + i]) : A(0);
  const Target<S> target{static_cast<S*>(p.y) + column, p.out, columns, p.bias ? bias : nullptr,
                         p.activation};
  const int32_t* index = p.lines.index + begin;
  const auto multiply_by = [&](const auto* w, int64_t stride) {
    const int64_t size = p.depth * stride;
    const auto where = [&](int64_t e) {
      const int64_t offset = int64_t{index[e]} * p.depth;
      return Step{offset, e * size, least(p.depth, p.in - offset)};
    };
    for_rows<P::R>(row, last, [&](int64_t r, auto rows) {
      Vector<A, L> sum[rows.R][NV];
      clear(sum);
      multiply<rows.R, NV, L, true, true>(sum, x.data + r * x.stride, x.stride, w, stride, entries, where);
      finish<rows.R, NV, L, S>(sum, target, r);
    });
  };
  const bool packs = (sizeof(S) != sizeof(A) || p.width >= kWideBlock) && last - row >= kRowsWorthPacking;
  if (p.transposed || in_block < W || packs) {
    pack_panel<W, S>(p, line, j, in_block, scratch);
    multiply_by(static_cast<const A*>(scratch), W);
  } else {
    multiply_by(static_cast<const S*>(p.values) + begin * p.depth * p.width + j, p.width);
  }
}

// Batch rows that one task takes: whole register tiles.
template <class S>
int64_t rows_per_task(const Product& p) {
  const bool packs = p.transposed || p.width >= kWideBlock;
  const int64_t rows = packs || p.in * int64_t(sizeof(Sum<S>)) < kWideXBytes ? kTaskRows : kTaskRowsOfWideX;
  const int64_t tile = p.width >= kPanelColumns<Sum<S>> ? Panel<1, kPanelVectors>::R : kRows;
  return ceil_div(rows, tile) * tile;
}

int64_t longest_line(const Lines& lines) {
  int64_t longest = 0;
  for (int64_t n = 0; n < lines.lines; ++n)
    longest = most<int64_t>(longest, lines.ptr[n + 1] - lines.ptr[n]);
  return longest;
}

template <class S>
bool block_spmm(const Product& p, const Pool& pool) {
  using A = Sum<S>;
  const Lines& lines = p.lines;
  if (!in_range(lines, 0, lines.lines)) return false;
  const int64_t pieces = ceil_div(p.width, kPanelColumns<A>), longest = longest_line(lines);
  const double work = double(p.m) * double(lines.entries) * double(p.depth) * double(p.width);
  const int workers = workers_for(pool, work);
  const int64_t stride = packed_stride<S>(p.in);
  const int64_t own = ceil_div(longest * p.depth * kPanelColumns<A>, 16) * 16;
  Scratch packed(sizeof(A) * stride * p.m), panels(sizeof(A) * own * workers);
  if (!packed.data() || !panels.data()) return false;
  A* copy = reinterpret_cast<A*>(packed.data());
  const int64_t slabs = stride ? least<int64_t>(p.m, kTasksPerWorker * workers) : 0;
  const auto pack = [&](int64_t s, int) {
    pack_rows(static_cast<const S*>(p.x), p.in, s * p.m / slabs, (s + 1) * p.m / slabs, copy, stride);
  };
  const Rows<A> x = rows_of(static_cast<const S*>(p.x), p.in, copy, stride);
  const int64_t chunk = rows_per_task<S>(p), chunks = ceil_div(p.m, chunk);
  const int64_t parts = workers == 1 ? 1 : least<int64_t>(lines.lines * pieces, workers * kTasksPerWorker);
  const auto multiply = [&](int64_t task, int worker) {
    const int64_t row = task / parts * chunk, last = least(row + chunk, p.m);
    const int64_t end = unit_of_part(lines, pieces, task % parts + 1, parts);
    A* panel = reinterpret_cast<A*>(panels.data()) + own * worker;
    for (int64_t u = unit_of_part(lines, pieces, task % parts, parts); u < end; ++u) {
      const int64_t j = u % pieces * kPanelColumns<A>;
      for_panels<A, kPanelVectors>(p.width, j, j + kPanelColumns<A>, [&](int64_t at, auto type) {
        multiply_panel<S>(p, x, u / pieces, at, row, last, panel, type);
      });
    }
  };
  const Phase phases[] = {phase(slabs, pack), phase(chunks * parts, multiply)};
  run_phases(pool, workers, phases, 2);
  return true;
}

}  // namespace
}  // namespace jaxsparse_cpu
