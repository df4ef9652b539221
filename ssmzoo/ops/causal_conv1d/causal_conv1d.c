// Causal depthwise convolution: y_t = act(bias + sum_j w_j x_{t-(k-1)+j}), and its decoding step.
//
// Two ways. Where time is contiguous and there is one sequence, lanes run over time (rows_*). Otherwise lanes run over
// channels (tiles_*): a task takes some neighbouring tiles of VL channels through time in
// chunks, brought into cache as rows of VL floats. A chunk comes with the k-1 steps before it (and, in the backward,
// behind it), so that chunks need nothing of each other. The convolution is recomputed in the backward.
#include "parallel.h"
#include "tensor.h"

enum { CHUNK = 64, LONG = 512 };  // steps, with lanes over channels and over time; multiples of VL

typedef struct {
    tensor x, weight, bias, seq_idx, initial, out;  // initial (b c k-1)
    tensor dout, dx, dinitial, dweight, dbias;      // dweight (b c k), dbias (b c)
    int64_t b, c, l, k, silu, tiles, threads;       // tiles per task
} conv_args;

typedef struct {
    const conv_args *a;
    int64_t batch, channel, lanes, tiles;  // first channel, number of channels
} task_info;

static int64_t task_count(const conv_args *a) {
    int64_t width = a->tiles * VL;
    return a->b * ((a->c + width - 1) / width);
}

static task_info make_task(const conv_args *a, int64_t index) {
    int64_t width = a->tiles * VL, per_batch = (a->c + width - 1) / width;
    task_info t = {a, index / per_batch, index % per_batch * width, 0, 0};
    t.lanes = a->c - t.channel < width ? a->c - t.channel : width;
    t.tiles = (t.lanes + VL - 1) / VL;
    return t;
}

// How many inputs before step s belong to the same sequence, at most k - 1; -1 for padding, which has a negative index.
static int64_t reach(const conv_args *a, int64_t batch, int64_t s) {
    int64_t row = batch * a->seq_idx.stride[0], step = a->seq_idx.stride[1], d = 0;
    if (!a->seq_idx.data) return a->k - 1;
    if (get_index(&a->seq_idx, row + s * step) < 0) return -1;
    for (; d < a->k - 1; d++)
        if (s - d > 0 && get_index(&a->seq_idx, row + (s - d) * step) != get_index(&a->seq_idx, row + (s - d - 1) * step))
            break;
    return d;
}

// Rows of a sequence for steps [from, to): initial states before step 0, zeros outside.
static void load_steps(const task_info *t, float *rows, int64_t gap, const tensor *m, const tensor *initial, int64_t from,
                       int64_t to) {
    int64_t begin = from < 0 ? 0 : from, end = to < t->a->l ? to : t->a->l, past = t->a->k - 1;
    for (int64_t i = 0; i < t->tiles; i++) {
        if (from < 0) memset(rows + i * gap, 0, sizeof(float) * (size_t)(-from * VL));
        if (to > end) memset(rows + i * gap + (end - from) * VL, 0, sizeof(float) * (size_t)((to - end) * VL));
    }
    if (from < 0 && initial && initial->data)  // a later chunk may begin less than k - 1 steps behind step 0
        load_tiles(rows, gap, at(initial, t->batch, t->channel, past + from), initial->dtype, initial->stride[1],
                   initial->stride[2], t->lanes, -from);
    if (end > begin)
        load_tiles(rows + (begin - from) * VL, gap, at(m, t->batch, t->channel, begin), m->dtype, m->stride[1],
                   m->stride[2], t->lanes, end - begin);
}

// Taps [tile][k][VL] and bias [tile][VL].
static void load_taps(const task_info *t, float *taps, float *bias) {
    const conv_args *a = t->a;
    const tensor *w = &a->weight;
    load_tiles(taps, a->k * VL, at(w, t->channel, 0, 0), w->dtype, w->stride[0], w->stride[1], t->lanes, a->k);
    for (int64_t i = 0; i < t->tiles * VL; i++)
        bias[i] = a->bias.data && i < t->lanes ? get(a->bias.data, a->bias.dtype, (t->channel + i) * a->bias.stride[0]) : 0.0f;
}

