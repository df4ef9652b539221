// Depthwise 3x3 convolution of a channels-last map with zeros around it, stride 1 or 2, and the activation behind it.
//
// Lanes run over channels, VL of them make a tile. A task is a batch entry and some tiles, row by row of the result:
// the three rows of x that it needs are kept in cache, tile by tile and with a zero on both sides, and a window of 3x3
// vectors slides along them in registers. Meanwhile the next row of x, and of y or dy, is called into the cache: tile
// by tile, memory is read in strides, which no hardware foresees as well.
//
// Backwards, the same window gives the sum before the activation anew, its gradient g = dy act'(sum), those of the nine
// taps, window * g, and what g adds to the window's own gradient, which slides along three more rows; rows that no
// further window touches are handed over as dx.
#include "parallel.h"
#include "tensor.h"

enum { KEPT = 3, TAPS = 9, SUMS = TAPS + 1 };
enum { NONE, SILU, RELU };

typedef struct {
    // x (b h w d), taps (9 d), bias (d) or NULL, y (b h' w' d); backwards: dy like y, dx like x, and per batch entry
    // the gradients of taps and bias, sums (b 10 d); all float32, channels dense
    tensor x, taps, bias, y, dy, dx, sums;
    int64_t b, h, w, d, stride, act, rectify, tiles, threads;  // rectify: relu(x) for x; tiles: per task
} conv_args;

typedef struct {
    const conv_args *a;
    int64_t batch, channel, tiles, width;  // the first channel; width of a kept row with its margins
    float *taps, *sums;                    // [tiles][10][VL]: taps and bias, their gradients
    float *x, *dx;                         // [KEPT][tiles][width][VL]
} conv_task;

static int64_t splits_of(const conv_args *a) {
    const int64_t all = (a->d + VL - 1) / VL;
    return (all + a->tiles - 1) / a->tiles;
}

static int64_t row_size(const conv_task *t) { return t->tiles * t->width * VL; }
static float *kept_row(const conv_task *t, float *rows, int64_t row) {
    return rows + (row + KEPT) % KEPT * row_size(t);
}
static float *row_of(const tensor *of, const conv_task *t, int64_t row) {
    return (float *)at(of, t->batch, row, 0) + t->channel;
}

// With its scratch memory, to be freed by t.taps: zeros but for the taps.
static conv_task task_of(const conv_args *a, int64_t index, int backward) {
    const int64_t first = index % splits_of(a) * a->tiles, left = (a->d + VL - 1) / VL - first;
    conv_task t = {.a = a, .batch = index / splits_of(a), .channel = first * VL,
                   .tiles = left < a->tiles ? left : a->tiles, .width = a->w + 2};
    const int64_t taps = t.tiles * SUMS * VL, rows = KEPT * row_size(&t);
    const size_t size = sizeof(float) * (size_t)(1 + backward) * (taps + rows);
    t.taps = memset(scratch(size), 0, size);
    t.x = t.taps + taps;
    t.dx = backward ? t.x + rows : NULL;
    t.sums = backward ? t.dx + rows : NULL;
    for (int64_t tile = 0; tile < t.tiles; tile++)
        for (int64_t k = 0; k < SUMS; k++) {
            const float *from = k < TAPS ? (const float *)a->taps.data + k * a->d : (const float *)a->bias.data;
            const int64_t channel = t.channel + tile * VL;
            if (from) v_store(t.taps + (tile * SUMS + k) * VL, v_load_some(from + channel, a->d - channel));
        }
    return t;
}

static void fetch_row(const conv_task *t, int64_t row) {
    const conv_args *a = t->a;
    float *to = kept_row(t, t->x, row);
    if (row < 0 || row >= a->h) {
        memset(to, 0, sizeof(float) * (size_t)row_size(t));
        return;
    }
    const float *from = row_of(&a->x, t, row);
    for (int64_t j = 0; j < a->w; j++, from += a->x.stride[2])
        for (int64_t tile = 0; tile < t->tiles; tile++) {
            const vf x = v_load_some(from + tile * VL, a->d - t->channel - tile * VL);
            v_store(to + (tile * t->width + j + 1) * VL, a->rectify ? v_at_least(x, 0.0f) : x);
        }
}

