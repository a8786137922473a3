#include "hashing.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "forward.hpp"

namespace proteus {
namespace {

enum Block : std::uint8_t { kWords = 0, kBigrams = 1, kFourGrams = 2, kShape = 3 };

enum ByteClass : std::uint8_t { kPunctuation, kSpace, kDigit, kLower, kUpper, kNonAscii };

constexpr std::array<std::uint8_t, 256> make_classes() {
    std::array<std::uint8_t, 256> table{};
    for (int c = 0; c < 256; ++c) {
        if (c == 0 || c == ' ' || (c >= '\t' && c <= '\r')) {
            table[c] = kSpace;
        } else if (c >= '0' && c <= '9') {
            table[c] = kDigit;
        } else if (c >= 'a' && c <= 'z') {
            table[c] = kLower;
        } else if (c >= 'A' && c <= 'Z') {
            table[c] = kUpper;
        } else if (c >= 0x80) {
            table[c] = kNonAscii;
        } else {
            table[c] = kPunctuation;
        }
    }
    return table;
}

constexpr std::array<std::uint8_t, 256> kClass = make_classes();

bool is_code_byte(unsigned char c) {
    return c == '{' || c == '}' || c == ';' || c == '=' || c == '(' || c == ')';
}

// Set of the (block, row) pairs of one text.
class FeatureSet {
  public:
    // Starts a text of `bytes` bytes. Few slots for a short text stay in the first-level cache.
    void clear(std::size_t bytes) {
        features_.clear();
        // a byte adds at most a word, a bigram and a 4-gram
        const std::size_t most = std::min(kMaxFeatures, 16 + 3 * bytes);
        slot_bits_ = std::bit_width(2 * most - 1);
        slots_.assign(std::size_t{1} << slot_bits_, 0);
    }

    // True if the pair is new and was taken.
    bool add(std::uint8_t block, std::uint64_t hash, unsigned row_bits) {
        const std::uint64_t mixed = mix64(hash ^ (block + 1u) * kGolden);
        const auto row = static_cast<std::uint32_t>(mixed >> (64 - row_bits));
        const std::uint32_t pair = row * 4u + block;
        std::size_t slot = (pair * 0x9E3779B1u) >> (32 - slot_bits_);
        for (; slots_[slot] != 0; slot = (slot + 1) & (slots_.size() - 1)) {
            Feature& found = features_[slots_[slot] - 1];
            if (found.row == row && found.block == block) {
                ++found.count;
                return false;
            }
        }
        if (features_.size() == kMaxFeatures) return false;
        features_.push_back({row, 1, block});
        slots_[slot] = static_cast<std::uint16_t>(features_.size());
        return true;
    }

    std::vector<Feature>& features() { return features_; }

