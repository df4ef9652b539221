#include "tensor.h"

void load_line(float *to, const char *from, int64_t dtype, int n) {
    switch (dtype) {
    case F32: memcpy(to, from, 4 * (size_t)n); break;
    case BF16: for (int i = 0; i < n; i++) to[i] = from_bf16(((const uint16_t *)from)[i]); break;
    default: for (int i = 0; i < n; i++) to[i] = from_f16(((const uint16_t *)from)[i]);
    }
}

void store_line(char *to, const float *from, int64_t dtype, int n) {
    switch (dtype) {
    case F32: memcpy(to, from, 4 * (size_t)n); break;
    case BF16: for (int i = 0; i < n; i++) ((uint16_t *)to)[i] = to_bf16(from[i]); break;
    default: for (int i = 0; i < n; i++) ((uint16_t *)to)[i] = to_f16(from[i]);
    }
}

void load_tile(float *tile, int64_t ld, const char *source, int64_t dtype, int64_t lane_stride, int64_t step_stride,
               int lanes, int64_t steps) {
    int64_t size = item_size(dtype), s = 0;
    if (lane_stride == 1 && lanes == VL) {
        if (dtype == F32)
            for (; s < steps; s++) v_store(tile + s * ld, v_load((const float *)(source + 4 * s * step_stride)));
        else
            for (; s < steps; s++) load_line(tile + s * ld, source + size * s * step_stride, dtype, VL);
        return;
    }
    if (step_stride == 1 && dtype == F32 && lanes == VL) {
        for (; s + VL <= steps; s += VL) {
            const float *from = (const float *)source + s;
            vf x[VL];
#pragma GCC unroll 16
            for (int lane = 0; lane < VL; lane++) {
                x[lane] = v_load(from + lane * lane_stride);
            }
            v_transpose(x);
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) v_store(tile + (s + i) * ld, x[i]);
        }
    } else if (step_stride == 1) {
        for (; s + VL <= steps; s += VL) {
            vf x[VL];
            for (int lane = 0; lane < VL; lane++) {
                float line[VL] = {0};
                if (lane < lanes) {
                    const char *from = source + size * (lane * lane_stride + s);
                    if (dtype == F32) { x[lane] = v_load((const float *)from); continue; }
                    load_line(line, from, dtype, VL);
                }
                x[lane] = v_load(line);
            }
            v_transpose(x);
            for (int i = 0; i < VL; i++) v_store(tile + (s + i) * ld, x[i]);
        }
    }
    for (; s < steps; s++) {
        float line[VL] = {0};
        const char *from = source + size * s * step_stride;
        if (lane_stride == 1) load_line(line, from, dtype, lanes);
        else for (int lane = 0; lane < lanes; lane++) line[lane] = get(from, dtype, lane * lane_stride);
        v_store(tile + s * ld, v_load(line));
    }
}

void store_tile(const float *tile, int64_t ld, char *target, int64_t dtype, int64_t lane_stride, int64_t step_stride,
                int lanes, int64_t steps) {
    int64_t size = item_size(dtype), s = 0;
    if (lane_stride == 1 && lanes == VL) {
        if (dtype == F32)
            for (; s < steps; s++) v_store((float *)(target + 4 * s * step_stride), v_load(tile + s * ld));
        else
            for (; s < steps; s++) store_line(target + size * s * step_stride, tile + s * ld, dtype, VL);
        return;
    }
    if (step_stride == 1) {
        for (; s + VL <= steps; s += VL) {
            vf x[VL];
            for (int i = 0; i < VL; i++) x[i] = v_load(tile + (s + i) * ld);
            v_transpose(x);
            for (int lane = 0; lane < lanes; lane++) {
                char *to = target + size * (lane * lane_stride + s);
                float line[VL];
                if (dtype == F32) { v_store((float *)to, x[lane]); continue; }
                v_store(line, x[lane]);
                store_line(to, line, dtype, VL);
            }
        }
    }
    for (; s < steps; s++) {
        char *to = target + size * s * step_stride;
        if (lane_stride == 1) store_line(to, tile + s * ld, dtype, lanes);
        else for (int lane = 0; lane < lanes; lane++) put(to, dtype, lane * lane_stride, tile[s * ld + lane]);
    }
}

void load_tiles(float *tiles, int64_t gap, const char *source, int64_t dtype, int64_t lane_stride, int64_t step_stride,
                int64_t lanes, int64_t steps) {
    int64_t size = item_size(dtype), done = 0;
    if (lane_stride == 1 && dtype == F32) {
        done = lanes / VL;
        for (int64_t s = 0; s < steps; s++) {
            const float *row = (const float *)source + s * step_stride;
            for (int64_t k = 0; k < done; k++) v_store(tiles + k * gap + s * VL, v_load(row + k * VL));
        }
    }
    for (int64_t k = done; k * VL < lanes; k++) {
        int64_t left = lanes - k * VL;
        load_tile(tiles + k * gap, VL, source + size * k * VL * lane_stride, dtype, lane_stride, step_stride,
                  (int)(left < VL ? left : VL), steps);
    }
}

void store_tiles(const float *tiles, int64_t gap, char *target, int64_t dtype, int64_t lane_stride, int64_t step_stride,
                 int64_t lanes, int64_t steps) {
    int64_t size = item_size(dtype), done = 0;
    if (lane_stride == 1 && dtype == F32) {
        done = lanes / VL;
        for (int64_t s = 0; s < steps; s++) {
            float *row = (float *)target + s * step_stride;
            for (int64_t k = 0; k < done; k++) v_store(row + k * VL, v_load(tiles + k * gap + s * VL));
        }
    }
    for (int64_t k = done; k * VL < lanes; k++) {
        int64_t left = lanes - k * VL;
        store_tile(tiles + k * gap, VL, target + size * k * VL * lane_stride, dtype, lane_stride, step_stride,
                   (int)(left < VL ? left : VL), steps);
    }
}
