// Attention with the weights w = 1 + s + s^2/2 of scores s = q.k / sqrt(f), in chunks of q steps.
//
// With x' = x / f^(1/4) and P, Q the features phi of keys and queries, per head and chunk, S (n p) and u (n) the sums
// before it, see[t] whether step t sees them and end[s] whether key s is in the document that the chunk ends with:
//     W[t][s] = w of q'_t . k'_s, for keys of the same document up to t
//     D = W 1 + see o (Q u) + eps               Y = (W V + see o (Q S)) / D
//     S_next = whole S + P' (end o V)           u_next = whole u + P' end          whole = see[last]
// and backwards with E = dY / D, given the gradients G (n p) and g (n) of S_next and u_next:
//     dD = -(rows of W o E V', summed + see o (Q o (E S')), summed) / D
//     dW = E V' + dD 1'    ds = dW o (1 + s)    dV = W' E + end o (P G)
//     dQ = see o (E S' + dD u')                 dP = end o (V G' + 1 g')
//     dS = whole G + Q' (see o E)               du = whole g + Q' (see o dD)
// Features are kept as (n, q), so that the lanes of products and of their derivatives run along time.
// A task is one head: its state stays in cache.
#include "gemm.h"
#include "parallel.h"

enum { b_, l_, h_, f_, p_, q_, threads_, eps_, q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, SIZES };

typedef struct {
    const int64_t *z;
    const float *q, *k, *v;                    // (b l h .) with strides
    const float *weight;                       // (b l) of the keys, 0 or 1; NULL: all 1
    const int32_t *begin;                      // (b l) where the document of each step begins; NULL: all 0
    const float *first;                        // (b h n p+1) or NULL
    float *saved, *y, *last;                   // (b h c size) or NULL, (b l h p), (b h n p+1)
    const float *dy, *dlast;                   // (b l h p), (b h n p+1) or NULL
    float *dq, *dk, *dv, *dfirst;              // contiguous; dfirst may be NULL
    int64_t n, np, fp, pp, qp, size, chunks;
    float eps, scale;
} taylor_t;

// One head in one chunk of `q` steps from t0 on. QT, KT (f qp) scaled; Q, P (n qp); s, W (q qp); V (q pp)
typedef struct {
    int64_t b, h, t0, q;
    float *QT, *KT, *Q, *P, *s, *W, *V, *Y, *D, *see, *end;
    int64_t *low;  // first key in the chunk that each step sees
} chunk_t;

static float *floats(size_t count) { return scratch(count * sizeof(float)); }

static float *chunk_memory(const taylor_t *a, chunk_t *c) {
    const size_t fq = a->z[f_] * a->qp, nq = a->n * a->qp, qq = a->z[q_] * a->qp, qpp = a->z[q_] * a->pp;
    const size_t sizes[] = {fq, fq, nq, nq, qq, qq, qpp, qpp, a->qp, a->qp, a->qp};
    float **names[] = {&c->QT, &c->KT, &c->Q, &c->P, &c->s, &c->W, &c->V, &c->Y, &c->D, &c->see, &c->end};
    size_t total = 0;
    for (int i = 0; i < 11; i++) total += sizes[i];
    float *memory = floats(total + 2 * a->qp), *next = memory;
    for (int i = 0; i < 11; i++) { *names[i] = next; next += sizes[i]; }
    c->low = (int64_t *)next;
    return memory;
}

static int64_t row_at(const taylor_t *a, const chunk_t *c) {  // index of (b t0 h) in a contiguous (b l h)
    return (c->b * a->z[l_] + c->t0) * a->z[h_] + c->h;
}
static const float *q_at(const taylor_t *a, const chunk_t *c) {
    return a->q + c->b * a->z[q_b] + c->t0 * a->z[q_l] + c->h * a->z[q_h];
}
static const float *k_at(const taylor_t *a, const chunk_t *c) {
    return a->k + c->b * a->z[k_b] + c->t0 * a->z[k_l] + c->h * a->z[k_h];
}
static const float *v_at(const taylor_t *a, const chunk_t *c) {
    return a->v + c->b * a->z[v_b] + c->t0 * a->z[v_l] + c->h * a->z[v_h];
}

