// Spatial-Mamba's mixer core in one pass: a raster scan with one state per channel, 25 taps on the states, the read-out.
//
//     delta_t = softplus(W dt_r + bias)     x_t = exp(delta_t A) x_{t-1} + delta_t B_t u_t
//     y_t = C_t sum over taps of weight * x[clamped neighbour] + D u_t
//
// Lanes run over channels, VL of them make a tile. A task is a batch entry and some tiles, row by row of the map: the
// states of the last eleven rows stay in cache, each continued by MARGIN copies of its border on both sides, and the row
// MARGIN above the one just scanned is read out. Rows beyond the border are the border row itself.
//
// Backwards, a tile's states are scanned anew and kept for the whole map, with the time steps and their slopes. Each row
// of dh = C dy then gives the taps' gradients and is added to the gradients g of the seven rows of states it was fused
// from, where a border's state takes what its copies on the margin would get. The scan runs in reverse over g:
//     lambda_t = g_t + exp(delta_{t+1} A) lambda_{t+1}          dB_t = sum over channels of lambda_t delta_t u_t
//     ddelta_t = lambda_t (A exp(delta_t A) x_{t-1} + B_t u_t)   du_t = lambda_t delta_t B_t + D dy_t
// The gradients before the softplus stay in cache, too: what they mean for W and dt_r are products of a few rows.
#include "gemm.h"
#include "parallel.h"
#include "tensor.h"

enum { MARGIN = 5, KEPT = 2 * MARGIN + 1, TAPS = 27, MERGED = 25, REACH = 7, BLOCK = 64, AHEAD = 12 };

typedef struct {
    // u (b l e), steps (b l r+2) = [dt_r | B | C], w (r e), bias (e), A (e), D (e), taps (27 e), y (b l e)
    tensor u, steps, w, bias, A, D, taps, y;
    // backwards: dy, du (b l e), dsteps (tasks of a batch entry, b r+2 l), l padded to vectors, and per batch entry
    // dw (b r e), dbias, dA, dD (b e), dtaps (b 27 e)
    tensor dy, du, dsteps, dw, dbias, dA, dD, dtaps;  // all float32, last axis dense
    int64_t b, e, rows, cols, r, tiles, threads;  // tiles: per task
} spatial_args;

typedef struct {
    const spatial_args *a;
    int64_t batch, first, tiles, width, rows;  // tiles [first, first + tiles); width of a kept row with its margins
    float *kept, *weights, *state;  // [tile][rows][width][VL], [tile][r + 3 + MERGED][VL], [tile][VL]
    float *raw;                     // [cols][VL], a row's time steps before bias and softplus
    float *steps;                   // [l][2][VL], time steps and the softplus's slopes there; NULL: not wanted
} spatial_task;

static int64_t all_tiles(const spatial_args *a) { return (a->e + VL - 1) / VL; }

static int64_t lanes_of(const spatial_task *t, int64_t tile) { return t->a->e - (t->first + tile) * VL; }

// The distinct taps: the centre, then the eight around it at distance 1, 3 and 5. Their rows are numbered from above.
INLINE int tap_of(int k) { return k ? (k - 1) / 8 * 9 + (k - 1) % 8 + ((k - 1) % 8 >= 4) : 4; }  // among the 27
INLINE int distance_of(int k) { return k ? (k - 1) / 8 * 2 + 1 : 0; }
INLINE int row_of(int k) { return REACH / 2 + (tap_of(k) % 9 / 3 - 1) * (distance_of(k) + 1) / 2; }
INLINE int shift_of(int k) { return (tap_of(k) % 3 - 1) * distance_of(k); }  // in columns

// Per tile: bias, A log2(e), D, r rows of W, then the distinct taps.
static void load_weights(const spatial_task *t, int64_t tile, float *to) {
    const spatial_args *a = t->a;
    const int64_t channel = (t->first + tile) * VL, lanes = lanes_of(t, tile);
    const float *w = (const float *)a->w.data + channel, *taps = (const float *)a->taps.data + channel;
    v_store(to, v_load_some((const float *)a->bias.data + channel, lanes));
    v_store(to + VL, v_load_some((const float *)a->A.data + channel, lanes) * LOG2E);
    v_store(to + 2 * VL, v_load_some((const float *)a->D.data + channel, lanes));
    for (int64_t j = 0; j < a->r; j++) v_store(to + (3 + j) * VL, v_load_some(w + j * a->e, lanes));
    to += (3 + a->r) * VL;
    for (int k = 0; k < MERGED; k++) v_store(to + k * VL, v_load_some(taps + tap_of(k) * a->e, lanes));
    for (int k = 13; k < TAPS; k += 9) v_store(to, v_load(to) + v_load_some(taps + k * a->e, lanes));
}

