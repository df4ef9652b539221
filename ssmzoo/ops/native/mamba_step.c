// One token through a Mamba-1 mixer, fp32 and contiguous: see ssmzoo/ops/mamba_step.py for the equations.
// All work is one pass over the weights; small enough that a single thread is the fastest.
#include "parallel.h"
#include "vec.h"

typedef struct {
    const float *u, *conv_state, *ssm_state, *conv_weight, *conv_bias, *x_proj, *dt_proj, *dt_bias, *A_log, *D, *in_proj,
        *in_bias, *out_proj, *out_bias;
    float *out, *conv_new, *ssm_new;
    int64_t b, d, e, n, r, k;
} step_args;

INLINE float dot(const float *w, const float *x, int64_t size) {
    vf sum = v_set(0);
    int64_t i = 0;
    for (; i + VL <= size; i += VL) sum += v_load(w + i) * v_load(x + i);
    float s = v_sum(sum);
    for (; i < size; i++) s += w[i] * x[i];
    return s;
}

// y = W x + bias; W (rows columns). Four rows at a time hide the latency of the additions.
static void gemv(float *y, const float *W, const float *x, const float *bias, int64_t rows, int64_t columns) {
    int64_t j = 0;
    for (; j + 4 <= rows; j += 4) {
        const float *w = W + j * columns;
        vf s0 = v_set(0), s1 = s0, s2 = s0, s3 = s0;
        int64_t i = 0;
        for (; i + VL <= columns; i += VL) {
            vf v = v_load(x + i);
            s0 += v_load(w + i) * v;
            s1 += v_load(w + columns + i) * v;
            s2 += v_load(w + 2 * columns + i) * v;
            s3 += v_load(w + 3 * columns + i) * v;
        }
        float s[4] = {v_sum(s0), v_sum(s1), v_sum(s2), v_sum(s3)};
        for (; i < columns; i++)
            for (int q = 0; q < 4; q++) s[q] += w[q * columns + i] * x[i];
        for (int q = 0; q < 4; q++) y[j + q] = s[q] + (bias ? bias[j + q] : 0);
    }
    for (; j < rows; j++) y[j] = dot(W + j * columns, x, columns) + (bias ? bias[j] : 0);
}

static void silu(float *x, int64_t size) {
    int64_t i = 0;
    for (; i + VL <= size; i += VL) {
        vf v = v_load(x + i);
        v_store(x + i, v * v_sigmoid(v));
    }
    for (; i < size; i++) x[i] = x[i] / (1 + expf(-x[i]));
}

static void softplus(float *x, int64_t size) {
    float tail[VL] = {0};
    for (int64_t i = 0; i < size; i += VL) {
        if (i + VL <= size) {
            v_store(x + i, v_softplus(v_load(x + i)));
        } else {
            memcpy(tail, x + i, (size - i) * sizeof(float));
            v_store(tail, v_softplus(v_load(tail)));
            memcpy(x + i, tail, (size - i) * sizeof(float));
        }
    }
}

// h' = exp(dt A) h + dt x B of one channel; returns <h', C>. Tails are padded with zeros: exp(0) * 0 + 0 adds nothing.
INLINE float channel(float *new_h, const float *h, const float *A_log, const float *B, const float *C, float dt, float dtx,
                     int64_t n) {
    vf sum = v_set(0);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vf state = v_exp(-dt * v_exp(v_load(A_log + i))) * v_load(h + i) + dtx * v_load(B + i);
        v_store(new_h + i, state);
        sum += state * v_load(C + i);
    }
    if (i < n) {
        float a[VL] = {0}, s[VL] = {0}, b[VL] = {0}, c[VL] = {0};
        size_t bytes = (n - i) * sizeof(float);
        memcpy(a, A_log + i, bytes), memcpy(s, h + i, bytes), memcpy(b, B + i, bytes), memcpy(c, C + i, bytes);
        vf state = v_exp(-dt * v_exp(v_load(a))) * v_load(s) + dtx * v_load(b);
        sum += state * v_load(c);
        v_store(s, state);
        memcpy(new_h + i, s, bytes);
    }
    return v_sum(sum);
}

static void step(const step_args *a, int64_t row, float *memory) {
    int64_t e = a->e, n = a->n, r = a->r, k = a->k;
    float *xz = memory, *x = xz + 2 * e, *dbc = x + e, *dt = dbc + r + 2 * n;
    if (a->in_proj) gemv(xz, a->in_proj, a->u + row * a->d, a->in_bias, 2 * e, a->d);
    else memcpy(xz, a->u + row * 2 * e, 2 * e * sizeof(float));
    float *z = xz + e;
    for (int64_t c = 0; c < e; c++) {
        const float *old = a->conv_state + (row * e + c) * k, *w = a->conv_weight + c * k;
        float *window = a->conv_new + (row * e + c) * k, sum = a->conv_bias ? a->conv_bias[c] : 0;
        for (int64_t j = 0; j + 1 < k; j++) sum += (window[j] = old[j + 1]) * w[j];
        window[k - 1] = xz[c];
        x[c] = sum + xz[c] * w[k - 1];
    }
    silu(x, e);
    silu(z, e);
    gemv(dbc, a->x_proj, x, NULL, r + 2 * n, e);
    gemv(dt, a->dt_proj, dbc, a->dt_bias, e, r);
    softplus(dt, e);
    const float *B = dbc + r, *C = B + n;
    float *y = a->out_proj ? xz : a->out + row * e;
    for (int64_t c = 0; c < e; c++) {
        int64_t at = (row * e + c) * n;
        float hC = channel(a->ssm_new + at, a->ssm_state + at, a->A_log + c * n, B, C, dt[c], dt[c] * x[c], n);
        y[c] = (hC + a->D[c] * x[c]) * z[c];
    }
    if (a->out_proj) gemv(a->out + row * a->d, a->out_proj, y, a->out_bias, a->d, e);
}

void ssmzoo_mamba_step(const step_args *a) {
    float *memory = scratch((4 * a->e + a->r + 2 * a->n) * sizeof(float));
    for (int64_t row = 0; row < a->b; row++) step(a, row, memory);
    free(memory);
}
