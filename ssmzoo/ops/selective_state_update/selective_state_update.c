// One step of the selective scan, in place on the state: h <- exp(dt A) h + dt x B,  y = (<h, C> + D x) silu(z).
//
// Lanes run over the n states of a channel, which lie next to each other; VL channels are finished together. Channels are
// (outer, inner): (1, e) for Mamba-1, (heads, head width) for Mamba-2. `index` says which row of the state a sequence has,
// negative: none, y = 0.
#include "parallel.h"
#include "tensor.h"

typedef struct {
    // state (rows o i n), x dt z out (b o i), A (o i n), B C (b g n), D bias (o i), index (b)
    tensor state, x, dt, A, B, C, D, z, bias, out, index;
    int64_t b, outer, inner, n, g, plain, softplus, threads;  // plain: Mamba-1, tensors come without the outer axis
} update_args;

enum { BLOCK = 4 * VL };  // channels per task

INLINE void load_channels(float *to, const tensor *t, const char *from, int64_t stride, int lanes) {
    if (!t->data) memset(to, 0, sizeof(float) * VL);
    else load_tile(to, VL, from, t->dtype, stride, 0, lanes, 1);
}

static void channels(const update_args *a, int64_t b, int64_t o, int64_t i, int lanes) {
    float x[VL], dt[VL], z[VL], skip[VL], bias[VL], y[VL] = {0}, rate[VL], input[VL];
    int64_t row = a->index.data ? get_index(&a->index, b * a->index.stride[0]) : b;
    if (row < 0) {
        store_tile(y, VL, at(&a->out, b, o, i), a->out.dtype, a->out.stride[2], 0, lanes, 1);
        return;
    }
    load_channels(x, &a->x, at(&a->x, b, o, i), a->x.stride[2], lanes);
    load_channels(dt, &a->dt, at(&a->dt, b, o, i), a->dt.stride[2], lanes);
    load_channels(z, &a->z, at(&a->z, b, o, i), a->z.stride[2], lanes);
    load_channels(skip, &a->D, at(&a->D, o, i, 0), a->D.stride[1], lanes);
    load_channels(bias, &a->bias, at(&a->bias, o, i, 0), a->bias.stride[1], lanes);
    vf step = v_load(dt) + v_load(bias), now = v_load(x);
    if (a->softplus) step = v_softplus(step);
    v_store(rate, step * LOG2E);
    v_store(input, step * now);
    vf sums[VL];
    int64_t group_of = (a->plain ? a->inner : a->outer) / a->g;
    for (int k = 0; k < VL; k++) {
        sums[k] = (vf){0};
        if (k >= lanes) continue;
        int64_t group = (a->plain ? i + k : o) / group_of, once = a->A.stride[2] == 0;
        float *h = (float *)at(&a->state, row, o, i + k);
        const float *A = (const float *)at(&a->A, o, i + k, 0), *B = (const float *)at(&a->B, b, group, 0);
        const float *C = (const float *)at(&a->C, b, group, 0);
        vf decay = {0}, in = v_set(input[k]);
        if (once) decay = v_exp2(v_set(rate[k] * A[0]));
        for (int64_t j = 0; j < a->n; j += VL) {
            int64_t count = a->n - j;
            if (!once) decay = v_exp2(rate[k] * v_load_some(A + j, count));
            vf next = decay * v_load_some(h + j, count) + in * v_load_some(B + j, count);
            v_store_some(h + j, next, count);
            sums[k] += next * v_load_some(C + j, count);
        }
    }
    v_transpose(sums);
    vf sum = v_load(skip) * now;
    for (int k = 0; k < VL; k++) sum += sums[k];
    if (a->z.data) sum *= v_load(z) * v_sigmoid(v_load(z));
    v_store(y, sum);
    store_tile(y, VL, at(&a->out, b, o, i), a->out.dtype, a->out.stride[2], 0, lanes, 1);
}

static void task(void *context, int64_t index) {
    const update_args *a = context;
    int64_t blocks = (a->inner + BLOCK - 1) / BLOCK, first = index % blocks * BLOCK;
    int64_t o = index / blocks % a->outer, b = index / blocks / a->outer;
    for (int64_t i = first; i < first + BLOCK && i < a->inner; i += VL)
        channels(a, b, o, i, (int)(a->inner - i < VL ? a->inner - i : VL));
}

static void add_axis(tensor *t, int axis) {  // an axis of length 1
    memmove(t->stride + axis + 1, t->stride + axis, sizeof(int64_t) * (size_t)(3 - axis));
    t->stride[axis] = 0;
}

void ssmzoo_selective_state_step(const update_args *given) {
    update_args a = *given;
    if (a.plain) {
        tensor *with_batch[] = {&a.state, &a.x, &a.dt, &a.z, &a.out}, *without[] = {&a.A, &a.D, &a.bias};
        for (int i = 0; i < 5; i++) add_axis(with_batch[i], 1);
        for (int i = 0; i < 3; i++) add_axis(without[i], 0);
    }
    int64_t tasks = a.b * a.outer * ((a.inner + BLOCK - 1) / BLOCK);
    int64_t worth = a.b * a.outer * a.inner * a.n / 32768;  // threads that such a small job can occupy
    parallel_for(tasks, worth < a.threads ? worth : a.threads, task, &a);
}
