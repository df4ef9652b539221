// Activations behind a linear map, and the gradients of its weights. All fp32, contiguous:
//
//     y = act(h)     dh = dy act'(h), from h or, for ReLU, from y     dW = dh^T x     dbias = sum over rows of dh
//
// The exact GELU takes its normal distribution from Abramowitz & Stegun 7.1.26, whose exponential is the density that
// the gradient needs (error 8e-8).
#include "parallel.h"
#include "vec.h"

enum { NONE, GELU, RELU, SILU };
enum { SHARE = 1 << 14, DEPTH = 256, WIDTH = 192 };  // elements per task; rows of dh and x at a time; columns of dh at a time
enum { STRIP = VL == 4 ? VL : VL / 4 * 3, PANEL = 2 * VL };  // columns of dh and of x whose products fill the registers

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
    float *dh, *dW, *dbias;       // (rows, e), or NULL without act; (parts, e, d); (parts, e)
    int64_t rows, e, d, act, parts, columns, threads;  // parts: of the rows; columns: of dh per task
} linear_args;

// dW's factors lie in cache as a product in registers reads them: strips of dh [strip][row][STRIP], panels of x [panel][row][PANEL].
// What the next ones are made from is called into the cache meanwhile.
enum { STRIP_SIZE = DEPTH * STRIP + VL, PANEL_SIZE = DEPTH * PANEL + VL, LINE = 16, EVERY = 8 };
typedef struct { const float *from; int64_t rows, width, gap; } region;
typedef struct { region of[3]; int now; int64_t column; } ahead;

INLINE void call_line(ahead *h) {
    if (h->now == 3) return;
    region *r = h->of + h->now;
    if (!r->rows) { h->now++; return; }
    __builtin_prefetch(r->from + h->column, 0, 2);
    h->column += LINE;
    if (h->column >= r->width) h->column = 0, r->from += r->gap, r->rows--;
}

INLINE void multiply_tile(vf (*sum)[2], const float *strip, const float *panel, int64_t K, ahead *h) {
#pragma GCC unroll 12
    for (int i = 0; i < STRIP; i++) sum[i][0] = sum[i][1] = (vf){0};
    for (int64_t k = 0; k < K; k++, strip += STRIP, panel += PANEL) {
        if (k % EVERY == 0) call_line(h);
        const vf left = v_load(panel), right = v_load(panel + VL);
#pragma GCC unroll 12
        for (int i = 0; i < STRIP; i++) sum[i][0] += strip[i] * left, sum[i][1] += strip[i] * right;
    }
}

// C (STRIP PANEL) = or += a strip times a panel
static void whole_tile(float *C, int64_t ldc, const float *strip, const float *panel, int64_t K, int add, ahead *h) {
    vf sum[STRIP][2];
    for (int i = 0; add && i < STRIP; i++) {
        __builtin_prefetch(C + i * ldc, 1);
        __builtin_prefetch(C + i * ldc + PANEL - 1, 1);
    }
    multiply_tile(sum, strip, panel, K, h);
#pragma GCC unroll 12
    for (int i = 0; i < STRIP; i++)
        for (int v = 0; v < 2; v++) {
            float *c = C + i * ldc + v * VL;
            v_store(c, add ? v_load(c) + sum[i][v] : sum[i][v]);
        }
}

static void edge_tile(float *C, int64_t ldc, int64_t M, int64_t N, const float *strip, const float *panel, int64_t K, int add,
                      ahead *h) {
    vf sum[STRIP][2];
    multiply_tile(sum, strip, panel, K, h);
    for (int64_t i = 0; i < M; i++)
        for (int64_t n = 0; n < N; n++) {
            const float here = sum[i][n / VL][n % VL];
            C[i * ldc + n] = add ? C[i * ldc + n] + here : here;
        }
}

INLINE void slope_line(float *dh, const float *dy, const float *saved, float *sum, int64_t size, const int64_t act) {
    for (int64_t i = 0; i < size; i += VL) {
        vf g = v_load_some(dy + i, size - i);
        if (act != NONE) {
            g *= v_act_slope(v_load_some(saved + i, size - i), act);
            v_store_some(dh + i, g, size - i);
        }
        v_store_some(sum + i, v_load_some(sum + i, size - i) + g, size - i);
    }
}

