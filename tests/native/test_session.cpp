// One connection fed bytes without a socket: what is answered, what is refused, what is bounded.
#include <algorithm>

#include "http2_peer.hpp"
#include "listener_session.hpp"

using namespace proteus;
using namespace std::chrono_literals;
using fixture::framed;
using fixture::Peer;

namespace {

const std::string kEcho = "/echo";
const std::string kStream = "/stream";

Methods echo_methods() {
    return {{kEcho, {Method::Kind::kForward, Shape::kUnary, true}},
            {kStream, {Method::Kind::kForward, Shape::kStream}}};
}

// Keeps the calls that arrive until the test answers them.
class TestHost final : public Host {
  public:
    explicit TestHost(Limits limits = {}) : Host(limits, echo_methods()) { now = Clock::now(); }

    void arrived(Call& call) override {
        messages.emplace_back(call.message);
        auto held = std::make_unique<Call*>(&call);
        call.slot = held.get();
        calls.push_back(std::move(held));
    }
    void touched(Session&) override {}
    bool draining() const override { return is_draining; }

    std::size_t waiting() const {
        return static_cast<std::size_t>(
            std::count_if(calls.begin(), calls.end(), [](const auto& held) { return *held; }));
    }

    // Answers what waits with its own message.
    void echo() {
        for (std::size_t i = 0; i < calls.size(); ++i) {
            if (!*calls[i]) continue;
            Call& call = **calls[i];
            const std::string message = messages[i];
            call.leave();
            call.session->reply(call, true, [&](std::string& out) { out += message; });
        }
    }

    std::vector<std::unique_ptr<Call*>> calls;
    std::vector<std::string> messages;
    bool is_draining = false;
};

struct Pair {
    explicit Pair(Limits limits = {}, std::int32_t window = 0)
        : host(limits), peer(window), session(host) {}

    // Lets bytes go to and fro until both are silent; false where the session gave up.
    bool exchange(std::size_t slice = 1 << 20) {
        for (;;) {
            const std::string request = peer.outgoing();
            for (std::size_t i = 0; i < request.size(); i += slice) {
                const std::string part = request.substr(i, slice);
                if (!session.receive(reinterpret_cast<const std::uint8_t*>(part.data()),
                                     part.size()))
                    return false;
            }
            std::string reply;
            if (!session.produce(reply, std::size_t{64} << 20)) return false;
            peer.incoming(reply);
            if (request.empty() && reply.empty()) return true;
        }
    }

    const fixture::Response& of(std::int32_t stream) { return peer.responses[stream]; }

