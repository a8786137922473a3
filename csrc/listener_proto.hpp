// Protobuf of the messages that the listener reads and writes itself (proteus.proto), no others.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace proteus {

inline constexpr std::size_t kMaxBatchRows = 65'536;
inline constexpr std::size_t kMaxNames = 4096;

}  // namespace proteus

namespace proteus::proto {

// Strings of a request. What is more than a request may have is counted, and not kept.
struct Texts {
    std::vector<std::string_view> kept;
    std::size_t count = 0;
};

struct RouteRequest {
    enum class Input : std::uint8_t { kNone, kText, kEmbedding };

    Input input = Input::kNone;  // the last one that came
    std::string_view bytes;      // of the input
    std::optional<double> tau;
    Texts available;
    bool strict = false;
    std::int32_t mode = 0;
    std::int32_t guarantee = 0;
};

struct RouteBatchRequest {
    Texts texts;
    std::string_view embeddings;
    std::uint32_t rows = 0;
    std::vector<double> tau;
    Texts available;
    bool strict = false;
    std::int32_t mode = 0;
    std::int32_t guarantee = 0;
};

struct HealthCheckRequest {
    std::string_view service;
};

// False where `data` is no such message. Views refer to `data`; vectors keep their memory.
bool parse(std::string_view data, RouteRequest& out);
bool parse(std::string_view data, RouteBatchRequest& out);
bool parse(std::string_view data, HealthCheckRequest& out);

bool is_utf8(std::string_view text);

void put_varint(std::string& out, std::uint64_t value);

// Fields as proto3 writes them: the first four leave a zero out.
void put_uint(std::string& out, unsigned field, std::uint64_t value);
void put_int(std::string& out, unsigned field, std::int32_t value);
void put_float(std::string& out, unsigned field, float value);
void put_text(std::string& out, unsigned field, std::string_view value);
void put_double(std::string& out, unsigned field, double value);
void put_bytes(std::string& out, unsigned field, std::string_view value);

// Packed fields; nothing for an empty vector.
void put_packed(std::string& out, unsigned field, const std::vector<float>& values);
void put_packed(std::string& out, unsigned field, const std::vector<double>& values);
void put_packed(std::string& out, unsigned field, const std::vector<std::int32_t>& values);

}  // namespace proteus::proto
