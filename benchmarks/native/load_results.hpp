// What became of a call: its status, its latency, what the reply says.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "load_options.hpp"

namespace load {

using Ns = std::int64_t;

// statuses of gRPC, then what is none
enum : int { kOk = 0, kMalformed = 17, kReset, kUnanswered, kUnsent, kStatuses };
inline constexpr const char* kNames[kStatuses] = {"OK",
                                                  "CANCELLED",
                                                  "UNKNOWN",
                                                  "INVALID_ARGUMENT",
                                                  "DEADLINE_EXCEEDED",
                                                  "NOT_FOUND",
                                                  "ALREADY_EXISTS",
                                                  "PERMISSION_DENIED",
                                                  "RESOURCE_EXHAUSTED",
                                                  "FAILED_PRECONDITION",
                                                  "ABORTED",
                                                  "OUT_OF_RANGE",
                                                  "UNIMPLEMENTED",
                                                  "INTERNAL",
                                                  "UNAVAILABLE",
                                                  "DATA_LOSS",
                                                  "UNAUTHENTICATED",
                                                  "malformed",
                                                  "reset",
                                                  "unanswered",
                                                  "unsent"};

// Counts of durations: 64 buckets an octave, so that a quantile is within 1.6 %.
class Histogram {
  public:
    void add(Ns ns) {
        const auto value = static_cast<std::uint64_t>(std::max<Ns>(ns, 0));
        const int shift = std::max(0, static_cast<int>(std::bit_width(value)) - 7);
        const auto bucket = static_cast<std::size_t>(shift) * 64 + (value >> shift);
        if (bucket >= counts_.size()) counts_.resize(bucket + 1);
        ++counts_[bucket];
        ++count_;
        max_ = std::max(max_, ns);
    }
    // Upper bound of the bucket that holds it, in microseconds; 0 of nothing.
    double quantile_us(double q) const {
        auto left = static_cast<std::uint64_t>(std::ceil(q * static_cast<double>(count_)));
        for (std::size_t i = 0; i < counts_.size(); ++i) {
            if (left > counts_[i]) {
                left -= counts_[i];
                continue;
            }
            const std::size_t shift = i < 128 ? 0 : i / 64 - 1;
            const std::uint64_t bound = (i - shift * 64 + 1) << shift;
            return std::min(static_cast<double>(bound - 1), static_cast<double>(max_)) / 1e3;
        }
        return 0.0;
    }
    double max_us() const { return static_cast<double>(max_) / 1e3; }
    std::uint64_t count() const { return count_; }

  private:
    std::vector<std::uint32_t> counts_;
    std::uint64_t count_ = 0;
    Ns max_ = 0;
};

// What a reply says, of RouteReply or RouteBatchReply.
struct Reply {
    bool well_formed = false;
    std::uint64_t choice = 0;
    std::uint32_t score = 0;
    std::uint64_t spent_ns = 0;  // waiting, in a batch encoding and deciding too
    std::string_view versions;
};

inline bool take_varint(std::string_view& in, std::uint64_t& out) {
    out = 0;
    for (unsigned shift = 0; shift < 64 && !in.empty(); shift += 7) {
        const auto byte = static_cast<unsigned char>(in[0]);
        in.remove_prefix(1);
        out |= std::uint64_t{byte & 0x7Fu} << shift;
        if (byte < 0x80) return true;
    }
    return false;
}

// Calls on_field(number, value, bytes) for each field; false where `in` is no message.
template <typename F>
inline bool for_fields(std::string_view in, F on_field) {
    while (!in.empty()) {
        std::uint64_t key = 0, value = 0;
        if (!take_varint(in, key)) return false;
        std::string_view bytes;
        std::size_t size = 0;
        switch (key & 7) {
            case 0:
                if (!take_varint(in, value)) return false;
                break;
            case 1:
            case 5:
                size = (key & 7) == 1 ? 8 : 4;
                if (in.size() < size) return false;
                std::memcpy(&value, in.data(), size);
                in.remove_prefix(size);
                break;
            case 2:
                if (!take_varint(in, value) || in.size() < value) return false;
                bytes = in.substr(0, value);
                in.remove_prefix(value);
                break;
            default:
                return false;
        }
        on_field(key >> 3, value, bytes);
    }
    return true;
}

inline Reply parse_reply(std::string_view body, bool is_batch, std::size_t candidates,
                         std::size_t rows) {
    Reply reply;
    if (body.size() < kPrefixBytes || body[0] != 0) return reply;
    std::size_t size = 0;
    for (std::size_t i = 1; i < kPrefixBytes; ++i)
        size = size << 8 | static_cast<unsigned char>(body[i]);
    if (size != body.size() - kPrefixBytes) return reply;
    std::size_t found = is_batch ? 0 : 1;
    bool in_range = true, named = false;
    std::string_view timings;
    const unsigned timings_field = is_batch ? 8 : 9, versions_field = is_batch ? 9 : 10;
    const auto on_field = [&](std::uint64_t field, std::uint64_t value, std::string_view bytes) {
        if (field == 1) named = !bytes.empty();
        if (field == 2 && !is_batch) reply.choice = value;
        if (field == 2 && is_batch)
            for (std::uint64_t one = 0; !bytes.empty() && take_varint(bytes, one); ++found)
                in_range = in_range && one < candidates;
        if (field == 4 && !is_batch) reply.score = static_cast<std::uint32_t>(value);
        if (field == timings_field) timings = bytes;
        if (field == versions_field) reply.versions = bytes;
    };
    if (!for_fields(body.substr(kPrefixBytes), on_field)) return reply;
    for_fields(timings, [&](std::uint64_t field, std::uint64_t value, std::string_view) {
        if (field == 1 || is_batch) reply.spent_ns += value;
    });
    reply.well_formed = named && in_range && reply.choice < candidates && found == rows;
    return reply;
}

struct Window {
    std::uint64_t refused = 0;
    Histogram latency;
};

// What a run has come to.
struct Results {
    void print(const Options& o) const;

