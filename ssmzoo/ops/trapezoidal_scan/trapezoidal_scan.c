// Mamba-3's scan with one rank, keys and queries biased and turned on the way, in chunks of q steps.
//
// With e = exp(a) (a reset is 0), w_s = gamma_s + beta_{s+1}, K and Q the turned keys and queries, V the values, X = w V,
// and, per head and inside a chunk, the products of decays L (here without its diagonal), start, end and whole:
//     W = L o Q K'     own[t] = gamma_t <Q_t, K_t>     Y = W X + start o (Q S) + (D + own) o V
//     S_next = whole S + K' (end o X)                  since a step's later share, beta, is not seen by its own y
// and backwards, given dY and the gradient G of S_next, with u[t] = <dY_t, V_t>:
//     dX = W' dY + end o (K G)        dV = w o dX + (D + own) o dY        dw[t] = <dX_t, V_t>      dD = sum of u
//     dgamma = dw + u o <Q, K>        dbeta one step later = dw           dS = whole G + Q' (start o dY)
//     dQK = L o dY X' + diag(gamma u)     dQ = dQK K + start o (dY S')    dK = dQK' Q + end o (X G')
//     d(log e): see decays.h
// dQ and dK turned back are the gradients of what was turned; a phase's is <dK, J K> + <dQ, J Q> of its pair of channels.
//
// A task takes some heads of one group through all chunks in sequence, so that their states stay in cache; states are
// (n, p) with p padded to whole vectors. The cut into tasks decides the order in which dk and dq are summed, nothing else.
#include "decays.h"
#include "parallel.h"

// split: parts that the heads of a group are cut into, one task each
enum { b_, l_, h_, p_, g_, n_, m_, q_, split_, threads_, v_b, v_l, v_h, k_b, k_l, k_g, q_b, q_l, q_g, SIZES };

typedef struct {
    const int64_t *z;
    const float *v, *k, *q;                       // (b l h p), (b l g n), with strides
    const float *k_bias, *q_bias, *phase;         // (h n), (h n), (b l h m); NULL: none
    const float *e, *gamma, *beta, *D;            // (b l h), (h)
    float *states;                                // (b c h n pp) before every chunk; NULL: not kept
    const float *first;                           // (b h p n) or NULL
    float *y, *last;                              // (b l h p), (b h p n)
    const float *dy, *dlast;                      // (b l h p); (b h p n) or NULL
    float *dv, *dk, *dq, *dk_bias, *dq_bias, *dphase;  // dk, dq (split b l g n), dk_bias, dq_bias (b h n): to be added
    float *da, *dgamma, *dbeta, *dD, *dfirst;     // dD (b h): to be added; dfirst may be NULL
    int64_t chunks, pp, qp, np, tp;               // tp: width of a row of cosines
} scan_t;

typedef struct { int64_t b, g, part, h0, h1, h, c, t0, q, step; } place_t;  // heads h0 to h1 of a group; one head in one chunk

// What one head needs in a chunk: cosines and sines by channel (q tp), K, Q (q np), KT (n qp), QK, L, W (q qp), V, X, Y
// (q pp), lines of qp numbers. The rest is of the backward: dQK, dW, XT (p qp), dX, ST and GT (p np), dK, dQ and sums.
typedef struct {
    float *cosine, *sine, *K, *Q, *KT, *QK, *L, *W, *V, *X, *Y, *start, *end, *weight, *own;
    float *dQK, *dW, *XT, *dX, *ST, *GT, *dK, *dQ, *dk, *dq, *before, *after, *column;
} bench_t;

