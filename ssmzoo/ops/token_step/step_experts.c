// One token for experts, for memories that product keys address, and for chunks of tokens.
#include "program.h"

enum { EXPERTS, HIDDEN, OUTPUT, CHOSEN, RENORMALISE, ACT, ADD, METRICS, LAYERS, INPUT };  // n of MOE

// y[from .. to) (+)= x0 W of `count` rows, so that memory is read in its order.
INLINE void some_rows(float *y, const float *x, const float *W, int64_t ld, int64_t from, int64_t to, const int count, int add) {
    for (int64_t c = from; c < to; c += VL) {
        const int64_t left = to - c;
        vf sum = add ? v_load_some(y + c, left) : (vf){0};
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) sum += x[i] * v_load_some(W + i * ld + c, left);
        v_store_some(y + c, sum, left);
    }
}

// y[from .. to) of y = x W, W (rows ld).
static void columns(float *y, const float *x, const float *W, int64_t rows, int64_t ld, int64_t from, int64_t to) {
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8) some_rows(y, x + i, W + i * ld, ld, from, to, 8, i > 0);
    for (; i < rows; i++) some_rows(y, x + i, W + i * ld, ld, from, to, 1, i > 0);
}

// Columns of a task: some for every thread.
INLINE int64_t block_of(const runner *r, int64_t size) {
    const int64_t wanted = (size / crew_size(r->t) + VL - 1) / VL * VL;
    return wanted < 4 * VL ? 4 * VL : wanted;
}

static int64_t best(const float *x, int64_t size, const char *taken) {
    int64_t most = -1;
    for (int64_t i = 0; i < size; i++)
        if (!taken[i] && (most < 0 || x[i] > x[most])) most = i;
    return most;
}

static void top(int64_t *chosen, const float *x, int64_t size, int64_t k, char *taken) {
    memset(taken, 0, (size_t)size);
    for (int64_t i = 0; i < k; i++) taken[chosen[i] = best(x, size, taken)] = 1;
}

// Room of a row of MOE: logits, probabilities, taken (e each), weights and experts (k each), hidden (k f), outputs (k o)
INLINE int64_t moe_row(const instruction *i) {
    const int64_t e = i->n[EXPERTS], k = i->n[CHOSEN];
    return 3 * e + 4 * k + 2 * k * i->n[HIDDEN] + k * i->n[OUTPUT] + 16;
}

typedef struct {
    float *logit, *p, *weight, *hidden, *out;
    char *taken;
    int64_t *expert;
} moe_parts;

static moe_parts parts_of(const runner *r, int64_t row) {
    const int64_t e = r->i->n[EXPERTS], k = r->i->n[CHOSEN];
    int64_t size = (moe_row(r->i) + 1) / 2 * 2;
    float *room = r->room + row * size;
    moe_parts q = {.expert = (int64_t *)room};
    q.weight = room + 2 * k;
    q.logit = q.weight + k;
    q.p = q.logit + e;
    q.taken = (char *)(q.p + e);
    q.hidden = q.p + 2 * e;
    q.out = q.hidden + 2 * k * r->i->n[HIDDEN];
    return q;
}

size_t moe_room(const program_args *a, const instruction *i) {
    if (i->kind == MOE) return (size_t)(a->b * ((moe_row(i) + 1) / 2 * 2));
    const int64_t n1 = i->n[0], n2 = i->n[1], k = i->n[3];
    return (size_t)(2 * (n1 + n2) + 4 * k + 8 * k * k + 64);
}

static void first_map(void *context, int64_t index) {
    const runner *r = context;
    const instruction *i = r->i;
    const int64_t f = i->n[HIDDEN], d = i->n[INPUT], k = i->n[CHOSEN], block = r->rows, tasks = (f + block - 1) / block;
    const int64_t pair = index / tasks, row = pair / k, one = pair % k, from = index % tasks * block;
    const int64_t to = from + block < f ? from + block : f;
    const moe_parts q = parts_of(r, row);
    float *h = q.hidden + one * 2 * f;
    const float *x = at(r, &i->a, row);
    columns(h, x, i->w[2] + q.expert[one] * d * f, d, f, from, to);
    if (!i->w[4]) {
        activate(h + from, to - from, (int)i->n[ACT]);
        return;
    }
    columns(h + f, x, i->w[4] + q.expert[one] * d * f, d, f, from, to);
    activate(h + f + from, to - from, (int)i->n[ACT]);
    for (int64_t j = from; j < to; j++) h[j] *= h[f + j];
}

