// Mamba-2's scan: S_t = e_t S_{t-1} + X_t (outer) B_t, y_t = S_t C_t + D x_t with X = dt x, in chunks of q steps.
//
// Inside a chunk, per head and with products of the decays e (a reset is e = 0, so nothing crosses it):
//     L[t][s] = e_{s+1} ... e_t    start[t] = e_0 ... e_t    end[s] = e_{s+1} ... e_last    whole = start[last]
//     Y = (L o C B') X + start o (C S)              S_next = whole S + B' (end o X)
// and backwards, given dY and the gradient G of S_next:
//     dX = (L o C B')' dY + end o (B G)             dS = whole G + C' (start o dY)
//     dW = dY X'   dCB = sum_h dW o L   dC = dCB B + start o (dY S')   dB = dCB' C + end o (X G')
//     d(log e_r) = sum over s < r <= t of (dW o L o CB)[t][s] + sum_{t >= r} <C_t, dC'_t> + sum_{s < r} <B_s, dB'_s>
//                  + whole <G, S>              with dC', dB' the second terms above, one head's share
//
// A task takes some heads of one group through all chunks in sequence, so that their states stay in cache; a state is
// kept as (n, p) with p padded to whole vectors, so that the lanes of every product run along the width of a head or
// along time.
// The cut into tasks decides the order in which dB and dC are summed up, nothing else.
#include "decays.h"
#include "gemm.h"
#include "parallel.h"

// split: parts that the heads of a group are cut into, one task each
enum { b_, l_, h_, p_, g_, n_, q_, split_, threads_, x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, SIZES };

typedef struct {
    const int64_t *z;
    const float *x, *dt, *e, *B, *C, *D;                   // dt and D may be NULL; e, dt (b l h), D (h p)
    float *states;                                         // (b c h n pp): before every chunk; NULL: not kept
    const float *first;                                    // (b h p n) or NULL
    float *y, *last;                                       // (b l h p), (b h p n)
    const float *dy, *dlast;                               // (b l h p); (b h p n) or NULL
    float *dx, *ddt, *da, *dB, *dC, *dD, *dfirst;          // dB, dC (split b l g n), dD (b h p): parts to be added;
                                                           // ddt, dD, dfirst may be NULL
    int64_t chunks, pp, qp, np, split;
} ssd_t;

typedef struct { int64_t b, g, part, h0, h1, c, t0, q; } place_t;  // heads h0 to h1 of one group, one chunk

static place_t heads(const ssd_t *s, int64_t i) {
    const int64_t each = s->z[h_] / s->z[g_];
    place_t at = {.part = i % s->split, .g = i / s->split % s->z[g_], .b = i / s->split / s->z[g_]};
    at.h0 = at.g * each + each * at.part / s->split;
    at.h1 = at.g * each + each * (at.part + 1) / s->split;
    return at;
}

static void go_to(const ssd_t *s, place_t *at, int64_t c) {
    at->c = c;
    at->t0 = c * s->z[q_];
    at->q = s->z[l_] - at->t0 < s->z[q_] ? s->z[l_] - at->t0 : s->z[q_];
}

static const float *B_at(const ssd_t *s, const place_t *at) {
    return s->B + at->b * s->z[B_b] + at->t0 * s->z[B_l] + at->g * s->z[B_g];
}
static const float *C_at(const ssd_t *s, const place_t *at) {
    return s->C + at->b * s->z[C_b] + at->t0 * s->z[C_l] + at->g * s->z[C_g];
}
static const float *x_at(const ssd_t *s, const place_t *at, int64_t h) {
    return s->x + at->b * s->z[x_b] + at->t0 * s->z[x_l] + h * s->z[x_h];
}
static int64_t step_at(const ssd_t *s, const place_t *at, int64_t h) {
    return (at->b * s->z[l_] + at->t0) * s->z[h_] + h;
}
static int64_t state_at(const ssd_t *s, int64_t b, int64_t c, int64_t h) {
    return ((b * s->chunks + c) * s->z[h_] + h) * s->z[n_] * s->pp;
}