static float *bench(const scan_t *s, bench_t *w, int backward) {
    const int64_t *z = s->z;
    const size_t qq = z[q_] * s->qp, qn = z[q_] * s->np, qpp = z[q_] * s->pp, qt = z[q_] * s->tp, pn = s->pp * s->np, line = s->qp;
    const size_t sizes[] = {qt, qt, qn, qn, s->np * s->qp, qq, qq, qq, qpp, qpp, qpp, line, line, line, line,
                            qq, qq, s->pp * s->qp, qpp, pn, pn, qn, qn, qn, qn, line, line, line};
    float **names[] = {&w->cosine, &w->sine, &w->K, &w->Q, &w->KT, &w->QK, &w->L, &w->W, &w->V, &w->X, &w->Y, &w->start, &w->end,
                       &w->weight, &w->own, &w->dQK, &w->dW, &w->XT, &w->dX, &w->ST, &w->GT, &w->dK, &w->dQ, &w->dk, &w->dq,
                       &w->before, &w->after, &w->column};
    const int count = backward ? 28 : 15;
    size_t total = 0;
    for (int i = 0; i < count; i++) total += sizes[i];
    float *memory = scratch(total * sizeof(float)), *next = memory;
    for (int i = 0; i < count; i++) { *names[i] = next; next += sizes[i]; }
    memset(w->W, 0, qq * sizeof(float));  // above the diagonal nothing is written
    if (backward) memset(w->dQK, 0, qq * sizeof(float));
    return memory;
}

static place_t heads(const scan_t *s, int64_t i) {
    const int64_t each = s->z[h_] / s->z[g_];
    place_t at = {.part = i % s->z[split_], .g = i / s->z[split_] % s->z[g_], .b = i / s->z[split_] / s->z[g_]};
    at.h0 = at.g * each + each * at.part / s->z[split_];
    at.h1 = at.g * each + each * (at.part + 1) / s->z[split_];
    return at;
}

static void go_to(const scan_t *s, place_t *at, int64_t c) {
    at->c = c;
    at->t0 = c * s->z[q_];
    at->q = s->z[l_] - at->t0 < s->z[q_] ? s->z[l_] - at->t0 : s->z[q_];
}

static void go_to_head(const scan_t *s, place_t *at, int64_t h) {
    at->h = h;
    at->step = (at->b * s->z[l_] + at->t0) * s->z[h_] + h;
}

static const float *v_at(const scan_t *s, const place_t *at) {
    return s->v + at->b * s->z[v_b] + at->t0 * s->z[v_l] + at->h * s->z[v_h];
}
static float *states_at(const scan_t *s, const place_t *at) {
    return s->states + ((at->b * s->chunks + at->c) * s->z[h_] + at->h) * s->z[n_] * s->pp;
}

// all states of the task, (h1 - h0, n, pp), from (b h p n) or zero, and back
static float *load_states(const scan_t *s, const place_t *at, const float *from) {
    const int64_t *z = s->z, size = z[n_] * s->pp;
    float *S = scratch((at->h1 - at->h0) * size * sizeof(float));
    for (int64_t h = at->h0; h < at->h1; h++) {
        float *to = S + (h - at->h0) * size;
        if (from) transpose(from + (at->b * z[h_] + h) * z[p_] * z[n_], z[n_], z[p_], z[n_], to, s->pp);
        else memset(to, 0, size * sizeof(float));
    }
    return S;
}
static void store_states(const scan_t *s, const place_t *at, const float *S, float *to) {
    const int64_t *z = s->z, size = z[n_] * s->pp;
    for (int64_t h = at->h0; h < at->h1; h++)
        transpose(S + (h - at->h0) * size, s->pp, z[n_], z[p_], to + (at->b * z[h_] + h) * z[p_] * z[n_], z[n_]);
}

// Cosines and sines of a head's phases by channel: of channels 2i and 2i+1 (c c) and (-s s), (1 1) and (0 0) behind them.
static void turns(const scan_t *s, const place_t *at, const bench_t *w) {
    const int64_t *z = s->z, m = z[m_];
    for (int64_t t = 0; t < at->q; t++) {
        const float *phase = s->phase + (at->step + t * z[h_]) * m;
        float *cosine = w->cosine + t * s->tp, *sine = w->sine + t * s->tp;
        for (int64_t i = 0; i < s->tp; i += 2 * VL) {
            vf c, v;
            v_sincos(m > i / 2 ? v_load_some(phase + i / 2, m - i / 2) : v_set(0), &v, &c);
            v_store(cosine + i, V_LOW(c, c)), v_store(cosine + i + VL, V_HIGH(c, c));
            v_store(sine + i, V_LOW(-v, v)), v_store(sine + i + VL, V_HIGH(-v, v));
        }
    }
}

