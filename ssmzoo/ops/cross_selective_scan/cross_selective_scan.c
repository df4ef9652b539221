// Four selective scans of a map in four scan directions, added up, without a permuted copy of the map.
//
// For every order k, position p_t at step t, and steps = [dt_r | B | C] of that position and order:
//     delta_t = softplus(W_k dt_r + bias_k)      h_t = exp(delta_t A_k) h_{t-1} + delta_t u_t B_t
//     y[p_t] += <h_t, C_t> + D_k u_t
// Lanes run over channels, VL of them make a tile whose states live in registers. A chunk of steps is gathered from
// wherever its positions lie into rows [step][VL] in cache, so that all directions cost the same. A task is a batch entry,
// a part (the directions k = part and part + 2) and some tiles. The backward starts from states saved at chunk starts.
#include "gemm.h"
#include "parallel.h"
#include "tensor.h"

enum { CHUNK = 32, BACK = 4, PAD = 16 * 20 };  // PAD keeps streams apart, see selective_scan.c
enum { BLOCK = 16 };  // states per block, see selective_scan.c

typedef struct {
    // u (b l e), steps (b l 4c), w (4 e r), bias (4 e), A (4e n), D (4e), y (b 2 l e), saved; all float32, last axis dense
    tensor u, steps, w, bias, A, D, y, saved;
    // dy (b l e), du (b 2 l e), dsteps (tasks b l 4c), dw (b 4 e r), dbias (b 4 e), dA (b 4e n), dD (b 4e)
    tensor dy, du, dsteps, dw, dbias, dA, dD;
    // columns, reversed: bit k set when order k runs down the columns, or backwards
    int64_t b, e, rows, cols, n, r, save, columns, reversed, tiles, threads;
} cross_args;

typedef struct {
    const cross_args *a;
    int64_t batch, part, split, first, tiles, c, l, chunks;  // tiles [first, first + tiles); c = r + 2n
} cross_task;

static int64_t all_tiles(const cross_args *a) { return (a->e + VL - 1) / VL; }
static int64_t splits(const cross_args *a) { return (all_tiles(a) + a->tiles - 1) / a->tiles; }

static cross_task cross_make_task(const cross_args *a, int64_t index) {
    cross_task t = {.a = a, .c = a->r + 2 * a->n, .l = a->rows * a->cols};
    t.chunks = (t.l + CHUNK - 1) / CHUNK;
    t.split = index % splits(a);
    t.part = index / splits(a) % 2;
    t.batch = index / splits(a) / 2;
    t.first = t.split * a->tiles;
    int64_t left = all_tiles(a) - t.first;
    t.tiles = left < a->tiles ? left : a->tiles;
    return t;
}

static int64_t lanes_of(const cross_task *t, int64_t tile) {
    int64_t left = t->a->e - (t->first + tile) * VL;
    return left < VL ? left : VL;
}

static void positions(const cross_task *t, int64_t k, int64_t start, int64_t count, int64_t *at) {
    const cross_args *a = t->a;
    int back = (int)(a->reversed >> k & 1), down = (int)(a->columns >> k & 1);
    for (int64_t s = 0; s < count; s++) {
        int64_t i = back ? t->l - 1 - (start + s) : start + s;
        at[s] = down ? i % a->rows * a->cols + i / a->rows : i;
    }
}

// Rows of positions into tiles [tile][CHUNK][VL] `gap` floats apart; missing lanes are 0.
static void gather(const cross_task *t, float *tiles, int64_t gap, const float *map, int64_t stride, const int64_t *at,
                   int64_t count) {
    for (int64_t s = 0; s < count; s++) {
        const float *row = map + at[s] * stride + t->first * VL;
        for (int64_t k = 0; k < t->tiles; k++) {
            int64_t lanes = lanes_of(t, k);
            float *to = tiles + k * gap + s * VL;
            if (lanes == VL) v_store(to, v_load(row + k * VL));
            else for (int64_t i = 0; i < VL; i++) to[i] = i < lanes ? row[k * VL + i] : 0.0f;
        }
    }
}