// to[t][p] = from[t][p] * a[t * stride_a] * b[t], padded with zeros; a and b may be NULL
static void pack(const float *from, int64_t ld, int64_t q, int64_t p, int64_t pp, const float *a, int64_t stride_a,
                 const float *b, float *to) {
    for (int64_t t = 0; t < q; t++) {
        const float scale = (a ? a[t * stride_a] : 1.f) * (b ? b[t] : 1.f);
        for (int64_t i = 0; i < p; i++) to[t * pp + i] = from[t * ld + i] * scale;
        for (int64_t i = p; i < pp; i++) to[t * pp + i] = 0;
    }
}

static float *floats(size_t count) { return scratch(count * sizeof(float)); }

// ---------------------------------------------------------------- forward

// all states of the task, (h1 - h0, n, pp), from (b h p n) or zero
static float *load_states(const ssd_t *s, const place_t *at, const float *from) {
    const int64_t *z = s->z, size = z[n_] * s->pp;
    float *S = floats((at->h1 - at->h0) * size);
    for (int64_t h = at->h0; h < at->h1; h++) {
        float *to = S + (h - at->h0) * size;
        if (from) transpose(from + (at->b * z[h_] + h) * z[p_] * z[n_], z[n_], z[p_], z[n_], to, s->pp);
        else memset(to, 0, size * sizeof(float));
    }
    return S;
}

static void store_states(const ssd_t *s, const place_t *at, const float *S, float *to) {
    const int64_t *z = s->z, size = z[n_] * s->pp;
    for (int64_t h = at->h0; h < at->h1; h++)
        transpose(S + (h - at->h0) * size, s->pp, z[n_], z[p_], to + (at->b * z[h_] + h) * z[p_] * z[n_], z[n_]);
}

// to = whole S + sum_t A[:, t] (outer) X[t]; `to` may be S
static void carry(const ssd_t *s, const float *S, float whole, const float *A, int64_t lda, const float *X, int64_t q,
                  float *to) {
    gemm_t product = {A, 1, lda, X, s->pp, to, s->pp, NULL, whole == 0 ? NULL : S, whole};
    gemm(&product, s->z[n_], s->pp, q, GEMM_FULL);
}

static void forward_task(void *context, int64_t i) {
    const ssd_t *s = context;
    const int64_t *z = s->z, qp = s->qp, pp = s->pp, size = z[n_] * pp;
    place_t at = heads(s, i);
    float *states = load_states(s, &at, s->first);
    float *BT = floats(z[n_] * qp + 2 * z[q_] * qp + 2 * z[q_] * pp + 2 * z[q_]);
    float *CB = BT + z[n_] * qp, *W = CB + z[q_] * qp, *X = W + z[q_] * qp, *Y = X + z[q_] * pp;
    float *start = Y + z[q_] * pp, *end = start + z[q_];
    for (int64_t c = 0; c < s->chunks; c++) {
        go_to(s, &at, c);
        const int64_t q = at.q;
        transpose(B_at(s, &at), z[B_l], q, z[n_], BT, qp);
        gemm_t scores = {C_at(s, &at), z[C_l], 1, BT, qp, CB, qp, NULL, NULL, 0};
        gemm(&scores, q, qp, z[n_], GEMM_RESULT);
        for (int64_t h = at.h0; h < at.h1; h++) {
            const int64_t step = step_at(s, &at, h);
            const float *x = x_at(s, &at, h);
            float *S = states + (h - at.h0) * size;
            if (s->states) memcpy(s->states + state_at(s, at.b, c, h), S, size * sizeof(float));
            decays(s->e + step, z[h_], q, start, end);
            decay_matrix(s->e + step, z[h_], q, qp, W);
            for (int64_t t = 0; t < q; t++)
                for (int64_t r = 0; r < padded(t + 1); r++) W[t * qp + r] *= CB[t * qp + r];
            pack(x, z[x_l], q, z[p_], pp, s->dt ? s->dt + step : NULL, z[h_], NULL, X);
            gemm_t before = {C_at(s, &at), z[C_l], 1, S, pp, Y, pp, start, NULL, 0};
            gemm(&before, q, pp, z[n_], GEMM_FULL);
            gemm_t inside = {W, qp, 1, X, pp, Y, pp, NULL, Y, 1};
            gemm(&inside, q, pp, q, GEMM_LOWER);
            const float *D = s->D ? s->D + h * z[p_] : NULL;
            for (int64_t t = 0; t < q; t++) {
                float *y = s->y + (step + t * z[h_]) * z[p_];
                if (D) for (int64_t k = 0; k < z[p_]; k++) y[k] = Y[t * pp + k] + D[k] * x[t * z[x_l] + k];
                else memcpy(y, Y + t * pp, z[p_] * sizeof(float));
                for (int64_t k = 0; k < pp; k++) X[t * pp + k] *= end[t];
            }
            carry(s, S, start[q - 1], B_at(s, &at), z[B_l], X, q, S);
        }
    }
    store_states(s, &at, states, s->last);
    free(BT);
    free(states);
}

