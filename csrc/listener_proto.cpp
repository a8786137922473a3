#include "listener_proto.hpp"

#include <bit>
#include <cstring>
#include <limits>

namespace proteus::proto {
namespace {

static_assert(std::endian::native == std::endian::little, "numbers are copied as they lie");

enum WireType : std::uint32_t { kVarint, kFixed64, kBytes, kGroup, kEndGroup, kFixed32 };

// As deep as Google's parsers nest groups.
constexpr int kMaxDepth = 100;

class Reader {
  public:
    explicit Reader(std::string_view data) : at_(data.data()), end_(at_ + data.size()) {}

    bool done() const { return at_ == end_; }

    // Each is false at a malformed or cut-off value.
    bool varint(std::uint64_t& value) {
        value = 0;
        for (unsigned shift = 0; shift < 70; shift += 7) {
            if (at_ == end_) return false;
            const auto byte = static_cast<std::uint8_t>(*at_++);
            value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
            if (byte < 0x80) return true;
        }
        return false;
    }

    bool tag(std::uint32_t& field, std::uint32_t& type) {
        std::uint64_t value;
        if (!short_varint(value)) return false;
        field = static_cast<std::uint32_t>(value >> 3);
        type = static_cast<std::uint32_t>(value & 7);
        return field != 0;
    }

    bool bytes(std::string_view& value) {
        std::uint64_t size;
        if (!short_varint(size) || size > static_cast<std::uint64_t>(end_ - at_)) return false;
        value = {at_, static_cast<std::size_t>(size)};
        at_ += size;
        return true;
    }

    bool text(std::string_view& value) { return bytes(value) && is_utf8(value); }

    template <typename T>
    bool fixed(T& value) {
        if (static_cast<std::size_t>(end_ - at_) < sizeof value) return false;
        std::memcpy(&value, at_, sizeof value);
        at_ += sizeof value;
        return true;
    }

    // A field that this version does not know.
    bool skip(std::uint32_t field, std::uint32_t type, int depth = 0) {
        std::uint64_t number;
        std::uint32_t half;
        std::string_view view;
        switch (type) {
            case kVarint:
                return varint(number);
            case kFixed64:
                return fixed(number);
            case kBytes:
                return bytes(view);
            case kFixed32:
                return fixed(half);
            case kGroup:
                break;
            default:
                return false;
        }
        if (depth >= kMaxDepth) return false;
        for (;;) {
            std::uint32_t inner, inner_type;
            if (!tag(inner, inner_type)) return false;
            if (inner_type == kEndGroup) return inner == field;
            if (!skip(inner, inner_type, depth + 1)) return false;
        }
    }

  private:
    // A tag or a length: 32 bits in at most five bytes.
    bool short_varint(std::uint64_t& value) {
        const char* begin = at_;
        return varint(value) && at_ - begin <= 5 &&
               value <= std::numeric_limits<std::uint32_t>::max();
    }

