// The gated delta rule step by step, S (n p) in the first-level cache: S = e S; w = v - S'k; S += k (beta w)'; y = S'q.
//
// Columns of S are independent, so a task runs through a sequence one tile of columns after the other and keeps sums
// over rows in registers. The state is kept at every chunk boundary; the backward pass runs each chunk again, keeps its
// states, and walks back:
//     G += q dy'   dq = S dy   dk = G u   du = G'k   G -= k (beta du)'   dk -= Sd (beta du)   dg = rows of Sd o G
//     G = e G      dv = beta du   dbeta = du'w              with Sd = e S_before and u = beta w
// A reset is e = 0.
#include "gemm.h"
#include "parallel.h"

enum { b_, l_, h_, n_, p_, q_, threads_, channels_, q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, SIZES };

typedef struct {
    const int64_t *z;
    const float *q, *k, *v, *e, *beta;  // e (b l h) or, with channels_, (b l h n); beta (b l h)
    const float *first;                 // (b h n p) or NULL
    float *states;                      // (b c h n pp) before every chunk, or NULL
    float *y, *last;                    // (b l h p), (b h n p)
    const float *dy, *dlast;            // (b l h p); (b h n p) or NULL
    float *dq, *dk, *dv, *dg, *dbeta, *dfirst;
    int64_t chunks, pp, np;
} rule_t;

#define FORWARD_TILE 4
#define BACKWARD_TILE 2

static int64_t step_at(const rule_t *r, int64_t b, int64_t t, int64_t h) { return (b * r->z[l_] + t) * r->z[h_] + h; }
static const float *q_at(const rule_t *r, int64_t b, int64_t t, int64_t h) {
    return r->q + b * r->z[q_b] + t * r->z[q_l] + h * r->z[q_h];
}
static const float *k_at(const rule_t *r, int64_t b, int64_t t, int64_t h) {
    return r->k + b * r->z[k_b] + t * r->z[k_l] + h * r->z[k_h];
}
static const float *v_at(const rule_t *r, int64_t b, int64_t t, int64_t h) {
    return r->v + b * r->z[v_b] + t * r->z[v_l] + h * r->z[v_h];
}
static float *state_at(const rule_t *r, int64_t b, int64_t c, int64_t h) {
    return r->states + ((b * r->chunks + c) * r->z[h_] + h) * r->z[n_] * r->pp;
}

// decays of one step: a pointer to n numbers, `line` filled when there is one per head
static const float *decays_at(const rule_t *r, int64_t step, float *line) {
    const int64_t n = r->z[n_];
    if (r->z[channels_]) return r->e + step * n;
    for (int64_t i = 0; i < n; i++) line[i] = r->e[step];
    return line;
}

// One step on `vecs` vectors of columns: from -> to (may be the same), rows ld apart. w = v - (e from)'k; y = to'q.
INLINE void step(const int vecs, int64_t n, const float *from, float *to, int64_t ld, const float *e, const float *k,
                 const float *q, const vf *v, float beta, vf *w, vf *y) {
    vf sum[FORWARD_TILE];
    for (int j = 0; j < vecs; j++) sum[j] = (vf){0};
    for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vecs; j++) {
            const vf s = e[i] * v_load(from + i * ld + j * VL);
            v_store(to + i * ld + j * VL, s);
            sum[j] += k[i] * s;
        }
    vf u[FORWARD_TILE];
    for (int j = 0; j < vecs; j++) {
        w[j] = v[j] - sum[j];
        u[j] = beta * w[j];
        y[j] = (vf){0};
    }
    for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vecs; j++) {
            const vf s = v_load(to + i * ld + j * VL) + k[i] * u[j];
            v_store(to + i * ld + j * VL, s);
            if (q) y[j] += q[i] * s;
        }
}

INLINE void columns(const int vecs, const float *from, int64_t count, vf *to) {
    for (int j = 0; j < vecs; j++) to[j] = count > j * VL ? v_load_some(from + j * VL, count - j * VL) : (vf){0};
}
INLINE void put_columns(const int vecs, float *to, int64_t count, const vf *from) {
    for (int j = 0; j < vecs; j++)
        if (count > j * VL) v_store_some(to + j * VL, from[j], count - j * VL);
}

// (n p) -> (n pp) padded with zeros, and back; NULL stands for zeros
static void unpack(const float *from, int64_t n, int64_t p, int64_t pp, float *to) {
    for (int64_t i = 0; i < n; i++) {
        if (from) memcpy(to + i * pp, from + i * p, p * sizeof(float));
        const int64_t done = from ? p : 0;
        memset(to + i * pp + done, 0, (pp - done) * sizeof(float));
    }
}
static void pack(const float *from, int64_t n, int64_t p, int64_t pp, float *to) {
    for (int64_t i = 0; i < n; i++) memcpy(to + i * p, from + i * pp, p * sizeof(float));
}

// ---------------------------------------------------------------- forward

