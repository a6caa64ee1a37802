// The block products' inner loop: a few rows by one or two vectors of sums, kept in registers
// over the whole depth.
#pragma once

#include "tiles.h"

namespace jaxsparse_cpu {
namespace {

// x as numbers of the summing type, with rows `stride` apart.
template <class A>
struct Rows {
  const A* data;
  int64_t stride;
};

// The stride of a copy of x's rows, or 0 where they are read in place. Half-precision rows are
// widened once for all lines, to a stride at which they spread over the sets of the caches.
template <class S>
int64_t packed_stride(int64_t width) {
  return sizeof(S) != sizeof(Sum<S>) ? ceil_div(width, 16) * 16 + 16 : 0;
}

// Rows [first, last) of x to rows of `stride`, which end in zeros.
template <class S>
void pack_rows(const S* x, int64_t width, int64_t first, int64_t last, Sum<S>* to, int64_t stride) {
  constexpr int L = kLanes<Sum<S>>;
  for (int64_t b = first; b < last; ++b)
    for (int64_t f = 0; f < stride; f += L)
      store<L>(to + b * stride + f,
               load_some<L>(x + b * width + f, most<int64_t>(0, width - f)));
}

template <class S>
Rows<Sum<S>> rows_of(const S* x, int64_t width, const Sum<S>* copy, int64_t stride) {
  if constexpr (sizeof(S) == sizeof(Sum<S>))
    return {x, width};
  else
    return {copy, stride};
}

template <int R_>
struct RowsOf {
  static constexpr int R = R_;
};

// Where step e of a product begins in both operands, and how deep it is.
struct Step {
  int64_t a, b, depth;
};

template <class V, int R, int NV>
ALWAYS_INLINE void clear(V (&sum)[R][NV]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) sum[r][j] = V{};
}

// sum[r][..] += over d < depth:  a[r, d] * b[d, vector]
// with rows of b `b_stride` apart; a is read a number at a time, at r * a_stride + d (kByRow)
// or at r + d * a_stride. With kFetches one of them is fetched ahead, where the loads leave time for it: b, if a step
// reads whole lines of it, or a's strips, if a vector is a line.
template <int R, int NV, int L, bool kByRow, bool kFetches, class SA, class SB>
ALWAYS_INLINE void multiply_run(Vector<Sum<SA>, L> (&sum)[R][NV], const SA* a, int64_t a_stride, const SB* b,
                                int64_t b_stride, int64_t depth) {
  constexpr int kPerLine = most<int>(1, 64 / (L * sizeof(SB)));
#if defined(__AVX512F__)  // in registers here, or the loop loads them from the stack; with 16 of them 3 % slower
  asm("" : "+r"(b_stride), "+r"(depth));
  if (!kByRow) asm("" : "+r"(a_stride));
#endif
  for (int64_t i = 0; i < depth; ++i, b += b_stride, a += kByRow ? 1 : a_stride) {
    Vector<Sum<SA>, L> v[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) v[j] = load<L>(b + j * L);
    if (kFetches && kByRow && NV >= kPerLine)
#pragma GCC unroll 4
      for (int j = 0; j < NV; j += kPerLine) __builtin_prefetch(b + kFetchRows * b_stride + j * L);
    if (kFetches && !kByRow && kPerLine == 1) __builtin_prefetch(a + kFetchRows * a_stride);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector<Sum<SA>, L> s = splat<L>(widen(a[kByRow ? r * a_stride : r]));
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[r][j] += s * v[j];
    }
  }
}

// What R rows begin with in step e + 1, while step e is summed; the hardware goes on from there.
template <int R, class S>
ALWAYS_INLINE void fetch_rows(const S* a, int64_t stride, const Step& step) {
  for (int64_t i = 0; i < least<int64_t>(step.depth, kFetchedOfRow / sizeof(S)); i += 64 / sizeof(S))
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) __builtin_prefetch(a + step.a + r * stride + i);
}

