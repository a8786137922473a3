// Bounded queue in front of threads that decide what is there as one batch.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "batch.hpp"
#include "histogram.hpp"
#include "snapshot.hpp"

namespace proteus {

struct QueueFull : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct BatcherOptions {
    std::size_t max_batch_size = 256;
    std::size_t max_queue_rows = 4096;
    // For which the first of a batch waits for others, but no longer than half of the time that
    // the deadline of any leaves.
    std::chrono::microseconds window{0};
    TokenLimits tokens{};
    // Threads that form and compute batches in turn, one batch each. One is right where the backend
    // computes on the caller's cores. With two, the next batch is formed, tokenised and launched
    // while a device computes the one before, and a batch needs no thread to hand it to another.
    std::size_t lanes = 1;
};

struct BatcherStats {
    std::uint64_t submitted = 0;  // entries taken into the queue
    std::uint64_t completed = 0;
    std::uint64_t rejected = 0;  // queue full
    std::uint64_t expired = 0;   // dropped or given up: too late, or nobody waits
    std::uint64_t failed = 0;
    std::uint64_t batches = 0;
    std::uint64_t rows = 0;         // computed
    std::uint64_t queued_rows = 0;  // waiting now
};

struct BatcherTimes {
    Histogram::Counts queue;              // of an entry, until its batch began
    Histogram::Counts encode;             // of a batch
    Histogram::Counts decide;             // of a batch
    Histogram::Counts total;              // of an entry, until its answer was there
    std::array<std::uint64_t, 4> sum_ns;  // of the four
};

class Batcher {
  public:
    class Entry;
    using Ticket = std::shared_ptr<Entry>;
    using Done = std::function<void()>;

    // Counts go on where those of `before` are, if there is one; it goes on counting too.
    Batcher(std::shared_ptr<const Snapshot> snapshot, BatcherOptions options, Backend backend = {},
            const Batcher* before = nullptr);
    ~Batcher();
    Batcher(const Batcher&) = delete;
    Batcher& operator=(const Batcher&) = delete;

    // Throws QueueFull, DeadlinePassed, std::invalid_argument, also for more rows than the queue
    // ever holds, or std::runtime_error once closed.
    // `done` is called once, when there is an outcome to take, unless the ticket was abandoned
    // before: on a lane's thread, or one that submits or closes, under no lock. It may not throw or
    // block; an event loop's pushes a tag into its Completions.
    Ticket submit(Query query, Done done = nullptr);

    // Waits at most `slice`; true once there is an outcome. Throws DeadlinePassed at the deadline.
    static bool wait(const Ticket& ticket, Clock::duration slice);

    // Whether there is an outcome to take.
    static bool ready(const Ticket& ticket);

    // The answer of a ticket that is ready, once; throws what went wrong.
    static Answer take(const Ticket& ticket);

    // Says that nobody waits any more: a queued entry is dropped when its turn comes.
    static void abandon(const Ticket& ticket);

    // Refuses new entries; finishes the queued ones, or fails them. Returns once the lanes are
    // gone, that is, after the batches that are being computed. Nothing happens in a fork.
    void close(bool drain);

    // In a fork, which has no lanes, or on one of its own: it can be neither used nor destroyed.
    bool is_foreign() const;

    BatcherStats stats() const;
    BatcherTimes times() const;
    bool takes_prompts() const { return backend_.takes_prompts(); }

  private:
    struct Counters {
        std::atomic<std::uint64_t> submitted{0};
        std::atomic<std::uint64_t> completed{0};
        std::atomic<std::uint64_t> rejected{0};
        std::atomic<std::uint64_t> expired{0};
        std::atomic<std::uint64_t> failed{0};
        std::atomic<std::uint64_t> batches{0};
        std::atomic<std::uint64_t> rows{0};
        Histogram queue;
        Histogram encode;
        Histogram decide;
        Histogram total;
    };

    void work();
    std::vector<Ticket> next_batch();
    void decide_batch(const std::vector<Ticket>& batch);
    void refuse_foreign() const;

    // What has left the queue without being computed, released after the lock.
    struct Dropped {
        std::vector<Ticket> late;
        std::vector<Ticket> abandoned;
    };

    void drop_unwanted(Clock::time_point now, Dropped& dropped);
    void expire(const Dropped& dropped);
    Clock::time_point window_end(const Entry& entry) const;

    const std::shared_ptr<const Snapshot> snapshot_;
    const BatcherOptions options_;
    const Backend backend_;
    const pid_t process_;
    const std::shared_ptr<Counters> shared_counters_;
    Counters& counters_;

    std::mutex turn_;   // held by the lane that forms a batch
    std::mutex mutex_;  // guards the next seven; the counts are written under it, read without
    std::condition_variable arrived_;
    std::deque<Ticket> queue_;
    std::atomic<std::uint64_t> queued_rows_{0};
    std::uint64_t queued_tokens_ = 0;
    Clock::time_point window_end_ = Clock::time_point::max();  // of the batch to come
    Clock::time_point swept_{};                                // when drop_unwanted last ran
    bool closed_ = false;

    std::mutex join_mutex_;
    std::vector<std::thread> lanes_;
};

}  // namespace proteus
