// What benchmarks and tests ask of the vector unit itself: its pace of multiply-adds, and exponentials alone.
#include "parallel.h"
#include "vec.h"

enum { TASKS = 16, CHAINS = 12 };
typedef struct { int64_t count, threads; float *result; } pace_args;

static void pace_task(void *context, int64_t task) {
    const pace_args *a = context;
    vf x[CHAINS], sum = {0}, factor = v_set(0.5f);
    for (int i = 0; i < CHAINS; i++) x[i] = v_set((float)i);
    for (int64_t i = 0; i < a->count / (TASKS * CHAINS * VL); i++) {
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) x[j] = x[j] * factor + factor;
    }
    for (int i = 0; i < CHAINS; i++) sum += x[i];
    a->result[task] = v_sum(sum);
}

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

// `count` multiply-adds of floats in independent chains in registers, shared among threads; 16 floats of result.
void ssmzoo_multiply_adds(const pace_args *a) { parallel_for(TASKS, a->threads, pace_task, (void *)a); }

// y = 2^x, count a multiple of 16; `range` as in vec.h
void ssmzoo_exponentials(const float *x, float *y, int64_t count, int64_t range) {
    for (int64_t i = 0; i + VL <= count; i += VL) {
        vf t = v_load(x + i);
        v_store(y + i, range == WITHIN_BOUND ? v_exp2_of(t, WITHIN_BOUND) : range ? v_exp2_of(t, AT_MOST_BOUND) : v_exp2(t));
    }
}
