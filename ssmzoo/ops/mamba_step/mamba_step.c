// One token through a Mamba-1 mixer, fp32 and contiguous: see ssmzoo/ops/mamba_step.py for the equations.
// All work is one pass over the weights, whose rows the threads share.
#include "parallel.h"
#include "vec.h"

typedef struct {
    const float *u, *conv_state, *ssm_state, *conv_weight, *conv_bias, *x_proj, *dt_proj, *dt_bias, *A_log, *D, *in_proj,
        *in_bias, *out_proj, *out_bias;
    float *out, *conv_new, *ssm_new;
    int64_t b, d, e, n, r, k, threads;
} step_args;

// The sums of VL vectors as one vector.
INLINE vf v_sums(vf *x) {
    v_transpose(x);
    vf sum = x[0];
#pragma GCC unroll 16
    for (int i = 1; i < VL; i++) sum += x[i];
    return sum;
}

// VL rows of y = W x + bias at a time, so that additions do not wait for each other and sums over lanes are taken together.
INLINE void gemv_rows(float *y, const float *w, const float *x, const float *bias, int count, int64_t columns) {
    vf sum[VL];
    float rest[VL] = {0}, sums[VL];
#pragma GCC unroll 16
    for (int q = 0; q < VL; q++) sum[q] = (vf){0};
    int64_t i = 0;
    for (; i + VL <= columns; i += VL) {
        vf v = v_load(x + i);
#pragma GCC unroll 16
        for (int q = 0; q < VL; q++)
            if (q < count) sum[q] += v_load(w + q * columns + i) * v;
    }
    for (int q = 0; q < count; q++) {
        for (int64_t j = i; j < columns; j++) rest[q] += w[q * columns + j] * x[j];
        if (bias) rest[q] += bias[q];
    }
    v_store(sums, v_sums(sum) + v_load(rest));
    memcpy(y, sums, sizeof(float) * (size_t)count);
}

static void gemv(float *y, const float *W, const float *x, const float *bias, int64_t rows, int64_t columns) {
    for (int64_t j = 0; j < rows; j += VL) {
        const float *w = W + j * columns, *b = bias ? bias + j : NULL;
        if (rows - j >= VL) gemv_rows(y + j, w, x, b, VL, columns);
        else gemv_rows(y + j, w, x, b, (int)(rows - j), columns);
    }
}

static void silu(float *x, int64_t size) {
    int64_t i = 0;
    for (; i + VL <= size; i += VL) {
        vf v = v_load(x + i);
        v_store(x + i, v * v_sigmoid(v));
    }
    for (; i < size; i++) x[i] = x[i] / (1 + expf(-x[i]));
}

static void softplus(float *x, int64_t size) {
    float tail[VL] = {0};
    for (int64_t i = 0; i < size; i += VL) {
        if (i + VL <= size) {
            v_store(x + i, v_softplus(v_load(x + i)));
        } else {
            memcpy(tail, x + i, (size - i) * sizeof(float));
            v_store(tail, v_softplus(v_load(tail)));
            memcpy(x + i, tail, (size - i) * sizeof(float));
        }
    }
}

// h' = exp(dt A) h + dt x B of one channel; returns the terms of <h', C>. Tails are padded with zeros: exp(0) * 0 + 0 adds
// nothing.
INLINE vf channel(float *new_h, const float *h, const float *A_log, const float *B, const float *C, float dt, float dtx,
                  int64_t n) {
    vf sum = v_set(0);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vf state = v_exp(-dt * v_exp(v_load(A_log + i))) * v_load(h + i) + dtx * v_load(B + i);
        v_store(new_h + i, state);
        sum += state * v_load(C + i);
    }
    if (i < n) {
        float a[VL] = {0}, s[VL] = {0}, b[VL] = {0}, c[VL] = {0};
        size_t bytes = (size_t)(n - i) * sizeof(float);
        memcpy(a, A_log + i, bytes), memcpy(s, h + i, bytes), memcpy(b, B + i, bytes), memcpy(c, C + i, bytes);
        vf state = v_exp(-dt * v_exp(v_load(a))) * v_load(s) + dtx * v_load(b);
        sum += state * v_load(c);
        v_store(s, state);
        memcpy(new_h + i, s, bytes);
    }
    return sum;
}

