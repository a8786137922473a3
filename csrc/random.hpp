// Counter-based random numbers and the Beta sampler, reproducible by (seed, row).
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace proteus {

// Philox4x32-10 (Salmon et al. 2011).
inline std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                           std::array<std::uint32_t, 2> key) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = 0xD2511F53ull * counter[0];
        const std::uint64_t b = 0xCD9E8D57ull * counter[2];
        counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0],
                   static_cast<std::uint32_t>(b),
                   static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1],
                   static_cast<std::uint32_t>(a)};
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return counter;
}

// Words of one try: key = seed, counter = (row, try, 0), low words first.
inline std::array<std::uint32_t, 4> philox_try(std::uint64_t seed, std::uint64_t row,
                                               std::uint32_t attempt) {
    return philox(
        {static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32), attempt, 0},
        {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
}

// In (0, 1) and exact in float32: the 24 bits of (n + 1/2) 2^-23.
inline double open_uniform(std::uint32_t word) {
    return (static_cast<double>(word >> 9) + 0.5) * 0x1p-23;
}

inline constexpr std::uint32_t kBetaTries = 16;

// Beta(conc1, conc0), both >= 1, by Cheng's algorithm BA (1978), two uniforms a try; the mean after
// 16 rejected tries.
inline double sample_beta(double conc1, double conc0, std::uint64_t seed, std::uint64_t row) {
    const double total = conc1 + conc0;
    const double mean = conc1 / total;
    const double excess1 = conc1 - 1.0;
    const double excess0 = conc0 - 1.0;
    const double excess = excess1 + excess0;
    // sqrt((total - 2) / (2 conc1 conc0 - total)) without its 0 / 0 at (1, 1)
    const double beta =
        excess > 0.0 ? 1.0 / std::sqrt(1.0 + 2.0 * excess1 * excess0 / excess) : 1.0;
    const double gamma = conc1 + 1.0 / beta;
    for (std::uint32_t attempt = 0; attempt < kBetaTries; ++attempt) {
        const auto words = philox_try(seed, row, attempt);
        const double u1 = open_uniform(words[0]);
        const double u2 = open_uniform(words[1]);
        const double v = beta * std::log(u1 / (1.0 - u1));
        const double w = conc1 * std::exp(v);
        const double r = gamma * v - std::log(4.0);
        if (r + total * std::log(total / (conc0 + w)) >= std::log(u1 * u1 * u2))
            return w / (conc0 + w);
    }
    return mean;
}

}  // namespace proteus
