// The forward of the selective scan; selective_scan.h says how it is laid out.
#include "selective_scan.h"

enum { BLOCK = 16 };  // states per block: all in registers with AVX-512's 32, in first-level cache with 16 registers
enum { HAND = 64, LONG = 256 };  // steps in hand at once; rows are long where time is contiguous

// What the next tile will read and write, called into cache while this one is computed: a row of each per step.
enum { STREAMS = 4 };
typedef struct {
    const char *at[STREAMS];
    int64_t step[STREAMS];  // bytes
} streams;

// One block of `count` states over steps [from, to): h (rows) is carried, y gains <h, C>.
INLINE void forward_block(const int count, const int per_lane, const int range, float *h, const float *A2, coefficients B,
                          coefficients C, const float *dt, const float *du, float *y, int64_t from, int64_t to,
                          const streams *next) {
    vf state[BLOCK];
    const char *ahead[STREAMS];
    for (int i = 0; i < STREAMS; i++) ahead[i] = next->at[i] + from * next->step[i];
    for (int j = 0; j < count; j++) state[j] = v_load(h + j * VL);
    for (int64_t s = from; s < to; s++) {
        vf d = v_load(dt + s * VL), x = v_load(du + s * VL), sum[2] = {v_load(y + s * VL), {0}};
        const float *b = B.data + s * B.step, *c = C.data + s * C.step;
#pragma GCC unroll 4
        for (int i = 0; i < STREAMS; i++) __builtin_prefetch(ahead[i]), ahead[i] += next->step[i];
#pragma GCC unroll 16
        for (int j = 0; j < count; j++) {
            vf decay = v_exp2_of(d * v_load(A2 + j * VL), range);
            state[j] = decay * state[j] + x * (per_lane ? v_load(b + j * VL) : v_set(b[j]));
            sum[j & 1] += state[j] * (per_lane ? v_load(c + j * VL) : v_set(c[j]));
        }
        v_store(y + s * VL, sum[0] + sum[1]);
    }
    for (int j = 0; j < count; j++) v_store(h + j * VL, state[j]);
}

static void forward_states(int64_t n, int per_lane, int bounded, float *h, const float *A2, coefficients B, coefficients C,
                           const float *dt, const float *du, float *y, int64_t from, int64_t to, const streams *next) {
    for (int64_t i = 0; i < n;) {
        int64_t k = per_lane ? i * VL : i;
        coefficients b = {B.data + k, B.step}, c = {C.data + k, C.step};
        float *hi = h + i * VL;
        const float *ai = A2 + i * VL;
#define FORWARD(count) \
    if (n - i >= count) { \
        if (per_lane) forward_block(count, 1, ANY, hi, ai, b, c, dt, du, y, from, to, next); \
        else if (RANGE_HELPS && bounded) forward_block(count, 0, WITHIN_BOUND, hi, ai, b, c, dt, du, y, from, to, next); \
        else forward_block(count, 0, ANY, hi, ai, b, c, dt, du, y, from, to, next); \
        i += count; \
        continue; \
    }
        FORWARD(BLOCK)
        FORWARD(8)
        FORWARD(4)
        FORWARD(1)
    }
}

typedef struct {  // memory of a task; [steps][VL] unless said otherwise
    float *h, *A2;      // [tiles][n][VL]
    float *bias, *skip, *steepest;  // [tiles][VL]; the largest |A2| of a channel
    float *u, *delta, *z, *out, *dt, *x, *y;
    float *B, *C;
} forward_memory;

static float *forward_scratch(const task_info *t, forward_memory *m, int64_t hand) {
    int64_t rows = hand * VL, states = t->tiles * t->a->n * VL, coefficients_size = coefficient_floats(t, hand);
    float *p = scratch(sizeof(float) * (size_t)(2 * states + 3 * t->tiles * VL + 7 * rows + 2 * coefficients_size));
    float *memory = p, **buffers[] = {&m->u, &m->delta, &m->z, &m->out, &m->dt, &m->x, &m->y};
    m->h = p, m->A2 = p += states;
    m->bias = p += states, m->skip = p += t->tiles * VL, m->steepest = p += t->tiles * VL;
    p += t->tiles * VL;
    for (int i = 0; i < 7; i++, p += rows) *buffers[i] = p;
    m->B = p, m->C = p + coefficients_size;
    return memory;
}

static streams next_streams(const task_info *t, const forward_memory *m, int64_t tile, int64_t start, int64_t steps) {
    const scan_args *a = t->a;
    const tensor *tensors[STREAMS] = {&a->u, &a->delta, &a->z, &a->out};
    streams next;
    if (++tile == t->tiles) tile = 0, start += steps;
    for (int i = 0; i < STREAMS; i++) {
        strip r = {m->y, 0};  // where there is none, or it will be transposed
        if (tensors[i]->data && start + steps <= a->l) r = strip_of(t, tensors[i], m->y, tile, start);
        next.at[i] = (const char *)r.data, next.step[i] = r.data == m->y ? 0 : r.step * (int64_t)sizeof(float);
    }
    return next;
}

