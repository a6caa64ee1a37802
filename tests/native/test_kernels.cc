// The kernels without XLA, against plain loops in double: random patterns, every dtype and
// instruction set, ragged edges, empty lines, short batches, one thread and several, bad indices.
// Built to run under the address, undefined-behaviour and thread sanitizers.
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels.h"

using namespace jaxsparse_cpu;

namespace {

class Threads {
 public:
  explicit Threads(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { serve(); });
  }
  ~Threads() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : threads_) t.join();
  }
  Pool pool() {
    return {static_cast<int>(threads_.size()) + 1, this, [](void* self, void (*run)(void*), void* arg) {
              Threads* threads = static_cast<Threads*>(self);
              {
                std::lock_guard<std::mutex> lock(threads->mutex_);
                threads->queue_.push_back({run, arg});
              }
              threads->wake_.notify_one();
            }, nullptr};
  }
  // The same number of threads as a team, which is there for one call.
  Pool team() {
    return {static_cast<int>(threads_.size()) + 1, nullptr, nullptr,
            [](void*, int times, void (*run)(void*), void* arg) {
              std::vector<std::thread> others;
              for (int i = 1; i < times; ++i) others.emplace_back(run, arg);
              run(arg);
              for (std::thread& t : others) t.join();
            }};
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const auto job = queue_.front();
      queue_.pop_front();
      lock.unlock();
      job.first(job.second);
      lock.lock();
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::pair<void (*)(void*), void*>> queue_;
  std::vector<std::thread> threads_;
  bool stop_ = false;
};

// An array in one of the four dtypes, exactly as large as it must be, so that the address
// sanitizer sees the first byte too far.
class Array {
 public:
  Array(Dtype dtype, size_t n) : dtype_(dtype), n_(n), bytes_(n * size()) {}
  size_t size() const { return dtype_ == Dtype::f64 ? 8 : dtype_ == Dtype::f32 ? 4 : 2; }
  void* data() { return bytes_.data(); }
  const std::vector<char>& bytes() const { return bytes_; }
  double get(size_t i) const {
    const char* p = bytes_.data() + i * size();
    if (dtype_ == Dtype::f64) return read<double>(p);
    if (dtype_ == Dtype::f32) return read<float>(p);
    const uint32_t bits = read<uint16_t>(p);
    if (dtype_ == Dtype::bf16) {
      const uint32_t wide = bits << 16;
      return read<float>(reinterpret_cast<const char*>(&wide));
    }
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25)
                                 : std::ldexp(fraction, -24);
    return bits & 0x8000 ? -size : size;
  }
  // Eighths in [-1, 1]: exact in every dtype.
  void fill(std::mt19937& random) {
    for (size_t i = 0; i < n_; ++i) set(i, (static_cast<int>(random() % 17) - 8) / 8.0);
  }
  void poison() { std::fill(bytes_.begin(), bytes_.end(), char(0x7f)); }

 private:
  template <class T>
  static T read(const char* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  template <class T>
  void write(size_t i, T v) {
    std::memcpy(bytes_.data() + i * sizeof v, &v, sizeof v);
  }
  void set(size_t i, double v) {
    const float f = static_cast<float>(v);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if (dtype_ == Dtype::f64) write(i, v);
    if (dtype_ == Dtype::f32) write(i, f);
    if (dtype_ == Dtype::bf16) write(i, static_cast<uint16_t>(bits >> 16));
    if (dtype_ == Dtype::f16)
      write(i, static_cast<uint16_t>((bits >> 16 & 0x8000) |
                                     (v ? (bits - 0x38000000u) >> 13 & 0x7fff : 0)));
  }
  Dtype dtype_;
  size_t n_;
  std::vector<char> bytes_;
};

#ifdef JAXSPARSE_FLOAT32_ALONE
const std::vector<Dtype> dtypes = {Dtype::f32};
#else
const std::vector<Dtype> dtypes = {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16};
#endif

int failures = 0;

void expect(bool holds, const char* what, const char* where) {
  if (holds) return;
  if (++failures < 20) std::printf("FAILED %s: %s\n", what, where);
}

