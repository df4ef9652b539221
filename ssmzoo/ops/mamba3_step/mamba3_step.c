// One token through a Mamba-3 mixer, fp32 and contiguous: see ssmzoo/ops/mamba3_step/__init__.py for the equations.
// All work is one pass over the weights and one over the state; rows of the matrices and heads are shared by the threads.
#include "mamba3_step.h"
#include "gemv.h"

typedef struct {  // one sequence: its row, and what is computed on the way
    const step3_args *a;
    int64_t row, e, w;
    float *proj, *B, *C, *q, *k, *y;    // (w), (g n), (g n), (h n), (h n), (e)
    const float *dt, *rate, *trap, *angle;  // parts of proj behind z, x, B and C: (h), (h), (h), (m)
} step3_info;

static void project_in(void *context, int64_t index) {
    const step3_info *s = context;
    int64_t from = index * SHARE, d = s->a->d;
    gemv(s->proj + from, s->a->in_proj + from * d, s->a->u + s->row * d, NULL, share_size(index, s->w), d);
}

static void project_out(void *context, int64_t index) {
    const step3_info *s = context;
    int64_t from = index * SHARE, e = s->e;
    gemv(s->a->out + s->row * s->a->d + from, s->a->out_proj + from * e, s->y, NULL, share_size(index, s->a->d), e);
}

static void normalise(float *to, const float *x, const float *weight, int64_t size, double eps) {
    double sum = 0;
    for (int64_t i = 0; i < size; i++) sum += (double)x[i] * x[i];
    float scale = (float)(1 / sqrt(sum / size + eps));
    for (int64_t i = 0; i < size; i++) to[i] = x[i] * scale * weight[i];
}

// One head's key or query: biased, then neighbouring channels turned by its phases.
static void rotate(float *to, const float *from, const float *bias, const float *cosine, const float *sine, int64_t n,
                   int64_t m) {
    for (int64_t i = 0; i < n; i++) to[i] = from[i] + bias[i];
    for (int64_t i = 0; i < m; i++) {
        float even = to[2 * i], odd = to[2 * i + 1];
        to[2 * i] = even * cosine[i] - odd * sine[i];
        to[2 * i + 1] = even * sine[i] + odd * cosine[i];
    }
}

// S' = decay S + before k' + now k of one channel; returns the terms of <S', q>.
INLINE vf channel(float *new_S, const float *S, const float *old_k, const float *k, const float *q, float decay, float before,
                  float now, int64_t n) {
    vf sum = v_set(0);
    for (int64_t i = 0; i < n; i += VL) {
        int64_t left = n - i;
        vf state = decay * v_load_some(S + i, left) + before * v_load_some(old_k + i, left) + now * v_load_some(k + i, left);
        v_store_some(new_S + i, state, left);
        sum += state * v_load_some(q + i, left);
    }
    return sum;
}

