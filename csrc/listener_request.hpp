// What Route and RouteBatch share: the router that is served, checks of a request, refusals.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "listener_proto.hpp"
#include "listener_status.hpp"
#include "snapshot.hpp"

namespace proteus {

// One loaded router and what its replies say of it. Immutable; swapped by one pointer.
struct Served {
    // tau_max[mode][guarantee] is the largest target, none where there is none; `versions` a
    // serialised proteus.v1.Versions. Throws std::invalid_argument.
    Served(std::shared_ptr<const Snapshot> snapshot, std::vector<std::string> names,
           std::optional<double> tau_max[2][2], std::string versions, bool decides_text,
           bool decides_embedding);

    const std::optional<double>& largest(Mode mode, Guarantee guarantee) const {
        return tau_max[static_cast<int>(mode)][static_cast<int>(guarantee)];
    }

    std::shared_ptr<const Snapshot> snapshot;
    std::vector<std::string> names;
    std::map<std::string, unsigned, std::less<>> index;
    std::optional<double> tau_max[2][2];
    bool decides_text;       // others are Python's
    bool decides_embedding;  // as above

    // fields of the replies, serialised
    std::vector<std::string> fallback_fields;
    std::string candidate_fields;
    std::string versions;
};

// What a request allows and asks for.
struct Options {
    std::uint64_t available = ~std::uint64_t{0};
    Mode mode;
    Guarantee guarantee = Guarantee::kCertified;
};

Options take_options(const Served& served, const proto::Texts& available, std::int32_t mode,
                     std::int32_t guarantee, Violations& violations);
void check_embeddings(const Served& served, const char* field, std::string_view bytes,
                      std::uint64_t rows, Violations& violations);

inline bool in_range(double tau) { return tau >= 0.0 && tau <= 1.0; }
std::string outside(double tau);
bool all_finite(std::string_view bytes);

Refusal no_message(const char* type, std::size_t bytes);
Refusal no_candidate();
Refusal infeasible(double tau, std::size_t rows, const std::optional<double>& tau_max);

// A floor as the reply gives it.
double rounded(float floor);

inline std::int64_t nanoseconds(std::chrono::nanoseconds duration) { return duration.count(); }

// Waiting, encoding, deciding.
void put_timings(std::string& out, unsigned field,
                 const std::array<std::chrono::nanoseconds, 3>& spent);

}  // namespace proteus
