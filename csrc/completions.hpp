// Outcomes on their way to an event loop, which watches one descriptor for all of them.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace proteus {

class Completions {
  public:
    // Throws std::system_error without a free descriptor.
    Completions();
    ~Completions();
    Completions(const Completions&) = delete;
    Completions& operator=(const Completions&) = delete;

    // Readable while a tag is waiting (an eventfd; level-triggered polls and edge-triggered ones
    // both do). The descriptor stays this object's.
    int fd() const { return fd_; }

    // From any thread. One system call for all the tags that arrive between two drains.
    void push(std::uint64_t tag);

    // Everything that has arrived, in order; empty after a wake-up for what was drained before.
    std::vector<std::uint64_t> drain();

  private:
    const int fd_;
    std::mutex mutex_;
    std::vector<std::uint64_t> tags_;
};

}  // namespace proteus
