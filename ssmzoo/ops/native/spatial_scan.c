// Spatial-Mamba's mixer core in one pass: a raster scan with one state per channel, 25 taps on the states, the read-out.
//
//     delta_t = softplus(W dt_r + bias)     x_t = exp(delta_t A) x_{t-1} + delta_t B_t u_t
//     y_t = C_t sum over taps of weight * x[clamped neighbour] + D u_t
//
// Lanes run over channels, VL of them make a tile. A task is a batch entry and some tiles, row by row of the map: the
// states of the last eleven rows stay in cache, each continued by MARGIN copies of its border on both sides, and the row
// MARGIN above the one just scanned is read out. Rows beyond the border are the border row itself.
#include "parallel.h"
#include "tensor.h"

enum { MARGIN = 5, KEPT = 2 * MARGIN + 1, TAPS = 27, MERGED = 25 };

typedef struct {
    // u (b l e), steps (b l r+2) = [dt_r | B | C], w (e r), bias (e), A (e), D (e), taps (e 27), y (b l e)
    tensor u, steps, w, bias, A, D, taps, y;  // all float32, last axis dense
    int64_t b, e, rows, cols, r, tiles, threads;  // tiles: per task
} spatial_args;

typedef struct {
    const spatial_args *a;
    int64_t batch, first, tiles, width;  // tiles [first, first + tiles); width of a kept row with its margins
    float *kept, *weights, *state;       // [tile][KEPT][width][VL], [tile][r + 3 + MERGED][VL], [tile][VL]
} spatial_task;

static int64_t all_tiles(const spatial_args *a) { return (a->e + VL - 1) / VL; }

// One column of a matrix with `width` entries per channel, VL channels from `channel` on.
static void load_column(float *to, const float *matrix, int64_t width, int64_t column, int64_t channel, int64_t lanes) {
    for (int64_t i = 0; i < VL; i++) to[i] = i < lanes ? matrix[(channel + i) * width + column] : 0.0f;
}

static int64_t lanes_of(const spatial_task *t, int64_t tile) { return t->a->e - (t->first + tile) * VL; }

// Per tile: bias, A log2(e), D, r rows of W, then the distinct taps with the three centres first.
static void load_weights(const spatial_task *t, int64_t tile, float *to) {
    const spatial_args *a = t->a;
    const int64_t channel = (t->first + tile) * VL, lanes = lanes_of(t, tile);
    const float *taps = (const float *)a->taps.data;
    float more[VL];
    load_column(to, (const float *)a->bias.data, 1, 0, channel, lanes);
    load_column(to + VL, (const float *)a->A.data, 1, 0, channel, lanes);
    v_store(to + VL, v_load(to + VL) * LOG2E);
    load_column(to + 2 * VL, (const float *)a->D.data, 1, 0, channel, lanes);
    for (int64_t j = 0; j < a->r; j++) load_column(to + (3 + j) * VL, (const float *)a->w.data, a->r, j, channel, lanes);
    float *merged = to + (3 + a->r) * VL;
    v_store(merged, (vf){0});
    for (int k = 0; k < TAPS; k++) {
        load_column(more, taps, TAPS, k, channel, lanes);
        if (k % 9 == 4) v_store(merged, v_load(merged) + v_load(more));
    }
    for (int k = 0, next = 1; k < TAPS; k++)
        if (k % 9 != 4) load_column(merged + next++ * VL, taps, TAPS, k, channel, lanes);
}

static float *kept_row(const spatial_task *t, int64_t tile, int64_t row) {
    return t->kept + (tile * KEPT + row % KEPT) * t->width * VL;
}