INLINE void forward_tile(const int vecs, const rule_t *r, int64_t b, int64_t h, int64_t col, float *S, float *line) {
    const int64_t *z = r->z, n = z[n_], p = z[p_], left = p - col;
    for (int64_t t = 0; t < z[l_]; t++) {
        if (r->states && t % z[q_] == 0) {
            float *keep = state_at(r, b, t / z[q_], h) + col;
            for (int64_t i = 0; i < n; i++) memcpy(keep + i * r->pp, S + i * r->pp + col, vecs * VL * sizeof(float));
        }
        const int64_t at = step_at(r, b, t, h);
        vf v[FORWARD_TILE], w[FORWARD_TILE], y[FORWARD_TILE];
        columns(vecs, v_at(r, b, t, h) + col, left, v);
        const float *e = decays_at(r, at, line);
        step(vecs, n, S + col, S + col, r->pp, e, k_at(r, b, t, h), q_at(r, b, t, h), v, r->beta[at], w, y);
        put_columns(vecs, r->y + at * p + col, left, y);
    }
}

static void forward_task(void *context, int64_t i) {
    const rule_t *r = context;
    const int64_t *z = r->z, b = i / z[h_], h = i % z[h_], size = z[n_] * r->pp;
    float *S = scratch((size + z[n_]) * sizeof(float)), *line = S + size;
    unpack(r->first ? r->first + i * z[n_] * z[p_] : NULL, z[n_], z[p_], r->pp, S);
    int64_t col = 0;
    for (; col + 4 * VL <= r->pp; col += 4 * VL) forward_tile(4, r, b, h, col, S, line);
    for (; col + 2 * VL <= r->pp; col += 2 * VL) forward_tile(2, r, b, h, col, S, line);
    if (col < r->pp) forward_tile(1, r, b, h, col, S, line);
    pack(S, z[n_], z[p_], r->pp, r->last + i * z[n_] * z[p_]);
    free(S);
}

// ---------------------------------------------------------------- backward

// partial sums of the rows' products, VL lanes each, and the states and errors of a chunk's steps
typedef struct { float *line, *history, *w, *rows_q, *rows_k, *rows_g, *sums; } bench_t;

// to[i] (+)= sum of the lanes of row i
static void row_sums(const float *rows, int64_t n, float *sums, float *to, int add) {
    for (int64_t i = 0; i < n; i += VL) {
        vf x[VL], sum = {0};
        for (int j = 0; j < VL; j++) x[j] = v_load(rows + (i + j) * VL);
        v_transpose(x);
        for (int j = 0; j < VL; j++) sum += x[j];
        v_store(sums + i, sum);
    }
    for (int64_t i = 0; i < n; i++) to[i] = add ? to[i] + sums[i] : sums[i];
}

INLINE void backward_tile(const int vecs, const rule_t *r, int64_t b, int64_t h, int64_t c, int64_t col, float *G,
                          const bench_t *m) {
    const int64_t *z = r->z, n = z[n_], p = z[p_], left = p - col, t0 = c * z[q_], ld = BACKWARD_TILE * VL;
    const int64_t q = z[l_] - t0 < z[q_] ? z[l_] - t0 : z[q_], size = n * ld;
    const float *S = state_at(r, b, c, h) + col;
    for (int64_t i = 0; i < n; i++) memcpy(m->history + i * ld, S + i * r->pp, vecs * VL * sizeof(float));
    for (int64_t t = 0; t < q; t++) {  // history[t + 1] holds the state after step t
        const int64_t at = step_at(r, b, t0 + t, h);
        vf v[BACKWARD_TILE], w[BACKWARD_TILE], y[BACKWARD_TILE];
        columns(vecs, v_at(r, b, t0 + t, h) + col, left, v);
        const float *e = decays_at(r, at, m->line);
        step(vecs, n, m->history + t * size, m->history + (t + 1) * size, ld, e, k_at(r, b, t0 + t, h), NULL, v,
             r->beta[at], w, y);
        for (int j = 0; j < vecs; j++) v_store(m->w + t * ld + j * VL, w[j]);
    }
    for (int64_t t = q - 1; t >= 0; t--) {
        const int64_t at = step_at(r, b, t0 + t, h);
        const float *e = decays_at(r, at, m->line), *k = k_at(r, b, t0 + t, h), *query = q_at(r, b, t0 + t, h);
        const float *before = m->history + t * size, *after = before + size, beta = r->beta[at];
        vf dy[BACKWARD_TILE], w[BACKWARD_TILE], u[BACKWARD_TILE], du[BACKWARD_TILE], dv[BACKWARD_TILE], dot = {0};
        columns(vecs, r->dy + at * p + col, left, dy);
        for (int j = 0; j < vecs; j++) {
            w[j] = v_load(m->w + t * ld + j * VL);
            u[j] = beta * w[j];
            du[j] = (vf){0};
        }
        for (int64_t i = 0; i < n; i++) {
            vf row_q = {0}, row_k = {0};
#pragma GCC unroll 2
            for (int j = 0; j < vecs; j++) {
                float *to = G + i * r->pp + col + j * VL;
                const vf g = v_load(to) + query[i] * dy[j];
                v_store(to, g);
                row_q += v_load(after + i * ld + j * VL) * dy[j];
                row_k += g * u[j];
                du[j] += k[i] * g;
            }
            v_store(m->rows_q + i * VL, row_q);
            v_store(m->rows_k + i * VL, row_k);
        }
        for (int j = 0; j < vecs; j++) {
            dv[j] = beta * du[j];
            dot += du[j] * w[j];
        }
        for (int64_t i = 0; i < n; i++) {
            vf row_k = v_load(m->rows_k + i * VL), row_g = {0};
#pragma GCC unroll 2
            for (int j = 0; j < vecs; j++) {
                float *to = G + i * r->pp + col + j * VL;
                const vf g = v_load(to) - k[i] * dv[j], decayed = e[i] * v_load(before + i * ld + j * VL);
                row_k -= decayed * dv[j];
                row_g += decayed * g;
                v_store(to, e[i] * g);
            }
            v_store(m->rows_k + i * VL, row_k);
            v_store(m->rows_g + i * VL, row_g);
        }
        put_columns(vecs, r->dv + at * p + col, left, dv);
        row_sums(m->rows_q, n, m->sums, r->dq + at * n, col > 0);
        row_sums(m->rows_k, n, m->sums, r->dk + at * n, col > 0);
        const float db = v_sum(dot);
        r->dbeta[at] = col > 0 ? r->dbeta[at] + db : db;
        if (z[channels_]) row_sums(m->rows_g, n, m->sums, r->dg + at * n, col > 0);
        else {
            vf sum = {0};
            for (int64_t i = 0; i < n; i++) sum += v_load(m->rows_g + i * VL);
            const float dg = v_sum(sum);
            r->dg[at] = col > 0 ? r->dg[at] + dg : dg;
        }
    }
}

