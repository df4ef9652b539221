// h_t = a_t h_{t-1} + x_t for every channel, fp32, forwards or backwards in time, and its gradients.
#include "parallel.h"
#include "vec.h"

#define VECTORS 16
#define WIDTH (VECTORS * VL)  // channels per task

typedef struct {
    const float *a, *x, *h0;  // x: of the backward, the gradient of h; h0 (b, n) or NULL
    float *h, *da, *dx;       // contiguous; h is read by the backward
    int64_t a_batch, a_step, x_batch, x_step;  // strides in elements; channels are contiguous
    int64_t batch, length, n, reverse, threads;
} recurrence_args;

// The steps in the order of the recurrence: step s of `length` is position `position(...)`.
INLINE int64_t position(const recurrence_args *a, int64_t s) { return a->reverse ? a->length - 1 - s : s; }

static void forward_task(void *context, int64_t task) {
    const recurrence_args *a = context;
    int64_t blocks = (a->n + WIDTH - 1) / WIDTH, b = task / blocks, first = task % blocks * WIDTH;
    int64_t count = a->n - first < WIDTH ? a->n - first : WIDTH;
    vf h[VECTORS] = {{0}};
    for (int64_t c = 0; a->h0 && c < count; c += VL) h[c / VL] = v_load_some(a->h0 + b * a->n + first + c, count - c);
    for (int64_t s = 0; s < a->length; s++) {
        int64_t t = position(a, s);
        const float *decay = a->a + b * a->a_batch + t * a->a_step + first;
        const float *x = a->x + b * a->x_batch + t * a->x_step + first;
        float *to = a->h + (b * a->length + t) * a->n + first;
        for (int64_t c = 0; c < count; c += VL) {
            h[c / VL] = v_load_some(decay + c, count - c) * h[c / VL] + v_load_some(x + c, count - c);
            v_store_some(to + c, h[c / VL], count - c);
        }
    }
}

// g_t = dh_t + a_{t+1} g_{t+1};  dx_t = g_t;  da_t = g_t h_{t-1}
static void backward_task(void *context, int64_t task) {
    const recurrence_args *a = context;
    int64_t blocks = (a->n + WIDTH - 1) / WIDTH, b = task / blocks, first = task % blocks * WIDTH;
    int64_t count = a->n - first < WIDTH ? a->n - first : WIDTH;
    vf carry[VECTORS] = {{0}};  // a_{t+1} g_{t+1}
    for (int64_t s = a->length - 1; s >= 0; s--) {
        int64_t t = position(a, s), row = (b * a->length + t) * a->n + first;
        const float *decay = a->a + b * a->a_batch + t * a->a_step + first;
        const float *dh = a->x + b * a->x_batch + t * a->x_step + first;
        const float *before = s ? a->h + (b * a->length + position(a, s - 1)) * a->n + first
                                : a->h0 ? a->h0 + b * a->n + first : NULL;
        for (int64_t c = 0; c < count; c += VL) {
            vf g = v_load_some(dh + c, count - c) + carry[c / VL];
            vf h = before ? v_load_some(before + c, count - c) : v_set(0);
            v_store_some(a->dx + row + c, g, count - c);
            v_store_some(a->da + row + c, g * h, count - c);
            carry[c / VL] = v_load_some(decay + c, count - c) * g;
        }
    }
}

void ssmzoo_gated_linear_recurrence(const recurrence_args *a) {
    parallel_for(a->batch * ((a->n + WIDTH - 1) / WIDTH), a->threads, forward_task, (void *)a);
}

void ssmzoo_gated_linear_recurrence_backward(const recurrence_args *a) {
    parallel_for(a->batch * ((a->n + WIDTH - 1) / WIDTH), a->threads, backward_task, (void *)a);
}
