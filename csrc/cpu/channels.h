// Norms over the channels of pixels [pixels, channels], and SiLU after them.
#pragma once

#include "rows.h"

namespace ebr::cpu {
namespace {

constexpr int64_t STRIPE = 256;  // pixels of a part

template <bool SILU>
INLINE V activated(V v) {
    return SILU ? v / (1.f + exp2<true>(v * -LOG2E)) : v;
}

// y = x · sqrt(channels) / |x| · weight + bias of every pixel.
template <typename T, bool SILU>
void norm_pixels(const ChannelNorm& a, const float* weight, const float* bias) {
    const int64_t pixels = a.frames * a.pixels;
    const float root = std::sqrt(static_cast<float>(a.channels));
    spread((pixels + STRIPE - 1) / STRIPE, a.threads, [&](int64_t part) {
        for (int64_t i = part * STRIPE; i < pixels && i < (part + 1) * STRIPE; ++i) {
            const T* x = reinterpret_cast<const T*>(a.x) + i * a.channels;
            T* out = reinterpret_cast<T*>(a.out) + i * a.channels;
            V squares{};
            along(a.channels, [&](int64_t d, auto whole) {
                const V v = whole ? load(x + d) : some(x + d, a.channels - d);
                squares += v * v;
            });
            const float length = std::sqrt(sum(squares)), inverse = root / (length > a.eps || length != length ? length : a.eps);
            along(a.channels, [&](int64_t d, auto whole) {
                const V v = whole ? load(x + d) : some(x + d, a.channels - d);
                const V y = activated<SILU>(v * inverse * load(weight + d) + load(bias + d));
                whole ? store(out + d, y) : put(out + d, y, a.channels - d);
            });
        }
    });
}

// y = (x − mean) / sqrt(variance + eps) · weight + bias, with the statistics of a frame's groups of channels. Sums are of what
// differs from the frame's first pixel, in float32 over a stripe and in float64 over all.
template <typename T, bool SILU>
void norm_groups(const ChannelNorm& a, const float* weight, const float* bias) {
    const int64_t stripes = (a.pixels + STRIPE - 1) / STRIPE, padded = (a.channels + W - 1) / W * W;
    for (int64_t frame = 0; frame < a.frames; ++frame) {
        const T* x = reinterpret_cast<const T*>(a.x) + frame * a.pixels * a.channels;
        T* out = reinterpret_cast<T*>(a.out) + frame * a.pixels * a.channels;
        float* partial = static_cast<float*>(room(Use::packed, sizeof(float) * 2 * padded * (stripes + 1)));
        spread(stripes, a.threads, [&](int64_t part) {
            const int64_t last = (part + 1) * STRIPE < a.pixels ? (part + 1) * STRIPE : a.pixels;
            along(a.channels, [&](int64_t d, auto whole) {
                const auto read = [&](int64_t i) {
                    return whole ? load(x + i * a.channels + d) : some(x + i * a.channels + d, a.channels - d);
                };
                const V pivot = read(0);
                V sums{}, squares{};
                for (int64_t i = part * STRIPE; i < last; ++i) {
                    const V v = read(i) - pivot;
                    sums += v;
                    squares += v * v;
                }
                store(partial + 2 * part * padded + d, sums);
                store(partial + (2 * part + 1) * padded + d, squares);
            });
        });
        float *scale = partial + 2 * stripes * padded, *shift = scale + padded;
        std::memset(scale, 0, sizeof(float) * 2 * padded);
        const int64_t wide = a.channels / a.groups;
        for (int64_t group = 0; group < a.groups; ++group) {
            const double count = static_cast<double>(wide) * a.pixels;
            const double origin = one(x + group * wide);
            double first = 0, second = 0;  // of x − origin
            for (int64_t c = group * wide; c < (group + 1) * wide; ++c) {
                double sums = 0, squares = 0;
                for (int64_t part = 0; part < stripes; ++part) {
                    sums += partial[2 * part * padded + c];
                    squares += partial[(2 * part + 1) * padded + c];
                }
                const double pivot = one(x + c) - origin;
                first += sums + pivot * a.pixels;
                second += squares + 2 * pivot * sums + pivot * pivot * a.pixels;
            }
            const double mean = first / count, variance = second / count - mean * mean;
            const double inverse = 1 / std::sqrt((variance > 0 || variance != variance ? variance : 0) + a.eps);
            for (int64_t c = group * wide; c < (group + 1) * wide; ++c) {
                scale[c] = static_cast<float>(weight[c] * inverse);
                shift[c] = static_cast<float>(bias[c] - (mean + origin) * inverse * weight[c]);
            }
        }
        spread(stripes, a.threads, [&](int64_t part) {
            for (int64_t i = part * STRIPE; i < a.pixels && i < (part + 1) * STRIPE; ++i)
                along(a.channels, [&](int64_t d, auto whole) {
                    const T* from = x + i * a.channels + d;
                    const V v = whole ? load(from) : some(from, a.channels - d);
                    const V y = activated<SILU>(v * load(scale + d) + load(shift + d));
                    whole ? store(out + i * a.channels + d, y) : put(out + i * a.channels + d, y, a.channels - d);
                });
        });
    }
}

template <typename T, bool SILU>
void norm_channels(const ChannelNorm& a, const float* weight, const float* bias) {
    a.groups ? norm_groups<T, SILU>(a, weight, bias) : norm_pixels<T, SILU>(a, weight, bias);
}

bool channel_norm(const ChannelNorm& a) {
    const int64_t padded = (a.channels + W - 1) / W * W;
    float *weight = static_cast<float*>(room(Use::tables, sizeof(float) * 2 * padded)), *bias = weight + padded;
    std::memset(weight, 0, sizeof(float) * 2 * padded);
    widen(a.weight, 0, a.channels, weight);
    if (a.bias.address) widen(a.bias, 0, a.channels, bias);
    if (a.dtype == Dtype::float32)
        a.silu ? norm_channels<float, true>(a, weight, bias) : norm_channels<float, false>(a, weight, bias);
    else
        a.silu ? norm_channels<bf16, true>(a, weight, bias) : norm_channels<bf16, false>(a, weight, bias);
    return true;
}

}  // namespace
}  // namespace ebr::cpu