static void hand_over_row(const conv_task *t, int64_t row) {
    const conv_args *a = t->a;
    if (row < 0 || row >= a->h) return;
    const float *from = kept_row(t, t->dx, row), *x = kept_row(t, t->x, row);
    float *to = row_of(&a->dx, t, row);
    for (int64_t j = 0; j < a->w; j++, to += a->dx.stride[2])
        for (int64_t tile = 0; tile < t->tiles; tile++) {
            const int64_t here = (tile * t->width + j + 1) * VL;
            vf dx = v_load(from + here);
            if (a->rectify) dx = v_select(v_load(x + here) > 0.0f, dx, v_set(0.0f));
            v_store_some(to + tile * VL, dx, a->d - t->channel - tile * VL);
        }
}

// One line of the result, a tile of channels wide.
typedef struct {
    const float *taps, *x[3];  // taps and bias; the rows of the window, from their left margin on
    float *dx[3], *sums;
    int64_t lanes, columns;  // of the result
    const float *below;      // the next row of x
    int64_t x_step, y_down;  // between its columns; from a row of y or dy to the next
} line;

static line line_of(const conv_task *t, int64_t row, int64_t tile) {
    const conv_args *a = t->a;
    line l = {.taps = t->taps + tile * SUMS * VL, .lanes = a->d - t->channel - tile * VL,
              .columns = (a->w - 1) / a->stride + 1, .below = row_of(&a->x, t, row + 2) + tile * VL,
              .x_step = a->x.stride[2], .y_down = t->dx ? a->dy.stride[1] : a->y.stride[1]};
    for (int k = 0; k < 3; k++) l.x[k] = kept_row(t, t->x, row * a->stride + k - 1) + tile * t->width * VL;
    if (!t->dx) return l;
    for (int k = 0; k < 3; k++) l.dx[k] = kept_row(t, t->dx, row * a->stride + k - 1) + tile * t->width * VL;
    l.sums = t->sums + tile * SUMS * VL;
    return l;
}

INLINE void load_sums(vf *to, const float *from) {
#pragma GCC unroll 10
    for (int k = 0; k < SUMS; k++) to[k] = v_load(from + k * VL);
}

INLINE vf sum_window(const vf *taps, const vf *window) {
    vf sum[3] = {taps[TAPS], {0}, {0}};
#pragma GCC unroll 9
    for (int k = 0; k < TAPS; k++) sum[k / 3] += taps[k] * window[k];
    return sum[0] + sum[1] + sum[2];
}

// The vector of a window's row that lies `at` columns from the left margin; rows not begun are zeros.
INLINE vf window_at(const float *const *rows, int row, int64_t at, int begun) {
    return row < begun ? v_load(rows[row] + at * VL) : v_set(0.0f);
}

// Move a window on by `stride` columns, to where its left one is `column`; `begin` prepares for the first time.
INLINE void slide(vf *window, const float *const *rows, int64_t column, int stride, int begun) {
#pragma GCC unroll 3
    for (int row = 0; row < 3; row++)
#pragma GCC unroll 3
        for (int k = 0; k < 3; k++)
            window[3 * row + k] = k + stride < 3 ? window[3 * row + k + stride]
                                                 : window_at(rows, row, column + k, begun);
}
INLINE void begin(vf *window, const float *const *rows, int stride, int begun) {
    for (int row = 0; row < 3; row++)
        for (int k = stride; k < 3; k++) window[3 * row + k] = window_at(rows, row, k - stride, begun);
}

INLINE void forward_line(const line *l, float *y, int64_t step, int stride, int act) {
    vf window[TAPS], taps[SUMS];
    load_sums(taps, l->taps);
    begin(window, l->x, stride, 3);
    for (int64_t j = 0; j < l->columns; j++, y += step) {
        slide(window, l->x, j * stride, stride, 3);
        if (stride == 1) {
            __builtin_prefetch(l->below + j * l->x_step);
            __builtin_prefetch(y + l->y_down, 1);
        }
        vf sum = sum_window(taps, window);
        if (act == SILU) sum *= v_sigmoid(sum);
        if (act == RELU) sum = v_at_least(sum, 0.0f);
        v_store_some(y, sum, l->lanes);
    }
}