// to (rows, padded columns) = from * scale, zero behind the columns
static void pack(const float *from, int64_t ld, int64_t rows, int64_t columns, int64_t ldt, float scale, float *to) {
    for (int64_t t = 0; t < rows; t++) {
        for (int64_t i = 0; i < columns; i++) to[t * ldt + i] = from[t * ld + i] * scale;
        for (int64_t i = columns; i < ldt; i++) to[t * ldt + i] = 0;
    }
}

#define ROOT_HALF 0.70710678118654752440f

// XT (f qp) -> its features (n qp)
static void features(const float *XT, int64_t f, int64_t qp, float *to) {
    for (int64_t t = 0; t < qp; t++) to[t] = 1;
    memcpy(to + qp, XT, f * qp * sizeof(float));
    float *pair = to + (1 + f) * qp;
    for (int64_t i = 0; i < f; i++)
        for (int64_t j = i; j < f; j++, pair += qp)
            for (int64_t t = 0; t < qp; t += VL) {
                const vf x = v_load(XT + i * qp + t) * v_load(XT + j * qp + t);
                v_store(pair + t, i == j ? x * ROOT_HALF : x);
            }
}

// dXT (f qp) from the gradient of the features of XT
static void features_gradient(const float *XT, const float *d, int64_t f, int64_t qp, float *dXT) {
    memcpy(dXT, d + qp, f * qp * sizeof(float));
    const float *pair = d + (1 + f) * qp;
    for (int64_t i = 0; i < f; i++)
        for (int64_t j = i; j < f; j++, pair += qp)
            for (int64_t t = 0; t < qp; t += VL) {
                const vf g = v_load(pair + t), xi = v_load(XT + i * qp + t);
                if (i == j) v_store(dXT + i * qp + t, v_load(dXT + i * qp + t) + g * xi * (2 * ROOT_HALF));
                else {
                    v_store(dXT + i * qp + t, v_load(dXT + i * qp + t) + g * v_load(XT + j * qp + t));
                    v_store(dXT + j * qp + t, v_load(dXT + j * qp + t) + g * xi);
                }
            }
}

// sums over the n rows: to[t] = sum_i rows[i][t] * other, other being u[i] or, without u, with[i][t]
static void column_sums(const float *rows, const float *u, const float *with, int64_t n, int64_t qp, float *to) {
    for (int64_t t = 0; t < qp; t += VL) {
        vf sum = {0};
        for (int64_t i = 0; i < n; i++) sum += v_load(rows + i * qp + t) * (u ? v_set(u[i]) : v_load(with + i * qp + t));
        v_store(to + t, sum);
    }
}

// to[i] = whole to[i] + sum_t rows[i][t] by[t]
static void row_sums(const float *rows, const float *by, float whole, int64_t n, int64_t qp, float *to) {
    for (int64_t i = 0; i < n; i++) {
        vf sum = {0};
        for (int64_t t = 0; t < qp; t += VL) sum += v_load(rows + i * qp + t) * v_load(by + t);
        to[i] = (whole == 0 ? 0 : whole * to[i]) + v_sum(sum);
    }
}

// Everything of a chunk up to D: features, weights and denominators, for the sums u before it.
static void begin_chunk(const taylor_t *a, chunk_t *c, int64_t number, const float *u) {
    const int64_t *z = a->z, f = z[f_], qp = a->qp;
    c->t0 = number * z[q_];
    c->q = z[l_] - c->t0 < z[q_] ? z[l_] - c->t0 : z[q_];
    transpose(q_at(a, c), z[q_l], c->q, f, c->QT, qp);
    transpose(k_at(a, c), z[k_l], c->q, f, c->KT, qp);
    for (int64_t i = 0; i < f * qp; i += VL) {
        v_store(c->QT + i, v_load(c->QT + i) * a->scale);
        v_store(c->KT + i, v_load(c->KT + i) * a->scale);
    }
    features(c->QT, f, qp, c->Q);
    features(c->KT, f, qp, c->P);
    pack(v_at(a, c), z[v_l], c->q, z[p_], a->pp, 1, c->V);

    const int64_t at = c->b * z[l_] + c->t0;
    const int64_t newest = a->begin ? a->begin[at + c->q - 1] : 0;  // where the last document begins
    for (int64_t t = 0; t < qp; t++) {
        const int64_t begin = a->begin && t < c->q ? a->begin[at + t] : 0;
        c->see[t] = begin == 0 || begin < c->t0;
        c->low[t] = begin > c->t0 ? begin - c->t0 : 0;
        c->end[t] = t < c->q && c->t0 + t >= newest ? (a->weight ? a->weight[at + t] : 1) : 0;
    }
    gemm_t scores = {c->QT, 1, qp, c->KT, qp, c->s, qp, NULL, NULL, 0};
    gemm(&scores, c->q, qp, f, GEMM_RESULT);
    column_sums(c->Q, u, NULL, a->n, qp, c->D);
    for (int64_t t = 0; t < c->q; t++) {
        const float *s = c->s + t * qp, *weight = a->weight ? a->weight + at : NULL;
        float *W = c->W + t * qp;
        memset(W, 0, qp * sizeof(float));
        float sum = 0;
        for (int64_t r = c->low[t]; r <= t; r++) W[r] = (1 + s[r] + 0.5f * s[r] * s[r]) * (weight ? weight[r] : 1);
        for (int64_t r = c->low[t]; r <= t; r++) sum += W[r];
        c->D[t] = sum + (c->see[t] ? c->D[t] : 0) + a->eps;
    }
}

