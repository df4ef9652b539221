// A token's way through a stack of layers as a list of instructions over vectors: see ssmzoo/ops/token_step/__init__.py.
#pragma once
#include "../mamba2_step/mamba2_step.h"

enum { LINEAR, NORM, MIX, CONV, MAMBA, MAMBA2, ATTEND, TAYLOR, SSD, DELTA, RECUR, RGLRU, ELEMENT, MOE, KEYS, CHUNK, WORKSPACE, MAMBA3, HADAMARD, EMBED };
enum { NONE, RELU, SILU, SIGMOID, GELU, GELU_TANH };  // activations

typedef struct {
    int64_t base, inner, ld, size;  // floats: where its block begins for one sequence, within the block; of a sequence; in use
} reg;

typedef struct {  // the state after the token may lie over the one before: no kernel reads what it has overwritten
    const void *before;
    void *after;
    int64_t length, kept;  // entries along the sequence, before and after
    int64_t ld, ld_after;  // entries from one sequence to the next
} state_slot;

typedef struct {  // a state that grows, where it stays in one place from token to token
    int64_t slot;
    char *data;                     // (b capacity bytes)
    int64_t capacity, most, bytes;  // entries; most that are kept (0: all); of an entry
} grown_state;

typedef struct {  // as ssmzoo/ops/token_step/c.py packs it
    int64_t kind;
    reg out, a, b, c, d;
    matrix m;
    const float *w[8];
    int64_t n[10];
    double f[4];
    int64_t s[4];
    const void *layer;  // of MAMBA and MAMBA2; of MOE: the matrices of all experts, or NULL
} instruction;

typedef struct {
    const instruction *code;
    state_slot *state;
    const float *x;  // (b d); NULL where the program begins with EMBED
    float *out;      // (b d), or what a LINEAR with n[2] makes
    float *metrics;  // of the experts; NULL: nobody asks
    int64_t b, d, count, floats, threads;  // floats: of all registers, for one sequence
    const int64_t *ids;                    // (b)
    const grown_state *grown;
    int64_t grown_count, refused;  // refused: whether an id has no row; then nothing is done
} program_args;

typedef struct {
    const program_args *a;
    const instruction *i;
    float *registers, *room;  // room: for one instruction
    char *integers;           // vectors made ready for matrices of few bits
    vectors v;
    int64_t b, rows;
    crew *t;
} runner;

INLINE float *at(const runner *r, const reg *g, int64_t row) { return r->registers + r->b * g->base + row * g->ld + g->inner; }
INLINE const state_slot *slot(const runner *r, int i) { return r->a->state + r->i->s[i]; }
void activate(float *x, int64_t size, int act);
// Neighbouring halves of the first `width` channels turned by position * frequency.
void turn(float *x, float position, const float *frequency, int64_t width);
INLINE float dot(const float *x, const float *y, int64_t size) {
    vf sum = {0};
    for (int64_t i = 0; i < size; i += VL) sum += v_load_some(x + i, size - i) * v_load_some(y + i, size - i);
    return v_sum(sum);
}
INLINE void axpy(float *y, float factor, const float *x, int64_t size) {
    for (int64_t i = 0; i < size; i += VL) v_store_some(y + i, v_load_some(y + i, size - i) + factor * v_load_some(x + i, size - i), size - i);
}
INLINE void softmax(float *x, int64_t size) {
    float most = x[0], sum = 0;
    for (int64_t i = 1; i < size; i++) most = x[i] > most ? x[i] : most;
    for (int64_t i = 0; i < size; i += VL) v_store_some(x + i, v_exp(v_load_some(x + i, size - i) - most), size - i);
    for (int64_t i = 0; i < size; i++) sum += x[i];
    for (int64_t i = 0; i < size; i++) x[i] /= sum;
}

size_t room_of(const program_args *a, const instruction *i);  // floats
void run_attend(runner *r);
void run_taylor(runner *r);
void run_ssd(runner *r);
void run_delta(runner *r);
void run_recur(runner *r);
void run_rglru(runner *r);
void run_element(runner *r);
void run_mamba3(runner *r);
size_t mamba3_room(const instruction *i);
void run_moe(runner *r);
void run_keys(runner *r);
void run_chunk(runner *r);
void run_workspace(runner *r);
size_t attend_room(const program_args *a, const instruction *i);
size_t moe_room(const program_args *a, const instruction *i);
size_t moe_integers(const instruction *i);
size_t workspace_room(const program_args *a, const instruction *i);
