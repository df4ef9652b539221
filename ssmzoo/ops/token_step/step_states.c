// One token more for recurrences whose state has a constant size.
#include "../mamba3_step/mamba3_step.h"
#include "program.h"

enum { HEADS, WIDTH, SIZE, X_STRIDE, B_STRIDE, C_STRIDE, DECAY, TURNED };  // n of SSD
enum { CONSTANT, NEGATIVE_EXP, RAW };                                      // its decays

// S' = decay S + dt x B^T, y = S' C of one head.
static void ssd(void *context, int64_t index) {
    const runner *r = context;
    const instruction *i = r->i;
    const int64_t h = i->n[HEADS], p = i->n[WIDTH], n = i->n[SIZE], row = index / h, head = index % h;
    float *B = at(r, &i->b, row) + head * i->n[B_STRIDE], *C = at(r, &i->c, row) + head * i->n[C_STRIDE];
    const float *x = at(r, &i->a, row) + head * i->n[X_STRIDE];
    float dt = 1, decay;
    if (i->d.size) {
        float step[VL] = {at(r, &i->d, row)[head]};
        softplus(step, VL);
        dt = step[0];
    }
    if (i->n[TURNED]) {
        const float position = (float)((const int64_t *)slot(r, 1)->before)[row];
        turn(B, position, i->w[1], i->n[TURNED]);
        turn(C, position, i->w[1], i->n[TURNED]);
    }
    if (i->n[DECAY] == NEGATIVE_EXP) decay = expf(-dt * expf(i->w[0][head]));
    else decay = expf(i->n[DECAY] == RAW ? dt * i->w[0][head] : -dt * i->w[0][head]);
    const float *S = (const float *)slot(r, 0)->before + index * p * n;
    float *S_new = (float *)slot(r, 0)->after + index * p * n, *y = at(r, &i->out, row) + head * p;
    for (int64_t c = 0; c < p; c++, S += n, S_new += n) {
        const float dtx = dt * x[c];
        vf sum = {0};
        for (int64_t j = 0; j < n; j += VL) {
            const int64_t left = n - j;
            const vf s = decay * v_load_some(S + j, left) + dtx * v_load_some(B + j, left);
            v_store_some(S_new + j, s, left);
            sum += s * v_load_some(C + j, left);
        }
        y[c] = v_sum(sum);
    }
}

void run_ssd(runner *r) {
    crew_for(r->t, r->b * r->i->n[HEADS], ssd, r);
    for (int64_t row = 0; r->i->n[TURNED] && row < r->b; row++)
        ((int64_t *)slot(r, 1)->after)[row] = ((const int64_t *)slot(r, 1)->before)[row] + 1;
}

static void to_length(float *to, const float *x, int64_t size, double factor) {
    double sum = 0;
    for (int64_t i = 0; i < size; i++) sum += (double)x[i] * x[i];
    const float scale = (float)(factor / sqrt(sum + 1e-6));
    for (int64_t i = 0; i < size; i++) to[i] = x[i] * scale;
}

// The gated delta rule of one head: n are heads of q and k, of v, widths of a key and a value, whether decays are per channel.
static void delta(void *context, int64_t index) {
    const runner *r = context;
    const instruction *i = r->i;
    const int64_t heads = i->n[0], h = i->n[1], n = i->n[2], p = i->n[3], row = index / h, head = index % h;
    const int64_t key = head / (h / heads);
    const float *qkv = at(r, &i->a, row), *v = qkv + 2 * heads * n + head * p, *gate = at(r, &i->c, row);
    float q[n], k[n], decay[n];
    const float beta = (float)i->f[0] / (1 + expf(-at(r, &i->b, row)[head])), rate = -expf(i->w[0][head]);
    const int64_t decays = i->n[4] ? n : 1, first = head * decays;
    to_length(q, qkv + key * n, n, 1 / sqrt((double)n));
    to_length(k, qkv + (heads + key) * n, n, 1);
    for (int64_t j = 0; j < decays; j++) decay[j] = gate[first + j] + i->w[1][first + j];
    softplus(decay, decays);
    for (int64_t j = 0; j < decays; j++) decay[j] = expf(rate * decay[j]);
    const float *old = (const float *)slot(r, 0)->before + index * n * p;
    float *S = (float *)slot(r, 0)->after + index * n * p, *y = at(r, &i->out, row) + head * p;
    for (int64_t j = 0; j < p; j += VL) {  // columns do not meet: sums stay in registers
        const int64_t left = p - j;
        vf read = {0}, out = {0};
        for (int64_t c = 0; c < n; c++) {
            const vf s = decay[i->n[4] ? c : 0] * v_load_some(old + c * p + j, left);
            v_store_some(S + c * p + j, s, left);
            read += k[c] * s;
        }
        const vf change = beta * (v_load_some(v + j, left) - read);
        for (int64_t c = 0; c < n; c++) {
            const vf s = v_load_some(S + c * p + j, left) + k[c] * change;
            v_store_some(S + c * p + j, s, left);
            out += q[c] * s;
        }
        v_store_some(y + j, out, left);
    }
}

