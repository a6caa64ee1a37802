// What XLA hands over, as the calls take it; each handler is one function between the two.
#pragma once

#include <cstdint>
#include <string>

#include "calls.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxsparse_cpu {
namespace {

using Array = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;
using Indices = ffi::Buffer<ffi::S32>;

inline Pool pool_of(ffi::ThreadPool& pool) {
  return {static_cast<int>(pool.num_threads()), &pool,
          [](void* owner, void (*run)(void*), void* argument) {
            static_cast<ffi::ThreadPool*>(owner)->Schedule([run, argument] { run(argument); });
          },
          nullptr};
}

inline ffi::Error result(const char* op, const std::string& wrong) {
  if (wrong.empty()) return ffi::Error::Success();
  return ffi::Error::InvalidArgument(std::string("cpu_kernels.") + op + ": " + wrong + ".");
}

inline Type type_of(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return Type::f32;
    case ffi::F64: return Type::f64;
    case ffi::BF16: return Type::bf16;
    case ffi::F16: return Type::f16;
    case ffi::S32: return Type::i32;
    case ffi::U16: return Type::u16;
    default: return Type::other;
  }
}

template <class B>
Buffer buffer(B& b) {
  const auto dims = b.dimensions();
  return {type_of(b.element_type()), int64_t(dims.size()), dims.begin(), b.untyped_data()};
}

}  // namespace
}  // namespace jaxsparse_cpu

#define EXPORTED __attribute__((visibility("default")))

#define HANDLER(symbol, function, binding)                             \
  extern "C" EXPORTED XLA_FFI_Error* symbol(XLA_FFI_CallFrame* frame) { \
    static auto* handler = (binding).To(function).release();           \
    return handler->Call(frame);                                       \
  }
