#include <algorithm>
#include <cstring>

#include "listener_decide.hpp"

namespace proteus {
namespace {

// Rows of a batch that are decided at once: the engine's own chunk, and below a millisecond.
constexpr std::size_t kSliceRows = 96;
// Of batches while it sheds, but for one that waits behind another.
constexpr auto kWaitingWork = std::chrono::milliseconds(1);

}  // namespace

// A batch, decided in slices so that nobody waits long behind it.
struct Decider::Job {
    Call* call;
    std::shared_ptr<const Served> served;
    proto::RouteBatchRequest request;
    Options options;
    std::size_t rows;
    std::size_t encoded = 0;
    std::size_t decided = 0;
    std::vector<float> x;  // of a slice
    std::vector<std::int32_t> choice;
    std::vector<float> mu;
    std::vector<float> score;
    std::vector<std::uint8_t> status;
    std::vector<float> floor;
    std::optional<Clock::time_point> begun;
    Clock::duration encoding{0};
    Clock::duration deciding{0};

    double tau(std::size_t row) const { return request.tau[request.tau.size() == 1 ? 0 : row]; }
    std::size_t width() const { return served->snapshot->input_dim; }
    std::string_view embedding(std::size_t row) const {
        return request.embeddings.substr(row * width() * sizeof(float), width() * sizeof(float));
    }
    void decide_slice();
    std::optional<Refusal> check_strict() const;
};

Decider::Decider(std::size_t max_calls, std::size_t max_rows, std::size_t max_burst)
    : max_calls_(max_calls), max_rows_(max_rows), max_burst_(max_burst), burst_(max_burst) {}

Decider::~Decider() = default;

bool Decider::route_batch(const std::shared_ptr<const Served>& served, Call& call) {
    auto job = std::make_unique<Job>();
    proto::RouteBatchRequest& request = job->request;
    Session& session = *call.session;
    if (!proto::parse(call.message, request)) {
        session.refuse(call, no_message("RouteBatchRequest", call.message.size()));
        return true;
    }
    if ((request.texts.count && !served->decides_text) ||
        (!request.embeddings.empty() && !served->decides_embedding))
        return false;
    Violations violations;
    std::size_t rows = request.texts.count;
    if (request.texts.count && !request.embeddings.empty()) {
        violations.add("texts", "expected texts or embeddings, got both");
    } else if (request.texts.count) {
        if (request.rows != 0 && request.rows != rows)
            violations.add("rows", "expected " + std::to_string(rows) +
                                       " as there are texts, got " + std::to_string(request.rows));
    } else if (!request.embeddings.empty()) {
        rows = request.rows;
        check_embeddings(*served, "embeddings", request.embeddings, rows, violations);
    } else {
        violations.add("texts", "expected texts or embeddings, got neither");
    }
    if (rows > kMaxBatchRows)
        violations.add("rows", "expected at most " + std::to_string(kMaxBatchRows) + ", got " +
                                   std::to_string(rows));
    const std::size_t taus = request.tau.size();
    if (taus == 0 || (taus != 1 && taus != rows))
        violations.add("tau", "expected " + (rows <= 1 ? "1" : "1 or " + std::to_string(rows)) +
                                  " values, got " + std::to_string(taus));
    const Options options =
        take_options(*served, request.available, request.mode, request.guarantee, violations);
    if (violations.size()) {
        session.refuse(call, invalid(violations));
    } else if (is_full(rows, call.arrived)) {
        shed_batches_.refuse(call.arrived);
        ++stats_.rejected;
        session.refuse(call, overloaded());
    } else {
        job->call = &call;
        job->served = served;
        job->options = options;
        job->rows = rows;
        job_rows_ += rows;
        call.slot = &job->call;
        jobs_.push_back(std::move(job));
    }
    return true;
}

bool Decider::is_full(std::size_t rows, Clock::time_point now) const {
    // one at work and one that waits, so that there is always work
    if (shed_batches_.is_on(now) && jobs_.size() > 1 &&
        job_rows_ + rows >
            batch_cost_.rows_in(std::max<Clock::duration>(kWaitingWork, pause(now) / 4)))
        return true;
    return jobs_.size() >= max_calls_ || (job_rows_ && job_rows_ + rows > max_rows_);
}

void Decider::decide_batches(Clock::duration budget) {
    const auto until = Clock::now() + budget;
    while (!jobs_.empty()) {
        std::unique_ptr<Job> job = std::move(jobs_.front());
        jobs_.pop_front();
        if (step(*job, until)) {
            job_rows_ -= job->rows;
        } else {
            jobs_.push_back(std::move(job));
        }
        decided_ = Clock::now();
        if (decided_ >= until) return;
    }
}

// True once the job is done, or nobody waits for it.
bool Decider::step(Job& job, Clock::time_point until) {
    if (!job.call) return true;
    auto now = Clock::now();
    if (job.call->deadline <= now) {
        ++stats_.expired;
        Call& call = *job.call;
        call.leave();
        call.session->refuse(call, deadline_exceeded());
        return true;
    }
    if (!job.begun) job.begun = now;
    const std::size_t slice = std::min(kSliceRows, job.rows - job.decided);
    job.x.resize(slice * job.width());
    for (std::size_t end = job.decided + slice; job.encoded < end; ++job.encoded) {
        float* x = job.x.data() + (job.encoded - job.decided) * job.width();
        if (!job.request.texts.count) {
            std::memcpy(x, job.embedding(job.encoded).data(), job.width() * sizeof(float));
            continue;
        }
        job.served->snapshot->options.encoder->encode(job.request.texts.kept[job.encoded], x);
        if (job.encoded % 4 == 3 && Clock::now() >= until) {
            ++job.encoded;
            break;
        }
    }
    const auto encoded = Clock::now();
    job.encoding += encoded - now;
    if (job.encoded < job.decided + slice) return false;
    job.decide_slice();
    job.deciding += Clock::now() - encoded;
    if (job.decided < job.rows) return false;
    ++stats_.batches;
    stats_.rows += job.rows;
    ++stats_.calls;
    times_.queue.add(nanoseconds(*job.begun - job.call->arrived));
    times_.encode.add(nanoseconds(job.encoding));
    times_.decide.add(nanoseconds(job.deciding));
    if (job.rows) batch_cost_.add(job.encoding + job.deciding, job.rows);
    if (Tally* tally = job.served->snapshot->options.tally.get())
        for (std::size_t r = 0; r < job.rows; ++r) tally->add(job.choice[r], job.status[r]);
    answer(job);
    return true;
}

void Decider::Job::decide_slice() {
    const std::size_t slice = encoded - decided;
    for (auto* values : {&mu, &score, &floor}) values->resize(encoded);
    choice.resize(encoded);
    status.resize(encoded);
    Request batch;
    batch.x = x.data();
    batch.rows = slice;
    const bool one_tau = request.tau.size() == 1;
    batch.tau = request.tau.data() + (one_tau ? 0 : decided);
    batch.tau_stride = one_tau ? 0 : 1;
    batch.mode = options.mode;
    batch.guarantee = options.guarantee;
    batch.available = &options.available;
    decide(*served->snapshot, batch,
           {choice.data() + decided, mu.data() + decided, score.data() + decided,
            status.data() + decided, floor.data() + decided, nullptr, nullptr});
    decided = encoded;
}

// What a strict batch is refused with: an INVALID row, which is named, or an INFEASIBLE one.
std::optional<Refusal> Decider::Job::check_strict() const {
    const auto find = [&](Status wanted) {
        return static_cast<std::size_t>(
            std::find(status.begin(), status.end(), static_cast<std::uint8_t>(wanted)) -
            status.begin());
    };
    if (const std::size_t row = find(Status::kInvalid); row < rows) {
        const std::string place = "[" + std::to_string(row) + "]";
        if (!in_range(tau(row))) return invalid("tau" + place, outside(tau(row)));
        if (!request.texts.count && !all_finite(embedding(row)))
            return invalid("embeddings" + place, "expected finite values, got NaN or infinity");
        return no_candidate();
    }
    if (const std::size_t row = find(Status::kInfeasible); row < rows) {
        const auto count = static_cast<std::size_t>(std::count(
            status.begin(), status.end(), static_cast<std::uint8_t>(Status::kInfeasible)));
        return infeasible(tau(row), count, served->largest(options.mode, options.guarantee));
    }
    return std::nullopt;
}

void Decider::answer(Job& job) {
    Call& call = *job.call;
    call.leave();
    if (job.request.strict)
        if (const auto refusal = job.check_strict()) return call.session->refuse(call, *refusal);
    const std::vector<std::int32_t> status(job.status.begin(), job.status.end());
    std::vector<double> floor(job.rows);
    std::transform(job.floor.begin(), job.floor.end(), floor.begin(), rounded);
    call.session->reply(call, true, [&](std::string& out) {
        out += job.served->candidate_fields;
        proto::put_packed(out, 2, job.choice);
        proto::put_packed(out, 3, job.mu);
        proto::put_packed(out, 4, job.score);
        proto::put_packed(out, 5, status);
        proto::put_packed(out, 6, floor);
        if (const auto& tau_max = job.served->largest(job.options.mode, job.options.guarantee))
            proto::put_double(out, 7, *tau_max);
        put_timings(out, 8, {*job.begun - call.arrived, job.encoding, job.deciding});
        proto::put_bytes(out, 9, job.served->versions);
    });
}

}  // namespace proteus