static void scatter(const cross_task *t, const float *tiles, int64_t gap, float *map, int64_t stride, const int64_t *at,
                    int64_t count, int add) {
    for (int64_t s = 0; s < count; s++) {
        float *row = map + at[s] * stride + t->first * VL;
        for (int64_t k = 0; k < t->tiles; k++) {
            int64_t lanes = lanes_of(t, k);
            const float *from = tiles + k * gap + s * VL;
            float *to = row + k * VL;
            if (lanes == VL) v_store(to, add ? v_load(to) + v_load(from) : v_load(from));
            else for (int64_t i = 0; i < lanes; i++) to[i] = add ? to[i] + from[i] : from[i];
        }
    }
}

static const float *map_of(const tensor *m, int64_t batch) { return (const float *)m->data + batch * m->stride[0]; }

static void gather_steps(const cross_task *t, float *rows, int64_t k, const int64_t *at, int64_t count) {
    const float *map = map_of(&t->a->steps, t->batch) + k * t->c;
    for (int64_t s = 0; s < count; s++) memcpy(rows + s * t->c, map + at[s] * t->a->steps.stride[1], 4 * (size_t)t->c);
}

// Matrix rows of order k (one per channel, `width` long) as [tile][width][VL], times `factor`.
static void load_matrix(const cross_task *t, float *to, const tensor *m, int64_t k, int64_t width, float factor) {
    const float *rows = (const float *)m->data + k * t->a->e * width;
    for (int64_t tile = 0; tile < t->tiles; tile++)
        for (int64_t j = 0; j < width; j++)
            for (int64_t lane = 0; lane < VL; lane++)
                *to++ = lane < lanes_of(t, tile) ? factor * rows[((t->first + tile) * VL + lane) * width + j] : 0.0f;
}

static void store_matrix(const cross_task *t, const float *from, const tensor *m, int64_t k, int64_t width) {
    float *rows = (float *)m->data + (t->batch * 4 + k) * t->a->e * width;
    for (int64_t tile = 0; tile < t->tiles; tile++)
        for (int64_t j = 0; j < width; j++)
            for (int64_t lane = 0; lane < VL; lane++, from++)
                if (lane < lanes_of(t, tile)) rows[((t->first + tile) * VL + lane) * width + j] = *from;
}

static float *saved_at(const cross_task *t, int64_t k, int64_t chunk) {
    int64_t states = t->a->n * VL;
    return (float *)t->a->saved.data
           + (((t->batch * 4 + k) * t->chunks + chunk) * all_tiles(t->a) + t->first) * states;
}

// dt = softplus(W dt_r + bias), du = dt u, and the softplus's slope if wanted
static void steps_of_tile(const cross_task *t, const float *w, const float *bias, const float *steps, const float *u,
                          float *slope, float *dt, float *du, int64_t count) {
    const gemm_t raw = {.A = steps, .am = t->c, .ak = 1, .B = w, .ldb = VL, .C = dt, .ldc = VL};
    gemm(&raw, count, VL, t->a->r, GEMM_FULL);
    const vf shift = v_load(bias);
    for (int64_t i = 0; i < count * VL; i += VL) {
        vf here, d = v_softplus_slope(v_load(dt + i) + shift, &here);
        if (slope) v_store(slope + i, here);
        v_store(dt + i, d);
        v_store(du + i, d * v_load(u + i));
    }
}