// Rows (q n) plus a bias, turned, as (q np) with zeros behind n.
static void turn(const scan_t *s, const place_t *at, const bench_t *w, const float *from, int64_t ld, const float *bias, float *to) {
    const int64_t n = s->z[n_], np = s->np;
    for (int64_t t = 0; t < at->q; t++)
        for (int64_t i = 0; i < np; i += VL) {
            vf x = v_load_some(from + t * ld + i, n - i);
            if (bias) x += v_load_some(bias + i, n - i);
            if (s->phase) x = x * v_load(w->cosine + t * s->tp + i) + V_NEIGHBOURS(x) * v_load(w->sine + t * s->tp + i);
            v_store(to + t * np + i, x);
        }
}

// sum (q np) += d turned back, bias (n) += its rows
static void turn_back(const scan_t *s, const place_t *at, const bench_t *w, const float *d, float *sum, float *bias) {
    const int64_t n = s->z[n_], np = s->np;
    for (int64_t i = 0; i < np; i += VL) {
        vf total = bias ? v_load_some(bias + i, n - i) : v_set(0);
        for (int64_t t = 0; t < at->q; t++) {
            vf x = v_load(d + t * np + i);
            if (s->phase) x = x * v_load(w->cosine + t * s->tp + i) - V_NEIGHBOURS(x) * v_load(w->sine + t * s->tp + i);
            v_store(sum + t * np + i, v_load(sum + t * np + i) + x);
            total += x;
        }
        if (bias) v_store_some(bias + i, total, n - i);
    }
}

static void phase_gradient(const scan_t *s, const place_t *at, const bench_t *w, float *line) {
    const int64_t *z = s->z, m = z[m_], np = s->np;
    for (int64_t t = 0; t < at->q; t++) {
        float *to = s->dphase + (at->step + t * z[h_]) * m;
        for (int64_t i = 0; i < np && i < 2 * m; i += VL) {
            const vf K = v_load(w->K + t * np + i), Q = v_load(w->Q + t * np + i);
            v_store(line + i, v_load(w->dK + t * np + i) * V_NEIGHBOURS(K) + v_load(w->dQ + t * np + i) * V_NEIGHBOURS(Q));
        }
        for (int64_t i = 0; i < m; i++) to[i] = line[2 * i + 1] - line[2 * i];
    }
}

INLINE float dot(const float *x, const float *y, int64_t n) {
    vf sum = {0};
    for (int64_t i = 0; i < n; i += VL) sum += v_load(x + i) * v_load(y + i);
    return v_sum(sum);
}

// rows *= by, (q pp)
static void scale_rows(float *rows, const float *by, int64_t q, int64_t pp) {
    for (int64_t t = 0; t < q; t++)
        for (int64_t i = 0; i < pp; i += VL) v_store(rows + t * pp + i, v_load(rows + t * pp + i) * by[t]);
}

// from (q p), rows ld apart, as (q pp) with zeros behind p
static void pack(const float *from, int64_t ld, int64_t q, int64_t p, int64_t pp, float *to) {
    for (int64_t t = 0; t < q; t++)
        for (int64_t i = 0; i < pp; i += VL) v_store(to + t * pp + i, v_load_some(from + t * ld + i, p - i));
}

// S = whole S + A' X, with A (q np), X (q pp); a whole of 0 forgets S, whatever it held
static void carry(const scan_t *s, float *S, float whole, const float *A, const float *X, int64_t q) {
    gemm_t product = {A, 1, s->np, X, s->pp, S, s->pp, NULL, whole == 0 ? NULL : S, whole};
    gemm(&product, s->z[n_], s->pp, q, GEMM_FULL);
}

