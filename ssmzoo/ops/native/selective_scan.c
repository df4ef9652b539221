// The selective scan: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = (<h_t, C_t> + D u_t) silu(z_t).
//
// Lanes run over channels: VL channels make a tile, whose states live in registers, one register per state index n,
// while time is passed over once. Time is cut into chunks; a chunk of a tile is brought into cache as rows of VL floats
// (transposed on the way when time is the contiguous axis), so that any layout costs the same. The backward starts from
// the states saved at chunk starts, recomputes a chunk forwards and then runs the adjoint backwards through it.
//
// A task is a batch entry and some tiles that share B and C. When groups are narrower than a tile, or B or C is
// constant in time, B and C are laid out per lane ("per_lane"), which serves every remaining case.
#include "parallel.h"
#include "tensor.h"

// Buffers that are read and written in the same step start at different places of a page: a load just behind a store to
// the same offset of another page would be held up (by 40 % of the whole backward, measured).
enum { SHIFT = 16 * 20 };
enum { BACK = 4 };  // states per block in the backward
#if VL == 16
enum { BLOCK = 16 };  // states per block in the forward: as many as registers hold
#else
enum { BLOCK = 8 };
#endif

typedef struct {
    tensor u, delta, A, B, C, D, z, bias, initial, seq_idx, out, last, saved;              // forward
    tensor dout, dlast, du, ddelta, dz, dinitial, dA, dD, dbias, dB_part, dC_part;           // backward
    // b e l n; g groups; constant_B, constant_C, softplus, save: bool; chunk: steps; tiles: per task; threads
    int64_t b, e, l, n, g, constant_B, constant_C, softplus, save, chunk, tiles, threads;
} scan_args;

// How channels are cut into parts that share B and C, tiles and tasks.
typedef struct {
    int64_t per_group, per_lane, part_channels, parts, part_groups, tiles_per_part, tasks_per_part;
} plan;

typedef struct {  // the part of the work that one task has in hand
    const scan_args *a;
    plan p;
    int64_t batch, part, split, groups, first_tile, tiles;
} task_info;

static plan make_plan(const scan_args *a) {
    plan p;
    p.per_group = a->e / a->g;
    p.per_lane = a->constant_B || a->constant_C || (p.per_group < VL && a->g > 1);
    p.part_groups = p.per_group < VL ? VL / p.per_group : 1;
    if (p.part_groups > a->g) p.part_groups = a->g;
    p.part_channels = p.per_group * p.part_groups;
    p.parts = (a->g + p.part_groups - 1) / p.part_groups;
    p.tiles_per_part = (p.part_channels + VL - 1) / VL;
    p.tasks_per_part = (p.tiles_per_part + a->tiles - 1) / a->tiles;
    return p;
}

static task_info make_task(const scan_args *a, int64_t index) {
    task_info t = {.a = a, .p = make_plan(a)};
    t.split = index % t.p.tasks_per_part;
    t.part = index / t.p.tasks_per_part % t.p.parts;
    t.batch = index / t.p.tasks_per_part / t.p.parts;
    int64_t left = a->g - t.part * t.p.part_groups;
    t.groups = left < t.p.part_groups ? left : t.p.part_groups;
    t.first_tile = t.split * a->tiles;
    int64_t tiles = t.p.tiles_per_part - t.first_tile;
    t.tiles = tiles < a->tiles ? tiles : a->tiles;
    return t;
}

static int64_t tile_channel(const task_info *t, int64_t tile) {
    return t->part * t->p.part_channels + (t->first_tile + tile) * VL;
}

static int tile_lanes(const task_info *t, int64_t tile) {
    int64_t end = t->part * t->p.part_channels + t->groups * t->p.per_group;
    int64_t lanes = end - tile_channel(t, tile);
    return (int)(lanes < VL ? lanes : VL);
}

static int is_reset(const scan_args *a, int64_t batch, int64_t s) {
    if (!a->seq_idx.data || s == 0) return 0;
    int64_t row = batch * a->seq_idx.stride[0], step = a->seq_idx.stride[1];
    return get_index(&a->seq_idx, row + s * step) != get_index(&a->seq_idx, row + (s - 1) * step);
}

// First step in (from, end] at which a new sequence starts, or end.
static int64_t segment_end(const scan_args *a, int64_t batch, int64_t start, int64_t from, int64_t end) {
    if (!a->seq_idx.data) return end;
    for (from++; from < end && !is_reset(a, batch, start + from); from++) {}
    return from;
}