// The sum at the step whose oldest tap meets row x; taps before k - 1 - reach are left out.
INLINE vf convolve_at(int64_t k, const float *x, const float *taps, vf sum, int64_t reach) {
    if (reach == k - 1) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < k; j++) sum += v_load(taps + j * VL) * v_load(x + j * VL);
    } else {
        for (int64_t j = k - 1 - reach; j < k; j++) sum += v_load(taps + j * VL) * v_load(x + j * VL);
    }
    return sum;
}

INLINE void forward_rows(int64_t k, const float *x, const float *taps, const float *bias, const int64_t *reaches,
                         int64_t silu, float *y, int64_t steps) {
    vf shift = v_load(bias);
    for (int64_t s = 0; s < steps; s++) {
        vf sum = reaches[s] < 0 ? (vf){0} : convolve_at(k, x + s * VL, taps, shift, reaches[s]);
        v_store(y + s * VL, silu ? sum * v_sigmoid(sum) : sum);
    }
}

static void tiles_forward(task_info t) {
    const conv_args *a = t.a;
    int64_t k = a->k, gap = (2 * CHUNK + k - 1) * VL + 16 * 5;
    float *memory = scratch(sizeof(float) * (size_t)(t.tiles * (gap + (k + 1) * VL)));
    float *rows = memory, *taps = rows + t.tiles * gap, *bias = taps + t.tiles * k * VL;
    int64_t reaches[CHUNK];
    load_taps(&t, taps, bias);
    for (int64_t start = 0; start < a->l; start += CHUNK) {
        int64_t steps = a->l - start < CHUNK ? a->l - start : CHUNK;
        load_steps(&t, rows, gap, &a->x, &a->initial, start - (k - 1), start + steps);
        for (int64_t s = 0; s < steps; s++) reaches[s] = reach(a, t.batch, start + s);
        float *y = rows + (CHUNK + k - 1) * VL;
        for (int64_t i = 0; i < t.tiles; i++) {
#define ROWS(width) forward_rows(width, rows + i * gap, taps + i * k * VL, bias + i * VL, reaches, a->silu, y + i * gap, steps)
            if (k == 4) ROWS(4);
            else if (k == 3) ROWS(3);
            else if (k == 2) ROWS(2);
            else ROWS(k);
#undef ROWS
        }
        store_tiles(y, gap, at(&a->out, t.batch, t.channel, start), a->out.dtype, a->out.stride[1], a->out.stride[2],
                    t.lanes, steps);
    }
    free(memory);
}

// One tile. x: rows from step -(k-1) of the chunk; dy: rows of dout, replaced by the gradient before the activation, over
// the chunk and k - 1 steps behind it. The chunk begins at row k - 1 of x, 0 of dy.
INLINE void backward_rows(int64_t k, const float *x, const float *taps, const float *bias, const int64_t *reaches,
                          int64_t silu, float *dy, float *dx, float *dtaps, float *dbias, int64_t steps) {
    vf shift = v_load(bias), sum_bias = v_load(dbias);
    for (int64_t s = 0; s < steps + k - 1; s++)
        if (reaches[s] < 0) v_store(dy + s * VL, (vf){0});
    if (silu)
        for (int64_t s = 0; s < steps + k - 1; s++) {
            vf y = convolve_at(k, x + s * VL, taps, shift, reaches[s]), sigma = v_sigmoid(y);
            v_store(dy + s * VL, v_load(dy + s * VL) * (sigma * (1.0f + y * (1.0f - sigma))));
        }
    for (int64_t s = 0; s < steps; s++) {
        vf sum = {0}, d = v_load(dy + s * VL);
#pragma GCC unroll 4
        for (int64_t j = 0; j < k; j++)  // step s + j looks back j steps
            if (reaches[s + j] >= j) sum += v_load(taps + (k - 1 - j) * VL) * v_load(dy + (s + j) * VL);
        v_store(dx + s * VL, sum);
        sum_bias += d;
#pragma GCC unroll 4
        for (int64_t j = 0; j < k; j++)
            if (reaches[s] >= k - 1 - j)
                v_store(dtaps + j * VL, v_load(dtaps + j * VL) + d * v_load(x + (s + j) * VL));
    }
    v_store(dbias, sum_bias);
}