// Phases, key and query of one head, then its state and gated output.
static void advance(void *context, int64_t head) {
    const step3_info *s = context;
    const step3_args *a = s->a;
    int64_t n = a->n, p = a->p, m = a->m, group = head / (a->h / a->g), at = s->row * a->h + head;
    float dt = s->dt[head], lam = 1 / (1 + expf(-s->trap[head])), r = s->rate[head];
    float rate = r >= 0 ? -(1 + r) : -1 / (1 - r);
    if (rate > -(float)a->A_floor) rate = -(float)a->A_floor;
    float decay = expf(dt * rate), before = decay * (1 - lam) * dt, now = lam * dt;
    float *k = s->k + head * n, *q = s->q + head * n, *phase = a->phase_new + at * m;
    for (int64_t i = 0; i < m; i++) {
        double sum = (double)a->phase[at * m + i] + (double)dt * M_PI * s->angle[i];
        phase[i] = (float)(sum - 2 * M_PI * floor(sum / (2 * M_PI)));
    }
    float cosine[m + VL], sine[m + VL];
    for (int64_t i = 0; i < m; i += VL) {
        vf c, v;
        v_sincos(v_load_some(phase + i, m - i), &v, &c);
        v_store(cosine + i, c), v_store(sine + i, v);
    }
    rotate(k, s->B + group * n, a->B_bias + head * n, cosine, sine, n, m);
    rotate(q, s->C + group * n, a->C_bias + head * n, cosine, sine, n, m);
    const float *z = s->proj + head * p, *x = s->proj + s->e + head * p, *old_x = a->last_x + at * p;
    float *y = s->y + head * p;
    for (int64_t first = 0; first < p; first += VL) {
        int lanes = p - first < VL ? (int)(p - first) : VL;
        vf terms[VL] = {{0}};
        float sums[VL];
        for (int c = 0; c < lanes; c++) {
            int64_t i = first + c, of = (at * p + i) * n;
            terms[c] = channel(a->ssm_new + of, a->ssm_state + of, a->last_k + at * n, k, q, decay, before * old_x[i],
                               now * x[i], n);
        }
        v_store(sums, v_sums(terms));
        for (int c = 0; c < lanes; c++) y[first + c] = sums[c] + a->D[head] * x[first + c];
    }
    memcpy(a->x_new + at * p, x, sizeof(float) * (size_t)p);  // states may be in place: their last readers are done
    memcpy(a->k_new + at * n, k, sizeof(float) * (size_t)n);
    if (a->norm_weight) normalise(y, y, a->norm_weight + head * p, p, a->eps);
    for (int64_t i = 0; i < p; i++) y[i] *= z[i];
}

size_t mamba3_memory(const step3_args *a) { return (size_t)(2 * a->g * a->n + 2 * a->h * a->n); }

void mamba3_core(const step3_args *a, int64_t row, float *proj, float *y, float *memory, crew *t) {
    int64_t e = a->h * a->p, n = a->n, gn = a->g * n;
    step3_info s = {.a = a, .row = row, .e = e, .w = 2 * e + 2 * gn + 3 * a->h + a->m, .proj = proj, .y = y};
    s.B = memory, s.C = s.B + gn, s.q = s.C + gn, s.k = s.q + a->h * n;
    float *dt = s.proj + 2 * e + 2 * gn, *angle = dt + 3 * a->h;
    s.dt = dt, s.rate = dt + a->h, s.trap = dt + 2 * a->h, s.angle = angle;
    silu(s.proj, e);
    for (int64_t i = 0; i < a->h; i++) dt[i] += a->dt_bias[i];
    softplus(dt, a->h);
    for (int64_t i = 0; i < a->m; i++) angle[i] = tanhf(angle[i]);
    for (int64_t i = 0; i < a->g; i++) {
        normalise(s.B + i * n, s.proj + 2 * e + i * n, a->B_norm, n, a->B_eps);
        normalise(s.C + i * n, s.proj + 2 * e + gn + i * n, a->C_norm, n, a->C_eps);
    }
    if (t) crew_for(t, a->h, advance, &s);
    else parallel_for(a->h, a->threads, advance, &s);
}

static void step(const step3_args *a, int64_t row, float *memory) {
    int64_t e = a->h * a->p, w = 2 * e + 2 * a->g * a->n + 3 * a->h + a->m;
    step3_info s = {.a = a, .row = row, .e = e, .w = w, .proj = memory, .y = memory + w};
    parallel_for(shares(w), a->threads, project_in, &s);
    mamba3_core(a, row, s.proj, s.y, s.y + e, NULL);
    parallel_for(shares(a->d), a->threads, project_out, &s);
}

void ssmzoo_mamba3_step(const step3_args *a) {
    int64_t e = a->h * a->p, w = 2 * e + 2 * a->g * a->n + 3 * a->h + a->m;
    float *memory = scratch((size_t)(w + e) * sizeof(float) + mamba3_memory(a) * sizeof(float));
    for (int64_t row = 0; row < a->b; row++) step(a, row, memory);
    free(memory);
}