// run(what a kernel is told, pool), for every kernel: which ones ran is told apart at the end.
std::set<std::string> tried;
#define RUN(kernel, Arguments)                             \
  std::string run(const Arguments& told, const Pool& pool) { \
    tried.insert(#kernel);                                 \
    return kernel(told, pool);                             \
  }
JAXSPARSE_KERNELS(RUN)
#undef RUN

double activated(double s, Activation activation) {
  if (activation == Activation::relu) return std::max(s, 0.);
  if (activation == Activation::silu) return s / (1 + std::exp(-s));
  if (activation == Activation::gelu) return s / 2 * (1 + std::tanh(0.7978845608028654 * (s + 0.044715 * s * s * s)));
  return s;
}

// Whether a result is the sum of so many products of numbers up to 1, but for rounding.
bool close(Dtype dtype, double got, double truth, double terms) {
  const double rounding[] = {1.2e-7, 2.2e-16, 7.9e-3, 9.8e-4};
  const double sum = dtype == Dtype::f64 ? 2.2e-16 : 1.2e-7;
  return std::abs(got - truth) <= rounding[int(dtype)] * std::abs(truth) + 8 * sum * (terms + 1);
}

struct Problem {
  Dtype dtype;
  int64_t m, in, out, i, o;
  double density;
};

// A random pattern in both orders, its values, and the truth by plain loops, found once for all kernels and threads.
struct Case {
  Problem p;
  int64_t rows, cols;
  std::vector<int32_t> col_ptr{0}, row_index, row_ptr{0}, col_index, order;
  int64_t entries;
  Array x, dy, values, bias, y, dx, dvalues;
  std::vector<double> true_y, true_dx, true_dvalues;  // y before its activation
  char name[120];

  Case(const Problem& q, std::mt19937& random, Pool pool)
      : p(q), rows((q.in + q.i - 1) / q.i), cols((q.out + q.o - 1) / q.o), entries(draw(random)),
        x(q.dtype, q.m * q.in), dy(q.dtype, q.m * q.out), values(q.dtype, entries * q.i * q.o),
        bias(q.dtype, q.out), y(q.dtype, q.m * q.out), dx(q.dtype, q.m * q.in),
        dvalues(q.dtype, entries * q.i * q.o), true_y(q.m * q.out), true_dx(q.m * q.in),
        true_dvalues(entries * q.i * q.o) {
    for (Array* a : {&x, &dy, &values, &bias}) a->fill(random);
    find_truth();
    std::snprintf(name, sizeof name, "%s dtype %d m %d, %d x %d, block %d x %d, %d threads", isa(),
                  int(p.dtype), int(p.m), int(p.in), int(p.out), int(p.i), int(p.o), pool.threads);
  }

  // [features][batch] of an array [batch][features]
  std::vector<double> by_feature(const Array& a, int64_t features) const {
    std::vector<double> found(p.m * features);
    for (int64_t b = 0; b < p.m; ++b)
      for (int64_t f = 0; f < features; ++f) found[f * p.m + b] = a.get(b * features + f);
    return found;
  }

  // Every entry inside the edge: its row and column, and its place in the values.
  template <class F>
  void each(F f) const {
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t k = col_ptr[c]; k < col_ptr[c + 1]; ++k)
        for (int64_t a = 0; a < p.i; ++a)
          for (int64_t b = 0; b < p.o; ++b) {
            const int64_t row = row_index[k] * p.i + a, col = c * p.o + b;
            if (row < p.in && col < p.out) f(row, col, (k * p.i + a) * p.o + b);
          }
  }

  void find_truth() {
    const std::vector<double> xs = by_feature(x, p.in), dys = by_feature(dy, p.out);
    std::vector<double> ys(p.m * p.out), dxs(p.m * p.in);
    each([&](int64_t row, int64_t col, int64_t v) {
      const double w = values.get(v), *x_of = xs.data() + row * p.m, *dy_of = dys.data() + col * p.m;
      double *y_of = ys.data() + col * p.m, *dx_of = dxs.data() + row * p.m, sum = 0;
      for (int64_t b = 0; b < p.m; ++b) {
        y_of[b] += x_of[b] * w;
        dx_of[b] += dy_of[b] * w;
        sum += x_of[b] * dy_of[b];
      }
      true_dvalues[v] = sum;
    });
    for (int64_t b = 0; b < p.m; ++b) {
      for (int64_t c = 0; c < p.out; ++c) true_y[b * p.out + c] = ys[c * p.m + b] + bias.get(c);
      for (int64_t r = 0; r < p.in; ++r) true_dx[b * p.in + r] = dxs[r * p.m + b];
    }
  }

  int64_t draw(std::mt19937& random) {
    std::vector<std::vector<std::pair<int, int>>> by_row(rows);
    for (int64_t c = 0; c < cols; ++c) {
      const bool empty = cols > 2 && c % 5 == 1;
      for (int64_t r = 0; r < rows; ++r)
        if (!empty && !(rows > 3 && r % 7 == 2) && random() % 1000 < p.density * 1000) {
          by_row[r].push_back({int(c), int(row_index.size())});
          row_index.push_back(int32_t(r));
        }
      col_ptr.push_back(int32_t(row_index.size()));
    }
    for (const auto& row : by_row) {
      for (const auto& [c, k] : row) {
        col_index.push_back(c);
        order.push_back(k);
      }
      row_ptr.push_back(int32_t(order.size()));
    }
    return int64_t(row_index.size());
  }

  Lines by_column() const { return {cols, rows, entries, col_ptr.data(), row_index.data(), nullptr}; }
  Lines by_row() const {
    return {rows, cols, entries, row_ptr.data(), col_index.data(), order.data()};
  }

  // y = x W, dx = dy W^T and dW = x^T dy, as the kernels are told.
  Product forward() {
    return {.dtype = p.dtype, .m = p.m, .in = p.in, .out = p.out, .depth = p.i, .width = p.o, .transposed = false,
            .activation = Activation::none, .x = x.data(), .values = values.data(), .bias = bias.data(),
            .y = y.data(), .lines = by_column()};
  }
  Product transposed() {
    return {.dtype = p.dtype, .m = p.m, .in = p.out, .out = p.in, .depth = p.o, .width = p.i, .transposed = true,
            .activation = Activation::none, .x = dy.data(), .values = values.data(), .bias = nullptr,
            .y = dx.data(), .lines = by_row()};
  }
  Outer outer() {
    return {.dtype = p.dtype, .m = p.m, .in = p.in, .out = p.out, .depth = p.i, .width = p.o, .x = x.data(),
            .dy = dy.data(), .values = dvalues.data(), .lines = by_column()};
  }
  Gradients gradients() {
    return {.dtype = p.dtype, .m = p.m, .in = p.in, .out = p.out, .x = x.data(), .dy = dy.data(),
            .values = values.data(), .dx = dx.data(), .dvalues = dvalues.data(), .lines = by_row()};
  }

  void check_forward(Pool pool, Activation activation) {
    check_product(pool, forward(), activation);
    if (p.m != 1 || p.i * p.o > 1) return;
    const std::vector<uint16_t> narrow(row_index.begin(), row_index.end());
    Product q = forward();
    q.lines.index = nullptr;
    q.lines.narrow = narrow.data();
    check_product(pool, q, activation);
  }

  void check_product(Pool pool, Product q, Activation activation) {
    y.poison();
    q.activation = activation;
    expect(run(q, pool).empty(), "spmm returns an error", name);
    for (size_t n = 0; n < true_y.size(); ++n)
      expect(close(p.dtype, y.get(n), activated(true_y[n], activation), p.in), "spmm", name);
  }

  void check_backward(Pool pool, bool fused) {
    dx.poison();
    dvalues.poison();
    if (fused) {
      expect(run(gradients(), pool).empty(), "spmm_grads returns an error", name);
    } else {
      expect(run(transposed(), pool).empty(), "transposed spmm returns an error", name);
      expect(run(outer(), pool).empty(), "sddmm returns an error", name);
    }
    for (size_t n = 0; n < true_dx.size(); ++n)
      expect(close(p.dtype, dx.get(n), true_dx[n], p.out), fused ? "dx, fused" : "dx", name);
    for (size_t v = 0; v < true_dvalues.size(); ++v)
      expect(close(p.dtype, dvalues.get(v), true_dvalues[v], p.m), fused ? "dvalues, fused" : "dvalues", name);
  }

  void check(Pool pool) {
    for (Activation a : {Activation::none, Activation::relu, Activation::gelu, Activation::silu})
      check_forward(pool, a);
    check_backward(pool, false);
    if (p.i == 1 && p.o == 1) check_backward(pool, true);
  }

  std::vector<char> results(Pool pool) {
    check_forward(pool, Activation::gelu);
    std::vector<char> all = y.bytes();
    for (bool fused : {false, true}) {
      if (fused && p.i * p.o > 1) break;
      check_backward(pool, fused);
      all.insert(all.end(), dx.bytes().begin(), dx.bytes().end());
      all.insert(all.end(), dvalues.bytes().begin(), dvalues.bytes().end());
    }
    return all;
  }

  void check_refusals(Pool pool) {
    if (entries == 0) return;
    for (int32_t bad : {-1, int32_t(rows), INT32_MAX, INT32_MIN}) {
      std::vector<int32_t> index = row_index;
      index[index.size() / 2] = bad;
      Product q = forward();
      q.lines.index = index.data();
      expect(!run(q, pool).empty() || p.m == 0, "spmm takes a bad index", name);
      Outer w = outer();
      w.lines.index = index.data();
      expect(!run(w, pool).empty(), "sddmm takes a bad index", name);
    }
    std::vector<int32_t> bad_order = order;
    bad_order.back() = int32_t(entries);
    Product q = transposed();
    q.lines.order = bad_order.data();
    expect(!run(q, pool).empty() || p.m == 0, "spmm takes a bad order", name);
    std::vector<int32_t> bad_ptr = col_ptr;
    bad_ptr[0] = 1;
    q = forward();
    q.lines.ptr = bad_ptr.data();
    expect(!run(q, pool).empty(), "spmm takes bad pointers", name);
  }
};

