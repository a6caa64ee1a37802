// The product of one batch row with 1 x 1 blocks: x stays as it lies, and each line gathers from it.
//
// Every entry is read once and nothing is packed, so that memory is the limit.
#pragma once

#include "micro.h"

namespace jaxsparse_cpu {
namespace {

// The terms of one line, in sums that lie across the lanes.
template <int L, class S, bool kOrdered, bool kByOne, class I>
ALWAYS_INLINE Vector<Sum<S>, L> gather_line(const Lines& lines, int64_t line, const I* index, const Sum<S>* x,
                                            const S* values) {
  using V = Vector<Sum<S>, L>;
  constexpr int64_t kFetchEntries = kFetchBytes / sizeof(int32_t);
  const int32_t* order = lines.order;
  const int64_t end = lines.ptr[line + 1];
  int64_t k = lines.ptr[line];
  V total{};
  while (k + L <= end) {
    V run{};
    for (const int64_t stop = least(end, k + kRun * L); k + L <= stop; k += L) {
      __builtin_prefetch(reinterpret_cast<const char*>(index + k) + kFetchEntries * sizeof(I));
      if (!kOrdered) __builtin_prefetch(reinterpret_cast<const char*>(values + k) + kFetchBytes);
      const V v = kOrdered ? gather<L, kByOne>(values, order + k) : load<L>(values + k);
      run += v * gather<L, kByOne>(x, index + k);
    }
    total += run;
  }
  for (int i = 0; k < end; ++k, ++i) total[i] += widen(values[kOrdered ? order[k] : k]) * x[index[k]];
  return total;
}

// y[first .. last); false where an index is out of range.
template <class S, bool kOrdered, bool kByOne, class I>
bool gather_lines(const Product& p, const I* index, const Sum<S>* x, int64_t first, int64_t last) {
  constexpr int L = kLanes<Sum<S>>;
  const S* bias = static_cast<const S*>(p.bias);
  const Lines& lines = p.lines;
  for (int64_t n = first; n < last; n += L) {
    const int64_t count = least<int64_t>(L, last - n), begin = lines.ptr[n], end = lines.ptr[n + count];
    if (!in_range(index, begin, end, lines.limit)) return false;
    if (kOrdered && !in_range(lines.order, begin, end, lines.entries)) return false;
    Vector<Sum<S>, L> rows[L] = {};
    for (int64_t i = 0; i < count; ++i)
      rows[i] = gather_line<L, S, kOrdered, kByOne>(lines, n + i, index, x, static_cast<const S*>(p.values));
    Vector<Sum<S>, L> y = sums<L>(rows);
    if (bias) y += load_some<L>(bias + n, count);
    store_some<L>(static_cast<S*>(p.y) + n, activate<Sum<S>, L>(y, p.activation), count);
  }
  return true;
}

// The same, by the index that there is.
template <class S, bool kByOne>
bool gather_part(const Product& p, const Sum<S>* x, int64_t first, int64_t last) {
  const Lines& lines = p.lines;
  if (lines.narrow) return gather_lines<S, false, kByOne>(p, lines.narrow, x, first, last);
  return lines.order ? gather_lines<S, true, kByOne>(p, lines.index, x, first, last)
                     : gather_lines<S, false, kByOne>(p, lines.index, x, first, last);
}

template <class S>
bool one_row_spmm(const Product& p, const Pool& pool) {
  using A = Sum<S>;
  const int workers = workers_for(pool, kFmasPerEntry * double(p.lines.entries));
  const int64_t parts = workers == 1 ? 1 : ceil_div(p.lines.lines, kColumnsPerTask);
  const int64_t stride = packed_stride<S>(p.in);
  Scratch copy(sizeof(A) * stride + 1);
  if (!copy.data()) return false;
  A* widened = reinterpret_cast<A*>(copy.data());
  const S* x = static_cast<const S*>(p.x);
  if (stride) pack_rows(x, p.in, 0, 1, widened, stride);
  const A* row = rows_of(x, p.in, widened, stride).data;
  const bool by_one = kVectorBytes == 64 && has_fast_gather();
  const auto gather_in = by_one ? gather_part<S, true> : gather_part<S, false>;
  Flag wrong;
  const auto multiply = [&](int64_t part, int) {
    const int64_t first = line_of_part(p.lines, part, parts), last = line_of_part(p.lines, part + 1, parts);
    if (!gather_in(p, row, first, last)) wrong.raise();
  };
  const Phase phases[] = {phase(parts, multiply)};
  run_phases(pool, workers, phases, 1);
  return !wrong.up();
}

}  // namespace
}  // namespace jaxsparse_cpu
