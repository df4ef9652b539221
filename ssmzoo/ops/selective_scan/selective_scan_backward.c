// The backward of the selective scan; selective_scan.h says how it is laid out. A chunk of all tiles of a task is in hand at
// once, block of states by block of states, so that the sums over lanes, for B and C, are taken once for all tiles.
#include "selective_scan.h"

// Buffers that are read and written in the same step start at different offsets in a page: a load just behind a store to
// the same offset of another page is held up.
enum { SHIFT = 16 * 20 };
enum { BLOCK = 4 };   // states per block
enum { HAND = 128 };  // steps brought into cache at once

typedef struct {  // one tile and chunk; x = dt u. The outputs may lie where the inputs are: step s is read before it is written
    strip u, delta, dout, z, du, ddelta, dz;
    float *dt, *x, *dy, *y, *grad_x, *grad_dt;  // [step][VL]
    vf bias, skip, steepest;
    int bounded;  // |dt A2| <= EXP2_BOUND throughout
} rows_of_tile;
enum { INPUTS = 4, ROWS = 6 };
typedef struct {  // rows [step][count][VL] of one block of states; `after` has one step more: the state before the chunk
    float *decay, *after, *grad_B, *grad_C;
} rows_of_block;

// Steps [from, to) forwards, keeping decays and states; y gains <h, C> when the gate will want it.
INLINE void recompute_block(const int count, const int per_lane, const int gated, const int range, const float *start, const float *A2,
                            coefficients B, coefficients C, const rows_of_tile *r, rows_of_block k, int64_t from, int64_t to) {
    vf state[BLOCK], rate[BLOCK];
    for (int j = 0; j < count; j++) state[j] = v_load(start + j * VL), rate[j] = v_load(A2 + j * VL);
    for (int64_t s = from; s < to; s++) {
        vf d = v_load(r->dt + s * VL), x = v_load(r->x + s * VL), sum = {0};
        const float *b = B.data + s * B.step, *c = C.data + s * C.step;
#pragma GCC unroll 4
        for (int j = 0; j < count; j++) {
            vf decay = v_exp2_of(d * rate[j], range);
            v_store(k.decay + (s * count + j) * VL, decay);
            state[j] = decay * state[j] + x * (per_lane ? v_load(b + j * VL) : v_set(b[j]));
            v_store(k.after + ((s + 1) * count + j) * VL, state[j]);
            if (gated) sum += state[j] * (per_lane ? v_load(c + j * VL) : v_set(c[j]));
        }
        if (gated) v_store(r->y + s * VL, v_load(r->y + s * VL) + sum);
    }
}

// Steps [from, to) backwards. dh and dA (rows) are carried; `start` holds the state before step `from`.
INLINE void adjoint_block(const int count, const int per_lane, const float *start, const float *A2, coefficients B, coefficients C,
                          const rows_of_tile *r, rows_of_block k, float *dh_rows, float *dA_rows, int64_t from, int64_t to) {
    vf dh[BLOCK], dA[BLOCK], rate[BLOCK];
    for (int j = 0; j < count; j++)
        dh[j] = v_load(dh_rows + j * VL), dA[j] = v_load(dA_rows + j * VL), rate[j] = v_load(A2 + j * VL);
    for (int64_t s = to - 1; s >= from; s--) {
        vf d = v_load(r->dt + s * VL), x = v_load(r->x + s * VL), dy = v_load(r->dy + s * VL);
        vf grad_x = v_load(r->grad_x + s * VL), grad_dt = v_load(r->grad_dt + s * VL);
        const float *b = B.data + s * B.step, *c = C.data + s * C.step;
        const float *before = s > from ? k.after + s * count * VL : start;
        float *gb = k.grad_B + s * count * VL, *gc = k.grad_C + s * count * VL;
#pragma GCC unroll 4
        for (int j = 0; j < count; j++) {
            dh[j] += dy * (per_lane ? v_load(c + j * VL) : v_set(c[j]));
            v_store(gc + j * VL, v_load(gc + j * VL) + dy * v_load(k.after + ((s + 1) * count + j) * VL));
            v_store(gb + j * VL, v_load(gb + j * VL) + dh[j] * x);
            grad_x += dh[j] * (per_lane ? v_load(b + j * VL) : v_set(b[j]));
            dh[j] *= v_load(k.decay + (s * count + j) * VL);
            vf log_decay = dh[j] * v_load(before + j * VL);  // gradient of dt A
            dA[j] += log_decay * d;
            grad_dt += log_decay * rate[j];  // A log2(e): put right in finish_tile
        }
        v_store(r->grad_x + s * VL, grad_x);
        v_store(r->grad_dt + s * VL, grad_dt);
    }
    for (int j = 0; j < count; j++) v_store(dh_rows + j * VL, dh[j]), v_store(dA_rows + j * VL, dA[j]);
}