// A (e n) or a state (b e n) of a tile as rows [n][VL].
static void load_states(float *rows, const tensor *t, int64_t batch, int64_t channel, int lanes, int64_t n) {
    if (!t->data) memset(rows, 0, sizeof(float) * (size_t)(n * VL));
    else load_tile(rows, VL, at(t, batch, channel, 0), t->dtype, t->stride[1], t->stride[2], lanes, n);
}

static void store_states(const float *rows, const tensor *t, int64_t batch, int64_t channel, int lanes, int64_t n) {
    if (t->data) store_tile(rows, VL, at(t, batch, channel, 0), t->dtype, t->stride[1], t->stride[2], lanes, n);
}

static void load_rates(float *rows, const scan_args *a, int64_t channel, int lanes) {  // A log2(e), so that decay = 2^(dt A2)
    tensor A = {a->A.data, a->A.dtype, {0, a->A.stride[0], a->A.stride[1]}};
    load_states(rows, &A, 0, channel, lanes, a->n);
    for (int64_t i = 0; i < a->n; i++) v_store(rows + i * VL, v_load(rows + i * VL) * LOG2E);
}

static tensor saved_states(const scan_args *a, int64_t chunk) {  // saved (chunks b e n) -> (b e n)
    const tensor *t = &a->saved;
    return (tensor){t->data + 4 * chunk * t->stride[0], F32, {t->stride[1], t->stride[2], t->stride[3]}};
}

static void load_vector(float *row, const tensor *t, int64_t channel, int lanes) {  // (e)
    for (int lane = 0; lane < VL; lane++)
        row[lane] = t->data && lane < lanes ? get(t->data, t->dtype, (channel + lane) * t->stride[0]) : 0.0f;
}

// A sequence (b e l) of neighbouring tiles, rows `gap` floats apart.
static void load_sequence(const task_info *t, float *rows, int64_t gap, const tensor *m, int64_t first, int64_t tiles,
                          int64_t start, int64_t steps) {
    int64_t channel = tile_channel(t, first), last = first + tiles - 1;
    load_tiles(rows, gap, at(m, t->batch, channel, start), m->dtype, m->stride[1], m->stride[2],
               tile_channel(t, last) + tile_lanes(t, last) - channel, steps);
}

static void store_sequence(const task_info *t, const float *rows, int64_t gap, const tensor *m, int64_t first,
                           int64_t tiles, int64_t start, int64_t steps) {
    int64_t channel = tile_channel(t, first), last = first + tiles - 1;
    store_tiles(rows, gap, at(m, t->batch, channel, start), m->dtype, m->stride[1], m->stride[2],
                tile_channel(t, last) + tile_lanes(t, last) - channel, steps);
}

// B or C of one chunk. Shared by all lanes: element (t, n) at data[t * step + n]. Per lane: row [n][VL] at t * step.
typedef struct {
    const float *data;
    int64_t step;
} coefficients;

// Shared: use the tensor in place when its states are contiguous floats, otherwise transpose into `buffer`.
static coefficients shared_coefficients(const task_info *t, const tensor *m, float *buffer, int64_t s, int64_t steps) {
    int64_t n = t->a->n, padded = (n + VL - 1) / VL * VL;
    const char *from = at(m, t->batch, t->part, 0) + item_size(m->dtype) * s * m->stride[3];
    if (m->dtype == F32 && (m->stride[2] == 1 || n == 1)) return (coefficients){(const float *)from, m->stride[3]};
    for (int64_t i = 0; i < n; i += VL)
        load_tile(buffer + i, padded, from + item_size(m->dtype) * i * m->stride[2], m->dtype, m->stride[2], m->stride[3],
                  (int)(n - i < VL ? n - i : VL), steps);
    return (coefficients){buffer, padded};
}

static coefficients lane_coefficients(const task_info *t, const tensor *m, int64_t constant, float *buffer,
                                      int64_t channel, int lanes, int64_t s, int64_t steps) {
    int64_t n = t->a->n;
    if (constant) {  // (e n)
        load_tile(buffer, VL, at(m, channel, 0, 0), m->dtype, m->stride[0], m->stride[1], lanes, n);
        return (coefficients){buffer, 0};
    }
    for (int lane = 0; lane < VL; lane++) {
        int64_t group = (channel + (lane < lanes ? lane : 0)) / t->p.per_group;
        const char *from = at(m, t->batch, group, 0);
        for (int64_t i = 0; i < steps; i++)
            for (int64_t k = 0; k < n; k++)
                buffer[(i * n + k) * VL + lane] =
                    lane < lanes ? get(from, m->dtype, k * m->stride[2] + (s + i) * m->stride[3]) : 0.0f;
    }
    return (coefficients){buffer, n * VL};
}

