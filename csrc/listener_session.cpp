#include "listener_session.hpp"

#include <algorithm>
#include <new>
#include <stdexcept>

#include "listener_callbacks.hpp"

namespace proteus {
namespace {

constexpr std::size_t kSpareCalls = 128;
constexpr std::size_t kSpareBytes = 16 << 10;
// Passes where others have taken all memory, up to twice as much as they may.
constexpr std::size_t kSmallBytes = 64 << 10;
// A peer that does not read while so much waits for it is not read either.
constexpr std::size_t kFullBytes = 4 << 20;
constexpr std::size_t kFullFrames = 4096;
constexpr std::int32_t kStreamWindow = 1 << 20;
constexpr std::int32_t kConnectionWindow = 4 << 20;
// The answer to a method that nothing answers, word for word grpcio's.
constexpr const char* kNoMethod = "Method not found!";
constexpr const char* kPart = "expected a whole message, got a part";
constexpr const char* kNone = "expected a message, got none";

constexpr auto kStatic =
    static_cast<std::uint8_t>(NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE);

nghttp2_nv field(std::string_view name, std::string_view value, int flags = kStatic) {
    return {reinterpret_cast<std::uint8_t*>(const_cast<char*>(name.data())),
            reinterpret_cast<std::uint8_t*>(const_cast<char*>(value.data())), name.size(),
            value.size(), static_cast<std::uint8_t>(flags)};
}

// What belongs to one reply is no use in the table of later ones.
nghttp2_nv own_field(std::string_view name, std::string_view value) {
    return field(name, value, NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_INDEX);
}

bool is_grpc(std::string_view content_type) {
    constexpr std::string_view kType = "application/grpc";
    if (!content_type.starts_with(kType)) return false;
    content_type.remove_prefix(kType.size());
    return content_type.empty() || content_type[0] == ';' || content_type == "+proto" ||
           content_type.starts_with("+proto;");
}

std::uint32_t message_size(std::string_view prefix) {
    std::uint32_t size = 0;
    for (std::size_t i = 1; i < 5; ++i) size = size << 8 | static_cast<unsigned char>(prefix[i]);
    return size;
}

void drop(std::string& bytes) {
    bytes.clear();
    if (bytes.capacity() > kSpareBytes) std::string().swap(bytes);
}

void count_ending(const Call& call, int code) {
    if (!call.method || !call.method->second.counts || code < 0 || code > 16) return;
    (*call.method->second.counts)[static_cast<std::size_t>(code)].fetch_add(
        1, std::memory_order_relaxed);
}

}  // namespace

bool Bucket::take(double per_second, Clock::time_point now) {
    used_ = std::max(0.0, used_ - per_second * std::chrono::duration<double>(now - last_).count());
    last_ = now;
    return ++used_ <= 10 * per_second;
}

Session::Session(Host& host, void* owned_by) : owner(owned_by), host_(host), idle_since_(host.now) {
    nghttp2_option* options = nullptr;
    if (nghttp2_option_new(&options) != 0) throw std::bad_alloc();
    nghttp2_option_set_no_closed_streams(options, 1);
#ifdef PROTEUS_NGHTTP2_RESET_RATE
    // the library's own limit is not to be met before ours
    const auto resets = static_cast<std::uint64_t>(host.limits.resets_per_second);
    nghttp2_option_set_stream_reset_rate_limit(options, 20 * resets, 2 * resets);
#endif
    const int made = nghttp2_session_server_new2(&session_, session_callbacks(), this, options);
    nghttp2_option_del(options);
    if (made != 0) throw std::bad_alloc();
    const nghttp2_settings_entry settings[] = {
        {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, host.limits.streams},
        {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, kStreamWindow},
        {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE,
         static_cast<std::uint32_t>(host.limits.header_bytes)},
#if NGHTTP2_VERSION_NUM >= 0x013200
        {NGHTTP2_SETTINGS_NO_RFC7540_PRIORITIES, 1},
#endif
    };
    nghttp2_submit_settings(session_, NGHTTP2_FLAG_NONE, settings, std::size(settings));
    nghttp2_session_set_local_window_size(session_, NGHTTP2_FLAG_NONE, 0, kConnectionWindow);
}

Session::~Session() {
    while (first_) close(*first_);
    nghttp2_session_del(session_);
}

bool Session::receive(const std::uint8_t* data, std::size_t size) {
    return nghttp2_session_mem_recv(session_, data, size) >= 0;
}

bool Session::produce(std::string& out, std::size_t enough) {
    while (out.size() < enough) {
        const std::uint8_t* data = nullptr;
        const ssize_t size = nghttp2_session_mem_send(session_, &data);
        if (size < 0) return false;
        if (size == 0) return true;
        out.append(reinterpret_cast<const char*>(data), static_cast<std::size_t>(size));
    }
    return true;
}

bool Session::is_full() const {
    return kept_bytes_ > kFullBytes ||
           nghttp2_session_get_outbound_queue_size(session_) > kFullFrames;
}

bool Session::finished() const {
    return !nghttp2_session_want_read(session_) && !nghttp2_session_want_write(session_);
}

Call* Session::open(std::int32_t stream) {
    std::unique_ptr<Call> call;
    if (spare_.empty()) {
        call = std::make_unique<Call>();
    } else {
        call = std::move(spare_.back());
        spare_.pop_back();
    }
    call->session = this;
    call->stream = stream;
    call->started = host_.now;
    call->after = first_;
    if (first_) first_->before = call.get();
    first_ = call.get();
    ++calls_;
    return call.release();
}

void Session::close(Call& call) {
    call.leave();
    nghttp2_session_set_stream_user_data(session_, call.stream, nullptr);
    if (call.before) call.before->after = call.after;
    if (call.after) call.after->before = call.before;
    if (first_ == &call) first_ = call.after;
    if (--calls_ == 0) idle_since_ = host_.now;
    kept_bytes_ -= call.counted;
    host_.kept_bytes -= call.counted;
    std::unique_ptr<Call> owned(&call);
    if (spare_.size() == kSpareCalls ||
        call.in.capacity() + call.out.capacity() + call.path.capacity() > kSpareBytes)
        return;
    // memory of the strings is used again
    std::string in = std::move(call.in), out = std::move(call.out), path = std::move(call.path);
    call = Call{};
    in.clear(), out.clear(), path.clear();
    call.in = std::move(in), call.out = std::move(out), call.path = std::move(path);
    spare_.push_back(std::move(owned));
}

void Session::header(Call& call, std::string_view name, std::string_view value) {
    // the overhead of an entry by RFC 9113, 6.5.2
    call.header_bytes += name.size() + value.size() + 32;
    if (name == ":path") {
        call.path = value;
    } else if (name == ":method") {
        call.is_post = value == "POST";
    } else if (name == "content-type") {
        call.is_grpc = is_grpc(value);
    } else if (name == "grpc-timeout") {
        if (const auto timeout = parse_timeout(value)) call.deadline = host_.now + *timeout;
    }
}

void Session::headers_done(Call& call) {
    if (call.header_bytes > host_.limits.header_bytes)
        return refuse(
            call, plain(Code::kResourceExhausted,
                        "metadata: expected at most " + std::to_string(host_.limits.header_bytes) +
                            " bytes, got " + std::to_string(call.header_bytes)));
    if (!call.is_post) return answer_http(call, "405");
    if (!call.is_grpc) return answer_http(call, "415");
    const auto found = host_.methods.find(call.path);
    if (found == host_.methods.end()) return refuse(call, plain(Code::kUnimplemented, kNoMethod));
    call.method = &*found;
    if (call.method->second.refused_while_draining && host_.draining())
        return refuse(call, unavailable());
    // before its body costs anything
    if (host_.turn_away(call.method->second.kind)) refuse(call, overloaded());
}

void Session::data(Call& call, std::string_view bytes) {
    if (call.place == Call::Place::kAnswered) return;
    if (call.in.empty() && call.opened) call.started = host_.now;
    call.in.append(bytes);
    count(call);
    const std::size_t total = host_.limits.total_bytes;
    if (kept_bytes_ > host_.limits.connection_bytes || host_.kept_bytes > 2 * total ||
        (host_.kept_bytes > total && call.in.size() > kSmallBytes)) {
        ++host_.shed_late;
        return refuse(call, overloaded());
    }
    pump(call);
}

void Session::half_close(Call& call) {
    call.half_closed = true;
    if (call.place == Call::Place::kAnswered) return;
    pump(call);
    // a stream without a message in flight is at its end; nothing else may end before its message
    if (call.place != Call::Place::kArriving) return;
    if (!call.in.empty()) return refuse(call, invalid("request", kPart));
    if (call.method->second.shape != Shape::kStream) return refuse(call, invalid("request", kNone));
    finish_message(call, call.out.size(), true);
}

// Hands the next message over once it is whole; of a unary call once the request has ended.
void Session::pump(Call& call) {
    if (call.place != Call::Place::kArriving) return;
    const std::string_view rest = call.in;
    if (rest.size() < kPrefixBytes) return;
    const std::size_t size = message_size(rest);
    if (rest[0] != 0)
        return refuse(call, plain(Code::kUnimplemented,
                                  "grpc-encoding: expected identity, got a compressed message"));
    if (size > host_.limits.message_bytes)
        return refuse(call, plain(Code::kResourceExhausted,
                                  "Received message larger than max (" + std::to_string(size) +
                                      " vs. " + std::to_string(host_.limits.message_bytes) + ")"));
    if (rest.size() < kPrefixBytes + size) {
        // one growth to the whole length, after the first part has shown good will
        if (rest.size() > kSpareBytes) call.in.reserve(kPrefixBytes + size);
        return;
    }
    const bool is_unary = call.method->second.shape != Shape::kStream;
    if (is_unary && rest.size() > kPrefixBytes + size)
        return refuse(call, invalid("request", "expected one message, got more"));
    if (is_unary && !call.half_closed) return;
    hand_over(call, rest.substr(kPrefixBytes, size));
}

void Session::hand_over(Call& call, std::string_view message) {
    call.place = Call::Place::kWithHost;
    call.message = message;
    call.arrived = host_.now;
    host_.arrived(call);
}

void Session::count(Call& call) {
    const std::size_t bytes = call.in.size() + call.out.size();
    kept_bytes_ += bytes - call.counted;
    host_.kept_bytes += bytes - call.counted;
    call.counted = bytes;
}

void Session::finish_message(Call& call, std::size_t begin, bool last) {
    if (call.out.size() > begin) {
        const std::size_t size = call.out.size() - begin - kPrefixBytes;
        for (std::size_t i = 1; i < kPrefixBytes; ++i)
            call.out[begin + i] = static_cast<char>(size >> (8 * (kPrefixBytes - 1 - i)));
    }
    if (call.method->second.shape == Shape::kStream && call.place == Call::Place::kWithHost) {
        call.in.erase(0, kPrefixBytes + call.message.size());
        call.place = Call::Place::kArriving;
        last = false;
    }
    call.last = last;
    if (last) {
        count_ending(call, 0);
        call.place = Call::Place::kAnswered;
        call.ended = host_.now;
        drop(call.in);
    }
    count(call);
    host_.touched(*this);
    if (call.opened) {
        nghttp2_session_resume_data(session_, call.stream);
    } else {
        call.opened = true;
        const nghttp2_nv headers[] = {field(":status", "200"),
                                      field("content-type", "application/grpc"),
                                      field("grpc-accept-encoding", "identity")};
        const nghttp2_data_provider body = reply_body(call);
        nghttp2_submit_response(session_, call.stream, headers, std::size(headers), &body);
    }
    if (call.place == Call::Place::kArriving) {
        pump(call);
        if (call.place == Call::Place::kArriving && call.half_closed) half_close(call);
    }
}

void Session::submit_trailers(Call& call) {
    const std::string code = std::to_string(call.ending.code);
    const std::string text = percent_encoded(call.ending.text);
    const nghttp2_nv trailers[] = {
        field("grpc-status", code, NGHTTP2_NV_FLAG_NO_COPY_NAME),
        own_field("grpc-message", text),
    };
    nghttp2_submit_trailer(session_, call.stream, trailers, call.ending.code ? 2 : 1);
}

void Session::refuse(Call& call, const Refusal& refusal) {
    if (call.place == Call::Place::kAnswered && !call.opened) return;
    if (call.last) return;
    count_ending(call, refusal.code);
    call.place = Call::Place::kAnswered;
    drop(call.in);
    host_.touched(*this);
    if (call.opened) {
        call.ending = {refusal.code, refusal.text, {}};
        call.last = true;
        call.ended = host_.now;
        count(call);
        nghttp2_session_resume_data(session_, call.stream);
        return;
    }
    count(call);
    const std::string code = std::to_string(refusal.code);
    const std::string text = percent_encoded(refusal.text);
    nghttp2_nv headers[6] = {
        field(":status", "200"),
        field("content-type", "application/grpc"),
        field("grpc-accept-encoding", "identity"),
        field("grpc-status", code, NGHTTP2_NV_FLAG_NO_COPY_NAME),
    };
    std::size_t count = 4;
    const int flags =
        NGHTTP2_NV_FLAG_NO_COPY_NAME | (refusal.repeats ? 0 : int{NGHTTP2_NV_FLAG_NO_INDEX});
    if (!text.empty()) headers[count++] = field("grpc-message", text, flags);
    if (!refusal.details.empty())
        headers[count++] = field("grpc-status-details-bin", refusal.details, flags);
    nghttp2_submit_response(session_, call.stream, headers, count, nullptr);
}

void Session::answer_http(Call& call, const char* status) {
    call.place = Call::Place::kAnswered;
    host_.touched(*this);
    const nghttp2_nv headers[] = {field(":status", status)};
    nghttp2_submit_response(session_, call.stream, headers, 1, nullptr);
}

void Session::go_away() {
    if (going_away_) return;
    going_away_ = true;
    host_.touched(*this);
    nghttp2_submit_goaway(session_, NGHTTP2_FLAG_NONE,
                          nghttp2_session_get_last_proc_stream_id(session_), NGHTTP2_NO_ERROR,
                          nullptr, 0);
}

std::size_t Session::refuse_all(const Refusal& refusal) {
    std::size_t count = 0;
    for (Call* call = first_; call; call = call->after) {
        call->leave();
        count += call->place != Call::Place::kAnswered;
        refuse(*call, refusal);
    }
    return count;
}

void Session::sweep() {
    if (first_) {
        host_.touched(*this);
    } else {
        spare_.clear();
    }
    for (Call* call = first_; call; call = call->after) {
        if (call->place == Call::Place::kAnswered) {
            // a peer that opens no window keeps no reply for ever
            if (call->last && host_.now - call->ended > host_.limits.request)
                nghttp2_submit_rst_stream(session_, NGHTTP2_FLAG_NONE, call->stream,
                                          NGHTTP2_CANCEL);
            continue;
        }
        // a stream may be silent between its messages
        const bool unfinished = call->place == Call::Place::kArriving && !call->half_closed &&
                                !(call->opened && call->in.empty()) &&
                                host_.now - call->started > host_.limits.request;
        if (!unfinished && host_.now < call->deadline) continue;
        ++host_.expired;
        call->leave();
        refuse(*call, deadline_exceeded());
    }
}

void Session::ping() {
    host_.touched(*this);
    nghttp2_submit_ping(session_, NGHTTP2_FLAG_NONE, nullptr);
}

}  // namespace proteus
