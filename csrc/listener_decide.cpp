#include "listener_decide.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

namespace proteus {

using Input = proto::RouteRequest::Input;

namespace {

// Without a refusal for so long there is no standing queue, here or at the clients.
constexpr auto kCalm = std::chrono::seconds(1);
constexpr std::chrono::seconds kLongestShedding{60};
// Work of one turn while it sheds: a caller waits for the rest of one turn, then for its own.
constexpr auto kShortTurn = std::chrono::microseconds(300);
constexpr auto kLongestPause = std::chrono::milliseconds(200);
// A refusal waits for the turn before it.
constexpr auto kLongTurn = std::chrono::milliseconds(10);

}  // namespace

void Shedding::refuse(Clock::time_point now) {
    if (!is_on(now)) {
        length_ = now - refused_ < kCalm ? std::min(2 * length_, kLongestShedding)
                                         : std::chrono::seconds(1);
        begun_ = now;
    }
    refused_ = now;
}

void RowCost::add(Clock::duration spent, std::size_t rows) {
    const double ns = static_cast<double>(nanoseconds(spent)) / static_cast<double>(rows);
    ns_ = ns_ ? ns_ + (std::min(ns, 2 * ns_) - ns_) / 8 : ns;
}

std::size_t RowCost::rows_in(Clock::duration work) const {
    if (!ns_) return std::numeric_limits<std::size_t>::max();
    return std::max<std::size_t>(
        1, static_cast<std::size_t>(static_cast<double>(nanoseconds(work)) / ns_));
}

bool Decider::route(const std::shared_ptr<const Served>& served, Call& call) {
    if (count_ == pending_.size()) pending_.push_back(std::make_unique<Pending>());
    Pending& pending = *pending_[count_];
    proto::RouteRequest& request = pending.request;
    Session& session = *call.session;
    if (!proto::parse(call.message, request)) {
        session.refuse(call, no_message("RouteRequest", call.message.size()));
        return true;
    }
    const bool is_text = request.input == Input::kText;
    if (request.input != Input::kNone &&
        !(is_text ? served->decides_text : served->decides_embedding))
        return false;
    Violations violations;
    if (request.input == Input::kNone)
        violations.add("input", "expected text or embedding, got neither");
    if (request.input == Input::kEmbedding)
        check_embeddings(*served, "embedding", request.bytes, 1, violations);
    if (!request.tau) {
        violations.add("tau", "expected a number in [0, 1], got none");
    } else if (!in_range(*request.tau)) {
        violations.add("tau", outside(*request.tau));
    }
    const Options options =
        take_options(*served, request.available, request.mode, request.guarantee, violations);
    // one request with many names must not keep its memory
    if (request.available.kept.capacity() > kMaxCandidates) request.available = {};
    if (violations.size()) {
        session.refuse(call, invalid(violations));
    } else if (turn_away(call.arrived)) {
        session.refuse(call, overloaded());
    } else {
        pending.call = &call;
        pending.available = options.available;
        pending.mode = options.mode;
        pending.guarantee = options.guarantee;
        call.slot = &pending.call;
        ++count_;
    }
    return true;
}

// Before this turn, without work: what came meanwhile is no standing queue.
Clock::duration Decider::pause(Clock::time_point now) const {
    return std::min<Clock::duration>(now - decided_, kLongestPause);
}

bool Decider::turn_away(Clock::time_point now) {
    const Clock::duration waited = pause(now);
    const auto rows_in = [&](Clock::duration work, Clock::duration more) {
        return route_cost_.rows_in(std::max(work, more));
    };
    const std::size_t most =
        shed_routes_.is_on(now)
            ? std::min(max_calls_, rows_in(kShortTurn, waited / 4))
            : std::max(max_calls_, std::min(max_calls_ + burst_, rows_in(kLongTurn, waited)));
    if (count_ < most) return false;
    shed_routes_.refuse(now);
    ++stats_.rejected;
    has_turned_away_ = true;
    return true;
}

void Decider::decide_routes(const Served& served, Clock::time_point now) {
    if (!count_) return;
    if (std::exchange(has_turned_away_, false)) turned_away_ = now;
    if (count_ > max_calls_) {
        burst_ -= count_ - max_calls_;
    } else if (now - turned_away_ >= kCalm) {
        burst_ = max_burst_;
    }
    for (std::size_t i = 0; i < count_; ++i) {
        Call*& call = pending_[i]->call;
        if (!call || call->deadline > now) continue;
        ++stats_.expired;
        Call& late = *call;
        late.leave();
        late.session->refuse(late, deadline_exceeded());
    }
    for (const Mode mode : {Mode::kDual, Mode::kPolicy})
        for (const Guarantee guarantee : {Guarantee::kCertified, Guarantee::kCalibrated})
            decide_group(served, mode, guarantee);
    count_ = 0;
    decided_ = Clock::now();
}

void Decider::decide_group(const Served& served, Mode mode, Guarantee guarantee) {
    group_.clear();
    for (std::size_t i = 0; i < count_; ++i) {
        Pending& pending = *pending_[i];
        if (pending.call && pending.mode == mode && pending.guarantee == guarantee)
            group_.push_back(&pending);
    }
    const std::size_t rows = group_.size();
    if (!rows) return;
    const Snapshot& snapshot = *served.snapshot;
    const std::size_t dim = snapshot.input_dim;
    x_.resize(rows * dim);
    tau_.resize(rows);
    available_.resize(rows);
    choice_.resize(rows);
    mu_.resize(rows);
    score_.resize(rows);
    status_.resize(rows);
    floor_.resize(rows);
    scores_.resize(rows * snapshot.candidates);
    Clock::time_point times[3] = {Clock::now(), {}, {}};
    for (std::size_t r = 0; r < rows; ++r) {
        const proto::RouteRequest& request = group_[r]->request;
        float* x = x_.data() + r * dim;
        if (request.input == Input::kText) {
            snapshot.options.encoder->encode(request.bytes, x);
        } else {
            std::memcpy(x, request.bytes.data(), dim * sizeof(float));
        }
        tau_[r] = *request.tau;
        available_[r] = group_[r]->available;
    }
    times[1] = Clock::now();
    Request batch;
    batch.x = x_.data();
    batch.rows = rows;
    batch.tau = tau_.data();
    batch.tau_stride = 1;
    batch.mode = mode;
    batch.guarantee = guarantee;
    batch.available = available_.data();
    batch.available_stride = 1;
    decide(snapshot, batch,
           {choice_.data(), mu_.data(), score_.data(), status_.data(), floor_.data(), nullptr,
            scores_.data()});
    times[2] = Clock::now();
    ++stats_.batches;
    stats_.rows += rows;
    stats_.calls += rows;
    times_.encode.add(nanoseconds(times[1] - times[0]));
    times_.decide.add(nanoseconds(times[2] - times[1]));
    route_cost_.add(times[2] - times[0], rows);
    for (std::size_t r = 0; r < rows; ++r) {
        times_.queue.add(nanoseconds(times[0] - group_[r]->call->arrived));
        if (Tally* tally = snapshot.options.tally.get()) tally->add(choice_[r], status_[r]);
        answer(served, *group_[r], r, times);
    }
}

void Decider::answer(const Served& served, Pending& pending, std::size_t row,
                     const Clock::time_point (&times)[3]) {
    Call& call = *pending.call;
    const proto::RouteRequest& request = pending.request;
    const auto& tau_max = served.largest(pending.mode, pending.guarantee);
    const auto status = static_cast<Status>(status_[row]);
    call.leave();
    if (status == Status::kInvalid) {
        const bool is_finite = request.input == Input::kText || all_finite(request.bytes);
        return call.session->refuse(
            call, is_finite ? no_candidate()
                            : invalid("embedding", "expected finite values, got NaN or infinity"));
    }
    if (request.strict && status == Status::kInfeasible)
        return call.session->refuse(call, infeasible(*request.tau, 1, tau_max));
    const auto choice = static_cast<unsigned>(choice_[row]);
    const float* scores = scores_.data() + row * served.names.size();
    order_.clear();
    for (unsigned i = 0; i < served.names.size(); ++i)
        if (i != choice && scores[i] > -std::numeric_limits<float>::infinity()) order_.push_back(i);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](unsigned a, unsigned b) { return scores[a] > scores[b]; });
    call.session->reply(call, true, [&](std::string& out) {
        proto::put_text(out, 1, served.names[choice]);
        proto::put_int(out, 2, choice_[row]);
        proto::put_float(out, 3, mu_[row]);
        proto::put_float(out, 4, score_[row]);
        proto::put_uint(out, 5, status_[row]);
        if (!std::isnan(floor_[row])) proto::put_double(out, 6, rounded(floor_[row]));
        if (tau_max) proto::put_double(out, 7, *tau_max);
        for (const unsigned i : order_) out += served.fallback_fields[i];
        put_timings(out, 9, {times[0] - call.arrived, times[1] - times[0], times[2] - times[1]});
        proto::put_bytes(out, 10, served.versions);
    });
}

}  // namespace proteus
