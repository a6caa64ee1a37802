// Products with 1 x 1 blocks: each stored entry meets a whole batch tile.
#pragma once

#include "tiles.h"

namespace jaxsparse_cpu {
namespace {

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

// Fetches `count` entries from the k-th on, as far as that pays.
template <class S>
ALWAYS_INLINE void fetch_entries(const Lines& lines, const S* values, int64_t k, int64_t count) {
  const auto fetch = [](const void* from, int64_t bytes) {
    for (int64_t i = 0; i < least<int64_t>(bytes, 4096); i += 64)
      __builtin_prefetch(static_cast<const char*>(from) + i);
  };
  fetch(lines.index + k, count * sizeof(int32_t));
  fetch(values + k, count * sizeof(S));
}

// All entries of lines [first, last) against one tile; sums is [last - first][NV * L].
template <int L, int NV, class S, bool kOrdered>
void add_lines(const Lines& lines, int64_t first, int64_t last, const Sum<S>* tile,
               const S* values, int64_t features, Sum<S>* sums, int32_t* cursors) {
  constexpr int T = NV * L;
  const int32_t* order = kOrdered ? lines.order : nullptr;
  for (int64_t n = first; n < last; ++n) cursors[n - first] = lines.ptr[n];
  for (int64_t i = 0; i < (last - first) * T; i += L) store<L>(sums + i, Vector<Sum<S>, L>{});
  const int64_t slice = most<int64_t>(1, kSliceBytes / int64_t(T * sizeof(Sum<S>)));
  // A short batch waits for memory: what the line after next reads in this slice is fetched ahead.
  const int64_t each = (lines.ptr[last] - lines.ptr[first]) * least(slice, features) /
                       most<int64_t>(1, features * (last - first));
  for (int64_t f = slice;; f += slice) {
    for (int64_t n = first; n < last; ++n) {
      if constexpr (NV == 1 && !kOrdered)
        if (slice < features && n + 2 < last) fetch_entries(lines, values, cursors[n + 2 - first], each);
      int32_t& k = cursors[n - first];
      k = static_cast<int32_t>(add_entries<L, NV, S>(sums + (n - first) * T, tile, values,
                                                     lines.index, order, k, lines.ptr[n + 1], f));
    }
    if (f >= features) break;
  }
}

template <int L, int NV, class S>
void add_part(const Part<S>& part) {
  const Lines& lines = part.p.lines;
  (lines.order ? add_lines<L, NV, S, true> : add_lines<L, NV, S, false>)(
      lines, part.first, part.last, part.tile, static_cast<const S*>(part.p.values), part.p.in,
      part.sums, part.cursors);
}

}  // namespace
}  // namespace jaxsparse_cpu
