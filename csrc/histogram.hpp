// Counts of durations in fixed buckets of equal ratio; any thread may add, any may read, none
// waits.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace proteus {

class Histogram {
  public:
    // Four buckets an octave from 1.024 us to 68.7 s; the first and the last hold what is beyond.
    static constexpr int kFirstBit = 10;
    static constexpr int kLastBit = 36;
    static constexpr std::size_t kBuckets = (kLastBit - kFirstBit) * 4 + 2;

    using Counts = std::array<std::uint64_t, kBuckets>;

    // The bucket of a duration; a negative one counts as 0.
    static std::size_t bucket_of(std::int64_t ns) {
        const auto value = static_cast<std::uint64_t>(std::max<std::int64_t>(ns, 0));
        const int bit = std::bit_width(value) - 1;
        if (bit < kFirstBit) return 0;
        if (bit >= kLastBit) return kBuckets - 1;
        return static_cast<std::size_t>((bit - kFirstBit) * 4) + (value >> (bit - 2) & 3) + 1;
    }

    // The first nanosecond above a bucket; the last bucket has no such bound and gives 2^64 - 1.
    static std::uint64_t bound_ns(std::size_t bucket) {
        if (bucket + 1 >= kBuckets) return ~std::uint64_t{0};
        return std::uint64_t{4 + bucket % 4} << (kFirstBit - 2 + bucket / 4);
    }

    void add(std::int64_t ns) {
        counts_[bucket_of(ns)].fetch_add(1, std::memory_order_relaxed);
        sum_ns_.fetch_add(static_cast<std::uint64_t>(std::max<std::int64_t>(ns, 0)),
                          std::memory_order_relaxed);
    }

    std::uint64_t sum_ns() const { return sum_ns_.load(std::memory_order_relaxed); }

    Counts counts() const {
        Counts out;
        for (std::size_t i = 0; i < kBuckets; ++i)
            out[i] = counts_[i].load(std::memory_order_relaxed);
        return out;
    }

  private:
    std::array<std::atomic<std::uint64_t>, kBuckets> counts_{};
    std::atomic<std::uint64_t> sum_ns_{0};
};

}  // namespace proteus
