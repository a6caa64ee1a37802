// What happens to a finished sum before it is rounded: bias and activation.
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace jaxsparse_cpu {
namespace {

// 2^n r for |r| <= log(2)/2 by a polynomial of degree 6 (error under 2 ulp in float32).
template <int L>
ALWAYS_INLINE Vector<float, L> exponential(Vector<float, L> x) {
  using V = Vector<float, L>;
  const V low = splat<L>(-87.0f), high = splat<L>(88.0f);
  V t = x < low ? low : x;
  t = t > high ? high : t;
  const V magic = splat<L>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = t * 1.44269504f + magic;
  const V n = shifted - magic;
  const V r = (t - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const auto scale = (bit_cast<Vector<int32_t, L>>(shifted) - 0x4b400000 + 127) << 23;
  const V infinity = splat<L>(__builtin_inff());
  return x > high ? infinity : p * bit_cast<V>(scale);
}
template <int L>
ALWAYS_INLINE Vector<double, L> exponential(Vector<double, L> x) {
  for (int i = 0; i < L; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// gelu's tanh form is x * sigmoid(2u), since (1 + tanh u) / 2 = sigmoid(2u); silu is u = x / 2.
template <class A, int L>
ALWAYS_INLINE Vector<A, L> activate(Vector<A, L> x, Activation activation) {
  using V = Vector<A, L>;
  if (activation == Activation::none) return x;
  const V zero{};
  if (activation == Activation::relu) return x < zero ? zero : x;
  const V cubic = (x + x * x * x * A(0.044715)) * A(1.5957691216057308);  // 2 sqrt(2 / pi)
  const V u = activation == Activation::gelu ? cubic : x;
  return x / (exponential<L>(-u) + A(1));
}

}  // namespace
}  // namespace jaxsparse_cpu
