// One token of b sequences through a Mamba-2 mixer, fp32 and contiguous: see ssmzoo/ops/mamba2_step/__init__.py for the
// equations. All work is one pass over the weights, whatever the number of sequences, and one over the states; rows of the
// matrices and heads are shared by the threads.
#include "mamba2_step.h"
#include "hadamard.h"

typedef struct {  // what is computed on the way: [z, xBC, dt] (b w), xBC behind the convolution (b c), y (b e)
    const mamba2_weights *w;
    step_state state;
    vectors u, into_out;
    float *proj, *xBC, *y, *squares, *out, *sum;  // squares (b h): sum of y^2
    int64_t b, e, c, width, rows, add;
} layer2_work;

// Columns from `from` to `to` of [z, xBC, dt]: SiLU of z, convolution and SiLU of xBC.
static void convolve(const layer2_work *s, int64_t from, int64_t to) {
    const mamba2_weights *w = s->w;
    const int64_t e = s->e, k = w->k, start = from > e ? from - e : 0, end = to - e < s->c ? to - e : s->c;
    for (int64_t row = 0; row < s->b; row++) {
        float *proj = s->proj + row * s->width, *x = s->xBC + row * s->c + start;
        if (from < e) silu(proj + from, (to < e ? to : e) - from);
        if (end <= start) continue;
        const int64_t at = (row * s->c + start) * k;
        convolve_and_activate(&w->conv, x, s->state.conv_new + at, s->state.conv + at, proj + e + start, start, end - start, k);
    }
}

static void project_in(void *context, int64_t index) {
    const layer2_work *s = context;
    const int64_t from = index * s->rows, to = from + s->rows < s->width ? from + s->rows : s->width;
    multiply_rows(&s->w->in_proj, &s->u, s->proj, s->width, from, to);
    convolve(s, from, to);
}

static void project_out(void *context, int64_t index) {
    const layer2_work *s = context;
    const int64_t from = index * s->rows, size = s->w->d, to = from + s->rows < size ? from + s->rows : size;
    multiply_rows(&s->w->out_proj, &s->into_out, s->add ? s->sum : s->out, size, from, to);
    for (int64_t row = 0; s->add && row < s->b; row++)
        for (int64_t j = row * size + from; j < row * size + to; j++) s->out[j] += s->sum[j];
}

// S' = decay S + x B of one channel; returns the terms of <S', C>.
INLINE vf channel(float *new_S, const float *S, const float *B, const float *C, float decay, float dtx, int64_t n) {
    vf sum = v_set(0);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vf state = decay * v_load(S + i) + dtx * v_load(B + i);
        v_store(new_S + i, state);
        sum += state * v_load(C + i);
    }
    if (i < n) {
        vf state = decay * v_load_some(S + i, n - i) + dtx * v_load_some(B + i, n - i);
        v_store_some(new_S + i, state, n - i);
        sum += state * v_load_some(C + i, n - i);
    }
    return sum;
}

static float time_step(const mamba2_weights *w, float x, int64_t head) {
    float dt[VL] = {x + w->dt_bias[head]};
    softplus(dt, VL);
    if (dt[0] < w->dt_min) dt[0] = (float)w->dt_min;
    if (dt[0] > w->dt_max) dt[0] = (float)w->dt_max;
    return dt[0];
}

// The state and the gated output of one head of a sequence.
static void advance(void *context, int64_t index) {
    const layer2_work *s = context;
    const mamba2_weights *w = s->w;
    const int64_t n = w->n, p = w->p, row = index / w->h, head = index % w->h, group = head / (w->h / w->g);
    const float *proj = s->proj + row * s->width, *xBC = s->xBC + row * s->c;
    const float *B = xBC + s->e + group * n, *C = B + w->g * n;
    const float dt = time_step(w, proj[s->e + s->c + head], head), decay = expf(-dt * expf(w->A_log[head]));
    float *y = s->y + row * s->e, squares = 0;
    for (int64_t first = head * p; first < (head + 1) * p; first += VL) {
        int lanes = (head + 1) * p - first < VL ? (int)((head + 1) * p - first) : VL;
        vf terms[VL] = {{0}};
        float sums[VL];
        for (int q = 0; q < lanes; q++) {
            const int64_t at = (row * s->e + first + q) * n;
            terms[q] = channel(s->state.ssm_new + at, s->state.ssm + at, B, C, decay, dt * xBC[first + q], n);
        }
        v_store(sums, v_sums(terms));
        for (int q = 0; q < lanes; q++) {
            const int64_t i = first + q;
            y[i] = (sums[q] + w->D[w->d_per_channel ? i : head] * xBC[i]) * proj[i];
            squares += y[i] * y[i];
        }
    }
    s->squares[index] = squares;
}

