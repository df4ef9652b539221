// Structure-aware state fusion: 3 x 9 taps of dilation 1, 3 and 5 on a map continued by its border; the three centres
// are one tap, which leaves 25.
//
// A task is some channels of one image: each map is copied into a plane with MARGIN more elements on every side, after
// which every tap is a shifted read. Backwards, the gradient of that plane is the mirrored sum on a plane of dy, and
// what fell on the margin is added to the border; the taps' gradients are 27 inner products. Rows follow each other
// without gaps: what a vector reads or writes beyond the end of a row is not used, or overwritten by the next row.
#include "parallel.h"
#include "vec.h"

enum { MARGIN = 5, TAPS = 27, MERGED = 25, TASK_ELEMENTS = 8192 };
enum { b_, d_, h_, w_, threads_, SIZES };

typedef struct {
    const int64_t *z;
    const float *x, *weight, *dy;  // (b d h w), (d 27), (b d h w)
    float *y, *dx, *dweight;       // (b d h w), (b d h w), (b d 27)
} fusion_t;

static int64_t clamp(int64_t i, int64_t end) { return i < 0 ? 0 : i >= end ? end - 1 : i; }
static float *plane_for(int64_t rows, int64_t ld) {  // zeros; may be over-read by four vectors
    const size_t size = (rows * ld + 4 * VL) * sizeof(float);
    return memset(scratch(size), 0, size);
}

// offset[t] of tap t from the centre, in a plane with rows of ld
static void offsets(int64_t ld, int64_t *offset) {
    for (int t = 0; t < TAPS; t++) offset[t] = (2 * (t / 9) + 1) * ((t % 9 / 3 - 1) * ld + t % 3 - 1);
}

// The 25 distinct taps of 27, the centre first; mirrored: the weight of the opposite tap.
static void merge(const float *weight, const int64_t *offset, int mirrored, float *w25, int64_t *o25) {
    w25[0] = weight[4] + weight[13] + weight[22];
    o25[0] = 0;
    for (int t = 0, k = 1; t < TAPS; t++) {
        if (t % 9 == 4) continue;
        w25[k] = weight[mirrored ? t / 9 * 9 + 8 - t % 9 : t];
        o25[k++] = offset[t];
    }
}

static void continue_map(const float *x, int64_t h, int64_t w, float *plane) {
    const int64_t ld = w + 2 * MARGIN;
    for (int64_t i = 0; i < h + 2 * MARGIN; i++) {
        const float *from = x + clamp(i - MARGIN, h) * w;
        float *to = plane + i * ld;
        for (int64_t j = 0; j < MARGIN; j++) { to[j] = from[0]; to[MARGIN + w + j] = from[w - 1]; }
        for (int64_t j = 0; j < w; j++) to[MARGIN + j] = from[j];
    }
}

// to[r][c] = sum over the taps of weight * from[r][c + offset] for c < n, with rows of n
static void sum_taps(const float *from, int64_t ld, const int64_t *offset, const float *weight, int64_t rows, int64_t n,
                     float *to) {
    float line[4 * VL];
    if (n <= 2 * VL) {
        vf w[MERGED];
        for (int t = 0; t < MERGED; t++) w[t] = v_set(weight[t]);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < n; j += VL) {
                const float *at = from + r * ld + j;
                vf even = w[0] * v_load(at), odd = {0};
#pragma GCC unroll 12
                for (int t = 1; t < MERGED; t += 2) {
                    even += w[t] * v_load(at + offset[t]);
                    odd += w[t + 1] * v_load(at + offset[t + 1]);
                }
                if (r * n + j + VL <= rows * n) v_store(to + r * n + j, even + odd);
                else {
                    v_store(line, even + odd);
                    memcpy(to + r * n + j, line, (n - j < VL ? n - j : VL) * sizeof(float));
                }
            }
        return;
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < n; j += 4 * VL) {
            const float *at = from + r * ld + j;
            vf sum[4] = {{0}};
            for (int t = 0; t < MERGED; t++)
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++) sum[v] += weight[t] * v_load(at + offset[t] + v * VL);
            const int fits = r * n + j + 4 * VL <= rows * n;
            float *out = fits ? to + r * n + j : line;
            for (int v = 0; v < 4; v++) v_store(out + v * VL, sum[v]);
            if (!fits) memcpy(to + r * n + j, line, (n - j < 4 * VL ? n - j : 4 * VL) * sizeof(float));
        }
}

static int64_t maps_per_task(const fusion_t *f) {
    const int64_t maps = TASK_ELEMENTS / (f->z[h_] * f->z[w_]);
    return maps > 1 ? maps : 1;
}

