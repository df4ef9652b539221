// One token through a Mamba-2 mixer, fp32 and contiguous: see ssmzoo/ops/mamba2_step/__init__.py for the equations.
// All work is one pass over the weights and one over the state; rows of the matrices and heads are shared by the threads.
#include "gemv.h"
#include "parallel.h"

typedef struct {
    const float *u, *conv_state, *ssm_state, *in_proj, *conv_weight, *conv_bias, *dt_bias, *A_log, *D, *norm_weight, *out_proj,
        *in_bias, *out_bias;
    float *out, *conv_new, *ssm_new;
    int64_t b, d, h, p, n, g, k, d_per_channel, threads;
    double eps, dt_min, dt_max;
} step2_args;

typedef struct {  // one sequence: its row, and what is computed on the way
    const step2_args *a;
    int64_t row, e, c, w;
    float *proj, *xBC, *dt, *y;
} step2_info;

static void project_in(void *context, int64_t index) {
    const step2_info *s = context;
    const step2_args *a = s->a;
    int64_t from = index * SHARE;
    gemv(s->proj + from, a->in_proj + from * a->d, a->u + s->row * a->d, a->in_bias ? a->in_bias + from : NULL,
         share_size(index, s->w), a->d);
}

static void project_out(void *context, int64_t index) {
    const step2_info *s = context;
    const step2_args *a = s->a;
    int64_t from = index * SHARE;
    gemv(a->out + s->row * a->d + from, a->out_proj + from * s->e, s->y, a->out_bias ? a->out_bias + from : NULL,
         share_size(index, a->d), s->e);
}

// S' = decay S + x B of one channel; returns the terms of <S', C>.
INLINE vf channel(float *new_S, const float *S, const float *B, const float *C, float decay, float dtx, int64_t n) {
    vf sum = v_set(0);
    for (int64_t i = 0; i < n; i += VL) {
        int64_t left = n - i;
        vf state = decay * v_load_some(S + i, left) + dtx * v_load_some(B + i, left);
        v_store_some(new_S + i, state, left);
        sum += state * v_load_some(C + i, left);
    }
    return sum;
}

// The state and the gated output of one head.
static void advance(void *context, int64_t head) {
    const step2_info *s = context;
    const step2_args *a = s->a;
    int64_t n = a->n, p = a->p, group = head / (a->h / a->g);
    const float *B = s->xBC + s->e + group * n, *C = B + a->g * n;
    float dt = s->dt[head], decay = expf(-dt * expf(a->A_log[head]));
    for (int64_t first = head * p; first < (head + 1) * p; first += VL) {
        int lanes = (head + 1) * p - first < VL ? (int)((head + 1) * p - first) : VL;
        vf terms[VL] = {{0}};
        float sums[VL];
        for (int q = 0; q < lanes; q++) {
            int64_t at = (s->row * s->e + first + q) * n;
            terms[q] = channel(a->ssm_new + at, a->ssm_state + at, B, C, decay, dt * s->xBC[first + q], n);
        }
        v_store(sums, v_sums(terms));
        for (int q = 0; q < lanes; q++) {
            int64_t i = first + q;
            s->y[i] = (sums[q] + a->D[a->d_per_channel ? i : head] * s->xBC[i]) * s->proj[i];
        }
    }
}

static void normalise(float *y, const float *weight, int64_t size, double eps) {
    double sum = 0;
    for (int64_t i = 0; i < size; i++) sum += (double)y[i] * y[i];
    float scale = (float)(1 / sqrt(sum / size + eps));
    for (int64_t i = 0; i < size; i++) y[i] *= scale * weight[i];
}

static void step(const step2_args *a, int64_t row, float *memory) {
    int64_t e = a->h * a->p, c = e + 2 * a->g * a->n, k = a->k;
    step2_info s = {a, row, e, c, e + c + a->h, memory, NULL, NULL, NULL};
    s.xBC = s.proj + s.w;
    s.dt = s.xBC + c;
    s.y = s.dt + a->h;
    parallel_for(shares(s.w), a->threads, project_in, &s);
    shift_and_convolve(s.xBC, a->conv_new + row * c * k, a->conv_state + row * c * k, s.proj + e, a->conv_weight, a->conv_bias, c,
                       k);
    silu(s.xBC, c);
    silu(s.proj, e);
    for (int64_t i = 0; i < a->h; i++) s.dt[i] = s.proj[e + c + i] + a->dt_bias[i];
    softplus(s.dt, a->h);
    for (int64_t i = 0; i < a->h; i++) {
        if (s.dt[i] < a->dt_min) s.dt[i] = (float)a->dt_min;
        if (s.dt[i] > a->dt_max) s.dt[i] = (float)a->dt_max;
    }
    parallel_for(a->h, a->threads, advance, &s);
    if (a->norm_weight) normalise(s.y, a->norm_weight, e, a->eps);
    parallel_for(shares(a->d), a->threads, project_out, &s);
}

void ssmzoo_mamba2_step(const step2_args *a) {
    int64_t e = a->h * a->p, c = e + 2 * a->g * a->n;
    float *memory = scratch((size_t)(2 * e + 2 * c + 2 * a->h) * sizeof(float));
    for (int64_t row = 0; row < a->b; row++) step(a, row, memory);
    free(memory);
}
