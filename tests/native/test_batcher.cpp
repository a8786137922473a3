// test_batcher [operations per thread]: 2,000 by default, 1000000 by hand.
#include <poll.h>

#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>
#include <numeric>
#include <semaphore>
#include <thread>

#include "batcher.hpp"
#include "completions.hpp"
#include "fixture.hpp"

using namespace proteus;
using namespace std::chrono_literals;
using fixture::make_snapshot;
using fixture::Shape;

namespace {

const Shape kShape{16, 0, 5, 8};

Query make_query(std::size_t rows, unsigned seed) {
    Query query;
    query.rows = rows;
    query.x = fixture::random_rows(rows, kShape.dim, seed);
    query.tau.assign(1, 0.5);
    return query;
}

Answer await(const Batcher::Ticket& ticket) {
    while (!Batcher::wait(ticket, 1s)) continue;
    return Batcher::take(ticket);
}

// What the engine says about the same rows.
void check_answer(const Snapshot& snapshot, const Query& query, const Answer& answer) {
    fixture::Results expected(query.rows, kShape.candidates);
    std::vector<double> tau(query.rows, query.tau[0]);
    Request request;
    request.x = query.x.data();
    request.rows = query.rows;
    request.tau = tau.data();
    request.tau_stride = 1;
    request.mode = query.mode.value_or(snapshot.options.default_mode);
    request.guarantee = query.guarantee;
    request.available = &query.available;
    decide(snapshot, request, expected.out());
    CHECK(answer.version == snapshot.options.version);
    CHECK(answer.choice == expected.choice && answer.status == expected.status);
    CHECK(answer.scores.size() == query.rows * kShape.candidates);
    for (std::size_t r = 0; r < query.rows; ++r)
        CHECK(answer.choice[r] < 0 || answer.score[r] == expected.score[r]);
}

// Eight threads with mixed options.
void stress(int operations, std::size_t lanes) {
    const auto snapshot = make_snapshot(kShape);
    // eight callers of up to five rows sometimes find this queue full
    Batcher batcher(snapshot, {8, 32, 0us, {}, lanes});
    std::atomic<std::uint64_t> answered{0};
    std::atomic<std::uint64_t> shed{0};
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 8; ++t)
        threads.emplace_back([&, t] {
            for (int i = 0; i < operations; ++i) {
                Query query = make_query(1 + (i + t) % 5, t * 1000 + i % 97);
                if (i % 3 == 0) query.mode = i % 2 ? Mode::kPolicy : Mode::kDual;
                if (i % 5 == 0) query.guarantee = Guarantee::kCalibrated;
                if (i % 7 == 0) query.available = 0b10110;
                if (i % 11 == 0) query.deadline = Clock::now() + std::chrono::microseconds(i % 500);
                const Query copy = query;
                try {
                    const auto ticket = batcher.submit(std::move(query));
                    if (i % 13 == 0) {
                        Batcher::abandon(ticket);
                        continue;
                    }
                    const Answer answer = await(ticket);
                    check_answer(*snapshot, copy, answer);
                    ++answered;
                } catch (const QueueFull&) {
                    ++shed;
                } catch (const DeadlinePassed&) {
                    CHECK(copy.deadline.has_value());
                }
            }
        });
    const Clock::time_point begin = Clock::now();
    for (auto& thread : threads) thread.join();
    const std::chrono::duration<double, std::milli> took = Clock::now() - begin;
    batcher.close(true);
    const BatcherStats stats = batcher.stats();
    CHECK(stats.queued_rows == 0);
    CHECK(stats.completed >= answered && stats.rejected == shed && stats.failed == 0);
    CHECK(stats.completed + stats.expired >= stats.submitted);
    std::printf("%llu answers in %llu batches, %llu shed, %llu expired in %.0f ms\n",
                static_cast<unsigned long long>(answered.load()),
                static_cast<unsigned long long>(stats.batches),
                static_cast<unsigned long long>(stats.rejected),
                static_cast<unsigned long long>(stats.expired), took.count());
}

// Holds whoever calls `pass` until it is opened, and knows how many have come.
class Gate {
  public:
    void pass() {
        std::unique_lock lock(mutex_);
        ++passed_;
        changed_.notify_all();
        changed_.wait(lock, [&] { return open_; });
    }
    void open() {
        const std::lock_guard lock(mutex_);
        open_ = true;
        changed_.notify_all();
    }
    void await(int calls) {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return passed_ >= calls; });
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    int passed_ = 0;
    bool open_ = false;
};

