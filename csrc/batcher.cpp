#include "batcher.hpp"

#include <unistd.h>

#include <algorithm>
#include <string>
#include <utility>

namespace proteus {

// State of one call. The lane and the waiter each hold a reference, so either may leave first.
class Batcher::Entry {
  public:
    enum class State { kQueued, kRunning, kDone, kTaken, kAbandoned };

    Entry(Query given, std::size_t cost, Done call)
        : query(std::move(given)), tokens(cost), enqueued(Clock::now()), done_(std::move(call)) {}

    // False if the waiter has left.
    bool start() {
        const std::lock_guard lock(mutex_);
        if (state_ != State::kQueued) return false;
        state_ = State::kRunning;
        return true;
    }

    void finish(Answer answer) {
        settle([&] { answer_ = std::move(answer); });
    }

    void fail(std::exception_ptr error) {
        settle([&] { error_ = std::move(error); });
    }

    void abandon() {
        const std::lock_guard lock(mutex_);
        if (state_ == State::kQueued || state_ == State::kRunning) state_ = State::kAbandoned;
    }

    bool late(Clock::time_point now) const { return query.deadline && *query.deadline <= now; }

    // Whether computing it is still of use.
    bool wanted() {
        if (late(Clock::now())) return false;
        const std::lock_guard lock(mutex_);
        return state_ != State::kAbandoned;
    }

    bool wait(Clock::duration slice) {
        std::unique_lock lock(mutex_);
        auto until = Clock::now() + slice;
        const bool last = query.deadline && *query.deadline <= until;
        if (last) until = *query.deadline;
        if (changed_.wait_until(lock, until, [&] { return state_ == State::kDone; })) return true;
        if (!last) return false;
        state_ = State::kAbandoned;
        throw DeadlinePassed("deadline_s: expected an answer in time, got none");
    }

    bool ready() {
        const std::lock_guard lock(mutex_);
        return state_ == State::kDone;
    }

    Answer take() {
        const std::lock_guard lock(mutex_);
        if (error_) std::rethrow_exception(error_);
        state_ = State::kTaken;
        return std::move(answer_);
    }

    const Query query;
    const std::size_t tokens;
    const Clock::time_point enqueued;

  private:
    template <typename Keep>
    void settle(Keep keep) {
        {
            const std::lock_guard lock(mutex_);
            if (state_ == State::kAbandoned) return;
            keep();
            state_ = State::kDone;
        }
        changed_.notify_all();
        if (done_) done_();
    }

    const Done done_;
    std::mutex mutex_;
    std::condition_variable changed_;
    State state_ = State::kQueued;
    Answer answer_;
    std::exception_ptr error_;
};

namespace {

constexpr std::chrono::milliseconds kSweepPeriod{10};

// The batcher whose lane this thread is: a backend that waits for itself would wait for ever.
thread_local const Batcher* lane_of = nullptr;

std::int64_t nanoseconds(Clock::duration duration) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count();
}

void count(std::atomic<std::uint64_t>& counter, std::uint64_t more = 1) {
    counter.fetch_add(more, std::memory_order_relaxed);
}

std::runtime_error closed_error() { return std::runtime_error("batcher: closed"); }

}  // namespace

Batcher::Batcher(std::shared_ptr<const Snapshot> snapshot, BatcherOptions options, Backend backend,
                 const Batcher* before)
    : snapshot_(std::move(snapshot)),
      options_(options),
      backend_(std::move(backend)),
      process_(::getpid()),
      shared_counters_(before ? before->shared_counters_ : std::make_shared<Counters>()),
      counters_(*shared_counters_) {
    if (options_.max_batch_size == 0)
        throw std::invalid_argument("max_batch_size: expected at least 1, got 0");
    if (options_.max_queue_rows == 0)
        throw std::invalid_argument("max_queue_rows: expected at least 1, got 0");
    if (options_.lanes == 0) throw std::invalid_argument("lanes: expected at least 1, got 0");
    try {
        for (std::size_t i = 0; i < options_.lanes; ++i) lanes_.emplace_back([this] { work(); });
    } catch (...) {
        // no thread to be had: those that are there must not be left running
        close(false);
        throw;
    }
}

Batcher::~Batcher() { close(false); }

BatcherStats Batcher::stats() const {
    const auto get = [](const std::atomic<std::uint64_t>& counter) {
        return counter.load(std::memory_order_relaxed);
    };
    return {get(counters_.submitted), get(counters_.completed), get(counters_.rejected),
            get(counters_.expired),   get(counters_.failed),    get(counters_.batches),
            get(counters_.rows),      get(queued_rows_)};
}

