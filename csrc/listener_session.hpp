// One HTTP/2 connection that speaks gRPC, by libnghttp2 and without a socket: bytes in, bytes out.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "listener_status.hpp"

struct nghttp2_session;

namespace proteus {

using Clock = std::chrono::steady_clock;

struct Limits {
    std::size_t message_bytes = std::size_t{8} << 20;
    std::size_t header_bytes = std::size_t{16} << 10;      // of one request, as HTTP/2 counts them
    std::uint32_t streams = 1024;                          // at once on one connection
    std::size_t connection_bytes = std::size_t{32} << 20;  // of requests and replies, kept
    std::size_t total_bytes = std::size_t{256} << 20;  // the same of all connections of a thread
    double resets_per_second = 100;                    // and ten times as many at once
    double controls_per_second = 1000;                 // pings, settings, empty frames; as above
    // of a message's bytes, and for a reply to be taken
    std::chrono::milliseconds request{30'000};
};

enum class Shape : std::uint8_t { kUnary, kWatch, kStream };

// Calls that were answered, by their status; any thread may add, any may read.
using CallCounts = std::array<std::atomic<std::uint64_t>, 17>;

// What answers a path.
struct Method {
    enum class Kind : std::uint8_t { kRoute, kRouteBatch, kHealthCheck, kHealthWatch, kForward };
    Kind kind;
    Shape shape = Shape::kUnary;
    bool refused_while_draining = false;
    CallCounts* counts = nullptr;
};
using Methods = std::map<std::string, Method, std::less<>>;

class Session;

// One stream. Belongs to its session until the peer or the server closes it.
struct Call {
    enum class Place : std::uint8_t { kArriving, kWithHost, kAnswered };

    Session* session = nullptr;
    std::int32_t stream = 0;
    Place place = Place::kArriving;
    const Methods::value_type* method = nullptr;
    Clock::time_point started;  // to come, or its next message to
    Clock::time_point ended;    // the last of the reply was written
    Clock::time_point deadline = Clock::time_point::max();

    // the host's own while it has the call
    std::string_view message;
    Clock::time_point arrived;                  // of the message's last byte
    Call** slot = nullptr;                      // the host's pointer to the call
    std::atomic<bool>* is_abandoned = nullptr;  // set once nobody waits any more

    std::shared_ptr<void> holder;  // keeps those two alive where the host does not

    // Nothing of the host refers to the call afterwards.
    void leave() {
        if (slot) *slot = nullptr;
        if (is_abandoned) is_abandoned->store(true, std::memory_order_relaxed);
        slot = nullptr;
        is_abandoned = nullptr;
        holder.reset();
    }

    std::string in;  // as it came: prefix and message, of a stream several
    std::string out;
    std::size_t sent = 0;
    bool opened = false;  // response headers are submitted
    bool last = false;    // nothing follows `out` but the trailers
    bool half_closed = false;
    std::size_t counted = 0;  // bytes of in and out that the session has counted

    // while the headers come
    std::size_t header_bytes = 0;
    std::string path;
    bool is_post = false;
    bool is_grpc = false;

    Refusal ending{0, {}, {}};  // of a reply that has begun
    Call* before = nullptr;
    Call* after = nullptr;
};

// Whoever answers calls.
class Host {
  public:
    // `call.message` is complete; it is answered now or later by reply, refuse or finish.
    virtual void arrived(Call& call) = 0;
    // The session has something to send.
    virtual void touched(Session& session) = 0;
    virtual bool draining() const = 0;
    // True where there is no place for a call of this kind, which counts as refused.
    virtual bool turn_away(Method::Kind) { return false; }

    const Limits limits;
    const Methods methods;
    std::size_t kept_bytes = 0;   // of all sessions
    Clock::time_point now;        // of the last read
    std::uint64_t expired = 0;    // calls refused past their deadline
    std::uint64_t shed_late = 0;  // calls refused while their bytes came, for want of memory

  protected:
    Host(Limits given, Methods known) : limits(given), methods(std::move(known)) {}
    ~Host() = default;
};

// Tokens that come back with time.
class Bucket {
  public:
    bool take(double per_second, Clock::time_point now);

  private:
    double used_ = 0;
    Clock::time_point last_{};
};

class Session {
  public:
    // `owner` is the host's own.
    explicit Session(Host& host, void* owner = nullptr);
    ~Session();
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    // False where the connection cannot go on.
    bool receive(const std::uint8_t* data, std::size_t size);

    // Appends what is to be sent until `out` has `enough` bytes; false as above.
    bool produce(std::string& out, std::size_t enough);

    // Nothing is left to be said in either direction.
    bool finished() const;

    // A message into the call's reply: what `write` appends. The last one ends the call.
    template <typename Write>
    void reply(Call& call, bool last, Write write) {
        const std::size_t begin = call.out.size();
        call.out.append(kPrefixBytes, '\0');
        write(call.out);
        finish_message(call, begin, last);
    }

    void refuse(Call& call, const Refusal& refusal);

    // No more reads of requests; streams that are open go on.
    void go_away();

    // Ends what is open. How many calls had no answer yet.
    std::size_t refuse_all(const Refusal& refusal);

    // Refuses what is late: requests that do not arrive, calls past their deadline. Gives memory
    // back where no call is open.
    void sweep();

    void ping();

    std::size_t calls() const { return calls_; }
    // The peer has said that it knows this side's limits.
    bool has_begun() const { return has_begun_; }
    // Of the last call, or of the session.
    Clock::time_point idle_since() const { return idle_since_; }

    std::size_t kept_bytes() const { return kept_bytes_; }
    // Too much waits to be sent for more to be read.
    bool is_full() const;

    void* const owner;

    static constexpr std::size_t kPrefixBytes = 5;

  private:
    friend struct Callbacks;

    Call* open(std::int32_t stream);
    void close(Call& call);
    void header(Call& call, std::string_view name, std::string_view value);
    void headers_done(Call& call);
    void data(Call& call, std::string_view bytes);
    void half_close(Call& call);
    void pump(Call& call);
    void hand_over(Call& call, std::string_view message);
    void finish_message(Call& call, std::size_t begin, bool last);
    void submit_trailers(Call& call);
    void answer_http(Call& call, const char* status);
    void count(Call& call);

    Host& host_;
    nghttp2_session* session_ = nullptr;
    Call* first_ = nullptr;
    std::size_t calls_ = 0;
    std::size_t kept_bytes_ = 0;
    bool has_begun_ = false;
    Clock::time_point idle_since_;
    bool going_away_ = false;
    Bucket resets_;
    Bucket controls_;
    std::vector<std::unique_ptr<Call>> spare_;
};

}  // namespace proteus
