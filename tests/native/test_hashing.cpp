#include <algorithm>
#include <random>

#include "fixture.hpp"
#include "hashing.hpp"

using namespace proteus;

namespace {

std::string random_bytes(std::mt19937& random, std::size_t size) {
    std::string text(size, '\0');
    for (char& c : text) c = static_cast<char>(random());
    return text;
}

void any_bytes_are_fine() {
    std::mt19937 random(1);
    const auto encoder = fixture::make_encoder(37);
    std::vector<float> out(37);
    for (int i = 0; i < 3000; ++i) {
        const std::string text = random_bytes(random, random() % 600);
        for (const unsigned bits : {1u, 8u, 28u})
            for (const Feature& feature : hash_features(text, bits)) {
                CHECK(feature.row < 1u << bits);
                CHECK(feature.block < kBlocks);
                CHECK(feature.count > 0);
            }
        encoder->encode(text, out.data());
        CHECK(std::all_of(out.begin(), out.end(), [](float v) { return std::isfinite(v); }));
    }
}

void long_texts_are_clipped() {
    std::mt19937 random(2);
    for (const std::size_t size : {2 * kHeadBytes, 2 * kHeadBytes + 1, std::size_t{5} << 20}) {
        const std::string text = random_bytes(random, size);
        const auto features = hash_features(text, 20);
        CHECK(features.size() == kMaxFeatures);
        // the middle is not read, the length is
        std::string other = text;
        other[size / 2] ^= 1;
        const std::vector<Feature> kept(features.begin(), features.end());
        const auto again = hash_features(other, 20);
        const auto same = [](const Feature& a, const Feature& b) {
            return a.row == b.row && a.count == b.count && a.block == b.block;
        };
        const bool equal = std::equal(kept.begin(), kept.end(), again.begin(), again.end(), same);
        CHECK(equal == (size > 2 * kHeadBytes));
        const auto encoder = fixture::make_encoder(16);
        std::vector<float> direct(16);
        std::vector<float> clipped(16);
        encoder->encode(text, direct.data());
        const ClippedText stored(text);
        CHECK(stored.bytes.size() == 2 * kHeadBytes && stored.size == size);
        encoder->encode(stored, clipped.data());
        CHECK(direct == clipped);
    }
}

void wrong_tables_are_named() {
    const std::vector<std::int8_t> table(12);
    std::vector<float> values(4, 1.0f);
    const auto make = [&](std::size_t rows, std::size_t dim) {
        return HashEncoder(table.data(), rows, dim, values.data(), values.data(), values);
    };
    CHECK(throws<std::invalid_argument>([&] { make(3, 4); }, "table: expected a power of two"));
    CHECK(throws<std::invalid_argument>([&] { make(1, 4); }, "table: expected a power of two"));
    CHECK(throws<std::invalid_argument>([&] { make(4, 0); }, "table: expected at least one"));
    make(4, 3);
    values[2] = NAN;
    CHECK(throws<std::invalid_argument>([&] { make(4, 3); }, "row_scale: expected finite"));
}

}  // namespace

int main() {
    any_bytes_are_fine();
    long_texts_are_clipped();
    wrong_tables_are_named();
    CHECK(hash_features("", 16).size() == 10);
    CHECK(hash_features(std::string_view("\0 \t\n", 4), 16).size() == 10);
}
