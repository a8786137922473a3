// test_listener [calls per thread]: 300 by default. The listener on real sockets, with threads.
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <set>
#include <thread>

#include "http2_peer.hpp"
#include "listener.hpp"
#include "listener_decide.hpp"
#include "listener_proto.hpp"

using namespace proteus;
using namespace std::chrono_literals;
using fixture::framed;
using fixture::Peer;

namespace {

const fixture::Shape kShape{16, 0, 5, 8};
const std::string kRoute = "/proteus.v1.RouterService/Route";
const std::string kBatch = "/proteus.v1.RouterService/RouteBatch";
const std::string kCheck = "/grpc.health.v1.Health/Check";
const std::string kWatch = "/grpc.health.v1.Health/Watch";
const std::string kEcho = "/proteus.v1.RouterService/Echo";

std::string make_versions(std::int64_t version) {
    std::string out;
    proto::put_text(out, 1, "router-" + std::to_string(version));
    return out;
}

std::shared_ptr<const Served> make_served(std::int64_t version, bool decides = true) {
    std::optional<double> tau_max[2][2] = {{0.9, 0.95}, {std::nullopt, 0.95}};
    return std::make_shared<const Served>(
        fixture::make_snapshot(kShape, static_cast<unsigned>(version + 1), version),
        std::vector<std::string>{"a", "b", "c", "d", "e"}, tau_max, make_versions(version), decides,
        decides);
}

// A listening Unix socket in a folder of its own.
class Place {
  public:
    Place() {
        CHECK(mkdtemp(folder_) != nullptr);
        address_.sun_family = AF_UNIX;
        std::snprintf(address_.sun_path, sizeof address_.sun_path, "%s/s", folder_);
        fd = socket(AF_UNIX, SOCK_STREAM, 0);
        CHECK(bind(fd, reinterpret_cast<sockaddr*>(&address_), sizeof address_) == 0);
        CHECK(listen(fd, 128) == 0);
    }
    ~Place() {
        close(fd);
        unlink(address_.sun_path);
        rmdir(folder_);
    }

    int connect() const {
        const int peer = socket(AF_UNIX, SOCK_STREAM, 0);
        CHECK(::connect(peer, reinterpret_cast<const sockaddr*>(&address_), sizeof address_) == 0);
        return peer;
    }

    int fd;

  private:
    char folder_[32] = "/tmp/proteus-XXXXXX";
    sockaddr_un address_{};
};

// A blocking client.
class Client {
  public:
    explicit Client(const Place& place) : fd_(place.connect()) {}
    ~Client() { close(fd_); }

    void send() {
        const std::string out = peer.outgoing();
        for (std::size_t sent = 0; sent < out.size();) {
            const ssize_t n = ::send(fd_, out.data() + sent, out.size() - sent, MSG_NOSIGNAL);
            if (n < 0) return;
            sent += static_cast<std::size_t>(n);
        }
    }

    // False at the end of the connection.
    bool receive() {
        char buffer[16384];
        const ssize_t n = recv(fd_, buffer, sizeof buffer, 0);
        if (n <= 0) return false;
        peer.incoming({buffer, static_cast<std::size_t>(n)});
        send();
        return true;
    }

    const fixture::Response& await(std::int32_t stream) {
        send();
        while (!peer.responses[stream].is_closed)
            if (!receive()) break;
        return peer.responses[stream];
    }

    Peer peer;