INLINE void backward_line(const line *l, const float *dy, int64_t step, int stride, int act) {
    const int begun = 3 - stride;  // rows of dx that the line above has added to
    vf window[TAPS], dwindow[TAPS], taps[SUMS], sums[SUMS];
    load_sums(taps, l->taps);
    load_sums(sums, l->sums);
    begin(window, l->x, stride, 3);
    begin(dwindow, (const float *const *)l->dx, stride, begun);
    for (int64_t j = 0; j < l->columns; j++, dy += step) {
        slide(window, l->x, j * stride, stride, 3);
        slide(dwindow, (const float *const *)l->dx, j * stride, stride, begun);
        if (stride == 1) __builtin_prefetch(l->below + j * l->x_step);
        __builtin_prefetch(dy + l->y_down);
        vf g = v_load_some(dy, l->lanes);
        if (act != NONE) {
            const vf y = sum_window(taps, window);
            if (act == SILU) {
                const vf s = v_sigmoid(y);
                g *= s + y * (s - s * s);
            } else g = v_select(y > 0.0f, g, v_set(0.0f));
        }
#pragma GCC unroll 9
        for (int k = 0; k < TAPS; k++) {
            sums[k] += g * window[k];
            dwindow[k] += g * taps[k];
        }
        sums[TAPS] += g;
#pragma GCC unroll 3
        for (int row = 0; row < 3; row++)
#pragma GCC unroll 3
            for (int k = 0; k < stride; k++) v_store(l->dx[row] + (j * stride + k) * VL, dwindow[3 * row + k]);
    }
    for (int row = 0; row < 3; row++)
        for (int k = stride; k < 3; k++)
            v_store(l->dx[row] + ((l->columns - 1) * stride + k) * VL, dwindow[3 * row + k]);
    for (int k = 0; k < SUMS; k++) v_store(l->sums + k * VL, sums[k]);
}

// Call a line's function with stride and activation known to the compiler.
#define SPECIALISED(a, function, ...)                                                  \
    do {                                                                               \
        if (a->stride == 1 && a->act == NONE) function(__VA_ARGS__, 1, NONE);          \
        else if (a->stride == 1 && a->act == SILU) function(__VA_ARGS__, 1, SILU);     \
        else if (a->stride == 1) function(__VA_ARGS__, 1, RELU);                       \
        else if (a->act == NONE) function(__VA_ARGS__, 2, NONE);                       \
        else if (a->act == SILU) function(__VA_ARGS__, 2, SILU);                       \
        else function(__VA_ARGS__, 2, RELU);                                           \
    } while (0)

static void forward_task(void *context, int64_t index) {
    const conv_args *a = context;
    conv_task t = task_of(a, index, 0);
    fetch_row(&t, 0);
    for (int64_t i = 0, next = 1; i * a->stride < a->h; i++) {
        for (; next <= i * a->stride + 1; next++) fetch_row(&t, next);
        for (int64_t tile = 0; tile < t.tiles; tile++) {
            const line l = line_of(&t, i, tile);
            SPECIALISED(a, forward_line, &l, row_of(&a->y, &t, i) + tile * VL, a->y.stride[2]);
        }
    }
    free(t.taps);
}

static void backward_task(void *context, int64_t index) {
    const conv_args *a = context;
    conv_task t = task_of(a, index, 1);
    int64_t next = 0, done = 0, row = 0;
    for (; row * a->stride < a->h; row++) {
        for (; next <= row * a->stride + 1; next++) fetch_row(&t, next);
        for (int64_t tile = 0; tile < t.tiles; tile++) {
            const line l = line_of(&t, row, tile);
            SPECIALISED(a, backward_line, &l, row_of(&a->dy, &t, row) + tile * VL, a->dy.stride[2]);
        }
        for (; done < (row + 1) * a->stride - 1; done++) hand_over_row(&t, done);
    }
    for (; done < a->h; done++) hand_over_row(&t, done);
    for (int64_t tile = 0; tile < t.tiles; tile++)
        for (int k = 0; k < SUMS; k++) {
            const int64_t channel = t.channel + tile * VL;
            v_store_some((float *)at(&a->sums, t.batch, k, 0) + channel, v_load(t.sums + (tile * SUMS + k) * VL),
                         a->d - channel);
        }
    free(t.taps);
}

void ssmzoo_depthwise_conv2d_forward(const conv_args *a) {
    parallel_for(a->b * splits_of(a), a->threads, forward_task, (void *)a);
}

void ssmzoo_depthwise_conv2d_backward(const conv_args *a) {
    parallel_for(a->b * splits_of(a), a->threads, backward_task, (void *)a);
}
