// Products with a matrix W of which n of every m neighbouring inputs are stored. Long batches meet panels of W that are
// expanded to zeros and all into the second-level cache; of few rows, W is expanded in registers, and its bytes decide.
#pragma once

#include "micro.h"

#define INLINE_LAMBDA __attribute__((always_inline))

namespace jaxsparse_cpu {
namespace {

// n and m, as the compiler knows them (N > 0) or not, and the type of a group's bits.
template <class B_, int N = 0, int M = 0>
struct Kept {
  using B = B_;
  static constexpr int kN = N, kM = M, kSlots = N ? N : 32, kGroup = M ? M : 32;
  int64_t slots, group;
  int64_t n() const { return N ? N : slots; }
  int64_t m() const { return M ? M : group; }
};

template <class A>
struct WordOf {
  using type = uint32_t;
};
template <>
struct WordOf<double> {
  using type = uint64_t;
};

// The bits of `count` columns, at most L, in lanes as wide as the sums'.
template <class A, int L, class B>
ALWAYS_INLINE Vector<typename WordOf<A>::type, L> load_words(const B* bits, int64_t count) {
  Vector<B, L> v{};
  if (__builtin_expect(count >= L, 1))
    v = load_bits<Vector<B, L>>(bits);
  else if (count > 0)
    __builtin_memcpy(&v, bits, count * sizeof(B));
  return __builtin_convertvector(v, Vector<typename WordOf<A>::type, L>);
}

template <int... I, class F>
ALWAYS_INLINE void each(Ints<I...>, F f) {
  (f(int64_t{I}), ...);
}

// f(i) for i < count, unrolled where the compiler knows the count.
template <int kCount, class F>
ALWAYS_INLINE void times(int64_t count, F f) {
  if constexpr (kCount > 0)
    each(typename Count<kCount>::type{}, f);
  else
    for (int64_t i = 0; i < count; ++i) f(i);
}

// places[j]: the bit of the j-th stored row of a group.
template <class K, class V>
ALWAYS_INLINE void split_bits(const K& kept, V bits, V* places) {
  times<K::kN>(kept.n(), [&](int64_t j) INLINE_LAMBDA {
    places[j] = bits & -bits;
    bits ^= places[j];
  });
}

// Whether the j-th stored row of a group can be row k of it.
template <class K>
ALWAYS_INLINE bool may_be(const K& kept, int64_t j, int64_t k) {
  return j <= k && k - j <= kept.m() - kept.n();
}

// Calls f(k, row k) for the rows of group g of W, columns [c, c + L) of them.
template <int L, class S, class K, class F>
ALWAYS_INLINE void expand_group(const NM& p, const K& kept, int64_t g, int64_t c, F f) {
  using A = Sum<S>;
  using V = Vector<A, L>;
  using Words = Vector<typename WordOf<A>::type, L>;
  const S* values = static_cast<const S*>(p.values) + g * kept.n() * p.out + c;
  const auto* bits = static_cast<const typename K::B*>(p.bits) + g * p.out + c;
  const int64_t count = p.out - c;
  V value[K::kSlots];
  Words place[K::kSlots];
  split_bits(kept, load_words<A, L>(bits, count), place);
  times<K::kN>(kept.n(), [&](int64_t j) INLINE_LAMBDA { value[j] = load_some<L>(values + j * p.out, count); });
  times<K::kM>(kept.m(), [&](int64_t k) INLINE_LAMBDA {
    const Words here = splat<L>(static_cast<typename WordOf<A>::type>(1) << k);
    V row{};
    times<K::kN>(kept.n(), [&](int64_t j) INLINE_LAMBDA {
      if (may_be(kept, j, k)) row = place[j] == here ? value[j] : row;
    });
    f(k, row);
  });
}

// ---- a long batch: panels -----------------------------------------------------------------

// Columns of a panel. The last panel is as wide as all others, with zeros at the end: one kernel is enough.
template <class A>
constexpr int kPanel = 2 * kLanes<A>;

// Columns [j, j + panel) of W as [groups * m][panel].
template <class S, class K>
void expand_columns(const NM& p, const K& kept, int64_t j, Sum<S>* to) {
  constexpr int L = kLanes<Sum<S>>, W = kPanel<Sum<S>>;
  for (int64_t g = 0; g < p.groups; ++g)
    for (int v = 0; v < W; v += L)
      expand_group<L, S>(p, kept, g, j + v,
                         [&](int64_t k, auto row) { store<L>(to + (g * kept.m() + k) * W + v, row); });
}

// Rows [j, j + panel) of W, as the columns of its transpose: [out][panel].
template <class S, class K>
void expand_rows(const NM& p, const K& kept, int64_t j, Sum<S>* to) {
  using A = Sum<S>;
  constexpr int L = kLanes<A>, W = kPanel<A>;
  alignas(64) A rows[(W + 2 * K::kGroup) * L] = {};
  const int64_t m = kept.m(), first = j / m, last = least(p.groups, ceil_div(j + W, m));
  for (int64_t c = 0; c < p.out; c += L) {
    for (int64_t g = first; g < last; ++g)
      expand_group<L, S>(p, kept, g, c, [&](int64_t k, auto row) { store<L>(rows + ((g - first) * m + k) * L, row); });
    for (int v = 0; v < W; v += L) {
      Vector<A, L> r[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) r[i] = load<L>(rows + (j - first * m + v + i) * L);
      transpose<L>(r);
      const int64_t count = least<int64_t>(L, p.out - c);
      for (int i = 0; i < count; ++i) store<L>(to + (c + i) * W + v, r[i]);
    }
  }
}

template <class S>
Target<S> target_at(const NM& p, int64_t column, const Sum<S>* bias) {
  const int64_t width = p.transposed ? p.in : p.out;
  return {static_cast<S*>(p.y) + column, width, width - column, bias, p.activation};
}

// The bias of `count` columns, or null. `to` has room for whole vectors.
template <class S>
const Sum<S>* widened_bias(const NM& p, int64_t column, int64_t count, Sum<S>* to) {
  const int64_t valid = (p.transposed ? p.in : p.out) - column;
  for (int64_t i = 0; i < count && p.bias; ++i)
    to[i] = i < valid ? widen(static_cast<const S*>(p.bias)[column + i]) : Sum<S>(0);
  return p.bias ? to : nullptr;
}

// Columns [j, j + panel) of y, for batch rows [row, last).
template <class S>
void multiply_panel(const NM& p, const Rows<Sum<S>>& x, int64_t j, int64_t row, int64_t last, const Sum<S>* panel) {
  constexpr int L = kLanes<Sum<S>>, W = kPanel<Sum<S>>;
  alignas(64) Sum<S> bias[W];
  const Target<S> target = target_at<S>(p, j, widened_bias<S>(p, j, W, bias));
  const int64_t depth = p.transposed ? p.out : p.in;
  for_rows<kRows>(row, last, [&](int64_t r, auto rows) {
    Vector<Sum<S>, L> sum[rows.R][2] = {};
    multiply<rows.R, 2, L, true, false>(sum, x.data + r * x.stride, x.stride, panel, W, 1,
                                 [&](int64_t) { return Step{0, 0, depth}; });
    finish<rows.R, 2, L, S>(sum, target, r);
  });
}

// ---- few rows -----------------------------------------------------------------------------

// sums[r][c - first] for columns [first, last) of x W, in runs of kRun rows of W.
template <int R, class S, class K>
void add_columns(const NM& p, const K& kept, const Rows<Sum<S>>& x, int64_t row, int64_t first, int64_t last,
                 Sum<S>* sums) {
  constexpr int L = kLanes<Sum<S>>;
  using V = Vector<Sum<S>, L>;
  alignas(64) Sum<S> run[R * kStrip] = {};
  const int64_t groups = most<int64_t>(1, kRun / kept.m());
  for (int64_t begin = 0; begin < p.groups; begin += groups) {
    const int64_t end = least(begin + groups, p.groups);
    for (int64_t g = begin; g < end; ++g) {
      const Sum<S>* from = x.data + row * x.stride + g * kept.m();
      const int64_t inside = p.in - g * kept.m();
      for (int64_t c = first; c < last; c += L) {
        V acc[R];
        for (int r = 0; r < R; ++r) acc[r] = load<L>(run + r * kStrip + c - first);
        expand_group<L, S>(p, kept, g, c, [&](int64_t k, V w) {
          if (__builtin_expect(k < inside, 1))
            for (int r = 0; r < R; ++r) acc[r] += splat<L>(from[r * x.stride + k]) * w;
        });
        for (int r = 0; r < R; ++r) store<L>(run + r * kStrip + c - first, acc[r]);
      }
    }
    for (int64_t i = 0; i < R * kStrip; i += L) {
      const V sum = begin ? load<L>(sums + i) : V{};
      store<L>(sums + i, sum + load<L>(run + i));
      store<L>(run + i, V{});
    }
  }
}

// sums[r][k - first] for rows [first, last) of W, whole groups, in x W^T.
template <int R, class S, class K>
void add_rows(const NM& p, const K& kept, const Rows<Sum<S>>& x, int64_t row, int64_t first, int64_t last,
              Sum<S>* sums) {
  constexpr int L = kLanes<Sum<S>>;
  using V = Vector<Sum<S>, L>;
  for (int64_t g = first / kept.m(); g * kept.m() < last; ++g) {
    V acc[K::kGroup][R] = {};
    for (int64_t c = 0; c < p.out; c += L) {
      V d[R];
      for (int r = 0; r < R; ++r) d[r] = load_some<L>(x.data + (row + r) * x.stride + c, p.out - c);
      expand_group<L, S>(p, kept, g, c, [&](int64_t k, V w) {
        for (int r = 0; r < R; ++r) acc[k][r] += d[r] * w;
      });
    }
    for (int64_t k = 0; k < kept.m(); ++k)
      for (int r = 0; r < R; ++r) {
        Sum<S> total = 0;
        for (int i = 0; i < L; ++i) total += acc[k][r][i];
        sums[r * kStrip + g * kept.m() + k - first] = total;
      }
  }
}

// One strip of y, for the rows from `row` to `last`.
template <class S, class K>
void multiply_strip(const NM& p, const K& kept, const Rows<Sum<S>>& x, int64_t row, int64_t last, int64_t first,
                    int64_t end) {
  using A = Sum<S>;
  constexpr int L = kLanes<A>;
  for_rows<2>(row, last, [&](int64_t r, auto rows) {
    alignas(64) A sums[rows.R * kStrip] = {};
    p.transposed ? add_rows<rows.R, S>(p, kept, x, r, first, end, sums)
                 : add_columns<rows.R, S>(p, kept, x, r, first, end, sums);
    for (int64_t c = first; c < end; c += L) {
      alignas(64) A bias[L];
      const Target<S> target = target_at<S>(p, c, widened_bias<S>(p, c, L, bias));
      for (int i = 0; i < rows.R; ++i) {
        Vector<A, L> sum[1][1] = {{load<L>(sums + i * kStrip + c - first)}};
        finish<1, 1, L, S>(sum, target, r + i);
      }
    }
  });
}

// ---- the products -------------------------------------------------------------------------

template <class S, class K>
bool n_m_multiply(const NM& p, const K& kept, const Pool& pool) {
  using A = Sum<S>;
  const int64_t depth = p.transposed ? p.out : p.in, width = p.transposed ? p.in : p.out;
  const bool few = p.rows <= kFewRows;
  const int workers = workers_for(pool, double(p.rows) * double(p.in) * double(p.out));
  const int64_t stride = packed_stride<S>(depth);
  const int64_t own = few ? 0 : ceil_div(most(p.groups * kept.m(), p.out) * kPanel<A>, 16) * 16;
  Scratch packed(sizeof(A) * stride * p.rows), panels(sizeof(A) * own * workers);
  if (!packed.data() || !panels.data()) return false;
  A* copy = reinterpret_cast<A*>(packed.data());
  const int64_t slabs = stride ? least<int64_t>(p.rows, kTasksPerWorker * workers) : 0;
  const auto pack = [&](int64_t s, int) {
    pack_rows(static_cast<const S*>(p.x), depth, s * p.rows / slabs, (s + 1) * p.rows / slabs, copy, stride);
  };
  const Rows<A> x = rows_of(static_cast<const S*>(p.x), depth, copy, stride);
  // A strip is whole groups of W^T's columns.
  const int64_t unit = !few ? kPanel<A> : p.transposed ? kStrip / kept.m() * kept.m() : kStrip;
  const int64_t units = ceil_div(width, unit), chunk = few ? kFewRows : kTaskRows, chunks = ceil_div(p.rows, chunk);
  const auto multiply = [&](int64_t task, int worker) {
    const int64_t row = task / units * chunk, last = least(row + chunk, p.rows), j = task % units * unit;
    if (few) return multiply_strip<S>(p, kept, x, row, last, j, least(j + unit, width));
    A* panel = reinterpret_cast<A*>(panels.data()) + own * worker;
    p.transposed ? expand_rows<S>(p, kept, j, panel) : expand_columns<S>(p, kept, j, panel);
    multiply_panel<S>(p, x, j, row, last, panel);
  };
  const Phase phases[] = {phase(slabs, pack), phase(chunks * units, multiply)};
  run_phases(pool, workers, phases, 2);
  return true;
}

// Calls f with n and m, which the compiler knows where they are 2:4.
template <class F>
bool with_kept(const NM& p, F f) {
  if (p.m <= 8) {
    if (p.n == 2 && p.m == 4) return f(Kept<uint8_t, 2, 4>{p.n, p.m});
    return f(Kept<uint8_t>{p.n, p.m});
  }
  return f(Kept<uint32_t>{p.n, p.m});
}

}  // namespace
}  // namespace jaxsparse_cpu