// One tile over the steps in hand.
static void forward_tile(const task_info *t, forward_memory *m, coefficients B, coefficients C, int64_t tile, int64_t start,
                         int64_t steps) {
    const scan_args *a = t->a;
    int64_t n = a->n, channel = tile_channel(t, tile);
    int lanes = tile_lanes(t, tile);
    float *h = m->h + tile * n * VL, *A2 = m->A2 + tile * n * VL;
    vf bias = v_load(m->bias + tile * VL), skip = v_load(m->skip + tile * VL), steepest = v_load(m->steepest + tile * VL);
    vi beyond = {0};  // where an exponent may be large, or is no number
    strip u = bring(t, &a->u, m->u, tile, start, steps), delta = bring(t, &a->delta, m->delta, tile, start, steps);
    strip z = bring(t, &a->z, m->z, tile, start, steps), out = strip_of(t, &a->out, m->out, tile, start);
    const streams next = next_streams(t, m, tile, start, steps);
    for (int64_t s = 0; s < steps; s++) {
        vf dt = time_step(a, strip_load(delta, s) + bias), us = strip_load(u, s);
        beyond |= ~(v_abs(dt) * steepest <= EXP2_BOUND);
        v_store(m->dt + s * VL, dt);
        v_store(m->x + s * VL, dt * us);
        v_store(m->y + s * VL, skip * us);
    }
    int bounded = !v_any(beyond);
    for (int64_t from = 0, to; from < steps; from = to) {
        int64_t end = a->save && (from / a->chunk + 1) * a->chunk < steps ? (from / a->chunk + 1) * a->chunk : steps;
        if (a->save && from % a->chunk == 0) {
            tensor saved = saved_states(a, (start + from) / a->chunk);
            store_states(h, &saved, t->batch, channel, lanes, n);
        }
        to = segment_end(a, t->batch, start, from, end);
        if (is_reset(a, t->batch, start + from)) memset(h, 0, sizeof(float) * (size_t)(n * VL));
        forward_states(n, (int)t->p.per_lane, bounded, h, A2, B, C, m->dt, m->x, m->y, from, to, &next);
    }
    for (int64_t s = 0; s < steps; s++) {
        vf y = v_load(m->y + s * VL);
        if (a->z.data) y *= strip_load(z, s) * v_sigmoid(strip_load(z, s));
        strip_store(out, s, y);
    }
    put_back(t, &a->out, m->out, tile, start, steps);
}

static void forward_task(void *context, int64_t index) {
    const scan_args *a = context;
    task_info t = make_task(a, index);
    forward_memory m;
    int64_t n = a->n, hand = steps_in_hand(&t, a->u.stride[2] == 1 ? LONG : HAND);
    float *memory = forward_scratch(&t, &m, hand);
    for (int64_t k = 0; k < t.tiles; k++) {
        int64_t channel = tile_channel(&t, k);
        int lanes = tile_lanes(&t, k);
        load_rates(m.A2 + k * n * VL, a, channel, lanes);
        v_store(m.steepest + k * VL, v_steepest(m.A2 + k * n * VL, n));
        load_states(m.h + k * n * VL, &a->initial, t.batch, channel, lanes, n);
        load_vector(m.bias + k * VL, &a->bias, channel, lanes);
        load_vector(m.skip + k * VL, &a->D, channel, lanes);
    }
    for (int64_t start = 0; start < a->l; start += hand) {
        int64_t steps = a->l - start < hand ? a->l - start : hand;
        coefficients B = {0}, C = {0};
        if (!t.p.per_lane) {
            B = shared_coefficients(&t, &a->B, m.B, start, steps);
            C = shared_coefficients(&t, &a->C, m.C, start, steps);
        }
        for (int64_t k = 0; k < t.tiles; k++) {
            if (t.p.per_lane) {
                B = lane_coefficients(&t, &a->B, a->constant_B, m.B, tile_channel(&t, k), tile_lanes(&t, k), start, steps);
                C = lane_coefficients(&t, &a->C, a->constant_C, m.C, tile_channel(&t, k), tile_lanes(&t, k), start, steps);
            }
            forward_tile(&t, &m, B, C, k, start, steps);
        }
    }
    for (int64_t k = 0; k < t.tiles; k++)
        store_states(m.h + k * n * VL, &a->last, t.batch, tile_channel(&t, k), tile_lanes(&t, k), n);
    free(memory);
}

void ssmzoo_selective_scan_forward(const scan_args *a) {
    if (!a->e) return;
    plan p = make_plan(a);
    parallel_for(a->b * p.parts * p.tasks_per_part, a->threads, forward_task, (void *)a);
}
