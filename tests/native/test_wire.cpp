// The listener's protobuf, statuses and headers, on good and on random bytes.
#include <bit>
#include <cmath>
#include <limits>
#include <random>

#include "fixture.hpp"
#include "listener_proto.hpp"
#include "listener_status.hpp"

using namespace proteus;
using namespace std::string_literals;
using Input = proto::RouteRequest::Input;

namespace {

void fields_are_read() {
    std::string data;
    proto::put_text(data, 1, "a text");
    proto::put_double(data, 3, 0.25);
    proto::put_text(data, 4, "one");
    proto::put_bytes(data, 4, "");
    proto::put_uint(data, 5, 7);
    proto::put_int(data, 6, -1);
    proto::put_uint(data, 7, 1ull << 32 | 2);
    proto::RouteRequest request;
    CHECK(proto::parse(data, request));
    CHECK(request.input == Input::kText && request.bytes == "a text" && request.tau == 0.25);
    CHECK(request.available.count == 2 && request.available.kept[0] == "one" && request.strict);
    CHECK(request.mode == -1 && request.guarantee == 2);
    // the last one of the input counts, an unknown field does not
    proto::put_bytes(data, 2, "\xFF\xFE");
    proto::put_bytes(data, 1000, "\xFF");
    CHECK(proto::parse(data, request));
    CHECK(request.input == Input::kEmbedding && request.bytes == "\xFF\xFE");
    CHECK(proto::parse("", request) && request.input == Input::kNone && !request.tau);
    CHECK(!request.available.count && !request.strict);
}

void no_more_than_a_request_may_have_is_kept() {
    std::string data;
    for (std::size_t i = 0; i < kMaxBatchRows + 10; ++i) proto::put_bytes(data, 1, "");
    for (std::size_t i = 0; i < kMaxNames + 10; ++i) proto::put_bytes(data, 5, "a");
    proto::RouteBatchRequest request;
    CHECK(proto::parse(data, request));
    CHECK(request.texts.count == kMaxBatchRows + 10 && request.texts.kept.size() == kMaxBatchRows);
    CHECK(request.available.count == kMaxNames + 10 && request.available.kept.size() == kMaxNames);
}

void repeated_numbers_come_packed_or_not() {
    std::string data;
    proto::put_packed(data, 4, std::vector<double>{0.5, 1.5});
    proto::put_double(data, 4, -0.0);
    proto::put_packed(data, 4, std::vector<double>{});
    proto::put_bytes(data, 4, "");
    proto::RouteBatchRequest request;
    CHECK(proto::parse(data, request));
    CHECK((request.tau == std::vector<double>{0.5, 1.5, -0.0}));
    data.clear();
    proto::put_bytes(data, 4, "1234567");
    CHECK(!proto::parse(data, request));
}

void malformed_messages_are_refused() {
    proto::RouteRequest request;
    std::string group;
    for (int depth = 1; depth <= 101; ++depth) {
        group = "\x4B" + group + "\x4C";
        CHECK(proto::parse(group, request) == (depth <= 100));
    }
    for (const std::string& data :
         {"\x0A"s, "\x0A\x7F"s + "abc", "\x0A\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x7F"s, "\x4B"s,
          "\x4C"s, "\x4B\x54"s, "\x28"s + std::string(11, '\xFF'), "\x0A\x01\xFF"s, "\x22\x01\xFF"s,
          "\x19\x00\x00"s, "\x00\x00"s, "\x07"s, "\x06"s, "\x0A\x81\x80\x80\x80\x80\x00x"s,
          "\xFF\xFF\xFF\xFF\xFF\x01\x00"s, "\x80\x80\x80\x80\x10\x00"s})
        CHECK(!proto::parse(data, request));
    std::string whole;
    proto::put_bytes(whole, 2, std::string(50, 'x'));
    proto::put_double(whole, 3, 0.5);
    for (std::size_t size = 1; size < whole.size(); ++size)
        CHECK(proto::parse(std::string_view(whole).substr(0, size), request) == (size == 52));
}

void utf8_is_checked() {
    for (const std::string& good :
         {""s, "a\0b"s, "\x7F"s, "\xC2\x80"s, "\xDF\xBF"s, "\xE0\xA0\x80"s, "\xED\x9F\xBF"s,
          "\xEE\x80\x80"s, "\xF0\x90\x80\x80"s, "\xF4\x8F\xBF\xBF"s})
        for (std::size_t pad = 0; pad < 20; ++pad)
            CHECK(proto::is_utf8(std::string(pad, 'x') + good + std::string(pad, 'y')));
    for (const std::string& bad :
         {"\x80"s, "\xC0\x80"s, "\xC1\xBF"s, "\xC2"s, "\xE0\x9F\xBF"s, "\xED\xA0\x80"s, "\xE2\x82"s,
          "\xF0\x8F\xBF\xBF"s, "\xF4\x90\x80\x80"s, "\xF5\x80\x80\x80"s, "\xF0\x90\x80"s, "\xC3("s,
          "\xE2(\xA1"s, "\xFF"s})
        for (std::size_t pad = 0; pad < 20; ++pad)
            CHECK(!proto::is_utf8(std::string(pad, 'x') + bad));
}

void random_bytes_are_fine() {
    std::mt19937 random(3);
    proto::RouteRequest route;
    proto::RouteBatchRequest batch;
    proto::HealthCheckRequest health;
    int parsed = 0;
    for (int i = 0; i < 100'000; ++i) {
        std::string data(random() % 40, '\0');
        for (char& c : data) c = static_cast<char>(random() % 4 ? random() % 64 : random());
        parsed += proto::parse(data, route);
        parsed += proto::parse(data, batch);
        parsed += proto::parse(data, health);
    }
    CHECK(parsed > 1000);
}

void zeros_are_left_out() {
    std::string out;
    proto::put_uint(out, 1, 0);
    proto::put_int(out, 1, 0);
    proto::put_float(out, 1, 0.0f);
    proto::put_text(out, 1, "");
    proto::put_packed(out, 1, std::vector<std::int32_t>{});
    CHECK(out.empty());
    proto::put_float(out, 1, -0.0f);
    CHECK(out == "\x0D\x00\x00\x00\x80"s);
    out.clear();
    proto::put_packed(out, 2, std::vector<std::int32_t>{1, -1, 300});
    CHECK(out == "\x12\x0D\x01\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01\xAC\x02"s);
}

void headers_are_encoded() {
    CHECK(base64("") == "" && base64("f") == "Zg" && base64("fo") == "Zm8");
    CHECK(base64("foo") == "Zm9v" && base64("\xFF\xFE\xFD\xFC") == "//79/A");
    CHECK(percent_encoded("50% \xC3\xBC\n~") == "50%25 %C3%BC%0A~");
    using namespace std::chrono_literals;
    CHECK(parse_timeout("1S") == 1s && parse_timeout("99999999u") == 99999999us);
    CHECK(parse_timeout("250m") == 250ms && parse_timeout("3H") == 3h &&
          parse_timeout("7n") == 7ns);
    CHECK(*parse_timeout("99999999H") > 24h * 365 && *parse_timeout("99999999M") > 24h * 365);
    for (const char* bad : {"", "S", "1", "-1S", "1s", "1 S", "999999999S", "x1S", "1.5S", "+1S"})
        CHECK(!parse_timeout(bad));
}

void numbers_are_shown_as_python_shows_them() {
    const std::pair<double, const char*> cases[] = {
        {0.5, "0.5"},       {1.0, "1.0"},      {-0.0, "-0.0"},
        {1e-300, "1e-300"}, {1e16, "1e+16"},   {1e15, "1000000000000000.0"},
        {1e-5, "1e-05"},    {1e-4, "0.0001"},  {1.0000001, "1.0000001"},
        {1e308, "1e+308"},  {5e-324, "5e-324"}};
    for (const auto& [value, text] : cases) CHECK(repr(value) == text);
    const double infinity = std::numeric_limits<double>::infinity();
    CHECK(repr(std::nan("")) == "nan" && repr(infinity) == "inf" && repr(-infinity) == "-inf");
}

void an_error_stays_small() {
    Violations violations;
    for (int i = 0; i < 100'000; ++i) violations.add("field", "expected much, got nothing");
    const Refusal refusal = invalid(violations);
    CHECK(refusal.details.size() < 4096 && refusal.text.ends_with("; and 99984 more"));
}

}  // namespace

int main() {
    fields_are_read();
    repeated_numbers_come_packed_or_not();
    no_more_than_a_request_may_have_is_kept();
    malformed_messages_are_refused();
    utf8_is_checked();
    random_bytes_are_fine();
    zeros_are_left_out();
    headers_are_encoded();
    numbers_are_shown_as_python_shows_them();
    an_error_stays_small();
}
