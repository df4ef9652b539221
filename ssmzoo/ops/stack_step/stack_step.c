// One token of b sequences through a stack of layers x + mixer(RMSNorm(x)): see ssmzoo/ops/stack_step/__init__.py.
#include "../mamba2_step/mamba2_step.h"

enum { MAMBA, MAMBA2 };

typedef struct {  // as ssmzoo/ops/stack_step/c.py packs it
    int64_t kind;
    const float *norm;
    double eps;
    matrix in_proj, out_proj, x_proj, dt_proj;  // the last two of Mamba-1 alone
    const float *conv_weight, *conv_bias, *A_log, *D, *dt_bias, *gate_norm;
    int64_t e, h, p, n, g, k, d_per_channel;
    double gate_eps, dt_min, dt_max;
} stack_layer;

typedef struct {
    const stack_layer *layers;
    const step_state *states;
    const float *x;  // (b d)
    float *out;
    int64_t b, d, count, threads;
} stack_args;

static mamba_weights weights_of(const stack_layer *l, int64_t d) {
    return (mamba_weights){.in_proj = l->in_proj, .x_proj = l->x_proj, .dt_proj = l->dt_proj, .out_proj = l->out_proj,
                           .conv_weight = l->conv_weight, .conv_bias = l->conv_bias, .A_log = l->A_log, .D = l->D,
                           .d = d, .e = l->e, .n = l->n, .k = l->k};
}

static mamba2_weights weights2_of(const stack_layer *l, int64_t d) {
    return (mamba2_weights){.in_proj = l->in_proj, .out_proj = l->out_proj, .conv_weight = l->conv_weight,
                            .conv_bias = l->conv_bias, .dt_bias = l->dt_bias, .A_log = l->A_log, .D = l->D,
                            .norm_weight = l->gate_norm, .d = d, .h = l->h, .p = l->p, .n = l->n, .g = l->g, .k = l->k,
                            .d_per_channel = l->d_per_channel, .eps = l->gate_eps, .dt_min = l->dt_min, .dt_max = l->dt_max};
}

static void rms_norm(float *u, const float *x, const float *weight, int64_t size, double eps) {
    vf squares = {0};
    for (int64_t i = 0; i < size; i += VL) {
        const vf v = v_load_some(x + i, size - i);
        squares += v * v;
    }
    const float scale = (float)(1 / sqrt((double)v_sum(squares) / (double)size + eps));
    for (int64_t i = 0; i < size; i++) u[i] = x[i] * scale * weight[i];
}

static void step(void *context, crew *t) {
    const stack_args *a = context;
    size_t most = 0;
    for (int64_t i = 0; i < a->count; i++) {
        const stack_layer *l = a->layers + i;
        const mamba_weights w = weights_of(l, a->d);
        const mamba2_weights w2 = weights2_of(l, a->d);
        const size_t size = l->kind == MAMBA ? mamba_memory(&w, a->b) : mamba2_memory(&w2, a->b);
        most = size > most ? size : most;
    }
    most = (most + 63) / 64 * 64;
    char *memory = scratch(most + (size_t)(a->b * a->d) * sizeof(float));
    float *u = (float *)(memory + most);
    memcpy(a->out, a->x, (size_t)(a->b * a->d) * sizeof(float));
    for (int64_t i = 0; i < a->count; i++) {
        const stack_layer *l = a->layers + i;
        for (int64_t row = 0; row < a->b; row++) rms_norm(u + row * a->d, a->out + row * a->d, l->norm, a->d, l->eps);
        const mamba_weights w = weights_of(l, a->d);
        const mamba2_weights w2 = weights2_of(l, a->d);
        if (l->kind == MAMBA) mamba_layer(&w, u, a->states[i], a->out, 1, a->b, memory, t);
        else mamba2_layer(&w2, u, a->states[i], a->out, 1, a->b, memory, t);
    }
    free(memory);
}

void ssmzoo_stack_step(const stack_args *a) { parallel_crew(a->threads, step, (void *)a); }
