// XLA's foreign function interface: buffers and attributes in, one call of a kernel, an error out.
#include "ffi.h"

namespace jaxsparse_cpu {
namespace {

template <class I>
Index index_of(Indices& ptr, I& index, Indices& order) {
  return {buffer(ptr), buffer(index), buffer(order)};
}

// An index whose entries lie in the order of the lines.
Index index_of(Indices& ptr, Indices& index) {
  static const int64_t none = 0;
  return {buffer(ptr), buffer(index), {Type::i32, 1, &none, nullptr}};
}

ffi::Error Spmm(ffi::ThreadPool threads, Array x, Array values, Indices ptr, Array index, Indices order, Array bias,
                Result y, int64_t in, int64_t out, int64_t block_in, int64_t block_out, bool transposed,
                int64_t activation) {
  return result("spmm", call_spmm(buffer(x), buffer(values), index_of(ptr, index, order), buffer(bias), buffer(*y),
                                  {in, out, block_in, block_out}, transposed, activation, pool_of(threads)));
}

ffi::Error Sddmm(ffi::ThreadPool threads, Array x, Array dy, Indices ptr, Indices index, Result values, int64_t in,
                 int64_t out, int64_t block_in, int64_t block_out) {
  return result("sddmm", call_sddmm(buffer(x), buffer(dy), index_of(ptr, index), buffer(*values),
                                    {in, out, block_in, block_out}, pool_of(threads)));
}

ffi::Error SpmmGrads(ffi::ThreadPool threads, Array x, Array dy, Array values, Indices ptr, Indices index,
                     Indices order, Result dx, Result dvalues, int64_t in, int64_t out) {
  return result("spmm_grads", call_spmm_grads(buffer(x), buffer(dy), buffer(values), index_of(ptr, index, order),
                                              buffer(*dx), buffer(*dvalues), in, out, pool_of(threads)));
}

ffi::Error BlockDiagMatmul(ffi::ThreadPool threads, Array x, Array values, Array bias, Result y, bool transposed,
                           int64_t activation) {
  return result("block_diag_matmul", call_block_diag_matmul(buffer(x), buffer(values), buffer(bias), buffer(*y),
                                                            transposed, activation, pool_of(threads)));
}

ffi::Error BlockDiagOuter(ffi::ThreadPool threads, Array x, Array dy, Result values) {
  return result("block_diag_outer",
                call_block_diag_outer(buffer(x), buffer(dy), buffer(*values), pool_of(threads)));
}

}  // namespace
}  // namespace jaxsparse_cpu

using namespace jaxsparse_cpu;

HANDLER(jaxsparse_cpu_spmm, Spmm,
        ffi::Ffi::Bind()
            .Ctx<ffi::ThreadPool>()
            .Arg<ffi::AnyBuffer>()
            .Arg<ffi::AnyBuffer>()
            .Arg<Indices>()
            .Arg<ffi::AnyBuffer>()
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

// Asked from Python by ctypes, which registers a handler for each of these names.
#define NAME(product, Arguments) #product " "
extern "C" EXPORTED const char* jaxsparse_cpu_products() { return JAXSPARSE_PRODUCTS(NAME); }
#undef NAME

extern "C" EXPORTED int jaxsparse_cpu_ffi_major() { return XLA_FFI_API_MAJOR; }
extern "C" EXPORTED int jaxsparse_cpu_ffi_minor() { return XLA_FFI_API_MINOR; }
extern "C" EXPORTED const char* jaxsparse_cpu_isa() { return isa(); }
extern "C" EXPORTED int jaxsparse_cpu_use_isa(const char* name) { return use_isa(name); }