// sum[r][..] += over steps e < count and d < depth:  a[r, d] * b[d, vector], in runs of kRun to 2 kRun terms.
template <int R, int NV, int L, bool kByRow, bool kFetches, class SA, class SB, class F>
ALWAYS_INLINE void multiply(Vector<Sum<SA>, L> (&sum)[R][NV], const SA* a, int64_t a_stride, const SB* b,
                            int64_t b_stride, int64_t count, F where) {
  alignas(64) Sum<SA> total[R * NV * L];
  bool long_sum = false;
  int64_t left = kRun;
  const auto add_total = [&] {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[r][j] += load<L>(total + (r * NV + j) * L);
  };
  for (int64_t e = 0; e < count; ++e) {
    const Step step = where(e);
    if (kFetches && kByRow && e + 1 < count) fetch_rows<R>(a, a_stride, where(e + 1));
    for (int64_t d = 0; d < step.depth; d += kRun) {
      if (left <= 0) {
        if (long_sum) add_total();
        for (int r = 0; r < R; ++r)
          for (int j = 0; j < NV; ++j) store<L>(total + (r * NV + j) * L, sum[r][j]);
        clear(sum);
        asm volatile("" : : "r"(total) : "memory");  // it must not take the registers of the sums
        long_sum = true;
        left = kRun;
      }
      const int64_t run = least(kRun, step.depth - d);
      multiply_run<R, NV, L, kByRow, kFetches>(sum, a + step.a + d * (kByRow ? 1 : a_stride), a_stride,
                                               b + step.b + d * b_stride, b_stride, run);
      left -= run;
    }
  }
  if (long_sum) add_total();
}

// Where a register tile goes: rows of y, `columns` of them valid from y on.
template <class S>
struct Target {
  S* y;
  int64_t stride, columns;
  const Sum<S>* bias;  // padded to whole vectors, or null
  Activation activation;
};

template <int R, int NV, int L, class S>
ALWAYS_INLINE void finish(Vector<Sum<S>, L> (&sum)[R][NV], const Target<S>& target, int64_t row) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      Vector<Sum<S>, L> v = sum[r][j];
      if (target.bias) v += load<L>(target.bias + j * L);
      if (target.activation != Activation::none) v = activate<Sum<S>, L>(v, target.activation);
      store_some<L>(target.y + (row + r) * target.stride + j * L, v, target.columns - j * L);
    }
}

// Calls f(row, register tile of R rows) for rows [row, last), the rest by halves.
template <int R, class F>
ALWAYS_INLINE void for_rows(int64_t row, int64_t last, F f) {
  for (; row + R <= last; row += R) f(row, RowsOf<R>{});
  if constexpr (R > 1)
    if (row < last) for_rows<R / 2>(row, last, f);
}

// Columns of a register tile, and how many rows it has.
template <int L_, int NV_>
struct Panel {
  static constexpr int L = L_, NV = NV_, width = L_ * NV_, R = NV_ > 2 ? kRowsOfWidePanel : kRows;
};

// Calls f with the widest panel of at most kMost vectors that fits into `left` columns, or the narrowest one.
template <class A, int kMost, class F>
ALWAYS_INLINE void with_panel(int64_t left, F f) {
  constexpr int L = kLanes<A>, kLeast = 16 / static_cast<int>(sizeof(A));
  if constexpr (kMost > 2)
    if (left >= kMost * L) return f(Panel<L, kMost>{});
  if (left >= 2 * L) return f(Panel<L, 2>{});
  if constexpr (L / 2 >= kLeast) {
    if constexpr (L / 4 >= kLeast)
      if (left < L / 2) return f(Panel<L / 4, 1>{});
    if (left < L) return f(Panel<L / 2, 1>{});
  }
  f(Panel<L, 1>{});
}

// Calls f(first column, panel type) for the panels of `width` columns, from `begin` to `end`.
template <class A, int kMost, class F>
ALWAYS_INLINE void for_panels(int64_t width, int64_t begin, int64_t end, F f) {
  while (begin < least(width, end))
    with_panel<A, kMost>(width - begin, [&](auto panel) {
      f(begin, panel);
      begin += decltype(panel)::width;
    });
}

// Units are the pieces of a panel's columns of all lines; the first unit of part `part` of `parts`,
// each with about as many entries.
int64_t unit_of_part(const Lines& lines, int64_t pieces, int64_t part, int64_t parts) {
  const int64_t units = lines.lines * pieces;
  if (part >= parts) return units;
  const auto before = [&](int64_t unit) {
    const int64_t n = unit / pieces, entries = lines.ptr[n + 1] - lines.ptr[n];
    return (lines.ptr[n] + n) * pieces + (entries + 1) * (unit % pieces);
  };
  const int64_t goal = (lines.entries + lines.lines) * pieces * part / parts;
  int64_t low = 0, high = units;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (before(middle) < goal)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

}  // namespace
}  // namespace jaxsparse_cpu
