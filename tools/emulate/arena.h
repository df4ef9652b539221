// Memory that two processes see at one address.
#pragma once
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#define ARENA_START ((void *)0x200000000000)
#define ARENA_BYTES ((size_t)4 << 30)

static inline char *map_arena(const char *file) {
    int descriptor = open(file, O_RDWR);
    if (descriptor < 0) return NULL;
    char *p = mmap(ARENA_START, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, descriptor, 0);
    close(descriptor);
    return p == MAP_FAILED ? NULL : p;
}
