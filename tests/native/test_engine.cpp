#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "engine.hpp"
#include "fixture.hpp"
#include "forward.hpp"

using namespace proteus;
using fixture::make_snapshot;
using fixture::Results;
using fixture::Shape;

namespace {

bool same_bits(const float* a, const float* b, std::size_t n) {
    return std::memcmp(a, b, n * sizeof(float)) == 0;
}

// Every row alone gives the bits that it gives in a batch, for every blocking of rows and columns.
void batch_equals_singles() {
    for (const Shape& shape : {Shape{24, 0, 5, 20}, Shape{1, 0, 1, 1}, Shape{65, 33, 17, 48},
                               Shape{40, 256, 64, 272}, Shape{256, 0, 33, 256}}) {
        const auto snapshot = make_snapshot(shape);
        const std::size_t rows = 101;
        const std::size_t k = shape.candidates;
        const auto x = fixture::random_rows(rows, shape.dim, 3);
        std::vector<double> tau(rows);
        for (std::size_t r = 0; r < rows; ++r) tau[r] = static_cast<double>(r % 50) / 49.0;
        for (const Mode mode : {Mode::kDual, Mode::kPolicy}) {
            Results batch(rows, k);
            Request request;
            request.x = x.data();
            request.rows = rows;
            request.tau = tau.data();
            request.tau_stride = 1;
            request.mode = mode;
            decide(*snapshot, request, batch.out());
            for (std::size_t r = 0; r < rows; ++r) {
                Results one(1, k);
                request.x = x.data() + r * shape.dim;
                request.rows = 1;
                request.tau = tau.data() + r;
                decide(*snapshot, request, one.out());
                CHECK(one.choice[0] == batch.choice[r] && one.status[0] == batch.status[r]);
                CHECK(same_bits(one.mu.data(), &batch.mu[r], 1));
                CHECK(same_bits(one.predicted.data(), &batch.predicted[r * k], k));
                CHECK(same_bits(one.scores.data(), &batch.scores[r * k], k));
            }
        }
    }
}

void bad_values_make_invalid_rows() {
    const Shape shape;
    const auto snapshot = make_snapshot(shape);
    const float kNan = std::numeric_limits<float>::quiet_NaN();
    const std::size_t rows = 8;
    auto x = fixture::random_rows(rows, shape.dim, 4);
    x[0] = kNan;
    x[shape.dim + 23] = std::numeric_limits<float>::infinity();
    std::vector<double> tau(rows, 0.5);
    tau[2] = kNan;
    tau[3] = 1.0000001;
    tau[4] = -0.1;
    tau[5] = -0.0;
    std::vector<std::uint64_t> available(rows, ~0ull);
    available[6] = ~0ull << shape.candidates;
    Request request;
    request.x = x.data();
    request.rows = rows;
    request.tau = tau.data();
    request.tau_stride = 1;
    request.available = available.data();
    request.available_stride = 1;
    for (const Mode mode : {Mode::kDual, Mode::kPolicy}) {
        request.mode = mode;
        Results results(rows, shape.candidates);
        decide(*snapshot, request, results.out());
        for (std::size_t r = 0; r < rows; ++r) {
            const bool valid = r == 5 || r == 7;
            CHECK((results.choice[r] >= 0) == valid);
            CHECK((results.status[r] == static_cast<std::uint8_t>(Status::kInvalid)) == !valid);
            CHECK(std::isnan(results.mu[r]) == !valid);
            CHECK(std::isnan(results.score[r]) == !valid);
        }
    }
    std::vector<double> price(shape.candidates, 0.1);
    for (const double wrong : {-1.0, std::nan(""), HUGE_VAL}) {
        price[1] = wrong;
        request.price_usd = price.data();
        Results results(rows, shape.candidates);
        decide(*snapshot, request, results.out());
        CHECK(results.choice[7] == -1);
    }
}

void wrong_tensors_are_named() {
    const Shape shape;
    SnapshotOptions options;
    options.price_usd.assign(shape.candidates, 1.0);
    options.dual = fixture::make_path();
    const auto build = [&](const Tensors& tensors) { Snapshot(tensors, options); };
    const fixture::RandomTensors good(shape, 1);
    build(good.views);
    for (const auto& [name, view] : good.views) {
        Tensors tensors = good.views;
        tensors.erase(name);
        const bool optional = name == "policy.w1";
        const std::string where =
            optional ? "tensors: expected names" : "tensors[\"" + name + "\"]: expected";
        CHECK(throws<std::invalid_argument>([&] { build(tensors); }, where));
        tensors = good.views;
        tensors[name].shape.push_back(1);
        CHECK(throws<std::invalid_argument>([&] { build(tensors); }, "tensors["));
    }
    Tensors tensors = good.views;
    const std::vector<float> bad(shape.hidden, std::nanf(""));
    tensors["policy.b1"].data = bad.data();
    CHECK(throws<std::invalid_argument>([&] { build(tensors); },
                                        "tensors[\"policy.b1\"]: expected finite values, got nan"));
    options.gamma = 0.0;
    CHECK(throws<std::invalid_argument>([&] { build(good.views); }, "gamma: expected"));
}

void paths_are_checked() {
    const std::vector<float> parameter{1.0f, 0.0f};
    std::vector<std::int32_t> code(kGridSteps + 1, 15);
    const auto build = [&](int max) { Path(parameter, code, max, code, max); };
    build(kGridSteps);
    CHECK(throws<std::invalid_argument>([&] { build(kGridSteps + 1); }, "certified_max: expected"));
    code[5] = 17;
    build(4);
    CHECK(throws<std::invalid_argument>([&] { build(5); }, "certified: expected steps"));
    code[5] = -1;
    CHECK(throws<std::invalid_argument>([&] { build(5); }, "certified: expected steps"));
}

// Threads share snapshots that another thread replaces; scratch is per thread.
void threads_share_snapshots() {
    const Shape shape{32, 16, 7, 24};
    const std::size_t rows = 13;
    const auto x = fixture::random_rows(rows, shape.dim, 5);
    const double tau = 0.7;
    std::mutex mutex;
    auto current = make_snapshot(shape, 1, 1);
    std::atomic<bool> stop{false};
    std::vector<std::thread> threads;
    for (int t = 0; t < 8; ++t)
        threads.emplace_back([&] {
            for (int i = 0; i < 300; ++i) {
                const auto snapshot = [&] {
                    const std::lock_guard lock(mutex);
                    return current;
                }();
                Results first(rows, shape.candidates);
                Results second(rows, shape.candidates);
                Request request;
                request.x = x.data();
                request.rows = rows;
                request.tau = &tau;
                request.mode = i % 2 ? Mode::kPolicy : Mode::kDual;
                decide(*snapshot, request, first.out());
                decide(*snapshot, request, second.out());
                CHECK(first.choice == second.choice);
                CHECK(same_bits(first.scores.data(), second.scores.data(), first.scores.size()));
            }
        });
    std::thread swapper([&] {
        for (int version = 2; !stop; ++version) {
            auto next = make_snapshot(shape, version, version);
            const std::lock_guard lock(mutex);
            current.swap(next);
        }
    });
    for (auto& thread : threads) thread.join();
    stop = true;
    swapper.join();
}

// In the order that forward.hpp gives, written out: a kernel on a GPU adds in it too.
void means_add_in_lanes() {
    for (const std::size_t dim : {1u, 15u, 16u, 33u, 384u})
        for (const std::size_t tokens : {0u, 1u, 7u, 8u, 9u, 64u}) {
            auto x = fixture::random_rows(std::max<std::size_t>(tokens, 1), dim, 11);
            std::vector<std::uint8_t> live(tokens, 1);
            std::size_t count = tokens;
            for (std::size_t t = 0; t < tokens; t += 3) {
                live[t] = 0;
                --count;
                // what does not count is not looked at
                for (std::size_t j = 0; j < dim; ++j) x[t * dim + j] = std::nanf("");
            }
            std::vector<float> mean(dim, 77.0f);
            masked_mean(x.data(), live.data(), tokens, dim, mean.data());
            for (std::size_t j = 0; j < dim; ++j) {
                float lane[8] = {};
                for (std::size_t t = 0; t < tokens; ++t)
                    if (live[t]) lane[t % 8] += x[t * dim + j];
                const float sum = ((lane[0] + lane[4]) + (lane[2] + lane[6])) +
                                  ((lane[1] + lane[5]) + (lane[3] + lane[7]));
                CHECK(mean[j] == sum / static_cast<float>(std::max<std::size_t>(count, 1)));
            }
        }
}

}  // namespace

int main() {
    means_add_in_lanes();
    batch_equals_singles();
    bad_values_make_invalid_rows();
    wrong_tensors_are_named();
    paths_are_checked();
    threads_share_snapshots();
    for (int i = 0; i <= kGridSteps; ++i) {
        const double tau = i / 1000.0;
        CHECK(grid_index(tau) == i && grid_index(static_cast<float>(tau)) == i);
    }
}