// Everything up to W, own and X of one head in one chunk.
static void begin_head(const scan_t *s, const place_t *at, const bench_t *w) {
    const int64_t *z = s->z, q = at->q, qp = s->qp, np = s->np, h = at->h, n = z[n_];
    if (s->phase) turns(s, at, w);
    turn(s, at, w, s->k + at->b * z[k_b] + at->t0 * z[k_l] + at->g * z[k_g], z[k_l], s->k_bias ? s->k_bias + h * n : NULL, w->K);
    turn(s, at, w, s->q + at->b * z[q_b] + at->t0 * z[q_l] + at->g * z[q_g], z[q_l], s->q_bias ? s->q_bias + h * n : NULL, w->Q);
    transpose(w->K, np, q, n, w->KT, qp);
    gemm_t scores = {w->Q, np, 1, w->KT, qp, w->QK, qp, NULL, NULL, 0};
    gemm(&scores, q, qp, n, GEMM_RESULT);
    decays(s->e + at->step, z[h_], q, w->start, w->end);
    decay_matrix(s->e + at->step, z[h_], q, qp, w->L);
    pack(v_at(s, at), z[v_l], q, z[p_], s->pp, w->V);
    for (int64_t t = 0; t < q; t++) {
        const int64_t i = at->step + t * z[h_];
        w->weight[t] = s->gamma[i] + (at->t0 + t + 1 < z[l_] ? s->beta[i + z[h_]] : 0.f);
        w->own[t] = s->gamma[i] * w->QK[t * qp + t];
        w->L[t * qp + t] = 0;
        for (int64_t r = 0; r <= t; r += VL) v_store(w->W + t * qp + r, v_load(w->L + t * qp + r) * v_load(w->QK + t * qp + r));
        for (int64_t i = 0; i < s->pp; i += VL) v_store(w->X + t * s->pp + i, v_load(w->V + t * s->pp + i) * w->weight[t]);
    }
}

// ---------------------------------------------------------------- forward

static void forward_head(const scan_t *s, const place_t *at, const bench_t *w, float *S) {
    const int64_t *z = s->z, q = at->q, pp = s->pp, p = z[p_];
    if (s->states) memcpy(states_at(s, at), S, z[n_] * pp * sizeof(float));
    begin_head(s, at, w);
    gemm_t before = {w->Q, s->np, 1, S, pp, w->Y, pp, w->start, NULL, 0};
    gemm(&before, q, pp, z[n_], GEMM_FULL);
    gemm_t inside = {w->W, s->qp, 1, w->X, pp, w->Y, pp, NULL, w->Y, 1};
    gemm(&inside, q, pp, q, GEMM_LOWER);
    for (int64_t t = 0; t < q; t++) {
        float *y = s->y + (at->step + t * z[h_]) * p;
        const float skip = s->D[at->h] + w->own[t];
        for (int64_t i = 0; i < pp; i += VL)
            v_store_some(y + i, v_load(w->Y + t * pp + i) + skip * v_load(w->V + t * pp + i), p - i);
    }
    scale_rows(w->X, w->end, q, pp);
    carry(s, S, w->start[q - 1], w->K, w->X, q);
}

static void forward_task(void *context, int64_t i) {
    const scan_t *s = context;
    place_t at = heads(s, i);
    bench_t w;
    float *S = load_states(s, &at, s->first), *memory = bench(s, &w, 0);
    for (int64_t c = 0; c < s->chunks; c++) {
        go_to(s, &at, c);
        for (int64_t h = at.h0; h < at.h1; h++) {
            go_to_head(s, &at, h);
            forward_head(s, &at, &w, S + (h - at.h0) * s->z[n_] * s->pp);
        }
    }
    store_states(s, &at, S, s->last);
    free(memory);
    free(S);
}

