// Loaded before the C library (LD_PRELOAD) of the process that holds torch: tensors' memory comes from a file that the
// emulated process maps at the same address, so that a pointer means the same in both.
#define _GNU_SOURCE
#include "arena.h"
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { CLASSES = 48, HEAD = 64 };
typedef struct block { struct block *next; long size_class; } block;  // in front of every piece of memory given out
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static block *unused[CLASSES];
static char *start, *end, *fresh;
static void (*system_free)(void *);
static void *(*system_realloc)(void *, size_t);
static int (*system_memalign)(void **, size_t, size_t);

static void find(void) {
    system_free = (void (*)(void *))dlsym(RTLD_NEXT, "free");
    system_realloc = (void *(*)(void *, size_t))dlsym(RTLD_NEXT, "realloc");
    system_memalign = (int (*)(void **, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
}

__attribute__((constructor)) static void map(void) {
    find();
    const char *file = getenv("SSMZOO_ARENA");
    if (file && (start = map_arena(file))) fresh = start, end = start + ARENA_BYTES;
}

static int ours(const void *p) { return (const char *)p >= start && (const char *)p < end; }

int posix_memalign(void **result, size_t alignment, size_t size) {
    if (!system_memalign) find();
    if (!start || alignment > HEAD) return system_memalign(result, alignment, size);
    int c = 7;
    while (((size_t)1 << c) < size + HEAD) c++;
    pthread_mutex_lock(&lock);
    block *b = unused[c];
    if (b) unused[c] = b->next;
    else if (fresh + ((size_t)1 << c) <= end) b = (block *)fresh, fresh += (size_t)1 << c;
    pthread_mutex_unlock(&lock);
    if (!b) return ENOMEM;
    b->size_class = c;
    *result = (char *)b + HEAD;
    return 0;
}

void free(void *p) {
    if (!system_free) find();
    if (!start || !ours(p)) {
        system_free(p);
        return;
    }
    block *b = (block *)((char *)p - HEAD);
    pthread_mutex_lock(&lock);
    b->next = unused[b->size_class];
    unused[b->size_class] = b;
    pthread_mutex_unlock(&lock);
}

void *realloc(void *p, size_t size) {
    void *q = NULL;
    if (!system_realloc) find();
    if (!start || !ours(p)) return system_realloc(p, size);
    size_t held = ((size_t)1 << ((block *)((char *)p - HEAD))->size_class) - HEAD;
    if (posix_memalign(&q, HEAD, size)) return NULL;
    memcpy(q, p, held < size ? held : size);
    free(p);
    return q;
}
