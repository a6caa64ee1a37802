// The sampled product with blocks: x^T dy at the stored blocks, summed over the whole batch.
#pragma once

#include "micro.h"

namespace jaxsparse_cpu {
namespace {

// x cut into its slices, and each slice into strips of `stride` columns, which the inner loop reads from end to end:
// [slice][strip][batch row][stride], zeros beyond the edges.
template <class A>
struct Strips {
  int64_t m, block, stride, strips;

  Strips(int64_t m_, int64_t block_)
      : m(m_), block(block_), stride(block <= kHalf ? kHalf : least(kWidest, ceil_div(block, kFull) * kFull)),
        strips(ceil_div(block, stride)) {}
  static constexpr int64_t kHalf = 16 / sizeof(A), kFull = 2 * kHalf, kWidest = 16;
  int64_t size(int64_t slices) const { return ceil_div(slices * strips * m * stride, 16) * 16; }
  // Column `column` of slice `slice` for the first batch row.
  int64_t at(int64_t slice, int64_t column) const {
    return (slice * strips + column / stride) * m * stride + column % stride;
  }
  template <class S>
  void pack(const S* x, int64_t width, int64_t first, int64_t last, A* to) const {
    stride == kHalf ? pack_by<kHalf>(x, width, first, last, to)
                    : pack_by<kFull>(x, width, first, last, to);
  }
  // Eight rows at a time, so that whole cache lines are written, and no more rows of x are read
  // together than a set of the first-level cache has ways.
  template <int L, class S>
  void pack_by(const S* x, int64_t width, int64_t first, int64_t last, A* to) const {
    for (int64_t b = first; b < last; b += 8) {
      const int64_t rows = least<int64_t>(8, last - b);
      A* strip = to + b * stride;
      for (int64_t begin = 0; begin < width; begin += block)
        for (int64_t j = 0; j < block; j += stride, strip += m * stride) {
          const int64_t valid = least(least(stride, block - j), width - begin - j);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t f = 0; f < stride; f += L) {
              __builtin_prefetch(strip + (m + r) * stride + f, 1, kToSecondLevel);
              store<L>(strip + r * stride + f,
                       load_some<L>(x + (b + r) * width + begin + j + f, valid - f));
            }
        }
    }
  }
};

// dy[:, column .. column + W) as [batch row][W], zeros from `columns` on.
template <int W, class S>
void pack_strip(const Outer& p, int64_t column, int64_t columns, Sum<S>* to) {
  constexpr int L = W < kLanes<Sum<S>> ? W : kLanes<Sum<S>>;
  const S* dy = static_cast<const S*>(p.dy) + column;
  for (int64_t b = 0; b < p.m; ++b, dy += p.out, to += W)
    for (int v = 0; v < W; v += L) store<L>(to + v, load_some<L>(dy + v, most<int64_t>(0, columns - v)));
}

// Columns [at, at + panel) of one block: of `dy`, the strip that holds them, and column i of its slice of x at place(i).
template <int kTile, int64_t kDeep, class S, class P, class Place>
void outer_block(const Outer& p, const Rows<Sum<S>>& x, Place place, const Sum<S>* dy, S* block, int64_t at,
                 Sum<S>* carry, P) {
  using A = Sum<S>;
  constexpr int L = P::L, NV = P::NV, W = P::width;
  const Target<S> target{block + at, p.width, p.width - at, nullptr, Activation::none};
  for (int64_t b = 0; b == 0 || b < p.m; b += kDeep) {
    const int64_t deep = least(kDeep, p.m - b);
    const bool last = b + kDeep >= p.m;
    for_rows<kTile>(0, p.depth, [&](int64_t i, auto rows) {
      Vector<A, L> sum[rows.R][NV];
      clear(sum);
      if (b)
        for (int r = 0; r < rows.R; ++r)
          for (int v = 0; v < NV; ++v) sum[r][v] = load<L>(carry + (i + r) * W + v * L);
      multiply<rows.R, NV, L, false, true>(sum, x.data + place(i) + b * x.stride, x.stride, dy + b * W, W, 1,
                                           [&](int64_t) { return Step{0, 0, deep}; });
      if (last) return finish<rows.R, NV, L, S>(sum, target, i);
      for (int r = 0; r < rows.R; ++r)
        for (int v = 0; v < NV; ++v) store<L>(carry + (i + r) * W + v * L, sum[r][v]);
    });
  }
}

// Whether x is read where it lies: few lines meet each of its slices, which are not wide, and none is ragged.
bool reads_x_in_place(const Outer& p) {
  const bool few = p.lines.entries <= kLinesInPlace * p.lines.limit;
  return few && p.depth <= kDepthInPlace && p.in == p.lines.limit * p.depth;
}

// kInPlace: x is read where it lies, and its rows are as many as the widest panel takes.
template <class S, bool kInPlace>
bool sddmm_by_strips(const Outer& p, const Pool& pool) {
  using A = Sum<S>;
  constexpr int kVectors = kInPlace ? kPanelVectors : 2;
  constexpr int64_t kColumns = kVectors * kLanes<A>;
  const Lines& lines = p.lines;
  const int64_t size = p.depth * p.width, pieces = ceil_div(p.width, kColumns);
  const Strips<A> xs(p.m, p.depth);
  const int workers = workers_for(pool, double(p.m) * double(lines.entries) * double(size));
  const int64_t strip = p.m * kColumns, own = strip + ceil_div(p.depth * kColumns, 16) * 16;
  Scratch packed(kInPlace ? 1 : sizeof(A) * xs.size(lines.limit)), scratch(sizeof(A) * own * workers);
  if (!packed.data() || !scratch.data()) return false;
  A* copy = reinterpret_cast<A*>(packed.data());
  const int64_t slabs = kInPlace ? 0 : least<int64_t>(p.m, kTasksPerWorker * workers);
  const auto pack = [&](int64_t s, int) {
    xs.pack(static_cast<const S*>(p.x), p.in, s * p.m / slabs, (s + 1) * p.m / slabs, copy);
  };
  const int64_t parts = workers == 1 ? 1 : least<int64_t>(lines.lines * pieces, workers * kTasksPerWorker);
  const auto multiply = [&](int64_t part, int worker) {
    A *dy = reinterpret_cast<A*>(scratch.data()) + own * worker, *carry = dy + strip;
    const int64_t end = unit_of_part(lines, pieces, part + 1, parts);
    for (int64_t u = unit_of_part(lines, pieces, part, parts); u < end; ++u) {
      const int64_t n = u / pieces, j = u % pieces * kColumns;
      for_panels<A, kVectors>(p.width, j, j + kColumns, [&](int64_t at, auto panel) {
        using P = decltype(panel);
        const int64_t column = n * p.width + at, columns = least(p.width - at, p.out - column);
        if (lines.ptr[n] < lines.ptr[n + 1]) pack_strip<P::width, S>(p, column, columns, dy);
        for (int64_t k = lines.ptr[n]; k < lines.ptr[n + 1]; ++k) {
          S* block = static_cast<S*>(p.values) + k * size;
          const int64_t slice = lines.index[k];
          if constexpr (kInPlace) {
            const Rows<A> x{static_cast<const A*>(p.x) + slice * p.depth, p.in};
            outer_block<P::R, kDeepInPlace, S>(p, x, [](int64_t i) { return i; }, dy, block, at, carry, panel);
          } else {
            const Rows<A> x{copy + xs.at(slice, 0), xs.stride};
            outer_block<kStripRows, kDeep, S>(p, x, [&](int64_t i) { return xs.at(0, i); }, dy, block, at, carry, panel);
          }
        }
      });
    }
  };
  const Phase phases[] = {phase(slabs, pack), phase(parts, multiply)};
  run_phases(pool, workers, phases, 2);
  return true;
}

template <class S>
bool block_sddmm(const Outer& p, const Pool& pool) {
  if (!in_range(p.lines, 0, p.lines.lines)) return false;
  if constexpr (sizeof(S) == sizeof(Sum<S>))
    if (reads_x_in_place(p)) return sddmm_by_strips<S, true>(p, pool);
  return sddmm_by_strips<S, false>(p, pool);
}

}  // namespace
}  // namespace jaxsparse_cpu
