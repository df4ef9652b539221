// One token of b sequences through a Mamba-2 mixer, for its operator and for stacks of layers.
#pragma once
#include "../mamba_step/mamba_step.h"

typedef struct {
    matrix in_proj, out_proj;
    conv_weights conv;
    const float *dt_bias, *A_log, *D, *norm_weight;  // no norm without norm_weight
    int64_t d, h, p, n, g, k, d_per_channel;
    double eps, dt_min, dt_max;
    const float *special;  // as in mamba_weights
    int64_t s;
} mamba2_weights;

size_t mamba2_memory(const mamba2_weights *w, int64_t b);
// u, out (b d); state.conv (b c k), state.ssm (b h p n); out += with `add`.
void mamba2_layer(const mamba2_weights *w, const float *u, step_state state, float *out, int add, int64_t b, void *memory, crew *t);
