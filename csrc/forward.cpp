#include "forward.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "hashing.hpp"
#include "simd.hpp"

namespace proteus {
namespace {

// y[r][0 : Vecs vectors] += x[r] w for Rows rows, accumulators in registers.
template <typename S, int Rows, int Vecs>
PROTEUS_INLINE void tile(const float* x, std::size_t stride, std::size_t in, const float* w,
                         std::size_t out, float* y) {
    using Float = typename S::Float;
    Float sum[Rows][Vecs];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < Vecs; ++v) sum[r][v] = load<S>(y + r * out + v * S::kFloats);
    for (std::size_t i = 0; i < in; ++i) {
        Float weight[Vecs];
#pragma GCC unroll 16
        for (int v = 0; v < Vecs; ++v) weight[v] = load<S>(w + i * out + v * S::kFloats);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
            const float value = x[r * stride + i];
#pragma GCC unroll 16
            for (int v = 0; v < Vecs; ++v) sum[r][v] += value * weight[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < Vecs; ++v) store(y + r * out + v * S::kFloats, sum[r][v]);
}

// All columns of Rows rows, Vecs vectors at a time, then halves of that.
template <typename S, int Rows, int Vecs>
PROTEUS_INLINE void columns(const float* x, std::size_t stride, std::size_t in, const float* w,
                            std::size_t out, float* y, std::size_t first = 0) {
    std::size_t j = first;
    for (; j + Vecs * S::kFloats <= out; j += Vecs * S::kFloats)
        tile<S, Rows, Vecs>(x, stride, in, w + j, out, y + j);
    if constexpr (Vecs > 1) {
        if (j < out) columns<S, Rows, Vecs / 2>(x, stride, in, w, out, y, j);
    }
}

template <typename S, int Rows, int Vecs>
PROTEUS_INLINE std::size_t row_blocks(const float* x, std::size_t stride, std::size_t row,
                                      std::size_t rows, std::size_t in, const float* w,
                                      std::size_t out, float* y) {
    for (; row + Rows <= rows; row += Rows)
        columns<S, Rows, Vecs>(x + row * stride, stride, in, w, out, y + row * out);
    return row;
}

struct Dense {
    template <typename S>
    static PROTEUS_INLINE void run(const float* x, std::size_t stride, std::size_t rows,
                                   std::size_t in, const float* w, std::size_t out, float* y) {
        std::size_t row = 0;
        // AVX-512 has 32 registers and holds 24 sums, the others have 16 and hold 12
        if constexpr (S::kBytes == 64) {
            row = row_blocks<S, 6, 4>(x, stride, row, rows, in, w, out, y);
            row = row_blocks<S, 2, 8>(x, stride, row, rows, in, w, out, y);
            row_blocks<S, 1, 16>(x, stride, row, rows, in, w, out, y);
        } else {
            row = row_blocks<S, 6, 2>(x, stride, row, rows, in, w, out, y);
            row = row_blocks<S, 2, 4>(x, stride, row, rows, in, w, out, y);
            row_blocks<S, 1, 8>(x, stride, row, rows, in, w, out, y);
        }
    }
};

struct FillRows {
    template <typename S>
    static PROTEUS_INLINE void run(const float* bias, std::size_t rows, std::size_t out, float* y) {
        for (std::size_t r = 0; r < rows; ++r)
            for (std::size_t j = 0; j < out; j += S::kFloats)
                store(y + r * out + j, load<S>(bias + j));
    }
};

struct Gelu {
    template <typename S>
    static PROTEUS_INLINE void run(float* y, std::size_t n) {
        for (std::size_t i = 0; i < n; i += S::kFloats) store(y + i, gelu_vec<S>(load<S>(y + i)));
    }
};

struct GeluGated {
    template <typename S>
    static PROTEUS_INLINE void run(float* y, const float* gate, std::size_t n) {
        for (std::size_t i = 0; i < n; i += S::kFloats)
            store(y + i, gelu_vec<S>(load<S>(y + i)) * load<S>(gate + i));
    }
};

struct PolicyContext {
    template <typename S>
    static PROTEUS_INLINE void run(float tau, float dual, const float* b1, const float* w_tau,
                                   const float* w_dual, const float* gate_weight,
                                   const float* gate_bias, std::size_t n, float* base,
                                   float* gate) {
        for (std::size_t i = 0; i < n; i += S::kFloats) {
            store(base + i,
                  load<S>(b1 + i) + tau * load<S>(w_tau + i) + dual * load<S>(w_dual + i));
            store(gate + i,
                  sigmoid_vec<S>(dual * load<S>(gate_weight + i) + load<S>(gate_bias + i)));
        }
    }
};

struct LayerNorm {
    template <typename S>
    static PROTEUS_INLINE void run(float* y, std::size_t width, const float* weight,
                                   const float* bias) {
        using Float = typename S::Float;
        const std::size_t n = padded(width);
        Float total{};
        for (std::size_t i = 0; i < n; i += S::kFloats) total += load<S>(y + i);
        const float mean = sum_lanes<S>(total) / static_cast<float>(width);
        Float squares{};
        for (std::size_t i = 0; i < n; i += S::kFloats) {
            const Float centred = load<S>(y + i) - mean;
            store(y + i, centred);
            if (i + S::kFloats <= width) squares += centred * centred;
        }
        float total_squares = sum_lanes<S>(squares);
        for (std::size_t i = width / S::kFloats * S::kFloats; i < width; ++i)
            total_squares += y[i] * y[i];
        const float variance = total_squares / static_cast<float>(width);
        const float scale = 1.0f / std::sqrt(variance + 1e-5f);
        for (std::size_t i = 0; i < n; i += S::kFloats)
            store(y + i, load<S>(y + i) * scale * load<S>(weight + i) + load<S>(bias + i));
    }
};

// 16 candidates of one row. Four sums per vector hide the latency of the multiply-add.
template <typename S>
PROTEUS_INLINE void predict_group(const float* z, std::size_t in, const float* w, const float* bias,
                                  std::size_t out, bool sigmoid, float* p) {
    using Float = typename S::Float;
    constexpr std::size_t kChains = 4;
    constexpr std::size_t kVecs = S::kPerGroup;
    Float sum[kChains][kVecs] = {};
    std::size_t i = 0;
    for (; i + kChains <= in; i += kChains)
#pragma GCC unroll 4
        for (std::size_t c = 0; c < kChains; ++c)
#pragma GCC unroll 4
            for (std::size_t v = 0; v < kVecs; ++v)
                sum[c][v] += z[i + c] * load<S>(w + (i + c) * out + v * S::kFloats);
    for (; i < in; ++i)
#pragma GCC unroll 4
        for (std::size_t v = 0; v < kVecs; ++v)
            sum[0][v] += z[i] * load<S>(w + i * out + v * S::kFloats);
#pragma GCC unroll 4
    for (std::size_t v = 0; v < kVecs; ++v) {
        Float y =
            ((sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v])) + load<S>(bias + v * S::kFloats);
        if (sigmoid) {
            y = sigmoid_vec<S>(y);
        } else {
            const Float one = Float{} + 1.0f;
            y = y < Float{} ? Float{} : y;
            y = y > one ? one : y;
        }
        store(p + v * S::kFloats, y);
    }
}

struct Predict {
    template <typename S>
    static PROTEUS_INLINE void run(const float* z, std::size_t stride, std::size_t rows,
                                   std::size_t in, const float* w, const float* bias,
                                   std::size_t out, bool sigmoid, float* p) {
        for (std::size_t r = 0; r < rows; ++r)
            for (std::size_t j = 0; j < out; j += kLanes)
                predict_group<S>(z + r * stride, in, w + j, bias + j, out, sigmoid,
                                 p + r * out + j);
    }
};

struct TwoDots {
    template <typename S>
    static PROTEUS_INLINE void run(const float* y, const float* w, const float* bias, std::size_t n,
                                   float* out) {
        typename S::Float first{};
        typename S::Float second{};
        for (std::size_t i = 0; i < n; i += S::kFloats) {
            first += load<S>(y + i) * load<S>(w + i);
            second += load<S>(y + i) * load<S>(w + n + i);
        }
        out[0] = sum_lanes<S>(first) + bias[0];
        out[1] = sum_lanes<S>(second) + bias[1];
    }
};

struct Score {
    template <typename S>
    static PROTEUS_INLINE void run(const float* p, float mu, const float* b, float cost_weight,
                                   const float* c, std::size_t n, float* s) {
        for (std::size_t i = 0; i < n; i += S::kFloats)
            store(s + i, load<S>(p + i) + mu * load<S>(b + i) - cost_weight * load<S>(c + i));
    }
};

inline constexpr std::size_t kPoolingLanes = 8;

// Vecs vectors of columns of all tokens, their lanes in registers; `mask` is all ones or 0 a token.
template <typename S, int Vecs>
PROTEUS_INLINE void mean_of_columns(const float* x, const std::int32_t* mask, std::size_t tokens,
                                    std::size_t dim, float count, float* mean) {
    using Float = typename S::Float;
    using Int = typename S::Int;
    Float lane[kPoolingLanes][Vecs] = {};
    const auto add = [&](std::size_t token, std::size_t l) {
        const Int keep = Int{} + mask[token];
#pragma GCC unroll 2
        for (int v = 0; v < Vecs; ++v) {
            const Int bits = bits_as<Int>(load<S>(x + token * dim + v * S::kFloats));
            lane[l][v] += bits_as<Float>(bits & keep);
        }
    };
    std::size_t token = 0;
    for (; token + kPoolingLanes <= tokens; token += kPoolingLanes)
#pragma GCC unroll 8
        for (std::size_t l = 0; l < kPoolingLanes; ++l) add(token + l, l);
#pragma GCC unroll 8
    for (std::size_t l = 0; l < kPoolingLanes; ++l)
        if (token + l < tokens) add(token + l, l);
#pragma GCC unroll 3
    for (std::size_t half = kPoolingLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 4
        for (std::size_t l = 0; l < half; ++l)
#pragma GCC unroll 2
            for (int v = 0; v < Vecs; ++v) lane[l][v] += lane[l + half][v];
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v) store(mean + v * S::kFloats, lane[0][v] / count);
}

struct MaskedMean {
    template <typename S>
    static PROTEUS_INLINE void run(const float* x, const std::int32_t* mask, std::size_t tokens,
                                   std::size_t dim, float count, float* mean) {
        // 16 sums are half of AVX-512's registers; the others have 16 in all
        constexpr int kVecs = S::kBytes == 64 ? 2 : 1;
        std::size_t j = 0;
        for (; j + kVecs * S::kFloats <= dim; j += kVecs * S::kFloats)
            mean_of_columns<S, kVecs>(x + j, mask, tokens, dim, count, mean + j);
        for (; j + S::kFloats <= dim; j += S::kFloats)
            mean_of_columns<S, 1>(x + j, mask, tokens, dim, count, mean + j);
        for (; j < dim; ++j) {
            float lane[kPoolingLanes] = {};
            for (std::size_t t = 0; t < tokens; ++t)
                if (mask[t]) lane[t % kPoolingLanes] += x[t * dim + j];
            for (std::size_t half = kPoolingLanes / 2; half > 0; half /= 2)
                for (std::size_t l = 0; l < half; ++l) lane[l] += lane[l + half];
            mean[j] = lane[0] / count;
        }
    }
};

struct AllFinite {
    template <typename S>
    static PROTEUS_INLINE bool run(const float* x, std::size_t n) {
        // x - x is 0 for every finite x and NaN for the rest
        typename S::Float sum{};
        std::size_t i = 0;
        for (; i + S::kFloats <= n; i += S::kFloats) {
            const typename S::Float value = load<S>(x + i);
            sum += value - value;
        }
        float total = sum_lanes<S>(sum);
        for (; i < n; ++i) total += x[i] - x[i];
        return total == 0.0f;
    }
};

struct ColumnSum {
    template <typename S>
    static PROTEUS_INLINE std::uint64_t run(const float* x, std::size_t n) {
        std::uint64_t total = 0;
        std::uint64_t column = 0;
        for (std::size_t i = 0; i < n; ++i) {
            column += kGolden;
            // + 0.0f makes -0.0 and 0.0 one value
            total += mix64(bits_as<std::uint32_t>(x[i] + 0.0f) + column);
        }
        return total;
    }
};

}  // namespace

