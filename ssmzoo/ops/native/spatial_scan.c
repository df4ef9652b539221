// Spatial-Mamba's mixer core in one pass: a raster scan with one state per channel, 25 taps on the states, the read-out.
//
//     delta_t = softplus(W dt_r + bias)     x_t = exp(delta_t A) x_{t-1} + delta_t B_t u_t
//     y_t = C_t sum over taps of weight * x[clamped neighbour] + D u_t
//
// Lanes run over channels, VL of them make a tile. A task is a batch entry and some tiles, row by row of the map: the
// states of the last eleven rows stay in cache, each continued by MARGIN copies of its border on both sides, and the row
// MARGIN above the one just scanned is read out. Rows beyond the border are the border row itself.
//
// Backwards, a tile's states are scanned anew and kept for the whole map. Each row of dh = C dy then gives the taps'
// gradients and is added, tap by tap, to the gradients g of the states it was fused from; what fell on the margins is
// folded into the border. The scan runs in reverse over g:
//     lambda_t = g_t + exp(delta_{t+1} A) lambda_{t+1}          dB_t = sum over channels of lambda_t delta_t u_t
//     ddelta_t = lambda_t (A exp(delta_t A) x_{t-1} + B_t u_t)   du_t = lambda_t delta_t B_t + D dy_t
// The gradient before the softplus is handed back; what it means for W and dt_r are matrix products.
#include "parallel.h"
#include "tensor.h"

enum { MARGIN = 5, KEPT = 2 * MARGIN + 1, TAPS = 27, MERGED = 25 };

typedef struct {
    // u (b l e), steps (b l r+2) = [dt_r | B | C], w (e r), bias (e), A (e), D (e), taps (e 27), y (b l e)
    tensor u, steps, w, bias, A, D, taps, y;
    // backwards: dy, du, draw (b l e), dread (tasks of a batch entry, b l 2) = [dB | dC], and per batch entry dbias, dA,
    // dD (b e), dtaps (b e 27)
    tensor dy, du, draw, dread, dbias, dA, dD, dtaps;  // all float32, last axis dense
    int64_t b, e, rows, cols, r, tiles, threads;  // tiles: per task
} spatial_args;

typedef struct {
    const spatial_args *a;
    int64_t batch, first, tiles, width, rows;  // tiles [first, first + tiles); width of a kept row with its margins
    float *kept, *weights, *state;  // [tile][rows][width][VL], [tile][r + 3 + MERGED][VL], [tile][VL]
    float *raw;                     // [l][VL], time steps before the softplus; NULL: not wanted
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
    return t->kept + (tile * t->rows + row % t->rows) * t->width * VL;
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
        raw += more;
        if (t->raw) v_store(t->raw + (row * cols + j) * VL, raw);
        const vf delta = v_softplus(raw);
        x = v_exp2(delta * rate) * x + delta * v_load_some(u, lanes) * steps[r];
        v_store(inner + j * VL, x);
    }
    v_store(t->state + tile * VL, x);
    for (int64_t j = 0; j < MARGIN; j++) {
        v_store(to + j * VL, v_load(inner));
        v_store(inner + (cols + j) * VL, x);
    }
}