// n of every m rows of W at random places, both products with it, and the truth by plain loops.
struct NMCase {
  Dtype dtype;
  int64_t rows, in, out, n, m, groups;
  Array x, dy, values, bias, y, dx;
  std::vector<uint8_t> few_bits;
  std::vector<uint32_t> many_bits;
  std::vector<double> true_y, true_dx;  // before the activation
  char name[120];

  NMCase(Dtype dtype_, int64_t rows_, int64_t in_, int64_t out_, int64_t n_, int64_t m_, std::mt19937& random)
      : dtype(dtype_), rows(rows_), in(in_), out(out_), n(n_), m(m_), groups((in_ + m_ - 1) / m_),
        x(dtype, rows * in), dy(dtype, rows * out), values(dtype, groups * n * out), bias(dtype, out),
        y(dtype, rows * out), dx(dtype, rows * in), true_y(rows * out), true_dx(rows * in) {
    for (Array* a : {&x, &dy, &values, &bias}) a->fill(random);
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t c = 0; c < out; ++c) true_y[b * out + c] = bias.get(c);
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = 0; c < out; ++c) add_column(g, c, random);
    std::snprintf(name, sizeof name, "%s dtype %d, %d rows, %d x %d, %d:%d", isa(), int(dtype), int(rows), int(in),
                  int(out), int(n), int(m));
  }

  // Draws which of the rows of group g are stored in column c.
  void add_column(int64_t g, int64_t c, std::mt19937& random) {
    std::vector<int64_t> places(m);
    for (int64_t k = 0; k < m; ++k) places[k] = k;
    std::shuffle(places.begin(), places.end(), random);
    std::sort(places.begin(), places.begin() + n);
    uint32_t bits = 0;
    for (int64_t j = 0; j < n; ++j) {
      bits |= uint32_t{1} << places[j];
      const int64_t row = g * m + places[j];
      const double w = values.get((g * n + j) * out + c);
      for (int64_t b = 0; b < rows && row < in; ++b) {
        true_y[b * out + c] += x.get(b * in + row) * w;
        true_dx[b * in + row] += dy.get(b * out + c) * w;
      }
    }
    m <= 8 ? few_bits.push_back(uint8_t(bits)) : many_bits.push_back(bits);
  }

  NM product(bool transposed, Activation activation) {
    const void* bits = m <= 8 ? static_cast<const void*>(few_bits.data()) : many_bits.data();
    return {.dtype = dtype, .rows = rows, .in = in, .out = out, .groups = groups, .n = n, .m = m,
            .transposed = transposed, .activation = activation, .x = transposed ? dy.data() : x.data(),
            .values = values.data(), .bits = bits, .bias = transposed ? nullptr : bias.data(),
            .y = transposed ? dx.data() : y.data()};
  }

  void check(Pool pool) {
    y.poison();
    dx.poison();
    expect(run(product(false, Activation::gelu), pool).empty(), "n_m_spmm returns an error", name);
    expect(run(product(true, Activation::none), pool).empty(), "transposed n_m_spmm returns an error", name);
    for (size_t i = 0; i < true_y.size(); ++i)
      expect(close(dtype, y.get(i), activated(true_y[i], Activation::gelu), in), "n_m_spmm", name);
    for (size_t i = 0; i < true_dx.size(); ++i)
      expect(close(dtype, dx.get(i), true_dx[i], out), "transposed n_m_spmm", name);
  }

  void check_refusals(Pool pool) {
    for (int64_t NM::*size : {&NM::groups, &NM::n, &NM::m, &NM::in, &NM::out}) {
      NM p = product(false, Activation::none);
      p.*size = size == &NM::groups ? groups + 1 : size == &NM::n ? m + 1 : size == &NM::m ? 33 : 0;
      expect(!run(p, pool).empty(), "n_m_spmm takes a bad size", name);
    }
  }
};