// Rows of M columns of dh, from `corner` on: computed, added to `sum`, and as strips.
static void make_strips(const linear_args *a, int64_t corner, int64_t M, int64_t K, float *sum, float *strips) {
    const float *dh = (a->act == NONE ? a->dy : a->dh) + corner;
    for (int64_t k = 0; k < K; k++, corner += a->e, dh += a->e, strips += STRIP) {
        const float *dy = a->dy + corner, *saved = a->saved + corner;
        if (a->act == GELU) slope_line(a->dh + corner, dy, saved, sum, M, GELU);
        else if (a->act == RELU) slope_line(a->dh + corner, dy, saved, sum, M, RELU);
        else if (a->act == SILU) slope_line(a->dh + corner, dy, saved, sum, M, SILU);
        else slope_line(NULL, dy, NULL, sum, M, NONE);
        float *to = strips;  // what is stored beyond a strip's row, its next one overwrites
        for (int64_t m = 0; m < M; m += STRIP, to += STRIP_SIZE) v_store(to, v_load_some(dh + m, M - m));
    }
}

static void make_panels(const linear_args *a, int64_t row, int64_t K, float *panels) {
    const float *x = a->x + row * a->d;
    for (int64_t k = 0; k < K; k++, x += a->d, panels += PANEL)
        for (int64_t n = 0; n < a->d; n += PANEL) {
            float *to = panels + n / PANEL * PANEL_SIZE;
            v_store(to, v_load_some(x + n, a->d - n));
            v_store(to + VL, a->d > n + VL ? v_load_some(x + n + VL, a->d - n - VL) : v_set(0.0f));
        }
}

static region region_of(const float *rows, int64_t row, int64_t count, int64_t first, int64_t width, int64_t gap) {
    return (region){rows ? rows + row * gap + first : NULL, rows ? count : 0, width, gap};
}

// A task has a part of dh to itself, some rows and columns: while they are in cache, they are computed, summed, multiplied.
static void backward_task(void *context, int64_t index) {
    const linear_args *a = context;
    const int64_t splits = (a->e + a->columns - 1) / a->columns, part = index / splits, d = a->d;
    const int64_t left = index % splits * a->columns, right = left + a->columns < a->e ? left + a->columns : a->e;
    const int64_t start = a->rows * part / a->parts, end = a->rows * (part + 1) / a->parts;
    const int64_t blocks = (end - start + DEPTH - 1) / DEPTH, panels = (d + PANEL - 1) / PANEL;
    const int64_t strips = (WIDTH + STRIP - 1) / STRIP;
    float *strip = scratch(sizeof(float) * (size_t)(strips * STRIP_SIZE + panels * PANEL_SIZE + WIDTH));
    float *panel = strip + strips * STRIP_SIZE, *sum = panel + panels * PANEL_SIZE, *dbias = a->dbias + part * a->e;
    memset(dbias + left, 0, sizeof(float) * (size_t)(right - left));
    if (!blocks) memset(a->dW + (part * a->e + left) * d, 0, sizeof(float) * (size_t)((right - left) * d));
    for (int64_t block = 0; block < blocks; block++) {  // of equal sizes
        const int64_t row = start + (end - start) * block / blocks, K = start + (end - start) * (block + 1) / blocks - row;
        make_panels(a, row, K, panel);
        for (int64_t first = left; first < right; first += WIDTH) {
            const int64_t M = first + WIDTH < right ? WIDTH : right - first, last = first + WIDTH >= right;
            memset(sum, 0, sizeof(float) * WIDTH);
            make_strips(a, row * a->e + first, M, K, sum, strip);
            for (int64_t m = 0; m < M; m++) dbias[first + m] += sum[m];
            const int64_t then = last ? left : first + WIDTH, width = then + WIDTH < right ? WIDTH : right - then;
            const int64_t below = last ? row + K : row, count = below + K < end ? K : end - below;
            ahead h = {{region_of(a->dy, below, count, then, width, a->e), region_of(a->saved, below, count, then, width, a->e),
                        region_of(last ? a->x : NULL, below, count, 0, d, d)}, 0, 0};
            for (int64_t n = 0; n < panels; n++)
                for (int64_t m = 0; m < M; m += STRIP) {
                    float *C = a->dW + (part * a->e + first + m) * d + n * PANEL;
                    const float *A = strip + m / STRIP * STRIP_SIZE, *B = panel + n * PANEL_SIZE;
                    const int64_t high = M - m, wide = d - n * PANEL;
                    if (high >= STRIP && wide >= PANEL) whole_tile(C, d, A, B, K, block > 0, &h);
                    else edge_tile(C, d, high < STRIP ? high : STRIP, wide < PANEL ? wide : PANEL, A, B, K, block > 0, &h);
                }
        }
    }
    free(strip);
}

void ssmzoo_linear_backward(const linear_args *a) {
    const int64_t splits = (a->e + a->columns - 1) / a->columns;
    parallel_for(a->parts * splits, a->threads, backward_task, (void *)a);
}
