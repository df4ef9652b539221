// Small matrix products for data that lives in cache, and transposition.
//
//     C[m][n] = keep * from[m][n] + scale[m] * sum_k A[m * am + k * ak] * B[k * ldb + n]
//
// for m < M and n < N, N a multiple of VL.
//
// A may be transposed by its strides, the lanes run along n, and the shape leaves out what is zero or unused.
#pragma once
#include <stdint.h>
#include "vec.h"

enum {
    GEMM_FULL,
    GEMM_LOWER,   // A is lower triangular: k <= m
    GEMM_UPPER,   // A is upper triangular: k >= m
    GEMM_RESULT,  // only n <= m of the result is wanted (whole vectors are written)
};

typedef struct {
    const float *A; int64_t am, ak;
    const float *B; int64_t ldb;
    float *C; int64_t ldc;
    const float *scale;  // per row of C, or NULL for 1
    const float *from;   // laid out like C and possibly C itself, or NULL for 0
    float keep;
} gemm_t;

// Sums that fit into the registers: 6 x 4 vectors of 32, or 6 x 2 of 16.
#define GEMM_ROWS 6
#define GEMM_VECTORS (VL == 16 ? 4 : 2)

INLINE int64_t padded(int64_t n) { return (n + VL - 1) / VL * VL; }

INLINE void gemm_tile(const gemm_t *g, const int rows, const int vecs, int64_t m, int64_t n, int64_t k0, int64_t k1) {
    vf sum[GEMM_ROWS][4];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) sum[i][v] = (vf){0};
    const float *a = g->A + m * g->am, *b = g->B + n;
    for (int64_t k = k0; k < k1; k++) {
        vf line[4];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) line[v] = v_load(b + k * g->ldb + v * VL);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            const float one = a[i * g->am + k * g->ak];
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) sum[i][v] += one * line[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        float *c = g->C + (m + i) * g->ldc + n;
        const float *from = g->from ? g->from + (m + i) * g->ldc + n : NULL;
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            vf value = sum[i][v];
            if (g->scale) value *= g->scale[m + i];
            if (from) value += g->keep * v_load(from + v * VL);
            v_store(c + v * VL, value);
        }
    }
}

#define GEMM_COLUMNS(rows)                                                                        \
    do {                                                                                          \
        int64_t n = 0;                                                                            \
        for (; n + GEMM_VECTORS * VL <= last; n += GEMM_VECTORS * VL)                             \
            gemm_tile(g, rows, GEMM_VECTORS, m, n, k0, k1);                                       \
        for (; n + 2 * VL <= last; n += 2 * VL) gemm_tile(g, rows, 2, m, n, k0, k1);              \
        if (n + VL <= last) gemm_tile(g, rows, 1, m, n, k0, k1);                                  \
    } while (0)

static __attribute__((unused)) void gemm(const gemm_t *g, int64_t M, int64_t N, int64_t K, int shape) {
    int64_t m = 0;
    while (m < M) {
        const int64_t left = M - m, rows = left >= GEMM_ROWS ? GEMM_ROWS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const int64_t k0 = shape == GEMM_UPPER ? m : 0, k1 = shape == GEMM_LOWER && m + rows < K ? m + rows : K;
        const int64_t last = shape == GEMM_RESULT && padded(m + rows) < N ? padded(m + rows) : N;
        if (rows == 6) GEMM_COLUMNS(6);
        else if (rows == 4) GEMM_COLUMNS(4);
        else if (rows == 2) GEMM_COLUMNS(2);
        else GEMM_COLUMNS(1);
        m += rows;
    }
}

// to[c][r] = from[r][c] for r < rows, c < columns, and 0 for rows <= r < ldt
static __attribute__((unused)) void transpose(const float *from, int64_t ld, int64_t rows, int64_t columns, float *to,
                                              int64_t ldt) {
    int64_t c = 0;
    for (; c + VL <= columns; c += VL) {
        int64_t r = 0;
        for (; r + VL <= rows; r += VL) {
            vf x[VL];
            for (int i = 0; i < VL; i++) x[i] = v_load(from + (r + i) * ld + c);
            v_transpose(x);
            for (int i = 0; i < VL; i++) v_store(to + (c + i) * ldt + r, x[i]);
        }
        for (; r < ldt; r++)
            for (int i = 0; i < VL; i++) to[(c + i) * ldt + r] = r < rows ? from[r * ld + c + i] : 0;
    }
    for (; c < columns; c++)
        for (int64_t r = 0; r < ldt; r++) to[c * ldt + r] = r < rows ? from[r * ld + c] : 0;
}