INLINE void through_block(const int count, const int per_lane, const int gated, const int range, const task_info *t,
                          const float *saved, const float *A2, coefficients B, coefficients C, const rows_of_tile *r, rows_of_block k, float *dh, float *dA,
                          int64_t start, int64_t steps) {
    static const float zeros[BLOCK * VL];
    for (int64_t from = 0, to; from < steps; from = to) {
        to = segment_end(t->a, t->batch, start, from, steps);
        const float *h = is_reset(t->a, t->batch, start + from) ? zeros : saved;
        recompute_block(count, per_lane, gated, range, h, A2, B, C, r, k, from, to);
    }
    for (int64_t to = steps, from; to > 0; to = from) {
        from = t->a->seq_idx.data ? to - 1 : 0;
        while (from > 0 && !is_reset(t->a, t->batch, start + from)) from--;
        int fresh = is_reset(t->a, t->batch, start + from);
        adjoint_block(count, per_lane, fresh ? zeros : saved, A2, B, C, r, k, dh, dA, from, to);
        if (fresh) memset(dh, 0, sizeof(float) * (size_t)(count * VL));
    }
}

static void begin_tile(const scan_args *a, rows_of_tile *r, int64_t steps) {
    vi beyond = {0};
    for (int64_t s = 0; s < steps; s++) {
        vf dt = time_step(a, strip_load(r->delta, s) + r->bias), u = strip_load(r->u, s), dout = strip_load(r->dout, s);
        beyond |= ~(v_abs(dt) * r->steepest <= EXP2_BOUND);
        v_store(r->dt + s * VL, dt);
        v_store(r->x + s * VL, dt * u);
        if (a->z.data) {
            vf z = strip_load(r->z, s);
            v_store(r->y + s * VL, r->skip * u);
            dout *= z * v_sigmoid(z);
        }
        v_store(r->dy + s * VL, dout);
        v_store(r->grad_x + s * VL, (vf){0});
        v_store(r->grad_dt + s * VL, (vf){0});
    }
    r->bounded = !v_any(beyond);
}

