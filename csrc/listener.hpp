// gRPC over cleartext HTTP/2 on sockets: Route, RouteBatch and health here, the rest by Python.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "listener_decide.hpp"
#include "listener_forward.hpp"
#include "listener_session.hpp"

namespace proteus {

struct ListenerOptions {
    Limits limits;
    std::size_t threads = 1;
    std::size_t connections = 1024;   // of one thread
    std::size_t max_calls = 256;      // routes of one turn, or batches at work; more are refused
    std::size_t burst = 32;           // times max_calls: routes more after a calm second
    std::size_t max_rows = 65'536;    // of batches at work
    std::size_t max_forwarded = 264;  // calls that wait for Python or are with it
    std::chrono::milliseconds handshake{10'000};
    std::chrono::milliseconds idle{600'000};        // without a call
    std::chrono::milliseconds replaceable{10'000};  // without a call, where there is no place
    std::chrono::milliseconds stalled{20'000};      // of a peer that does not read
    std::chrono::milliseconds keepalive{60'000};    // silence with a call open, before a ping
    std::chrono::milliseconds age{0};               // of a connection; 0: any
    std::chrono::milliseconds age_grace{10'000};
};

struct ListenerStats {
    DecideStats decide;
    std::uint64_t connections = 0;  // open now
    std::uint64_t accepted = 0;
    std::uint64_t refused_connections = 0;
    std::uint64_t forwarded = 0;
    std::uint64_t waiting = 0;  // batches at work and calls with Python now
    std::uint64_t cut_off = 0;  // calls that a drain has ended
};

// Of all threads.
struct ListenerTimes {
    Histogram::Counts queue{};              // of a call, until its batch began
    Histogram::Counts encode{};             // of a batch
    Histogram::Counts decide{};             // of a batch
    std::array<std::uint64_t, 3> sum_ns{};  // of the three
};

// Where a thread is given connections that another one has accepted.
class Seat {
  public:
    explicit Seat(std::shared_ptr<Mailbox> mailbox) : mailbox_(std::move(mailbox)) {}
    ~Seat();
    Seat(const Seat&) = delete;
    Seat& operator=(const Seat&) = delete;

    void give(int descriptor);
    std::vector<int> take();

    std::atomic<std::size_t> connections{0};  // open here, or given

  private:
    const std::shared_ptr<Mailbox> mailbox_;
    std::mutex mutex_;
    std::vector<int> given_;
};

// What the threads share.
class ListenerState {
  public:
    ListenerState(std::shared_ptr<const Served> served, std::size_t max_forwarded)
        : forwarder(max_forwarded), served_(std::move(served)) {}

    void swap(std::shared_ptr<const Served> served);
    // Replaces `held` where it is not the present one; costs one load where it is.
    void refresh(std::shared_ptr<const Served>& held, std::uint64_t& generation) const;

    // Before the threads run.
    Seat& add_seat(std::shared_ptr<Mailbox> mailbox);
    // The thread with the fewest connections; `own` where others have as few.
    Seat& lightest(Seat& own) const;

    // -1 where the service is unknown.
    int health(std::string_view service) const;
    void set_health(const std::string& service, int status);

    Forwarder forwarder;
    std::atomic<std::uint64_t> health_generation{0};
    std::atomic<bool> is_draining{false};
    std::atomic<bool> is_stopping{false};
    std::atomic<Clock::rep> stop_at{0};  // since the clock's epoch, once is_stopping

  private:
    std::vector<std::unique_ptr<Seat>> seats_;
    mutable std::mutex mutex_;  // guards the next two
    std::shared_ptr<const Served> served_;
    std::map<std::string, int, std::less<>> health_;
    std::atomic<std::uint64_t> generation_{1};
};

class ListenerLoop;

class Listener {
  public:
    // Serves on listening sockets, of which it takes duplicates, until drain. `methods` are those
    // that Python answers. Throws std::system_error.
    Listener(const std::vector<int>& sockets, std::shared_ptr<const Served> served,
             const Methods& methods, const ListenerOptions& options);
    ~Listener();
    Listener(const Listener&) = delete;
    Listener& operator=(const Listener&) = delete;

    // Replies from now on come from `served`; each names the versions that made it.
    void swap(std::shared_ptr<const Served> served) { state_.swap(std::move(served)); }

    void set_health(const std::string& service, int status);

    // New calls of a method that is refused while draining are UNAVAILABLE from now on.
    void refuse_new() { state_.is_draining = true; }

    // Accepts no more, says GOAWAY, lets what is open finish for `limit`, refuses the rest, stops.
    void drain(std::chrono::nanoseconds limit);

    std::shared_ptr<Forwarded> take(std::chrono::nanoseconds wait) {
        return state_.forwarder.take(wait);
    }

    ListenerStats stats() const;
    ListenerTimes times() const;

    // By path, of every method that is known.
    const std::map<std::string, CallCounts>& calls() const { return calls_; }

  private:
    Methods all_methods(const Methods& forwarded);

    ListenerState state_;
    std::map<std::string, CallCounts> calls_;  // its entries are made before the threads
    std::vector<int> sockets_;
    std::vector<std::unique_ptr<ListenerLoop>> loops_;
    std::vector<std::thread> threads_;
    std::mutex join_mutex_;
};

}  // namespace proteus
