// Products with 1 x 1 blocks: each stored entry meets a whole batch tile.
#pragma once

#include "slices.h"

namespace jaxsparse_cpu {
namespace {

// sum[t] += values[k] * tile[index[k]][t] for the entries [k, end); kOrdered: values[order[k]].
// Short tiles keep several sums, so that one multiply-add need not wait for the last.
template <int L, int NV, class S, bool kOrdered>
ALWAYS_INLINE void add_entries(Sum<S>* sum, const Sum<S>* tile, const S* values, const int32_t* index,
                               const int32_t* order, int64_t k, int64_t end) {
  using V = Vector<Sum<S>, L>;
  constexpr int kChains = NV >= kVectorsWithoutChains ? 1 : kSumsInFlight / NV;
  V acc[kChains][NV] = {};
  const auto add = [&](int64_t e, int chain) {
    const Sum<S>* row = tile + int64_t{index[e]} * (NV * L);
    if constexpr (kChains == 1) keep(row);
    const V a = splat<L>(widen(values[kOrdered ? order[e] : e]));
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[chain][v] += a * load<L>(row + v * L);
  };
  if constexpr (kChains > 1) {
    for (; k + kChains <= end; k += kChains)
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) add(k + c, c);
  }
  for (; k < end; ++k) add(k, 0);
#pragma GCC unroll 8
  for (int c = 1; c < kChains; ++c)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[0][v] += acc[c][v];
  // The entries of a slice are summed apart from the rest, so that no sum is one long run.
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) store<L>(sum + v * L, load<L>(sum + v * L) + acc[0][v]);
}

// All entries of a part's lines against one tile.
template <int L, int NV, class S, bool kOrdered>
void add_part(const Part<S>& part, const S* values, const Slices& slices, const int32_t* starts) {
  constexpr int T = NV * L;
  const Lines& lines = part.p.lines;
  for (int64_t i = 0; i < (part.last - part.first) * T; i += L) store<L>(part.sums + i, Vector<Sum<S>, L>{});
  // Visits jump about among the entries: those of the line after next are fetched ahead.
  const int64_t each = slices.entries(lines);
  for (int64_t s = 0; s < slices.count; ++s, starts += lines.lines) {
    const int32_t* ends = starts + lines.lines;
    for (int64_t n = part.first; n < part.last; ++n) {
      if (slices.count > 1 && n + 2 < part.last) {
        fetch(lines.index, starts[n + 2], each);
        if (kOrdered)
          fetch(lines.order, starts[n + 2], each);
        else
          fetch(values, starts[n + 2], each);
      }
      add_entries<L, NV, S, kOrdered>(part.sums + (n - part.first) * T, part.tile, values, lines.index, lines.order,
                                      starts[n], ends[n]);
    }
  }
}

}  // namespace
}  // namespace jaxsparse_cpu
