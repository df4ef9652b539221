// Compiled for the other architecture and run by its emulator: serve.c LIBRARY ARENA. Calls functions of the library as
// they are asked for on standard input, on tensors in the shared memory.
#include "arena.h"
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { ARGUMENTS = 13 };
typedef struct {
    char name[64];
    int64_t value[ARGUMENTS], bytes[ARGUMENTS];  // bytes > 0: the argument points to so many, which follow
} request;
typedef int64_t function(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                         int64_t, int64_t, int64_t);  // one that takes fewer leaves the rest alone

static void in(void *to, size_t bytes) { if (bytes && fread(to, bytes, 1, stdin) != 1) exit(0); }
static void out(const void *from, size_t bytes) { if (bytes && fwrite(from, bytes, 1, stdout) != 1) exit(1); }

int main(int count, char **arguments) {
    void *library = count == 3 ? dlopen(arguments[1], RTLD_NOW) : NULL;
    if (!library || !map_arena(arguments[2])) return fprintf(stderr, "cannot serve: %s\n", dlerror()), 1;
    for (request r;;) {
        in(&r, sizeof r);
        int64_t v[ARGUMENTS];
        for (int i = 0; i < ARGUMENTS; i++) {
            v[i] = r.value[i];
            if (!r.bytes[i]) continue;
            void *p = NULL;
            if (posix_memalign(&p, 64, (size_t)r.bytes[i])) return 1;
            in(p, (size_t)r.bytes[i]);
            v[i] = (int64_t)p;
        }
        function *called = (function *)dlsym(library, r.name);
        int64_t found = called != NULL, result = 0;
        if (found)
            result = called(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12]);
        out(&found, sizeof found);
        out(&result, sizeof result);
        for (int i = 0; i < ARGUMENTS; i++)
            if (r.bytes[i]) out((void *)v[i], (size_t)r.bytes[i]), free((void *)v[i]);
        fflush(stdout);
    }
}