// Gradient of the k - 1 inputs before step 0, from the first rows of dy.
static void initial_rows(int64_t k, const float *taps, const int64_t *reaches, const float *dy, float *dinitial, int64_t steps) {
    for (int64_t i = 0; i < k - 1; i++) {  // input at step i - (k-1) meets tap j at step i - j
        vf sum = {0};
        for (int64_t j = 0; j <= i && j < k; j++)
            if (i - j < steps && reaches[i - j] >= k - 1 - j) sum += v_load(taps + j * VL) * v_load(dy + (i - j) * VL);
        v_store(dinitial + i * VL, sum);
    }
}

static void tiles_backward(task_info t) {
    const conv_args *a = t.a;
    int64_t k = a->k, past = k - 1, x_rows = CHUNK + 2 * past, dy_rows = CHUNK + past;
    int64_t gap = (x_rows + dy_rows + CHUNK) * VL + 16 * 5;
    int64_t zeroed = t.tiles * (k + 1) * VL;
    int64_t floats = zeroed + t.tiles * (gap + (k + 1 + past) * VL);
    float *memory = scratch(sizeof(float) * (size_t)floats + sizeof(int64_t) * (size_t)dy_rows);
    float *dtaps = memory, *dbias = dtaps + t.tiles * k * VL, *taps = dbias + t.tiles * VL, *bias = taps + t.tiles * k * VL;
    float *dinitial = bias + t.tiles * VL, *rows = dinitial + t.tiles * past * VL;
    int64_t *reaches = (int64_t *)(rows + t.tiles * gap);
    memset(memory, 0, sizeof(float) * (size_t)zeroed);
    load_taps(&t, taps, bias);
    memset(dinitial, 0, sizeof(float) * (size_t)(t.tiles * past * VL));
    for (int64_t start = 0; start < a->l; start += CHUNK) {
        int64_t steps = a->l - start < CHUNK ? a->l - start : CHUNK;
        float *dy = rows + x_rows * VL, *dx = dy + dy_rows * VL;
        load_steps(&t, rows, gap, &a->x, &a->initial, start - past, start + steps + past);
        load_steps(&t, dy, gap, &a->dout, NULL, start, start + steps + past);
        for (int64_t s = 0; s < steps + past; s++)
            reaches[s] = start + s < a->l ? reach(a, t.batch, start + s) : -1;  // nothing behind the end
        for (int64_t i = 0; i < t.tiles; i++) {
#define ROWS(width) \
    backward_rows(width, rows + i * gap, taps + i * k * VL, bias + i * VL, reaches, a->silu, dy + i * gap, dx + i * gap, \
                  dtaps + i * k * VL, dbias + i * VL, steps)
            if (k == 4) ROWS(4);
            else if (k == 3) ROWS(3);
            else if (k == 2) ROWS(2);
            else ROWS(k);
#undef ROWS
            if (start == 0) initial_rows(k, taps + i * k * VL, reaches, dy + i * gap, dinitial + i * past * VL, steps + past);
        }
        store_tiles(dx, gap, at(&a->dx, t.batch, t.channel, start), a->dx.dtype, a->dx.stride[1], a->dx.stride[2], t.lanes,
                    steps);
    }
    const tensor *dw = &a->dweight, *di = &a->dinitial;
    store_tiles(dtaps, k * VL, at(dw, t.batch, t.channel, 0), F32, dw->stride[1], dw->stride[2], t.lanes, k);
    if (a->dbias.data)
        store_tiles(dbias, VL, at(&a->dbias, t.batch, t.channel, 0), F32, a->dbias.stride[1], 1, t.lanes, 1);
    if (di->data && past)
        store_tiles(dinitial, past * VL, at(di, t.batch, t.channel, 0), di->dtype, di->stride[1], di->stride[2], t.lanes, past);
    free(memory);
}

// ---------------------------------------------------------------------------------------------- lanes over time

// Steps [from, to) of one channel; initial states before step 0, zeros outside.
static void load_row(const task_info *t, float *row, const tensor *m, const tensor *initial, int64_t channel, int64_t from,
                     int64_t to) {
    const conv_args *a = t->a;
    int64_t s = from;
    for (; s < 0; s++)
        row[s - from] = initial && initial->data ? get(at(initial, t->batch, channel, s + a->k - 1), initial->dtype, 0) : 0.0f;
    int64_t end = to < a->l ? to : a->l;
    if (end > s) load_line(row + (s - from), at(m, t->batch, channel, s), m->dtype, (int)(end - s));
    if (to > end) memset(row + (end - from), 0, sizeof(float) * (size_t)(to - end));
}

