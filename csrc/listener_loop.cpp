#include "listener_loop.hpp"

#include <malloc.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

namespace proteus {
namespace {

using namespace std::chrono_literals;

constexpr std::size_t kReadBytes = 64 << 10;
// Of one connection in one turn, so that what exceeds the queue is refused now and does not wait
// in the socket.
constexpr int kReadsAtOnce = 8;
constexpr std::size_t kWriteBytes = 128 << 10;
constexpr int kAcceptsAtOnce = 64;
constexpr auto kBatchBudget = 500us;
constexpr auto kSweepPeriod = 500ms;
constexpr auto kPingGrace = 20s;
constexpr auto kLinger = 200ms;
constexpr auto kTrimPeriod = 5s;
constexpr std::size_t kTrimBytes = 4 << 20;

constexpr std::uint64_t kEvent = ~std::uint64_t{0};
constexpr std::uint64_t kSocket = std::uint64_t{1} << 63;

}  // namespace

struct ListenerLoop::Connection {
    Connection(Host& host, int descriptor, std::uint32_t number)
        : fd(descriptor), serial(number), session(host, this) {}
    ~Connection() { ::close(fd); }

    bool has_unsent() const { return sent < out.size(); }

    const int fd;
    const std::uint32_t serial;
    Session session;
    std::string out;
    std::size_t sent = 0;
    std::uint32_t events = 0;
    bool is_touched = false;
    bool is_shut = false;  // nothing more is sent
    bool is_pinged = false;
    Clock::time_point opened;
    Clock::time_point heard;     // the last bytes from the peer
    Clock::time_point advanced;  // the last bytes to the peer, or the first of an idle time
    Clock::time_point gone;      // of is_shut
};

ListenerLoop::ListenerLoop(ListenerState& state, const std::vector<int>& sockets,
                           const Methods& methods, const ListenerOptions& options)
    : Host(options.limits, methods),
      options_(options),
      state_(state),
      sockets_(sockets),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      decider_(options.max_calls, options.max_rows, options.burst * options.max_calls),
      buffer_(kReadBytes) {
    if (epoll_ < 0) throw std::system_error(errno, std::generic_category(), "epoll_create1");
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = kEvent;
    epoll_ctl(epoll_, EPOLL_CTL_ADD, mailbox_->event(), &event);
    listen(true);
    now = swept_ = trimmed_ = Clock::now();
}

ListenerLoop::~ListenerLoop() {
    connections_.clear();
    mailbox_->close();
    ::close(epoll_);
}

void ListenerLoop::listen(bool on) {
    if (on == is_listening_) return;
    is_listening_ = on;
    for (const int socket : sockets_) {
        epoll_event event{};
        // one of several threads wakes
        event.events = EPOLLIN | EPOLLEXCLUSIVE;
        event.data.u64 = kSocket | static_cast<std::uint32_t>(socket);
        epoll_ctl(epoll_, on ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, socket, &event);
    }
}

void ListenerLoop::run() {
    for (;;) {
        wait(decider_.batches() ? 0 : is_stopping_ ? 10 : 500);
        recent_peak_ = std::max(recent_peak_, kept_bytes);
        decider_.decide_routes(*served_, Clock::now());
        // counts before answers: a caller who has one sees it counted
        publish();
        flush_touched();
        if (decider_.batches()) {
            decider_.decide_batches(kBatchBudget);
            publish();
            flush_touched();
        }
        if (now - swept_ >= kSweepPeriod) sweep();
        if (!state_.is_stopping) continue;
        if (!is_stopping_) begin_stop();
        if (!go_on_stopping()) return;
    }
}

void ListenerLoop::wait(int timeout_ms) {
    epoll_event events[64];
    const int count = epoll_wait(epoll_, events, std::size(events), timeout_ms);
    now = Clock::now();
    state_.refresh(served_, served_generation_);
    // another one first in each turn: places in the queue go to whoever comes first
    for (int i = 0, first = count ? static_cast<int>(turn_++ % static_cast<unsigned>(count)) : 0;
         i < count; ++i) {
        const epoll_event& event = events[(first + i) % count];
        const std::uint64_t data = event.data.u64;
        if (data == kEvent) {
            // which takes what woke it, and so comes first
            collect_answers();
            for (const int given : seat_.take()) adopt(given);
        } else if (data & kSocket) {
            accept(static_cast<int>(data & 0x7FFFFFFF));
        } else {
            const auto fd = static_cast<std::size_t>(data & 0xFFFFFFFF);
            Connection* connection = fd < connections_.size() ? connections_[fd].get() : nullptr;
            // closed since, perhaps with its descriptor in use again
            if (!connection || connection->serial != data >> 32) continue;
            if (event.events & EPOLLOUT) touched(connection->session);
            if (event.events & (EPOLLIN | EPOLLHUP | EPOLLERR)) read(*connection);
        }
    }
    if (const auto generation = state_.health_generation.load(); generation != health_generation_) {
        health_generation_ = generation;
        tell_watchers();
    }
}

void ListenerLoop::accept(int socket) {
    for (int i = 0; i < kAcceptsAtOnce; ++i) {
        const int fd = accept4(socket, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            const bool is_out = errno == EMFILE || errno == ENFILE;
            if (is_out && make_room()) continue;
            // out of descriptors or memory: the sweep tries again
            if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) listen(false);
            return;
        }
        Seat& seat = state_.lightest(seat_);
        if (seat.connections >= options_.connections && !(&seat == &seat_ && make_room())) {
            ++counts_.refused_connections;
            ::close(fd);
        } else if (&seat == &seat_) {
            ++seat.connections;
            adopt(fd);
        } else {
            seat.give(fd);
        }
    }
}