  private:
    const int fd_;
};

std::string route_request(const std::vector<float>& x, double tau) {
    std::string out;
    proto::put_bytes(out, 2, {reinterpret_cast<const char*>(x.data()), x.size() * sizeof(float)});
    proto::put_double(out, 3, tau);
    return framed(out);
}

std::string batch_request(const std::vector<float>& x, std::size_t rows) {
    std::string out;
    proto::put_bytes(out, 2, {reinterpret_cast<const char*>(x.data()), x.size() * sizeof(float)});
    proto::put_uint(out, 3, rows);
    proto::put_double(out, 4, 0.5);
    return framed(out);
}

// The version that a reply names: "router-N".
int version_of(const std::string& body) {
    const auto at = body.find("router-");
    CHECK(at != std::string::npos);
    return body[at + 7] - '0';
}

// A reply's score, by its key of field 4 after the choice and mu.
bool has_score(const std::string& body, float score) {
    std::string field;
    proto::put_float(field, 4, score);
    return body.find(field) != std::string::npos;
}

float expected_score(const Served& served, const std::vector<float>& x, double tau) {
    fixture::Results results(1, kShape.candidates);
    Request request;
    request.x = x.data();
    request.rows = 1;
    request.tau = &tau;
    request.mode = served.snapshot->options.default_mode;
    decide(*served.snapshot, request, results.out());
    return results.score[0];
}

// Threads of clients on threads of the listener while routers are swapped each millisecond: each
// reply's version explains its score.
void stress(int calls) {
    std::vector<std::shared_ptr<const Served>> routers;
    for (int version = 0; version < 4; ++version) routers.push_back(make_served(version));
    const Place place;
    ListenerOptions options;
    options.threads = 2;
    Methods methods{{kEcho, {Method::Kind::kForward, Shape::kUnary, true}}};
    Listener listener({place.fd}, routers[0], methods, options);
    listener.set_health("", 1);
    std::atomic<bool> stop{false};
    const Clock::time_point begin = Clock::now();
    std::size_t swaps = 0;
    std::thread swapper([&] {
        // a sleep that was too long is made up for; whoever drops a copy last destroys it
        for (; !stop; std::this_thread::sleep_until(begin + swaps * 1ms))
            listener.swap(std::make_shared<const Served>(*routers[++swaps % routers.size()]));
    });
    std::thread python([&] {
        while (!stop)
            if (const auto call = listener.take(10ms)) call->reply(call->message);
    });
    std::atomic<std::uint64_t> answered{0};
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 4; ++t)
        threads.emplace_back([&, t] {
            Client client(place);
            for (int i = 0; i < calls; ++i) {
                std::vector<std::vector<float>> rows;
                std::vector<std::int32_t> streams;
                for (unsigned k = 0; k < 4; ++k) {
                    rows.push_back(fixture::random_rows(1, kShape.dim, t * 1000 + i * 7 + k));
                    streams.push_back(client.peer.call(kRoute, route_request(rows[k], 0.5)));
                }
                const auto cancelled = client.peer.call(kRoute, route_request(rows[0], 0.5));
                const auto batch = client.peer.call(
                    kBatch, batch_request(fixture::random_rows(250, kShape.dim, i), 250));
                const auto echo = client.peer.call(kEcho, framed("echo " + std::to_string(i)));
                client.send();
                if (i % 3 == 0) client.peer.cancel(cancelled);
                for (unsigned k = 0; k < 4; ++k) {
                    const auto& reply = client.await(streams[k]);
                    CHECK(reply.status() == 0);
                    const Served& served = *routers[version_of(reply.body)];
                    CHECK(has_score(reply.body, expected_score(served, rows[k], 0.5)));
                    ++answered;
                }
                CHECK(client.await(batch).status() == 0);
                CHECK(client.await(echo).body == framed("echo " + std::to_string(i)));
                client.await(cancelled);
                client.peer.responses.clear();
            }
        });
    for (auto& thread : threads) thread.join();
    const std::chrono::duration<double, std::milli> took = Clock::now() - begin;
    stop = true;
    swapper.join();
    python.join();
    const ListenerStats stats = listener.stats();
    std::uint64_t counted = 0;
    for (const std::string& path : {kRoute, kBatch}) counted += listener.calls().at(path)[0];
    CHECK(counted == stats.decide.calls);
    std::uint64_t timed = 0;
    for (const std::uint64_t count : listener.times().queue) timed += count;
    CHECK(timed == stats.decide.calls);
    listener.drain(1s);
    CHECK(answered == 16ull * static_cast<unsigned>(calls));
    CHECK(stats.decide.rejected == 0 && stats.waiting == 0);
    std::printf("%llu routes, %llu rows in %llu batches, %zu swaps in %.0f ms\n",
                static_cast<unsigned long long>(answered.load()),
                static_cast<unsigned long long>(stats.decide.rows),
                static_cast<unsigned long long>(stats.decide.batches), swaps, took.count());
}

void a_drain_lets_calls_finish_and_refuses_the_rest() {
    const Place place;
    Methods methods{{kEcho, {Method::Kind::kForward, Shape::kUnary, true}}};
    Listener listener({place.fd}, make_served(1), methods, {});
    listener.set_health("", 1);
    Client client(place);
    const auto watch = client.peer.call(kWatch, framed(""));
    const auto unknown = client.peer.call(kCheck, framed("\x0A\x01x"));
    CHECK(client.await(unknown).status() == 5);
    const auto slow = client.peer.call(kEcho, framed("slow"));
    const auto stuck = client.peer.call(kEcho, framed("stuck"));
    CHECK(client.await(client.peer.call(kCheck, framed(""))).body == framed("\x08\x01"));
    const auto first = listener.take(5s);
    const auto second = listener.take(5s);
    CHECK(first && second && listener.stats().waiting == 2);
    listener.set_health("", 2);
    while (client.peer.responses[watch].body != framed("\x08\x01") + framed("\x08\x02"))
        CHECK(client.receive());
    std::thread drain([&] { listener.drain(500ms); });
    while (!client.peer.has_goaway) CHECK(client.receive());
    first->reply("done");
    CHECK(client.await(slow).body == framed("done"));
    CHECK(client.await(stuck).status() == 14 && client.await(watch).status() == 14);
    while (client.receive()) continue;
    drain.join();
    // an answer that comes too late harms nobody
    CHECK(second->reply("late"));
}