INLINE vf convolve_row(int64_t k, const float *x, const float *taps, vf sum) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < k; j++) sum += taps[j] * v_load(x + j);
    return sum;
}

INLINE void forward_row(int64_t k, const float *x, const float *taps, float bias, int64_t silu, float *y, int64_t steps) {
    for (int64_t s = 0; s < steps; s += VL) {
        vf sum = convolve_row(k, x + s, taps, v_set(bias));
        v_store(y + s, silu ? sum * v_sigmoid(sum) : sum);
    }
}

INLINE void backward_row(int64_t k, const float *x, const float *taps, float bias, int64_t silu, float *dy, float *dx,
                         float *dtaps, float *dbias, int64_t steps) {
    vf sum_bias = {0};
    for (int64_t s = 0; silu && s < steps + k - 1; s += VL) {
        vf y = convolve_row(k, x + s, taps, v_set(bias)), sigma = v_sigmoid(y);
        v_store(dy + s, v_load(dy + s) * (sigma * (1.0f + y * (1.0f - sigma))));
    }
    for (int64_t s = 0; s < steps; s += VL) {
        vf sum = {0};
#pragma GCC unroll 4
        for (int64_t j = 0; j < k; j++) sum += taps[k - 1 - j] * v_load(dy + s + j);
        v_store(dx + s, sum);
        sum_bias += v_load(dy + s);
    }
    *dbias += v_sum(sum_bias);
    for (int64_t j = 0; j < k; j++) {
        vf sum = {0};
        for (int64_t s = 0; s < steps; s += VL) sum += v_load(dy + s) * v_load(x + s + j);
        dtaps[j] += v_sum(sum);
    }
}

#define BY_WIDTH(k, call) \
    switch (k) { \
    case 4: call(4); break; \
    case 3: call(3); break; \
    case 2: call(2); break; \
    default: call(k); \
    }

static float *load_row_taps(const task_info *t, int64_t channel, float *taps) {
    const conv_args *a = t->a;
    for (int64_t j = 0; j < a->k; j++) taps[j] = get(at(&a->weight, channel, j, 0), a->weight.dtype, 0);
    taps[a->k] = a->bias.data ? get(at(&a->bias, channel, 0, 0), a->bias.dtype, 0) : 0.0f;
    return taps;
}

static void rows_forward(task_info t) {
    const conv_args *a = t.a;
    int64_t k = a->k;
    float *memory = scratch(sizeof(float) * (size_t)(2 * LONG + 2 * k + 4 * VL));
    float *x = memory, *y = x + LONG + k + 2 * VL, *taps = y + LONG + VL;
    for (int64_t c = t.channel; c < t.channel + t.lanes; c++) {
        load_row_taps(&t, c, taps);
        for (int64_t start = 0; start < a->l; start += LONG) {
            int64_t steps = a->l - start < LONG ? a->l - start : LONG;
            load_row(&t, x, &a->x, &a->initial, c, start - (k - 1), start + steps);
#define FORWARD(width) forward_row(width, x, taps, taps[k], a->silu, y, steps)
            BY_WIDTH(k, FORWARD)
            store_line(at(&a->out, t.batch, c, start), y, a->out.dtype, (int)steps);
        }
    }
    free(memory);
}

static void rows_backward(task_info t) {
    const conv_args *a = t.a;
    int64_t k = a->k, past = k - 1, room = LONG + 2 * past + 2 * VL;
    float *memory = scratch(sizeof(float) * (size_t)(3 * room + 3 * k + 2));
    float *x = memory, *dy = x + room, *dx = dy + room, *taps = dx + room, *dtaps = taps + k + 1;
    for (int64_t c = t.channel; c < t.channel + t.lanes; c++) {
        float *dbias = dtaps + k, *dinitial = dbias + 1;
        load_row_taps(&t, c, taps);
        memset(dtaps, 0, sizeof(float) * (size_t)(k + 1 + past));
        for (int64_t start = 0; start < a->l; start += LONG) {
            int64_t steps = a->l - start < LONG ? a->l - start : LONG;
            load_row(&t, x, &a->x, &a->initial, c, start - past, start + steps + past + VL);
            load_row(&t, dy, &a->dout, NULL, c, start, start + steps + past + VL);
#define BACKWARD(width) backward_row(width, x, taps, taps[k], a->silu, dy, dx, dtaps, dbias, steps)
            BY_WIDTH(k, BACKWARD)
            store_line(at(&a->dx, t.batch, c, start), dx, a->dx.dtype, (int)steps);
            for (int64_t i = 0; start == 0 && i < past; i++)  // input at step i - past meets tap j at step i - j
                for (int64_t j = 0; j <= i; j++) dinitial[i] += taps[j] * dy[i - j];
        }
        for (int64_t j = 0; j < k; j++) put(at(&a->dweight, t.batch, c, j), F32, 0, dtaps[j]);
        if (a->dbias.data) put(at(&a->dbias, t.batch, c, 0), F32, 0, *dbias);
        for (int64_t i = 0; a->dinitial.data && i < past; i++)
            put(at(&a->dinitial, t.batch, c, i), a->dinitial.dtype, 0, dinitial[i]);
    }
    free(memory);
}

