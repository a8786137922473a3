#include "listener.hpp"

#include <fcntl.h>
#include <malloc.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "listener_loop.hpp"

namespace proteus {
namespace {

constexpr int kTrimBytes = 4 << 20;

}  // namespace

Seat::~Seat() {
    for (const int descriptor : given_) ::close(descriptor);
}

void Seat::give(int descriptor) {
    ++connections;
    {
        const std::lock_guard lock(mutex_);
        given_.push_back(descriptor);
    }
    mailbox_->wake();
}

std::vector<int> Seat::take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(given_, {});
}

Seat& ListenerState::add_seat(std::shared_ptr<Mailbox> mailbox) {
    return *seats_.emplace_back(std::make_unique<Seat>(std::move(mailbox)));
}

Seat& ListenerState::lightest(Seat& own) const {
    Seat* found = &own;
    for (const auto& seat : seats_)
        if (seat->connections < found->connections) found = seat.get();
    return *found;
}

void ListenerState::swap(std::shared_ptr<const Served> served) {
    // the old one is released after the lock
    const std::lock_guard lock(mutex_);
    served_.swap(served);
    generation_.fetch_add(1, std::memory_order_release);
}

void ListenerState::refresh(std::shared_ptr<const Served>& held, std::uint64_t& generation) const {
    if (generation == generation_.load(std::memory_order_acquire)) return;
    std::shared_ptr<const Served> present;
    {
        const std::lock_guard lock(mutex_);
        present = served_;
        generation = generation_.load(std::memory_order_relaxed);
    }
    // the one that was held may end here, without the lock
    held = std::move(present);
}

int ListenerState::health(std::string_view service) const {
    const std::lock_guard lock(mutex_);
    const auto found = health_.find(service);
    return found == health_.end() ? -1 : found->second;
}

void ListenerState::set_health(const std::string& service, int status) {
    {
        const std::lock_guard lock(mutex_);
        health_[service] = status;
    }
    ++health_generation;
}

Methods Listener::all_methods(const Methods& forwarded) {
    using Kind = Method::Kind;
    Methods methods = forwarded;
    methods["/proteus.v1.RouterService/Route"] = {Kind::kRoute, Shape::kUnary, true};
    methods["/proteus.v1.RouterService/RouteBatch"] = {Kind::kRouteBatch, Shape::kUnary, true};
    methods["/grpc.health.v1.Health/Check"] = {Kind::kHealthCheck};
    methods["/grpc.health.v1.Health/Watch"] = {Kind::kHealthWatch, Shape::kWatch};
    for (auto& [path, method] : methods) method.counts = &calls_[path];
    return methods;
}

Listener::Listener(const std::vector<int>& sockets, std::shared_ptr<const Served> served,
                   const Methods& methods, const ListenerOptions& options)
    : state_(std::move(served), options.max_forwarded) {
#ifdef __GLIBC__
    // else a thread keeps after a peak twice what the largest block freed so far had: a
    // checkpoint's
    mallopt(M_TRIM_THRESHOLD, kTrimBytes);
#endif
    try {
        for (const int socket : sockets) {
            const int own = fcntl(socket, F_DUPFD_CLOEXEC, 0);
            if (own < 0) throw std::system_error(errno, std::generic_category(), "sockets");
            sockets_.push_back(own);
            fcntl(own, F_SETFL, fcntl(own, F_GETFL) | O_NONBLOCK);
        }
        const Methods known = all_methods(methods);
        for (std::size_t i = 0; i < options.threads; ++i)
            loops_.push_back(std::make_unique<ListenerLoop>(state_, sockets_, known, options));
        for (const auto& loop : loops_) threads_.emplace_back([&loop = *loop] { loop.run(); });
    } catch (...) {
        drain(std::chrono::nanoseconds(0));
        throw;
    }
}

Listener::~Listener() { drain(std::chrono::nanoseconds(0)); }

void Listener::set_health(const std::string& service, int status) {
    state_.set_health(service, status);
    for (const auto& loop : loops_) loop->wake();
}

void Listener::drain(std::chrono::nanoseconds limit) {
    state_.is_draining = true;
    state_.stop_at = (Clock::now() + limit).time_since_epoch().count();
    state_.is_stopping = true;
    for (const auto& loop : loops_) loop->wake();
    const std::lock_guard lock(join_mutex_);
    for (std::thread& thread : threads_)
        if (thread.joinable()) thread.join();
    state_.forwarder.close();
    for (const int socket : sockets_) ::close(socket);
    sockets_.clear();
}

ListenerStats Listener::stats() const {
    ListenerStats sum;
    for (const auto& loop : loops_) {
        const ListenerStats one = loop->stats();
        sum.decide.calls += one.decide.calls;
        sum.decide.rows += one.decide.rows;
        sum.decide.batches += one.decide.batches;
        sum.decide.rejected += one.decide.rejected;
        sum.decide.expired += one.decide.expired;
        sum.connections += one.connections;
        sum.accepted += one.accepted;
        sum.refused_connections += one.refused_connections;
        sum.forwarded += one.forwarded;
        sum.waiting += one.waiting;
        sum.cut_off += one.cut_off;
    }
    sum.waiting += state_.forwarder.pending();
    return sum;
}

ListenerTimes Listener::times() const {
    ListenerTimes sum;
    const auto add = [](Histogram::Counts& to, std::uint64_t& total, const Histogram& from) {
        total += from.sum_ns();
        const Histogram::Counts counts = from.counts();
        for (std::size_t i = 0; i < counts.size(); ++i) to[i] += counts[i];
    };
    for (const auto& loop : loops_) {
        const DecideTimes& times = loop->times();
        add(sum.queue, sum.sum_ns[0], times.queue);
        add(sum.encode, sum.sum_ns[1], times.encode);
        add(sum.decide, sum.sum_ns[2], times.decide);
    }
    return sum;
}

}  // namespace proteus
