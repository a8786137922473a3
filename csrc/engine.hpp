// Decides a batch on one thread: project, predict, preference, score, argmax.
#pragma once

#include <cstddef>
#include <cstdint>

#include "snapshot.hpp"

namespace proteus {

// Arguments of one call. A stride of 0 gives every row the same value.
struct Request {
    const float* x = nullptr;  // (rows, input_dim)
    std::size_t rows = 0;
    const double* tau = nullptr;
    std::size_t tau_stride = 0;
    Mode mode = Mode::kDual;
    Guarantee guarantee = Guarantee::kCertified;
    const std::uint64_t* available = nullptr;  // bit i is candidate i; null: all
    std::size_t available_stride = 0;
    const double* price_usd = nullptr;  // null: the snapshot's
    std::size_t price_stride = 0;       // 0 or candidates
    const std::uint64_t* ids = nullptr;
    bool sample = false;
    std::uint64_t seed = 0;
};

// One entry a row; predicted and scores are (rows, candidates) and may be null.
struct Decisions {
    std::int32_t* choice = nullptr;
    float* mu = nullptr;
    float* score = nullptr;
    std::uint8_t* status = nullptr;
    float* certified_floor = nullptr;
    float* predicted = nullptr;
    float* scores = nullptr;
};

// Values never throw: a bad row is INVALID. The mode "policy" needs snapshot.policy. Allocates only
// on a thread's first calls.
void decide(const Snapshot& snapshot, const Request& request, const Decisions& out);

// choice[v * rows + r]: what every vertex of the mode's path chooses for every row, -1 where the
// row is INVALID. Only x, rows, mode and price_usd of the request are read; the path must exist.
void choose_path(const Snapshot& snapshot, const Request& request, std::int32_t* choice);

}  // namespace proteus
