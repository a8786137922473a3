#include <cmath>

#include "fixture.hpp"
#include "random.hpp"

int main() {
    using namespace proteus;
    // known answers of Random123
    using Words = std::array<std::uint32_t, 4>;
    constexpr std::uint32_t kOnes = 0xFFFFFFFFu;
    CHECK((philox({0, 0, 0, 0}, {0, 0}) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
    CHECK((philox({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}) ==
           Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
    CHECK((philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
           Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));

    CHECK(open_uniform(0) > 0.0);
    CHECK(static_cast<float>(open_uniform(kOnes)) < 1.0f);

    for (const auto& [a, b] : {std::pair{1.0, 1.0}, {1.0, 33.0}, {2.5, 1.5}, {40.0, 3.0}}) {
        constexpr int kSamples = 20000;
        double sum = 0.0;
        for (int i = 0; i < kSamples; ++i) {
            const double value = sample_beta(a, b, 7, i);
            CHECK(value > 0.0 && value < 1.0);
            sum += value;
        }
        CHECK(sample_beta(a, b, 7, 3) == sample_beta(a, b, 7, 3));
        const double mean = a / (a + b);
        const double deviation = std::sqrt(mean * (1.0 - mean) / (a + b + 1.0) / kSamples);
        CHECK(std::fabs(sum / kSamples - mean) < 5.0 * deviation);
    }
}
