// The immutable loaded router. Many threads read one; a change makes another.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "hashing.hpp"
#include "simd.hpp"

namespace proteus {

inline constexpr std::size_t kMaxCandidates = 64;
inline constexpr int kGridSteps = 1000;  // grid targets 0, 0.001 ... 1

enum class Status : std::uint8_t { kUnspecified, kFeasible, kInfeasible, kUncertified, kInvalid };
enum class Mode : std::uint8_t { kDual, kPolicy };
enum class Guarantee : std::uint8_t { kCertified, kCalibrated };
enum class Link : std::uint8_t { kSigmoid, kClip };
enum class Head : std::uint8_t { kResidual, kFree };

// Each throws std::invalid_argument naming the argument.
Mode parse_mode(std::string_view name, const char* argument = "mode");
Guarantee parse_guarantee(std::string_view name);

// Index of the first grid target that is not below tau, -1 for NaN or outside [0, 1]. The slack of
// 1e-3 steps keeps a tau rounded to float32 on its step.
int grid_index(double tau);

// Step codes of one guarantee. Entries above `max` are served with code 0, the most accurate.
struct Steps {
    std::array<std::int32_t, kGridSteps + 1>
        code{};    // vertex * 16 + share of the cheaper neighbour
    int max = -1;  // largest feasible grid index, -1 if none
};

// List of policies from the most accurate to the cheapest, and the tables tau -> step.
class Path {
  public:
    // Throws std::invalid_argument where a code leaves the list or a parameter leaves [0, 1].
    Path(std::vector<float> parameter, std::span<const std::int32_t> certified, int certified_max,
         std::span<const std::int32_t> calibrated, int calibrated_max);

    const std::vector<float>& parameter() const { return parameter_; }
    const Steps& steps(Guarantee guarantee) const {
        return guarantee == Guarantee::kCertified ? certified_ : calibrated_;
    }

  private:
    std::vector<float> parameter_;
    Steps certified_;
    Steps calibrated_;
};

struct TensorView {
    const float* data;
    std::vector<std::size_t> shape;
};

using Tensors = std::map<std::string, TensorView>;  // names as in a checkpoint

// Rows by candidate and status, of every snapshot that shares it; any thread may add, none waits.
class Tally {
  public:
    static constexpr std::size_t kStatuses = 5;

    explicit Tally(std::size_t candidates) : counts_((candidates + 1) * kStatuses) {}

    // One row; the choice -1 has the row after the last candidate's.
    void add(std::int32_t choice, std::uint8_t status) {
        const std::size_t row = choice < 0 ? candidates() : static_cast<std::size_t>(choice);
        // what a backend answers is not checked
        if (row <= candidates() && status < kStatuses)
            counts_[row * kStatuses + status].fetch_add(1, std::memory_order_relaxed);
    }

    std::size_t candidates() const { return counts_.size() / kStatuses - 1; }
    std::uint64_t count(std::size_t cell) const {
        return counts_[cell].load(std::memory_order_relaxed);
    }

  private:
    std::vector<std::atomic<std::uint64_t>> counts_;
};

// What a server changes about a loaded router without another one.
struct Change {
    std::vector<double> price_usd;                // empty: as they are
    std::uint64_t available = ~std::uint64_t{0};  // bit i is candidate i
    bool certified = true;                        // false: no answer is
    std::shared_ptr<Tally> tally;                 // of who serves it, or null
    std::int64_t version = 0;
};

struct SnapshotOptions {
    Link link = Link::kSigmoid;
    Head head = Head::kResidual;
    double kappa = 1.0;
    double gamma = 2.0;
    std::vector<double> price_usd;
    double cost_unit_usd = 1.0;
    std::uint64_t key = 0;
    Mode default_mode = Mode::kDual;
    std::shared_ptr<const Path> dual;
    std::shared_ptr<const Path> policy;
    std::shared_ptr<const HashEncoder> encoder;
    std::int64_t version = 0;
    std::uint64_t available = ~std::uint64_t{0};  // whatever a request allows
    bool certified = true;                        // whether the certificate covers price_usd
    std::shared_ptr<Tally> tally;
};

// Weights (in, out) with `out` padded to whole vectors by zeros.
struct Layer {
    std::size_t in = 0;
    std::size_t out = 0;  // padded
    AlignedVector<float> weight;
    AlignedVector<float> bias;
};

struct Projection {
    Layer first;
    Layer second;
    AlignedVector<float> ln_weight;
    AlignedVector<float> ln_bias;
};

struct Policy {
    Layer first;  // its two last input rows belong to tau and the dual variable
    Layer second;
    AlignedVector<float> gate_weight;
    AlignedVector<float> gate_bias;
    AlignedVector<float> w3;  // (2, H)
    float b3[2];
    AlignedVector<float> prior;
    std::vector<float> knots_tau;
    std::vector<float> knots_dual;
    std::vector<float> knots_mu;
};

struct Snapshot {
    // Throws std::invalid_argument naming the tensor or the argument that is wrong.
    Snapshot(const Tensors& tensors, SnapshotOptions options);

    // The same router with other prices or fewer candidates. Throws as above.
    Snapshot changed(Change change) const;

    const Path* path(Mode mode) const {
        return mode == Mode::kDual ? options.dual.get() : options.policy.get();
    }

    SnapshotOptions options;
    std::size_t input_dim;  // D
    std::size_t width;      // d, of the embedding z
    std::size_t candidates;
    std::shared_ptr<const Projection> projection;  // null: z is the input
    Layer predictor;
    std::shared_ptr<const Policy> policy;  // null: mode "dual" only
    AlignedVector<float> cost;             // price / cost unit, padded
    AlignedVector<float> no_prior;         // zeros, padded

  private:
    void set_prices();
};

}  // namespace proteus
