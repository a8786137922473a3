// Client on one gRPC method over cleartext HTTP/2, open loop or closed; prints one line of JSON.
// benchmarks/load.py is its user, and says what the numbers mean.
#include <netdb.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <queue>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "load_options.hpp"
#include "load_results.hpp"

namespace {

using namespace load;
using Clock = std::chrono::steady_clock;

constexpr Ns kSecond = 1'000'000'000;
// The last microseconds before a call is due are waited for without sleep, at rates at which that
// leaves the core idle for most of the time.
constexpr Ns kSpin = 25'000;
constexpr double kSpinRate = 12'000;
constexpr Ns kWindow = kSecond / 10;  // of the series
constexpr Ns kLate = 5'000'000;       // what a deadline may be overrun by
constexpr std::size_t kUnsentBytes = 256 << 10;

Ns now() { return Clock::now().time_since_epoch().count(); }

struct Client;

struct Call {
    Ns intended = 0, sent = 0, timeout = 0;
    std::size_t message = 0, at = 0;
    int status = -1;  // none came
    bool is_http_ok = false;
    std::string body;
    std::string timeout_text;
    std::uint64_t number = 0;  // tells a used-again call from its earlier life
};

struct Connection {
    Client* client = nullptr;
    int fd = -1;
    nghttp2_session* session = nullptr;
    std::string out;
    std::size_t sent = 0, open = 0, limit = 0;
    std::size_t again = 0;  // calls of a closed loop to submit
    bool has_settings = false, waits = false;
};

struct Cancel {
    Ns due;
    Connection* connection;
    std::int32_t stream;
    Call* call;
    std::uint64_t number;
    bool operator<(const Cancel& other) const { return due > other.due; }
};

struct Client : Results {
    explicit Client(Options given)
        : o(std::move(given)),
          messages(read_messages(o.messages)),
          path("/proteus.v1.RouterService/" + o.method),
          is_batch(o.method == "RouteBatch"),
          random(o.seed) {
        epoll = epoll_create1(0);
        if (!o.samples.empty()) samples = std::fopen(o.samples.c_str(), "wb");
        connections.resize(o.connections);
        for (Connection& connection : connections) open(connection);
    }

    void open(Connection& connection);
    void flush(Connection& connection);
    void read(Connection& connection);
    void submit(Connection& connection, Ns intended);
    void send_due(Ns at);
    void cancel_due(Ns at);
    void wait(Ns at);
    void finish(Call& call, std::uint32_t error);
    void run();

    // Exponential, so that calls come independently of each other.
    Ns gap() { return static_cast<Ns>(gaps(random) * 1e9 / o.rate); }

    const Options o;
    const std::vector<std::string> messages;
    const std::string path;
    const bool is_batch;
    std::mt19937_64 random;
    std::exponential_distribution<double> gaps{1.0};
    std::vector<Connection> connections;
    std::vector<std::unique_ptr<Call>> calls;
    std::vector<Call*> spare;
    std::priority_queue<Cancel> cancels;
    int epoll = -1;
    const Ns spin = o.rate > kSpinRate ? 0 : kSpin;
    std::FILE* samples = nullptr;
    std::size_t turn = 0, in_flight = 0;
    std::uint64_t numbers = 0;