static float *kept_row(const spatial_task *t, int64_t tile, int64_t row) {
    const int64_t slot = t->rows == KEPT ? row % KEPT : row;  // all rows are kept otherwise
    return t->kept + (tile * t->rows + slot) * t->width * VL;
}

static void scan_row(const spatial_task *t, int64_t tile, int64_t row, const float *weights) {
    const spatial_args *a = t->a;
    const int64_t r = a->r, cols = a->cols, lanes = lanes_of(t, tile), index = t->batch * a->rows + row;
    const float *steps = (const float *)a->steps.data + index * cols * (r + 2);
    const float *u = (const float *)a->u.data + index * cols * a->e + (t->first + tile) * VL;
    float *to = kept_row(t, tile, row), *inner = to + MARGIN * VL;
    float *kept = t->steps ? t->steps + row * cols * 2 * VL : NULL;
    const vf bias = v_load(weights), rate = v_load(weights + VL);
    const gemm_t time_steps = {steps, r + 2, 1, weights + 3 * VL, VL, t->raw, VL, NULL, NULL, 0};
    gemm(&time_steps, cols, VL, r, GEMM_FULL);
    vf x = v_load(t->state + tile * VL);
    for (int64_t j = 0; j < cols; j++, steps += r + 2, u += a->e) {
        __builtin_prefetch(u + AHEAD * a->e);
        const vf raw = v_load(t->raw + j * VL) + bias;
        vf delta, slope;
        if (kept) {
            delta = v_softplus_slope(raw, &slope);
            v_store(kept + j * 2 * VL, delta);
            v_store(kept + (j * 2 + 1) * VL, slope);
        } else {
            delta = v_softplus(raw);
        }
        x = v_exp2(delta * rate) * x + delta * v_load_some(u, lanes) * steps[r];
        v_store(inner + j * VL, x);
    }
    v_store(t->state + tile * VL, x);
    for (int64_t j = 0; j < MARGIN; j++) {
        v_store(to + j * VL, v_load(inner));
        v_store(inner + (cols + j) * VL, x);
    }
}

// The seven rows that a row is fused from.
static int64_t neighbour(const spatial_task *t, int64_t row, int tap) {
    const int distances[REACH] = {-5, -3, -1, 0, 1, 3, 5};
    row += distances[tap];
    return row < 0 ? 0 : row >= t->a->rows ? t->a->rows - 1 : row;
}

static void fused_from(const spatial_task *t, int64_t tile, int64_t row, const float **x) {
    for (int i = 0; i < REACH; i++) x[i] = kept_row(t, tile, neighbour(t, row, i)) + MARGIN * VL;
}

INLINE void load_taps(vf *weight, const float *from) {
#pragma GCC unroll 25
    for (int k = 0; k < MERGED; k++) weight[k] = v_load(from + k * VL);
}

