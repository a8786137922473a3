// What a call is refused with: gRPC statuses and their details, the table of server/errors.py.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace proteus {

enum class Code : std::uint8_t {
    kOk = 0,
    kInvalidArgument = 3,
    kDeadlineExceeded = 4,
    kNotFound = 5,
    kResourceExhausted = 8,
    kFailedPrecondition = 9,
    kUnimplemented = 12,
    kInternal = 13,
    kUnavailable = 14,
};

struct Refusal {
    int code;
    std::string text;
    std::string details;   // google.rpc.Status in base64; may be empty
    bool repeats = false;  // word for word: worth a place in the peers' header tables
};

// Pairs of a field and "expected X, got Y"; the first few are kept, all are counted.
class Violations {
  public:
    void add(std::string field, std::string text);
    std::size_t size() const { return count_; }
    const std::vector<std::pair<std::string, std::string>>& shown() const { return shown_; }

  private:
    std::size_t count_ = 0;
    std::vector<std::pair<std::string, std::string>> shown_;
};

Refusal invalid(const Violations& violations);
Refusal invalid(std::string field, std::string text);
Refusal precondition(const std::string& reason, std::string text,
                     const std::vector<std::pair<std::string, std::string>>& metadata = {});
const Refusal& overloaded();
const Refusal& unavailable();
const Refusal& deadline_exceeded();
Refusal plain(Code code, std::string text);

// A number as Python's repr shows it.
std::string repr(double value);

// Values of the headers grpc-message and grpc-status-details-bin.
std::string percent_encoded(std::string_view text);
std::string base64(std::string_view bytes);

// The header grpc-timeout; none where it is malformed.
std::optional<std::chrono::nanoseconds> parse_timeout(std::string_view text);

}  // namespace proteus