// Where the states of the distinct taps begin for a row, counted from those of the tap's tile.
static void neighbours(const spatial_task *t, int64_t tile, int64_t row, int64_t *at) {
    const float *origin = kept_row(t, tile, 0);
    at[0] = kept_row(t, tile, row) - origin + MARGIN * VL;
    for (int k = 0, next = 1; k < TAPS; k++) {
        if (k % 9 == 4) continue;
        const int64_t dilation = 2 * (k / 9) + 1;
        int64_t neighbour = row + dilation * (k % 9 / 3 - 1);
        neighbour = neighbour < 0 ? 0 : neighbour >= t->a->rows ? t->a->rows - 1 : neighbour;
        at[next++] = kept_row(t, tile, neighbour) - origin + (MARGIN + dilation * (k % 3 - 1)) * VL;
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
    int64_t offset[MERGED];
    neighbours(t, tile, row, offset);
    for (int k = 0; k < MERGED; k++) at[k] = kept_row(t, tile, 0) + offset[k];
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

void ssmzoo_spatial_scan_forward(const spatial_args *a) {
    if (a->e) parallel_for(a->b * splits_of(a), a->threads, forward_task, (void *)a);
}

// ---- backwards: one tile at a time, so that `tile` of the functions above is always 0 ------------------------------

typedef struct {
    float *g, *h, *dh;        // [rows][width][VL] gradients of states; a row of fused states and of their gradients
    float *read;              // (l 2), this task's part of dread
    vf tap[MERGED], bias, A, D;  // sums over the map
} gradients;

static void read_out_backward(const spatial_task *t, gradients *grad, int64_t row) {
    const spatial_args *a = t->a;
    const int64_t r = a->r, cols = a->cols, lanes = lanes_of(t, 0), place = (t->batch * a->rows + row) * cols;
    const float *C = (const float *)a->steps.data + place * (r + 2) + r + 1, *merged = t->weights + (3 + r) * VL;
    const float *dy = (const float *)a->dy.data + place * a->e + t->first * VL;
    const float *u = (const float *)a->u.data + place * a->e + t->first * VL;
    float *read = grad->read + 2 * row * cols;
    int64_t at[MERGED];
    neighbours(t, 0, row, at);
    for (int64_t j = 0; j < cols; j++) {
        const vf here = v_load_some(dy + j * a->e, lanes);
        grad->D += here * v_load_some(u + j * a->e, lanes);
        v_store(grad->dh + j * VL, here * C[j * (r + 2)]);
        v_store(grad->h + j * VL, (vf){0});
    }
    for (int k = 0; k < MERGED; k++) {
        const vf weight = v_load(merged + k * VL);
        const float *x = t->kept + at[k];
        float *g = grad->g + at[k];
        vf sum = {0};
        for (int64_t j = 0; j < cols * VL; j += VL) {
            const vf dh = v_load(grad->dh + j), state = v_load(x + j);
            sum += dh * state;
            v_store(g + j, v_load(g + j) + weight * dh);
            v_store(grad->h + j, v_load(grad->h + j) + weight * state);
        }
        grad->tap[k] += sum;
    }
    for (int64_t j = 0; j < cols; j++)
        read[2 * j + 1] += v_sum(v_load_some(dy + j * a->e, lanes) * v_load(grad->h + j * VL));
}

static void fold_margins(const spatial_task *t, float *g) {
    const int64_t last = (MARGIN + t->a->cols - 1) * VL;
    for (int64_t row = 0; row < t->rows; row++, g += t->width * VL) {
        vf left = v_load(g + MARGIN * VL);
        for (int64_t j = 0; j < MARGIN; j++) left += v_load(g + j * VL);
        v_store(g + MARGIN * VL, left);
        vf right = v_load(g + last);
        for (int64_t j = 1; j <= MARGIN; j++) right += v_load(g + last + j * VL);
        v_store(g + last, right);
    }
}

static void scan_backward(const spatial_task *t, gradients *grad) {
    const spatial_args *a = t->a;
    const int64_t r = a->r, cols = a->cols, lanes = lanes_of(t, 0), length = a->rows * cols, start = t->batch * length;
    const float *steps = (const float *)a->steps.data + start * (r + 2) + r;  // B
    const int64_t from = start * a->e + t->first * VL;
    const float *u = (const float *)a->u.data + from, *dy = (const float *)a->dy.data + from;
    float *du = (float *)a->du.data + from, *draw = (float *)a->draw.data + from;
    const vf rate = v_load(t->weights + VL), A = rate / LOG2E, skip = v_load(t->weights + 2 * VL);
    vf carried = {0};
    for (int64_t i = length - 1; i >= 0; i--) {
        const int64_t place = (i / cols * t->width + MARGIN + i % cols) * VL;
        const int64_t before = i % cols ? place - VL : place - (2 * MARGIN + 1) * VL;
        const vf raw = v_load(t->raw + i * VL), delta = v_softplus(raw), decay = v_exp2(delta * rate);
        const vf here = v_load_some(u + i * a->e, lanes), lambda = v_load(grad->g + place) + carried;
        carried = decay * lambda;
        const vf kept = i ? carried * v_load(t->kept + before) : (vf){0}, stepped = lambda * delta;
        const vf change = (kept * A + lambda * here * steps[i * (r + 2)]) * v_sigmoid(raw);
        grad->A += kept * delta;
        grad->bias += change;
        grad->read[2 * i] += v_sum(stepped * here);
        v_store_some(draw + i * a->e, change, lanes);
        v_store_some(du + i * a->e, stepped * steps[i * (r + 2)] + skip * v_load_some(dy + i * a->e, lanes), lanes);
    }
}

static void store_sums(const spatial_task *t, const gradients *grad) {
    const spatial_args *a = t->a;
    const int64_t lanes = lanes_of(t, 0), channel = t->batch * a->e + t->first * VL;
    v_store_some((float *)a->dbias.data + channel, grad->bias, lanes);
    v_store_some((float *)a->dA.data + channel, grad->A, lanes);
    v_store_some((float *)a->dD.data + channel, grad->D, lanes);
    for (int k = 0, next = 1; k < TAPS; k++) {
        float sums[VL];
        v_store(sums, grad->tap[k % 9 == 4 ? 0 : next++]);
        for (int64_t i = 0; i < VL && i < lanes; i++) ((float *)a->dtaps.data)[(channel + i) * TAPS + k] = sums[i];
    }
}

static void backward_task(void *context, int64_t index) {
    const spatial_args *a = context;
    const int64_t length = a->rows * a->cols, last = task_of(a, index).tiles;
    spatial_task t = task_of(a, index);
    const int64_t plane = a->rows * t.width * VL;
    t.rows = a->rows;
    t.kept = scratch(sizeof(float) * (size_t)(2 * plane + (length + 2 * a->cols + 1) * VL + weights_size(a)));
    t.raw = t.kept + 2 * plane;
    t.state = t.raw + (length + 2 * a->cols) * VL;
    t.weights = t.state + VL;
    float *read = (float *)a->dread.data + (index % splits_of(a) * a->b + t.batch) * length * 2;
    memset(read, 0, sizeof(float) * (size_t)(2 * length));
    for (int64_t tile = 0; tile < last; tile++, t.first++) {
        gradients grad = {.g = t.kept + plane, .h = t.raw + length * VL, .read = read};
        grad.dh = grad.h + a->cols * VL;
        memset(grad.g, 0, sizeof(float) * (size_t)plane);
        memset(t.state, 0, sizeof(float) * VL);
        load_weights(&t, 0, t.weights);
        for (int64_t row = 0; row < a->rows; row++) scan_row(&t, 0, row, t.weights);
        for (int64_t row = 0; row < a->rows; row++) read_out_backward(&t, &grad, row);
        fold_margins(&t, grad.g);
        scan_backward(&t, &grad);
        store_sums(&t, &grad);
    }
    free(t.kept);
}

void ssmzoo_spatial_scan_backward(const spatial_args *a) {
    if (a->e) parallel_for(a->b * splits_of(a), a->threads, backward_task, (void *)a);
}
