#include "engine.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "forward.hpp"
#include "random.hpp"

namespace proteus {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows of one pass: activations stay in the second-level cache, weights are read once for all.
constexpr std::size_t kChunk = 96;

struct Preference {
    float mu;
    double conc1;
    double conc0;
};

// What a row is served with.
struct Plan {
    float parameter;  // of the path's vertex
    double tau;       // the parameter, or tau itself where the policy has no path
    Status status;
    float floor;
};

struct Scratch {
    AlignedVector<float> hidden1;
    AlignedVector<float> hidden2;
    AlignedVector<float> z;
    AlignedVector<float> predicted;
    AlignedVector<float> base;
    AlignedVector<float> gate;
    AlignedVector<float> score;
    AlignedVector<float> cost;
    std::vector<Plan> plans;
    std::vector<Preference> preferences;
};

Scratch& scratch() {
    thread_local Scratch buffers;
    return buffers;
}

float* grown(AlignedVector<float>& buffer, std::size_t n) {
    if (buffer.size() < n) buffer.resize(n);
    return buffer.data();
}

// Piecewise linear through (knots, values), constant outside.
double interpolate(double x, const std::vector<float>& knots, const std::vector<float>& values) {
    const auto found = std::lower_bound(knots.begin(), knots.end(), x) - knots.begin();
    const auto right = std::clamp<std::ptrdiff_t>(found, 1, std::ssize(knots) - 1);
    const double low = knots[right - 1];
    const double share = std::clamp((x - low) / (knots[right] - low), 0.0, 1.0);
    return values[right - 1] + share * (static_cast<double>(values[right]) - values[right - 1]);
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

double softplus(double x) { return x > 20.0 ? x : std::log1p(std::exp(x)); }

std::uint64_t all_candidates(std::size_t candidates) {
    return ~std::uint64_t{0} >> (64 - candidates);
}

// Embedding of `rows` rows; the input itself without a projection. Sets the stride of its rows.
const float* project(const Snapshot& snapshot, const float* x, std::size_t rows, Scratch& buffers,
                     std::size_t& stride) {
    if (!snapshot.projection) {
        stride = snapshot.input_dim;
        return x;
    }
    const Projection& layers = *snapshot.projection;
    stride = layers.second.out;
    float* hidden = grown(buffers.hidden1, rows * layers.first.out);
    fill_rows(layers.first.bias.data(), rows, layers.first.out, hidden);
    dense(x, snapshot.input_dim, rows, layers.first.in, layers.first.weight.data(),
          layers.first.out, hidden);
    gelu(hidden, rows * layers.first.out);
    float* z = grown(buffers.z, rows * stride);
    fill_rows(layers.second.bias.data(), rows, stride, z);
    dense(hidden, layers.first.out, rows, layers.second.in, layers.second.weight.data(), stride, z);
    gelu(z, rows * stride);
    for (std::size_t r = 0; r < rows; ++r)
        layer_norm(z + r * stride, snapshot.width, layers.ln_weight.data(), layers.ln_bias.data());
    return z;
}

// The Beta policy on `rows` rows; tau(r) is the path parameter of row r.
template <typename Tau>
void prefer(const Snapshot& snapshot, const float* z, std::size_t stride, std::size_t rows, Tau tau,
            bool need_concentrations, Scratch& buffers, Preference* out) {
    const Policy& policy = *snapshot.policy;
    const std::size_t hidden = policy.first.out;
    const std::size_t width = snapshot.width;
    float* first = grown(buffers.hidden1, rows * hidden);
    float* second = grown(buffers.hidden2, rows * hidden);
    float* base = grown(buffers.base, hidden);
    float* gates = grown(buffers.gate, rows * hidden);
    const float* w1 = policy.first.weight.data();
    for (std::size_t r = 0; r < rows; ++r) {
        float* gate = gates + r * hidden;
        if (r > 0 && tau(r) == tau(r - 1)) {
            std::copy_n(gate - hidden, hidden, gate);
        } else {
            const double dual = interpolate(tau(r), policy.knots_tau, policy.knots_dual);
            policy_context(static_cast<float>(tau(r)), static_cast<float>(dual),
                           policy.first.bias.data(), w1 + width * hidden, w1 + (width + 1) * hidden,
                           policy.gate_weight.data(), policy.gate_bias.data(), hidden, base, gate);
        }
        fill_rows(base, 1, hidden, first + r * hidden);
    }
    dense(z, stride, rows, width, w1, hidden, first);
    gelu_gated(first, gates, rows * hidden);
    fill_rows(policy.second.bias.data(), rows, hidden, second);
    dense(first, hidden, rows, policy.second.in, policy.second.weight.data(), hidden, second);
    gelu(second, rows * hidden);
    for (std::size_t r = 0; r < rows; ++r) {
        float o[2];
        two_dots(second + r * hidden, policy.w3.data(), policy.b3, hidden, o);
        Preference& preference = out[r];
        if (snapshot.options.head == Head::kResidual) {
            const double knot = interpolate(tau(r), policy.knots_tau, policy.knots_mu);
            const double start = std::clamp(knot, 1e-4, 1.0 - 1e-4);
            const double mu = sigmoid(std::log(start / (1.0 - start)) + o[0]);
            preference.mu = static_cast<float>(mu);
            if (need_concentrations) {
                const double total = softplus(o[1]);
                preference.conc1 = 1.0 + mu * total;
                preference.conc0 = 1.0 + (1.0 - mu) * total;
            }
        } else {
            preference.conc1 = 1.0 + softplus(o[0]);
            preference.conc0 = 1.0 + softplus(o[1]);
            preference.mu =
                static_cast<float>(preference.conc1 / (preference.conc1 + preference.conc0));
        }
    }
}

float cost_weight(const Snapshot& snapshot, float mu) {
    return static_cast<float>(snapshot.options.kappa *
                              std::pow(1.0 - static_cast<double>(mu), snapshot.options.gamma));
}

// Prices of one row in cost units; false where one is negative or not finite.
bool convert_prices(const double* price_usd, std::size_t n, double unit, float* cost) {
    bool fits = true;
    for (std::size_t i = 0; i < n; ++i) {
        fits &= price_usd[i] >= 0.0 && price_usd[i] <= std::numeric_limits<double>::max();
        cost[i] = static_cast<float>(price_usd[i] / unit);
    }
    return fits;
}

// Lowest index of the largest eligible score; -1 where none is eligible or one is not finite.
int best_candidate(const float* scores, std::size_t n, std::uint64_t eligible) {
    int best = -1;
    float top = -kInfinity;
    bool finite = true;
    for (std::size_t i = 0; i < n; ++i) {
        const bool allowed = eligible >> i & 1;
        const float value = allowed ? scores[i] : -kInfinity;
        finite &= !allowed || std::fabs(scores[i]) < kInfinity;
        best = value > top ? static_cast<int>(i) : best;
        top = value > top ? value : top;
    }
    return finite ? best : -1;
}

// Everything about a row that its numbers do not change.
struct Rules {
    const Path* path;
    const Steps* steps;
    bool uncertified;
    bool calibrated;
};

Rules make_rules(const Snapshot& snapshot, const Request& request) {
    const Path* path = snapshot.path(request.mode);
    const bool calibrated = request.guarantee == Guarantee::kCalibrated;
    return {path, path ? &path->steps(request.guarantee) : nullptr,
            request.mode != snapshot.options.default_mode || !path || request.price_usd ||
                !snapshot.options.certified || request.ids || request.sample,
            calibrated};
}

Plan plan_row(const Snapshot& snapshot, const Request& request, const Rules& rules, std::size_t row,
              std::uint64_t eligible) {
    const double tau = request.tau[row * request.tau_stride];
    const float* x = request.x + row * snapshot.input_dim;
    const int grid = grid_index(tau);
    Plan plan{0.0f, 0.0, Status::kInvalid, kNan};
    if (grid < 0 || eligible == 0 || !all_finite(x, snapshot.input_dim)) return plan;
    const bool restricted = eligible != all_candidates(snapshot.candidates);
    const bool uncertified = rules.uncertified || restricted;
    plan.status = uncertified ? Status::kUncertified : Status::kFeasible;
    plan.tau = tau;
    if (!rules.path) return plan;
    const bool reached = grid <= rules.steps->max;
    const std::int32_t code = reached ? rules.steps->code[grid] : 0;
    std::int32_t vertex = code >> 4;
    if (code & 15) {
        const std::uint64_t key = snapshot.options.key;
        const std::uint64_t u =
            request.ids ? id_hash(request.ids[row], key) : row_hash(x, snapshot.input_dim, key);
        vertex += (u >> 60) < static_cast<std::uint64_t>(code & 15);
    }
    plan.parameter = rules.path->parameter()[vertex];
    plan.tau = plan.parameter;
    if (uncertified) return plan;
    if (!reached) {
        plan.status = Status::kInfeasible;
    } else if (rules.calibrated) {
        plan.status = Status::kUncertified;
    }
    // out of reach the most accurate policy is served, and it was tested at the largest target
    const int tested = reached ? grid : rules.steps->max;
    if (!rules.calibrated && (reached || tested > 0))
        plan.floor = static_cast<float>(tested / static_cast<double>(kGridSteps));
    return plan;
}

void decide_chunk(const Snapshot& snapshot, const Request& request, const Rules& rules,
                  std::size_t begin, std::size_t rows, const Decisions& out) {
    Scratch& buffers = scratch();
    const std::size_t k = snapshot.candidates;
    const std::size_t k_padded = snapshot.predictor.out;
    const std::uint64_t all = all_candidates(k) & snapshot.options.available;
    const auto eligible = [&](std::size_t r) {
        return request.available ? request.available[(begin + r) * request.available_stride] & all
                                 : all;
    };
    if (buffers.plans.size() < rows) {
        buffers.plans.resize(rows);
        buffers.preferences.resize(rows);
    }
    Plan* plans = buffers.plans.data();
    Preference* preferences = buffers.preferences.data();
    for (std::size_t r = 0; r < rows; ++r)
        plans[r] = plan_row(snapshot, request, rules, begin + r, eligible(r));

    std::size_t stride;
    const float* z =
        project(snapshot, request.x + begin * snapshot.input_dim, rows, buffers, stride);
    float* predicted = grown(buffers.predicted, rows * k_padded);
    predict(z, stride, rows, snapshot.predictor.in, snapshot.predictor.weight.data(),
            snapshot.predictor.bias.data(), k_padded, snapshot.options.link == Link::kSigmoid,
            predicted);
    const bool policy = request.mode == Mode::kPolicy;
    if (policy) {
        prefer(
            snapshot, z, stride, rows, [plans](std::size_t r) { return plans[r].tau; },
            request.sample, buffers, preferences);
    }
    const float* prior = policy ? snapshot.policy->prior.data() : snapshot.no_prior.data();
    float* scores = grown(buffers.score, k_padded);
    const float* cost = snapshot.cost.data();
    bool prices_fit = true;
    for (std::size_t r = 0; r < rows; ++r) {
        const std::size_t row = begin + r;
        float mu = policy ? preferences[r].mu : plans[r].parameter;
        if (request.sample)
            mu = static_cast<float>(
                sample_beta(preferences[r].conc1, preferences[r].conc0, request.seed, row));
        if (request.price_usd && (r == 0 || request.price_stride)) {
            float* converted = grown(buffers.cost, k_padded);
            prices_fit = convert_prices(request.price_usd + row * request.price_stride, k,
                                        snapshot.options.cost_unit_usd, converted);
            cost = converted;
        }
        int choice = -1;
        const float* p = predicted + r * k_padded;
        if (plans[r].status != Status::kInvalid && prices_fit && mu >= 0.0f && mu <= 1.0f) {
            score(p, mu, prior, cost_weight(snapshot, mu), cost, k_padded, scores);
            choice = best_candidate(scores, k, eligible(r));
        }
        const bool valid = choice >= 0;
        out.choice[row] = choice;
        out.mu[row] = valid ? mu : kNan;
        out.score[row] = valid ? scores[choice] : kNan;
        out.status[row] = static_cast<std::uint8_t>(valid ? plans[r].status : Status::kInvalid);
        out.certified_floor[row] = valid ? plans[r].floor : kNan;
        if (out.predicted)
            for (std::size_t i = 0; i < k; ++i) out.predicted[row * k + i] = valid ? p[i] : kNan;
        if (out.scores)
            for (std::size_t i = 0; i < k; ++i)
                out.scores[row * k + i] =
                    !valid ? kNan : (eligible(r) >> i & 1 ? scores[i] : -kInfinity);
    }
}

}  // namespace

void decide(const Snapshot& snapshot, const Request& request, const Decisions& out) {
    const Rules rules = make_rules(snapshot, request);
    for (std::size_t begin = 0; begin < request.rows; begin += kChunk)
        decide_chunk(snapshot, request, rules, begin, std::min(kChunk, request.rows - begin), out);
}

void choose_path(const Snapshot& snapshot, const Request& request, std::int32_t* choice) {
    Scratch& buffers = scratch();
    const auto& parameter = snapshot.path(request.mode)->parameter();
    const std::size_t dim = snapshot.input_dim;
    const std::size_t k = snapshot.candidates;
    const std::size_t k_padded = snapshot.predictor.out;
    const bool policy = request.mode == Mode::kPolicy;
    const float* prior = policy ? snapshot.policy->prior.data() : snapshot.no_prior.data();
    if (buffers.preferences.size() < kChunk) {
        buffers.plans.resize(kChunk);
        buffers.preferences.resize(kChunk);
    }
    for (std::size_t begin = 0; begin < request.rows; begin += kChunk) {
        const std::size_t rows = std::min(kChunk, request.rows - begin);
        const float* x = request.x + begin * dim;
        std::size_t stride;
        const float* z = project(snapshot, x, rows, buffers, stride);
        float* predicted = grown(buffers.predicted, rows * k_padded);
        predict(z, stride, rows, snapshot.predictor.in, snapshot.predictor.weight.data(),
                snapshot.predictor.bias.data(), k_padded, snapshot.options.link == Link::kSigmoid,
                predicted);
        float* scores = grown(buffers.score, k_padded);
        float* converted = grown(buffers.cost, k_padded);
        for (std::size_t v = 0; v < parameter.size(); ++v) {
            if (policy)
                prefer(
                    snapshot, z, stride, rows,
                    [&](std::size_t) { return static_cast<double>(parameter[v]); }, false, buffers,
                    buffers.preferences.data());
            for (std::size_t r = 0; r < rows; ++r) {
                const std::size_t row = begin + r;
                const float mu = policy ? buffers.preferences[r].mu : parameter[v];
                const float* cost = snapshot.cost.data();
                bool fits = all_finite(x + r * dim, dim);
                if (request.price_usd) {
                    fits &= convert_prices(request.price_usd + row * request.price_stride, k,
                                           snapshot.options.cost_unit_usd, converted);
                    cost = converted;
                }
                int best = -1;
                if (fits && mu >= 0.0f && mu <= 1.0f) {
                    score(predicted + r * k_padded, mu, prior, cost_weight(snapshot, mu), cost,
                          k_padded, scores);
                    best = best_candidate(scores, k, all_candidates(k));
                }
                choice[v * request.rows + row] = best;
            }
        }
    }
}

}  // namespace proteus