typedef struct {  // one sequence: its row, and what is computed on the way
    const step_args *a;
    int64_t row;
    float *xz, *x, *dbc, *dt, *y;
} step_info;
enum { SHARE = 128 };  // rows of a matrix, or channels, per task

static int64_t shares(int64_t size) { return (size + SHARE - 1) / SHARE; }
static int64_t share_size(int64_t index, int64_t size) { return size - index * SHARE < SHARE ? size - index * SHARE : SHARE; }

static void project_in(void *context, int64_t index) {
    const step_info *s = context;
    const step_args *a = s->a;
    int64_t from = index * SHARE;
    gemv(s->xz + from, a->in_proj + from * a->d, a->u + s->row * a->d, a->in_bias ? a->in_bias + from : NULL,
         share_size(index, 2 * a->e), a->d);
}

static void project_out(void *context, int64_t index) {
    const step_info *s = context;
    const step_args *a = s->a;
    int64_t from = index * SHARE;
    gemv(a->out + s->row * a->d + from, a->out_proj + from * a->e, s->y, a->out_bias ? a->out_bias + from : NULL,
         share_size(index, a->d), a->e);
}

// The time step, the state and the gated output of some channels.
static void advance(void *context, int64_t index) {
    const step_info *s = context;
    const step_args *a = s->a;
    int64_t n = a->n, r = a->r, from = index * SHARE, to = from + share_size(index, a->e);
    const float *B = s->dbc + r, *C = B + n, *z = s->xz + a->e;
    gemv(s->dt + from, a->dt_proj + from * r, s->dbc, a->dt_bias + from, to - from, r);
    softplus(s->dt + from, to - from);
    for (int64_t first = from; first < to; first += VL) {
        int lanes = to - first < VL ? (int)(to - first) : VL;
        vf terms[VL] = {{0}};
        float sums[VL];
        for (int q = 0; q < lanes; q++) {
            int64_t c = first + q, at = (s->row * a->e + c) * n;
            terms[q] = channel(a->ssm_new + at, a->ssm_state + at, a->A_log + c * n, B, C, s->dt[c], s->dt[c] * s->x[c], n);
        }
        v_store(sums, v_sums(terms));
        for (int q = 0; q < lanes; q++) s->y[first + q] = (sums[q] + a->D[first + q] * s->x[first + q]) * z[first + q];
    }
}

static void step(const step_args *a, int64_t row, float *memory) {
    int64_t e = a->e, k = a->k;
    step_info s = {a, row, memory, memory + 2 * e, memory + 3 * e, NULL, NULL};
    s.dt = s.dbc + a->r + 2 * a->n + VL;
    s.y = a->out_proj ? s.dt + e : a->out + row * e;
    if (a->in_proj) parallel_for(shares(2 * e), a->threads, project_in, &s);
    else memcpy(s.xz, a->u + row * 2 * e, 2 * (size_t)e * sizeof(float));
    for (int64_t c = 0; c < e; c++) {
        const float *old = a->conv_state + (row * e + c) * k, *w = a->conv_weight + c * k;
        float *window = a->conv_new + (row * e + c) * k, sum = a->conv_bias ? a->conv_bias[c] : 0;
        for (int64_t j = 0; j + 1 < k; j++) sum += (window[j] = old[j + 1]) * w[j];
        window[k - 1] = s.xz[c];
        s.x[c] = sum + s.xz[c] * w[k - 1];
    }
    silu(s.x, e);
    silu(s.xz + e, e);
    gemv(s.dbc, a->x_proj, s.x, NULL, a->r + 2 * a->n, e);
    parallel_for(shares(e), a->threads, advance, &s);
    if (a->out_proj) parallel_for(shares(a->d), a->threads, project_out, &s);
}

void ssmzoo_mamba_step(const step_args *a) {
    float *memory = scratch((size_t)(5 * a->e + a->r + 2 * a->n + VL) * sizeof(float));
    for (int64_t row = 0; row < a->b; row++) step(a, row, memory);
    free(memory);
}
