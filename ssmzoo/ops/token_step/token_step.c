// One token of b sequences through the instructions of a program: see ssmzoo/ops/token_step/__init__.py.
#include "hadamard.h"
#include "program.h"

typedef struct {  // as ssmzoo/ops/token_step/c.py packs it
    matrix in_proj, out_proj, x_proj, dt_proj;  // the last two of Mamba-1 alone
    conv_weights conv;
    const float *A_log, *D, *dt_bias, *gate_norm, *special;
    int64_t s, e, h, p, n, g, k, d_per_channel;
    double gate_eps, dt_min, dt_max;
} mixer_layer;

static mamba_weights weights_of(const mixer_layer *l, int64_t d) {
    return (mamba_weights){.in_proj = l->in_proj, .x_proj = l->x_proj, .dt_proj = l->dt_proj, .out_proj = l->out_proj,
                           .conv = l->conv, .A_log = l->A_log, .D = l->D, .d = d, .e = l->e, .n = l->n, .k = l->k, .special = l->special, .s = l->s};
}

static mamba2_weights weights2_of(const mixer_layer *l, int64_t d) {
    return (mamba2_weights){.in_proj = l->in_proj, .out_proj = l->out_proj, .conv = l->conv, .dt_bias = l->dt_bias, .A_log = l->A_log, .D = l->D,
                            .norm_weight = l->gate_norm, .d = d, .h = l->h, .p = l->p, .n = l->n, .g = l->g, .k = l->k,
                            .d_per_channel = l->d_per_channel, .eps = l->gate_eps, .dt_min = l->dt_min, .dt_max = l->dt_max,
                            .special = l->special, .s = l->s};
}

INLINE vf activated(vf x, int act) {
    switch (act) {
        case RELU: return v_at_least(x, 0.0f);
        case SILU: return x * v_sigmoid(x);
        case SIGMOID: return v_sigmoid(x);
        case GELU_TANH: return x * v_sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
        default: return x;
    }
}

void activate(float *x, int64_t size, int act) {
    if (act == NONE) return;
    if (act == GELU) {
        for (int64_t i = 0; i < size; i++) x[i] = 0.5f * x[i] * (1 + erff(x[i] * (float)M_SQRT1_2));
        return;
    }
    for (int64_t i = 0; i < size; i += VL) v_store_some(x + i, activated(v_load_some(x + i, size - i), act), size - i);
}

void turn(float *x, float position, const float *frequency, int64_t width) {
    for (int64_t i = 0, m = width / 2; i < m; i++) {
        const float angle = position * frequency[i], c = cosf(angle), s = sinf(angle), even = x[i], odd = x[i + m];
        x[i] = even * c - odd * s;
        x[i + m] = even * s + odd * c;
    }
}

// out = factor act(M a + bias), added to what stands there with n[1].
static void linear_rows(void *context, int64_t index) {
    const runner *r = context;
    const instruction *i = r->i;
    const int64_t from = index * r->rows, size = i->m.rows, to = from + r->rows < size ? from + r->rows : size;
    const int add = (int)i->n[1];
    float *y = add ? r->room : i->n[2] ? r->a->out : at(r, &i->out, 0);
    const int64_t ld = add || i->n[2] ? size : i->out.ld;
    multiply_rows(&i->m, &r->v, y, ld, from, to);
    const float factor = (float)i->f[0];
    for (int64_t row = 0; row < r->b; row++) {
        float *line = y + row * ld, *out = i->n[2] ? line : at(r, &i->out, row);
        activate(line + from, to - from, (int)i->n[0]);
        if (add) axpy(out + from, factor, line + from, to - from);
        else if (factor != 1)
            for (int64_t j = from; j < to; j++) out[j] *= factor;
    }
}

// out = rows of a table of floats or small integers.
static void run_embed(const runner *r) {
    const instruction *i = r->i;
    const matrix *m = &i->m;
    const int64_t d = m->columns, groups = m->bits == 32 ? 0 : (d + m->group - 1) / m->group;
    for (int64_t row = 0; row < r->b; row++) {
        const int64_t id = r->a->ids[row];
        const float *scale = m->scale + id * groups;
        const char *line = (const char *)m->data + id * (m->bits * d / 8);
        float *out = at(r, &i->out, row);
        if (m->bits == 32) memcpy(out, line, sizeof(float) * (size_t)d);
        else if (m->bits == 8)
            for (int64_t j = 0; j < d; j++) out[j] = (float)((const int8_t *)line)[j] * scale[j / m->group];
        else
            for (int64_t j = 0; j < d; j++) {
                const uint8_t both = ((const uint8_t *)line)[j / 2];
                out[j] = (float)((j % 2 ? both >> 4 : both & 15) - 8) * scale[j / m->group];
            }
    }
}

static void run_linear(runner *r) {
    const instruction *i = r->i;
    ready(&r->v, &i->m, at(r, &i->a, 0), r->b, i->a.ld, r->integers);
    r->rows = rows_per_task(i->m.rows, crew_size(r->t));
    crew_for(r->t, (i->m.rows + r->rows - 1) / r->rows, linear_rows, r);
}