Query make_prompts(std::vector<std::string> prompts) {
    Query query;
    query.rows = prompts.size();
    query.prompts = std::move(prompts);
    query.tau.assign(1, 0.5);
    return query;
}

// A row that says which text it is of.
void encode_plainly(std::span<const std::string_view> texts, std::size_t dim, float* x) {
    for (std::size_t r = 0; r < texts.size(); ++r) {
        const auto row = fixture::random_rows(1, dim, std::hash<std::string_view>()(texts[r]));
        std::copy(row.begin(), row.end(), x + r * dim);
    }
}

// Encodes plainly once its gate is open; counts the texts.
struct HeldEncoder {
    Gate gate;
    std::atomic<int> encoded{0};

    Backend backend() {
        Backend made;
        made.encode = [this](std::span<const std::string_view> texts, std::size_t dim, float* x) {
            encoded += static_cast<int>(texts.size());
            gate.pass();
            encode_plainly(texts, dim, x);
        };
        return made;
    }
};

// A lane that is held: what comes next stays in the queue.
void queue_is_bounded_and_deadlines_hold() {
    HeldEncoder encoder;
    Batcher batcher(make_snapshot(kShape), {64, 8, 0us}, encoder.backend());
    const auto held = batcher.submit(make_prompts({"held"}));
    encoder.gate.await(1);
    const auto first = batcher.submit(make_query(6, 1));
    CHECK(
        throws<QueueFull>([&] { batcher.submit(make_query(3, 2)); }, "queue: expected at most 8"));
    // what never fits is not worth another try
    CHECK(throws<std::invalid_argument>([&] { batcher.submit(make_query(9, 2)); },
                                        "x: expected at most 8 rows (max_queue_rows), got 9"));
    Query late = make_query(2, 3);
    late.deadline = Clock::now() + 20ms;
    const auto begin = Clock::now();
    const auto second = batcher.submit(late);
    CHECK(throws<DeadlinePassed>([&] { await(second); }, "deadline_s: expected"));
    CHECK(Clock::now() - begin < 200ms);
    encoder.gate.open();
    CHECK(await(first).choice.size() == 6);
    CHECK(await(held).choice.size() == 1);
    const BatcherStats stats = batcher.stats();
    CHECK(stats.expired == 1 && stats.rejected == 1 && stats.rows == 7 && stats.batches == 2);
    late.deadline = Clock::now() - 1ms;
    CHECK(throws<DeadlinePassed>([&] { batcher.submit(late); }, "deadline_s: expected"));
}

// A call that finds the queue full takes the places of those that nobody waits for.
void who_has_left_takes_no_place() {
    HeldEncoder encoder;
    Batcher batcher(make_snapshot(kShape), {64, 4, 0us}, encoder.backend());
    const auto held = batcher.submit(make_prompts({"held"}));
    encoder.gate.await(1);
    const auto left = batcher.submit(make_query(1, 1));
    Query late = make_query(2, 2);
    late.deadline = Clock::now() + 50ms;
    std::atomic<int> done{0};
    const auto expired = batcher.submit(late, [&] { ++done; });
    const auto stays = batcher.submit(make_query(1, 3));
    Batcher::abandon(left);
    while (Clock::now() < *late.deadline) std::this_thread::sleep_for(1ms);
    const auto next = batcher.submit(make_query(3, 4));
    CHECK(done == 1 && Batcher::ready(expired) && batcher.stats().expired == 2);
    CHECK(batcher.stats().queued_rows == 4);
    CHECK(throws<QueueFull>([&] { batcher.submit(make_query(1, 5)); },
                            "queue: expected at most 4 rows, got 5"));
    encoder.gate.open();
    CHECK(await(stays).choice.size() == 1 && await(next).choice.size() == 3);
    CHECK(await(held).choice.size() == 1);
    CHECK(throws<DeadlinePassed>([&] { Batcher::take(expired); }, "deadline_s: expected"));
}

