#include "listener_forward.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace proteus {

Mailbox::Mailbox() : event_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    if (event_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
}

Mailbox::~Mailbox() { ::close(event_); }

void Mailbox::wake() const {
    const std::uint64_t one = 1;
    // it fails only where the counter is full, and then the reader wakes anyway
    [[maybe_unused]] const ssize_t written = ::write(event_, &one, sizeof one);
}

void Mailbox::post(std::shared_ptr<Forwarded> call) {
    {
        const std::lock_guard lock(mutex_);
        if (is_closed_) return;
        answered_.push_back(std::move(call));
    }
    wake();
}

void Mailbox::close() {
    // a call refers to its mailbox, so that what stays in here would never go
    std::vector<std::shared_ptr<Forwarded>> dropped;
    const std::lock_guard lock(mutex_);
    is_closed_ = true;
    dropped.swap(answered_);
}

std::vector<std::shared_ptr<Forwarded>> Mailbox::take() {
    std::uint64_t count;
    [[maybe_unused]] const ssize_t size = ::read(event_, &count, sizeof count);
    const std::lock_guard lock(mutex_);
    return std::exchange(answered_, {});
}

Forwarded::Forwarded(Call& from, std::shared_ptr<Mailbox> mailbox)
    : method(from.method->first),
      message(from.message),
      deadline(from.deadline),
      call(&from),
      mailbox_(std::move(mailbox)) {
    from.slot = &call;
    from.is_abandoned = &is_abandoned;
}

bool Forwarded::settle() {
    if (is_settled_.exchange(true)) return false;
    --*pending_;
    return true;
}

bool Forwarded::reply(std::string bytes) {
    if (!settle()) return false;
    answer = std::move(bytes);
    mailbox_->post(shared_from_this());
    return true;
}

bool Forwarded::refuse(Refusal reason) {
    if (!settle()) return false;
    refusal = std::move(reason);
    mailbox_->post(shared_from_this());
    return true;
}

bool Forwarder::submit(const std::shared_ptr<Forwarded>& call) {
    {
        const std::lock_guard lock(mutex_);
        if (is_closed_ || *pending_ >= most_) return false;
        call->pending_ = pending_;
        ++*pending_;
        queue_.push_back(call);
    }
    arrived_.notify_one();
    return true;
}

std::shared_ptr<Forwarded> Forwarder::take(std::chrono::nanoseconds wait) {
    const auto until = Clock::now() + wait;
    std::unique_lock lock(mutex_);
    while (arrived_.wait_until(lock, until, [&] { return is_closed_ || !queue_.empty(); })) {
        if (queue_.empty()) return nullptr;
        const std::shared_ptr<Forwarded> call = std::move(queue_.front());
        queue_.pop_front();
        if (call->is_active()) return call;
        call->refuse(deadline_exceeded());
    }
    return nullptr;
}

void Forwarder::close() {
    std::deque<std::shared_ptr<Forwarded>> refused;
    {
        const std::lock_guard lock(mutex_);
        is_closed_ = true;
        refused.swap(queue_);
    }
    arrived_.notify_all();
    for (const auto& call : refused) call->refuse(unavailable());
}

}  // namespace proteus
