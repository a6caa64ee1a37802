// The sampled product with blocks: x^T dy at the stored blocks, summed over the whole batch.
#pragma once

#include "micro.h"

namespace jaxsparse_cpu {
namespace {

// Columns of dy's strips, and of a unit of work.
template <class A>
constexpr int64_t kStripColumns = 2 * kLanes<A>;

// One operand cut into its slices, and each slice into strips of `stride` columns, which the
// inner loop reads from end to end: [slice][strip][batch row][stride], zeros beyond the edges.
template <class A>
struct Strips {
  int64_t m, block, stride, strips;

  Strips(int64_t m_, int64_t block_, int64_t widest)
      : m(m_), block(block_), stride(block <= kHalf ? kHalf : least(widest, ceil_div(block, kFull) * kFull)),
        strips(ceil_div(block, stride)) {}
  static constexpr int64_t kHalf = 16 / sizeof(A), kFull = 2 * kHalf;
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
            for (int64_t f = 0; f < stride; f += L)
              store<L>(strip + r * stride + f,
                       load_some<L>(x + (b + r) * width + begin + j + f, valid - f));
        }
    }
  }
};

// Columns [at, at + panel) of the block at one stored entry; dy is the strip that holds them.
template <class S, class P>
void outer_block(const Outer& p, const Sum<S>* x, const Strips<Sum<S>>& xs, int64_t slice,
                 const Sum<S>* dy, int64_t dy_stride, S* block, int64_t at, Sum<S>* carry, P) {
  using A = Sum<S>;
  constexpr int L = P::L, NV = P::NV, W = P::width;
  const Target<S> target{block + at, p.width, p.width - at, nullptr, Activation::none};
  for (int64_t b = 0; b == 0 || b < p.m; b += kDeep) {
    const int64_t deep = least(kDeep, p.m - b);
    const bool last = b + kDeep >= p.m;
    for_rows<kStripRows>(0, p.depth, [&](int64_t i, auto rows) {
      Vector<A, L> sum[rows.R][NV];
      clear(sum);
      if (b)
        for (int r = 0; r < rows.R; ++r)
          for (int v = 0; v < NV; ++v) sum[r][v] = load<L>(carry + (i + r) * W + v * L);
      multiply<rows.R, NV, L, false, true>(sum, x + xs.at(slice, i) + b * xs.stride, xs.stride,
                                           dy + b * dy_stride, dy_stride, 1,
                                           [&](int64_t) { return Step{0, 0, deep}; });
      if (last) return finish<rows.R, NV, L, S>(sum, target, i);
      for (int r = 0; r < rows.R; ++r)
        for (int v = 0; v < NV; ++v) store<L>(carry + (i + r) * W + v * L, sum[r][v]);
    });
  }
}

template <class S>
bool block_sddmm(const Outer& p, const Pool& pool) {
  using A = Sum<S>;
  const Lines& lines = p.lines;
  if (!in_range(lines, 0, lines.lines)) return false;
  const int64_t size = p.depth * p.width, pieces = ceil_div(p.width, kStripColumns<A>);
  const Strips<A> xs(p.m, p.depth, 16), dys(p.m, p.width, kStripColumns<A>);
  const int workers = workers_for(pool, double(p.m) * double(lines.entries) * double(size));
  const int64_t own = ceil_div(p.depth * kStripColumns<A>, 16) * 16, x_size = xs.size(lines.limit);
  Scratch packed(sizeof(A) * (x_size + dys.size(lines.lines))), carries(sizeof(A) * own * workers);
  if (!packed.data() || !carries.data()) return false;
  A *x = reinterpret_cast<A*>(packed.data()), *dy = x + x_size;
  const int64_t slabs = least<int64_t>(p.m, kTasksPerWorker * workers);
  const auto pack = [&](int64_t s, int) {
    const int64_t first = s * p.m / slabs, last = (s + 1) * p.m / slabs;
    xs.pack(static_cast<const S*>(p.x), p.in, first, last, x);
    dys.pack(static_cast<const S*>(p.dy), p.out, first, last, dy);
  };
  const int64_t parts = workers == 1 ? 1 : least<int64_t>(lines.lines * pieces, workers * kTasksPerWorker);
  const auto multiply = [&](int64_t part, int worker) {
    A* carry = reinterpret_cast<A*>(carries.data()) + own * worker;
    const int64_t end = unit_of_part(lines, pieces, part + 1, parts);
    for (int64_t u = unit_of_part(lines, pieces, part, parts); u < end; ++u) {
      const int64_t n = u / pieces, j = u % pieces * kStripColumns<A>;
      for_panels<A, 2>(p.width, j, j + kStripColumns<A>, [&](int64_t at, auto panel) {
        for (int64_t k = lines.ptr[n]; k < lines.ptr[n + 1]; ++k)
          outer_block<S>(p, x, xs, lines.index[k], dy + dys.at(n, at), dys.stride,
                         static_cast<S*>(p.values) + k * size, at, carry, panel);
      });
    }
  };
  const Phase phases[] = {phase(slabs, pack), phase(parts, multiply)};
  run_phases(pool, workers, phases, 2);
  return true;
}

}  // namespace
}  // namespace jaxsparse_cpu
