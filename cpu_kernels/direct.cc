// The kernels without XLA: on tensors of whoever speaks DLPack, in their own memory and on the caller's threads.
#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <utility>

#include "calls.h"

namespace {

using namespace jaxsparse_cpu;

// DLPack's tensor (dmlc.github.io/dlpack, version 1): its layout is an ABI.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;  // strides may be null: C order
  uint64_t byte_offset;
};

Type type_of(const DLTensor& t) {
  enum { kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4 };
  if (t.lanes != 1) return Type::other;
  if (t.code == kInt && t.bits == 32) return Type::i32;
  if (t.code == kUint && t.bits == 16) return Type::u16;
  if (t.code == kBfloat && t.bits == 16) return Type::bf16;
  if (t.code != kFloat) return Type::other;
  return t.bits == 32 ? Type::f32 : t.bits == 64 ? Type::f64 : t.bits == 16 ? Type::f16 : Type::other;
}

bool in_c_order(const DLTensor& t) {
  if (!t.strides) return true;
  int64_t step = 1, count = 1;
  for (int i = 0; i < t.ndim; ++i) count *= t.shape[i];
  for (int i = t.ndim - 1; i >= 0 && count; step *= t.shape[i--])
    if (t.shape[i] != 1 && t.strides[i] != step) return false;
  return true;
}

}  // namespace

extern "C" {

// Who calls. Its address is an argument of every call.
struct JaxsparseCaller {
  int (*borrow)(void* object, DLTensor* tensor);  // DLPack's exchange; null: objects are pointers to tensors
  void* none;                                     // the object that stands for no tensor
  int32_t (*threads)(uint32_t* count);            // the team; null: the calling thread alone
  int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*run)(int64_t, int64_t, void*), void*);
  void* (*unlock)();  // gives up a lock that the caller holds (Python's), and takes it again; null: there is none
  void (*lock)(void*);
  int64_t (*number)(void* object);  // Python's own, for its builtin functions below
  void (*keep)(void* object);
  void (*refuse)(void* kind, const char* text);
  void* error;
};

}  // extern "C"

namespace {

// The operands of one call, borrowed one after the other. After the first failure the rest are empty.
class Operands {
 public:
  explicit Operands(const JaxsparseCaller& caller) : caller_(caller) {}

  Buffer operator()(const char* name, void* object) {
    static const int64_t none = 0;
    if (failed_ || !object || object == caller_.none) return {Type::i32, 1, &none, nullptr};
    DLTensor& t = tensors_[count_++];
    if (caller_.borrow) {
      failed_ = caller_.borrow(object, &t) != 0;  // the caller's own error is set
      if (failed_) return {Type::i32, 1, &none, nullptr};
    } else {
      t = *static_cast<DLTensor*>(object);
    }
    if (t.device_type != 1) wrong(name, " is not on a CPU");
    if (!in_c_order(t)) wrong(name, " is not contiguous");
    const Buffer buffer{type_of(t), t.ndim, t.shape, static_cast<char*>(t.data) + t.byte_offset};
    if (!t.data && buffer.count()) wrong(name, " has no memory");
    return buffer;
  }

  // Runs call(pool) without the caller's lock, and returns what is to be returned.
  template <class F>
  const char* run(F call) {
    static thread_local std::string text;
    if (failed_) return "";
    if (wrong_.empty()) {
      void* state = caller_.unlock ? caller_.unlock() : nullptr;
      try {
        wrong_ = call(pool());
      } catch (const std::exception& error) {
        wrong_ = error.what();
      }
      if (caller_.unlock) caller_.lock(state);
    }
    text = wrong_;
    return text.empty() ? nullptr : text.c_str();
  }

 private:
  void wrong(const char* name, const char* what) {
    if (wrong_.empty()) wrong_ = std::string(name) + what;
  }

  Pool pool() {
    uint32_t threads = 1;
    if (!caller_.parallel_for || caller_.threads(&threads) != 0) threads = 1;
    return {static_cast<int>(threads), this, nullptr, together};
  }

  struct Work {
    void (*run)(void*);
    void* arg;
  };

  static void together(void* self, int times, void (*run)(void*), void* arg) {
    Work work{run, arg};
    const auto some = [](int64_t begin, int64_t end, void* work) {
      for (; begin < end; ++begin) static_cast<Work*>(work)->run(static_cast<Work*>(work)->arg);
    };
    static_cast<Operands*>(self)->caller_.parallel_for(0, times, 1, some, &work);
  }

  const JaxsparseCaller& caller_;
  DLTensor tensors_[11];  // as many as any call has
  int count_ = 0;
  bool failed_ = false;
  std::string wrong_;
};

}  // namespace

#define EXPORTED __attribute__((visibility("default")))