// ---------------------------------------------------------------- backward

// G is the gradient of the state after the chunk, and of the one before it afterwards.
static void head_gradients(const scan_t *s, const place_t *at, const bench_t *w, float *G) {
    const int64_t *z = s->z, q = at->q, qp = s->qp, pp = s->pp, np = s->np, p = z[p_], n = z[n_];
    const float *S = states_at(s, at), *gamma = s->gamma + at->step;
    float *dD = s->dD + at->b * z[h_] + at->h, *dY = w->Y;
    begin_head(s, at, w);
    pack(s->dy + at->step * p, z[h_] * p, q, p, pp, dY);
    transpose(w->X, pp, q, pp, w->XT, qp);
    transpose(S, pp, n, pp, w->ST, np);
    transpose(G, pp, n, pp, w->GT, np);
    gemm_t weights = {dY, pp, 1, w->XT, qp, w->dW, qp, NULL, NULL, 0};
    gemm(&weights, q, qp, pp, GEMM_RESULT);
    gemm_t through_state = {w->K, np, 1, G, pp, w->dX, pp, w->end, NULL, 0};
    gemm(&through_state, q, pp, n, GEMM_FULL);
    gemm_t to_Q = {dY, pp, 1, w->ST, np, w->dQ, np, w->start, NULL, 0};
    gemm(&to_Q, q, np, p, GEMM_FULL);
    gemm_t to_K = {w->X, pp, 1, w->GT, np, w->dK, np, w->end, NULL, 0};
    gemm(&to_K, q, np, p, GEMM_FULL);
    for (int64_t t = 0; t < q; t++) {
        w->before[t] = dot(w->Q + t * np, w->dQ + t * np, np);
        w->after[t] = dot(w->X + t * pp, w->dX + t * pp, pp);
    }
    const float across = w->start[q - 1] == 0 ? 0 : w->start[q - 1] * dot(S, G, n * pp);
    decay_gradient(s->e + at->step, z[h_], q, qp, w->W, w->dW, w->before, w->after, across, w->column, s->da + at->step);

    gemm_t inside = {w->W, 1, qp, dY, pp, w->dX, pp, NULL, w->dX, 1};
    gemm(&inside, q, pp, q, GEMM_UPPER);
    for (int64_t t = 0; t < q; t++) {
        const int64_t i = at->step + t * z[h_];
        const float *dx = w->dX + t * pp, *dy = dY + t * pp, *v = w->V + t * pp;
        const float u = dot(dy, v, pp), dw = dot(dx, v, pp), skip = s->D[at->h] + w->own[t];
        for (int64_t j = 0; j < pp; j += VL)
            v_store_some(s->dv + i * p + j, w->weight[t] * v_load(dx + j) + skip * v_load(dy + j), p - j);
        s->dgamma[i] = dw + u * w->QK[t * qp + t];
        if (at->t0 + t + 1 < z[l_]) s->dbeta[i + z[h_]] = dw;
        *dD += u;
        for (int64_t r = 0; r <= t; r += VL) v_store(w->dQK + t * qp + r, v_load(w->L + t * qp + r) * v_load(w->dW + t * qp + r));
        w->dQK[t * qp + t] = gamma[t * z[h_]] * u;
    }
    gemm_t score_Q = {w->dQK, qp, 1, w->K, np, w->dQ, np, NULL, w->dQ, 1};
    gemm(&score_Q, q, np, q, GEMM_LOWER);
    gemm_t score_K = {w->dQK, 1, qp, w->Q, np, w->dK, np, NULL, w->dK, 1};
    gemm(&score_K, q, np, q, GEMM_UPPER);
    const int64_t row = (at->b * z[h_] + at->h) * n;
    turn_back(s, at, w, w->dK, w->dk, s->dk_bias ? s->dk_bias + row : NULL);
    turn_back(s, at, w, w->dQ, w->dq, s->dq_bias ? s->dq_bias + row : NULL);
    if (s->phase) phase_gradient(s, at, w, w->ST);
    scale_rows(dY, w->start, q, pp);
    carry(s, G, w->start[q - 1], w->Q, dY, q);
}