static void rms_norm(float *u, const float *x, const float *weight, int64_t size, double eps) {
    vf squares = {0};
    for (int64_t i = 0; i < size; i += VL) {
        const vf v = v_load_some(x + i, size - i);
        squares += v * v;
    }
    const float scale = (float)(1 / sqrt((double)v_sum(squares) / (double)size + eps));
    for (int64_t i = 0; i < size; i++) u[i] = x[i] * scale * weight[i];
}

static void layer_norm(float *u, const float *x, const float *weight, const float *bias, int64_t size, double eps) {
    vf sums = {0}, squares = {0};
    for (int64_t i = 0; i < size; i += VL) sums += v_load_some(x + i, size - i);
    const float mean = v_sum(sums) / (float)size;
    for (int64_t i = 0; i < size; i += VL) {
        vf v = v_load_some(x + i, size - i) - mean;
        if (i + VL > size)
            for (int j = (int)(size - i); j < VL; j++) v[j] = 0;
        squares += v * v;
    }
    const float scale = (float)(1 / sqrt((double)v_sum(squares) / (double)size + eps));
    for (int64_t i = 0; i < size; i++) {
        u[i] = (x[i] - mean) * scale * (weight ? weight[i] : 1) + (bias ? bias[i] : 0);
    }
}

// RMS norm of what is left without the component along `ones`, a vector of length 1.
static void centred_norm(float *u, const float *x, const float *weight, const float *ones, int64_t size, double eps) {
    memcpy(u, x, sizeof(float) * (size_t)size);
    axpy(u, -dot(x, ones, size), ones, size);
    rms_norm(u, u, weight, size, eps);
}

// n: RMS norm, layer norm or centred norm; channels that are normalised together; whether these share their weights.
static void run_norm(const runner *r) {
    const instruction *i = r->i;
    for (int64_t row = 0; row < r->b; row++)
        for (int64_t from = 0; from < i->a.size; from += i->n[1]) {
            const float *x = at(r, &i->a, row) + from, *weight = i->w[0] ? i->w[0] + (i->n[2] ? 0 : from) : NULL;
            float *u = at(r, &i->out, row) + from;
            if (i->n[0] == 2) centred_norm(u, x, weight, i->w[1], i->n[1], i->f[0]);
            else if (i->n[0]) layer_norm(u, x, weight, i->w[1], i->n[1], i->f[0]);
            else rms_norm(u, x, weight, i->n[1], i->f[0]);
        }
}

// out = f0 w1 act(a) b + f1 w0 c, with ones for what is missing, but 0 for c; b may be one number.
static void run_mix(const runner *r) {
    const instruction *i = r->i;
    const float own = (float)i->f[0] * (i->w[1] ? *i->w[1] : 1), other = (float)i->f[1];
    for (int64_t row = 0; row < r->b; row++) {
        const float *a = at(r, &i->a, row), *b = at(r, &i->b, row), *c = at(r, &i->c, row);
        float *out = at(r, &i->out, row);
        for (int64_t j = 0; j < i->out.size; j += VL) {
            const int64_t left = i->out.size - j;
            vf x = v_load_some(a + j, left);
            if (i->n[0] == GELU) {
                float line[VL];
                v_store(line, x), activate(line, VL, GELU), x = v_load(line);
            } else x = activated(x, (int)i->n[0]);
            x *= own;
            if (i->b.size == 1) x *= b[0];
            else if (i->b.size) x *= v_load_some(b + j, left);
            if (i->c.size) {
                vf y = other * v_load_some(c + j, left);
                x += i->w[0] ? y * v_load_some(i->w[0] + j, left) : y;
            }
            v_store_some(out + j, x, left);
        }
    }
}

// out = a rotated, or back; n: order of the special factor, whether back
static void run_hadamard(const runner *r) {
    const instruction *i = r->i;
    for (int64_t row = 0; row < r->b; row++) {
        float *out = at(r, &i->out, row);
        memmove(out, at(r, &i->a, row), sizeof(float) * (size_t)i->a.size);
        hadamard(out, i->a.size, i->w[0], i->n[0], (int)i->n[1]);
    }
}

static void run_conv(const runner *r) {
    const instruction *i = r->i;
    const int64_t c = i->a.size, k = i->n[1];
    const float *before = slot(r, 0)->before;
    float *after = slot(r, 0)->after;
    for (int64_t row = 0; row < r->b; row++) {
        float *y = at(r, &i->out, row);
        shift_and_convolve(y, after + row * c * k, before + row * c * k, at(r, &i->a, row), i->w[0], i->w[1], c, k);
        activate(y, c, (int)i->n[0]);
    }
}