static int64_t coefficient_floats(const task_info *t, int64_t steps) {
    int64_t n = t->a->n;
    return steps * (t->p.per_lane ? n * VL : (n + VL - 1) / VL * VL + VL);
}

// How much of a task is brought into cache at once: `tiles` tiles over `steps` steps, a multiple of the chunk. Where
// time is contiguous, long rows of few channels, since every row lies in another page; otherwise many channels.
typedef struct {
    int64_t tiles, steps;
} portion;

static portion make_portion(const task_info *t, int64_t tiles, int64_t steps) {
    int64_t chunk = t->a->chunk;
    if (t->p.per_lane) return (portion){1, chunk};
    if (t->a->u.stride[2] != 1 || chunk >= steps) return (portion){t->tiles, chunk};
    return (portion){t->tiles < tiles ? t->tiles : tiles, steps / chunk * chunk};
}

// raw = delta + bias, dt = softplus(raw) or raw, du = dt u.
static void time_steps(const scan_args *a, float *raw, float *dt, const float *u, float *du, const float *bias, int64_t steps) {
    vf shift = v_load(bias);
    for (int64_t s = 0; s < steps; s++) {
        vf x = v_load(raw + s * VL) + shift;
        vf d = a->softplus ? v_softplus(x) : x;
        v_store(raw + s * VL, x);
        v_store(dt + s * VL, d);
        v_store(du + s * VL, d * v_load(u + s * VL));
    }
}

// One block of `count` states over steps [from, to): h (rows) is carried, y gains <h, C>.
INLINE void forward_block(int count, int per_lane, float *h, const float *A2, coefficients B, coefficients C,
                          const float *dt, const float *du, float *y, int64_t from, int64_t to) {
    vf state[BLOCK];
    for (int j = 0; j < count; j++) state[j] = v_load(h + j * VL);
    for (int64_t s = from; s < to; s++) {
        vf d = v_load(dt + s * VL), x = v_load(du + s * VL), sum[2] = {v_load(y + s * VL), {0}};
        const float *b = B.data + s * B.step, *c = C.data + s * C.step;
#pragma GCC unroll 16
        for (int j = 0; j < count; j++) {
            vf decay = v_exp2(d * v_load(A2 + j * VL));
            state[j] = decay * state[j] + x * (per_lane ? v_load(b + j * VL) : v_set(b[j]));
            sum[j & 1] += state[j] * (per_lane ? v_load(c + j * VL) : v_set(c[j]));
        }
        v_store(y + s * VL, sum[0] + sum[1]);
    }
    for (int j = 0; j < count; j++) v_store(h + j * VL, state[j]);
}

static void forward_states(int64_t n, int per_lane, float *h, const float *A2, coefficients B, coefficients C,
                           const float *dt, const float *du, float *y, int64_t from, int64_t to) {
    for (int64_t i = 0; i < n;) {
        int64_t k = per_lane ? i * VL : i;
        coefficients b = {B.data + k, B.step}, c = {C.data + k, C.step};
        float *hi = h + i * VL;
        const float *ai = A2 + i * VL;
#define FORWARD(count) \
    if (n - i >= count) { \
        if (per_lane) forward_block(count, 1, hi, ai, b, c, dt, du, y, from, to); \
        else forward_block(count, 0, hi, ai, b, c, dt, du, y, from, to); \
        i += count; \
        continue; \
    }
        FORWARD(BLOCK)
#if VL == 16
        FORWARD(8)
#endif
        FORWARD(4)
        FORWARD(1)
    }
}