void dense(const float* x, std::size_t stride, std::size_t rows, std::size_t in, const float* w,
           std::size_t out, float* y) {
    dispatch<Dense>(x, stride, rows, in, w, out, y);
}

void fill_rows(const float* bias, std::size_t rows, std::size_t out, float* y) {
    dispatch<FillRows>(bias, rows, out, y);
}

void gelu(float* y, std::size_t n) { dispatch<Gelu>(y, n); }

void gelu_gated(float* y, const float* gate, std::size_t n) { dispatch<GeluGated>(y, gate, n); }

void policy_context(float tau, float dual, const float* b1, const float* w_tau, const float* w_dual,
                    const float* gate_weight, const float* gate_bias, std::size_t n, float* base,
                    float* gate) {
    dispatch<PolicyContext>(tau, dual, b1, w_tau, w_dual, gate_weight, gate_bias, n, base, gate);
}

void layer_norm(float* y, std::size_t width, const float* weight, const float* bias) {
    dispatch<LayerNorm>(y, width, weight, bias);
}

void predict(const float* z, std::size_t stride, std::size_t rows, std::size_t in, const float* w,
             const float* bias, std::size_t out, bool sigmoid, float* p) {
    dispatch<Predict>(z, stride, rows, in, w, bias, out, sigmoid, p);
}

void two_dots(const float* y, const float* w, const float* bias, std::size_t n, float* out) {
    dispatch<TwoDots>(y, w, bias, n, out);
}

void score(const float* p, float mu, const float* b, float cost_weight, const float* c,
           std::size_t n, float* s) {
    dispatch<Score>(p, mu, b, cost_weight, c, n, s);
}

void masked_mean(const float* x, const std::uint8_t* live, std::size_t tokens, std::size_t dim,
                 float* mean) {
    thread_local std::vector<std::int32_t> mask;
    mask.resize(tokens);
    std::size_t count = 0;
    for (std::size_t t = 0; t < tokens; ++t) {
        mask[t] = live[t] ? -1 : 0;
        count += live[t] ? 1 : 0;
    }
    dispatch<MaskedMean>(x, mask.data(), tokens, dim,
                         static_cast<float>(std::max<std::size_t>(count, 1)), mean);
}

bool all_finite(const float* x, std::size_t n) { return dispatch<AllFinite>(x, n); }

std::uint64_t column_sum(const float* x, std::size_t n) { return dispatch<ColumnSum>(x, n); }

}  // namespace proteus