INLINE vf fuse(const vf *weight, const float *const *x, int64_t j) {
    vf sum[4] = {weight[0] * v_load(x[REACH / 2] + j * VL)};
#pragma GCC unroll 25
    for (int k = 1; k < MERGED; k++) sum[k % 4] += weight[k] * v_load(x[row_of(k)] + (j + shift_of(k)) * VL);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

static void read_out_row(const spatial_task *t, int64_t tile, int64_t row, const float *weights) {
    const spatial_args *a = t->a;
    const int64_t r = a->r, cols = a->cols, lanes = lanes_of(t, tile), index = t->batch * a->rows + row;
    const float *C = (const float *)a->steps.data + index * cols * (r + 2) + r + 1;
    const int64_t from = index * cols * a->e + (t->first + tile) * VL;
    const float *u = (const float *)a->u.data + from, *x[REACH];
    float *y = (float *)a->y.data + from;
    const vf skip = v_load(weights + 2 * VL);
    vf weight[MERGED];
    load_taps(weight, weights + (3 + r) * VL);
    fused_from(t, tile, row, x);
    for (int64_t j = 0; j < cols; j++)
        v_store_some(y + j * a->e, C[j * (r + 2)] * fuse(weight, x, j) + skip * v_load_some(u + j * a->e, lanes),
                     lanes);
}

static int64_t splits_of(const spatial_args *a) { return (all_tiles(a) + a->tiles - 1) / a->tiles; }

static int64_t weights_size(const spatial_args *a) { return (3 + a->r + MERGED) * VL; }

static spatial_task task_of(const spatial_args *a, int64_t index) {
    const int64_t splits = splits_of(a), first = index % splits * a->tiles, left = all_tiles(a) - first;
    return (spatial_task){.a = a, .batch = index / splits, .first = first, .tiles = left < a->tiles ? left : a->tiles,
                          .width = a->cols + 2 * MARGIN};
}

static void forward_task(void *context, int64_t index) {
    const spatial_args *a = context;
    const int64_t size = weights_size(a);
    spatial_task t = task_of(a, index);
    t.rows = KEPT;
    t.kept = scratch(sizeof(float) * (size_t)(t.tiles * (KEPT * t.width * VL + size + VL) + a->cols * VL));
    t.weights = t.kept + t.tiles * KEPT * t.width * VL;
    t.state = t.weights + t.tiles * size;
    t.raw = t.state + t.tiles * VL;
    memset(t.state, 0, sizeof(float) * (size_t)(t.tiles * VL));
    for (int64_t tile = 0; tile < t.tiles; tile++) load_weights(&t, tile, t.weights + tile * size);
    for (int64_t row = 0; row < a->rows + MARGIN; row++)
        for (int64_t tile = 0; tile < t.tiles; tile++) {
            if (row < a->rows) scan_row(&t, tile, row, t.weights + tile * size);
            if (row >= MARGIN) read_out_row(&t, tile, row - MARGIN, t.weights + tile * size);
        }
    free(t.kept);
}

void ssmzoo_spatial_scan_forward(const spatial_args *a) {
    if (a->e) parallel_for(a->b * splits_of(a), a->threads, forward_task, (void *)a);
}

// ---- backwards: one tile at a time, so that `tile` of the functions above is always 0 ------------------------------

typedef struct {
    float *g, *dh;      // [l][VL] gradients of states; [cols][VL] of a row of fused states, MARGIN zeros on both sides
    float *transposed;      // [VL][BLOCK] gradients of time steps
    float *dw;          // [r][VL]
    float *dsteps;      // this task's part, rows of `length` floats
    int64_t length;     // l padded to vectors
    vf tap[MERGED], bias, A, D;  // sums over the map
} gradients;

// A row of dh and, from it, the gradients of the taps and of C.
static void read_out_backward(const spatial_task *t, gradients *grad, int64_t row) {
    const spatial_args *a = t->a;
    const int64_t r = a->r, cols = a->cols, lanes = lanes_of(t, 0), index = (t->batch * a->rows + row) * cols;
    const float *C = (const float *)a->steps.data + index * (r + 2) + r + 1, *x[REACH];
    const float *dy = (const float *)a->dy.data + index * a->e + t->first * VL;
    float *dC = grad->dsteps + (r + 1) * grad->length + row * cols;
    vf weight[MERGED], tap[MERGED];
    load_taps(weight, t->weights + (3 + r) * VL);
    fused_from(t, 0, row, x);
    for (int64_t j = 0; j < cols; j++) {
        const vf here = v_load_some(dy + j * a->e, lanes);
        __builtin_prefetch(dy + (j + AHEAD) * a->e);
        v_store(grad->dh + j * VL, here * C[j * (r + 2)]);
        dC[j] += v_sum(here * fuse(weight, x, j));
    }
    load_taps(tap, (const float *)grad->tap);
    for (int64_t j = 0; j < cols; j++) {
        const vf dh = v_load(grad->dh + j * VL);
#pragma GCC unroll 25
        for (int k = 0; k < MERGED; k++) tap[k] += dh * v_load(x[row_of(k)] + (j + shift_of(k)) * VL);
        __asm__ volatile("" ::: "memory");  // or GCC keeps what the next columns need, too: too many registers
    }
#pragma GCC unroll 25
    for (int k = 0; k < MERGED; k++) grad->tap[k] = tap[k];
}

// Add a row of dh to the gradients of the states that it was fused from.
static void spread_row(const spatial_task *t, const gradients *grad, int64_t row) {
    const int64_t cols = t->a->cols;
    const float *dh = grad->dh;
    float *g[REACH];
    vf weight[MERGED];
    load_taps(weight, t->weights + (3 + t->a->r) * VL);
    for (int i = 0; i < REACH; i++) g[i] = grad->g + neighbour(t, row, i) * cols * VL;
    for (int64_t j = 0; j < cols; j++, dh += VL) {
        vf from[KEPT];  // from[MARGIN + shift]: what a tap of that shift brings to this column
#pragma GCC unroll 11
        for (int i = 0; i < KEPT; i++) from[i] = v_load(dh + (MARGIN - i) * VL);
        if (j == 0)
#pragma GCC unroll 5
            for (int i = MARGIN - 1; i >= 0; i--) from[i] += from[i + 1];
        if (j == cols - 1) {
            vf sum = v_load(dh);
#pragma GCC unroll 5
            for (int i = 1; i <= MARGIN; i++) from[MARGIN + i] = sum += v_load(dh - i * VL);
        }
        vf sum[REACH] = {{0}};
#pragma GCC unroll 25
        for (int k = 0; k < MERGED; k++) sum[row_of(k)] += weight[k] * from[MARGIN + shift_of(k)];
#pragma GCC unroll 7
        for (int i = 0; i < REACH; i++) v_store(g[i] + j * VL, v_load(g[i] + j * VL) + sum[i]);
    }
}

// In reverse; the gradients before the softplus take the place of the time steps.
static void scan_backward(const spatial_task *t, gradients *grad) {
    const spatial_args *a = t->a;
    const int64_t r = a->r, cols = a->cols, lanes = lanes_of(t, 0), length = a->rows * cols, start = t->batch * length;
    const float *B = (const float *)a->steps.data + start * (r + 2) + r;
    const int64_t from = start * a->e + t->first * VL;
    const float *u = (const float *)a->u.data + from, *dy = (const float *)a->dy.data + from;
    float *du = (float *)a->du.data + from, *dB = grad->dsteps + r * grad->length;
    const vf rate = v_load(t->weights + VL), A = rate / LOG2E, skip = v_load(t->weights + 2 * VL);
    vf carried = {0};
    for (int64_t row = a->rows - 1; row >= 0; row--) {
        const float *x = kept_row(t, 0, row) + MARGIN * VL, *above = row ? x - (2 * MARGIN + 1) * VL : t->state;
        for (int64_t j = cols - 1, i = row * cols + j; j >= 0; j--, i--) {
            __builtin_prefetch(u + (i - AHEAD) * a->e);
            __builtin_prefetch(dy + (i - AHEAD) * a->e);
            __builtin_prefetch(du + (i - AHEAD) * a->e, 1);
            float *step = t->steps + i * 2 * VL;
            const vf delta = v_load(step), slope = v_load(step + VL), before = v_load(j ? x + (j - 1) * VL : above);
            const vf here = v_load_some(u + i * a->e, lanes), out = v_load_some(dy + i * a->e, lanes);
            const vf lambda = v_load(grad->g + i * VL) + carried, stepped = lambda * delta;
            carried = v_exp2(delta * rate) * lambda;
            const vf kept = carried * before, change = (kept * A + lambda * here * B[i * (r + 2)]) * slope;
            grad->A += kept * delta;
            grad->D += out * here;
            grad->bias += change;
            dB[i] += v_sum(stepped * here);
            v_store(step, change);
            v_store_some(du + i * a->e, stepped * B[i * (r + 2)] + skip * out, lanes);
        }
    }
}

// The gradients of dt_r and W.
static void steps_backward(const spatial_task *t, const gradients *grad) {
    const int64_t r = t->a->r, length = t->a->rows * t->a->cols;
    const float *steps = (const float *)t->a->steps.data + t->batch * length * (r + 2);
    for (int64_t i = 0; i < length; i += BLOCK) {
        const int64_t n = length - i < BLOCK ? length - i : BLOCK, np = padded(n);
        const float *change = t->steps + i * 2 * VL;
        float *ddt = grad->dsteps + i;
        transpose(change, 2 * VL, n, VL, grad->transposed, np);
        const gemm_t to_dt = {t->weights + 3 * VL, VL, 1, grad->transposed, np, ddt, grad->length, NULL, ddt, 1};
        gemm(&to_dt, r, np, VL, GEMM_FULL);
        const gemm_t to_w = {steps + i * (r + 2), 1, r + 2, change, 2 * VL, grad->dw, VL, NULL, grad->dw, 1};
        gemm(&to_w, r, VL, n, GEMM_FULL);
    }
}

static void store_sums(const spatial_task *t, const gradients *grad) {
    const spatial_args *a = t->a;
    const int64_t lanes = lanes_of(t, 0), channel = t->batch * a->e + t->first * VL;
    float *taps = (float *)a->dtaps.data + t->batch * TAPS * a->e + t->first * VL;
    float *w = (float *)a->dw.data + t->batch * a->r * a->e + t->first * VL;
    for (int64_t j = 0; j < a->r; j++) v_store_some(w + j * a->e, v_load(grad->dw + j * VL), lanes);
    v_store_some((float *)a->dbias.data + channel, grad->bias, lanes);
    v_store_some((float *)a->dA.data + channel, grad->A, lanes);
    v_store_some((float *)a->dD.data + channel, grad->D, lanes);
    for (int k = 0; k < MERGED; k++) v_store_some(taps + tap_of(k) * a->e, grad->tap[k], lanes);
    for (int k = 13; k < TAPS; k += 9) v_store_some(taps + k * a->e, grad->tap[0], lanes);
}

static void backward_task(void *context, int64_t index) {
    const spatial_args *a = context;
    const int64_t length = a->rows * a->cols, last = task_of(a, index).tiles, padded_cols = a->cols + 2 * MARGIN;
    spatial_task t = task_of(a, index);
    t.rows = a->rows;
    const int64_t vectors = t.rows * t.width + 3 * length + padded_cols + a->cols + BLOCK + a->r + 1;
    t.kept = scratch(sizeof(float) * (size_t)(vectors * VL + weights_size(a)));
    t.steps = t.kept + t.rows * t.width * VL;
    gradients grad = {.length = padded(length)};
    grad.g = t.steps + 2 * length * VL;
    grad.dh = grad.g + (length + MARGIN) * VL;
    grad.transposed = grad.dh + (a->cols + MARGIN) * VL;
    grad.dw = grad.transposed + BLOCK * VL;
    t.raw = grad.dw + a->r * VL;
    t.state = t.raw + a->cols * VL;
    t.weights = t.state + VL;
    const int64_t part = (a->r + 2) * grad.length;
    grad.dsteps = (float *)a->dsteps.data + (index % splits_of(a) * a->b + t.batch) * part;
    memset(grad.dsteps, 0, sizeof(float) * (size_t)part);
    for (int64_t tile = 0; tile < last; tile++, t.first++) {
        memset(grad.g, 0, sizeof(float) * (size_t)((length + padded_cols) * VL));
        memset(grad.dw, 0, sizeof(float) * (size_t)(a->r * VL));
        memset(grad.tap, 0, sizeof grad.tap);
        grad.bias = grad.A = grad.D = (vf){0};
        memset(t.state, 0, sizeof(float) * VL);
        load_weights(&t, 0, t.weights);
        for (int64_t row = 0; row < a->rows; row++) scan_row(&t, 0, row, t.weights);
        for (int64_t row = 0; row < a->rows; row++) {
            read_out_backward(&t, &grad, row);
            spread_row(&t, &grad, row);
        }
        memset(t.state, 0, sizeof(float) * VL);
        scan_backward(&t, &grad);
        steps_backward(&t, &grad);
        store_sums(&t, &grad);
    }
    free(t.kept);
}

void ssmzoo_spatial_scan_backward(const spatial_args *a) {
    if (a->e) parallel_for(a->b * splits_of(a), a->threads, backward_task, (void *)a);
}