    Ns begin = 0, measured = 0, end = 0, next = 0, received = 0;
};

struct Callbacks {
    static Client& self(void* user) { return *static_cast<Connection*>(user)->client; }
    static Call* call(nghttp2_session* session, std::int32_t stream) {
        return static_cast<Call*>(nghttp2_session_get_stream_user_data(session, stream));
    }
    static int header(nghttp2_session* session, const nghttp2_frame* frame,
                      const std::uint8_t* name, std::size_t name_size, const std::uint8_t* value,
                      std::size_t value_size, std::uint8_t, void*) {
        Call* found = call(session, frame->hd.stream_id);
        if (!found) return 0;
        const std::string_view key(reinterpret_cast<const char*>(name), name_size);
        const std::string_view text(reinterpret_cast<const char*>(value), value_size);
        if (key == ":status") found->is_http_ok = text == "200";
        if (key == "grpc-status") {
            int status = 0;
            for (const char c : text) status = std::min(status * 10 + (c - '0'), 99);
            found->status = status <= 16 ? status : kMalformed;
        }
        return 0;
    }
    static int data(nghttp2_session* session, std::uint8_t, std::int32_t stream,
                    const std::uint8_t* bytes, std::size_t size, void*) {
        if (Call* found = call(session, stream))
            found->body.append(reinterpret_cast<const char*>(bytes), size);
        return 0;
    }
    static int frame(nghttp2_session*, const nghttp2_frame* frame, void* user) {
        if (frame->hd.type == NGHTTP2_SETTINGS && !(frame->hd.flags & NGHTTP2_FLAG_ACK))
            static_cast<Connection*>(user)->has_settings = true;
        if (frame->hd.type == NGHTTP2_GOAWAY) fail("the server says GOAWAY");
        return 0;
    }
    static int close(nghttp2_session* session, std::int32_t stream, std::uint32_t error,
                     void* user) {
        auto& connection = *static_cast<Connection*>(user);
        Call* found = call(session, stream);
        if (!found) return 0;
        --connection.open;
        ++connection.again;
        connection.client->finish(*found, error);
        return 0;
    }
    static ssize_t body(nghttp2_session*, std::int32_t, std::uint8_t* to, std::size_t size,
                        std::uint32_t* flags, nghttp2_data_source* source, void* user) {
        Call& call = *static_cast<Call*>(source->ptr);
        const std::string& message = self(user).messages[call.message];
        const std::size_t n = std::min(size, message.size() - call.at);
        std::memcpy(to, message.data() + call.at, n);
        call.at += n;
        if (call.at == message.size()) *flags |= NGHTTP2_DATA_FLAG_EOF;
        return static_cast<ssize_t>(n);
    }
};

int connect_to(const Options& o) {
    if (!o.unix_path.empty()) {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        if (o.unix_path.size() >= sizeof address.sun_path) fail("--unix: the path is too long");
        std::strcpy(address.sun_path, o.unix_path.c_str());
        const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
        if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0) return fd;
        fail("cannot connect to " + o.unix_path + ": " + std::strerror(errno));
    }
    addrinfo hints{}, *found = nullptr;
    hints.ai_socktype = SOCK_STREAM;
    if (getaddrinfo(o.host.c_str(), o.port.c_str(), &hints, &found) != 0)
        fail("no address of " + o.host);
    for (const addrinfo* each = found; each; each = each->ai_next) {
        const int fd = socket(each->ai_family, SOCK_STREAM, 0);
        if (fd >= 0 && connect(fd, each->ai_addr, each->ai_addrlen) == 0) {
            const int on = 1;
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
            return fd;
        }
        if (fd >= 0) close(fd);
    }
    fail("cannot connect to " + o.host + ":" + o.port + ": " + std::strerror(errno));
}

void Client::open(Connection& connection) {
    connection.client = this;
    connection.fd = connect_to(o);
    nghttp2_session_callbacks* callbacks = nullptr;
    nghttp2_session_callbacks_new(&callbacks);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, &Callbacks::header);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, &Callbacks::data);
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, &Callbacks::frame);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, &Callbacks::close);
    nghttp2_option* option = nullptr;
    nghttp2_option_new(&option);
    nghttp2_option_set_no_closed_streams(option, 1);
    nghttp2_session_client_new2(&connection.session, callbacks, &connection, option);
    nghttp2_option_del(option);
    nghttp2_session_callbacks_del(callbacks);
    const nghttp2_settings_entry settings[] = {{NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, 4 << 20},
                                               {NGHTTP2_SETTINGS_ENABLE_PUSH, 0}};
    nghttp2_submit_settings(connection.session, NGHTTP2_FLAG_NONE, settings, 2);
    nghttp2_session_set_local_window_size(connection.session, NGHTTP2_FLAG_NONE, 0, 1 << 30);
    flush(connection);
    // the server's limits come first
    while (!connection.has_settings) read(connection);
    flush(connection);
    connection.limit = std::min<std::size_t>(
        4096, nghttp2_session_get_remote_settings(connection.session,
                                                  NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS));
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.ptr = &connection;
    epoll_ctl(epoll, EPOLL_CTL_ADD, connection.fd, &event);
}