static void backward_task(void *context, int64_t i) {
    const rule_t *r = context;
    const int64_t *z = r->z, b = i / z[h_], h = i % z[h_], n = z[n_], ld = BACKWARD_TILE * VL;
    const int64_t sizes[] = {n * r->pp, padded(n), (z[q_] + 1) * n * ld, z[q_] * ld, r->np * VL, r->np * VL,
                             r->np * VL, r->np};
    float *part[8];
    int64_t total = 0;
    for (int j = 0; j < 8; j++) total += padded(sizes[j]);
    float *memory = scratch(total * sizeof(float)), *next = memory;
    for (int j = 0; j < 8; j++, next += padded(sizes[j - 1])) part[j] = next;
    float *G = part[0];
    const bench_t m = {part[1], part[2], part[3], part[4], part[5], part[6], part[7]};
    memset(m.rows_q, 0, 3 * padded(r->np * VL) * sizeof(float));  // rows behind n
    unpack(r->dlast ? r->dlast + i * n * z[p_] : NULL, n, z[p_], r->pp, G);
    for (int64_t c = r->chunks - 1; c >= 0; c--) {
        int64_t col = 0;
        for (; col + 2 * VL <= r->pp; col += 2 * VL) backward_tile(2, r, b, h, c, col, G, &m);
        if (col < r->pp) backward_tile(1, r, b, h, c, col, G, &m);
    }
    if (r->dfirst) pack(G, n, z[p_], r->pp, r->dfirst + i * n * z[p_]);
    free(memory);
}

// ---------------------------------------------------------------- entry points

static void prepare(rule_t *r) {
    r->chunks = (r->z[l_] + r->z[q_] - 1) / r->z[q_];
    r->pp = padded(r->z[p_]);
    r->np = padded(r->z[n_]);
}

// arguments: the sizes, then the pointers q k v e beta first | states y last
void ssmzoo_gated_delta_rule_forward(const int64_t *sizes) {
    void *const *a = (void *const *)(sizes + SIZES);
    rule_t r = {.z = sizes, .q = a[0], .k = a[1], .v = a[2], .e = a[3], .beta = a[4], .first = a[5], .states = a[6],
                .y = a[7], .last = a[8]};
    prepare(&r);
    parallel_for(sizes[b_] * sizes[h_], sizes[threads_], forward_task, &r);
}

// arguments: the sizes, then the pointers q k v e beta states dy dlast | dq dk dv dg dbeta dfirst
void ssmzoo_gated_delta_rule_backward(const int64_t *sizes) {
    void *const *a = (void *const *)(sizes + SIZES);
    rule_t r = {.z = sizes, .q = a[0], .k = a[1], .v = a[2], .e = a[3], .beta = a[4], .states = a[5], .dy = a[6],
                .dlast = a[7], .dq = a[8], .dk = a[9], .dv = a[10], .dg = a[11], .dbeta = a[12], .dfirst = a[13]};
    prepare(&r);
    parallel_for(sizes[b_] * sizes[h_], sizes[threads_], backward_task, &r);
}
