// All kernels for one instruction set; compiled once for each, with JAXSPARSE_ISA as its name.
#include <type_traits>

#include "kernels.h"

#include "amx.h"
#include "blocks.h"
#include "blocks_outer.h"
#include "n_m.h"
#include "one_row.h"
#include "tiled.h"
#include "unstructured_grads.h"

#define STRING_(x) #x
#define STRING(x) STRING_(x)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

namespace jaxsparse_cpu {
namespace {

template <class F>
bool with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
#ifndef JAXSPARSE_FLOAT32_ALONE
    case Dtype::f64: return f(double{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f16: return f(f16{});
#else
    default: break;
#endif
  }
  return false;
}

bool run_spmm(const Product& p, const Pool& pool) {
  return with_dtype(p.dtype, [&](auto zero) {
    using S = decltype(zero);
    if (p.depth == 1 && p.width == 1)
      return p.m == 1 ? one_row_spmm<S>(p, pool) : tiled_spmm<S, kTileVectors, false>(p, pool);
#ifdef __AMX_BF16__
    if (std::is_same<S, bf16>::value && has_tiles() && suits_tiles(p)) return tiles_spmm(p, pool);
#endif
    return is_short<S>(p) ? tiled_spmm<S, kTileVectorsOfBlocks, true>(p, pool) : block_spmm<S>(p, pool);
  });
}

bool run_sddmm(const Outer& p, const Pool& pool) {
  return with_dtype(p.dtype, [&](auto zero) {
    using S = decltype(zero);
#ifdef __AMX_BF16__
    if (std::is_same<S, bf16>::value && has_tiles() && suits_tiles(p)) return tiles_sddmm(p, pool);
#endif
    if (p.depth != 1 || p.width != 1) return block_sddmm<S>(p, pool);
    Grads<S> g{};
    g.lines = p.lines;
    g.m = p.m;
    g.own_width = p.out;
    g.other_width = p.in;
    g.own = static_cast<const S*>(p.dy);
    g.other = static_cast<const S*>(p.x);
    g.dvalues = static_cast<S*>(p.values);
    return unstructured_outer<S, false>(g, pool);
  });
}

bool run_spmm_grads(const Gradients& p, const Pool& pool) {
  return with_dtype(p.dtype, [&](auto zero) {
    using S = decltype(zero);
    Grads<S> g{};
    g.lines = p.lines;
    g.m = p.m;
    g.own_width = p.in;
    g.other_width = p.out;
    g.own = static_cast<const S*>(p.x);
    g.other = static_cast<const S*>(p.dy);
    g.values = static_cast<const S*>(p.values);
    g.dvalues = static_cast<S*>(p.dvalues);
    g.dx = static_cast<S*>(p.dx);
    return unstructured_outer<S, true>(g, pool);
  });
}

bool run_n_m_spmm(const NM& p, const Pool& pool) {
  return with_dtype(p.dtype, [&](auto zero) {
    return with_kept(p, [&](auto kept) { return n_m_multiply<decltype(zero)>(p, kept, pool); });
  });
}

}  // namespace

extern const KernelTable JOIN(kernels_, JAXSPARSE_ISA);
const KernelTable JOIN(kernels_, JAXSPARSE_ISA) = {
    STRING(JAXSPARSE_ISA),
#define ENTRY(kernel, Arguments) run_##kernel,
    JAXSPARSE_KERNELS(ENTRY)
#undef ENTRY
};

}  // namespace jaxsparse_cpu
