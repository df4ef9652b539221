// One token more for attention that keeps all keys, or a window of them, and for Taylor linear attention.
#include "program.h"

enum { HEADS, KEY_HEADS, WIDTH, Q_STRIDE, K_STRIDE, V_STRIDE, WINDOW, TURNED };  // n of ATTEND

size_t attend_room(const program_args *a, const instruction *i) {
    return (size_t)(a->b * i->n[HEADS] * (a->state[i->s[0]].length + 2 + 2 * i->n[WIDTH]));
}

// The entries that are kept and the new one behind them, with `width` numbers each out of rows of `stride` numbers.
static void keep(float *after, const float *before, const float *now, int64_t dropped, int64_t length, int64_t stride, int64_t width) {
    for (int64_t s = dropped; after != before + dropped * stride && s < length; s++)
        memcpy(after + (s - dropped) * stride, before + s * stride, sizeof(float) * (size_t)width);
    memcpy(after + (length - dropped) * stride, now, sizeof(float) * (size_t)width);
}

static int64_t position_of(const state_slot *at, int64_t row) {  // of the new token
    const int64_t *position = (const int64_t *)at->before + row * at->ld;
    int64_t most = -1;
    for (int64_t s = 0; s < at->length; s++) most = position[s] > most ? position[s] : most;
    return most + 1;
}

// All heads of a sequence that share keys.
static void attend(void *context, int64_t index) {
    const runner *r = context;
    const instruction *i = r->i;
    const state_slot *keys = slot(r, 0), *values = slot(r, 1), *at_ = slot(r, 2);
    const int64_t h = i->n[HEADS], kv = i->n[KEY_HEADS], p = i->n[WIDTH], group = h / kv, row = index / kv, j = index % kv;
    const int64_t length = keys->length, dropped = length + 1 - keys->kept, stride = kv * p;
    const int64_t now = position_of(at_, row), first = i->n[WINDOW] && now >= i->n[WINDOW] ? now - i->n[WINDOW] + 1 : 0;
    const int64_t *position = (const int64_t *)at_->before + row * at_->ld;
    float *room = r->room + (row * h + j * group) * (length + 2 + 2 * p), *k = room + group * (length + 2), *q = k + p;
    const float *old_k = (const float *)keys->before + row * keys->ld * stride + j * p, *v = at(r, &i->c, row) + j * i->n[V_STRIDE];
    const float *old_v = (const float *)values->before + row * values->ld * stride + j * p;
    memcpy(k, at(r, &i->b, row) + j * i->n[K_STRIDE], sizeof(float) * (size_t)p);
    turn(k, (float)now, i->w[0], i->n[TURNED]);
    for (int64_t one = 0; one < group; one++) {
        const int64_t head = j * group + one;
        float *score = room + one * (length + 1), *y = at(r, &i->out, row) + head * p;
        memcpy(q, at(r, &i->a, row) + head * i->n[Q_STRIDE], sizeof(float) * (size_t)p);
        turn(q, (float)now, i->w[0], i->n[TURNED]);
        for (int64_t s = 0; s < length; s++)
            score[s] = position[s] >= first ? (float)i->f[0] * dot(q, old_k + s * stride, p) : -INFINITY;
        score[length] = (float)i->f[0] * dot(q, k, p);
        if (i->w[1]) {  // what every key adds to its scores
            const float *m = (const float *)slot(r, 3)->before + row * slot(r, 3)->ld * h + head;
            float step[VL] = {at(r, &i->d, row)[head]};
            softplus(step, VL);
            const float m_now = expf(i->w[1][head] * step[0]);
            float *m_after = (float *)slot(r, 3)->after + row * slot(r, 3)->ld_after * h + head;
            for (int64_t s = 0; s < length; s++) score[s] += m[s * h];
            for (int64_t s = dropped; m_after != m + dropped * h && s < length; s++) m_after[(s - dropped) * h] = m[s * h];
            score[length] += m_now;
            m_after[(length - dropped) * h] = m_now;
        }
        softmax(score, length + 1);
        memset(y, 0, sizeof(float) * (size_t)p);
        for (int64_t s = 0; s < length; s++)
            if (score[s] != 0) axpy(y, score[s], old_v + s * stride, p);
        axpy(y, score[length], v, p);
    }
    keep((float *)keys->after + row * keys->ld_after * stride + j * p, old_k, k, dropped, length, stride, p);
    keep((float *)values->after + row * values->ld_after * stride + j * p, old_v, v, dropped, length, stride, p);
}

void run_attend(runner *r) {
    const state_slot *at_ = slot(r, 2);
    crew_for(r->t, r->b * r->i->n[KEY_HEADS], attend, r);
    const int64_t dropped = at_->length + 1 - at_->kept;
    for (int64_t row = 0; row < r->b; row++) {
        int64_t *after = (int64_t *)at_->after + row * at_->ld_after;
        const int64_t *kept = (const int64_t *)at_->before + row * at_->ld + dropped, now = position_of(at_, row);
        if (after != kept) memcpy(after, kept, sizeof(int64_t) * (size_t)(at_->kept - 1));
        after[at_->kept - 1] = now;
    }
}

// phi(x) as ssmzoo/ops/taylor_attention/__init__.py has it.
static void features(float *to, const float *x, int64_t f) {
    const float scale = (float)pow((double)f, -0.25);
    float *next = to;
    *next++ = 1;
    for (int64_t i = 0; i < f; i++) *next++ = x[i] * scale;
    for (int64_t i = 0; i < f; i++)
        for (int64_t j = i; j < f; j++) *next++ = to[1 + i] * to[1 + j] * (i == j ? (float)M_SQRT1_2 : 1);
}

static void taylor(void *context, int64_t index) {
    const runner *r = context;
    const instruction *i = r->i;
    const int64_t h = i->n[0], f = i->n[1], p = i->n[2], row = index / h, head = index % h, n = (f + 1) * (f + 2) / 2;
    float *phi_q = r->room + index * 4 * n, *phi_k = phi_q + n, *y = at(r, &i->out, row) + head * p;
    features(phi_q, at(r, &i->a, row) + head * f, f);
    features(phi_k, at(r, &i->b, row) + head * f, f);
    const float *v = at(r, &i->c, row) + head * p, *before = (const float *)slot(r, 0)->before + index * n * (p + 1);
    float *after = (float *)slot(r, 0)->after + index * n * (p + 1), total = 0;
    memset(y, 0, sizeof(float) * (size_t)p);
    for (int64_t one = 0; one < n; one++, before += p + 1, after += p + 1) {
        for (int64_t j = 0; j < p; j += VL) {
            const int64_t left = p - j;
            const vf s = v_load_some(before + j, left) + phi_k[one] * v_load_some(v + j, left);
            v_store_some(after + j, s, left);
            v_store_some(y + j, v_load_some(y + j, left) + phi_q[one] * s, left);
        }
        after[p] = before[p] + phi_k[one];
        total += phi_q[one] * after[p];
    }
    for (int64_t j = 0; j < p; j++) y[j] /= total + (float)i->f[0];
}

void run_taylor(runner *r) { crew_for(r->t, r->b * r->i->n[0], taylor, r); }
