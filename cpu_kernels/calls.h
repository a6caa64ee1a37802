// One call of a product by buffers that are not to be trusted: every face checks and runs them here.
#pragma once

#include <cstdint>
#include <string>

#include "kernels.h"

namespace jaxsparse_cpu {

enum class Type { f32, f64, bf16, f16, i32, u16, other };

// An array as a caller hands it over, its elements in C order.
struct Buffer {
  Type type;
  int64_t rank;
  const int64_t* dims;
  void* data;

  int64_t count() const {
    int64_t n = 1;
    for (int64_t i = 0; i < rank; ++i) n *= dims[i];
    return n;
  }
};

// The index of a matrix as one product reads it; `order` is empty where entries lie in the order of the lines, and then
// `index` may be uint16 in a product of one row with single entries.
struct Index {
  Buffer ptr, index, order;
};

struct Sizes {
  int64_t in, out, block_in, block_out;
};

// x, y, dx and dy are [..., features] with the same leading dimensions, and an empty bias is none. Each call returns an
// empty string, or what is wrong with the arguments, with the numbers.
std::string call_spmm(const Buffer& x, const Buffer& values, const Index& index, const Buffer& bias, const Buffer& y,
                      const Sizes& sizes, bool transposed, int64_t activation, const Pool& pool);
std::string call_sddmm(const Buffer& x, const Buffer& dy, const Index& index, const Buffer& values,
                       const Sizes& sizes, const Pool& pool);
std::string call_spmm_grads(const Buffer& x, const Buffer& dy, const Buffer& values, const Index& index,
                            const Buffer& dx, const Buffer& dvalues, int64_t in, int64_t out, const Pool& pool);
// All that a layer's backward pass needs, for y = x W + bias, or with W^T in place of W. An empty result is not wanted.
std::string call_spmm_backward(const Buffer& x, const Buffer& dy, const Buffer& values, const Index& by_columns,
                               const Index& by_rows, const Buffer& dx, const Buffer& dvalues, const Buffer& dbias,
                               const Sizes& sizes, bool transposed, const Pool& pool);
std::string call_block_diag_matmul(const Buffer& x, const Buffer& values, const Buffer& bias, const Buffer& y,
                                   bool transposed, int64_t activation, const Pool& pool);
std::string call_block_diag_outer(const Buffer& x, const Buffer& dy, const Buffer& values, const Pool& pool);
std::string call_block_diag_backward(const Buffer& x, const Buffer& dy, const Buffer& values, const Buffer& dx,
                                     const Buffer& dvalues, const Buffer& dbias, bool transposed, const Pool& pool);

}  // namespace jaxsparse_cpu