// ---------------------------------------------------------------- backward

typedef struct { float *BT, *CT, *CB, *L, *W, *dW, *dCB, *X, *XT, *dY, *dYT, *dX, *dBT, *dCT, *term, *Bn, *Cn, *sum,
                 *share, *line; } bench_t;

static float *bench(const ssd_t *s, bench_t *w) {
    const int64_t *z = s->z;
    const size_t nq = z[n_] * s->qp, qq = z[q_] * s->qp, qpp = z[q_] * s->pp, pq = s->pp * s->qp, qn = z[q_] * s->np;
    const size_t sizes[] = {nq, nq, qq, qq, qq, qq, qq, qpp, pq, qpp, pq, qpp, nq, nq, nq, qn, qn, qn, qn, 8 * s->qp};
    float **names[] = {&w->BT, &w->CT, &w->CB, &w->L, &w->W, &w->dW, &w->dCB, &w->X, &w->XT, &w->dY, &w->dYT, &w->dX,
                       &w->dBT, &w->dCT, &w->term, &w->Bn, &w->Cn, &w->sum, &w->share, &w->line};
    size_t total = 0;
    for (int i = 0; i < 20; i++) total += sizes[i];
    float *memory = floats(total), *next = memory;
    for (int i = 0; memory && i < 20; i++) { *names[i] = next; next += sizes[i]; }
    return memory;
}

// With term[:, t] *= scale[t]: into += term and sum[t] = <term[:, t], with[:, t]>, all (n, qp): a share of dB, dC
static void add_share(const float *term, const float *scale, const float *with, float *into, int64_t n, int64_t qp,
                      float *sum) {
    for (int64_t t = 0; t < qp; t += VL) {
        vf total = {0};
        for (int64_t k = 0; k < n; k++) {
            const vf x = v_load(term + k * qp + t) * v_load(scale + t);
            total += x * v_load(with + k * qp + t);
            v_store(into + k * qp + t, v_load(into + k * qp + t) + x);
        }
        v_store(sum + t, total);
    }
}

