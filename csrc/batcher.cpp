#include "batcher.hpp"

#include <algorithm>
#include <utility>

namespace proteus {

// State of one call. The worker and the waiter each hold a reference, so either may leave first.
class Batcher::Entry {
  public:
    enum class State { kQueued, kRunning, kDone, kAbandoned };

    explicit Entry(Query given) : query(std::move(given)), enqueued(Clock::now()) {}

    // False if the waiter has left.
    bool start() {
        const std::lock_guard lock(mutex_);
        if (state_ != State::kQueued) return false;
        state_ = State::kRunning;
        return true;
    }

    void finish(Answer answer) {
        {
            const std::lock_guard lock(mutex_);
            answer_ = std::move(answer);
            if (state_ != State::kAbandoned) state_ = State::kDone;
        }
        changed_.notify_all();
    }

    void fail(std::exception_ptr error) {
        {
            const std::lock_guard lock(mutex_);
            error_ = std::move(error);
            if (state_ != State::kAbandoned) state_ = State::kDone;
        }
        changed_.notify_all();
    }

    void abandon() {
        const std::lock_guard lock(mutex_);
        if (state_ != State::kDone) state_ = State::kAbandoned;
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

    Answer take() {
        const std::lock_guard lock(mutex_);
        if (error_) std::rethrow_exception(error_);
        return std::move(answer_);
    }

    const Query query;
    const Clock::time_point enqueued;

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    State state_ = State::kQueued;
    Answer answer_;
    std::exception_ptr error_;
};

namespace {

std::int64_t nanoseconds(Clock::duration duration) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count();
}

// A swap may bring a snapshot for which a queued entry is wrong, so this is checked twice.
void check(const Query& query, const Snapshot& snapshot) {
    if (query.mode == Mode::kPolicy && !snapshot.policy)
        throw std::invalid_argument(
            "mode: expected \"dual\" (the checkpoint has no policy), got \"policy\"");
    if (!query.texts.empty()) {
        if (!snapshot.options.encoder)
            throw std::invalid_argument(
                "texts: expected None (the checkpoint has no hash encoder), got texts");
    } else if (query.x.size() != query.rows * snapshot.input_dim) {
        throw std::invalid_argument("x: expected shape (" + std::to_string(query.rows) + ", " +
                                    std::to_string(snapshot.input_dim) + "), got " +
                                    std::to_string(query.x.size()) + " values");
    }
}

// Rows of the entries that share mode and guarantee, and where their answers begin.
struct Group {
    Mode mode;
    Guarantee guarantee;
    std::vector<std::size_t> entries;
    std::size_t rows = 0;
};

std::vector<Group> group_entries(const std::vector<const Query*>& queries, Mode default_mode) {
    std::vector<Group> groups;
    for (std::size_t i = 0; i < queries.size(); ++i) {
        const Mode mode = queries[i]->mode.value_or(default_mode);
        const Guarantee guarantee = queries[i]->guarantee;
        auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& g) {
            return g.mode == mode && g.guarantee == guarantee;
        });
        if (group == groups.end()) group = groups.insert(group, {mode, guarantee, {}, 0});
        group->entries.push_back(i);
        group->rows += queries[i]->rows;
    }
    return groups;
}

// Flat arguments and results of one group.
struct GroupBuffers {
    std::vector<float> x;
    std::vector<double> tau;
    std::vector<std::uint64_t> available;
    Answer answer;

    void resize(std::size_t rows, std::size_t candidates) {
        available.resize(rows);
        tau.resize(rows);
        answer.choice.resize(rows);
        answer.mu.resize(rows);
        answer.score.resize(rows);
        answer.status.resize(rows);
        answer.certified_floor.resize(rows);
        answer.scores.resize(rows * candidates);
    }
};

template <typename T>
std::vector<T> part(const std::vector<T>& from, std::size_t first, std::size_t count) {
    return {from.begin() + first, from.begin() + first + count};
}

Answer answer_part(const Answer& from, std::size_t first, std::size_t rows, std::size_t k) {
    Answer answer;
    answer.choice = part(from.choice, first, rows);
    answer.mu = part(from.mu, first, rows);
    answer.score = part(from.score, first, rows);
    answer.status = part(from.status, first, rows);
    answer.certified_floor = part(from.certified_floor, first, rows);
    answer.scores = part(from.scores, first * k, rows * k);
    answer.candidates = k;
    return answer;
}