// From the gradients of dt u and dt to those of u, delta and z; sums for D and the bias.
static void finish_tile(const scan_args *a, const rows_of_tile *r, float *dD, float *dbias, int64_t steps) {
    vf sum_D = v_load(dD), sum_bias = v_load(dbias);
    for (int64_t s = 0; s < steps; s++) {
        vf u = strip_load(r->u, s), dy = v_load(r->dy + s * VL), grad_x = v_load(r->grad_x + s * VL);
        vf ddt = v_load(r->grad_dt + s * VL) * 0.693147180559945309f + grad_x * u;
        if (a->softplus) ddt *= v_sigmoid(strip_load(r->delta, s) + r->bias);
        if (a->z.data) {
            vf z = strip_load(r->z, s), sigma = v_sigmoid(z), dout = strip_load(r->dout, s);
            strip_store(r->dz, s, dout * v_load(r->y + s * VL) * sigma * (1.0f + z * (1.0f - sigma)));
        }
        strip_store(r->du, s, grad_x * v_load(r->dt + s * VL) + dy * r->skip);
        strip_store(r->ddelta, s, ddt);
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
    float *bias, *skip, *steepest, *dD, *dbias;  // [tiles][VL]; steepest: the largest |A2| of a channel
    float *inputs;                    // [tiles][INPUTS][steps in hand][VL]
    float *rows;                      // [tiles][ROWS][chunk][VL]
    float *B, *C;
    rows_of_block block;
    int64_t hand, inputs_gap, rows_gap;
    rows_of_tile *tiles;  // of the chunk in work
} backward_memory;

static void *backward_scratch(const task_info *t, backward_memory *m) {
    int64_t states = t->tiles * t->a->n * VL, rows = t->a->chunk * VL, vectors = t->tiles * VL;
    int64_t coefficients_size = coefficient_floats(t, t->a->chunk);
    m->hand = steps_in_hand(t, HAND);
    m->inputs_gap = INPUTS * m->hand * VL + SHIFT;
    m->rows_gap = ROWS * rows + SHIFT;
    struct { float **start; int64_t size; } parts[] = {
        {&m->dA, states}, {&m->dB, states}, {&m->dC, states}, {&m->dD, vectors}, {&m->dbias, vectors},
        {&m->block.grad_B, BLOCK * rows + SHIFT}, {&m->block.grad_C, BLOCK * rows + SHIFT},  // up to here set to 0
        {&m->dh, states}, {&m->saved, states}, {&m->A2, states}, {&m->bias, vectors}, {&m->skip, vectors}, {&m->steepest, vectors},
        {&m->inputs, t->tiles * m->inputs_gap}, {&m->rows, t->tiles * m->rows_gap}, {&m->B, coefficients_size},
        {&m->C, coefficients_size + 2 * SHIFT}, {&m->block.decay, BLOCK * rows + SHIFT}, {&m->block.after, BLOCK * (rows + VL)}};
    int64_t total = 0, zeroed = 0;
    for (int i = 0; i < (int)(sizeof parts / sizeof *parts); i++) {
        total += parts[i].size;
        if (i < 7) zeroed = total;
    }
    float *p = scratch(sizeof(float) * (size_t)total), *memory = p;
    memset(p, 0, sizeof(float) * (size_t)zeroed);
    for (int i = 0; i < (int)(sizeof parts / sizeof *parts); p += parts[i++].size) *parts[i].start = p;
    m->tiles = scratch(sizeof(rows_of_tile) * (size_t)t->tiles);
    return memory;
}

// The inputs of a tile, `into` steps after the start of what is in hand.
static rows_of_tile tile_rows(const task_info *t, const backward_memory *m, int64_t tile, int64_t start, int64_t into) {
    const scan_args *a = t->a;
    rows_of_tile r;
    float *buffer = m->inputs + tile * m->inputs_gap, *rows = m->rows + tile * m->rows_gap;
    const tensor *tensors[] = {&a->u, &a->delta, &a->dout, &a->z, &a->du, &a->ddelta, NULL, &a->dz};
    strip *strips[] = {&r.u, &r.delta, &r.dout, &r.z, &r.du, &r.ddelta, NULL, &r.dz};
    for (int i = 0; i < 8; i++)
        if (strips[i]) *strips[i] = strip_from(strip_of(t, tensors[i], buffer + i % INPUTS * m->hand * VL, tile, start), into);
    float **work[] = {&r.dt, &r.x, &r.dy, &r.y, &r.grad_x, &r.grad_dt};
    for (int i = 0; i < ROWS; i++) *work[i] = rows + i * a->chunk * VL;
    r.bias = v_load(m->bias + tile * VL), r.skip = v_load(m->skip + tile * VL), r.steepest = v_load(m->steepest + tile * VL);
    return r;
}

static void bring_inputs(const task_info *t, const backward_memory *m, int64_t tile, int64_t start, int64_t steps) {
    const tensor *tensors[] = {&t->a->u, &t->a->delta, &t->a->dout, &t->a->z};
    for (int i = 0; i < INPUTS; i++)
        bring(t, tensors[i], m->inputs + tile * m->inputs_gap + i * m->hand * VL, tile, start, steps);
}

static void put_back_outputs(const task_info *t, const backward_memory *m, int64_t tile, int64_t start, int64_t steps) {
    const tensor *tensors[] = {&t->a->du, &t->a->ddelta, NULL, &t->a->dz};
    for (int i = 0; i < INPUTS; i++)
        if (tensors[i]) put_back(t, tensors[i], m->inputs + tile * m->inputs_gap + i * m->hand * VL, tile, start, steps);
}

// All blocks of states of the tiles [first, first + count) through the chunk `into` what is in hand from `start` on.
static void backward_chunk(const task_info *t, const backward_memory *m, int64_t first, int64_t tiles, int64_t start,
                           int64_t into, int64_t steps) {
    const scan_args *a = t->a;
    int64_t n = a->n, states = n * VL, begin = start + into;
    int per_lane = (int)t->p.per_lane, gated = a->z.data != NULL;
    coefficients B, C;
    if (per_lane) {
        int64_t channel = tile_channel(t, first);
        B = lane_coefficients(t, &a->B, a->constant_B, m->B, channel, tile_lanes(t, first), begin, steps);
        C = lane_coefficients(t, &a->C, a->constant_C, m->C, channel, tile_lanes(t, first), begin, steps);
    } else {
        B = shared_coefficients(t, &a->B, m->B, begin, steps);
        C = shared_coefficients(t, &a->C, m->C, begin, steps);
    }
    for (int64_t k = first; k < first + tiles; k++) {
        m->tiles[k] = tile_rows(t, m, k, start, into);
        begin_tile(a, &m->tiles[k], steps);
    }
    for (int64_t i = 0; i < n;) {
        int count = n - i >= BLOCK ? BLOCK : n - i >= 2 ? 2 : 1;
        coefficients b = {B.data + (per_lane ? i * VL : i), B.step}, c = {C.data + (per_lane ? i * VL : i), C.step};
        for (int64_t k = first; k < first + tiles; k++) {
            int64_t at_state = k * states + i * VL;
#define THROUGH(count, per_lane, gated, range) \
    through_block(count, per_lane, gated, range, t, m->saved + at_state, m->A2 + at_state, b, c, &m->tiles[k], m->block, \
                  m->dh + at_state, m->dA + at_state, begin, steps)
#define THROUGH_BLOCK(gated) \
    if (per_lane) THROUGH(BLOCK, 1, gated, ANY); \
    else if (RANGE_HELPS && m->tiles[k].bounded) THROUGH(BLOCK, 0, gated, WITHIN_BOUND); \
    else THROUGH(BLOCK, 0, gated, ANY)
            if (count == BLOCK) { if (gated) { THROUGH_BLOCK(1); } else { THROUGH_BLOCK(0); } }
            else if (count == 2) { if (per_lane) THROUGH(2, 1, gated, ANY); else THROUGH(2, 0, gated, ANY); }
            else { if (per_lane) THROUGH(1, 1, gated, ANY); else THROUGH(1, 0, gated, ANY); }
        }
        if (per_lane) {
            int64_t channel = tile_channel(t, first), at_state = first * states + i * VL;
            int lanes = tile_lanes(t, first);
            scatter_lanes(t, &a->dB_part, a->constant_B, m->block.grad_B, m->dB + at_state, count, i, channel, lanes, begin, steps);
            scatter_lanes(t, &a->dC_part, a->constant_C, m->block.grad_C, m->dC + at_state, count, i, channel, lanes, begin, steps);
        } else {
            reduce_lanes(t, &a->dB_part, m->block.grad_B, count, i, begin, steps);
            reduce_lanes(t, &a->dC_part, m->block.grad_C, count, i, begin, steps);
        }
        i += count;
    }
    for (int64_t k = first; k < first + tiles; k++) finish_tile(a, &m->tiles[k], m->dD + k * VL, m->dbias + k * VL, steps);
}

static void begin_task(const task_info *t, const backward_memory *m) {
    const scan_args *a = t->a;
    int64_t n = a->n, states = n * VL;
    if (t->p.per_lane)
        for (int64_t g = t->part * t->p.part_groups; g < t->part * t->p.part_groups + t->groups; g++) {
            if (!a->constant_B) memset(partial(t, &a->dB_part, g), 0, sizeof(float) * (size_t)(a->l * n));
            if (!a->constant_C) memset(partial(t, &a->dC_part, g), 0, sizeof(float) * (size_t)(a->l * n));
        }
    for (int64_t k = 0; k < t->tiles; k++) {
        int64_t channel = tile_channel(t, k);
        int lanes = tile_lanes(t, k);
        load_rates(m->A2 + k * states, a, channel, lanes);
        v_store(m->steepest + k * VL, v_steepest(m->A2 + k * states, n));
        load_states(m->dh + k * states, &a->dlast, t->batch, channel, lanes, n);
        load_vector(m->bias + k * VL, &a->bias, channel, lanes);
        load_vector(m->skip + k * VL, &a->D, channel, lanes);
    }
}

static void end_task(const task_info *t, const backward_memory *m) {
    const scan_args *a = t->a;
    int64_t n = a->n, states = n * VL;
    for (int64_t k = 0; k < t->tiles; k++) {
        int64_t channel = tile_channel(t, k);
        int lanes = tile_lanes(t, k);
        store_states(m->dh + k * states, &a->dinitial, t->batch, channel, lanes, n);
        store_states(m->dA + k * states, &a->dA, t->batch, channel, lanes, n);
        if (a->constant_B) store_states(m->dB + k * states, &a->dB_part, t->batch, channel, lanes, n);
        if (a->constant_C) store_states(m->dC + k * states, &a->dC_part, t->batch, channel, lanes, n);
        for (int lane = 0; lane < lanes; lane++) {
            if (a->D.data) put(at(&a->dD, t->batch, channel + lane, 0), F32, 0, m->dD[k * VL + lane]);
            if (a->bias.data) put(at(&a->dbias, t->batch, channel + lane, 0), F32, 0, m->dbias[k * VL + lane]);
        }
    }
}

static void backward_task(void *context, int64_t index) {
    const scan_args *a = context;
    task_info t = make_task(a, index);
    backward_memory m;
    void *memory = backward_scratch(&t, &m);
    int64_t states = a->n * VL, together = t.p.per_lane ? 1 : t.tiles;
    begin_task(&t, &m);
    for (int64_t start = a->l ? (a->l - 1) / m.hand * m.hand : -1; start >= 0; start -= m.hand) {
        int64_t steps = a->l - start < m.hand ? a->l - start : m.hand;
        for (int64_t k = 0; k < t.tiles; k++) bring_inputs(&t, &m, k, start, steps);
        for (int64_t into = (steps - 1) / a->chunk * a->chunk; into >= 0; into -= a->chunk) {
            tensor saved = saved_states(a, (start + into) / a->chunk);
            for (int64_t k = 0; k < t.tiles; k++)
                load_states(m.saved + k * states, &saved, t.batch, tile_channel(&t, k), tile_lanes(&t, k), a->n);
            for (int64_t k = 0; k < t.tiles; k += together)
                backward_chunk(&t, &m, k, together, start, into, steps - into < a->chunk ? steps - into : a->chunk);
        }
        for (int64_t k = 0; k < t.tiles; k++) put_back_outputs(&t, &m, k, start, steps);
    }
    end_task(&t, &m);
    free(m.tiles);
    free(memory);
}

void ssmzoo_selective_scan_backward(const scan_args *a) {
    if (!a->e) return;
    plan p = make_plan(a);
    parallel_for(a->b * p.parts * p.tasks_per_part, a->threads, backward_task, (void *)a);
}