INLINE void cross_block(const int size, float *h, const float *A2, const float *B, const float *C, int64_t c,
                        const float *dt, const float *du, float *y, int64_t count) {
    vf state[BLOCK];
    for (int j = 0; j < size; j++) state[j] = v_load(h + j * VL);
    for (int64_t s = 0; s < count; s++) {
        vf d = v_load(dt + s * VL), x = v_load(du + s * VL), sum[2] = {v_load(y + s * VL), {0}};
#pragma GCC unroll 16
        for (int j = 0; j < size; j++) {
            state[j] = v_exp2(d * v_load(A2 + j * VL)) * state[j] + x * B[s * c + j];
            sum[j & 1] += state[j] * C[s * c + j];
        }
        v_store(y + s * VL, sum[0] + sum[1]);
    }
    for (int j = 0; j < size; j++) v_store(h + j * VL, state[j]);
}

static void cross_states(int64_t n, float *h, const float *A2, const float *B, const float *C, int64_t c, const float *dt,
                         const float *du, float *y, int64_t count) {
    for (int64_t i = 0; i < n;) {
#define CROSS(size) \
    if (n - i >= size) { cross_block(size, h + i * VL, A2 + i * VL, B + i, C + i, c, dt, du, y, count); i += size; continue; }
        CROSS(BLOCK)
        CROSS(8)
        CROSS(4)
        CROSS(2)
        CROSS(1)
    }
}

static void cross_forward_task(void *context, int64_t index) {
    const cross_args *a = context;
    cross_task t = cross_make_task(a, index);
    int64_t states = a->n * VL, rows = CHUNK * VL, gap = 2 * rows + PAD, at[CHUNK];
    float *memory = scratch(sizeof(float) * (size_t)(t.tiles * (2 * states + (a->r + 2) * VL + gap) + 2 * (rows + PAD)
                                                     + CHUNK * t.c));
    float *h = memory, *A2 = h + t.tiles * states, *w = A2 + t.tiles * states, *bias = w + t.tiles * a->r * VL;
    float *skip = bias + t.tiles * VL, *u = skip + t.tiles * VL, *y = u + rows, *dt = u + t.tiles * gap;
    float *du = dt + rows + PAD, *steps = du + rows + PAD;
    for (int64_t k = t.part; k < 4; k += 2) {
        load_matrix(&t, A2, &a->A, k, a->n, LOG2E);
        load_matrix(&t, w, &a->w, k, a->r, 1.0f);
        load_matrix(&t, bias, &a->bias, k, 1, 1.0f);
        load_matrix(&t, skip, &a->D, k, 1, 1.0f);
        memset(h, 0, sizeof(float) * (size_t)(t.tiles * states));
        float *out = (float *)a->y.data + (t.batch * 2 + t.part) * t.l * a->e;
        for (int64_t chunk = 0; chunk < t.chunks; chunk++) {
            int64_t start = chunk * CHUNK, count = t.l - start < CHUNK ? t.l - start : CHUNK;
            positions(&t, k, start, count, at);
            gather(&t, u, gap, map_of(&a->u, t.batch), a->u.stride[1], at, count);
            gather_steps(&t, steps, k, at, count);
            if (a->save) memcpy(saved_at(&t, k, chunk), h, sizeof(float) * (size_t)(t.tiles * states));
            for (int64_t tile = 0; tile < t.tiles; tile++) {
                float *ut = u + tile * gap, *yt = y + tile * gap;
                vf D = v_load(skip + tile * VL);
                steps_of_tile(&t, w + tile * a->r * VL, bias + tile * VL, steps, ut, NULL, dt, du, count);
                for (int64_t i = 0; i < count * VL; i += VL) v_store(yt + i, D * v_load(ut + i));
                cross_states(a->n, h + tile * states, A2 + tile * states, steps + a->r, steps + a->r + a->n, t.c, dt, du,
                             yt, count);
            }
            scatter(&t, y, gap, out, a->e, at, count, k >= 2);
        }
    }
    free(memory);
}

void ssmzoo_cross_selective_scan_forward(const cross_args *a) {
    if (a->e && a->rows && a->cols) parallel_for(a->b * 2 * splits(a), a->threads, cross_forward_task, (void *)a);
}

