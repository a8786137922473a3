// What the load's client is told, and what it reads before it starts.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace load {

inline constexpr std::size_t kPrefixBytes = 5;

[[noreturn]] inline void fail(const std::string& text) {
    std::fprintf(stderr, "load: %s\n", text.c_str());
    std::exit(1);
}

struct Options {
    std::string unix_path, host, port, messages, method = "Route", samples;
    double rate = 0.0;            // calls a second, open loop
    unsigned long in_flight = 0;  // closed loop
    double seconds = 1.0, warm_up = 0.0, grace = 2.0;
    unsigned long connections = 2, candidates = 0, rows = 1;
    unsigned long timeout_from_us = 0, timeout_to_us = 0;  // deadlines, drawn between; 0: none
    unsigned long cancel_from_us = 0, cancel_to_us = 0;    // after which a call is cancelled
    unsigned long pid = 0;                                 // whose CPU time is read
    unsigned long answers = 0, series = 0;                 // 1: printed too
    unsigned long seed = 1;
};

// Pairs of a name and a value.
inline Options parse(int argc, char** argv) {
    Options o;
    const std::map<std::string_view, std::variant<std::string*, double*, unsigned long*>> known{
        {"--unix", &o.unix_path},
        {"--host", &o.host},
        {"--port", &o.port},
        {"--messages", &o.messages},
        {"--method", &o.method},
        {"--samples", &o.samples},
        {"--rate", &o.rate},
        {"--seconds", &o.seconds},
        {"--warm-up", &o.warm_up},
        {"--grace", &o.grace},
        {"--in-flight", &o.in_flight},
        {"--connections", &o.connections},
        {"--candidates", &o.candidates},
        {"--rows", &o.rows},
        {"--timeout-from-us", &o.timeout_from_us},
        {"--timeout-to-us", &o.timeout_to_us},
        {"--cancel-from-us", &o.cancel_from_us},
        {"--cancel-to-us", &o.cancel_to_us},
        {"--pid", &o.pid},
        {"--answers", &o.answers},
        {"--series", &o.series},
        {"--seed", &o.seed},
    };
    for (int i = 1; i + 1 < argc; i += 2) {
        const auto found = known.find(argv[i]);
        if (found == known.end()) fail(std::string("unknown argument ") + argv[i]);
        const char* value = argv[i + 1];
        if (const auto text = std::get_if<std::string*>(&found->second)) **text = value;
        if (const auto real = std::get_if<double*>(&found->second)) **real = std::atof(value);
        if (const auto whole = std::get_if<unsigned long*>(&found->second))
            **whole = std::strtoul(value, nullptr, 10);
    }
    if (argc % 2 == 0 || (o.rate > 0) == (o.in_flight > 0) || !o.connections || !o.candidates ||
        o.messages.empty())
        fail("expected --messages, --candidates and one of --rate and --in-flight");
    return o;
}

// gRPC frames, one after the other.
inline std::vector<std::string> read_messages(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::string all{std::istreambuf_iterator<char>(file), {}};
    std::vector<std::string> messages;
    for (std::size_t at = 0; at + kPrefixBytes <= all.size();) {
        std::size_t size = 0;
        for (std::size_t i = 1; i < kPrefixBytes; ++i)
            size = size << 8 | static_cast<unsigned char>(all[at + i]);
        messages.push_back(all.substr(at, kPrefixBytes + size));
        at += kPrefixBytes + size;
    }
    if (messages.empty()) fail("--messages: expected gRPC frames, got none");
    return messages;
}

// User and system time of a process so far.
inline double cpu_s(unsigned long pid) {
    std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    const auto end = text.rfind(')');
    unsigned long user = 0, system = 0;
    if (end == std::string::npos ||
        std::sscanf(text.c_str() + end + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu",
                    &user, &system) != 2)
        return 0.0;
    return static_cast<double>(user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

}  // namespace load