// One tile over the steps in hand, from rows u, raw, z to y.
static void forward_tile(const task_info *t, float *h, const float *A2, coefficients B, coefficients C, float *u,
                         int64_t rows, float *dt, float *du, int64_t tile, int64_t start, int64_t steps) {
    const scan_args *a = t->a;
    int64_t n = a->n, channel = tile_channel(t, tile);
    int lanes = tile_lanes(t, tile);
    float *raw = u + rows, *y = raw + rows, *z = y + rows, bias[VL], skip[VL];
    load_vector(bias, &a->bias, channel, lanes);
    load_vector(skip, &a->D, channel, lanes);
    time_steps(a, raw, dt, u, du, bias, steps);
    for (int64_t i = 0; i < steps * VL; i += VL) v_store(y + i, v_load(skip) * v_load(u + i));
    for (int64_t from = 0, to; from < steps; from = to) {
        int64_t chunk_end = a->save ? (from / a->chunk + 1) * a->chunk : steps;
        if (a->save && from % a->chunk == 0) {
            tensor saved = saved_states(a, (start + from) / a->chunk);
            store_states(h, &saved, t->batch, channel, lanes, n);
        }
        to = segment_end(a, t->batch, start, from, chunk_end < steps ? chunk_end : steps);
        if (is_reset(a, t->batch, start + from)) memset(h, 0, sizeof(float) * (size_t)(n * VL));
        forward_states(n, (int)t->p.per_lane, h, A2, B, C, dt, du, y, from, to);
    }
    for (int64_t i = 0; a->z.data && i < steps * VL; i += VL)
        v_store(y + i, v_load(y + i) * (v_load(z + i) * v_sigmoid(v_load(z + i))));
}

static void forward_task(void *context, int64_t index) {
    const scan_args *a = context;
    task_info t = make_task(a, index);
    portion hand = make_portion(&t, 1, 256);
    int64_t n = a->n, rows = hand.steps * VL, states = n * VL, gap = 4 * rows + SHIFT;  // per tile: u, raw, y, z
    int64_t coefficients_size = coefficient_floats(&t, hand.steps);
    float *memory = scratch(sizeof(float) * (size_t)(t.tiles * 2 * states + hand.tiles * gap + 2 * rows + 2 * SHIFT + 2 * coefficients_size));
    float *h = memory, *A2 = h + t.tiles * states, *tiles = A2 + t.tiles * states, *dt = tiles + hand.tiles * gap;
    float *du = dt + rows + SHIFT, *bbuf = du + rows + SHIFT, *cbuf = bbuf + coefficients_size;
    for (int64_t k = 0; k < t.tiles; k++) {
        load_rates(A2 + k * states, a, tile_channel(&t, k), tile_lanes(&t, k));
        load_states(h + k * states, &a->initial, t.batch, tile_channel(&t, k), tile_lanes(&t, k), n);
    }
    for (int64_t start = 0; start < a->l; start += hand.steps) {
        int64_t steps = a->l - start < hand.steps ? a->l - start : hand.steps;
        coefficients B = {0}, C = {0};
        if (!t.p.per_lane) {
            B = shared_coefficients(&t, &a->B, bbuf, start, steps);
            C = shared_coefficients(&t, &a->C, cbuf, start, steps);
        }
        for (int64_t first = 0; first < t.tiles; first += hand.tiles) {
            int64_t count = t.tiles - first < hand.tiles ? t.tiles - first : hand.tiles;
            load_sequence(&t, tiles, gap, &a->u, first, count, start, steps);
            load_sequence(&t, tiles + rows, gap, &a->delta, first, count, start, steps);
            if (a->z.data) load_sequence(&t, tiles + 3 * rows, gap, &a->z, first, count, start, steps);
            for (int64_t k = first; k < first + count; k++) {
                if (t.p.per_lane) {
                    B = lane_coefficients(&t, &a->B, a->constant_B, bbuf, tile_channel(&t, k), tile_lanes(&t, k), start, steps);
                    C = lane_coefficients(&t, &a->C, a->constant_C, cbuf, tile_channel(&t, k), tile_lanes(&t, k), start, steps);
                }
                forward_tile(&t, h + k * states, A2 + k * states, B, C, tiles + (k - first) * gap, rows, dt, du, k, start, steps);
            }
            store_sequence(&t, tiles + 2 * rows, gap, &a->out, first, count, start, steps);
        }
    }
    for (int64_t k = 0; k < t.tiles; k++)
        store_states(h + k * states, &a->last, t.batch, tile_channel(&t, k), tile_lanes(&t, k), n);
    free(memory);
}

void ssmzoo_selective_scan_forward(const scan_args *a) {
    if (!a->e) return;
    plan p = make_plan(a);
    parallel_for(a->b * p.parts * p.tasks_per_part, a->threads, forward_task, (void *)a);
}

// ------------------------------------------------------------------------------------------------------- backward

typedef struct {  // rows [step][VL] of one tile and chunk
    float *u, *raw, *dt, *du, *z, *dout, *dy, *y, *grad_du, *grad_dt;
} rows_of_tile;
enum { ROWS = 10 };
typedef struct {  // rows [step][count][VL] of one block of states; `after` has one step more: the state before the chunk
    float *decay, *after, *grad_B, *grad_C;
} rows_of_block;