void a_burst_is_taken_and_no_standing_queue() {
    const Place place;
    ListenerOptions options;
    options.max_calls = 3;
    options.burst = 2;
    Listener listener({place.fd}, make_served(1), {}, options);
    Client client(place);
    const auto x = fixture::random_rows(1, kShape.dim, 1);
    const auto rejected_after = [&](int calls) {
        std::vector<std::int32_t> streams;
        for (int i = 0; i < calls; ++i)
            streams.push_back(client.peer.call(kRoute, route_request(x, 0.5)));
        for (const auto stream : streams) client.await(stream);
        return listener.stats().decide.rejected;
    };
    CHECK(rejected_after(10) == 1);
    CHECK(rejected_after(10) == 8);
    CHECK(rejected_after(1) == 8);
    CHECK(rejected_after(10) == 15);
    std::this_thread::sleep_for(std::chrono::milliseconds(1100));
    CHECK(rejected_after(1) == 15);
    CHECK(rejected_after(10) == 16);
}

void a_queue_that_was_full_is_kept_short() {
    const Clock::time_point start = Clock::now();
    Shedding shedding;
    CHECK(!shedding.is_on(start));
    shedding.refuse(start);
    CHECK(shedding.is_on(start + 99ms) && !shedding.is_on(start + 101ms));
    // refusals go on
    int tried = 0;
    for (auto at = start; at < start + 12s; at += 50ms) {
        tried += !shedding.is_on(at);
        shedding.refuse(at);
    }
    CHECK(tried == 3);
    CHECK(!shedding.is_on(start + 12s + 100ms));
    shedding.refuse(start + 13s);
    for (auto at = start + 13s; at < start + 14s; at += 50ms) shedding.refuse(at);
    CHECK(!shedding.is_on(start + 14s));

    RowCost cost;
    CHECK(cost.rows_in(1us) > 1'000'000);
    cost.add(100us, 10);
    CHECK(cost.rows_in(300us) == 30 && cost.rows_in(1us) == 1);
    // a stop of the process
    cost.add(1s, 10);
    CHECK(cost.rows_in(300us) >= 26);
    for (int i = 0; i < 100; ++i) cost.add(20us, 1);
    CHECK(cost.rows_in(300us) <= 16);
}

void what_is_over_the_limits_is_refused() {
    const Place place;
    ListenerOptions options;
    options.max_calls = 3;
    options.burst = 0;
    options.max_forwarded = 2;
    options.connections = 2;
    Methods methods{{kEcho, {Method::Kind::kForward}}};
    Listener listener({place.fd}, make_served(1), methods, options);
    Client client(place);
    std::set<int> codes;
    std::vector<std::int32_t> streams;
    const auto x = fixture::random_rows(1, kShape.dim, 1);
    for (int i = 0; i < 10; ++i) streams.push_back(client.peer.call(kRoute, route_request(x, 0.5)));
    for (const auto stream : streams) codes.insert(client.await(stream).status());
    CHECK((codes == std::set<int>{0, 8}));
    CHECK(listener.stats().decide.rejected == 7);
    streams.clear();
    for (int i = 0; i < 3; ++i) streams.push_back(client.peer.call(kEcho, framed("x")));
    CHECK(client.await(streams[2]).status() == 8);
    const auto late = client.peer.call(kRoute, route_request(x, 0.5), {{"grpc-timeout", "0n"}});
    CHECK(client.await(late).status() == 4);
    // a cancelled call is not given to Python
    client.peer.cancel(streams[0]);
    client.send();
    while (listener.take(10ms)) continue;
    Client second(place);
    const auto ok = second.peer.call(kRoute, route_request(x, 0.5));
    CHECK(second.await(ok).status() == 0);
    Client third(place);
    third.send();
    CHECK(!third.receive());
    while (listener.stats().refused_connections == 0) std::this_thread::sleep_for(1ms);
}

