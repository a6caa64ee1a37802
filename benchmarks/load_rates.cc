// What one core of this machine reaches: multiply-adds from registers, and with one operand loaded
// in rows of 256 bytes, in random order, from the first- and second-level caches.
// Prints JSON; benchmarks/_measure.py compiles it with -march=native and runs it.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
using Vector = float __attribute__((vector_size(kLanes * 4)));
constexpr int kRow = 256 / sizeof(Vector), kRows = 4096, kChains = 12;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The best of several runs, in seconds.
template <class F>
double best(F run) {
  double least = 1e9;
  for (int i = 0; i < 50; ++i) {
    const double start = seconds();
    run();
    least = std::min(least, seconds() - start);
  }
  return least;
}

float sink;

template <int N>
void consume(const Vector (&sums)[N]) {
  for (const Vector& sum : sums) sink += sum[0];
}

double fma_gflops() {
  constexpr int kTurns = 100000;
  const double time = best([] {
    Vector sums[kChains] = {}, factor = {};
    factor += 0.5f;
    for (int i = 0; i < kChains; ++i) sums[i] += float(i);  // equal chains would be computed once
    for (int turn = 0; turn < kTurns; ++turn)
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * factor + factor;
    consume(sums);
  });
  return 2e-9 * kTurns * kChains * kLanes / time;
}

double load_gb_per_s(int64_t bytes) {
  const int64_t rows = bytes / 256;
  Vector* data = static_cast<Vector*>(std::aligned_alloc(1 << 21, 1 << 21));
  std::fill(data, data + rows * kRow, Vector{});
  std::mt19937 random(0);
  std::vector<int32_t> order(kRows);
  for (int32_t& row : order) row = static_cast<int32_t>(random() % rows);
  const double time = best([&] {
    Vector sums[kRow] = {};
    for (const int32_t row : order)
#pragma GCC unroll 8
      for (int i = 0; i < kRow; ++i) sums[i] += data[row * kRow + i] * 0.5f;
    consume(sums);
  });
  std::free(data);
  return 256e-9 * kRows / time;
}

int main() {
  std::printf("{\"fma_gflops_per_core\": %.1f, ", fma_gflops());
  std::printf("\"l1_load_gb_per_s_per_core\": %.1f, ", load_gb_per_s(16 << 10));
  std::printf("\"l2_load_gb_per_s_per_core\": %.1f}\n", load_gb_per_s(384 << 10));
}
