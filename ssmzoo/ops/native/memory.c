// Fresh memory in one go. The system hands out a new block of memory page by page, at the first touch of each 4 KiB; asked
// for at once, in huge pages, it takes a fraction of that (`ssmzoo bench fresh` compares).
#define _GNU_SOURCE
#include "parallel.h"
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

enum { SLAB = 1 << 21 };  // a huge page

typedef struct {
    uintptr_t start, end, first;  // pages of the block; first: the slab that holds its start
} block;

static void populate(void *context, int64_t index) {
    const block *b = context;
    uintptr_t from = b->first + (uintptr_t)index * SLAB, to = from + SLAB;
    if (from < b->start) from = b->start;
    if (to > b->end) to = b->end;
    madvise((void *)from, to - from, MADV_POPULATE_WRITE);
}

// Bring the block of `bytes` at `data`, which is about to be overwritten, into memory. Only advice: a system that does not
// know it refuses, and the pages then come one by one.
void ssmzoo_commit(char *data, int64_t bytes, int64_t threads) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    block b = {((uintptr_t)data + page - 1) / page * page, ((uintptr_t)data + (uintptr_t)bytes) / page * page, 0};
    if (b.end <= b.start) return;
    size_t pages = (b.end - b.start) / page, present = 0;
    unsigned char *resident = malloc(pages);
    if (!resident || mincore((void *)b.start, b.end - b.start, resident)) present = pages;
    else for (size_t i = 0; i < pages; i++) present += resident[i] & 1;
    free(resident);
    if (present > pages - pages / 8) return;
    madvise((void *)b.start, b.end - b.start, MADV_HUGEPAGE);
    b.first = b.start / SLAB * SLAB;
    parallel_for((int64_t)((b.end - b.first + SLAB - 1) / SLAB), threads, populate, &b);
}

// Gather what lies between two multiples of SLAB into huge pages, where it is; a system that cannot leaves it as it was.
void ssmzoo_gather(char *from, char *to) {
    for (; from < to; from += SLAB) madvise(from, SLAB, MADV_COLLAPSE);
}
#else
void ssmzoo_gather(char *from, char *to) { (void)from, (void)to; }
void ssmzoo_commit(char *data, int64_t bytes, int64_t threads) { (void)data, (void)bytes, (void)threads; }
#endif
