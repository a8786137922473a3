#include "snapshot.hpp"

#include <algorithm>
#include <cmath>
#include <set>
#include <stdexcept>

namespace proteus {
namespace {

using Shape = std::vector<std::size_t>;

[[noreturn]] void reject(const std::string& argument, const std::string& expected,
                         const std::string& got) {
    throw std::invalid_argument(argument + ": expected " + expected + ", got " + got);
}

std::string quoted(std::string_view name) { return "\"" + std::string(name) + "\""; }

std::string shape_text(const Shape& shape) {
    std::string text = "(";
    for (std::size_t i = 0; i < shape.size(); ++i)
        text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + (shape.size() == 1 ? ",)" : ")");
}

std::string number_text(double value) {
    std::string text = std::to_string(value);
    if (text.find('.') != std::string::npos) text.erase(text.find_last_not_of('0') + 1);
    return text.back() == '.' ? text + "0" : text;
}

// Takes tensors by name and remembers which, so that strangers are found at the end.
class Reader {
  public:
    explicit Reader(const Tensors& tensors) : tensors_(tensors) {}

    bool has(const std::string& name) const { return tensors_.contains(name); }

    // The shape must equal `expected`, where 0 stands for any size of at least one.
    const TensorView& take(const std::string& name, const Shape& expected,
                           const std::string& expected_text) {
        const auto found = tensors_.find(name);
        if (found == tensors_.end()) reject(label(name), expected_text, "nothing");
        const TensorView& tensor = found->second;
        bool fits = tensor.shape.size() == expected.size();
        std::size_t count = 1;
        for (std::size_t i = 0; fits && i < expected.size(); ++i) {
            fits = expected[i] ? tensor.shape[i] == expected[i] : tensor.shape[i] > 0;
            count *= tensor.shape[i];
        }
        if (!fits) reject(label(name), expected_text, "shape " + shape_text(tensor.shape));
        for (std::size_t i = 0; i < count; ++i)
            if (!std::isfinite(tensor.data[i]))
                reject(label(name), "finite values",
                       number_text(tensor.data[i]) + " at flat index " + std::to_string(i));
        taken_.insert(name);
        return tensor;
    }

    const TensorView& take(const std::string& name, const Shape& expected) {
        return take(name, expected, "shape " + shape_text(expected));
    }

    AlignedVector<float> vector(const std::string& name, std::size_t n) {
        const TensorView& tensor = take(name, {n});
        AlignedVector<float> values(padded(n), 0.0f);
        std::copy_n(tensor.data, n, values.begin());
        return values;
    }

    Layer layer(const std::string& weight, const std::string& bias, std::size_t in,
                std::size_t out) {
        const TensorView& tensor = take(weight, {in, out});
        Layer made;
        made.in = in;
        made.out = padded(out);
        made.weight.assign(in * made.out, 0.0f);
        for (std::size_t i = 0; i < in; ++i)
            std::copy_n(tensor.data + i * out, out, made.weight.begin() + i * made.out);
        made.bias = vector(bias, out);
        return made;
    }

    void finish() const {
        for (const auto& [name, tensor] : tensors_)
            if (!taken_.contains(name)) reject("tensors", "names of a checkpoint", quoted(name));
    }

  private:
    static std::string label(const std::string& name) { return "tensors[" + quoted(name) + "]"; }

