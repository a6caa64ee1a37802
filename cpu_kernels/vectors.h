// Vectors of the compiler's own kind, as wide as the instruction set this file is compiled for.
//
// Everything is in an unnamed namespace on purpose: the file is compiled once per instruction
// set, and a function with external linkage would let the linker keep the AVX-512 copy for all.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace jaxsparse_cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type in which values of type S are summed.
template <class S>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class S>
using Sum = typename SumOf<S>::type;

template <class T, int L>
struct VectorOf {
  typedef T type __attribute__((vector_size(L * sizeof(T))));
};
template <class T, int L>
using Vector = typename VectorOf<T, L>::type;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class T>
constexpr ALWAYS_INLINE T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr ALWAYS_INLINE T most(T a, T b) {
  return a < b ? b : a;
}
ALWAYS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class To, class From>
ALWAYS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// ---- scalars ------------------------------------------------------------------------------

ALWAYS_INLINE float widen(float v) { return v; }
ALWAYS_INLINE double widen(double v) { return v; }
ALWAYS_INLINE float widen(bf16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
ALWAYS_INLINE float widen(f16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#elif defined(__ARM_FP16_FORMAT_IEEE)
  return bit_cast<__fp16>(v.bits);
#else
  const uint32_t sign = (v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // The exponent is moved by a multiplication, which gets subnormals right.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f));
#endif
}

ALWAYS_INLINE void round_to(float* p, float v) { *p = v; }
ALWAYS_INLINE void round_to(double* p, double v) { *p = v; }
ALWAYS_INLINE void round_to(bf16* p, float v) {
  const uint32_t u = bit_cast<uint32_t>(v);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  p->bits = static_cast<uint16_t>((nan ? u | 0x400000u : u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
ALWAYS_INLINE void round_to(f16* p, float v) {
#if defined(__F16C__)
  p->bits = static_cast<uint16_t>(_cvtss_sh(v, 0));
#elif defined(__ARM_FP16_FORMAT_IEEE)
  p->bits = bit_cast<uint16_t>(static_cast<__fp16>(v));
#else
  const uint32_t u = bit_cast<uint32_t>(v), sign = u >> 16 & 0x8000u, rest = u & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // rounds to infinity
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // subnormal: let the addition round
    half = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
#endif
}

// ---- vectors ------------------------------------------------------------------------------

template <int L, class A>
ALWAYS_INLINE Vector<A, L> splat(A v) {
  return v - Vector<A, L>{};  // not +, which would turn -0 into 0 and cost an instruction
}

template <class V>
ALWAYS_INLINE V load_bits(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <int L>
ALWAYS_INLINE Vector<float, L> load(const float* p) {
  return load_bits<Vector<float, L>>(p);
}
template <int L>
ALWAYS_INLINE Vector<double, L> load(const double* p) {
  return load_bits<Vector<double, L>>(p);
}
template <int L>
ALWAYS_INLINE Vector<float, L> load(const bf16* p) {
  const auto v = load_bits<Vector<uint16_t, L>>(p);
  return bit_cast<Vector<float, L>>(__builtin_convertvector(v, Vector<uint32_t, L>) << 16);
}
template <int L>
ALWAYS_INLINE Vector<float, L> load(const f16* p) {
#if defined(__AVX512F__)
  if constexpr (L == 16)
    return bit_cast<Vector<float, L>>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#endif
#if defined(__F16C__)
  if constexpr (L == 8)
    return bit_cast<Vector<float, L>>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
  Vector<float, L> v;
  for (int i = 0; i < L; ++i) v[i] = widen(p[i]);
  return v;
}

template <int L>
ALWAYS_INLINE void store(float* p, Vector<float, L> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <int L>
ALWAYS_INLINE void store(double* p, Vector<double, L> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <int L>
ALWAYS_INLINE void store(bf16* p, Vector<float, L> v) {
  const auto u = bit_cast<Vector<uint32_t, L>>(v);
  const auto nan = (u & 0x7fffffffu) > 0x7f800000u;
  const auto rounded = (nan ? (u | 0x400000u) : (u + 0x7fffu + (u >> 16 & 1u))) >> 16;
  const auto bits = __builtin_convertvector(rounded, Vector<uint16_t, L>);
  __builtin_memcpy(p, &bits, sizeof bits);
}
template <int L>
ALWAYS_INLINE void store(f16* p, Vector<float, L> v) {
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bit_cast<__m512>(v), 0));
    return;
  }
#endif
#if defined(__F16C__)
  if constexpr (L == 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bit_cast<__m256>(v), 0));
    return;
  }
#endif
  for (int i = 0; i < L; ++i) round_to(p + i, v[i]);
}

// Keeps v in a register: compilers fold a load into each of its uses, and loads are the limit.
template <class V>
ALWAYS_INLINE void keep(V& v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  (void)v;
#endif
}

// Keeps an address in one register: with an index in another, a load within a multiply-add is split in two.
template <class T>
ALWAYS_INLINE void keep(const T*& p) {
  __asm__("" : "+r"(p));
}

#if defined(__AVX512F__)
// 16 or 8 whole numbers as those of 32 bits.
ALWAYS_INLINE __m512i load_16(const int32_t* index) { return _mm512_loadu_si512(index); }
ALWAYS_INLINE __m512i load_16(const uint16_t* index) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)));
}
ALWAYS_INLINE __m256i load_8(const int32_t* index) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
}
ALWAYS_INLINE __m256i load_8(const uint16_t* index) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
}
#endif

