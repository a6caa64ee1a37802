// Tasks over somebody else's threads, and scratch memory that outlives a call.
#include "parallel.h"

#include "choose.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jaxsparse_cpu {
namespace {

constexpr int kMaxPhases = 2, kMaxWorkers = 256;

struct alignas(64) Counter {
  std::atomic<int64_t> value{0};
};

// Lives until the last helper has looked at it, which may be after the call has returned; the
// phases' contexts lie on the caller's stack, but no task can be claimed by then.
struct Job {
  std::atomic<int> references, tickets{0};
  int workers, count;
  Phase phases[kMaxPhases];
  Counter done[kMaxPhases];
  Counter* claimed;  // [count][workers]
};

void release(Job* job) {
  if (job->references.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  delete[] job->claimed;
  delete job;
}

// Each worker owns a run of neighbouring tasks, which share data in its cache; when its own are
// finished it takes from the others.
void work_on(Job* job, int phase, int worker) {
  const Phase& p = job->phases[phase];
  for (int step = 0; step < job->workers; ++step) {
    const int owner = (worker + step) % job->workers;
    const int64_t begin = p.tasks * owner / job->workers;
    const int64_t end = p.tasks * (owner + 1) / job->workers;
    std::atomic<int64_t>& next = job->claimed[phase * job->workers + owner].value;
    for (;;) {
      if (next.load(std::memory_order_relaxed) >= end - begin) break;
      const int64_t task = begin + next.fetch_add(1, std::memory_order_relaxed);
      if (task >= end) break;
      p.run(p.context, task, worker);
      job->done[phase].value.fetch_add(1, std::memory_order_release);
    }
  }
}

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

void work(Job* job) {
  const int worker = job->tickets.fetch_add(1, std::memory_order_relaxed);
  if (worker < job->workers) {
    for (int phase = 0; phase < job->count; ++phase) {
      work_on(job, phase, worker);
      for (int spins = 0;
           job->done[phase].value.load(std::memory_order_acquire) < job->phases[phase].tasks;
           ++spins) {
        spins < kLooks ? pause() : std::this_thread::yield();
      }
    }
  }
}

void help(void* argument) {
  Job* job = static_cast<Job*>(argument);
  work(job);
  release(job);
}

void run_alone(const Phase* phases, int count) {
  for (int phase = 0; phase < count; ++phase)
    for (int64_t task = 0; task < phases[phase].tasks; ++task)
      phases[phase].run(phases[phase].context, task, 0);
}

}  // namespace

void run_phases(const Pool& pool, int workers, const Phase* phases, int count) {
  Job* job = workers > 1 ? new (std::nothrow) Job : nullptr;
  if (job) job->claimed = new (std::nothrow) Counter[count * workers];
  if (!job || !job->claimed) {
    delete job;
    return run_alone(phases, count);
  }
  job->workers = workers;
  job->count = count;
  for (int phase = 0; phase < count; ++phase) job->phases[phase] = phases[phase];
  job->references.store(workers, std::memory_order_relaxed);
  if (pool.together) return pool.together(pool.owner, workers, help, job);
  for (int helper = 1; helper < workers; ++helper) pool.schedule(pool.owner, help, job);
  help(job);
}

int workers_for(const Pool& pool, double fmas) {
  const double worth = fmas / kFmasPerWorker;
  const int most = pool.threads < kMaxWorkers ? pool.threads : kMaxWorkers;
  return worth < 2 || most < 2 ? 1 : worth < most ? static_cast<int>(worth) : most;
}

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// The size of a buffer stands in the 64 bytes before it.
struct Shelf {
  std::mutex mutex;
  void* kept[kKeptBuffers] = {};
  size_t bytes = 0;
};

Shelf& shelf() {
  static Shelf* one = new Shelf;  // never destroyed: threads may outlive static destructors
  return *one;
}

size_t& size_of(void* scratch) { return *reinterpret_cast<size_t*>(static_cast<char*>(scratch) - 64); }

void free_scratch(void* scratch) { std::free(static_cast<char*>(scratch) - 64); }

}  // namespace

void* take_scratch(size_t bytes) {
  if (bytes == 0) bytes = 64;
  {
    Shelf& s = shelf();
    std::lock_guard<std::mutex> lock(s.mutex);
    int best = -1;
    for (int i = 0; i < kKeptBuffers; ++i)
      if (s.kept[i] && size_of(s.kept[i]) >= bytes &&
          (best < 0 || size_of(s.kept[i]) < size_of(s.kept[best])))
        best = i;
    if (best >= 0) {
      void* scratch = s.kept[best];
      s.kept[best] = nullptr;
      s.bytes -= size_of(scratch);
      return scratch;
    }
  }
  if (bytes > SIZE_MAX / 2) return nullptr;
  // Large scratch asks for huge pages: tiles are read at random, and with small pages every
  // other read would miss the first-level table of pages.
  const size_t page = bytes < kHugePage / 2 ? 4096 : kHugePage;
  const size_t rounded = (bytes + 64 + page - 1) / page * page;
  char* raw = static_cast<char*>(std::aligned_alloc(page, rounded));
  if (!raw) return nullptr;
#if defined(__linux__)
  if (page == kHugePage) madvise(raw, rounded, MADV_HUGEPAGE);
#endif
  size_of(raw + 64) = rounded - 64;
  return raw + 64;
}

void give_scratch(void* scratch) {
  if (!scratch) return;
  Shelf& s = shelf();
  void* drop = scratch;
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    // The smallest makes room: a call that needs little would be served by a larger one.
    int slot = 0;
    for (int i = 1; i < kKeptBuffers && s.kept[slot]; ++i)
      if (!s.kept[i] || size_of(s.kept[i]) < size_of(s.kept[slot])) slot = i;
    void* old = s.kept[slot];
    const size_t freed = old ? size_of(old) : 0;
    const bool better = !old || size_of(old) < size_of(scratch);
    if (better && s.bytes - freed + size_of(scratch) <= kKeptBytes) {
      s.kept[slot] = scratch;
      s.bytes += size_of(scratch) - freed;
      drop = old;
    }
  }
  if (drop) free_scratch(drop);
}

}  // namespace jaxsparse_cpu
