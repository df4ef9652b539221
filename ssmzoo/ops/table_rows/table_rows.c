// Products of tokens with rows of a table that they name, weighted sums of such rows, and the table's gradient; fp32.
#include "parallel.h"
#include "vec.h"

typedef struct {
    float *table;           // (e d)
    const int64_t *entry;   // (t k)
    float *x, *weight;      // (t d), (t k)
    int64_t tokens, k, e, d, threads;
} rows_args;

enum { SHARE = 64, VECTORS = 8 };  // tokens per task; vectors of columns that a sum holds in registers

static int64_t last(const rows_args *a, int64_t task) { return (task + 1) * SHARE < a->tokens ? (task + 1) * SHARE : a->tokens; }

static void products(void *context, int64_t task) {  // weight = <row, x>
    const rows_args *a = context;
    for (int64_t t = task * SHARE; t < last(a, task); t++) {
        const float *x = a->x + t * a->d;
        for (int64_t j = 0; j < a->k; j++) {
            const float *row = a->table + a->entry[t * a->k + j] * a->d;
            vf sum = {0};
            for (int64_t i = 0; i < a->d; i += VL) sum += v_load_some(row + i, a->d - i) * v_load_some(x + i, a->d - i);
            a->weight[t * a->k + j] = v_sum(sum);
        }
    }
}

static void sums(void *context, int64_t task) {  // x = sum of weight row
    const rows_args *a = context;
    for (int64_t t = task * SHARE; t < last(a, task); t++)
        for (int64_t i = 0; i < a->d; i += VECTORS * VL) {
            const int64_t left = a->d - i;
            vf sum[VECTORS] = {{0}};
            for (int64_t j = 0; j < a->k; j++) {
                const float *row = a->table + a->entry[t * a->k + j] * a->d + i, weight = a->weight[t * a->k + j];
                for (int v = 0; v < VECTORS && v * VL < left; v++) sum[v] += weight * v_load_some(row + v * VL, left - v * VL);
            }
            for (int v = 0; v < VECTORS && v * VL < left; v++)
                v_store_some(a->x + t * a->d + i + v * VL, sum[v], left - v * VL);
        }
}

// A task has some columns of the table to itself and goes through all tokens in their order.
static void spread(void *context, int64_t task) {  // rows of the table = sum of weight x
    const rows_args *a = context;
    const int64_t tasks = (a->d + VL - 1) / VL < a->threads ? (a->d + VL - 1) / VL : a->threads;
    const int64_t vectors = (a->d + VL - 1) / VL, from = vectors * task / tasks * VL;
    const int64_t to = vectors * (task + 1) / tasks * VL < a->d ? vectors * (task + 1) / tasks * VL : a->d;
    for (int64_t r = 0; r < a->e; r++) memset(a->table + r * a->d + from, 0, (size_t)(to - from) * sizeof(float));
    for (int64_t t = 0; t < a->tokens; t++)
        for (int64_t j = 0; j < a->k; j++) {
            float *row = a->table + a->entry[t * a->k + j] * a->d;
            const float *x = a->x + t * a->d, weight = a->weight[t * a->k + j];
            for (int64_t i = from; i < to; i += VL)
                v_store_some(row + i, v_load_some(row + i, to - i) + weight * v_load_some(x + i, to - i), to - i);
        }
}

void ssmzoo_dot_rows(const rows_args *a) { parallel_for((a->tokens + SHARE - 1) / SHARE, a->threads, products, (void *)a); }
void ssmzoo_sum_rows(const rows_args *a) { parallel_for((a->tokens + SHARE - 1) / SHARE, a->threads, sums, (void *)a); }
void ssmzoo_spread_rows(const rows_args *a) {
    const int64_t vectors = (a->d + VL - 1) / VL;
    parallel_for(vectors < a->threads ? vectors : a->threads, a->threads, spread, (void *)a);
}