// One head in one chunk; G is the gradient of the state after the chunk, and of the one before it afterwards.
static void head_gradients(const ssd_t *s, const place_t *at, int64_t h, const bench_t *w, float *G, float *dD) {
    const int64_t *z = s->z;
    const int64_t q = at->q, qp = s->qp, pp = s->pp, p = z[p_], n = z[n_], step = step_at(s, at, h);
    float *start = w->line, *end = start + qp, *before = end + qp, *after = before + qp, *col = after + qp;
    const float *x = x_at(s, at, h), *dy = s->dy + step * p, *dt = s->dt ? s->dt + step : NULL;
    const float *S = s->states + state_at(s, at->b, at->c, h);
    memset(w->line, 0, 2 * qp * sizeof(float));
    decays(s->e + step, z[h_], q, start, end);
    decay_matrix(s->e + step, z[h_], q, qp, w->L);
    pack(x, z[x_l], q, p, pp, dt, z[h_], NULL, w->X);
    pack(dy, z[h_] * p, q, p, pp, NULL, 0, NULL, w->dY);
    transpose(w->X, pp, q, pp, w->XT, qp);
    transpose(w->dY, pp, q, pp, w->dYT, qp);

    gemm_t weights = {w->dY, pp, 1, w->XT, qp, w->dW, qp, NULL, NULL, 0};
    gemm(&weights, q, qp, pp, GEMM_RESULT);
    for (int64_t t = 0; t < q; t++)
        for (int64_t r = 0; r < padded(t + 1); r++) {
            const int64_t k = t * qp + r;
            w->W[k] = w->L[k] * w->CB[k];
            w->dCB[k] += w->L[k] * w->dW[k];
        }
    gemm_t through_state = {B_at(s, at), z[B_l], 1, G, pp, w->dX, pp, end, NULL, 0};
    gemm(&through_state, q, pp, n, GEMM_FULL);
    gemm_t inside = {w->W, 1, qp, w->dY, pp, w->dX, pp, NULL, w->dX, 1};
    gemm(&inside, q, pp, q, GEMM_UPPER);

    gemm_t to_C = {S, pp, 1, w->dYT, qp, w->term, qp, NULL, NULL, 0};
    gemm(&to_C, n, qp, p, GEMM_FULL);
    add_share(w->term, start, w->CT, w->dCT, n, qp, before);
    gemm_t to_B = {G, pp, 1, w->XT, qp, w->term, qp, NULL, NULL, 0};
    gemm(&to_B, n, qp, p, GEMM_FULL);
    add_share(w->term, end, w->BT, w->dBT, n, qp, after);

    float across = 0;
    if (start[q - 1] != 0) {
        vf sum = {0};
        for (int64_t k = 0; k < n * pp; k += VL) sum += *(const vfu *)(S + k) * *(const vfu *)(G + k);
        for (int k = 0; k < VL; k++) across += sum[k];
        across *= start[q - 1];
    }
    decay_gradient(s->e + step, z[h_], q, qp, w->W, w->dW, before, after, across, col, s->da + step);

    const float *D = s->D ? s->D + h * p : NULL;
    for (int64_t t = 0; t < q; t++) {
        const float *dX = w->dX + t * pp, *xt = x + t * z[x_l], *dyt = dy + t * z[h_] * p;
        float *dx = s->dx + (step + t * z[h_]) * p, scale = dt ? dt[t * z[h_]] : 1, sum = 0;
        for (int64_t k = 0; k < p; k++) dx[k] = scale * dX[k] + (D ? D[k] * dyt[k] : 0.f);
        if (s->ddt) {
            for (int64_t k = 0; k < p; k++) sum += dX[k] * xt[k];
            s->ddt[step + t * z[h_]] = sum;
        }
        if (dD) for (int64_t k = 0; k < p; k++) dD[k] += dyt[k] * xt[k];
        for (int64_t k = 0; k < pp; k++) w->dY[t * pp + k] *= start[t];
    }
    carry(s, G, start[q - 1], C_at(s, at), z[C_l], w->dY, q, G);
}

