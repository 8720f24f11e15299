// 3 x 3 convolutions of frames [height, width, channels], summed over a few frames, by Winograd's F(4 x 4, 3 x 3).
//
// A tile of 4 x 4 outputs takes 36 products in place of 144: y = Aᵀ [(G g Gᵀ) ∘ (Bᵀ d B)] A, with polynomials through the points
// 0, ±3/4, ±3/2 and infinity, whose rounding is half of that of the usual ±1, ±2 (Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", 2016). Over tiles and channels each of the 36 is a product of matrices. Sums over frames are
// taken there, so that every output is transformed once.
#pragma once

#include "rows.h"

namespace ebr::cpu {
namespace {

constexpr int POINTS = 6, TILE = 4, PLACES = POINTS * POINTS;
constexpr int PANEL = 2 * W;                  // outputs that a product's registers hold side by side
constexpr int DEEP = W == 16 ? 12 : 6;        // tiles that they hold one below the other
constexpr int64_t BLOCK = 48;                 // tiles of a part: their transforms stay in a cache
constexpr int64_t LARGE = 4 << 20;            // transformed weights that are not kept until the next call
constexpr float P = 0.75f, Q = 1.5f, PP = P * P, QQ = Q * Q;

INLINE void transform_input(const V* d, int64_t step, V* t) {  // Bᵀ d
    const V d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
    const V even_p = d4 - d2 * QQ, odd_p = (d3 - d1 * QQ) * P, even_q = d4 - d2 * PP, odd_q = (d3 - d1 * PP) * Q;
    t[0] = d0 * (PP * QQ) - d2 * (PP + QQ) + d4;
    t[1] = even_p + odd_p;
    t[2] = even_p - odd_p;
    t[3] = even_q + odd_q;
    t[4] = even_q - odd_q;
    t[5] = d1 * (PP * QQ) - d3 * (PP + QQ) + d5;
}

INLINE void transform_output(const V* m, int64_t step, V* y) {  // Aᵀ m
    const V sum_p = m[step] + m[2 * step], minus_p = m[step] - m[2 * step];
    const V sum_q = m[3 * step] + m[4 * step], minus_q = m[3 * step] - m[4 * step];
    y[0] = m[0] + sum_p + sum_q;
    y[1] = minus_p * P + minus_q * Q;
    y[2] = sum_p * PP + sum_q * QQ;
    y[3] = minus_p * (PP * P) + minus_q * (QQ * Q) + m[5 * step];
}

INLINE void transform_weight(const V* g, int64_t step, V* t) {  // G g
    constexpr float NP = 1 / (2 * PP * (PP - QQ)), NQ = 1 / (2 * QQ * (QQ - PP));
    const V even_p = g[0] * NP + g[2 * step] * (PP * NP), odd_p = g[step] * (P * NP);
    const V even_q = g[0] * NQ + g[2 * step] * (QQ * NQ), odd_q = g[step] * (Q * NQ);
    t[0] = g[0] * (1 / (PP * QQ));
    t[1] = even_p + odd_p;
    t[2] = even_p - odd_p;
    t[3] = even_q + odd_q;
    t[4] = even_q - odd_q;
    t[5] = g[2 * step];
}

INLINE int64_t panels_of(const Convolution& a) { return (a.outputs + PANEL - 1) / PANEL; }
INLINE int64_t padded(const Convolution& a) { return (a.channels + W - 1) / W * W; }

// The weights [frames, outputs, 3, 3, channels] transformed: [36, panels, frames, channels, PANEL].
void pack(const Convolution& a, float* packed) {
    const int64_t panels = panels_of(a), depth = a.frames * a.channels, place = panels * depth * PANEL;
    const float* weight = reinterpret_cast<const float*>(a.weight);
    spread(panels * a.frames, a.threads, [&](int64_t part) {
        const int64_t panel = part / a.frames, frame = part % a.frames;
        if (!a.frame[frame]) return;
        for (int64_t c = 0; c < a.channels; ++c) {
            for (int half = 0; half < PANEL; half += W) {
                const int64_t first = panel * PANEL + half, count = a.outputs - first < W ? a.outputs - first : W;
                const float* from = weight + (frame * a.outputs + first) * 9 * a.channels + c;
                V g[9] = {}, rows[3 * POINTS], t[POINTS];
                for (int k = 0; k < 9; ++k)
                    for (int64_t o = 0; o < count; ++o) g[k][o] = from[(o * 9 + k) * a.channels];
                for (int row = 0; row < 3; ++row) transform_weight(g + 3 * row, 1, rows + POINTS * row);
                float* to = packed + ((panel * a.frames + frame) * a.channels + c) * PANEL + half;
                for (int column = 0; column < POINTS; ++column) {
                    transform_weight(rows + column, POINTS, t);
                    for (int row = 0; row < POINTS; ++row) store(to + (row * POINTS + column) * place, t[row]);
                }
            }
        }
    });
}

// One frame's part of a tile whose first input is at (y, x), to [36, BLOCK, padded channels].
INLINE void gather(const Convolution& a, const float* frame, int64_t y, int64_t x, float* to) {
    const int64_t stored = a.width >> a.doubled;  // of a row
    const float* pixel[PLACES];
    for (int row = 0; row < POINTS; ++row)
        for (int column = 0; column < POINTS; ++column) {
            const int64_t v = y + row, u = x + column;
            const bool inside = v >= 0 && v < a.height && u >= 0 && u < a.width;
            pixel[row * POINTS + column] = inside ? frame + ((v >> a.doubled) * stored + (u >> a.doubled)) * a.channels : nullptr;
        }
    const int64_t place = BLOCK * padded(a);
    along(a.channels, [&](int64_t c, auto whole) {
        V rows[PLACES], d[POINTS], t[POINTS];
        for (int row = 0; row < POINTS; ++row) {
            for (int column = 0; column < POINTS; ++column) {
                const float* from = pixel[row * POINTS + column];
                d[column] = !from ? V{} : whole ? load(from + c) : some(from + c, a.channels - c);
            }
            transform_input(d, 1, rows + row * POINTS);
        }
        for (int column = 0; column < POINTS; ++column) {
            transform_input(rows + column, POINTS, t);
            for (int row = 0; row < POINTS; ++row) store(to + (row * POINTS + column) * place + c, t[row]);
        }
    });
}

// out [DEEP, PANEL] = inputs [DEEP, channels] · weights [channels, PANEL] of each frame.
INLINE void product(const Convolution& a, const float* inputs, const float* weights, float* out) {
    const int64_t input = padded(a), output = panels_of(a) * PANEL;
    V sums[DEEP][2] = {};
    for (int64_t frame = 0; frame < a.frames; ++frame) {
        if (!a.frame[frame]) continue;
        const float* x = inputs + frame * PLACES * BLOCK * input;
        const float* w = weights + frame * a.channels * PANEL;
        for (int64_t c = 0; c < a.channels; ++c, w += PANEL) {
            const V first = load(w), second = load(w + W);
#pragma GCC unroll 16
            for (int row = 0; row < DEEP; ++row) {
                const V value = all(x[row * input + c]);
                sums[row][0] += value * first;
                sums[row][1] += value * second;
            }
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < DEEP; ++row) {
        store(out + row * output, sums[row][0]);
        store(out + row * output + W, sums[row][1]);
    }
}

// The tile of outputs that begins at (y, x), from [36, BLOCK, panels · PANEL].
INLINE void scatter(const Convolution& a, const float* from, int64_t y, int64_t x) {
    const float *bias = reinterpret_cast<const float*>(a.bias), *added = reinterpret_cast<const float*>(a.added);
    float* out = reinterpret_cast<float*>(a.out);
    const int64_t place = BLOCK * panels_of(a) * PANEL;
    along(a.outputs, [&](int64_t o, auto whole) {
        const int64_t left = a.outputs - o;
        V rows[POINTS * TILE], m[POINTS], t[TILE];
        for (int row = 0; row < POINTS; ++row) {
            for (int column = 0; column < POINTS; ++column) m[column] = load(from + (row * POINTS + column) * place + o);
            transform_output(m, 1, rows + row * TILE);
        }
        const V start = !bias ? V{} : whole ? load(bias + o) : some(bias + o, left);
        for (int column = 0; column < TILE && x + column < a.width; ++column) {
            transform_output(rows + column, TILE, t);
            for (int row = 0; row < TILE && y + row < a.height; ++row) {
                const int64_t at = ((y + row) * a.width + x + column) * a.outputs + o;
                const V y = t[row] + (!added ? start : start + (whole ? load(added + at) : some(added + at, left)));
                whole ? store(out + at, y) : put(out + at, y, left);
            }
        }
    });
}

bool convolution(const Convolution& a) {
    const int64_t across = (a.width + TILE - 1) / TILE, tiles = across * ((a.height + TILE - 1) / TILE);
    const int64_t panels = panels_of(a), depth = a.frames * a.channels, input = padded(a), output = panels * PANEL;
    float* packed = static_cast<float*>(room(Use::packed, sizeof(float) * PLACES * panels * depth * PANEL));
    pack(a, packed);
    spread((tiles + BLOCK - 1) / BLOCK, a.threads, [&](int64_t part) {
        const int64_t first = part * BLOCK, count = tiles - first < BLOCK ? tiles - first : BLOCK;
        float* inputs = static_cast<float*>(room(Use::part, sizeof(float) * PLACES * BLOCK * (a.frames * input + output)));
        float* sums = inputs + PLACES * BLOCK * a.frames * input;
        for (int64_t frame = 0; frame < a.frames; ++frame)
            for (int64_t i = 0; a.frame[frame] && i < count; ++i) {
                const int64_t y = (first + i) / across * TILE - 1, x = (first + i) % across * TILE - 1;
                gather(a, reinterpret_cast<const float*>(a.frame[frame]), y, x, inputs + (frame * PLACES * BLOCK + i) * input);
            }
        for (int place = 0; place < PLACES; ++place)
            for (int64_t panel = 0; panel < panels; ++panel)
                for (int64_t i = 0; i < count; i += DEEP)
                    product(a, inputs + (place * BLOCK + i) * input, packed + (place * panels + panel) * depth * PANEL,
                            sums + (place * BLOCK + i) * output + panel * PANEL);
        for (int64_t i = 0; i < count; ++i)
            scatter(a, sums + i * output, (first + i) / across * TILE, (first + i) % across * TILE);
    });
    if (PLACES * panels * depth * PANEL > LARGE) leave(Use::packed);
    return true;
}

}  // namespace
}  // namespace ebr::cpu