static void load_state(const taylor_t *a, const chunk_t *c, const float *from, float *S, float *u) {
    const int64_t p = a->z[p_];
    memset(S, 0, a->size * sizeof(float));
    if (!from) return;
    from += (c->b * a->z[h_] + c->h) * a->n * (p + 1);
    for (int64_t i = 0; i < a->n; i++) {
        memcpy(S + i * a->pp, from + i * (p + 1), p * sizeof(float));
        u[i] = from[i * (p + 1) + p];
    }
}

static void store_state(const taylor_t *a, const chunk_t *c, const float *S, const float *u, float *to) {
    const int64_t p = a->z[p_];
    to += (c->b * a->z[h_] + c->h) * a->n * (p + 1);
    for (int64_t i = 0; i < a->n; i++) {
        memcpy(to + i * (p + 1), S + i * a->pp, p * sizeof(float));
        to[i * (p + 1) + p] = u[i];
    }
}

static float *saved_at(const taylor_t *a, const chunk_t *c, int64_t number) {
    return a->saved + ((c->b * a->z[h_] + c->h) * a->chunks + number) * a->size;
}

// S = whole S + sum_t X[:, t] (outer) R[t] with X (n qp), R (q pp)
static void carry(const taylor_t *a, const chunk_t *c, const float *X, const float *R, float whole, float *S) {
    gemm_t product = {X, a->qp, 1, R, a->pp, S, a->pp, NULL, whole == 0 ? NULL : S, whole};
    gemm(&product, a->n, a->pp, c->q, GEMM_FULL);
}

static void scale_rows(const taylor_t *a, const chunk_t *c, float *R, const float *by) {
    for (int64_t t = 0; t < c->q; t++)
        for (int64_t i = 0; i < a->pp; i++) R[t * a->pp + i] *= by[t];
}

// ---------------------------------------------------------------- forward

static void forward_task(void *context, int64_t task) {
    const taylor_t *a = context;
    const int64_t *z = a->z, pp = a->pp, qp = a->qp;
    chunk_t c = {.b = task / z[h_], .h = task % z[h_]};
    float *memory = chunk_memory(a, &c), *S = floats(a->size), *u = S + a->n * pp;
    load_state(a, &c, a->first, S, u);
    for (int64_t i = 0; i < a->chunks; i++) {
        if (a->saved) memcpy(saved_at(a, &c, i), S, a->size * sizeof(float));
        begin_chunk(a, &c, i, u);
        gemm_t before = {c.Q, 1, qp, S, pp, c.Y, pp, c.see, NULL, 0};
        gemm(&before, c.q, pp, a->n, GEMM_FULL);
        gemm_t inside = {c.W, qp, 1, c.V, pp, c.Y, pp, NULL, c.Y, 1};
        gemm(&inside, c.q, pp, c.q, GEMM_LOWER);
        float *y = a->y + row_at(a, &c) * z[p_];
        for (int64_t t = 0; t < c.q; t++)
            for (int64_t k = 0; k < z[p_]; k++) y[t * z[h_] * z[p_] + k] = c.Y[t * pp + k] / c.D[t];
        scale_rows(a, &c, c.V, c.end);
        carry(a, &c, c.P, c.V, c.see[c.q - 1], S);
        row_sums(c.P, c.end, c.see[c.q - 1], a->n, qp, u);
    }
    store_state(a, &c, S, u, a->last);
    free(S);
    free(memory);
}

