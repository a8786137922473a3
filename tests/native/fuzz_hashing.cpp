// libFuzzer: the hash encoder on any bytes. The first four bytes are options, the rest is cut into
// a batch of texts.
#include <algorithm>
#include <cmath>
#include <set>

#include "fixture.hpp"
#include "hashing.hpp"

namespace {

using namespace proteus;

// Values as far out as a checkpoint may have them (MAX_MAGNITUDE and block_weight in
// checkpoint.py).
constexpr float kMost = 1e5f;
constexpr float kMostWeight = 1e3f;

const HashEncoder& encoder_of(unsigned option) {
    static const auto encoders = [] {
        std::vector<HashEncoder> made;
        const std::size_t dims[] = {1, 16, 37, 100};
        for (std::size_t i = 0; i < 16; ++i) {
            const std::size_t rows = i % 2 ? 4096 : 2;
            const std::size_t dim = dims[i / 4];
            std::vector<std::int8_t> table(rows * dim);
            for (std::size_t at = 0; at < table.size(); ++at)
                table[at] = static_cast<std::int8_t>(i / 2 % 2 ? -128 : at * 37);
            std::vector<float> idf(rows);
            std::vector<float> scale(rows, i / 2 % 2 ? kMost : 0.01f);
            for (std::size_t r = 0; r < rows; ++r) {
                const float values[] = {kMost, 1.0f, 0.0f, -1.0f, 1e-22f, -kMost, 1e-42f, 3.5f};
                idf[r] = values[r % std::size(values)];
            }
            const std::vector<float> weights{kMostWeight, 0.0f, 1.0f, 0.25f};
            made.emplace_back(table.data(), rows, dim, scale.data(), idf.data(), weights);
        }
        return made;
    }();
    return encoders[option % encoders.size()];
}

void check_features(std::string_view text, unsigned bits) {
    const auto first = hash_features(text, bits);
    CHECK(first.size() >= 1 && first.size() <= kMaxFeatures);
    const std::vector<Feature> kept(first.begin(), first.end());
    std::set<std::pair<std::uint32_t, unsigned>> pairs;
    std::uint64_t total = 0;
    for (const Feature& feature : kept) {
        CHECK(feature.row < 1u << bits && feature.block < kBlocks && feature.count > 0);
        CHECK(pairs.emplace(feature.row, feature.block).second);
        total += feature.count;
    }
    // ten of the shape, at most a word, a bigram and a 4-gram a byte
    CHECK(total <= 10 + 3 * (std::min(text.size(), 2 * kHeadBytes) + 2));
    CHECK(kept[0].block == 3);
    hash_features("another text between the two", bits);
    const auto again = hash_features(std::string(text), bits);
    CHECK(std::equal(kept.begin(), kept.end(), again.begin(), again.end(),
                     [](const Feature& a, const Feature& b) {
                         return a.row == b.row && a.block == b.block && a.count == b.count;
                     }));
}

void check_row_hash(std::string_view bytes) {
    std::vector<float> x(bytes.size() / sizeof(float));
    if (x.empty()) return;
    std::memcpy(x.data(), bytes.data(), x.size() * sizeof(float));
    const std::uint64_t hash = row_hash(x.data(), x.size(), 99);
    // zeros of both signs are one value
    for (float& value : x)
        if (value == 0.0f) value = -value;
    CHECK(row_hash(x.data(), x.size(), 99) == hash);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size < 4) return 0;
    const HashEncoder& encoder = encoder_of(data[0]);
    const unsigned bits = 1 + data[1] % 28;
    std::string bytes(reinterpret_cast<const char*>(data) + 4, size - 4);
    // repeated beyond what is used of a text
    if (data[3] & 1 && !bytes.empty())
        while (bytes.size() <= 2 * kHeadBytes + data[2]) bytes += bytes;
    const std::size_t slice = data[3] & 2 ? 1 + data[2] : bytes.size() + 1;
    std::vector<std::string> texts;
    for (std::size_t at = 0; at == 0 || (at < bytes.size() && texts.size() < 16); at += slice)
        texts.push_back(bytes.substr(at, slice));

    const std::size_t dim = encoder.dim();
    std::vector<float> batch(texts.size() * dim, NAN);
    for (std::size_t i = 0; i < texts.size(); ++i) encoder.encode(texts[i], &batch[i * dim]);
    for (const float value : batch) CHECK(std::isfinite(value));
    // each alone, in another order, from other memory and as it waits in a queue
    std::vector<float> single(dim);
    for (std::size_t i = texts.size(); i-- > 0;) {
        const auto same = [&] {
            return std::memcmp(single.data(), &batch[i * dim], dim * sizeof(float)) == 0;
        };
        encoder.encode(std::string(texts[i]), single.data());
        CHECK(same());
        const ClippedText stored(texts[i]);
        CHECK(stored.size == texts[i].size());
        encoder.encode(stored, single.data());
        CHECK(same());
    }
    check_features(texts.back(), bits);
    check_row_hash(bytes);
    return 0;
}
