// One call of a product by buffers that are not to be trusted: every face checks and runs them here.
#include "calls.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

#include "choose.h"
#include "parallel.h"

namespace jaxsparse_cpu {
namespace {

std::string text(const int64_t* v, int64_t n) {
  std::string list = "[";
  for (int64_t i = 0; i < n; ++i) list += (i ? ", " : "") + std::to_string(v[i]);
  return list + "]";
}

const char* name_of(Type type) {
  static const char* const names[] = {"float32", "float64", "bfloat16", "float16", "int32", "uint16", "another dtype"};
  return names[static_cast<int>(type)];
}

// Collects the first complaint, so that a call reads as a list of what it needs. x gives the dtype and the rows of all.
struct Needs {
  const Buffer& x;
  Type type;
  std::string wrong;

  Needs(const Buffer& x_, Dtype* dtype, int64_t* rows) : x(x_), type(x_.type) {
    that(type < Type::i32, "x must be float32, float64, bfloat16 or float16");
    that(x.rank >= 1, "x must have a dimension of features");
    if (!wrong.empty()) return;
    *dtype = static_cast<Dtype>(type);
    *rows = std::accumulate(x.dims, x.dims + x.rank - 1, int64_t{1}, std::multiplies<int64_t>());
  }
  void that(bool holds, const std::string& otherwise) {
    if (wrong.empty() && !holds) wrong = otherwise;
  }
  void dtype(const char* name, const Buffer& b, Type want) {
    if (wrong.empty() && b.type != want)
      wrong = std::string(name) + " is " + name_of(b.type) + ", needs " + name_of(want);
  }
  void shape(const char* name, const Buffer& b, const int64_t* dims, int64_t rank) {
    dtype(name, b, type);
    if (!wrong.empty() || (b.rank == rank && std::equal(dims, dims + rank, b.dims))) return;
    wrong = std::string(name) + " has shape " + text(b.dims, b.rank) + ", needs " + text(dims, rank);
  }
  void vector(const char* name, const Buffer& b, int64_t n) { shape(name, b, &n, 1); }
  void rows(const char* name, const Buffer& b, int64_t features) {
    dtype(name, b, type);
    const bool same = b.rank == x.rank && std::equal(x.dims, x.dims + x.rank - 1, b.dims);
    if (!wrong.empty() || (same && b.dims[b.rank - 1] == features)) return;
    std::vector<int64_t> dims(x.dims, x.dims + x.rank);
    dims.back() = features;
    wrong = std::string(name) + " has shape " + text(b.dims, b.rank) + ", needs " + text(dims.data(), x.rank);
  }
  void values(const char* name, const Buffer& b, int64_t entries, int64_t i, int64_t o) {
    const int64_t dims[] = {entries, i, o};
    shape(name, b, dims, i == 1 && o == 1 ? 1 : 3);
  }
  void activation(int64_t number) { that(number >= 0 && number <= 3, "no activation " + std::to_string(number)); }
  Lines lines(const Index& i, int64_t limit, bool may_be_narrow = false) {
    const bool narrow = may_be_narrow && i.index.type == Type::u16 && i.order.count() == 0;
    dtype("the index pointers", i.ptr, Type::i32);
    dtype("the index", i.index, narrow ? Type::u16 : Type::i32);
    dtype("the order", i.order, Type::i32);
    const int64_t entries = i.index.count(), order = i.order.count();
    that(i.ptr.count() >= 1, "index pointers are empty");
    that(order == 0 || order == entries, "order has " + std::to_string(order) + " entries, index has " +
                                             std::to_string(entries));
    return {i.ptr.count() - 1,
            limit,
            entries,
            static_cast<const int32_t*>(i.ptr.data),
            narrow ? nullptr : static_cast<const int32_t*>(i.index.data),
            order ? static_cast<const int32_t*>(i.order.data) : nullptr,
            narrow ? static_cast<const uint16_t*>(i.index.data) : nullptr};
  }
};

const int64_t kZero = 0;
const Buffer kNone{Type::i32, 1, &kZero, nullptr};

int64_t slices(int64_t size, int64_t block) { return block > 0 ? (size + block - 1) / block : 0; }

// A block-diagonal matrix is a sparse one whose line n holds the single entry n.
struct Diagonal {
  std::vector<int32_t> ptr;
  explicit Diagonal(int64_t n) : ptr(n + 1) { std::iota(ptr.begin(), ptr.end(), 0); }
  Lines lines() const {
    const int64_t n = int64_t(ptr.size()) - 1;
    return {n, n, n, ptr.data(), ptr.data(), nullptr};
  }
};

template <class S>
struct ColumnSums {
  int64_t rows, columns;
  const S* x;
  S* sums;