static rows_of_tile tile_rows(float *memory, int64_t size) {
    float *m[ROWS];
    for (int i = 0; i < ROWS; i++) m[i] = memory + i * size;
    return (rows_of_tile){m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7], m[8], m[9]};
}

// Steps [from, to) forwards, keeping decays and states; y gains <h, C> when the gate will want it.
INLINE void recompute_block(int count, int per_lane, int gated, const float *start, const float *A2, coefficients B,
                            coefficients C, rows_of_tile r, rows_of_block k, int64_t from, int64_t to) {
    vf state[BACK], rate[BACK];
    for (int j = 0; j < count; j++) state[j] = v_load(start + j * VL), rate[j] = v_load(A2 + j * VL);
    for (int64_t s = from; s < to; s++) {
        vf d = v_load(r.dt + s * VL), x = v_load(r.du + s * VL), sum = {0};
        const float *b = B.data + s * B.step, *c = C.data + s * C.step;
#pragma GCC unroll 4
        for (int j = 0; j < count; j++) {
            vf decay = v_exp2(d * rate[j]);
            v_store(k.decay + (s * count + j) * VL, decay);
            state[j] = decay * state[j] + x * (per_lane ? v_load(b + j * VL) : v_set(b[j]));
            v_store(k.after + ((s + 1) * count + j) * VL, state[j]);
            if (gated) sum += state[j] * (per_lane ? v_load(c + j * VL) : v_set(c[j]));
        }
        if (gated) v_store(r.y + s * VL, v_load(r.y + s * VL) + sum);
    }
}

// Steps [from, to) backwards. dh and dA (rows) are carried; `start` holds the state before step `from`.
INLINE void adjoint_block(int count, int per_lane, const float *start, const float *A2, coefficients B, coefficients C,
                          rows_of_tile r, rows_of_block k, float *dh_rows, float *dA_rows, int64_t from, int64_t to) {
    vf dh[BACK], dA[BACK], rate[BACK];
    for (int j = 0; j < count; j++)
        dh[j] = v_load(dh_rows + j * VL), dA[j] = v_load(dA_rows + j * VL), rate[j] = v_load(A2 + j * VL);
    for (int64_t s = to - 1; s >= from; s--) {
        vf d = v_load(r.dt + s * VL), x = v_load(r.du + s * VL), dy = v_load(r.dy + s * VL);
        vf grad_du = v_load(r.grad_du + s * VL), grad_dt = v_load(r.grad_dt + s * VL);
        const float *b = B.data + s * B.step, *c = C.data + s * C.step;
        const float *before = s > from ? k.after + s * count * VL : start;
        float *gb = k.grad_B + s * count * VL, *gc = k.grad_C + s * count * VL;
#pragma GCC unroll 4
        for (int j = 0; j < count; j++) {
            dh[j] += dy * (per_lane ? v_load(c + j * VL) : v_set(c[j]));
            v_store(gc + j * VL, v_load(gc + j * VL) + dy * v_load(k.after + ((s + 1) * count + j) * VL));
            v_store(gb + j * VL, v_load(gb + j * VL) + dh[j] * x);
            grad_du += dh[j] * (per_lane ? v_load(b + j * VL) : v_set(b[j]));
            dh[j] *= v_load(k.decay + (s * count + j) * VL);
            vf log_decay = dh[j] * v_load(before + j * VL);  // gradient of dt A
            dA[j] += log_decay * d;
            grad_dt += log_decay * rate[j];  // A log2(e): put right in finish_tile
        }
        v_store(r.grad_du + s * VL, grad_du);
        v_store(r.grad_dt + s * VL, grad_dt);
    }
    for (int j = 0; j < count; j++) v_store(dh_rows + j * VL, dh[j]), v_store(dA_rows + j * VL, dA[j]);
}

INLINE void through_block(int count, int per_lane, int gated, const task_info *t, const float *saved, const float *A2,
                          coefficients B, coefficients C, rows_of_tile r, rows_of_block k, float *dh, float *dA,
                          int64_t start, int64_t steps) {
    static const float zeros[BACK * VL];
    for (int64_t from = 0, to; from < steps; from = to) {
        to = segment_end(t->a, t->batch, start, from, steps);
        const float *h = is_reset(t->a, t->batch, start + from) ? zeros : saved;
        recompute_block(count, per_lane, gated, h, A2, B, C, r, k, from, to);
    }
    for (int64_t to = steps, from; to > 0; to = from) {
        from = t->a->seq_idx.data ? to - 1 : 0;
        while (from > 0 && !is_reset(t->a, t->batch, start + from)) from--;
        int fresh = is_reset(t->a, t->batch, start + from);
        adjoint_block(count, per_lane, fresh ? zeros : saved, A2, B, C, r, k, dh, dA, from, to);
        if (fresh) memset(dh, 0, sizeof(float) * (size_t)(count * VL));
    }
}

