// Tasks over somebody else's threads, and scratch memory that outlives a call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace jaxsparse_cpu {

// `tasks` independent pieces of work; run(context, task, worker) with worker < workers.
struct Phase {
  int64_t tasks;
  void (*run)(const void* context, int64_t task, int worker);
  const void* context;
};

// Runs the phases one after another, each wholly done before the next begins. The caller works
// too and never waits for a queued helper, only for tasks that somebody has begun: the calling
// thread may itself belong to the pool, where waiting for the queue would deadlock.
void run_phases(const Pool& pool, int workers, const Phase* phases, int count);

// How many threads `fmas` multiply-adds are worth.
int workers_for(const Pool& pool, double fmas);

// Scratch of at least `bytes`, 64-byte aligned, or null. Kept for the next call when given back,
// because fresh pages cost more than many a product.
void* take_scratch(size_t bytes);
void give_scratch(void*);

}  // namespace jaxsparse_cpu
