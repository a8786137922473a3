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
    rapid_resets_end_the_connection();
    a_flood_of_pings_ends_the_connection();
    going_away_lets_calls_finish();
    new_calls_are_refused_while_draining();
    no_preface_no_connection();
}