// ---------------------------------------------------------------- backward

typedef struct { float *E, *ET, *VT, *dW, *dQ, *dP, *dV, *dD, *rows, *dXT, *own, *other; } bench_t;

static float *bench(const taylor_t *a, bench_t *w) {
    const size_t qpp = a->z[q_] * a->pp, pq = a->pp * a->qp, qq = a->z[q_] * a->qp, nq = a->n * a->qp;
    const size_t fq = a->z[f_] * a->qp, qf = a->z[q_] * a->fp;
    const size_t sizes[] = {qpp, pq, pq, qq, nq, nq, qpp, a->qp, qf, fq, qf, qf};
    float **names[] = {&w->E, &w->ET, &w->VT, &w->dW, &w->dQ, &w->dP, &w->dV, &w->dD, &w->rows, &w->dXT, &w->own,
                       &w->other};
    size_t total = 0;
    for (int i = 0; i < 12; i++) total += sizes[i];
    float *memory = floats(total), *next = memory;
    for (int i = 0; i < 12; i++) { *names[i] = next; next += sizes[i]; }
    return memory;
}

// d = by o (d + x (outer) y): (n qp), x (n), y (qp) or NULL for 1
static void finish_features(float *d, const float *by, const float *x, const float *y, int64_t n, int64_t qp) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t t = 0; t < qp; t += VL) {
            const vf more = y ? x[i] * v_load(y + t) : v_set(x[i]);
            v_store(d + i * qp + t, v_load(by + t) * (v_load(d + i * qp + t) + more));
        }
}

// Gradient of queries (turned: keys) in `to` (b l h f): through the scores, ds times the others, and the features.
static void to_inputs(const taylor_t *a, const chunk_t *c, bench_t *w, int turned, const float *d, float *to) {
    const int64_t *z = a->z, f = z[f_], fp = a->fp, qp = a->qp;
    if (turned) pack(q_at(a, c), z[q_l], c->q, f, fp, a->scale, w->other);
    else pack(k_at(a, c), z[k_l], c->q, f, fp, a->scale, w->other);
    gemm_t scores = {w->dW, turned ? 1 : qp, turned ? qp : 1, w->other, fp, w->rows, fp, NULL, NULL, 0};
    gemm(&scores, c->q, fp, c->q, turned ? GEMM_UPPER : GEMM_LOWER);
    features_gradient(turned ? c->KT : c->QT, d, f, qp, w->dXT);
    transpose(w->dXT, qp, f, c->q, w->own, fp);
    to += row_at(a, c) * f;
    for (int64_t t = 0; t < c->q; t++)
        for (int64_t i = 0; i < f; i++) to[t * z[h_] * f + i] = a->scale * (w->rows[t * fp + i] + w->own[t * fp + i]);
}

