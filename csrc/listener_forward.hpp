// Calls that Python answers: a bounded queue between the listener's threads and Python's.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "listener_session.hpp"

namespace proteus {

class Forwarded;

// Answers on their way to a thread of the listener.
class Mailbox {
  public:
    Mailbox();
    ~Mailbox();
    Mailbox(const Mailbox&) = delete;
    Mailbox& operator=(const Mailbox&) = delete;

    int event() const { return event_; }  // readable after wake or post
    void wake() const;
    void post(std::shared_ptr<Forwarded> call);
    std::vector<std::shared_ptr<Forwarded>> take();
    // Nobody takes any more: what comes later is dropped.
    void close();

  private:
    const int event_;
    std::mutex mutex_;
    std::vector<std::shared_ptr<Forwarded>> answered_;
    bool is_closed_ = false;
};

// One message on its way to Python and back.
class Forwarded : public std::enable_shared_from_this<Forwarded> {
  public:
    Forwarded(Call& call, std::shared_ptr<Mailbox> mailbox);

    const std::string method;
    const std::string message;
    const Clock::time_point deadline;

    // The first answer counts; false for a later one.
    bool reply(std::string bytes);
    bool refuse(Refusal refusal);
    bool is_active() const {
        return !is_abandoned.load(std::memory_order_relaxed) && Clock::now() < deadline;
    }

    // the listener's thread's own; the answer once the mailbox has given the call back
    Call* call;
    std::string answer;
    std::optional<Refusal> refusal;

    std::atomic<bool> is_abandoned{false};

  private:
    friend class Forwarder;
    bool settle();

    const std::shared_ptr<Mailbox> mailbox_;
    std::shared_ptr<std::atomic<std::size_t>> pending_;
    std::atomic<bool> is_settled_{false};
};

class Forwarder {
  public:
    explicit Forwarder(std::size_t most) : most_(most) {}

    // False where as many as may be wait or are at work.
    bool submit(const std::shared_ptr<Forwarded>& call);

    // The next call that somebody waits for; null after `wait` without one, or once closed.
    std::shared_ptr<Forwarded> take(std::chrono::nanoseconds wait);

    void close();
    std::size_t pending() const { return *pending_; }

  private:
    const std::size_t most_;
    const std::shared_ptr<std::atomic<std::size_t>> pending_ =
        std::make_shared<std::atomic<std::size_t>>(0);
    std::mutex mutex_;
    std::condition_variable arrived_;
    std::deque<std::shared_ptr<Forwarded>> queue_;
    bool is_closed_ = false;
};

}  // namespace proteus
