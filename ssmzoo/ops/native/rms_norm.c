// RMSNorm over rows, y = x / sqrt(mean(x^2) + eps) * weight, fp32 and contiguous, and its gradients.
#include "parallel.h"
#include "vec.h"

typedef struct {
    const float *x, *weight, *dy;
    float *y, *scale, *dx, *dweight;  // scale (rows): 1 / sqrt(mean(x^2) + eps); dweight (tasks, dim)
    int64_t rows, dim, share, threads;  // share: rows per task
    double eps;
} norm_args;

INLINE vf row_load(const float *p, int64_t i, int64_t dim) {  // zeros beyond the end of the row
    if (i + VL <= dim) return v_load(p + i);
    float tail[VL] = {0};
    memcpy(tail, p + i, sizeof(float) * (size_t)(dim - i));
    return v_load(tail);
}

INLINE void row_store(float *p, int64_t i, int64_t dim, vf x) {
    if (i + VL <= dim) { v_store(p + i, x); return; }
    float tail[VL];
    v_store(tail, x);
    memcpy(p + i, tail, sizeof(float) * (size_t)(dim - i));
}

static void forward_task(void *context, int64_t index) {
    const norm_args *a = context;
    int64_t dim = a->dim, end = (index + 1) * a->share < a->rows ? (index + 1) * a->share : a->rows;
    for (int64_t row = index * a->share; row < end; row++) {
        const float *x = a->x + row * dim;
        vf sum = {0};
        for (int64_t i = 0; i < dim; i += VL) { vf v = row_load(x, i, dim); sum += v * v; }
        float scale = (float)(1.0 / sqrt(v_sum(sum) / (double)dim + a->eps));
        if (a->scale) a->scale[row] = scale;
        for (int64_t i = 0; i < dim; i += VL)
            row_store(a->y + row * dim, i, dim, row_load(x, i, dim) * scale * row_load(a->weight, i, dim));
    }
}

static void backward_task(void *context, int64_t index) {
    const norm_args *a = context;
    int64_t dim = a->dim, end = (index + 1) * a->share < a->rows ? (index + 1) * a->share : a->rows;
    float *dweight = a->dweight + index * dim;
    memset(dweight, 0, sizeof(float) * (size_t)dim);
    for (int64_t row = index * a->share; row < end; row++) {
        const float *x = a->x + row * dim, *dy = a->dy + row * dim;
        float scale = a->scale[row];
        vf sum = {0};
        for (int64_t i = 0; i < dim; i += VL) sum += row_load(dy, i, dim) * row_load(a->weight, i, dim) * row_load(x, i, dim);
        float pull = v_sum(sum) / (float)dim * scale * scale;
        for (int64_t i = 0; i < dim; i += VL) {
            vf v = row_load(x, i, dim), g = row_load(dy, i, dim);
            row_store(a->dx + row * dim, i, dim, scale * (g * row_load(a->weight, i, dim) - v * pull));
            row_store(dweight, i, dim, row_load(dweight, i, dim) + g * v * scale);
        }
    }
}

void ssmzoo_rms_norm(const norm_args *a) {
    if (a->rows) parallel_for((a->rows + a->share - 1) / a->share, a->threads, forward_task, (void *)a);
}

void ssmzoo_rms_norm_backward(const norm_args *a) {
    if (a->rows) parallel_for((a->rows + a->share - 1) / a->share, a->threads, backward_task, (void *)a);
}
