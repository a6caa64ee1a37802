// Batch-minor tiles: tile t holds batch rows t*T .. t*T+T-1 as [features][T], so that one
// feature is a few whole vectors and a sparse entry is a load and a multiply-add each.
#pragma once

#include <limits>
#include <type_traits>

#include "choose.h"
#include "epilogue.h"
#include "kernels.h"
#include "parallel.h"
#include "vectors.h"

namespace jaxsparse_cpu {
namespace {

template <class F>
Phase phase(int64_t tasks, const F& f) {
  return {tasks,
          [](const void* context, int64_t task, int worker) {
            (*static_cast<const F*>(context))(task, worker);
          },
          &f};
}

// Scratch that goes back by itself.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(take_scratch(bytes)) {}
  ~Scratch() { give_scratch(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_;
};

// A flag that any worker may raise.
struct Flag {
  int raised = 0;
  void raise() { __atomic_store_n(&raised, 1, __ATOMIC_RELAXED); }
  bool up() const { return __atomic_load_n(&raised, __ATOMIC_RELAXED) != 0; }
};

// Whether all of index[begin .. end) lie in [0, limit): one compare a vector.
template <class I>
bool in_range(const I* index, int64_t begin, int64_t end, int64_t limit) {
  constexpr int L = kVectorBytes / sizeof(I);
  using Unsigned = std::make_unsigned_t<I>;
  using V = Vector<Unsigned, L>;
  if (limit > std::numeric_limits<Unsigned>::max()) return true;
  const V bound = splat<L>(static_cast<Unsigned>(limit));
  Vector<std::make_signed_t<I>, L> bad{};
  int64_t k = begin;
  for (; k + L <= end; k += L) {
    bad |= load_bits<V>(index + k) >= bound;
  }
  bool ok = true;
  for (int i = 0; i < L; ++i) ok &= bad[i] == 0;
  for (; k < end; ++k) ok &= static_cast<Unsigned>(index[k]) < static_cast<Unsigned>(limit);
  return ok;
}

bool in_range(const Lines& lines, int64_t first, int64_t last) {
  const int64_t begin = lines.ptr[first], end = lines.ptr[last];
  return in_range(lines.index, begin, end, lines.limit) &&
         (!lines.order || in_range(lines.order, begin, end, lines.entries));
}

// The first line of part `part` of `parts`, each with about as many entries (an empty line
// counts as a little, since it too must be written).
int64_t line_of_part(const Lines& lines, int64_t part, int64_t parts) {
  if (part >= parts) return lines.lines;
  const int64_t goal = (lines.entries + kEntriesPerLine * lines.lines) * part / parts;
  int64_t low = 0, high = lines.lines;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (lines.ptr[middle] + kEntriesPerLine * middle < goal)
      low = middle + 1;
    else
      high = middle;
  }
  // Whole vectors of results, where that is fair.
  return lines.lines < kLinesWorthRounding * parts ? low : low / 16 * 16;
}

// Where slab `s` of `slabs` begins: at a whole vector, so that only the last one ends raggedly.
int64_t slab_begin(int64_t width, int64_t s, int64_t slabs) {
  return s == slabs ? width : width * s / slabs / 16 * 16;
}

// tile[f][0 .. NV*L) = x[row .. row + NV*L)[f] for f in [first, last); rows from m on are zero.
template <int L, int NV, class S>
void pack_tile(const S* x, int64_t m, int64_t width, int64_t row, int64_t first, int64_t last,
               Sum<S>* tile) {
  constexpr int T = NV * L;
  // A few features at a time for all rows, so that whole runs of the tile are written.
  for (int64_t begin = first; begin < last; begin += kPackedAtOnce) {
    const int64_t end = least(begin + kPackedAtOnce, last);
    for (int v = 0; v < NV; ++v) {
      const int64_t rows = most<int64_t>(0, least<int64_t>(L, m - row - v * L));
      const S* from = x + (row + v * L) * width;
      for (int64_t f = begin; f < end; f += L) {
        const int64_t count = least<int64_t>(L, end - f);
        Vector<Sum<S>, L> r[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          __builtin_prefetch(from + i * width + f + kPackedAtOnce, 0, kToSecondLevel);
          r[i] = i < rows ? load_some<L>(from + i * width + f, count) : Vector<Sum<S>, L>{};
        }
        transpose<L>(r);
        for (int i = 0; i < count; ++i) {
          __builtin_prefetch(tile + (f + i + kPackedAtOnce) * T + v * L, 1, kToSecondLevel);
          store<L>(tile + (f + i) * T + v * L, r[i]);
        }
      }
    }
  }
}

// y[row + b][first + i] = activation(tile[i][b] + bias[first + i]) for i < last - first.
template <int L, int NV, class S>
void unpack_tile(const Sum<S>* tile, int64_t row, int64_t m, int64_t width, int64_t first,
                 int64_t last, const S* bias, Activation activation, S* y) {
  constexpr int T = NV * L;
  for (int64_t f = first; f < last; f += L, tile += L * T) {
    const int64_t count = least<int64_t>(L, last - f);
    for (int v = 0; v < NV && row + v * L < m; ++v) {
      S* to = y + (row + v * L) * width + f;
      const int64_t rows = least<int64_t>(L, m - row - v * L);
      Vector<Sum<S>, L> r[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) r[i] = i < count ? load<L>(tile + i * T + v * L) : Vector<Sum<S>, L>{};
      if (bias)
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) r[i] += i < count ? widen(bias[f + i]) : 0;
      if (activation != Activation::none)
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) r[i] = activate<Sum<S>, L>(r[i], activation);
      transpose<L>(r);
      for (int b = 0; b < rows; ++b) {
        __builtin_prefetch(to + b * width + L, 1, kToSecondLevel);
        store_some<L>(to + b * width, r[b], count);
      }
    }
  }
}