// ------------------------------------------------------------------------------------------------------- backward

typedef struct {
    float *u, *slope, *dt, *du, *dy, *grad_du, *grad_dt;  // rows of a tile
} cross_rows;
enum { CROSS_ROWS = 7 };

static cross_rows rows_at(float *m) {
    const int64_t s = CHUNK * VL;
    return (cross_rows){m, m + s, m + 2 * s, m + 3 * s, m + 4 * s, m + 5 * s, m + 6 * s};
}

// Some states of a tile through a chunk: forwards from `start`, keeping decays and states, and back again.
// gB, gC: rows [step][size][VL], summed over tiles.
INLINE void cross_adjoint(const int size, const float *start, const float *A2, const float *B, const float *C, int64_t c,
                          cross_rows r, float *decay, float *after, float *gB, float *gC, float *dh_rows, float *dA_rows,
                          int64_t count) {
    vf x[BACK], dA[BACK], rate[BACK];
    for (int j = 0; j < size; j++) x[j] = v_load(start + j * VL), rate[j] = v_load(A2 + j * VL);
    for (int j = 0; j < size; j++) v_store(after + j * VL, x[j]);
    for (int64_t s = 0; s < count; s++) {
        vf d = v_load(r.dt + s * VL), in = v_load(r.du + s * VL);
#pragma GCC unroll 4
        for (int j = 0; j < size; j++) {
            vf keep = v_exp2(d * rate[j]);
            x[j] = keep * x[j] + in * B[s * c + j];
            v_store(decay + (s * size + j) * VL, keep);
            v_store(after + ((s + 1) * size + j) * VL, x[j]);
        }
    }
    for (int j = 0; j < size; j++) x[j] = v_load(dh_rows + j * VL), dA[j] = v_load(dA_rows + j * VL);
    for (int64_t s = count - 1; s >= 0; s--) {
        vf d = v_load(r.dt + s * VL), in = v_load(r.du + s * VL), dy = v_load(r.dy + s * VL);
        vf grad_du = v_load(r.grad_du + s * VL), grad_dt = v_load(r.grad_dt + s * VL);
#pragma GCC unroll 4
        for (int j = 0; j < size; j++) {
            int64_t i = (s * size + j) * VL;
            x[j] += dy * C[s * c + j];
            v_store(gC + i, v_load(gC + i) + dy * v_load(after + i + size * VL));
            v_store(gB + i, v_load(gB + i) + x[j] * in);
            grad_du += x[j] * B[s * c + j];
            x[j] *= v_load(decay + i);
            vf log_decay = x[j] * v_load(after + i);  // gradient of dt A
            dA[j] += log_decay * d;
            grad_dt += log_decay * rate[j];  // A log2(e): put right in finish_cross
        }
        v_store(r.grad_du + s * VL, grad_du);
        v_store(r.grad_dt + s * VL, grad_dt);
    }
    for (int j = 0; j < size; j++) v_store(dh_rows + j * VL, x[j]), v_store(dA_rows + j * VL, dA[j]);
}

// to[(i / size) * c + i % size] = sum over lanes of rows[i], i < total; the rows are cleared.
static void sum_lanes(float *rows, int64_t total, int64_t size, float *to, int64_t c) {
    for (int64_t first = 0; first < total; first += VL) {
        vf x[VL], sum = {0};
        float sums[VL];
        for (int64_t i = 0; i < VL; i++) x[i] = first + i < total ? v_load(rows + (first + i) * VL) : (vf){0};
        v_transpose(x);
        for (int i = 0; i < VL; i++) sum += x[i];
        v_store(sums, sum);
        for (int64_t i = first; i < first + VL && i < total; i++) to[i / size * c + i % size] = sums[i - first];
    }
    memset(rows, 0, sizeof(float) * (size_t)(total * VL));
}

