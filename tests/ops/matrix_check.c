// Products of random matrices with random vectors beside sums in double: floats, int8 and 4 bits, for a machine that
// tests/ops/test_other_machines.py has no Python for. Prints the worst error relative to the sum of magnitudes.
#include <stdio.h>
#include "matrix.h"

static uint64_t seed = 1;
static double uniform(void) {  // -1 .. 1
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(int64_t)(seed >> 11) / (1ll << 52) - 1;
}

static double check(int64_t count, int64_t rows, int64_t columns, int64_t bits, int64_t group, int act) {
    const int64_t m = (columns + group - 1) / group;
    float *W = scratch(4 * rows * columns), *x = scratch(4 * count * columns), *scale = scratch(4 * rows * m);
    float *y = scratch(4 * count * rows), *bias = scratch(4 * rows);
    int8_t *codes = scratch(rows * columns);
    uint8_t *nibbles = scratch(rows * columns / 2 + 1);
    for (int64_t i = 0; i < count * rows; i++) y[i] = NAN;
    for (int64_t i = 0; i < count * columns; i++) x[i] = (float)uniform();
    for (int64_t i = 0; i < rows; i++) bias[i] = (float)uniform();
    for (int64_t i = 0; i < rows * m; i++) scale[i] = (float)(uniform() + 1.1);
    for (int64_t i = 0; i < rows * columns; i++) {
        const int64_t row = i / columns, column = i % columns;
        codes[i] = (int8_t)(bits == 4 ? uniform() * 7.9 : uniform() * 127.9);
        W[i] = bits == 32 ? (float)uniform() : codes[i] * scale[row * m + column / group];
        if (bits == 4) {
            uint8_t *b = nibbles + row * (columns / 2) + column / 2;
            *b = column % 2 ? (uint8_t)(*b | ((codes[i] + 8) << 4)) : (uint8_t)(codes[i] + 8);
        }
    }
    const matrix matrix_of = {bits == 32 ? (void *)W : bits == 8 ? (void *)codes : (void *)nibbles, scale, NULL, bias, rows,
                              columns, bits, group};
    vectors v;
    void *memory = scratch(prepared_bytes(&matrix_of, count));
    begin_vectors(&v, &matrix_of, x, count, columns, act, 0.01f, memory);
    prepare(&v, &matrix_of, 0, count);
    multiply_rows(&matrix_of, &v, y, rows, 0, rows / 2);
    multiply_rows(&matrix_of, &v, y, rows, rows / 2, rows);
    double worst = 0;
    for (int64_t c = 0; c < count; c++)
        for (int64_t j = 0; j < rows; j++) {
            double sum = bias[j], size = fabs(bias[j]);
            for (int64_t i = 0; i < columns; i++) {
                double in = x[c * columns + i];
                if (act == ACT_STATIC && bits != 32) in = fmin(fmax(rint(x[c * columns + i] / 0.01f), -128), 127) * 0.01f;
                sum += W[j * columns + i] * in, size += fabs(W[j * columns + i]);
            }
            const double error = fabs(y[c * rows + j] - sum) / size;
            worst = error > worst || error != error ? error : worst;
        }
    free(W), free(x), free(scale), free(y), free(bias), free(codes), free(nibbles), free(memory);
    return worst;
}

int main(void) {
    const int64_t shapes[][3] = {{1, 1, 2}, {1, 17, 48}, {2, 33, 300}, {5, 20, 130}, {8, 16, 768}, {11, 37, 94}};
    for (int bits = 32; bits >= 4; bits = bits == 32 ? 8 : bits / 2)
        for (int act = ACT_FLOAT; act <= ACT_STATIC; act++) {
            double worst = 0;
            for (int i = 0; i < 6; i++)
                for (int64_t group = 32; group < 2000; group *= 8) {
                    const int64_t d = shapes[i][2];
                    const double e = check(shapes[i][0], shapes[i][1], d, bits, group < d ? group : d, act);
                    worst = e > worst || e != e ? e : worst;
                }
            printf("%d %d %.3g\n", bits, act, worst);
        }
    return 0;
}