  private:
    unsigned slot_bits_ = 0;
    std::vector<std::uint16_t> slots_;  // 1 + index of the feature, 0 where free
    std::vector<Feature> features_;
};

// 2 log2(n) rounded down, for n >= 1.
std::uint64_t half_steps(std::uint64_t n) {
    n = std::min<std::uint64_t>(n, 0xFFFFFFFFull);
    const auto whole = static_cast<std::uint64_t>(std::bit_width(n) - 1);
    return 2 * whole + (n * n >= 1ull << (2 * whole + 1) ? 1 : 0);
}

// 0 for none, else 1 + sixteenths of the whole, at most 8.
std::uint64_t share(std::uint64_t part, std::uint64_t whole) {
    return part == 0 ? 0 : std::min<std::uint64_t>(8, 1 + part * 16 / whole);
}

struct Scratch {
    FeatureSet set;
    std::vector<unsigned char> clipped;
    std::vector<unsigned char> text;    // " " + normalised + " "
    std::vector<std::uint64_t> tokens;  // FNV-1a of each
};

// Normalises into scratch.text, hashes the tokens, and adds the shape features.
void scan(std::size_t whole_size, std::span<const unsigned char> bytes, unsigned row_bits,
          Scratch& scratch) {
    std::uint64_t counts[6] = {};
    std::uint64_t newlines = 0;
    std::uint64_t code = 0;
    bool question = false;
    auto& text = scratch.text;
    text.resize(bytes.size() + 2);
    text[0] = ' ';
    std::size_t end = 1;
    for (const unsigned char c : bytes) {
        const std::uint8_t type = kClass[c];
        ++counts[type];
        if (type == kSpace) {
            newlines += c == '\n';
            text[end] = ' ';
            end += text[end - 1] != ' ';
        } else {
            code += is_code_byte(c);
            question |= c == '?';
            text[end++] = type == kUpper ? c + ('a' - 'A') : c;
        }
    }
    if (text[end - 1] != ' ') text[end++] = ' ';
    text.resize(end);

    constexpr std::uint64_t kOffset = 0xCBF29CE484222325ull;
    constexpr std::uint64_t kPrime = 0x100000001B3ull;
    auto& tokens = scratch.tokens;
    tokens.clear();
    for (std::size_t i = 1; i < end;) {
        if (text[i] == ' ') {
            ++i;
            continue;
        }
        std::uint64_t hash = (kOffset ^ text[i]) * kPrime;
        if (kClass[text[i++]] != kPunctuation)
            for (; kClass[text[i]] >= kDigit; ++i) hash = (hash ^ text[i]) * kPrime;
        tokens.push_back(hash);
    }

    const std::uint64_t size = std::max<std::uint64_t>(1, bytes.size());
    const std::uint64_t words = tokens.size();
    const std::uint64_t buckets[] = {
        half_steps(whole_size + 1ull),
        half_steps(words + 1),
        half_steps(newlines + 1),
        share(counts[kDigit], size),
        share(counts[kPunctuation], size),
        share(code, size),
        share(counts[kNonAscii], size),
        share(counts[kUpper], size),
        question ? 1u : 0u,
        std::min<std::uint64_t>(15, bytes.size() / std::max<std::uint64_t>(1, words)),
    };
    for (std::size_t kind = 0; kind < std::size(buckets); ++kind)
        scratch.set.add(kShape, kind * 256 + buckets[kind], row_bits);
}

std::uint32_t window(const unsigned char* p) {
    return p[0] | p[1] << 8 | p[2] << 16 | static_cast<std::uint32_t>(p[3]) << 24;
}

template <typename OnNew>
std::vector<Feature>& collect(const TextView& view, unsigned row_bits, OnNew on_new) {
    thread_local Scratch scratch;
    const auto bytes_of = [](std::string_view text) {
        return std::span{reinterpret_cast<const unsigned char*>(text.data()), text.size()};
    };
    auto bytes = bytes_of(view.head);
    if (!view.tail.empty()) {
        const auto tail = bytes_of(view.tail);
        scratch.clipped.assign(bytes.begin(), bytes.end());
        scratch.clipped.insert(scratch.clipped.end(), tail.begin(), tail.end());
        bytes = scratch.clipped;
    }
    FeatureSet& set = scratch.set;
    set.clear(bytes.size());
    scan(view.size, bytes, row_bits, scratch);
    auto& features = set.features();
    for (const Feature& feature : features) on_new(feature.row);
    const auto add = [&](Block block, std::uint64_t hash) {
        if (set.add(block, hash, row_bits)) on_new(features.back().row);
    };
    for (const std::uint64_t token : scratch.tokens) add(kWords, token);
    for (std::size_t i = 1; i < scratch.tokens.size(); ++i)
        add(kBigrams, mix64(scratch.tokens[i - 1]) + 3 * scratch.tokens[i]);
    for (std::size_t i = 0; i + 4 <= scratch.text.size(); ++i)
        add(kFourGrams, window(scratch.text.data() + i));
    return features;
}

float log_count(std::uint32_t count) {
    // most counts are small; the table spares the call
    static const auto table = [] {
        std::array<float, 64> values{};
        for (std::size_t i = 1; i < values.size(); ++i)
            values[i] = static_cast<float>(std::log(static_cast<double>(i)));
        return values;
    }();
    return count < table.size() ? table[count]
                                : static_cast<float>(std::log(static_cast<double>(count)));
}

// Sums of Groups * 16 columns, in registers.
template <typename S, std::size_t Groups>
PROTEUS_INLINE void pool_columns(const std::int8_t* table, std::size_t stride,
                                 const std::uint32_t* rows, const float* weights, std::size_t n,
                                 float* out) {
    constexpr std::size_t kVecs = Groups * S::kPerGroup;
    typename S::Float sum[kVecs] = {};
    for (std::size_t i = 0; i < n; ++i) {
        const std::int8_t* row = table + rows[i] * stride;
#pragma GCC unroll 32
        for (std::size_t v = 0; v < kVecs; ++v) {
            typename S::Byte bytes;
            std::memcpy(&bytes, row + v * S::kFloats, sizeof bytes);
            // g++ 12 makes scalar code of a conversion that widens by more than two
            const auto shorts = __builtin_convertvector(bytes, typename S::Short);
            const auto ints = __builtin_convertvector(shorts, typename S::Int);
            sum[v] += weights[i] * __builtin_convertvector(ints, typename S::Float);
        }
    }
#pragma GCC unroll 32
    for (std::size_t v = 0; v < kVecs; ++v) store(out + v * S::kFloats, sum[v]);
}

// out[j] = sum_i weights[i] table[rows[i]][j] for `groups` groups of 16 columns.
struct Pool {
    template <typename S>
    static PROTEUS_INLINE void run(const std::int8_t* table, std::size_t stride, std::size_t groups,
                                   const std::uint32_t* rows, const float* weights, std::size_t n,
                                   float* out) {
        std::size_t done = 0;
        while (done < groups) {
            const std::size_t left = groups - done;
            const std::int8_t* from = table + done * kLanes;
            float* to = out + done * kLanes;
            if (left >= 6) {
                pool_columns<S, 6>(from, stride, rows, weights, n, to);
                done += 6;
            } else if (left >= 4) {
                pool_columns<S, 4>(from, stride, rows, weights, n, to);
                done += 4;
            } else if (left >= 2) {
                pool_columns<S, 2>(from, stride, rows, weights, n, to);
                done += 2;
            } else {
                pool_columns<S, 1>(from, stride, rows, weights, n, to);
                done += 1;
            }
        }
    }
};

constexpr std::size_t kRowHeader = 2 * sizeof(float);  // idf, row_scale

}  // namespace

std::uint64_t row_hash(const float* x, std::size_t n, std::uint64_t key) {
    return mix64(key ^ column_sum(x, n));
}

TextView clip(std::string_view text) {
    if (text.size() <= 2 * kHeadBytes) return {text, {}, text.size()};
    return {text.substr(0, kHeadBytes), text.substr(text.size() - kHeadBytes), text.size()};
}

std::span<const Feature> hash_features(std::string_view text, unsigned row_bits) {
    return collect(clip(text), row_bits, [](std::uint32_t) {});
}

HashEncoder::HashEncoder(const std::int8_t* table, std::size_t rows, std::size_t dim,
                         const float* row_scale, const float* idf,
                         std::span<const float> block_weight)
    : rows_(rows), dim_(dim) {
    if (rows < 2 || rows > kMaxRows || !std::has_single_bit(rows))
        throw std::invalid_argument("table: expected a power of two of rows from 2 to 2^28, got " +
                                    std::to_string(rows));
    if (dim == 0) throw std::invalid_argument("table: expected at least one column, got 0");
    const auto check = [](const char* name, std::span<const float> values) {
        for (const float value : values)
            if (!std::isfinite(value))
                throw std::invalid_argument(std::string(name) + ": expected finite values, got " +
                                            std::to_string(value));
    };
    check("row_scale", {row_scale, rows});
    check("idf", {idf, rows});
    check("block_weight", block_weight);
    if (block_weight.size() != kBlocks)
        throw std::invalid_argument("block_weight: expected shape (4,), got (" +
                                    std::to_string(block_weight.size()) + ",)");
    std::copy(block_weight.begin(), block_weight.end(), block_weight_);
    row_bits_ = static_cast<unsigned>(std::bit_width(rows) - 1);
    stride_ = padded(kRowHeader + dim);
    // the last vector of the last row may end behind it
    table_.resize(rows * stride_ + kLanes);
    for (std::size_t r = 0; r < rows; ++r) {
        std::int8_t* to = table_.data() + r * stride_;
        std::memcpy(to, idf + r, sizeof(float));
        std::memcpy(to + sizeof(float), row_scale + r, sizeof(float));
        std::memcpy(to + kRowHeader, table + r * dim, dim);
    }
}

void HashEncoder::encode(const TextView& text, float* out) const {
    thread_local std::vector<std::uint32_t> rows;
    thread_local std::vector<float> weights;
    thread_local AlignedVector<float> sum;
    const std::int8_t* table = table_.data();
    const std::size_t stride = stride_;
    const auto& features = collect(text, row_bits_, [table, stride](std::uint32_t row) {
        // the row is read after all features are known: its misses overlap with the hashing
        const std::int8_t* at = table + row * stride;
        for (std::size_t line = 0; line < stride; line += 64) __builtin_prefetch(at + line);
        __builtin_prefetch(at + stride - 1);
    });
    rows.resize(features.size());
    weights.resize(features.size());
    float squares[kBlocks] = {};
    for (std::size_t i = 0; i < features.size(); ++i) {
        float idf;
        std::memcpy(&idf, table + features[i].row * stride, sizeof idf);
        weights[i] = (1.0f + log_count(features[i].count)) * idf;
        squares[features[i].block] += weights[i] * weights[i];
        rows[i] = features[i].row;
    }
    float scale[kBlocks];
    for (std::size_t b = 0; b < kBlocks; ++b)
        scale[b] = squares[b] > 0.0f ? block_weight_[b] / std::sqrt(squares[b]) : 0.0f;
    for (std::size_t i = 0; i < features.size(); ++i) {
        float row_scale;
        std::memcpy(&row_scale, table + rows[i] * stride + sizeof(float), sizeof row_scale);
        weights[i] *= scale[features[i].block] * row_scale;
    }
    sum.resize(padded(dim_));
    dispatch<Pool>(table + kRowHeader, stride, sum.size() / kLanes, rows.data(), weights.data(),
                   rows.size(), sum.data());
    std::copy_n(sum.begin(), dim_, out);
}

}  // namespace proteus