static void second_map(void *context, int64_t index) {
    const runner *r = context;
    const instruction *i = r->i;
    const int64_t f = i->n[HIDDEN], o = i->n[OUTPUT], k = i->n[CHOSEN], block = r->rows, tasks = (o + block - 1) / block;
    const int64_t row = index / tasks, from = index % tasks * block, to = from + block < o ? from + block : o;
    const moe_parts q = parts_of(r, row);
    float *out = at(r, &i->out, row);
    if (!i->n[ADD]) memset(out + from, 0, sizeof(float) * (size_t)(to - from));
    for (int64_t one = 0; one < k; one++) {
        columns(q.out + one * o, q.hidden + one * 2 * f, i->w[3] + q.expert[one] * f * o, f, o, from, to);
        axpy(out + from, (float)i->f[3] * q.weight[one], q.out + one * o + from, to - from);
    }
}

// Experts whose matrices lie each by itself: (e) lin1, (e) lin2, (e) gate, without data where there is none.
static const matrix *expert_matrix(const instruction *i, int which, int64_t expert) {
    return (const matrix *)i->layer + which * i->n[EXPERTS] + expert;
}

size_t moe_integers(const instruction *i) {
    size_t most = 0;
    for (int which = 0; which < 3; which++)
        for (int64_t e = 0; e < i->n[EXPERTS]; e++) {
            const matrix *m = expert_matrix(i, which, e);
            const size_t size = m->data ? prepared_bytes(m, 1) : 0;
            most = size > most ? size : most;
        }
    return most;
}

typedef struct {
    const matrix *m;
    const vectors *v;
    float *y;
    int64_t rows;
} expert_product;

static void expert_rows(void *context, int64_t index) {
    const expert_product *s = context;
    const int64_t from = index * s->rows, to = from + s->rows;
    multiply_rows(s->m, s->v, s->y, s->m->rows, from, to < s->m->rows ? to : s->m->rows);
}

static void expert_linear(runner *r, const matrix *m, const float *x, float *y) {
    ready(&r->v, m, x, 1, m->columns, r->integers);
    expert_product s = {m, &r->v, y, rows_per_task(m->rows, crew_size(r->t))};
    crew_for(r->t, (m->rows + s.rows - 1) / s.rows, expert_rows, &s);
}

static void separate_experts(runner *r) {
    const instruction *i = r->i;
    const int64_t f = i->n[HIDDEN], o = i->n[OUTPUT], k = i->n[CHOSEN];
    for (int64_t row = 0; row < r->b; row++) {
        const moe_parts q = parts_of(r, row);
        float *out = at(r, &i->out, row);
        if (!i->n[ADD]) memset(out, 0, sizeof(float) * (size_t)o);
        for (int64_t one = 0; one < k; one++) {
            float *h = q.hidden + one * 2 * f, *y = q.out + one * o;
            expert_linear(r, expert_matrix(i, 0, q.expert[one]), at(r, &i->a, row), h);
            if (expert_matrix(i, 2, 0)->data) {
                expert_linear(r, expert_matrix(i, 2, q.expert[one]), at(r, &i->a, row), h + f);
                activate(h + f, f, (int)i->n[ACT]);
                for (int64_t j = 0; j < f; j++) h[j] *= h[f + j];
            } else activate(h, f, (int)i->n[ACT]);
            expert_linear(r, expert_matrix(i, 1, q.expert[one]), h, y);
            axpy(out, (float)i->f[3] * q.weight[one], y, o);
        }
    }
}

// What a router says of its tokens, added up over the layers: see `merge_aux` in ssmzoo/layers/feedforward/moe.py.
static void metrics(const runner *r) {
    const instruction *i = r->i;
    const int64_t e = i->n[EXPERTS], k = i->n[CHOSEN], layers = i->n[LAYERS], b = r->b;
    float *all = r->a->metrics, *share = all + i->n[METRICS] * e, *sums = all + layers * e;  // busiest, dropped, entropy, losses
    double counts[e], mass[e], entropy = 0, squares = 0, balance = 0;
    for (int64_t j = 0; j < e; j++) counts[j] = mass[j] = 0;
    for (int64_t row = 0; row < b; row++) {
        const moe_parts q = parts_of(r, row);
        double most = q.logit[0], sum = 0;
        for (int64_t j = 1; j < e; j++) most = q.logit[j] > most ? q.logit[j] : most;
        for (int64_t j = 0; j < e; j++) sum += exp(q.logit[j] - most);
        squares += (most + log(sum)) * (most + log(sum));
        for (int64_t j = 0; j < e; j++) {
            mass[j] += q.p[j];
            entropy -= q.p[j] > 0 ? q.p[j] * log((double)q.p[j]) : 0;
        }
        for (int64_t one = 0; one < k; one++) counts[q.expert[one]]++;
    }
    for (int64_t j = 0; j < e; j++) {
        share[j] = (float)(counts[j] / (double)b);
        if (share[j] > sums[0]) sums[0] = share[j];
        balance += counts[j] * mass[j];
    }
    sums[2] += (float)(entropy / (double)b / (double)layers);
    sums[3] += (float)(i->f[1] * (double)e / (double)(b * b) * balance);
    sums[4] += (float)(i->f[2] * squares / (double)b);
}