template <int L_, int NV_>
struct Tile {
  static constexpr int L = L_, NV = NV_, T = L_ * NV_;
};

// Calls f with the type of the tile that begins `rows` batch rows before the end: kMost vectors
// where they fill, otherwise one tile that covers the rest (or, where it would be half empty,
// half of one).
template <class A, int kMost, class F>
ALWAYS_INLINE void with_tile(int64_t rows, F f) {
  constexpr int L = kLanes<A>;
  if constexpr (L >= 16)
    if (rows <= L / 4) return f(Tile<L / 4, 1>{});
  if constexpr (L >= 8)
    if (rows <= L / 2) return f(Tile<L / 2, 1>{});
  if (rows <= L) return f(Tile<L, 1>{});
  if (rows <= 2 * L && kMost > 2) return f(Tile<L, 2>{});
  if constexpr (kMost > 4)
    if (rows >= kMost * L) return f(Tile<L, kMost>{});
  f(Tile<L, least(kMost, 4)>{});
}

// Tiles [first, last), of which the first begins at row `begin`.
struct Round {
  int64_t first, last, begin;
};

// The batch cut into tiles, which are packed and used in rounds. Tile t begins at row `row(t)`.
template <class A, int kMost>
struct Batch {
  int64_t m, full, count, padded;

  explicit Batch(int64_t m_) : m(m_), full(m / (kMost * kLanes<A>)), count(0), padded(0) {
    for (; padded < m; ++count) padded += lanes(padded);
  }
  static int64_t lanes_of(int64_t rows) {
    int64_t n = 0;
    with_tile<A, kMost>(rows, [&](auto tile) { n = decltype(tile)::T; });
    return n;
  }
  int64_t lanes(int64_t row) const { return lanes_of(m - row); }
  int64_t row(int64_t t) const {
    constexpr int64_t T = kMost * kLanes<A>;
    if (t <= full) return t * T;
    int64_t at = full * T;
    for (int64_t i = full; i < t; ++i) at += lanes(at);
    return at;
  }
  // How many tiles are packed in one round, where a batch row takes `bytes`.
  int64_t per_round(int64_t bytes) const {
    return most<int64_t>(1, kRoundBytes / most<int64_t>(1, bytes * kMost * kLanes<A>));
  }
  // Calls f(round) for `step` tiles after the other, once for an empty batch, until it is false.
  template <class F>
  void in_rounds(int64_t step, F f) const {
    int64_t first = 0;
    do {
      const int64_t last = least(first + step, count);
      if (!f(Round{first, last, row(first)})) return;
      first = last;
    } while (first < count);
  }
  // f(tile type, first row)
  template <class F>
  void visit(int64_t t, F f) const {
    const int64_t at = row(t);
    with_tile<A, kMost>(m - at, [&](auto tile) { f(tile, at); });
  }
};

// One part of the lines against one tile, into sums [(last - first) * width][T].
template <class S>
struct Part {
  const Product& p;
  int64_t first, last;
  const Sum<S>* tile;
  Sum<S>* sums;
};

}  // namespace
}  // namespace jaxsparse_cpu
