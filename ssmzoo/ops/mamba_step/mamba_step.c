// One token through a Mamba-1 mixer, fp32 and contiguous: see ssmzoo/ops/mamba_step.py for the equations.
// All work is one pass over the weights, whose rows the threads share.
#include "gemv.h"
#include "parallel.h"

typedef struct {
    const float *u, *conv_state, *ssm_state, *conv_weight, *conv_bias, *x_proj, *dt_proj, *dt_bias, *A_log, *D, *in_proj,
        *in_bias, *out_proj, *out_bias;
    float *out, *conv_new, *ssm_new;
    int64_t b, d, e, n, r, k, threads;
} step_args;

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
    shift_and_convolve(s.x, a->conv_new + row * e * k, a->conv_state + row * e * k, s.xz, a->conv_weight, a->conv_bias, e, k);
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
