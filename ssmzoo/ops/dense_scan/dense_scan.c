// The dense scan of symbols: h_t = T[symbol_t] h_{t-1} + x_t for every sequence of a batch; backwards
// g_t = dh_t + T[symbol_{t+1}]' g_{t+1}, dx_t = g_t, dT_s = sum over the steps with symbol s of g_t h_{t-1}'.
//
// One task is one sequence: its state stays in cache and so do the transitions, whose columns (backwards: rows) the
// lanes run along. For dT the steps are sorted by symbol, which makes one matrix product per symbol of them.
#include "gemm.h"
#include "parallel.h"

enum { SKIP = 1 << 28, RESET = 1 << 30 };  // flags in the step codes, as in dense_scan_torch.py

// bad: set to 1 when a code names no symbol
enum { b_, l_, n_, np_, s_, threads_, bad_, SIZES };

typedef struct {
    const int64_t *z;
    const float *T;              // (s n np): forward T' (the column j of T in row j), backward T
    const int32_t *codes;        // (b l)
    const float *x, *first;      // (b l n), (b n)
    float *states, *last;        // (b l n) or NULL when not kept, (b n)
    const float *dstates, *dlast;  // (b l n) or NULL, (b n)
    float *dx, *dfirst;          // (b l n), (b n)
    const int64_t *order, *bounds;  // steps sorted by symbol; where each symbol begins
    int64_t from, to;            // which of them
    float *G, *H;                // (to - from, np) are copied: gradients and previous states in this order
    float *dT;                   // (s n np)
} dense_t;

// y[i] += sum_j h[j] M[j][i], with i < np
static void multiply(const float *M, int64_t n, int64_t np, const float *h, float *y) {
    int64_t i = 0;
    for (; i + 4 * VL <= np; i += 4 * VL) {
        vf even[4], odd[4];
        for (int v = 0; v < 4; v++) { even[v] = v_load(y + i + v * VL); odd[v] = (vf){0}; }
        int64_t j = 0;
        for (; j + 2 <= n; j += 2)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                even[v] += h[j] * v_load(M + j * np + i + v * VL);
                odd[v] += h[j + 1] * v_load(M + (j + 1) * np + i + v * VL);
            }
        if (j < n)
            for (int v = 0; v < 4; v++) even[v] += h[j] * v_load(M + j * np + i + v * VL);
        for (int v = 0; v < 4; v++) v_store(y + i + v * VL, even[v] + odd[v]);
    }
    for (; i < np; i += VL) {
        vf part[4] = {v_load(y + i)};
        int64_t j = 0;
        for (; j + 4 <= n; j += 4)
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) part[k] += h[j + k] * v_load(M + (j + k) * np + i);
        for (; j < n; j++) part[0] += h[j] * v_load(M + j * np + i);
        v_store(y + i, (part[0] + part[1]) + (part[2] + part[3]));
    }
}

static void forward_task(void *context, int64_t b) {
    const dense_t *d = context;
    const int64_t l = d->z[l_], n = d->z[n_], np = d->z[np_];
    float *memory = scratch(2 * np * sizeof(float)), *h = memory, *y = memory + np;
    memset(memory, 0, 2 * np * sizeof(float));
    memcpy(h, d->first + b * n, n * sizeof(float));
    for (int64_t t = 0; t < l; t++) {
        const int32_t code = d->codes[b * l + t];
        if (code >= RESET) memset(h, 0, n * sizeof(float));
        if (!(code & SKIP)) {
            memcpy(y, d->x + (b * l + t) * n, n * sizeof(float));
            if (code < RESET) multiply(d->T + code * n * np, n, np, h, y);
            float *swap = h;
            h = y;
            y = swap;
        }
        if (d->states) memcpy(d->states + (b * l + t) * n, h, n * sizeof(float));
    }
    memcpy(d->last + b * n, h, n * sizeof(float));
    free(memory);
}

static void backward_task(void *context, int64_t b) {
    const dense_t *d = context;
    const int64_t l = d->z[l_], n = d->z[n_], np = d->z[np_];
    float *memory = scratch(2 * np * sizeof(float)), *g = memory, *y = memory + np;
    memset(memory, 0, 2 * np * sizeof(float));
    memcpy(g, d->dlast + b * n, n * sizeof(float));
    for (int64_t t = l - 1; t >= 0; t--) {
        const int64_t at = (b * l + t) * n;
        const int32_t code = d->codes[b * l + t];
        if (d->dstates) for (int64_t i = 0; i < n; i++) g[i] += d->dstates[at + i];
        if (code & SKIP) memset(d->dx + at, 0, n * sizeof(float));
        else {
            memcpy(d->dx + at, g, n * sizeof(float));
            memset(y, 0, np * sizeof(float));
            if (code < RESET) multiply(d->T + code * n * np, n, np, g, y);
            float *swap = g;
            g = y;
            y = swap;
        }
        if (code >= RESET) memset(g, 0, n * sizeof(float));
    }
    memcpy(d->dfirst + b * n, g, n * sizeof(float));
    free(memory);
}

