// One token of b sequences through a Mamba-1 mixer, fp32 and contiguous: see ssmzoo/ops/mamba_step/__init__.py for the
// equations. All work is one pass over the weights, whose rows the threads share, whatever the number of sequences.
#include "mamba_step.h"
#include "hadamard.h"

// h' = exp(-dt a) h + dt x B of one channel, a = exp(A_log); returns the terms of <h', C>. Tails are padded with zeros: exp(0) * 0 + 0 adds
// nothing.
INLINE vf channel(float *new_h, const float *h, const float *rate, const float *B, const float *C, float dt, float dtx,
                  int64_t n) {
    vf sum = v_set(0);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vf state = v_exp(-dt * v_load(rate + i)) * v_load(h + i) + dtx * v_load(B + i);
        v_store(new_h + i, state);
        sum += state * v_load(C + i);
    }
    if (i < n) {
        float a[VL] = {0}, s[VL] = {0}, b[VL] = {0}, c[VL] = {0};
        size_t bytes = (size_t)(n - i) * sizeof(float);
        memcpy(a, rate + i, bytes), memcpy(s, h + i, bytes), memcpy(b, B + i, bytes), memcpy(c, C + i, bytes);
        vf state = v_exp(-dt * v_load(a)) * v_load(s) + dtx * v_load(b);
        sum += state * v_load(c);
        v_store(s, state);
        memcpy(new_h + i, s, bytes);
    }
    return sum;
}

typedef struct {  // what is computed on the way: [x, z] (b 2e), x (b e), [dt, B, C] (b r+2n), dt (b e), y (b e)
    const mamba_weights *w;
    step_state state;
    vectors u, into_x, into_dt, into_out;
    float *xz, *x, *dbc, *dt, *y, *out, *sum;
    int64_t b, rows, add;  // rows of a matrix, or channels, per task
} layer_work;

// Channels from `from` to `to` of [x, z]: the convolution of those of x, SiLU of all.
static void convolve(const layer_work *s, int64_t from, int64_t to) {
    const mamba_weights *w = s->w;
    const int64_t e = w->e, k = w->k, end = to < e ? to : e;
    for (int64_t row = 0; row < s->b; row++) {
        float *xz = s->xz + row * 2 * e;
        if (from < end) {
            float *x = s->x + row * e + from;
            const int64_t at = (row * e + from) * k;
            convolve_and_activate(&w->conv, x, s->state.conv_new + at, s->state.conv + at, xz + from, from, end - from, k);
        }
        if (to > e) silu(xz + (from > e ? from : e), to - (from > e ? from : e));
    }
}

static void project_in(void *context, int64_t index) {
    const layer_work *s = context;
    const int64_t from = index * s->rows, size = 2 * s->w->e, to = from + s->rows < size ? from + s->rows : size;
    if (s->w->in_proj.data) multiply_rows(&s->w->in_proj, &s->u, s->xz, size, from, to);
    convolve(s, from, to);
}

static void project_x(void *context, int64_t index) {
    const layer_work *s = context;
    const int64_t from = index * s->rows, size = s->w->x_proj.rows, to = from + s->rows < size ? from + s->rows : size;
    multiply_rows(&s->w->x_proj, &s->into_x, s->dbc, size, from, to);
}

static void project_out(void *context, int64_t index) {
    const layer_work *s = context;
    const int64_t from = index * s->rows, size = s->w->d, to = from + s->rows < size ? from + s->rows : size;
    multiply_rows(&s->w->out_proj, &s->into_out, s->add ? s->sum : s->out, size, from, to);
    for (int64_t row = 0; s->add && row < s->b; row++)
        for (int64_t j = row * size + from; j < row * size + to; j++) s->out[j] += s->sum[j];
}

// The time step, the state and the gated output of some channels.
static void advance(void *context, int64_t index) {
    const layer_work *s = context;
    const mamba_weights *w = s->w;
    const int64_t n = w->n, e = w->e, r = w->dt_proj.columns, from = index * s->rows, to = from + s->rows < e ? from + s->rows : e;
    multiply_rows(&w->dt_proj, &s->into_dt, s->dt, e, from, to);
    for (int64_t row = 0; row < s->b; row++) softplus(s->dt + row * e + from, to - from);
    for (int64_t first = from; first < to; first += VL) {
        const int lanes = to - first < VL ? (int)(to - first) : VL;
        float rate[VL * n];
        for (int64_t i = 0; i < lanes * n; i += VL)
            v_store_some(rate + i, v_exp(v_load_some(w->A_log + first * n + i, lanes * n - i)), lanes * n - i);
        for (int64_t row = 0; row < s->b; row++) {
            const float *B = s->dbc + row * (r + 2 * n) + r, *C = B + n, *z = s->xz + row * 2 * e + e, *x = s->x + row * e;
            float *dt = s->dt + row * e, *y = s->y + row * e;
            vf terms[VL] = {{0}};
            float sums[VL];
            for (int q = 0; q < lanes; q++) {
                const int64_t c = first + q, at = (row * e + c) * n;
                terms[q] =
                    channel(s->state.ssm_new + at, s->state.ssm + at, rate + q * n, B, C, dt[c], dt[c] * x[c], n);
            }
            v_store(sums, v_sums(terms));
            for (int q = 0; q < lanes; q++) y[first + q] = (sums[q] + w->D[first + q] * x[first + q]) * z[first + q];
        }
    }
}

