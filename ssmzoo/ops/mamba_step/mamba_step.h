// One token of b sequences through a Mamba-1 mixer, for its operator and for stacks of layers.
#pragma once
#include "gemv.h"
#include "matrix.h"

typedef struct {
    matrix in_proj, x_proj, dt_proj, out_proj;  // in_proj and out_proj may be missing
    conv_weights conv;
    const float *A_log, *D;
    int64_t d, e, n, k;
    const float *special;  // (s s): what enters out_proj is rotated first, see hadamard.h; NULL: it is not
    int64_t s;
} mamba_weights;

typedef struct {
    const float *conv, *ssm;  // (b e k), (b e n)
    float *conv_new, *ssm_new;
} step_state;

size_t mamba_memory(const mamba_weights *w, int64_t b);
// u (b d), or (b 2e) without in_proj; out (b d), or (b e) without out_proj; out += with `add`, which needs an out_proj.
void mamba_layer(const mamba_weights *w, const float *u, step_state state, float *out, int add, int64_t b, void *memory, crew *t);
