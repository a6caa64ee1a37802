// XLA's foreign function interface: buffers and attributes in, one call of a kernel, an error out.
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxsparse_cpu {
namespace {

using Indices = ffi::Buffer<ffi::S32>;

Pool pool_of(ffi::ThreadPool& pool) {
  return {static_cast<int>(pool.num_threads()), &pool,
          [](void* owner, void (*run)(void*), void* argument) {
            static_cast<ffi::ThreadPool*>(owner)->Schedule([run, argument] { run(argument); });
          }};
}

ffi::Error result(const char* op, const std::string& wrong) {
  if (wrong.empty()) return ffi::Error::Success();
  return ffi::Error::InvalidArgument(std::string("cpu_kernels.") + op + ": " + wrong + ".");
}

bool dtype_of(ffi::DataType type, Dtype* dtype) {
  switch (type) {
    case ffi::F32: *dtype = Dtype::f32; return true;
    case ffi::F64: *dtype = Dtype::f64; return true;
    case ffi::BF16: *dtype = Dtype::bf16; return true;
    case ffi::F16: *dtype = Dtype::f16; return true;
    default: return false;
  }
}

// What is wrong with a buffer that should have this dtype and these dimensions, or "".
std::string wrong_buffer(const char* name, ffi::DataType want, ffi::DataType type,
                         ffi::Span<const int64_t> got, const std::vector<int64_t>& shape) {
  const auto list = [](const int64_t* v, size_t n) {
    std::string text = "[";
    for (size_t i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(v[i]);
    return text + "]";
  };
  if (type != want)
    return std::string(name) + " has dtype number " + std::to_string(static_cast<int>(type)) +
           ", but x has " + std::to_string(static_cast<int>(want));
  if (std::vector<int64_t>(got.begin(), got.end()) != shape)
    return std::string(name) + " has shape " + list(got.begin(), got.size()) + ", needs " +
           list(shape.data(), shape.size());
  return "";
}

// Collects the first complaint, so that a handler reads as a list of what it needs.
struct Needs {
  ffi::DataType type;
  std::string wrong;

  template <class B>
  void shape(const char* name, B& buffer, const std::vector<int64_t>& dims) {
    if (wrong.empty())
      wrong = wrong_buffer(name, type, buffer.element_type(), buffer.dimensions(), dims);
  }
  void that(bool holds, const std::string& otherwise) {
    if (wrong.empty() && !holds) wrong = otherwise;
  }
};

std::vector<int64_t> values_shape(int64_t entries, int64_t i, int64_t o) {
  return i == 1 && o == 1 ? std::vector<int64_t>{entries} : std::vector<int64_t>{entries, i, o};
}

Needs needs_of(ffi::AnyBuffer& x, Dtype* dtype) {
  Needs needs{x.element_type(), ""};
  needs.that(dtype_of(x.element_type(), dtype), "x must be float32, float64, bfloat16 or float16");
  needs.that(x.dimensions().size() == 2, "x must have two dimensions");
  return needs;
}

// The lines of an index: `order` is empty where entries lie in the order of the lines.
Lines lines_of(Needs& needs, Indices& ptr, Indices& index, Indices& order, int64_t limit) {
  const int64_t entries = index.element_count();
  needs.that(ptr.element_count() >= 1, "index pointers are empty");
  needs.that(order.element_count() == 0 || int64_t(order.element_count()) == entries,
             "order has " + std::to_string(order.element_count()) + " entries, index has " +
                 std::to_string(entries));
  return {int64_t(ptr.element_count()) - 1, limit, entries, ptr.typed_data(), index.typed_data(),
          order.element_count() ? order.typed_data() : nullptr};
}

int64_t slices(int64_t size, int64_t block) { return block > 0 ? (size + block - 1) / block : 0; }

ffi::Error Spmm(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer values, Indices ptr,
                Indices index, Indices order, ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y,
                int64_t in, int64_t out, int64_t block_in, int64_t block_out, bool transposed,
                int64_t activation) {
  Product p{};
  Needs needs = needs_of(x, &p.dtype);
  if (!needs.wrong.empty()) return result("spmm", needs.wrong);
  p.m = x.dimensions()[0];
  p.in = transposed ? out : in;
  p.out = transposed ? in : out;
  p.depth = transposed ? block_out : block_in;
  p.width = transposed ? block_in : block_out;
  p.transposed = transposed;
  p.activation = static_cast<Activation>(activation);
  p.lines = lines_of(needs, ptr, index, order, slices(p.in, p.depth));
  needs.that(activation >= 0 && activation <= 3, "no activation " + std::to_string(activation));
  needs.shape("x", x, {p.m, p.in});
  needs.shape("blocks", values, values_shape(p.lines.entries, block_in, block_out));
  needs.shape("y", *y, {p.m, p.out});
  const bool biased = bias.element_count() != 0;
  if (biased) needs.shape("bias", bias, {p.out});
  if (!needs.wrong.empty()) return result("spmm", needs.wrong);
  p.x = x.untyped_data();
  p.values = values.untyped_data();
  p.bias = biased ? bias.untyped_data() : nullptr;
  p.y = y->untyped_data();
  return result("spmm", spmm(p, pool_of(threads)));
}

ffi::Error Sddmm(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer dy, Indices ptr,
                 Indices index, ffi::Result<ffi::AnyBuffer> values, int64_t in, int64_t out,
                 int64_t block_in, int64_t block_out) {
  Outer p{};
  Needs needs = needs_of(x, &p.dtype);
  if (!needs.wrong.empty()) return result("sddmm", needs.wrong);
  p.m = x.dimensions()[0];
  p.in = in;
  p.out = out;
  p.depth = block_in;
  p.width = block_out;
  p.lines = lines_of(needs, ptr, index, index, slices(in, block_in));
  p.lines.order = nullptr;
  needs.shape("x", x, {p.m, in});
  needs.shape("dy", dy, {p.m, out});
  needs.shape("blocks", *values, values_shape(p.lines.entries, block_in, block_out));
  if (!needs.wrong.empty()) return result("sddmm", needs.wrong);
  p.x = x.untyped_data();
  p.dy = dy.untyped_data();
  p.values = values->untyped_data();
  return result("sddmm", sddmm(p, pool_of(threads)));
}

ffi::Error SpmmGrads(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer dy,
                     ffi::AnyBuffer values, Indices ptr, Indices index, Indices order,
                     ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dvalues,
                     int64_t in, int64_t out) {
  Gradients p{};
  Needs needs = needs_of(x, &p.dtype);
  if (!needs.wrong.empty()) return result("spmm_grads", needs.wrong);
  p.m = x.dimensions()[0];
  p.in = in;
  p.out = out;
  p.lines = lines_of(needs, ptr, index, order, out);
  needs.shape("x", x, {p.m, in});
  needs.shape("dy", dy, {p.m, out});
  needs.shape("blocks", values, {p.lines.entries});
  needs.shape("dx", *dx, {p.m, in});
  needs.shape("dblocks", *dvalues, {p.lines.entries});
  if (!needs.wrong.empty()) return result("spmm_grads", needs.wrong);
  p.x = x.untyped_data();
  p.dy = dy.untyped_data();
  p.values = values.untyped_data();
  p.dx = dx->untyped_data();
  p.dvalues = dvalues->untyped_data();
  return result("spmm_grads", spmm_grads(p, pool_of(threads)));
}

// A block-diagonal matrix is a sparse one whose line n holds the single entry n.
struct Diagonal {
  std::vector<int32_t> ptr;
  explicit Diagonal(int64_t n) : ptr(n + 1) { std::iota(ptr.begin(), ptr.end(), 0); }
  Lines lines() const {
    const int64_t n = int64_t(ptr.size()) - 1;
    return {n, n, n, ptr.data(), ptr.data(), nullptr};
  }
};

ffi::Error BlockDiagMatmul(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer values,
                           ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y, bool transposed,
                           int64_t activation) {
  Product p{};
  Needs needs = needs_of(x, &p.dtype);
  needs.that(values.dimensions().size() == 3, "blocks must have three dimensions");
  needs.that(activation >= 0 && activation <= 3, "no activation " + std::to_string(activation));
  if (!needs.wrong.empty()) return result("block_diag_matmul", needs.wrong);
  const int64_t n = values.dimensions()[0];
  p.m = x.dimensions()[0];
  p.depth = values.dimensions()[transposed ? 2 : 1];
  p.width = values.dimensions()[transposed ? 1 : 2];
  p.in = n * p.depth;
  p.out = n * p.width;
  p.transposed = transposed;
  p.activation = static_cast<Activation>(activation);
  needs.that(n < INT32_MAX, std::to_string(n) + " blocks overflow int32");
  needs.shape("x", x, {p.m, p.in});
  needs.shape("blocks", values, {n, transposed ? p.width : p.depth, transposed ? p.depth : p.width});
  needs.shape("y", *y, {p.m, p.out});
  const bool biased = bias.element_count() != 0;
  if (biased) needs.shape("bias", bias, {p.out});
  if (!needs.wrong.empty()) return result("block_diag_matmul", needs.wrong);
  const Diagonal diagonal(n);
  p.lines = diagonal.lines();
  p.x = x.untyped_data();
  p.values = values.untyped_data();
  p.bias = biased ? bias.untyped_data() : nullptr;
  p.y = y->untyped_data();
  return result("block_diag_matmul", spmm(p, pool_of(threads)));
}

ffi::Error BlockDiagOuter(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer dy,
                          ffi::Result<ffi::AnyBuffer> values) {
  Outer p{};
  Needs needs = needs_of(x, &p.dtype);
  needs.that(values->dimensions().size() == 3, "blocks must have three dimensions");
  if (!needs.wrong.empty()) return result("block_diag_outer", needs.wrong);
  const int64_t n = values->dimensions()[0];
  p.m = x.dimensions()[0];
  p.depth = values->dimensions()[1];
  p.width = values->dimensions()[2];
  p.in = n * p.depth;
  p.out = n * p.width;
  needs.that(n < INT32_MAX, std::to_string(n) + " blocks overflow int32");
  needs.shape("x", x, {p.m, p.in});
  needs.shape("dy", dy, {p.m, p.out});
  needs.shape("blocks", *values, {n, p.depth, p.width});
  if (!needs.wrong.empty()) return result("block_diag_outer", needs.wrong);
  const Diagonal diagonal(n);
  p.lines = diagonal.lines();
  p.x = x.untyped_data();
  p.dy = dy.untyped_data();
  p.values = values->untyped_data();
  return result("block_diag_outer", sddmm(p, pool_of(threads)));
}

}  // namespace
}  // namespace jaxsparse_cpu

using namespace jaxsparse_cpu;

#define EXPORTED __attribute__((visibility("default")))

#define HANDLER(symbol, function, binding)                             \
  extern "C" EXPORTED XLA_FFI_Error* symbol(XLA_FFI_CallFrame* frame) { \
    static auto* handler = (binding).To(function).release();           \
    return handler->Call(frame);                                       \
  }

HANDLER(jaxsparse_cpu_spmm, Spmm,
        ffi::Ffi::Bind()
            .Ctx<ffi::ThreadPool>()
            .Arg<ffi::AnyBuffer>()
            .Arg<ffi::AnyBuffer>()
            .Arg<Indices>()
            .Arg<Indices>()
            .Arg<Indices>()
            .Arg<ffi::AnyBuffer>()
            .Ret<ffi::AnyBuffer>()
            .Attr<int64_t>("size_in")
            .Attr<int64_t>("size_out")
            .Attr<int64_t>("block_in")
            .Attr<int64_t>("block_out")
            .Attr<bool>("transposed")
            .Attr<int64_t>("activation"))

HANDLER(jaxsparse_cpu_sddmm, Sddmm,
        ffi::Ffi::Bind()
            .Ctx<ffi::ThreadPool>()
            .Arg<ffi::AnyBuffer>()
            .Arg<ffi::AnyBuffer>()
            .Arg<Indices>()
            .Arg<Indices>()
            .Ret<ffi::AnyBuffer>()
            .Attr<int64_t>("size_in")
            .Attr<int64_t>("size_out")
            .Attr<int64_t>("block_in")
            .Attr<int64_t>("block_out"))

HANDLER(jaxsparse_cpu_spmm_grads, SpmmGrads,
        ffi::Ffi::Bind()
            .Ctx<ffi::ThreadPool>()
            .Arg<ffi::AnyBuffer>()
            .Arg<ffi::AnyBuffer>()
            .Arg<ffi::AnyBuffer>()
            .Arg<Indices>()
            .Arg<Indices>()
            .Arg<Indices>()
            .Ret<ffi::AnyBuffer>()
            .Ret<ffi::AnyBuffer>()
            .Attr<int64_t>("size_in")
            .Attr<int64_t>("size_out"))

HANDLER(jaxsparse_cpu_block_diag_matmul, BlockDiagMatmul,
        ffi::Ffi::Bind()
            .Ctx<ffi::ThreadPool>()
            .Arg<ffi::AnyBuffer>()
            .Arg<ffi::AnyBuffer>()
            .Arg<ffi::AnyBuffer>()
            .Ret<ffi::AnyBuffer>()
            .Attr<bool>("transposed")
            .Attr<int64_t>("activation"))

HANDLER(jaxsparse_cpu_block_diag_outer, BlockDiagOuter,
        ffi::Ffi::Bind()
            .Ctx<ffi::ThreadPool>()
            .Arg<ffi::AnyBuffer>()
            .Arg<ffi::AnyBuffer>()
            .Ret<ffi::AnyBuffer>())

// Asked from Python by ctypes.
extern "C" EXPORTED int jaxsparse_cpu_ffi_major() { return XLA_FFI_API_MAJOR; }
extern "C" EXPORTED int jaxsparse_cpu_ffi_minor() { return XLA_FFI_API_MINOR; }
extern "C" EXPORTED const char* jaxsparse_cpu_isa() { return isa(); }
extern "C" EXPORTED int jaxsparse_cpu_use_isa(const char* name) { return use_isa(name); }