static void backward_task(void *context, int64_t i) {
    const scan_t *s = context;
    const int64_t *z = s->z, n = z[n_], np = s->np;
    place_t at = heads(s, i);
    bench_t w;
    float *G = load_states(s, &at, s->dlast), *memory = bench(s, &w, 1);
    for (int64_t h = at.h0; h < at.h1; h++) {
        const int64_t row = at.b * z[h_] + h;
        s->dD[row] = 0;
        s->dbeta[at.b * z[l_] * z[h_] + h] = 0;
        if (s->dk_bias) memset(s->dk_bias + row * n, 0, n * sizeof(float));
        if (s->dq_bias) memset(s->dq_bias + row * n, 0, n * sizeof(float));
    }
    for (int64_t c = s->chunks - 1; c >= 0; c--) {
        go_to(s, &at, c);
        memset(w.dk, 0, at.q * np * sizeof(float));
        memset(w.dq, 0, at.q * np * sizeof(float));
        for (int64_t h = at.h0; h < at.h1; h++) {
            go_to_head(s, &at, h);
            head_gradients(s, &at, &w, G + (h - at.h0) * n * s->pp);
        }
        const int64_t out = (((at.part * z[b_] + at.b) * z[l_] + at.t0) * z[g_] + at.g) * n;
        for (int64_t t = 0; t < at.q; t++) {
            memcpy(s->dk + out + t * z[g_] * n, w.dk + t * np, n * sizeof(float));
            memcpy(s->dq + out + t * z[g_] * n, w.dq + t * np, n * sizeof(float));
        }
    }
    if (s->dfirst) store_states(s, &at, G, s->dfirst);
    free(memory);
    free(G);
}

// ---------------------------------------------------------------- entry points

static void run(scan_t *s, void (*task)(void *context, int64_t i)) {
    const int64_t *z = s->z;
    s->chunks = (z[l_] + z[q_] - 1) / z[q_];
    s->pp = padded(z[p_]);
    s->qp = padded(z[q_]);
    s->np = padded(z[n_]);
    s->tp = (s->np + 2 * VL - 1) / (2 * VL) * (2 * VL);
    parallel_for(z[b_] * z[g_] * z[split_], z[threads_], task, s);
}

// arguments: the sizes, then the pointers v k q k_bias q_bias phase e gamma beta D first | states y last
void ssmzoo_trapezoidal_scan_forward(const int64_t *sizes) {
    void *const *p = (void *const *)(sizes + SIZES);
    scan_t s = {.z = sizes, .v = p[0], .k = p[1], .q = p[2], .k_bias = p[3], .q_bias = p[4], .phase = p[5], .e = p[6],
                .gamma = p[7], .beta = p[8], .D = p[9], .first = p[10], .states = p[11], .y = p[12], .last = p[13]};
    run(&s, forward_task);
}

// arguments: the sizes, then the pointers v k q k_bias q_bias phase e gamma beta D states dy dlast |
// dv dk dq dk_bias dq_bias dphase da dgamma dbeta dD dfirst
void ssmzoo_trapezoidal_scan_backward(const int64_t *sizes) {
    void *const *p = (void *const *)(sizes + SIZES);
    scan_t s = {.z = sizes, .v = p[0], .k = p[1], .q = p[2], .k_bias = p[3], .q_bias = p[4], .phase = p[5], .e = p[6],
                .gamma = p[7], .beta = p[8], .D = p[9], .states = p[10], .dy = p[11], .dlast = p[12], .dv = p[13],
                .dk = p[14], .dq = p[15], .dk_bias = p[16], .dq_bias = p[17], .dphase = p[18], .da = p[19],
                .dgamma = p[20], .dbeta = p[21], .dD = p[22], .dfirst = p[23]};
    run(&s, backward_task);
}