// base[index[i]] in lane i; kByOne: by the instruction for it, where there is one for these types.
template <int L, bool kByOne, class S, class I>
ALWAYS_INLINE Vector<Sum<S>, L> gather(const S* base, const I* index) {
#if defined(__AVX512F__)
  if constexpr (kByOne && L == 16 && sizeof(S) == 4)
    return bit_cast<Vector<Sum<S>, L>>(_mm512_i32gather_ps(load_16(index), base, 4));
  if constexpr (kByOne && L == 8 && sizeof(S) == 8)
    return bit_cast<Vector<Sum<S>, L>>(_mm512_i32gather_pd(load_8(index), base, 8));
#endif
  Vector<Sum<S>, L> v;
  for (int i = 0; i < L; ++i) v[i] = widen(base[index[i]]);
  return v;
}

// The first `count` lanes only. The tails are calls: they are rare and would bloat every kernel.
template <int L, class S>
__attribute__((noinline)) void store_tail(S* p, Vector<Sum<S>, L> v, int64_t count) {
  S lanes[L];
  store<L>(lanes, v);
  if (count > 0) __builtin_memcpy(p, lanes, count * sizeof(S));
}
template <int L, class S>
__attribute__((noinline)) Vector<Sum<S>, L> load_tail(const S* p, int64_t count) {
  S lanes[L] = {};
  if (count > 0) __builtin_memcpy(lanes, p, count * sizeof(S));
  return load<L>(lanes);
}
template <int L, class S>
ALWAYS_INLINE void store_some(S* p, Vector<Sum<S>, L> v, int64_t count) {
  if (__builtin_expect(count >= L, 1)) return store<L>(p, v);
  store_tail<L>(p, v, count);
}
template <int L, class S>
ALWAYS_INLINE Vector<Sum<S>, L> load_some(const S* p, int64_t count) {
  if (__builtin_expect(count >= L, 1)) return load<L>(p);
  return load_tail<L>(p, count);
}

// ---- shuffles -----------------------------------------------------------------------------

template <int... I>
struct Ints {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Ints<I...>;
};

// a[i], b[i] for runs of D lanes: the lanes whose bit D is clear of both (kHigh: set).
template <int L, int D, bool kHigh, class V, int... I>
ALWAYS_INLINE V interleave(V a, V b, Ints<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(
      a, b, ((I & D) ? (kHigh ? L + I : L + I - D) : (kHigh ? I + D : I))...);
#else
  using Mask = decltype(a < b);
  return __builtin_shuffle(
      a, b, Mask{((I & D) ? (kHigh ? L + I : L + I - D) : (kHigh ? I + D : I))...});
#endif
}

template <int L, int D, class V>
ALWAYS_INLINE void transpose_from(V (&rows)[L]) {
  using Lanes = typename Count<L>::type;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i & D) continue;
    const V a = rows[i], b = rows[i + D];
    rows[i] = interleave<L, D, false>(a, b, Lanes{});
    rows[i + D] = interleave<L, D, true>(a, b, Lanes{});
  }
  if constexpr (D > 1) transpose_from<L, D / 2>(rows);
}

// rows[i][j] <-> rows[j][i]
template <int L, class V>
ALWAYS_INLINE void transpose(V (&rows)[L]) {
  transpose_from<L, L / 2>(rows);
}

template <int L, int D, class V>
ALWAYS_INLINE V sums_from(V (&rows)[L]) {
  using Lanes = typename Count<L>::type;
#pragma GCC unroll 16
  for (int i = 0; i < D; ++i) {
    const V a = rows[i], b = rows[i + D];
    rows[i] = interleave<L, D, false>(a, b, Lanes{}) + interleave<L, D, true>(a, b, Lanes{});
  }
  if constexpr (D > 1) return sums_from<L, D / 2>(rows);
  return rows[0];
}

// Lane i of the result is the sum of the lanes of rows[i].
template <int L, class V>
ALWAYS_INLINE V sums(V (&rows)[L]) {
  return sums_from<L, L / 2>(rows);
}

}  // namespace
}  // namespace jaxsparse_cpu
