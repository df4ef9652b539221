// What stands between the projections of a Mamba-3 mixer, for one token: for its operator and for whole programs.
#pragma once
#include "parallel.h"

typedef struct {
    const float *u, *phase, *ssm_state, *last_k, *last_x, *in_proj, *dt_bias, *B_norm, *C_norm, *B_bias, *C_bias, *D,
        *norm_weight, *out_proj;
    float *out, *phase_new, *ssm_new, *k_new, *x_new;
    int64_t b, d, h, p, n, m, g, threads;
    double A_floor, B_eps, C_eps, eps;
} step3_args;

// proj (w), [z, x, B, C, d, a, t, g] of a sequence, is used up; y (h p); memory: mamba3_memory floats.
size_t mamba3_memory(const step3_args *a);
void mamba3_core(const step3_args *a, int64_t row, float *proj, float *y, float *memory, crew *t);
