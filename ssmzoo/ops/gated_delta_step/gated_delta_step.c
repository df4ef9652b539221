// One token through a gated delta mixer, fp32 and contiguous: see ssmzoo/ops/gated_delta_step/__init__.py for the equations.
// All work is one pass over the weights and one over the state; rows of the matrices and heads are shared by the threads.
#include "gemv.h"
#include "parallel.h"

typedef struct {
    const float *u, *conv_state, *state, *in_proj, *conv_weight, *A_log, *dt_bias, *norm_weight, *out_proj, *f_proj, *g_proj,
        *g_bias;
    float *out, *conv_new, *state_new;
    int64_t b, d, heads, h, n, p, k, threads;  // heads of q and k, of v
    double beta_scale, eps;
} delta_args;

typedef struct {  // one sequence: its row, and what is computed on the way
    const delta_args *a;
    int64_t row, c, w;
    float *proj, *qkv, *gate, *decay, *y;  // y (h p) and, behind it, one vector of p per head
    const float *beta;
} delta_info;

static void project_in(void *context, int64_t index) {
    const delta_info *s = context;
    const delta_args *a = s->a;
    int64_t from = index * SHARE;
    gemv(s->proj + from, a->in_proj + from * a->d, a->u + s->row * a->d, NULL, share_size(index, s->w), a->d);
}

static void project_out(void *context, int64_t index) {
    const delta_info *s = context;
    const delta_args *a = s->a;
    int64_t from = index * SHARE, e = a->h * a->p;
    gemv(a->out + s->row * a->d + from, a->out_proj + from * e, s->y, NULL, share_size(index, a->d), e);
}

static void normalise(float *x, int64_t size, double eps, double factor) {
    double sum = 0;
    for (int64_t i = 0; i < size; i++) sum += (double)x[i] * x[i];
    float scale = (float)(factor / sqrt(sum + eps));
    for (int64_t i = 0; i < size; i++) x[i] *= scale;
}

// The state and the gated output of one head.
static void advance(void *context, int64_t head) {
    const delta_info *s = context;
    const delta_args *a = s->a;
    int64_t n = a->n, p = a->p, key = head / (a->h / a->heads), from = (s->row * a->h + head) * n * p;
    const float *q = s->qkv + key * n, *k = s->qkv + (a->heads + key) * n, *v = s->qkv + 2 * a->heads * n + head * p;
    const float *old = a->state + from, *gate = s->gate + head * p;
    float *S = a->state_new + from, *y = s->y + head * p, *delta = y + a->h * p;
    float beta = (float)a->beta_scale / (1 + expf(-s->beta[head]));
    memset(delta, 0, sizeof(float) * (size_t)p);
    for (int64_t i = 0; i < n; i++) {  // S <- exp(g) S, and S^T k
        float e = s->decay[a->f_proj ? head * n + i : head], ki = k[i];
        for (int64_t j = 0; j < p; j += VL) {
            int64_t left = p - j;
            vf x = e * v_load_some(old + i * p + j, left);
            v_store_some(S + i * p + j, x, left);
            v_store_some(delta + j, v_load_some(delta + j, left) + ki * x, left);
        }
    }
    for (int64_t j = 0; j < p; j++) delta[j] = beta * (v[j] - delta[j]);
    memset(y, 0, sizeof(float) * (size_t)p);
    for (int64_t i = 0; i < n; i++) {  // S <- S + k delta^T, and S^T q
        for (int64_t j = 0; j < p; j += VL) {
            int64_t left = p - j;
            vf x = v_load_some(S + i * p + j, left) + k[i] * v_load_some(delta + j, left);
            v_store_some(S + i * p + j, x, left);
            v_store_some(y + j, v_load_some(y + j, left) + q[i] * x, left);
        }
    }
    normalise(y, p, a->eps * p, sqrt((double)p));
    for (int64_t j = 0; j < p; j += VL) {
        int64_t left = p - j;
        vf z = v_load_some(gate + j, left), open = v_sigmoid(z);
        if (!a->f_proj) open *= z;
        v_store_some(y + j, v_load_some(y + j, left) * v_load_some(a->norm_weight + j, left) * open, left);
    }
}

static void step(const delta_args *a, int64_t row, float *memory) {
    int64_t hn = a->heads * a->n, e = a->h * a->p, c = 2 * hn + e, k = a->k, decays = a->f_proj ? a->h * a->n : a->h;
    int64_t bottleneck = a->f_proj ? a->p : e, w = c + bottleneck + a->h + (a->f_proj ? a->p : a->h);
    delta_info s = {a, row, c, w, memory, memory + w, NULL, NULL, NULL, NULL};
    float *gate = s.proj + c, *decay = gate + bottleneck + a->h;
    s.decay = s.qkv + c;
    s.y = s.decay + decays;
    s.gate = a->f_proj ? s.y + 2 * e : gate;
    s.beta = gate + bottleneck;
    parallel_for(shares(w), a->threads, project_in, &s);
    shift_and_convolve(s.qkv, a->conv_new + row * c * k, a->conv_state + row * c * k, s.proj, a->conv_weight, NULL, c, k);
    silu(s.qkv, c);
    for (int64_t i = 0; i < 2 * a->heads; i++)
        normalise(s.qkv + i * a->n, a->n, 1e-6, i < a->heads ? 1 / sqrt((double)a->n) : 1);
    if (a->f_proj) {
        gemv(s.decay, a->f_proj, decay, a->dt_bias, decays, a->p);
        gemv(s.gate, a->g_proj, gate, a->g_bias, e, a->p);
    } else {
        for (int64_t i = 0; i < decays; i++) s.decay[i] = decay[i] + a->dt_bias[i];
    }
    softplus(s.decay, decays);
    for (int64_t i = 0; i < decays; i++) s.decay[i] = expf(-s.decay[i] * expf(a->A_log[i / (decays / a->h)]));
    parallel_for(a->h, a->threads, advance, &s);
    parallel_for(shares(a->d), a->threads, project_out, &s);
}

void ssmzoo_gated_delta_step(const delta_args *a) {
    int64_t hn = a->heads * a->n, e = a->h * a->p, c = 2 * hn + e;
    float *memory = scratch((size_t)(2 * c + 4 * e + 2 * a->p + 2 * a->h + a->h * a->n + VL) * sizeof(float));
    for (int64_t row = 0; row < a->b; row++) step(a, row, memory);
    free(memory);
}