typedef struct {  // [tile][n or r or 1][VL]; rows [tile][CROSS_ROWS][CHUNK][VL]
    float *A2, *w, *bias, *skip, *rows, *steps, *dsteps, *decay, *after;
    float *transposed, *ddt;  // [VL][CHUNK], gradients before the softplus; [r][CHUNK], those of dt_r
    float *dh, *dA, *dw, *dbias, *dD, *gB, *gC;  // start at zero
} cross_memory;

static float *cross_scratch(const cross_task *t, cross_memory *m) {
    int64_t states = t->tiles * t->a->n * VL, w = t->tiles * t->a->r * VL, one = t->tiles * VL, block = BACK * CHUNK * VL;
    int64_t sizes[] = {states, w, one, one, t->tiles * (CROSS_ROWS * CHUNK * VL + PAD), CHUNK * t->c, CHUNK * t->c, block + PAD,
                       block + BACK * VL + PAD, CHUNK * VL, CHUNK * t->a->r, states, states, w, one, one, block + PAD,
                       block + PAD};
    float **parts[] = {&m->A2, &m->w, &m->bias, &m->skip, &m->rows, &m->steps, &m->dsteps, &m->decay, &m->after, &m->transposed,
                       &m->ddt, &m->dh, &m->dA, &m->dw, &m->dbias, &m->dD, &m->gB, &m->gC};
    int64_t total = 0;
    for (int i = 0; i < 18; i++) total += (sizes[i] + 15) / 16 * 16;
    float *memory = scratch(sizeof(float) * (size_t)total), *p = memory;
    for (int i = 0; i < 18; i++) *parts[i] = p, p += (sizes[i] + 15) / 16 * 16;
    return memory;
}

// From the gradients of dt u and dt to those of u, W dt_r, W, dt_r, bias and D; r.du and r.slope take the first two.
static void finish_cross(const cross_task *t, cross_memory *m, cross_rows r, int64_t tile, int64_t count) {
    vf D = v_load(m->skip + tile * VL), dD = v_load(m->dD + tile * VL), dbias = v_load(m->dbias + tile * VL);
    for (int64_t s = 0; s < count; s++) {
        int64_t i = s * VL;
        vf u = v_load(r.u + i), dy = v_load(r.dy + i), grad_du = v_load(r.grad_du + i);
        vf ddt = (v_load(r.grad_dt + i) * 0.693147180559945309f + grad_du * u) * v_load(r.slope + i);
        v_store(r.du + i, grad_du * v_load(r.dt + i) + dy * D);
        v_store(r.slope + i, ddt);
        dD += dy * u;
        dbias += ddt;
    }
    v_store(m->dD + tile * VL, dD);
    v_store(m->dbias + tile * VL, dbias);
    float *dw = m->dw + tile * t->a->r * VL;
    const gemm_t g = {.A = m->steps, .am = 1, .ak = t->c, .B = r.slope, .ldb = VL, .C = dw, .ldc = VL, .from = dw, .keep = 1};
    gemm(&g, t->a->r, VL, count, GEMM_FULL);
    transpose(r.slope, VL, count, VL, m->transposed, CHUNK);
    const gemm_t back = {.A = m->w + tile * t->a->r * VL, .am = VL, .ak = 1, .B = m->transposed, .ldb = CHUNK, .C = m->ddt,
                         .ldc = CHUNK, .from = tile ? m->ddt : NULL, .keep = 1};
    gemm(&back, t->a->r, CHUNK, VL, GEMM_FULL);
}

