// RMSNorm over rows, y = x / sqrt(mean(x^2) + eps) * weight, fp32 and contiguous, and its gradients.
#include "parallel.h"
#include "vec.h"

typedef struct {
    const float *x, *weight, *dy;
    float *y, *scale, *dx, *dweight;  // scale (rows): 1 / sqrt(mean(x^2) + eps); dweight (tasks, dim)
    int64_t rows, dim, share, threads;  // share: rows per task
    double eps;
} norm_args;

static void forward_task(void *context, int64_t index) {
    const norm_args *a = context;
    int64_t dim = a->dim, end = (index + 1) * a->share < a->rows ? (index + 1) * a->share : a->rows;
    for (int64_t row = index * a->share; row < end; row++) {
        const float *x = a->x + row * dim;
        float *y = a->y + row * dim;
        vf sum = {0};
        for (int64_t i = 0; i < dim; i += VL) {
            vf v = v_load_some(x + i, dim - i);
            sum += v * v;
        }
        float scale = (float)(1.0 / sqrt(v_sum(sum) / (double)dim + a->eps));
        if (a->scale) a->scale[row] = scale;
        for (int64_t i = 0; i < dim; i += VL)
            v_store_some(y + i, v_load_some(x + i, dim - i) * scale * v_load_some(a->weight + i, dim - i), dim - i);
    }
}

static void backward_task(void *context, int64_t index) {
    const norm_args *a = context;
    int64_t dim = a->dim, end = (index + 1) * a->share < a->rows ? (index + 1) * a->share : a->rows;
    float *dweight = a->dweight + index * dim;
    memset(dweight, 0, sizeof(float) * (size_t)dim);
    for (int64_t row = index * a->share; row < end; row++) {
        const float *x = a->x + row * dim, *dy = a->dy + row * dim;
        float *dx = a->dx + row * dim, scale = a->scale[row];
        vf sum = {0};
        for (int64_t i = 0; i < dim; i += VL)
            sum += v_load_some(dy + i, dim - i) * v_load_some(a->weight + i, dim - i) * v_load_some(x + i, dim - i);
        float pull = v_sum(sum) / (float)dim * scale * scale;
        for (int64_t i = 0; i < dim; i += VL) {
            vf v = v_load_some(x + i, dim - i), g = v_load_some(dy + i, dim - i);
            v_store_some(dx + i, scale * (g * v_load_some(a->weight + i, dim - i) - v * pull), dim - i);
            v_store_some(dweight + i, v_load_some(dweight + i, dim - i) + g * v * scale, dim - i);
        }
    }
}

void ssmzoo_rms_norm(const norm_args *a) {
    if (a->rows) parallel_for((a->rows + a->share - 1) / a->share, a->threads, forward_task, (void *)a);
}

void ssmzoo_rms_norm_backward(const norm_args *a) {
    if (a->rows) parallel_for((a->rows + a->share - 1) / a->share, a->threads, backward_task, (void *)a);
}
