// Features cut into slices, each of which stays in a cache while many lines read it.
#pragma once

#include "choose.h"
#include "tiles.h"

namespace jaxsparse_cpu {
namespace {

struct Slices {
  int64_t features, count;  // `features` in each slice, fewer in the last

  int64_t starts(const Lines& lines) const { return (count + 1) * lines.lines; }
  // Of a line, in a slice, on average.
  int64_t entries(const Lines& lines) const { return ceil_div(lines.entries, most<int64_t>(1, lines.lines * count)); }
};

// Slices of about `bytes`, a feature taking `feature_bytes`; wider where a line would meet fewer than `entries`
// in a slice, which do not pay for coming back to it.
Slices slices_of(const Lines& lines, int64_t features, int64_t feature_bytes, int64_t bytes, int64_t entries) {
  int64_t each = most<int64_t>(1, bytes / feature_bytes);
  while (each < features && lines.entries * each < entries * lines.lines * features) each *= 2;
  return {each, most<int64_t>(1, ceil_div(features, each))};
}

// The first of [k, end) whose index is at least `limit`: indices ascend, and counting branches less than a search.
int64_t skip_below(const Lines& lines, int64_t k, int64_t end, int32_t limit) {
  constexpr int kAtOnce = 16;
  while (k + kAtOnce <= end && lines.index[k + kAtOnce - 1] < limit) k += kAtOnce;
  if (k + kAtOnce > lines.entries) {
    while (k < end && lines.index[k] < limit) ++k;
    return k;
  }
  const int rest = static_cast<int>(least<int64_t>(kAtOnce, end - k));
  int below = 0;
  for (int i = 0; i < kAtOnce; ++i) below += (lines.index[k + i] < limit) & (i < rest);
  return k + below;
}

// starts[s * lines.lines + n]: the entry with which slice s begins in line n, for n in [first, last).
// The row after the last slice holds the ends of the lines. Slices take whole groups of `group` entries of a line: on
// which side of a border an entry is read makes no difference but to the cache.
void find_starts(const Lines& lines, const Slices& slices, int64_t first, int64_t last, int64_t group,
                 int32_t* starts) {
  for (int64_t n = first; n < last; ++n) {
    const int64_t begin = lines.ptr[n], end = lines.ptr[n + 1];
    int64_t k = begin;
    for (int64_t s = 0; s < slices.count; ++s) {
      if (s > 0) k = skip_below(lines, k, end, static_cast<int32_t>(s * slices.features));
      const int64_t whole = begin + (k - begin + group / 2) / group * group;
      starts[s * lines.lines + n] = static_cast<int32_t>(least(end, whole));
    }
    starts[slices.count * lines.lines + n] = static_cast<int32_t>(end);
  }
}

// Fetches what `count` entries from the k-th on read of `from`, as far as that pays.
template <class T>
ALWAYS_INLINE void fetch(const T* from, int64_t k, int64_t count) {
  const char* at = reinterpret_cast<const char*>(from + k);
  for (int64_t i = 0; i < least<int64_t>(count * sizeof(T), kFetchedOfLine); i += 64) __builtin_prefetch(at + i);
}

}  // namespace
}  // namespace jaxsparse_cpu