void check_n_m(Dtype dtype, std::mt19937& random, Pool pool) {
  const int64_t sizes[][4] = {{2, 4, 37, 53}, {4, 8, 40, 16}, {1, 3, 20, 70}, {1, 1, 5, 9}, {9, 32, 70, 35}};
  for (const auto& s : sizes)
    for (int64_t rows : {0, 1, 3, 17}) {
      NMCase c(dtype, rows, s[2], s[3], s[0], s[1], random);
      c.check(pool);
      c.check_refusals(pool);
    }
}

// Big enough for several threads, tiles and slices: all thread counts must agree to the bit.
void check_thread_counts(std::mt19937& random) {
  Threads one(0), two(1), five(4);
  const Problem problems[] = {{Dtype::f32, 150, 400, 300, 1, 1, 0.2},
                              {Dtype::bf16, 150, 300, 400, 1, 1, 0.2},
                              {Dtype::f32, 150, 400, 300, 8, 8, 0.4},
                              {Dtype::f16, 300, 260, 300, 32, 32, 0.5},
                              {Dtype::f64, 600, 100, 130, 20, 40, 0.6}};
  for (const Problem& problem : problems) {
    if (std::find(dtypes.begin(), dtypes.end(), problem.dtype) == dtypes.end()) continue;
    Case c(problem, random, five.pool());
    const std::vector<char> alone = c.results(one.pool());
    expect(c.results(two.pool()) == alone, "two threads give other bits", c.name);
    expect(c.results(five.pool()) == alone, "five threads give other bits", c.name);
    expect(c.results(five.team()) == alone, "a team of five gives other bits", c.name);
    c.check_refusals(five.pool());
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && !std::strcmp(argv[1], "quick");
  std::mt19937 random(7);
  Threads threads(2);
  const int64_t sizes[][4] = {{1, 1, 37, 53},   {1, 1, 130, 70}, {1, 1, 1, 1},    {8, 8, 64, 72},
                              {16, 16, 50, 70}, {32, 32, 96, 64}, {4, 12, 30, 50}, {5, 7, 37, 53},
                              {3, 40, 20, 90},  {64, 64, 64, 64}, {16, 1, 40, 9},  {1, 16, 9, 40},
                              {33, 35, 70, 71}};
  for (const char* name : {"portable", "avx2", "avx512", "amx"}) {
    if (!use_isa(name)) {
      std::printf("%s: this machine lacks it, not run\n", name);
      continue;
    }
    const int before = failures;
    for (Dtype dtype : dtypes) {
      check_n_m(dtype, random, threads.pool());
      for (const auto& s : sizes)
        for (int64_t m : {0, 1, 3, 17, 70}) {
          if (quick && m == 70) continue;
          Case c({dtype, m, s[2], s[3], s[0], s[1], 0.4}, random, threads.pool());
          c.check(threads.pool());
          c.check_refusals(threads.pool());
        }
    }
    Case({Dtype::f32, 27000, 160, 16, 1, 1, 0.4}, random, threads.pool()).check(threads.pool());  // rounds
    check_thread_counts(random);
    std::printf("%s: %d failures\n", name, failures - before);
  }
#define TRIED(kernel, Arguments) expect(tried.count(#kernel) == 1, "no test runs the kernel", #kernel);
  JAXSPARSE_KERNELS(TRIED)
#undef TRIED
  return failures ? 1 : 0;
}