static void begin_tile(const task_info *t, rows_of_tile r, int64_t channel, int lanes, int64_t steps) {
    const scan_args *a = t->a;
    float bias[VL], skip[VL];
    load_vector(bias, &a->bias, channel, lanes);
    load_vector(skip, &a->D, channel, lanes);
    time_steps(a, r.raw, r.dt, r.u, r.du, bias, steps);
    for (int64_t i = 0; i < steps * VL; i += VL) {
        vf dout = v_load(r.dout + i), z = {0};
        if (a->z.data) z = v_load(r.z + i), v_store(r.y + i, v_load(skip) * v_load(r.u + i));
        v_store(r.dy + i, a->z.data ? dout * z * v_sigmoid(z) : dout);
        v_store(r.grad_du + i, (vf){0});
        v_store(r.grad_dt + i, (vf){0});
    }
}

// From the gradients of dt u and dt to those of u, delta and z; sums for D and the bias.
static void finish_tile(const task_info *t, rows_of_tile r, float *dD, float *dbias, int64_t channel, int lanes,
                        int64_t steps) {
    const scan_args *a = t->a;
    float skip[VL];
    load_vector(skip, &a->D, channel, lanes);
    vf sum_D = v_load(dD), sum_bias = v_load(dbias);
    for (int64_t i = 0; i < steps * VL; i += VL) {
        vf u = v_load(r.u + i), dy = v_load(r.dy + i), grad_du = v_load(r.grad_du + i);
        vf ddt = v_load(r.grad_dt + i) * 0.693147180559945309f + grad_du * u;
        if (a->softplus) ddt *= v_sigmoid(v_load(r.raw + i));
        if (a->z.data) {
            vf z = v_load(r.z + i), sigma = v_sigmoid(z);
            v_store(r.z + i, v_load(r.dout + i) * v_load(r.y + i) * sigma * (1.0f + z * (1.0f - sigma)));
        }
        v_store(r.du + i, grad_du * v_load(r.dt + i) + dy * v_load(skip));
        v_store(r.raw + i, ddt);
        sum_D += dy * u;
        sum_bias += ddt;
    }
    v_store(dD, sum_D);
    v_store(dbias, sum_bias);
}

// Where the task's contribution to dB or dC of a group goes: rows (l n) of the partial sums (splits b g l n).
static float *partial(const task_info *t, const tensor *part, int64_t group) {
    const int64_t *stride = part->stride;  // of splits, b, g, l
    return (float *)part->data + t->split * stride[0] + t->batch * stride[1] + group * stride[2];
}

// Shared B, C: rows [step][count][VL] summed over lanes, in a fixed order, into partial sums at states i ..
static void reduce_lanes(const task_info *t, const tensor *part, float *rows, int count, int64_t i, int64_t start, int64_t steps) {
    float *to = partial(t, part, t->part) + start * t->a->n + i;
    for (int64_t first = 0; first < steps * count; first += VL) {
        vf x[VL], sum = {0};
        float sums[VL];
        for (int k = 0; k < VL; k++) x[k] = first + k < steps * count ? v_load(rows + (first + k) * VL) : (vf){0};
        v_transpose(x);
        for (int k = 0; k < VL; k++) sum += x[k];
        v_store(sums, sum);
        for (int64_t k = first; k < first + VL && k < steps * count; k++) to[k / count * t->a->n + k % count] = sums[k - first];
    }
    memset(rows, 0, sizeof(float) * (size_t)(steps * count * VL));
}

// B, C per lane: rows added to the partial sums of each lane's group, or, when constant, summed over time into `total`.
static void scatter_lanes(const task_info *t, const tensor *part, int64_t constant, float *rows, float *total, int count,
                          int64_t i, int64_t channel, int lanes, int64_t start, int64_t steps) {
    if (constant) {
        for (int j = 0; j < count; j++) {
            vf sum = v_load(total + j * VL);
            for (int64_t s = 0; s < steps; s++) sum += v_load(rows + (s * count + j) * VL);
            v_store(total + j * VL, sum);
        }
    } else {
        for (int lane = 0; lane < lanes; lane++) {
            float *to = partial(t, part, (channel + lane) / t->p.per_group) + start * t->a->n + i;
            for (int64_t s = 0; s < steps; s++)
                for (int j = 0; j < count; j++) to[s * t->a->n + j] += rows[(s * count + j) * VL + lane];
        }
    }
    memset(rows, 0, sizeof(float) * (size_t)(steps * count * VL));
}

