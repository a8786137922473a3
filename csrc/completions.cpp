#include "completions.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace proteus {
namespace {

int make_eventfd() {
    const int fd = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (fd < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
    return fd;
}

}  // namespace

Completions::Completions() : fd_(make_eventfd()) {}
Completions::~Completions() { ::close(fd_); }

void Completions::push(std::uint64_t tag) {
    bool first;
    {
        const std::lock_guard lock(mutex_);
        first = tags_.empty();
        tags_.push_back(tag);
    }
    // whoever drains between the lock and this write is woken once more, and finds nothing
    if (first) ::eventfd_write(fd_, 1);
}

std::vector<std::uint64_t> Completions::drain() {
    // the descriptor first: a tag that comes after the swap writes it again
    eventfd_t count;
    ::eventfd_read(fd_, &count);
    std::vector<std::uint64_t> tags;
    const std::lock_guard lock(mutex_);
    tags.swap(tags_);
    return tags;
}

}  // namespace proteus
