// The product with n of every m neighbouring inputs stored, as XLA calls it: shapes and dtypes are checked here.
#include <algorithm>
#include <initializer_list>

#include "ffi.h"

namespace jaxsparse_cpu {
namespace {

bool has_shape(const Array& a, ffi::DataType type, std::initializer_list<int64_t> dims) {
  const auto got = a.dimensions();
  return a.element_type() == type && got.size() == dims.size() && std::equal(dims.begin(), dims.end(), got.begin());
}

// The sizes of a product, or what is wrong.
std::string fill(NM* p, const Array& x, const Array& values, const Array& bits, int64_t in, int64_t m) {
  const auto type = x.element_type();
  if (x.dimensions().size() != 2) return "x must be a matrix";
  if (values.dimensions().size() != 3) return "values must be [groups, n, out]";
  if (type_of(type) >= Type::i32) return "x must be float32, float64, bfloat16 or float16";
  p->dtype = static_cast<Dtype>(type_of(type));
  p->rows = x.dimensions()[0];
  p->in = in;
  p->m = m;
  p->groups = values.dimensions()[0];
  p->n = values.dimensions()[1];
  p->out = values.dimensions()[2];
  if (!has_shape(values, type, {p->groups, p->n, p->out})) return "values must have the dtype of x";
  if (!has_shape(bits, m <= 8 ? ffi::U8 : ffi::U32, {p->groups, p->out}))
    return "bits must be [groups, out], of 8 bits for m up to 8, else of 32";
  p->x = x.untyped_data();
  p->bits = bits.untyped_data();
  return "";
}

ffi::Error NMSpmm(ffi::ThreadPool threads, Array x, Array values, Array bits, Array bias, Result y, int64_t in,
                  int64_t m, bool transposed, int64_t activation) {
  NM p{};
  std::string wrong = fill(&p, x, values, bits, in, m);
  const int64_t depth = transposed ? p.out : p.in, width = transposed ? p.in : p.out;
  const auto type = x.element_type();
  if (wrong.empty() && (!has_shape(x, type, {p.rows, depth}) || !has_shape(*y, type, {p.rows, width})))
    wrong = "x and y must have " + std::to_string(depth) + " and " + std::to_string(width) + " features";
  const bool biased = bias.element_count() != 0;
  if (wrong.empty() && biased && !has_shape(bias, type, {width})) wrong = "bias must be one number an output";
  if (wrong.empty() && (activation < 0 || activation > 3)) wrong = "no activation " + std::to_string(activation);
  if (!wrong.empty()) return result("n_m_spmm", wrong);
  p.transposed = transposed;
  p.activation = static_cast<Activation>(activation);
  p.values = values.untyped_data();
  p.bias = biased ? bias.untyped_data() : nullptr;
  p.y = y->untyped_data();
  return result("n_m_spmm", n_m_spmm(p, pool_of(threads)));
}

}  // namespace
}  // namespace jaxsparse_cpu

using namespace jaxsparse_cpu;

HANDLER(jaxsparse_cpu_n_m_spmm, NMSpmm,
        ffi::Ffi::Bind()
            .Ctx<ffi::ThreadPool>()
            .Arg<Array>()
            .Arg<Array>()
            .Arg<Array>()
            .Arg<Array>()
            .Ret<Array>()
            .Attr<int64_t>("size_in")
            .Attr<int64_t>("m")
            .Attr<bool>("transposed")
            .Attr<int64_t>("activation"))