static void cross_backward_chunk(const cross_task *t, cross_memory *m, int64_t k, int64_t chunk) {
    const cross_args *a = t->a;
    int64_t start = chunk * CHUNK, count = t->l - start < CHUNK ? t->l - start : CHUNK, at[CHUNK];
    int64_t gap = CROSS_ROWS * CHUNK * VL + PAD, n = a->n, c = t->c;
    const float *saved = saved_at(t, k, chunk), *B = m->steps + a->r, *C = B + n;
    cross_rows all = rows_at(m->rows);
    positions(t, k, start, count, at);
    gather(t, all.u, gap, map_of(&a->u, t->batch), a->u.stride[1], at, count);
    gather(t, all.dy, gap, map_of(&a->dy, t->batch), a->dy.stride[1], at, count);
    gather_steps(t, m->steps, k, at, count);
    for (int64_t tile = 0; tile < t->tiles; tile++) {
        cross_rows r = rows_at(m->rows + tile * gap);
        steps_of_tile(t, m->w + tile * a->r * VL, m->bias + tile * VL, m->steps, r.u, r.slope, r.dt, r.du, count);
        memset(r.grad_du, 0, sizeof(float) * (size_t)(2 * CHUNK * VL));  // grad_dt follows
    }
    for (int64_t i = 0; i < n;) {
        int size = n - i >= BACK ? BACK : n - i >= 2 ? 2 : 1;
        for (int64_t tile = 0; tile < t->tiles; tile++) {
            cross_rows r = rows_at(m->rows + tile * gap);
            int64_t p = (tile * n + i) * VL;
#define ADJOINT(size) cross_adjoint(size, saved + p, m->A2 + p, B + i, C + i, c, r, m->decay, m->after, m->gB, m->gC, m->dh + p, m->dA + p, count)
            if (size == BACK) ADJOINT(BACK);
            else if (size == 2) ADJOINT(2);
            else ADJOINT(1);
        }
        sum_lanes(m->gB, count * size, size, m->dsteps + a->r + i, c);
        sum_lanes(m->gC, count * size, size, m->dsteps + a->r + n + i, c);
        i += size;
    }
    for (int64_t tile = 0; tile < t->tiles; tile++) finish_cross(t, m, rows_at(m->rows + tile * gap), tile, count);
    for (int64_t s = 0; s < count; s++)
        for (int64_t j = 0; j < a->r; j++) m->dsteps[s * c + j] = m->ddt[j * CHUNK + s];
    scatter(t, all.du, gap, (float *)a->du.data + (t->batch * 2 + t->part) * t->l * a->e, a->e, at, count, k >= 2);
    float *dsteps = (float *)a->dsteps.data + (t->split * a->b + t->batch) * t->l * 4 * c + k * c;
    for (int64_t s = 0; s < count; s++) memcpy(dsteps + at[s] * 4 * c, m->dsteps + s * c, sizeof(float) * (size_t)c);
}

static void cross_backward_task(void *context, int64_t index) {
    const cross_args *a = context;
    cross_task t = cross_make_task(a, index);
    cross_memory m;
    float *memory = cross_scratch(&t, &m);
    for (int64_t k = t.part; k < 4; k += 2) {
        load_matrix(&t, m.A2, &a->A, k, a->n, LOG2E);
        load_matrix(&t, m.w, &a->w, k, a->r, 1.0f);
        load_matrix(&t, m.bias, &a->bias, k, 1, 1.0f);
        load_matrix(&t, m.skip, &a->D, k, 1, 1.0f);
        float *sums = m.dh;
        memset(sums, 0, (size_t)((char *)(m.gC + BACK * CHUNK * VL) - (char *)sums));
        for (int64_t chunk = t.chunks - 1; chunk >= 0; chunk--) cross_backward_chunk(&t, &m, k, chunk);
        store_matrix(&t, m.dA, &a->dA, k, a->n);
        store_matrix(&t, m.dw, &a->dw, k, a->r);
        store_matrix(&t, m.dbias, &a->dbias, k, 1);
        store_matrix(&t, m.dD, &a->dD, k, 1);
    }
    free(memory);
}

void ssmzoo_cross_selective_scan_backward(const cross_args *a) {
    if (a->e && a->rows && a->cols) parallel_for(a->b * 2 * splits(a), a->threads, cross_backward_task, (void *)a);
}
