// The columns of mixed transitions divided by their p-norms, fp32, and the gradient; 1 <= p. Lanes run along columns.
#include "parallel.h"
#include "vec.h"

typedef struct {
    const float *M, *dT;   // (s n n)
    float *slope;          // (s n n): sign(M) |M|^(p-1), written by the forward
    float *to;             // (s n n): T, or dM
    int64_t s, n, threads;
    double p;
} norm_args;

// log2 of positive, finite and normal numbers, absolute error below 1e-7 beside the rounding of the result
INLINE vf v_log2(vf x) {
    const vi exponent = ((vi)x - 0x3f3504f3) >> 23;  // x = 2^exponent (1 + f), from sqrt(1/2) to sqrt(2)
    const vf f = (vf)((vi)x - (exponent << 23)) - 1.0f, r = f / (2.0f + f), q = r * r;
    vf p = q * 0.32059889f + 0.41219858f;  // 2 / (9 ln 2), 2 / (7 ln 2), ...: 2 atanh(r) / ln 2
    p = (p * q + 0.57707802f) * q + 0.96179669f;
    return __builtin_convertvector(exponent, vf) + r * (p * q + 2.88539008f);
}
// x^e of x >= 0 and e >= 0; 0 for 0, NaN and infinity stay
INLINE vf v_power(vf x, float e) {
    return v_select((x > 0.0f) & (x < INFINITY), v_exp2(v_log2(x) * e), x);
}

static void forward_task(void *context, int64_t s) {
    const norm_args *a = context;
    const int64_t n = a->n, at = s * n * n;
    const float slope_power = (float)(a->p - 1), root = (float)(1 / a->p);
    for (int64_t j = 0; j < n; j += VL) {
        vf sum = {0};
        for (int64_t i = at + j; i < at + n * n; i += n) {
            const vf m = v_load_some(a->M + i, n - j);
            const vf size = v_power(v_abs(m), slope_power), slope = (vf)((vi)size | ((vi)m & INT32_MIN));
            v_store_some(a->slope + i, slope, n - j);
            sum += m * slope;
        }
        const vf norm = v_power(sum, root);
        for (int64_t i = at + j; i < at + n * n; i += n)
            v_store_some(a->to + i, v_load_some(a->M + i, n - j) / norm, n - j);
    }
}

// dM = (dT - slope sum(dT M) / sum(M slope)) / norm
static void backward_task(void *context, int64_t s) {
    const norm_args *a = context;
    const int64_t n = a->n, at = s * n * n;
    const float root = (float)(1 / a->p);
    for (int64_t j = 0; j < n; j += VL) {
        vf sum = {0}, pull = {0};
        for (int64_t i = at + j; i < at + n * n; i += n) {
            const vf m = v_load_some(a->M + i, n - j);
            sum += m * v_load_some(a->slope + i, n - j);
            pull += m * v_load_some(a->dT + i, n - j);
        }
        const vf scale = 1.0f / v_power(sum, root);
        pull = pull / sum;
        for (int64_t i = at + j; i < at + n * n; i += n) {
            const vf d = v_load_some(a->dT + i, n - j) - v_load_some(a->slope + i, n - j) * pull;
            v_store_some(a->to + i, d * scale, n - j);
        }
    }
}

void ssmzoo_column_norm(const norm_args *a) { parallel_for(a->s, a->threads, forward_task, (void *)a); }
void ssmzoo_column_norm_backward(const norm_args *a) { parallel_for(a->s, a->threads, backward_task, (void *)a); }
