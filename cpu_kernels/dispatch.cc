// The public functions: check every size and index pointer, then run the best instruction set.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef JAXSPARSE_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "kernels.h"

namespace jaxsparse_cpu {

extern const KernelTable kernels_portable;
#ifdef JAXSPARSE_X86
extern const KernelTable kernels_avx2, kernels_avx512;
#endif

namespace {

#ifdef JAXSPARSE_X86
// Asked of the processor itself: clang 14 and 15 refuse __builtin_cpu_supports("f16c").
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

#ifdef JAXSPARSE_X86
// The kernels of AVX-512, whose products of bfloat16 blocks go by tile registers where this is the table in use.
const KernelTable kernels_amx = [] {
  KernelTable table = kernels_avx512;
  table.name = "amx";
  return table;
}();

// Tile registers are there if the processor has them and Linux, asked once for each process, allows for their size.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr int kRequest = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best first; null ends the list.
const KernelTable* const* available() {
  static const KernelTable* found[5] = {};
  static const bool once = [] {
    int n = 0;
#ifdef JAXSPARSE_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      if (may_use_tiles()) found[n++] = &kernels_amx;
      found[n++] = &kernels_avx512;
    }
    if (avx2) found[n++] = &kernels_avx2;
#endif
    found[n] = &kernels_portable;
    return true;
  }();
  (void)once;
  return found;
}

const KernelTable* named(const char* name) {
  for (const KernelTable* const* t = available(); *t; ++t)
    if (!std::strcmp((*t)->name, name)) return *t;
  return nullptr;
}

std::atomic<const KernelTable*>& chosen() {
  static std::atomic<const KernelTable*> table{[] {
    const char* wish = std::getenv("JAXSPARSE_CPU_ISA");
    const KernelTable* table = wish ? named(wish) : nullptr;
    return table ? table : available()[0];
  }()};
  return table;
}

std::string text(int64_t v) { return std::to_string(v); }

// The first thing that is wrong with the pointers of the lines; the indices are checked by the
// kernels, a vector at a time, and only looked at again here when one was found out of range.
std::string wrong_pointers(const Lines& l) {
  if (l.lines < 0 || l.limit < 0 || l.entries < 0) return "negative sizes";
  if (l.entries > INT32_MAX || l.limit > INT32_MAX)
    return text(l.entries) + " entries over " + text(l.limit) + " slices overflow int32 indices";
  if (l.ptr[0] != 0) return "index pointers begin with " + text(l.ptr[0]) + ", not 0";
  for (int64_t n = 0; n < l.lines; ++n)
    if (l.ptr[n + 1] < l.ptr[n])
      return "index pointers fall from " + text(l.ptr[n]) + " to " + text(l.ptr[n + 1]) +
             " at line " + text(n);
  if (l.ptr[l.lines] != l.entries)
    return "index pointers end with " + text(l.ptr[l.lines]) + ", but there are " +
           text(l.entries) + " stored entries";
  return "";
}

std::string wrong_index(const Lines& l) {
  for (int64_t k = 0; k < l.entries; ++k) {
    const int64_t index = l.narrow ? l.narrow[k] : l.index[k];
    if (index < 0 || index >= l.limit)
      return "index " + text(index) + " of entry " + text(k) + " is not in [0, " +
             text(l.limit) + ")";
    if (l.order && (l.order[k] < 0 || l.order[k] >= l.entries))
      return "order " + text(l.order[k]) + " of entry " + text(k) + " is not in [0, " +
             text(l.entries) + ")";
  }
  return "no memory for scratch";
}

// The block's slices must be those of the matrix, and no size may overflow.
std::string wrong_sizes(int64_t m, int64_t in, int64_t out, int64_t depth, int64_t width,
                        const Lines& l, bool lines_are_inputs) {
  if (m < 0 || in < 0 || out < 0 || depth < 1 || width < 1)
    return "sizes m=" + text(m) + ", in=" + text(in) + ", out=" + text(out) + ", block (" +
           text(depth) + ", " + text(width) + ")";
  const int64_t slices = (in + depth - 1) / depth, lines = (out + width - 1) / width;
  if ((lines_are_inputs ? slices : lines) != l.lines || (lines_are_inputs ? lines : slices) != l.limit)
    return "a " + text(in) + " x " + text(out) + " product with blocks of " + text(depth) + " x " +
           text(width) + " has " + text(slices) + " x " + text(lines) + " blocks, but the index has " +
           text(l.lines) + " lines of at most " + text(l.limit);
  return wrong_pointers(l);
}

}  // namespace

const KernelTable& kernels() { return *chosen().load(); }

const char* isa() { return kernels().name; }

bool use_isa(const char* name) {
  const KernelTable* table = named(name);
  if (table) chosen().store(table);
  return table != nullptr;
}

bool has_tiles() {
#ifdef JAXSPARSE_X86
  return &kernels() == &kernels_amx;
#else
  return false;
#endif
}

bool has_fast_gather() {
  static const bool fast = [] {
    char state[16] = "";
    if (std::FILE* file = std::fopen("/sys/devices/system/cpu/vulnerabilities/gather_data_sampling", "r")) {
      if (!std::fgets(state, sizeof state, file)) state[0] = 0;
      std::fclose(file);
    }
    return std::strncmp(state, "Mitigation", 10) != 0;
  }();
  return fast;
}

std::string spmm(const Product& p, const Pool& pool) {
  const std::string wrong = wrong_sizes(p.m, p.in, p.out, p.depth, p.width, p.lines, false);
  if (!wrong.empty()) return wrong;
  return kernels().spmm(p, pool) ? "" : wrong_index(p.lines);
}

std::string sddmm(const Outer& p, const Pool& pool) {
  const std::string wrong = wrong_sizes(p.m, p.in, p.out, p.depth, p.width, p.lines, false);
  if (!wrong.empty()) return wrong;
  return kernels().sddmm(p, pool) ? "" : wrong_index(p.lines);
}

std::string spmm_grads(const Gradients& p, const Pool& pool) {
  if (!p.lines.order && p.lines.entries) return "both gradients together need the order of entries";
  const std::string wrong = wrong_sizes(p.m, p.in, p.out, 1, 1, p.lines, true);
  if (!wrong.empty()) return wrong;
  return kernels().spmm_grads(p, pool) ? "" : wrong_index(p.lines);
}

}  // namespace jaxsparse_cpu