// The experts that rows of b choose, applied to rows of a.
void run_moe(runner *r) {
    const instruction *i = r->i;
    const int64_t e = i->n[EXPERTS], k = i->n[CHOSEN], d = i->b.size;
    for (int64_t row = 0; row < r->b; row++) {
        const moe_parts q = parts_of(r, row);
        columns(q.logit, at(r, &i->b, row), i->w[0], d, e, 0, e);
        for (int64_t j = 0; j < e; j++) {
            if (i->w[1]) q.logit[j] += i->w[1][j];
            q.logit[j] *= (float)i->f[0];
            if (i->c.size && at(r, &i->c, row)[1] != 0) q.logit[j] = 0;
        }
        memcpy(q.p, q.logit, sizeof(float) * (size_t)e);
        softmax(q.p, e);
        top(q.expert, q.p, e, k, q.taken);
        float sum = 0;
        for (int64_t one = 0; one < k; one++) sum += q.weight[one] = q.p[q.expert[one]];
        for (int64_t one = 0; i->n[RENORMALISE] && one < k; one++) q.weight[one] /= sum;
    }
    if (i->layer) {
        separate_experts(r);
        if (i->n[METRICS] >= 0 && r->a->metrics) metrics(r);
        return;
    }
    r->rows = block_of(r, i->n[HIDDEN]);
    crew_for(r->t, r->b * k * ((i->n[HIDDEN] + r->rows - 1) / r->rows), first_map, r);
    r->rows = block_of(r, i->n[OUTPUT]);
    crew_for(r->t, r->b * ((i->n[OUTPUT] + r->rows - 1) / r->rows), second_map, r);
    if (i->n[METRICS] >= 0 && r->a->metrics) metrics(r);
}

enum { N1, N2, HALF, TOP, KEY_HEADS, ALL_PAIRS, NEURONS };  // n of KEYS

// Entries found by product keys: their values added up, or the one-neuron experts of b added to out.
void run_keys(runner *r) {
    const instruction *i = r->i;
    const int64_t n1 = i->n[N1], n2 = i->n[N2], half = i->n[HALF], k = i->n[TOP], h = i->n[KEY_HEADS], d = i->out.size;
    float *s1 = r->room, *s2 = s1 + n1, *sums = s2 + n2, *score = sums + k * k;
    int64_t best1[k], best2[k], pick[k * k];
    char taken[n1 + n2 + k * k];
    const int64_t found = i->n[ALL_PAIRS] ? k * k : k;
    for (int64_t row = 0; row < r->b; row++) {
        float *out = at(r, &i->out, row);
        if (!i->n[NEURONS]) memset(out, 0, sizeof(float) * (size_t)d);
        for (int64_t head = 0; head < h; head++) {
            const float *q1 = at(r, &i->a, row) + head * half, *q2 = q1 + h * half;
            for (int64_t j = 0; j < n1; j++) s1[j] = dot(q1, i->w[0] + (head * n1 + j) * half, half);
            for (int64_t j = 0; j < n2; j++) s2[j] = dot(q2, i->w[1] + (head * n2 + j) * half, half);
            top(best1, s1, n1, k, taken);
            top(best2, s2, n2, k, taken);
            for (int64_t j = 0; j < k * k; j++) sums[j] = s1[best1[j / k]] + s2[best2[j % k]], pick[j] = j;
            if (!i->n[ALL_PAIRS]) top(pick, sums, k * k, k, taken);
            for (int64_t j = 0; j < found; j++) score[j] = sums[pick[j]];
            softmax(score, found);
            for (int64_t j = 0; j < found; j++) {
                const int64_t entry = best1[pick[j] / k] * n2 + best2[pick[j] % k];
                if (!i->n[NEURONS]) {
                    axpy(out, score[j], i->w[2] + entry * d, d);
                    continue;
                }
                const float x = dot(at(r, &i->b, row), i->w[2] + entry * i->b.size, i->b.size);
                axpy(out, score[j] * x / (1 + expf(-x)), i->w[3] + entry * d, d);
            }
        }
    }
}

// out: the sum over the chunk before the token's; c: whether the token begins a chunk, lies in the first, begins a document.
void run_chunk(runner *r) {
    const instruction *i = r->i;
    const int64_t d = i->a.size, size = i->n[0];
    for (int64_t row = 0; row < r->b; row++) {
        const float *x = at(r, &i->a, row), *previous = (const float *)slot(r, 0)->before + row * d;
        const float *open = (const float *)slot(r, 1)->before + row * d;
        const int64_t done = ((const int64_t *)slot(r, 2)->before)[row];
        float *previous_new = (float *)slot(r, 0)->after + row * d, *open_new = (float *)slot(r, 1)->after + row * d;
        float *out = at(r, &i->out, row), *flags = at(r, &i->c, row);
        ((int64_t *)slot(r, 2)->after)[row] = done + 1;
        flags[0] = done % size == 0, flags[1] = done < size, flags[2] = done == 0;
        memcpy(out, flags[0] ? open : previous, sizeof(float) * (size_t)d);
        memcpy(previous_new, out, sizeof(float) * (size_t)d);
        for (int64_t j = 0; j < d; j++) open_new[j] = x[j] + (flags[0] ? 0 : open[j]);
    }
}

