// What the forward and the backward of the selective scan share: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,
// y_t = (<h_t, C_t> + D u_t) silu(z_t).
//
// Lanes run over channels: VL channels make a tile, whose states live in registers, one register per state index n,
// while time is passed over once. A sequence whose channels are contiguous floats is read and written in place, any other
// is brought into cache as rows of VL floats (a strip), a few hundred steps at once where time is contiguous, since every
// channel then lies in another page. States are saved at the start of every chunk; the backward recomputes a chunk
// forwards and then runs the adjoint backwards through it.
//
// A task is a batch entry and some tiles that share B and C. When groups are narrower than a tile, or B or C is
// constant in time, B and C are laid out per lane ("per_lane"), which serves every remaining case.
#pragma once
#include "parallel.h"
#include "tensor.h"

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

static inline plan make_plan(const scan_args *a) {
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

static inline task_info make_task(const scan_args *a, int64_t index) {
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

static inline int64_t tile_channel(const task_info *t, int64_t tile) {
    return t->part * t->p.part_channels + (t->first_tile + tile) * VL;
}

static inline int tile_lanes(const task_info *t, int64_t tile) {
    int64_t end = t->part * t->p.part_channels + t->groups * t->p.per_group;
    int64_t lanes = end - tile_channel(t, tile);
    return (int)(lanes < VL ? lanes : VL);
}

static inline int is_reset(const scan_args *a, int64_t batch, int64_t s) {
    if (!a->seq_idx.data || s == 0) return 0;
    int64_t row = batch * a->seq_idx.stride[0], step = a->seq_idx.stride[1];
    return get_index(&a->seq_idx, row + s * step) != get_index(&a->seq_idx, row + (s - 1) * step);
}

// First step in (from, end] at which a new sequence starts, or end.
static inline int64_t segment_end(const scan_args *a, int64_t batch, int64_t start, int64_t from, int64_t end) {
    if (!a->seq_idx.data) return end;
    for (from++; from < end && !is_reset(a, batch, start + from); from++) {}
    return from;
}

// A (e n) or a state (b e n) of a tile as rows [n][VL].
static inline void load_states(float *rows, const tensor *t, int64_t batch, int64_t channel, int lanes, int64_t n) {
    if (!t->data) memset(rows, 0, sizeof(float) * (size_t)(n * VL));
    else load_tile(rows, VL, at(t, batch, channel, 0), t->dtype, t->stride[1], t->stride[2], lanes, n);
}

static inline void store_states(const float *rows, const tensor *t, int64_t batch, int64_t channel, int lanes, int64_t n) {
    if (t->data) store_tile(rows, VL, at(t, batch, channel, 0), t->dtype, t->stride[1], t->stride[2], lanes, n);
}

static inline void load_rates(float *rows, const scan_args *a, int64_t channel, int lanes) {  // A log2(e), so that decay = 2^(dt A2)
    tensor A = {a->A.data, a->A.dtype, {0, a->A.stride[0], a->A.stride[1]}};
    load_states(rows, &A, 0, channel, lanes, a->n);
    for (int64_t i = 0; i < a->n; i++) v_store(rows + i * VL, v_load(rows + i * VL) * LOG2E);
}

static inline tensor saved_states(const scan_args *a, int64_t chunk) {  // saved (chunks b e n) -> (b e n)
    const tensor *t = &a->saved;
    return (tensor){t->data + 4 * chunk * t->stride[0], F32, {t->stride[1], t->stride[2], t->stride[3]}};
}

static inline void load_vector(float *row, const tensor *t, int64_t channel, int lanes) {  // (e)
    for (int lane = 0; lane < VL; lane++)
        row[lane] = t->data && lane < lanes ? get(t->data, t->dtype, (channel + lane) * t->stride[0]) : 0.0f;
}

// VL channels of a sequence: rows of VL floats, `step` floats apart.
typedef struct {
    float *data;
    int64_t step;
} strip;

INLINE vf strip_load(strip r, int64_t s) { return v_load(r.data + s * r.step); }
INLINE void strip_store(strip r, int64_t s, vf x) { v_store(r.data + s * r.step, x); }
INLINE strip strip_from(strip r, int64_t s) { return (strip){r.data + s * r.step, r.step}; }

// Where a sequence lies (b e l) from `start` on: the tensor itself where its channels are contiguous floats, or `buffer`.
static inline strip strip_of(const task_info *t, const tensor *m, float *buffer, int64_t tile, int64_t start) {
    if (m->dtype != F32 || m->stride[1] != 1 || tile_lanes(t, tile) != VL) return (strip){buffer, VL};
    return (strip){(float *)at(m, t->batch, tile_channel(t, tile), start), m->stride[2]};
}

static inline strip bring(const task_info *t, const tensor *m, float *buffer, int64_t tile, int64_t start, int64_t steps) {
    if (!m->data) return (strip){buffer, VL};
    strip r = strip_of(t, m, buffer, tile, start);
    if (r.data == buffer)
        load_tile(buffer, VL, at(m, t->batch, tile_channel(t, tile), start), m->dtype, m->stride[1], m->stride[2],
                  tile_lanes(t, tile), steps);
    return r;
}

static inline void put_back(const task_info *t, const tensor *m, float *buffer, int64_t tile, int64_t start, int64_t steps) {
    if (m->data && strip_of(t, m, buffer, tile, start).data == buffer)
        store_tile(buffer, VL, at(m, t->batch, tile_channel(t, tile), start), m->dtype, m->stride[1], m->stride[2],
                   tile_lanes(t, tile), steps);
}

// Steps brought into cache at once, a multiple of the chunk.
static inline int64_t steps_in_hand(const task_info *t, int64_t wanted) {
    int64_t chunk = t->a->chunk;
    return t->p.per_lane || chunk >= wanted ? chunk : wanted / chunk * chunk;
}

// B or C of one chunk. Shared by all lanes: element (t, n) at data[t * step + n]. Per lane: row [n][VL] at t * step.
typedef struct {
    const float *data;
    int64_t step;
} coefficients;

// Shared: use the tensor in place when its states are contiguous floats, otherwise transpose into `buffer`.
static inline coefficients shared_coefficients(const task_info *t, const tensor *m, float *buffer, int64_t s, int64_t steps) {
    int64_t n = t->a->n, padded = (n + VL - 1) / VL * VL;
    const char *from = at(m, t->batch, t->part, 0) + item_size(m->dtype) * s * m->stride[3];
    if (m->dtype == F32 && (m->stride[2] == 1 || n == 1)) return (coefficients){(const float *)from, m->stride[3]};
    for (int64_t i = 0; i < n; i += VL)
        load_tile(buffer + i, padded, from + item_size(m->dtype) * i * m->stride[2], m->dtype, m->stride[2], m->stride[3],
                  (int)(n - i < VL ? n - i : VL), steps);
    return (coefficients){buffer, padded};
}

static inline coefficients lane_coefficients(const task_info *t, const tensor *m, int64_t constant, float *buffer,
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

static inline int64_t coefficient_floats(const task_info *t, int64_t steps) {
    int64_t n = t->a->n;
    return steps * (t->p.per_lane ? n * VL : (n + VL - 1) / VL * VL + VL);
}

INLINE vf time_step(const scan_args *a, vf raw) { return a->softplus ? v_softplus(raw) : raw; }