BatcherTimes Batcher::times() const {
    return {counters_.queue.counts(),
            counters_.encode.counts(),
            counters_.decide.counts(),
            counters_.total.counts(),
            {counters_.queue.sum_ns(), counters_.encode.sum_ns(), counters_.decide.sum_ns(),
             counters_.total.sum_ns()}};
}

bool Batcher::is_foreign() const { return ::getpid() != process_ || lane_of == this; }

// Who waits for lanes that are not there, or for itself, waits for ever.
void Batcher::refuse_foreign() const {
    if (!is_foreign()) return;
    if (lane_of == this)
        throw std::runtime_error("batcher: expected another caller than its own backend");
    throw std::runtime_error("batcher: expected the process that made it, got a fork of it");
}

Batcher::Ticket Batcher::submit(Query query, Done done) {
    if (query.rows == 0) throw std::invalid_argument("x: expected at least one row, got none");
    refuse_foreign();
    check(query, *snapshot_, backend_);
    // not QueueFull, which says that a later call may do better
    if (query.rows > options_.max_queue_rows)
        throw std::invalid_argument((query.x.empty() ? "texts" : "x") +
                                    std::string(": expected at most ") +
                                    std::to_string(options_.max_queue_rows) +
                                    " rows (max_queue_rows), got " + std::to_string(query.rows));
    const std::size_t tokens = count_tokens(query, options_.tokens);
    auto ticket = std::make_shared<Entry>(std::move(query), tokens, std::move(done));
    const std::size_t rows = ticket->query.rows;
    Dropped dropped;
    std::uint64_t queued = 0;
    {
        const std::lock_guard lock(mutex_);
        if (closed_) throw closed_error();
        if (ticket->late(ticket->enqueued)) {
            count(counters_.expired);
            throw DeadlinePassed("deadline_s: expected time to compute, got none");
        }
        if (queued_rows_ + rows > options_.max_queue_rows) drop_unwanted(ticket->enqueued, dropped);
        queued = queued_rows_ + rows;
        if (queued <= options_.max_queue_rows) {
            queued_rows_ = queued;
            queued_tokens_ += tokens;
            window_end_ = std::min(window_end_, window_end(*ticket));
            count(counters_.submitted);
            queue_.push_back(ticket);
        }
    }
    expire(dropped);
    if (queued > options_.max_queue_rows) {
        count(counters_.rejected);
        throw QueueFull("queue: expected at most " + std::to_string(options_.max_queue_rows) +
                        " rows, got " + std::to_string(queued));
    }
    arrived_.notify_one();
    return ticket;
}

// A full queue gives up the places of those that are late or have left. Looking at all of it is
// worth it once in a while, not for every call that is refused under overload.
void Batcher::drop_unwanted(Clock::time_point now, Dropped& dropped) {
    if (now - swept_ < kSweepPeriod) return;
    swept_ = now;
    const auto leaves = [&](const Ticket& ticket) {
        const bool late = ticket->late(now);
        if (!late && ticket->wanted()) return false;
        queued_rows_ -= ticket->query.rows;
        queued_tokens_ -= ticket->tokens;
        (late ? dropped.late : dropped.abandoned).push_back(ticket);
        return true;
    };
    queue_.erase(std::remove_if(queue_.begin(), queue_.end(), leaves), queue_.end());
}

void Batcher::expire(const Dropped& dropped) {
    count(counters_.expired, dropped.late.size() + dropped.abandoned.size());
    for (const Ticket& ticket : dropped.late)
        ticket->fail(std::make_exception_ptr(
            DeadlinePassed("deadline_s: expected an answer in time, got none")));
}

// Until when the batch with this entry may wait for others.
Clock::time_point Batcher::window_end(const Entry& entry) const {
    const auto end = entry.enqueued + options_.window;
    if (!entry.query.deadline) return end;
    return std::min(end, entry.enqueued + (*entry.query.deadline - entry.enqueued) / 2);
}

bool Batcher::wait(const Ticket& ticket, Clock::duration slice) { return ticket->wait(slice); }
bool Batcher::ready(const Ticket& ticket) { return ticket->ready(); }
Answer Batcher::take(const Ticket& ticket) { return ticket->take(); }
void Batcher::abandon(const Ticket& ticket) { ticket->abandon(); }

