// The check of what the kernel for n of every m is told. No bits can lead it astray: it reads and writes by sizes alone.
#include "kernels.h"

namespace jaxsparse_cpu {

std::string n_m_spmm(const NM& p, const Pool& pool) {
  const bool group = p.n >= 1 && p.m >= p.n && p.m <= 32;
  if (!group || p.rows < 0 || p.in < 1 || p.out < 1 || p.groups != (p.in + p.m - 1) / p.m)
    return std::to_string(p.n) + ":" + std::to_string(p.m) + " of " + std::to_string(p.in) + " inputs and " +
           std::to_string(p.out) + " outputs can't be " + std::to_string(p.groups) + " groups";
  return kernels().n_m_spmm(p, pool) ? "" : "no memory for scratch";
}

}  // namespace jaxsparse_cpu