    const char* at_;
    const char* end_;
};

constexpr std::uint32_t key(std::uint32_t field, WireType type) { return field << 3 | type; }

// Integers and enums keep the low half of what came.
template <typename T>
bool read_int(Reader& reader, T& value) {
    std::uint64_t number;
    if (!reader.varint(number)) return false;
    value = static_cast<T>(static_cast<std::uint32_t>(number));
    return true;
}

bool read_bool(Reader& reader, bool& value) {
    std::uint64_t number;
    if (!reader.varint(number)) return false;
    value = number != 0;
    return true;
}

bool read_text(Reader& reader, Texts& texts, std::size_t most) {
    std::string_view text;
    if (++texts.count > most) return reader.bytes(text);
    if (!reader.text(text)) return false;
    texts.kept.push_back(text);
    return true;
}

bool read_doubles(Reader& reader, std::vector<double>& values) {
    std::string_view packed;
    if (!reader.bytes(packed) || packed.size() % sizeof(double)) return false;
    const std::size_t before = values.size();
    values.resize(before + packed.size() / sizeof(double));
    if (!packed.empty()) std::memcpy(values.data() + before, packed.data(), packed.size());
    return true;
}

// Calls read(key) for each field; it returns -1 for a field that it does not know, else success.
template <typename Read>
bool read_fields(Reader& reader, Read read) {
    while (!reader.done()) {
        std::uint32_t field, type;
        if (!reader.tag(field, type)) return false;
        const int known = read(field << 3 | type);
        if (known < 0 ? !reader.skip(field, type) : known == 0) return false;
    }
    return true;
}

void put_key(std::string& out, unsigned field, WireType type) { put_varint(out, key(field, type)); }

template <typename T>
void put_raw(std::string& out, const T& value) {
    out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

template <typename T>
void put_packed_raw(std::string& out, unsigned field, const std::vector<T>& values) {
    if (values.empty()) return;
    put_bytes(out, field,
              {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)});
}

std::size_t varint_size(std::uint64_t value) {
    return (static_cast<std::size_t>(std::bit_width(value | 1)) + 6) / 7;
}

// An int32 goes out as the 64 bits that it extends to.
std::uint64_t extended(std::int32_t value) {
    return static_cast<std::uint64_t>(static_cast<std::int64_t>(value));
}

}  // namespace

bool is_utf8(std::string_view text) {
    const auto* at = reinterpret_cast<const unsigned char*>(text.data());
    const auto* end = at + text.size();
    while (at != end) {
        std::uint64_t eight;
        if (end - at >= 8) {
            std::memcpy(&eight, at, 8);
            if (!(eight & 0x8080808080808080ull)) {
                at += 8;
                continue;
            }
        }
        const unsigned char lead = *at++;
        if (lead < 0x80) continue;
        const int more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
        if (lead < 0xC2 || lead > 0xF4 || end - at < more) return false;
        // the second byte decides what is overlong, a surrogate or past U+10FFFF
        const unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        const unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (*at < low || *at > high) return false;
        for (int i = 1; i < more; ++i)
            if ((at[i] & 0xC0) != 0x80) return false;
        at += more;
    }
    return true;
}

bool parse(std::string_view data, RouteRequest& out) {
    using Input = RouteRequest::Input;
    out.available.kept.clear();
    std::vector<std::string_view> kept = std::move(out.available.kept);
    out = {};
    out.available.kept = std::move(kept);
    Reader reader(data);
    return read_fields(reader, [&](std::uint32_t tag) -> int {
        switch (tag) {
            case key(1, kBytes):
                out.input = Input::kText;
                return reader.text(out.bytes);
            case key(2, kBytes):
                out.input = Input::kEmbedding;
                return reader.bytes(out.bytes);
            case key(3, kFixed64):
                return reader.fixed(out.tau.emplace());
            case key(4, kBytes):
                return read_text(reader, out.available, kMaxNames);
            case key(5, kVarint):
                return read_bool(reader, out.strict);
            case key(6, kVarint):
                return read_int(reader, out.mode);
            case key(7, kVarint):
                return read_int(reader, out.guarantee);
            default:
                return -1;
        }
    });
}

bool parse(std::string_view data, RouteBatchRequest& out) {
    out = {};
    Reader reader(data);
    return read_fields(reader, [&](std::uint32_t tag) -> int {
        switch (tag) {
            case key(1, kBytes):
                return read_text(reader, out.texts, kMaxBatchRows);
            case key(2, kBytes):
                return reader.bytes(out.embeddings);
            case key(3, kVarint):
                return read_int(reader, out.rows);
            case key(4, kFixed64):
                return reader.fixed(out.tau.emplace_back());
            case key(4, kBytes):
                return read_doubles(reader, out.tau);
            case key(5, kBytes):
                return read_text(reader, out.available, kMaxNames);
            case key(6, kVarint):
                return read_bool(reader, out.strict);
            case key(7, kVarint):
                return read_int(reader, out.mode);
            case key(8, kVarint):
                return read_int(reader, out.guarantee);
            default:
                return -1;
        }
    });
}

bool parse(std::string_view data, HealthCheckRequest& out) {
    out = {};
    Reader reader(data);
    return read_fields(reader, [&](std::uint32_t tag) -> int {
        return tag == key(1, kBytes) ? reader.text(out.service) : -1;
    });
}

void put_varint(std::string& out, std::uint64_t value) {
    for (; value >= 0x80; value >>= 7) out.push_back(static_cast<char>(value | 0x80));
    out.push_back(static_cast<char>(value));
}

void put_uint(std::string& out, unsigned field, std::uint64_t value) {
    if (!value) return;
    put_key(out, field, kVarint);
    put_varint(out, value);
}

void put_int(std::string& out, unsigned field, std::int32_t value) {
    put_uint(out, field, extended(value));
}

void put_float(std::string& out, unsigned field, float value) {
    // -0.0 is not the default
    if (!std::bit_cast<std::uint32_t>(value)) return;
    put_key(out, field, kFixed32);
    put_raw(out, value);
}

void put_text(std::string& out, unsigned field, std::string_view value) {
    if (!value.empty()) put_bytes(out, field, value);
}

void put_double(std::string& out, unsigned field, double value) {
    put_key(out, field, kFixed64);
    put_raw(out, value);
}

void put_bytes(std::string& out, unsigned field, std::string_view value) {
    put_key(out, field, kBytes);
    put_varint(out, value.size());
    out.append(value);
}

void put_packed(std::string& out, unsigned field, const std::vector<float>& values) {
    put_packed_raw(out, field, values);
}

void put_packed(std::string& out, unsigned field, const std::vector<double>& values) {
    put_packed_raw(out, field, values);
}

void put_packed(std::string& out, unsigned field, const std::vector<std::int32_t>& values) {
    if (values.empty()) return;
    std::size_t size = 0;
    for (const std::int32_t value : values) size += varint_size(extended(value));
    put_key(out, field, kBytes);
    put_varint(out, size);
    for (const std::int32_t value : values) put_varint(out, extended(value));
}

}  // namespace proteus::proto