enum { SLOTS, RANK, CHUNK_SIZE };  // n of WORKSPACE; m: W_o; w: slots, W_gate, its bias, the norm's weight, W_q, the norm's bias, W_k, W_v

size_t workspace_room(const program_args *a, const instruction *i) {
    (void)a;
    return (size_t)(i->n[SLOTS] * (i->out.size + 1) + i->n[RANK] + 3 * i->out.size + 64);
}

// What a chunk's mean writes and reads: see `Workspace.update` in ssmzoo/models/hydra_layers/memory.py. Slots need no keys
// and values of their own: q . W_k s = (W_k^T q) . s, and the values' mean is W_v of the slots' mean.
static void write_and_read(const runner *r, float *slots, float *read, const float *sum) {
    const instruction *i = r->i;
    const int64_t n = i->n[SLOTS], rank = i->n[RANK], d = i->out.size;
    const float *const *w = i->w, *gate = w[1], *norm = w[3], *q_proj = w[4], *k_proj = w[6], *v_proj = w[7];
    float *mean = r->room, *lines = mean + d, *score = lines + n * d, *q = score + n, *asked = q + rank, *mixed = asked + d;
    int64_t least = 0;
    float smallest = INFINITY, open[2];
    for (int64_t j = 0; j < d; j++) mean[j] = sum[j] / (float)i->n[CHUNK_SIZE];
    for (int j = 0; j < 2; j++) open[j] = dot(gate + j * d, mean, d) + w[2][j];
    softmax(open, 2);
    for (int64_t s = 0; s < n; s++) {
        const float size = sqrtf(dot(slots + s * d, slots + s * d, d));
        if (size < smallest) smallest = size, least = s;
    }
    for (int64_t j = 0; j < d; j++) slots[least * d + j] = 0.9f * slots[least * d + j] + 0.1f * (open[1] * mean[j]);
    gemv(q, q_proj, mean, NULL, rank, d);
    columns(asked, q, k_proj, rank, d, 0, d);
    for (int64_t s = 0; s < n; s++) {
        const float *x = slots + s * d;
        float *line = lines + s * d;
        double total = 0, squares = 0;
        for (int64_t j = 0; j < d; j++) total += x[j];
        for (int64_t j = 0; j < d; j++) squares += (x[j] - total / (double)d) * (x[j] - total / (double)d);
        const float scale = (float)(1 / sqrt(squares / (double)d + i->f[0]));
        for (int64_t j = 0; j < d; j++) line[j] = (float)(x[j] - total / (double)d) * scale * norm[j] + w[5][j];
        score[s] = dot(line, asked, d) / sqrtf((float)rank);
    }
    softmax(score, n);
    memset(mixed, 0, sizeof(float) * (size_t)d);
    for (int64_t s = 0; s < n; s++) axpy(mixed, score[s], lines + s * d, d);
    gemv(q, v_proj, mixed, NULL, rank, d);
    gemv(read, i->m.data, q, NULL, d, rank);
    for (int64_t j = 0; j < d; j++) read[j] *= open[0];
}

// out = a + what its chunk reads; b, c: what CHUNK gave.
void run_workspace(runner *r) {
    const instruction *i = r->i;
    const int64_t n = i->n[SLOTS], d = i->out.size;
    for (int64_t row = 0; row < r->b; row++) {
        const float *x = at(r, &i->a, row), *flags = at(r, &i->c, row);
        float *slots = (float *)slot(r, 0)->after + row * n * d, *read = (float *)slot(r, 1)->after + row * d;
        const int fresh = flags[2] != 0;
        const float *slots_before = (const float *)slot(r, 0)->before + row * n * d, *before = (const float *)slot(r, 1)->before + row * d;
        if (fresh || slots != slots_before) memcpy(slots, fresh ? i->w[0] : slots_before, sizeof(float) * (size_t)(n * d));
        if (fresh) memset(read, 0, sizeof(float) * (size_t)d);
        else if (flags[0] != 0) write_and_read(r, slots, read, at(r, &i->b, row));
        else if (read != before) memcpy(read, before, sizeof(float) * (size_t)d);
        float *out = at(r, &i->out, row);
        for (int64_t j = 0; j < d; j++) out[j] = x[j] + read[j];
    }
}
