// Activations behind a linear map, and the gradients of its weights. All fp32, contiguous:
//
//     y = act(h)     dh = dy act'(h), from h or, for ReLU, from y     dW = dh^T x     dbias = sum over rows of dh
//
// The exact GELU takes its normal distribution from Abramowitz & Stegun 7.1.26, whose exponential is the density that
// the gradient needs (error 8e-8).
#include "gemm.h"
#include "parallel.h"

enum { NONE, GELU, RELU, SILU };
enum { SHARE = 1 << 14, DEPTH = 256, PANEL = 4 * VL };  // elements per task; rows at a time; columns of x at a time

// The integral of the normal distribution up to h; `density` becomes exp(-h^2 / 2).
INLINE vf v_normal(vf h, vf *density) {
    const vf x = v_abs(h) * 0.70710678118654752f, t = 1.0f / (1.0f + 0.3275911f * x);
    vf p = v_set(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    *density = v_exp(-x * x);
    const vf tail = 0.5f * p * t * *density;
    return v_select(h < 0.0f, tail, 1.0f - tail);
}

INLINE vf v_act(vf h, const int64_t act) {
    vf density;
    return h * (act == GELU ? v_normal(h, &density) : v_sigmoid(h));
}

INLINE vf v_act_slope(vf h, const int64_t act) {
    if (act == RELU) return v_select(h > 0.0f, v_set(1.0f), v_set(0.0f));
    if (act == SILU) {
        const vf s = v_sigmoid(h);
        return s * (1.0f + h * (1.0f - s));
    }
    vf density;
    const vf normal = v_normal(h, &density);
    return normal + h * density * 0.39894228040143268f;
}

typedef struct {
    const float *h;
    float *y;
    int64_t size, act, threads;  // GELU or SILU
} act_args;

INLINE void act_line(const act_args *a, int64_t i, int64_t end, const int64_t act) {
    for (; i < end; i += VL) v_store_some(a->y + i, v_act(v_load_some(a->h + i, end - i), act), end - i);
}

static void act_task(void *context, int64_t index) {
    const act_args *a = context;
    const int64_t from = index * SHARE, end = from + SHARE < a->size ? from + SHARE : a->size;
    if (a->act == GELU) act_line(a, from, end, GELU);
    else act_line(a, from, end, SILU);
}

void ssmzoo_act(const act_args *a) { parallel_for((a->size + SHARE - 1) / SHARE, a->threads, act_task, (void *)a); }

typedef struct {
    const float *dy, *saved, *x;  // (rows, e), (rows, e), (rows, d)
    float *dh, *dW, *dbias;       // (rows, e), or NULL without act; (parts, e, d), or NULL if not wanted; (parts, e)
    int64_t rows, e, d, act, parts, columns, threads;  // parts: of the rows; columns: of dh per task
} linear_args;

INLINE void slope_line(float *dh, const float *dy, const float *saved, int64_t size, const int64_t act) {
    for (int64_t i = 0; i < size; i += VL)
        v_store_some(dh + i, v_load_some(dy + i, size - i) * v_act_slope(v_load_some(saved + i, size - i), act), size - i);
}

// A task has a part of dh to itself, some rows and columns: while they are in cache, they are computed, summed, multiplied.
static void backward_task(void *context, int64_t index) {
    const linear_args *a = context;
    const int64_t splits = (a->e + a->columns - 1) / a->columns, part = index / splits;
    const int64_t first = index % splits * a->columns, M = first + a->columns < a->e ? a->columns : a->e - first;
    const int64_t start = a->rows * part / a->parts, end = a->rows * (part + 1) / a->parts;
    float *sum = scratch(sizeof(float) * (size_t)M), *dbias = a->dbias + part * a->e + first;
    memset(dbias, 0, sizeof(float) * (size_t)M);
    for (int64_t row = start; row < end; row += DEPTH) {
        const int64_t K = row + DEPTH < end ? DEPTH : end - row, corner = row * a->e + first;
        const float *dh = (a->act == NONE ? a->dy : a->dh) + corner;
        memset(sum, 0, sizeof(float) * (size_t)M);
        for (int64_t k = 0; k < K; k++) {
            const int64_t line = corner + k * a->e;
            if (a->act == GELU) slope_line(a->dh + line, a->dy + line, a->saved + line, M, GELU);
            else if (a->act == RELU) slope_line(a->dh + line, a->dy + line, a->saved + line, M, RELU);
            else if (a->act == SILU) slope_line(a->dh + line, a->dy + line, a->saved + line, M, SILU);
            for (int64_t m = 0; m < M; m++) sum[m] += dh[k * a->e + m];
        }
        for (int64_t m = 0; m < M; m++) dbias[m] += sum[m];
        for (int64_t n = 0; a->dW && n < a->d; n += PANEL) {
            float *dW = a->dW + (part * a->e + first) * a->d + n;
            const gemm_t g = {.A = dh, .am = 1, .ak = a->e, .B = a->x + row * a->d + n, .ldb = a->d, .C = dW,
                              .ldc = a->d, .from = row > start ? dW : NULL, .keep = 1.0f};
            gemm(&g, M, n + PANEL < a->d ? PANEL : a->d - n, K, GEMM_FULL);
        }
    }
    free(sum);
}

void ssmzoo_linear_backward(const linear_args *a) {
    const int64_t splits = (a->e + a->columns - 1) / a->columns;
    parallel_for(a->parts * splits, a->threads, backward_task, (void *)a);
}