static void forward_task(void *context, int64_t index) {
    const conv_args *a = context;
    int in_rows = !a->seq_idx.data && a->x.stride[2] == 1 && a->out.stride[2] == 1;
    (in_rows ? rows_forward : tiles_forward)(make_task(a, index));
}

static void backward_task(void *context, int64_t index) {
    const conv_args *a = context;
    int in_rows = !a->seq_idx.data && a->x.stride[2] == 1 && a->dx.stride[2] == 1 && a->dout.stride[2] == 1;
    (in_rows ? rows_backward : tiles_backward)(make_task(a, index));
}

void ssmzoo_causal_conv1d_forward(const conv_args *a) {
    parallel_for(task_count(a), a->threads, forward_task, (void *)a);
}

void ssmzoo_causal_conv1d_backward(const conv_args *a) {
    parallel_for(task_count(a), a->threads, backward_task, (void *)a);
}

// New tokens, contiguous float32 throughout: x, y (b c l); state (rows c s), s >= k - 1, in place. index (b) says which row
// of the state a sequence has, negative: none, y = 0; NULL: the same. seen (b): the state is circular, and so many tokens
// came before; NULL: oldest first, shifted by l.
void ssmzoo_causal_conv1d_step(const float *x, float *state, const float *weight, const float *bias, float *y,
                               const int64_t *index, const int64_t *seen, int64_t b, int64_t c, int64_t l, int64_t s,
                               int64_t k, int64_t silu) {
    for (int64_t i = 0; i < b; i++) {
        int64_t row = index ? index[i] : i;
        if (row < 0) {
            memset(y + i * c * l, 0, sizeof(float) * (size_t)(c * l));
            continue;
        }
        int64_t next = seen && s ? (seen[i] % s + s) % s : s;  // where the first new token belongs
        for (int64_t e = 0; e < c; e++) {
            float *past = state + (row * c + e) * s, *out = y + (i * c + e) * l;
            const float *now = x + (i * c + e) * l, *w = weight + e * k;
            if (l == 1 && !seen) {  // decoding
                float sum = bias ? bias[e] : 0.0f;
                for (int64_t j = 0; j < k - 1; j++) sum += w[j] * past[s - (k - 1) + j];
                for (int64_t j = 0; j + 1 < s; j++) past[j] = past[j + 1];
                if (s) past[s - 1] = now[0];
                out[0] = sum + w[k - 1] * now[0];
                continue;
            }
            for (int64_t t = 0; t < l; t++) {
                float sum = bias ? bias[e] : 0.0f;
                for (int64_t j = 0; j < k; j++) {
                    int64_t step = t - (k - 1) + j, index = next + step;
                    sum += w[j] * (step < 0 ? past[index < 0 ? index + s : index] : now[step]);
                }
                out[t] = sum;
            }
            if (seen)
                for (int64_t t = l > s ? l - s : 0; t < l; t++) past[(next + t) % s] = now[t];
            else if (l < s) {
                memmove(past, past + l, sizeof(float) * (size_t)(s - l));
                memcpy(past + s - l, now, sizeof(float) * (size_t)l);
            } else
                memcpy(past, now + l - s, sizeof(float) * (size_t)s);
        }
    }
    if (!silu) return;
    int64_t i = 0, size = b * c * l;
    for (; i + VL <= size; i += VL) v_store(y + i, v_load(y + i) * v_sigmoid(v_load(y + i)));
    for (; i < size; i++) y[i] = v_sum(v_set(y[i]) * v_sigmoid(v_set(y[i]))) / VL;
}
