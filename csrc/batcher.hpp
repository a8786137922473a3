// Bounded queue in front of one worker thread that decides what is there as one batch.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "engine.hpp"
#include "snapshot.hpp"

namespace proteus {

using Clock = std::chrono::steady_clock;

struct QueueFull : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct DeadlinePassed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// One caller's rows, as texts or as embeddings.
struct Query {
    std::size_t rows = 0;
    std::vector<ClippedText> texts;  // one a row, or
    std::vector<float> x;            // (rows, input_dim)
    std::vector<double> tau;         // one, or one a row
    std::optional<Mode> mode;        // none: the snapshot's default
    Guarantee guarantee = Guarantee::kCertified;
    std::uint64_t available = ~std::uint64_t{0};
    std::optional<Clock::time_point> deadline;
};

struct Answer {
    std::vector<std::int32_t> choice;
    std::vector<float> mu;
    std::vector<float> score;
    std::vector<std::uint8_t> status;
    std::vector<float> certified_floor;
    std::vector<float> scores;  // (rows, candidates)
    std::size_t candidates = 0;
    std::int64_t queue_ns = 0;
    std::int64_t encode_ns = 0;  // of the whole batch, as the next
    std::int64_t decide_ns = 0;
    std::int64_t version = 0;  // of the snapshot that decided
};

struct BatcherOptions {
    std::size_t max_batch_size = 256;
    std::size_t max_queue_rows = 4096;
    std::chrono::microseconds window{0};
};

struct BatcherStats {
    std::uint64_t submitted = 0;  // entries taken into the queue
    std::uint64_t completed = 0;
    std::uint64_t rejected = 0;  // queue full
    std::uint64_t expired = 0;   // dropped before compute
    std::uint64_t failed = 0;
    std::uint64_t batches = 0;
    std::uint64_t rows = 0;         // computed
    std::uint64_t queued_rows = 0;  // waiting now
};

class Batcher {
  public:
    class Entry;
    using Ticket = std::shared_ptr<Entry>;

    Batcher(std::shared_ptr<const Snapshot> snapshot, BatcherOptions options);
    ~Batcher();
    Batcher(const Batcher&) = delete;
    Batcher& operator=(const Batcher&) = delete;

    // Throws QueueFull, DeadlinePassed, std::invalid_argument, or std::runtime_error once closed.
    Ticket submit(Query query);

    // Waits at most `slice`; true once there is an outcome. Throws DeadlinePassed at the deadline.
    static bool wait(const Ticket& ticket, Clock::duration slice);

    // The answer of a ticket that `wait` reported; throws what went wrong.
    static Answer take(const Ticket& ticket);

    // Tells the worker that nobody waits any more: a queued entry is dropped.
    static void abandon(const Ticket& ticket);

    // Takes effect between batches.
    void swap(std::shared_ptr<const Snapshot> snapshot);

    // Refuses new entries; finishes the queued ones, or fails them. Returns once the worker is
    // gone.
    void close(bool drain);

    BatcherStats stats() const;
    std::shared_ptr<const Snapshot> snapshot() const;

  private:
    void work();
    std::vector<Ticket> next_batch();
    void decide_batch(const std::vector<Ticket>& batch);

    const BatcherOptions options_;

    mutable std::mutex snapshot_mutex_;
    std::shared_ptr<const Snapshot> snapshot_;

    mutable std::mutex mutex_;  // guards the next five
    std::condition_variable arrived_;
    std::deque<Ticket> queue_;
    BatcherStats stats_;
    bool closed_ = false;

    std::mutex join_mutex_;
    std::thread worker_;
};

}  // namespace proteus