static void run_mixer(runner *r) {
    const instruction *i = r->i;
    const step_state state = {slot(r, 0)->before, slot(r, 1)->before, slot(r, 0)->after, slot(r, 1)->after};
    float *u = at(r, &i->a, 0), *out = at(r, &i->out, 0);
    if (i->kind == MAMBA) {
        const mamba_weights w = weights_of(i->layer, i->a.size);
        mamba_layer(&w, u, state, out, (int)i->n[1], r->b, r->integers, r->t);
    } else {
        const mamba2_weights w = weights2_of(i->layer, i->a.size);
        mamba2_layer(&w, u, state, out, (int)i->n[1], r->b, r->integers, r->t);
    }
}

static size_t integers_of(const program_args *a, const instruction *i) {  // bytes
    if (i->kind == LINEAR) return prepared_bytes(&i->m, a->b);
    if (i->kind == MOE && i->layer) return moe_integers(i);
    if (i->kind == MAMBA) {
        const mamba_weights w = weights_of(i->layer, i->a.size);
        return mamba_memory(&w, a->b);
    }
    if (i->kind == MAMBA2) {
        const mamba2_weights w = weights2_of(i->layer, i->a.size);
        return mamba2_memory(&w, a->b);
    }
    return 0;
}

size_t room_of(const program_args *a, const instruction *i) {
    switch (i->kind) {
        case LINEAR: return i->n[1] ? (size_t)(a->b * i->m.rows) : 0;
        case ATTEND: return attend_room(a, i);
        case TAYLOR: return (size_t)(2 * a->b * i->n[0] * (i->n[1] + 1) * (i->n[1] + 2));
        case MOE:
        case KEYS: return moe_room(a, i);
        case WORKSPACE: return workspace_room(a, i);
        case MAMBA3: return mamba3_room(i);
        default: return 0;
    }
}

static void execute(runner *r) {
    switch (r->i->kind) {
        case LINEAR: run_linear(r); break;
        case NORM: run_norm(r); break;
        case MIX: run_mix(r); break;
        case CONV: run_conv(r); break;
        case MAMBA:
        case MAMBA2: run_mixer(r); break;
        case ATTEND: run_attend(r); break;
        case TAYLOR: run_taylor(r); break;
        case SSD: run_ssd(r); break;
        case DELTA: run_delta(r); break;
        case RECUR: run_recur(r); break;
        case RGLRU: run_rglru(r); break;
        case ELEMENT: run_element(r); break;
        case MOE: run_moe(r); break;
        case KEYS: run_keys(r); break;
        case CHUNK: run_chunk(r); break;
        case WORKSPACE: run_workspace(r); break;
        case MAMBA3: run_mamba3(r); break;
        case HADAMARD: run_hadamard(r); break;
        case EMBED: run_embed(r); break;
    }
}

static void step(void *context, crew *t) {
    const program_args *a = context;
    size_t bytes = 64, room = 16;
    for (int64_t i = 0; i < a->count; i++) {
        const size_t more = integers_of(a, a->code + i), floats = room_of(a, a->code + i);
        bytes = more > bytes ? more : bytes;
        room = floats > room ? floats : room;
    }
    bytes = (bytes + 63) / 64 * 64;
    room = (room + VL + 15) / 16 * 16;
    char *memory = scratch(bytes + (room + (size_t)(a->b * a->floats) + VL) * sizeof(float));
    runner r = {.a = a, .integers = memory, .room = (float *)(memory + bytes), .b = a->b, .t = t};
    r.registers = r.room + room;
    const size_t stream = (size_t)(a->b * a->d) * sizeof(float);
    if (a->x) memcpy(r.registers, a->x, stream);
    for (r.i = a->code; r.i < a->code + a->count; r.i++) execute(&r);
    if (a->x) memcpy(a->out, r.registers, stream);
    free(memory);
}

void ssmzoo_token_step(const program_args *a) { parallel_crew(a->threads, step, (void *)a); }

// The token's entry is in place behind those before it: where the next one goes.
static void move_on(const program_args *a, const grown_state *g) {
    state_slot *s = a->state + g->slot;
    s->before = s->after, s->length = s->kept;
    s->kept = g->most && s->length + 1 > g->most ? g->most : s->length + 1;
    const int64_t stride = g->capacity * g->bytes, start = ((char *)s->before - g->data) / g->bytes;
    if (start > 0 && start + s->length + 1 > g->capacity) {
        for (int64_t row = 0; row < a->b; row++)
            memmove(g->data + row * stride, (char *)s->before + row * stride, (size_t)(s->length * g->bytes));
        s->before = g->data;
    }
    s->after = (char *)s->before + (s->length + 1 - s->kept) * g->bytes;
}

// The same for states that stay in place, from ids to logits, again and again.
void ssmzoo_decode(program_args *a) {
    const matrix *table = &a->code->m;
    a->refused = 0;
    for (int64_t row = 0; row < a->b; row++) a->refused |= a->ids[row] < 0 || a->ids[row] >= table->rows;
    if (a->refused) return;
    parallel_crew(a->threads, step, a);
    for (const grown_state *g = a->grown; g < a->grown + a->grown_count; g++) move_on(a, g);
}