void threads_share_connections() {
    const Place place;
    ListenerOptions options;
    options.threads = 3;
    options.connections = 2;
    Listener listener({place.fd}, make_served(1), {}, options);
    std::vector<std::unique_ptr<Client>> clients;
    const auto x = fixture::random_rows(1, kShape.dim, 1);
    for (int i = 0; i < 6; ++i) {
        clients.push_back(std::make_unique<Client>(place));
        Client& client = *clients.back();
        CHECK(client.await(client.peer.call(kRoute, route_request(x, 0.5))).status() == 0);
    }
    CHECK(listener.stats().refused_connections == 0);
    Client seventh(place);
    seventh.send();
    CHECK(!seventh.receive());
    clients.pop_back();
    while (listener.stats().connections == 6) std::this_thread::sleep_for(1ms);
    Client next(place);
    CHECK(next.await(next.peer.call(kRoute, route_request(x, 0.5))).status() == 0);
}

void old_idle_and_silent_connections_end() {
    const Place place;
    ListenerOptions options;
    options.handshake = options.idle = 100ms;
    const auto x = fixture::random_rows(1, kShape.dim, 1);
    {
        Listener listener({place.fd}, make_served(1), {}, options);
        const int silent = place.connect();
        Client idle(place);
        CHECK(idle.await(idle.peer.call(kRoute, route_request(x, 0.5))).status() == 0);
        while (idle.receive()) continue;
        CHECK(idle.peer.has_goaway && idle.peer.goaway == 0);
        char byte;
        while (recv(silent, &byte, 1, 0) == 1) continue;
        close(silent);
    }
    {
        // bytes without a call are no use of a connection
        Listener listener({place.fd}, make_served(1), {}, options);
        Client dripping(place);
        dripping.send();
        while (!dripping.peer.has_goaway) {
            dripping.peer.ping();
            dripping.send();
            CHECK(dripping.receive());
        }
    }
    {
        options.idle = 1h;
        options.connections = 2;
        options.replaceable = 50ms;
        Listener listener({place.fd}, make_served(1), {{kEcho, {Method::Kind::kForward}}}, options);
        Client busy(place), unused(place);
        busy.peer.call(kEcho, framed("stuck"));
        busy.send();
        CHECK(unused.await(unused.peer.call(kRoute, route_request(x, 0.5))).status() == 0);
        std::this_thread::sleep_for(100ms);
        Client next(place);
        CHECK(next.await(next.peer.call(kRoute, route_request(x, 0.5))).status() == 0);
        while (unused.receive()) continue;
        CHECK(unused.peer.has_goaway && listener.stats().refused_connections == 0);
        CHECK(listener.take(5s));
    }
    options.age = 100ms;
    options.age_grace = 700ms;
    Listener listener({place.fd}, make_served(1), {{kEcho, {Method::Kind::kForward}}}, options);
    Client old(place);
    const auto done = old.peer.call(kEcho, framed("done"));
    const auto stuck = old.peer.call(kEcho, framed("stuck"));
    old.send();
    while (!old.peer.has_goaway) CHECK(old.receive());
    const auto call = listener.take(5s);
    CHECK(call && call->reply(call->message) && listener.take(5s));
    CHECK(old.await(done).status() == 0 && old.await(stuck).status() == 14);
    while (old.receive()) continue;
}

void a_batch_keeps_nobody_waiting() {
    const Place place;
    Listener listener({place.fd}, make_served(1), {}, {});
    Client bulk(place);
    std::string request;
    for (int i = 0; i < 2000; ++i) proto::put_text(request, 1, std::string(3000, 'x'));
    proto::put_double(request, 4, 0.5);
    const auto large = bulk.peer.call(kBatch, framed(request));
    std::thread waiting([&] { CHECK(bulk.await(large).status() == 0); });
    Client client(place);
    const auto x = fixture::random_rows(1, kShape.dim, 1);
    int before = 0;
    while (listener.stats().waiting == 0) std::this_thread::sleep_for(1ms);
    while (listener.stats().waiting != 0 && before < 20) {
        CHECK(client.await(client.peer.call(kRoute, route_request(x, 0.5))).status() == 0);
        ++before;
    }
    // many calls of others are answered while the batch is at work
    CHECK(before > 5);
    waiting.join();
}

}  // namespace

int main(int argc, char** argv) {
    stress(argc > 1 ? std::atoi(argv[1]) : 300);
    a_drain_lets_calls_finish_and_refuses_the_rest();
    a_burst_is_taken_and_no_standing_queue();
    a_queue_that_was_full_is_kept_short();
    what_is_over_the_limits_is_refused();
    threads_share_connections();
    old_idle_and_silent_connections_end();
    a_batch_keeps_nobody_waiting();
}
