// Layers of the forward pass. A row's arithmetic does not depend on the rows beside it: every
// blocking adds the same products in the same order, so a batch equals its rows bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace proteus {

// y[r][j] += sum_i x[r][i] w[i][j]; x is (rows, in) with `stride` floats from row to row, w is
// (in, out), y (rows, out); out is a multiple of 16.
void dense(const float* x, std::size_t stride, std::size_t rows, std::size_t in, const float* w,
           std::size_t out, float* y);

// y[r][j] = bias[j]
void fill_rows(const float* bias, std::size_t rows, std::size_t out, float* y);

// y = gelu(y), n a multiple of 16.
void gelu(float* y, std::size_t n);

// y = gelu(y) gate, n a multiple of 16.
void gelu_gated(float* y, const float* gate, std::size_t n);

// What one path parameter adds to the policy's first layer:
// base = b1 + tau w_tau + dual w_dual, gate = sigmoid(dual gate_weight + gate_bias).
void policy_context(float tau, float dual, const float* b1, const float* w_tau, const float* w_dual,
                    const float* gate_weight, const float* gate_bias, std::size_t n, float* base,
                    float* gate);

// Layer norm of one row of `width` values in a buffer padded to whole vectors with zeros.
void layer_norm(float* y, std::size_t width, const float* weight, const float* bias);

// p = link(z w + bias) for every row; w is (in, out), out is 16, 32, 48 or 64.
void predict(const float* z, std::size_t stride, std::size_t rows, std::size_t in, const float* w,
             const float* bias, std::size_t out, bool sigmoid, float* p);

// Two outputs of a row: out[j] = sum_i y[i] w[j][i] + bias[j]; n a multiple of 16.
void two_dots(const float* y, const float* w, const float* bias, std::size_t n, float* out);

// s = p + mu b - cost_weight c, n a multiple of 16.
void score(const float* p, float mu, const float* b, float cost_weight, const float* c,
           std::size_t n, float* s);

// mean[j] over the tokens of one row that are live (not 0); x is (tokens, dim). Token t goes to
// lane t mod 8, a lane adds in the order of its tokens, lanes are folded in halves: the order of
// the GPU kernels. Zeros without a live token; what the others hold, NaN too, does not matter.
void masked_mean(const float* x, const std::uint8_t* live, std::size_t tokens, std::size_t dim,
                 float* mean);

bool all_finite(const float* x, std::size_t n);

// Sum over the columns of a row that its hash mixes with the key.
std::uint64_t column_sum(const float* x, std::size_t n);

}  // namespace proteus
