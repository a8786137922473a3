// Does one piece of the native core's work a number of times; instructions.py counts the
// instructions.
//   instructions                     prints compiler and C library, then "case items" of each case
//   instructions CASE REPETITIONS    does the case's work so often, after a warm-up
#include <gnu/libc-version.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "engine.hpp"
#include "fixture.hpp"
#include "forward.hpp"
#include "hashing.hpp"
#include "random.hpp"

using namespace proteus;
using fixture::Shape;

namespace {

#if defined(__clang__)
#define PROTEUS_COMPILER "clang++ " __clang_version__
#else
#define PROTEUS_COMPILER "g++ " __VERSION__
#endif

constexpr std::size_t kSamples = 256;
constexpr double kTau = 0.85;

const Shape kPlain{256, 0, 11, 256};
const Shape kProjected{768, 256, 11, 256};

// of the embedded router's encoder
constexpr std::size_t kTableRows = 1 << 16;
constexpr std::size_t kTableDim = 79;
constexpr unsigned kRowBits = 16;

constexpr std::string_view kShortText =
    "A baker sells 18 orders on Monday and twice as many on Tuesday. Each order brings $20. How "
    "much money is that in all, in USD (2 days)?";

// One repetition of a case: the same work and the same answer each time.
using Work = std::function<std::uint64_t()>;

// 4 KiB of words of one to three syllables, so that 4-grams repeat as in prose.
std::string make_long_text() {
    constexpr std::string_view kSyllables[] = {"an",  "ter", "lo", "ri", "ka", "men", "to",   "sil",
                                               "ven", "do",  "pr", "gu", "es", "ti",  "onde", "r"};
    std::string text;
    for (std::uint64_t i = 0; text.size() < 4096; ++i) {
        std::uint64_t bits = mix64(i);
        for (std::uint64_t left = 1 + bits % 3; left > 0; --left) {
            bits >>= 8;
            text += kSyllables[bits % 16];
        }
        text += i % 11 == 10 ? ".\n" : " ";
    }
    text.resize(4096);
    return text;
}

Work decide_rows(const Shape& shape, Mode mode, std::size_t rows) {
    const auto snapshot = fixture::make_snapshot(shape);
    const auto x = fixture::random_rows(rows, shape.dim, 3);
    const auto results = std::make_shared<fixture::Results>(rows, shape.candidates);
    return [snapshot, x, results, mode, rows] {
        Request request;
        request.x = x.data();
        request.rows = rows;
        request.tau = &kTau;
        request.mode = mode;
        Decisions out = results->out();
        out.predicted = nullptr;
        out.scores = nullptr;
        decide(*snapshot, request, out);
        const std::size_t last = rows - 1;
        CHECK(out.choice[0] >= 0 && out.choice[last] >= 0);
        return bits_as<std::uint32_t>(out.score[last]) + static_cast<std::uint64_t>(out.choice[0]);
    };
}

Work hash_text(const std::string& text) {
    return [text] {
        const auto features = hash_features(text, kRowBits);
        CHECK(features.size() > 16);
        return features.size() + features.back().row;
    };
}

Work encode_text(const std::string& text) {
    const auto encoder = fixture::make_encoder(kTableDim, kTableRows);
    const auto out = std::make_shared<std::vector<float>>(kTableDim);
    return [text, encoder, out] {
        encoder->encode(text, out->data());
        CHECK(out->front() != 0.0f);
        return std::uint64_t{bits_as<std::uint32_t>(out->front())};
    };
}

Work hash_row() {
    const auto x = fixture::random_rows(1, kPlain.dim, 3);
    return [x] { return row_hash(x.data(), x.size(), 99); };
}

Work pool_tokens() {
    const std::size_t tokens = 64;
    const std::size_t dim = 384;
    const auto x = fixture::random_rows(tokens, dim, 3);
    const auto mean = std::make_shared<std::vector<float>>(dim);
    std::vector<std::uint8_t> live(tokens, 1);
    for (std::size_t t = 0; t < tokens; t += 5) live[t] = 0;
    return [x, live, mean, tokens, dim] {
        masked_mean(x.data(), live.data(), tokens, dim, mean->data());
        return std::uint64_t{bits_as<std::uint32_t>(mean->back())};
    };
}

// not inlined: the loop over samples would become another program than the engine's
[[gnu::noinline]] std::uint64_t draw_words(std::uint64_t row) { return philox_try(7, row, 0)[3]; }

[[gnu::noinline]] double draw_beta(std::uint64_t row) { return sample_beta(3.5, 1.75, 7, row); }

Work draw_philox() {
    return [] {
        std::uint64_t total = 0;
        for (std::size_t row = 0; row < kSamples; ++row) total += draw_words(row);
        return total;
    };
}

Work sample() {
    return [] {
        double total = 0.0;
        for (std::size_t row = 0; row < kSamples; ++row) total += draw_beta(row);
        // the mean is 2 / 3, its standard deviation .012
        CHECK(total > 0.6 * kSamples && total < 0.73 * kSamples);
        return bits_as<std::uint64_t>(total);
    };
}

struct Case {
    const char* name;
    std::size_t items;  // of one repetition
    std::function<Work()> prepare;
};

std::vector<Case> make_cases() {
    const auto decision = [](const Shape& shape, Mode mode, std::size_t rows) {
        return [&shape, mode, rows] { return decide_rows(shape, mode, rows); };
    };
    return {
        {"decide_dual_1", 1, decision(kPlain, Mode::kDual, 1)},
        {"decide_dual_256", 256, decision(kPlain, Mode::kDual, 256)},
        {"decide_policy_1", 1, decision(kPlain, Mode::kPolicy, 1)},
        {"decide_policy_256", 256, decision(kPlain, Mode::kPolicy, 256)},
        {"decide_dual_projected_1", 1, decision(kProjected, Mode::kDual, 1)},
        {"decide_policy_projected_1", 1, decision(kProjected, Mode::kPolicy, 1)},
        {"hash_short", 1, [] { return hash_text(std::string(kShortText)); }},
        {"hash_long", 1, [] { return hash_text(make_long_text()); }},
        {"encode_short", 1, [] { return encode_text(std::string(kShortText)); }},
        {"encode_long", 1, [] { return encode_text(make_long_text()); }},
        {"row_hash", 1, hash_row},
        {"masked_mean", 1, pool_tokens},
        {"philox", kSamples, draw_philox},
        {"sample_beta", kSamples, sample},
    };
}

int run(const Case& found, unsigned long repetitions) {
    // other vectors are another program, whose counts cannot be compared
    if (kSimdBytes != 32) {
        std::fprintf(stderr, "processor: expected AVX2 and FMA, got vectors of %zu bytes\n",
                     kSimdBytes);
        return 1;
    }
    const Work work = found.prepare();
    // memory is allocated and symbols are bound on the first call
    const std::uint64_t expected = work();
    for (unsigned long i = 0; i < repetitions; ++i) CHECK(work() == expected);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<Case> cases = make_cases();
    if (argc == 1) {
        std::printf("%s\nglibc %s\n", PROTEUS_COMPILER, gnu_get_libc_version());
        for (const Case& each : cases) std::printf("%s %zu\n", each.name, each.items);
        return 0;
    }
    if (argc == 3) {
        for (const Case& each : cases)
            if (each.name == std::string_view(argv[1]))
                return run(each, std::strtoul(argv[2], nullptr, 10));
    }
    std::fprintf(stderr, "usage: instructions [CASE REPETITIONS]\n");
    return 2;
}
