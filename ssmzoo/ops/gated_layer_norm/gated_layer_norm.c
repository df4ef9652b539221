// A row's LayerNorm times the SiLU of its gate, fp32, and its gradients:
//
//     n = (x - mean) scale,  scale = 1 / sqrt(variance + eps)      y = (n weight + bias) z sigmoid(z)
#include "parallel.h"
#include "vec.h"

typedef struct {
    const float *x, *z, *weight, *bias, *dy;  // x, dy (rows, dim) contiguous; rows of z have stride `gap`
    float *y, *mean, *scale, *dx, *dz, *sums;  // mean, scale (rows); sums (tasks, 2, dim): dweight, dbias
    int64_t gap, rows, dim, share, threads;  // share: rows per task
    double eps;
} norm_args;

static int64_t end_of(const norm_args *a, int64_t task) {
    return (task + 1) * a->share < a->rows ? (task + 1) * a->share : a->rows;
}

INLINE vf centred(const float *x, float mean, int64_t count) {  // zeros behind the first `count` lanes
    vf v = v_load_some(x, count) - mean;
    if (count < VL)
        for (int64_t i = count; i < VL; i++) v[i] = 0;
    return v;
}

static void forward_task(void *context, int64_t index) {
    const norm_args *a = context;
    const int64_t dim = a->dim;
    for (int64_t row = index * a->share; row < end_of(a, index); row++) {
        const float *x = a->x + row * dim, *z = a->z + row * a->gap;
        float *y = a->y + row * dim;
        vf sum = {0}, squares = {0};
        for (int64_t i = 0; i < dim; i += VL) sum += v_load_some(x + i, dim - i);
        const float mean = v_sum(sum) / (float)dim;
        for (int64_t i = 0; i < dim; i += VL) {
            const vf v = centred(x + i, mean, dim - i);
            squares += v * v;
        }
        const float scale = (float)(1.0 / sqrt(v_sum(squares) / (double)dim + a->eps));
        a->mean[row] = mean;
        a->scale[row] = scale;
        for (int64_t i = 0; i < dim; i += VL) {
            const vf gate = v_load_some(z + i, dim - i), n = (v_load_some(x + i, dim - i) - mean) * scale;
            const vf scaled = n * v_load_some(a->weight + i, dim - i) + v_load_some(a->bias + i, dim - i);
            v_store_some(y + i, scaled * gate * v_sigmoid(gate), dim - i);
        }
    }
}

static void backward_task(void *context, int64_t index) {
    const norm_args *a = context;
    const int64_t dim = a->dim;
    float *dweight = a->sums + 2 * index * dim, *dbias = dweight + dim;
    memset(dweight, 0, 2 * sizeof(float) * (size_t)dim);
    for (int64_t row = index * a->share; row < end_of(a, index); row++) {
        const float *x = a->x + row * dim, *z = a->z + row * a->gap, *dy = a->dy + row * dim;
        float *dx = a->dx + row * dim, *dz = a->dz + row * dim;
        const float mean = a->mean[row], scale = a->scale[row];
        vf sum = {0}, along = {0};
        for (int64_t i = 0; i < dim; i += VL) {
            const vf gate = v_load_some(z + i, dim - i), open = v_sigmoid(gate), g = v_load_some(dy + i, dim - i);
            const vf n = (v_load_some(x + i, dim - i) - mean) * scale, weight = v_load_some(a->weight + i, dim - i);
            const vf scaled = n * weight + v_load_some(a->bias + i, dim - i), dscaled = g * gate * open;
            v_store_some(dz + i, g * scaled * open * (1.0f + gate * (1.0f - open)), dim - i);
            v_store_some(dweight + i, v_load_some(dweight + i, dim - i) + dscaled * n, dim - i);
            v_store_some(dbias + i, v_load_some(dbias + i, dim - i) + dscaled, dim - i);
            v_store_some(dx + i, dscaled * weight, dim - i);
            sum += dscaled * weight;
            along += dscaled * weight * n;
        }
        const float shift = v_sum(sum) / (float)dim, pull = v_sum(along) / (float)dim;
        for (int64_t i = 0; i < dim; i += VL) {
            const vf n = (v_load_some(x + i, dim - i) - mean) * scale;
            v_store_some(dx + i, scale * (v_load_some(dx + i, dim - i) - shift - n * pull), dim - i);
        }
    }
}

void ssmzoo_gated_layer_norm(const norm_args *a) {
    if (a->rows) parallel_for((a->rows + a->share - 1) / a->share, a->threads, forward_task, (void *)a);
}

void ssmzoo_gated_layer_norm_backward(const norm_args *a) {
    if (a->rows) parallel_for((a->rows + a->share - 1) / a->share, a->threads, backward_task, (void *)a);
}