static void scan_row(const spatial_task *t, int64_t tile, int64_t row, const float *weights) {
    const spatial_args *a = t->a;
    const int64_t r = a->r, cols = a->cols, lanes = lanes_of(t, tile), place = t->batch * a->rows + row;
    const float *steps = (const float *)a->steps.data + place * cols * (r + 2);
    const float *u = (const float *)a->u.data + place * cols * a->e + (t->first + tile) * VL;
    float *to = kept_row(t, tile, row), *inner = to + MARGIN * VL;
    const vf bias = v_load(weights), rate = v_load(weights + VL);
    vf x = v_load(t->state + tile * VL);
    for (int64_t j = 0; j < cols; j++, steps += r + 2, u += a->e) {
        vf raw = bias, more = {0};
        int64_t i = 0;
        for (; i + 2 <= r; i += 2) {
            raw += v_load(weights + (3 + i) * VL) * steps[i];
            more += v_load(weights + (4 + i) * VL) * steps[i + 1];
        }
        if (i < r) raw += v_load(weights + (3 + i) * VL) * steps[i];
        const vf delta = v_softplus(raw + more);
        x = v_exp2(delta * rate) * x + delta * v_load_some(u, lanes) * steps[r];
        v_store(inner + j * VL, x);
    }
    v_store(t->state + tile * VL, x);
    for (int64_t j = 0; j < MARGIN; j++) {
        v_store(to + j * VL, v_load(inner));
        v_store(inner + (cols + j) * VL, x);
    }
}

static void read_out_row(const spatial_task *t, int64_t tile, int64_t row, const float *weights) {
    const spatial_args *a = t->a;
    const int64_t r = a->r, cols = a->cols, lanes = lanes_of(t, tile), place = t->batch * a->rows + row;
    const float *C = (const float *)a->steps.data + place * cols * (r + 2) + r + 1, *merged = weights + (3 + r) * VL;
    const int64_t from = place * cols * a->e + (t->first + tile) * VL;
    const float *u = (const float *)a->u.data + from, *at[MERGED];
    float *y = (float *)a->y.data + from;
    const vf skip = v_load(weights + 2 * VL);
    at[0] = kept_row(t, tile, row) + MARGIN * VL;
    for (int k = 0, next = 1; k < TAPS; k++) {
        if (k % 9 == 4) continue;
        const int64_t dilation = 2 * (k / 9) + 1;
        int64_t neighbour = row + dilation * (k % 9 / 3 - 1);
        neighbour = neighbour < 0 ? 0 : neighbour >= a->rows ? a->rows - 1 : neighbour;
        at[next++] = kept_row(t, tile, neighbour) + (MARGIN + dilation * (k % 3 - 1)) * VL;
    }
    vf weight[MERGED];
    for (int k = 0; k < MERGED; k++) weight[k] = v_load(merged + k * VL);
    for (int64_t j = 0; j < cols; j++) {
        vf even = weight[0] * v_load(at[0] + j * VL), odd = {0};
#pragma GCC unroll 12
        for (int k = 1; k < MERGED; k += 2) {
            even += weight[k] * v_load(at[k] + j * VL);
            odd += weight[k + 1] * v_load(at[k + 1] + j * VL);
        }
        v_store_some(y + j * a->e, (even + odd) * C[j * (r + 2)] + skip * v_load_some(u + j * a->e, lanes), lanes);
    }
}

static void spatial_task_body(void *context, int64_t index) {
    const spatial_args *a = context;
    const int64_t splits = (all_tiles(a) + a->tiles - 1) / a->tiles, size = (3 + a->r + MERGED) * VL;
    spatial_task t = {.a = a, .batch = index / splits, .first = index % splits * a->tiles, .width = a->cols + 2 * MARGIN};
    t.tiles = all_tiles(a) - t.first < a->tiles ? all_tiles(a) - t.first : a->tiles;
    t.kept = scratch(sizeof(float) * (size_t)(t.tiles * (KEPT * t.width * VL + size + VL)));
    t.weights = t.kept + t.tiles * KEPT * t.width * VL;
    t.state = t.weights + t.tiles * size;
    memset(t.state, 0, sizeof(float) * (size_t)(t.tiles * VL));
    for (int64_t tile = 0; tile < t.tiles; tile++) load_weights(&t, tile, t.weights + tile * size);
    for (int64_t row = 0; row < a->rows + MARGIN; row++)
        for (int64_t tile = 0; tile < t.tiles; tile++) {
            if (row < a->rows) scan_row(&t, tile, row, t.weights + tile * size);
            if (row >= MARGIN) read_out_row(&t, tile, row - MARGIN, t.weights + tile * size);
        }
    free(t.kept);
}

void ssmzoo_spatial_scan(const spatial_args *a) {
    if (!a->e) return;
    const int64_t splits = (all_tiles(a) + a->tiles - 1) / a->tiles;
    parallel_for(a->b * splits, a->threads, spatial_task_body, (void *)a);
}