static void forward_task(void *context, int64_t task) {
    const fusion_t *f = context;
    const int64_t h = f->z[h_], w = f->z[w_], ld = w + 2 * MARGIN, maps = maps_per_task(f), end = f->z[b_] * f->z[d_];
    float *plane = plane_for(h + 2 * MARGIN, ld), weight[MERGED];
    int64_t offset[TAPS], merged[MERGED];
    offsets(ld, offset);
    for (int64_t i = task * maps; i < (task + 1) * maps && i < end; i++) {
        continue_map(f->x + i * h * w, h, w, plane);
        merge(f->weight + i % f->z[d_] * TAPS, offset, 0, weight, merged);
        sum_taps(plane + MARGIN * ld + MARGIN, ld, merged, weight, h, w, f->y + i * h * w);
    }
    free(plane);
}

// dx from the gradient of the continued map, rows of w + 2 MARGIN
static void fold(const float *padded, int64_t h, int64_t w, float *dx) {
    const int64_t ld = w + 2 * MARGIN;
    memset(dx, 0, h * w * sizeof(float));
    for (int64_t r = 0; r < h + 2 * MARGIN; r++) {
        const float *from = padded + r * ld;
        float *to = dx + clamp(r - MARGIN, h) * w;
        for (int64_t j = 0; j < w; j++) to[j] += from[MARGIN + j];
        for (int64_t j = 0; j < MARGIN; j++) { to[0] += from[j]; to[w - 1] += from[MARGIN + w + j]; }
    }
}

static void weight_gradients(const float *x, int64_t ldx, const int64_t *offset, const float *dy, int64_t ldy,
                             int64_t h, int64_t w, float *dweight) {
    for (int k = 0; k < 3; k++, offset += 9, dweight += 9) {
        vf sum[9] = {{0}};
        for (int64_t r = 0; r < h; r++)
            for (int64_t j = 0; j < w; j += VL) {
                const vf here = v_load(dy + r * ldy + j);  // zeros follow every row
#pragma GCC unroll 9
                for (int t = 0; t < 9; t++) sum[t] += here * v_load(x + r * ldx + j + offset[t]);
            }
        for (int t = 0; t < 9; t++) dweight[t] = v_sum(sum[t]);
    }
}

static void backward_task(void *context, int64_t task) {
    const fusion_t *f = context;
    const int64_t h = f->z[h_], w = f->z[w_], maps = maps_per_task(f), end = f->z[b_] * f->z[d_];
    const int64_t ldx = w + 2 * MARGIN, ldy = w + 4 * MARGIN;  // dy lies within 2 MARGIN zeros
    float *x = plane_for(h + 2 * MARGIN, ldx), *sums = plane_for(h + 2 * MARGIN, ldx);
    float *dy = plane_for(h + 4 * MARGIN, ldy);
    float weight[MERGED];
    int64_t at_x[TAPS], at_dy[TAPS], merged[MERGED];
    offsets(ldx, at_x);
    offsets(ldy, at_dy);
    for (int64_t i = task * maps; i < (task + 1) * maps && i < end; i++) {
        float *inner = dy + 2 * MARGIN * ldy + 2 * MARGIN;
        for (int64_t r = 0; r < h; r++)
            for (int64_t j = 0; j < w; j++) inner[r * ldy + j] = f->dy[(i * h + r) * w + j];
        merge(f->weight + i % f->z[d_] * TAPS, at_dy, 1, weight, merged);
        sum_taps(dy + MARGIN * ldy + MARGIN, ldy, merged, weight, h + 2 * MARGIN, ldx, sums);
        fold(sums, h, w, f->dx + i * h * w);
        continue_map(f->x + i * h * w, h, w, x);
        weight_gradients(x + MARGIN * ldx + MARGIN, ldx, at_x, inner, ldy, h, w, f->dweight + i * TAPS);
    }
    free(sums);
    free(dy);
    free(x);
}

static int64_t tasks(const fusion_t *f) {
    const int64_t maps = maps_per_task(f);
    return (f->z[b_] * f->z[d_] + maps - 1) / maps;
}

// arguments: the sizes, then the pointers x weight | y
void ssmzoo_state_fusion_forward(const int64_t *sizes) {
    void *const *p = (void *const *)(sizes + SIZES);
    fusion_t f = {.z = sizes, .x = p[0], .weight = p[1], .y = p[2]};
    parallel_for(tasks(&f), sizes[threads_], forward_task, &f);
}

// arguments: the sizes, then the pointers x weight dy | dx dweight
void ssmzoo_state_fusion_backward(const int64_t *sizes) {
    void *const *p = (void *const *)(sizes + SIZES);
    fusion_t f = {.z = sizes, .x = p[0], .weight = p[1], .dy = p[2], .dx = p[3], .dweight = p[4]};
    parallel_for(tasks(&f), sizes[threads_], backward_task, &f);
}