static void normalise(const layer2_work *s) {
    const int64_t h = s->w->h, e = s->e;
    for (int64_t row = 0; row < s->b; row++) {
        double sum = 0;
        for (int64_t i = 0; i < h; i++) sum += s->squares[row * h + i];
        const float scale = (float)(1 / sqrt(sum / (double)e + s->w->eps));
        for (int64_t i = 0; i < e; i++) s->y[row * e + i] *= scale * s->w->norm_weight[i];
    }
}

INLINE int64_t inner(const mamba2_weights *w) { return w->h * w->p; }
INLINE int64_t convolved(const mamba2_weights *w) { return inner(w) + 2 * w->g * w->n; }

static size_t most_prepared(const mamba2_weights *w, int64_t b) {
    const size_t in = prepared_bytes(&w->in_proj, b), out = prepared_bytes(&w->out_proj, b);
    return (in > out ? in : out) + 64;
}

size_t mamba2_memory(const mamba2_weights *w, int64_t b) {
    const int64_t floats = 2 * inner(w) + 2 * convolved(w) + 2 * w->h + w->d + VL;
    return (size_t)(floats * b + 16) * sizeof(float) + most_prepared(w, b) + 64;
}

static void in_shares(crew *t, layer2_work *s, int64_t rows, void (*body)(void *, int64_t)) {
    s->rows = rows_per_task(rows, crew_size(t));
    crew_for(t, (rows + s->rows - 1) / s->rows, body, s);
}

void mamba2_layer(const mamba2_weights *w, const float *u, step_state state, float *out, int add, int64_t b, void *memory, crew *t) {
    const int64_t e = inner(w), c = convolved(w), width = e + c + w->h;
    layer2_work s = {.w = w, .state = state, .b = b, .e = e, .c = c, .width = width, .out = out, .add = add};
    s.proj = (float *)((char *)memory + most_prepared(w, b) / 64 * 64);
    s.xBC = s.proj + b * width;
    s.y = s.xBC + b * c;
    s.squares = s.y + b * e;
    s.sum = s.squares + b * w->h;
    ready(&s.u, &w->in_proj, u, b, w->d, memory);
    in_shares(t, &s, width, project_in);
    crew_for(t, b * w->h, advance, &s);
    if (w->norm_weight) normalise(&s);
    for (int64_t row = 0; w->special && row < b; row++) hadamard(s.y + row * e, e, w->special, w->s, 0);
    ready(&s.into_out, &w->out_proj, s.y, b, e, memory);
    in_shares(t, &s, w->d, project_out);
}

typedef struct {
    const float *u, *conv_state, *ssm_state, *in_proj, *conv_weight, *conv_bias, *dt_bias, *A_log, *D, *norm_weight, *out_proj,
        *in_bias, *out_bias;
    float *out, *conv_new, *ssm_new;
    int64_t b, d, h, p, n, g, k, d_per_channel, threads;
    double eps, dt_min, dt_max;
} step2_args;

static void step(void *context, crew *t) {
    const step2_args *a = context;
    const int64_t e = a->h * a->p;
    const mamba2_weights w = {
        .in_proj = {.data = a->in_proj, .bias = a->in_bias, .rows = 2 * e + 2 * a->g * a->n + a->h, .columns = a->d, .bits = 32},
        .out_proj = {.data = a->out_proj, .bias = a->out_bias, .rows = a->d, .columns = e, .bits = 32},
        .conv = {a->conv_weight, a->conv_bias}, .dt_bias = a->dt_bias, .A_log = a->A_log, .D = a->D,
        .norm_weight = a->norm_weight, .d = a->d, .h = a->h, .p = a->p, .n = a->n, .g = a->g, .k = a->k,
        .d_per_channel = a->d_per_channel, .eps = a->eps, .dt_min = a->dt_min, .dt_max = a->dt_max,
    };
    void *memory = scratch(mamba2_memory(&w, a->b));
    mamba2_layer(&w, a->u, (step_state){a->conv_state, a->ssm_state, a->conv_new, a->ssm_new}, a->out, 0, a->b, memory, t);
    free(memory);
}

void ssmzoo_mamba2_step(const step2_args *a) { parallel_crew(a->threads, step, (void *)a); }
