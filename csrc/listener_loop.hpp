// One thread of the listener: its connections, and an epoll that waits for them.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "listener.hpp"

namespace proteus {

class ListenerLoop final : public Host {
  public:
    ListenerLoop(ListenerState& state, const std::vector<int>& sockets, const Methods& methods,
                 const ListenerOptions& options);
    ~ListenerLoop();

    // Until the state says stop.
    void run();
    void wake() const { mailbox_->wake(); }
    ListenerStats stats() const;
    const DecideTimes& times() const { return decider_.times(); }

    void arrived(Call& call) override;
    void touched(Session& session) override;
    bool turn_away(Method::Kind kind) override {
        return kind == Method::Kind::kRoute && decider_.turn_away(now);
    }
    bool draining() const override { return state_.is_draining.load(std::memory_order_relaxed); }

  private:
    struct Connection;
    struct Watch {
        Call* call;
        std::string service;
        int status;
    };

    void wait(int timeout_ms);
    void accept(int socket);
    void adopt(int fd);
    bool make_room();
    void read(Connection& connection);
    void flush(Connection& connection);
    void flush_touched();
    void set_events(Connection& connection);
    void close(Connection& connection);
    void collect_answers();
    void answer_health(Call& call);
    void tell_watchers();
    void forward(Call& call);
    void sweep();
    void sweep(Connection& connection);
    void begin_stop();
    bool go_on_stopping();
    void listen(bool on);
    void trim();
    void publish();

    const ListenerOptions options_;
    ListenerState& state_;
    const std::vector<int> sockets_;
    const std::shared_ptr<Mailbox> mailbox_ = std::make_shared<Mailbox>();
    Seat& seat_ = state_.add_seat(mailbox_);
    const int epoll_;
    bool is_listening_ = false;
    bool is_stopping_ = false;

    std::shared_ptr<const Served> served_;
    std::uint64_t served_generation_ = 0;
    std::uint64_t health_generation_ = 0;
    Decider decider_;

    std::vector<std::unique_ptr<Connection>> connections_;  // by descriptor
    std::uint32_t serial_ = 0;
    unsigned turn_ = 0;
    std::vector<Connection*> touched_;
    std::list<Watch> watches_;
    std::vector<std::uint8_t> buffer_;
    std::uint64_t not_forwarded_ = 0;  // no place
    std::size_t recent_peak_ = 0;      // of kept bytes, since trimmed_
    std::size_t peak_ = 0;             // of kept bytes, before that, not given back
    Clock::time_point trimmed_;
    Clock::time_point swept_;

    ListenerStats counts_;
    mutable std::mutex stats_mutex_;
    ListenerStats published_;
};

}  // namespace proteus