enum { SORTED = 8192, COPIES = 256, ROWS = 24 };  // steps sorted at a time, by one task; rows of dT that one task computes

static void sort_task(void *context, int64_t block) {
    const dense_t *d = context;
    const int64_t l = d->z[l_], n = d->z[n_], np = d->z[np_], steps = d->to - d->from;
    for (int64_t k = block * COPIES; k < (block + 1) * COPIES && k < steps; k++) {
        const int64_t at = d->order[d->from + k];
        const float *before = at % l ? d->states + (at - 1) * n : d->first + at / l * n;
        memcpy(d->G + k * np, d->dx + at * n, n * sizeof(float));
        memcpy(d->H + k * np, before, n * sizeof(float));
        memset(d->G + k * np + n, 0, (np - n) * sizeof(float));
        memset(d->H + k * np + n, 0, (np - n) * sizeof(float));
    }
}

static void product_task(void *context, int64_t i) {
    const dense_t *d = context;
    const int64_t n = d->z[n_], np = d->z[np_], blocks = (n + ROWS - 1) / ROWS, s = i / blocks, row = i % blocks * ROWS;
    const int64_t from = d->bounds[s] > d->from ? d->bounds[s] : d->from;
    const int64_t to = d->bounds[s + 1] < d->to ? d->bounds[s + 1] : d->to, at = (from - d->from) * np;
    if (to <= from) return;
    float *dT = d->dT + (s * n + row) * np;
    gemm_t product = {d->G + at + row, 1, np, d->H + at, np, dT, np, NULL, dT, 1.0f};
    gemm(&product, n - row < ROWS ? n - row : ROWS, np, to - from, GEMM_FULL);
}

// arguments: the sizes, then the pointers T codes x first | states last
void ssmzoo_dense_scan_forward(int64_t *sizes) {
    void *const *p = (void *const *)(sizes + SIZES);
    dense_t d = {.z = sizes, .T = p[0], .codes = p[1], .x = p[2], .first = p[3], .states = p[4], .last = p[5]};
    for (int64_t i = 0; i < sizes[b_] * sizes[l_]; i++)
        if (d.codes[i] < 0 || (d.codes[i] & (SKIP - 1)) >= sizes[s_]) sizes[bad_] = 1;
    if (!sizes[bad_]) parallel_for(sizes[b_], sizes[threads_], forward_task, &d);
}

// arguments: the sizes, then the pointers T codes states first dstates dlast | dx dfirst dT
void ssmzoo_dense_scan_backward(int64_t *sizes) {
    void *const *p = (void *const *)(sizes + SIZES);
    const int64_t steps = sizes[b_] * sizes[l_], s = sizes[s_], n = sizes[n_], np = sizes[np_];
    dense_t d = {.z = sizes, .T = p[0], .codes = p[1], .states = p[2], .first = p[3], .dstates = p[4], .dlast = p[5],
                 .dx = p[6], .dfirst = p[7], .dT = p[8]};
    parallel_for(sizes[b_], sizes[threads_], backward_task, &d);

    int64_t *bounds = scratch((s + 2) * sizeof(int64_t)), *order = scratch(steps * sizeof(int64_t));
    memset(bounds, 0, (s + 2) * sizeof(int64_t));
    for (int64_t i = 0; i < steps; i++)
        if (d.codes[i] < SKIP) bounds[d.codes[i] + 2]++;
    for (int64_t i = 0; i < s; i++) bounds[i + 2] += bounds[i + 1];
    for (int64_t i = 0; i < steps; i++)
        if (d.codes[i] < SKIP) order[bounds[d.codes[i] + 1]++] = i;  // afterwards symbol i begins at bounds[i]
    d.order = order;
    d.bounds = bounds;
    const int64_t most = bounds[s] < SORTED ? bounds[s] : SORTED;
    float *sorted = scratch(2 * most * np * sizeof(float));
    d.G = sorted;
    d.H = sorted + most * np;
    memset(d.dT, 0, s * n * np * sizeof(float));
    for (d.from = 0; d.from < bounds[s]; d.from = d.to) {
        d.to = d.from + most < bounds[s] ? d.from + most : bounds[s];
        parallel_for((d.to - d.from + COPIES - 1) / COPIES, sizes[threads_], sort_task, &d);
        parallel_for(s * ((n + ROWS - 1) / ROWS), sizes[threads_], product_task, &d);
    }
    free(sorted);
    free(order);
    free(bounds);
}