static void backward_task(void *context, int64_t i) {
    const ssd_t *s = context;
    const int64_t *z = s->z, qp = s->qp, np = s->np, n = z[n_], size = n * s->pp;
    place_t at = heads(s, i);
    float *G = load_states(s, &at, s->dlast), *dD = s->dD ? s->dD + at.b * z[h_] * z[p_] : NULL;
    if (dD) memset(dD + at.h0 * z[p_], 0, (at.h1 - at.h0) * z[p_] * sizeof(float));
    bench_t w;
    float *memory = bench(s, &w);
    memset(w.W, 0, (size_t)z[q_] * qp * sizeof(float));
    for (int64_t c = s->chunks - 1; c >= 0; c--) {
        go_to(s, &at, c);
        const int64_t q = at.q;
        transpose(B_at(s, &at), z[B_l], q, n, w.BT, qp);
        transpose(C_at(s, &at), z[C_l], q, n, w.CT, qp);
        gemm_t scores = {C_at(s, &at), z[C_l], 1, w.BT, qp, w.CB, qp, NULL, NULL, 0};
        gemm(&scores, q, qp, n, GEMM_RESULT);
        memset(w.dCB, 0, (size_t)z[q_] * qp * sizeof(float));
        memset(w.dBT, 0, (size_t)n * qp * sizeof(float));
        memset(w.dCT, 0, (size_t)n * qp * sizeof(float));
        for (int64_t h = at.h0; h < at.h1; h++)
            head_gradients(s, &at, h, &w, G + (h - at.h0) * size, dD ? dD + h * z[p_] : NULL);

        pack(B_at(s, &at), z[B_l], q, n, np, NULL, 0, NULL, w.Bn);
        pack(C_at(s, &at), z[C_l], q, n, np, NULL, 0, NULL, w.Cn);
        const int64_t out = (((at.part * z[b_] + at.b) * z[l_] + at.t0) * z[g_] + at.g) * n, ld = z[g_] * n;
        for (int which = 0; which < 2; which++) {  // dC = dCB B + shares, dB = dCB' C + shares
            gemm_t product = {w.dCB, which ? 1 : qp, which ? qp : 1, which ? w.Cn : w.Bn, np, w.sum, np, NULL, NULL, 0};
            gemm(&product, q, np, q, which ? GEMM_UPPER : GEMM_LOWER);
            transpose(which ? w.dBT : w.dCT, qp, n, q, w.share, np);
            float *to = (which ? s->dB : s->dC) + out;
            for (int64_t t = 0; t < q; t++)
                for (int64_t k = 0; k < n; k++) to[t * ld + k] = w.sum[t * np + k] + w.share[t * np + k];
        }
    }
    if (s->dfirst) store_states(s, &at, G, s->dfirst);
    free(memory);
    free(G);
}

// ---------------------------------------------------------------- entry points

static void prepare(ssd_t *s) {
    const int64_t *z = s->z;
    s->chunks = (z[l_] + z[q_] - 1) / z[q_];
    s->pp = padded(z[p_]);
    s->qp = padded(z[q_]);
    s->np = padded(z[n_]);
    s->split = z[split_];
}

// arguments: the sizes, then the pointers x dt e B C D first | states y last
void ssmzoo_ssd_forward(const int64_t *sizes) {
    void *const *p = (void *const *)(sizes + SIZES);
    ssd_t s = {.z = sizes, .x = p[0], .dt = p[1], .e = p[2], .B = p[3], .C = p[4], .D = p[5], .first = p[6],
               .states = p[7], .y = p[8], .last = p[9]};
    prepare(&s);
    parallel_for(sizes[b_] * sizes[g_] * s.split, sizes[threads_], forward_task, &s);
}

// arguments: the sizes, then the pointers x dt e B C D states dy dlast | dx ddt da dB dC dD dfirst
void ssmzoo_ssd_backward(const int64_t *sizes) {
    void *const *p = (void *const *)(sizes + SIZES);
    ssd_t s = {.z = sizes, .x = p[0], .dt = p[1], .e = p[2], .B = p[3], .C = p[4], .D = p[5], .states = p[6],
               .dy = p[7], .dlast = p[8], .dx = p[9], .ddt = p[10], .da = p[11], .dB = p[12], .dC = p[13], .dD = p[14],
               .dfirst = p[15]};
    prepare(&s);
    parallel_for(sizes[b_] * sizes[g_] * s.split, sizes[threads_], backward_task, &s);
}
