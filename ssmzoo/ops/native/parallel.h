// A small persistent thread pool. Results must not depend on which thread runs a task.
#pragma once
#include <stdint.h>
#include <stdlib.h>

// Run body(context, 0) ... body(context, tasks - 1) on up to `threads` threads, the caller among them, and wait. When
// another caller occupies the pool, the tasks run on the calling thread alone: never a deadlock, never a queue.
void parallel_for(int64_t tasks, int64_t threads, void (*body)(void *context, int64_t task), void *context);

// For calls of many short jobs one after the other: program(context, t) runs on the caller, while up to `threads` - 1
// others wait for its crew_for(t, ...), which is parallel_for without the start and the end of a parallel region.
typedef struct crew crew;
void parallel_crew(int64_t threads, void (*program)(void *context, crew *t), void *context);
void crew_for(crew *t, int64_t tasks, void (*body)(void *context, int64_t task), void *context);
int64_t crew_size(const crew *t);

// Scratch memory for one task, aligned to a cache line; free() it.
static inline void *scratch(size_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 64, bytes ? bytes : 64)) abort();
    return p;
}