void Batcher::close(bool drain) {
    // any lock may have been held when the fork was made
    if (::getpid() != process_) return;
    refuse_foreign();
    std::deque<Ticket> refused;
    {
        const std::lock_guard lock(mutex_);
        closed_ = true;
        if (!drain) {
            refused.swap(queue_);
            queued_rows_ = 0;
            queued_tokens_ = 0;
            count(counters_.failed, refused.size());
        }
    }
    arrived_.notify_all();
    for (const Ticket& ticket : refused) ticket->fail(std::make_exception_ptr(closed_error()));
    const std::lock_guard lock(join_mutex_);
    for (auto& lane : lanes_)
        if (lane.joinable()) lane.join();
}

// What is there, in order of arrival and within the limits; empty once closed and drained.
std::vector<Batcher::Ticket> Batcher::next_batch() {
    // one lane waits for entries, the others for their turn to: no wake-up goes to a lane that
    // cannot use it, and a window is one lane's
    const std::lock_guard turn(turn_);
    const std::size_t budget = options_.tokens.budget;
    for (;;) {
        std::vector<Ticket> batch;
        Dropped dropped;
        {
            std::unique_lock lock(mutex_);
            arrived_.wait(lock, [&] { return closed_ || !queue_.empty(); });
            if (queue_.empty()) return {};
            const auto full = [&] {
                return closed_ || queued_rows_ >= options_.max_batch_size ||
                       (budget > 0 && queued_tokens_ >= budget);
            };
            // a call that arrives may bring the end nearer
            while (options_.window.count() > 0 && !full() && Clock::now() < window_end_)
                arrived_.wait_until(lock, window_end_);
            std::size_t rows = 0;
            std::size_t tokens = 0;
            const auto now = Clock::now();
            while (!queue_.empty()) {
                Ticket& front = queue_.front();
                const std::size_t more = front->query.rows;
                const std::size_t cost = front->tokens;
                if (!batch.empty() && (rows + more > options_.max_batch_size ||
                                       (budget > 0 && tokens + cost > budget)))
                    break;
                if (front->late(now)) {
                    dropped.late.push_back(std::move(front));
                } else if (!front->start()) {
                    dropped.abandoned.push_back(std::move(front));
                } else {
                    rows += more;
                    tokens += cost;
                    batch.push_back(std::move(front));
                }
                queued_rows_ -= more;
                queued_tokens_ -= cost;
                queue_.pop_front();
            }
            window_end_ = queue_.empty() ? Clock::time_point::max() : window_end(*queue_.front());
        }
        expire(dropped);
        if (!batch.empty()) return batch;
    }
}

void Batcher::decide_batch(const std::vector<Ticket>& batch) {
    const auto begin = Clock::now();
    std::vector<const Query*> queries;
    std::size_t rows = 0;
    for (const Ticket& ticket : batch) {
        queries.push_back(&ticket->query);
        rows += ticket->query.rows;
    }
    std::vector<Answer> answers;
    std::exception_ptr error;
    bool given_up = false;
    try {
        const auto wanted = [&] {
            return std::any_of(batch.begin(), batch.end(),
                               [](const Ticket& ticket) { return ticket->wanted(); });
        };
        BatchTimes times;
        answers = compute(*snapshot_, backend_, options_.tokens, queries, wanted, times);
        const auto end = Clock::now();
        for (std::size_t i = 0; i < batch.size(); ++i) {
            answers[i].queue_ns = nanoseconds(begin - batch[i]->enqueued);
            counters_.queue.add(answers[i].queue_ns);
            counters_.total.add(nanoseconds(end - batch[i]->enqueued));
        }
        counters_.encode.add(times.encode_ns);
        counters_.decide.add(times.decide_ns);
        if (Tally* tally = snapshot_->options.tally.get())
            for (const Answer& answer : answers)
                for (std::size_t r = 0; r < answer.choice.size(); ++r)
                    tally->add(answer.choice[r], answer.status[r]);
        count(counters_.rows, rows);
    } catch (const DeadlinePassed&) {
        given_up = true;
        error = std::current_exception();
    } catch (...) {
        error = std::current_exception();
    }
    // before the answers leave, so that a caller who has one sees it counted
    count(counters_.batches);
    count(error ? given_up ? counters_.expired : counters_.failed : counters_.completed,
          batch.size());
    for (std::size_t i = 0; i < batch.size(); ++i) {
        if (error) {
            batch[i]->fail(error);
        } else {
            batch[i]->finish(std::move(answers[i]));
        }
    }
}

void Batcher::work() {
    lane_of = this;
    for (auto batch = next_batch(); !batch.empty(); batch = next_batch()) decide_batch(batch);
}

}  // namespace proteus