    double cpu_before = 0.0, cpu_after = 0.0;
    std::uint64_t completed_before = 0, completed_after = 0, completed = 0, sent = 0;
    std::uint64_t ok_in_time = 0;  // of calls that are counted, before the end
    std::uint64_t by_status[kStatuses] = {};
    std::uint64_t late_decided = 0, late_answered = 0, out_of_time = 0;
    Histogram latency, refused, lag;
    std::vector<Window> windows;
    std::map<std::string, std::uint64_t> answers;
};

// One line of JSON.
inline void Results::print(const Options& o) const {
    std::uint64_t all = 0;
    for (const std::uint64_t n : by_status) all += n;
    const std::uint64_t in_window = completed_after - completed_before;
    const double per_call =
        o.pid && in_window ? (cpu_after - cpu_before) / static_cast<double>(in_window) * 1e6 : 0;
    const double ok = static_cast<double>(ok_in_time);
    std::printf("{\"calls\": %lu, \"sent\": %lu, \"ok\": %lu, \"errors\": %lu", all, sent,
                by_status[kOk], all - by_status[kOk]);
    std::printf(", \"rate\": %.1f, \"decisions_per_s\": %.1f, \"offered_per_s\": %.1f",
                static_cast<double>(in_window) / o.seconds,
                ok * static_cast<double>(o.rows) / o.seconds, static_cast<double>(all) / o.seconds);
    std::printf(", \"p50_us\": %.1f, \"p99_us\": %.1f, \"p999_us\": %.1f, \"max_us\": %.1f",
                latency.quantile_us(0.5), latency.quantile_us(0.99), latency.quantile_us(0.999),
                latency.max_us());
    std::printf(", \"error_p50_us\": %.1f, \"error_p99_us\": %.1f, \"error_max_us\": %.1f",
                refused.quantile_us(0.5), refused.quantile_us(0.99), refused.max_us());
    std::printf(", \"send_lag_p50_us\": %.1f, \"send_lag_p99_us\": %.1f", lag.quantile_us(0.5),
                lag.quantile_us(0.99));
    std::printf(", \"server_cpu_us_per_call\": %.2f, \"server_cpu\": %.3f", per_call,
                (cpu_after - cpu_before) / o.seconds);
    std::printf(", \"late_decided\": %lu, \"late_answered\": %lu, \"cancelled_by_client\": %lu",
                late_decided, late_answered, out_of_time);
    std::printf(", \"by_status\": {");
    const char* comma = "";
    for (int i = 0; i < kStatuses; ++i) {
        if (!by_status[i]) continue;
        std::printf("%s\"%s\": %lu", comma, kNames[i], by_status[i]);
        comma = ", ";
    }
    std::printf("}");
    if (o.series) {
        std::printf(", \"series\": [");
        comma = "";
        for (const Window& window : windows) {
            std::printf("%s[%lu, %lu, %.1f]", comma, window.latency.count(), window.refused,
                        window.latency.quantile_us(0.99));
            comma = ", ";
        }
        std::printf("]");
    }
    if (o.answers) {
        // message, choice, bits of the score, versions as hexadecimal bytes, how often
        std::printf(", \"answers\": [");
        comma = "";
        for (const auto& [key, count] : answers) {
            std::uint32_t score;
            std::size_t message;
            std::memcpy(&score, key.data(), sizeof score);
            std::memcpy(&message, key.data() + sizeof score + 1, sizeof message);
            std::printf("%s[%zu, %d, %u, \"", comma, message, key[sizeof score], score);
            for (std::size_t i = sizeof score + 1 + sizeof message; i < key.size(); ++i)
                std::printf("%02x", static_cast<unsigned char>(key[i]));
            std::printf("\", %lu]", count);
            comma = ", ";
        }
        std::printf("]");
    }
    std::printf("}\n");
}

}  // namespace load
