// What the kernels offer to whoever calls them: plain pointers, a pool of threads, an error text.
//
// Nothing here knows XLA or Python, so the same code runs in the sanitizer tests. The three
// products share one picture of the sparse matrix: *lines*. A line is a block column where the
// product writes columns, and a block row where it writes rows (the transposed products).
#pragma once

#include <cstdint>
#include <string>

namespace jaxsparse_cpu {

enum class Dtype { f32, f64, bf16, f16 };
enum class Activation { none, relu, gelu, silu };

// Threads that somebody else owns: a queue, where `schedule` puts run(arg) and returns at once; or a team, where
// `together` calls run(arg) `times` times, on as many threads as there are, and returns when all are done.
struct Pool {
  int threads;
  void* owner;
  void (*schedule)(void* owner, void (*run)(void*), void* arg);
  void (*together)(void* owner, int times, void (*run)(void*), void* arg);  // null: it is a queue
};

// Entries ptr[n] .. ptr[n+1]-1 belong to line n. `index` says which slice of the other side an
// entry meets (ascending within a line); `order` where its values lie, null when entry k's
// values are the k-th. A product of one row with single entries takes `narrow`, of 16 bits, in place of `index`.
struct Lines {
  int64_t lines, limit, entries;
  const int32_t *ptr, *index, *order;
  const uint16_t* narrow = nullptr;
};

// y[m, out] = activation(x[m, in] W + bias). W has blocks of (depth, width) as this product sees
// them. `transposed`: each stored block is [width, depth] and is read as its transpose.
struct Product {
  Dtype dtype;
  int64_t m, in, out, depth, width;
  bool transposed;
  Activation activation;
  const void *x, *values, *bias;  // bias may be null
  void* y;
  Lines lines;
};

// values[k] = x[:, slice index[k]]^T dy[:, slice of k's line], for every stored entry k.
struct Outer {
  Dtype dtype;
  int64_t m, in, out, depth, width;
  const void *x, *dy;
  void* values;
  Lines lines;
};

// Both gradients of y = x W with 1 x 1 blocks in one pass over dy. Lines are rows of W.
struct Gradients {
  Dtype dtype;
  int64_t m, in, out;
  const void *x, *dy, *values;
  void *dx, *dvalues;
  Lines lines;
};

// y[rows, out] = activation(x[rows, in] W + bias), or, transposed, of x[rows, out] W^T. Of every m rows of W n are
// stored in each column: values[groups, n, out] in ascending order, where bits[groups, out], of 8 bits up to m = 8 and
// else of 32, say.
struct NM {
  Dtype dtype;
  int64_t rows, in, out, groups, n, m;
  bool transposed;
  Activation activation;
  const void *x, *values, *bits, *bias;  // bias may be null
  void* y;
};

// Every kernel and every product, each named here and nowhere else: the functions below, the table of kernels, the names
// that Python registers with XLA and the native tests are made from these rows. A row is a name, and what is told to the
// kernel that runs it.
#define JAXSPARSE_KERNELS(KERNEL) \
  KERNEL(spmm, Product)           \
  KERNEL(sddmm, Outer)            \
  KERNEL(spmm_grads, Gradients)   \
  KERNEL(n_m_spmm, NM)

// What XLA calls: each kernel, and what others are made of.
#define JAXSPARSE_PRODUCTS(PRODUCT)   \
  JAXSPARSE_KERNELS(PRODUCT)          \
  PRODUCT(block_diag_matmul, Product) \
  PRODUCT(block_diag_outer, Outer)

// spmm(product, pool), and so on. Each returns an empty string, or what is wrong with the arguments, with the numbers.
#define DECLARATION(kernel, Arguments) std::string kernel(const Arguments&, const Pool&);
JAXSPARSE_KERNELS(DECLARATION)
#undef DECLARATION

struct KernelTable;

// The instruction set in use: "avx512", "avx2" or "portable". JAXSPARSE_CPU_ISA, or a call of
// use_isa, lowers it; one that this machine lacks is refused (false).
const char* isa();
bool use_isa(const char* name);

// Whether one instruction gathers a vector faster than a load for each lane. It does not where microcode guards
// it against gather data sampling, as on Intel's server processors before Sapphire Rapids.
bool has_fast_gather();

// Whether the instruction set in use has tile registers for bfloat16 (AMX), and the system lets this process use them.
bool has_tiles();

// The kernels of the instruction set in use.
const KernelTable& kernels();

// One compilation of the kernels per instruction set fills one of these. A kernel is false where it gets no memory, and
// for an index out of range.
struct KernelTable {
  const char* name;
#define FIELD(kernel, Arguments) bool (*kernel)(const Arguments&, const Pool&);
  JAXSPARSE_KERNELS(FIELD)
#undef FIELD
};

}  // namespace jaxsparse_cpu
