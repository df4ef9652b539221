// h_t = a_t h_{t-1} + b_t of complex numbers, channel by channel, fp32, and its gradients.
// A row of n numbers is 2 n floats, real and imaginary parts next to each other.
#include "parallel.h"
#include "vec.h"

#define VECTORS 16
#define WIDTH (VECTORS * VL)  // floats per task

#if VL == 16
#define V_REAL(x) V_SHUFFLE(x, x, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14)
#define V_IMAGINARY(x) V_SHUFFLE(x, x, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15)
#elif VL == 8
#define V_REAL(x) V_SHUFFLE(x, x, 0, 0, 2, 2, 4, 4, 6, 6)
#define V_IMAGINARY(x) V_SHUFFLE(x, x, 1, 1, 3, 3, 5, 5, 7, 7)
#else
#define V_REAL(x) V_SHUFFLE(x, x, 0, 0, 2, 2)
#define V_IMAGINARY(x) V_SHUFFLE(x, x, 1, 1, 3, 3)
#endif

typedef struct {
    const float *a, *b, *h0;  // b: of the backward, the gradient of h; h0 (b, n) or NULL
    float *h, *da, *db, *dh0;  // contiguous; h is read by the backward; dh0 as h0
    int64_t a_batch, a_step, b_batch, b_step;  // strides in floats; numbers of a row are contiguous
    int64_t batch, length, width, threads;  // width: 2 n
} complex_args;

static const float SIGN[16] = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};

INLINE vf times(vf a, vf x) { return V_REAL(a) * x + V_IMAGINARY(a) * (v_load(SIGN) * V_NEIGHBOURS(x)); }
INLINE vf conjugate_times(vf a, vf x) { return V_REAL(a) * x - V_IMAGINARY(a) * (v_load(SIGN) * V_NEIGHBOURS(x)); }

static void forward_task(void *context, int64_t task) {
    const complex_args *a = context;
    int64_t blocks = (a->width + WIDTH - 1) / WIDTH, b = task / blocks, first = task % blocks * WIDTH;
    int64_t count = a->width - first < WIDTH ? a->width - first : WIDTH;
    vf h[VECTORS] = {{0}};
    for (int64_t c = 0; a->h0 && c < count; c += VL)
        h[c / VL] = v_load_some(a->h0 + b * a->width + first + c, count - c);
    for (int64_t t = 0; t < a->length; t++) {
        const float *decay = a->a + b * a->a_batch + t * a->a_step + first;
        const float *input = a->b + b * a->b_batch + t * a->b_step + first;
        float *to = a->h + (b * a->length + t) * a->width + first;
        for (int64_t c = 0; c < count; c += VL) {
            h[c / VL] = times(v_load_some(decay + c, count - c), h[c / VL]) + v_load_some(input + c, count - c);
            v_store_some(to + c, h[c / VL], count - c);
        }
    }
}

// g_t = dh_t + conj(a_{t+1}) g_{t+1};  db_t = g_t;  da_t = g_t conj(h_{t-1});  dh_0 = conj(a_1) g_1
static void backward_task(void *context, int64_t task) {
    const complex_args *a = context;
    int64_t blocks = (a->width + WIDTH - 1) / WIDTH, b = task / blocks, first = task % blocks * WIDTH;
    int64_t count = a->width - first < WIDTH ? a->width - first : WIDTH;
    vf carry[VECTORS] = {{0}};  // conj(a_{t+1}) g_{t+1}
    for (int64_t t = a->length - 1; t >= 0; t--) {
        int64_t row = (b * a->length + t) * a->width + first;
        const float *decay = a->a + b * a->a_batch + t * a->a_step + first;
        const float *dh = a->b + b * a->b_batch + t * a->b_step + first;
        const float *before = t ? a->h + row - a->width : a->h0 ? a->h0 + b * a->width + first : NULL;
        for (int64_t c = 0; c < count; c += VL) {
            vf g = v_load_some(dh + c, count - c) + carry[c / VL];
            vf h = before ? v_load_some(before + c, count - c) : v_set(0);
            v_store_some(a->db + row + c, g, count - c);
            v_store_some(a->da + row + c, conjugate_times(h, g), count - c);
            carry[c / VL] = conjugate_times(v_load_some(decay + c, count - c), g);
        }
    }
    for (int64_t c = 0; a->dh0 && c < count; c += VL)
        v_store_some(a->dh0 + b * a->width + first + c, carry[c / VL], count - c);
}

void ssmzoo_complex_scan(const complex_args *a) {
    parallel_for(a->batch * ((a->width + WIDTH - 1) / WIDTH), a->threads, forward_task, (void *)a);
}

void ssmzoo_complex_scan_backward(const complex_args *a) {
    parallel_for(a->batch * ((a->width + WIDTH - 1) / WIDTH), a->threads, backward_task, (void *)a);
}