// A window ends while the deadlines in it can still be met.
void a_window_leaves_time_for_deadlines() {
    Batcher batcher(make_snapshot(kShape), {64, 64, 60s});
    const auto patient = batcher.submit(make_query(1, 1));
    Query urgent = make_query(2, 2);
    urgent.deadline = Clock::now() + 400ms;
    const auto begin = Clock::now();
    CHECK(await(batcher.submit(urgent)).choice.size() == 2);
    CHECK(Clock::now() - begin > 100ms);
    CHECK(await(patient).choice.size() == 1);
    CHECK(batcher.stats().batches == 1);
}

void closing_drains_or_fails() {
    for (const bool drain : {true, false}) {
        Batcher batcher(make_snapshot(kShape), {4, 64, 200ms});
        std::vector<Batcher::Ticket> tickets;
        for (unsigned i = 0; i < 3; ++i) tickets.push_back(batcher.submit(make_query(1, i)));
        batcher.close(drain);
        for (const auto& ticket : tickets) {
            if (drain) {
                CHECK(await(ticket).choice.size() == 1);
            } else {
                CHECK(throws<std::runtime_error>([&] { await(ticket); }, "batcher: closed"));
            }
        }
        batcher.close(drain);
        CHECK(throws<std::runtime_error>([&] { batcher.submit(make_query(1, 1)); },
                                         "batcher: closed"));
    }
}

// What the snapshot cannot answer is refused before it is queued.
void a_query_fits_the_snapshot() {
    Shape shape = kShape;
    shape.hidden = 0;
    Batcher batcher(make_snapshot(shape), {64, 64, 0us});
    Query policy = make_query(2, 1);
    policy.mode = Mode::kPolicy;
    CHECK(throws<std::invalid_argument>([&] { batcher.submit(policy); }, "mode: expected"));
    Query narrow = make_query(1, 1);
    narrow.x.pop_back();
    CHECK(throws<std::invalid_argument>([&] { batcher.submit(narrow); }, "x: expected"));
    CHECK(batcher.stats().submitted == 0);
}

void check_prompts(const Snapshot& snapshot, const Query& query, const Answer& answer) {
    Query rows = query;
    rows.x.resize(query.rows * kShape.dim);
    std::vector<std::string_view> texts(query.prompts.begin(), query.prompts.end());
    encode_plainly(texts, kShape.dim, rows.x.data());
    check_answer(snapshot, rows, answer);
}

// Texts of all callers, whatever their mode, are one call of the encoder; embeddings lie between.
void callers_share_an_encoder() {
    const auto snapshot = make_snapshot(kShape);
    Gate gate;
    std::vector<std::size_t> calls;
    Backend backend;
    backend.encode = [&](std::span<const std::string_view> texts, std::size_t dim, float* x) {
        calls.push_back(texts.size());
        gate.pass();
        encode_plainly(texts, dim, x);
    };
    Batcher batcher(snapshot, {64, 64, 0us, {.budget = 100, .text = 20}}, backend);
    const auto first = batcher.submit(make_prompts({"held"}));
    gate.await(1);
    std::vector<std::pair<Query, Batcher::Ticket>> waiting;
    for (int i = 0; i < 9; ++i) {
        Query query = make_prompts({"text " + std::to_string(i), "more"});
        if (i % 2) query.mode = Mode::kPolicy;
        if (i % 3 == 0) query = make_query(3, i);
        waiting.emplace_back(query, batcher.submit(query));
    }
    gate.open();
    for (const auto& [query, ticket] : waiting) {
        if (query.prompts.empty()) {
            check_answer(*snapshot, query, await(ticket));
        } else {
            check_prompts(*snapshot, query, await(ticket));
        }
    }
    CHECK(await(first).encode_ns > 0);
    CHECK((calls == std::vector<std::size_t>{1, 12}));
    // 20 tokens each, of which five are a batch
    const auto wide = [](int i) { return std::string(1000, static_cast<char>('a' + i)); };
    calls.clear();
    const Query large =
        make_prompts({wide(0), wide(1), wide(2), wide(3), wide(4), wide(5), wide(6)});
    check_prompts(*snapshot, large, await(batcher.submit(large)));
    CHECK((calls == std::vector<std::size_t>{5, 2}));
}

