// The pace that the vector unit sets, for benchmarks: `count` exponentials with two multiply-adds each, all in registers
// and first-level cache, shared among threads.
#include "parallel.h"
#include "vec.h"

enum { TASKS = 16 };
typedef struct { int64_t count, threads; float *result; } limit_args;

static void limit_task(void *context, int64_t task) {
    const limit_args *a = context;
    vf h[16], sum = {0}, x = v_set(0.01f);
    float rate[16 * VL], factor[32];
    for (int i = 0; i < 16 * VL; i++) rate[i] = -1.0f - (float)i / 64;
    for (int i = 0; i < 32; i++) factor[i] = 1.0f / (float)(i + 1);
    for (int i = 0; i < 16; i++) h[i] = v_set(0.0f);
    for (int64_t i = 0; i < a->count / (TASKS * 16 * VL); i++) {
        x = v_set(0.01f) + sum * 1e-30f;
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) {
            h[j] = v_exp2(x * v_load(rate + j * VL)) * h[j] + v_set(factor[j]);
            sum += h[j] * factor[j + 16];
        }
    }
    a->result[task] = v_sum(sum);
}

void ssmzoo_exponential_limit(const limit_args *a) { parallel_for(TASKS, a->threads, limit_task, (void *)a); }

// The pace that memory sets: all numbers are read once, a slab per task, whose sum is kept.
enum { SLAB = 1 << 18 };
typedef struct { const float *data; int64_t count; float *sums; int64_t threads; } read_args;

static void read_task(void *context, int64_t task) {
    const read_args *a = context;
    const float *from = a->data + task * SLAB;
    vf sum[4] = {{0}};
    for (int64_t i = 0; i < SLAB; i += 4 * VL)
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) sum[u] += v_load(from + i + u * VL);
    a->sums[task] = v_sum(sum[0] + sum[1] + sum[2] + sum[3]);
}

void ssmzoo_read(const read_args *a) { parallel_for(a->count / SLAB, a->threads, read_task, (void *)a); }