// Closes the connection that has been without a call for longest; false where all are in use.
bool ListenerLoop::make_room() {
    Connection* oldest = nullptr;
    for (const auto& connection : connections_) {
        if (!connection || connection->session.calls()) continue;
        if (!oldest || connection->session.idle_since() < oldest->session.idle_since())
            oldest = connection.get();
    }
    if (!oldest || now - oldest->session.idle_since() < options_.replaceable) return false;
    oldest->session.go_away();
    const auto fd = static_cast<std::size_t>(oldest->fd);
    flush(*oldest);
    if (connections_[fd]) close(*connections_[fd]);
    return true;
}

void ListenerLoop::adopt(int fd) {
    const int on = 1;
    // fails on a Unix socket, which waits for nothing
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    const auto place = static_cast<std::size_t>(fd);
    if (place >= connections_.size()) connections_.resize(place + 1);
    serial_ = (serial_ + 1) & 0x7FFFFFFF;
    connections_[place] = std::make_unique<Connection>(*this, fd, serial_);
    Connection& connection = *connections_[place];
    connection.opened = connection.heard = connection.advanced = now;
    ++counts_.accepted;
    ++counts_.connections;
    epoll_event event{};
    epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
    touched(connection.session);
    if (is_stopping_) connection.session.go_away();
}

