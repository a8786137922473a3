#include "listener_request.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "listener_proto.hpp"

namespace proteus {
namespace {

constexpr int kPolicyField = 2;  // MODE_POLICY

}  // namespace

Served::Served(std::shared_ptr<const Snapshot> given, std::vector<std::string> names_,
               std::optional<double> tau_max_[2][2], std::string versions_, bool text,
               bool embedding)
    : snapshot(std::move(given)),
      names(std::move(names_)),
      decides_text(text && snapshot->options.encoder),
      decides_embedding(embedding),
      versions(std::move(versions_)) {
    if (names.size() != snapshot->candidates)
        throw std::invalid_argument("names: expected " + std::to_string(snapshot->candidates) +
                                    ", got " + std::to_string(names.size()));
    for (unsigned i = 0; i < names.size(); ++i) {
        index.emplace(names[i], i);
        proto::put_bytes(fallback_fields.emplace_back(), 8, names[i]);
        proto::put_bytes(candidate_fields, 1, names[i]);
    }
    for (int m = 0; m < 2; ++m) std::copy(tau_max_[m], tau_max_[m] + 2, tau_max[m]);
}

bool all_finite(std::string_view bytes) {
    for (std::size_t i = 0; i + sizeof(float) <= bytes.size(); i += sizeof(float)) {
        float value;
        std::memcpy(&value, bytes.data() + i, sizeof value);
        if (!std::isfinite(value)) return false;
    }
    return true;
}

Options take_options(const Served& served, const proto::Texts& available, std::int32_t mode,
                     std::int32_t guarantee, Violations& violations) {
    Options options{.mode = served.snapshot->options.default_mode};
    if (available.count) options.available = 0;
    if (available.count > kMaxNames)
        violations.add("available", "expected at most " + std::to_string(kMaxNames) +
                                        " names, got " + std::to_string(available.count));
    for (std::size_t i = 0; i < available.count && available.count <= kMaxNames; ++i) {
        const auto found = served.index.find(available.kept[i]);
        if (found == served.index.end()) {
            violations.add("available[" + std::to_string(i) + "]",
                           "expected a candidate of the pool, got an unknown name");
        } else {
            options.available |= std::uint64_t{1} << found->second;
        }
    }
    const auto shown = [](std::int32_t value) {
        return "expected 0, 1 or 2, got " + std::to_string(value);
    };
    if (mode < 0 || mode > 2) {
        violations.add("mode", shown(mode));
    } else if (mode == kPolicyField && !served.snapshot->policy) {
        violations.add("mode",
                       "expected MODE_DUAL, got MODE_POLICY: this router has no policy network");
    } else if (mode != 0) {
        options.mode = mode == kPolicyField ? Mode::kPolicy : Mode::kDual;
    }
    if (guarantee < 0 || guarantee > 2) {
        violations.add("guarantee", shown(guarantee));
    } else if (guarantee == 2) {
        options.guarantee = Guarantee::kCalibrated;
    }
    return options;
}

void check_embeddings(const Served& served, const char* field, std::string_view bytes,
                      std::uint64_t rows, Violations& violations) {
    const std::uint64_t dim = served.snapshot->input_dim;
    const std::uint64_t expected = rows * dim * sizeof(float);
    if (!rows) {
        violations.add("rows", "expected the number of embeddings, got 0");
    } else if (bytes.size() != expected) {
        violations.add(field, "expected " + std::to_string(expected) + " bytes (" +
                                  std::to_string(rows) + " x " + std::to_string(dim) +
                                  " float32, little-endian), got " + std::to_string(bytes.size()));
    }
}

Refusal no_message(const char* type, std::size_t bytes) {
    return invalid("request", std::string("expected a proteus.v1.") + type + ", got " +
                                  std::to_string(bytes) + " bytes that are none");
}

Refusal no_candidate() {
    return precondition("NO_CANDIDATE", "available: expected an eligible candidate, got none");
}

Refusal infeasible(double tau, std::size_t rows, const std::optional<double>& tau_max) {
    if (!tau_max)
        return precondition(
            "INFEASIBLE",
            "tau: expected another mode: this one certifies no target, got " + repr(tau),
            {{"rows", std::to_string(rows)}});
    char shown[32];
    std::snprintf(shown, sizeof shown, "%g", *tau_max);
    return precondition(
        "INFEASIBLE",
        std::string("tau: expected at most ") + shown + " (tau_max), got " + repr(tau),
        {{"rows", std::to_string(rows)}, {"tau_max", shown}});
}

std::string outside(double tau) { return "expected a number in [0, 1], got " + repr(tau); }

// A floor is a step of the grid of targets, as float32.
double rounded(float floor) { return std::rint(static_cast<double>(floor) * 1e3) / 1e3; }

void put_timings(std::string& out, unsigned field,
                 const std::array<std::chrono::nanoseconds, 3>& spent) {
    std::string timings;
    for (unsigned i = 0; i < 3; ++i)
        proto::put_uint(timings, i + 1, std::max<std::int64_t>(0, spent[i].count()));
    proto::put_bytes(out, field, timings);
}

}  // namespace proteus
