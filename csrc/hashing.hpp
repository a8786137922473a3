// Text -> hashed features -> pooled embedding, and the keyed hash of a row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "simd.hpp"

namespace proteus {

inline constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15ull;

// Finaliser of splitmix64 (Steele et al. 2014).
PROTEUS_INLINE std::uint64_t mix64(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// Keyed hash of a row of `n` float32 as passed, or of an id; it decides the side of a mixing step.
std::uint64_t row_hash(const float* x, std::size_t n, std::uint64_t key);
inline std::uint64_t id_hash(std::uint64_t id, std::uint64_t key) {
    return mix64(key ^ mix64(id + kGolden));
}

inline constexpr std::size_t kHeadBytes = 8192;      // of a longer text the first and the last
inline constexpr std::size_t kMaxFeatures = 4096;    // distinct (row, block) pairs of a query
inline constexpr std::size_t kBlocks = 4;            // words, bigrams, 4-grams, shape
inline constexpr std::uint64_t kMaxRows = 1u << 28;  // of the table; a power of two

// What is used of a text, and the length of the whole.
struct TextView {
    std::string_view head;  // all of it if it is short
    std::string_view tail;  // empty if it is short
    std::size_t size;
};

TextView clip(std::string_view text);

// A text of any length, kept for later in at most 2 kHeadBytes.
struct ClippedText {
    explicit ClippedText(std::string_view text)
        : bytes(std::string(clip(text).head) + std::string(clip(text).tail)), size(text.size()) {}
    TextView view() const { return {bytes, {}, size}; }

    std::string bytes;
    std::size_t size;
};

struct Feature {
    std::uint32_t row;
    std::uint32_t count;
    std::uint8_t block;
};

// Distinct features of a text in order of first appearance (shape, words, bigrams, 4-grams).
// The span lives until the next call on this thread.
std::span<const Feature> hash_features(std::string_view text, unsigned row_bits);

// Immutable table of int8 rows; safe to use from many threads.
class HashEncoder {
  public:
    // table is (rows, dim) row-major; throws std::invalid_argument naming the argument.
    HashEncoder(const std::int8_t* table, std::size_t rows, std::size_t dim, const float* row_scale,
                const float* idf, std::span<const float> block_weight);

    std::size_t rows() const { return rows_; }
    std::size_t dim() const { return dim_; }

    // out is (dim,).
    void encode(std::string_view text, float* out) const { encode(clip(text), out); }
    void encode(const ClippedText& text, float* out) const { encode(text.view(), out); }

  private:
    void encode(const TextView& text, float* out) const;

    std::size_t rows_;
    std::size_t dim_;
    unsigned row_bits_;
    std::size_t stride_;  // bytes of a stored row: idf, row_scale, dim int8
    float block_weight_[kBlocks];
    AlignedVector<std::int8_t> table_;
};

}  // namespace proteus
