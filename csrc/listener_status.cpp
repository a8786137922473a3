#include "listener_status.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "listener_proto.hpp"

namespace proteus {
namespace {

// An error travels twice in the trailing metadata, of which many peers take 8 KiB at most.
constexpr std::size_t kMostViolations = 16;
constexpr std::int32_t kRetryAfterNs = 100'000'000;

// google.rpc.Status with one detail, or none where `type` is empty.
Refusal make_refusal(Code code, std::string text, std::string_view type = {},
                     std::string_view detail = {}) {
    Refusal refusal{static_cast<int>(code), std::move(text), {}};
    std::string status;
    proto::put_int(status, 1, refusal.code);
    proto::put_text(status, 2, refusal.text);
    if (!type.empty()) {
        std::string any;
        proto::put_text(any, 1, "type.googleapis.com/google.rpc." + std::string(type));
        proto::put_text(any, 2, detail);
        proto::put_bytes(status, 3, any);
    }
    refusal.details = base64(status);
    return refusal;
}

Refusal repeated(Refusal refusal) {
    refusal.repeats = true;
    return refusal;
}

std::string retry_info() {
    std::string duration, info;
    proto::put_int(duration, 2, kRetryAfterNs);
    proto::put_bytes(info, 1, duration);
    return info;
}

}  // namespace

void Violations::add(std::string field, std::string text) {
    if (count_++ < kMostViolations) shown_.emplace_back(std::move(field), std::move(text));
}

Refusal invalid(const Violations& violations) {
    std::string text, bad_request;
    for (const auto& [field, expected] : violations.shown()) {
        if (!text.empty()) text += "; ";
        text += field + ": " + expected;
        std::string violation;
        proto::put_text(violation, 1, field);
        proto::put_text(violation, 2, expected);
        proto::put_bytes(bad_request, 1, violation);
    }
    if (const std::size_t more = violations.size() - violations.shown().size())
        text += "; and " + std::to_string(more) + " more";
    return make_refusal(Code::kInvalidArgument, std::move(text), "BadRequest", bad_request);
}

Refusal invalid(std::string field, std::string text) {
    Violations violations;
    violations.add(std::move(field), std::move(text));
    return invalid(violations);
}

Refusal precondition(const std::string& reason, std::string text,
                     const std::vector<std::pair<std::string, std::string>>& metadata) {
    std::string info;
    proto::put_text(info, 1, reason);
    proto::put_text(info, 2, "proteus.v1");
    for (const auto& [name, value] : metadata) {
        std::string entry;
        proto::put_bytes(entry, 1, name);
        proto::put_bytes(entry, 2, value);
        proto::put_bytes(info, 3, entry);
    }
    return make_refusal(Code::kFailedPrecondition, std::move(text), "ErrorInfo", info);
}

// Made once: an overloaded server has no time to make them.
const Refusal& overloaded() {
    static const Refusal made = repeated(
        make_refusal(Code::kResourceExhausted, "queue: expected a free place, got a full queue",
                     "RetryInfo", retry_info()));
    return made;
}

const Refusal& unavailable() {
    static const Refusal made = repeated(make_refusal(
        Code::kUnavailable, "server: draining, no new calls", "RetryInfo", retry_info()));
    return made;
}

const Refusal& deadline_exceeded() {
    static const Refusal made = repeated(
        make_refusal(Code::kDeadlineExceeded, "deadline: passed before the decision was made"));
    return made;
}

Refusal plain(Code code, std::string text) { return {static_cast<int>(code), std::move(text), {}}; }

std::string repr(double value) {
    if (std::isnan(value)) return "nan";
    if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
    char buffer[40];
    const double size = std::fabs(value);
    const bool fixed = value == 0 || (size >= 1e-4 && size < 1e16);
    const auto end = std::to_chars(std::begin(buffer), std::end(buffer), value,
                                   fixed ? std::chars_format::fixed : std::chars_format::scientific)
                         .ptr;
    std::string text(buffer, end);
    if (fixed && text.find('.') == std::string::npos) text += ".0";
    return text;
}

std::string percent_encoded(std::string_view text) {
    constexpr char kHex[] = "0123456789ABCDEF";
    std::string out;
    for (const char c : text) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte >= 0x20 && byte <= 0x7E && byte != '%') {
            out += c;
        } else {
            out += {'%', kHex[byte >> 4], kHex[byte & 15]};
        }
    }
    return out;
}

std::string base64(std::string_view bytes) {
    constexpr char kLetters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string out;
    out.reserve((bytes.size() + 2) / 3 * 4);
    for (std::size_t i = 0; i < bytes.size(); i += 3) {
        std::uint32_t group = 0;
        const std::size_t n = std::min<std::size_t>(3, bytes.size() - i);
        for (std::size_t k = 0; k < 3; ++k)
            group = group << 8 | (k < n ? static_cast<unsigned char>(bytes[i + k]) : 0);
        // unpadded, as gRPC asks of a sender
        for (std::size_t k = 0; k <= n; ++k) out += kLetters[group >> (18 - 6 * k) & 63];
    }
    return out;
}

std::optional<std::chrono::nanoseconds> parse_timeout(std::string_view text) {
    if (text.size() < 2 || text.size() > 9) return std::nullopt;
    std::int64_t amount;
    const char* last = text.data() + text.size() - 1;
    const auto [end, error] = std::from_chars(text.data(), last, amount);
    if (error != std::errc() || end != last || amount < 0) return std::nullopt;
    using namespace std::chrono;
    switch (*last) {
        case 'H':
            // more would leave the clock's range
            return hours(std::min<std::int64_t>(amount, 24 * 365 * 100));
        case 'M':
            return minutes(amount);
        case 'S':
            return seconds(amount);
        case 'm':
            return milliseconds(amount);
        case 'u':
            return microseconds(amount);
        case 'n':
            return nanoseconds(amount);
        default:
            return std::nullopt;
    }
}

}  // namespace proteus