    const Tensors& tensors_;
    std::set<std::string> taken_;
};

std::unique_ptr<const Projection> read_projection(Reader& reader, std::size_t& dim,
                                                  std::size_t& width) {
    const Shape shape = reader.take("projection.w1", {0, 0}, "two dimensions").shape;
    dim = shape[0];
    width = shape[1];
    auto made = std::make_unique<Projection>();
    made->first = reader.layer("projection.w1", "projection.b1", dim, width);
    made->second = reader.layer("projection.w2", "projection.b2", width, width);
    made->ln_weight = reader.vector("projection.ln_weight", width);
    made->ln_bias = reader.vector("projection.ln_bias", width);
    return made;
}

std::unique_ptr<const Policy> read_policy(Reader& reader, std::size_t width,
                                          std::size_t candidates) {
    const Shape shape =
        reader.take("policy.w1", {width + 2, 0}, "shape (" + std::to_string(width + 2) + ", H)")
            .shape;
    const std::size_t hidden = shape[1];
    auto made = std::make_unique<Policy>();
    made->first = reader.layer("policy.w1", "policy.b1", width + 2, hidden);
    made->second = reader.layer("policy.w2", "policy.b2", hidden, hidden);
    // the second layer reads the padding of the first's output, which is zero after the gate
    made->gate_weight = reader.vector("policy.gate_weight", hidden);
    made->gate_bias = reader.vector("policy.gate_bias", hidden);
    const TensorView& w3 = reader.take("policy.w3", {hidden, 2});
    made->w3.assign(2 * padded(hidden), 0.0f);
    for (std::size_t i = 0; i < hidden; ++i)
        for (std::size_t j = 0; j < 2; ++j) made->w3[j * padded(hidden) + i] = w3.data[2 * i + j];
    const TensorView& b3 = reader.take("policy.b3", {2});
    std::copy_n(b3.data, 2, made->b3);
    made->prior = reader.vector("policy.prior", candidates);
    const std::size_t knots = reader.take("policy.knots_tau", {0}, "shape (N,)").shape[0];
    const auto values = [&](const char* name) {
        const TensorView& tensor = reader.take(name, {knots});
        return std::vector<float>(tensor.data, tensor.data + knots);
    };
    made->knots_tau = values("policy.knots_tau");
    made->knots_dual = values("policy.knots_dual");
    made->knots_mu = values("policy.knots_mu");
    if (knots < 2) reject("tensors[\"policy.knots_tau\"]", "at least two knots", "one");
    for (std::size_t i = 1; i < knots; ++i)
        if (!(made->knots_tau[i] > made->knots_tau[i - 1]))
            reject("tensors[\"policy.knots_tau\"]", "increasing knots",
                   number_text(made->knots_tau[i]) + " at index " + std::to_string(i));
    return made;
}

Steps make_steps(const char* name, std::span<const std::int32_t> code, int max,
                 std::size_t vertices) {
    const std::string argument = name;
    if (code.size() != kGridSteps + 1)
        reject(argument, "shape (1001,)", "(" + std::to_string(code.size()) + ",)");
    if (max < -1 || max > kGridSteps) reject(argument + "_max", "-1 to 1000", std::to_string(max));
    Steps steps;
    steps.max = max;
    for (int i = 0; i <= max; ++i) {
        const std::int32_t step = code[i];
        // a mixing step needs the cheaper neighbour
        const std::int64_t last = step < 0 ? -1 : step / 16 + (step % 16 > 0 ? 1 : 0);
        if (last < 0 || last >= static_cast<std::int64_t>(vertices))
            reject(argument, "steps among " + std::to_string(vertices) + " vertices",
                   "code " + std::to_string(step) + " at index " + std::to_string(i));
        steps.code[i] = step;
    }
    return steps;
}

void check(const char* name, double value, bool fits, const char* expected) {
    if (!std::isfinite(value) || !fits) reject(name, expected, number_text(value));
}

}  // namespace

Mode parse_mode(std::string_view name, const char* argument) {
    if (name == "dual") return Mode::kDual;
    if (name == "policy") return Mode::kPolicy;
    reject(argument, "\"dual\" or \"policy\"", quoted(name));
}

Guarantee parse_guarantee(std::string_view name) {
    if (name == "certified") return Guarantee::kCertified;
    if (name == "calibrated") return Guarantee::kCalibrated;
    reject("guarantee", "\"certified\" or \"calibrated\"", quoted(name));
}

int grid_index(double tau) {
    if (!(tau >= 0.0 && tau <= 1.0)) return -1;
    return static_cast<int>(std::ceil(tau * kGridSteps - 1e-3));
}

Path::Path(std::vector<float> parameter, std::span<const std::int32_t> certified, int certified_max,
           std::span<const std::int32_t> calibrated, int calibrated_max)
    : parameter_(std::move(parameter)) {
    if (parameter_.empty()) reject("parameter", "at least one vertex", "none");
    for (const float value : parameter_)
        if (!(value >= 0.0f && value <= 1.0f))
            reject("parameter", "values in [0, 1]", number_text(value));
    certified_ = make_steps("certified", certified, certified_max, parameter_.size());
    calibrated_ = make_steps("calibrated", calibrated, calibrated_max, parameter_.size());
}

Snapshot::Snapshot(const Tensors& tensors, SnapshotOptions given) : options(std::move(given)) {
    Reader reader(tensors);
    const Shape shape = reader.take("predictor.weight", {0, 0}, "two dimensions").shape;
    candidates = shape[1];
    if (candidates > kMaxCandidates)
        reject("tensors[\"predictor.weight\"]", "at most 64 columns", std::to_string(candidates));
    if (reader.has("projection.w1")) {
        projection = read_projection(reader, input_dim, width);
    } else {
        input_dim = width = shape[0];
    }
    predictor = reader.layer("predictor.weight", "predictor.bias", width, candidates);
    if (reader.has("policy.w1")) policy = read_policy(reader, width, candidates);
    reader.finish();

    check("kappa", options.kappa, options.kappa >= 0.0, "a finite number >= 0");
    check("gamma", options.gamma, options.gamma > 0.0, "a finite number > 0");
    check("cost_unit_usd", options.cost_unit_usd, options.cost_unit_usd > 0.0,
          "a finite number > 0");
    no_prior.assign(padded(candidates), 0.0f);
    set_prices();
    if (!options.dual) reject("dual", "a Path", "None");
    if (options.policy && !policy)
        reject("policy", "None where the tensors have no policy", "a Path");
    if (options.default_mode == Mode::kPolicy && !policy)
        reject("default_mode", "\"dual\" where the tensors have no policy", "\"policy\"");
    if (options.encoder && options.encoder->dim() != input_dim)
        reject("encoder", "dim " + std::to_string(input_dim),
               std::to_string(options.encoder->dim()));
}

void Snapshot::set_prices() {
    if (options.price_usd.size() != candidates)
        reject("price_usd", "shape (" + std::to_string(candidates) + ",)",
               "(" + std::to_string(options.price_usd.size()) + ",)");
    cost.assign(padded(candidates), 0.0f);
    for (std::size_t i = 0; i < candidates; ++i) {
        const double price = options.price_usd[i];
        check("price_usd", price, price >= 0.0, "finite numbers >= 0");
        cost[i] = static_cast<float>(price / options.cost_unit_usd);
        if (!std::isfinite(cost[i]))
            reject("cost_unit_usd", "a unit near the prices", number_text(options.cost_unit_usd));
    }
}

Snapshot Snapshot::changed(Change change) const {
    if (change.tally && change.tally->candidates() != candidates)
        reject("tally", "one of " + std::to_string(candidates) + " candidates",
               std::to_string(change.tally->candidates()));
    Snapshot made = *this;
    if (!change.price_usd.empty()) made.options.price_usd = std::move(change.price_usd);
    made.options.available = change.available;
    made.options.certified = change.certified;
    made.options.tally = std::move(change.tally);
    made.options.version = change.version;
    made.set_prices();
    return made;
}

}  // namespace proteus