void ListenerLoop::read(Connection& connection) {
    for (int i = 0; i < kReadsAtOnce; ++i) {
        const ssize_t size = recv(connection.fd, buffer_.data(), buffer_.size(), 0);
        if (size < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (size <= 0) return close(connection);
        connection.heard = now;
        connection.is_pinged = false;
        touched(connection.session);
        // what comes after the end is thrown away, so that the peer sees all that was sent
        if (connection.is_shut) return;
        if (!connection.session.receive(buffer_.data(), static_cast<std::size_t>(size)))
            return close(connection);
        // backpressure, and a read that has emptied the socket
        if (connection.session.is_full() || static_cast<std::size_t>(size) < buffer_.size()) return;
    }
}

void ListenerLoop::flush(Connection& connection) {
    while (!connection.is_shut) {
        if (!connection.has_unsent()) {
            connection.out.clear();
            connection.sent = 0;
            if (!connection.session.produce(connection.out, kWriteBytes)) return close(connection);
            if (connection.out.empty()) break;
            connection.advanced = now;
        }
        const ssize_t size = send(connection.fd, connection.out.data() + connection.sent,
                                  connection.out.size() - connection.sent, MSG_NOSIGNAL);
        if (size < 0) {
            if (errno == EINTR) continue;
            if (errno != EAGAIN) return close(connection);
            break;
        }
        connection.sent += static_cast<std::size_t>(size);
        connection.advanced = now;
    }
    if (!connection.is_shut && !connection.has_unsent() && connection.session.finished()) {
        // closing with unread bytes would throw away what the peer has not read
        shutdown(connection.fd, SHUT_WR);
        connection.is_shut = true;
        connection.gone = now;
    }
    set_events(connection);
}

void ListenerLoop::set_events(Connection& connection) {
    const bool is_full = connection.has_unsent() && connection.session.is_full();
    const std::uint32_t events =
        (is_full ? 0u : static_cast<std::uint32_t>(EPOLLIN)) |
        (connection.has_unsent() ? static_cast<std::uint32_t>(EPOLLOUT) : 0u);
    if (events == connection.events) return;
    connection.events = events;
    epoll_event event{};
    event.events = events;
    event.data.u64 = static_cast<std::uint64_t>(connection.serial) << 32 |
                     static_cast<std::uint32_t>(connection.fd);
    epoll_ctl(epoll_, EPOLL_CTL_MOD, connection.fd, &event);
}

void ListenerLoop::touched(Session& session) {
    auto& connection = *static_cast<Connection*>(session.owner);
    if (connection.is_touched) return;
    connection.is_touched = true;
    touched_.push_back(&connection);
}

void ListenerLoop::flush_touched() {
    // producing may touch again
    for (std::size_t i = 0; i < touched_.size(); ++i) {
        Connection* connection = touched_[i];
        if (!connection) continue;
        connection->is_touched = false;
        flush(*connection);
    }
    touched_.clear();
}

void ListenerLoop::close(Connection& connection) {
    std::replace(touched_.begin(), touched_.end(), &connection, static_cast<Connection*>(nullptr));
    --counts_.connections;
    --seat_.connections;
    // its calls leave whoever holds them
    connections_[static_cast<std::size_t>(connection.fd)].reset();
}

void ListenerLoop::arrived(Call& call) {
    using Kind = Method::Kind;
    if (call.deadline <= now) {
        ++expired;
        return call.session->refuse(call, deadline_exceeded());
    }
    switch (call.method->second.kind) {
        case Kind::kRoute:
            if (!decider_.route(served_, call)) forward(call);
            break;
        case Kind::kRouteBatch:
            if (!decider_.route_batch(served_, call)) forward(call);
            break;
        case Kind::kHealthCheck:
        case Kind::kHealthWatch:
            answer_health(call);
            break;
        case Kind::kForward:
            forward(call);
            break;
    }
}

void ListenerLoop::forward(Call& call) {
    const auto forwarded = std::make_shared<Forwarded>(call, mailbox_);
    call.holder = forwarded;
    if (state_.forwarder.submit(forwarded)) {
        ++counts_.forwarded;
    } else {
        ++not_forwarded_;
        call.leave();
        call.session->refuse(call, overloaded());
    }
}

void ListenerLoop::collect_answers() {
    for (const auto& forwarded : mailbox_->take()) {
        if (!forwarded->call) continue;
        Call& call = *forwarded->call;
        call.leave();
        if (forwarded->refusal) {
            call.session->refuse(call, *forwarded->refusal);
        } else {
            call.session->reply(call, true, [&](std::string& out) { out += forwarded->answer; });
        }
    }
}

void ListenerLoop::answer_health(Call& call) {
    constexpr int kServiceUnknown = 3;
    proto::HealthCheckRequest request;
    if (!proto::parse(call.message, request))
        return call.session->refuse(
            call,
            invalid("request", "expected a grpc.health.v1.HealthCheckRequest, got " +
                                   std::to_string(call.message.size()) + " bytes that are none"));
    int status = state_.health(request.service);
    const bool is_watch = call.method->second.kind == Method::Kind::kHealthWatch;
    if (status < 0 && !is_watch) return call.session->refuse(call, plain(Code::kNotFound, ""));
    if (status < 0) status = kServiceUnknown;
    if (is_watch) {
        watches_.push_back({&call, std::string(request.service), status});
        call.slot = &watches_.back().call;
    }
    call.session->reply(call, !is_watch, [&](std::string& out) { proto::put_int(out, 1, status); });
}

void ListenerLoop::tell_watchers() {
    for (Watch& watch : watches_) {
        const int status = state_.health(watch.service);
        if (!watch.call || status < 0 || status == watch.status) continue;
        watch.status = status;
        watch.call->session->reply(*watch.call, false,
                                   [&](std::string& out) { proto::put_int(out, 1, status); });
    }
}

void ListenerLoop::sweep() {
    swept_ = now;
    std::erase_if(watches_, [](const Watch& watch) { return !watch.call; });
    if (!is_stopping_) listen(true);
    for (std::size_t fd = 0; fd < connections_.size(); ++fd)
        if (connections_[fd]) sweep(*connections_[fd]);
    flush_touched();
    trim();
}

// Gives back what a peak has taken: the allocator keeps it for itself, as long as it likes.
void ListenerLoop::trim() {
    if (now - trimmed_ < kTrimPeriod) return;
    trimmed_ = now;
    const std::size_t recent = std::exchange(recent_peak_, kept_bytes);
    if (peak_ > kTrimBytes && recent < peak_ / 4) {
        peak_ = 0;
#ifdef __GLIBC__
        malloc_trim(0);
#endif
    }
    peak_ = std::max(peak_, recent);
}

void ListenerLoop::sweep(Connection& connection) {
    Session& session = connection.session;
    if (connection.is_shut) {
        if (now - connection.gone > kLinger) close(connection);
        return;
    }
    const auto silent = now - connection.heard;
    const bool is_late =
        (!session.has_begun() && now - connection.opened > options_.handshake) ||
        (connection.has_unsent() && now - connection.advanced > options_.stalled) ||
        (session.calls() && silent > options_.keepalive + kPingGrace);
    if (is_late) return close(connection);
    session.sweep();
    if (!session.calls() && !connection.has_unsent()) std::string().swap(connection.out);
    const bool is_old = options_.age.count() > 0 && now - connection.opened > options_.age;
    const bool is_idle = !session.calls() && now - session.idle_since() > options_.idle;
    if (is_old && now - connection.opened > options_.age + options_.age_grace)
        session.refuse_all(unavailable());
    if (is_old || is_idle) session.go_away();
    if (session.calls() && silent > options_.keepalive && !connection.is_pinged) {
        connection.is_pinged = true;
        session.ping();
    }
}

void ListenerLoop::begin_stop() {
    is_stopping_ = true;
    listen(false);
    for (Watch& watch : watches_) {
        if (!watch.call) continue;
        Call& call = *watch.call;
        call.leave();
        call.session->refuse(call, unavailable());
    }
    for (const auto& connection : connections_)
        if (connection) connection->session.go_away();
    flush_touched();
}

// False once nothing is open any more.
bool ListenerLoop::go_on_stopping() {
    const Clock::time_point end{Clock::duration(state_.stop_at.load())};
    now = Clock::now();
    const bool is_over = now >= end;
    if (is_over) {
        for (const auto& connection : connections_)
            if (connection) counts_.cut_off += connection->session.refuse_all(unavailable());
        publish();
        flush_touched();
    }
    for (std::size_t fd = 0; fd < connections_.size(); ++fd) {
        Connection* connection = connections_[fd].get();
        if (!connection) continue;
        const bool is_done = connection->is_shut && now - connection->gone > kLinger;
        if (is_done || (is_over && now >= end + kLinger)) close(*connection);
    }
    return counts_.connections > 0;
}

void ListenerLoop::publish() {
    counts_.decide = decider_.stats();
    counts_.decide.rejected += not_forwarded_ + shed_late;
    counts_.decide.expired += expired;
    counts_.waiting = decider_.batches();
    const std::lock_guard lock(stats_mutex_);
    published_ = counts_;
}

ListenerStats ListenerLoop::stats() const {
    const std::lock_guard lock(stats_mutex_);
    return published_;
}

}  // namespace proteus