void a_backend_may_decide_alone() {
    const auto snapshot = make_snapshot(kShape);
    Backend backend;
    backend.route = [](std::span<const std::string_view> texts, const Request& request,
                       std::size_t dim, Answer& answer) {
        CHECK(request.x == nullptr || (texts.empty() && dim == kShape.dim));
        for (std::size_t r = 0; r < request.rows; ++r) {
            answer.choice[r] = static_cast<std::int32_t>(request.x ? 100 : texts[r].size());
            answer.mu[r] = static_cast<float>(request.tau[r]);
        }
        answer.scores.clear();
    };
    Batcher batcher(snapshot, {64, 64, 100ms}, backend);
    const auto texts = batcher.submit(make_prompts({"a", "bcd"}));
    const auto rows = batcher.submit(make_query(2, 1));
    const Answer answer = await(texts);
    CHECK((answer.choice == std::vector<std::int32_t>{1, 3}));
    CHECK((answer.mu == std::vector<float>{0.5f, 0.5f}));
    CHECK(answer.scores.empty() && answer.candidates == 0);
    CHECK((await(rows).choice == std::vector<std::int32_t>{100, 100}));
    CHECK(batcher.stats().batches == 1);
}

// With two lanes the next batch is formed and begun while a batch runs, a third is not.
void a_second_lane_works_ahead() {
    for (const std::size_t lanes : {1, 2}) {
        Gate gate;
        std::atomic<int> running{0};
        std::atomic<int> most{0};
        Backend backend;
        backend.encode = [&](std::span<const std::string_view> texts, std::size_t dim, float* x) {
            const int now = ++running;
            for (int seen = most; seen < now && !most.compare_exchange_weak(seen, now);) continue;
            gate.pass();
            encode_plainly(texts, dim, x);
            --running;
        };
        const auto snapshot = make_snapshot(kShape);
        Batcher batcher(snapshot, {2, 64, 0us, {}, lanes}, backend);
        std::vector<std::pair<Query, Batcher::Ticket>> waiting;
        for (int i = 0; i < 8; ++i) {
            const Query query = make_prompts({"text " + std::to_string(i), "and"});
            waiting.emplace_back(query, batcher.submit(query));
        }
        gate.await(static_cast<int>(lanes));
        CHECK(batcher.stats().queued_rows == 16 - 2 * lanes);
        gate.open();
        for (const auto& [query, ticket] : waiting) check_prompts(*snapshot, query, await(ticket));
        CHECK(most == static_cast<int>(lanes));
    }
}

void a_failing_backend_fails_its_batch_only() {
    const auto snapshot = make_snapshot(kShape);
    Batcher* self = nullptr;
    Backend backend;
    backend.encode = [&](std::span<const std::string_view> texts, std::size_t dim, float* x) {
        if (texts[0] == "bad") throw std::domain_error("backend: broken");
        if (texts[0] == "self") self->submit(make_prompts({"again"}));
        if (texts[0] == "close") self->close(true);
        encode_plainly(texts, dim, x);
    };
    Batcher batcher(snapshot, {1, 64, 0us}, backend);
    self = &batcher;
    const auto bad = batcher.submit(make_prompts({"bad"}));
    const Query query = make_prompts({"good"});
    const auto good = batcher.submit(query);
    CHECK(throws<std::domain_error>([&] { await(bad); }, "backend: broken"));
    check_prompts(*snapshot, query, await(good));
    // what would wait for itself is told so
    for (const char* word : {"self", "close"}) {
        const auto ticket = batcher.submit(make_prompts({word}));
        CHECK(throws<std::runtime_error>([&] { await(ticket); }, "batcher: expected another"));
    }
    const BatcherStats stats = batcher.stats();
    CHECK(stats.failed == 3 && stats.completed == 1);
}

// What nobody waits for is not encoded: in the queue, nor the rest of a large call.
void what_is_not_wanted_is_not_encoded() {
    HeldEncoder encoder;
    Batcher batcher(make_snapshot(kShape), {64, 64, 0us, {.budget = 2}}, encoder.backend());
    std::atomic<int> done{0};
    const auto count = [&] { ++done; };
    // the first two of these twenty are a batch's budget
    Query large = make_prompts(std::vector<std::string>(20, "text"));
    const auto running = batcher.submit(large, count);
    encoder.gate.await(1);
    Query late = make_prompts({"late"});
    late.deadline = Clock::now() + 5ms;
    const auto expired = batcher.submit(late, count);
    const auto cancelled = batcher.submit(make_prompts({"cancelled"}), count);
    const auto kept = batcher.submit(make_prompts({"kept"}), count);
    Batcher::abandon(running);
    Batcher::abandon(cancelled);
    while (Clock::now() < *late.deadline) std::this_thread::sleep_for(1ms);
    encoder.gate.open();
    CHECK(await(kept).choice.size() == 1);
    CHECK(encoder.encoded == 3);
    CHECK(Batcher::ready(expired) && !Batcher::ready(running) && !Batcher::ready(cancelled));
    CHECK(throws<DeadlinePassed>([&] { Batcher::take(expired); }, "deadline_s: expected"));
    CHECK(batcher.stats().expired == 3 && batcher.stats().failed == 0);
    batcher.close(true);
    // the late one and the kept one: an abandoned call is never heard of again
    CHECK(done == 2);
}