static void backward_task(void *context, int64_t task) {
    const taylor_t *a = context;
    const int64_t *z = a->z, p = z[p_], pp = a->pp, qp = a->qp, n = a->n;
    chunk_t c = {.b = task / z[h_], .h = task % z[h_]};
    bench_t w;
    float *memory = chunk_memory(a, &c), *more = bench(a, &w), *G = floats(a->size), *g = G + n * pp;
    load_state(a, &c, a->dlast, G, g);
    for (int64_t i = a->chunks - 1; i >= 0; i--) {
        const float *S = saved_at(a, &c, i), *u = S + n * pp, *weight = NULL;
        begin_chunk(a, &c, i, u);
        if (a->weight) weight = a->weight + c.b * z[l_] + c.t0;
        pack(a->dy + row_at(a, &c) * p, z[h_] * p, c.q, p, pp, 1, w.E);
        for (int64_t t = 0; t < c.q; t++)
            for (int64_t k = 0; k < pp; k++) w.E[t * pp + k] /= c.D[t];
        transpose(w.E, pp, c.q, pp, w.ET, qp);
        transpose(c.V, pp, c.q, pp, w.VT, qp);

        gemm_t to_Q = {S, pp, 1, w.ET, qp, w.dQ, qp, NULL, NULL, 0};
        gemm(&to_Q, n, qp, p, GEMM_FULL);
        gemm_t to_W = {w.E, pp, 1, w.VT, qp, w.dW, qp, NULL, NULL, 0};
        gemm(&to_W, c.q, qp, p, GEMM_RESULT);
        column_sums(c.Q, NULL, w.dQ, n, qp, w.dD);
        for (int64_t t = 0; t < qp; t++) {
            float *dW = w.dW + t * qp, sum = 0;
            const float *W = c.W + t * qp, *s = c.s + t * qp;
            if (t >= c.q) { w.dD[t] = 0; continue; }
            for (int64_t r = c.low[t]; r <= t; r++) sum += W[r] * dW[r];
            w.dD[t] = -(sum + (c.see[t] ? w.dD[t] : 0)) / c.D[t];
            for (int64_t r = c.low[t]; r <= t; r++) dW[r] = (dW[r] + w.dD[t]) * (1 + s[r]) * (weight ? weight[r] : 1);
            memset(dW, 0, c.low[t] * sizeof(float));
            memset(dW + t + 1, 0, (qp - t - 1) * sizeof(float));
        }
        finish_features(w.dQ, c.see, u, w.dD, n, qp);
        to_inputs(a, &c, &w, 0, w.dQ, a->dq);

        gemm_t to_P = {G, pp, 1, w.VT, qp, w.dP, qp, NULL, NULL, 0};
        gemm(&to_P, n, qp, p, GEMM_FULL);
        finish_features(w.dP, c.end, g, NULL, n, qp);
        to_inputs(a, &c, &w, 1, w.dP, a->dk);

        gemm_t from_state = {c.P, 1, qp, G, pp, w.dV, pp, c.end, NULL, 0};
        gemm(&from_state, c.q, pp, n, GEMM_FULL);
        gemm_t inside = {c.W, 1, qp, w.E, pp, w.dV, pp, NULL, w.dV, 1};
        gemm(&inside, c.q, pp, c.q, GEMM_UPPER);
        float *dv = a->dv + row_at(a, &c) * p;
        for (int64_t t = 0; t < c.q; t++) memcpy(dv + t * z[h_] * p, w.dV + t * pp, p * sizeof(float));

        scale_rows(a, &c, w.E, c.see);
        carry(a, &c, c.Q, w.E, c.see[c.q - 1], G);
        for (int64_t t = 0; t < c.q; t++) w.dD[t] *= c.see[t];
        row_sums(c.Q, w.dD, c.see[c.q - 1], n, qp, g);
    }
    if (a->dfirst) store_state(a, &c, G, g, a->dfirst);
    free(G);
    free(more);
    free(memory);
}

// ---------------------------------------------------------------- entry points

static void prepare(taylor_t *a) {
    const int64_t *z = a->z, f = z[f_];
    double eps;
    memcpy(&eps, &z[eps_], sizeof eps);
    a->eps = (float)eps;
    a->scale = powf((float)f, -0.25f);
    a->n = (f + 1) * (f + 2) / 2;
    a->np = padded(a->n);
    a->fp = padded(f);
    a->pp = padded(z[p_]);
    a->qp = padded(z[q_]);
    a->size = a->n * a->pp + a->np;
    a->chunks = (z[l_] + z[q_] - 1) / z[q_];
}

// arguments: the sizes, then the pointers q k v weight begin first | saved y last
void ssmzoo_taylor_attention_forward(const int64_t *sizes) {
    void *const *p = (void *const *)(sizes + SIZES);
    taylor_t a = {.z = sizes, .q = p[0], .k = p[1], .v = p[2], .weight = p[3], .begin = p[4], .first = p[5],
                  .saved = p[6], .y = p[7], .last = p[8]};
    prepare(&a);
    parallel_for(sizes[b_] * sizes[h_], sizes[threads_], forward_task, &a);
}

// arguments: the sizes, then the pointers q k v weight begin saved dy dlast | dq dk dv dfirst
void ssmzoo_taylor_attention_backward(const int64_t *sizes) {
    void *const *p = (void *const *)(sizes + SIZES);
    taylor_t a = {.z = sizes, .q = p[0], .k = p[1], .v = p[2], .weight = p[3], .begin = p[4], .saved = p[5],
                  .dy = p[6], .dlast = p[7], .dq = p[8], .dk = p[9], .dv = p[10], .dfirst = p[11]};
    prepare(&a);
    parallel_for(sizes[b_] * sizes[h_], sizes[threads_], backward_task, &a);
}
