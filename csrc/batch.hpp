// One batch of callers' rows: what it is made of, and how it is computed.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "engine.hpp"
#include "snapshot.hpp"

namespace proteus {

using Clock = std::chrono::steady_clock;

struct DeadlinePassed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// One caller's rows: texts for the snapshot's encoder, texts for the backend, or embeddings.
struct Query {
    std::size_t rows = 0;
    std::vector<ClippedText> texts;    // one a row, or
    std::vector<std::string> prompts;  // one a row, whole, or
    std::vector<float> x;              // (rows, input_dim)
    std::vector<double> tau;           // one, or one a row
    std::optional<Mode> mode;          // none: the snapshot's default
    Guarantee guarantee = Guarantee::kCertified;
    std::uint64_t available = ~std::uint64_t{0};
    std::optional<Clock::time_point> deadline;
};

struct Answer {
    std::vector<std::int32_t> choice;
    std::vector<float> mu;
    std::vector<float> score;
    std::vector<std::uint8_t> status;
    std::vector<float> certified_floor;
    std::vector<float> scores;   // (rows, candidates), empty if the backend gives none
    std::size_t candidates = 0;  // 0 without scores
    std::int64_t queue_ns = 0;
    std::int64_t encode_ns = 0;  // of the whole batch, as the next
    std::int64_t decide_ns = 0;
    std::int64_t version = 0;  // of the snapshot that decided
};

// What does a step of a batch in the core's place; either may be missing. Called without any lock,
// from as many lanes at once as there are. What it throws, the entries of that batch throw.
struct Backend {
    // x, (texts, dim), of texts: a transformer, before the core decides. One call a batch.
    std::function<void(std::span<const std::string_view> texts, std::size_t dim, float* x)> encode;

    // The answers of rows that share mode and guarantee: a router on another device. `request.x` is
    // null where there are texts. `answer` has its size; one without scores leaves them empty.
    std::function<void(std::span<const std::string_view> texts, const Request& request,
                       std::size_t dim, Answer& answer)>
        route;

    bool takes_prompts() const { return encode || route; }
};

// Tokens of the prompts of a batch. A prompt counts as one for each four bytes begun, at most as
// `text`: known without a tokenizer, near what one makes of English. Other rows count nothing.
struct TokenLimits {
    std::size_t budget = 0;  // of a batch, 0: no limit
    std::size_t text = 0;    // of a text, 0: no limit
};

std::size_t count_tokens(const Query& query, const TokenLimits& limits);

// Throws std::invalid_argument where the snapshot, or the backend, cannot answer the query.
void check(const Query& query, const Snapshot& snapshot, const Backend& backend);

struct BatchTimes {
    std::int64_t encode_ns = 0;
    std::int64_t decide_ns = 0;
};

// The answers of checked queries, without queue_ns. One with more tokens than the budget is encoded
// in parts, and given up with DeadlinePassed once `wanted` says that no answer is waited for.
std::vector<Answer> compute(const Snapshot& snapshot, const Backend& backend,
                            const TokenLimits& limits, const std::vector<const Query*>& queries,
                            const std::function<bool()>& wanted, BatchTimes& times);

}  // namespace proteus