// Eight producers and one loop behind a descriptor: every tag comes out once, none is slept over.
// Few calls are in flight, so that the loop sleeps, and no number of them fills the queue.
void completions_reach_a_loop(int operations) {
    const auto snapshot = make_snapshot(kShape);
    Batcher batcher(snapshot, {16, 64, 0us, {}, 2});
    Completions completions;
    std::mutex mutex;
    std::map<std::uint64_t, Batcher::Ticket> tickets;
    std::counting_semaphore<> room(64);
    std::vector<std::thread> producers;
    for (unsigned t = 0; t < 8; ++t)
        producers.emplace_back([&, t] {
            for (int i = 0; i < operations; ++i) {
                const std::uint64_t tag = static_cast<std::uint64_t>(i) * 8 + t;
                room.acquire();
                // held until the ticket is in the table
                const std::lock_guard lock(mutex);
                tickets[tag] = batcher.submit(make_query(1, static_cast<unsigned>(tag)),
                                              [&completions, tag] { completions.push(tag); });
            }
        });
    int answers = 0;
    int wakes = 0;
    while (answers < 8 * operations) {
        pollfd ready{completions.fd(), POLLIN, 0};
        CHECK(::poll(&ready, 1, 60'000) == 1);
        ++wakes;
        for (const std::uint64_t tag : completions.drain()) {
            const std::lock_guard lock(mutex);
            const auto found = tickets.find(tag);
            CHECK(found != tickets.end() && Batcher::ready(found->second));
            const Answer answer = Batcher::take(found->second);
            if (tag % 16 == 0)
                check_answer(*snapshot, make_query(1, static_cast<unsigned>(tag)), answer);
            tickets.erase(found);
            ++answers;
            room.release();
        }
    }
    for (auto& producer : producers) producer.join();
    CHECK(tickets.empty());
    std::printf("%d answers in %d wake-ups\n", answers, wakes);
}

void durations_fall_into_their_buckets() {
    std::size_t bucket = 0;
    for (std::int64_t ns = 0; ns < (std::int64_t{1} << 37); ns += 1 + ns / 7) {
        const std::size_t found = Histogram::bucket_of(ns);
        CHECK(found >= bucket && found < Histogram::kBuckets);
        CHECK(static_cast<std::uint64_t>(ns) < Histogram::bound_ns(found));
        CHECK(found == 0 || static_cast<std::uint64_t>(ns) >= Histogram::bound_ns(found - 1));
        bucket = found;
    }
    CHECK(bucket == Histogram::kBuckets - 1 && Histogram::bucket_of(-5) == 0);
    Batcher batcher(make_snapshot(kShape), {});
    for (unsigned i = 0; i < 20; ++i) await(batcher.submit(make_query(2, i)));
    const BatcherTimes times = batcher.times();
    const auto sum = [](const Histogram::Counts& counts) {
        return std::accumulate(counts.begin(), counts.end(), std::uint64_t{0});
    };
    CHECK(sum(times.queue) == 20 && sum(times.total) == 20);
    CHECK(sum(times.encode) == 20 && sum(times.decide) == 20);
}

}  // namespace

int main(int argc, char** argv) {
    const int operations = argc > 1 ? std::atoi(argv[1]) : 2000;
    stress(operations, 1);
    stress(operations, 2);
    queue_is_bounded_and_deadlines_hold();
    closing_drains_or_fails();
    a_query_fits_the_snapshot();
    who_has_left_takes_no_place();
    a_window_leaves_time_for_deadlines();
    callers_share_an_encoder();
    a_backend_may_decide_alone();
    a_second_lane_works_ahead();
    a_failing_backend_fails_its_batch_only();
    what_is_not_wanted_is_not_encoded();
    completions_reach_a_loop(operations);
    durations_fall_into_their_buckets();
}