void run_delta(runner *r) { crew_for(r->t, r->b * r->i->n[1], delta, r); }

// h' = a h + b of the first m channels, whose state goes on; the others are their input.
void run_recur(runner *r) {
    const instruction *i = r->i;
    const int64_t m = i->n[0];
    for (int64_t row = 0; row < r->b; row++) {
        const float *a = at(r, &i->a, row), *u = at(r, &i->b, row), *h = (const float *)slot(r, 0)->before + row * m;
        float *out = at(r, &i->out, row), *after = (float *)slot(r, 0)->after + row * m;
        for (int64_t j = 0; j < m; j++) out[j] = after[j] = a[j] * h[j] + u[j];
        for (int64_t j = m; j < i->out.size; j++) out[j] = u[j];
    }
}

// The same with the decays and inputs of the real-gated linear recurrent unit, from r and i (before their sigmoids) and u.
void run_rglru(runner *r) {
    const instruction *i = r->i;
    const int64_t m = i->n[0], size = i->out.size;
    for (int64_t row = 0; row < r->b; row++) {
        const float *h = (const float *)slot(r, 0)->before + row * m, *gate = at(r, &i->a, row), *in = at(r, &i->b, row);
        const float *u = at(r, &i->c, row);
        float *out = at(r, &i->out, row), *after = (float *)slot(r, 0)->after + row * m;
        const int begun = ((const char *)slot(r, 1)->before)[row] != 0;
        ((char *)slot(r, 1)->after)[row] = 1;
        for (int64_t j = 0; j < size; j += VL) {
            const int64_t left = size - j;
            const vf log_a = (float)-i->f[0] * v_softplus(v_load_some(i->w[0] + j, left)) * v_sigmoid(v_load_some(gate + j, left));
            vf x = v_sigmoid(v_load_some(in + j, left)) * v_load_some(u + j, left);
            if (begun) {
                vf scale;
                for (int q = 0; q < VL; q++) scale[q] = sqrtf(-expm1f(2 * log_a[q]));
                x *= scale;
            }
            float now[VL], decay[VL];
            v_store(now, x), v_store(decay, v_exp(log_a));
            for (int64_t q = 0; q < VL && q < left; q++)
                if (j + q < m) out[j + q] = after[j + q] = decay[q] * h[j + q] + now[q];
                else out[j + q] = now[q];
        }
    }
}

// Hydra's recurrence: out = C s, s' = exp(-softplus(delta) softplus(lambda)) s + B U with [delta, B, C, U] = a.
void run_element(runner *r) {
    const instruction *i = r->i;
    const int64_t d = i->out.size;
    for (int64_t row = 0; row < r->b; row++) {
        const float *delta_ = at(r, &i->a, row), *B = delta_ + d, *C = B + d, *U = C + d;
        const float *s = (const float *)slot(r, 0)->before + row * d;
        float *after = (float *)slot(r, 0)->after + row * d, *out = at(r, &i->out, row);
        for (int64_t j = 0; j < d; j += VL) {
            const int64_t left = d - j;
            const vf old = v_load_some(s + j, left), rate = v_softplus(v_load_some(i->w[0] + j, left));
            const vf decay = v_exp(-v_softplus(v_load_some(delta_ + j, left)) * rate);
            v_store_some(out + j, v_load_some(C + j, left) * old, left);
            v_store_some(after + j, decay * old + v_load_some(B + j, left) * v_load_some(U + j, left), left);
        }
    }
}

// Mamba-3 between its projections; n: heads, channels, state, angles, groups; the third and fourth states: last key and value.
static step3_args mamba3_args(const instruction *i) {
    return (step3_args){.dt_bias = i->w[0], .B_norm = i->w[1], .C_norm = i->w[2], .B_bias = i->w[3], .C_bias = i->w[4], .D = i->w[5],
                        .norm_weight = i->w[6], .h = i->n[0], .p = i->n[1], .n = i->n[2], .m = i->n[3], .g = i->n[4],
                        .A_floor = i->f[0], .B_eps = i->f[1], .C_eps = i->f[2], .eps = i->f[3]};
}

size_t mamba3_room(const instruction *i) {
    const step3_args a = mamba3_args(i);
    return mamba3_memory(&a);
}

void run_mamba3(runner *r) {
    step3_args a = mamba3_args(r->i);
    a.phase = slot(r, 0)->before, a.ssm_state = slot(r, 1)->before, a.last_k = slot(r, 2)->before, a.last_x = slot(r, 3)->before;
    a.phase_new = slot(r, 0)->after, a.ssm_new = slot(r, 1)->after, a.k_new = slot(r, 2)->after, a.x_new = slot(r, 3)->after;
    for (int64_t row = 0; row < r->b; row++) mamba3_core(&a, row, at(r, &r->i->a, row), at(r, &r->i->out, row), r->room, r->t);
}
