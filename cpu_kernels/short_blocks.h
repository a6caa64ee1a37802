// Blocks shorter than a vector (and short batches): the batch lies along the vectors, and values are
// read a number at a time, as they are stored or across. Nothing of W is packed or transposed.
#pragma once

#include "choose.h"
#include "micro.h"

namespace jaxsparse_cpu {
namespace {

template <int L, int NV, class S, bool kTransposed>
void add_blocks(const Part<S>& part) {
  using A = Sum<S>;
  constexpr int T = NV * L;
  const Product& p = part.p;
  const Lines& lines = p.lines;
  const int64_t size = p.depth * p.width;
  for (int64_t n = part.first; n < part.last; ++n) {
    const int64_t begin = lines.ptr[n];
    const auto where = [&](int64_t e) {
      if (lines.order && begin + e + 2 < lines.entries) {
        const char* next = reinterpret_cast<const char*>(
            static_cast<const S*>(p.values) + lines.order[begin + e + 2] * size);
        for (int64_t i = 0; i < least<int64_t>(size * sizeof(S), kFetchedOfBlock); i += 64)
          __builtin_prefetch(next + i);
      }
      const int64_t k = begin + e, offset = int64_t{lines.index[k]} * p.depth;
      return Step{(lines.order ? lines.order[k] : k) * size, offset * T,
                  least(p.depth, p.in - offset)};
    };
    for_rows<kRows>(0, p.width, [&](int64_t j, auto rows) {
      Vector<A, L> sum[rows.R][NV];
      clear(sum);
      multiply<rows.R, NV, L, kTransposed, false>(
          sum, static_cast<const S*>(p.values) + (kTransposed ? j * p.depth : j),
          kTransposed ? p.depth : p.width, part.tile, T, lines.ptr[n + 1] - begin, where);
      A* to = part.sums + ((n - part.first) * p.width + j) * T;
      for (int r = 0; r < rows.R; ++r)
        for (int v = 0; v < NV; ++v) store<L>(to + r * T + v * L, sum[r][v]);
    });
  }
}

// Where this beats packed panels: blocks narrower than a panel, and transposed products of a
// batch too short to pay for transposing the values.
template <class S>
bool is_short(const Product& p) {
  return p.width <= kLanes<Sum<S>> || (p.transposed && p.m < kRowsWorthTransposing);
}

}  // namespace
}  // namespace jaxsparse_cpu