// Each returns null, or what is wrong with the arguments ("" where borrowing failed). Absent ones are null or none.
extern "C" {

EXPORTED const char* jaxsparse_cpu_direct_spmm(const JaxsparseCaller* caller, void* x, void* values, void* ptr,
                                               void* index, void* order, void* bias, void* y, int64_t in, int64_t out,
                                               int64_t block_in, int64_t block_out, int transposed,
                                               int64_t activation) {
  Operands get(*caller);
  const Buffer bx = get("x", x), bv = get("blocks", values), bb = get("bias", bias), by = get("y", y);
  const Index i{get("the index pointers", ptr), get("the index", index), get("the order", order)};
  return get.run([&](const Pool& pool) {
    return call_spmm(bx, bv, i, bb, by, {in, out, block_in, block_out}, transposed, activation, pool);
  });
}

EXPORTED const char* jaxsparse_cpu_direct_sddmm(const JaxsparseCaller* caller, void* x, void* dy, void* ptr,
                                                void* index, void* values, int64_t in, int64_t out, int64_t block_in,
                                                int64_t block_out) {
  Operands get(*caller);
  const Buffer bx = get("x", x), bd = get("dy", dy), bv = get("blocks", values);
  const Index i{get("the index pointers", ptr), get("the index", index), get("the order", nullptr)};
  return get.run(
      [&](const Pool& pool) { return call_sddmm(bx, bd, i, bv, {in, out, block_in, block_out}, pool); });
}

EXPORTED const char* jaxsparse_cpu_direct_spmm_backward(const JaxsparseCaller* caller, void* x, void* dy, void* values,
                                                        void* col_ptr, void* row_index, void* row_ptr,
                                                        void* col_index, void* order, void* dx, void* dvalues,
                                                        void* dbias, int64_t in, int64_t out, int64_t block_in,
                                                        int64_t block_out, int transposed) {
  Operands get(*caller);
  const Buffer bx = get("x", x), bd = get("dy", dy), bv = get("blocks", values);
  const Index columns{get("the index pointers", col_ptr), get("the index", row_index), get("the order", nullptr)};
  const Index rows{get("the index pointers", row_ptr), get("the index", col_index), get("the order", order)};
  const Buffer bdx = get("dx", dx), bdv = get("dblocks", dvalues), bdb = get("dbias", dbias);
  return get.run([&](const Pool& pool) {
    return call_spmm_backward(bx, bd, bv, columns, rows, bdx, bdv, bdb, {in, out, block_in, block_out}, transposed,
                              pool);
  });
}

EXPORTED const char* jaxsparse_cpu_direct_block_diag_matmul(const JaxsparseCaller* caller, void* x, void* values,
                                                            void* bias, void* y, int transposed, int64_t activation) {
  Operands get(*caller);
  const Buffer bx = get("x", x), bv = get("blocks", values), bb = get("bias", bias), by = get("y", y);
  return get.run(
      [&](const Pool& pool) { return call_block_diag_matmul(bx, bv, bb, by, transposed, activation, pool); });
}

EXPORTED const char* jaxsparse_cpu_direct_block_diag_outer(const JaxsparseCaller* caller, void* x, void* dy,
                                                           void* values) {
  Operands get(*caller);
  const Buffer bx = get("x", x), bd = get("dy", dy), bv = get("blocks", values);
  return get.run([&](const Pool& pool) { return call_block_diag_outer(bx, bd, bv, pool); });
}

EXPORTED const char* jaxsparse_cpu_direct_block_diag_backward(const JaxsparseCaller* caller, void* x, void* dy,
                                                              void* values, void* dx, void* dvalues, void* dbias,
                                                              int transposed) {
  Operands get(*caller);
  const Buffer bx = get("x", x), bd = get("dy", dy), bv = get("blocks", values);
  const Buffer bdx = get("dx", dx), bdv = get("dblocks", dvalues), bdb = get("dbias", dbias);
  return get.run([&](const Pool& pool) {
    return call_block_diag_backward(bx, bd, bv, bdx, bdv, bdb, transposed, pool);
  });
}

}  // extern "C"

// The same as builtin functions of Python (METH_FASTCALL, of its stable ABI), which it calls in a third of the time that
// a foreign function takes. They return None, or raise.
namespace {

const JaxsparseCaller* python = nullptr;

template <class T>
T argument(void* object) {
  return static_cast<T>(python->number(object));
}

template <>
void* argument<void*>(void* object) {
  return object;
}

void* returned(const char* name, const char* wrong) {
  if (!wrong) {
    python->keep(python->none);
    return python->none;
  }
  if (*wrong) python->refuse(python->error, (std::string("cpu_kernels.") + name + ": " + wrong + ".").c_str());
  return nullptr;
}

template <class... A, size_t... I>
void* called(const char* name, const char* (*function)(const JaxsparseCaller*, A...), void* const* arguments,
             ptrdiff_t count, std::index_sequence<I...>) {
  if (count != ptrdiff_t(sizeof...(A))) return returned(name, "another number of arguments is needed");
  return returned(name, function(python, argument<A>(arguments[I])...));
}

template <class... A>
void* called(const char* name, const char* (*function)(const JaxsparseCaller*, A...), void* const* arguments,
             ptrdiff_t count) {
  return called(name, function, arguments, count, std::index_sequence_for<A...>{});
}

}  // namespace

#define BUILTIN(name)                                                                                      \
  EXPORTED void* jaxsparse_cpu_builtin_##name(void*, void* const* arguments, ptrdiff_t count) {             \
    return called(#name, jaxsparse_cpu_direct_##name, arguments, count);                                    \
  }

extern "C" {

// Who calls by the builtin functions; it must outlive them.
EXPORTED void jaxsparse_cpu_builtin_caller(const JaxsparseCaller* caller) { python = caller; }

BUILTIN(spmm)
BUILTIN(sddmm)
BUILTIN(spmm_backward)
BUILTIN(block_diag_matmul)
BUILTIN(block_diag_outer)
BUILTIN(block_diag_backward)

}  // extern "C"