    TestHost host;
    Peer peer;
    Session session;
};

void a_call_is_answered() {
    for (const std::size_t slice : {std::size_t{1}, std::size_t{7}, std::size_t{1} << 20}) {
        Pair pair;
        const auto first = pair.peer.call(kEcho, framed("hello"));
        const auto second = pair.peer.call(kEcho, framed(""));
        CHECK(pair.exchange(slice));
        CHECK(pair.host.waiting() == 2 && pair.session.calls() == 2);
        pair.host.echo();
        CHECK(pair.exchange(slice));
        CHECK(pair.of(first).body == framed("hello") && pair.of(first).status() == 0);
        CHECK(pair.of(first).fields.at(":status") == "200");
        CHECK(pair.of(first).fields.at("content-type") == "application/grpc");
        CHECK(pair.of(second).body == framed("") && pair.of(second).is_closed);
        CHECK(pair.session.calls() == 0 && pair.host.kept_bytes == 0);
    }
}

void a_large_reply_heeds_the_peer_s_window() {
    Pair pair({}, 1000);
    const std::string large(3'000'000, 'x');
    const auto stream = pair.peer.call(kEcho, framed(large));
    CHECK(pair.exchange());
    pair.host.echo();
    CHECK(pair.exchange());
    CHECK(pair.of(stream).body == framed(large) && pair.of(stream).status() == 0);
    CHECK(pair.host.kept_bytes == 0);
}

void a_reply_that_is_not_read_is_given_up() {
    Pair pair({}, 10);
    const auto stream = pair.peer.call(kEcho, framed(std::string(100, 'x')));
    CHECK(pair.exchange());
    pair.host.echo();
    std::string out;
    CHECK(pair.session.produce(out, 1 << 20) && pair.host.kept_bytes == 105);
    pair.host.now += 31s;
    pair.session.sweep();
    CHECK(pair.session.produce(out, 1 << 20));
    CHECK(pair.session.calls() == 0 && pair.host.kept_bytes == 0);
    pair.peer.incoming(out);
    CHECK(pair.of(stream).is_closed && pair.of(stream).error == NGHTTP2_CANCEL);
}

void bad_requests_are_refused() {
    Pair pair;
    Peer& peer = pair.peer;
    const auto unknown = peer.call("/nothing", framed("x"));
    const auto get = peer.call(kEcho, framed("x"), {}, true, "application/grpc", "GET");
    const auto json = peer.call(kEcho, framed("x"), {}, true, "application/json");
    const auto squeezed = peer.call(kEcho, framed("x", 1), {{"grpc-encoding", "gzip"}});
    const auto none = peer.call(kEcho, "");
    const auto part = peer.call(kEcho, framed("whole").substr(0, 8));
    const auto two = peer.call(kEcho, framed("one") + framed("two"));
    const auto large = peer.call(kEcho, std::string("\0\0\x80\0\1", 5) + "x", {}, false);
    const auto late = peer.call(kEcho, "\0", {{"grpc-timeout", "1n"}}, false);
    const auto fat = peer.call(kEcho, framed("x"), {{"padding", std::string(20'000, 'x')}});
    CHECK(pair.exchange());
    CHECK(pair.host.waiting() == 0);
    CHECK(pair.of(unknown).status() == 12 && pair.of(get).fields.at(":status") == "405");
    CHECK(pair.of(json).fields.at(":status") == "415");
    CHECK(pair.of(squeezed).status() == 12);
    CHECK(pair.of(squeezed).fields.at("grpc-accept-encoding") == "identity");
    CHECK(pair.of(none).status() == 3 && pair.of(part).status() == 3 && pair.of(two).status() == 3);
    CHECK(pair.of(large).status() == 8 && pair.of(large).is_closed);
    CHECK(pair.of(fat).status() == 8);
    CHECK(pair.of(late).status() == -1);
    pair.host.now += 1ms;
    pair.session.sweep();
    CHECK(pair.exchange());
    CHECK(pair.of(late).status() == 4 && pair.session.calls() == 0);
}

void a_slow_request_is_given_up() {
    Pair pair;
    const auto stream = pair.peer.call(kEcho, framed("never the whole").substr(0, 9), {}, false);
    CHECK(pair.exchange());
    pair.host.now += 29s;
    pair.session.sweep();
    CHECK(pair.exchange() && pair.of(stream).status() == -1);
    pair.host.now += 2s;
    pair.session.sweep();
    CHECK(pair.exchange() && pair.of(stream).status() == 4 && pair.of(stream).is_closed);
}

void a_slow_message_of_a_stream_is_given_up() {
    Pair pair;
    const auto stream = pair.peer.call(kStream, framed("one"), {}, false);
    CHECK(pair.exchange());
    pair.host.echo();
    CHECK(pair.exchange() && pair.of(stream).body == framed("one"));
    // silence between messages is allowed
    pair.host.now += 100s;
    pair.session.sweep();
    pair.peer.more(stream, framed("two").substr(0, 6), false);
    CHECK(pair.exchange());
    pair.host.now += 29s;
    pair.session.sweep();
    CHECK(pair.exchange() && !pair.of(stream).is_closed);
    pair.host.now += 2s;
    pair.session.sweep();
    CHECK(pair.exchange() && pair.of(stream).status() == 4 && pair.host.expired == 1);
}

void a_cancelled_call_leaves_the_host() {
    Pair pair;
    const auto stream = pair.peer.call(kEcho, framed("x"));
    CHECK(pair.exchange() && pair.host.waiting() == 1);
    pair.peer.cancel(stream);
    CHECK(pair.exchange() && pair.host.waiting() == 0 && pair.session.calls() == 0);
    pair.host.echo();
    CHECK(pair.exchange());
}

void a_stream_answers_message_by_message() {
    Pair pair;
    const auto stream = pair.peer.call(kStream, framed("one") + framed("two"), {}, false);
    CHECK(pair.exchange() && pair.host.waiting() == 1);
    pair.host.echo();
    CHECK(pair.exchange() && pair.of(stream).body == framed("one") + framed("two"));
    pair.peer.more(stream, framed("three"), true);
    CHECK(pair.exchange() && pair.host.waiting() == 1 && !pair.of(stream).is_closed);
    pair.host.echo();
    CHECK(pair.exchange() && pair.of(stream).status() == 0 && pair.of(stream).is_closed);
    CHECK(pair.of(stream).body.ends_with(framed("three")));
    const auto empty = pair.peer.call(kStream, "");
    const auto broken = pair.peer.call(kStream, framed("one") + std::string(1, 0));
    CHECK(pair.exchange() && pair.of(empty).status() == 0);
    pair.host.echo();
    CHECK(pair.exchange());
    CHECK(pair.of(broken).body == framed("one") && pair.of(broken).status() == 3);
}

void what_is_kept_is_bounded() {
    Limits limits;
    limits.connection_bytes = 100'000;
    Pair pair(limits);
    std::vector<std::int32_t> streams;
    for (int i = 0; i < 20; ++i)
        streams.push_back(pair.peer.call(kEcho, framed(std::string(9'000, 'x'))));
    CHECK(pair.exchange());
    CHECK(pair.host.waiting() == 11 && pair.host.kept_bytes <= 110'000);
    CHECK(pair.of(streams.back()).status() == 8);
    pair.host.echo();
    CHECK(pair.exchange() && pair.host.kept_bytes == 0);
    CHECK(pair.of(streams.front()).status() == 0);
}

void small_messages_pass_where_others_take_all() {
    Limits limits;
    limits.total_bytes = 100'000;
    TestHost host(limits);
    Session sessions[2] = {Session(host), Session(host)};
    Peer peers[2];
    const auto send = [&](int i) {
        const std::string bytes = peers[i].outgoing();
        const auto* data = reinterpret_cast<const std::uint8_t*>(bytes.data());
        CHECK(sessions[i].receive(data, bytes.size()));
        std::string reply;
        CHECK(sessions[i].produce(reply, 1 << 20));
        peers[i].incoming(reply);
    };
    const auto part = framed(std::string(8'000'000, 'x')).substr(0, 60'000);
    peers[0].call(kEcho, part, {}, false);
    peers[0].call(kEcho, part, {}, false);
    for (int i = 0; i < 4; ++i) send(0);
    CHECK(host.kept_bytes == 120'000 && host.shed_late == 0);
    const auto small = peers[1].call(kEcho, framed("small"));
    const auto large = peers[1].call(kEcho, framed(std::string(70'000, 'x')));
    for (int i = 0; i < 4; ++i) send(1);
    host.echo();
    for (int i = 0; i < 4; ++i) send(1);
    CHECK(peers[1].responses[small].status() == 0 && peers[1].responses[large].status() == 8);
    CHECK(host.shed_late == 1);
}

void what_is_answered_keeps_no_memory() {
    Pair pair({}, 10);
    const auto stream = pair.peer.call(kEcho, framed(std::string(1 << 20, 'x')));
    CHECK(pair.exchange() && pair.host.waiting() == 1);
    Call& call = **pair.host.calls[0];
    call.leave();
    pair.session.refuse(call, overloaded());
    CHECK(call.in.capacity() < 64 << 10 && pair.host.kept_bytes == 0);
    CHECK(pair.exchange() && pair.of(stream).status() == 8);
}

void refused_streams_end_the_connection() {
    Limits limits;
    limits.streams = 4;
    limits.resets_per_second = 2;
    Pair pair(limits);
    // a peer that has not heard of the limit
    for (int i = 0; i < 80; ++i) pair.peer.call(kEcho, framed("x"), {}, false);
    const std::string bytes = pair.peer.outgoing();
    pair.session.receive(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
    std::string out;
    pair.session.produce(out, 1 << 20);
    CHECK(pair.session.finished() && out.size() < 2000);
}

void a_peer_that_does_not_read_fills_the_queue() {
    Limits limits;
    limits.streams = 4;
    limits.resets_per_second = 1e6;
    Pair pair(limits);
    std::string bytes = pair.peer.outgoing();
    // requests of three indexed fields
    for (std::uint32_t stream = 1; stream < 10'000; stream += 2) {
        const char id[] = {0, 0, static_cast<char>(stream >> 8), static_cast<char>(stream)};
        bytes += std::string("\0\0\3\1\5", 5) + std::string(id, 4) + "\x83\x84\x86";
    }
    CHECK(pair.session.receive(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()));
    CHECK(pair.session.is_full());
    std::string out;
    CHECK(pair.session.produce(out, 1 << 20) && !pair.session.is_full());
}

void rapid_resets_end_the_connection() {
    Pair pair;
    int opened = 0;
    for (; opened < 10'000 && !pair.peer.has_goaway; ++opened) {
        pair.peer.cancel(pair.peer.call(kEcho, framed("x")));
        // the request goes out before the reset
        pair.exchange();
        const auto stream = pair.peer.call(kEcho, framed("x"));
        if (!pair.exchange()) break;
        pair.peer.cancel(stream);
        pair.exchange();
    }
    CHECK(pair.peer.has_goaway && opened < 1100);
    CHECK(pair.session.finished());
}

void a_flood_of_pings_ends_the_connection() {
    Pair pair;
    for (int i = 0; i < 20'000 && !pair.peer.has_goaway; ++i) {
        pair.peer.ping();
        pair.exchange();
    }
    CHECK(pair.peer.goaway == NGHTTP2_ENHANCE_YOUR_CALM && pair.peer.pongs >= 9'000);
}

void going_away_lets_calls_finish() {
    Pair pair;
    const auto stream = pair.peer.call(kEcho, framed("x"));
    CHECK(pair.exchange());
    pair.session.go_away();
    CHECK(pair.exchange() && pair.peer.has_goaway && pair.peer.goaway == 0);
    CHECK(!pair.session.finished());
    pair.host.echo();
    CHECK(pair.exchange() && pair.of(stream).status() == 0 && pair.session.finished());
}

void new_calls_are_refused_while_draining() {
    Pair pair;
    pair.host.is_draining = true;
    const auto refused = pair.peer.call(kEcho, framed("x"));
    const auto taken = pair.peer.call(kStream, framed("x"));
    CHECK(pair.exchange() && pair.of(refused).status() == 14 && pair.host.waiting() == 1);
    pair.session.refuse_all(unavailable());
    CHECK(pair.exchange() && pair.of(taken).status() == 14 && pair.host.waiting() == 0);
}

void no_preface_no_connection() {
    TestHost host;
    Session session(host);
    const std::string text = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    CHECK(!session.receive(reinterpret_cast<const std::uint8_t*>(text.data()), text.size()));
    CHECK(!session.has_begun());
}

}  // namespace

int main() {
    a_call_is_answered();
    a_large_reply_heeds_the_peer_s_window();
    a_reply_that_is_not_read_is_given_up();
    bad_requests_are_refused();
    a_slow_request_is_given_up();
    a_cancelled_call_leaves_the_host();
    a_stream_answers_message_by_message();
    what_is_kept_is_bounded();
    a_slow_message_of_a_stream_is_given_up();
    small_messages_pass_where_others_take_all();
    what_is_answered_keeps_no_memory();
    refused_streams_end_the_connection();
    a_peer_that_does_not_read_fills_the_queue();
    rapid_resets_end_the_connection();
    a_flood_of_pings_ends_the_connection();
    going_away_lets_calls_finish();
    new_calls_are_refused_while_draining();
    no_preface_no_connection();
}
