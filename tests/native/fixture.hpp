// What the native tests share: a check that aborts, and small random routers.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine.hpp"
#include "snapshot.hpp"

#define CHECK(condition)                                                                \
    do {                                                                                \
        if (!(condition)) {                                                             \
            std::fprintf(stderr, "%s:%d: CHECK(%s)\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                               \
        }                                                                               \
    } while (false)

// True if `call` throws an E whose text begins with `start`.
template <typename E, typename F>
bool throws(F call, const std::string& start) {
    try {
        call();
    } catch (const E& error) {
        return std::string(error.what()).rfind(start, 0) == 0;
    }
    return false;
}

namespace proteus::fixture {

struct Shape {
    std::size_t dim = 24;
    std::size_t width = 0;  // of the projection, 0 for none
    std::size_t candidates = 5;
    std::size_t hidden = 20;  // of the policy, 0 for none
};

// Tensors with random values that own their memory.
class RandomTensors {
  public:
    RandomTensors(const Shape& shape, unsigned seed) : random_(seed) {
        const std::size_t d = shape.width ? shape.width : shape.dim;
        const std::size_t k = shape.candidates;
        if (shape.width) {
            add("projection.w1", {shape.dim, d});
            add("projection.b1", {d});
            add("projection.w2", {d, d});
            add("projection.b2", {d});
            add("projection.ln_weight", {d});
            add("projection.ln_bias", {d});
        }
        add("predictor.weight", {d, k});
        add("predictor.bias", {k});
        if (const std::size_t h = shape.hidden) {
            add("policy.w1", {d + 2, h});
            for (const char* name : {"b1", "gate_weight", "gate_bias", "b2"})
                add("policy." + std::string(name), {h});
            add("policy.w2", {h, h});
            add("policy.w3", {h, 2});
            add("policy.b3", {2});
            add("policy.prior", {k});
            for (const char* name : {"knots_tau", "knots_dual", "knots_mu"}) {
                add("policy." + std::string(name), {8});
                auto& values = storage_["policy." + std::string(name)];
                for (std::size_t i = 0; i < 8; ++i) values[i] = static_cast<float>(i) / 7.0f;
            }
        }
    }

    Tensors views;

  private:
    void add(const std::string& name, std::vector<std::size_t> shape) {
        std::size_t count = 1;
        for (const std::size_t n : shape) count *= n;
        auto& values = storage_[name];
        values.resize(count);
        std::normal_distribution<float> normal(0.0f, 0.3f);
        for (float& value : values) value = normal(random_);
        views[name] = {values.data(), std::move(shape)};
    }

    std::mt19937 random_;
    std::map<std::string, std::vector<float>> storage_;
};

inline std::shared_ptr<const Path> make_path(int vertices = 9, int certified_max = 900,
                                             int calibrated_max = 950) {
    std::vector<float> parameter(vertices);
    for (int v = 0; v < vertices; ++v)
        parameter[v] = 1.0f - static_cast<float>(v) / static_cast<float>(vertices);
    std::vector<std::int32_t> code(kGridSteps + 1);
    for (int i = 0; i <= kGridSteps; ++i)
        code[i] = (kGridSteps - i) * (vertices - 1) * 16 / kGridSteps;
    return std::make_shared<const Path>(parameter, code, certified_max, code, calibrated_max);
}

inline std::shared_ptr<const HashEncoder> make_encoder(std::size_t dim, std::size_t rows = 256) {
    std::vector<std::int8_t> table(rows * dim);
    for (std::size_t i = 0; i < table.size(); ++i)
        table[i] = static_cast<std::int8_t>(i * 37 % 255 - 127);
    const std::vector<float> scale(rows, 0.01f);
    const std::vector<float> idf(rows, 1.0f);
    const std::vector<float> weight(kBlocks, 1.0f);
    return std::make_shared<const HashEncoder>(table.data(), rows, dim, scale.data(), idf.data(),
                                               weight);
}

inline std::shared_ptr<const Snapshot> make_snapshot(const Shape& shape, unsigned seed = 1,
                                                     std::int64_t version = 0) {
    const RandomTensors tensors(shape, seed);
    SnapshotOptions options;
    options.kappa = 1.5;
    options.gamma = 3.0;
    options.key = 99;
    options.version = version;
    for (std::size_t i = 0; i < shape.candidates; ++i)
        options.price_usd.push_back(0.1 * static_cast<double>(i + 1));
    options.dual = make_path();
    if (shape.hidden) options.policy = make_path(5);
    options.encoder = make_encoder(shape.dim);
    return std::make_shared<const Snapshot>(tensors.views, options);
}

inline std::vector<float> random_rows(std::size_t rows, std::size_t dim, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> x(rows * dim);
    for (float& value : x) value = normal(random);
    return x;
}

// Results of one call with their memory.
struct Results {
    Results(std::size_t rows, std::size_t k)
        : choice(rows),
          mu(rows),
          score(rows),
          status(rows),
          floor(rows),
          predicted(rows * k),
          scores(rows * k) {}

    Decisions out() {
        return {choice.data(), mu.data(),        score.data(), status.data(),
                floor.data(),  predicted.data(), scores.data()};
    }

    std::vector<std::int32_t> choice;
    std::vector<float> mu;
    std::vector<float> score;
    std::vector<std::uint8_t> status;
    std::vector<float> floor;
    std::vector<float> predicted;
    std::vector<float> scores;
};

}  // namespace proteus::fixture