void Client::flush(Connection& connection) {
    for (;;) {
        if (connection.sent == connection.out.size()) {
            connection.out.clear();
            connection.sent = 0;
            const std::uint8_t* data = nullptr;
            while (connection.out.size() < kUnsentBytes) {
                const ssize_t size = nghttp2_session_mem_send(connection.session, &data);
                if (size < 0) fail("libnghttp2 cannot send");
                if (size == 0) break;
                connection.out.append(reinterpret_cast<const char*>(data),
                                      static_cast<std::size_t>(size));
            }
            if (connection.out.empty()) break;
        }
        const ssize_t size =
            send(connection.fd, connection.out.data() + connection.sent,
                 connection.out.size() - connection.sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (size < 0 && errno == EINTR) continue;
        if (size < 0 && errno == EAGAIN) break;
        if (size < 0)
            fail(std::string("the server has closed a connection: ") + std::strerror(errno));
        connection.sent += static_cast<std::size_t>(size);
    }
    const bool waits = connection.sent < connection.out.size();
    if (waits == connection.waits) return;
    connection.waits = waits;
    epoll_event event{};
    event.events = EPOLLIN | (waits ? static_cast<std::uint32_t>(EPOLLOUT) : 0u);
    event.data.ptr = &connection;
    epoll_ctl(epoll, EPOLL_CTL_MOD, connection.fd, &event);
}

void Client::read(Connection& connection) {
    static std::vector<std::uint8_t> buffer(256 << 10);
    const ssize_t size = recv(connection.fd, buffer.data(), buffer.size(),
                              connection.has_settings ? MSG_DONTWAIT : 0);
    if (size < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (size <= 0) fail("the server has closed a connection");
    received = now();
    if (nghttp2_session_mem_recv(connection.session, buffer.data(),
                                 static_cast<std::size_t>(size)) < 0)
        fail("the server does not speak HTTP/2");
}

nghttp2_nv field(std::string_view name, std::string_view value, std::uint8_t flags = 0) {
    return {reinterpret_cast<std::uint8_t*>(const_cast<char*>(name.data())),
            reinterpret_cast<std::uint8_t*>(const_cast<char*>(value.data())), name.size(),
            value.size(),
            static_cast<std::uint8_t>(NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE |
                                      flags)};
}

void Client::submit(Connection& connection, Ns intended) {
    if (spare.empty()) {
        calls.push_back(std::make_unique<Call>());
        spare.push_back(calls.back().get());
    }
    Call& call = *spare.back();
    spare.pop_back();
    call.intended = intended;
    call.sent = now();
    call.message = numbers % messages.size();
    call.number = ++numbers;
    call.at = 0;
    call.status = -1;
    call.is_http_ok = false;
    call.timeout = 0;
    call.body.clear();
    nghttp2_nv fields[7] = {field(":method", "POST"),
                            field(":scheme", "http"),
                            field(":path", path),
                            field(":authority", "localhost"),
                            field("content-type", "application/grpc"),
                            field("te", "trailers")};
    std::size_t count = 6;
    if (o.timeout_to_us) {
        const auto us = std::uniform_int_distribution<unsigned long>(o.timeout_from_us,
                                                                     o.timeout_to_us)(random);
        call.timeout = static_cast<Ns>(us) * 1000;
        call.timeout_text = std::to_string(us) + "u";
        fields[count++] = field("grpc-timeout", call.timeout_text, NGHTTP2_NV_FLAG_NO_INDEX);
    }
    nghttp2_data_provider provider;
    provider.source.ptr = &call;
    provider.read_callback = &Callbacks::body;
    const std::int32_t stream =
        nghttp2_submit_request(connection.session, nullptr, fields, count, &provider, &call);
    if (stream < 0) fail("no more streams on a connection");
    ++connection.open;
    ++in_flight;
    if (o.cancel_to_us) {
        const auto us =
            std::uniform_int_distribution<unsigned long>(o.cancel_from_us, o.cancel_to_us)(random);
        cancels.push(
            {call.sent + static_cast<Ns>(us) * 1000, &connection, stream, &call, call.number});
    }
    if (intended < measured) return;
    ++sent;
    lag.add(call.sent - intended);
}

void Client::finish(Call& call, std::uint32_t error) {
    --in_flight;
    ++completed;
    int status = call.status;
    if (status < 0 || (status == kOk && error != NGHTTP2_NO_ERROR))
        status = error == NGHTTP2_CANCEL ? 1 : kReset;
    if (status == kOk || (status > 0 && !call.is_http_ok && call.status >= 0)) {
        const Reply reply = parse_reply(call.body, is_batch, o.candidates, o.rows);
        if (!call.is_http_ok || !reply.well_formed) {
            status = kMalformed;
        } else if (o.answers) {
            std::string key(reinterpret_cast<const char*>(&reply.score), sizeof reply.score);
            key += static_cast<char>(reply.choice);
            key.append(reinterpret_cast<const char*>(&call.message), sizeof call.message);
            key += reply.versions;
            ++answers[key];
        }
        if (call.timeout && status == kOk) {
            if (static_cast<Ns>(reply.spent_ns) > call.timeout + kLate) ++late_decided;
            if (received - call.sent > call.timeout + kLate) ++late_answered;
        }
    }
    spare.push_back(&call);
    if (call.intended < measured) return;
    ++by_status[status];
    if (status == kOk && received < end) ++ok_in_time;
    const Ns spent = received - call.intended;
    (status == kOk ? latency : refused).add(spent);
    if (samples) {
        const std::int64_t record[3] = {call.intended - measured, spent, status};
        std::fwrite(record, sizeof record, 1, samples);
    }
    if (!o.series) return;
    const auto place = static_cast<std::size_t>((call.intended - measured) / kWindow);
    if (windows.size() <= place) windows.resize(place + 1);
    if (status == kOk) {
        windows[place].latency.add(spent);
    } else {
        ++windows[place].refused;
    }
}

void Client::send_due(Ns at) {
    if (o.in_flight) {
        for (Connection& connection : connections)
            for (; connection.again; --connection.again)
                if (at < end) submit(connection, at);
        return;
    }
    // who finds no room waits, and its latency goes on
    for (std::size_t full = 0; next <= at && next < end && full < connections.size();) {
        Connection& connection = connections[turn++ % connections.size()];
        const bool has_room = connection.open < connection.limit &&
                              connection.out.size() - connection.sent < kUnsentBytes / 2;
        full = has_room ? 0 : full + 1;
        if (!has_room) continue;
        submit(connection, next);
        next += gap();
    }
}

void Client::cancel_due(Ns at) {
    for (; !cancels.empty() && cancels.top().due <= at; cancels.pop()) {
        const Cancel& cancel = cancels.top();
        if (cancel.call->number != cancel.number) continue;
        if (nghttp2_session_get_stream_user_data(cancel.connection->session, cancel.stream) !=
            cancel.call)
            continue;
        ++out_of_time;
        nghttp2_submit_rst_stream(cancel.connection->session, NGHTTP2_FLAG_NONE, cancel.stream,
                                  NGHTTP2_CANCEL);
    }
}

void Client::wait(Ns at) {
    Ns until = at + kSecond / 20;
    if (o.rate > 0 && next < end) {
        // a call that waits for room is sent once there is some: a reply or a write brings it
        if (next > at) until = std::min(until, next);
    }
    if (!cancels.empty()) until = std::min(until, std::max(at, cancels.top().due));
    if (at < measured) until = std::min(until, measured);
    const Ns left = std::max<Ns>(0, until - spin - at);
    const timespec timeout{left / kSecond, left % kSecond};
    epoll_event events[64];
    const int count = epoll_pwait2(epoll, events, 64, &timeout, nullptr);
    for (int i = 0; i < count; ++i) read(*static_cast<Connection*>(events[i].data.ptr));
}

void Client::run() {
    // the kernel may otherwise wake a sleeper 50 us late
    prctl(PR_SET_TIMERSLACK, 1UL);
    begin = now();
    measured = begin + static_cast<Ns>(o.warm_up * 1e9);
    end = measured + static_cast<Ns>(o.seconds * 1e9);
    const Ns last = end + static_cast<Ns>(o.grace * 1e9);
    next = begin;
    if (o.rate > 0) next += gap();
    for (std::size_t i = 0; i < o.in_flight; ++i) ++connections[i % connections.size()].again;
    bool has_begun = false, has_ended = false;
    for (;;) {
        const Ns at = now();
        if (!has_begun && at >= measured) {
            has_begun = true;
            cpu_before = cpu_s(o.pid);
            completed_before = completed;
        }
        if (!has_ended && at >= end) {
            has_ended = true;
            cpu_after = cpu_s(o.pid);
            completed_after = completed;
        }
        send_due(at);
        cancel_due(at);
        for (Connection& connection : connections) flush(connection);
        if (at >= last || (at >= end && in_flight == 0)) break;
        wait(at);
    }
    for (; o.rate > 0 && next < end; next += gap())
        if (next >= measured) ++by_status[kUnsent];
    by_status[kUnanswered] += in_flight;
    if (samples) std::fclose(samples);
}

}  // namespace

int main(int argc, char** argv) {
    Client client(parse(argc, argv));
    client.run();
    client.print(client.o);
    return 0;
}
