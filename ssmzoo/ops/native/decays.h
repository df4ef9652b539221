// Products of a head's decays within a chunk of q steps, for scans with one decay per head and step. Steps lie `stride` apart.
#pragma once
#include "gemm.h"

// from the start up to each step, and from after each step to the end
static __attribute__((unused)) void decays(const float *e, int64_t stride, int64_t q, float *start, float *end) {
    float product = 1;
    for (int64_t t = 0; t < q; t++) start[t] = product *= e[t * stride];
    product = 1;
    for (int64_t t = q - 1; t >= 0; t--) { end[t] = product; product *= e[t * stride]; }
}

// L[t][s] = e_{s+1} ... e_t row by row, (q, qp), 1 on the diagonal and 0 above; products far below rounding are flushed to
// avoid subnormals
static __attribute__((unused)) void decay_matrix(const float *e, int64_t stride, int64_t q, int64_t qp, float *L) {
    memset(L, 0, (size_t)q * qp * sizeof(float));
    L[0] = 1;
    for (int64_t t = 1; t < q; t++) {
        const float *above = L + (t - 1) * qp;
        float *row = L + t * qp;
        const float factor = e[t * stride];
        for (int64_t s = 0; s < t; s += VL) {
            const vf value = v_load(above + s) * factor;
            v_store(row + s, v_select(v_abs(value) < 1e-36f, v_set(0), value));
        }
        row[t] = 1;
        for (int64_t s = t + 1; s < padded(t); s++) row[s] = 0;  // also where a decay is infinite
    }
}

// The gradient of the logarithm of every decay: of r, sum over s < r <= t of (W o dW)[t][s] + sum_{t >= r} before[t]
// + sum_{s < r} after[s] + across. W and dW (q, qp) up to the diagonal; column (qp) is work space.
static __attribute__((unused)) void decay_gradient(const float *e, int64_t stride, int64_t q, int64_t qp, const float *W,
                                                   const float *dW, const float *before, const float *after, float across,
                                                   float *column, float *da) {
    memset(column, 0, qp * sizeof(float));
    float sum = 0;
    for (int64_t r = q - 1; r >= 0; r--) {
        vf inside = {0};
        int64_t k = 0;
        for (; k + VL <= r; k += VL) {
            const vf x = v_load(column + k) + v_load(W + r * qp + k) * v_load(dW + r * qp + k);
            v_store(column + k, x);
            inside += x;
        }
        const vf x = v_load(column + k) + v_load(W + r * qp + k) * v_load(dW + r * qp + k);
        v_store(column + k, x);
        float rest = v_sum(inside);
        for (; k < r; k++) rest += column[k];
        sum += before[r];
        da[r * stride] = rest + sum + across;
    }
    sum = 0;
    for (int64_t r = 1; r < q; r++) da[r * stride] += sum += after[r - 1];
    for (int64_t r = 0; r < q; r++)
        if (e[r * stride] == 0) da[r * stride] = 0;
}
