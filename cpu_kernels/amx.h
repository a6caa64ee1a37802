// Products of bfloat16 blocks on tile registers (AMX): 16 rows of 64 bytes each, multiplied 16 x 32 by 32 x 16 numbers
// at once, summed in float32. x is read where it lies; values are rearranged, pairs of inputs side by side.
#pragma once

#include "blocks.h"

#ifdef __AMX_BF16__

namespace jaxsparse_cpu {
namespace {

constexpr int64_t kTile = 16;  // rows of a tile, and its columns of 4 bytes
constexpr int64_t kTwoTiles = 2 * kTile;

// Tiles 0 to 3: sums, 2 x 2. Tiles 4 and 5: x. Tiles 6 and 7: values, of `depth` inputs.
class Tiles {
 public:
  explicit Tiles(int64_t depth) {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      const bool is_x = tile == 4 || tile == 5, is_values = tile > 5;
      const auto bytes = static_cast<uint16_t>(is_x ? 2 * depth : 64);
      __builtin_memcpy(config + 16 + 2 * tile, &bytes, 2);
      config[48 + tile] = static_cast<uint8_t>(is_values ? depth / 2 : kTile);
    }
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Inputs that one multiplication sums: a whole tile's, or those of a block of 16.
int64_t step_of(int64_t depth) { return least(depth, kTwoTiles); }

// How an operand's tiles lie: bytes from row to row, and from a tile to the next in the rows of x or the columns of w.
struct Layout {
  int64_t row, tile;
};

// R x N tiles of sums = x w, over steps e < count. `at(e, &x, &w)` says where both begin there, asked in order.
template <int R, int N, class F>
ALWAYS_INLINE void multiply_tiles(const Layout& x, const Layout& w, int64_t count, float* sums, F at) {
  _tile_zero(0);
  if (N > 1) _tile_zero(1);
  if (R > 1) _tile_zero(2);
  if (R > 1 && N > 1) _tile_zero(3);
  for (int64_t e = 0; e < count; ++e) {
    const bf16 *from, *by;
    at(e, &from, &by);
    const char *rows = reinterpret_cast<const char*>(from), *columns = reinterpret_cast<const char*>(by);
    _tile_loadd(6, columns, w.row);
    if (N > 1) _tile_loadd(7, columns + w.tile, w.row);
    _tile_loadd(4, rows, x.row);
    _tile_dpbf16ps(0, 4, 6);
    if (N > 1) _tile_dpbf16ps(1, 4, 7);
    if (R > 1) {
      _tile_loadd(5, rows + x.tile, x.row);
      _tile_dpbf16ps(2, 5, 6);
      if (N > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr int64_t stride = N * kTile * sizeof(float);
  _tile_stored(0, sums, stride);
  if (N > 1) _tile_stored(1, sums + kTile, stride);
  if (R > 1) _tile_stored(2, sums + kTile * N * kTile, stride);
  if (R > 1 && N > 1) _tile_stored(3, sums + kTile * N * kTile + kTile, stride);
}

using Pairs = Vector<float, 16>;  // of bfloat16 numbers

ALWAYS_INLINE void store_pairs(const Pairs& pairs, bf16* to) { __builtin_memcpy(to, &pairs, sizeof pairs); }

// 16 columns of a and b side by side: a0 b0 a1 b1 ...
ALWAYS_INLINE Pairs pairs_of(const bf16* a, const bf16* b) {
  const auto low = __builtin_convertvector(load_bits<Vector<uint16_t, 16>>(a), Vector<uint32_t, 16>);
  const auto high = __builtin_convertvector(load_bits<Vector<uint16_t, 16>>(b), Vector<uint32_t, 16>);
  return bit_cast<Pairs>(low | high << 16);
}

// Columns [j, j + N * 16) of a line's blocks, as [entries][depth / 2][N * 16][2].
template <int N>
void pack_pairs(const Product& p, int64_t line, int64_t j, bf16* to) {
  const bf16* values = static_cast<const bf16*>(p.values);
  for (int64_t k = p.lines.ptr[line]; k < p.lines.ptr[line + 1]; ++k, to += p.depth * N * kTile) {
    const bf16* block = values + (p.lines.order ? p.lines.order[k] : k) * p.depth * p.width;
    for (int n = 0; n < N; ++n) {
      const int64_t column = j + n * kTile;
      bf16* at = to + 2 * n * kTile;
      if (!p.transposed) {
        for (int64_t d = 0; d < p.depth; d += 2, at += 2 * N * kTile)
          store_pairs(pairs_of(block + d * p.width + column, block + (d + 1) * p.width + column), at);
        continue;
      }
      for (int64_t d = 0; d < p.depth; d += kTwoTiles) {
        const int64_t pairs = least<int64_t>(kTile, (p.depth - d) / 2);
        Pairs r[kTile];
#pragma GCC unroll 16
        for (int i = 0; i < kTile; ++i) {
          r[i] = Pairs{};
          __builtin_memcpy(&r[i], block + (column + i) * p.depth + d, 4 * pairs);
        }
        transpose<kTile>(r);
        for (int64_t i = 0; i < pairs; ++i, at += 2 * N * kTile) store_pairs(r[i], at);
      }
    }
  }
}

// Columns [j, j + N * 16) of line `line`, for the tiles of rows [tile, last).
template <int N>
void multiply_columns(const Product& p, const bf16* rest, const bf16* w, int64_t line, int64_t j, int64_t tile,
                      int64_t last) {
  const int64_t begin = p.lines.ptr[line], entries = p.lines.ptr[line + 1] - begin;
  const int64_t step = step_of(p.depth), count = entries * (p.depth / step), column = line * p.width + j;
  const int32_t* index = p.lines.index + begin;
  alignas(64) float bias[N * kTile], sums[2 * kTile * N * kTile];
  for (int i = 0; i < N * kTile && p.bias; ++i) bias[i] = widen(static_cast<const bf16*>(p.bias)[column + i]);
  const int64_t bytes = p.in * int64_t(sizeof(bf16));
  const auto run = [&](int64_t t, auto rows) {
    const bf16* x = (t + 1) * kTile <= p.m ? static_cast<const bf16*>(p.x) + t * kTile * p.in : rest;
    const int32_t* entry = index;
    int64_t input = 0;
    multiply_tiles<rows.R, N>({bytes, kTile * bytes}, {N * 64, 64}, count, sums,
                              [&](int64_t e, const bf16** from, const bf16** by) {
                                *from = x + *entry * p.depth + input;
                                *by = w + e * step * N * kTile;
                                if ((input += step) < p.depth) return;
                                input = 0;
                                ++entry;
                              });
    const int64_t valid = least<int64_t>(rows.R * kTile, p.m - t * kTile);
    for (int64_t r = 0; r < valid; ++r)
      for (int n = 0; n < N; ++n) {
        Vector<float, 16> v = load<16>(sums + (r * N + n) * kTile);
        if (p.bias) v += load<16>(bias + n * kTile);
        if (p.activation != Activation::none) v = activate<float, 16>(v, p.activation);
        store<16>(static_cast<bf16*>(p.y) + (t * kTile + r) * p.out + column + n * kTile, v);
      }
  };
  int64_t t = tile;
  for (; t + 2 <= last && (t + 2) * kTile <= p.m; t += 2) run(t, RowsOf<2>{});
  for (; t < last; ++t) run(t, RowsOf<1>{});
}

// Whether whole tiles cover the blocks, and enough rows pay for rearranging the values.
bool suits_tiles(const Product& p) {
  const int64_t enough = p.transposed ? kRowsWorthTransposedTiles : kTile;
  return p.m >= enough && p.width % kTile == 0 && (p.depth == kTile || p.depth % kTwoTiles == 0) &&
         p.in % p.depth == 0 && p.out % p.width == 0;
}

bool tiles_spmm(const Product& p, const Pool& pool) {
  const Lines& lines = p.lines;
  if (!in_range(lines, 0, lines.lines)) return false;
  const int64_t pieces = ceil_div(p.width, kTwoTiles), longest = longest_line(lines);
  const double work = double(p.m) * double(lines.entries) * double(p.depth) * double(p.width);
  const int workers = workers_for(pool, work / kTileSpeed);
  const int64_t own = longest * p.depth * kTwoTiles;
  Scratch panels(sizeof(bf16) * own * workers), padded(sizeof(bf16) * kTile * p.in);
  if (!panels.data() || !padded.data()) return false;
  bf16* rest = reinterpret_cast<bf16*>(padded.data());
  const int64_t left = p.m % kTile, tiles = ceil_div(p.m, kTile);
  if (left) {
    __builtin_memcpy(rest, static_cast<const bf16*>(p.x) + (p.m - left) * p.in, sizeof(bf16) * left * p.in);
    __builtin_memset(rest + left * p.in, 0, sizeof(bf16) * (kTile - left) * p.in);
  }
  const int64_t chunk = kTaskRowsOfTiles / kTile, chunks = ceil_div(tiles, chunk);
  const int64_t parts = workers == 1 ? 1 : least<int64_t>(lines.lines * pieces, workers * kTasksPerWorker);
  const auto multiply = [&](int64_t task, int worker) {
    const Tiles configured(step_of(p.depth));
    const int64_t tile = task / parts * chunk, last = least(tile + chunk, tiles);
    const int64_t end = unit_of_part(lines, pieces, task % parts + 1, parts);
    bf16* panel = reinterpret_cast<bf16*>(panels.data()) + own * worker;
    for (int64_t u = unit_of_part(lines, pieces, task % parts, parts); u < end; ++u) {
      const int64_t line = u / pieces, j = u % pieces * kTwoTiles;
      if (p.width - j >= kTwoTiles) {
        pack_pairs<2>(p, line, j, panel);
        multiply_columns<2>(p, rest, panel, line, j, tile, last);
      } else {
        pack_pairs<1>(p, line, j, panel);
        multiply_columns<1>(p, rest, panel, line, j, tile, last);
      }
    }
  };
  const Phase phases[] = {phase(chunks * parts, multiply)};
  run_phases(pool, workers, phases, 1);
  return true;
}

// One operand of the sampled product, [rows][width], as tiles of 16 of its columns and 32 of its rows, the summed ones:
// [width / 16][rows / 32][16][64 bytes], zeros beyond the last row. `across`: a tile's rows are its columns; else pairs
// of rows.
struct Summed {
  int64_t rows, width, steps;

  Summed(int64_t rows_, int64_t width_) : rows(rows_), width(width_), steps(ceil_div(rows_, kTwoTiles)) {}
  static constexpr int64_t kTileNumbers = kTwoTiles * kTile;
  int64_t size() const { return width / kTile * steps * kTileNumbers; }
  Layout layout() const { return {64, steps * kTileNumbers * int64_t(sizeof(bf16))}; }
  const bf16* at(const bf16* packed, int64_t column) const { return packed + column / kTile * steps * kTileNumbers; }

  template <bool kAcross>
  void pack(const bf16* x, int64_t step, bf16* to) const {
    static const bf16 zeros[kTile] = {};
    const int64_t first = step * kTwoTiles;
    for (int64_t f = 0; f < width; f += kTile) {
      const auto row = [&](int64_t i) { return first + i < rows ? x + (first + i) * width + f : zeros; };
      Pairs r[kTile];
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) r[i] = pairs_of(row(2 * i), row(2 * i + 1));
      if (kAcross) transpose<kTile>(r);
      bf16* tile = to + (f / kTile * steps + step) * kTileNumbers;
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) store_pairs(r[i], tile + i * kTwoTiles);
    }
  }
};

// Columns [j, j + N * 16) of the block at one stored entry; x and dy are the tiles of its slices.
template <int N>
void outer_columns(const Outer& p, const Summed& xs, const bf16* x, const Summed& dys, const bf16* dy, bf16* block,
                   int64_t j) {
  alignas(64) float sums[2 * kTile * N * kTile];
  const auto run = [&](int64_t i, auto rows) {
    const bf16* from = xs.at(x, i);
    multiply_tiles<rows.R, N>(xs.layout(), dys.layout(), xs.steps, sums,
                              [&](int64_t e, const bf16** a, const bf16** b) {
                                *a = from + e * Summed::kTileNumbers;
                                *b = dy + e * Summed::kTileNumbers;
                              });
    for (int r = 0; r < rows.R * kTile; ++r)
      for (int n = 0; n < N; ++n)
        store<16>(block + (i + r) * p.width + j + n * kTile, load<16>(sums + (r * N + n) * kTile));
  };
  int64_t i = 0;
  for (; i + kTwoTiles <= p.depth; i += kTwoTiles) run(i, RowsOf<2>{});
  if (i < p.depth) run(i, RowsOf<1>{});
}

bool suits_tiles(const Outer& p) {
  return p.m >= kTile && p.width % kTile == 0 && p.depth % kTile == 0 && p.in % p.depth == 0 && p.out % p.width == 0;
}

bool tiles_sddmm(const Outer& p, const Pool& pool) {
  const Lines& lines = p.lines;
  if (!in_range(lines, 0, lines.lines)) return false;
  const int64_t size = p.depth * p.width, pieces = ceil_div(p.width, kTwoTiles);
  const Summed xs(p.m, p.in), dys(p.m, p.out);
  const int workers = workers_for(pool, double(p.m) * double(lines.entries) * double(size) / kTileSpeed);
  Scratch packed(sizeof(bf16) * (xs.size() + dys.size()));
  if (!packed.data()) return false;
  bf16 *x = reinterpret_cast<bf16*>(packed.data()), *dy = x + xs.size();
  const auto pack = [&](int64_t step, int) {
    xs.pack<true>(static_cast<const bf16*>(p.x), step, x);
    dys.pack<false>(static_cast<const bf16*>(p.dy), step, dy);
  };
  const int64_t parts = workers == 1 ? 1 : least<int64_t>(lines.lines * pieces, workers * kTasksPerWorker);
  const auto multiply = [&](int64_t part, int) {
    const Tiles configured(kTwoTiles);
    const int64_t end = unit_of_part(lines, pieces, part + 1, parts);
    for (int64_t u = unit_of_part(lines, pieces, part, parts); u < end; ++u) {
      const int64_t n = u / pieces, j = u % pieces * kTwoTiles;
      const bf16* columns = dys.at(dy, n * p.width + j);
      for (int64_t k = lines.ptr[n]; k < lines.ptr[n + 1]; ++k) {
        const bf16* rows = xs.at(x, lines.index[k] * p.depth);
        bf16* block = static_cast<bf16*>(p.values) + k * size;
        p.width - j >= kTwoTiles ? outer_columns<2>(p, xs, rows, dys, columns, block, j)
                                 : outer_columns<1>(p, xs, rows, dys, columns, block, j);
      }
    }
  };
  const Phase phases[] = {phase(xs.steps, pack), phase(parts, multiply)};
  run_phases(pool, workers, phases, 2);
  return true;
}

}  // namespace
}  // namespace jaxsparse_cpu

#endif  // __AMX_BF16__