void fill_inputs(const Snapshot& snapshot, const Group& group,
                 const std::vector<const Query*>& queries, GroupBuffers& buffers) {
    const std::size_t dim = snapshot.input_dim;
    buffers.x.resize(group.rows * dim);
    buffers.resize(group.rows, snapshot.candidates);
    std::size_t row = 0;
    for (const std::size_t entry : group.entries) {
        const Query& query = *queries[entry];
        std::copy(query.x.begin(), query.x.end(), buffers.x.begin() + row * dim);
        for (std::size_t r = 0; r < query.rows; ++r, ++row) {
            buffers.tau[row] = query.tau.size() == 1 ? query.tau[0] : query.tau[r];
            buffers.available[row] = query.available;
            if (!query.texts.empty())
                snapshot.options.encoder->encode(query.texts[r], buffers.x.data() + row * dim);
        }
    }
}

void decide_group(const Snapshot& snapshot, const Group& group, GroupBuffers& buffers) {
    Request request;
    request.x = buffers.x.data();
    request.rows = group.rows;
    request.tau = buffers.tau.data();
    request.tau_stride = 1;
    request.mode = group.mode;
    request.guarantee = group.guarantee;
    request.available = buffers.available.data();
    request.available_stride = 1;
    Answer& out = buffers.answer;
    decide(snapshot, request,
           {out.choice.data(), out.mu.data(), out.score.data(), out.status.data(),
            out.certified_floor.data(), nullptr, out.scores.data()});
}

std::runtime_error closed_error() { return std::runtime_error("batcher: closed"); }

}  // namespace

Batcher::Batcher(std::shared_ptr<const Snapshot> snapshot, BatcherOptions options)
    : options_(options), snapshot_(std::move(snapshot)) {
    if (options_.max_batch_size == 0)
        throw std::invalid_argument("max_batch_size: expected at least 1, got 0");
    if (options_.max_queue_rows == 0)
        throw std::invalid_argument("max_queue_rows: expected at least 1, got 0");
    worker_ = std::thread([this] { work(); });
}

Batcher::~Batcher() { close(false); }

std::shared_ptr<const Snapshot> Batcher::snapshot() const {
    const std::lock_guard lock(snapshot_mutex_);
    return snapshot_;
}

void Batcher::swap(std::shared_ptr<const Snapshot> snapshot) {
    // the old one is released after the lock
    const std::lock_guard lock(snapshot_mutex_);
    snapshot_.swap(snapshot);
}

BatcherStats Batcher::stats() const {
    const std::lock_guard lock(mutex_);
    return stats_;
}

Batcher::Ticket Batcher::submit(Query query) {
    if (query.rows == 0) throw std::invalid_argument("x: expected at least one row, got none");
    check(query, *snapshot());
    auto ticket = std::make_shared<Entry>(std::move(query));
    const std::size_t rows = ticket->query.rows;
    {
        const std::lock_guard lock(mutex_);
        if (closed_) throw closed_error();
        if (ticket->query.deadline && *ticket->query.deadline <= ticket->enqueued) {
            ++stats_.expired;
            throw DeadlinePassed("deadline_s: expected time to compute, got none");
        }
        if (stats_.queued_rows + rows > options_.max_queue_rows) {
            ++stats_.rejected;
            throw QueueFull("queue: expected at most " + std::to_string(options_.max_queue_rows) +
                            " rows, got " + std::to_string(stats_.queued_rows + rows));
        }
        stats_.queued_rows += rows;
        ++stats_.submitted;
        queue_.push_back(ticket);
    }
    arrived_.notify_one();
    return ticket;
}

bool Batcher::wait(const Ticket& ticket, Clock::duration slice) { return ticket->wait(slice); }
Answer Batcher::take(const Ticket& ticket) { return ticket->take(); }
void Batcher::abandon(const Ticket& ticket) { ticket->abandon(); }