  static void run(const void* self, int64_t task, int) {
    static_cast<const ColumnSums*>(self)->sum(task * kColumnsOfSums);
  }
  void sum(int64_t first) const {
    const int64_t count = std::min(kColumnsOfSums, columns - first);
    S total[kColumnsOfSums] = {};
    for (int64_t row = 0; row < rows; row += kRun) {
      S some[kColumnsOfSums] = {};
      const S* from = x + row * columns + first;
      for (int64_t r = std::min(kRun, rows - row); r > 0; --r, from += columns)
        if (count == kColumnsOfSums)
          for (int64_t c = 0; c < kColumnsOfSums; ++c) some[c] += from[c];
        else
          for (int64_t c = 0; c < count; ++c) some[c] += from[c];
      for (int64_t c = 0; c < count; ++c) total[c] += some[c];
    }
    std::copy(total, total + count, sums + first);
  }
};

template <class S>
void sum_columns(const Buffer& x, const Buffer& sums, const Pool& pool) {
  const int64_t columns = sums.count();
  const ColumnSums<S> work{columns ? x.count() / columns : 0, columns, static_cast<const S*>(x.data),
                           static_cast<S*>(sums.data)};
  const Phase phase{(columns + kColumnsOfSums - 1) / kColumnsOfSums, ColumnSums<S>::run, &work};
  run_phases(pool, workers_for(pool, double(x.count())), &phase, 1);
}

// db = the sum of dy over all rows.
std::string call_sums(const Buffer& dy, const Buffer& dbias, int64_t features, const Pool& pool) {
  Dtype dtype{};
  int64_t rows = 0;
  Needs needs(dy, &dtype, &rows);
  needs.that(dtype == Dtype::f32 || dtype == Dtype::f64, "the gradient of a bias must be float32 or float64");
  needs.rows("dy", dy, features);
  needs.vector("dbias", dbias, features);
  if (!needs.wrong.empty()) return needs.wrong;
  dtype == Dtype::f32 ? sum_columns<float>(dy, dbias, pool) : sum_columns<double>(dy, dbias, pool);
  return "";
}

}  // namespace

std::string call_spmm(const Buffer& x, const Buffer& values, const Index& index, const Buffer& bias, const Buffer& y,
                      const Sizes& sizes, bool transposed, int64_t activation, const Pool& pool) {
  Product p{};
  Needs needs(x, &p.dtype, &p.m);
  p.in = transposed ? sizes.out : sizes.in;
  p.out = transposed ? sizes.in : sizes.out;
  p.depth = transposed ? sizes.block_out : sizes.block_in;
  p.width = transposed ? sizes.block_in : sizes.block_out;
  p.transposed = transposed;
  p.activation = static_cast<Activation>(activation);
  p.lines = needs.lines(index, slices(p.in, p.depth), p.m == 1 && p.depth == 1 && p.width == 1);
  needs.activation(activation);
  needs.rows("x", x, p.in);
  needs.values("blocks", values, p.lines.entries, sizes.block_in, sizes.block_out);
  needs.rows("y", y, p.out);
  const bool biased = bias.count() != 0;
  if (biased) needs.vector("bias", bias, p.out);
  if (!needs.wrong.empty()) return needs.wrong;
  p.x = x.data;
  p.values = values.data;
  p.bias = biased ? bias.data : nullptr;
  p.y = y.data;
  return spmm(p, pool);
}

std::string call_sddmm(const Buffer& x, const Buffer& dy, const Index& index, const Buffer& values,
                       const Sizes& sizes, const Pool& pool) {
  Outer p{};
  Needs needs(x, &p.dtype, &p.m);
  p.in = sizes.in;
  p.out = sizes.out;
  p.depth = sizes.block_in;
  p.width = sizes.block_out;
  p.lines = needs.lines(index, slices(p.in, p.depth));
  needs.rows("x", x, p.in);
  needs.rows("dy", dy, p.out);
  needs.values("blocks", values, p.lines.entries, p.depth, p.width);
  if (!needs.wrong.empty()) return needs.wrong;
  p.x = x.data;
  p.dy = dy.data;
  p.values = values.data;
  return sddmm(p, pool);
}

std::string call_spmm_grads(const Buffer& x, const Buffer& dy, const Buffer& values, const Index& index,
                            const Buffer& dx, const Buffer& dvalues, int64_t in, int64_t out, const Pool& pool) {
  Gradients p{};
  Needs needs(x, &p.dtype, &p.m);
  p.in = in;
  p.out = out;
  p.lines = needs.lines(index, out);
  needs.rows("x", x, in);
  needs.rows("dy", dy, out);
  needs.vector("blocks", values, p.lines.entries);
  needs.rows("dx", dx, in);
  needs.vector("dblocks", dvalues, p.lines.entries);
  if (!needs.wrong.empty()) return needs.wrong;
  p.x = x.data;
  p.dy = dy.data;
  p.values = values.data;
  p.dx = dx.data;
  p.dvalues = dvalues.data;
  return spmm_grads(p, pool);
}

std::string call_spmm_backward(const Buffer& x, const Buffer& dy, const Buffer& values, const Index& by_columns,
                               const Index& by_rows, const Buffer& dx, const Buffer& dvalues, const Buffer& dbias,
                               const Sizes& sizes, bool transposed, const Pool& pool) {
  const bool single = sizes.block_in == 1 && sizes.block_out == 1;
  std::string wrong;
  if (single && !transposed && dx.count() && dvalues.count()) {
    wrong = call_spmm_grads(x, dy, values, by_rows, dx, dvalues, sizes.in, sizes.out, pool);
  } else {
    if (dx.count())
      wrong = call_spmm(dy, values, transposed ? by_columns : by_rows, kNone, dx, sizes, !transposed, 0, pool);
    if (wrong.empty() && dvalues.count())
      wrong = call_sddmm(transposed ? dy : x, transposed ? x : dy, by_columns, dvalues, sizes, pool);
  }
  if (!wrong.empty() || !dbias.count()) return wrong;
  return call_sums(dy, dbias, transposed ? sizes.in : sizes.out, pool);
}

std::string call_block_diag_matmul(const Buffer& x, const Buffer& values, const Buffer& bias, const Buffer& y,
                                   bool transposed, int64_t activation, const Pool& pool) {
  Product p{};
  Needs needs(x, &p.dtype, &p.m);
  needs.dtype("blocks", values, x.type);
  needs.that(values.rank == 3, "blocks must have three dimensions");
  needs.activation(activation);
  if (!needs.wrong.empty()) return needs.wrong;
  const int64_t n = values.dims[0];
  p.depth = values.dims[transposed ? 2 : 1];
  p.width = values.dims[transposed ? 1 : 2];
  p.in = n * p.depth;
  p.out = n * p.width;
  p.transposed = transposed;
  p.activation = static_cast<Activation>(activation);
  needs.that(n < INT32_MAX, std::to_string(n) + " blocks overflow int32");
  needs.rows("x", x, p.in);
  needs.rows("y", y, p.out);
  const bool biased = bias.count() != 0;
  if (biased) needs.vector("bias", bias, p.out);
  if (!needs.wrong.empty()) return needs.wrong;
  const Diagonal diagonal(n);
  p.lines = diagonal.lines();
  p.x = x.data;
  p.values = values.data;
  p.bias = biased ? bias.data : nullptr;
  p.y = y.data;
  return spmm(p, pool);
}

std::string call_block_diag_outer(const Buffer& x, const Buffer& dy, const Buffer& values, const Pool& pool) {
  Outer p{};
  Needs needs(x, &p.dtype, &p.m);
  needs.dtype("blocks", values, x.type);
  needs.that(values.rank == 3, "blocks must have three dimensions");
  if (!needs.wrong.empty()) return needs.wrong;
  const int64_t n = values.dims[0];
  p.depth = values.dims[1];
  p.width = values.dims[2];
  p.in = n * p.depth;
  p.out = n * p.width;
  needs.that(n < INT32_MAX, std::to_string(n) + " blocks overflow int32");
  needs.rows("x", x, p.in);
  needs.rows("dy", dy, p.out);
  if (!needs.wrong.empty()) return needs.wrong;
  const Diagonal diagonal(n);
  p.lines = diagonal.lines();
  p.x = x.data;
  p.dy = dy.data;
  p.values = values.data;
  return sddmm(p, pool);
}

std::string call_block_diag_backward(const Buffer& x, const Buffer& dy, const Buffer& values, const Buffer& dx,
                                     const Buffer& dvalues, const Buffer& dbias, bool transposed, const Pool& pool) {
  std::string wrong;
  if (dx.count()) wrong = call_block_diag_matmul(dy, values, kNone, dx, !transposed, 0, pool);
  if (wrong.empty() && dvalues.count())
    wrong = call_block_diag_outer(transposed ? dy : x, transposed ? x : dy, dvalues, pool);
  if (!wrong.empty() || !dbias.count()) return wrong;
  if (values.rank != 3) return "blocks must have three dimensions";
  return call_sums(dy, dbias, values.dims[0] * values.dims[transposed ? 1 : 2], pool);
}

}  // namespace jaxsparse_cpu