typedef struct {  // memory of a backward task; [tiles][n][VL] unless said otherwise
    float *A2, *saved, *dh, *dA, *dB, *dC;
    float *dD, *dbias;  // [tiles][VL]
    float *rows;        // [tiles in hand][ROWS][step][VL]
    float *bbuf, *cbuf;
    rows_of_block block;
} backward_memory;

static void *backward_scratch(const task_info *t, backward_memory *m) {
    int64_t states = t->tiles * t->a->n * VL, rows = t->a->chunk * VL, hand = t->p.per_lane ? 1 : t->tiles;
    int64_t coefficients_size = coefficient_floats(t, t->a->chunk);
    int64_t zeroed = 5 * states + 2 * t->tiles * VL + 2 * BACK * rows + SHIFT;
    int64_t total = zeroed + states + hand * (ROWS * rows + SHIFT) + 2 * coefficients_size + 2 * BACK * rows + BACK * VL + 6 * SHIFT;
    float *p = scratch(sizeof(float) * (size_t)total), *memory = p;
    memset(p, 0, sizeof(float) * (size_t)zeroed);
    m->saved = p, m->dh = p += states, m->dA = p += states, m->dB = p += states, m->dC = p += states;
    m->dD = p += states, m->dbias = p += t->tiles * VL;
    m->block.grad_B = p += t->tiles * VL, m->block.grad_C = p += BACK * rows + SHIFT;
    m->A2 = p += BACK * rows + SHIFT;
    m->rows = p += states;
    m->bbuf = p += hand * (ROWS * rows + SHIFT), m->cbuf = p += coefficients_size;
    m->block.decay = p += coefficients_size + 2 * SHIFT;
    m->block.after = p + BACK * rows + SHIFT;
    return memory;
}

// All blocks of states of the tiles [first, first + count) through one chunk.
static void backward_chunk(const task_info *t, backward_memory *m, int64_t first, int64_t tiles, int64_t start, int64_t steps) {
    const scan_args *a = t->a;
    int64_t n = a->n, states = n * VL, rows = a->chunk * VL;
    int per_lane = (int)t->p.per_lane, gated = a->z.data != NULL;
    coefficients B, C;
    if (per_lane) {
        int64_t channel = tile_channel(t, first);
        B = lane_coefficients(t, &a->B, a->constant_B, m->bbuf, channel, tile_lanes(t, first), start, steps);
        C = lane_coefficients(t, &a->C, a->constant_C, m->cbuf, channel, tile_lanes(t, first), start, steps);
    } else {
        B = shared_coefficients(t, &a->B, m->bbuf, start, steps);
        C = shared_coefficients(t, &a->C, m->cbuf, start, steps);
    }
    int64_t gap = ROWS * rows + SHIFT;
    rows_of_tile all = tile_rows(m->rows, rows);
    load_sequence(t, all.u, gap, &a->u, first, tiles, start, steps);
    load_sequence(t, all.raw, gap, &a->delta, first, tiles, start, steps);
    load_sequence(t, all.dout, gap, &a->dout, first, tiles, start, steps);
    if (gated) load_sequence(t, all.z, gap, &a->z, first, tiles, start, steps);
    for (int64_t k = 0; k < tiles; k++)
        begin_tile(t, tile_rows(m->rows + k * gap, rows), tile_channel(t, first + k), tile_lanes(t, first + k), steps);
    for (int64_t i = 0; i < n;) {
        int count = n - i >= BACK ? BACK : n - i >= 2 ? 2 : 1;
        coefficients b = {B.data + (per_lane ? i * VL : i), B.step}, c = {C.data + (per_lane ? i * VL : i), C.step};
        for (int64_t k = 0; k < tiles; k++) {
            rows_of_tile r = tile_rows(m->rows + k * gap, rows);
            int64_t place = (first + k) * states + i * VL;
#define THROUGH(count, per_lane, gated)     through_block(count, per_lane, gated, t, m->saved + place, m->A2 + place, b, c, r, m->block, m->dh + place, m->dA + place, start, steps)
#define THROUGH_LANES(count, gated) if (per_lane) THROUGH(count, 1, gated); else THROUGH(count, 0, gated)
            if (count == BACK) { if (gated) { THROUGH_LANES(BACK, 1); } else { THROUGH_LANES(BACK, 0); } }
            else if (count == 2) { THROUGH_LANES(2, gated); }
            else { THROUGH_LANES(1, gated); }
        }
        if (per_lane) {
            int64_t channel = tile_channel(t, first), place = first * states + i * VL;
            int lanes = tile_lanes(t, first);
            scatter_lanes(t, &a->dB_part, a->constant_B, m->block.grad_B, m->dB + place, count, i, channel, lanes, start, steps);
            scatter_lanes(t, &a->dC_part, a->constant_C, m->block.grad_C, m->dC + place, count, i, channel, lanes, start, steps);
        } else {
            reduce_lanes(t, &a->dB_part, m->block.grad_B, count, i, start, steps);
            reduce_lanes(t, &a->dC_part, m->block.grad_C, count, i, start, steps);
        }
        i += count;
    }
    for (int64_t k = first; k < first + tiles; k++)
        finish_tile(t, tile_rows(m->rows + (k - first) * gap, rows), m->dD + k * VL, m->dbias + k * VL, tile_channel(t, k),
                    tile_lanes(t, k), steps);
    store_sequence(t, all.du, gap, &a->du, first, tiles, start, steps);
    store_sequence(t, all.raw, gap, &a->ddelta, first, tiles, start, steps);
    if (gated) store_sequence(t, all.z, gap, &a->dz, first, tiles, start, steps);
}