void Batcher::close(bool drain) {
    std::deque<Ticket> refused;
    {
        const std::lock_guard lock(mutex_);
        closed_ = true;
        if (!drain) {
            refused.swap(queue_);
            stats_.queued_rows = 0;
            stats_.failed += refused.size();
        }
    }
    arrived_.notify_all();
    for (const Ticket& ticket : refused) ticket->fail(std::make_exception_ptr(closed_error()));
    const std::lock_guard lock(join_mutex_);
    if (worker_.joinable()) worker_.join();
}

// What is there, in order of arrival and up to max_batch_size rows; empty once closed and drained.
std::vector<Batcher::Ticket> Batcher::next_batch() {
    std::unique_lock lock(mutex_);
    for (;;) {
        arrived_.wait(lock, [&] { return closed_ || !queue_.empty(); });
        if (queue_.empty()) return {};
        if (options_.window.count() > 0) {
            const auto until = queue_.front()->enqueued + options_.window;
            arrived_.wait_until(lock, until, [&] {
                return closed_ || stats_.queued_rows >= options_.max_batch_size;
            });
        }
        std::vector<Ticket> batch;
        std::size_t rows = 0;
        const auto now = Clock::now();
        while (!queue_.empty()) {
            const Ticket& front = queue_.front();
            const std::size_t more = front->query.rows;
            if (!batch.empty() && rows + more > options_.max_batch_size) break;
            const bool late = front->query.deadline && *front->query.deadline <= now;
            if (!late && front->start()) {
                rows += more;
                batch.push_back(front);
            } else {
                // the waiter leaves by itself at its deadline
                ++stats_.expired;
            }
            stats_.queued_rows -= more;
            queue_.pop_front();
        }
        if (!batch.empty()) return batch;
    }
}

void Batcher::decide_batch(const std::vector<Ticket>& batch) {
    const auto begin = Clock::now();
    // held to the end of the batch: its answers come from one snapshot
    const std::shared_ptr<const Snapshot> snapshot = this->snapshot();
    std::vector<const Query*> queries;
    std::vector<Ticket> taken;
    std::vector<std::pair<Ticket, std::exception_ptr>> refused;
    for (const Ticket& ticket : batch) {
        try {
            check(ticket->query, *snapshot);
            queries.push_back(&ticket->query);
            taken.push_back(ticket);
        } catch (...) {
            refused.emplace_back(ticket, std::current_exception());
        }
    }
    std::uint64_t rows = 0;
    std::uint64_t failed = refused.size();
    std::vector<Answer> answers(taken.size());
    std::exception_ptr error;
    try {
        const auto groups = group_entries(queries, snapshot->options.default_mode);
        std::vector<GroupBuffers> buffers(groups.size());
        for (std::size_t g = 0; g < groups.size(); ++g)
            fill_inputs(*snapshot, groups[g], queries, buffers[g]);
        const auto encoded = Clock::now();
        for (std::size_t g = 0; g < groups.size(); ++g)
            decide_group(*snapshot, groups[g], buffers[g]);
        const auto decided = Clock::now();
        for (std::size_t g = 0; g < groups.size(); ++g) {
            std::size_t row = 0;
            for (const std::size_t i : groups[g].entries) {
                answers[i] =
                    answer_part(buffers[g].answer, row, queries[i]->rows, snapshot->candidates);
                answers[i].queue_ns = nanoseconds(begin - taken[i]->enqueued);
                answers[i].encode_ns = nanoseconds(encoded - begin);
                answers[i].decide_ns = nanoseconds(decided - encoded);
                answers[i].version = snapshot->options.version;
                row += queries[i]->rows;
            }
            rows += groups[g].rows;
        }
    } catch (...) {
        error = std::current_exception();
        failed += taken.size();
    }
    {
        // before the answers leave, so that a caller who has one sees it counted
        const std::lock_guard lock(mutex_);
        ++stats_.batches;
        stats_.rows += rows;
        stats_.failed += failed;
        if (!error) stats_.completed += taken.size();
    }
    for (const auto& [ticket, reason] : refused) ticket->fail(reason);
    for (std::size_t i = 0; i < taken.size(); ++i) {
        if (error) {
            taken[i]->fail(error);
        } else {
            taken[i]->finish(std::move(answers[i]));
        }
    }
}

void Batcher::work() {
    for (auto batch = next_batch(); !batch.empty(); batch = next_batch()) decide_batch(batch);
}

}  // namespace proteus
