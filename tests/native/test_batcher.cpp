// test_batcher [operations per thread]: 2,000 by default, 1000000 by hand.
#include <atomic>
#include <thread>

#include "batcher.hpp"
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

// Eight threads with mixed options while snapshots are swapped each millisecond: each answer is
// the one of the snapshot that it names.
void stress(int operations) {
    std::vector<std::shared_ptr<const Snapshot>> snapshots;
    for (int version = 0; version < 4; ++version)
        snapshots.push_back(make_snapshot(kShape, version + 1, version));
    // eight callers of up to five rows sometimes find this queue full
    Batcher batcher(snapshots[0], {8, 16, 0us});
    std::atomic<bool> stop{false};
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
                    check_answer(*snapshots[answer.version], copy, answer);
                    ++answered;
                } catch (const QueueFull&) {
                    ++shed;
                } catch (const DeadlinePassed&) {
                    CHECK(copy.deadline.has_value());
                }
            }
        });
    std::thread swapper([&] {
        for (std::size_t i = 1; !stop; ++i) {
            batcher.swap(snapshots[i % snapshots.size()]);
            std::this_thread::sleep_for(1ms);
        }
    });
    for (auto& thread : threads) thread.join();
    stop = true;
    swapper.join();
    batcher.close(true);
    const BatcherStats stats = batcher.stats();
    CHECK(stats.queued_rows == 0);
    CHECK(stats.completed >= answered && stats.rejected == shed && stats.failed == 0);
    CHECK(stats.completed + stats.expired >= stats.submitted);
    std::printf("%llu answers in %llu batches, %llu shed, %llu expired\n",
                static_cast<unsigned long long>(answered.load()),
                static_cast<unsigned long long>(stats.batches),
                static_cast<unsigned long long>(stats.rejected),
                static_cast<unsigned long long>(stats.expired));
}

// A worker held by a long window: what comes next stays in the queue.
void queue_is_bounded_and_deadlines_hold() {
    Batcher batcher(make_snapshot(kShape), {64, 8, 300ms});
    const auto first = batcher.submit(make_query(6, 1));
    CHECK(
        throws<QueueFull>([&] { batcher.submit(make_query(3, 2)); }, "queue: expected at most 8"));
    Query late = make_query(2, 3);
    late.deadline = Clock::now() + 20ms;
    const auto begin = Clock::now();
    const auto second = batcher.submit(late);
    CHECK(throws<DeadlinePassed>([&] { await(second); }, "deadline_s: expected"));
    CHECK(Clock::now() - begin < 200ms);
    CHECK(await(first).choice.size() == 6);
    const BatcherStats stats = batcher.stats();
    CHECK(stats.expired == 1 && stats.rejected == 1 && stats.rows == 6 && stats.batches == 1);
    late.deadline = Clock::now() - 1ms;
    CHECK(throws<DeadlinePassed>([&] { batcher.submit(late); }, "deadline_s: expected"));
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

// Only the entries that do not fit the new snapshot fail.
void a_swap_fails_what_no_longer_fits() {
    Batcher batcher(make_snapshot(kShape, 1, 1), {64, 64, 100ms});
    Query policy = make_query(2, 1);
    policy.mode = Mode::kPolicy;
    const auto wrong = batcher.submit(policy);
    const auto right = batcher.submit(make_query(3, 2));
    Query text;
    text.rows = 2;
    text.tau = {0.5, 0.9};
    text.texts = {ClippedText("hello"), ClippedText("world")};
    const auto encoded = batcher.submit(text);
    Shape shape = kShape;
    shape.hidden = 0;
    batcher.swap(make_snapshot(shape, 2, 2));
    CHECK(throws<std::invalid_argument>([&] { await(wrong); }, "mode: expected"));
    CHECK(await(right).version == 2);
    CHECK(await(encoded).choice.size() == 2);
    CHECK(batcher.stats().failed == 1 && batcher.stats().completed == 2);
    CHECK(throws<std::invalid_argument>([&] { batcher.submit(policy); }, "mode: expected"));
    Query narrow = make_query(1, 1);
    narrow.x.pop_back();
    CHECK(throws<std::invalid_argument>([&] { batcher.submit(narrow); }, "x: expected"));
}

}  // namespace

int main(int argc, char** argv) {
    stress(argc > 1 ? std::atoi(argv[1]) : 2000);
    queue_is_bounded_and_deadlines_hold();
    closing_drains_or_fails();
    a_swap_fails_what_no_longer_fits();
}