static void backward_task(void *context, int64_t index) {
    const scan_args *a = context;
    task_info t = make_task(a, index);
    backward_memory m;
    void *memory = backward_scratch(&t, &m);
    int64_t n = a->n, states = n * VL, hand = t.p.per_lane ? 1 : t.tiles;
    if (t.p.per_lane)
        for (int64_t g = t.part * t.p.part_groups; g < t.part * t.p.part_groups + t.groups; g++) {
            if (!a->constant_B) memset(partial(&t, &a->dB_part, g), 0, sizeof(float) * (size_t)(a->l * n));
            if (!a->constant_C) memset(partial(&t, &a->dC_part, g), 0, sizeof(float) * (size_t)(a->l * n));
        }
    for (int64_t k = 0; k < t.tiles; k++) {
        load_rates(m.A2 + k * states, a, tile_channel(&t, k), tile_lanes(&t, k));
        load_states(m.dh + k * states, &a->dlast, t.batch, tile_channel(&t, k), tile_lanes(&t, k), n);
    }
    for (int64_t chunk = (a->l + a->chunk - 1) / a->chunk - 1; chunk >= 0; chunk--) {
        int64_t start = chunk * a->chunk, steps = a->l - start < a->chunk ? a->l - start : a->chunk;
        tensor saved = saved_states(a, chunk);
        for (int64_t k = 0; k < t.tiles; k++)
            load_states(m.saved + k * states, &saved, t.batch, tile_channel(&t, k), tile_lanes(&t, k), n);
        for (int64_t k = 0; k < t.tiles; k += hand) backward_chunk(&t, &m, k, hand, start, steps);
    }
    for (int64_t k = 0; k < t.tiles; k++) {
        int64_t channel = tile_channel(&t, k);
        int lanes = tile_lanes(&t, k);
        store_states(m.dh + k * states, &a->dinitial, t.batch, channel, lanes, n);
        store_states(m.dA + k * states, &a->dA, t.batch, channel, lanes, n);
        if (a->constant_B) store_states(m.dB + k * states, &a->dB_part, t.batch, channel, lanes, n);
        if (a->constant_C) store_states(m.dC + k * states, &a->dC_part, t.batch, channel, lanes, n);
        for (int lane = 0; lane < lanes; lane++) {
            if (a->D.data) put(at(&a->dD, t.batch, channel + lane, 0), F32, 0, m.dD[k * VL + lane]);
            if (a->bias.data) put(at(&a->dbias, t.batch, channel + lane, 0), F32, 0, m.dbias[k * VL + lane]);
        }
    }
    free(memory);
}

void ssmzoo_selective_scan_backward(const scan_args *a) {
    if (!a->e) return;
    plan p = make_plan(a);
    parallel_for(a->b * p.parts * p.tasks_per_part, a->threads, backward_task, (void *)a);
}