static size_t most_prepared(const mamba_weights *w, int64_t b) {
    const matrix *all[] = {&w->in_proj, &w->x_proj, &w->dt_proj, &w->out_proj};
    size_t most = 0;
    for (int i = 0; i < 4; i++) {
        size_t size = all[i]->data ? prepared_bytes(all[i], b) : 0;
        most = size > most ? size : most;
    }
    return most;
}

size_t mamba_memory(const mamba_weights *w, int64_t b) {
    const int64_t floats = 5 * w->e + w->x_proj.rows + w->d + VL;
    return (size_t)(floats * b + 16) * sizeof(float) + most_prepared(w, b) + 64;
}

static void in_shares(crew *t, layer_work *s, int64_t rows, void (*body)(void *, int64_t)) {
    s->rows = rows_per_task(rows, crew_size(t));
    crew_for(t, (rows + s->rows - 1) / s->rows, body, s);
}

void mamba_layer(const mamba_weights *w, const float *u, step_state state, float *out, int add, int64_t b, void *memory, crew *t) {
    const int64_t e = w->e, r = w->dt_proj.columns, mix = w->x_proj.rows;
    char *integers = memory;
    layer_work s = {.w = w, .state = state, .b = b, .out = out, .add = add};
    s.xz = (float *)(integers + (most_prepared(w, b) + 63) / 64 * 64);
    s.x = s.xz + b * 2 * e;
    s.dt = s.x + b * e;
    s.y = w->out_proj.data ? s.dt + b * e : out;
    s.dbc = s.dt + 2 * b * e;
    s.sum = s.dbc + b * mix;
    if (w->in_proj.data) ready(&s.u, &w->in_proj, u, b, w->in_proj.columns, integers);
    else memcpy(s.xz, u, (size_t)(b * 2 * e) * sizeof(float));
    in_shares(t, &s, 2 * e, project_in);
    ready(&s.into_x, &w->x_proj, s.x, b, e, integers);
    in_shares(t, &s, mix, project_x);
    ready(&s.into_dt, &w->dt_proj, s.dbc, b, r + 2 * w->n, integers);
    in_shares(t, &s, e, advance);
    if (!w->out_proj.data) return;
    for (int64_t row = 0; w->special && row < b; row++) hadamard(s.y + row * e, e, w->special, w->s, 0);
    ready(&s.into_out, &w->out_proj, s.y, b, e, integers);
    in_shares(t, &s, w->d, project_out);
}

typedef struct {
    const float *u, *conv_state, *ssm_state, *conv_weight, *conv_bias, *x_proj, *dt_proj, *dt_bias, *A_log, *D, *in_proj,
        *in_bias, *out_proj, *out_bias;
    float *out, *conv_new, *ssm_new;
    int64_t b, d, e, n, r, k, threads;
} step_args;

static void step(void *context, crew *t) {
    const step_args *a = context;
    const int64_t e = a->e;
    const mamba_weights w = {
        .in_proj = {.data = a->in_proj, .bias = a->in_bias, .rows = 2 * e, .columns = a->d, .bits = 32},
        .x_proj = {.data = a->x_proj, .rows = a->r + 2 * a->n, .columns = e, .bits = 32},
        .dt_proj = {.data = a->dt_proj, .bias = a->dt_bias, .rows = e, .columns = a->r, .bits = 32},
        .out_proj = {.data = a->out_proj, .bias = a->out_bias, .rows = a->d, .columns = e, .bits = 32},
        .conv = {a->conv_weight, a->conv_bias}, .A_log = a->A_log, .D = a->D,
        .d = a->d, .e = e, .n = a->n, .k = a->k,
    };
    void *memory = scratch(mamba_memory(&w, a->b));
    mamba_layer(&w, a->u, (step_state){a->conv_state, a->ssm_state, a->conv_new, a->ssm_new}, a->out, 0, a->b, memory, t);
    free(memory);
}

void ssmzoo_mamba_step(const step_args *a) { parallel_crew(a->threads, step, (void *)a); }
